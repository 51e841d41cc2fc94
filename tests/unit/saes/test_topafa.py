"""The SAELens contract, for topafa: configs, checkpoints, folds, export, hooks, refusals."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers.models import tiny_hooked_sae_transformer
from helpers.oracle import keep_brute_force
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MultiSAETrainingRunnerConfig,
    SAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunnerConfig

from sae_afa_plugin import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)

NORMALIZATIONS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"]


def training_sae(seed=0, **fields):
    torch.manual_seed(seed)
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(**{"d_in": 16, "d_sae": 64, **fields}))
    with torch.no_grad():  # nothing at its initial value
        sae.b_dec += 0.1 * torch.randn_like(sae.b_dec)
        sae.b_enc += 0.1 * torch.randn_like(sae.b_enc)
    return sae


def inference_sae(seed=0, **fields):
    torch.manual_seed(seed)
    sae = TopAFASAE(TopAFASAEConfig(**{"d_in": 16, "d_sae": 64, **fields}))
    with torch.no_grad():
        sae.b_dec += 0.1 * torch.randn_like(sae.b_dec)
        sae.b_enc += 0.1 * torch.randn_like(sae.b_enc)
        sae.W_dec *= torch.rand(sae.cfg.d_sae, 1) * 3 + 0.2  # rows far from unit
    return sae


def step_input(x, dead=None, coefficients=None):
    return TrainStepInput(
        sae_in=x,
        coefficients={"afa": 1 / 32} if coefficients is None else coefficients,
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )


# --- what encode and decode compute ---


def by_definition(sae, z):
    """Features of z from the definition, in float64 NumPy."""
    z = z.double()
    centered = z - sae.b_dec.double()
    acts = (centered @ sae.W_enc.double() + sae.b_enc.double()).relu()
    scores = acts * sae.W_dec.double().norm(dim=-1)
    mask = keep_brute_force(scores.detach().numpy(), centered.norm(dim=-1).detach().numpy())
    return torch.where(torch.from_numpy(mask), acts, 0)


@pytest.mark.parametrize("make", [training_sae, inference_sae])
def test_encode_and_decode_follow_the_definition(make):
    sae = make(normalize_activations="none", dtype="float64")
    x = torch.randn(200, 16, dtype=torch.float64) * 3
    expected = by_definition(sae, x)
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        sae.decode(expected), expected @ sae.W_dec + sae.b_dec, rtol=1e-12, atol=1e-12
    )
    assert 1 <= (expected != 0).sum(-1).min() < (expected != 0).sum(-1).max()


def test_layer_norm_standardises_each_token_and_undoes_it():
    sae = inference_sae(normalize_activations="layer_norm", dtype="float64")
    x = torch.randn(50, 16, dtype=torch.float64) * 7 + 2
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z = (x - mean) / (std + 1e-5)
    f = by_definition(sae, z)
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae(x), (f @ sae.W_dec + sae.b_dec) * std + mean)


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(d_in=64, d_sae=2048))
    z = torch.randn(500, 64)
    acts = (z @ sae.W_enc).relu()
    # half of all features start on, with the norm of the input
    assert (acts > 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert (acts.square().sum(-1) / z.square().sum(-1)).mean().item() == pytest.approx(1, abs=0.05)
    assert sae.W_enc.abs().max() <= math.sqrt(6 / 2048)
    torch.testing.assert_close(sae.W_dec, (sae.W_enc / sae.W_enc.norm(dim=0)).T)
    assert not sae.b_enc.any()
    assert not sae.b_enc.requires_grad
    assert not sae.b_dec.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype):
    sae = inference_sae(dtype=dtype, normalize_activations="none")
    x = torch.randn(20, 16, dtype=sae.dtype)
    f = sae.encode(x)
    assert f.dtype == sae.dtype
    assert sae(x).isfinite().all()
    # the same features as float32 keeps, of the same activations
    hidden_pre = (sae.process_sae_in(x) @ sae.W_enc + sae.b_enc).float().relu()
    norms = sae.W_dec.float().norm(dim=-1)
    target = sae.process_sae_in(x).float().norm(dim=-1)
    mask = keep_brute_force((hidden_pre * norms).detach().numpy(), target.detach().numpy())
    assert torch.equal(f != 0, torch.from_numpy(mask))


def test_any_leading_shape_and_a_bad_token_stays_alone():
    sae = inference_sae()
    x = torch.randn(3, 5, 16)
    clean = sae(x)
    x[1, 2, 3] = torch.nan
    out = sae(x)
    assert out[1, 2].isnan().all()
    rest = torch.ones(3, 5, dtype=torch.bool)
    rest[1, 2] = False
    torch.testing.assert_close(out[rest], clean[rest])


def test_meta_device():
    sae = TopAFASAE(TopAFASAEConfig(d_in=16, d_sae=64, device="meta"))
    assert sae(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 16)


# --- configs by name ---


def test_training_config_round_trip():
    cfg = TopAFATrainingSAEConfig(
        d_in=8,
        d_sae=32,
        afa_coefficient=1 / 64,
        afa_warm_up_steps=7,
        top_k_aux=3,
        aux_loss_coefficient=0.5,
        train_encoder_bias=True,
        normalize_activations="none",
    )
    again = TrainingSAEConfig.from_dict(cfg.to_dict())
    assert type(again) is TopAFATrainingSAEConfig
    assert again == cfg
    inference = SAEConfig.from_dict(cfg.get_inference_sae_cfg_dict())
    assert type(inference) is TopAFASAEConfig
    assert inference.normalize_activations == "none"
    assert inference.metadata.training_architecture_details["afa_coefficient"] == 1 / 64
    assert SAEConfig.from_dict(inference.to_dict()) == inference


def test_by_name_with_the_papers_defaults():
    cfg = TrainingSAEConfig.from_dict({"architecture": "topafa", "d_in": 8, "d_sae": 32})
    assert isinstance(cfg, TopAFATrainingSAEConfig)
    assert (cfg.afa_coefficient, cfg.aux_loss_coefficient, cfg.top_k_aux) == (1 / 32, 1 / 32, 512)
    assert (cfg.decoder_init_norm, cfg.normalize_activations) == (1.0, "layer_norm")
    assert cfg.afa_warm_up_steps == 0
    assert cfg.train_encoder_bias is False
    assert type(TrainingSAE.from_dict(cfg.to_dict())) is TopAFATrainingSAE


def test_by_name_in_every_runner_config():
    sae = TopAFATrainingSAEConfig(d_in=8, d_sae=32)
    logger = LoggingConfig(log_to_wandb=False)
    runner = LanguageModelSAERunnerConfig(sae=sae, logger=logger, verbose=False)
    again = LanguageModelSAERunnerConfig.from_dict(
        {k: v for k, v in runner.to_dict().items() if k != "tokens_per_buffer"}
    )
    assert again.sae == sae
    multi = MultiSAETrainingRunnerConfig(saes={"a": sae}, hook_names="h", logger=logger)
    assert multi.to_dict()["saes"]["a"]["architecture"] == "topafa"
    synthetic = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=20, hidden_dim=8), sae=sae, logger=logger
    )
    assert type(SyntheticSAERunnerConfig.from_dict(synthetic.to_dict()).sae) is type(sae)


@pytest.mark.parametrize("cls", [TopAFASAEConfig, TopAFATrainingSAEConfig])
def test_refused_configs(cls):
    with pytest.raises(
        ValueError,
        match=r"topafa needs apply_b_dec_to_input=True, because the number of features it keeps is "
        r"defined by \|\|z - b_dec\|\|: got apply_b_dec_to_input=False",
    ):
        cls(d_in=8, d_sae=32, apply_b_dec_to_input=False)
    with pytest.raises(
        ValueError,
        match="topafa cannot use normalize_activations='covariance_whitening', because whitening "
        "does not preserve the norm",
    ):
        cls(d_in=8, d_sae=32, normalize_activations="covariance_whitening")


@pytest.mark.parametrize("field", ["afa_coefficient", "aux_loss_coefficient", "top_k_aux"])
def test_negative_settings_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must not be negative: got -1"):
        TopAFATrainingSAEConfig(d_in=8, d_sae=32, **{field: -1})


def test_another_decoder_norm_is_set_right_with_a_warning():
    with pytest.warns(UserWarning, match=r"decoder_init_norm is set to 1.0 \(got 0.1\)"):
        cfg = TopAFATrainingSAEConfig(d_in=8, d_sae=32, decoder_init_norm=0.1)
    assert cfg.decoder_init_norm == 1.0


def test_a_wrong_width_is_named():
    message = r"this topafa SAE has d_in=16, but the activations have shape \(4, 12\)"
    for sae in (inference_sae(), training_sae()):
        with pytest.raises(ValueError, match=message):
            sae.encode(torch.randn(4, 12))


# --- folds ---


@pytest.mark.parametrize("make", [training_sae, inference_sae])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_folding_decoder_norms_changes_nothing(make, normalize):
    sae = make(normalize_activations=normalize, dtype="float64")
    with torch.no_grad():
        sae.W_dec *= torch.rand(64, 1, dtype=torch.float64) * 3 + 0.2
    x = torch.randn(100, 16, dtype=torch.float64)
    before, out = sae.encode(x), sae(x)
    norms = sae.W_dec.norm(dim=-1)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones_like(norms))
    torch.testing.assert_close(sae.encode(x), before * norms, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sae(x), out, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [training_sae, inference_sae])
def test_folding_the_norm_scaling_factor_changes_nothing(make):
    sae = make(normalize_activations="expected_average_only_in", dtype="float64")
    x, factor = torch.randn(100, 16, dtype=torch.float64) * 40, 0.123
    features, out = sae.encode(x * factor), sae(x * factor) / factor
    sae.fold_activation_norm_scaling_factor(factor)
    assert sae.cfg.normalize_activations == "none"
    torch.testing.assert_close(sae.encode(x), features, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sae(x), out, rtol=1e-10, atol=1e-10)


def test_folding_a_whitening_is_refused():
    eye = torch.eye(16)
    for sae in (inference_sae(), training_sae()):
        with pytest.raises(NotImplementedError, match="cannot be folded into a topafa SAE"):
            sae.fold_activation_whitening(torch.zeros(16), eye, eye)


# --- saving ---


def test_checkpoint_round_trip(tmp_path):
    sae = training_sae(train_encoder_bias=True)
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert type(again) is TopAFATrainingSAE
    assert again.cfg == sae.cfg
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert again.b_enc.requires_grad


def test_inference_export_folds_the_rows_to_unit_norm(tmp_path):
    sae = training_sae(dtype="float64")
    with torch.no_grad():
        sae.W_dec *= torch.rand(64, 1, dtype=torch.float64) + 0.5
    kept = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.save_inference_model(tmp_path)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, kept[name]), "saving must not change the SAE"
    exported = SAE.load_from_disk(tmp_path)
    assert type(exported) is TopAFASAE
    torch.testing.assert_close(
        exported.W_dec.norm(dim=-1), torch.ones(64, dtype=torch.float64), rtol=1e-14, atol=1e-14
    )
    x = torch.randn(100, 16, dtype=torch.float64)
    torch.testing.assert_close(exported(x), sae(x), rtol=1e-10, atol=1e-10)
    assert exported.cfg.metadata.training_architecture == "topafa"


def test_inference_round_trip_and_dtype(tmp_path):
    sae = inference_sae()
    sae.save_model(tmp_path)
    x = torch.randn(10, 16)
    assert torch.equal(SAE.load_from_disk(tmp_path)(x), sae(x))
    assert SAE.load_from_disk(tmp_path, dtype="bfloat16").W_enc.dtype == torch.bfloat16


# --- inside a model ---


def test_hook_z_is_flattened_and_restored():
    sae = inference_sae(reshape_activations="hook_z")
    flat = inference_sae()
    x = torch.randn(2, 3, 4, 4)
    assert sae.encode(x).shape == (2, 3, 64)
    torch.testing.assert_close(sae(x), flat(x.flatten(-2)).reshape(x.shape))
    with pytest.raises(ValueError, match="has d_in=16, but the activations have shape"):
        sae.encode(torch.randn(2, 3, 4, 5))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_splicing_with_the_error_term_leaves_the_model_as_it_is(normalize):
    model = tiny_hooked_sae_transformer()
    tokens = torch.randint(0, 50, (2, 7))
    sae = inference_sae(d_in=16, normalize_activations=normalize)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    original = model(tokens)
    with model.saes(saes=[sae], use_error_term=True):
        torch.testing.assert_close(model(tokens), original, rtol=1e-4, atol=1e-4)
    spliced, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    assert not torch.allclose(spliced, original, atol=1e-3)
    features = cache["blocks.1.hook_resid_pre.hook_sae_acts_post"]
    assert features.shape == (2, 7, 64)
    assert torch.equal(features, sae.encode(cache["blocks.1.hook_resid_pre.hook_sae_input"]))
    # an intervention on the features reaches the logits
    ablated = model.run_with_hooks_with_saes(
        tokens,
        saes=[sae],
        fwd_hooks=[
            (
                "blocks.1.hook_resid_pre.hook_sae_acts_post",
                lambda acts, hook: torch.zeros_like(acts),
            )
        ],
    )
    assert not torch.allclose(ablated, spliced, atol=1e-3)


# --- one training step ---


def test_losses_by_hand():
    """Two features on the axes, one token, all numbers worked out on paper."""
    sae = TopAFATrainingSAE(
        TopAFATrainingSAEConfig(
            d_in=2,
            d_sae=3,
            normalize_activations="none",
            afa_coefficient=0.25,
            aux_loss_coefficient=0.5,
            top_k_aux=1,
        )
    )
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.6], [0.0, 0.5, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    # z = (3, 4), ||z|| = 5; acts (3, 2, 1.8); norms 3, sqrt(13) = 3.606, sqrt(16.24) = 4.03
    x = torch.tensor([[3.0, 4.0]])
    # the third feature is kept as well: reconstruction (3 + 1.08, 2 + 1.44) = (4.08, 3.44)
    out = sae.training_forward_pass(step_input(x, coefficients={"afa": 0.25}))
    assert out.feature_acts.tolist() == [[3.0, 2.0, pytest.approx(1.8)]]
    assert out.sae_out[0].tolist() == pytest.approx([4.08, 3.44])
    mse = 1.08**2 + 0.56**2  # a sum over d_in
    afa = 2 * 0.25 * (math.sqrt(16.24) - 5) ** 2
    assert out.losses["mse_loss"].item() == pytest.approx(mse, rel=1e-5)
    assert out.losses["afa_loss"].item() == pytest.approx(afa, rel=1e-5)
    assert out.losses["auxiliary_reconstruction_loss"].item() == 0
    # dead: the last two; the larger of them, 2 * (0, 1), rebuilds what is left over
    dead = torch.tensor([False, True, True])
    out = sae.training_forward_pass(step_input(x, dead, {"afa": 0.25}))
    aux = 0.5 * (1.08**2 + (0.56 - 2) ** 2)
    assert out.losses["auxiliary_reconstruction_loss"].item() == pytest.approx(aux, rel=1e-5)
    assert out.loss.item() == pytest.approx(mse + afa + aux, rel=1e-5)
    values = {name: float(metric()) for name, metric in out.metrics.items()}
    assert values == pytest.approx(
        {
            "mean_l0": 3,
            "min_l0": 3,
            "max_l0": 3,
            "dead_features": 2,
            "over_activated": 0,
            "norm_ratio": math.sqrt(16.24) / 5,
            "nmse": mse / 25,
            "non_finite_tokens": 0,
        },
        rel=1e-5,
    )


def test_the_scheduled_coefficient_counts_not_the_configured_one():
    sae, x = training_sae(afa_warm_up_steps=4), torch.randn(20, 16)
    assert sae.get_coefficients()["afa"] == (1 / 32, 4)
    full = sae.training_forward_pass(step_input(x, coefficients={"afa": 1 / 32}))
    part = sae.training_forward_pass(step_input(x, coefficients={"afa": 1 / 320}))
    assert part.losses["afa_loss"].item() == pytest.approx(full.losses["afa_loss"].item() / 10)


def test_a_step_on_sequences_equals_the_step_on_tokens():
    sae, x, dead = training_sae(top_k_aux=2), torch.randn(6, 5, 16), torch.arange(64) < 9
    nested = sae.training_forward_pass(step_input(x, dead))
    flat = sae.training_forward_pass(step_input(x.flatten(0, 1), dead))
    assert {k: v.item() for k, v in nested.losses.items()} == pytest.approx(
        {k: v.item() for k, v in flat.losses.items()}
    )


def test_hooks_see_the_reconstruction_of_z():
    for sae in (inference_sae(), training_sae()):
        seen = []
        sae.hook_sae_recons.add_hook(lambda acts, hook, seen=seen: seen.append(acts))
        x = torch.randn(5, 16)
        f = sae.encode(x)
        sae.decode(f)
        torch.testing.assert_close(seen[0], f @ sae.W_dec + sae.b_dec)


def test_metrics_do_not_move_with_the_weights():
    sae = training_sae()
    with torch.no_grad():
        sae.b_dec += 0.5
    step = step_input(torch.randn(40, 16))
    asked_at_once = sae.training_forward_pass(step).metrics
    expected = {name: float(metric()) for name, metric in asked_at_once.items()}
    asked_later = sae.training_forward_pass(step).metrics
    with torch.no_grad():  # as an optimizer does before the metrics are asked for
        for parameter in sae.parameters():
            parameter.mul_(3)
    assert {name: float(metric()) for name, metric in asked_later.items()} == expected


def test_metrics_on_uneven_tokens():
    sae = training_sae(normalize_activations="none")
    with torch.no_grad():
        sae.W_dec *= torch.rand(64, 1) + 0.5
        sae.b_dec += 0.2
    x = torch.cat([torch.randn(5, 16) * 3, torch.randn(3, 16) * 0.1])
    out = sae.training_forward_pass(step_input(x, torch.arange(64) < 3))
    assert all(callable(metric) for metric in out.metrics.values())
    values = {name: float(metric()) for name, metric in out.metrics.items()}
    f, b = out.feature_acts.detach().double(), sae.b_dec.detach().double()
    l0 = (f != 0).sum(-1).double()
    norm_f = (f * sae.W_dec.detach().double().norm(dim=-1)).norm(dim=-1)
    norm_f = (norm_f**2 + b.norm() ** 2).sqrt()  # the bias is one more feature
    norm_z = x.double().norm(dim=-1)
    recons = f @ sae.W_dec.detach().double() + b
    expected = {
        "mean_l0": l0.mean(),
        "min_l0": l0.min(),
        "max_l0": l0.max(),
        "dead_features": 3,
        "norm_ratio": (norm_f / norm_z).mean(),
        "over_activated": (norm_f > norm_z).double().mean(),
        "nmse": ((x - recons).norm(dim=-1) ** 2 / norm_z**2).mean(),
        "non_finite_tokens": 0,
    }
    assert values == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)
    assert 0 < values["over_activated"] < 1


def test_losses_are_in_the_space_of_z():
    x = torch.randn(40, 16) * 50 + 3
    sae = training_sae()
    scaled = sae.training_forward_pass(step_input(x))
    plain = sae.training_forward_pass(step_input(x / 50))
    assert scaled.losses["mse_loss"].item() == pytest.approx(plain.losses["mse_loss"].item(), 1e-3)
    # while the output goes back to the space of x
    assert scaled.sae_out.norm() > 20 * plain.sae_out.norm()


def test_backward_holds_the_rows_and_removes_the_gradient_along_them():
    sae = training_sae()
    with torch.no_grad():
        sae.W_dec *= torch.rand(64, 1) + 0.5
    before = sae.W_dec.detach().clone()
    sae.training_forward_pass(step_input(torch.randn(40, 16))).loss.backward()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    torch.testing.assert_close(sae.W_dec.detach(), before / before.norm(dim=-1, keepdim=True))
    along = (sae.W_dec.grad * sae.W_dec).sum(-1)
    torch.testing.assert_close(along, torch.zeros(64), rtol=0, atol=1e-5)
    assert sae.W_dec.grad.abs().max() > 1e-3


@pytest.mark.parametrize("how", ["deepcopy", "load_from_disk", "load_state_dict"])
def test_copies_hold_their_rows_too(how, tmp_path):
    sae = training_sae()
    if how == "deepcopy":
        sae = copy.deepcopy(sae)
    elif how == "load_from_disk":
        sae.save_model(tmp_path)
        sae = TrainingSAE.load_from_disk(tmp_path)
    else:
        sae.load_state_dict(training_sae(seed=1).state_dict(), assign=True)
    for _ in range(2):  # the hook must not be there twice
        sae.zero_grad()
        sae.training_forward_pass(step_input(torch.randn(40, 16))).loss.backward()
    assert len(sae.W_dec._post_accumulate_grad_hooks) == 1
    along = (sae.W_dec.grad * sae.W_dec).sum(-1)
    torch.testing.assert_close(along, torch.zeros(64), rtol=0, atol=1e-5)


def test_a_frozen_decoder_can_be_trained_around():
    sae = training_sae()
    sae.W_dec.requires_grad_(False)
    sae.train()
    sae.training_forward_pass(step_input(torch.randn(40, 16))).loss.backward()
    assert sae.W_enc.grad.isfinite().all()


@pytest.mark.parametrize("trained", [False, True])
def test_encoder_bias_is_trained_only_on_request(trained):
    sae = training_sae(train_encoder_bias=trained)
    sae.training_forward_pass(step_input(torch.randn(40, 16))).loss.backward()
    assert (sae.b_enc.grad is not None) == trained


def test_gradient_of_the_loss():
    sae = training_sae(dtype="float64", normalize_activations="none", top_k_aux=2)
    x = torch.randn(3, 16, dtype=torch.float64)
    dead = torch.arange(64) < 5
    sae.W_dec.requires_grad_(False)  # its hook would change it

    def loss(W_enc, b_dec):
        parts = {"W_enc": W_enc, "b_dec": b_dec}
        return torch.func.functional_call(
            _Loss(sae), {f"sae.{k}": v for k, v in parts.items()}, (x, dead)
        )

    inputs = (sae.W_enc.detach().requires_grad_(), sae.b_dec.detach().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6)


class _Loss(torch.nn.Module):
    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x, dead):
        return self.sae.training_forward_pass(step_input(x, dead)).loss


@pytest.mark.parametrize("dead", [False, True])
def test_the_training_step_compiles_without_graph_breaks(dead):
    x, mask = torch.randn(40, 16), torch.zeros(64, dtype=torch.bool)
    mask[:9] = dead
    eager, compiled = training_sae(top_k_aux=4), training_sae(top_k_aux=4)
    expected = eager.training_forward_pass(step_input(x, mask))
    expected.loss.backward()
    step = torch.compile(compiled.training_forward_pass, fullgraph=True, backend="aot_eager")
    out = step(step_input(x, mask))
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    assert {k: float(v()) for k, v in out.metrics.items()} == pytest.approx(
        {k: float(v()) for k, v in expected.metrics.items()}, rel=1e-5
    )
    for name in ("W_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(
            getattr(compiled, name).grad, getattr(eager, name).grad, rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(compiled.W_dec.norm(dim=-1), torch.ones(64))


def test_autocast():
    sae = training_sae(top_k_aux=4)
    x, dead = torch.randn(40, 16), torch.arange(64) < 9
    exact = sae.training_forward_pass(step_input(x, dead))
    with torch.autocast("cpu", torch.bfloat16):
        out = sae.training_forward_pass(step_input(x, dead))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
    assert sae.W_enc.grad.isfinite().all()
    assert sae.W_dec.grad.isfinite().all()


def test_importing_and_building_warn_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_sae()
        inference_sae()
