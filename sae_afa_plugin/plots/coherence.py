"""Interference inside what the dictionary allows."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from sae_afa_plugin.plots.style import (
    Results,
    axes_of,
    colours,
    groups,
    merged,
    names_below,
    number,
    picture,
    violins,
)


@picture(
    "coherence",
    title="Interference",
    text="The interference of a token is the mean cosine between its active directions, "
    "weighted by how strongly they are active. Above zero the directions lean the same "
    "way, so the reconstruction is longer than the feature vector and the SAE looks "
    "under-activated although it need not reconstruct badly; below zero they partly "
    "cancel. By arithmetic no token can be beyond the coherence (the largest cosine in "
    "the dictionary), and no dictionary of this size can have a coherence below the Welch "
    "bound. The axis is straight around zero and logarithmic beyond. For signed features "
    "(AbsTopK) it is no longer a mean.",
    place=50,
    needs=lambda results: "max_abs_cos" in results.summary,
)
def coherence_plot(results: Results, ax: Axes | None = None) -> Figure:
    """Interference of the active features, token by token, inside what the dictionary allows.

    Args:
        results: What to draw.
        ax: Axes to draw into.

    Raises:
        ValueError: If the coherence of the dictionaries was not computed.
    """
    results = merged(results)
    if "max_abs_cos" not in results.summary:
        raise ValueError("the results have no coherence: evaluate with coherence=True")
    names = [str(name) for name in results.summary.index]
    colour = colours(names)
    figure, ax = axes_of(ax, (max(5.0, 0.55 * len(names) + 2.5), 4.2))
    values = {n: g["interference"].dropna().to_numpy(float) for n, g in groups(results)}
    typical = np.median(np.abs(np.concatenate([v for v in values.values() if len(v)] or [[1.0]])))
    unit = 10 ** np.floor(np.log10(max(float(typical), 1e-6)))

    def height(value: Any) -> Any:
        """Straight around zero, logarithmic beyond ``unit``, on both sides."""
        return np.arcsinh(np.asarray(value) / unit)

    violins(ax, {name: height(of_sae) for name, of_sae in values.items()}, colour)
    for at, (_, row) in enumerate(results.summary.iterrows()):
        for sign in (-1, 1):
            ax.hlines(
                height(sign * row["max_abs_cos"]), at - 0.4, at + 0.4, color="#D55E00", lw=1.6
            )
        ax.hlines(height(row["welch_bound"]), at - 0.4, at + 0.4, color="#0072B2", lw=1.2, ls=":")
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    largest = max(float(results.summary["max_abs_cos"].max()), unit)  # 0 where all are orthogonal
    powers = unit * 10.0 ** np.arange(0, np.floor(np.log10(largest / unit)) + 1)
    ax.yaxis.set_major_locator(FixedLocator(height([*-powers[::-1], 0, *powers]).tolist()))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(round(unit * np.sinh(v), 9))))
    names_below(ax, names)
    ax.set_ylabel("interference (weighted mean cosine)")
    ax.legend(
        handles=[
            Line2D([], [], color="#D55E00", lw=1.6, label="± coherence: no token can be beyond"),
            Line2D([], [], color="#0072B2", lw=1.2, ls=":", label="Welch bound on the coherence"),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, 1.14),
        ncols=2,
        fontsize="small",
    )
    return figure
