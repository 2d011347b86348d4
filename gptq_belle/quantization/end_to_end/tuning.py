"""End-to-end tuning: train scales, biases and norms towards the full-precision model's predictions, with fixed codes.

GPTQ minimizes the error of each layer alone. Adam (arXiv 1412.6980) then lowers the mean KL(full || quantized) of the
next token by changing the values that the file stores besides the codes. Training scales alone after a block-wise
calibration is the second phase of EfficientQAT (arXiv 2407.11062, section 3.3), which trains on the text itself instead
of the model's predictions.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptq_belle.checkpoint.writer import CheckpointWriter
from gptq_belle.quantization.end_to_end.student import RelativeChanges, Student, read_student
from gptq_belle.quantization.end_to_end.tuning_checkpoint import TuningCheckpoint
from gptq_belle.quantization.end_to_end.tuning_rows import TuningRows, tuning_rows
from gptq_belle.quantization.job import QuantizationJob
from gptq_belle.quantization.journal import Journal
from gptq_belle.quantization.report import JobProgress
from gptq_belle.quantization.verification import VERIFIED_BLOCK, BlockVerification

BATCH_TOKENS = 2048  # per step
CHUNK_TOKENS = 128  # tokens whose logits are in memory at a time
LEARNING_RATE, WARMUP_STEPS = 1e-3, 10  # the rate is relative to a scale, see `RelativeChanges`
BETAS, EPS = (0.9, 0.95), 1e-12  # gradients are tiny, because they belong to a mean over tokens and to relative changes
VALIDATE_EVERY = 10  # steps
PATIENCE = 6  # validation steps without improvement before early stopping
PART = "tuned.safetensors"  # sorts after all other parts, whose tensors it replaces


def tune_model(job: QuantizationJob, writer: CheckpointWriter, journal: Journal, verification: BlockVerification,
               progress: JobProgress) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Tune the finished blocks, and write the tuned tensors as a separate part.

    An interrupted phase resumes after its last validation step, with a bit-identical result.

    Returns:
        `TuningResult` as a dictionary for the report, and the expected output for `BlockVerification.compare`.
    """
    def step(index: int) -> None:
        progress.phase(f"computing the full-precision model's outputs: block {index + 1} of {job.stream.count}")

    stream, steps = job.stream, job.config.techniques.tuning_steps
    rows, held_out = tuning_rows(job, journal.folder / "rows.f32", step)
    parts = [stamp for record in journal.records for name, stamp in record.files.items() if name.startswith("parts/")]
    student = read_student(stream, writer.written(), job.config)
    head = torch.cat(list(stream.head()))
    result = Tuner(student, head, rows, held_out, TuningCheckpoint(journal.folder, parts), steps).run(progress)
    writer.add(PART, student.tensors())
    return asdict(result), verification.expected_output(stream, student.blocks[VERIFIED_BLOCK])


@dataclass(slots=True)
class TuningResult:
    """Course of tuning, for the report.

    Attributes:
        steps: number of steps taken.
        best: step whose parameters are written; 0 where no step improved.
        kl: mean KL(full || quantized) of the held-out rows in nats per token, by validated step.
    """

    steps: int = 0
    best: int = 0
    kl: dict[int, float] = field(default_factory=dict)

    def record(self, step: int, kl: float) -> bool:
        """Record a validation step; true where it is the best so far."""
        self.steps, self.kl[step] = step, kl
        if kl >= self.kl.get(self.best, math.inf) and step:
            return False
        self.best = step
        return True

    @property
    def should_stop(self) -> bool:
        """Whether early stopping applies."""
        return self.steps - self.best >= VALIDATE_EVERY * PATIENCE


