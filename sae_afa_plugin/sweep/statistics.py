"""What can be said of differences: over seeds, over held-out sequences, at equal L0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sae_lens.synthetic import mean_correlation_coefficient
from torch import Tensor


class Difference(NamedTuple):
    """How two settings differ in the mean over tokens of some quantity.

    Args:
        first: Mean of the first, over seeds.
        second: Mean of the second.
        ratio: ``first / second``.
        low: The ratio's 2.5 % quantile over drawn sequences and seeds.
        high: Its 97.5 % quantile.
        sd_seeds: Standard deviation over seeds of the ratio; NaN for one seed.
        seeds: How many.
    """

    first: float
    second: float
    ratio: float
    low: float
    high: float
    sd_seeds: float
    seeds: int


def paired_difference(
    pairs: Sequence[tuple[pd.DataFrame, pd.DataFrame]],
    column: str,
    draws: int = 1000,
    seed: int = 0,
) -> Difference:
    """Compare two settings on the same held-out tokens.

    Sequences are drawn with replacement, the same ones for both (tokens of one sequence are no
    independent samples, and consecutive training steps even less so), and so are seeds.

    Args:
        pairs: For each seed the tables of tokens of the first and of the second, with ``sequence``
            and the column; tokens where it is NaN in either are left out of both.
        column: ``nmse``, say.
        draws: How often.
        seed: Of the drawing.

    Raises:
        ValueError: If there is no pair, or tables are not of the same tokens.

    Example:
        >>> tokens = pd.DataFrame({"sequence": [0, 0, 1, 1], "nmse": [0.2, 0.4, 0.1, 0.3]})
        >>> half = tokens.assign(nmse=tokens["nmse"] / 2)
        >>> found = paired_difference([(half, tokens)], "nmse", draws=20)
        >>> print(f"{found.ratio:.3f} {found.low:.3f} {found.high:.3f}")
        0.500 0.500 0.500
    """
    if not pairs:
        raise ValueError("there is nothing to compare")
    sums = [_sums(first, second, column) for first, second in pairs]
    if any(len(one) != len(sums[0]) for one in sums):
        raise ValueError("seeds must be compared on the same sequences")
    of_pair = np.stack(sums)  # [seeds, sequences, (first, second, tokens)]
    whole = of_pair.sum(1)
    ratios = whole[:, 0] / whole[:, 1]
    random = np.random.default_rng(seed)
    n_seeds, n_sequences, _ = of_pair.shape
    drawn = np.empty(draws)
    for number in range(draws):
        chosen = of_pair[random.integers(n_seeds, size=n_seeds)].sum(0)
        weights = random.multinomial(n_sequences, np.full(n_sequences, 1 / n_sequences))
        first, second, _ = weights @ chosen
        drawn[number] = first / second
    total = whole.sum(0)
    return Difference(
        first=float(total[0] / total[2]),
        second=float(total[1] / total[2]),
        ratio=float(total[0] / total[1]),
        low=float(np.quantile(drawn, 0.025)),
        high=float(np.quantile(drawn, 0.975)),
        sd_seeds=float(np.std(ratios, ddof=1)) if n_seeds > 1 else math.nan,
        seeds=n_seeds,
    )


def _sums(first: pd.DataFrame, second: pd.DataFrame, column: str) -> np.ndarray:
    """Sums over each sequence's tokens of both, and how many there are."""
    if not np.array_equal(first["sequence"], second["sequence"]):
        raise ValueError("two SAEs must be compared on the same tokens")
    table = pd.DataFrame(
        {"sequence": first["sequence"], "first": first[column], "second": second[column]}
    ).dropna()
    sums: Any = table.assign(n=1.0).groupby("sequence")[["first", "second", "n"]].sum()
    # sequences of which nothing is left still count as drawn
    every = np.unique(first["sequence"])
    return sums.reindex(every, fill_value=0.0).to_numpy(dtype=float)


def interpolated(points: Mapping[float, float], l0: float) -> float:
    """What an architecture would reach at another L0, by its neighbours on the frontier.

    Linear in log L0 and the logarithm of the value. Nothing is said beyond the ends.

    Args:
        points: Positive values by L0.
        l0: Where.

    Example:
        >>> round(interpolated({16: 0.08, 64: 0.02}, 32), 4)
        0.04
    """
    known = sorted((k, v) for k, v in points.items() if k > 0 and v > 0)
    if not known or not known[0][0] <= l0 <= known[-1][0]:
        return math.nan
    xs, ys = zip(*known, strict=True)
    return float(np.exp(np.interp(np.log(l0), np.log(xs), np.log(ys))))


