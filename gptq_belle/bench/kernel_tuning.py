"""Which tiles are fastest: a search over plans, given a way to time one, and the table that the kernels read.

The search starts from the plan that the rule takes, varies one number of the tile at a time and keeps what is faster.
That is some twenty configs a case, where all combinations would be hundreds, each of which is compiled for a second.
"""

import datetime
import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptq_belle import __version__
from gptq_belle.bench import bandwidth
from gptq_belle.errors import GptqBelleError, HardwareError, InputError
from gptq_belle.kernels import triton_config, triton_matmul
from gptq_belle.kernels.triton_config import (
    KERNELS,
    MAX_SKINNY_ROWS,
    LaunchPlan,
    MatmulProblem,
    TileConfig,
    default_plan,
)
from gptq_belle.kernels.triton_layout import SlicedWeight

SHIPPED = Path(triton_config.__file__).parent / "tuning"
VARIED = {  # in the order in which they are varied
    "SPLIT_K": (1, 2, 4, 8, 16),
    "num_stages": (2, 3, 4, 5, 6),
    "BN": (64, 128),
    "num_warps": (4, 8),
    "BK": (64, 128),
    "BM": (64, 128),  # of the kernel for many rows; with few rows it is the bucket
}
MARGIN = 0.98  # what replaces a plan has to take less than this share of its time: the rest is noise
PASSES = 2
Timer = Callable[[LaunchPlan], float]  # seconds of a product by a plan; infinite where the plan cannot run


class Tuned(NamedTuple):
    """The fastest plan of a case."""

    case: MatmulProblem
    plan: LaunchPlan
    seconds: float
    rule_seconds: float  # of the plan that the rule takes
    tried: int


def tune(case: MatmulProblem, arch: int, processors: int, timer: Timer) -> Tuned:
    """Find the fastest plan of a case.

    Args:
        arch, processors: as for `triton_config.default_plan`.
        timer: measures a plan; it is asked once for each.
    """
    seen: dict[LaunchPlan, float] = {}

    def time(plan: LaunchPlan) -> float:
        if plan not in seen:
            seen[plan] = timer(plan)
        return seen[plan]

    first = default_plan(case, arch, processors)
    best = first
    for start in starts(case, first):
        found = descend(start, time)
        if time(found) < MARGIN * time(best):
            best = found
    return Tuned(case, best, time(best), time(first), len(seen))


def starts(case: MatmulProblem, first: LaunchPlan) -> list[LaunchPlan]:
    """Where searches begin: the rule's plan, and the other kernels that the case may take."""
    others = [LaunchPlan("expand", None)]
    if case.rows >= MAX_SKINNY_ROWS:
        others.append(LaunchPlan("gemm", TileConfig(64 if case.rows == MAX_SKINNY_ROWS else 128, 128, 64, 1, 8, 3)))
    return [first, *(plan for plan in others if plan.kernel != first.kernel)]


def descend(plan: LaunchPlan, time: Timer) -> LaunchPlan:
    """Vary one number at a time and keep what is faster, until none is or PASSES are over."""
    for _ in range(PASSES):
        before = plan
        for name in VARIED:
            for other in variations(plan, name):
                if time(other) < MARGIN * time(plan):
                    plan = other
        if plan == before:
            break
    return plan


def variations(plan: LaunchPlan, name: str) -> Iterator[LaunchPlan]:
    """The plan with other values of one number of its config."""
    if plan.config is None or (name == "BM" and plan.kernel == "skinny"):
        return
    for value in VARIED[name]:
        if value != getattr(plan.config, name):
            yield plan._replace(config=plan.config._replace(**{name: value}))


def entry(tuned: Tuned) -> dict[str, Any]:
    """A line of the table."""
    config = tuned.plan.config
    return tuned.case._asdict() | {
        "kernel": tuned.plan.kernel, "config": None if config is None else config._asdict(),
        "seconds": tuned.seconds, "rule_seconds": tuned.rule_seconds if math.isfinite(tuned.rule_seconds) else None}


def write(results: Sequence[Tuned], arch: int, device_name: str, folder: Path | None = None) -> Path:
    """Write ``sm_ARCH.json``, keeping what it says of other cases, and make this process read it.

    Args:
        folder: made where it is missing; left out, that of the installed package.
    Raises:
        HardwareError: it cannot be written there.
        InputError: the file that is there is damaged.
    """
    path = (folder or SHIPPED) / f"sm_{arch}.json"
    lines = {MatmulProblem(**{name: line[name] for name in MatmulProblem._fields}): line for line in _entries(path)}
    lines |= {tuned.case: entry(tuned) for tuned in results}
    content = {
        "device": device_name,
        "date": datetime.date.today().isoformat(),
        "versions": {"gptq_belle": __version__, "torch": torch.__version__,
                     "triton": version("triton") if find_spec("triton") else None},
        "entries": [lines[case] for case in sorted(lines)],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise HardwareError(f"the table cannot be written: {error}", "Name another folder with --out.") from error
    triton_config.tuned_plans.cache_clear()
    triton_config.launch_plan.cache_clear()
    return path


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        lines: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["entries"]
        assert all(line["kernel"] in KERNELS and set(MatmulProblem._fields) <= line.keys() for line in lines)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a table of tuned kernels: {error!r}",
                         "Move it away, or name another folder with --out.") from error
    return lines


EXPANDED = LaunchPlan("expand", None)
# Relative error of the whole result against the expanded weight, which rounds it to x's dtype as many rows do.
AGREEMENT = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


def device_timer(case: MatmulProblem, weights: Sequence[SlicedWeight]) -> Timer:
    """Times plans of a case on the device, its weights taking turns; wrong results are an error, not a time."""
    from triton.runtime.errors import OutOfResources, PTXASError

    turns = rotation(weights)
    dtype: torch.dtype = getattr(torch, case.dtype)
    x = torch.randn(case.rows, turns[0].in_features, device=turns[0].words.device).to(dtype)
    expected = triton_matmul.quant_matmul(x, turns[0], plan=EXPANDED).float()

    def time(plan: LaunchPlan) -> float:
        try:
            y = triton_matmul.quant_matmul(x, turns[0], plan=plan).float()
            error = float((y - expected).norm() / expected.norm())
            if not error < AGREEMENT[dtype]:
                raise GptqBelleError(f"{plan} multiplies wrongly here: relative error {error:.1e}, {describe(case)}",
                                     "Please report it, with the output of `gptq-belle doctor --json`.")
            actions = [lambda weight=weight: triton_matmul.quant_matmul(x, weight, plan=plan) for weight in turns]
            return bandwidth.device_seconds(actions).median
        except (OutOfResources, PTXASError):  # too many stages for this part's shared memory, too many registers
            return float("inf")

    return time


def rotation(weights: Sequence[SlicedWeight]) -> list[SlicedWeight]:
    """So many weights of one shape, copied where they are too few, that none stays in the L2 cache."""
    first = weights[0]
    wanted = bandwidth.copies(first.words.nbytes + first.scales.nbytes, first.words.device)
    turns = list(weights[:wanted])
    turns += [first._replace(words=first.words.clone(), scales=first.scales.clone())
              for _ in range(wanted - len(turns))]
    return turns


def describe(case: MatmulProblem) -> str:
    """A case in words."""
    return f"{case.rows} rows, {case.inputs} x {case.outputs}, {case.bits} bits, runs of {case.run}, {case.dtype}"
