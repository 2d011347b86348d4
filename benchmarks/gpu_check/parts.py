"""The four parts: what each compiles, runs and writes."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check import (
    cache_pack,
    correctness,
    decode_steps,
    demo_models,
    matmul,
    models,
    probe,
    solver,
    solver_checks,
    tuning,
)
from gpu_check.child import Child
from gpu_check.compilation import Compilers
from gpu_check.kernel_recording import Case
from gpu_check.plan import Deadline, Record, Step, run_steps, write_json
from gpu_check.setting import Setting

CACHE = "triton-cache.zip"


@dataclass
class Run:
    """One call: where it runs, what it has, and what it found so far.

    Attributes:
        head: from `setting.describe`.
        gpu: the process that uses the device.
        extra: further values of the JSON file, entered by the part.
    """

    part: str
    setting: Setting
    head: dict[str, Any]
    gpu: Child
    compilers: Compilers
    deadline: Deadline
    out: Path
    cache: Path  # Triton's cache
    record: Record = field(default_factory=Record)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def arch(self) -> tuple[int, int]:
        """Compute capability and multiprocessors."""
        return self.head["arch"], self.head["processors"]

    def save(self) -> None:
        """Write the JSON file of the part."""
        write_json(self.out / f"{self.part}.json", self.head | {
            "part": self.part, "seconds": self.deadline.elapsed} | self.extra | self.record.to_dict())

    def compile(self, cases: list[Case], name: str = "compilation") -> None:
        """Compile the kernels of some cases; a problem is entered as a failure."""
        done = self.compilers.compile(cases, self.deadline)
        self.extra[name] = done._asdict()
        if problem := done.problem():
            self.record.failed[name] = problem
        print(f"{name}: {done.kernels} kernels in {done.seconds:.0f} s by {done.processes} processes", flush=True)
        self.save()

    def steps(self, found: Sequence[Step]) -> None:
        """Run steps."""
        run_steps(found, self.record, self.deadline, self.gpu, self.save)


def run_probe(run: Run) -> None:
    """The machine, the correctness of every kernel and configuration, and the kernels of the other parts compiled."""
    setting = run.setting
    run.steps(probe.steps(setting))
    run.compile([*probe.launch_cases(), *correctness.cases(setting, *run.arch)])
    run.steps([*correctness.steps(setting, *run.arch), *probe.sanitizer_steps(setting, run.record.left_out)])
    run.compile([*matmul.cases(setting), *models.cases(setting), *tuning.cases(setting, *run.arch)],
                "compilation for the other parts")
    run.extra["cache_bytes"] = cache_pack.pack(run.cache, run.out / CACHE)
    run.steps(probe.test_steps(setting, run.record.left_out))
    errors = [result["error"] for result in run.record.results.values() if "error" in result]
    run.extra["largest_error"] = max(errors, default=None)


def run_matmul(run: Run) -> None:
    """The table of products, and the solver."""
    run.compile([*matmul.cases(run.setting), *solver_checks.cases()])
    run.steps([*probe.limits(run.setting), *matmul.steps(run.setting, matmul.FIRST, run.record.left_out),
               *solver.steps(run.setting), *matmul.steps(run.setting, matmul.OTHERS, run.record.left_out)])
    results = run.record.results
    rows = []
    if probe.COPY in results and probe.PEAK in results:
        rows = matmul.table(results, results[probe.COPY]["Bps"], results[probe.PEAK]["operations_per_s"])
    goals = [*matmul.goals(rows), solver.goal(results)]
    run.extra |= {"goals": goals, "table": rows}
    for goal in goals:
        print(f"{goal['goal']}: at least {goal['least']}, worst {goal['worst']}", flush=True)


def run_tuning(run: Run) -> None:
    """The tuning table for few rows."""
    run.compile(tuning.cases(run.setting, *run.arch))
    tuner = tuning.Tuner(run.setting, *run.arch, run.gpu, run.compilers, run.deadline)
    tuning.run(tuner, run.record, run.out, run.head["device"])
    run.extra["times_rule"] = tuning.gains(run.record.results)


def run_models(run: Run) -> None:
    """Whole models."""
    run.compile(models.cases(run.setting))
    with tempfile.TemporaryDirectory() as scratch:
        run.steps([*demo_models.steps(run.setting, Path(scratch)), *models.steps(run.setting, Path(scratch))])
    run.extra["goals"] = [decode_steps.goal(run.record.results)]


PARTS: dict[str, Callable[[Run], None]] = {
    "probe": run_probe, "matmul": run_matmul, "tuning": run_tuning, "models": run_models}
