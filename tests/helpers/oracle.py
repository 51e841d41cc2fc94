"""The prefix rule, written again from its definition; the top-AFA rule is its case p = 2 per row.

Nothing here imports the package. ``kept_exactly`` and ``kept_exactly_of_batch`` decide in rational
arithmetic, so they have no rounding at all; ``keep_brute_force`` is the plain formula in NumPy
float64 for many rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def kept_exactly(scores: list[float], target: float, p: int = 2) -> list[int]:
    """Indices kept by the rule for one row, in exact arithmetic."""
    (kept,) = kept_exactly_of_batch([scores], [target], p)
    return kept


def kept_exactly_of_batch(
    scores: list[list[float]], targets: list[float], p: int
) -> list[list[int]]:
    """Indices kept in each row where all rows stand in one order and share one target."""
    usable = [
        i
        for i, row in enumerate(scores)
        if all(map(math.isfinite, row)) and math.isfinite(targets[i])
    ]
    entries = [(-s, i, j) for i in usable for j, s in enumerate(scores[i]) if s > 0]
    entries.sort()
    goal = sum((max(Fraction(targets[i]), Fraction(0)) ** max(p, 1) for i in usable), Fraction(0))
    kept = entries[: _prefix([Fraction(-s) for s, _, _ in entries], goal, p)]
    return [sorted(j for _, i, j in kept if i == row) for row in range(len(scores))]


def _prefix(values: list[Fraction], goal: Fraction, p: int) -> int:
    """The k with the smallest |c_k - t|, for values from the largest and goal = t^2 (p = 2) or t.

    Without powers the distances are rational. For p = 2, c_k is strictly nearer to t than c_{k-1}
    if c_k + c_{k-1} < 2t. Squared twice, that needs no roots: with S = c^2,
    r = 4 t^2 - S_k - S_{k-1}, it is r > 0 and 4 S_k S_{k-1} < r^2.
    """
    if p < 2:
        sums = [sum((v**p for v in values[:k]), Fraction(0)) for k in range(1, len(values) + 1)]
        return 1 + min(range(len(sums)), key=lambda i: abs(sums[i] - goal)) if sums else 0
    best, total = 0, Fraction(0)
    for value in values:
        following = total + value**2
        rest = 4 * goal - total - following
        if best > 0 and not (rest > 0 and 4 * total * following < rest * rest):
            break
        best, total = best + 1, following
    return best


def keep_brute_force(
    scores: np.ndarray, targets: np.ndarray, p: int = 2, per: str = "row"
) -> np.ndarray:
    """The mask ``[n, h]`` of kept scores: all distances, the first of the smallest.

    Powers below 1e-16 of the sum do not move a float64 sum, so the distances of the last
    features can look equal where they are not. One consequence of the definition settles that:
    where all positive scores together are below the target, all of them are kept.
    """
    targets = targets.astype(np.float64)
    if per == "batch":
        usable = np.isfinite(scores).all(axis=1) & np.isfinite(targets)
        powers = np.maximum(targets[usable], 0.0) ** max(p, 1)
        total = np.sqrt(powers.sum()) if p == 2 else powers.sum()
        one_row = np.where(usable[:, None], scores, 0).reshape(1, -1)
        return keep_brute_force(one_row, np.array([total]), p).reshape(scores.shape)
    order = np.argsort(-scores, axis=1, kind="stable")
    values = np.take_along_axis(scores, order, axis=1).astype(np.float64)
    powers = np.where(values > 0, np.maximum(values, 0.0) ** p, 0.0)
    sums = np.cumsum(powers, axis=1)
    c = np.sqrt(sums) if p == 2 else sums
    distance = np.where(values > 0, np.abs(c - targets[:, None]), np.inf)
    kept = np.where((values > 0).any(axis=1), distance.argmin(axis=1) + 1, 0)
    kept = np.where(c[:, -1] < targets, (values > 0).sum(axis=1), kept)
    first = np.arange(scores.shape[1])[None, :] < kept[:, None]
    mask = np.zeros_like(first)
    np.put_along_axis(mask, order, first, axis=1)
    return mask


# --- rules that look at the residual ---


def _order(acts: list[float], W_dec: list[list[float]]) -> list[int]:
    """Features with a positive score, the largest first, by the squares of their scores."""
    squares = [Fraction(a) ** 2 * _dot(d, d) for a, d in zip(acts, W_dec, strict=True)]
    offered = [i for i, a in enumerate(acts) if a > 0 and squares[i] > 0]
    return sorted(offered, key=lambda i: (-squares[i], i))


def order_is_clear(acts: list[float], W_dec: list[list[float]]) -> bool:
    """Whether rounded norms put the scores in the same order.

    Scores of an equal activation and an equal norm are equal however they are rounded.
    """
    parts = [(Fraction(a), _dot(d, d)) for a, d in zip(acts, W_dec, strict=True) if a > 0]
    return all(
        one == other or abs(one[0] ** 2 * one[1] - other[0] ** 2 * other[1]) * 10**5 > one[1]
        for i, one in enumerate(parts)
        for other in parts[:i]
    )


def _dot(a: Sequence[float | Fraction], b: Sequence[float | Fraction]) -> Fraction:
    return sum((Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)), Fraction(0))


def _energy_without(
    kept: list[int], acts: list[float], sae_in: list[float], W_dec: list[list[float]]
) -> Fraction:
    """``||y - sum over kept of acts_i d_i||^2``, from the beginning every time."""
    rest = [
        Fraction(y) - sum((Fraction(acts[i]) * Fraction(W_dec[i][c]) for i in kept), Fraction(0))
        for c, y in enumerate(sae_in)
    ]
    return _dot(rest, rest)


def left_one_out_exactly(
    acts: list[float],
    sae_in: list[float],
    W_dec: list[list[float]],
    price: float,
    leniency: float = 0.0,
) -> tuple[list[int], Fraction]:
    """What leave-one-out keeps of one row, and by how much its nearest decision was decided.

    A gain is the difference of two energies, as the words of the definition have it. To it comes
    the share of what the residual has along the direction; where the activation that would leave
    the least is not positive, the feature goes.
    """
    kept, nearest = _order(acts, W_dec), Fraction(10**9)
    for least in (Fraction(0), max(Fraction(price), Fraction(0))):
        for i in reversed(list(kept)):
            others = [j for j in kept if j != i]
            gain = _energy_without(others, acts, sae_in, W_dec) - _energy_without(
                kept, acts, sae_in, W_dec
            )
            left = [
                Fraction(y) - sum(Fraction(acts[j]) * Fraction(W_dec[j][c]) for j in others)
                for c, y in enumerate(sae_in)
            ]
            direction = [Fraction(w) for w in W_dec[i]]
            length = sum(w * w for w in direction)
            best = sum(a * b for a, b in zip(left, direction, strict=True)) / length
            gain += Fraction(leniency) * (best - Fraction(acts[i])) ** 2 * length
            nearest = min(nearest, abs(gain - least), abs(best) if leniency else abs(gain - least))
            if gain < least or best <= 0:
                kept = others
    return sorted(kept), nearest


def explained_exactly(
    acts: list[float],
    sae_in: list[float],
    W_dec: list[list[float]],
    explained: float,
    max_k: int | None = None,
) -> tuple[list[int], Fraction]:
    """What constant quality keeps of one row, and how far apart the energies are that decided."""
    order = _order(acts, W_dec)[:max_k]
    energies = [_energy_without(order[:k], acts, sae_in, W_dec) for k in range(len(order) + 1)]
    goal = (1 - Fraction(explained)) * energies[0]
    reached = [k for k, energy in enumerate(energies) if energy <= goal]
    number = reached[0] if reached else min(range(len(energies)), key=lambda k: energies[k])
    apart = [abs(energy - goal) for energy in energies]
    if not reached:
        apart += [abs(e - energies[number]) for k, e in enumerate(energies) if k != number]
    return sorted(order[:number]), min(apart)
