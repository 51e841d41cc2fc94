"""The top-AFA rule, written again from its definition.

Nothing here imports the package. ``kept_exactly`` decides in rational arithmetic, so it has no
rounding at all; ``keep_brute_force`` is the plain formula in NumPy float64 for many rows.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def kept_exactly(scores: list[float], target: float) -> list[int]:
    """Indices kept by the rule for one row, in exact arithmetic.

    c_k is strictly nearer to t than c_{k-1} if c_k + c_{k-1} < 2t. Squared twice, that needs no
    roots: with S = c^2, r = 4 t^2 - S_k - S_{k-1}, it is r > 0 and 4 S_k S_{k-1} < r^2.
    """
    order = sorted((i for i, s in enumerate(scores) if s > 0), key=lambda i: (-scores[i], i))
    if not order:
        return []
    t = max(Fraction(target), Fraction(0))
    best, total = 1, Fraction(scores[order[0]]) ** 2
    for k in range(2, len(order) + 1):
        following = total + Fraction(scores[order[k - 1]]) ** 2
        rest = 4 * t * t - total - following
        if not (rest > 0 and 4 * total * following < rest * rest):
            break
        best, total = k, following
    return sorted(order[:best])


def keep_brute_force(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The mask ``[n, h]`` of kept scores: all distances, the first of the smallest.

    Squares below 1e-16 of the sum do not move a float64 sum, so the distances of the last
    features can look equal where they are not. One consequence of the definition settles that:
    where the norm of all positive scores is below the target, all of them are kept.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    values = np.take_along_axis(scores, order, axis=1).astype(np.float64)
    norms = np.sqrt(np.cumsum(np.where(values > 0, values, 0.0) ** 2, axis=1))
    distance = np.where(values > 0, np.abs(norms - targets[:, None].astype(np.float64)), np.inf)
    kept = np.where((values > 0).any(axis=1), distance.argmin(axis=1) + 1, 0)
    kept = np.where(norms[:, -1] < targets, (values > 0).sum(axis=1), kept)
    first = np.arange(scores.shape[1])[None, :] < kept[:, None]
    mask = np.zeros_like(first)
    np.put_along_axis(mask, order, first, axis=1)
    return mask
