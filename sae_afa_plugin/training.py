"""SAELens's training runners with a plain log: one JSON object per line, no wandb needed.

SAELens computes the metrics of a training step only when it logs to wandb. These subclasses
watch the trainer's public ``step`` and ask it for the same metrics; the training itself is
SAELens's, unchanged.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
)
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from typing_extensions import override

from sae_afa_plugin.models import stop_layer

LOG_FILENAME = "training_log.jsonl"

_RunnerConfig: TypeAlias = LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig


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


def _new_log(cfg: _RunnerConfig, trainer: SAETrainer[Any, Any] | MultiSAETrainer) -> TrainingLog:
    return TrainingLog(
        None if cfg.output_path is None else Path(cfg.output_path) / LOG_FILENAME,
        cfg.logger.wandb_log_frequency,
        trainer.n_training_samples // cfg.train_batch_size_tokens,
    )


def check_batches(model: Any, cfg: _RunnerConfig) -> None:
    """Make sure that a runner config can give batches from this model, before it is trained.

    Args:
        model: The language model; its ``cfg.n_ctx`` is looked at where it has one.
        cfg: The config of either runner.

    Raises:
        ValueError: If the sequences are too long for the model or the buffer holds no batch.
    """
    longest = getattr(getattr(model, "cfg", None), "n_ctx", None)
    if longest is not None and cfg.context_size > longest:
        raise ValueError(
            f"context_size is {cfg.context_size}, but {cfg.model_name} takes {longest} tokens at "
            f"most: set context_size={longest} or less"
        )
    used = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    if cfg.n_batches_in_buffer * used < cfg.train_batch_size_tokens:
        raise ValueError(
            f"the buffer of n_batches_in_buffer={cfg.n_batches_in_buffer} times {used} tokens is "
            f"smaller than a batch of train_batch_size_tokens={cfg.train_batch_size_tokens}: set "
            f"n_batches_in_buffer={-(-2 * cfg.train_batch_size_tokens // used)} or more"
        )


def hook_shapes(model: Any, hook_names: Sequence[str]) -> dict[str, torch.Size]:
    """Shapes of the activations at these hooks, by one pass over two tokens.

    Args:
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.
        hook_names: The hooks. Those that the model does not have are left out; with some models
            one of these leaves out all others too.
    """
    try:
        # Looked up by running the model: a TransformerBridge answers to aliases as well.
        cache = model.run_with_cache(
            torch.zeros(1, 2, dtype=torch.long, device=_device(model)),
            names_filter=list(hook_names),
            stop_at_layer=stop_layer(hook_names),
            prepend_bos=False,
        )[1]
    except (KeyError, IndexError, AttributeError):
        return {}
    shapes: dict[str, torch.Size] = {}
    for name in hook_names:
        with suppress(KeyError):
            shapes[name] = cache[name].shape
    return shapes


def check_hook(
    model: Any,
    hook_name: str,
    d_in: int,
    head_index: int | None = None,
    known: Mapping[str, torch.Size] | None = None,
) -> None:
    """Make sure that a hook exists and is as wide as the SAE, before anything is trained.

    Args:
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.
        hook_name: The hook to read.
        d_in: The SAE's input width.
        head_index: The head that is read, where the hook has heads.
        known: What :func:`hook_shapes` has found; what it lacks is looked for again.

    Raises:
        ValueError: If there is no such hook, or its activations have another width.
    """
    shape = (known or {}).get(hook_name) or hook_shapes(model, [hook_name]).get(hook_name)
    if shape is None:
        near = get_close_matches(hook_name, list(model.hook_dict), n=3)
        hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"the model has no hook {hook_name!r}{hint}")
    heads = shape[2] if len(shape) == 4 else 0
    if head_index is not None and not -heads <= head_index < heads:
        raise ValueError(
            f"hook_head_index={head_index} does not fit {hook_name!r}, which has "
            f"{heads or 'no'} heads"
        )
    width = shape[-1] if len(shape) == 3 or head_index is not None else shape[2:].numel()
    if width != d_in:
        raise ValueError(
            f"the activations at {hook_name!r} have width {width}, but the SAE has d_in={d_in}: "
            f"set d_in={width} or choose another hook"
        )


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


class LoggedTrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens's runner for one SAE, with ``training_log.jsonl`` in ``cfg.output_path``.

    Every ``cfg.logger.wandb_log_frequency`` steps give one line, whether wandb is used or not.
    """

    log: TrainingLog

    @override
    def run(self) -> Any:
        """Train; raises ValueError first if the hook and the SAE do not fit together."""
        check_batches(self.model, self.cfg)
        check_hook(self.model, self.cfg.hook_name, self.sae.cfg.d_in, self.cfg.hook_head_index)
        return super().run()

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        self.log = _new_log(self.cfg, trainer)
        self.log.watch(trainer)
        return super().run_trainer_with_interruption_handling(trainer)


class LoggedMultiTrainingRunner(MultiSAETrainingRunner):
    """SAELens's runner for many SAEs, with ``training_log.jsonl`` in ``cfg.output_path``."""

    log: TrainingLog

    @override
    def run(self) -> Any:
        """Train; raises ValueError first if a hook and its SAE do not fit together."""
        check_batches(self.model, self.cfg)
        heads = self.cfg.hook_head_indices_per_sae
        for hook_name, d_in, head_index in dict.fromkeys(  # each costs a pass of the model
            (hook_name, self.cfg.saes[name].d_in, heads[name])
            for name, hook_name in self.cfg.hook_names_per_sae.items()
        ):
            check_hook(self.model, hook_name, d_in, head_index)
        return super().run()

    @override
    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> Any:
        self.log = _new_log(self.cfg, trainer)
        for name, one in trainer.trainers.items():
            self.log.watch(one, name)
        return super()._run_with_interruption_handling(trainer)
