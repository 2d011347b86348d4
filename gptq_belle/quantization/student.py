"""The quantized model as something to train: all its blocks, codes fixed, behind a frozen embedding."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptq_belle.checkpoint.packing import PackedWeight, QuantizedWeight, unpack
from gptq_belle.checkpoint.tensor_file import TensorFile
from gptq_belle.config import QuantConfig
from gptq_belle.models.quick import quicken
from gptq_belle.models.skeleton import assign, empty_model
from gptq_belle.quantization.stream import BlockStream
from gptq_belle.quantization.tunable import TunableLinear


class Student:
    """Blocks and last norm of a model, in float32; scales, biases and norms are trained.

    Args:
        stream: the source; what the blocks get beside hidden states is the student's too.
        blocks: as transformers has them, packed linears replaced by tunable ones.
        after: what comes behind them, in front of the head.
        parameters: what is trained, by the names of the file, in an order that does not change; scales are (N, G).
    """

    def __init__(self, stream: BlockStream, blocks: Sequence[nn.Module], after: Sequence[nn.Module],
                 parameters: dict[str, nn.Parameter]) -> None:
        self.stream, self.blocks, self.after, self.parameters = stream, blocks, after, parameters

    def run(self, states: Tensor) -> Tensor:
        """States (rows, T, hidden_size) from in front of the first block to behind the last norm.

        What a block computes inside is computed again on the way back: memory holds one block's at a time.
        """
        args, kwargs = self.stream.arguments(states.shape[:2])
        states = states.to(self.stream.device)
        for block in self.blocks:
            output = checkpoint(block, states, *args, use_reentrant=False, **kwargs)
            states = output[0] if isinstance(output, tuple) else output
        for module in self.after:
            states = module(states)
        return states

    def tensors(self) -> dict[str, Tensor]:
        """The parameters as the file holds them: float16, scales (G, N)."""
        return {name: (part.detach().t() if part.ndim == 2 else part.detach()).to("cpu", torch.float16).contiguous()
                for name, part in self.parameters.items()}


def read_student(stream: BlockStream, written: Mapping[str, TensorFile], config: QuantConfig) -> Student:
    """The student of a source whose blocks are quantized.

    Args:
        stream: the source.
        written: by name, the file that holds a tensor of the quantized model.
        config: the job's settings.
    """
    model = empty_model(stream.reader.path)
    quicken(model)
    blocks = list(model.get_submodule(stream.arch.blocks).children())
    after = {root: model.get_submodule(root) for root in stream.arch.after}
    parameters: dict[str, nn.Parameter] = {}
    for root, module in [*((f"{stream.arch.blocks}.{index}", block) for index, block in enumerate(blocks)),
                         *after.items()]:

        parameters |= _fill(stream, root, module, written, config)
    return Student(stream, blocks, list(after.values()), parameters)


def _fill(stream: BlockStream, root: str, module: nn.Module, written: Mapping[str, TensorFile],
          config: QuantConfig) -> dict[str, nn.Parameter]:
    """Read a module's parameters; those that are trained are vectors, and the scales of packed weights."""
    parameters = {}
    for name, _ in list(module.named_parameters()):
        if (full_name := f"{root}.{name}") in written:
            tensor = written[full_name].tensor(full_name).to(stream.device, torch.float32)
            assign(module, name, tensor)
            if tensor.ndim == 1:
                parameters[full_name] = module.get_parameter(name)
                parameters[full_name].requires_grad_()
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and (stem := f"{root}.{name}") + ".qweight" in written:
            weight = _solved(stem, written, config)
            tunable = TunableLinear(QuantizedWeight(*(part.to(stream.device) for part in weight)), linear.bias)
            parameters[f"{stem}.scales"] = tunable.scales
            module.set_submodule(name, tunable)
    return parameters


def _solved(stem: str, written: Mapping[str, TensorFile], config: QuantConfig) -> QuantizedWeight:
    own = config.of(stem)
    assert own is not None
    packed = PackedWeight(*(written[f"{stem}.{part}"].tensor(f"{stem}.{part}") for part in PackedWeight._fields))
    return unpack(packed, own.bits, config.checkpoint_format)
