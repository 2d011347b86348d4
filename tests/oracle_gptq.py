"""A second, slow implementation of GPTQ: the oracle of tests/test_solver.py.

Frantar et al., arXiv 2210.17323, section 3, with the update of equations (2) and (3): every column is quantized in
turn, the remaining columns are compensated, and the inverse Hessian is down-dated by Gaussian elimination.
No Cholesky factor, no lazy blocks, float64 throughout. It shares no code with the package.

Shapes: weight (N, K) with outputs in rows, hessian (K, K), codes (N, K), scales and zeros (N, G), g_idx (K,).
"""

from typing import NamedTuple

import numpy as np


class Oracle(NamedTuple):
    """``weight[n, k] ~ scales[n, g_idx[k]] * (codes[n, k] - zeros[n, g_idx[k]])``, all in the order of the inputs."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    g_idx: np.ndarray

    def dequantize(self) -> np.ndarray:
        return self.scales[:, self.g_idx] * (self.codes - self.zeros[:, self.g_idx])


def stored_scale(scale: float) -> float:
    """The scale as stored in the file: rounded to float32, the dtype of results, and then to float16."""
    half = float(np.float16(np.float32(scale)))
    return half if half >= 1e-7 else 1.0


def grid(weights: np.ndarray, bits: int, sym: bool) -> tuple[float, int]:
    """Scale and zero point of one group of one row."""
    maxq = 2**bits - 1
    low, high = min(0.0, float(weights.min())), max(0.0, float(weights.max()))
    if sym:
        return stored_scale(2 * max(-low, high) / maxq), 2 ** (bits - 1)
    scale = stored_scale((high - low) / maxq)
    return scale, int(np.clip(np.rint(-low / scale), 0, maxq))


def encode(column: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Codes of one column; np.rint rounds ties to even."""
    return np.clip(np.rint(column / scale) + zero, 0, 2**bits - 1).astype(np.int64)


def gptq_oracle(weight: np.ndarray, hessian: np.ndarray, *, bits: int, group_size: int, sym: bool,
                act_order: bool = False, damp: float = 0.01) -> Oracle:
    """GPTQ by equations (2) and (3)."""
    w, h = np.array(weight, dtype=np.float64), np.array(hessian, dtype=np.float64)
    rows, columns = w.shape
    for k in range(columns):
        if h[k, k] == 0:  # a never active input: its weight has no influence
            h[k, k] = 1.0
            w[:, k] = 0.0
    perm = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(columns)
    w, h = w[:, perm], h[np.ix_(perm, perm)]
    h_inv = np.linalg.inv(h + damp * np.mean(np.diag(h)) * np.eye(columns))

    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    codes = np.zeros((rows, columns), dtype=np.int64)
    scales, zeros = np.zeros((rows, groups)), np.zeros((rows, groups), dtype=np.int64)
    for q in range(columns):
        group = q // size
        if q % size == 0:
            for row in range(rows):
                scales[row, group], zeros[row, group] = grid(w[row, q : q + size], bits, sym)
        codes[:, q] = encode(w[:, q], scales[:, group], zeros[:, group], bits)
        error = w[:, q] - scales[:, group] * (codes[:, q] - zeros[:, group])
        w[:, q + 1 :] -= np.outer(error / h_inv[q, q], h_inv[q, q + 1 :])  # equation (2)
        rest = h_inv[q + 1 :, q] / h_inv[q, q]  # equation (3), for the remaining rows and columns
        h_inv[q + 1 :, q + 1 :] -= np.outer(rest, h_inv[q, q + 1 :])

    original = np.empty_like(codes)
    original[:, perm] = codes
    g_idx = np.empty(columns, dtype=np.int64)
    g_idx[perm] = np.arange(columns) // size
    return Oracle(original, scales, zeros, g_idx)


def static_oracle(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, zeros: np.ndarray, *, bits: int,
                  damp: float) -> np.ndarray:
    """Codes (N, K) on given grids (N, G), with inputs in order of decreasing H_kk and groups of neighbouring inputs.

    Solves the least-squares problem of equation (2): rounded columns are fixed, and the others take the values that
    minimize d (H + damping) d^T.
    """
    w, h = np.array(weight, dtype=np.float64), np.array(hessian, dtype=np.float64)
    order = list(np.argsort(-np.diag(h), kind="stable"))
    h += damp * np.mean(np.diag(h)) * np.eye(len(h))
    size = len(h) // scales.shape[1]
    codes, delta = np.zeros(w.shape, dtype=np.int64), np.zeros(w.shape)
    for place, k in enumerate(order):
        done, rest = order[:place], order[place:]
        moved = -np.linalg.solve(h[np.ix_(rest, rest)], h[np.ix_(rest, done)] @ delta[:, done].T).T
        codes[:, k] = encode(w[:, k] + moved[:, 0], scales[:, k // size], zeros[:, k // size], bits)
        delta[:, k] = scales[:, k // size] * (codes[:, k] - zeros[:, k // size]) - w[:, k]
    return codes


def nearest_oracle(weight: np.ndarray, *, bits: int, group_size: int, sym: bool) -> Oracle:
    """Rounding to nearest on the same grid."""
    w = np.array(weight, dtype=np.float64)
    rows, columns = w.shape
    size = columns if group_size == -1 else group_size
    g_idx = np.arange(columns) // size
    grids = [[grid(w[row, g_idx == g], bits, sym) for g in range(g_idx[-1] + 1)] for row in range(rows)]
    scales = np.array([[scale for scale, _ in row] for row in grids])
    zeros = np.array([[zero for _, zero in row] for row in grids])
    codes = np.stack([encode(w[:, k], scales[:, g_idx[k]], zeros[:, g_idx[k]], bits) for k in range(columns)], axis=1)
    return Oracle(codes, scales, zeros, g_idx)


def least_squares_oracle(weight: np.ndarray, hessian: np.ndarray, *, bits: int, sym: bool, damp: float) -> np.ndarray:
    """Codes for one group per row, from the least-squares problem that equation (2) solves.

    With the columns before q fixed, the columns from q on take the values that minimize d (H + damping) d^T for the
    whole row: d_rest = -d_done H_done,rest H_rest,rest^-1.
    """
    w, h = np.array(weight, dtype=np.float64), np.array(hessian, dtype=np.float64)
    h += damp * np.mean(np.diag(h)) * np.eye(len(h))
    grids = [grid(row, bits, sym) for row in w]
    scale, zero = np.array([s for s, _ in grids]), np.array([z for _, z in grids])
    codes, delta = np.zeros(w.shape, dtype=np.int64), np.zeros(w.shape)
    for q in range(w.shape[1]):
        rest = -np.linalg.solve(h[q:, q:], h[q:, :q] @ delta[:, :q].T).T
        codes[:, q] = encode(w[:, q] + rest[:, 0], scale, zero, bits)
        delta[:, q] = scale * (codes[:, q] - zero) - w[:, q]
    return codes


def relative_error(weight: np.ndarray, approximation: np.ndarray, hessian: np.ndarray) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T)."""
    w, h = np.asarray(weight, dtype=np.float64), np.asarray(hessian, dtype=np.float64)
    delta = w - np.asarray(approximation, dtype=np.float64)
    return float(np.trace(delta @ h @ delta.T) / np.trace(w @ h @ w.T))
