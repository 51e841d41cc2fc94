"""Tokens that are not finite take no part in training; weights that are not are not saved."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import replace

import pytest
import torch
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput

from sae_afa_plugin import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)

BAD = {3: torch.nan, 17: torch.inf, 18: -torch.inf, 29: torch.nan}


def new_sae(**fields):
    torch.manual_seed(0)
    sae = TopAFATrainingSAE(
        TopAFATrainingSAEConfig(
            **{"d_in": 16, "d_sae": 64, "top_k_aux": 4, "normalize_activations": "none", **fields}
        )
    )
    with torch.no_grad():
        sae.b_dec += 0.1 * torch.randn_like(sae.b_dec)
        sae.b_enc += 0.1 * torch.randn_like(sae.b_enc)
    return sae


def batch(dtype=torch.float64):
    x = torch.randn(40, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
    bad = x.clone()
    for row, value in BAD.items():
        bad[row, 5] = value
    return x[[row not in BAD for row in range(40)]], bad


def step_input(x, dead=True):
    return TrainStepInput(
        sae_in=x,
        coefficients={"afa": 1 / 32},
        dead_neuron_mask=torch.arange(64) < 9 if dead else None,
        n_training_steps=0,
        is_logging_step=False,
    )


def gradients(sae):
    return {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_step_is_the_one_without_the_tokens_that_are_not_finite(normalize, bias):
    """In float64: tolerance 1e-12, of sums in another order."""
    fields = {"dtype": "float64", "normalize_activations": normalize, "train_encoder_bias": bias}
    finite, bad = batch()
    # dead features are those that reconstruct, with a bias also where the input is zero
    expected = new_sae(**fields)
    without = expected.training_forward_pass(step_input(finite))
    without.loss.backward()
    sae = new_sae(**fields)
    with pytest.warns(UserWarning, match="4 tokens of the training of this topafa SAE had values"):
        out = sae.training_forward_pass(step_input(bad))
    out.loss.backward()
    for name, loss in without.losses.items():
        torch.testing.assert_close(out.losses[name], loss, rtol=1e-12, atol=0)
    found = gradients(sae)
    assert found.keys() == gradients(expected).keys()
    for name, grad in gradients(expected).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-11, atol=1e-12, msg=name)
    kept = torch.tensor([row not in BAD for row in range(40)])
    torch.testing.assert_close(out.feature_acts[kept], without.feature_acts)
    values = {name: float(metric()) for name, metric in out.metrics.items()}
    others = {name: float(metric()) for name, metric in without.metrics.items()}
    assert (values.pop("non_finite_tokens"), others.pop("non_finite_tokens")) == (4, 0)
    assert values == pytest.approx(others, rel=1e-9)


def test_a_token_that_its_normalisation_makes_nan_is_left_out():
    sae = new_sae(normalize_activations="constant_norm_rescale")
    x = torch.randn(5, 16)
    x[2] = 0  # 0 / 0
    with pytest.warns(UserWarning, match="1 token of the training"):
        sae.training_forward_pass(step_input(x)).loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(sae).values())


def test_a_token_whose_squared_norm_overflows_is_left_out():
    sae, finite = new_sae(), batch(torch.float32)[0].clone()
    finite[7, 3] = 1e25
    with pytest.warns(UserWarning, match="1 token of the training"):
        out = sae.training_forward_pass(step_input(finite))
    assert out.loss.isfinite()


def test_it_is_said_once_and_counted_on(recwarn):
    sae, (finite, bad) = new_sae(), batch(torch.float32)
    for x in (finite, bad, finite, bad):
        out = sae.training_forward_pass(step_input(x))
    assert len([w for w in recwarn if "NaN or infinite" in str(w.message)]) == 1
    assert float(out.metrics["non_finite_tokens"]()) == 8
    assert "left_out.count" not in sae.state_dict()


def test_where_all_tokens_are_left_out_the_weights_get_no_gradient():
    sae = new_sae()
    with torch.no_grad():
        sae.b_enc.zero_()
    with pytest.warns(UserWarning, match="40 tokens"):
        out = sae.training_forward_pass(step_input(torch.full((40, 16), torch.nan)))
    out.loss.backward()
    assert not out.feature_acts.any()  # they fire nothing
    assert not any(grad.any() for grad in gradients(sae).values())
    assert all(torch.tensor(float(metric())).numel() for metric in out.metrics.values())


def test_compiled_without_graph_breaks_it_is_the_same():
    finite, bad = batch(torch.float32)
    expected, sae = new_sae(), new_sae()
    expected.training_forward_pass(step_input(finite)).loss.backward()
    step = torch.compile(sae.training_forward_pass, fullgraph=True, backend="aot_eager")
    for n in (4, 8):
        sae.zero_grad()
        out = step(step_input(bad))
        out.loss.backward()
        assert float(out.metrics["non_finite_tokens"]()) == n
        for name in ("W_enc", "b_dec"):
            torch.testing.assert_close(
                gradients(sae)[name], gradients(expected)[name], rtol=1e-4, atol=1e-5
            )
        with torch.no_grad():
            sae.W_dec.copy_(expected.W_dec)
    with pytest.warns(UserWarning, match="8 tokens"):
        sae.train()  # which trainers call before the next step


def test_autocast_keeps_weights_finite():
    sae, (_, bad) = new_sae(), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="4 tokens"):
        out = sae.training_forward_pass(step_input(bad))
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(sae).values())


def test_saelens_own_trainer_gives_an_sae_that_works(tmp_path):
    sae, (finite, bad) = new_sae(), batch(torch.float32)
    trainer = SAETrainer(SAETrainerConfig(20 * 40, 40, lr_end=1e-4), sae, iter([bad] * 20))
    with pytest.warns(UserWarning, match="4 tokens"):
        trainer.fit()
    sae.save_inference_model(tmp_path)
    out = TopAFASAE.load_from_disk(tmp_path)(finite)
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", [TopAFATrainingSAE, TopAFASAE])
def test_features_of_an_input_that_is_not_finite_stay_nan(kind):
    cfg = TopAFASAEConfig if kind is TopAFASAE else TopAFATrainingSAEConfig
    out = kind(cfg(d_in=16, d_sae=64)).encode(batch(torch.float32)[1])
    assert out.isnan().all(-1).tolist() == [row in BAD for row in range(40)]


@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_saved(save, bad, tmp_path):
    sae = new_sae()
    getattr(sae, save)(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        sae.W_enc[3, 4:6] = bad
    with pytest.raises(ValueError, match="2 of 1024 values of W_enc are NaN or infinite"):
        getattr(sae, save)(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_inference_sae_that_is_not_finite_is_not_saved(tmp_path):
    sae = TopAFASAE(TopAFASAEConfig(d_in=16, d_sae=64))
    sae.b_dec.data[0] = torch.nan
    with pytest.raises(ValueError, match="1 of 16 values of b_dec"):
        sae.save_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_whose_norms_overflow_when_they_are_folded_are_not_saved(tmp_path):
    sae = new_sae(dtype="float16")
    with torch.no_grad():
        sae.W_dec[0] *= 3000
        sae.W_enc[0, 0] = 60000
    with pytest.raises(ValueError, match="1 of 1024 values of W_enc"):
        sae.save_inference_model(tmp_path)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 0.0, -1.0])
def test_a_factor_that_is_no_positive_number_is_not_folded(factor):
    sae = new_sae()
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(ValueError, match="which cannot be folded into weights"):
        sae.fold_activation_norm_scaling_factor(factor)
    assert all(torch.equal(before[name], w) for name, w in sae.state_dict().items())


# --- copies ---


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale", "none"])
def test_a_copy_knows_nothing_of_what_it_was_copied_from(how, compiled, normalize):
    sae = new_sae(normalize_activations=normalize)
    if compiled:  # as SAELens's runner does it
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="eager")
    if how == "deepcopy":
        other = copy.deepcopy(sae)
    else:
        file = io.BytesIO()
        torch.save(sae, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x, attributes = batch(torch.float32)[0], dict(vars(sae))
    other.train()
    out = other.training_forward_pass(step_input(x))
    expected = sae.training_forward_pass(step_input(x)).loss
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert not gradients(sae)
    assert set(gradients(other)) >= {"W_enc", "W_dec", "b_dec"}
    other.encode(x)  # leaves the mean on the one that encodes
    assert vars(sae).keys() == attributes.keys()


def test_a_copy_for_heads_flattens_them_as_before():
    torch.manual_seed(0)
    cfg = TopAFASAEConfig(d_in=16, d_sae=64, reshape_activations="hook_z")
    sae = TopAFASAE(replace(cfg))
    x = torch.randn(5, 4, 4)
    expected = sae(x)
    other = copy.deepcopy(sae)
    acts = other.encode(torch.randn(3, 2, 8))
    assert other.decode(acts).shape == (3, 2, 8)
    assert torch.equal(sae.decode(sae.encode(x)), expected)
    assert torch.equal(copy.deepcopy(sae)(x), expected)


def test_a_finite_batch_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new_sae().training_forward_pass(step_input(batch(torch.float32)[0]))
