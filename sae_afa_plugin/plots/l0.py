"""How many features are active."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_afa_plugin.plots.style import (
    Results,
    colours,
    groups,
    is_constant,
    legend,
    merged,
    names_below,
    power_ticks,
    styled,
    trend,
    violins,
)


@styled
def l0_plot(results: Results, ax: Sequence[Axes] | None = None) -> Figure:
    """How many features are active: over tokens, by the norm of the input, and by position.

    Lines are medians; for up to four SAEs, shades reach from the 5 to the 95 % quantile.

    Args:
        results: What to draw.
        ax: Three axes to draw into.

    Raises:
        ValueError: If ``ax`` has not three axes.
    """
    results = merged(results)
    names = [str(name) for name in results.summary.index]
    colour = colours(names)
    if ax is None:
        figure = Figure(figsize=(11.0, 3.6), layout="constrained")
        ax = list(figure.subplots(1, 3, sharey=True))
    if len(ax) != 3:
        raise ValueError(f"l0_plot draws into three axes: got {len(ax)}")
    figure = ax[0].get_figure()
    assert isinstance(figure, Figure)
    violins(
        ax[0], {n: np.log10(g["l0"].clip(lower=1).to_numpy()) for n, g in groups(results)}, colour
    )
    ax[0].set_ylabel("active features (L0)")
    names_below(ax[0], names)
    if len(names) > 4:  # the legend of colours says it
        ax[0].set_xticks([])
    constant, shade = True, len(names) <= 4
    for name, group in groups(results):
        l0 = np.log10(group["l0"].clip(lower=1))
        if not is_constant(group["norm_z"].to_numpy(float)):
            constant = False
            bins = pd.qcut(group["norm_z"], 20, duplicates="drop")
            trend(ax[1], group["norm_z"].groupby(bins, observed=True).median(),
                   l0.groupby(bins, observed=True), colour[name], shade)  # fmt: skip
        if group["position"].nunique() > 1:
            by_position = l0.groupby(group["position"])
            trend(ax[2], by_position.mean().index.to_series(), by_position, colour[name], shade)
    if constant:
        ax[1].tick_params(bottom=False, labelbottom=False)
        ax[1].text(0.5, 0.5, "‖z‖ is the same\nfor every token", ha="center", va="center",
                   transform=ax[1].transAxes, color="0.3")  # fmt: skip
    elif results.tokens["norm_z"].max() > 10 * max(results.tokens["norm_z"].min(), 1e-9):
        ax[1].set_xscale("log")
    if results.tokens["position"].nunique() == 1:
        ax[2].tick_params(bottom=False, labelbottom=False)
        ax[2].text(0.5, 0.5, "only one position\nwas evaluated", ha="center", va="center",
                   transform=ax[2].transAxes, color="0.3")  # fmt: skip
    ax[1].set_xlabel("norm of the input ‖z‖")
    ax[2].set_xlabel("position in the sequence")
    power_ticks(ax[0])
    legend(ax[2], names, colour)
    return figure
