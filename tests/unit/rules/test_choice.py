"""What PyTorch is told of the rules that look at the residual, whatever computes them."""

from __future__ import annotations

import pytest
import torch

from sae_afa_plugin import keep_until_explained, leave_one_out, top_afa


def _leave(acts, sae_in, W_dec, decoder_norm=None):
    return leave_one_out(acts, sae_in, W_dec, 0.4, decoder_norm)


def _explain(acts, sae_in, W_dec, decoder_norm=None):
    return keep_until_explained(acts, sae_in, W_dec, 0.7, decoder_norm)


@pytest.fixture(params=[_leave, _explain], ids=["leave_one_out", "keep_until_explained"])
def rule(request):
    return request.param


def _random(n, d_in=16, d_sae=60, dtype=torch.float32):
    torch.manual_seed(0)
    W_dec, sae_in = torch.randn(d_sae, d_in, dtype=dtype), torch.randn(n, d_in, dtype=dtype)
    return (sae_in @ W_dec.T) * 0.4 / W_dec.square().sum(-1), sae_in, W_dec


def test_the_gradient_passes_to_what_is_kept(rule):
    acts, sae_in, W_dec = _random(6)
    for each in (acts, sae_in, W_dec):
        each.requires_grad_()
    out = rule(acts, sae_in, W_dec)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    assert torch.equal(acts.grad, torch.where(out != 0, weights, 0))
    assert sae_in.grad is None
    assert W_dec.grad is None


def test_after_another_rule(rule):
    """Proposed by the norm of the input, then looked at one by one: never anything else."""
    acts, sae_in, W_dec = _random(8)
    acts.requires_grad_()
    norms = W_dec.norm(dim=-1)
    proposed = top_afa(acts, sae_in.norm(dim=-1), norms)
    out = rule(proposed, sae_in, W_dec)
    assert torch.equal(out, torch.where(out != 0, acts, 0))
    assert ((out != 0) <= (proposed != 0)).all()
    out.sum().backward()
    assert torch.equal(acts.grad, (out != 0).float())


def test_torch_func(rule):
    acts, sae_in, W_dec = _random(5)
    expected = rule(acts, sae_in, W_dec)
    assert torch.equal(torch.func.vmap(lambda a, x: rule(a, x, W_dec))(acts, sae_in), expected)
    decoders = torch.stack([W_dec, W_dec.flip(0)], dim=1)  # entries may have their own
    found = torch.func.vmap(lambda W: rule(acts, sae_in, W), 1)(decoders)
    assert torch.equal(found, torch.stack([expected, rule(acts, sae_in, W_dec.flip(0))]))
    tangent = torch.randn_like(acts)
    _, moved = torch.func.jvp(lambda a: rule(a, sae_in, W_dec), (acts,), (tangent,))
    assert torch.equal(moved, torch.where(expected != 0, tangent, 0))
    gradient = torch.func.grad(lambda a: rule(a, sae_in, W_dec).sum())(acts)
    assert torch.equal(gradient, (expected != 0).float())


def test_compiles_without_a_break(rule):
    acts, sae_in, W_dec = _random(5)
    acts.requires_grad_()

    def loss(a):
        return (rule(a, sae_in, W_dec) @ W_dec).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(acts), acts)
    (found,) = torch.autograd.grad(compiled(acts), acts)
    torch.testing.assert_close(found, expected)


def test_autograd_agrees_with_finite_differences(rule):
    acts, sae_in, W_dec = _random(3, dtype=torch.float64)
    acts.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: rule(a, sae_in, W_dec), acts, eps=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sae_in": torch.ones(4, 16)}, r"same shape but for the last dimension: got \(5, 60\)"),
        ({"W_dec": torch.ones(60, 15)}, r"W_dec must have shape \(60, 16\).*got \(60, 15\)"),
        ({"decoder_norm": torch.ones(59)}, r"decoder_norm must have shape \(60,\).*got \(59,\)"),
        ({"sae_in": torch.ones(5, 16, dtype=torch.long)}, "sae_in must be floating point"),
        ({"W_dec": torch.ones(60, 16, device="meta")}, r"on the device of acts \(cpu\): got meta"),
    ],
)
def test_what_does_not_fit(rule, change, message):
    acts, sae_in, W_dec = _random(5)
    arguments = {"acts": acts, "sae_in": sae_in, "W_dec": W_dec, **change}
    with pytest.raises(ValueError, match=message):
        rule(**arguments)


def test_numbers_out_of_range():
    acts, sae_in, W_dec = _random(5)
    with pytest.raises(ValueError, match=r"between 0 and 1: got 1\.5"):
        keep_until_explained(acts, sae_in, W_dec, 1.5)
    with pytest.raises(ValueError, match="max_k must be at least 1: got 0"):
        keep_until_explained(acts, sae_in, W_dec, 0.5, max_k=0)
    with pytest.raises(ValueError, match=r"one number or have shape \(5,\).*got \(4,\)"):
        leave_one_out(acts, sae_in, W_dec, torch.ones(4))
