"""Compile all kernels that a part needs in parallel, into Triton's cache, before anything is timed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from gpu_check.child import CallFailed, Child, run_all
from gpu_check.kernel_recording import Case, KernelSpec, compile_kernel, pretend, record
from gpu_check.plan import Deadline

TOO_LARGE = ("PTXASError", "OutOfResources")  # the configuration exceeds the GPU: a result, not a failure
RECORDING = 120.0  # seconds


class Compilation(NamedTuple):
    """Outcome of compiling kernels."""

    kernels: int
    seconds: float
    processes: int
    too_large: list[str]  # kernels that this GPU cannot run
    failed: list[str]  # kernels and reasons
    missing: list[str]  # kernels for which there was no time

    def problem(self) -> str:
        """What is missing in one line; empty if nothing is."""
        found = []
        if self.failed:
            found.append(f"{len(self.failed)} of {self.kernels} kernels failed, the first: {self.failed[0]}")
        if self.missing:
            found.append(f"the time limit left out {len(self.missing)} kernels, the first: {self.missing[0]}")
        return "; ".join(found)


class Compilers:
    """Processes that compile kernels for one GPU.

    Args:
        with_launcher: see `compile_kernel`.
        every: of how many cases one is compiled.
    """

    def __init__(self, children: Sequence[Child], with_launcher: bool, every: int = 1) -> None:
        self._children = children
        self._with_launcher = with_launcher
        self._every = every
        self._compiled: set[KernelSpec] = set()

    def compile(self, cases: Sequence[Case], deadline: Deadline) -> Compilation:
        """Compile the kernels that some cases launch; those that were compiled before are not counted."""
        start = deadline.elapsed
        if deadline.remaining <= 0:
            return Compilation(0, 0.0, 0, [], [], [f"those of {len(cases)} cases"])
        try:
            specs: list[KernelSpec] = self._children[0].call(partial(record, cases[:: self._every]),
                                                             min(RECORDING, deadline.remaining))
        except CallFailed as error:
            return Compilation(0, deadline.elapsed - start, 1, [], [f"finding the kernels: {error}"], [])
        new = [spec for spec in specs if spec not in self._compiled]
        found = run_all(self._children, {spec: partial(compile_kernel, spec, self._with_launcher) for spec in new},
                        deadline.end)
        wrong = {str(spec): str(result) for spec, result in found.items() if isinstance(result, CallFailed)}
        self._compiled |= found.keys()
        return Compilation(
            kernels=len(new), seconds=deadline.elapsed - start, processes=len(self._children),
            too_large=[name for name, reason in wrong.items() if reason.startswith(TOO_LARGE)],
            failed=[f"{name}: {reason}" for name, reason in wrong.items() if not reason.startswith(TOO_LARGE)],
            missing=[str(spec) for spec in new if spec not in found])


@contextmanager
def compilers(arch: int, processors: int, with_launcher: bool, every: int = 1, most: int = 32) -> Iterator[Compilers]:
    """Start one compiling process per core, less one for the process that uses the GPU; stop them at the end.

    Args:
        arch, processors: as for `pretend`.
        with_launcher, every: as for Compilers.
    """
    children = [Child(partial(pretend, arch, processors))
                for _ in range(max(1, min(most, len(os.sched_getaffinity(0)) - 1)))]
    try:
        yield Compilers(children, with_launcher, every)
    finally:
        for one in children:
            one.stop()
