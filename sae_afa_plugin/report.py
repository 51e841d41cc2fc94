"""One self-contained HTML page from results: works from ``file://``, without any network.

plotly.js, the figures and the data of the interactive ZF plot are all in the file. Text that
comes from a dataset is data everywhere: escaped by the template, or set as text by the script.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_afa_plugin import plots
from sae_afa_plugin.results import REPORT_FILENAME, AFAResults
from sae_afa_plugin.store import write_whole
from sae_afa_plugin.tables import shown, shown_columns

_POINTS = 100_000  # of the interactive plot, over all SAEs
_EXTREMES = 8  # tokens on either side
_CONTEXT = 14  # tokens before and after

_EXPLAINED = {
    "violin": (
        "Reconstruction error and ε LBO",
        "Each half violin is the distribution over tokens, the bar its median; both axes are "
        "logarithmic. ε LBO is the least constant of quasi-orthogonality that a token forces on "
        "the dictionary in the paper's convention. It contains reconstruction error, so it is no "
        "lower bound on the coherence, and an SAE that was trained to match norms (top-AFA) has a "
        "small one whether it reconstructs well or not.",
    ),
    "l0": (
        "Active features",
        "How many features are active, over all tokens, by the norm of the input and by position. "
        "Lines are medians. A TopK SAE is a single line by construction; long tails downwards "
        "mean tokens that are written with very few features, which is worth a look at the list "
        "of under- and over-activated tokens.",
    ),
    "coherence": (
        "Interference",
        "The interference of a token is the mean cosine between its active directions, weighted "
        "by how strongly they are active. Above zero the directions lean the same way, so the "
        "reconstruction is longer than the feature vector and the SAE looks under-activated "
        "although it need not reconstruct badly; below zero they partly cancel. By arithmetic no "
        "token can be beyond the coherence (the largest cosine in the dictionary), and no "
        "dictionary of this size can have a coherence below the Welch bound. The axis is straight "
        "around zero and logarithmic beyond. For signed features (AbsTopK) it is no longer a mean.",
    ),
    "frontier": (
        "Error against sparsity",
        "Mean NMSE against mean L0; lower left is better. Only SAEs of one hook and one kind of "
        "normalisation compare, and differences of a few percent between single runs mean nothing.",
    ),
}


def write_report(results: AFAResults, path: str | Path, n_points: int = _POINTS) -> Path:
    """Write the report.

    Args:
        results: What to report.
        path: The file, or a folder in which it gets the name ``report.html``.
        n_points: At most so many tokens in the interactive plot, over all SAEs; where there are
            more they are drawn at random. Everything else is made from all tokens.

    Returns:
        The file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / REPORT_FILENAME
    page = render_report(results, n_points)
    write_whole(path, lambda partial: partial.write_text(page, encoding="utf-8"))
    return path


