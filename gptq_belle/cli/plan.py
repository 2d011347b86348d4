"""The command `plan`: a table that compares settings with a memory budget, and a recommendation."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_belle.cli import console, options
from gptq_belle.errors import UsageError

if TYPE_CHECKING:
    from gptq_belle.bench.gpus import Gpu
    from gptq_belle.bench.plan import PlanRow
    from gptq_belle.bench.step_time import StepTime

GIB = 2**30


def plan(
    model: Annotated[Path, typer.Argument(
        metavar="MODEL", help="Model directory, a config.json, a name listed by `models`, or belle-7b, llama-7b, "
        "llama-13b.")],
    memory: Annotated[str, typer.Option(help="Memory budget, such as 8GiB.")],
    context: Annotated[int | None, typer.Option(
        help="Tokens of prompt and answer together. Default: the model's context.", show_default=False)] = None,
    batch: Annotated[int, typer.Option("-b", "--batch", help="Number of sequences.")] = 1,
    cache: options.Cache = "float16",
    group_size: options.GroupSize = 128,
    device: options.Device = "auto",
    gpu: Annotated[str | None, typer.Option(
        help="GPU to plan for: H200, H100, A100, 4090, 3090 or 3060. Adds decode speeds, which are calculated, not "
        "measured.", show_default=False)] = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show at which bits, lm_head bits and context a model fits into a memory budget. Reads config.json only."""
    options.import_engine("bench.plan")
    from gptq_belle.bench.gpus import gpu_named
    from gptq_belle.bench.plan import best_fit, check_workload, recommendation, size_unit
    from gptq_belle.bench.plan import plan as planned
    from gptq_belle.bench.step_time import assumptions
    from gptq_belle.checkpoint.reader import read_config
    from gptq_belle.common.memory import parse_memory

    planned_gpu = None if gpu is None else gpu_named(gpu)
    kind = device_kind(device) if planned_gpu is None else "cuda"
    budget = parse_memory(memory)
    check_workload(context, batch, cache, group_size)
    rows = planned(read_config(model), budget, context=context, batch=batch, cache=cache, group_size=group_size,
                   device=kind, gpu=planned_gpu)
    if as_json:
        chosen = best_fit(rows)
        console.print_json({"model": model, "memory": budget, "context": context, "batch": batch,
                            "best": None if chosen is None else chosen.settings, "rows": [_flat(row) for row in rows],
                            "assumptions": None if planned_gpu is None else assumptions(planned_gpu)})
        return
    settings, (unit, name) = rows[0].settings, size_unit(rows)
    asked = "the whole context" if context is None else f"{context:,} tokens of context"
    title = (f"{model} on a {'GPU' if kind == 'cuda' else 'CPU'}: {asked}, batch {batch}, cache in {cache}, groups of "
             f"{settings.group_size}; computed {name}")
    columns = ["bits", "head", "blocks", "embedding, head", "cache", "workspace", "program", "total",
               f"in {budget / GIB:.2f} GiB", "longest context"]
    if planned_gpu is not None:
        columns += [f"tokens/s, {planned_gpu.name}", "memory limit"]
    console.print_table(title, columns, [_cells(row, unit, planned_gpu is not None) for row in rows], text=0)
    console.print_line()
    console.print_line(recommendation(rows, budget))
    if planned_gpu is not None:
        for line in _speed_notes(planned_gpu, [row.step for row in rows if row.step is not None]):
            console.print_line(line)


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


def _cells(row: "PlanRow", unit: float, with_speeds: bool) -> list[str]:
    n, step = row.use, row.step
    sizes = (n.blocks, n.head, n.cache, n.workspace, n.program, n.total)
    speeds = ["", ""] if step is None else [f"{step.tokens_per_second:,.0f} ({100 * step.share:.0f} %)",
                                            f"{step.limit_tokens_per_second:,.0f}"]
    return [str(row.settings.bits), str(row.settings.head_bits), *(f"{size / unit:.2f}" for size in sizes),
            "yes" if row.fits else "no", f"{row.longest_context:,}" if row.longest_context else "none",
            *(speeds if with_speeds else [])]


def _speed_notes(gpu: "Gpu", steps: list["StepTime"]) -> list[str]:
    """What the speeds are and what they assume."""
    notes = ["Speeds are calculated for a decode step with a full context, not measured. At the memory limit, weights "
             "and cache are read at the speed of a copy.",
             f"Assumptions: a copy reaches {100 * gpu.copy_share:.0f} % of {gpu.bandwidth / 1e12:.3g} TB/s, data "
             f"arrive {1e6 * gpu.latency:.2g} us after their load, the L2 cache has {gpu.l2_bandwidth / 1e12:.2g} "
             f"TB/s, {gpu.processors} multiprocessors run at {gpu.clock / 1e9:.4g} GHz, and {1e6 * gpu.launch:.1f} us "
             "are between two kernels of a CUDA graph. --json lists all."]
    if steps and (dependent := steps[-1].with_dependent_launch()) is not None and gpu.dependent_launch is not None:
        notes.append(f"Programmatic dependent launch is off, because it has not run on a GPU yet. With "
                     f"{1e6 * gpu.dependent_launch:.1f} us between two kernels, the last row would have "
                     f"{dependent.tokens_per_second:,.0f} tokens/s ({100 * dependent.share:.0f} %).")
    return notes


def _flat(row: "PlanRow") -> dict[str, Any]:
    """JSON-ready values; sizes in bytes."""
    sizes = asdict(row.use) | {"total": row.use.total}
    return {**asdict(row.settings), **{f"{name}_bytes": size for name, size in sizes.items()}, "fits": row.fits,
            "longest_context": row.longest_context, "step": None if row.step is None else _flat_step(row.step)}


def _flat_step(step: "StepTime") -> dict[str, Any]:
    """JSON-ready values of the calculated step; times in seconds."""
    dependent = step.with_dependent_launch()
    return {"gpu": step.gpu.name, "tokens_per_second": step.tokens_per_second, "share_of_limit": step.share,
            "limit_tokens_per_second": step.limit_tokens_per_second, "launches": step.launches, "bytes": step.bytes,
            "seconds": step.seconds, "parts": [part._asdict() for part in step.parts],
            "dependent_launch_tokens_per_second": None if dependent is None else dependent.tokens_per_second}
