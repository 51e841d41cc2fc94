"""Error against sparsity, for several architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sae_afa_plugin.plots.style import Results, axes_of, colours, literal, merged, picture

MARKERS = "osD^vPX*"
_LINES = ("-", "--", ":", "-.")
_CE = "core_ce_loss_score"


@picture(
    "frontier",
    title="Error against sparsity",
    text="Mean NMSE against mean L0; lower left is better. Only SAEs of one hook and one kind "
    "of normalisation compare, and differences of a few percent between single runs mean "
    "nothing.",
    place=60,
    needs=lambda results: len(results.summary) > 1,
)
def frontier_plot(
    results: Results | pd.DataFrame,
    ax: Axes | None = None,
    ce_recovered: bool = False,
    *,
    column: str = "nmse_mean",
    legend: bool = True,
    best: bool = True,
    looks: Mapping[str, tuple[str, str]] | None = None,
) -> Figure:
    """L0 against the error, one line for each architecture and hook; lower left is better.

    Args:
        results: What to draw, or a table with ``architecture``, ``l0_mean`` and ``nmse_mean``
            (or ``core_ce_loss_score``). Rows that share a value in a column ``group`` are runs
            of one setting with different seeds: their mean is drawn, with the standard
            deviation as error bars.
        ax: Axes to draw into.
        ce_recovered: Draw the share of the loss that is lost, ``1 - core_ce_loss_score``,
            instead of NMSE.
        column: What is drawn against L0, if it is another.
        legend: Whether to say which line is which.
        best: Whether to mark the lowest error, if all SAEs are of one hook.
        looks: A colour and a marker for each name, where several axes share them.

    Raises:
        ValueError: If a column is missing, or no row has values in both.
    """
    table = results if isinstance(results, pd.DataFrame) else merged(results).summary
    if ce_recovered:
        column = _CE
    is_error = column in (_CE, "nmse_mean")
    missing = [name for name in ("architecture", "l0_mean", column) if name not in table]
    if missing:
        raise ValueError(
            f"the table has no column {', '.join(missing)}"
            + (": evaluate with core=True (--core)" if column == _CE else "")
        )
    # a BatchTopK SAE is saved as a JumpReLU one: how it was trained says more, where it is known
    kind = table["architecture"]
    if "trained_as" in table:
        kind = table["trained_as"].where(table["trained_as"].notna(), kind)
    hook: Any = table["hook_name"] if "hook_name" in table else pd.Series("", table.index)
    alone = pd.Series(range(len(table)), table.index)
    points = pd.DataFrame(
        {
            "kind": kind.astype(str),
            "hook": hook.fillna("").astype(str),
            "group": table.get("group", alone),
            "l0": table["l0_mean"],
            "error": 1 - table[column] if column == _CE else table[column],
        }
    ).dropna(subset=["l0", "error"])
    if points.empty:
        raise ValueError(f"no SAE has both l0_mean and {column}: there is nothing to draw")
    figure, ax = axes_of(ax, (5.6, 4.2))
    several_hooks = points["hook"].nunique() > 1
    if looks is None:
        shades = colours(sorted(points["kind"].unique()))
        looks = {name: (c, MARKERS[i % len(MARKERS)]) for i, (name, c) in enumerate(shades.items())}
    lowest = (np.inf, 0.0)
    # errors at different hooks do not compare: no line leads from one to another
    lines: Any = points.groupby(["kind", "hook"])
    for (name, of_hook), of_line in lines:
        runs = of_line.groupby("group")[["l0", "error"]]
        mean: Any = runs.mean()
        spread: Any = runs.std(ddof=1)
        order = np.argsort(mean["l0"].to_numpy())  # NaN last, which pandas below 3 does not do
        mean, spread = mean.iloc[order], spread.iloc[order]
        hooks = sorted(points["hook"].unique())
        ax.errorbar(
            mean["l0"],
            mean["error"],
            xerr=spread["l0"].fillna(0),
            yerr=spread["error"].fillna(0),
            color=looks[str(name)][0],
            marker=looks[str(name)][1],
            ls=_LINES[hooks.index(of_hook) % len(_LINES)],
            ms=5,
            lw=1.2,
            capsize=2,
            label=literal(f"{name}, {of_hook}" if several_hooks else str(name)),
        )
        at = mean["error"].idxmin()
        lowest = min(lowest, (mean["error"][at], mean["l0"][at]))
    if best and is_error and not several_hooks:
        ax.plot(lowest[1], lowest[0], "o", ms=13, mfc="none", mec="black", mew=1.2)
        ax.annotate("best", (lowest[1], lowest[0]), xytext=(0, -9), textcoords="offset points",
                    ha="center", va="top", fontsize=8)  # fmt: skip
    ax.margins(0.08, 0.12)
    ax.set(xscale="log", xlabel="active features (L0)")
    if is_error:
        ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis) if is_error else (ax.xaxis,):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(
            # over more than three decades there is room for those alone
            FuncFormatter(
                lambda v, _, axis=axis: (
                    f"{v:g}" if f"{v:e}"[0] in "25" and _decades(axis) < 3 else ""
                )
            )
        )
        for label in axis.get_minorticklabels():
            label.set_fontsize(8)
    ax.set_ylabel({_CE: "1 - CE recovered", "nmse_mean": "NMSE"}.get(column, column))
    if legend:
        beside: Any = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0)} if several_hooks else {}
        ax.legend(fontsize="small", **beside)
    return figure


def _decades(axis: Axis) -> float:
    low, high = sorted(axis.get_view_interval())
    return math.log10(high / low)
