"""The folder of one SAE's training: what it is, how far it is, and the SAE once it is finished.

In the folder::

    training.json        settings, and whether it is finished or was left behind, and why
    training_log.jsonl   a line for every so many steps
    checkpoint-000320    while it is under way: a checkpoint of SAELens's trainer, and more
    cfg.json, sae_weights.safetensors, sparsity.safetensors   the finished SAE

Checkpoints are written aside and renamed, and ``training.json`` says "finished" last, so that a
kill at any moment leaves something to go on from. Other files in the folder are not touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sae_afa_plugin._upstream import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_afa_plugin.files import aside_of, clear_aside, write_json, writing
from sae_afa_plugin.training.log import LOG_FILENAME

RECORD_FILENAME = "training.json"
STATE_FILENAME = "coordinator_state.pt"
FINISHED, DIVERGED, FAILED, UNDER_WAY = "finished", "diverged", "failed", "under way"

_CHECKPOINT = "checkpoint-"
_ASIDE = ("checkpoint", "SAE", RECORD_FILENAME, LOG_FILENAME)  # what is written aside
_FINAL = (SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, SAE_CFG_FILENAME)
_WRITTEN = (
    *_FINAL,
    TRAINER_STATE_FILENAME,
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    STATE_FILENAME,
)


def is_finished(path: Path) -> bool:
    """Whether a folder says that its training is finished; whose it is, is not looked at.

    Args:
        path: The folder; it need not exist.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((path / RECORD_FILENAME).read_text(encoding="utf-8"))["state"] == FINISHED
    return False


class TrainingFolder:
    """One SAE's folder. It keeps to its settings.

    Args:
        path: Made when :meth:`begin` is called.
        settings: Everything that decides what the SAE becomes.

    Raises:
        ValueError: If the folder holds a training with other settings, or files that this one
            would overwrite.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        # as in the file: tuples become lists
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        self.record: dict[str, Any] = {"state": UNDER_WAY, "step": 0, "seconds": 0.0}
        if (path / RECORD_FILENAME).is_file():
            self._read()
            return
        others = [name for name in (*_FINAL, LOG_FILENAME) if (path / name).exists()]
        others += [folder.name for folder in self._checkpoints()]
        if others:
            raise ValueError(
                f"{str(path)!r} holds {' and '.join(others)}, but no {RECORD_FILENAME}, so it was "
                "not made by this training: use another folder or another name"
            )

    def _read(self) -> None:
        place = self.path / RECORD_FILENAME
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
            before = found.pop("settings")
            self.record = {**{key: found[key] for key in self.record}, **found}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(place)!r} is damaged ({type(error).__name__}: {error}): delete its folder, "
                "or use another name"
            ) from error
        was, now = dict(_flat(before)), dict(_flat(self.settings))
        different = [
            f"{key} was {was.get(key)!r} and is {now.get(key)!r}"
            for key in {**was, **now}
            if was.get(key) != now.get(key)
        ]
        if different:
            raise ValueError(
                f"{str(self.path)!r} holds a training with other settings "
                f"({'; '.join(different)}): use another name or folder, or delete this one"
            )
        missing = [name for name in _FINAL if not (self.path / name).is_file()]
        if self.state == FINISHED and missing:
            raise ValueError(
                f"{str(self.path)!r} says that its training is finished, but has no "
                f"{' and no '.join(missing)}: delete the folder to train it again"
            )

    @property
    def state(self) -> str:
        """Finished, diverged, failed or under way."""
        return self.record["state"]

    def begin(self) -> None:
        """Make the folder, and clear what a kill has left half written."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.say(UNDER_WAY, self.record["step"], self.record["seconds"])
        self.tidy()

    def tidy(self) -> None:
        """Remove what a kill has left, and all checkpoints but the last; those too if finished."""
        for name in _ASIDE:
            clear_aside(self.path / name)
        for old in self._checkpoints()[: None if self.state == FINISHED else -1]:
            _remove(old)

    def say(self, state: str, step: int, seconds: float, reason: str | None = None) -> None:
        """Write how it stands.

        Args:
            state: One of the four.
            step: Steps behind it.
            seconds: Spent in them.
            reason: Why it was left behind, in a sentence.
        """
        self.record = {"state": state, "step": step, "seconds": round(seconds, 3)}
        if reason is not None:
            self.record["reason"] = reason
        write_json(self.path / RECORD_FILENAME, {**self.record, "settings": self.settings})

    def _checkpoints(self) -> list[Path]:
        found = [
            folder
            for folder in self.path.glob(f"{_CHECKPOINT}*")
            if folder.name.removeprefix(_CHECKPOINT).isdigit()
        ]
        return sorted(found, key=lambda folder: int(folder.name.removeprefix(_CHECKPOINT)))

    def latest(self) -> Path | None:
        """The checkpoint to go on from."""
        return next(iter(self._checkpoints()[::-1]), None)

    def checkpoint(self, step: int, write: Callable[[Path], Any]) -> None:
        """Write a checkpoint, then remove the one before.

        Args:
            step: Steps behind it.
            write: Writes into the folder that it is given.
        """
        place = self.path / f"{_CHECKPOINT}{step:06d}"
        if not place.exists():
            with self._aside("checkpoint", write) as aside:
                aside.rename(place)
            self.tidy()

    def finish(self, step: int, seconds: float, write: Callable[[Path], Any]) -> None:
        """Put the finished SAE into the folder, and remove the checkpoint.

        Args:
            step: Steps behind it.
            seconds: Spent in them.
            write: Writes the SAE into the folder that it is given.
        """
        with self._aside("SAE", write) as aside:
            for name in _FINAL:
                (aside / name).replace(self.path / name)
        self.say(FINISHED, step, seconds)
        self.tidy()

    @contextmanager
    def _aside(self, what: str, write: Callable[[Path], Any]) -> Generator[Path]:
        with aside_of(self.path / what) as aside:
            aside.mkdir()
            write(aside)
            for file in aside.iterdir():
                with file.open("rb+") as content:
                    os.fsync(content.fileno())
            yield aside


def _flat(settings: Any, prefix: str = "") -> Generator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _remove(folder: Path) -> None:
    """Remove what was written here, and the folder if nothing else is in it."""
    for name in _WRITTEN:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or not empty
        folder.rmdir()
