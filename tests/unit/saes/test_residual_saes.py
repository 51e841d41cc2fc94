"""SAELens's contract and the rules themselves, for ``sparse_topafa`` and ``constant_quality``.

What they share with ``topafa``, whose classes they extend, is tested there.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers.models import tiny_hooked_sae_transformer
from helpers.oracle import explained_exactly, kept_exactly, left_one_out_exactly
from helpers.saes import PRICE, unlike_new
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MultiSAETrainingRunnerConfig,
    SAEConfig,
    SAETrainer,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput

from sae_afa_plugin import (
    ConstantQualitySAE,
    ConstantQualityTrainingSAE,
    SparseTopAFASAE,
    SparseTopAFATrainingSAE,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
    top_afa,
)
from sae_afa_plugin.saes import sparse_topafa

CLASSES = {
    "sparse_topafa": (SparseTopAFASAE, SparseTopAFATrainingSAE, {"max_k": 20}),
    "constant_quality": (ConstantQualitySAE, ConstantQualityTrainingSAE, {"explained": 0.6}),
}
NORMALIZATIONS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"]


@pytest.fixture(params=sorted(CLASSES))
def architecture(request):
    return request.param


def training_sae(architecture, seed=0, **fields):
    torch.manual_seed(seed)
    given = {"architecture": architecture, "d_in": 16, "d_sae": 64, **CLASSES[architecture][2]}
    sae = TrainingSAE.from_dict(TrainingSAEConfig.from_dict({**given, **fields}).to_dict())
    assert type(sae) is CLASSES[architecture][1]
    with torch.no_grad():  # nothing at its initial value
        sae.b_dec += 0.1 * torch.randn_like(sae.b_dec)
        sae.b_enc += 0.1 * torch.randn_like(sae.b_enc)
        if architecture == "sparse_topafa":
            sae.price += PRICE
            sae.running_residual += 0.1
            sae.running_energy += 0.9
    return sae


def inference_sae(architecture, seed=0, **fields):
    torch.manual_seed(seed)
    given = {"architecture": architecture, "d_in": 16, "d_sae": 64, **CLASSES[architecture][2]}
    sae = SAE.from_dict(SAEConfig.from_dict({**given, **fields}).to_dict())
    assert type(sae) is CLASSES[architecture][0]
    return unlike_new(sae)


def step_input(x, dead=None, **coefficients):
    return TrainStepInput(
        sae_in=x,
        coefficients={"afa": 0.0, "price": 0.3, **coefficients},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )


# --- what encode computes ---


def by_definition(sae, z):
    """Features of z, each token's in rational arithmetic from its float64 activations."""
    centered = (z - sae.b_dec).detach()
    acts = (centered @ sae.W_enc + sae.b_enc).detach()
    W_dec, norms = sae.W_dec.detach().tolist(), sae.W_dec.detach().norm(dim=-1)
    expected = torch.zeros_like(acts)
    for row, (a, y) in enumerate(zip(acts, centered, strict=True)):
        if isinstance(sae, ConstantQualitySAE | ConstantQualityTrainingSAE):
            kept, _ = explained_exactly(
                a.tolist(), y.tolist(), W_dec, sae.cfg.explained, sae.cfg.max_k or 16
            )
        else:
            proposed = kept_exactly((a * norms).tolist(), y.norm().item())
            offered = torch.zeros_like(a)
            offered[proposed] = a[proposed]
            kept, _ = left_one_out_exactly(
                offered.tolist(), y.tolist(), W_dec, float(sae.price), sae.cfg.leniency
            )
            by_score = sorted(range(len(a)), key=lambda i: -float(a[i] * norms[i]))
            kept = {*kept, *(i for i in by_score[: sae.cfg.min_k] if a[i] > 0)}
            kept = [i for i in by_score if i in kept][: sae.cfg.max_k]
        expected[row, kept] = a[kept]
    return expected


