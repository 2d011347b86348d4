"""The command `plan`."""

from pathlib import Path
from typing import Annotated

import typer

from gptq_belle.cli import console, options


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
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show at which bits, lm_head bits and context a model fits into a memory budget. Reads config.json only."""
    from gptq_belle.bench.plan import check_workload
    from gptq_belle.bench.plan import plan as planned
    from gptq_belle.checkpoint.reader import read_config
    from gptq_belle.cli import plan_output
    from gptq_belle.common.memory import parse_memory

    kind = plan_output.device_kind(device)
    budget = parse_memory(memory)
    check_workload(context, batch, cache, group_size)
    rows = planned(read_config(model), budget, context=context, batch=batch, cache=cache, group_size=group_size,
                   device=kind)
    found = plan_output.PlanResult(str(model), budget, context, batch, rows)
    if as_json:
        console.print_json(plan_output.plain(found))
    else:
        plan_output.show(found)