class Tuner:
    """The training loop.

    Args:
        head: (vocabulary, hidden_size) float32, on the student's device.
        checkpoint: where progress is saved, and resumed from with a bit-identical result.
    """

    def __init__(self, student: Student, head: Tensor, rows: TuningRows, held_out: TuningRows,
                 checkpoint: TuningCheckpoint, steps: int) -> None:
        self.student, self.head, self.rows, self.held_out = student, head, rows, held_out
        self.checkpoint, self.steps = checkpoint, steps
        self.changes = RelativeChanges(list(student.parameters.values()))
        self.adam = torch.optim.Adam([self.changes.vector], lr=LEARNING_RATE, betas=BETAS, eps=EPS)
        self.best = self.changes.vector.detach().clone()
        self.result = TuningResult()

    def run(self, progress: JobProgress) -> TuningResult:
        """Train, and set the student's parameters to those with the lowest held-out KL."""
        first = self._resume()
        progress.start(1, self.steps - first, 0)
        self.changes.apply()
        for step in range(first, self.steps + 1):
            if step % VALIDATE_EVERY == 0 or step == self.steps:
                if step not in self.result.kl:
                    self._validate(step)
                progress.phase(f"tuning scales: step {step} of {self.steps}, held-out KL {self.result.kl[step]:.6f}, "
                               f"{self.result.kl[0]:.6f} at first")
                if self.result.should_stop:
                    break
            if step < self.steps:
                self._step(step)
                progress.step()
        self.changes.apply(self.best)
        return self.result

    def _validate(self, step: int) -> None:
        if self.result.record(step, self._held_out_kl()):
            self.best.copy_(self.changes.vector.detach())
        self._save(step)

    def _step(self, step: int) -> None:
        for group in self.adam.param_groups:
            warmup, cosine = min(1.0, (step + 1) / WARMUP_STEPS), 1 + math.cos(math.pi * step / self.steps)
            group["lr"] = LEARNING_RATE * warmup * cosine / 2
        accumulate_gradients(self.student, self.head, *self.rows.batch(step, BATCH_TOKENS))
        self.changes.collect()
        self.adam.step()
        self.changes.apply()

    @torch.no_grad()
    def _held_out_kl(self) -> float:
        total, count = 0.0, 0
        for inputs, targets in self.held_out.batches(BATCH_TOKENS):
            outputs = self.student.run(inputs).flatten(0, 1)
            for own, full in zip(outputs.split(CHUNK_TOKENS), targets.flatten(0, 1).split(CHUNK_TOKENS), strict=True):
                total += float(summed_kl(self.head, own, full.to(own.device)))
            count += len(outputs)
        return total / count

    def _save(self, step: int) -> None:
        state = self.adam.state[self.changes.vector]
        moments = {name: state[name] for name in ("step", "exp_avg", "exp_avg_sq")} if state else {}
        self.checkpoint.save(step, asdict(self.result), {
            name: tensor.detach().cpu() for name, tensor in
            ({"changes": self.changes.vector, "best": self.best} | moments).items()})

    def _resume(self) -> int:
        """Load the checkpoint, if there is one; returns the first step to take."""
        if (saved := self.checkpoint.load()) is None:
            return 0
        state: dict[str, Any] = saved.state
        self.result = TuningResult(state["steps"], state["best"], {int(step): kl for step, kl in state["kl"].items()})
        vector = self.changes.vector
        tensors = {name: tensor.to(vector.device) for name, tensor in saved.tensors.items()}
        self.best = tensors.pop("best")
        vector.data.copy_(tensors.pop("changes"))
        if tensors:
            self.adam.state[vector] = tensors | {"step": saved.tensors["step"]}
        return saved.step


def accumulate_gradients(student: Student, head: Tensor, inputs: Tensor, targets: Tensor) -> None:
    """Add the gradient of the mean KL(full || student) to the student's parameters.

    Only the logits of `CHUNK_TOKENS` tokens are in memory at a time.

    Args:
        student: the model to train.
        head: (vocabulary, hidden_size).
        inputs: (rows, T, hidden_size), inputs of the first block.
        targets: (rows, T, hidden_size), inputs of the full-precision model's head.
    """
    outputs = student.run(inputs)
    leaf = outputs.detach().flatten(0, 1).requires_grad_()
    for own, full in zip(leaf.split(CHUNK_TOKENS), targets.flatten(0, 1).split(CHUNK_TOKENS), strict=True):
        (summed_kl(head, own, full.to(own.device)) / len(leaf)).backward()
    assert leaf.grad is not None
    outputs.backward(leaf.grad.view_as(outputs))


def summed_kl(head: Tensor, states: Tensor, targets: Tensor) -> Tensor:
    """KL(full || student) summed over tokens, in nats; differentiable in `states`.

    Args:
        head: (vocabulary, hidden_size).
        states: (tokens, hidden_size), inputs of the student's head.
        targets: (tokens, hidden_size), inputs of the full-precision model's head.
    """
    full = (targets @ head.t()).log_softmax(1)
    own = (states @ head.t()).log_softmax(1)
    return ((full - own) * full.exp()).sum()
