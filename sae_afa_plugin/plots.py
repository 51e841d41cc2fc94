"""Pictures of results: tables in, matplotlib figures out. No model code.

Every function takes results (or several, put side by side), draws into ``ax`` if one is given,
and returns the figure. Colours keep apart for colour-blind readers and in print; clouds of many
points are drawn as densities and rasterised, so that a PDF stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from sae_afa_plugin.results import AFAResults

Results: TypeAlias = AFAResults | Sequence[AFAResults]

BANDS = (0.25, 0.5, 1.0)
_DOTS_UP_TO = 20_000
_CELLS = 160  # of a density, along each axis
# Okabe and Ito's palette without its yellow, which is too light on paper
_FEW = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX*"
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
    if len(names) <= len(_FEW):
        return dict(zip(names, _FEW, strict=False))
    ramp = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(names)))
    return {name: to_hex(shade) for name, shade in zip(names, ramp, strict=True)}


def _axes(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if ax is None:
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots()
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure, ax


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    drawn.__name__, drawn.__doc__ = draw.__name__, draw.__doc__
    return drawn


def groups(results: AFAResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """The tokens of each SAE, in the order of the summary."""
    of: Any = results.tokens.groupby("sae", observed=True)
    for name in results.summary.index:
        yield str(name), of.get_group(name)


def is_constant(values: np.ndarray) -> bool:
    """Whether all values are the same up to rounding, as norms of standardised inputs are."""
    return bool(np.ptp(values) <= 1e-3 * np.median(np.abs(values)))


def _literal(name: str) -> str:
    """A name as matplotlib is to write it: between two dollars it would read mathematics."""
    return name.replace("$", r"\$")


def _legend(ax: Axes, names: Sequence[str], colour: Mapping[str, str]) -> None:
    """Beside the axes, so that it covers no data; on two columns where it would be too long."""
    if len(names) > 1:
        handles = [Line2D([], [], color=colour[n], marker="o", ls="", ms=5) for n in names]
        ax.legend(
            handles,
            [_literal(name) for name in names],
            loc="upper left",
            bbox_to_anchor=(1.02, 1.0),
            fontsize="small",
            ncols=1 + (len(names) > 20),
            handletextpad=0.2,
        )


# --- ||z|| against ||f|| ---


def band(e: float) -> tuple[float, float | None]:
    """Between which ratios ``norm_f / norm_z`` lies if ``epsilon_lbo (d_sae - 1)`` is ``e``.

    Returns:
        ``sqrt(1 / (1 + e))`` and ``sqrt(1 / (1 - e))``; no upper edge from e = 1 on.

    Example:
        >>> band(0.5)
        (0.816..., 1.414...)
    """
    return (1 / (1 + e)) ** 0.5, (1 / (1 - e)) ** 0.5 if e < 1 else None


@_styled
def zf_plot(results: Results, ax: Axes | None = None, dots_up_to: int = _DOTS_UP_TO) -> Figure:
    """The ZF plot: what each token's features weigh against what they should.

    ``||z||`` to the right, ``||f||`` upwards; on the diagonal they are equal, above it a token is
    over-activated. The bands are where a dictionary of ``epsilon_lbo (d_sae - 1) = e`` would
    keep all tokens.

    Args:
        results: What to draw.
        ax: Axes to draw into.
        dots_up_to: With more tokens than this, densities are drawn instead of dots.
    """
    results = merged(results)
    names = [str(name) for name in results.summary.index]
    colour = colours(names)
    clouds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, group in groups(results):
        x, y = group["norm_z"].to_numpy(float), group["norm_f"].to_numpy(float)
        known = (x > 0) & (y > 0)
        clouds[name] = x[known], y[known]
    if all(is_constant(x) for x, _ in clouds.values()):
        return _zf_lanes(clouds, colour, ax)
    figure, ax = _axes(ax, (7.4, 5.2))
    every_x = np.concatenate([x for x, _ in clouds.values()])
    every_y = np.concatenate([y for _, y in clouds.values()])
    log = max(np.ptp(np.log10(every_x)), np.ptp(np.log10(every_y))) > 1
    # a few outliers must not squeeze everything else into a corner
    low, high = np.quantile(np.concatenate([every_x, every_y]), [0.0005, 0.9995])
    ends = (low / 1.15, high * 1.15) if log else (max(0.0, low - 0.1 * high), 1.08 * high)
    if log:
        ax.set(xscale="log", yscale="log")
    ax.set(xlim=ends, ylim=ends)
    for name, (x, y) in clouds.items():
        if len(every_x) <= dots_up_to:
            ax.scatter(x, y, s=6, color=colour[name], alpha=0.5, lw=0, rasterized=True)
        else:
            _density(ax, x, y, colour[name], ends, log)
    for ratio, style in _band_lines():
        ax.plot(ends, [ratio * end for end in ends], zorder=3, **style)
    _legend(ax, names, colour)
    _band_legend(ax)
    ax.set(xlabel="norm of the input ‖z‖", ylabel="norm of the features ‖f‖")
    return figure


def _zf_lanes(
    clouds: Mapping[str, tuple[np.ndarray, np.ndarray]], colour: Mapping[str, str], ax: Axes | None
) -> Figure:
    """The ZF plot of standardised inputs: every token has the same ‖z‖, so each SAE has a lane."""
    figure, ax = _axes(ax, (max(5.0, 0.5 * len(clouds) + 3.2), 4.6))
    _violins(ax, {name: y for name, (_, y) in clouds.items()}, colour)
    for lane, (x, _) in enumerate(clouds.values()):
        for ratio, style in _band_lines():
            height = ratio * np.median(x)
            ax.plot([lane - 0.5, lane + 0.5], [height, height], zorder=0.5, **style)
    every = np.concatenate([np.concatenate(cloud) for cloud in clouds.values()])
    low, high = np.quantile(every, [0.0005, 0.9995])
    ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    _names_below(ax, list(clouds))
    _band_legend(ax)
    ax.set_ylabel("norm of the features ‖f‖")
    ax.set_title("the norm of the input ‖z‖ is the same for every token", fontsize=9, loc="left")
    return figure


def _band_lines() -> Iterator[tuple[float, dict[str, Any]]]:
    """Ratio and style of the diagonal and of every edge of a band."""
    yield 1.0, {"color": "black", "lw": 1.2}
    for e, dashes in zip(BANDS, ((6, 2), (3, 1.5), (1, 1.5)), strict=True):
        for ratio in band(e):
            if ratio is not None:
                yield ratio, {"color": "0.35", "lw": 0.9, "dashes": dashes}


def _band_legend(ax: Axes) -> None:
    """Which line is which, below the names of the SAEs."""
    labels = ["‖f‖ = ‖z‖", *(f"e = {e:g}" + (" (no upper edge)" if e >= 1 else "") for e in BANDS)]
    styles = {tuple(style.get("dashes", ())): style for _, style in _band_lines()}
    names = ax.get_legend()
    handles = [Line2D([], [], **style) for style in styles.values()]
    ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(1.02, 0.0), fontsize="small")
    if names is not None:
        ax.add_artist(names)


def _density(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    colour: str,
    ends: tuple[float, float],
    log: bool,
) -> None:
    edges = (np.geomspace if log else np.linspace)(*ends, _CELLS + 1)
    counts = np.histogram2d(x, y, bins=(edges, edges))[0].T
    if not counts.any():
        return
    shades = LinearSegmentedColormap.from_list("", [to_rgba(colour, 0.15), to_rgba(colour, 0.95)])
    ax.pcolormesh(
        edges,
        edges,
        np.ma.masked_equal(np.sqrt(counts / counts.max()), 0),  # sqrt: rare tokens stay visible
        cmap=shades,
        vmin=0,
        vmax=1,
        rasterized=True,
    )


# --- distributions ---


def _violins(
    ax: Axes, values: Mapping[str, np.ndarray], colour: Mapping[str, str], side: Any = "both"
) -> None:
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


def _names_below(ax: Axes, names: Sequence[str]) -> None:
    ax.set_xticks(range(len(names)), [_literal(name) for name in names])
    if len(names) > 4 or max(map(len, names)) > 12:
        for label in ax.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_xlim(-0.6, len(names) - 0.4)


def _power_ticks(ax: Axes) -> None:
    """Round numbers on an upward axis that shows log10 of a quantity; once all is drawn."""
    low, high = ax.get_ylim()
    steps = (1, 2, 5) if high - low <= 1.6 else (1, 3) if high - low <= 3 else (1,)
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    every = 1 if len(powers) <= 8 else 2
    values = [step * 10.0**power for power in powers[::every] for step in steps]
    ax.yaxis.set_major_locator(FixedLocator([np.log10(v) for v in values]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _number(10**v)))
    ax.set_ylim(low, high)


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if 0.999e-3 < abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    power = round(np.log10(abs(value)))
    return f"{'-' if value < 0 else ''}$10^{{{power}}}$"


@_styled
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
    figure, ax = _axes(ax, (max(5.0, 0.55 * len(names) + 2.5), 4.2))
    right = ax.twinx()
    right.spines["right"].set_visible(True)
    for axes, column, side, tint in ((ax, "nmse", "low", 0), (right, "epsilon_lbo", "high", 1)):
        values = {
            name: np.log10(v[v > 0])
            for name, group in groups(results)
            if (v := group[column].dropna().to_numpy(float)) is not None
        }
        _violins(axes, values, dict.fromkeys(names, _FEW[tint]), side)
        axes.set_ylabel(
            {"nmse": "NMSE (left halves)", "epsilon_lbo": "ε LBO (right halves)"}[column],
            color=_FEW[tint],
        )
        axes.tick_params(axis="y", colors=_FEW[tint])
        _mark_best_and_worst(axes, values, -0.22 if side == "low" else 0.22, _FEW[tint])
        _power_ticks(axes)
    _names_below(ax, names)
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


@_styled
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
    _violins(
        ax[0], {n: np.log10(g["l0"].clip(lower=1).to_numpy()) for n, g in groups(results)}, colour
    )
    ax[0].set_ylabel("active features (L0)")
    _names_below(ax[0], names)
    if len(names) > 4:  # the legend of colours says it
        ax[0].set_xticks([])
    constant, shade = True, len(names) <= 4
    for name, group in groups(results):
        l0 = np.log10(group["l0"].clip(lower=1))
        if not is_constant(group["norm_z"].to_numpy(float)):
            constant = False
            bins = pd.qcut(group["norm_z"], 20, duplicates="drop")
            _trend(ax[1], group["norm_z"].groupby(bins, observed=True).median(),
                   l0.groupby(bins, observed=True), colour[name], shade)  # fmt: skip
        if group["position"].nunique() > 1:
            by_position = l0.groupby(group["position"])
            _trend(ax[2], by_position.mean().index.to_series(), by_position, colour[name], shade)
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
    _power_ticks(ax[0])
    _legend(ax[2], names, colour)
    return figure


def _trend(ax: Axes, x: Any, groups: Any, colour: str, shade: bool) -> None:
    ax.plot(x, groups.median(), color=colour, lw=1.4)
    if not shade:
        return
    ax.fill_between(x, groups.quantile(0.05), groups.quantile(0.95), color=colour, alpha=0.12, lw=0)


@_styled
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
    figure, ax = _axes(ax, (max(5.0, 0.55 * len(names) + 2.5), 4.2))
    values = {n: g["interference"].dropna().to_numpy(float) for n, g in groups(results)}
    typical = np.median(np.abs(np.concatenate([v for v in values.values() if len(v)] or [[1.0]])))
    unit = 10 ** np.floor(np.log10(max(float(typical), 1e-6)))

    def height(value: Any) -> Any:
        """Straight around zero, logarithmic beyond ``unit``, on both sides."""
        return np.arcsinh(np.asarray(value) / unit)

    _violins(ax, {name: height(of_sae) for name, of_sae in values.items()}, colour)
    for at, (_, row) in enumerate(results.summary.iterrows()):
        for sign in (-1, 1):
            ax.hlines(
                height(sign * row["max_abs_cos"]), at - 0.4, at + 0.4, color="#D55E00", lw=1.6
            )
        ax.hlines(height(row["welch_bound"]), at - 0.4, at + 0.4, color="#0072B2", lw=1.2, ls=":")
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    largest = results.summary["max_abs_cos"].max()
    powers = unit * 10.0 ** np.arange(0, np.floor(np.log10(largest / unit)) + 1)
    ax.yaxis.set_major_locator(FixedLocator(height([*-powers[::-1], 0, *powers]).tolist()))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _number(round(unit * np.sinh(v), 9))))
    _names_below(ax, names)
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


# --- several architectures ---


@_styled
def frontier_plot(
    results: Results | pd.DataFrame, ax: Axes | None = None, ce_recovered: bool = False
) -> Figure:
    """L0 against the error, one line for each architecture; lower left is better.

    Args:
        results: What to draw, or a table with ``architecture``, ``l0_mean`` and ``nmse_mean``
            (or ``core_ce_loss_score``). Rows that share a value in a column ``group`` are runs
            of one setting with different seeds: their mean is drawn, with the standard
            deviation as error bars.
        ax: Axes to draw into.
        ce_recovered: Draw the share of the loss that is lost, ``1 - core_ce_loss_score``,
            instead of NMSE.

    Raises:
        ValueError: If a column is missing.
    """
    table = results if isinstance(results, pd.DataFrame) else merged(results).summary
    column = "core_ce_loss_score" if ce_recovered else "nmse_mean"
    missing = [name for name in ("architecture", "l0_mean", column) if name not in table]
    if missing:
        raise ValueError(
            f"the table has no column {', '.join(missing)}"
            + (": evaluate with core=True (--core)" if ce_recovered else "")
        )
    figure, ax = _axes(ax, (5.6, 4.2))
    # a BatchTopK SAE is saved as a JumpReLU one: how it was trained says more, where it is known
    kind = table.get("trained_as", table["architecture"])
    error = 1 - table[column] if ce_recovered else table[column]
    alone = pd.Series(range(len(table)), table.index)
    points = pd.DataFrame(
        {
            "kind": kind,
            "group": table.get("group", alone),
            "l0": table["l0_mean"],
            "error": error,
        }
    )
    colour = colours(sorted(points["kind"].unique()))
    best = (np.inf, 0.0)
    for number, (name, of_kind) in enumerate(points.groupby("kind")):
        runs = of_kind.groupby("group")[["l0", "error"]]
        mean: Any = runs.mean()
        spread: Any = runs.std(ddof=1)
        order = mean["l0"].argsort().to_numpy()
        mean, spread = mean.iloc[order], spread.iloc[order]
        ax.errorbar(
            mean["l0"],
            mean["error"],
            xerr=spread["l0"].fillna(0),
            yerr=spread["error"].fillna(0),
            color=colour[str(name)],
            marker=_MARKERS[number % len(_MARKERS)],
            ms=5,
            lw=1.2,
            capsize=2,
            label=_literal(str(name)),
        )
        lowest = mean["error"].idxmin()
        best = min(best, (mean["error"][lowest], mean["l0"][lowest]))
    ax.plot(best[1], best[0], "o", ms=13, mfc="none", mec="black", mew=1.2)
    ax.annotate("best", (best[1], best[0]), xytext=(0, -9), textcoords="offset points",
                ha="center", va="top", fontsize=8)  # fmt: skip
    ax.margins(0.08, 0.12)
    ax.set(xscale="log", yscale="log", xlabel="active features (L0)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(
            FuncFormatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else "")
        )
        for label in axis.get_minorticklabels():
            label.set_fontsize(8)
    ax.set_ylabel("1 - CE recovered" if ce_recovered else "NMSE")
    ax.legend(fontsize="small")
    return figure


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
