"""The AFA metric of every token, and its energy budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from typing_extensions import override

from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.groups.base import Accumulator, Column, GroupResult, MetricGroup
from sae_afa_plugin.metrics import AFATokenMetrics, TokenColumns, is_finite, summarize
from sae_afa_plugin.spaces import EncodedTokens, LinearCode

SHARES = ("share_features", "share_interference", "share_unexplained", "share_shrinkage")


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


class _Tokens(Accumulator):
    def __init__(self, n_tokens: int) -> None:
        self._columns = TokenColumns(n_tokens)
        self._ranges: list[range] = []  # which tokens, in the order they came

    @override
    def add(self, tokens: EncodedTokens) -> None:
        self._columns.add(tokens.metrics())
        start = tokens.rows.start
        self._ranges.append(range(start, start + len(tokens)))

    @override
    def merge(self, other: _Tokens) -> None:
        self._columns.extend(other._columns)
        self._ranges += other._ranges

    @override
    def finish(self) -> GroupResult:
        table = self._columns.frame()
        numbers = [np.arange(r.start, r.stop) for r in self._ranges]
        table.index = pd.Index(np.concatenate(numbers or [np.empty(0, dtype=np.int64)]))
        if not table.index.is_monotonic_increasing:
            table = table.sort_index()
        finite = is_finite(table)
        if not finite.any():
            raise ValueError(
                "none of its tokens has finite norms: its weights or inputs are not finite"
            )
        tokens = table if finite.all() else table.loc[finite]
        summary = {"tokens": int(finite.sum()), "nonfinite_tokens": int((~finite).sum())}
        return GroupResult({**summary, **summarize(tokens)}, tokens)


@dataclass(frozen=True)
class AFA(MetricGroup):
    """Norms, epsilon LBO, interference, errors and the energy budget of each token.

    What they are: :class:`sae_afa_plugin.metrics.AFATokenMetrics`. The summary has mean and
    quantiles of each, see :func:`sae_afa_plugin.metrics.summarize`.
    """

    name: ClassVar[str] = "afa"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("l0_mean", "L0", "Active features, mean over tokens.", "{:.1f}".format, 10, 100),
        Column(
            "nmse_mean",
            "NMSE\n(mean)",
            "Squared error of the reconstruction over the squared norm of the input, mean.",
            _short,
            30,
            99,
        ),
        Column("nmse_median", "NMSE\n(median)", "The same, median over tokens.", _short, 31, 4),
        Column("norm_z_median", "‖z‖", "Norm of what the SAE reconstructs, median.", _short, 50, 1),
        Column(
            "norm_f_median",
            "‖f‖",
            "Norm of the features on the unit-norm dictionary, the bias counted as one, median.",
            _short,
            51,
            2,
        ),
        Column(
            "norm_ratio_median",
            "‖f‖/‖z‖",
            "What the features weigh against what they should; 1 is what AFA expects. Median.",
            _short,
            52,
            98,
        ),
        Column(
            "over_activated",
            "over‑\nactivated",
            "Share of tokens whose features weigh more than the input.",
            "{:.1%}".format,
            53,
            97,
        ),
        Column(
            "share_interference_mean",
            "inter-\nference\nenergy",
            "Share of the input's energy that active directions make by leaning the same way; "
            "below 0 they cancel. Mean.",
            "{:.1%}".format,
            60,
            50,
        ),
        Column(
            "share_unexplained_mean",
            "unex-\nplained\nenergy",
            "Share of the input's energy that is left over. Mean.",
            "{:.1%}".format,
            61,
            49,
        ),
        Column(
            "share_shrinkage_mean",
            "shrink-\nage\nenergy",
            "Above 0 the reconstruction is too short, below 0 too long. Mean.",
            "{:.1%}".format,
            62,
            48,
        ),
        Column(
            "cosine_mean",
            "cosine",
            "Cosine between the input and its reconstruction, mean.",
            _short,
            63,
            12,
        ),
        Column(
            "l2_ratio_mean",
            "L2\nratio",
            "Norm of the reconstruction over the norm of the input, mean.",
            _short,
            64,
            8,
        ),
        Column(
            "relative_reconstruction_bias",
            "recon.\nbias",
            "Relative reconstruction bias (arXiv 2404.16014): below 1 the SAE shrinks.",
            _short,
            65,
            7,
        ),
        Column(
            "epsilon_lbo_median",
            "ε LBO",
            "Least constant of quasi-orthogonality that a token forces on the dictionary, median.",
            "{:.2e}".format,
            70,
            20,
        ),
        Column(
            "interference_median",
            "inter-\nference",
            "Weighted mean cosine between the active directions of a token, median.",
            _short,
            71,
            30,
        ),
    )

    @override
    def start(self, code: LinearCode, activations: Activations) -> Accumulator:
        if len(code.W_dec) < 2:
            raise ValueError("the AFA metric needs a dictionary of two features or more")
        return _Tokens(activations.n_tokens)


def energy_sentence(summary: Mapping[str, Any]) -> str:
    """Where the energy of the input goes, in one sentence.

    Args:
        summary: Of one SAE, with ``share_features_mean`` and so on.

    Example:
        >>> energy_sentence(
        ...     {
        ...         "share_features_mean": 0.55,
        ...         "share_interference_mean": 0.36,
        ...         "share_unexplained_mean": 0.09,
        ...         "share_shrinkage_mean": 0.0,
        ...     }
        ... )
        "Features have 74 % of the input's norm: 36 % of its energy is interference, 9 % is unexplained, 0 % is shrinkage."
    """
    features, interference, unexplained, shrinkage = (summary[f"{s}_mean"] for s in SHARES)

    if any(share != share for share in (features, interference, unexplained, shrinkage)):
        return "The energy budget is not defined: every token is at the decoder's bias."

    def percent(share: float) -> str:
        return f"{round(100 * share) + 0:.0f} %".replace("-", "\N{MINUS SIGN}")

    # what a reader is told in words has to be more than a rounding
    too = "shrinkage" if shrinkage > -0.05 else "shrinkage, so the reconstruction is too long"
    leaning = "interference" if interference > -0.05 else "interference that cancels"
    return (
        f"Features have {percent(features**0.5)} of the input's norm: {percent(interference)} of "
        f"its energy is {leaning}, {percent(unexplained)} is unexplained, {percent(shrinkage)} is "
        f"{too}."
    )


assert set(SHARES) <= set(AFATokenMetrics._fields)
