"""The paper's protocol as SAELens configs."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

from sae_afa_plugin import limits
from sae_afa_plugin.saes.topafa import TopAFATrainingSAEConfig
from sae_afa_plugin.training.checks import check_training

_BATCH = 4096
_STEPS = 20_001


def paper_runner_config(
    layer: int = 8, afa_coefficient: float = 1 / 32, **overrides: Any
) -> LanguageModelSAERunnerConfig[TopAFATrainingSAEConfig]:
    """The training runs of arXiv 2503.24277 on GPT-2 small, for SAELens's own runner.

    81,924,096 tokens of OpenWebText at ``blocks.{layer}.hook_resid_pre``, dictionary size
    12,288, Adam at 3e-4 with betas (0.9, 0.99), batch 4,096, inputs standardised per token, a
    feature dead after 5 silent steps. The paper reports layers 6, 7 and 8.

    Args:
        layer: The block whose input is read.
        afa_coefficient: Weight of the AFA loss; the paper reports 1/128, 1/64, 1/32, 1/24, 1/16.
        **overrides: Fields of ``LanguageModelSAERunnerConfig`` or of
            :class:`TopAFATrainingSAEConfig` (``d_sae=...``) that shall differ from the paper.
            ``device`` and ``dtype`` go to both.

    Returns:
        A config for ``LanguageModelSAETrainingRunner``. It does not log to wandb.

    Raises:
        TypeError: If an override is a field of neither config.
        ValueError: If a number is of the wrong kind, NaN, infinite or out of range, or the SAE
            would be in float16.

    Example:
        >>> cfg = paper_runner_config(layer=6, d_sae=1536, training_tokens=100_000, verbose=False)
        >>> cfg.hook_name, cfg.sae.d_sae, cfg.adam_beta2, cfg.sae.normalize_activations
        ('blocks.6.hook_resid_pre', 1536, 0.99, 'layer_norm')
    """
    runner_fields = {field.name for field in fields(LanguageModelSAERunnerConfig)}
    sae_fields = {field.name for field in fields(TopAFATrainingSAEConfig)}
    unknown = sorted(set(overrides) - (runner_fields - {"sae"}) - sae_fields)
    if unknown:
        raise TypeError(
            f"unknown override {', '.join(unknown)}: overrides are fields of "
            "LanguageModelSAERunnerConfig or TopAFATrainingSAEConfig"
        )
    sae: dict[str, Any] = {
        "d_in": 768,
        "d_sae": 12_288,
        "afa_coefficient": afa_coefficient,
        **{name: value for name, value in overrides.items() if name in sae_fields},
    }
    limits.whole(SimpleNamespace(layer=layer), "layer")
    runner: dict[str, Any] = {
        "sae": TopAFATrainingSAEConfig(**sae),
        "model_name": "gpt2",
        "hook_name": f"blocks.{layer}.hook_resid_pre",
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "train_batch_size_tokens": _BATCH,
        "n_batches_in_buffer": 256,  # times context_size: 32,768 tokens are mixed
        "training_tokens": _STEPS * _BATCH,
        "lr": 3e-4,
        "lr_scheduler_name": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "dead_feature_window": 5,
        "logger": LoggingConfig(log_to_wandb=False),
        **{name: value for name, value in overrides.items() if name in runner_fields},
    }
    # SAELens's config computes with some of these before anything can look at it
    numbers = SimpleNamespace(**runner)
    limits.real(numbers, "lr", more_than=0)
    limits.whole(
        numbers,
        *("training_tokens", "train_batch_size_tokens", "context_size", "n_batches_in_buffer"),
        at_least=1,
    )
    cfg: LanguageModelSAERunnerConfig[TopAFATrainingSAEConfig] = LanguageModelSAERunnerConfig(
        **vars(numbers)
    )
    check_training(cfg, cfg.sae)
    return cfg
