"""The structs of native/native.h, field by field; raise `library.ABI` with them. `library.py` compares their sizes."""

import ctypes


class WeightStruct(ctypes.Structure):
    """`BelleWeight` of native.h."""

    _fields_ = [("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
                ("order", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("inputs", ctypes.c_int64),
                ("outputs", ctypes.c_int64), ("groups", ctypes.c_int64), ("run", ctypes.c_int32),
                ("bits", ctypes.c_int32), ("half_scales", ctypes.c_int32), ("zero", ctypes.c_int32)]


class PackedWordsStruct(ctypes.Structure):
    """`BelleWords` of native.h."""

    _fields_ = [("words", ctypes.c_void_p), ("order", ctypes.c_void_p), ("inputs", ctypes.c_int64),
                ("outputs", ctypes.c_int64), ("groups", ctypes.c_int64), ("bits", ctypes.c_int32),
                ("run", ctypes.c_int32), ("container", ctypes.c_int32)]


class CodeRowsStruct(ctypes.Structure):
    """`BelleRows` of native.h."""

    _fields_ = [("matrix", ctypes.c_void_p), ("count", ctypes.c_int64), ("groups", ctypes.c_int64),
                ("run", ctypes.c_int32), ("bits", ctypes.c_int32)]


class RowQuantizationStruct(ctypes.Structure):
    """`BelleRounding` of native.h."""

    _fields_ = [("matrix", ctypes.c_void_p), ("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p),
                ("clips", ctypes.c_void_p), ("count", ctypes.c_int64), ("inputs", ctypes.c_int64),
                ("clip_count", ctypes.c_int64), ("run", ctypes.c_int32), ("bits", ctypes.c_int32),
                ("kind", ctypes.c_int32)]


class NewTokensStruct(ctypes.Structure):
    """`BelleNew` of native.h."""

    _fields_ = [("numbers", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64)]


class KvCacheStruct(ctypes.Structure):
    """`BelleCache` of native.h."""

    _fields_ = [("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("key_scales", ctypes.c_void_p),
                ("value_scales", ctypes.c_void_p), ("slots", ctypes.c_int64), ("kv_heads", ctypes.c_int64),
                ("capacity", ctypes.c_int64), ("head_dim", ctypes.c_int64), ("kind", ctypes.c_int32)]


class DecodeStepStruct(ctypes.Structure):
    """`BelleStep` of native.h."""

    _fields_ = [("slots", ctypes.c_void_p), ("lengths", ctypes.c_void_p), ("cosines", ctypes.c_void_p),
                ("sines", ctypes.c_void_p), ("slopes", ctypes.c_void_p), ("rows", ctypes.c_int64)]


class AttentionStruct(ctypes.Structure):
    """`BelleAttention` of native.h."""

    _fields_ = [("cache", ctypes.POINTER(KvCacheStruct)), ("step", ctypes.POINTER(DecodeStepStruct)),
                ("query", NewTokensStruct), ("key", NewTokensStruct), ("value", NewTokensStruct),
                ("out", ctypes.c_void_p), ("heads", ctypes.c_int64)]


class CallStruct(ctypes.Structure):
    """`BelleCall` of native.h."""

    _fields_ = [("kind", ctypes.c_int32), ("parts", ctypes.c_int32), ("subject", ctypes.c_void_p),
                ("x", ctypes.c_void_p), ("plus", ctypes.c_void_p), ("out", ctypes.c_void_p), ("rows", ctypes.c_int64),
                ("width", ctypes.c_int64), ("eps", ctypes.c_float)]


class GptqBlockStruct(ctypes.Structure):
    """`BelleGptqBlock` of native.h."""

    _fields_ = [("weights", ctypes.c_void_p), ("factor", ctypes.c_void_p), ("codes", ctypes.c_void_p),
                ("errors", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
                ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64), ("factor_step", ctypes.c_int64),
                ("factor_input", ctypes.c_int64), ("own", ctypes.c_int64), ("group", ctypes.c_int32),
                ("levels", ctypes.c_int32), ("symmetric", ctypes.c_int32)]


class CoordinateDescentStruct(ctypes.Structure):
    """`BelleDescent` of native.h."""

    _fields_ = [("codes", ctypes.c_void_p), ("residual", ctypes.c_void_p), ("scale", ctypes.c_void_p),
                ("zero", ctypes.c_void_p), ("hessian", ctypes.c_void_p), ("diagonal", ctypes.c_void_p),
                ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64), ("stride", ctypes.c_int64),
                ("levels", ctypes.c_int32)]


class GridSearchStruct(ctypes.Structure):
    """`BelleSearch` of native.h."""

    _fields_ = [("weights", ctypes.c_void_p), ("importance", ctypes.c_void_p), ("scales", ctypes.c_void_p),
                ("zeros", ctypes.c_void_p), ("best", ctypes.c_void_p), ("inputs", ctypes.c_int64),
                ("outputs", ctypes.c_int64), ("candidates", ctypes.c_int64), ("smallest", ctypes.c_float),
                ("levels", ctypes.c_int32)]


STRUCTS: tuple[type[ctypes.Structure], ...] = (  # in the order of `belle_struct_size` in native/matmul.cpp
    WeightStruct, PackedWordsStruct, CodeRowsStruct, RowQuantizationStruct, NewTokensStruct, KvCacheStruct,
    DecodeStepStruct, AttentionStruct, CallStruct, GptqBlockStruct, CoordinateDescentStruct, GridSearchStruct)
