"""Progress of a quantization job: a progress bar on a terminal, and one line per linear."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gptq_belle.quantization.report import MIB, LinearReport


class ConsoleProgress:
    """Progress on a rich console: a line per linear with its error, seconds and the job's peak memory, and a bar on a
    terminal. The remaining time is estimated from whole blocks, because the steps of a block are not equally long."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.blocks = self.steps = self.todo = self.done = 0
        self.started, self.seconds_per_step = time.monotonic(), 0.0  # 0 until a block is finished
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps{task.fields[left]}"),
            console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("reading", total=None, left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def start(self, blocks: int, steps: int, finished: int) -> None:
        self.blocks, self.steps, self.todo, self.done = blocks, steps, (blocks - finished) * steps, 0
        self.started, self.seconds_per_step = time.monotonic(), 0.0
        self._bar.reset(self._task, total=self.todo, description=f"block {finished + 1}")

    def step(self) -> None:
        self.done += 1
        if self.done % self.steps == 0:
            self.seconds_per_step = (time.monotonic() - self.started) / self.done
        self._bar.update(self._task, completed=self.done, left=self._left())

    def linear(self, block: int, row: LinearReport, peak_memory: int | None) -> None:
        """Print a line for a quantized linear, and advance the bar."""
        self.step()
        self._bar.update(self._task, description=f"block {block + 1}/{self.blocks}")
        memory = f", peak {peak_memory / MIB:,.0f} MiB" if peak_memory is not None else ""
        damp = f", damping {row.damp:g}" if row.damp > 0.01 else ""
        left = "" if self.console.is_terminal else self._left()
        self.console.print(f"block {block + 1}/{self.blocks} {_short(row.name):<32} error {row.error:.2e}, "
                           f"{row.seconds:.2f} s{memory}{damp}{left}", soft_wrap=True)

    def phase(self, text: str) -> None:
        self._bar.update(self._task, description=text)
        if not self.console.is_terminal:
            self.console.print(text, soft_wrap=True)

    def _left(self) -> str:
        return f", {self.seconds_per_step * max(0, self.todo - self.done):.0f} s left" if self.seconds_per_step else ""


def _short(name: str) -> str:
    """A linear's name inside its block, after the block's number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[number + 1 :])
