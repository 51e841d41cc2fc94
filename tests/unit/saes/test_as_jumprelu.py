"""as_jumprelu: SAELens's JumpReLU with thresholds at which features are on as often."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.saes import unlike_new
from sae_lens import SAE, SAEConfig, TopKSAE, TopKSAEConfig, TrainingSAE, TrainingSAEConfig

from sae_afa_plugin import as_jumprelu

RULES = {"topafa": {}, "sparse_topafa": {"leniency": 0.0}, "constant_quality": {"explained": 0.6}}


def sae_of(architecture, seed=0, **fields):
    torch.manual_seed(seed)
    given = {"architecture": architecture, "d_in": 16, "d_sae": 64, **RULES[architecture], **fields}
    return unlike_new(SAE.from_dict(SAEConfig.from_dict(given).to_dict()))


@pytest.fixture(params=RULES)
def architecture(request):
    return request.param


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_each_feature_is_on_as_often_and_with_the_same_value(architecture, normalize):
    sae = sae_of(architecture, normalize_activations=normalize)
    x = 3 * torch.randn(501, 16)
    fast = as_jumprelu(sae, x, batch_size=100)
    assert fast.cfg.architecture() == "jumprelu"
    exact, acts = sae.encode(x), fast.encode(x)
    assert (exact > 0).sum(0).tolist() == (acts > 0).sum(0).tolist()
    assert not torch.equal(exact > 0, acts > 0)  # or nothing would be shown
    both = (exact > 0) & (acts > 0)
    torch.testing.assert_close(acts[both], exact[both])
    torch.testing.assert_close(fast.decode(exact), sae.decode(exact))


def test_thresholds_lie_between_the_last_that_is_on_and_the_first_that_is_not(architecture):
    sae = sae_of(architecture, normalize_activations="none", dtype="float64")
    with torch.no_grad():  # never on: one with values too small for a residual, one with none
        sae.W_enc[:, 3] *= 1e-5
        sae.b_enc[3], sae.b_enc[9] = 1e-6, -1000
    x = 3 * torch.randn(40, 16, dtype=torch.float64)
    acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    fast, on = as_jumprelu(sae, x), sae.encode(x) > 0
    for feature in range(64):
        ordered = sorted((max(float(a), 0.0) for a in acts[:, feature]), reverse=True)
        count = int(on[:, feature].sum())
        expected = (ordered[count - 1] + ordered[count]) / 2 if count else 1.01 * ordered[0]
        assert fast.threshold[feature].item() == pytest.approx(expected, rel=1e-9)
    assert (fast.encode(x) > 0).sum(0).tolist() == on.sum(0).tolist()
    never = (on.sum(0) == 0).nonzero().flatten().tolist()
    assert 9 in never
    assert (3 in never) == (architecture != "topafa")


def test_a_feature_that_is_always_on_has_a_threshold_below_its_smallest_value():
    sae = sae_of("topafa", normalize_activations="none")
    with torch.no_grad():
        sae.b_enc[5] = 1000.0  # the largest of every token
    x = torch.randn(30, 16)
    fast = as_jumprelu(sae, x)
    assert (fast.encode(x)[:, 5] > 0).all()
    assert 0 < fast.threshold[5] < sae.encode(x)[:, 5].min()


def test_rows_that_are_not_finite_have_no_part_in_it(architecture):
    sae = sae_of(architecture)
    x = torch.randn(100, 16)
    expected = as_jumprelu(sae, x).threshold
    bad = x.new_tensor([torch.nan, torch.inf])[:, None].expand(2, 16)
    with_bad = torch.cat([bad, x[:50], bad, x[50:]])
    torch.testing.assert_close(as_jumprelu(sae, with_bad, batch_size=7).threshold, expected)
    with pytest.raises(ValueError, match="all activations of a batch are NaN or infinite"):
        as_jumprelu(sae, bad)
    with pytest.raises(ValueError, match="all activations"):
        as_jumprelu(sae, x[:0])


def test_heads_are_flattened_as_for_the_sae_itself():
    sae = sae_of("sparse_topafa", reshape_activations="hook_z")
    x = torch.randn(60, 4, 4)
    fast = as_jumprelu(sae, x)
    assert (fast.encode(x) > 0).sum(0).tolist() == (sae.encode(x) > 0).sum(0).tolist()
    assert fast(x).shape == x.shape


def test_it_is_saved_and_loaded_as_saelens_own_with_its_metadata(architecture, tmp_path):
    sae = sae_of(architecture)
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_pre"
    x = torch.randn(50, 16)
    fast = as_jumprelu(sae, x)
    fast.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded).__name__ == "JumpReLUSAE"
    torch.testing.assert_close(loaded.encode(x), fast.encode(x))
    assert loaded.cfg.metadata.hook_name == "blocks.3.hook_resid_pre"
    fast.cfg.metadata.hook_name = "another"
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_pre"  # nothing is shared


def test_nothing_of_the_sae_changes_and_no_weights_are_shared(architecture):
    sae = sae_of(architecture)
    before = copy.deepcopy(sae.state_dict())
    fast = as_jumprelu(sae, torch.randn(50, 16))
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(1)
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_folding_the_rows_before_or_after_makes_the_same_sae(architecture):
    sae, x = sae_of(architecture, normalize_activations="none"), torch.randn(300, 16)
    fast = as_jumprelu(sae, x)
    fast.fold_W_dec_norm()
    sae.fold_W_dec_norm()
    torch.testing.assert_close(as_jumprelu(sae, x).threshold, fast.threshold)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_keeps_the_dtype_and_nearly_the_frequencies(architecture, dtype):
    sae, x = sae_of(architecture, dtype=dtype), torch.randn(2000, 16)
    x = x.to(sae.dtype)
    fast = as_jumprelu(sae, x)
    assert {p.dtype for p in fast.parameters()} == {sae.dtype}
    exact = (sae.encode(x) > 0).float().mean(0)
    assert ((fast.encode(x) > 0).float().mean(0) - exact).abs().max() < 0.02


def test_other_saes_are_refused_in_words():
    with pytest.raises(ValueError, match="got TopKSAE"):
        as_jumprelu(TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2)), torch.randn(3, 4))
    cfg = TrainingSAEConfig.from_dict({"architecture": "topafa", "d_in": 4, "d_sae": 8})
    with pytest.raises(ValueError, match="save_inference_model makes one of a training SAE"):
        as_jumprelu(TrainingSAE.from_dict(cfg.to_dict()), torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"d_in=16, but the activations have shape \(3, 4\)"):
        as_jumprelu(sae_of("topafa"), torch.randn(3, 4))
