"""Pictures of a sweep: what each architecture reaches at which L0, with seeds as error bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sae_afa_plugin import plots
from sae_afa_plugin.plots import MARKERS, colours, frontier_plot, literal, styled
from sae_afa_plugin.sweep.config import TRUTH
from sae_afa_plugin.sweep.results import INTERPOLATED, MISSED, SETTING, SweepResults

_ON_A_FRONTIER = ("nmse_mean", "core_ce_loss_score", "f1", "mcc")
_LABELS = {  # beside those that frontier_plot knows
    "f1": "F1 with the truth",
    "mcc": "MCC with the truth",
    "norm_ratio_median": "‖f‖/‖z‖ (median)",
    "pw_mcc": "PW-MCC over seeds",
}


class Drawn(NamedTuple):
    """A figure of a sweep.

    Args:
        name: Of its files.
        title: Above it.
        text: Under it: how to read it.
        draw: Draws it.
    """

    name: str
    title: str
    text: str
    draw: Callable[[SweepResults], Figure]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the options that tell none of them from another.

    An option that begins with its architecture's name loses that.

    Args:
        names: Words, of which those with ``=`` are options.

    Example:
        >>> names = ["topk k=8 d_sae=64", "topk k=16 d_sae=64", "pca k=8"]
        >>> list(short_names(names).values())
        ['topk k=8', 'topk k=16', 'pca']
        >>> short_names(["jumprelu jumprelu_mode=a", "jumprelu jumprelu_mode=b"]).values()
        dict_values(['jumprelu mode=a', 'jumprelu mode=b'])
    """
    known = list(dict.fromkeys(names))
    words = {name: name.split() for name in known}
    plain = {name: tuple(word for word in words[name] if "=" not in word) for name in known}
    found: dict[str, str] = {}
    for name in known:
        alike = [words[other] for other in known if plain[other] == plain[name]]
        told = [w for w in words[name] if "=" not in w or not all(w in other for other in alike)]
        told = [word.removeprefix(f"{words[name][0]}_") for word in told]
        found[name] = " ".join(told if len(alike) > 1 else plain[name])
    return found


def frontiers(results: SweepResults) -> Figure:
    """Error, and where it is known the truth, against L0: a column of panels for each hook."""
    known = [column for column in _ON_A_FRONTIER if _is_known(results.summary, column)]
    return _against_l0(results, results.summary, known)


def ratios(results: SweepResults) -> Figure:
    """What the AFA metric says, against L0."""
    figure = _against_l0(results, results.summary, ["norm_ratio_median"])
    for ax in figure.axes:
        ax.axhline(1, color="black", lw=1, zorder=0)
    return figure


def stabilities(results: SweepResults) -> Figure:
    """How alike dictionaries of different seeds are, against L0."""
    table = results.frontier.merge(results.stability[[*SETTING, "pw_mcc"]], on=SETTING)
    return _against_l0(results, table, ["pw_mcc"])


