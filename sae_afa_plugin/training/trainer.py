"""SAELens's trainer, which leaves out tokens that are not finite and notices when it diverges.

A trainer of SAELens becomes one of these by its class: nothing is put on the instance that a copy
of it would share with it.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from typing_extensions import Self, override

from sae_afa_plugin._upstream import ActivationScaler
from sae_afa_plugin.files import writing
from sae_afa_plugin.saes.finite import check_weights, finite_rows, nothing_finite, say_left_out
from sae_afa_plugin.training.log import TrainingLog


class Diverged(ValueError):
    """What happened, and in which step (from 1)."""

    def __init__(self, step: int, what: str):
        super().__init__(step, what)
        self.step, self.what = step, what

    def __str__(self) -> str:
        return self.what


def finiteness(sae: TrainingSAE[Any], loss: Tensor) -> Tensor:
    """Whether a step's loss and the weights after it are finite: boolean ``[2]``, on their device.

    Gradients are clipped by the norm of all of them, which spreads what is not finite to every
    weight, so that the smallest tensor tells for all.

    Args:
        sae: The SAE, behind the step.
        loss: Of the step.
    """
    trained = [p.detach() for p in sae.parameters() if p.requires_grad]
    smallest = min(trained, key=Tensor.numel)
    return torch.stack([tensor.isfinite().all() for tensor in (loss.detach(), smallest)])


def why_diverged(trainer: SAETrainer[Any, Any], step: int, steps: int, loss: bool) -> Diverged:
    """The sentence about a training that has diverged.

    Args:
        trainer: The trainer.
        step: In which step, from 1.
        steps: How many there are.
        loss: Whether it was the loss that is not finite; otherwise the weights.
    """
    what = "its loss was" if loss else "its weights were"
    return Diverged(
        step,
        f"{what} no longer a number in step {step} of {steps}: lower lr (it is "
        f"{trainer.cfg.lr:g}) or raise lr_warm_up_steps, and train it under another name",
    )


def finite_part(batch: Tensor) -> Tensor:
    """The tokens of a batch that are finite ``[n, ...]``.

    Args:
        batch: ``[batch, ...]``.

    Raises:
        ValueError: If there is none.
    """
    keep = finite_rows(batch.flatten(1))
    if keep.all():
        return batch
    if not keep.any():
        raise nothing_finite()
    return batch[keep]


class FiniteScaler(ActivationScaler):
    """SAELens's statistics of activations, of the tokens that are finite."""

    @override
    def estimate_scaling_factor(
        self, d_in: int, data_provider: Any, n_batches_for_norm_estimate: int = 1000
    ) -> None:
        batches = map(finite_part, data_provider)
        super().estimate_scaling_factor(d_in, batches, n_batches_for_norm_estimate)

    @override
    def estimate_whitening(
        self,
        d_in: int,
        data_provider: Any,
        n_batches_for_norm_estimate: int = 1000,
        eps: float = 1e-3,
    ) -> None:
        batches = map(finite_part, data_provider)
        super().estimate_whitening(d_in, batches, n_batches_for_norm_estimate, eps)


class LoggedTrainer(SAETrainer[Any, Any]):
    """A trainer of SAELens's runners with a log.

    It leaves out tokens that are not finite and ends with :class:`Diverged` in the first step
    whose loss or weights are not. A copy of it trains the copied SAE, and writes to no file.
    """

    log: TrainingLog
    name: str
    left_out: int

    @classmethod
    def of(cls, trainer: SAETrainer[Any, Any], log: TrainingLog, name: str = "") -> Self:
        """Make a trainer one of these; it stays the same object, which SAELens goes on to use.

        Args:
            trainer: SAELens's own.
            log: Where its steps are written.
            name: Of the SAE, where there are several.
        """
        trainer.__class__ = cls
        assert isinstance(trainer, cls)
        trainer.log, trainer.name, trainer.left_out = log, name, 0
        scaler = trainer.activation_scaler
        trainer.activation_scaler = FiniteScaler(scaler.scaling_factor, scaler.whitening)
        log.watch(trainer.cfg.device, name)
        return trainer

    @property
    def what(self) -> str:
        """The SAE, for messages."""
        return f"the SAE {self.name!r}" if self.name else "this SAE"

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        samples = self.n_training_samples + len(batch)
        # not n_training_steps: checkpoints have it one too low
        number = samples // self.cfg.train_batch_size_samples
        batch = self._finite_part(batch)
        watch = self.log.watches[self.name]
        watch.start()
        output = super().step(batch)
        watch.stop()
        self.n_training_samples = samples  # schedules and checkpoints go by whole batches
        loss, weights = finiteness(self.sae, output.loss).tolist()
        if not (loss and weights):
            self._end(why_diverged(self, number, self.cfg.total_training_steps, not loss), output)
        elif self.log.is_due(number):
            self.log.write(self, output, number, watch.seconds, self.name, self.left_out)
        return output

    def _finite_part(self, batch: Tensor) -> Tensor:
        kept = finite_part(batch)
        n = len(batch) - len(kept)
        if n and not self.left_out:
            say_left_out(n, self.what)
        self.left_out += n
        return kept

    def _end(self, why: Diverged, output: TrainStepOutput) -> None:
        raise why

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        check_weights(self.what, self.sae.state_dict())
        # without a folder it is a temporary one, for wandb
        base = Path(base_path or self.cfg.checkpoint_path or tempfile.gettempdir())
        with writing(base / checkpoint_name):
            super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)


class OneOfSeveral(LoggedTrainer):
    """One of the trainers of SAELens's runner for many SAEs, which step together.

    When it diverges it is left behind, and the others go on: it takes no more steps and writes no
    checkpoints.
    """

    why: Diverged | None = None
    _last: TrainStepOutput

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        if self.why is None:
            return super().step(batch)
        self.n_training_samples += len(batch)
        return self._last

    @override
    def _end(self, why: Diverged, output: TrainStepOutput) -> None:
        self.why, self._last = why, output
        warnings.warn(f"{self.what} was left behind: {why}", stacklevel=3)

    @override
    def full_sparsity_window_log(self) -> dict[str, Any]:
        return super().full_sparsity_window_log() if self.why is None else {}

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.why is None:
            super().save_checkpoint(*args, **kwargs)
