"""All trained parameters as one vector of changes, so that one step of an optimizer fits all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Changes:
    """Parameters that are (1 + change) times what they were, as float16 holds it.

    Scales of different layers differ by orders of magnitude, and Adam's steps do not: so a scale's change is a share of
    itself, and that of a norm's or a bias's element a share of the root mean square of all of it, for single elements
    may be 0. Rounding to float16 has no gradient; it is passed over (arXiv 1308.3432, section 3: straight through).

    Args:
        parameters: matrices of scales, and vectors.

    Attributes:
        vector: a parameter, the changes; 0 at first.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._begun = torch.cat([part.detach().flatten() for part in self.parameters])
        self._units = torch.cat([_unit(part.detach()).flatten() for part in self.parameters])
        self.vector = nn.Parameter(torch.zeros_like(self._begun))

    @torch.no_grad()
    def apply(self, vector: Tensor | None = None) -> None:
        """Give the parameters the values that `vector` (or another one) stands for."""
        values = torch.addcmul(self._begun, self._units, self.vector if vector is None else vector)
        values = values.to(torch.float16).float()
        for part, value in zip(self.parameters, values.split([part.numel() for part in self.parameters]), strict=True):
            part.copy_(value.view(part.shape))

    @torch.no_grad()
    def collect(self) -> None:
        """Turn the parameters' gradients into the vector's."""
        grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in self.parameters]
        self.vector.grad = torch.cat([grad.flatten() for grad in grads]).mul_(self._units)
        for part in self.parameters:
            part.grad = None


def _unit(part: Tensor) -> Tensor:
    return part.abs() if part.ndim == 2 else part.square().mean().sqrt().expand(part.shape)
