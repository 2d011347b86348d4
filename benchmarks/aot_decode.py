"""Compilation of the kernels of a decode step that are not products: attention, embedding, lm_head and sampling."""

from typing import Any, NamedTuple

import triton
from machine_code import Turn

from gptq_belle.kernels import triton_attention, triton_embedding, triton_head, triton_sampling
from gptq_belle.kernels.triton_attention import HeadLayout
from gptq_belle.kernels.triton_attention_kernel import attention_kernel
from gptq_belle.kernels.triton_config import MatmulProblem, TileConfig, skinny_tile
from gptq_belle.kernels.triton_embedding_kernel import embedding_kernel
from gptq_belle.kernels.triton_head_kernel import head_kernel
from gptq_belle.kernels.triton_sampling_kernel import sampling_kernel

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "int8": "*i16"}
WIDTH, VOCABULARY = 4096, 250880  # BELLE-7B
PACKED = {"RUN": 128, "BLOCK": 128}
MIN_PDL = 90  # compute capability that has programmatic dependent launch


class Variant(NamedTuple):
    """A kernel with the types of its arguments, its constants and the options of the compiler."""

    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    arch: int
    options: dict[str, Any]
    turn: Turn | None = None  # None without a main loop


def variant(arch: int, function: Any, types: dict[str, str], constants: dict[str, Any],
            options: dict[str, Any], turn: Turn | None = None) -> Variant:
    """A variant in which all tensors without a type are None."""
    absent = [parameter.name for parameter in function.params
              if parameter.name not in types and parameter.name not in constants]
    return Variant(function, types, constants | dict.fromkeys(absent), arch, options, turn)


