"""Tune the kernels for the linears of BELLE-7B, LLaMA-7B and 13B with random 4-bit weights.

The searches of all shapes with one number of rows advance together: the plans that they want next are compiled in
parallel, then timed one after another. Writes sm_NN.json in the folder of the results, as `gptq-belle tune` does; set
GPTQ_BELLE_TUNING to that folder, or move the file to kernels/tuning.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptq_belle.bench.kernel_tuning import (
    VARIED,
    Search,
    Timer,
    TunedPlan,
    describe_problem,
    device_timer,
    search,
    starting_plans,
    table_entry,
    variations,
    write_table,
)
from gptq_belle.kernels.triton_config import LaunchPlan, MatmulProblem, default_plan
from gpu_check.child import CallFailed, Child
from gpu_check.compilation import Compilers
from gpu_check.kernel_recording import Case
from gpu_check.plan import Deadline, Record
from gpu_check.setting import Setting
from gpu_check.weights import product_case, random_weight

ONE_PLAN = 60.0  # seconds in which a plan has to be timed
FAILURES = 3  # plans of a problem that may fail, which counts as an infinite time, before its search is given up


def problems(setting: Setting) -> list[MatmulProblem]:
    """The problems in order of importance: small numbers of rows determine the decode speed."""
    return [MatmulProblem(rows, outputs, inputs, 4, 128, "float16")
            for rows in setting.sizes.tuned_rows for inputs, outputs in setting.sizes.shapes]


def cases(setting: Setting, arch: int, processors: int) -> list[Case]:
    """The plans from which the searches start, and their variations, for compilation."""
    return [product_case(problem, plan) for problem in problems(setting)
            for first in starting_plans(problem, default_plan(problem, arch, processors))
            for plan in (first, *(other for name in VARIED for other in variations(first, name)))]


class Tuner(NamedTuple):
    """What a search needs: the GPU, the compilers, and the time limit."""

    setting: Setting
    arch: int
    processors: int
    gpu: Child
    compilers: Compilers
    deadline: Deadline


@dataclass
class Progress:
    """A search that is not finished: the plans that it wants next, and how many failed."""

    steps: Search[TunedPlan]
    wanted: list[LaunchPlan]
    failures: int = 0


def run(tuner: Tuner, record: Record, out: Path, device_name: str) -> None:
    """Tune all problems; the table is written after each number of rows."""
    everything = problems(tuner.setting)
    done: list[TunedPlan] = []
    for rows in tuner.setting.sizes.tuned_rows:
        done += _tune_together([problem for problem in everything if problem.rows == rows], tuner, record)
        if done:
            write_table(done, tuner.arch, device_name, out)
    tuned = {found.problem for found in done}
    record.missing += [describe_problem(problem) for problem in everything
                       if problem not in tuned and describe_problem(problem) not in record.failed]


def _tune_together(some: Sequence[MatmulProblem], tuner: Tuner, record: Record) -> list[TunedPlan]:
    """Advance the searches of some problems in rounds; returns those that are finished."""
    searches = {problem: search(problem, tuner.arch, tuner.processors) for problem in some}
    active = {problem: Progress(steps, next(steps)) for problem, steps in searches.items()}
    done = []
    while active and tuner.deadline.remaining > 0:
        wanted = [product_case(problem, plan) for problem, progress in active.items() for plan in progress.wanted]
        if problem_found := tuner.compilers.compile(wanted, tuner.deadline).problem():
            record.failed[f"compilation for {some[0].rows} rows"] = problem_found
        for problem, progress in list(active.items()):
            times = _time(problem, progress, tuner, record)
            if times is None:
                del active[problem]
                continue
            try:
                progress.wanted = progress.steps.send(times)
            except StopIteration as end:
                done.append(end.value)
                record.results[describe_problem(problem)] = table_entry(end.value) | {"tried": end.value.tried}
                del active[problem]
    return done


def _time(problem: MatmulProblem, progress: Progress, tuner: Tuner,
          record: Record) -> Mapping[LaunchPlan, float] | None:
    """Seconds by plan; None if time is up or too many plans failed, which the record then names."""
    times = {}
    for plan in progress.wanted:
        if tuner.deadline.remaining <= 0:
            return None
        try:
            times[plan] = tuner.gpu.call(partial(time_plan, tuner.setting, problem, plan),
                                         min(ONE_PLAN, tuner.deadline.remaining))
        except CallFailed as error:
            if tuner.deadline.remaining <= 0:
                return None
            record.left_out[f"{describe_problem(problem)}, {plan}"] = str(error)
            progress.failures += 1
            if progress.failures > FAILURES:
                record.failed[describe_problem(problem)] = f"{progress.failures} plans failed: {error}"
                return None
            times[plan] = math.inf
    return times


def time_plan(setting: Setting, problem: MatmulProblem, plan: LaunchPlan) -> float:
    """Seconds of a product by a plan; infinite if the plan cannot run on this GPU.

    Raises:
        GptqBelleError: the product is wrong.
    """
    return _timer(setting, problem)(plan)


@lru_cache(maxsize=16)
def _timer(setting: Setting, problem: MatmulProblem) -> Timer:
    torch.manual_seed(0)
    weight = random_weight(problem.inputs, problem.outputs, problem.bits, setting.device)
    return device_timer(problem, [weight])


def gains(results: Mapping[str, Any]) -> dict[str, float]:
    """Speed relative to the plan of the rule, by problem."""
    return {name: entry["rule_seconds"] / entry["seconds"] for name, entry in results.items() if entry["rule_seconds"]}
