"""A plain log of training steps: one JSON object per line, no wandb needed."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput

LOG_FILENAME = "training_log.jsonl"


class TrainingLog:
    """Writes the metrics of training steps and sums up the time they take.

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
                line
                for line in path.read_text(encoding="utf-8").splitlines()
                if (step := _step_of(line)) is not None and step <= first_step
            ]
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}

    def watch(self, trainer: SAETrainer[Any, Any], name: str = "") -> None:
        """Log the steps of this trainer from now on."""
        step = trainer.step

        def watched_step(batch: torch.Tensor) -> TrainStepOutput:
            started = time.perf_counter()
            output = step(batch)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.steps[name] = self.steps.get(name, 0) + 1
            # not n_training_steps: checkpoints have it one too low
            number = trainer.n_training_samples // trainer.cfg.train_batch_size_samples
            if self.path is not None and number % self.every == 0:
                self._write(trainer, output, name, number)
            return output

        trainer.step = watched_step

    def _write(
        self, trainer: SAETrainer[Any, Any], output: TrainStepOutput, name: str, number: int
    ) -> None:
        assert self.path is not None
        line: dict[str, Any] = {"step": number, "seconds": round(self.seconds[name], 3)}
        if name:
            line["sae"] = name
        line.update(trainer.build_train_step_log_dict(output, trainer.n_training_samples))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")


def _step_of(line: str) -> int | None:
    """The step of a line of the log; None for one that was cut off when its run was killed."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return None


def _finite(value: Any) -> Any:
    """NaN and infinity as None: JSON has no word for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
