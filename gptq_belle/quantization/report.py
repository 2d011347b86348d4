"""The report of a quantization job (quantization_report.json), and its progress callbacks."""

import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from gptq_belle.quantization.config import QuantConfig

REPORT = "quantization_report.json"
LOGGER = logging.getLogger("gptq_belle")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class LinearReport:
    """One linear of the report.

    Attributes:
        name: full name in the model.
        error: squared error of the output on the calibration rows, relative to the squared output; with method rtn,
            which uses no inputs, of the weights.
        damp: damping that was used; 0 for rtn.
        seconds: time to quantize it.
        inputs, outputs: K and N.
        bits: bits per weight; 16 for a linear kept in float16, whose rounding is then the error.
        won: the chosen candidate (see `candidate_selection.ChosenSolution`); "" for rtn.
        held_out: error of each candidate on held-out rows; empty without held-out rows.
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
    """Content of quantization_report.json.

    Attributes:
        calibration: description of the calibration rows (see `Calibration.describe`); None for rtn.
        choice: bit allocation with the measured losses (see `auto_bits.choose_bits`); None without a budget.
        linears: one row per linear, in the order of solving.
        phases: seconds of each block by phase; "total" is the whole block.
        refinement: one row per refined block (`block_refinement.refinement.RefinementResult`).
        notes: unplanned events, such as a block that fell back to the CPU.
        resumed: the first block of this run where it resumed an interrupted one; otherwise empty.
        seconds: working time of the job, without blocks that were started and not finished.
        peak_memory: peak of anonymous memory in bytes; None where the system does not report it.
        bytes_on_disk: size of the weight files.
        readback_error: largest difference between a block's output computed from the written file and its output when
            it was quantized, relative to the largest value.
        versions: gptq_belle, torch, transformers, python.
    """

    source: str
    settings: QuantConfig
    calibration: dict[str, Any] | None = None
    choice: dict[str, Any] | None = None
    linears: list[LinearReport] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    refinement: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int | None = None
    bytes_on_disk: int = 0
    readback_error: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def mean_error(self) -> float:
        """Mean relative error of the linears."""
        return sum(row.error for row in self.linears) / max(1, len(self.linears))

    @property
    def average_bits(self) -> float:
        """Bits per weight over all linears, without scales and zero points."""
        weights = sum(row.inputs * row.outputs for row in self.linears)
        return sum(row.bits * row.inputs * row.outputs for row in self.linears) / max(1, weights)

    @property
    def winners(self) -> dict[str, int]:
        """Number of linears by chosen candidate, where held-out rows decided between several."""
        return dict(Counter(row.won for row in self.linears if len(row.held_out) > 1).most_common())

    @property
    def refined(self) -> str:
        """Effect of block refinement in one line; "" without it."""
        if not self.refinement:
            return ""
        ratios = [row["after"] / row["before"] for row in self.refinement if row["before"] > 0]
        mean = sum(ratios) / max(1, len(ratios))
        return (f"error of the blocks' outputs on held-out rows {mean:.3f} times that before, "
                f"{sum(row['kept'] > 0 for row in self.refinement)} of {len(self.refinement)} blocks changed")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {**asdict(self), "mean_error": self.mean_error, "average_bits": self.average_bits,
                "winners": self.winners, "refined": self.refined}


class JobProgress(Protocol):
    """Progress callbacks of a job."""

    def start(self, blocks: int, steps: int, finished: int) -> None:
        """The job has `blocks` blocks with `steps` steps (forward batches and solutions) each; `finished` are done."""

    def step(self) -> None:
        """One step of the current block is done."""

    def linear(self, block: int, row: LinearReport, peak_memory: int | None) -> None:
        """A linear is quantized; this is a step too."""

    def phase(self, text: str) -> None:
        """A phase outside of the blocks starts."""


class NoProgress:
    """Ignores all callbacks: the default of the library."""

    def start(self, blocks: int, steps: int, finished: int) -> None: ...
    def step(self) -> None: ...
    def linear(self, block: int, row: LinearReport, peak_memory: int | None) -> None: ...
    def phase(self, text: str) -> None: ...


class LoggedProgress(NoProgress):
    """Logs a line for every linear and phase at level INFO under the name "gptq_belle", as AutoGPTQ does."""

    def linear(self, block: int, row: LinearReport, peak_memory: int | None) -> None:
        LOGGER.info("%s: error %.2e, %.2f s", row.name, row.error, row.seconds)

    def phase(self, text: str) -> None:
        LOGGER.info("%s", text)
