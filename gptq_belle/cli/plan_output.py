"""What `plan` prints: a table of settings against the budget, and the one to take."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gptq_belle.bench.plan import FULL, Row, best
from gptq_belle.cli import console
from gptq_belle.errors import UsageError

MB, GB, GIB = 1e6, 1e9, 2**30


@dataclass(frozen=True, slots=True)
class Plan:
    """A finished plan: the model as it was named, the budget in bytes, what was asked for, and the settings."""

    model: str
    memory: int
    context: int | None
    batch: int
    rows: Sequence[Row]


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


def plain(plan: Plan) -> dict[str, Any]:
    """JSON-ready values; sizes in bytes."""
    chosen = best(plan.rows)
    return {"model": plan.model, "memory": plan.memory, "context": plan.context, "batch": plan.batch,
            "best": None if chosen is None else asdict(chosen.setting),
            "rows": [_flat(row) for row in plan.rows]}


def show(plan: Plan) -> None:
    """Print the table and the verdict on stdout."""
    setting, (unit, word) = plan.rows[0].setting, _unit(plan)
    asked = "the whole context" if plan.context is None else f"{plan.context:,} tokens of context"
    title = (f"{plan.model} on a {'GPU' if setting.device == 'cuda' else 'CPU'}: {asked}, batch {plan.batch}, "
             f"cache in {setting.cache}, groups of {setting.group_size}; {word} by arithmetic")
    columns = ["bits", "head", "blocks", "embedding, head", "cache", "workspace", "program", "total",
               f"in {plan.memory / GIB:.2f} GiB", "longest context"]
    console.print_table(title, columns, [_cells(row, unit) for row in plan.rows], text=0)
    console.print_line()
    console.print_line(verdict(plan))


def verdict(plan: Plan) -> str:
    """Which setting to take, in one line; with none that fits, what comes closest."""
    chosen, (unit, word) = best(plan.rows), _unit(plan)
    if chosen is not None:
        s = chosen.setting
        return (f"Fits with {_bits(s.bits)} and {_head(s.head_bits)}: {chosen.needs.total / unit:.2f} {word} of "
                f"{plan.memory / unit:.2f}. Of what fits, this has the most bits.")
    longest = max(plan.rows, key=lambda row: row.longest)
    if longest.longest:
        s = longest.setting
        return (f"Does not fit. With {_bits(s.bits)} and {_head(s.head_bits)}, {longest.longest:,} tokens of context "
                "do: choose --context.")
    least = min(plan.rows, key=lambda row: row.needs.total)
    return (f"Does not fit at any setting: {_bits(least.setting.bits)} and {_head(least.setting.head_bits)} take "
            f"{least.needs.total / unit:.2f} {word}.")


def _unit(plan: Plan) -> tuple[float, str]:
    """In what sizes are shown: of some MB, two digits of a GB would be zeros."""
    return (GB, "GB") if max(row.needs.total for row in plan.rows) >= GB else (MB, "MB")


def _bits(bits: int) -> str:
    return "weights that are not packed" if bits == FULL else f"{bits}-bit weights"


def _head(bits: int) -> str:
    return "a head that is not packed" if bits == FULL else f"a head of {bits} bits"


def _cells(row: Row, unit: float) -> list[str]:
    n = row.needs
    sizes = (n.blocks, n.head, n.cache, n.workspace, n.program, n.total)
    return [str(row.setting.bits), str(row.setting.head_bits), *(f"{size / unit:.2f}" for size in sizes),
            "yes" if row.fits else "no", f"{row.longest:,}" if row.longest else "none"]


def _flat(row: Row) -> dict[str, Any]:
    sizes = asdict(row.needs) | {"total": row.needs.total}
    return {**asdict(row.setting), **{f"{name}_bytes": size for name, size in sizes.items()}, "fits": row.fits,
            "longest_context": row.longest}
