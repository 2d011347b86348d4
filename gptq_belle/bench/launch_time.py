"""The time that one launch of a decode step should take on a GPU: calculated, not measured.

A launch takes what comes between two kernels, and then as long as the slowest of three: reading weights or cache from
memory, moving them and x from the L2 cache to the multiprocessors, and issuing instructions. Assumptions, besides those
about the GPU (`Gpu`):

* The multiprocessor with most programs decides; where programs do not all run at once, LOST_SHARE of the last wave is
  lost.
* Reading slows down where the bytes in flight are fewer than bandwidth times latency.
* A kernel can use ISSUE_SHARE of the issue slots, and each warp one in four of its scheduler.
* The last program of a split tile, or of a slot's pieces, takes SPLIT_END longer.
* Instructions per number are those of the compiled loops (`benchmarks/aot.py --jobs decode`).
"""

from math import ceil
from typing import NamedTuple

from gptq_belle.bench.gpus import Gpu
from gptq_belle.kernels.triton_config import (
    MatmulProblem,
    TileConfig,
    launch_plan,
    programs_per_multiprocessor,
    row_bucket,
    shared_memory,
    skinny_tile,
)
from gptq_belle.kernels.triton_layout import block_inputs
from gptq_belle.models.dimensions import Dimensions, LinearShape
from gptq_belle.models.sizes import GROUP_SIZE, UNPACKED, MemorySettings, cache_bytes, matrix_bytes

SPLIT_END = 1.2e-6  # s: fence, ticket, sums of the others, epilogue
STATE = 4e-7  # s: tokens, lengths and slots, which are read before the embedding or the cache
ISSUE_SHARE = 0.75
LOST_SHARE = 0.15
SCHEDULERS, WARP = 4, 32
MAX_HEAD_ROWS = 32  # rows of a program of the lm_head
# Per weight and thread of the products' loops, by rows of a tile, and per number of a cache: the largest of sm_80 to
# sm_90, compiled by Triton 3.9.
INSTRUCTIONS = {8: 2.06, 16: 2.3, 32: 2.8, 64: 4.4}
CACHE_INSTRUCTIONS = {"float16": 2.2, "float32": 2.2, "int8": 4.3}
# Of the decode attention (kernels/triton_attention.py): positions of a program and of an iteration, warps, iterations
# that are loaded ahead, and bytes of shared memory besides those.
PIECE, STEP, WARPS, AHEAD, OTHER_SHARED = 128, 64, 2, 2, 6144


class Work(NamedTuple):
    """What all programs of a launch do."""

    bytes: float  # read from memory
    l2_bytes: float  # read from the L2 cache
    instructions: float  # of all warps
    programs: int
    resident: int  # programs that run on a multiprocessor at a time
    warps: int  # of a program
    in_flight: float  # bytes that a program requests ahead


def work_seconds(gpu: Gpu, work: Work) -> float:
    """Time of a launch after its start."""
    share = work.programs / gpu.processors
    together = min(share, float(work.resident))
    unevenness = 1.0
    if share > 1:
        unevenness = ceil(share) / share if share <= work.resident else 1 + LOST_SHARE * work.resident / share
    slowdown = max(1.0, gpu.copy_bandwidth / gpu.processors * gpu.latency / (together * work.in_flight))
    slots = min(ISSUE_SHARE, together * work.warps / SCHEDULERS**2) * SCHEDULERS * gpu.processors * gpu.clock
    return max(work.bytes / gpu.copy_bandwidth * slowdown, work.l2_bytes / gpu.l2_bandwidth,
               work.instructions / slots) * unevenness


def product_seconds(gpu: Gpu, shape: LinearShape, bits: int, run: int, rows: int) -> float:
    """Time of a packed product, with the tile and split of K that the kernels' rule chooses; without its start.

    Args:
        bits: of a code in memory, 4 or 8.
        run: inputs that share a scale.
        rows: at most MAX_SKINNY_ROWS.
    """
    block = block_inputs(bits, run)
    problem = MatmulProblem(row_bucket(rows), shape.out_features, ceil(shape.in_features / block) * block, bits, run,
                            "float16")
    config = launch_plan(problem, gpu.capability, gpu.processors).config
    assert config is not None  # up to MAX_SKINNY_ROWS rows the kernel for few rows is planned
    return tile_seconds(gpu, problem, config, rows)


def tile_seconds(gpu: Gpu, problem: MatmulProblem, config: TileConfig, rows: int) -> float:
    """Time of a product by the kernel for few rows."""
    weights, row_tiles = problem.inputs * problem.outputs, ceil(rows / config.BM)
    column_tiles, size = ceil(problem.outputs / config.BN), weights * (problem.bits / 8 + 2 / problem.run)
    l2_bytes = row_tiles * size + 2 * column_tiles * rows * problem.inputs
    split = 0.0
    if config.SPLIT_K > 1:
        split = SPLIT_END + 8 * config.SPLIT_K * rows * problem.outputs / gpu.l2_bandwidth
    return split + work_seconds(gpu, Work(
        size, l2_bytes, weights * row_tiles * INSTRUCTIONS[config.BM] / WARP, column_tiles * row_tiles * config.SPLIT_K,
        programs_per_multiprocessor("skinny", config, problem, gpu.capability), config.num_warps,
        (config.num_stages - 1) * config.K_WARPS * config.BN * 128 * problem.bits / 8))


def head_seconds(gpu: Gpu, shape: LinearShape, bits: int, rows: int) -> float:
    """Time of the lm_head without its start; a dense one is read at the speed of a copy."""
    if bits == UNPACKED:
        return weight_bytes(shape, bits, GROUP_SIZE) / gpu.copy_bandwidth
    problem = MatmulProblem(min(row_bucket(rows), MAX_HEAD_ROWS), shape.out_features, shape.in_features, bits,
                            GROUP_SIZE, "float16")
    return tile_seconds(gpu, problem, skinny_tile(problem, gpu.capability), rows)


def attention_seconds(gpu: Gpu, d: Dimensions, cache: str, rows: int, length: int) -> float:
    """Time of the attention of one block without its start, with `length` tokens in the cache of each row."""
    read = cache_bytes(d, cache, length, rows) / d.num_layers
    pieces, numbers = ceil(length / PIECE), 2 * d.num_kv_heads * d.head_dim * length * rows
    ahead = AHEAD * STEP * read / (rows * d.num_kv_heads * length)
    resident = shared_memory(gpu.capability) // (int(ahead) + OTHER_SHARED)
    work = Work(read, read, numbers * CACHE_INSTRUCTIONS[cache] / WARP, rows * d.num_kv_heads * pieces,
                max(1, resident), WARPS, ahead)
    return STATE + work_seconds(gpu, work) + (SPLIT_END if pieces > 1 else 0.0)


def weight_bytes(shape: LinearShape, bits: int, group_size: int) -> int:
    """Bytes of a matrix in GPU memory."""
    return matrix_bytes(shape, bits, MemorySettings(bits=bits, group_size=group_size, device="cuda"))
