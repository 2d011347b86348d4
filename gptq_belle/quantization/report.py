"""What a quantization job reports: progress while it runs, quantization_report.json at the end."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from gptq_belle.quantization.config import QuantConfig

REPORT = "quantization_report.json"


@dataclass(frozen=True, slots=True)
class LinearReport:
    """One quantized linear.

    Attributes:
        name: full name in the model.
        error: squared error of its output on the calibration rows as a share of the output's square; with method
            rtn, which sees no inputs, of its weights.
        damp: damping that was needed; 0 for rtn.
        seconds: time of its solution.
        inputs, outputs: K and N.
        bits: a weight; 16 where the linear was left in float16, whose rounding is then the error.
        won: which of the recipe's solutions was taken (see `solution_choice.ChosenSolution`); "" for rtn.
        held_out: error of every solution on the rows that are held out, which decided; empty where none are.
    """

    name: str
    error: float
    damp: float
    seconds: float
    inputs: int
    outputs: int
    bits: int
    won: str = ""
    held_out: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """The whole job.

    Attributes:
        source: the model that was quantized.
        settings: the job's configuration.
        calibration: source, rows, tokens a row, seed, SHA-256 of the token ids, and keys of the documents (see
            `overlap`); None for rtn.
        linears: one row a quantized linear, in the order of solving.
        phases: seconds of every block by what they went into; "total" is all of the block.
        choice: of bits a stage, with what 4 bits were measured to cost it (see `auto_bits.choose_bits`); None where the
            settings say all.
        tuning: the result of end-to-end tuning (`end_to_end.tuning.TuningResult`); None where the preset has none.
        notes: what went otherwise than planned, such as a block that fell back to the CPU.
        resumed: the first block of this run, where it went on with an earlier one; else empty.
        seconds: working time of the job, without blocks that were begun and not finished.
        peak_memory: largest anonymous memory in bytes, None where the system does not tell.
        bytes_on_disk: size of the weight files.
        readback_error: largest difference between one block's output from the written file and from the solver, as a
            share of the output's largest value.
        versions: gptq_belle, torch, transformers.
    """

    source: str
    settings: QuantConfig
    calibration: dict[str, Any] | None = None
    choice: dict[str, Any] | None = None
    linears: list[LinearReport] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    tuning: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int | None = None
    bytes_on_disk: int = 0
    readback_error: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def mean_error(self) -> float:
        """Mean of the linears' normalised errors."""
        return sum(row.error for row in self.linears) / max(1, len(self.linears))

    @property
    def average_bits(self) -> float:
        """Bits a weight over all linears; scales and zero points are not counted."""
        weights = sum(row.inputs * row.outputs for row in self.linears)
        return sum(row.bits * row.inputs * row.outputs for row in self.linears) / max(1, weights)

    @property
    def winners(self) -> dict[str, int]:
        """How many linears each kind of solution won, where held-out rows had a choice."""
        return dict(Counter(row.won for row in self.linears if len(row.held_out) > 1).most_common())

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {**asdict(self), "mean_error": self.mean_error, "average_bits": self.average_bits,
                "winners": self.winners}


def format_tuning(tuning: Mapping[str, Any]) -> str:
    """What end-to-end tuning did (see `end_to_end.tuning.TuningResult`), in one line; "" for any other record."""
    try:
        kl = {int(step): float(value) for step, value in tuning["kl"].items()}
        return (f"{tuning['steps']} steps; held-out KL {kl[0]:.6f} before, {kl[tuning['best']]:.6f} behind step "
                f"{tuning['best']}, which is in the file")
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""


LOGGER = logging.getLogger("gptq_belle")
MIB = 1 << 20


class JobProgress(Protocol):
    """What the pipeline tells its caller."""

    def start(self, blocks: int, steps: int, finished: int) -> None:
        """The job has `blocks` blocks, `finished` of them by an earlier one, each of `steps` steps (forward batches and
        solutions)."""

    def step(self) -> None:
        """One step of the current block is done."""

    def linear(self, block: int, row: LinearReport, peak_memory: int | None) -> None:
        """A linear is solved."""

    def phase(self, text: str) -> None:
        """Something outside of the blocks begins."""


class LoggedProgress:
    """Logs a line for every linear and phase at level INFO under the name "gptq_belle", as AutoGPTQ does."""

    def start(self, blocks: int, steps: int, finished: int) -> None:
        """Log how many blocks there are."""
        LOGGER.info("%d of %d blocks are finished", finished, blocks)

    def step(self) -> None: ...

    def linear(self, block: int, row: LinearReport, peak_memory: int | None) -> None:
        """Log a finished linear."""
        LOGGER.info("%s: error %.2e, %.2f s", row.name, row.error, row.seconds)

    def phase(self, text: str) -> None:
        """Log what starts."""
        LOGGER.info("%s", text)


class NoProgress:
    """Shows nothing: the library's default."""

    def start(self, blocks: int, steps: int, finished: int) -> None: ...
    def step(self) -> None: ...
    def linear(self, block: int, row: LinearReport, peak_memory: int | None) -> None: ...
    def phase(self, text: str) -> None: ...
