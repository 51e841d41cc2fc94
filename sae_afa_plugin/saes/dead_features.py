"""The reconstruction that dead features make, for the auxiliary loss.

How many features are dead is known only when the step runs. A PyTorch operator hides that from
``torch.compile`` (no graph break, no recompilation), and only the dead columns are computed.
Auxiliary loss: Gao et al., "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093),
appendix A.2; in the variant of arXiv 2503.24277.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("sae_afa_plugin::dead_reconstruction", mutates_args=())
def dead_reconstruction(hidden_pre: Tensor, W_dec: Tensor, dead: Tensor, k: int) -> Tensor:
    """Reconstruct with the ``k`` largest positive pre-activations among the dead features.

    Args:
        hidden_pre: Pre-activations ``[batch, d_sae]``.
        W_dec: Decoder ``[d_sae, d_in]``.
        dead: Which features are dead, boolean ``[d_sae]``.
        k: The most features that take part for one token; fewer where fewer are dead.

    Returns:
        ``[batch, d_in]`` in the dtype of ``hidden_pre``, without the decoder's bias.

    Example:
        >>> pre = torch.tensor([[5.0, 2.0, 1.0, -3.0]])
        >>> dead = torch.tensor([False, True, True, True])
        >>> dead_reconstruction(pre, torch.eye(4), dead, 1)
        tensor([[0., 2., 0., 0.]])
    """
    index, acts = _dead_acts(hidden_pre, dead, k)
    with torch.autocast(hidden_pre.device.type, enabled=False):
        return acts @ W_dec[index].to(acts.dtype)


def _dead_acts(hidden_pre: Tensor, dead: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the dead features ``[n_dead]`` and what they contribute ``[batch, n_dead]``."""
    index = dead.nonzero()[:, 0]
    acts = hidden_pre[:, index].relu()
    if len(index) > k:
        largest = acts.topk(k, dim=-1, sorted=False)
        acts = torch.zeros_like(acts).scatter_(-1, largest.indices, largest.values)
    return index, acts


@dead_reconstruction.register_fake
def _(hidden_pre: Tensor, W_dec: Tensor, dead: Tensor, k: int) -> Tensor:
    return hidden_pre.new_empty(hidden_pre.shape[0], W_dec.shape[1])


@torch.library.custom_op("sae_afa_plugin::dead_reconstruction_backward", mutates_args=())
def _backward_op(
    grad: Tensor, hidden_pre: Tensor, W_dec: Tensor, dead: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    index, acts = _dead_acts(hidden_pre, dead, k)
    grad_hidden_pre, grad_W_dec = torch.zeros_like(hidden_pre), torch.zeros_like(W_dec)
    with torch.autocast(hidden_pre.device.type, enabled=False):
        grad_acts = grad @ W_dec[index].to(grad.dtype).T
        grad_hidden_pre[:, index] = torch.where(acts > 0, grad_acts, 0).to(hidden_pre.dtype)
        grad_W_dec[index] = (acts.to(grad.dtype).T @ grad).to(W_dec.dtype)
    return grad_hidden_pre, grad_W_dec


@_backward_op.register_fake
def _(
    grad: Tensor,
    hidden_pre: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_pre), torch.empty_like(W_dec)


def _setup_context(ctx, inputs, output) -> None:  # pyright: ignore
    hidden_pre, W_dec, dead, k = inputs
    ctx.save_for_backward(hidden_pre, W_dec, dead)
    ctx.k = k


def _backward(ctx, grad: Tensor):  # pyright: ignore
    return *_backward_op(grad, *ctx.saved_tensors, ctx.k), None, None


dead_reconstruction.register_autograd(_backward, setup_context=_setup_context)