@pytest.mark.parametrize("make", [training_sae, inference_sae])
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("sparse_topafa", {"max_k": None}),
        ("sparse_topafa", {"leniency": 0.0}),
        ("sparse_topafa", {"leniency": 1.0}),
        ("sparse_topafa", {"min_k": 2, "max_k": 4}),
        ("constant_quality", {"explained": 0.6}),
        ("constant_quality", {"explained": 0.9, "max_k": 11}),
    ],
    indirect=False,
)
def test_encode_and_decode_follow_the_definition(make, architecture, fields):
    sae = make(architecture, normalize_activations="none", dtype="float64", **fields)
    x = torch.randn(12, 16, dtype=torch.float64) * 3
    expected = by_definition(sae, x)
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        sae.decode(expected), expected @ sae.W_dec + sae.b_dec, rtol=1e-12, atol=1e-12
    )
    l0 = (expected != 0).sum(-1)
    assert l0.min() < l0.max() <= (fields.get("max_k") or 63)
    assert l0.min() >= fields.get("min_k", 0)


def test_never_more_than_the_norm_proposes():
    sae = training_sae("sparse_topafa", normalize_activations="none", max_k=None)
    x = torch.randn(100, 16) * 3
    y = x - sae.b_dec
    proposed = top_afa(y @ sae.W_enc + sae.b_enc, y.norm(dim=-1), sae.W_dec.norm(dim=-1))
    f = sae.encode(x)
    assert ((f != 0) <= (proposed != 0)).all()
    assert 0 < (f != 0).sum() < (proposed != 0).sum()
    with torch.no_grad():
        sae.price.zero_()
    assert (f != 0).sum() < (sae.encode(x) != 0).sum()


def test_any_leading_shape_and_a_bad_token_stays_alone(architecture):
    sae = inference_sae(architecture)
    x = torch.randn(3, 5, 16)
    clean = sae(x)
    x[1, 2, 3] = torch.nan
    out = sae(x)
    assert out[1, 2].isnan().all()
    rest = torch.ones(3, 5, dtype=torch.bool)
    rest[1, 2] = False
    torch.testing.assert_close(out[rest], clean[rest])


