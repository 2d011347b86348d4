"""The time that a decode step should take on a GPU: a model computed from config.json, not a measurement.

A step is 5 launches per block (qkv, attention, out, up, down) and 2 more (embedding, lm_head), replayed as a CUDA
graph. They follow one another, so their times add up. A measured step that takes longer has a cause that the model does
not know. The assumptions are those of bench/gpus.py and bench/launch_time.py; `assumptions` lists them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from gptq_belle.bench.gpus import Gpu
from gptq_belle.bench.launch_time import (
    CACHE_INSTRUCTIONS,
    INSTRUCTIONS,
    ISSUE_SHARE,
    LOST_SHARE,
    SPLIT_END,
    STATE,
    attention_seconds,
    head_seconds,
    product_seconds,
    weight_bytes,
)
from gptq_belle.errors import UsageError
from gptq_belle.kernels.triton_config import MAX_SKINNY_ROWS
from gptq_belle.kernels.triton_layout import CONTAINERS
from gptq_belle.models.dimensions import Dimensions, LinearShape
from gptq_belle.models.sizes import GROUP_SIZE, UNPACKED, MemorySettings, cache_bytes


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

    def with_dependent_launch(self) -> "StepTime | None":
        """The same step with programmatic dependent launch; None if the GPU does not have it."""
        if self.gpu.dependent_launch is None:
            return None
        saved = self.gpu.launch - self.gpu.dependent_launch
        return replace(self, parts=tuple(part._replace(seconds=part.seconds - saved) for part in self.parts))


def has_step_time(settings: MemorySettings, rows: int) -> bool:
    """Whether the model covers a case: packed linears, and rows that one tile of the products holds."""
    return settings.bits != UNPACKED and rows <= MAX_SKINNY_ROWS


def step_time(d: Dimensions, settings: MemorySettings, gpu: Gpu, rows: int, length: int) -> StepTime:
    """Calculate the time of a decode step without programmatic dependent launch.

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
    run, head = block_run(settings.group_size), LinearShape(d.hidden_size, d.vocab_size)
    cache = cache_bytes(d, settings.cache, length, rows) // d.num_layers
    parts = [Part("embedding", 1, STATE, 0)]
    for name, shape in fused_linears(d).items():
        seconds = product_seconds(gpu, shape, CONTAINERS[settings.bits], run, rows)
        parts.append(Part(name, d.num_layers, seconds, weight_bytes(shape, settings.bits, settings.group_size)))
    parts.insert(2, Part("attention", d.num_layers, attention_seconds(gpu, d, settings.cache, rows, length), cache))
    seconds = head_seconds(gpu, head, settings.head_bits, rows)
    parts.append(Part("lm_head", 1, seconds, weight_bytes(head, settings.head_bits, GROUP_SIZE)))
    return StepTime(gpu, rows, tuple(part._replace(seconds=gpu.launch + part.seconds) for part in parts))


def assumptions(gpu: Gpu) -> dict[str, float | None]:
    """What the model assumes about a GPU and about all kernels, by name; times in seconds."""
    return {
        "multiprocessors": gpu.processors, "clock_Hz": gpu.clock, "bandwidth_Bps": gpu.bandwidth,
        "copy_share": gpu.copy_share, "latency": gpu.latency, "l2_bandwidth_Bps": gpu.l2_bandwidth,
        "launch": gpu.launch, "dependent_launch": gpu.dependent_launch, "split_end": SPLIT_END, "state": STATE,
        "issue_share": ISSUE_SHARE, "lost_share": LOST_SHARE,
        **{f"instructions_per_weight_{rows}_rows": count for rows, count in INSTRUCTIONS.items()},
        **{f"instructions_per_{kind}_in_cache": count for kind, count in CACHE_INSTRUCTIONS.items()}}


def fused_linears(d: Dimensions) -> dict[str, LinearShape]:
    """The products of a block, one per launch: query, key and value in one, gate and up in one."""
    shapes = list(d.arch.shapes.values())
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
