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
    picture,
    power_ticks,
    trend,
    violins,
)


@picture(
    "l0",
    title="Active features",
    text="How many features are active, over all tokens, by the norm of the input and by "
    "position. Lines are medians. A TopK SAE is a single line by construction; long tails "
    "downwards mean tokens that are written with very few features, which is worth a look "
    "at the list of under- and over-activated tokens.",
    place=40,
)
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
    columns = ["l0", "norm_z", "position"]
    logs: dict[str, np.ndarray] = {}
    shade = len(names) <= 4
    norms: list[tuple[float, float]] = []  # the smallest and the largest of each SAE
    positions: set[int] = set()
    for name, group in groups(results, columns):
        l0 = np.log10(group["l0"].clip(lower=1))
        logs[name] = l0.to_numpy()
        norm_z = group["norm_z"]
        if not is_constant(norm_z.to_numpy(float)):
            norms.append((float(norm_z.min()), float(norm_z.max())))
            bins = pd.qcut(norm_z, 20, duplicates="drop")
            x = norm_z.groupby(bins, observed=True).median()
            trend(ax[1], x, l0.groupby(bins, observed=True), colour[name], shade)
        if "position" not in group:  # samples that stand in no text
            continue
        positions.update(group["position"].unique())
        if group["position"].nunique() > 1:
            by_position = l0.groupby(group["position"])
            trend(ax[2], by_position.mean().index.to_series(), by_position, colour[name], shade)
    violins(ax[0], logs, colour)
    ax[0].set_ylabel("active features (L0)")
    names_below(ax[0], names)
    if len(names) > 4:  # the legend of colours says it
        ax[0].set_xticks([])
    if not norms:
        _say(ax[1], "‖z‖ is the same\nfor every token")
    elif max(high for _, high in norms) > 10 * max(min(low for low, _ in norms), 1e-9):
        ax[1].set_xscale("log")
    if len(positions) < 2:
        _say(ax[2], "only one position\nwas evaluated")
    ax[1].set_xlabel("norm of the input ‖z‖")
    ax[2].set_xlabel("position in the sequence")
    power_ticks(ax[0])
    legend(ax[2], names, colour)
    return figure


def _say(ax: Axes, text: str) -> None:
    """In place of a curve that cannot be drawn."""
    ax.tick_params(bottom=False, labelbottom=False)
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="0.3")
