"""Pictures of results: tables in, matplotlib figures out. No model code.

Every function takes results (or several, put side by side), draws into ``ax`` if one is given,
and returns the figure. Colours keep apart for colour-blind readers and in print; clouds of many
points are drawn as densities and rasterised, so that a PDF stays small.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path

from matplotlib.figure import Figure

from sae_afa_plugin.files import OURS, check_ours, user_path, write_whole, writing
from sae_afa_plugin.plots.coherence import coherence_plot
from sae_afa_plugin.plots.energy import energy_plot
from sae_afa_plugin.plots.frontier import MARKERS, frontier_plot
from sae_afa_plugin.plots.l0 import l0_plot
from sae_afa_plugin.plots.style import (
    PICTURES,
    Picture,
    colours,
    groups,
    is_constant,
    literal,
    merged,
    picture,
    styled,
)
from sae_afa_plugin.plots.violin import violin_plot
from sae_afa_plugin.plots.zf import BANDS, band, zf_plot
from sae_afa_plugin.results import AFAResults

__all__ = [
    "BANDS",
    "MARKERS",
    "PICTURES",
    "Picture",
    "band",
    "coherence_plot",
    "colours",
    "drawable",
    "energy_plot",
    "frontier_plot",
    "groups",
    "is_constant",
    "l0_plot",
    "literal",
    "merged",
    "picture",
    "pictures",
    "save_figures",
    "save_plots",
    "styled",
    "violin_plot",
    "zf_plot",
]

for _module in pkgutil.iter_modules(__path__):  # a picture is a file here, and nothing else
    import_module(f"{__name__}.{_module.name}")


_MADE_BY = {"png": "Software", "pdf": "Creator"}  # what a kind of file calls it


def pictures(results: AFAResults) -> list[Picture]:
    """The figures that these results have the data for, in their order."""
    known = [one for one in PICTURES.values() if one.needs(results)]
    return sorted(known, key=lambda one: one.place)


def drawable(results: AFAResults) -> dict[str, Callable[..., Figure]]:
    """The same as functions from results to a figure, by name."""
    return {one.name: one.draw for one in pictures(results)}


def save_plots(results: AFAResults, folder: str | Path) -> list[Path]:
    """Write every figure that the results have data for, as PNG and PDF.

    Args:
        results: What to draw.
        folder: Made if it does not exist.

    Returns:
        The files.

    Raises:
        OSError: If one cannot be written. Those before it are whole.
        ValueError: If somebody else's file has the name of one.
    """
    return save_figures(((name, draw(results)) for name, draw in drawable(results).items()), folder)


def save_figures(figures: Iterable[tuple[str, Figure]], folder: str | Path) -> list[Path]:
    """Write figures as PNG and PDF.

    Args:
        figures: With the names of their files; one is drawn when those before it are written.
        folder: Made if it does not exist.

    Returns:
        The files.

    Raises:
        OSError: If one cannot be written. Those before it are whole.
        ValueError: If somebody else's file has the name of one.
    """
    folder = user_path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, figure in figures:
        for kind, key in _MADE_BY.items():
            written.append(folder / f"{name}.{kind}")
            check_ours(written[-1])
            save = partial(
                figure.savefig, format=kind, dpi=200, bbox_inches="tight", metadata={key: OURS}
            )
            write_whole(written[-1], save)
    return written
