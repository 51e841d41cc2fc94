"""Where the energy of the input goes, as stacked bars."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_afa_plugin.groups.afa import SHARES
from sae_afa_plugin.plots.style import Results, axes_of, literal, merged, picture
from sae_afa_plugin.printable import shown_name

_LONGEST_NAME = 37  # characters; it leaves room for the bars
_LOOKS = {
    "share_features": ("features ‖f‖²", "#0072B2", ""),
    "share_interference": ("interference", "#56B4E9", "///"),
    "share_unexplained": ("unexplained", "#D55E00", ""),
    "share_shrinkage": ("shrinkage", "#E69F00", "..."),
}


def _is_known(results: Results) -> bool:
    summary = merged(results).summary
    return all(f"{share}_mean" in summary for share in SHARES)


@picture(
    "energy",
    title="The energy budget",
    text="What the energy of the input is made of, on average over tokens: that of the features, "
    "what active directions add by leaning the same way (interference; below the line where they "
    "cancel), the error that is left (unexplained), and shrinkage (above 0 the reconstruction is "
    "too short, below 0 too long). The four add up to 1, the line. So an SAE is under-activated "
    "because of interference, error or shrinkage, and here is which.",
    place=20,
    needs=_is_known,
)
def energy_plot(results: Results, ax: Axes | None = None) -> Figure:
    """The energy budget of each SAE as one stacked bar; see ``docs/metric.md``.

    Args:
        results: What to draw.
        ax: Axes to draw into.

    Raises:
        ValueError: If the results have no energy budget.
    """
    summary = merged(results).summary
    if not _is_known(results):
        raise ValueError("the results have no energy budget: evaluate with this version")
    names = [str(name) for name in summary.index]
    figure, ax = axes_of(ax, (7.4, 1.5 + 0.42 * len(names)))
    at = np.arange(len(names))
    ends = {sign: np.zeros(len(names)) for sign in (1, -1)}
    for share in SHARES:
        label, colour, hatch = _LOOKS[share]
        values = summary[f"{share}_mean"].to_numpy(float)
        # what is below zero is stacked to the left, so that nothing covers anything
        starts = np.where(values >= 0, ends[1], ends[-1])
        ax.barh(
            at, values, 0.72, starts, label=label, color=colour, hatch=hatch, ec="white", lw=0.6
        )
        for y, (value, start) in enumerate(zip(values, starts, strict=True)):
            if abs(value) > 0.06 * max(1.0, ends[1].max()):
                ax.text(
                    start + value / 2,
                    y,
                    f"{value:.0%}".replace("-", "\N{MINUS SIGN}"),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black"
                    if share in ("share_interference", "share_shrinkage")
                    else "white",
                    bbox={"fc": colour, "ec": "none", "pad": 0.8} if hatch else None,
                )
        ends[1] = ends[1] + values.clip(min=0)
        ends[-1] = ends[-1] + values.clip(max=0)
    ax.axvline(1, color="black", lw=1.2)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_yticks(at, [literal(shown_name(name, _LONGEST_NAME)) for name in names])
    ax.invert_yaxis()
    ax.set_xlabel("share of the input's energy ‖z − b‖²")
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, fontsize="small")
    return figure
