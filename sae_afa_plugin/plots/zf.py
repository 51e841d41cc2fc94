"""The ZF plot: the norm of the input against the norm of the features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sae_afa_plugin.plots.style import (
    Results,
    axes_of,
    colours,
    groups,
    is_constant,
    legend,
    merged,
    names_below,
    picture,
    violins,
)

BANDS = (0.25, 0.5, 1.0)


_DOTS_UP_TO = 20_000


_CELLS = 160  # of a density, along each axis


def band(e: float) -> tuple[float, float | None]:
    """Between which ratios ``norm_f / norm_z`` lies if ``epsilon_lbo (d_sae - 1)`` is ``e``.

    Returns:
        ``sqrt(1 / (1 + e))`` and ``sqrt(1 / (1 - e))``; no upper edge from e = 1 on.

    Example:
        >>> band(0.5)
        (0.816..., 1.414...)
    """
    return (1 / (1 + e)) ** 0.5, (1 / (1 - e)) ** 0.5 if e < 1 else None


@picture(
    "zf",
    title="‖z‖ against ‖f‖",
    text="Each dot is a token; on the line the features weigh what they should. The bands are "
    "where a dictionary with ε (d_sae − 1) = e would keep every token.",
    place=10,
)
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
    drawn = {name: cloud for name, cloud in clouds.items() if len(cloud[0])}
    if not drawn:
        figure, ax = axes_of(ax, (7.4, 5.2))
        ax.text(0.5, 0.5, "no token has both norms above zero", ha="center", va="center",
                transform=ax.transAxes, color="0.3")  # fmt: skip
        return figure
    if all(is_constant(x) for x, _ in drawn.values()):
        return _zf_lanes(clouds, colour, ax)
    figure, ax = axes_of(ax, (7.4, 5.2))
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
    legend(ax, names, colour)
    _band_legend(ax)
    ax.set(xlabel="norm of the input ‖z‖", ylabel="norm of the features ‖f‖")
    return figure


def _zf_lanes(
    clouds: Mapping[str, tuple[np.ndarray, np.ndarray]], colour: Mapping[str, str], ax: Axes | None
) -> Figure:
    """The ZF plot of standardised inputs: every token has the same ‖z‖, so each SAE has a lane."""
    figure, ax = axes_of(ax, (max(5.0, 0.5 * len(clouds) + 3.2), 4.6))
    violins(ax, {name: y for name, (_, y) in clouds.items()}, colour)
    for lane, (x, _) in enumerate(clouds.values()):
        for ratio, style in _band_lines():
            height = ratio * np.median(x)
            ax.plot([lane - 0.5, lane + 0.5], [height, height], zorder=0.5, **style)
    every = np.concatenate([np.concatenate(cloud) for cloud in clouds.values()])
    low, high = np.quantile(every, [0.0005, 0.9995])
    ax.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    names_below(ax, list(clouds))
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
        names.set_clip_on(False)  # or the figure has no room for what is beside the axes


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