def render_report(results: AFAResults, n_points: int = _POINTS) -> str:
    """The report as one string of HTML; see :func:`write_report`."""
    environment = Environment(
        loader=PackageLoader("sae_afa_plugin"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = shown_columns(results.summary)
    facts: list[tuple[str, dict[Any, Any]]] = [
        (str(name), row.to_dict()) for name, row in results.summary.iterrows()
    ]
    names = [str(name) for name in results.summary.index]
    drawn = {name: draw for name, draw in plots.drawable(results).items() if name != "zf"}
    sampled = _sampled(results, n_points)
    return environment.get_template("report.html.j2").render(
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        names=names,
        colours=plots.colours(names),
        settings=results.metadata.get("settings", {}),
        versions=results.metadata.get("versions", {}),
        refused=results.metadata.get("refused", {}),
        command=reproducing_command(results),
        headings={
            column: heading.replace("-\n", "").replace("\n", " ")
            for column, heading in columns.items()
        },
        rows=[
            (
                name,
                [(shown(column, row[column]), _sortable(row[column])) for column in columns],
            )
            for name, row in facts
        ],
        about=[(name, _about(row)) for name, row in facts],
        n_tokens=int(results.summary["tokens"].max()),
        n_all=len(results.tokens),
        n_drawn=sum(map(len, sampled.values())),
        figures=[(*_EXPLAINED[name], _png(draw(results))) for name, draw in drawn.items()],
        extremes=_extremes(results),
        data=Markup(json.dumps(_interactive(results, sampled)).replace("<", "\\u003c")),
        plotly=Markup(get_plotlyjs()),
    )


_ABOUT = (
    "source", "architecture", "d_in", "d_sae", "hook_name", "hook_name_out",
    "normalize_activations", "dtype", "tokens", "special_tokens", "nonfinite_tokens",
)  # fmt: skip


def _about(row: dict[Any, Any]) -> dict[str, str]:
    known = {key: row[key] for key in _ABOUT if not bool(pd.isna(row.get(key)))}
    return {key: str(value).replace("\t", "/") for key, value in known.items()}


def _sortable(value: Any) -> float:
    return -1e300 if pd.isna(value) else float(value)


def _png(figure: Any) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(file.getvalue()).decode()


def reproducing_command(results: AFAResults) -> str:
    """The command that makes these results, as far as they came from files and the hub.

    One line for each release; empty where all SAEs were objects.

    Args:
        results: With ``settings`` in their metadata.
    """
    settings = results.metadata.get("settings", {})
    sources = [str(row.get("source", "in memory")) for _, row in results.summary.iterrows()]
    of_releases = [source.split("\t") for source in sources if "\t" in source]
    # one release for each command: the next goes on in the same folder
    wanted = {release: [release] for release, _ in of_releases} or {"": []}
    for release, sae_id in of_releases:
        wanted[release] += ["--sae-id", sae_id]
    for source in sources:
        if "\t" not in source and source != "in memory":
            next(iter(wanted.values())).extend(["--path", source])
    same: list[str] = []
    if settings.get("positions") == "last":
        same += ["--protocol", "paper"]
    for flag, key in (
        ("--model", "model_argument"), ("--dataset", "dataset"),
        ("--dataset-config", "dataset_config"), ("--split", "split"), ("--tokens", "n_tokens"),
        ("--context-size", "context_size"), ("--seed", "seed"),
    ):  # fmt: skip
        if settings.get(key) == "in memory":
            same += [flag, "YOUR_DATASET"]
        elif settings.get(key) is not None:
            same += [flag, str(settings[key])]
    if settings.get("model_content") is not None:  # it was an object
        same += ["--model", "YOUR_MODEL"]
    if settings.get("prepend_bos") is not None:
        same.append("--bos" if settings["prepend_bos"] else "--no-bos")
    if settings.get("exclude_special_tokens") is False:
        same.append("--keep-special-tokens")
    if settings.get("core_tokens"):
        same.append("--core")
    return "\n".join(
        shlex.join(["sae-afa", "evaluate", *of, *same]) for of in wanted.values() if of
    )


# --- the interactive plot ---


def _sampled(results: AFAResults, n_points: int) -> dict[str, pd.DataFrame]:
    """The same share of each SAE's tokens, in their order."""
    every = dict(plots.groups(results))
    total = sum(map(len, every.values()))
    share = min(1.0, n_points / max(total, 1))
    return {
        name: group.sample(int(share * len(group)), random_state=0).sort_index()
        for name, group in every.items()
    }


def _interactive(results: AFAResults, sampled: dict[str, pd.DataFrame]) -> dict[str, Any]:
    size = int(results.sequences["position"].max()) + 1
    colour = plots.colours([str(name) for name in results.summary.index])
    where = results.sequences["token"].astype("category")
    lanes = all(plots.is_constant(g["norm_z"].to_numpy(float)) for _, g in plots.groups(results))
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
                "place": _packed(group["sequence"] * size + group["position"], np.uint32),
            }
            for name, group in sampled.items()
        ],
        "size": size,
        "tokens": _packed(where.cat.codes, np.uint32),
        "texts": [str(text) for text in where.cat.categories],
        "bands": [[e, *plots.band(e)] for e in plots.BANDS],
        "lanes": lanes,
        "context": _CONTEXT,
    }


def _packed(values: Any, dtype: type) -> str:
    little_endian = values.to_numpy(dtype).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(little_endian.tobytes()).decode()


# --- the most over- and under-activated tokens ---


def _extremes(results: AFAResults) -> list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    texts = results.sequences["token"].to_numpy(dtype=object)
    size = int(results.sequences["position"].max()) + 1
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
        "token": _readable(texts[start + at : start + at + 1]),
        "after": _readable(texts[start + at + 1 : start + last]),
    }


def _readable(tokens: Any) -> str:
    return "".join(map(str, tokens)).replace("\n", "⏎")
