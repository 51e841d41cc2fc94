"""What a sweep found, in memory and in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sae_afa_plugin.files import user_path, write_json, write_whole
from sae_afa_plugin.printable import cell
from sae_afa_plugin.results import AFAResults

TABLES = ("summary", "frontier", "comparisons", "noise", "stability")
SETTING = ["hook_name", "setting"]  # what runs have in common that differ by their seed alone
EVALUATION = "evaluation"
_ABOUT = "sweep.json"

# how a comparison came to the L0 of the SAE that chose it
AT_THIS_L0 = "trained at this L0"
MISSED = "told this L0, off by over 10 %"
INTERPOLATED = "interpolated"


def is_sweep(folder: Path) -> bool:
    """Whether a sweep has been finished in a folder."""
    return (folder / _ABOUT).is_file()


@dataclass
class SweepResults:
    """What a sweep found.

    Args:
        summary: One row for each SAE: what it is, and everything that was measured.
        frontier: One row for each setting and hook: means and standard deviations over seeds.
        comparisons: SAEs that choose their L0 beside others at equal L0: trained at it, told
            it and off by more than a tenth, or interpolated, which the column ``how`` says.
        noise: How much each number moves when nothing but the seed does.
        stability: How alike the dictionaries of different seeds are.
        evaluation: Tables of tokens and features.
        refused: Why SAEs are missing, by name.
        about: The config, its tokens, the device, peak memory.
    """

    summary: pd.DataFrame
    frontier: pd.DataFrame
    comparisons: pd.DataFrame
    noise: pd.DataFrame
    stability: pd.DataFrame
    evaluation: AFAResults
    refused: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the tables as CSV, and the rest as ``sweep.json``.

        Args:
            folder: Where the evaluation is already.

        Raises:
            OSError: If one cannot be written.
        """
        for name in TABLES:
            table: pd.DataFrame = getattr(self, name).map(cell)
            label = "sae" if name == "summary" else None
            write_whole(
                folder / f"{name}.csv",
                lambda path, t=table, label=label: t.to_csv(
                    path, index=label is not None, index_label=label
                ),
            )
        write_json(folder / _ABOUT, {"refused": self.refused, "about": self.about})

    @classmethod
    def load(cls, folder: str | Path) -> SweepResults:
        """Read what ``sae-afa sweep`` has left.

        Args:
            folder: Its ``--out``.

        Raises:
            ValueError: If it has no finished sweep.
        """
        folder = user_path(folder)
        if not is_sweep(folder):
            raise ValueError(
                f"{str(folder)!r} has no {_ABOUT}: name the folder of a finished sae-afa sweep"
            )
        told = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        tables = {
            # a copy is in one piece
            name: pd.read_csv(
                folder / f"{name}.csv", index_col=0 if name == "summary" else None
            ).copy()
            for name in TABLES
        }
        return cls(
            **tables,
            evaluation=AFAResults.load(folder / EVALUATION),
            refused=told["refused"],
            about=told["about"],
        )
