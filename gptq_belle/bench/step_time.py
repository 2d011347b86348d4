"""The time that a decode step should take on a GPU: a model computed from config.json, not a measurement.

A step is 5 launches per block (qkv, attention, out, up, down) and 2 more (embedding, lm_head), replayed as a CUDA
graph, with programmatic dependent launch where the GPU has it. They follow one another, so their times add up. The
assumptions are the constants below and the fields of `Gpu`; a measured step that takes longer has a cause that the
model does not know.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from gptq_belle.bench.gpus import Gpu
from gptq_belle.errors import UsageError
from gptq_belle.kernels.triton_config import (
    MAX_SKINNY_ROWS,
    MatmulProblem,
    TileConfig,
    launch_plan,
    programs_per_multiprocessor,
    row_bucket,
    skinny_tile,
)
from gptq_belle.kernels.triton_layout import CONTAINERS, block_inputs
from gptq_belle.models.dimensions import Dimensions, LinearShape, linear_shapes
from gptq_belle.models.sizes import GROUP_SIZE, UNPACKED, MemorySettings, cache_bytes, matrix_bytes

SPLIT_END = 1.2e-6  # s for the last program of a split tile: fence, ticket, sums of the others, epilogue
ATTENTION, EMBEDDING = 2.5e-6, 2.5e-6  # s besides the bytes of the attention, and for the embedding
ISSUE_SHARE = 0.75  # of the issue slots of a multiprocessor that a kernel can use
LOST_SHARE = 0.15  # of the last wave, where programs do not all run at once
SCHEDULERS, WARP = 4, 32
MAX_HEAD_ROWS = 32  # rows of a program of the lm_head
# Instructions per weight and thread of the products' main loops, by rows of a tile: limits of benchmarks/aot.py; and
# per number of an int8 cache in the decode attention, compiled.
INSTRUCTIONS = {8: 2.06, 16: 2.3, 32: 2.8, 64: 4.4}
INT8_INSTRUCTIONS = 4.3


class Part(NamedTuple):
    """One kind of launch."""

    name: str
    launches: int  # per step
    seconds: float  # of each
    bytes: int  # weights or cache that each reads


@dataclass(frozen=True, slots=True)
class StepTime:
    """The calculated time of one decode step."""

    gpu: Gpu  # the GPU
    rows: int  # sequences, each of which gets one token per step
    parts: tuple[Part, ...]  # launches in the order in which they first run

    @property
    def launches(self) -> int:
        """Launches of a step."""
        return sum(part.launches for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes that a step has to read."""
        return sum(part.launches * part.bytes for part in self.parts)

    @property
    def seconds(self) -> float:
        """Time of a step."""
        return sum(part.launches * part.seconds for part in self.parts)

    @property
    def memory_seconds(self) -> float:
        """The memory limit: the time to read the bytes at the speed of a copy."""
        return self.bytes / self.gpu.copy_bandwidth

    @property
    def tokens_per_second(self) -> float:
        """Calculated tokens per second of all sequences."""
        return self.rows / self.seconds

    @property
    def limit_tokens_per_second(self) -> float:
        """Tokens per second at the memory limit."""
        return self.rows / self.memory_seconds

    @property
    def share(self) -> float:
        """Share of the memory limit that the step reaches."""
        return self.memory_seconds / self.seconds


def has_step_time(settings: MemorySettings, rows: int) -> bool:
    """Whether the model covers a case: packed linears, and rows that one tile of the products holds."""
    return settings.bits != UNPACKED and rows <= MAX_SKINNY_ROWS


def step_time(d: Dimensions, settings: MemorySettings, gpu: Gpu, rows: int, length: int) -> StepTime:
    """Calculate the time of a decode step.

    Args:
        d: sizes of the model.
        settings: bits, group size and cache; its device is ignored.
        rows: sequences.
        length: tokens of each sequence in the cache.
    Raises:
        UsageError: linears that are not packed, or too many rows.
    """
    if not has_step_time(settings, rows):
        raise UsageError(f"the time of a decode step of {rows} sequences at {settings.bits} bits is not modelled",
                         f"Choose 2, 3, 4 or 8 bits and at most {MAX_SKINNY_ROWS} sequences.")
    run = block_run(settings.group_size)
    cache = cache_bytes(d, settings.cache, length, rows) // d.num_layers
    head = LinearShape(d.hidden_size, d.vocab_size)
    parts = [Part("embedding", 1, EMBEDDING, 0)]
    for name, shape in fused_linears(d).items():
        seconds = product_seconds(gpu, shape, CONTAINERS[settings.bits], run, rows)
        parts.append(Part(name, d.num_layers, seconds, weight_bytes(shape, settings.bits, settings.group_size)))
    parts.insert(2, Part("attention", d.num_layers, attention_seconds(gpu, d, settings.cache, rows, length), cache))
    seconds = head_seconds(gpu, head, settings.head_bits, rows)
    parts.append(Part("lm_head", 1, seconds, weight_bytes(head, settings.head_bits, GROUP_SIZE)))
    return StepTime(gpu, rows, tuple(parts))


