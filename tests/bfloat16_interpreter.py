"""Arithmetic in bfloat16 for Triton's interpreter, which keeps it as bits and adds, multiplies and casts those."""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def floats(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def teach() -> None:
    """Let the interpreter compute in bfloat16 as a GPU does: in float32, rounded once an operation."""
    binary, dot, cast = InterpreterBuilder.binary_op, InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        return TensorHandle(rounded(op(floats(lhs.data), floats(rhs.data))), tl.bfloat16)

    def create_dot(self, a, b, d, *others):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(floats(handle.data), tl.float32) for handle in (a, b))
        return dot(self, a, b, d, *others)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    InterpreterBuilder.binary_op, InterpreterBuilder.create_dot = binary_op, create_dot
    InterpreterBuilder.cast_impl = cast_impl
    for name, op in (("create_fadd", np.add), ("create_fsub", np.subtract), ("create_fmul", np.multiply)):
        setattr(InterpreterBuilder, name, lambda self, lhs, rhs, op=op: binary_op(self, lhs, rhs, op))
