"""Results as tables for people: which columns, under which headings, how written."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_afa_plugin.results import AFAResults

# columns of the summary that are shown in a terminal, with their headings
_SHOWN = {
    "l0_mean": "L0",
    "catalogue_l0": "L0 in the\ncatalogue",
    "nmse_mean": "NMSE\n(mean)",
    "nmse_median": "NMSE\n(median)",
    "core_ce_loss_score": "CE\nrecovered",
    "norm_z_median": "||z||",
    "norm_f_median": "||f||",
    "norm_ratio_median": "||f||/||z||",
    "over_activated": "over-\nactivated",
    "epsilon_lbo_median": "ε LBO",
    "interference_median": "inter-\nference",
    "max_abs_cos": "cohe-\nrence",
    "dead_features": "dead",
    "training_seconds": "training\nseconds",
}
# where the terminal is narrow, the first of these go first
_LESS_NEEDED = (
    "norm_z_median",
    "norm_f_median",
    "training_seconds",
    "max_abs_cos",
    "nmse_median",
    "dead_features",
    "epsilon_lbo_median",
    "catalogue_l0",
    "interference_median",
)


def shown_columns(summary: pd.DataFrame) -> dict[str, str]:
    """The columns that people are shown, with their headings, as far as they are known."""
    return {
        column: heading
        for column, heading in _SHOWN.items()
        if column in summary and summary[column].notna().any()
    }


def results_table(results: AFAResults, title: str = "", width: int | None = None) -> Table:
    """The summary as a table for the terminal: medians over tokens; L0 and shares are means.

    Args:
        results: What to show.
        title: Above the table.
        width: Characters in a line. Columns that do not fit are left out; ``summary.csv`` has
            them all.
    """
    columns = list(shown_columns(results.summary))
    less_needed = [column for column in _LESS_NEEDED if column in columns]
    while True:
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("SAE", no_wrap=True)
        for column in columns:
            table.add_column(_SHOWN[column], justify="right", no_wrap=True, vertical="bottom")
        for name, row in results.summary.iterrows():
            table.add_row(Text(str(name)), *(shown(column, row[column]) for column in columns))
        table.title = None  # it may wrap, and must not count here
        fits = width is None or Console(width=10_000).measure(table).minimum <= width
        table.title = Text(title)
        if fits or not less_needed:
            return table
        columns.remove(less_needed.pop(0))


def shown(column: str, value: Any) -> str:
    """A value of the summary, as it is read best."""
    if pd.isna(value):
        return "-"
    if column == "dead_features":
        return f"{int(value):,}"
    if column == "over_activated":
        return f"{value:.1%}"
    if column == "epsilon_lbo_median":
        return f"{value:.2e}"
    if column in ("l0_mean", "catalogue_l0", "training_seconds"):
        return f"{value:.1f}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