def fused_linears(d: Dimensions) -> dict[str, LinearShape]:
    """The products of a block, one per launch: query, key and value in one, gate and up in one."""
    shapes = list(linear_shapes(d).values())
    if d.model_type == "bloom":
        return dict(zip(("qkv", "out", "up", "down"), shapes, strict=True))
    query, key, value, out, gate, up, down = shapes
    return {"qkv": _joined((query, key, value)), "out": out, "gate_up": _joined((gate, up)), "down": down}


def _joined(shapes: Iterable[LinearShape]) -> LinearShape:
    shapes = list(shapes)
    return LinearShape(shapes[0].in_features, sum(shape.out_features for shape in shapes))


def block_run(group_size: int) -> int:
    """Inputs that share a scale in the kernels' layout."""
    return next((run for run in (128, 64, 32) if group_size == -1 or group_size % run == 0), 32)


def weight_bytes(shape: LinearShape, bits: int, group_size: int) -> int:
    """Bytes of a matrix in GPU memory."""
    return matrix_bytes(shape, bits, MemorySettings(bits=bits, group_size=group_size, device="cuda"))


def product_seconds(gpu: Gpu, shape: LinearShape, bits: int, run: int, rows: int) -> float:
    """Time of one launch of a packed product, with the tile and split of K that the kernels' rule chooses."""
    block = block_inputs(bits, run)
    problem = MatmulProblem(row_bucket(rows), shape.out_features, ceil(shape.in_features / block) * block, bits, run,
                            "float16")
    config = launch_plan(problem, gpu.capability, gpu.processors).config
    assert config is not None  # up to MAX_SKINNY_ROWS rows the kernel for few rows is planned
    return tile_seconds(gpu, problem, config, rows)


def tile_seconds(gpu: Gpu, problem: MatmulProblem, config: TileConfig, rows: int) -> float:
    """Time of a product by the kernel for few rows: the slower of reading and issuing, and what comes on top.

    The multiprocessor with most programs decides, unless there are more programs than run at a time. Reading slows down
    where the bytes in flight are fewer than bandwidth times latency; issuing where a scheduler has few warps.
    """
    weights = problem.inputs * problem.outputs
    programs = ceil(problem.outputs / config.BN) * ceil(rows / config.BM) * config.SPLIT_K
    resident = programs_per_multiprocessor("skinny", config, problem, gpu.capability)
    share = programs / gpu.processors
    if share <= resident:
        unevenness, together = ceil(share) / share, share
    else:
        unevenness, together = 1 + LOST_SHARE * resident / share, float(resident)
    in_flight = together * (config.num_stages - 1) * config.K_WARPS * config.BN * 128 * problem.bits / 8
    slowdown = max(1.0, gpu.copy_bandwidth / gpu.processors * gpu.latency / in_flight)
    size = weights * (problem.bits / 8 + 2 / problem.run)
    read = size / gpu.copy_bandwidth * slowdown
    slots = min(ISSUE_SHARE, together * config.num_warps / SCHEDULERS**2) * SCHEDULERS * gpu.processors * gpu.clock
    issue = weights * ceil(rows / config.BM) * INSTRUCTIONS[config.BM] / WARP / slots
    split = SPLIT_END + 8 * config.SPLIT_K * rows * problem.outputs / gpu.l2_bandwidth if config.SPLIT_K > 1 else 0.0
    return max(read, issue) * unevenness + split + gpu.launch


def head_seconds(gpu: Gpu, shape: LinearShape, bits: int, rows: int) -> float:
    """Time of the lm_head; a dense one is read at the speed of a copy."""
    if bits == UNPACKED:
        return weight_bytes(shape, bits, GROUP_SIZE) / gpu.copy_bandwidth + gpu.launch
    problem = MatmulProblem(min(row_bucket(rows), MAX_HEAD_ROWS), shape.out_features, shape.in_features, bits,
                            GROUP_SIZE, "float16")
    return tile_seconds(gpu, problem, skinny_tile(problem, gpu.capability), rows)


def attention_seconds(gpu: Gpu, d: Dimensions, cache: str, rows: int, length: int) -> float:
    """Time of the attention of one block."""
    read = cache_bytes(d, cache, length, rows) / d.num_layers / gpu.copy_bandwidth
    numbers = 2 * d.num_kv_heads * d.head_dim * length * rows
    slots = ISSUE_SHARE * SCHEDULERS * gpu.processors * gpu.clock
    unpack = numbers * INT8_INSTRUCTIONS / WARP / slots if cache == "int8" else 0.0
    return ATTENTION + max(read, unpack)
