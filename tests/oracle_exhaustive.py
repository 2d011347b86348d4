"""Grid search and refinement by exhaustive search: the oracle of test_grid and test_refine.

float64 and NumPy throughout, one output and one weight at a time; shares no code with the package.
"""

import numpy as np


def half(value: float) -> float:
    """Round to float32, the dtype of results, and then to float16, the dtype of the file."""
    return float(np.float16(np.float32(value)))


def rounded(weights: np.ndarray, scale: float, zero: int, bits: int) -> np.ndarray:
    return scale * (np.clip(np.rint(weights / scale) + zero, 0, 2**bits - 1) - zero)


def spans(weights: np.ndarray, bits: int, sym: bool, positive: bool) -> list[tuple[float, int]]:
    """All candidate scales and zero points for one group of one output."""
    middle, top = 2 ** (bits - 1), 2**bits - 1
    shares = [0.55 + 0.55 * i / 26 for i in range(27)]
    if sym:
        largest = float(np.abs(weights).max())
        found = [half(largest / (middle - 0.5) * share) for share in shares] + [half(largest / middle)]
        return [(sign * scale, middle) for scale in found for sign in ((1,) if positive else (1, -1))]
    low, high = min(0.0, float(weights.min())), max(0.0, float(weights.max()))
    found = [half((high - low) / top * share) for share in (*shares, 1.0)]
    return [(scale, int(np.clip(np.rint(-low * share / scale), 0, top))) if scale else (0.0, 0)
            for scale, share in zip(found, (*shares, 1.0), strict=True)]


def searched(weights: np.ndarray, importance: np.ndarray, bits: int, sym: bool, positive: bool) -> float:
    """The smallest weighted error of one group of one output."""
    errors = [float(importance @ (rounded(weights, scale, zero, bits) - weights) ** 2)
              for scale, zero in spans(weights, bits, sym, positive) if abs(scale) >= 1e-5]
    return min(errors, default=float(importance @ weights**2))


def refined(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, weight: np.ndarray, hessian: np.ndarray, *,
            bits: int, sweeps: int, positive: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, K) and scales (N, G) after some sweeps, each step by exhaustive search.

    A scale is the minimum of the parabola through three errors; a code is the best of all 2**bits.
    """
    codes, scales = codes.astype(np.int64).copy(), scales.copy()
    outputs, inputs = codes.shape
    size = inputs // scales.shape[1]
    owner = np.arange(inputs) // size

    def error(row: int) -> float:
        delta = scales[row, owner] * (codes[row] - zeros[row, owner]) - weight[row]
        return float(delta @ hessian @ delta)

    for _ in range(sweeps):
        for row in range(outputs):
            for group in range(scales.shape[1]):
                scales[row, group] = _best_scale(error, scales, row, group, positive)
                for k in range(group * size, (group + 1) * size):
                    found = []
                    for code in range(2**bits):
                        codes[row, k] = code
                        found.append(error(row))
                    codes[row, k] = int(np.argmin(found))
    return codes, scales


def _best_scale(error, scales, row: int, group: int, positive: bool) -> float:
    before = scales[row, group]
    errors = []
    for scale in (before - 1, before, before + 1):
        scales[row, group] = scale
        errors.append(error(row))
    scales[row, group] = before
    bend = errors[0] - 2 * errors[1] + errors[2]
    if bend < 1e-9:
        return before
    found = half(before + 0.5 * (errors[0] - errors[2]) / bend)
    scales[row, group] = found
    better = error(row) < errors[1] and abs(found) >= 1e-5 and (found > 0 or not positive)
    scales[row, group] = before
    return found if better else before
