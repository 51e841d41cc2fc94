"""A rule of one's own: an architecture that overrides one method, trained by SAELens by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.oracle import keep_brute_force
from sae_lens import (
    SAE,
    LoggingConfig,
    SAETrainer,
    TrainingSAE,
    TrainingSAEConfig,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_afa_plugin import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
    keep_prefix,
)


class _L1Budget:
    """Features until their sum of norms is a share of the L1 norm of the input."""

    def choose(self, hidden_pre, sae_in, decoder_norm):
        target = self.cfg.budget * sae_in.detach().abs().sum(-1)
        return keep_prefix(hidden_pre, target, decoder_norm, p=1)


@dataclass
class L1BudgetSAEConfig(TopAFASAEConfig):
    budget: float = 0.2

    @classmethod
    def architecture(cls):
        return "l1_budget"


@dataclass
class L1BudgetTrainingSAEConfig(TopAFATrainingSAEConfig):
    budget: float = 0.2

    @classmethod
    def architecture(cls):
        return "l1_budget"


class L1BudgetSAE(_L1Budget, TopAFASAE):
    pass


class L1BudgetTrainingSAE(_L1Budget, TopAFATrainingSAE):
    pass


@pytest.fixture
def registered():
    register_sae_class("l1_budget", L1BudgetSAE, L1BudgetSAEConfig)
    register_sae_training_class("l1_budget", L1BudgetTrainingSAE, L1BudgetTrainingSAEConfig)
    yield
    del SAE_CLASS_REGISTRY["l1_budget"], SAE_TRAINING_CLASS_REGISTRY["l1_budget"]


def by_definition(sae, x):
    """Features from the definition, in NumPy."""
    centered = (x - sae.b_dec).detach()
    acts = (centered @ sae.W_enc + sae.b_enc).detach().relu()
    scores = acts * sae.W_dec.detach().norm(dim=-1)
    target = sae.cfg.budget * centered.abs().sum(-1)
    mask = torch.from_numpy(keep_brute_force(scores.numpy(), target.numpy(), p=1))
    return torch.where(mask, acts, 0)


def test_a_rule_is_trained_by_name(registered, tmp_path):
    torch.manual_seed(0)
    cfg = TrainingSAEConfig.from_dict(
        {
            "architecture": "l1_budget",
            "d_in": 16,
            "d_sae": 64,
            "budget": 0.3,
            "dtype": "float64",
            "normalize_activations": "none",
        }
    )
    sae = TrainingSAE.from_dict(cfg.to_dict())
    assert type(sae) is L1BudgetTrainingSAE
    directions = torch.randn(40, 16, dtype=torch.float64)
    steps, batch = 60, 128
    codes = torch.rand(steps, batch, 40, dtype=torch.float64)
    batches = (codes * (codes > 0.95)) @ directions
    trainer_config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * batch,
        device="cpu",
        autocast=False,
        lr=1e-2,
        lr_end=1e-2,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.99,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=batch,
        dead_feature_window=5,
        feature_sampling_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(trainer_config, sae, iter(batches))
    step, losses = trainer.step, []

    def watched_step(x):
        expected = by_definition(sae, x)
        output = step(x)
        torch.testing.assert_close(output.feature_acts, expected, rtol=1e-12, atol=1e-12)
        losses.append(output.losses["mse_loss"].item())
        return output

    trainer.step = watched_step
    trainer.fit()
    assert len(losses) == steps
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])

    sae.save_inference_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    assert type(exported) is L1BudgetSAE
    assert exported.cfg.budget == 0.3
    x = batches[0]
    torch.testing.assert_close(exported(x), sae(x), rtol=1e-10, atol=1e-10)
    l0 = (exported.encode(x) != 0).sum(-1)
    assert 1 <= l0.min() < l0.max() < 64


def test_its_errors_name_it(registered):
    with pytest.raises(ValueError, match="^l1_budget needs apply_b_dec_to_input=True"):
        L1BudgetSAEConfig(d_in=8, d_sae=32, apply_b_dec_to_input=False)
    sae = L1BudgetSAE(L1BudgetSAEConfig(d_in=8, d_sae=32))
    with pytest.raises(ValueError, match="^this l1_budget SAE has d_in=8, but"):
        sae.encode(torch.randn(4, 12))
