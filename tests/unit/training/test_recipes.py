"""The paper's protocol, every hyperparameter."""

from __future__ import annotations

import pytest

from sae_afa_plugin import TopAFATrainingSAEConfig, paper_runner_config


def test_the_papers_hyperparameters():
    cfg = paper_runner_config()
    assert isinstance(cfg.sae, TopAFATrainingSAEConfig)
    assert (cfg.model_name, cfg.hook_name) == ("gpt2", "blocks.8.hook_resid_pre")
    assert (cfg.sae.d_in, cfg.sae.d_sae) == (768, 12_288)
    assert (cfg.dataset_path, cfg.context_size) == ("Skylion007/openwebtext", 128)
    assert cfg.train_batch_size_tokens == 4096
    assert cfg.training_tokens == 81_924_096
    assert cfg.total_training_steps == 20_001
    assert (cfg.lr, cfg.lr_scheduler_name, cfg.lr_warm_up_steps, cfg.lr_decay_steps) == (
        3e-4,
        "constant",
        0,
        0,
    )
    assert (cfg.adam_beta1, cfg.adam_beta2) == (0.9, 0.99)
    assert cfg.dead_feature_window == 5
    assert (cfg.dtype, cfg.sae.dtype) == ("float32", "float32")
    assert (cfg.sae.afa_coefficient, cfg.sae.aux_loss_coefficient) == (1 / 32, 1 / 32)
    assert (cfg.sae.top_k_aux, cfg.sae.decoder_init_norm) == (512, 1.0)
    assert cfg.sae.normalize_activations == "layer_norm"
    assert not cfg.logger.log_to_wandb


def test_overrides_reach_the_runner_and_the_sae():
    cfg = paper_runner_config(
        layer=6, afa_coefficient=1 / 64, d_sae=3072, lr=1e-3, dtype="float64", verbose=False
    )
    assert cfg.hook_name == "blocks.6.hook_resid_pre"
    assert (cfg.sae.afa_coefficient, cfg.sae.d_sae, cfg.lr) == (1 / 64, 3072, 1e-3)
    assert (cfg.dtype, cfg.sae.dtype) == ("float64", "float64")


def test_an_unknown_override_is_named():
    with pytest.raises(TypeError, match="unknown override batch_size, learning_rate: overrides"):
        paper_runner_config(learning_rate=1e-3, batch_size=3)
    with pytest.raises(TypeError, match="unknown override sae"):
        paper_runner_config(sae=TopAFATrainingSAEConfig(d_in=8, d_sae=32))