def test_a_token_has_the_same_features_in_any_company(architecture):
    sae = inference_sae(architecture)
    x = torch.randn(20, 16)
    alone = torch.cat([sae.encode(row[None]) for row in x])
    assert torch.equal(sae.encode(x) != 0, alone != 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(architecture, dtype):
    sae = inference_sae(architecture, dtype=dtype, normalize_activations="none")
    x = torch.randn(20, 16, dtype=sae.dtype)
    f = sae.encode(x)
    assert f.dtype == sae.dtype
    assert sae(x).isfinite().all()
    assert 0 < f.count_nonzero() < f.numel() / 3


def test_meta_device(architecture):
    cls = CLASSES[architecture][0]
    config = SAEConfig.from_dict(
        {"architecture": architecture, "d_in": 16, "d_sae": 64, "device": "meta"}
    )
    assert cls(config)(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 16)


# --- configs by name ---


def test_training_config_round_trip(architecture):
    own = {
        "sparse_topafa": {
            "price": 0.7, "price_warm_up_steps": 3, "target_l0": 9.5, "leniency": 0.25, "min_k": 2, "max_k": 30,
        },
        "constant_quality": {"explained": 0.7, "max_k": 30},
    }[architecture]  # fmt: skip
    cfg = training_sae(architecture, **own, train_encoder_bias=True, top_k_aux=3).cfg
    again = TrainingSAEConfig.from_dict(cfg.to_dict())
    assert again == cfg
    assert {name: getattr(again, name) for name in own} == own
    inference = SAEConfig.from_dict(cfg.get_inference_sae_cfg_dict())
    assert type(inference) is type(inference_sae(architecture).cfg)
    assert inference.max_k == 30
    assert getattr(inference, "leniency", None) == own.get("leniency")
    details = inference.metadata.training_architecture_details
    assert {**own, **details} == details | {k: v for k, v in own.items() if k not in details}
    assert SAEConfig.from_dict(inference.to_dict()) == inference


def test_by_name_nothing_has_to_be_set(architecture):
    cfg = TrainingSAEConfig.from_dict({"architecture": architecture, "d_in": 8, "d_sae": 32})
    assert (cfg.afa_coefficient, cfg.max_k, cfg.normalize_activations) == (0.0, None, "layer_norm")
    logger = LoggingConfig(log_to_wandb=False)
    runner = LanguageModelSAERunnerConfig(sae=cfg, logger=logger, verbose=False)
    again = LanguageModelSAERunnerConfig.from_dict(
        {k: v for k, v in runner.to_dict().items() if k != "tokens_per_buffer"}
    )
    assert again.sae == cfg
    multi = MultiSAETrainingRunnerConfig(saes={"a": cfg}, hook_names="h", logger=logger)
    assert multi.to_dict()["saes"]["a"]["architecture"] == architecture


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("sparse_topafa", {"price": -1}, "price must not be negative: got -1"),
        ("sparse_topafa", {"target_l0": 0}, "target_l0 must be more than 0: got 0"),
        ("sparse_topafa", {"max_k": 0}, "max_k must be at least 1: got 0"),
        ("sparse_topafa", {"min_k": 1.5}, "min_k must be a whole number: got 1.5"),
        ("sparse_topafa", {"leniency": 1.5}, "leniency is a number between 0 and 1: got 1.5"),
        ("sparse_topafa", {"leniency": -0.5}, "leniency must not be negative: got -0.5"),
        (
            "sparse_topafa", {"min_k": 9, "max_k": 8},
            "min_k must be at most max_k: got min_k=9 and max_k=8",
        ),
        ("constant_quality", {"explained": 1}, "explained must be below 1: got 1"),
        ("constant_quality", {"explained": 0}, "explained must be more than 0: got 0"),
        ("constant_quality", {"explained": "90 %"}, "explained must be a number: got '90 %'"),
        (
            "constant_quality", {"apply_b_dec_to_input": False},
            "constant_quality needs apply_b_dec_to_input=True",
        ),
    ],
)  # fmt: skip
def test_refused_configs(architecture, fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        training_sae(architecture, **fields)


# --- folds ---


@pytest.mark.parametrize("make", [training_sae, inference_sae])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_folding_decoder_norms_changes_nothing(architecture, make, normalize):
    sae = make(architecture, normalize_activations=normalize, dtype="float64")
    with torch.no_grad():
        sae.W_dec *= torch.rand(64, 1, dtype=torch.float64) * 3 + 0.2
    x = torch.randn(100, 16, dtype=torch.float64)
    before, out = sae.encode(x), sae(x)
    norms = sae.W_dec.norm(dim=-1)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.encode(x), before * norms, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sae(x), out, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [training_sae, inference_sae])
def test_folding_the_norm_scaling_factor_changes_nothing(architecture, make):
    sae = make(architecture, normalize_activations="expected_average_only_in", dtype="float64")
    x, factor = torch.randn(100, 16, dtype=torch.float64) * 40, 0.123
    features, out = sae.encode(x * factor), sae(x * factor) / factor
    sae.fold_activation_norm_scaling_factor(factor)
    torch.testing.assert_close(sae.encode(x), features, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sae(x), out, rtol=1e-10, atol=1e-10)


# --- saving ---


def test_checkpoint_round_trip(architecture, tmp_path):
    sae = training_sae(architecture, train_encoder_bias=True)
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert type(again) is type(sae)
    assert again.cfg == sae.cfg
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_inference_export_computes_the_same(architecture, tmp_path):
    sae = training_sae(architecture, dtype="float64")
    with torch.no_grad():
        sae.W_dec *= torch.rand(64, 1, dtype=torch.float64) + 0.5
    kept = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.save_inference_model(tmp_path)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, kept[name]), "saving must not change the SAE"
    exported = SAE.load_from_disk(tmp_path)
    assert type(exported) is CLASSES[architecture][0]
    x = torch.randn(100, 16, dtype=torch.float64)
    torch.testing.assert_close(exported(x), sae(x), rtol=1e-10, atol=1e-10)
    assert exported.cfg.metadata.training_architecture == architecture
    half = SAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert half.W_enc.dtype == torch.bfloat16
    assert half(x.bfloat16()).isfinite().all()


