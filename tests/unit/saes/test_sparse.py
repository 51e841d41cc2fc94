"""Decoding few features: the loops against dense products in float64."""

from __future__ import annotations

import pytest
import torch

from sae_afa_plugin.rules import numba_kernel
from sae_afa_plugin.saes import sparse
from sae_afa_plugin.saes.topafa import TopAFATrainingSAE, TopAFATrainingSAEConfig


@pytest.fixture
def loops_called(monkeypatch):
    """Which loops ran, in their order."""
    called = []
    run = sparse._run
    monkeypatch.setattr(sparse, "_run", lambda loop, *args: (called.append(loop), run(loop, *args)))
    return called


def _few(*shape, share=0.01, seed=0):
    rng = torch.Generator().manual_seed(seed)
    acts = torch.randn(*shape, generator=rng)
    return torch.where(torch.rand(*shape, generator=rng) < share, acts, 0)


@pytest.mark.parametrize("shape", [(1000,), (1, 1000), (70, 1000), (5, 14, 1000)])
def test_products_and_gradients(shape, loops_called):
    acts = _few(*shape).requires_grad_()
    W_dec = torch.randn(24, 1000).T.requires_grad_()  # not contiguous
    weights = torch.randn(*shape[:-1], 24)
    out = sparse.decode(acts, W_dec, zeros_stay_zero=True)
    grad_acts, grad_W = torch.autograd.grad((out * weights).sum(), (acts, W_dec))
    assert loops_called == [0, 1, 2]

    exact_acts = acts.detach().double().requires_grad_()
    exact_W = W_dec.detach().double().requires_grad_()
    expected = exact_acts @ exact_W
    wanted = torch.autograd.grad((expected * weights).sum(), (exact_acts, exact_W))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    kept = torch.where(exact_acts != 0, wanted[0], 0)
    torch.testing.assert_close(grad_acts.double(), kept, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_W.double(), wanted[1], atol=1e-5, rtol=1e-5)


def test_features_that_are_zero_keep_their_gradient_unless_it_is_declined(loops_called):
    acts, W_dec = _few(20, 500).requires_grad_(), torch.randn(500, 8)
    (grad,) = torch.autograd.grad(sparse.decode(acts, W_dec).sum(), acts)
    torch.testing.assert_close(grad, W_dec.sum(-1).expand(20, -1))
    assert loops_called == []
    with torch.no_grad():
        sparse.decode(acts, W_dec)
    assert loops_called == [0]


def test_nan_stays_in_its_row():
    acts = _few(6, 500)
    acts[2, 7] = torch.nan
    out = sparse.decode(acts, torch.randn(500, 8))
    assert out.isnan().all(-1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("case", ["many features", "float64", "autocast", "no Numba", "no tokens"])
def test_where_it_is_the_dense_product(case, monkeypatch, loops_called):
    acts, W_dec = _few(20, 500, share=0.5 if case == "many features" else 0.01), torch.randn(500, 8)
    if case == "no Numba":
        monkeypatch.setattr(sparse, "_loops", lambda: None)
    if case == "float64":
        acts, W_dec = acts.double(), W_dec.double()
    if case == "no tokens":
        acts = acts[:0]
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(sparse.decode(acts, W_dec), acts @ W_dec)
    assert loops_called == []


@pytest.mark.parametrize("width", [399, 401, 0])
@pytest.mark.parametrize("zeros_stay_zero", [True, False])
def test_what_does_not_fit_is_refused_as_by_the_dense_product(width, zeros_stay_zero):
    acts = torch.zeros(2, width)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sparse.decode(acts, torch.randn(400, 8), zeros_stay_zero)


def test_forward_mode_is_left_to_the_dense_product():
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.zeros(2, 300), torch.ones(2, 300))
        tangent = forward_ad.unpack_dual(sparse.decode(dual, torch.ones(300, 4))).tangent
    assert torch.equal(tangent, torch.full((2, 4), 300.0))


def test_tokens_at_one_position_do_not_stand_for_all():
    acts = torch.randn(64, 16, 500)
    acts[:, 0] = 0.0  # BOS, say
    assert not sparse._are_few(acts)


def test_under_transforms_and_in_inference_mode():
    acts, W_dec = _few(20, 500), torch.randn(500, 8)
    expected = acts @ W_dec
    torch.testing.assert_close(torch.func.vmap(lambda a: sparse.decode(a, W_dec))(acts), expected)
    with torch.inference_mode():
        torch.testing.assert_close(sparse.decode(acts, W_dec), expected, atol=1e-5, rtol=1e-5)


def test_without_numba_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(sparse, "compile_kernel", lambda *args, **options: None)
    assert sparse._loops.__wrapped__() is None
    assert numba_kernel.compiled(2) is not None


# --- in a training step ---


def _sae_and_step(few: bool):
    torch.manual_seed(0)
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(d_in=16, d_sae=2048))
    with torch.no_grad():
        # large pre-activations, so that few of them make up the norm
        sae.W_enc.mul_(8 if few else 1)
        sae.b_dec.normal_(std=0.3)
    x = torch.randn(60, 16)

    def gradients(x=x):
        from sae_lens.saes.sae import TrainStepInput

        sae.zero_grad()
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                coefficients={"afa": 1 / 32},
                dead_neuron_mask=torch.arange(2048) % 5 == 0,
                n_training_steps=1,
                is_logging_step=False,
            )
        )
        out.loss.backward()
        return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}

    return sae, x, gradients


def test_a_training_step_has_the_same_gradients(monkeypatch, loops_called):
    _, _, gradients = _sae_and_step(few=True)
    with_loops = gradients()
    assert loops_called == [0, 1, 2]
    monkeypatch.setattr(sparse, "_loops", lambda: None)
    without = gradients()
    assert with_loops.keys() == without.keys() == {"W_enc", "W_dec", "b_dec"}
    for name, grad in without.items():
        torch.testing.assert_close(with_loops[name], grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("few", [True, False])
def test_b_dec_has_the_gradient_that_it_has_through_the_input(few):
    _, x, gradients = _sae_and_step(few)
    short = gradients()
    through_input = gradients(x.clone().requires_grad_())
    assert short["b_dec"].abs().max() > 1e-3
    for name, grad in through_input.items():
        torch.testing.assert_close(short[name], grad, atol=1e-4, rtol=1e-4)


def test_a_hook_on_the_input_sees_its_gradient():
    sae, _, gradients = _sae_and_step(few=True)
    offset = torch.zeros(16, requires_grad=True)
    sae.hook_sae_input.add_hook(lambda tensor, hook: tensor + offset)
    gradients()
    assert (offset.grad != 0).any()


def test_a_hook_on_the_features_sees_every_gradient(loops_called):
    sae, _, gradients = _sae_and_step(few=True)
    seen = []
    sae.hook_sae_acts_post.add_hook(lambda grad, hook: seen.append(grad), dir="bwd")
    gradients()
    assert loops_called == []
    assert (seen[0] != 0).float().mean() > 0.9


def test_a_hook_of_pytorch_on_the_features_sees_every_gradient(loops_called):
    sae, _, gradients = _sae_and_step(few=True)
    extra = torch.zeros(60, 2048, requires_grad=True)
    sae.hook_sae_acts_post.register_forward_hook(lambda module, args, out: out + extra)
    gradients()
    assert loops_called == []
    assert (extra.grad != 0).float().mean() > 0.9
