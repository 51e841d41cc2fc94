"""What an evaluation found: tables that can be saved, loaded and continued. No model code.

In a results folder::

    summary.csv       one row for each SAE
    tokens.parquet    one row for each SAE and token
    sequences.parquet every token that was read, with its text, for context
    results.json      schema version, settings, versions, refusals; written last
    unfinished/       while an evaluation is under way: one file for each finished SAE
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sae_afa_plugin.store import write_json, write_whole

SCHEMA_VERSION = 1
RESULTS_FILENAME = "results.json"
REPORT_FILENAME = "report.html"
SUMMARY_FILENAME = "summary.csv"
TOKENS_FILENAME = "tokens.parquet"
SEQUENCES_FILENAME = "sequences.parquet"
_UNFINISHED = "unfinished"
_SETTINGS_FILENAME = "settings.json"
_DAMAGED = (OSError, ValueError, KeyError, pa.ArrowException)


@dataclass
class AFAResults:
    """The AFA metric of several SAEs on the same tokens.

    Args:
        summary: One row for each SAE, by name: what it is, then what
            :func:`sae_afa_plugin.metrics.summarize` gives, the coherence of its dictionary,
            ``dead_features`` (active on none of the tokens) and ``nonfinite_tokens``.
        tokens: One row for each SAE and token: ``sae``, ``sequence``, ``position``,
            ``token_id`` and the columns of :class:`sae_afa_plugin.metrics.AFATokenMetrics`.
        sequences: Every token that the model has read: ``sequence``, ``position``,
            ``token_id``, ``token`` (its text).
        metadata: ``settings``, ``versions``, ``refused`` (reasons by name), ``fingerprints``.
    """

    summary: pd.DataFrame
    tokens: pd.DataFrame
    sequences: pd.DataFrame
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write the results; ``results.json`` last, so that its presence means completeness.

        Args:
            folder: Made if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(
            folder / SUMMARY_FILENAME, lambda path: self.summary.to_csv(path, index_label="sae")
        )
        write_whole(
            folder / TOKENS_FILENAME,
            lambda path: self.tokens.to_parquet(path, engine="pyarrow", index=False),
        )
        write_whole(
            folder / SEQUENCES_FILENAME,
            lambda path: self.sequences.to_parquet(path, engine="pyarrow", index=False),
        )
        write_json(
            folder / RESULTS_FILENAME,
            {
                "schema_version": SCHEMA_VERSION,
                **self.metadata,
                "saes": {
                    str(name): {
                        column: None
                        if pd.isna(value)
                        else getattr(value, "item", lambda v=value: v)()
                        for column, value in row.items()
                    }
                    for name, row in self.summary.astype(object).iterrows()
                },
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> AFAResults:
        """Read what :meth:`save` has written.

        Args:
            folder: The folder of a finished evaluation.

        Raises:
            ValueError: If the folder holds no finished results, or they are damaged or of
                another schema.
        """
        folder = Path(folder)
        if not (folder / RESULTS_FILENAME).is_file():
            hint = (
                "its evaluation was not finished, run it again to continue"
                if (folder / _UNFINISHED).is_dir()
                else f"it has no {RESULTS_FILENAME}"
            )
            raise ValueError(f"the folder {str(folder)!r} holds no results: {hint}")
        try:
            written = json.loads((folder / RESULTS_FILENAME).read_text(encoding="utf-8"))
            if written["schema_version"] != SCHEMA_VERSION:
                raise ValueError(
                    f"its schema_version is {written['schema_version']}, this version of "
                    f"sae-afa-plugin reads {SCHEMA_VERSION}"
                )
            summary = pd.read_csv(folder / SUMMARY_FILENAME, index_col="sae", dtype={"sae": str})
            tokens = pd.read_parquet(folder / TOKENS_FILENAME, engine="pyarrow")
            sequences = pd.read_parquet(folder / SEQUENCES_FILENAME, engine="pyarrow")
        except _DAMAGED as error:
            raise ValueError(
                f"the results in {str(folder)!r} cannot be read: {error}. Delete the folder and "
                "evaluate again"
            ) from error
        metadata = {k: v for k, v in written.items() if k not in ("schema_version", "saes")}
        return cls(summary, tokens, sequences, metadata)

    def __str__(self) -> str:
        return self.summary.to_string()


# --- continuing ---


@dataclass(frozen=True)
class FinishedSAE:
    """One SAE's part of the results.

    Args:
        name: Its name.
        fingerprint: Of the SAE that was evaluated.
        summary: Its row of the summary.
        tokens: Its rows of the token table.
    """

    name: str
    fingerprint: str
    summary: dict[str, Any]
    tokens: pd.DataFrame


class ResultsFolder:
    """A folder in which an evaluation leaves each SAE as soon as it is finished.

    Args:
        folder: Made if it does not exist.
        settings: Everything that decides what the numbers mean. A folder keeps to its settings.

    Raises:
        ValueError: If the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        self._unfinished = folder / _UNFINISHED
        if (folder / RESULTS_FILENAME).is_file():
            self._check(folder / RESULTS_FILENAME)
        elif self._single_files():
            self._check(self._unfinished / _SETTINGS_FILENAME)

    def _single_files(self) -> list[Path]:
        return sorted(self._unfinished.glob("*.parquet"))

    def _check(self, place: Path) -> None:
        try:
            found = json.loads(place.read_text(encoding="utf-8"))["settings"]
        except _DAMAGED as error:
            raise ValueError(
                f"{str(place)!r} is damaged ({error}): delete it, or use another folder"
            ) from error
        different = [
            f"{key} was {found.get(key)!r} and is {self.settings.get(key)!r}"
            for key in {**found, **self.settings}
            if found.get(key) != self.settings.get(key)
            # a dataset that is gone cannot have changed
            and not (key.endswith("_content") and None in (found.get(key), self.settings.get(key)))
        ]
        if different:
            raise ValueError(
                f"{str(self.folder)!r} holds results of other settings ({'; '.join(different)}): "
                "use another folder, or delete this one"
            )

    def finished(self) -> tuple[dict[str, FinishedSAE], list[str]]:
        """What need not be evaluated again, by name, and a line for each file that is damaged."""
        done: dict[str, FinishedSAE] = {}
        damaged: list[str] = []
        if (self.folder / RESULTS_FILENAME).is_file():
            results = AFAResults.load(self.folder)
            for name, fingerprint in results.metadata["fingerprints"].items():
                tokens = results.tokens.loc[results.tokens["sae"] == name]
                summary = {str(k): v for k, v in results.summary.loc[name].to_dict().items()}
                done[name] = FinishedSAE(name, fingerprint, summary, tokens)
        for file in self._single_files():
            try:
                table = pq.read_table(file)
                about = json.loads((table.schema.metadata or {})[b"sae_afa"])
                one = FinishedSAE(tokens=table.to_pandas(), **about)
            except _DAMAGED as error:
                damaged.append(f"{file.name} is damaged and evaluated again ({error})")
                continue
            done[one.name] = one
        return done, damaged

    def sequences(self) -> pd.DataFrame:
        """The tokens that the SAEs of this folder were evaluated on."""
        return pd.read_parquet(self.folder / SEQUENCES_FILENAME, engine="pyarrow")

    def begin(self, sequences: pd.DataFrame) -> None:
        """Remember the tokens, or make sure that they are those of the SAEs finished before.

        Args:
            sequences: As in :class:`AFAResults`.

        Raises:
            ValueError: If they are others.
        """
        place = self.folder / SEQUENCES_FILENAME
        if self._single_files() or (self.folder / RESULTS_FILENAME).is_file():
            before = self.sequences()["token_id"].to_numpy()
            if not np.array_equal(before, sequences["token_id"].to_numpy()):
                raise ValueError(
                    f"the dataset gives other tokens than those that {str(self.folder)!r} was "
                    "made with: use another folder, or delete this one"
                )
        self._unfinished.mkdir(parents=True, exist_ok=True)
        write_json(self._unfinished / _SETTINGS_FILENAME, {"settings": self.settings})
        write_whole(place, lambda path: sequences.to_parquet(path, engine="pyarrow", index=False))

    def leave(self) -> None:
        """Leave nothing behind where nothing was finished."""
        if self._single_files():
            return
        shutil.rmtree(self._unfinished, ignore_errors=True)
        if self.folder.is_dir() and not (self.folder / RESULTS_FILENAME).is_file():
            (self.folder / SEQUENCES_FILENAME).unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def add(self, one: FinishedSAE) -> None:
        """Keep one SAE's results for good."""
        about = {"name": one.name, "fingerprint": one.fingerprint, "summary": one.summary}
        table = pa.Table.from_pandas(one.tokens, preserve_index=False)
        table = table.replace_schema_metadata(
            {**(table.schema.metadata or {}), b"sae_afa": json.dumps(about).encode()}
        )
        name = hashlib.sha256(one.name.encode()).hexdigest()[:16]
        write_whole(self._unfinished / f"{name}.parquet", lambda path: pq.write_table(table, path))

    def complete(self, results: AFAResults) -> None:
        """Write the final files, then remove the single ones."""
        if self._single_files():
            results.save(self.folder)
            shutil.rmtree(self._unfinished)
