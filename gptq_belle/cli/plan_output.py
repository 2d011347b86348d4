"""Output of `plan`: a table that compares settings with the budget, and a recommendation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gptq_belle.bench.plan import PlanRow, best_fit
from gptq_belle.cli import console
from gptq_belle.errors import UsageError
from gptq_belle.models.sizes import UNPACKED

MB, GB, GIB = 1e6, 1e9, 2**30


@dataclass(frozen=True, slots=True)
class PlanResult:
    """A finished plan: the name of the model, the budget in bytes, the workload, and a row per setting."""

    model: str
    memory: int
    context: int | None
    batch: int
    rows: Sequence[PlanRow]


def device_kind(name: str) -> str:
    """"cpu" or "cuda" of --device; the device planned for need not be in this machine, but "auto" looks for one.

    Raises:
        UsageError: something else.
    """
    if name == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    if (kind := name.partition(":")[0]) not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not known", "Choose auto, cpu or cuda:0.")
    return kind


def plain(plan: PlanResult) -> dict[str, Any]:
    """JSON-ready values; sizes in bytes."""
    chosen = best_fit(plan.rows)
    return {"model": plan.model, "memory": plan.memory, "context": plan.context, "batch": plan.batch,
            "best": None if chosen is None else asdict(chosen.settings),
            "rows": [_flat(row) for row in plan.rows]}


def show(plan: PlanResult) -> None:
    """Print the table and the verdict on stdout."""
    settings, (unit, word) = plan.rows[0].settings, _unit(plan)
    asked = "the whole context" if plan.context is None else f"{plan.context:,} tokens of context"
    title = (f"{plan.model} on a {'GPU' if settings.device == 'cuda' else 'CPU'}: {asked}, batch {plan.batch}, "
             f"cache in {settings.cache}, groups of {settings.group_size}; computed {word}")
    columns = ["bits", "head", "blocks", "embedding, head", "cache", "workspace", "program", "total",
               f"in {plan.memory / GIB:.2f} GiB", "longest context"]
    console.print_table(title, columns, [_cells(row, unit) for row in plan.rows], text=0)
    console.print_line()
    console.print_line(verdict(plan))


def verdict(plan: PlanResult) -> str:
    """The recommended setting in one line; if none fits, the closest one."""
    chosen, (unit, word) = best_fit(plan.rows), _unit(plan)
    if chosen is not None:
        s = chosen.settings
        return (f"Fits with {_bits(s.bits)} and {_head(s.head_bits)}: {chosen.use.total / unit:.2f} {word} of "
                f"{plan.memory / unit:.2f}. Of what fits, this has the most bits.")
    longest = max(plan.rows, key=lambda row: row.longest_context)
    if longest.longest_context:
        s = longest.settings
        return (f"Does not fit. With {_bits(s.bits)} and {_head(s.head_bits)}, {longest.longest_context:,} tokens "
                "of context fit: choose --context.")
    least = min(plan.rows, key=lambda row: row.use.total)
    return (f"Does not fit at any setting: {_bits(least.settings.bits)} and {_head(least.settings.head_bits)} take "
            f"{least.use.total / unit:.2f} {word}.")


def _unit(plan: PlanResult) -> tuple[float, str]:
    """GB, or MB where sizes in GB would be shown as 0.00."""
    return (GB, "GB") if max(row.use.total for row in plan.rows) >= GB else (MB, "MB")


def _bits(bits: int) -> str:
    return "weights that are not packed" if bits == UNPACKED else f"{bits}-bit weights"


def _head(bits: int) -> str:
    return "a head that is not packed" if bits == UNPACKED else f"a head of {bits} bits"


def _cells(row: PlanRow, unit: float) -> list[str]:
    n = row.use
    sizes = (n.blocks, n.head, n.cache, n.workspace, n.program, n.total)
    return [str(row.settings.bits), str(row.settings.head_bits), *(f"{size / unit:.2f}" for size in sizes),
            "yes" if row.fits else "no", f"{row.longest_context:,}" if row.longest_context else "none"]


def _flat(row: PlanRow) -> dict[str, Any]:
    sizes = asdict(row.use) | {"total": row.use.total}
    return {**asdict(row.settings), **{f"{name}_bytes": size for name, size in sizes.items()}, "fits": row.fits,
            "longest_context": row.longest_context}