def attention(arch: int, head_dim: int, cache: str, position: str, dtype: str = "float16", group: int = 1) -> Variant:
    """The decode attention; `position` is the name of the argument: "rotation" or "slopes"."""
    x = POINTERS[dtype]
    types = {"qkv": x, "keys": POINTERS[cache], "values": POINTERS[cache], "slots": "*i32", "lengths": "*i32",
             position: "*fp32", "out": x, "sums": "*fp32", "tickets": "*i32", "capacity": "i32", "row_size": "i32",
             "out_size": "i32"}
    if cache == "int8":
        types |= {"key_scales": "*fp16", "value_scales": "*fp16"}
    layout = HeadLayout(32, 32 // group, head_dim, False)
    constants = triton_attention.constants(layout) | {"ASM": True, "PDL": arch >= MIN_PDL}
    step, queries, padded = constants["STEP"], constants["QUERIES"], triton.next_power_of_2(head_dim)
    turn = Turn(2 * step * head_dim, 2 * queries * step * padded, triton_attention.COMPILED["num_warps"])
    return variant(arch, attention_kernel, types, constants, triton_attention.COMPILED, turn)


def embedding(arch: int, bits: int, dtype: str = "float16") -> Variant:
    """The lookup of embeddings; packed ones are normalized as BLOOM's are."""
    x = POINTERS[dtype]
    types = {"tokens": "*i32", "words": x if bits == 16 else "*i16", "eps": "fp32", "out": x, "gamma": "*fp32",
             "x": x, "moments": "*fp32", "columns": "i32", "row": "i32"}
    if bits != 16:
        types |= {"scales": "*fp16", "norm_weight": "*fp32", "norm_bias": "*fp32"}
    constants = triton_embedding.DENSE if bits == 16 else {**PACKED, "BITS": bits, "ZERO": 2 ** (bits - 1)}
    return variant(arch, embedding_kernel, types, constants | {
        "WIDTH": WIDTH, "TILE": triton_embedding.TILE, "PDL": arch >= MIN_PDL}, triton_embedding.COMPILED)


def head(arch: int, bits: int, rows: int, is_sampled: bool, dtype: str = "float16") -> Variant:
    """The lm_head after a layer norm (packed) or an RMS norm (dense)."""
    x = POINTERS[dtype]
    types = {"x": x, "words": x if bits == 16 else "*i16", "moments": "*fp32", "eps": "fp32", "logits": "*fp32",
             "tokens": "*i32", "lengths": "*i32", "tickets": "*i32", "best": "*i64", "M": "i32", "N": "i32", "K": "i32"}
    if is_sampled:
        types |= {"temperatures": "*fp32", "penalties": "*fp32", "seen": "*u8", "adjusted": "*fp32",
                  "maxima": "*fp32"}
    if bits == 16:
        tile, options = triton_head.dense_tile(rows), triton_head.DENSE_OPTIONS
    else:
        types |= {"scales": "*fp16", "bias": "*fp32", "gamma_product": "*fp32"}
        config = head_tile(arch, bits, rows, dtype)
        tile = {**PACKED, "BITS": bits, "ZERO": 2 ** (bits - 1), "BM": rows, "BK": config.step(128), "ASM": True}
        options = triton_head.packed_options(config)
    numbers = triton_sampling.TILE * tile["BK"]
    return variant(arch, head_kernel, types, tile | {
        "WIDTH": WIDTH, "MOMENTS_TILE": 64, "BN": triton_sampling.TILE, "PDL": arch >= MIN_PDL}, options,
        Turn(numbers, tile["BM"] * numbers, options["num_warps"]))


def head_tile(arch: int, bits: int, rows: int, dtype: str = "float16") -> TileConfig:
    """The tile of a packed lm_head, which is that of a product without a split of K."""
    return skinny_tile(MatmulProblem(rows, VOCABULARY, WIDTH, bits, 128, dtype), arch)


def sampling(arch: int) -> Variant:
    """The choice among the logits."""
    names = ("temperatures", "top_ps", "min_ps", "numbers", "adjusted", "maxima")
    types = dict.fromkeys(names, "*fp32") | dict.fromkeys(("top_ks", "tokens", "lengths"), "*i32") | {
        "seen": "*u8", "V": "i32", "room": "i32"}
    return variant(arch, sampling_kernel, types,
                   triton_sampling.constants(VOCABULARY) | {"PDL": arch >= MIN_PDL}, triton_sampling.COMPILED)


# Name of a kernel in the record: a function and its arguments.
DECODE_KERNELS: dict[str, tuple[Any, ...]] = {
    **{f"attention-{d}-{cache}-{position}-{group}": (attention, d, cache, position, "float16", group)
       for d, cache, position, group in (
           (128, "float16", "rotation", 1), (128, "float16", "slopes", 1), (128, "int8", "rotation", 1),
           (128, "int8", "slopes", 1), (128, "float16", "rotation", 4), (128, "int8", "rotation", 8),
           (80, "float16", "rotation", 1), (80, "int8", "rotation", 1), (64, "float16", "rotation", 1),
           (64, "int8", "slopes", 1))},
    "attention-bfloat16": (attention, 128, "bfloat16", "rotation", "bfloat16"),
    "attention-int8-bfloat16": (attention, 128, "int8", "rotation", "bfloat16"),
    **{f"embedding-{bits}": (embedding, bits) for bits in (4, 8, 16)},
    **{f"head-{bits}-{rows}-{'sampled' if is_sampled else 'greedy'}": (head, bits, rows, is_sampled)
       for bits in (4, 8, 16) for rows in (8, 16, 32) for is_sampled in (False, True)},
    "head-8-bfloat16": (head, 8, 8, False, "bfloat16"),
    "sampling": (sampling,),
}
# One of each kind of cache, and those with the most registers: the others differ in a type or a size.
VARIED = ("attention-128-float16-rotation-1", "attention-128-int8-rotation-1", "head-8-8-greedy", "head-8-32-sampled",
          "embedding-8", "sampling")
USUAL = ("attention-128-int8-rotation-1", "head-8-8-sampled", "sampling")  # those with the most registers


def decode_kernel(name: str, arch: int) -> Variant:
    """One of DECODE_KERNELS for an architecture."""
    function, *arguments = DECODE_KERNELS[name]
    found: Variant = function(arch, *arguments)
    return found