def stability(W_decs: Sequence[Tensor]) -> float:
    """How alike dictionaries of different seeds are: PW-MCC of arXiv 2505.20254.

    Directions of each pair are matched one to one (Hungarian algorithm) by ``|cos|``; the mean over
    matches and pairs. NaN for fewer than two.

    Args:
        W_decs: Decoders ``[d_sae, d]``.
    """
    found = [mean_correlation_coefficient(a, b) for a, b in combinations(W_decs, 2)]
    return float(np.mean(found)) if found else math.nan


def description_length(l0: float, d_sae: int) -> float:
    """Bits for a token in the paper: ``L0 (7 + log2 d_sae)``, 7 for a value.

    Args:
        l0: Mean number of active features.
        d_sae: Number of features.

    Example:
        >>> description_length(64, 4096)
        1216.0
    """
    return l0 * (7 + math.log2(d_sae))


def firing_bits(fired: np.ndarray, n_tokens: int) -> float:
    """Bits for a token where a feature costs what it surprises: which are on, and 7 for a value.

    Each feature's being on or off is coded by how often it is on, as in SAEBench's description
    length (arXiv 2410.11179); a value has 7 bits as in the paper, where SAEBench takes the entropy
    of its histogram.

    Args:
        fired: On how many tokens each feature is active ``[d_sae]``.
        n_tokens: Tokens.

    Example:
        >>> firing_bits(np.array([50, 100, 0]), 100)
        11.5
    """
    p = fired / n_tokens
    inner = p[(p > 0) & (p < 1)]
    entropy = -(inner * np.log2(inner) + (1 - inner) * np.log2(1 - inner)).sum()
    return float(entropy + 7 * p.sum())


def reseed_noise(summary: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """How much each number of a summary moves when nothing but the seed does.

    Args:
        summary: One row for each SAE.
        by: Columns that runs of one setting have in common.

    Returns:
        For each setting and number the mean, the standard deviation over seeds, their ratio and how
        many seeds there are; settings with one seed are left out.
    """
    numbers = summary.select_dtypes("number").columns.difference([*by, "seed"], sort=False)
    groups: Any = summary.groupby(list(by), sort=False)
    found: list[dict[str, Any]] = []
    for name, group in groups:
        if len(group) < 2:
            continue
        keys = dict(zip(by, name if isinstance(name, tuple) else (name,), strict=True))
        values = group[numbers].astype(float)
        mean, sd = values.mean(), values.std(ddof=1)
        for number in numbers:
            if math.isfinite(mean[number]):
                found.append(
                    {
                        **keys,
                        "number": number,
                        "mean": mean[number],
                        "sd": sd[number],
                        "relative": sd[number] / abs(mean[number]) if mean[number] else math.nan,
                        "seeds": len(group),
                    }
                )
    return pd.DataFrame(found, columns=[*by, "number", "mean", "sd", "relative", "seeds"])


def noise_of_numbers(noise: pd.DataFrame) -> pd.DataFrame:
    """Which numbers tell settings apart: how they differ beside how seeds do.

    Args:
        noise: As :func:`reseed_noise` gives it, for settings at some hooks.

    Returns:
        For each number ``relative``, its standard deviation over seeds over its mean (median over
        settings), and ``signal``, the standard deviation between settings of one hook over that
        between seeds (root mean square over settings; median over hooks).

    Example:
        >>> noise = pd.DataFrame({"hook_name": "h", "setting": ["a", "b"], "number": "nmse_mean",
        ...     "mean": [1.0, 3.0], "sd": [0.1, 0.1], "relative": [0.1, 0.1 / 3]})
        >>> noise_of_numbers(noise).round(2).loc["nmse_mean"].tolist()
        [0.07, 14.14]
    """
    rows: dict[str, dict[str, float]] = {}
    if noise.empty:
        return pd.DataFrame(columns=["relative", "signal"])
    for number, of_number in noise.groupby("number", sort=False):
        signals: list[float] = []
        for _, at in of_number.groupby("hook_name"):
            within = float(np.sqrt(np.mean(at["sd"].to_numpy(float) ** 2)))
            if len(at) > 1 and within > 0:
                signals.append(float(np.std(at["mean"].to_numpy(float), ddof=1)) / within)
        rows[str(number)] = {
            "relative": float(of_number["relative"].median()),
            "signal": float(np.median(signals)) if signals else math.nan,
        }
    return pd.DataFrame.from_dict(rows, orient="index")
