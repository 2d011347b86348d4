"""Load the weights of a checkpoint for a decoder: every tensor is read once, directly to its device and layout.

Packed linears with the same input (query, key and value; gate and up) are fused into one matrix if they have the same
bits and groups, so that one kernel call computes all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from gptq_belle.checkpoint.empty_model import wrong_shape
from gptq_belle.checkpoint.packed_reader import read_packed_linear, read_quantization
from gptq_belle.checkpoint.prefetch import BlockPrefetch
from gptq_belle.checkpoint.reader import CheckpointReader
from gptq_belle.engine.linear import ConcatenatedLinear, DenseLinear, LinearOperator, PackedLinear
from gptq_belle.errors import InputError
from gptq_belle.kernels.dispatch import PreparedWeight, prepare_weight
from gptq_belle.kernels.layout import CanonicalWeight, fuse_weights


class WeightLoader:
    """Read tensors and linears of a model directory by name.

    Args:
        reader: the model directory.
        device: device of the weights.
        dtype: dtype of activations and of weights that are not packed.
        precision: "exact" or "fast", see `engine.hf_model.hf_model`.
        head_bits: 16, 8, 4 or None, see `engine.lm_head.embedding_and_head`.
        progress: called with the numbers of loaded blocks and of all.
    Attributes:
        quantization: quantization of the checkpoint; None if it is not quantized.
        nbytes: memory in bytes of all weights loaded so far.
        native: whether activations are float32 and all linears loaded so far run in `kernels.cpu_matmul`.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device, dtype: torch.dtype, precision: str,
                 head_bits: int | None = None,
                 progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.reader, self.device, self.dtype, self.precision = reader, device, dtype, precision
        self.head_bits, self.progress = head_bits, progress
        self.quantization = read_quantization(reader)
        self.nbytes = 0
        self.native = dtype is torch.float32
        self._prefetch: BlockPrefetch | None = None

    def block_names(self, prefix: str, count: int) -> Iterator[str]:
        """Yield prefix.0, prefix.1, ... and prefetch the tensors of the next blocks in the meantime."""
        with closing(BlockPrefetch(self.reader, prefix, count)) as self._prefetch:
            for index in range(count):
                self.progress(index, count)
                yield f"{prefix}.{index}"
        self.progress(count, count)

    def tensor(self, name: str, *shape: int, narrow: bool = False) -> Tensor:
        """Load a floating-point tensor in the dtype of activations.

        Args:
            name: full name.
            shape: expected shape.
            narrow: keep the dtype of the file if it is smaller.
        Raises:
            InputError: see `expect`.
        """
        kind = self.expect(name, *shape)
        dtype = kind if narrow and kind.itemsize < self.dtype.itemsize else self.dtype
        tensor = self._read(name).to(self.device, dtype)
        self.nbytes += tensor.nbytes
        return tensor

    def expect(self, name: str, *shape: int) -> torch.dtype:
        """Check a floating-point tensor by its header and return its dtype.

        Raises:
            InputError: the tensor is missing, has another shape, or is not floating point.
        """
        found, kind = self.reader.shape(name), self.reader.dtype(name)
        if found != shape:
            raise wrong_shape(name, found, shape)
        if not kind.is_floating_point:
            raise InputError(f"{self.reader.path}: tensor {name} is {kind}, not floating point",
                             "Only GPTQ's packed linears and plain floating-point weights can be read.")
        return kind

    def linear(self, names: Sequence[str], inputs: int, outputs: Sequence[int], biased: bool) -> LinearOperator:
        """Load one linear, or several with the same input as one operator that concatenates their outputs.

        Args:
            names: full names of the linears.
            inputs: in_features of each.
            outputs: out_features of each linear, in the order of `names`.
            biased: whether the model has biases. Zero biases that some tools write without need are loaded, too.
        Raises:
            InputError: tensors are missing or inconsistent; the linear is named.
        """
        operator = self._linear(names, inputs, outputs, biased)
        self.native &= isinstance(operator, PackedLinear) and operator.native
        return operator

    def _linear(self, names: Sequence[str], inputs: int, outputs: Sequence[int], biased: bool) -> LinearOperator:
        packed = [self.reader.is_packed(name) for name in names]
        if any(packed) and not all(packed):
            return ConcatenatedLinear([
                self._packed_linear(self.packed_weight(name, inputs, size), self.bias(name, size, biased)) if is_packed
                else DenseLinear(self.tensor(f"{name}.weight", size, inputs), self.bias(name, size, biased))
                for name, size, is_packed in zip(names, outputs, packed, strict=True)])
        biases = [self.bias(name, size, biased) for name, size in zip(names, outputs, strict=True)]
        if not any(packed):
            return DenseLinear(self._concatenated_weight(names, inputs, outputs),
                               self._concatenated_bias(biases, outputs))
        weights = [self.packed_weight(name, inputs, size) for name, size in zip(names, outputs, strict=True)]
        try:
            fused = fuse_weights(weights) if len(weights) > 1 else weights[0]
        except ValueError:  # different bits, groups or formats
            return ConcatenatedLinear([self._packed_linear(weight, bias)
                                       for weight, bias in zip(weights, biases, strict=True)])
        return self._packed_linear(fused, self._concatenated_bias(biases, outputs))

    def _concatenated_weight(self, names: Sequence[str], inputs: int, outputs: Sequence[int]) -> Tensor:
        """Weights of several linears in one matrix (sum of outputs, inputs)."""
        if len(names) == 1:
            return self.tensor(f"{names[0]}.weight", outputs[0], inputs)
        whole = torch.empty(sum(outputs), inputs, device=self.device, dtype=self.dtype)
        for name, part in zip(names, whole.split(list(outputs)), strict=True):
            self.expect(f"{name}.weight", *part.shape)
            part.copy_(self._read(f"{name}.weight"))
        self.nbytes += whole.nbytes
        return whole

    def _concatenated_bias(self, biases: Sequence[Tensor | None], outputs: Sequence[int]) -> Tensor | None:
        if all(bias is None for bias in biases):
            return None
        self.nbytes += sum(size * self.dtype.itemsize for bias, size in zip(biases, outputs, strict=True)
                           if bias is None)
        return torch.cat([torch.zeros(size, device=self.device, dtype=self.dtype) if bias is None else bias
                          for bias, size in zip(biases, outputs, strict=True)])

    def packed_weight(self, name: str, inputs: int, outputs: int) -> CanonicalWeight:
        """Load one packed linear in the layout of the file; raises InputError like `read_packed_linear`."""
        return read_packed_linear(self.reader, self.quantization, name, inputs, outputs, self._read)

    def bias(self, name: str, size: int, needed: bool, *, narrow: bool = False) -> Tensor | None:
        """Load the bias of a linear like `tensor`; None if the model needs none and the file has none."""
        present = needed or f"{name}.bias" in self.reader
        return self.tensor(f"{name}.bias", size, narrow=narrow) if present else None

    def count_bytes(self, weight: PreparedWeight) -> None:
        """Add a weight that is laid out for its kernel to `nbytes`."""
        self.nbytes += sum(value.nbytes for value in weight._asdict().values() if isinstance(value, Tensor))

    def _packed_linear(self, weight: CanonicalWeight, bias: Tensor | None) -> PackedLinear:
        prepared = prepare_weight(weight, device=self.device, dtype=self.dtype, precision=self.precision)
        self.count_bytes(prepared)
        return PackedLinear(prepared, bias)

    def _read(self, name: str) -> Tensor:
        prefetched = None if self._prefetch is None else self._prefetch.take(name)
        return self.reader.tensor(name) if prefetched is None else prefetched
