"""What an evaluation found: a table of SAEs, and the tables of their tokens, read when asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sae_afa_plugin.activations.base import different_settings
from sae_afa_plugin.files import read_sealed, user_path, write_sealed, write_whole
from sae_afa_plugin.groups.base import GroupResult
from sae_afa_plugin.printable import cell, printable
from sae_afa_plugin.store import SCHEMA_VERSION, TOKEN, Store, StoredResult

RESULTS_FILENAME = "results.json"
REPORT_FILENAME = "report.html"
SUMMARY_FILENAME = "summary.csv"
Parts = Mapping[str, Mapping[str, StoredResult]]  # by SAE and group


class AFAResults:
    """The metrics of several SAEs on the same tokens.

    Args:
        summary: One row for each SAE, by name: what it is, then what each group of metrics found,
            :func:`sae_afa_plugin.metrics.summarize` among them.
        tokens: One row for each SAE and token: ``sae``, ``sequence``, ``position``,
            ``token_id`` and the columns of :class:`sae_afa_plugin.metrics.AFATokenMetrics`.
        sequences: Every token that the model has read: ``sequence``, ``position``,
            ``token_id``, ``token`` (its text).
        metadata: ``settings``, ``versions``, ``refused`` (reasons by name), ``fingerprints``.
    """

    def __init__(
        self,
        summary: pd.DataFrame,
        tokens: pd.DataFrame,
        sequences: pd.DataFrame,
        metadata: dict[str, Any] | None = None,
    ):
        self.summary, self.metadata = summary, {} if metadata is None else metadata
        self._tokens: pd.DataFrame | None = tokens
        self._sequences: pd.DataFrame | None = sequences
        self._parts: Parts = {}
        self._store: Store | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def _of_store(
        cls, store: Store, parts: Parts, summary: pd.DataFrame, metadata: dict[str, Any]
    ) -> AFAResults:
        results = cls(summary, pd.DataFrame(), pd.DataFrame(), metadata)
        results._tokens = results._sequences = None
        results._parts, results._store = parts, store
        return results

    def __getstate__(self) -> dict[str, Any]:
        if self._temporary is None:
            return vars(self)
        # a copy in another process has no folder that vanishes with this one
        tables = {"_tokens": self.tokens, "_sequences": self.sequences}
        return {**vars(self), **tables, "_parts": {}, "_store": None, "_temporary": None}

    def keep(self, temporary: tempfile.TemporaryDirectory[str]) -> None:
        """Keep a temporary folder, in which the tables lie, as long as these results."""
        self._temporary = temporary

    # --- tables of tokens ---

    @property
    def tokens(self) -> pd.DataFrame:
        """One row for each SAE and token, of all SAEs: :meth:`tokens_of` takes less memory."""
        if self._tokens is None:
            names = [str(name) for name in self.summary.index]
            tables = [self.tokens_of(name) for name in names]
            for name, table in zip(names, tables, strict=True):
                table.insert(0, "sae", pd.Categorical([name] * len(table), names))
            self._tokens = pd.concat(tables, ignore_index=True)
        return self._tokens

    def tokens_of(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The tokens of one SAE, read from disk where they lie there.

        Args:
            name: Of the SAE.
            columns: Only those of these that there are.

        Raises:
            ValueError: If there is no such SAE, or the file is damaged.
        """
        if name not in self.summary.index:
            known = ", ".join(map(repr, self.summary.index[:8]))
            raise ValueError(f"the results have no SAE {name!r}: they have {known}")
        if self._tokens is not None:
            rows = self._tokens.loc[self._tokens["sae"] == name].drop(columns="sae")
            return rows if columns is None else rows[[c for c in columns if c in rows]]
        wanted = None if columns is None else [TOKEN, *columns]
        found = (part.table("tokens", wanted) for part in self._parts[name].values())
        tables = [table.set_index(TOKEN) for table in found if table is not None]
        joined: Any = pd.DataFrame(columns=wanted)
        for number, table in enumerate(tables):
            new = [column for column in table if number == 0 or column not in joined]
            joined = table if number == 0 else joined.join(table[new])
        joined = joined.reset_index(drop=True)
        return joined if columns is None else joined[[c for c in columns if c in joined]]

    def features_of(self, name: str) -> pd.DataFrame | None:
        """One row for each feature of an SAE: on how many tokens it fired; None if unknown.

        Args:
            name: Of the SAE.
        """
        for part in self._parts.get(name, {}).values():
            table = part.table("features")
            if table is not None:
                return table
        return None

    @property
    def sequences(self) -> pd.DataFrame:
        """Every token that the model has read, with its text."""
        if self._sequences is None:
            assert self._store is not None
            self._sequences = self._store.sequences
        return self._sequences

    def only(self, names: Sequence[str]) -> AFAResults:
        """Some of the SAEs, in this order: to be drawn or reported without the others.

        Args:
            names: Of SAEs in the summary.

        Raises:
            KeyError: If there is no such SAE.
        """
        summary, wanted = self.summary.loc[list(names)], set(names)
        if self._tokens is None:
            assert self._store is not None
            parts = {name: self._parts[name] for name in names}
            chosen = AFAResults._of_store(self._store, parts, summary, self.metadata)
            chosen._temporary = self._temporary
            return chosen
        rows = self._tokens["sae"].isin(wanted)
        return AFAResults(summary, self._tokens.loc[rows], self.sequences, self.metadata)

    # --- on disk ---

    def save(self, folder: str | Path) -> None:
        """Write the results, ``results.json`` last.

        Args:
            folder: Made if it does not exist. Where the results come from it, only what has
                changed in ``summary`` and ``metadata`` is written.

        Raises:
            ValueError: If the folder holds results of other settings.
        """
        folder = user_path(folder)
        if self._store is not None and folder.resolve() == self._store.folder.resolve():
            self._write_beside_others(self._store, self._parts)
            return
        store = Store(folder, self.metadata.get("settings", {}))
        store.begin(self.sequences, self._store.places_digest if self._store else None)
        fingerprints = self.metadata.get("fingerprints", {})
        parts: dict[str, dict[str, StoredResult]] = {}
        for name, row in self.summary.iterrows():
            name = str(name)
            copied = parts.setdefault(name, {})
            for group, part in self._parts.get(name, {}).items():
                target = store.folder / "results" / part.folder.name
                if not target.is_dir():
                    shutil.copytree(part.folder, target)
                found = store.at(target)
                copied[group] = found
            if not copied:
                result = GroupResult(dict(row), self.tokens_of(name))
                fingerprint = fingerprints.get(name, "")
                key = store.key(fingerprint, "afa")
                copied["afa"] = store.add(name, "afa", key, fingerprint, {}, result)
        self._write_beside_others(store, parts)

    def _write_beside_others(self, store: Store, parts: Parts) -> None:
        """Bring the index of a store up to date, and leave what it says of other SAEs."""
        with store.alone():
            before = _index_if_whole(store)
            of_others, summary, metadata = before or ({}, pd.DataFrame(), {})
            names = {str(name) for name in self.summary.index}
            others = [name for name in of_others if name not in names]
            own = self.metadata
            merged = {
                **own,
                "fingerprints": {
                    name: fingerprint
                    for of in (metadata, own)
                    for name, fingerprint in of.get("fingerprints", {}).items()
                    if name in {*names, *others}
                },
                "refused": {
                    name: reason
                    for of in (metadata, own)
                    for name, reason in of.get("refused", {}).items()
                    if name not in {*names, *others}
                },
            }
            write_index(
                store,
                pd.concat([self.summary, summary.loc[others]]) if others else self.summary,
                {**parts, **{name: of_others[name] for name in others}},
                merged,
            )

    @classmethod
    def load(cls, folder: str | Path) -> AFAResults:
        """Read the results of a finished evaluation. Tables of tokens are read when asked for.

        Args:
            folder: Where :meth:`save` or an evaluation has written.

        Raises:
            ValueError: If the folder holds no finished results, or they are damaged or of
                another version.
        """
        folder = user_path(folder)
        try:
            store = Store(folder)
        except ValueError as error:
            if str(folder) in str(error):
                raise
            raise ValueError(f"the folder {str(folder)!r} holds no results: {error}") from error
        index = read_index(store)
        if index is None:
            raise ValueError(
                f"the folder {str(folder)!r} holds no results: its evaluation was not finished, "
                "run it again to continue"
            )
        parts, summary, metadata = index
        return cls._of_store(store, parts, summary, metadata)

    def __str__(self) -> str:
        return self.summary.to_string()


