"""What the figures share: style, colours, legends, violins, ticks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeAlias

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from sae_afa_plugin.printable import shown_name
from sae_afa_plugin.results import AFAResults

_P = ParamSpec("_P")
Results: TypeAlias = AFAResults | Sequence[AFAResults]


# Okabe and Ito's palette without its yellow, which is too light on paper, and Tol's wine
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#882255")


_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,  # text stays text
}


def merged(results: Results) -> AFAResults:
    """Several results as one; SAEs of equal names get the number of their results before them.

    Args:
        results: One or more.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(results, AFAResults):
        return results
    if not results:
        raise ValueError("there are no results to draw: pass at least one AFAResults")
    names = [name for one in results for name in one.summary.index]
    twice = {name for name in names if names.count(name) > 1}
    summaries: list[pd.DataFrame] = []
    tokens: list[pd.DataFrame] = []
    for number, one in enumerate(results, 1):
        new = {name: f"{number}: {name}" if name in twice else name for name in one.summary.index}
        summaries.append(one.summary.rename(index=new))
        tokens.append(one.tokens.assign(sae=one.tokens["sae"].astype(str).map(new)))
    return AFAResults(
        pd.concat(summaries), pd.concat(tokens, ignore_index=True), results[0].sequences
    )


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each SAE: distinct ones for a few, a dark-to-light ramp for many layers.

    Example:
        >>> colours(["a", "b"])
        {'a': '#0072B2', 'b': '#D55E00'}
    """
    if len(names) <= len(PALETTE):
        return dict(zip(names, PALETTE, strict=False))
    ramp = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(names)))
    return {name: to_hex(shade) for name, shade in zip(names, ramp, strict=True)}


def axes_of(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """The given axes and their figure, or new ones of this size in inches."""
    if ax is None:
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots()
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure, ax


@dataclass(frozen=True)
class Picture:
    """A figure that is drawn from the results of an evaluation.

    Args:
        name: Of the figure, and of its file.
        draw: Draws it.
        title: Above it in the report.
        text: Under it there: how to read it.
        place: Figures stand in this order.
        needs: Whether results have what it needs.
    """

    name: str
    draw: Callable[..., Figure]
    title: str
    text: str
    place: int
    needs: Callable[[AFAResults], bool]


PICTURES: dict[str, Picture] = {}


def picture(
    name: str,
    title: str,
    text: str,
    place: int,
    needs: Callable[[AFAResults], bool] = lambda results: True,
) -> Callable[[Callable[_P, Figure]], Callable[_P, Figure]]:
    """Make a function from results to a figure one of the pictures, in this package's style.

    Args:
        name: As in :class:`Picture`, like the others.
        title: See there.
        text: See there.
        place: See there.
        needs: See there.
    """

    def registered(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
        drawn = styled(draw)
        PICTURES[name] = Picture(name, drawn, title, text, place, needs)
        return drawn

    return registered


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Make a function draw in this package's style."""

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def groups(
    results: AFAResults, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The tokens of one SAE after the other, in the order of the summary."""
    for name in results.summary.index:
        yield str(name), results.tokens_of(str(name), columns)


def is_constant(values: np.ndarray) -> bool:
    """Whether all values are the same up to rounding, as norms of standardised inputs are."""
    return bool(np.ptp(values) <= 1e-3 * np.median(np.abs(values)))


def literal(name: str) -> str:
    """A name as matplotlib is to write it: between two dollars it would read mathematics.

    No longer than can be read: a picture grows with its longest name, 3,000 characters to 10 GiB.
    """
    return shown_name(name).replace("$", r"\$")


def legend(ax: Axes, names: Sequence[str], colour: Mapping[str, str]) -> None:
    """Beside the axes, so that it covers no data; on two columns where it would be too long."""
    if len(names) > 1:
        handles = [Line2D([], [], color=colour[n], marker="o", ls="", ms=5) for n in names]
        # numbers first: matplotlib leaves out labels that begin with an underscore
        shown = ax.legend(
            handles,
            [str(number) for number in range(len(names))],
            loc="upper left",
            bbox_to_anchor=(1.02, 1.0),
            fontsize="small",
            ncols=1 + (len(names) > 20),
            handletextpad=0.2,
        )
        for text, name in zip(shown.get_texts(), names, strict=True):
            text.set_text(literal(name))


def violins(
    ax: Axes, values: Mapping[str, np.ndarray], colour: Mapping[str, str], side: Any = "both"
) -> None:
    """A violin for each SAE, at 0, 1, 2 and so on, with a bar at its median."""
    for at, (name, of_sae) in enumerate(values.items()):
        if len(of_sae) == 0:
            continue
        if np.ptp(of_sae) < 1e-9:  # no density to estimate
            ax.plot(at, of_sae[0], "_", color=colour[name], ms=14, mew=2)
            continue
        # the density of 5,000 quantiles is that of all tokens, at a fraction of the time
        shown = np.quantile(of_sae, np.linspace(0, 1, min(len(of_sae), 5000)))
        parts: Any = ax.violinplot(shown, [at], widths=0.85, showextrema=False, side=side)
        parts["bodies"][0].set(facecolor=colour[name], alpha=0.65, edgecolor="0.2", linewidth=0.5)
        reach = {"low": (-0.2, 0), "high": (0, 0.2), "both": (-0.12, 0.12)}[side]
        median = np.median(of_sae)
        ax.plot([at + reach[0], at + reach[1]], [median, median], color="black", lw=1.4)


def names_below(ax: Axes, names: Sequence[str]) -> None:
    """The names of the SAEs under their violins, slanted where they need room."""
    ax.set_xticks(range(len(names)), [literal(name) for name in names])
    if len(names) > 4 or max(map(len, names)) > 12:
        for label in ax.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_xlim(-0.6, len(names) - 0.4)


def power_ticks(ax: Axes) -> None:
    """Round numbers on an upward axis that shows log10 of a quantity; once all is drawn."""
    low, high = ax.get_ylim()
    steps = (1, 2, 5) if high - low <= 1.6 else (1, 3) if high - low <= 3 else (1,)
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    every = 1 if len(powers) <= 8 else 2
    values = [step * 10.0**power for power in powers[::every] for step in steps]
    ax.yaxis.set_major_locator(FixedLocator([np.log10(v) for v in values]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(10**v)))
    ax.set_ylim(low, high)


def number(value: float) -> str:
    """A number as an axis is to show it."""
    if value == 0:
        return "0"
    if 0.999e-3 < abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    power = round(np.log10(abs(value)))
    return f"{'-' if value < 0 else ''}$10^{{{power}}}$"


def trend(ax: Axes, x: Any, groups: Any, colour: str, shade: bool) -> None:
    """Medians of groups over ``x`` as a line, with a shade from the 5 to the 95 % quantile."""
    ax.plot(x, groups.median(), color=colour, lw=1.4)
    if not shade:
        return
    ax.fill_between(x, groups.quantile(0.05), groups.quantile(0.95), color=colour, alpha=0.12, lw=0)
