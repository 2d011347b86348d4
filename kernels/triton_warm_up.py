"""Compile Triton kernels before their first launch, several at a time and without data.

`warm_up` does it for all products with the weights of a model, `compile_launches` for any launches.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .triton_config import ROW_BUCKETS, row_bucket
from .triton_launch import Launch
from .triton_layout import COLUMNS, SlicedWeight
from .triton_matmul import arrange_launch, dequant_launch, plan_for, problem_of, product_launches

Progress = Callable[[int, int], None]  # numbers of finished kernels and of all
# In these versions ast.parse, with which Triton reads a kernel, fails with SystemError if a garbage collection inside
# it lets another thread parse (CPython's issue gh-106905).
PARSER_NEEDS_NO_COLLECTION = sys.version_info < (3, 11, 8) or (3, 12) <= sys.version_info < (3, 12, 2)


class Product(NamedTuple):
    """Products with one weight, of 1 to `rows` rows."""

    weight: SlicedWeight
    bias: Tensor | None
    rows: int


def warm_up(products: Iterable[Product], dtype: torch.dtype, progress: Progress | None = None,
            others: Iterable[Launch] = ()) -> None:
    """Compile the kernels of products; see `compile_launches`. Layers of the same shape and format share them.

    Args:
        products: whose weights are on one device.
        dtype: of the activations.
        progress: called for every finished kernel.
        others: launches whose kernels are compiled as well.
    """
    different = {}
    for weight, bias, rows in products:
        bias_dtype = None if bias is None else bias.dtype
        for most in ROW_BUCKETS[: ROW_BUCKETS.index(row_bucket(rows)) + 1]:
            key = (problem_of(weight, most, dtype), weight.in_features, weight.order is None, weight.zero,
                   weight.scales.dtype, bias_dtype)
            different[key] = Product(weight, bias, most)
    if different:
        launches = (launch for product in different.values() for launch in _launches(product, dtype))
        compile_launches(chain(launches, others), next(iter(different.values())).weight.words.device, progress)


def _launches(product: Product, dtype: torch.dtype) -> list[Launch]:
    """The launches of the plan for `rows` rows, on one row: no kernel is compiled for a number of rows."""
    weight, bias, rows = product
    kernel, config = plan_for(weight, rows, dtype)
    x = torch.empty(1, weight.places, dtype=dtype, device=weight.words.device)
    arranged = [] if weight.order is None else [arrange_launch(x[:, : weight.in_features], weight, x)]
    if config is None:
        return [*arranged, dequant_launch(weight, 0, x.new_empty(COLUMNS, weight.places))]
    return [*arranged, *product_launches(x, weight, bias, x.new_empty(1, weight.out_features), kernel, config)]


def compile_launches(launches: Iterable[Launch], device: torch.device, progress: Progress | None = None) -> None:
    """Compile the kernels of launches and load them to a device, in as many threads as there are cores.

    Kernels that were compiled before take microseconds. Triton releases Python's lock in LLVM and ptxas only: on two
    cores, 6 kernels took 2.5 s together and 3.2 one after another.

    Raises:
        Exception: errors of Triton and ptxas propagate.
    """
    import triton

    with (torch.cuda.device(device), _safe_parser(), ThreadPoolExecutor(os.cpu_count()) as threads,
          triton.AsyncCompileMode(threads)):
        started = [launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.constants)
                   for launch in launches]
        different = {id(kernel): kernel for kernel in started}.values()  # launches with the same code share it
        for done, kernel in enumerate(different, 1):
            if isinstance(kernel, triton.FutureKernel):
                kernel = kernel.result()
            getattr(kernel, "run", None)  # this property builds the launcher and loads the machine code
            if progress is not None:
                progress(done, len(different))


@contextmanager
def _safe_parser() -> Iterator[None]:
    """A context in which several threads can call ast.parse: see PARSER_NEEDS_NO_COLLECTION."""
    pause = PARSER_NEEDS_NO_COLLECTION and gc.isenabled()
    if pause:
        gc.disable()
    try:
        yield
    finally:
        if pause:
            gc.enable()