def summary_of(parts: Parts) -> pd.DataFrame:
    """One row for each SAE: what it is, then what each group found.

    Args:
        parts: By SAE and group.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, groups in parts.items():
        row: dict[str, Any] = {}
        of_groups = [groups[group] for group in sorted(groups)]
        for part in of_groups:
            row.update(part.facts)
        for part in of_groups:
            row.update(part.summary)
        rows[name] = row
    return _table(rows)


def _table(rows: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    for name in rows:
        if printable(name) != name:  # none is made so
            raise ValueError(f"{name!r} is no name of an SAE")
    # before pandas looks at them: it takes no bytes that are no UTF-8
    words = {name: {key: _words(value) for key, value in row.items()} for name, row in rows.items()}
    # NaN for whatever is missing, as it comes back from a file
    table = pd.DataFrame.from_dict(words, orient="index")
    # a copy is one block: columns can be added without pandas finding it fragmented
    return table.astype(object).where(table.notna(), np.nan).infer_objects().copy()


def _words(value: Any) -> Any:
    # a tab stands between a release and an id
    return "\t".join(map(printable, value.split("\t"))) if isinstance(value, str) else value


def write_index(
    store: Store, summary: pd.DataFrame, parts: Parts, metadata: Mapping[str, Any]
) -> None:
    """Write ``summary.csv`` and, last, ``results.json``.

    Args:
        store: Where the parts lie.
        summary: One row for each SAE.
        parts: By SAE and group.
        metadata: As in :class:`AFAResults`.
    """
    write_whole(
        store.folder / SUMMARY_FILENAME,
        lambda path: summary.map(cell).rename(index=cell).to_csv(path, index_label="sae"),
    )
    rows = {
        str(name): {
            str(column): None if pd.isna(value) else getattr(value, "item", lambda v=value: v)()
            for column, value in row.items()
        }
        for name, row in summary.astype(object).iterrows()
    }
    content = {
        "schema_version": SCHEMA_VERSION,
        **metadata,
        "parts": {n: {g: p.folder.name for g, p in of.items()} for n, of in parts.items()},
        "saes": rows,
    }
    write_sealed(store.folder / RESULTS_FILENAME, content)


def read_index(
    store: Store,
) -> tuple[dict[str, dict[str, StoredResult]], pd.DataFrame, dict[str, Any]] | None:
    """What :func:`write_index` has written: parts, summary, metadata; None if there is none.

    Args:
        store: Where to read.

    Raises:
        ValueError: If it is damaged, or what it lists is not there.
    """
    path = store.folder / RESULTS_FILENAME
    if not path.exists():
        return None
    try:
        written = read_sealed(path)
        different = different_settings(written["settings"], store.settings)
        if different:
            raise ValueError(f"it is of other settings ({', '.join(different)} differ)")
        parts = {
            name: {group: store.at(store.folder / "results" / part) for group, part in of.items()}
            for name, of in written["parts"].items()
        }
        summary = _table(written["saes"])
        own = ("schema_version", "saes", "parts")
        metadata = {key: value for key, value in written.items() if key not in own}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the results in {str(store.folder)!r} cannot be read: {RESULTS_FILENAME}: {error}. "
            "Run the evaluation again: what is whole is kept"
        ) from error
    return parts, summary, metadata


def _index_if_whole(
    store: Store,
) -> tuple[dict[str, dict[str, StoredResult]], pd.DataFrame, dict[str, Any]] | None:
    """The same, and None for one that is damaged: it is about to be made anew."""
    try:
        return read_index(store)
    except ValueError:
        return None


def update_index(
    store: Store,
    own: Parts,
    order: Iterable[str],
    refused: Mapping[str, str],
    versions: Mapping[str, str],
    options: Mapping[str, Any],
) -> AFAResults:
    """Bring the index of a store up to date with what this process knows and others have left.

    Args:
        store: The store.
        own: The parts of this process's SAEs.
        order: Names that come first, in this order.
        refused: Why SAEs of this process were not evaluated.
        versions: What is at work here beside the packages that results remember.
        options: How this process was asked.

    Returns:
        The results of the whole store.
    """
    with store.alone():
        parts: dict[str, dict[str, StoredResult]] = {}
        for result in store.results():  # the newest of each is what counts
            parts.setdefault(result.sae, {})[result.group] = result
        reasons: dict[str, str] = {}
        before = _index_if_whole(store)
        if before is not None:
            for name, of in before[0].items():
                parts[name] = {**parts.get(name, {}), **of}
            reasons = before[2].get("refused", {})
        reasons = {n: why for n, why in reasons.items() if not n.startswith("results/")}
        reasons.update({**_missing(store), **store.why_unread()})
        parts.update({name: dict(of) for name, of in own.items()})
        names = [name for name in order if name in parts]
        names += sorted(set(parts) - set(names))
        parts = {name: parts[name] for name in names}
        found = {*parts, *(f"{n} ({group})" for n, of in parts.items() for group in of)}
        metadata = {
            "settings": store.settings,
            "versions": {**versions, **_versions_of(parts)},
            "options": dict(options),
            "refused": {n: w for n, w in {**reasons, **refused}.items() if n not in found},
            "fingerprints": {
                n: next(iter(of.values())).fingerprint for n, of in parts.items() if of
            },
        }
        summary = summary_of(parts)
        if before is not None:  # columns that somebody has added
            kept = before[1].loc[[name for name in before[1].index if name in parts]]
            for column in kept.columns.difference(summary.columns, sort=False):
                summary[column] = kept[column]
        write_index(store, summary, parts, metadata)
    return AFAResults._of_store(store, parts, summary, metadata)


def _versions_of(parts: Parts) -> dict[str, str]:
    """Of each package the versions that the parts were made with: one, or all of them."""
    found: dict[str, set[str]] = {}
    for part in (part for of in parts.values() for part in of.values()):
        for package, version in part.versions.items():
            found.setdefault(package, set()).add(version)
    return {package: ", ".join(sorted(of)) for package, of in found.items()}


def _missing(store: Store) -> dict[str, str]:
    """Results that the index lists and that are gone, by their places in the folder."""
    try:
        listed = read_sealed(store.folder / RESULTS_FILENAME)["parts"]
        places = [f"results/{part}" for of in listed.values() for part in of.values()]
    except (OSError, ValueError, LookupError, AttributeError):
        return {}  # nobody knows what it listed
    return {
        place: f"{place} is gone: evaluate that SAE again"
        for place in places
        if not (store.folder / place).exists()
    }
