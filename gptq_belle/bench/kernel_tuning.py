"""Search for the fastest tile sizes of the GPU kernels, and the table of results that the kernels read.

The search starts from the plan of the rule, varies one number of the tile at a time and keeps what is faster. This
tries about twenty configurations per problem instead of hundreds of combinations; each takes a second to compile, so
`search` names those that can be compiled at a time.
"""

import datetime
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from gptq_belle import __version__
from gptq_belle.bench import cuda_timing
from gptq_belle.errors import GptqBelleError, HardwareError, InputError
from gptq_belle.kernels import triton_config, triton_matmul
from gptq_belle.kernels.triton_config import (
    KERNELS,
    MAX_SKINNY_ROWS,
    SPLITS,
    LaunchPlan,
    MatmulProblem,
    TileConfig,
    UnsupportedTileError,
    default_plan,
)
from gptq_belle.kernels.triton_layout import SlicedWeight

SHIPPED = Path(triton_config.__file__).parent / "tuning"
VARIED = {  # values by name, in the order in which they are varied
    "SPLIT_K": SPLITS,
    "num_stages": (2, 3, 4, 5, 6),
    "BN": (32, 64, 128),
    "num_warps": (1, 2, 4, 8),
    "K_WARPS": (1, 2, 4, 8, 16),  # only of the kernel for few rows
    "BK": (64, 128),
    "BM": (64, 128),  # only of the kernel for many rows; otherwise it is the row bucket
}
MARGIN = 0.98  # a plan is replaced by one that takes less than this share of its time; the rest is noise
PASSES = 2  # over all names in VARIED
Timer = Callable[[LaunchPlan], float]  # seconds of a product by a plan; infinite if the plan cannot run
Result = TypeVar("Result")
Search: TypeAlias = Generator[list[LaunchPlan], Mapping[LaunchPlan, float], Result]


class TunedPlan(NamedTuple):
    """The fastest plan of a problem."""

    problem: MatmulProblem
    plan: LaunchPlan
    seconds: float
    rule_seconds: float  # of the plan of the rule
    tried: int  # number of timed plans


def tune(problem: MatmulProblem, arch: int, processors: int, timer: Timer) -> TunedPlan:
    """Find the fastest plan of a problem.

    Args:
        arch, processors: as for `triton_config.default_plan`.
        timer: measures a plan; called once per plan.
    """
    steps = search(problem, arch, processors)
    wanted = next(steps)
    while True:
        try:
            wanted = steps.send({plan: timer(plan) for plan in wanted})
        except StopIteration as end:
            found: TunedPlan = end.value
            return found


def search(problem: MatmulProblem, arch: int, processors: int) -> Search[TunedPlan]:
    """The search of `tune` as a generator: it yields the plans whose times it needs next, never one twice, and receives
    their seconds. All plans that it yields together can be compiled at a time."""
    seen: dict[LaunchPlan, float] = {}
    first = default_plan(problem, arch, processors)
    best = first
    for start in starting_plans(problem, first):
        found = yield from _improved(start, seen)
        if seen[found] < MARGIN * seen[best]:
            best = found
    return TunedPlan(problem, best, seen[best], seen[first], len(seen))


def starting_plans(problem: MatmulProblem, first: LaunchPlan) -> list[LaunchPlan]:
    """Plans from which the search starts: the rule's, and one of each other kernel that the problem allows."""
    others = [LaunchPlan("expand", None)]
    if problem.rows >= MAX_SKINNY_ROWS:
        others.append(LaunchPlan("gemm", TileConfig(64 if problem.rows == MAX_SKINNY_ROWS else 128, 128, 64, 1, 8, 3)))
    return [first, *(plan for plan in others if plan.kernel != first.kernel)]


def _improved(plan: LaunchPlan, seen: dict[LaunchPlan, float]) -> Search[LaunchPlan]:
    """Vary one number at a time and keep what is faster, for PASSES or until nothing is faster."""
    yield from _time([plan], seen)
    for _ in range(PASSES):
        before = plan
        for name in VARIED:
            others = list(variations(plan, name))
            yield from _time(others, seen)
            for other in others:
                if seen[other] < MARGIN * seen[plan]:
                    plan = other
        if plan == before:
            break
    return plan


def _time(plans: Sequence[LaunchPlan], seen: dict[LaunchPlan, float]) -> Search[None]:
    """Ask for the times of those plans that were not timed yet."""
    if new := [plan for plan in plans if plan not in seen]:
        seen |= yield new


