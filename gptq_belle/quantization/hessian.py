"""The layer-wise Hessian H = X^T X / n of the calibration inputs X, and the Cholesky factor of its inverse."""

import torch
from torch import Tensor

from gptq_belle.errors import InputError
from gptq_belle.formats.gptq_weight import ROWS_AT_A_TIME, all_finite

COLUMNS = 512  # of the sum at a time: of 4096 x 4096 products 56 % are computed, in pieces that are no slower a product
LARGEST_DAMP = 1.0  # beyond, H is mostly the identity and GPTQ mostly rounding to nearest: better said than done


class HessianMean:
    """The running mean of x x^T over calibration tokens, in float32.

    Of its two equal triangles one is summed up.

    Attributes:
        tokens: how many inputs it has seen.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in activations x (..., K) of any float dtype."""
        x = x.reshape(-1, x.shape[-1]).float()
        total = self.tokens + x.shape[0]
        for k1 in range(0, x.shape[1], COLUMNS):
            k2 = min(k1 + COLUMNS, x.shape[1])
            self._sum[k1:k2, :k2].addmm_(x[:, k1:k2].t(), x[:, :k2], beta=self.tokens / total, alpha=1 / total)
        self.tokens = total

    @property
    def value(self) -> Tensor:
        """(K, K) float32, symmetric; of this object, not a copy."""
        for k1 in range(0, len(self._sum), COLUMNS):
            k2 = min(k1 + COLUMNS, len(self._sum))
            self._sum[k1:k2, k2:] = self._sum[k2:, k1:k2].t()
        return self._sum


class CrossProductMean:
    """The running mean of x y^T over calibration tokens, in float32.

    Attributes:
        value: (K, K) float32.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.value = torch.zeros(features, features, dtype=torch.float32, device=device)
        self._tokens = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in activations x and y (..., K) of any float dtype."""
        x, y = (part.reshape(-1, part.shape[-1]).float() for part in (x, y))
        total = self._tokens + x.shape[0]
        self.value.addmm_(x.t(), y, beta=self._tokens / total, alpha=1 / total)
        self._tokens = total


def nonzero_diagonal(hessian: Tensor) -> Tensor:
    """The diagonal (K,) of H with 1 in the place of 0: an input that was never active is then left alone."""
    diagonal = hessian.diagonal()
    return torch.where(diagonal == 0, 1.0, diagonal)


def inverse_cholesky(hessian: Tensor, damp: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """The upper triangular U with U^T U = (H + damp * mean(diag H) * I)^-1 (GPTQ, section 3.3, step 3).

    Where the Cholesky factorization fails, damping is raised tenfold, up to 1; the value used is returned.
    One further K x K matrix is alive beside `hessian`, which is left as it is: LAPACK works in place on a matrix that
    lies column by column, as does torch where result and argument are the same such matrix.

    Args:
        hessian: (K, K) float32 or float64, symmetric.
        damp: first damping, as a share of the mean of `nonzero_diagonal`.
        order: (K,) int64, a permutation to apply to H first.
    Raises:
        InputError: not positive definite even with the largest damping.
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
            if not failed and all_finite(work.t()):  # by rows, it would be copied
                return work, damp
        del work
        if damp >= LARGEST_DAMP:
            raise InputError(f"the Hessian is not positive definite, even damped by {damp:g} of its mean diagonal",
                             "Use more or more varied calibration text, and check the model's weights for damage.")
        damp = min(10 * damp, LARGEST_DAMP)


def remaining_error(upper: Tensor, order: Tensor | None) -> Tensor:
    """1 / [H^-1]_kk (K,): how much rounding input k costs once all others have made up for it as well as they can.

    It is the denominator of the loss in Optimal Brain Surgeon (GPTQ, equation 2); H_kk is what it costs where none do.

    Args:
        upper: U of `inverse_cholesky`, whose columns' squares sum to the diagonal of the inverse.
        order: that U was made for.
    """
    found = torch.linalg.vector_norm(upper, dim=0).square_().reciprocal_()
    return found if order is None else torch.empty_like(found).index_copy_(0, order, found)


def _column_major(matrix: Tensor, order: Tensor | None) -> Tensor:
    """A copy that lies column by column, its rows and columns in another order where one is given."""
    copy = torch.empty_like(matrix, memory_format=torch.contiguous_format).t()
    if order is None:
        return copy.copy_(matrix)
    for place, part in zip(torch.arange(len(order)).split(ROWS_AT_A_TIME), order.split(ROWS_AT_A_TIME), strict=True):
        copy[place[0] : place[-1] + 1] = matrix[part][:, order]
    return copy
