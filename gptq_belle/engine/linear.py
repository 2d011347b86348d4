"""Linear layers on packed or dense weights: callables for the decoders, and `QuantLinear` for transformers."""

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
from gptq_belle.kernels.triton_layout import GATES, SlicedWeight, gate_order

MAX_SINGLE_ROWS = 64  # see DenseLinear


class PackedLinear:
    """x (..., K) times a packed weight, plus bias and optional `residual` (..., N): (..., N)."""

    def __init__(self, weight: PreparedWeight, bias: Tensor | None) -> None:
        self.weight, self.bias, self._product = weight, bias, bind_weight(weight, bias)
        self.native = isinstance(weight, CpuWeight)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._product(x, residual)


@dataclass(slots=True)
class DenseLinear:
    """x (M, K) times a dense weight (N, K), plus bias and optional residual: (M, N).

    On a CPU, up to MAX_SINGLE_ROWS rows are multiplied one by one: BLAS rounds differently for different numbers of
    rows, and a row in a batch must get the same bits as alone. Packed weights do not need this.
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
    """Several linears with the same input; their outputs are concatenated."""

    parts: list[PackedLinear | DenseLinear]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], -1)
        return y if residual is None else y.add_(residual)


LinearOperator = PackedLinear | DenseLinear | ConcatenatedLinear


def packed_linears(operator: LinearOperator) -> list[PackedLinear]:
    """The products with packed weights of an operator."""
    parts = operator.parts if isinstance(operator, ConcatenatedLinear) else [operator]
    return [part for part in parts if isinstance(part, PackedLinear)]


def interleave_gates(operator: LinearOperator) -> tuple[LinearOperator, bool]:
    """Interleave the outputs (gates | values) of an operator as the Triton kernels do, if its layout allows it.

    Returns:
        the operator, and whether its outputs are interleaved; `silu_and_mul_interleaved` takes them.
    """
    if not isinstance(operator, PackedLinear) or not isinstance(operator.weight, SlicedWeight):
        return operator, False
    outputs, bias = operator.weight.out_features, operator.bias
    if outputs % (2 * GATES):
        return operator, False
    weight = triton_layout.interleave_gates(operator.weight)
    return PackedLinear(weight, None if bias is None else bias[gate_order(outputs, bias.device)]), True


def silu_and_mul_interleaved(x: Tensor) -> Tensor:
    """silu(gate) * value (M, N / 2) of interleaved outputs (M, N): GATES gates, their values, the next gates."""
    gates, values = x.view(len(x), -1, 2, GATES).unbind(2)
    return F.silu(gates).mul_(values).flatten(1)


class QuantLinear(nn.Linear):
    """Linear layer on a packed weight: x (..., in_features) to (..., out_features), in the dtype of x.

    It is a subclass of `nn.Linear` because peft selects layers by that class. Gradients pass through to x. Its `weight`
    is a `WeightProxy` without values; `qweight` contains the codes in the layout of the kernel.

    Every tensor of the prepared weight is a buffer with the name of its field. The state dict contains the tensors of
    the GPTQ format, which are rebuilt if the kernel's layout differs. Moving the module moves the buffers; a cast
    changes only the bias.

    Args:
        prepared: weight from `kernels.dispatch.prepare_weight`.
        bias: (out_features,) of any floating-point dtype, or None.
    """

    bias: Tensor | None  # type: ignore[assignment]  # a buffer here

    def __init__(self, prepared: PreparedWeight, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a weight
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
        """The weight for `kernels.dispatch.quant_matmul`, from the current buffers."""
        tensors = {name: value for name, value in self._buffers.items() if name != "bias"}
        return self._layout(**tensors, **self._numbers)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return quant_matmul(x, self.prepared, self.bias)

    @property
    def weight(self) -> "WeightProxy":  # type: ignore[override]
        """Proxy with shape, dtype and device of the weight."""
        return WeightProxy(self.out_features, self.in_features, self.qweight.device)

    def __getattr__(self, name: str) -> Any:
        if name == "qweight" and self._buffers:  # other layouts name it differently, but all have the codes first
            return next(iter(self._buffers.values()))
        return super().__getattr__(name)

    def reset_parameters(self) -> None:
        """Do nothing: the weight was loaded, not initialized."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._layout.__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.device != tensor.device and self._layout is not CanonicalWeight:
                raise UsageError(f"the weights of this model are packed for {tensor.device} and cannot be moved",
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
    """Proxy of a packed weight that has shape (out_features, in_features), dtype float32 and device, but no values.

    peft uses these to create an adapter. Operations that need values (merging an adapter, DoRA) raise UsageError:
    with a dequantized copy, their changes would be lost without a message.
    """

    def __new__(cls, outputs: int, inputs: int, device: torch.device) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls, (outputs, inputs), dtype=torch.float32, device=device)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise UsageError(f"{func} needs the values of a packed weight, which cannot be read or changed in place",
                         "To merge an adapter into the model, quantize its source with --lora.")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightProxy({self.shape[0]}, {self.shape[1]}, device={str(self.device)!r})"


def packed_tensors(weight: CpuWeight | SlicedWeight) -> dict[str, Tensor]:
    """Rebuild qweight, qzeros, scales and g_idx of the GPTQ format from a kernel's layout."""
    unpacked = (cpu_layout.unpack_weight(weight) if isinstance(weight, CpuWeight)
                else triton_layout.unpack_weight(weight))
    codes, zeros, scales = unpacked
    bits, stored_zeros = weight.checkpoint_bits, zeros - weight.zero_offset
    qzeros = pack_rows(stored_zeros.t(), bits).t().contiguous()
    return {"qweight": pack_rows(codes, bits), "qzeros": qzeros, "scales": scales, "g_idx": weight.g_idx}
