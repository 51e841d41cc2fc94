"""Pictures of results: tables in, matplotlib figures out. No model code.

Every function takes results (or several, put side by side), draws into ``ax`` if one is given,
and returns the figure. Colours keep apart for colour-blind readers and in print; clouds of many
points are drawn as densities and rasterised, so that a PDF stays small.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from sae_afa_plugin.plots.coherence import coherence_plot
from sae_afa_plugin.plots.frontier import frontier_plot
from sae_afa_plugin.plots.l0 import l0_plot
from sae_afa_plugin.plots.style import colours, groups, is_constant, merged
from sae_afa_plugin.plots.violin import violin_plot
from sae_afa_plugin.plots.zf import BANDS, band, zf_plot
from sae_afa_plugin.results import AFAResults

__all__ = [
    "BANDS",
    "FIGURES",
    "band",
    "coherence_plot",
    "colours",
    "drawable",
    "frontier_plot",
    "groups",
    "is_constant",
    "l0_plot",
    "merged",
    "save_plots",
    "violin_plot",
    "zf_plot",
]

FIGURES: dict[str, Callable[[AFAResults], Figure]] = {
    "zf": zf_plot,
    "violin": violin_plot,
    "l0": l0_plot,
    "coherence": coherence_plot,
    "frontier": frontier_plot,
}


def drawable(results: AFAResults) -> dict[str, Callable[[AFAResults], Figure]]:
    """The figures that these results have the data for, by name."""
    found = dict(FIGURES)
    if "max_abs_cos" not in results.summary:
        del found["coherence"]
    if len(results.summary) < 2:
        del found["frontier"]
    return found


def save_plots(results: AFAResults, folder: Path) -> list[Path]:
    """Write every figure that the results have data for, as PNG and PDF.

    Args:
        results: What to draw.
        folder: Made if it does not exist.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, draw in drawable(results).items():
        figure = draw(results)
        for kind in ("png", "pdf"):
            written.append(folder / f"{name}.{kind}")
            figure.savefig(written[-1], dpi=200, bbox_inches="tight")
    return written
