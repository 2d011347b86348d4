"""The layer-wise Hessian H = X^T X / n of the calibration inputs X, the Cholesky factor of its inverse, and the output
error that H measures."""

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.formats.gptq_weight import ROWS_AT_A_TIME, QuantizedWeight, all_finite, dequantize

COLUMNS = 512  # at a time: 56 % of a symmetric 4096 x 4096 product is computed, at the speed of the whole product
LARGEST_DAMP = 1.0  # with more damping H is nearly the identity, and GPTQ silently becomes rounding to nearest


class HessianMean:
    """Running mean of x x^T over calibration tokens, in float32; only the lower triangle is accumulated.

    Attributes:
        tokens: number of inputs accumulated.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._mean = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Accumulate activations x (..., K) of any float dtype."""
        x = x.reshape(-1, x.shape[-1]).float()
        total = self.tokens + x.shape[0]
        for k1 in range(0, x.shape[1], COLUMNS):
            k2 = min(k1 + COLUMNS, x.shape[1])
            self._mean[k1:k2, :k2].addmm_(x[:, k1:k2].t(), x[:, :k2], beta=self.tokens / total, alpha=1 / total)
        self.tokens = total

    @property
    def value(self) -> Tensor:
        """(K, K) float32, symmetric; a view of this object's tensor, not a copy."""
        for k1 in range(0, len(self._mean), COLUMNS):
            k2 = min(k1 + COLUMNS, len(self._mean))
            self._mean[k1:k2, k2:] = self._mean[k2:, k1:k2].t()
        return self._mean


class CrossProductMean:
    """Running mean of x y^T over calibration tokens, in float32.

    Attributes:
        value: (K, K) float32.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.value = torch.zeros(features, features, dtype=torch.float32, device=device)
        self._tokens = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Accumulate activations x and y (..., K) of any float dtype."""
        x, y = (part.reshape(-1, part.shape[-1]).float() for part in (x, y))
        total = self._tokens + x.shape[0]
        self.value.addmm_(x.t(), y, beta=self._tokens / total, alpha=1 / total)
        self._tokens = total


def nonzero_diagonal(hessian: Tensor) -> Tensor:
    """The diagonal (K,) of H with 1 in place of the 0 of inputs that were never active."""
    diagonal = hessian.diagonal()
    return torch.where(diagonal == 0, 1.0, diagonal)


def inverse_cholesky(hessian: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """Hinv, the upper triangular U with U^T U = (H + damp * mean(diag H) * I)^-1 (GPTQ, section 3.3, step 3).

    If the factorization fails, damping is raised tenfold, up to 1. Only one K x K matrix is allocated, because LAPACK
    (and torch with it) works in place on a column-major matrix; `hessian` is not changed.

    Args:
        hessian: (K, K) float32 or float64, symmetric.
        damp: first damping, as a share of the mean of `nonzero_diagonal`.
        order: (K,) int64, a permutation to apply to H first (see `activation_order`).
    Returns:
        U (K, K), and the damping that was used.
    Raises:
        InputError: H is not positive definite even with the largest damping.
    """
    diagonal = nonzero_diagonal(hessian)
    mean = diagonal.mean()
    if order is not None:
        diagonal = diagonal[order]
    failed = torch.zeros((), dtype=torch.int32, device=hessian.device)
    while True:
        work = _column_major(hessian, order)
        work.diagonal().copy_(diagonal + damp * mean)
        torch.linalg.cholesky_ex(work, out=(work, failed))
        if not failed:
            torch.cholesky_inverse(work, out=work)
            torch.linalg.cholesky_ex(work, upper=True, out=(work, failed))
            if not failed and all_finite(work.t()):  # the transpose is contiguous; otherwise it would be copied
                return work, damp
        del work
        if damp >= LARGEST_DAMP:
            raise InputError(f"the Hessian is not positive definite, even damped by {damp:g} of its mean diagonal",
                             "Use more or more varied calibration text, and check the model's weights for damage.")
        damp = min(10 * damp, LARGEST_DAMP)


def remaining_error(Hinv: Tensor) -> Tensor:
    """1 / [H^-1]_kk (K,): the error of rounding input k that remains after compensation by all other inputs.

    Its inverse is the denominator of the loss in Optimal Brain Surgeon (GPTQ, equation 2). Without compensation the
    error is H_kk.

    Args:
        Hinv: U of `inverse_cholesky`; the squared norms of its columns are the diagonal of the inverse.
    """
    return torch.linalg.vector_norm(Hinv, dim=0).square_().reciprocal_()


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor | None) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W - Q, computed some rows at a time; H = I where `hessian` is None.

    Args:
        weight: W (N, K).
        quantized: Q (N, K).
        hessian: (K, K), undamped.
    """
    if hessian is not None:
        hessian = hessian.to(weight.dtype)
    total = lost = 0.0
    for start in range(0, weight.shape[0], ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        lost += _energy(weight[part] - dequantize(rows_of(quantized, part)), hessian)
        total += _energy(weight[part], hessian)
    return max(0.0, lost) / total if total > 0 else 0.0


def rows_of(quantized: QuantizedWeight, part: slice) -> QuantizedWeight:
    """Some output rows of a quantized weight."""
    codes, scales, zeros = (tensor[part] for tensor in quantized[:3])
    return QuantizedWeight(codes, scales, zeros, quantized.g_idx)


def _energy(matrix: Tensor, hessian: Tensor | None) -> float:
    """tr(M H M^T); only the upper triangle of the symmetric product is computed."""
    if hessian is None:
        return float(torch.sum(matrix * matrix, dtype=torch.float64))
    total, K = 0.0, matrix.shape[1]
    for k1 in range(0, K, COLUMNS):
        k2 = min(k1 + COLUMNS, K)
        image = (matrix[:, k1:k2] @ hessian[k1:k2, k1:]).mul_(matrix[:, k1:])
        total += 2 * float(image.sum(dtype=torch.float64)) - float(image[:, : k2 - k1].sum(dtype=torch.float64))
    return total


def _column_major(matrix: Tensor, order: Tensor | None) -> Tensor:
    """A column-major copy, its rows and columns permuted where an order is given."""
    copy = torch.empty_like(matrix, memory_format=torch.contiguous_format).t()
    if order is None:
        return copy.copy_(matrix)
    for place, part in zip(torch.arange(len(order)).split(ROWS_AT_A_TIME), order.split(ROWS_AT_A_TIME), strict=True):
        copy[place[0] : place[-1] + 1] = matrix[part][:, order]
    return copy
