"""One self-contained HTML page about a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from sae_afa_plugin.groups.base import Column
from sae_afa_plugin.pages import embedded, render, sortable
from sae_afa_plugin.sweep.figures import drawn, short_names
from sae_afa_plugin.sweep.results import AT_THIS_L0, SweepResults
from sae_afa_plugin.sweep.statistics import noise_of_numbers
from sae_afa_plugin.tables import shown, shown_columns


def render_sweep(results: SweepResults) -> str:
    """The page as one string of HTML.

    Args:
        results: What to report.
    """
    frontier: Any = results.frontier
    columns = shown_columns(frontier)
    settings = short_names([str(name) for name in frontier["setting"]])
    hooks = list(dict.fromkeys(frontier["hook_name"]))
    headings = [(column.in_a_line, column.meaning) for column in columns]
    noise = noise_of_numbers(results.noise)
    return render(
        "sweep.html.j2",
        about=results.about,
        config=results.about.get("config", ""),
        versions=results.evaluation.metadata.get("versions", {}),
        n_saes=len(results.summary),
        hooks=hooks,
        verdict=_verdict(results.comparisons),
        figures=[
            (one.title, one.text, embedded(one.draw(results))) for one in drawn(results)
        ],
        headings=headings,
        rows=[
            (
                settings[str(row["setting"])],
                row["hook_name"],
                int(row["seeds"]),
                [_mean_and_sd(row, column) for column in columns],
            )
            for _, row in frontier.iterrows()
        ],
        comparisons=_compared(results.comparisons),
        noise=[
            (column.in_a_line, column.meaning, noise.loc[column.name])
            for column in columns
            if column.name in noise.index
        ],
        refused=results.refused,
    )  # fmt: skip


def _mean_and_sd(row: Any, column: Column) -> tuple[str, float]:
    """As it is shown, and as it is sorted."""
    value, sd = row[column.name], row.get(f"{column.name}_sd")
    text = shown(column, value)
    if not pd.isna(value) and not pd.isna(sd) and sd > 0:
        text += f" ± {shown(column, sd)}"
    return text, sortable(value)


def _compared(table: Any) -> list[dict[str, str]]:
    if table.empty:
        return []
    settings = short_names([str(name) for name in table["setting"]])
    others = short_names([str(name) for name in table["against"]])
    return [
        {
            "setting": settings[str(row["setting"])],
            "against": others[str(row["against"])],
            "hook": str(row["hook_name"]),
            "how": str(row["how"]),
            "l0": f"{row['l0']:.1f}",
            "l0_against": f"{row['l0_against']:.1f}",
            "ratio": f"{row['nmse_ratio']:.3f}",
            "interval": _interval(row),
        }
        for _, row in table.iterrows()
        if not pd.isna(row["nmse_ratio"])
    ]


def _interval(row: Any) -> str:
    low, high = row.get("nmse_low"), row.get("nmse_high")
    return "" if pd.isna(low) or pd.isna(high) else f"{low:.3f} to {high:.3f}"


def _verdict(table: Any) -> Mapping[str, int]:
    """How many settings that choose their L0 have more error than others trained at it, or less."""
    if "nmse_low" not in table:
        return {}
    of = table[table["how"] == AT_THIS_L0].dropna(subset=["nmse_low", "nmse_high"])
    counts = {
        "more": int((of["nmse_low"] > 1).sum()),
        "less": int((of["nmse_high"] < 1).sum()),
        "of": len(of),
    }
    return counts if counts["of"] else {}
