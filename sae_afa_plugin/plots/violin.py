"""NMSE and epsilon LBO of each SAE as half violins."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_afa_plugin.plots.style import (
    PALETTE,
    Results,
    axes_of,
    groups,
    merged,
    names_below,
    picture,
    power_ticks,
    violins,
)


@picture(
    "violin",
    title="Reconstruction error and ε LBO",
    text="Each half violin is the distribution over tokens, the bar its median; both axes are "
    "logarithmic. ε LBO is the least constant of quasi-orthogonality that a token forces "
    "on the dictionary in the paper's convention. It contains reconstruction error, so it "
    "is no lower bound on the coherence, and an SAE that was trained to match norms "
    "(top-AFA) has a small one whether it reconstructs well or not.",
    place=30,
)
def violin_plot(results: Results, ax: Axes | None = None) -> Figure:
    """NMSE (left halves) and ``epsilon_lbo`` (right halves) over the tokens of each SAE.

    Both on logarithmic axes; bars are medians, the SAEs with the best and the worst median are
    marked.

    Args:
        results: What to draw.
        ax: Axes to draw into; the axis of ``epsilon_lbo`` is added to its right.
    """
    results = merged(results)
    names = [str(name) for name in results.summary.index]
    figure, ax = axes_of(ax, (max(5.0, 0.55 * len(names) + 2.5), 4.2))
    right = ax.twinx()
    right.spines["right"].set_visible(True)
    for axes, column, side, tint in ((ax, "nmse", "low", 0), (right, "epsilon_lbo", "high", 1)):
        values = {
            name: np.log10(v[v > 0])
            for name, group in groups(results)
            if (v := group[column].dropna().to_numpy(float)) is not None
        }
        violins(axes, values, dict.fromkeys(names, PALETTE[tint]), side)
        axes.set_ylabel(
            {"nmse": "NMSE (left halves)", "epsilon_lbo": "ε LBO (right halves)"}[column],
            color=PALETTE[tint],
        )
        axes.tick_params(axis="y", colors=PALETTE[tint])
        _mark_best_and_worst(axes, values, -0.22 if side == "low" else 0.22, PALETTE[tint])
        power_ticks(axes)
    names_below(ax, names)
    return figure


def _mark_best_and_worst(
    ax: Axes, values: Mapping[str, np.ndarray], shift: float, colour: str
) -> None:
    medians = [np.median(v) if len(v) else np.nan for v in values.values()]
    if len(medians) < 2 or np.isnan(medians).all():
        return
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    for which, word, up in (
        (np.nanargmin(medians), "best", False),
        (np.nanargmax(medians), "worst", True),
    ):
        of_sae = list(values.values())[int(which)]
        ax.annotate(
            word,
            (float(which) + shift, of_sae.max() if up else of_sae.min()),
            xytext=(0, 3 if up else -3),
            textcoords="offset points",
            ha="center",
            va="bottom" if up else "top",
            fontsize=8,
            color=colour,
        )
