"""The reconstruction by dead features, against a slow and obvious computation."""

from __future__ import annotations

import pytest
import torch

from sae_afa_plugin.saes.dead_features import dead_reconstruction


def slow(hidden_pre, W_dec, dead, k):
    rows = []
    for row in hidden_pre:
        alive = [(v, i) for i, v in enumerate(row.tolist()) if dead[i] and v > 0]
        best = sorted(alive, reverse=True)[:k]
        rows.append(sum((row[i] * W_dec[i] for _, i in best), torch.zeros_like(W_dec[0])))
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("n_dead", [0, 1, 5, 12])
def test_values_and_gradients(k, n_dead):
    torch.manual_seed(0)
    hidden_pre = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    W_dec = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[torch.randperm(12)[:n_dead]] = True
    weights = torch.randn(6, 4, dtype=torch.float64)
    out, expected = (
        dead_reconstruction(hidden_pre, W_dec, dead, k),
        slow(hidden_pre, W_dec, dead, k),
    )
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad((out * weights).sum(), (hidden_pre, W_dec))
    if n_dead == 0:
        assert not any(grad.any() for grad in grads)
        return
    wanted = torch.autograd.grad((expected * weights).sum(), (hidden_pre, W_dec))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_opcheck():
    torch.library.opcheck(
        torch.ops.sae_afa_plugin.dead_reconstruction.default,
        (
            torch.randn(6, 12, requires_grad=True),
            torch.randn(12, 4, requires_grad=True),
            torch.arange(12) < 5,
            3,
        ),
    )
