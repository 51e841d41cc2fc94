"""One self-contained HTML page from results: works from ``file://``, without any network.

plotly.js, the figures and the data of the interactive ZF plot are all in the file. Text that
comes from a dataset is data everywhere: escaped by the template, or set as text by the script.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_afa_plugin import plots
from sae_afa_plugin.activations.contexts import shown_text
from sae_afa_plugin.commands import evaluate_commands, shell_lines
from sae_afa_plugin.files import user_path
from sae_afa_plugin.groups.afa import SHARES, energy_sentence
from sae_afa_plugin.pages import embedded, render, sortable, write_page
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.tables import shown, shown_columns

_POINTS = 100_000  # of the interactive plot, over all SAEs
_EXTREMES = 8  # tokens on either side
_CONTEXT = 14  # tokens before and after


def write_report(results: AFAResults, path: str | Path, n_points: int = _POINTS) -> Path:
    """Write the report.

    Args:
        results: What to report.
        path: The file, or a folder in which it gets the name ``report.html``.
        n_points: At most so many tokens in the interactive plot, over all SAEs; where there are
            more they are drawn at random. Everything else is made from all tokens.

    Returns:
        The file.

    Raises:
        ValueError: If there is a file that this package has not written.
    """
    return write_page(user_path(path), lambda: render_report(results, n_points))


def render_report(results: AFAResults, n_points: int = _POINTS) -> str:
    """The report as one string of HTML; see :func:`write_report`."""
    columns = shown_columns(results.summary)
    facts: list[tuple[str, dict[Any, Any]]] = [
        (str(name), row.to_dict()) for name, row in results.summary.iterrows()
    ]
    names = [str(name) for name in results.summary.index]
    # the interactive plot stands for the first of them
    drawn = [picture for picture in plots.pictures(results) if picture.name != "zf"]
    sampled = _sampled(results, n_points)
    return render(
        "report.html.j2",
        names=names,
        colours=plots.colours(names),
        settings=results.metadata.get("settings", {}),
        versions=results.metadata.get("versions", {}),
        refused=results.metadata.get("refused", {}),
        command=shell_lines(evaluate_commands(results)),
        headings=[(column.in_a_line, column.meaning) for column in columns],
        rows=[
            (
                name,
                [
                    (shown(column, row[column.name]), sortable(row[column.name]))
                    for column in columns
                ],
            )
            for name, row in facts
        ],
        energy=[
            (name, energy_sentence(row))
            for name, row in facts
            if all(f"{share}_mean" in row for share in SHARES)
        ],
        about=[(name, _about(row)) for name, row in facts],
        n_tokens=int(results.summary["tokens"].max()),
        n_all=int(results.summary["tokens"].sum()),
        n_drawn=sum(map(len, sampled.values())),
        figures=[
            (picture.title, picture.text, embedded(picture.draw(results))) for picture in drawn
        ],
        extremes=_extremes(results),
        data=Markup(json.dumps(_interactive(results, sampled)).replace("<", "\\u003c")),
        plotly=Markup(get_plotlyjs()),
    )


_ABOUT = (
    "source", "architecture", "trained_as", "d_in", "d_sae", "hook_name", "hook_name_out",
    "normalize_activations", "dtype", "tokens", "special_tokens", "nonfinite_tokens",
)  # fmt: skip


def _about(row: dict[Any, Any]) -> dict[str, str]:
    known = {key: row[key] for key in _ABOUT if not bool(pd.isna(row.get(key)))}
    return {key: str(value).replace("\t", "/") for key, value in known.items()}


# --- the interactive plot ---


def _sampled(results: AFAResults, n_points: int) -> dict[str, pd.DataFrame]:
    """The same share of each SAE's tokens, in their order."""
    share = min(1.0, n_points / max(int(results.summary["tokens"].sum()), 1))
    return {
        name: group.sample(int(share * len(group)), random_state=0).sort_index()
        for name, group in plots.groups(results)
    }


def _interactive(results: AFAResults, sampled: dict[str, pd.DataFrame]) -> dict[str, Any]:
    size = _sequence_length(results)
    colour = plots.colours([str(name) for name in results.summary.index])
    where = results.sequences["token"].astype("category")
    lanes = all(
        plots.is_constant(g["norm_z"].to_numpy(float)) for _, g in plots.groups(results, ["norm_z"])
    )
    return {
        "saes": [
            {
                "name": name,
                "colour": colour[name],
                **{
                    column: _packed(group[column], np.float32)
                    for column in ("norm_z", "norm_f", "nmse", "interference")
                },
                "l0": _packed(group["l0"], np.uint32),
                "place": _packed(group["sequence"] * size + group.get("position", 0), np.uint32),
            }
            for name, group in sampled.items()
        ],
        "size": size,
        "tokens": _packed(where.cat.codes, np.uint32),
        "texts": [str(text) for text in where.cat.categories],
        "bands": [[e, *plots.band(e)] for e in plots.BANDS],
        "lanes": lanes,
        "context": _CONTEXT,
        "empty": shown_text(""),
    }


def _sequence_length(results: AFAResults) -> int:
    return 1 if results.sequences.empty else int(results.sequences["position"].max()) + 1


def _packed(values: Any, dtype: type) -> str:
    little_endian = values.to_numpy(dtype).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(little_endian.tobytes()).decode()


# --- the most over- and under-activated tokens ---


def _extremes(results: AFAResults) -> list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    texts = results.sequences["token"].to_numpy(dtype=object)
    size = _sequence_length(results)
    if results.sequences.empty:  # samples that stand in no text
        return []
    found: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = []
    for name, group in plots.groups(results):
        ratio = (group["norm_f"] / group["norm_z"]).replace([np.inf, -np.inf], np.nan).dropna()
        order = ratio.sort_values(kind="stable").index
        over = [_in_context(group.loc[i], ratio[i], texts, size) for i in order[::-1][:_EXTREMES]]
        under = [_in_context(group.loc[i], ratio[i], texts, size) for i in order[:_EXTREMES]]
        found.append((name, over, under))
    return found


def _in_context(row: Any, ratio: float, texts: Any, size: int) -> dict[str, Any]:
    start, at = int(row["sequence"]) * size, int(row["position"])
    first, last = max(0, at - _CONTEXT), min(size, at + _CONTEXT + 1)
    return {
        "ratio": f"{ratio:.3f}",
        "nmse": f"{row['nmse']:.3g}",
        "l0": int(row["l0"]),
        "before": _readable(texts[start + first : start + at]),
        "token": shown_text(_readable(texts[start + at : start + at + 1])),
        "after": _readable(texts[start + at + 1 : start + last]),
    }


def _readable(tokens: Any) -> str:
    return "".join(map(str, tokens)).replace("\n", "⏎")
