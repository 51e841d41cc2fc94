"""SAELens's training runners with a plain log: one JSON object per line, no wandb needed.

SAELens computes the metrics of a training step only when it logs to wandb. Here the trainers are
asked for the same metrics, leave out tokens that are not finite, and end when they diverge; the
training itself is SAELens's, unchanged.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, TypeAlias

from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
    TrainingSAE,
)
from torch import Tensor
from typing_extensions import override

from sae_afa_plugin._upstream import MultiSAETrainer
from sae_afa_plugin.activations.hooks import check_hook
from sae_afa_plugin.files import user_given, writing
from sae_afa_plugin.saes.finite import check_weights
from sae_afa_plugin.training.checks import check_training
from sae_afa_plugin.training.log import LOG_FILENAME, TrainingLog
from sae_afa_plugin.training.trainer import LoggedTrainer, OneOfSeveral

_RunnerConfig: TypeAlias = LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig

_PATHS = (
    *("output_path", "checkpoint_path", "resume_from_checkpoint", "from_pretrained_path"),
    *("cached_activations_path", "model_name", "dataset_path"),
)


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
        ValueError: If the sequences are too long for the model, the buffer holds no batch, or
            :func:`check_training` refuses it.
    """
    several = isinstance(cfg, MultiSAETrainingRunnerConfig)
    check_training(cfg, *(cfg.saes.values() if several else [cfg.sae]))
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


def _at_home(cfg: _RunnerConfig) -> None:
    """Paths as their user means them: SAELens would make a folder called ``~``."""
    for name in _PATHS:
        if getattr(cfg, name, None) is not None:
            setattr(cfg, name, user_given(getattr(cfg, name)))


class LoggedTrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens's runner for one SAE, with ``training_log.jsonl`` in ``cfg.output_path``.

    Every ``cfg.logger.wandb_log_frequency`` steps give one line, whether wandb is used or not.
    ``run`` raises a ValueError in the first step whose loss or weights are not finite.
    """

    log: TrainingLog

    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any], *args: Any, **kwargs: Any):
        _at_home(cfg)
        super().__init__(cfg, *args, **kwargs)

    @override
    def run(self) -> Any:
        """Train; raises ValueError first if the hook and the SAE do not fit together."""
        check_batches(self.model, self.cfg)
        check_hook(self.model, self.cfg.hook_name, self.sae.cfg.d_in, self.cfg.hook_head_index)
        return super().run()

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        self.log = _new_log(self.cfg, trainer)
        LoggedTrainer.of(trainer, self.log)
        return super().run_trainer_with_interruption_handling(trainer)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        with writing(Path(checkpoint_path or tempfile.gettempdir())):
            super().save_checkpoint(checkpoint_path)

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: Tensor | None = None,
    ) -> None:
        check_weights("this SAE", sae.state_dict())
        with writing(Path(output_path)):
            super().save_final_sae(sae, output_path, log_feature_sparsity)


class LoggedMultiTrainingRunner(MultiSAETrainingRunner):
    """SAELens's runner for many SAEs, with ``training_log.jsonl`` in ``cfg.output_path``.

    An SAE that diverges is left behind with a warning, and neither returned nor saved; if all do,
    ``run`` raises a ValueError.
    """

    log: TrainingLog

    def __init__(self, cfg: MultiSAETrainingRunnerConfig, *args: Any, **kwargs: Any):
        _at_home(cfg)
        super().__init__(cfg, *args, **kwargs)

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
        trainers = {
            name: OneOfSeveral.of(one, self.log, name) for name, one in trainer.trainers.items()
        }
        saes = super()._run_with_interruption_handling(trainer)
        left = {name: sae for name, sae in saes.items() if trainers[name].why is None}
        for name, sae in left.items():
            check_weights(trainers[name].what, sae.state_dict())
        for one in trainers.values():
            if one.why is not None and not left:
                raise one.why
        return left

    @override
    def _save_final_outputs(self, *args: Any, **kwargs: Any) -> None:
        assert self.cfg.output_path is not None
        with writing(Path(self.cfg.output_path)):
            super()._save_final_outputs(*args, **kwargs)