@styled
def _against_l0(results: SweepResults, table: pd.DataFrame, columns: Sequence[str]) -> Figure:
    labels, looks = _looks(results)
    table = table.assign(
        architecture=[labels[str(name)] for name in table["family"]], group=table["setting"]
    ).drop(columns=["trained_as"], errors="ignore")
    hooks = list(dict.fromkeys(table["hook_name"]))
    if len(hooks) == 1:  # side by side: the page is wider than it is high
        figure = Figure(figsize=(4 * len(columns), 3.6), layout="constrained")
        panels = figure.subplots(1, len(columns), squeeze=False, sharex=True).T
    else:
        figure = Figure(figsize=(3.2 * len(hooks), 2.7 * len(columns) + 0.6), layout="constrained")
        panels = figure.subplots(len(columns), len(hooks), squeeze=False, sharex=True, sharey="row")
    known: dict[str, Any] = {}
    for column, row in zip(columns, panels, strict=True):
        for hook, ax in zip(hooks, row, strict=True):
            here: Any = table[table["hook_name"] == hook].drop(columns="hook_name")
            if column == "nmse_mean":  # the truth's is rounding, a dozen decades below all others
                here = here[here["control"] != TRUTH]
            frontier_plot(here, ax=ax, column=column, legend=False, best=False, looks=looks)
            at_the_bottom = len(hooks) == 1 or ax in panels[-1]
            ax.set_xlabel("active features (L0)" if at_the_bottom else "")
            ax.set_ylabel(_LABELS.get(column, ax.get_ylabel()) if hook == hooks[0] else "")
            if ax in panels[0] and len(hooks) > 1:
                ax.set_title(literal(str(hook)), fontsize=9)
            known.update(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    order = [literal(name) for name in looks if literal(name) in known]
    _legend(figure, [known[name] for name in order], order)
    return figure


def _looks(results: SweepResults) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """What each family is called, and a colour and a marker for each: controls are grey and last."""
    families, control = results.summary["family"].astype(str), results.summary["control"]
    labels = short_names(list(families))
    controls = {labels[name] for name in families[control.notna()]}
    plain = sorted(set(labels.values()) - controls)
    shades = colours(plain) | dict.fromkeys(sorted(controls), "#888888")
    looks = {
        name: (colour, MARKERS[i % len(MARKERS)]) for i, (name, colour) in enumerate(shades.items())
    }
    return labels, looks


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Above the panels, in as many columns as there is room for."""
    width = 0.5 + 0.06 * max(len(name) for name in names)  # inches
    columns = max(1, min(len(names), int(figure.get_figwidth() / width)))
    n_rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * n_rows)
    figure.legend(handles, names, loc="outside upper center", ncols=columns, fontsize="small")


def _is_known(table: pd.DataFrame, column: str) -> bool:
    return column in table and bool(table[column].notna().any())


@styled
def equal_l0(results: SweepResults) -> Figure:
    """The error of SAEs that choose their L0, over that of others at the same L0."""
    table = _at_equal_l0(results)
    settings = short_names([str(name) for name in table["setting"]])
    others, looks = _looks(results)
    against = {others[str(name)] for name in table["against"]}
    colour = {name: shade for name, (shade, _) in looks.items() if name in against}
    hooks = list(dict.fromkeys(table["hook_name"]))
    rows = list(dict.fromkeys(settings.values()))
    size = (2.9 * len(hooks) + 3, 0.9 + (0.16 * len(colour) + 0.2) * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(hooks), squeeze=False, sharex=True, sharey=True)[0]
    for _, row in table.iterrows():
        ax = panels[hooks.index(row["hook_name"])]
        other = others[str(row["against"])]
        ratio, low, high = (row.get(f"nmse_{name}", np.nan) for name in ("ratio", "low", "high"))
        trained = row["how"] != INTERPOLATED
        # an interpolated one beside the one that was trained there
        step = 0.7 / len(colour)
        at = rows.index(settings[str(row["setting"])]) - 0.35 + step * [*colour].index(other)
        ax.errorbar(
            ratio, at if trained else at + step / 2,
            xerr=[[ratio - low], [high - ratio]] if np.isfinite([low, high]).all() else None,
            fmt="o", ms=4, capsize=2, color=colour[other],
            mfc=colour[other] if trained else "white",
        )  # fmt: skip
    for hook, ax in zip(hooks, panels, strict=True):
        ax.axvline(1, color="black", lw=1, zorder=0)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(_RATIOS))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if len(hooks) > 1:
            ax.set_title(literal(str(hook)), fontsize=9)
    panels[0].set_yticks(range(len(rows)), [literal(name) for name in rows], fontsize=8)
    panels[0].invert_yaxis()
    figure.supxlabel("NMSE over the other's; left of 1 it is better", fontsize=10)
    handles = [Line2D([], [], color=c, marker="o", ls="", ms=4) for c in colour.values()]
    _legend(figure, handles, [literal(name) for name in colour])
    return figure


def _at_equal_l0(results: SweepResults) -> Any:
    table: Any = results.comparisons
    return table[table["how"] != MISSED].dropna(subset=["nmse_ratio"])


_RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10)


def drawn(results: SweepResults) -> list[Drawn]:
    """The figures that a sweep has the data for, in their order.

    Args:
        results: What to draw.
    """
    found = [
        Drawn(
            "frontier",
            "What is reached at which L0",
            "Each point is a setting: the mean over seeds, with the standard deviation as bars. "
            "Errors: lower left is better.",
            frontiers,
        )
    ]
    if len(_at_equal_l0(results)):
        found.append(
            Drawn(
                "equal_l0",
                "At equal L0",
                "SAEs that choose their L0, beside others. Full: trained at that L0, with the 95 % "
                "interval of a paired bootstrap over held-out sequences and seeds. Hollow: "
                "interpolated between the neighbours on the frontier. What was told that L0 and "
                "ended more than 10 % off it is in the table below alone.",
                equal_l0,
            )
        )
    found.append(
        Drawn(
            "ratio",
            "The AFA metric against L0",
            "Below the line an SAE is under-activated. Where features are chosen by their norm the "
            "ratio is 1 by construction, and says nothing.",
            ratios,
        )
    )
    if _is_known(results.stability, "pw_mcc"):
        found.append(
            Drawn(
                "stability",
                "How alike the dictionaries of two seeds are",
                "Directions of two seeds are matched one to one; the mean |cos| of the matches. "
                "Random directions are not at 0: see the untrained control, if there is one.",
                stabilities,
            )
        )
    return found


def save_figures(results: SweepResults, folder: Path) -> list[Path]:
    """Write the figures as PNG and PDF.

    Args:
        results: What to draw.
        folder: Made if it does not exist.

    Returns:
        The files.

    Raises:
        OSError: If one cannot be written.
        ValueError: If somebody else's file has the name of one.
    """
    return plots.save_figures(((one.name, one.draw(results)) for one in drawn(results)), folder)
