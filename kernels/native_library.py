"""The compiled CPU kernels (`native/`): finding and loading them, what they can use here, and why they are missing.

The library, `_native.so` beside this file, is built when the package is installed (setup.py). It has a C interface and
does not use torch; the `cpu_*.py` pass it pointers to memory whose size they have checked.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from ctypes import POINTER
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .native_structs import (
    STRUCTS,
    CallStruct,
    CodeRowsStruct,
    CoordinateDescentStruct,
    GptqBlockStruct,
    GridSearchStruct,
    PackedWordsStruct,
    RowQuantizationStruct,
)

ABI = 10  # of native/native.h
ISAS = ("portable", "avx2", "avx-vnni", "avx512", "avx512-vnni", "amx")  # in the order of `InstructionSet` in native.h
FASTEST_FIRST = ("amx", "avx512-vnni", "avx512", "avx-vnni", "avx2", "portable")
# Environment variables.
ISA_VARIABLE = "GPTQ_BELLE_CPU_ISA"  # one of ISAS, instead of the fastest
LIBRARY_VARIABLE = "GPTQ_BELLE_CPU_LIBRARY"  # the path of the library, instead of `_native.so` in this folder
NOT_BUILT = ("the native CPU kernels are not built: there was no C++17 compiler when the package was installed "
               "(install one, then the package again)")
ADDRESS, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class NativeLibrary:
    """The loaded library, with the instruction set that it is to use."""

    def __init__(self, path: Path) -> None:
        """Load; OSError where the file cannot be used, its message says why."""
        self._c = ctypes.CDLL(str(path))
        abi = self._c.belle_abi()
        if abi != ABI:
            raise OSError(f"{path.name} was built from other sources (interface {abi}, not {ABI}): install again")
        self._check_struct_sizes(path)
        self.pack = self._function("pack", None, POINTER(PackedWordsStruct), ADDRESS, INT, INT)
        self.pack_rows = self._function("pack_rows", None, POINTER(CodeRowsStruct), ADDRESS, INT)
        self.round_rows = self._function("round_rows", INT, POINTER(RowQuantizationStruct), INT, INT)
        self.read = self._function("read", ctypes.c_uint32, ADDRESS, SIZE, INT, INT)
        self.run = self._function("run", INT, POINTER(CallStruct), SIZE, INT, INT, POINTER(ctypes.c_double))
        self.gptq_block = self._function("gptq_block", None, POINTER(GptqBlockStruct), INT, INT)
        self.descend = self._function("descend", None, POINTER(CoordinateDescentStruct), INT, INT)
        self.search = self._function("search", None, POINTER(GridSearchStruct), INT, INT)
        self.usable = tuple(name for name in FASTEST_FIRST if self._c.belle_usable(ISAS.index(name)))
        wanted = os.environ.get(ISA_VARIABLE, self.usable[0])
        if wanted not in self.usable:
            raise OSError(f"{ISA_VARIABLE}={wanted} cannot be used here: choose one of {', '.join(self.usable)}")
        self.isa = wanted
        self._c.belle_use_openmp.argtypes = [ctypes.c_void_p]
        self._c.belle_use_openmp(_openmp_entry())

    def number(self, isa: str | None) -> int:
        """What the library calls an instruction set; None means `isa`, the one to use.

        Raises:
            ValueError: it cannot be used here.
        """
        if isa is not None and isa not in self.usable:
            raise ValueError(f"instruction set {isa!r} is not one of {', '.join(self.usable)}")
        return ISAS.index(isa or self.isa)

    def _check_struct_sizes(self, path: Path) -> None:
        """Raise OSError where a struct of the library and its mirror in `structs.py` differ in size."""
        size_of = self._function("struct_size", SIZE, INT)
        for index, struct in enumerate(STRUCTS):
            if (size := size_of(index)) != ctypes.sizeof(struct):
                raise OSError(f"{path.name} was built from other sources ({struct.__name__} takes {size} bytes there, "
                              f"{ctypes.sizeof(struct)} here): install again")
        if size_of(len(STRUCTS)) != -1:
            raise OSError(f"{path.name} was built from other sources (it has more structs): install again")

    def _function(self, name: str, result: type | None, *arguments: Any) -> Callable[..., Any]:
        """A function of the library; the last two numbers of most are threads and the instruction set."""
        function = getattr(self._c, f"belle_{name}")
        function.argtypes, function.restype = arguments, result
        return cast(Callable[..., Any], function)


def require_library() -> NativeLibrary:
    """The library; RuntimeError where there is none."""
    found = load_library()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def data_pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie, for a field that may be null."""
    return None if tensor is None else tensor.data_ptr()


def is_contiguous_float32(tensor: Tensor) -> bool:
    """Whether the library can take a tensor as it lies: contiguous float32 on the CPU, without a gradient."""
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad


def check_tensors(shape: tuple[int | None, ...], *dtypes: torch.dtype, **tensors: Tensor) -> None:
    """Raises ValueError for a tensor, by name, that is not contiguous, on the CPU, of that shape and one of the dtypes
    (float32 where none is named)."""
    dtypes = dtypes or (torch.float32,)
    for name, tensor in tensors.items():
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, not a contiguous "
                             f"{' or '.join(map(str, dtypes))} {tuple(shape)} on the CPU")


@cache
def load_library() -> NativeLibrary | str:
    """The library, or why there is none."""
    if sys.byteorder != "little":
        return "the native CPU kernels are for little-endian processors"
    elsewhere = os.environ.get(LIBRARY_VARIABLE)
    path = Path(elsewhere or Path(__file__).parent / "_native.so")
    if not elsewhere and not path.is_file():
        return NOT_BUILT
    try:
        return NativeLibrary(path)
    except (OSError, AttributeError) as error:
        return f"the native CPU kernels cannot be used: {error}"


def _openmp_entry() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch computes with, so that our work runs on the same threads.

    Two runtimes side by side are slow: the threads of one spin at its barrier while those of the other have work.
    None (threads started for each call) where torch has no OpenMP, or the system does not tell what is loaded.
    """
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in maps if "/lib" in line and line.count(" ") >= 5}
    runtimes = sorted((path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))),
                      key=lambda path: f"{os.sep}torch{os.sep}" not in path)
    for path in runtimes:
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
