"""The compiled CPU kernels (`native/`): finding and loading them, what they can use here, and why they are missing.

The library is built when the package is installed (setup.py) and lies beside this file. It has a plain C interface and
knows nothing of torch; `cpu.py` passes it pointers that it has checked.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

ABI = 8  # of native/native.h
ISAS = ("portable", "avx2", "avx-vnni", "avx512", "avx512-vnni", "amx")  # in the order of native/cpu_features.h
FASTEST = ("amx", "avx512-vnni", "avx512", "avx-vnni", "avx2", "portable")
CHOICE = "GPTQ_BELLE_CPU_ISA"  # an environment variable: one of ISAS, instead of the fastest
PLACE = "GPTQ_BELLE_CPU_LIBRARY"  # an environment variable: the library's file, instead of the one beside this
MISSING = ("the native CPU kernels are not built: there was no C++17 compiler when the package was installed "
           "(install one, then the package again)")


class WeightStruct(ctypes.Structure):
    """`BelleWeight` of native.h."""

    _fields_ = [("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
                ("order", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("inputs", ctypes.c_int64),
                ("outputs", ctypes.c_int64), ("groups", ctypes.c_int64), ("run", ctypes.c_int32),
                ("bits", ctypes.c_int32), ("half_scales", ctypes.c_int32), ("zero", ctypes.c_int32)]


class WordsStruct(ctypes.Structure):
    """`BelleWords` of native.h."""

    _fields_ = [("words", ctypes.c_void_p), ("order", ctypes.c_void_p), ("inputs", ctypes.c_int64),
                ("outputs", ctypes.c_int64), ("groups", ctypes.c_int64), ("bits", ctypes.c_int32),
                ("run", ctypes.c_int32), ("container", ctypes.c_int32)]


class RowsStruct(ctypes.Structure):
    """`BelleRows` of native.h."""

    _fields_ = [("matrix", ctypes.c_void_p), ("count", ctypes.c_int64), ("groups", ctypes.c_int64),
                ("run", ctypes.c_int32), ("bits", ctypes.c_int32)]


class RoundingStruct(ctypes.Structure):
    """`BelleRounding` of native.h."""

    _fields_ = [("matrix", ctypes.c_void_p), ("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p),
                ("clips", ctypes.c_void_p), ("count", ctypes.c_int64), ("inputs", ctypes.c_int64),
                ("clip_count", ctypes.c_int64), ("run", ctypes.c_int32), ("bits", ctypes.c_int32),
                ("kind", ctypes.c_int32)]


class AttentionStruct(ctypes.Structure):
    """`BelleAttention` of native.h."""

    _fields_ = [("query", ctypes.c_void_p), ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p),
                ("key_scales", ctypes.c_void_p), ("value_scales", ctypes.c_void_p), ("slots", ctypes.c_void_p),
                ("lengths", ctypes.c_void_p), ("slopes", ctypes.c_void_p), ("out", ctypes.c_void_p),
                ("rows", ctypes.c_int64), ("heads", ctypes.c_int64), ("kv_heads", ctypes.c_int64),
                ("head_dim", ctypes.c_int64), ("capacity", ctypes.c_int64), ("slot_count", ctypes.c_int64),
                ("query_row", ctypes.c_int64), ("query_head", ctypes.c_int64), ("scale", ctypes.c_float),
                ("kind", ctypes.c_int32)]


class GptqBlockStruct(ctypes.Structure):
    """`BelleGptqBlock` of native.h."""

    _fields_ = [("weights", ctypes.c_void_p), ("factor", ctypes.c_void_p), ("codes", ctypes.c_void_p),
                ("errors", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
                ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64), ("factor_step", ctypes.c_int64),
                ("factor_input", ctypes.c_int64), ("own", ctypes.c_int64), ("group", ctypes.c_int32),
                ("levels", ctypes.c_int32), ("symmetric", ctypes.c_int32)]


class DescentStruct(ctypes.Structure):
    """`BelleDescent` of native.h."""

    _fields_ = [("codes", ctypes.c_void_p), ("residual", ctypes.c_void_p), ("scale", ctypes.c_void_p),
                ("zero", ctypes.c_void_p), ("hessian", ctypes.c_void_p), ("diagonal", ctypes.c_void_p),
                ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64), ("stride", ctypes.c_int64),
                ("levels", ctypes.c_int32)]


class SearchStruct(ctypes.Structure):
    """`BelleSearch` of native.h."""

    _fields_ = [("weights", ctypes.c_void_p), ("importance", ctypes.c_void_p), ("scales", ctypes.c_void_p),
                ("zeros", ctypes.c_void_p), ("best", ctypes.c_void_p), ("inputs", ctypes.c_int64),
                ("outputs", ctypes.c_int64), ("candidates", ctypes.c_int64), ("smallest", ctypes.c_float),
                ("levels", ctypes.c_int32)]


class Library:
    """The loaded library, with the instruction set that it is to use."""

    def __init__(self, path: Path) -> None:
        """Load; OSError where the file cannot be used, its message says why."""
        self._c = ctypes.CDLL(str(path))
        abi = self._c.belle_abi()
        if abi != ABI:
            raise OSError(f"{path.name} was built from other sources (interface {abi}, not {ABI}): install again")
        self.matmul = self._c.belle_matmul
        self.matmul.argtypes = [ctypes.POINTER(WeightStruct), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int,
                                ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self.pack = self._c.belle_pack
        self.pack.argtypes = [ctypes.POINTER(WordsStruct), ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self.pack.restype = None
        self.pack_rows = self._c.belle_pack_rows
        self.pack_rows.argtypes = [ctypes.POINTER(RowsStruct), ctypes.c_void_p, ctypes.c_int]
        self.pack_rows.restype = None
        self.round_rows = self._c.belle_round_rows
        self.round_rows.argtypes = [ctypes.POINTER(RoundingStruct), ctypes.c_int, ctypes.c_int]
        self.read = self._c.belle_read
        self.read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        self.read.restype = ctypes.c_uint32
        self.attend = self._c.belle_attend
        self.attend.argtypes = [ctypes.POINTER(AttentionStruct), ctypes.c_int, ctypes.c_int]
        self.rms_norm = self._c.belle_rms_norm
        self.rms_norm.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
                                  ctypes.c_float, ctypes.c_int]
        self.rms_norm.restype = None
        self.gptq_block = self._solver("gptq_block", GptqBlockStruct)
        self.descend = self._solver("descend", DescentStruct)
        self.search = self._solver("search", SearchStruct)
        self.usable = tuple(name for name in FASTEST if self._c.belle_usable(ISAS.index(name)))
        wanted = os.environ.get(CHOICE, self.usable[0])
        if wanted not in self.usable:
            raise OSError(f"{CHOICE}={wanted} cannot be used here: choose one of {', '.join(self.usable)}")
        self.isa = wanted
        self._c.belle_use_openmp.argtypes = [ctypes.c_void_p]
        self._c.belle_use_openmp(_openmp_entry())

    def _solver(self, name: str, struct: type[ctypes.Structure]) -> Callable[[ctypes.Structure, int, int], None]:
        """A function of solver.cpp: it takes its struct, threads and the instruction set's number."""
        function = getattr(self._c, f"belle_{name}")
        function.argtypes = [ctypes.POINTER(struct), ctypes.c_int, ctypes.c_int]
        function.restype = None
        return cast(Callable[[ctypes.Structure, int, int], None], function)


@cache
def library() -> Library | str:
    """The library, or why there is none."""
    if sys.byteorder != "little":
        return "the native CPU kernels are for little-endian processors"
    elsewhere = os.environ.get(PLACE)
    built = [Path(elsewhere)] if elsewhere else sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        return MISSING
    try:
        return Library(built[-1])
    except (OSError, AttributeError) as error:
        return f"the native CPU kernels cannot be used: {error}"


def _openmp_entry() -> int | None:
    """GOMP_parallel of the OpenMP runtime that torch computes with, so that our work runs on the same threads.

    Two runtimes side by side are slow: the threads of one spin at its barrier while those of the other have work.
    None (threads started for each call) where torch has no OpenMP, or the system does not tell what is loaded.
    """
    import torch  # noqa: F401  (loads its runtime)

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
