"""When a result of a kernel agrees with the reference."""

from torch import Tensor


class WrongProduct(Exception):
    """A kernel disagrees with the reference."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    """In the Frobenius norm."""
    return float((found.double() - exact).norm() / exact.norm())


def accepted(error: float, allowed: float) -> dict[str, float]:
    """The error as a result.

    Raises:
        WrongProduct: it is too large.
    """
    if not error < allowed:
        raise WrongProduct(f"relative error {error:.2e}, {allowed:.0e} is allowed")
    return {"error": error}
