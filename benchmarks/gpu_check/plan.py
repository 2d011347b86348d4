"""The steps of a part: run in order of importance until they are done or time is up, with a record of what is missing.

A part counts as complete only if every planned step ran and succeeded. What was not planned, such as a peer that is not
installed, is in the record under "left_out" with its reason.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gpu_check.child import Call, CallFailed, Child

SAVE_EVERY = 10.0  # seconds


class Step(NamedTuple):
    """One call in a child process, which returns values that JSON can represent."""

    name: str
    call: Call
    limit: float = 60.0  # seconds
    group: str = ""  # steps of a group are given up together: the first failure is that of all


@dataclass
class Record:
    """What a part did.

    Attributes:
        results: the results of steps by name.
        failed: reasons by name of the steps that failed.
        missing: names of the steps that were not started before the time limit.
        left_out: reasons by name of what was not planned.
    """

    results: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything that was planned was done."""
        return not self.failed and not self.missing

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"complete": self.complete, "missing": self.missing, "failed": self.failed, "left_out": self.left_out,
                "results": self.results}

    def report(self) -> str:
        """What is missing, one line each; empty if complete."""
        return "\n".join([*(f"failed: {name}: {reason}" for name, reason in self.failed.items()),
                          *(f"missing: {name}: not started within the time limit" for name in self.missing)])


class Deadline:
    """A time limit in seconds from now on."""

    def __init__(self, seconds: float) -> None:
        self.start = time.monotonic()
        self.end = self.start + seconds

    @property
    def remaining(self) -> float:
        """Seconds until the end; negative after it."""
        return self.end - time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start


def run_steps(steps: Sequence[Step], record: Record, deadline: Deadline, child: Child,
              save: Callable[[], None] = lambda: None) -> None:
    """Run steps in a child until the deadline and enter them in the record.

    Args:
        save: called every SAVE_EVERY seconds, so that a machine that is lost takes little with it.
    """
    saved = time.monotonic()
    given_up: dict[str, str] = {}
    for step in steps:
        if step.group in given_up:
            record.failed[step.name] = given_up[step.group]
        elif deadline.remaining <= 0:
            record.missing.append(step.name)
        else:
            try:
                record.results[step.name] = child.call(step.call, min(step.limit, deadline.remaining))
            except CallFailed as error:
                record.failed[step.name] = str(error)
                if step.group:
                    given_up[step.group] = str(error)
                print(f"{step.name}: {error}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY:
            save()
            saved = time.monotonic()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is complete whenever it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
