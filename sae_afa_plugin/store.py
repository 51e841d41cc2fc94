"""A folder of results that any number of processes can add to.

In the folder::

    sae-afa.json             what the folder is, and the settings that it keeps to
    sequences.parquet        every token that was read, with its text, for context
    results/NAME.GROUP.KEY/  one result: an SAE, the activations, a group of metrics
        result.json          what it is of, its summary, digests of its tables
        tokens.parquet       one row for each token, where the group has some
        features.parquet     one row for each feature, where the group has some
    .claims/                 locks: who is at which SAE

A result is written aside and renamed in, and is never changed or deleted afterwards, so a process
that dies loses what it was doing and nothing else. Everything else in the folder is the user's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from filelock import AcquireReturnProxy, BaseFileLock, FileLock, Timeout

from sae_afa_plugin.activations.base import different_settings
from sae_afa_plugin.files import (
    add_file,
    aside_of,
    clear_aside,
    clear_asides,
    read_object,
    read_sealed,
    user_path,
    write_sealed,
    write_whole,
    writing,
)
from sae_afa_plugin.groups.base import GroupResult

SCHEMA_VERSION = 4
MARKER_FILENAME = "sae-afa.json"
SEQUENCES_FILENAME = "sequences.parquet"
_RESULTS, _CLAIMS = "results", ".claims"
_OF_FOLDER = "folder"  # the lock of whoever makes it
_RESULT_FILENAME = "result.json"
_FORMAT = "sae-afa results"
_TABLES = ("tokens", "features")
_PACKAGES = ("sae-afa-plugin", "sae-lens", "transformer-lens", "transformers", "torch")
_KINDS = {  # of what is in a result's file
    **dict.fromkeys(("sae", "group", "key", "fingerprint"), str),
    **dict.fromkeys(("facts", "summary", "digests", "settings", "versions"), dict),
    "finished": float,
}
_ROWS_AT_ONCE = 1 << 16  # of a table that is written
TOKEN = "token_number"  # in the source; tables of several groups are joined by it
_SETTLED = 2_000_000_000  # nanoseconds; clocks of file systems are coarse
_OF_VERSION_0_1 = ("tokens.parquet", "unfinished/settings.json")


@dataclass(frozen=True)
class StoredResult:
    """One result as it lies in a store.

    Args:
        sae: The SAE's name.
        group: The group's name.
        key: What :meth:`Store.key` said.
        fingerprint: Of the SAE.
        facts: What the SAE is: source, architecture, widths, hooks.
        summary: The group's numbers.
        folder: Where it lies.
        finished: When, in seconds since 1970.
        digests: Of its tables, by name.
        settings: Of the activations that it was made from.
        versions: Of the packages that made it.
    """

    sae: str
    group: str
    key: str
    fingerprint: str
    facts: dict[str, Any]
    summary: dict[str, Any]
    folder: Path
    finished: float
    digests: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]

    def table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        """One of its tables, ``tokens`` or ``features``; None if the group has none.

        Args:
            name: Which.
            columns: Only those of these that there are.

        Raises:
            ValueError: If the file is damaged or gone.
        """
        if name not in self.digests:
            return None
        path = self.folder / f"{name}.parquet"
        try:
            if digest_of(path) != self.digests[name]:
                raise ValueError("it is not the file that was written")
            known = None if columns is None else set(pq.read_schema(path).names)
            some = None if known is None else [c for c in columns or () if c in known]
            return pd.read_parquet(path, columns=some)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the results in {str(self.folder.parents[1])!r} cannot be read: "
                f"{path.relative_to(self.folder.parents[1])}: {error}. Delete that folder and "
                "evaluate again"
            ) from error


class Store:
    """A folder of results.

    Args:
        folder: Where. Nothing is made before there is something to keep.
        settings: Everything that decides what the numbers mean; the folder keeps to them. None:
            those that the folder has.

    Raises:
        ValueError: If the folder holds results of other settings, or files of somebody else by
            the names that are needed here.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None):
        self.folder = user_path(folder)
        self._sequences_digest, self.places_digest = "", None
        self._begun = False  # by this process
        self._found = self.folder.is_dir()
        marker = self.folder / MARKER_FILENAME
        if marker.exists():
            self.settings = self._read_marker(marker)
            if settings is not None:
                self._check(json.loads(json.dumps(settings)))
            return
        if any((self.folder / name).is_file() for name in _OF_VERSION_0_1):
            raise ValueError(
                f"{str(self.folder)!r} holds results of version 0.1, which this version does not "
                "read: evaluate again, into another folder"
            )
        if settings is None:
            raise ValueError(f"it has no {MARKER_FILENAME}")
        for name in ("results.json", "summary.csv", _RESULTS, *self._not_of_a_beginning()):
            if (self.folder / name).exists():
                raise ValueError(
                    f"{str(self.folder / name)!r} was not written by sae-afa and would be in the "
                    "way: use another folder"
                )
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file

    def _not_of_a_beginning(self) -> list[str]:
        """What a process that is about to make the folder, or was when it was killed, has not made.

        It makes a folder for locks, takes one, and writes the tokens.
        """
        claims = self.folder / _CLAIMS
        locks = [lock.name for lock in claims.glob("*")]
        taken = f"{_OF_FOLDER}.lock" in locks
        own = claims.is_dir() and all(lock.endswith(".lock") for lock in locks)
        if own and taken:
            return []
        return [SEQUENCES_FILENAME] if own and not locks else [SEQUENCES_FILENAME, _CLAIMS]

    def _read_marker(self, marker: Path) -> dict[str, Any]:
        try:
            version = read_object(marker)["schema_version"]  # others may write other files
            if version == SCHEMA_VERSION:
                found = read_sealed(marker)
                settings, self._sequences_digest = found["settings"], found["sequences"]
                self.places_digest = found["places"]
                if not isinstance(settings, dict):
                    raise ValueError("it has no settings")
                return settings
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{str(marker)!r} is damaged ({error}): delete the folder, or use another one"
            ) from error
        raise ValueError(
            f"the results in {str(self.folder)!r} cannot be read: their schema_version is "
            f"{version}, this version of sae-afa-plugin reads {SCHEMA_VERSION}"
        )

    def _check(self, settings: dict[str, Any]) -> None:
        found = self.settings
        different = [
            f"{key} was {found.get(key)!r} and is {settings.get(key)!r}"
            for key in different_settings(found, settings)
        ]
        if different:
            raise ValueError(
                f"{str(self.folder)!r} holds results of other settings ({'; '.join(different)}): "
                "use another folder, or delete this one"
            )

    # --- the tokens ---

    @property
    def sequences(self) -> pd.DataFrame:
        """Every token that was read, with its text.

        Raises:
            ValueError: If the file is damaged or gone.
        """
        try:
            if digest_of(self.folder / SEQUENCES_FILENAME) != self._sequences_digest:
                raise ValueError("it is not the file that was written")
            return pd.read_parquet(self.folder / SEQUENCES_FILENAME)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the results in {str(self.folder)!r} cannot be read: {SEQUENCES_FILENAME}: "
                f"{error}. Delete the folder and evaluate again"
            ) from error

    def begin(self, sequences: pd.DataFrame, places: str | None = None) -> None:
        """Make the folder, or make sure that its results are of the same tokens.

        Args:
            sequences: Every token that is read.
            places: A digest of where those stand that are evaluated; None: not known.

        Raises:
            ValueError: If the folder has others, or sequences are not all of one length.
        """
        _check_sequences(sequences)
        with self._lock(_OF_FOLDER):
            if not (self.folder / MARKER_FILENAME).is_file():
                write_whole(self.folder / SEQUENCES_FILENAME, sequences.to_parquet)
                self._sequences_digest = digest_of(self.folder / SEQUENCES_FILENAME)
                content = {
                    "format": _FORMAT,
                    "schema_version": SCHEMA_VERSION,
                    "settings": self.settings,
                    "sequences": self._sequences_digest,
                    "places": places,
                }
                write_sealed(self.folder / MARKER_FILENAME, content)
                self.places_digest, self._begun = places, True
                return
            for name in (SEQUENCES_FILENAME, MARKER_FILENAME):
                clear_aside(self.folder / name)
        self._check(self._read_marker(self.folder / MARKER_FILENAME))
        of_others = None not in (places, self.places_digest) and places != self.places_digest
        if of_others or not self.sequences["token_id"].equals(sequences["token_id"]):
            raise ValueError(
                f"the dataset gives other tokens than those that {str(self.folder)!r} was "
                "made with: use another folder, or delete this one"
            )

    def leave(self) -> None:
        """Leave nothing behind where nothing was finished, by anybody."""
        results, claims = self.folder / _RESULTS, self.folder / _CLAIMS
        with suppress(OSError):  # another process may be at it
            if results.is_dir() and any(results.glob("*/" + _RESULT_FILENAME)):
                return
            if any(_held(lock) for lock in claims.glob("*.lock")):
                return
            for lock in claims.glob("*.lock"):
                lock.unlink(missing_ok=True)
            clear_asides(results)  # of results that could not be written
            for folder in (claims, results):
                with suppress(OSError):  # somebody's own files may be in it
                    folder.rmdir()
            if self._begun:
                for name in (MARKER_FILENAME, SEQUENCES_FILENAME):
                    (self.folder / name).unlink(missing_ok=True)
            if not self._found:
                self.folder.rmdir()

    # --- results ---

    def key(self, fingerprint: str, group: str) -> str:
        """What names a result: of which SAE, of which activations, of which group.

        Args:
            fingerprint: Of the SAE.
            group: The group's ``identity``.
        """
        parts = json.dumps([fingerprint, self.settings, group], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def _beginning(self, sae: str) -> str:
        """How the folders of an SAE's results begin: letters that any system takes, no pattern."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", sae).strip("._")[:60] or "sae"
        name = hashlib.sha256(sae.encode()).hexdigest()[:12]
        return f"{slug}-{name}."

    def _place(self, sae: str, group: str, key: str) -> Path:
        return self.folder / _RESULTS / f"{self._beginning(sae)}{group}.{key}"

    def find(self, sae: str, group: str, key: str) -> StoredResult | None:
        """A result, if it is there.

        Args:
            sae: The SAE's name.
            group: The group's name.
            key: What :meth:`key` says.

        Raises:
            ValueError: If it is there, but not as it was written.
        """
        place = self._place(sae, group, key)
        if not place.is_dir():
            return None
        result = self.at(place)
        for name, digest in result.digests.items():
            if digest_of(place / f"{name}.parquet") != digest:
                raise ValueError(f"{place.name} is damaged ({name}.parquet has changed)")
        return result

    def add(
        self,
        sae: str,
        group: str,
        key: str,
        fingerprint: str,
        facts: Mapping[str, Any],
        result: GroupResult,
        places: pd.DataFrame | None = None,
    ) -> StoredResult:
        """Keep a result for good.

        Args:
            sae: The SAE's name.
            group: The group's name.
            key: What :meth:`key` says.
            fingerprint: Of the SAE.
            facts: What the SAE is.
            result: What the group found.
            places: Where each token of the source stands.

        Raises:
            OSError: If it cannot be written.
        """
        place = self._place(sae, group, key)
        # of another run, whose result had another key
        clear_asides(place.parent, f"{self._beginning(sae)}{group}.")
        with aside_of(place) as aside:  # only who has the claim writes here
            aside.mkdir(parents=True)
            digests: dict[str, str] = {}
            for name, table in zip(_TABLES, (result.tokens, result.features), strict=True):
                if table is None:
                    continue
                if name == "tokens":
                    table = _placed(table, places)
                path = aside / f"{name}.parquet"
                _write_table(table, path)
                _flush(path)
                digests[name] = digest_of(path)
            content = {
                "sae": sae,
                "group": group,
                "key": key,
                "fingerprint": fingerprint,
                "facts": _plain(facts),
                "summary": _plain(result.summary),
                "finished": time.time(),
                "digests": digests,
                "settings": self.settings,
                "versions": versions(),
            }
            write_sealed(aside / _RESULT_FILENAME, content)
            if place.is_dir():
                with suppress(ValueError):
                    there = self.find(sae, group, key)
                    assert there is not None
                    return there  # a process that sees no locks was faster
                shutil.rmtree(place)  # a damaged one
            aside.rename(place)
        return self.at(place)

    def at(self, place: Path) -> StoredResult:
        """The result in a folder of this store.

        Args:
            place: The folder.

        Raises:
            ValueError: If it is damaged or gone, or was made for another folder.
        """
        result = _read_result(place)
        own = self._place(result.sae, result.group, result.key)
        if place != own:
            raise ValueError(f"{place.name} is damaged (it holds what was written as {own.name!r})")
        different = different_settings(result.settings, self.settings)
        if different:
            raise ValueError(f"{place.name} is of other settings ({', '.join(different)} differ)")
        return result

    def results(self, sae: str | None = None) -> list[StoredResult]:
        """Every result that can be read, the newest last.

        Args:
            sae: Only those of this SAE, without a look at the others.
        """
        found: list[StoredResult] = []
        beginning = "[!.]" if sae is None else self._beginning(sae)
        for place in sorted((self.folder / _RESULTS).glob(f"{beginning}*")):
            with suppress(ValueError):  # why_unread says of a damaged one
                found.append(self.at(place))
        return sorted(found, key=lambda result: result.finished)

    def why_unread(self) -> dict[str, str]:
        """Why results that are there cannot be read, by their places in the folder."""
        reasons: dict[str, str] = {}
        for place in sorted((self.folder / _RESULTS).glob("[!.]*")):
            try:
                self.at(place)
            except ValueError as error:
                reasons[f"{_RESULTS}/{place.name}"] = f"{error}: delete that folder"
        return reasons

    # --- several processes ---

    @contextmanager
    def claim(self, name: str, wait: bool = False) -> Generator[bool]:
        """Say that this process is at something; True if no other one is.

        A claim ends with the block or with the process, however that ends.

        Args:
            name: Of an SAE.
            wait: Wait until no other process is at it.
        """
        try:
            lock = self._lock(hashlib.sha256(name.encode()).hexdigest()[:16], -1 if wait else 0)
        except Timeout:
            yield False
            return
        with lock:
            yield True

    def _lock(self, name: str, timeout: float = -1) -> AcquireReturnProxy[BaseFileLock]:
        claims = self.folder / _CLAIMS
        with writing(claims):
            claims.mkdir(parents=True, exist_ok=True)
            return FileLock(claims / f"{name}.lock").acquire(timeout=timeout)

    @contextmanager
    def alone(self) -> Generator[None]:
        """Wait until no other process writes the index."""
        with self._lock("index"):
            yield


def _check_sequences(sequences: pd.DataFrame) -> None:
    """Tokens are looked up by their sequence and position, in tables and pages."""
    if sequences.empty:
        return
    size = int(sequences["position"].max()) + 1
    number = np.arange(len(sequences))
    if len(sequences) % size or not (
        np.array_equal(sequences["sequence"], number // size)
        and np.array_equal(sequences["position"], number % size)
    ):
        raise ValueError(
            "sequences must all have the same number of tokens and be numbered 0, 1, 2, ... in "
            "order, positions as well: pad them, and leave the padding out of places"
        )


def _write_table(table: pd.DataFrame, path: Path) -> None:
    """Floats byte by byte, which compresses them best: 52 bytes for a token's row instead of 90."""
    floats = [str(c) for c in table if table[c].dtype.kind == "f"]
    table.to_parquet(
        path,
        index=False,
        compression="zstd",
        use_dictionary=[str(c) for c in table if str(c) not in floats],
        use_byte_stream_split=floats,
        row_group_size=_ROWS_AT_ONCE,
    )


def _placed(table: pd.DataFrame, places: pd.DataFrame | None) -> pd.DataFrame:
    """Rows with their number in the source and their place in the text."""
    columns = {TOKEN: table.index.to_numpy(dtype="int32")}
    for part in (() if places is None else (places.loc[table.index],)) + (table,):
        columns.update({str(name): part[name].to_numpy() for name in part})
    return pd.DataFrame(columns, table.index, copy=False)


def _held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _read_result(place: Path) -> StoredResult:
    try:
        found = read_sealed(place / _RESULT_FILENAME)
        kinds = {name: type(found.get(name)) for name in _KINDS}
        if set(found) != set(_KINDS) or kinds != _KINDS or not set(found["digests"]) <= {*_TABLES}:
            raise ValueError("it is no result of this version")
        for name in found["digests"]:
            if not (place / f"{name}.parquet").is_file():
                raise ValueError(f"{name}.parquet is missing")
    except (OSError, ValueError) as error:
        raise ValueError(f"{place.name} is damaged ({_RESULT_FILENAME}: {error})") from error
    return StoredResult(folder=place, **found)


def versions() -> dict[str, str]:
    """Of the packages that decide numbers, the versions that are at work."""
    return {package: version(package) for package in _PACKAGES}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON holds them; NaN as None."""
    plain = {name: getattr(value, "item", lambda v=value: v)() for name, value in values.items()}
    return {name: None if value != value else value for name, value in plain.items()}


def digest_of(path: Path) -> str:
    """A digest of a file; of one that has not changed it is known from before."""
    about = path.stat()
    if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) < _SETTLED:
        return _digest.__wrapped__(path)  # another edit may get the same time
    return _digest(path, about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, *about: int) -> str:
    del about
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()[:16]


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
