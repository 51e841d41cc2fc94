"""A plain log of training steps: one JSON object per line, no wandb needed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput

from sae_afa_plugin.files import user_path, write_whole, writing
from sae_afa_plugin.saes.finite import LEFT_OUT_METRIC

LOG_FILENAME = "training_log.jsonl"
_LEFT_OUT = f"metrics/{LEFT_OUT_METRIC}"


class Stopwatch:
    """Seconds of work on one device: it waits for what was begun there, and for nothing else.

    Without that a GPU goes on with one SAE's step while the clock of the next one runs.

    Args:
        device: Where the work is done.
        seconds: What was measured before.

    Example:
        >>> watch = Stopwatch("cpu", 2.0)
        >>> watch.start()
        >>> 2.0 < watch.stop() < 3.0
        True
    """

    def __init__(self, device: torch.device | str, seconds: float = 0.0):
        self.device, self.seconds = torch.device(device), seconds
        self._started = 0.0

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def start(self) -> None:
        """Begin, or go on."""
        self._wait()
        self._started = time.perf_counter()

    def stop(self) -> float:
        """Stop; returns all seconds so far."""
        self._wait()
        self.seconds += time.perf_counter() - self._started
        return self.seconds


class TrainingLog:
    """Writes the metrics of training steps, and for SAELens's runners the time they take.

    Each line has ``step``, ``seconds`` (spent in steps so far), ``sae`` where several are
    trained, and the keys that SAELens logs to wandb (``losses/...``, ``metrics/...``).

    Args:
        path: The file to write, made with its folder at the first line. None: only time.
        every: Write each step whose number is divisible by this.
        first_step: How many steps a resumed run has behind it. Lines up to there are kept, what
            else an earlier run has left in the file is removed.
    """

    def __init__(self, path: Path | None, every: int = 10, first_step: int = 0):
        self.path = path
        self.every = every
        if path is not None and path.exists():
            kept = [
                f"{line}\n"
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
                if (step := _step_of(line)) is not None and step <= first_step
            ]
            write_whole(path, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))
        self.watches: dict[str, Stopwatch] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingLog:
        # a copied trainer's steps are not this training's
        log = TrainingLog(None, self.every)
        log.watches = deepcopy(self.watches, memo)
        return log

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each trainer that is watched."""
        return {name: watch.seconds for name, watch in self.watches.items()}

    def watch(self, device: torch.device | str, name: str = "") -> None:
        """Measure the steps of a trainer from now on.

        Args:
            device: Where they are done.
            name: Of the SAE, where there are several.
        """
        self.watches[name] = Stopwatch(device)

    def is_due(self, number: int) -> bool:
        """Whether the step of this number (from 1) is to be written."""
        return self.path is not None and number % self.every == 0

    def write(
        self,
        trainer: SAETrainer[Any, Any],
        output: TrainStepOutput,
        number: int,
        seconds: float,
        name: str = "",
        left_out: int = 0,
    ) -> None:
        """Write the line of one step.

        Args:
            trainer: The trainer, behind the step.
            output: What the step gave.
            number: Of the step, from 1.
            seconds: Spent in steps so far.
            name: Of the SAE, where there are several.
            left_out: Tokens so far that were not finite and that the SAE has not seen.
        """
        assert self.path is not None
        line: dict[str, Any] = {"step": number, "seconds": round(seconds, 3)}
        if name:
            line["sae"] = name
        line.update(trainer.build_train_step_log_dict(output, trainer.n_training_samples))
        line[_LEFT_OUT] = line.get(_LEFT_OUT, 0) + left_out
        text = json.dumps({key: _finite(value) for key, value in line.items()})
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def keep(self) -> None:
        """Wait until what was written is on the disk."""
        if self.path is not None and self.path.exists():
            with writing(self.path), self.path.open("rb+") as file:
                os.fsync(file.fileno())


def read_logs(folders: Iterable[Path]) -> pd.DataFrame:
    """The logs of several trainings in one table, one row for each line.

    Args:
        folders: Each holds ``training_log.jsonl``; those that do not are passed over.
    """
    files = [user_path(folder) / LOG_FILENAME for folder in folders]
    return pd.DataFrame(
        [
            json.loads(line)
            for file in files
            if file.is_file()
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
            if _step_of(line) is not None
        ]
    )


def _step_of(line: str) -> int | None:
    """The step of a line of the log; None for one that was cut off when its run was killed."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None  # or is none of ours
    return step if type(step) is int else None


def _finite(value: Any) -> Any:
    """NaN and infinity as None: JSON has no word for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
