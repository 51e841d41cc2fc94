"""What SAELens's configs of a training do not check themselves, before hours are spent on them."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields
from typing import Any, TypeAlias

import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MultiSAETrainingRunnerConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig

from sae_afa_plugin import limits

_Config: TypeAlias = (
    SAETrainerConfig | LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig
)
_POSITIVE = (
    *("total_training_samples", "train_batch_size_samples"),
    *("training_tokens", "train_batch_size_tokens", "context_size", "n_batches_in_buffer"),
    *("store_batch_size_prompts", "feature_sampling_window", "n_restart_cycles"),
    "n_batches_for_norm_estimate",
)
_NOT_NEGATIVE = ("lr_warm_up_steps", "lr_decay_steps", "dead_feature_window", "n_checkpoints")
_SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")


def check_training(cfg: _Config, *saes: TrainingSAEConfig) -> None:
    """Refuse what SAELens's trainer cannot train with.

    Args:
        cfg: Of a trainer or of a runner.
        *saes: Of the SAEs that it trains.

    Raises:
        ValueError: If a number is of the wrong kind, NaN, infinite or out of range, or an SAE is in
            float16.
    """
    known = {field.name for field in fields(cfg)}
    limits.whole(cfg, *(name for name in _POSITIVE if name in known), at_least=1)
    limits.whole(cfg, *(name for name in _NOT_NEGATIVE if name in known))
    limits.real(cfg, "lr", more_than=0)
    limits.real(cfg, "lr_end", none=True)
    limits.real(cfg, "adam_beta1", "adam_beta2", below=1)
    limits.truth(cfg, "autocast")
    limits.text(cfg, "lr_scheduler_name")
    if cfg.lr_scheduler_name.lower() not in _SCHEDULERS:
        limits.choice(cfg, "lr_scheduler_name", _SCHEDULERS)
    steps = cfg.total_training_steps - cfg.lr_warm_up_steps - cfg.lr_decay_steps
    if cfg.lr_scheduler_name.lower() != "constant" and steps < cfg.n_restart_cycles:
        raise ValueError(
            f"{cfg.total_training_steps} steps leave {steps} between lr_warm_up_steps="
            f"{cfg.lr_warm_up_steps} and lr_decay_steps={cfg.lr_decay_steps}, which "
            f"lr_scheduler_name={cfg.lr_scheduler_name!r} cannot fill: train longer, or set fewer"
        )
    limits.kind(cfg, "logger", LoggingConfig)
    limits.whole(cfg.logger, "wandb_log_frequency", at_least=1)
    for sae in saes:
        check_sae(sae)


def check_sae(sae: TrainingSAEConfig) -> None:
    """Refuse the config of an SAE that cannot be trained.

    Args:
        sae: The config.

    Raises:
        ValueError: If a number is of the wrong kind, NaN or infinite, it is in float16, or its
            class refuses it.
    """
    limits.whole(sae, "d_in", "d_sae", at_least=1)
    limits.dtype_and_device(sae)
    if str(sae.dtype).removeprefix("torch.") in ("float16", "fp16", "half"):
        raise ValueError(
            "an SAE cannot be trained in float16, because Adam's update becomes NaN in it in the "
            "first step: set dtype='float32', and autocast=True for speed"
        )
    for field in fields(sae):
        value = getattr(sae, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} must be a finite number: got {value!r}")
    # some is known to the class alone, widths of Matryoshka SAEs say; "meta" takes no memory
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            TrainingSAE.from_dict({**sae.to_dict(), "device": "meta"})
        except ValueError:
            raise
        except Exception:  # a class that looks at its weights cannot be built so
            return
