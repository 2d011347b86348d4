"""The compiled CPU kernels (`native/`): loading the library, its functions, and why it is missing.

The library, `_native.so` in this folder, is built when the package is installed (setup.py). It has a C interface and
does not use torch; the `cpu_*.py` files pass it pointers to memory whose size they have checked.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from ctypes import POINTER
from functools import cache
from pathlib import Path
from typing import Any, cast

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
ISA_VARIABLE = "GPTQ_BELLE_CPU_ISA"  # one of ISAS to use instead of the fastest
LIBRARY_VARIABLE = "GPTQ_BELLE_CPU_LIBRARY"  # path of the library to use instead of `_native.so` in this folder
NOT_BUILT = ("the native CPU kernels are not built: there was no C++17 compiler when the package was installed "
             "(install one, then the package again)")
ADDRESS, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class NativeLibrary:
    """The loaded library.

    Attributes:
        usable_isas: the instruction sets that work on this machine, the fastest first.
        isa: the one that is used unless a call names another.
    """

    def __init__(self, path: Path) -> None:
        """Load the library; raises OSError with the reason if the file cannot be used."""
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
        self.usable_isas = tuple(name for name in FASTEST_FIRST if self._c.belle_usable(ISAS.index(name)))
        wanted = os.environ.get(ISA_VARIABLE, self.usable_isas[0])
        if wanted not in self.usable_isas:
            raise OSError(f"{ISA_VARIABLE}={wanted} cannot be used here: choose one of {', '.join(self.usable_isas)}")
        self.isa = wanted
        self._c.belle_use_openmp.argtypes = [ctypes.c_void_p]
        self._c.belle_use_openmp(_openmp_entry())

    def isa_index(self, isa: str | None) -> int:
        """The library's number for an instruction set; None means `self.isa`.

        Raises:
            ValueError: it is not one of `usable_isas`.
        """
        if isa is not None and isa not in self.usable_isas:
            raise ValueError(f"instruction set {isa!r} is not one of {', '.join(self.usable_isas)}")
        return ISAS.index(isa or self.isa)

    def _check_struct_sizes(self, path: Path) -> None:
        """Raise OSError if a struct of the library and its mirror in `native_structs.py` differ in size."""
        size_of = self._function("struct_size", SIZE, INT)
        for index, struct in enumerate(STRUCTS):
            if (size := size_of(index)) != ctypes.sizeof(struct):
                raise OSError(f"{path.name} was built from other sources ({struct.__name__} takes {size} bytes there, "
                              f"{ctypes.sizeof(struct)} here): install again")
        if size_of(len(STRUCTS)) != -1:
            raise OSError(f"{path.name} was built from other sources (it has more structs): install again")

    def _function(self, name: str, result: type | None, *arguments: Any) -> Callable[..., Any]:
        """A function of the library; for most, the last two arguments are threads and the instruction set."""
        function = getattr(self._c, f"belle_{name}")
        function.argtypes, function.restype = arguments, result
        return cast(Callable[..., Any], function)


def require_library() -> NativeLibrary:
    """The library; raises RuntimeError with the reason if there is none."""
    library = load_library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def data_pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's data, for a field that may be null."""
    return None if tensor is None else tensor.data_ptr()


@cache
def load_library() -> NativeLibrary | str:
    """The library, or the reason why there is none."""
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
    """Address of GOMP_parallel in the OpenMP runtime of torch, so that our work runs on the same threads.

    Two runtimes side by side are slow: the threads of one spin at its barrier while those of the other have work.
    None if torch has no OpenMP or the system does not list loaded libraries; then every call starts threads.
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
