"""Launches of Triton kernels as values, which can be compiled before they are made."""

from typing import Any, NamedTuple

from torch import Tensor


class Launch(NamedTuple):
    """A kernel with everything that it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors and numbers, by name, in the order of the kernel
    constants: dict[str, Any]  # constexpr arguments and options of the compiler

    def __call__(self) -> None:
        """Launch the kernel."""
        self.kernel[self.grid](**self.arguments, **self.constants)


class Workspace(NamedTuple):
    """Memory that launches which follow one another on a stream share."""

    sums: Tensor  # 1-D float32, contents undefined between launches
    tickets: Tensor  # 1-D int32, all 0 between launches