def variations(plan: LaunchPlan, name: str) -> Iterator[LaunchPlan]:
    """The plan with each other value of one number of its configuration."""
    if plan.config is None or (name, plan.kernel) in (("BM", "skinny"), ("K_WARPS", "gemm")):
        return
    for value in VARIED[name]:
        if value != getattr(plan.config, name):
            config = plan.config._replace(**{name: value})
            yield plan._replace(config=config._replace(num_warps=max(config.num_warps, config.K_WARPS)))


def table_entry(result: TunedPlan) -> dict[str, Any]:
    """An entry of the table."""
    config = result.plan.config
    return result.problem._asdict() | {
        "kernel": result.plan.kernel, "config": None if config is None else config._asdict(),
        "seconds": result.seconds, "rule_seconds": result.rule_seconds if math.isfinite(result.rule_seconds) else None}


def write_table(results: Sequence[TunedPlan], arch: int, device_name: str, folder: Path | None = None) -> Path:
    """Write ``sm_ARCH.json`` for later calls of the kernels; entries of other problems in the file are kept.

    Args:
        arch: compute capability, such as 86.
        folder: folder of the table, created if missing. Default: the folder of the installed kernels.
    Raises:
        HardwareError: the table cannot be written.
        InputError: the existing file is damaged.
    """
    path = (folder or SHIPPED) / f"sm_{arch}.json"
    entries = {MatmulProblem(**{name: entry[name] for name in MatmulProblem._fields}): entry
               for entry in _read_entries(path)}
    entries |= {result.problem: table_entry(result) for result in results}
    content = {
        "device": device_name,
        "date": datetime.date.today().isoformat(),
        "versions": {"gptq_belle": __version__, "torch": torch.__version__,
                     "triton": version("triton") if find_spec("triton") else None},
        "entries": [entries[problem] for problem in sorted(entries)],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise HardwareError(f"the table cannot be written: {error}", "Name another folder with --out.") from error
    triton_config.tuned_plans.cache_clear()
    triton_config.launch_plan.cache_clear()
    return path


def _read_entries(path: Path) -> list[dict[str, Any]]:
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
# Allowed relative error to the product with the dequantized weight, which is rounded to the dtype of x.
AGREEMENT = {torch.float16: 3e-3, torch.bfloat16: 2e-2}


def device_timer(problem: MatmulProblem, weights: Sequence[SlicedWeight]) -> Timer:
    """A function that times plans of a problem on the device, with several weights in turn.

    It raises GptqBelleError if a product is wrong.
    """
    from triton.runtime.errors import OutOfResources, PTXASError

    turns = rotated_weights(weights)
    dtype: torch.dtype = getattr(torch, problem.dtype)
    x = torch.randn(problem.rows, turns[0].in_features, device=turns[0].words.device).to(dtype)
    expected = triton_matmul.quant_matmul(x, turns[0], plan=EXPANDED).float()

    def time(plan: LaunchPlan) -> float:
        try:
            y = triton_matmul.quant_matmul(x, turns[0], plan=plan).float()
            error = float((y - expected).norm() / expected.norm())
            if not error < AGREEMENT[dtype]:
                raise GptqBelleError(f"{plan} computes a wrong product: relative error {error:.1e}, "
                                     f"{describe_problem(problem)}",
                                     "Please report it, with the output of `gptq-belle doctor --json`.")
            actions = [lambda weight=weight: triton_matmul.quant_matmul(x, weight, plan=plan) for weight in turns]
            return cuda_timing.device_seconds(actions).median
        except (OutOfResources, PTXASError, UnsupportedTileError):  # more shared memory or registers than this GPU has
            return float("inf")

    return time


def rotated_weights(weights: Sequence[SlicedWeight]) -> list[SlicedWeight]:
    """Weights of one shape, copied if they are too few, that together exceed the L2 cache."""
    first = weights[0]
    wanted = cuda_timing.operand_copies(first.words.nbytes + first.scales.nbytes, first.words.device)
    turns = list(weights[:wanted])
    turns += [first._replace(words=first.words.clone(), scales=first.scales.clone())
              for _ in range(wanted - len(turns))]
    return turns


def describe_problem(problem: MatmulProblem) -> str:
    """A problem in words."""
    return (f"{problem.rows} rows, {problem.inputs} x {problem.outputs}, {problem.bits} bits, runs of {problem.run}, "
            f"{problem.dtype}")
