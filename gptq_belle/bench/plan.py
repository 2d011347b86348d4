"""`plan`: which bits fit into a memory budget, computed from config.json alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from gptq_belle.bench.gpus import Gpu
from gptq_belle.bench.step_time import StepTime, has_step_time, step_time
from gptq_belle.errors import UsageError
from gptq_belle.formats.quantize_config import BITS
from gptq_belle.models.dimensions import Dimensions, dimensions
from gptq_belle.models.sizes import (
    ACTIVATION_BYTES,
    CACHE_ITEM_BYTES,
    GROUP_SIZE,
    UNPACKED,
    MemorySettings,
    MemoryUse,
    memory_use,
)
from gptq_belle.quantization.config import AUTO
from gptq_belle.quantization.group_sizes import fitting_group_sizes

PLANNED_BITS = (UNPACKED, 8, 4)
DEFAULT_CONTEXT = 2048  # if the configuration does not state a limit


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Memory of one choice of settings, compared with the budget.

    Attributes:
        settings: the choice.
        use: its memory with the requested context and batch.
        fits: whether that is within the budget.
        longest_context: the most tokens of context that fit, up to the model's limit; 0 if none do.
        step: calculated time of a decode step with a full context; None without a GPU, or if it is not modelled.
    """

    settings: MemorySettings
    use: MemoryUse
    fits: bool
    longest_context: int
    step: StepTime | None = None


def check_workload(context: int | None, batch: int, cache: str, group_size: int | str) -> None:
    """Check what does not depend on the model.

    Raises:
        UsageError: a number below 1, or an unknown cache.
    """
    group = None if group_size in (-1, AUTO) else group_size
    for name, value in (("context", context), ("batch", batch), ("group size", group)):
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{name} {value} is not allowed", "It must be 1 or more.")
    if cache not in CACHE_ITEM_BYTES:
        raise UsageError(f"cache {cache!r} is not known", f"Choose one of {', '.join(CACHE_ITEM_BYTES)}.")


def plan(config: Mapping[str, Any], memory: int, *, context: int | None = None, batch: int = 1,
         cache: str = "float16", group_size: int | str = GROUP_SIZE, device: str = "cpu",
         bits: Sequence[int] = PLANNED_BITS, head_bits: Sequence[int] = PLANNED_BITS,
         gpu: Gpu | None = None) -> list[PlanRow]:
    """Compare every combination of bits and head bits with a memory budget.

    Args:
        config: config.json. For a quantized model only its own bits and group size are planned.
        memory: budget in bytes.
        context: tokens of prompt and answer; by default the model's limit, or 2,048 if it states none.
        batch: number of sequences answered at a time.
        cache, group_size, device, bits, head_bits: as in `MemorySettings`; group size "auto" is the largest that fits.
        gpu: GPU whose decode speed is calculated.
    Raises:
        InputError: the configuration lacks a value.
        UsageError: a context beyond the model's limit, or an unknown cache or device.
    """
    d = dimensions(config)
    limit = d.context or DEFAULT_CONTEXT
    context = limit if context is None else context
    check_workload(context, batch, cache, group_size)
    if context > limit:
        raise UsageError(f"{batch} x {context} tokens cannot be planned", f"The model takes 1 to {limit} tokens.")
    if device not in ACTIVATION_BYTES:
        raise UsageError(f"device {device!r} is not known", f"Choose one of {', '.join(ACTIVATION_BYTES)}.")
    if isinstance(group_size, str):
        group_size = fitting_group_sizes(shape.in_features for shape in d.arch.shapes.values())[0]
    stated = config.get("quantization_config")
    if isinstance(stated, dict) and stated.get("bits") in BITS:
        bits, group_size = (stated["bits"],), int(stated.get("group_size", group_size))
    rows, native = [], d.arch.family.native
    if not native:  # transformers runs it, which has no packed lm_head
        head_bits = [UNPACKED]
    for settings in (MemorySettings(b, h, group_size, cache, device) for b, h in product(bits, head_bits)):
        use = memory_use(d, settings, context, batch)
        longest = longest_context(d, settings, memory, batch, limit)
        step = step_time(d, settings, gpu, batch, context) if gpu and native and has_step_time(
            settings, batch) else None
        rows.append(PlanRow(settings, use, use.total <= memory, longest, step))
    return rows


def best_fit(rows: Sequence[PlanRow]) -> PlanRow | None:
    """The fitting row with the most bits per weight, then the most head bits; None if nothing fits."""
    fitting = [row for row in rows if row.fits]
    return max(fitting, key=lambda row: (row.settings.bits, row.settings.head_bits), default=None)


def recommendation(rows: Sequence[PlanRow], memory: int) -> str:
    """The recommended setting in one line; if none fits, the closest one."""
    chosen, (unit, name) = best_fit(rows), size_unit(rows)
    if chosen is not None:
        return (f"Fits with {_settings_text(chosen)}: {chosen.use.total / unit:.2f} {name} of {memory / unit:.2f}. "
                "Of what fits, this has the most bits.")
    longest = max(rows, key=lambda row: row.longest_context)
    if longest.longest_context:
        return (f"Does not fit. With {_settings_text(longest)}, {longest.longest_context:,} tokens of context fit: "
                "choose --context.")
    least = min(rows, key=lambda row: row.use.total)
    return f"Does not fit at any setting: {_settings_text(least)} take {least.use.total / unit:.2f} {name}."


def size_unit(rows: Sequence[PlanRow]) -> tuple[float, str]:
    """GB and its name, or MB where sizes in GB would be shown as 0.00."""
    return (1e9, "GB") if max(row.use.total for row in rows) >= 1e9 else (1e6, "MB")


def _settings_text(row: PlanRow) -> str:
    bits, head = row.settings.bits, row.settings.head_bits
    return (("weights that are not packed" if bits == UNPACKED else f"{bits}-bit weights") + " and "
            + ("a head that is not packed" if head == UNPACKED else f"a head of {head} bits"))


def longest_context(d: Dimensions, settings: MemorySettings, memory: int, batch: int, limit: int) -> int:
    """The largest context up to `limit` that fits into `memory` bytes, by binary search; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if memory_use(d, settings, middle, batch).total <= memory else (low, middle - 1)
    return low