def test_the_error_term_leaves_a_model_as_it_is(architecture):
    model = tiny_hooked_sae_transformer()
    tokens = torch.randint(0, 50, (2, 7))
    sae = inference_sae(architecture)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    original = model(tokens)
    with model.saes(saes=[sae], use_error_term=True):
        torch.testing.assert_close(model(tokens), original, rtol=1e-4, atol=1e-4)
    spliced = model.run_with_saes(tokens, saes=[sae])
    assert not torch.allclose(spliced, original, atol=1e-3)


# --- training ---


def test_the_price_is_a_multiple_of_the_noise(monkeypatch):
    sae = training_sae("sparse_topafa", normalize_activations="none", seed=3)
    torch.manual_seed(0)
    residual, energy = 0.1, 0.9
    for price, least in ((0.0, 0.07), (0.2, 0.07), (0.5, 0.3), (0.2, 0.3)):
        monkeypatch.setattr(sparse_topafa, "_LEAST_NOISE", least)  # below and above the residual
        x = torch.randn(30, 16)
        out = sae.training_forward_pass(step_input(x, price=price))
        in_use = price * 2 * math.log(64) * max(residual, least * energy)
        assert sae.price.item() == pytest.approx(in_use, rel=1e-5)
        assert float(out.metrics["price"]) == pytest.approx(in_use, rel=1e-5)
        assert torch.equal(out.feature_acts, sae.encode(x))
        residual += 0.01 * ((out.sae_out - x).square().mean().item() - residual)
        energy += 0.01 * ((x - sae.b_dec).square().mean().item() - energy)
        assert sae.running_residual.item() == pytest.approx(residual, rel=1e-5)
        assert sae.running_energy.item() == pytest.approx(energy, rel=1e-5)


def test_the_price_is_a_schedule_of_saelens():
    sae = training_sae("sparse_topafa", price=0.7, price_warm_up_steps=5)
    assert sae.get_coefficients()["price"] == (0.7, 5)


def test_gradient_of_the_loss(architecture):
    sae = training_sae(
        architecture, d_in=6, d_sae=20, dtype="float64", normalize_activations="none", top_k_aux=2
    )
    x = torch.randn(2, 6, dtype=torch.float64)
    dead = torch.arange(20) < 5
    sae.W_dec.requires_grad_(False)  # its hook would change it
    before = {name: buffer.clone() for name, buffer in sae.named_buffers()}

    def loss(W_enc, b_dec):
        for name, buffer in sae.named_buffers():  # the price moves with every step
            buffer.copy_(before[name])
        parts = {"sae.W_enc": W_enc, "sae.b_dec": b_dec}
        return torch.func.functional_call(_Loss(sae), parts, (x, dead))

    inputs = (sae.W_enc.detach().requires_grad_(), sae.b_dec.detach().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6)


class _Loss(torch.nn.Module):
    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x, dead):
        return self.sae.training_forward_pass(step_input(x, dead)).loss


def test_the_training_step_compiles_without_graph_breaks(architecture):
    fields = {"target_l0": 5.0} if architecture == "sparse_topafa" else {}
    x, mask = torch.randn(40, 16), torch.arange(64) < 9
    eager, compiled = (training_sae(architecture, top_k_aux=4, **fields) for _ in range(2))
    step = torch.compile(compiled.training_forward_pass, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        expected = eager.training_forward_pass(step_input(x, mask))
        expected.loss.backward()
        out = step(step_input(x, mask))
        out.loss.backward()
        torch.testing.assert_close(out.loss, expected.loss)
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor)
    for name in ("W_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(
            getattr(compiled, name).grad, getattr(eager, name).grad, rtol=1e-4, atol=1e-5
        )


def test_autocast(architecture):
    sae = training_sae(architecture, top_k_aux=4)
    x, dead = torch.randn(40, 16), torch.arange(64) < 9
    exact = copy.deepcopy(sae).training_forward_pass(step_input(x, dead))
    with torch.autocast("cpu", torch.bfloat16):
        out = sae.training_forward_pass(step_input(x, dead))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.1)
    assert sae.W_enc.grad.isfinite().all()


