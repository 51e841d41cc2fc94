"""The AFA group in SAELens's evals, and the evaluator during training with SAELens's runners."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sae_lens
import torch
from datasets import Dataset
from helpers.afa_oracle import metrics_of_dictionary
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAEConfig,
    TemporalSAE,
    TemporalSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.evals import EvalConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from wandb.sdk.wandb_run import Run

from sae_afa_plugin import AFAEvalConfig, AFAEvaluator, TopAFATrainingSAEConfig, run_evals
from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.activations.tokens import tokenize

HOOK = "blocks.2.hook_resid_pre"
D_IN, CONTEXT, PROMPTS = 192, 32, 4


@pytest.fixture(scope="module")
def model():
    return load_embedded_model()


@pytest.fixture(scope="module")
def tokens(model):
    return tokenize(model, standard_library_texts("heldout")[:3], CONTEXT)[:24]


def store(model, tokens, hook=HOOK, d_in=D_IN):
    return ActivationsStore.from_config_multi_hook(
        model=model,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}).to_iterable_dataset(),
        hook_names=[hook],
        hook_d_ins={hook: d_in},
        context_size=CONTEXT,
        store_batch_size_prompts=PROMPTS,
    )


def sae_at(hook=HOOK, d_in=D_IN, **fields):
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=96, **fields))
    with torch.no_grad():
        sae.W_dec *= torch.rand(96, 1) + 0.1
        sae.W_enc *= 0.2
        sae.b_dec += torch.randn(d_in) * 0.1
    sae.cfg.metadata.hook_name = hook
    return sae


def evals(sae, model, tokens, config=None, scaler=None, exclude=True, evaluate=run_evals, **more):
    return evaluate(
        sae=sae,
        activation_store=store(model, tokens, sae.cfg.metadata.hook_name, sae.cfg.d_in),
        model=model,
        activation_scaler=scaler or ActivationScaler(),
        exclude_special_tokens=exclude,
        **({} if config is None else {"eval_config": config}),
        **more,
    )


def acts(model, tokens, hook=HOOK, exclude=(0,)):
    keep = ~torch.isin(tokens, torch.tensor(exclude))
    return model.run_with_cache(tokens, names_filter=hook)[1][hook][keep].detach()


def by_definition(sae, z):
    return metrics_of_dictionary(z, sae.encode(z), sae.W_dec, sae.b_dec)


def assert_group(group, expected):
    for name in ("norm_z", "norm_f", "nmse", "l0", "epsilon_lbo", "interference"):
        assert group[f"{name}_mean"] == pytest.approx(np.nanmean(expected[name]), rel=1e-3), name
        assert group[f"{name}_median"] == pytest.approx(np.nanmedian(expected[name]), rel=1e-3), (
            name
        )
    assert group["over_activated"] == pytest.approx(expected["over_activated"].mean())
    assert group["tokens"] == len(expected["l0"])


def test_the_afa_group_beside_saelens_own(model, tokens):
    sae, twin = sae_at(), store(model, tokens)
    flags = {"compute_variance_metrics": True, "compute_l2_norms": True, "compute_ce_loss": True,
             "n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 2}  # fmt: skip
    theirs = sae_lens.run_evals(sae, twin, model, ActivationScaler(), EvalConfig(**flags))
    groups, features = evals(sae, model, tokens, AFAEvalConfig(**flags, n_eval_afa_batches=2))
    group = groups.pop("afa")
    assert repr((groups, features)) == repr(theirs)  # NaN is not equal to itself
    following = torch.cat([twin.get_batch_tokens(PROMPTS) for _ in range(2)])
    assert_group(group, by_definition(sae, acts(model, following)))


def test_without_the_flag_it_is_saelens_run_evals(model, tokens):
    flags = {"compute_sparsity_metrics": True}
    theirs = evals(sae_at(), model, tokens, EvalConfig(**flags), evaluate=sae_lens.run_evals)
    for config in (EvalConfig(**flags), AFAEvalConfig(**flags, compute_afa=False)):
        assert repr(evals(sae_at(), model, tokens, config)) == repr(theirs)


def test_the_default_is_the_afa_group_alone(model, tokens):
    sae = sae_at()
    groups, features = evals(sae, model, tokens)
    assert sorted(groups) == ["afa", "token_stats"]
    assert features == {}
    assert_group(groups["afa"], by_definition(sae, acts(model, tokens[:4])))


@pytest.mark.parametrize(
    ("exclude", "left_out"), [(False, ()), ([0, 5], (0, 5)), (iter([0, 5]), (0, 5)), (True, (0,))]
)
def test_special_tokens(model, tokens, exclude, left_out):
    sae = sae_at()
    config = AFAEvalConfig(compute_sparsity_metrics=True)
    groups, _ = evals(sae, model, tokens, config, exclude=exclude)
    assert_group(groups["afa"], by_definition(sae, acts(model, tokens[4:8], exclude=left_out)))


def test_activations_are_scaled_as_for_training(model, tokens):
    sae = sae_at(normalize_activations="expected_average_only_in")
    scaled, _ = evals(sae, model, tokens, scaler=ActivationScaler(scaling_factor=0.25))
    assert_group(scaled["afa"], by_definition(sae, 0.25 * acts(model, tokens[:4])))


@pytest.mark.parametrize("style", ["hook_z", "none"])
def test_attention_heads(model, tokens, style):
    hook = "blocks.2.attn.hook_z"
    sae = sae_at(hook, reshape_activations=style)
    groups, _ = evals(sae, model, tokens, AFAEvalConfig(compute_variance_metrics=True))
    z = acts(model, tokens[4:8], hook).flatten(-2)
    f = torch.relu((z - sae.b_dec) @ sae.W_enc + sae.b_enc)
    assert_group(groups["afa"], metrics_of_dictionary(z, f, sae.W_dec, sae.b_dec))
    assert sae.hook_z_reshaping_mode == (style == "hook_z")


def test_one_head(model, tokens):
    hook = "blocks.2.attn.hook_z"
    d_head = acts(model, tokens[:1], hook).shape[-1]
    sae = sae_at(hook, d_in=d_head)
    sae.cfg.metadata.hook_head_index = 1
    groups, _ = evals(sae, model, tokens)
    assert_group(groups["afa"], by_definition(sae, acts(model, tokens[:4], hook)[:, 1]))


def test_transcoders(model, tokens):
    torch.manual_seed(0)
    cfg = TranscoderConfig(d_in=D_IN, d_out=D_IN, d_sae=96, apply_b_dec_to_input=False)
    sae = Transcoder(cfg)
    sae.cfg.metadata.hook_name = "blocks.1.ln2.hook_normalized"
    with pytest.raises(ValueError, match="this transcoder has no hook_name_out"):
        evals(sae, model, tokens)
    sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    groups, _ = evals(sae, model, tokens)
    x, z = (acts(model, tokens[:4], hook) for hook in ("blocks.1.ln2.hook_normalized",
                                                       "blocks.1.hook_mlp_out"))  # fmt: skip
    assert_group(groups["afa"], metrics_of_dictionary(z, sae.encode(x), sae.W_dec, sae.b_dec))


def test_what_cannot_be_evaluated_is_said_before_anything_runs(model, tokens):
    cfg = TemporalSAEConfig(d_in=D_IN, d_sae=64, n_heads=2, bottleneck_factor=4, kval_topk=4)
    temporal = TemporalSAE(cfg)
    temporal.cfg.metadata.hook_name = HOOK
    model_calls = []
    model.hook_embed.add_perma_hook(lambda tensor, hook: model_calls.append(1))
    try:
        for sae, message in (
            (temporal, "architecture 'temporal' is not supported"),
            (sae_at(None), "the SAE's metadata has no hook_name"),
        ):
            with pytest.raises(ValueError, match=message):
                run_evals(sae, store(model, tokens), model, ActivationScaler())
    finally:
        model.reset_hooks(including_permanent=True)
    assert model_calls == []


def test_tokens_that_are_not_finite_are_counted(model, tokens):
    sae = sae_at("hook_embed")
    some = int(tokens[0, 5])
    before = model.embed.W_E.data.clone()
    try:
        model.embed.W_E.data[some] = torch.nan
        groups, _ = evals(sae, model, tokens)
    finally:
        model.embed.W_E.data.copy_(before)
    bad = int((tokens[:4] == some).sum())
    assert bad
    assert groups["afa"]["nonfinite_tokens"] == bad
    assert math.isfinite(groups["afa"]["nmse_mean"])


# --- during training ---


class Recording(AFAEvaluator):
    def __call__(self, sae, data_provider, activation_scaler):
        batches = []

        def watched():
            for batch in data_provider:
                batches.append(batch)
                yield batch

        metrics = super().__call__(sae, watched(), activation_scaler)
        x = activation_scaler.scale(torch.cat(batches))
        z = sae.run_time_activation_norm_fn_in(x)
        f = sae.encode(x)
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            f = f / sae.W_dec.norm(dim=-1)  # what is multiplied with W_dec
        expected = metrics_of_dictionary(z, f, sae.W_dec, sae.b_dec)
        self.calls = [*getattr(self, "calls", []), (sae.cfg.architecture(), metrics, expected)]
        return metrics


@pytest.fixture
def logged(monkeypatch):
    """Everything that wandb is told."""
    told, log = {}, Run.log
    monkeypatch.setattr(
        Run,
        "log",
        lambda self, metrics, **kwargs: told.update(metrics) or log(self, metrics, **kwargs),
    )
    return told


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    return LoggingConfig(log_to_wandb=True, wandb_log_frequency=2, eval_every_n_wandb_logs=2)


def shared(tmp_path, offline):
    return {
        "model_name": "sae-afa-demo",
        "context_size": CONTEXT,
        "training_tokens": 8 * 64,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 32,
        "store_batch_size_prompts": 8,
        "dead_feature_window": 100,
        "eval_batch_size_prompts": 2,
        "n_eval_batches": 1,
        "exclude_special_tokens": True,
        "logger": offline,
        "checkpoint_path": None,
        "output_path": str(tmp_path / "out"),
        "model_from_pretrained_kwargs": {},
    }


def dataset(tokens):
    return Dataset.from_dict({"tokens": tokens.repeat(20, 1).tolist()}).to_iterable_dataset()


@pytest.mark.filterwarnings("ignore:All samples in the training dataset")
@pytest.mark.parametrize("scaling", ["none", "expected_average_only_in"])
def test_one_sae_in_training(model, tokens, tmp_path, offline, logged, scaling):
    cfg = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=D_IN, d_sae=96, normalize_activations=scaling),
        hook_name=HOOK,
        **shared(tmp_path, offline),
    )
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=dataset(tokens), override_model=model
    )
    runner.evaluator = evaluator = Recording(n_batches=2, beside=runner.evaluator)
    runner.run()
    assert [architecture for architecture, _, _ in evaluator.calls] == ["standard", "standard"]
    for _, metrics, expected in evaluator.calls:
        assert_group({k.removeprefix("afa/"): v for k, v in metrics.items()}, expected)
        assert metrics["afa/tokens"] == 128
        assert "model_performance_preservation" in metrics
    assert logged["afa/norm_z_median"] == pytest.approx(
        evaluator.calls[-1][1]["afa/norm_z_median"], rel=1e-6
    )
    assert logged["model_performance_preservation"]["ce_loss_score"]


@pytest.mark.filterwarnings("ignore:All samples in the training dataset")
def test_many_saes_of_different_architectures_in_training(model, tokens, tmp_path, offline, logged):
    fields = {"d_in": D_IN, "d_sae": 96}
    evaluator = Recording()
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "afa": TopAFATrainingSAEConfig(**fields),
            "batchtopk": BatchTopKTrainingSAEConfig(**fields, k=8),
        },
        hook_names=HOOK,
        evaluator=evaluator,
        **shared(tmp_path, offline),
    )
    MultiSAETrainingRunner(cfg, override_dataset=dataset(tokens), override_model=model).run()
    assert [name for name, _, _ in evaluator.calls] == ["topafa", "batchtopk"] * 2
    for _, metrics, expected in evaluator.calls:
        assert_group({k.removeprefix("afa/"): v for k, v in metrics.items()}, expected)
    assert logged["afa/afa/norm_ratio_mean"] == pytest.approx(1, abs=0.1)
    assert logged["batchtopk/afa/l0_mean"] == pytest.approx(8, abs=1e-6)
