"""Mirrors of the structs of native/native.h, with the same names and fields.

Raise `native_library.ABI` with every change. `native_library.py` compares the sizes when it loads the library.
"""

import ctypes


class WeightStruct(ctypes.Structure):
    """A weight in the layout of native.h, and the bias of its product."""

    _fields_ = [("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
                ("order", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("inputs", ctypes.c_int64),
                ("outputs", ctypes.c_int64), ("groups", ctypes.c_int64), ("run", ctypes.c_int32),
                ("bits", ctypes.c_int32), ("half_scales", ctypes.c_int32), ("zero", ctypes.c_int32)]


class PackedWordsStruct(ctypes.Structure):
    """A weight in the format of GPTQ files, to be laid out."""

    _fields_ = [("words", ctypes.c_void_p), ("order", ctypes.c_void_p), ("inputs", ctypes.c_int64),
                ("outputs", ctypes.c_int64), ("groups", ctypes.c_int64), ("bits", ctypes.c_int32),
                ("run", ctypes.c_int32), ("container", ctypes.c_int32)]


class CodeRowsStruct(ctypes.Structure):
    """A symmetric matrix (N, K) of codes, one row per output, to be laid out."""

    _fields_ = [("matrix", ctypes.c_void_p), ("count", ctypes.c_int64), ("groups", ctypes.c_int64),
                ("run", ctypes.c_int32), ("bits", ctypes.c_int32)]


class RowQuantizationStruct(ctypes.Structure):
    """A matrix (N, K) of floating-point numbers, to be rounded to codes."""

    _fields_ = [("matrix", ctypes.c_void_p), ("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p),
                ("clips", ctypes.c_void_p), ("count", ctypes.c_int64), ("inputs", ctypes.c_int64),
                ("clip_count", ctypes.c_int64), ("run", ctypes.c_int32), ("bits", ctypes.c_int32),
                ("kind", ctypes.c_int32)]


class NewTokensStruct(ctypes.Structure):
    """Queries, keys or values of new tokens."""

    _fields_ = [("values", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64)]


class KvCacheStruct(ctypes.Structure):
    """Keys and values of one block."""

    _fields_ = [("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("key_scales", ctypes.c_void_p),
                ("value_scales", ctypes.c_void_p), ("slots", ctypes.c_int64), ("kv_heads", ctypes.c_int64),
                ("capacity", ctypes.c_int64), ("head_dim", ctypes.c_int64), ("kind", ctypes.c_int32)]


class DecodeStepStruct(ctypes.Structure):
    """One new token in each of some slots."""

    _fields_ = [("slots", ctypes.c_void_p), ("lengths", ctypes.c_void_p), ("cosines", ctypes.c_void_p),
                ("sines", ctypes.c_void_p), ("slopes", ctypes.c_void_p), ("rows", ctypes.c_int64)]


class AttentionStruct(ctypes.Structure):
    """Attention of one decode step in one block."""

    _fields_ = [("cache", ctypes.POINTER(KvCacheStruct)), ("step", ctypes.POINTER(DecodeStepStruct)),
                ("query", NewTokensStruct), ("key", NewTokensStruct), ("value", NewTokensStruct),
                ("out", ctypes.c_void_p), ("heads", ctypes.c_int64)]


class CallStruct(ctypes.Structure):
    """One call of a kernel."""

    _fields_ = [("kind", ctypes.c_int32), ("parts", ctypes.c_int32), ("operand", ctypes.c_void_p),
                ("x", ctypes.c_void_p), ("addend", ctypes.c_void_p), ("out", ctypes.c_void_p), ("rows", ctypes.c_int64),
                ("width", ctypes.c_int64), ("eps", ctypes.c_float)]


class GptqBlockStruct(ctypes.Structure):
    """GPTQ's loop over a block of inputs."""

    _fields_ = [("weights", ctypes.c_void_p), ("factor", ctypes.c_void_p), ("codes", ctypes.c_void_p),
                ("errors", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
                ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64), ("factor_row_stride", ctypes.c_int64),
                ("factor_column_stride", ctypes.c_int64), ("grid_stride", ctypes.c_int64), ("group", ctypes.c_int32),
                ("levels", ctypes.c_int32), ("symmetric", ctypes.c_int32)]


class CoordinateDescentStruct(ctypes.Structure):
    """One sweep of coordinate descent over inputs of a group."""

    _fields_ = [("codes", ctypes.c_void_p), ("residual", ctypes.c_void_p), ("scale", ctypes.c_void_p),
                ("zero", ctypes.c_void_p), ("hessian", ctypes.c_void_p), ("diagonal", ctypes.c_void_p),
                ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64), ("stride", ctypes.c_int64),
                ("levels", ctypes.c_int32)]


class GridSearchStruct(ctypes.Structure):
    """The search for the best grid of a group."""

    _fields_ = [("weights", ctypes.c_void_p), ("importance", ctypes.c_void_p), ("scales", ctypes.c_void_p),
                ("zeros", ctypes.c_void_p), ("best", ctypes.c_void_p), ("inputs", ctypes.c_int64),
                ("outputs", ctypes.c_int64), ("candidates", ctypes.c_int64), ("smallest", ctypes.c_float),
                ("levels", ctypes.c_int32)]


STRUCTS: tuple[type[ctypes.Structure], ...] = (  # in the order of `belle_struct_size` in native/abi.cpp
    WeightStruct, PackedWordsStruct, CodeRowsStruct, RowQuantizationStruct, NewTokensStruct, KvCacheStruct,
    DecodeStepStruct, AttentionStruct, CallStruct, GptqBlockStruct, CoordinateDescentStruct, GridSearchStruct)