def test_tokens_that_are_not_finite_are_left_out(architecture):
    fields = {"target_l0": 5.0} if architecture == "sparse_topafa" else {}
    sae, other = (training_sae(architecture, **fields) for _ in range(2))
    x = torch.randn(20, 16)
    with pytest.warns(UserWarning, match="2 tokens of the training of"):
        sae.training_forward_pass(
            step_input(torch.cat([x, torch.full((2, 16), torch.nan)]))
        ).loss.backward()
    other.training_forward_pass(step_input(x)).loss.backward()
    torch.testing.assert_close(sae.W_enc.grad, other.W_enc.grad)
    torch.testing.assert_close(sae.W_dec.grad, other.W_dec.grad)
    for name, buffer in other.named_buffers():
        if "left_out" not in name:
            torch.testing.assert_close(sae.get_buffer(name), buffer)


def test_building_warns_about_nothing(architecture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_sae(architecture)
        inference_sae(architecture)


# --- trained on a small world ---


def batches(steps, batch=256, seed=0, d=32, h=48):
    """Few of h directions at a time, with positive coefficients."""
    torch.manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(h, d), dim=-1)
    return [
        ((torch.rand(batch, h) < 4 / h) * (1 + 0.2 * torch.randn(batch, h)).clamp(min=0.2))
        @ directions
        for _ in range(steps)
    ]


def fit(sae, data):
    cfg = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
        total_training_samples=len(data) * len(data[0]), device="cpu", autocast=False, lr=3e-3,
        lr_end=3e-4, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9,
        adam_beta2=0.99, lr_decay_steps=len(data) // 5, n_restart_cycles=1,
        train_batch_size_samples=len(data[0]), dead_feature_window=100,
        feature_sampling_window=10**6, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    SAETrainer(cfg, sae, iter(data)).fit()
    return sae


def mean_l0_and_nmse(sae, x):
    f = sae.encode(x)
    error = (sae.decode(f) - x).square().sum(-1) / x.square().sum(-1)
    return (f != 0).sum(-1).float().mean().item(), error


def test_sparse_topafa_finds_how_many_are_on():
    """Told nothing, about 4 of 48; as published, the rule settles at dozens."""
    data = batches(700)
    sae = training_sae("sparse_topafa", d_in=32, d_sae=48, normalize_activations="none", max_k=None)
    l0, _ = mean_l0_and_nmse(fit(sae, data), data[-1])
    assert 3 < l0 < 7
    torch.manual_seed(0)
    cfg = TopAFATrainingSAEConfig(d_in=32, d_sae=48, normalize_activations="none")
    l0, _ = mean_l0_and_nmse(fit(TopAFATrainingSAE(cfg), data), data[-1])
    assert l0 > 20


def test_a_wanted_l0_is_steered_to():
    data = batches(700)
    sae = training_sae(
        "sparse_topafa", d_in=32, d_sae=48, normalize_activations="none", target_l0=2.5
    )
    l0, _ = mean_l0_and_nmse(fit(sae, data), data[-1])
    assert l0 == pytest.approx(2.5, rel=0.1)
    assert sae.price_factor > 1


def test_constant_quality_holds_the_quality_and_l0_falls():
    data = batches(700)
    sae = training_sae(
        "constant_quality", d_in=32, d_sae=48, normalize_activations="none", explained=0.7
    )
    before, _ = mean_l0_and_nmse(fit(sae, data[:100]), data[-1])
    after, error = mean_l0_and_nmse(fit(sae, data), data[-1])
    assert after < before / 2
    assert (error > 0.3 + 1e-4).float().mean() < 0.1


def test_a_share_that_makes_it_dense_is_said_once():
    data = batches(1010)
    sae = training_sae("constant_quality", d_in=32, d_sae=48, explained=0.9999)
    with pytest.warns(
        UserWarning, match=r"keeps \d+ features of a token to explain 0.9999"
    ) as said:
        fit(sae, data)
    assert len([w for w in said if "constant_quality" in str(w.message)]) == 1
