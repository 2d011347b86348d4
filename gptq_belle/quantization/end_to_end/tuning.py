"""End-to-end tuning: scales, biases and norms are moved towards the full-precision model's predictions, codes fixed.

GPTQ minimises each layer's error by itself. What is left of it can be made up for in what the file holds beside the
codes: Adam (arXiv 1412.6980) lowers the mean KL(full || quantized) of the next token. Training scales alone behind a
calibration by blocks is the second phase of EfficientQAT (arXiv 2407.11062, section 3.3), with the model's predictions
for its text.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptq_belle.quantization.end_to_end.rows import TuningRows
from gptq_belle.quantization.end_to_end.savepoint import Savepoint
from gptq_belle.quantization.end_to_end.student import RelativeChanges, Student
from gptq_belle.quantization.report import JobProgress

BATCH = 2048  # tokens a step
CHUNK = 128  # tokens whose predictions over the vocabulary are in memory at a time
RATE, WARM = 1e-3, 10  # Adam's largest step, as a share of a scale, and how many steps it grows for
BETAS, EPS = (0.9, 0.95), 1e-12  # gradients are tiny: those of a mean over tokens to shares of scales
EVERY, PATIENCE = 10, 6  # steps between two looks at the held-out rows, and looks without a gain before the end


@dataclass(slots=True)
class TuningResult:
    """What tuning did, for the report.

    Attributes:
        steps: how many were taken.
        best: behind which of them the parameters are those of the file; 0 where none was a gain.
        kl: mean KL(full || quantized) of the held-out rows in nats a token, at every look, by step.
    """

    steps: int = 0
    best: int = 0
    kl: dict[int, float] = field(default_factory=dict)

    def look(self, step: int, kl: float) -> bool:
        """Note a look; true where it is the best so far."""
        self.steps, self.kl[step] = step, kl
        if kl >= self.kl.get(self.best, math.inf) and step:
            return False
        self.best = step
        return True

    @property
    def over(self) -> bool:
        """Whether the held-out rows have not gained for so long that they will not."""
        return self.steps - self.best >= EVERY * PATIENCE


class Tuning:
    """The loop.

    Args:
        student: the quantized model.
        head: (vocabulary, hidden_size) float32, on the student's device.
        rows: to learn from.
        held_out: to stop by.
        savepoint: where it goes on after an interruption, bit for bit.
        steps: how many, at most.
    """

    def __init__(self, student: Student, head: Tensor, rows: TuningRows, held_out: TuningRows, savepoint: Savepoint,
                 steps: int) -> None:
        self.student, self.head, self.rows, self.held_out = student, head, rows, held_out
        self.savepoint, self.steps = savepoint, steps
        self.changes = RelativeChanges(list(student.parameters.values()))
        self.adam = torch.optim.Adam([self.changes.vector], lr=RATE, betas=BETAS, eps=EPS)
        self.best = self.changes.vector.detach().clone()
        self.told = TuningResult()

    def run(self, progress: JobProgress) -> TuningResult:
        """Tune, and leave the student with the parameters that the held-out rows liked best."""
        first = self._resume()
        progress.start(1, self.steps - first, 0)
        self.changes.apply()
        for step in range(first, self.steps + 1):
            if step % EVERY == 0 or step == self.steps:
                if step not in self.told.kl:
                    self._look(step)
                progress.phase(f"tuning scales: step {step} of {self.steps}, held-out KL {self.told.kl[step]:.6f}, "
                               f"{self.told.kl[0]:.6f} at first")
                if self.told.over:
                    break
            if step < self.steps:
                self._step(step)
                progress.step()
        self.changes.apply(self.best)
        return self.told

    def _look(self, step: int) -> None:
        if self.told.look(step, self._held_out_kl()):
            self.best.copy_(self.changes.vector.detach())
        self._save(step)

    def _step(self, step: int) -> None:
        for group in self.adam.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM) * (1 + math.cos(math.pi * step / self.steps)) / 2
        learn(self.student, self.head, *self.rows.batch(step, BATCH))
        self.changes.collect()
        self.adam.step()
        self.changes.apply()

    @torch.no_grad()
    def _held_out_kl(self) -> float:
        total, count = 0.0, 0
        for states, aims in self.held_out.batches(BATCH):
            found = self.student.run(states).flatten(0, 1)
            for own, aim in zip(found.split(CHUNK), aims.flatten(0, 1).split(CHUNK), strict=True):
                total += float(divergence(self.head, own, aim.to(own.device)))
            count += len(found)
        return total / count

    def _save(self, step: int) -> None:
        state = self.adam.state[self.changes.vector]
        moments = {name: state[name] for name in ("step", "exp_avg", "exp_avg_sq")} if state else {}
        self.savepoint.save(step, asdict(self.told), {
            name: tensor.detach().cpu() for name, tensor in
            ({"changes": self.changes.vector, "best": self.best} | moments).items()})

    def _resume(self) -> int:
        """The step to go on with."""
        if (saved := self.savepoint.load()) is None:
            return 0
        told: dict[str, Any] = saved.state
        self.told = TuningResult(told["steps"], told["best"], {int(step): kl for step, kl in told["kl"].items()})
        vector = self.changes.vector
        tensors = {name: tensor.to(vector.device) for name, tensor in saved.tensors.items()}
        self.best = tensors.pop("best")
        vector.data.copy_(tensors.pop("changes"))
        if tensors:
            self.adam.state[vector] = tensors | {"step": saved.tensors["step"]}
        return saved.step


def learn(student: Student, head: Tensor, states: Tensor, aims: Tensor) -> None:
    """Leave the gradient of the mean KL(full || student) with the student's parameters; some tokens' predictions are in
    memory at a time.

    Args:
        student: to be trained.
        head: (vocabulary, hidden_size).
        states: (rows, T, hidden_size) in front of the first block.
        aims: the same of the full-precision model in front of the head.
    """
    found = student.run(states)
    leaf = found.detach().flatten(0, 1).requires_grad_()
    for own, aim in zip(leaf.split(CHUNK), aims.flatten(0, 1).split(CHUNK), strict=True):
        (divergence(head, own, aim.to(own.device)) / len(leaf)).backward()
    assert leaf.grad is not None
    found.backward(leaf.grad.view_as(found))


def divergence(head: Tensor, states: Tensor, aims: Tensor) -> Tensor:
    """The sum of KL(full || student) over tokens, in nats; differentiable in `states`.

    Args:
        head: (vocabulary, hidden_size).
        states: (tokens, hidden_size), in front of the head, the student's.
        aims: the same of the full-precision model.
    """
    full = (aims @ head.t()).log_softmax(1)
    own = (states @ head.t()).log_softmax(1)
    return ((full - own) * full.exp()).sum()
