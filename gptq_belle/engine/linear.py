"""Linear layers on packed or dense weights: `QuantLinear` for transformers, and the products that the decoders call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptq_belle.errors import UsageError
from gptq_belle.formats.packing import pack_rows
from gptq_belle.kernels import cpu_layout, triton_layout
from gptq_belle.kernels.cpu_layout import CpuWeight
from gptq_belle.kernels.dispatch import PreparedWeight, bind_weight, quant_matmul
from gptq_belle.kernels.layout import CanonicalWeight
from gptq_belle.kernels.triton_layout import SlicedWeight

MAX_SINGLE_ROWS = 64


class PackedLinear:
    """x (..., K) to (..., N) through a packed weight, plus its bias and, where there is one, `residual` (..., N)."""

    def __init__(self, weight: PreparedWeight, bias: Tensor | None) -> None:
        self.weight, self._product = weight, bind_weight(weight, bias)
        self.native = isinstance(weight, CpuWeight)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._product(x, residual)


@dataclass(slots=True)
class DenseLinear:
    """x (M, K) to (M, N) through a weight (N, K).

    On a CPU, up to MAX_SINGLE_ROWS rows are multiplied one by one: a BLAS rounds differently for different numbers of
    rows, and a row of a batch must get the bits it gets alone. Packed weights do not need this.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.is_cpu and 1 < len(x) <= MAX_SINGLE_ROWS:
            y = torch.cat([F.linear(row, self.weight, self.bias) for row in x.split(1)])
        else:
            y = F.linear(x, self.weight, self.bias)
        return y if residual is None else y.add_(residual)


@dataclass(slots=True)
class ConcatenatedLinear:
    """Several products of the same x, their outputs one after another."""

    parts: list[PackedLinear | DenseLinear]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], -1)
        return y if residual is None else y.add_(residual)


LinearOperator = PackedLinear | DenseLinear | ConcatenatedLinear


class QuantLinear(nn.Linear):
    """A linear layer on a packed weight: x (..., in_features) to (..., out_features), in x's dtype.

    It is an `nn.Linear` to those who choose layers by that, as peft does for adapters (gradients pass through to x);
    but its `weight` is a `WeightProxy`. `qweight` is the codes in whatever layout stands in memory.

    Every tensor of the prepared weight is a buffer of its field's name; the state dict is what stands on disk, made
    anew where a layout of the kernels replaced the words. Moving the module moves them; no cast changes them (the bias
    excepted, which is rounded to the activations' dtype at each call anyway).

    Args:
        prepared: from `kernels.dispatch.prepare_tensors`.
        bias: (out_features,) of any floating dtype, or None; added inside.
    """

    bias: Tensor | None  # type: ignore[assignment]  # a buffer here

    def __init__(self, prepared: PreparedWeight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = prepared.in_features, prepared.out_features
        self._layout = type(prepared)
        self._numbers: dict[str, int] = {}
        for name, value in prepared._asdict().items():
            if isinstance(value, int):
                self._numbers[name] = value
            else:
                self.register_buffer(name, value)
        self.register_buffer("bias", bias)

    @property
    def prepared(self) -> PreparedWeight:
        """The weight as the kernels take it, from the buffers as they are now."""
        tensors = {name: value for name, value in self._buffers.items() if name != "bias"}
        return self._layout(**tensors, **self._numbers)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) times the weight, plus the bias: (..., out_features)."""
        return quant_matmul(x, self.prepared, self.bias)

    @property
    def weight(self) -> "WeightProxy":  # type: ignore[override]
        """Shape and device of the weight, and an error for whoever computes with it."""
        return WeightProxy(self.out_features, self.in_features, self.qweight.device)

    def __getattr__(self, name: str) -> Any:
        if name == "qweight" and self._buffers:  # where the layout calls it otherwise; each begins with its codes
            return next(iter(self._buffers.values()))
        return super().__getattr__(name)

    def reset_parameters(self) -> None:
        """Nothing: the weight was read, not drawn."""

    def extra_repr(self) -> str:
        """Sizes and layout, for print(model)."""
        return f"{self.in_features}, {self.out_features}, {self._layout.__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.device != tensor.device and self._layout is not CanonicalWeight:
                raise UsageError(f"this model's weights are laid out for {tensor.device} and cannot move",
                                 f"Load it again with device=\"{moved.device}\".")
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        prepared = self.prepared
        if isinstance(prepared, CanonicalWeight):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        state = packed_tensors(prepared) | ({} if self.bias is None else {"bias": self.bias})
        destination |= {f"{prefix}{name}": tensor for name, tensor in state.items()}


class WeightProxy(Tensor):
    """What a packed weight shows of itself: (out_features, in_features), float32, its device; no values.

    peft looks at it to size and place an adapter. Whatever needs values (to merge an adapter, DoRA) is refused, where
    an expanded copy would be changed and thrown away in silence.
    """

    def __new__(cls, outputs: int, inputs: int, device: torch.device) -> Self:
        """Without memory."""
        made: Self = Tensor._make_wrapper_subclass(
            cls, (outputs, inputs), dtype=torch.float32, device=device)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise UsageError(f"{func} asked for the values of a packed weight, which cannot be read or changed in place",
                         "To merge adapters into a model, give them with --lora when quantizing its source.")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightProxy({self.shape[0]}, {self.shape[1]}, device={str(self.device)!r})"


def packed_tensors(weight: CpuWeight | SlicedWeight) -> dict[str, Tensor]:
    """qweight, qzeros, scales and g_idx of the checkpoint that a weight was made from."""
    unpacked = (cpu_layout.unpack_weight(weight) if isinstance(weight, CpuWeight)
                else triton_layout.unpack_weight(weight))
    codes, zeros, scales = unpacked
    stored, bits = zeros - weight.zero_offset, weight.checkpoint_bits
    return {"qweight": pack_rows(codes, bits), "qzeros": pack_rows(stored.t(), bits).t().contiguous(), "scales": scales,
            "g_idx": weight.g_idx}
