"""Results as tables for people: which columns, under which headings, how written."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae_afa_plugin.groups import shown_columns as group_columns
from sae_afa_plugin.groups.base import Column
from sae_afa_plugin.printable import printable, shown_name
from sae_afa_plugin.results import AFAResults

_ALWAYS = 4  # columns that no table goes without
# what is known of an SAE beside what groups of metrics find
_FACTS = (
    Column(
        "catalogue_l0",
        "L0 in the\ncatalogue",
        "What SAELens's catalogue says of L0.",
        "{:.1f}".format,
        20,
        25,
    ),
    Column(
        "training_seconds",
        "training\nseconds",
        "Time in training steps of this SAE alone.",
        "{:.1f}".format,
        90,
        3,
    ),
)


def shown_columns(summary: pd.DataFrame) -> list[Column]:
    """The columns that people are shown, as far as they are known, in their order.

    Args:
        summary: Of an evaluation.
    """
    known = [
        column
        for column in [*_FACTS, *group_columns()]
        if column.name in summary and summary[column.name].notna().any()
    ]
    return sorted(known, key=lambda column: column.place)


def results_table(results: AFAResults, title: str = "", width: int | None = None) -> Table:
    """The summary as a table for the terminal: medians over tokens; L0 and shares are means.

    Args:
        results: What to show.
        title: Above the table.
        width: Characters in a line. Columns that do not fit are left out; ``summary.csv`` has
            them all.
    """
    columns = shown_columns(results.summary)
    less_needed = sorted(columns, key=lambda column: column.need)[:-_ALWAYS]
    while True:
        table = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("SAE", no_wrap=True)
        for column in columns:
            table.add_column(column.heading, justify="right", no_wrap=True, vertical="bottom")
        for name, row in results.summary.iterrows():
            table.add_row(
                Text(printable(shown_name(str(name)))),
                *(shown(column, row[column.name]) for column in columns),
            )
        table.title = None  # it may wrap, and must not count here
        fits = width is None or Console(width=10_000).measure(table).minimum <= width
        table.title = Text(printable(title))
        if fits or not less_needed:
            return table
        columns.remove(less_needed.pop(0))


def shown(column: Column, value: Any) -> str:
    """A value of the summary, as it is read best.

    Args:
        column: Which.
        value: NaN for one that is unknown.
    """
    return "-" if pd.isna(value) else column.form(value)
