"""Run the programs of every launch in Triton's interpreter in a random order instead of the order of the grid."""

from types import TracebackType
from typing import Any

import torch
from triton.runtime import interpreter


class Shuffled:
    """A context in which the interpreter runs programs in an order that depends on a seed.

    A kernel whose last program finishes the work of others must give the same result in every order.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.builder: Any = interpreter.interpreter_builder
        self.order: list[int] = []

    def __enter__(self) -> None:
        in_order = type(self.builder).set_grid_idx

        def set_grid_idx(x: int, y: int, z: int) -> None:
            size_x, size_y, size_z = self.builder.grid_dim
            number = (x * size_y + y) * size_z + z
            if number == 0:
                self.order = torch.randperm(size_x * size_y * size_z, generator=self.generator).tolist()
            rest, new_z = divmod(self.order[number], size_z)
            in_order(self.builder, *divmod(rest, size_y), new_z)

        self.builder.set_grid_idx = set_grid_idx

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        del self.builder.set_grid_idx
