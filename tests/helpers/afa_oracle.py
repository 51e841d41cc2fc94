"""The AFA metric, written again from its definition: one token and one pair at a time, float64.

Nothing here imports the package.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.detach().double() if hasattr(x, "detach") else x, dtype=np.float64)


def _epsilon(squared_z: float, squared_f: float, h: int) -> float:
    return abs(squared_z - squared_f) / ((h - 1) * squared_f) if squared_f else np.nan


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def metrics_of_tensors(z: Any, recons: Any, f_unit: Any, b: Any) -> dict[str, np.ndarray]:
    """The formulas, for features on the unit-norm dictionary and a reconstruction without bias."""
    z, recons, f_unit, b = map(_array, (z, recons, f_unit, b))
    rows: list[dict[str, Any]] = []
    for z_t, r_t, f_t in zip(z, recons, f_unit, strict=True):
        active = [abs(v) for v in f_t if v != 0]
        squared_f = sum(v * v for v in active)
        norm_z, norm_f = np.sqrt(z_t @ z_t), np.sqrt(squared_f + b @ b)
        error = z_t - (r_t + b)
        recons_t, y = r_t + b, z_t - b
        energy, length = y @ y, np.sqrt(recons_t @ recons_t)
        pairs = sum(active) ** 2 - squared_f
        rows.append(
            {
                "norm_z": norm_z,
                "norm_f": norm_f,
                "norm_z_centered": np.sqrt((z_t - b) @ (z_t - b)),
                "norm_f_centered": np.sqrt(squared_f),
                "over_activated": norm_f > norm_z,
                "epsilon_lbo": _epsilon(norm_z**2, norm_f**2, len(f_t)),
                "epsilon_lbo_recon": _epsilon(r_t @ r_t, squared_f, len(f_t)),
                "interference": (r_t @ r_t - squared_f) / pairs if len(active) > 1 else np.nan,
                "nmse": (error @ error) / (z_t @ z_t) if norm_z else np.nan,
                "cosine": z_t @ recons_t / (norm_z * length) if norm_z * length else np.nan,
                "l2_ratio": length / norm_z if norm_z else np.nan,
                "share_features": squared_f / energy if energy else np.nan,
                "share_interference": (r_t @ r_t - squared_f) / energy if energy else np.nan,
                "share_unexplained": (error @ error) / energy if energy else np.nan,
                "share_shrinkage": 2 * (error @ r_t) / energy if energy else np.nan,
                "l0": len(active),
            }
        )
    return _columns(rows)


def metrics_of_dictionary(z: Any, f: Any, W_dec: Any, b: Any) -> dict[str, np.ndarray]:
    """The same from the features as ``encode`` gives them and the decoder.

    The interference is a mean over pairs of active features here, weighted by what they carry.
    """
    z, f, W_dec, b = map(_array, (z, f, W_dec, b))
    norms = np.sqrt((W_dec**2).sum(1))
    metrics = metrics_of_tensors(z, f @ W_dec, f * norms, b)
    metrics["l0"] = (f != 0).sum(1)
    for t, f_t in enumerate(f):
        active = [i for i in range(len(f_t)) if f_t[i] * norms[i] != 0]
        total, weights = 0.0, 0.0
        for i in active:
            for j in active:
                if i != j:
                    cosine = W_dec[i] @ W_dec[j] / (norms[i] * norms[j])
                    weight = f_t[i] * norms[i] * f_t[j] * norms[j]
                    total += weight * cosine
                    weights += abs(weight)
        metrics["interference"][t] = total / weights if weights else np.nan
    return metrics


def absolute_cosines(W_dec: Any) -> np.ndarray:
    """``|cos|`` of every pair of different rows that are not zero."""
    rows = [row for row in _array(W_dec) if row.any()]
    unit = [row / np.sqrt(row @ row) for row in rows]
    return np.array([abs(unit[i] @ unit[j]) for i in range(len(unit)) for j in range(i)])
