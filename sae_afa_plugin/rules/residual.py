"""Rules that look at what the chosen features leave over: leave-one-out and constant quality.

:func:`~sae_afa_plugin.rules.operator.keep_prefix` decides by the features alone. The rules here
also read the input and the decoder: what a feature is worth is how much the residual grows
without it. Both are greedy and exact; no least squares is solved.

The definition that the backends share: scores are products in float32 (float64 for float64
inputs), and so are the residual and its products with rows of the decoder. They sum in different
orders, so where a gain equals its price, or a residual its goal, to within that rounding, they may
differ; nowhere else.
"""

from __future__ import annotations

import functools
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from sae_afa_plugin.rules import residual_numba, residual_torch
from sae_afa_plugin.rules.choice import (
    check_tensors,
    differentiable,
    register_choice,
    vmap_as_a_loop,
)


def leave_one_out(
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    price: Tensor | float,
    decoder_norm: Tensor | None = None,
    *,
    leniency: Tensor | float = 0.0,
) -> Tensor:
    """Drop each feature that is worth less than a price.

    With y the input, d_i the decoder's rows and r = y - sum of acts_i d_i over the features that
    are still kept, leaving out feature i makes ``||r||^2`` larger by its gain
    ``2 acts_i <r, d_i> + acts_i^2 ||d_i||^2``. Features stand in the order of their scores
    ``acts_i ||d_i||``, the smallest first (equal scores: the higher index first), and are gone
    through twice: the first time, those that do harm are dropped (gain < 0), the second time those
    whose gain is below the price. r is kept up to date all the time.

    In a dictionary that has just begun to learn, useful directions come with activations that are
    far too large and do harm; if they are dropped, nothing teaches them. ``leniency`` times
    ``<r, d_i>^2 / ||d_i||^2`` is added to the gain: with 1, a feature is worth what its direction
    could explain of what the others leave over. If that is nothing, because
    ``<r, d_i> <= -acts_i ||d_i||^2``, it is dropped at any leniency.

    What is on offer are the features with positive scores: all of them, or what another rule left
    (:func:`~sae_afa_plugin.rules.operator.top_afa`). Thresholds for gains that fall as 1/d are
    those of Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage" (1994), and
    Foster and George, "The risk inflation criterion for multiple regression" (1994).

    The gradient with respect to ``acts`` passes to the kept features only.

    Args:
        acts: Activations ``[..., d_sae]``, in float16, bfloat16, float32 or float64. Entries
            that are not positive are never kept.
        sae_in: What the features shall explain ``[..., d_in]``, for SAEs z - b_dec.
        W_dec: Decoder ``[d_sae, d_in]``.
        price: In the units of ``||sae_in||^2``: one for all rows, or one for each ``[...]``. A
            negative one counts as 0.
        leniency: From 0 to 1, one for all rows or one for each ``[...]``: how far a feature is
            judged by its direction alone.
        decoder_norm: Norms of the decoder's rows ``[d_sae]``, if they are at hand.

    Returns:
        ``[..., d_sae]`` in the dtype of ``acts``. A row of which a score, the input or the price
        is NaN or infinite is NaN throughout; other rows are not affected.

    Raises:
        ValueError: If shapes, devices or dtypes do not fit together.

    Example:
        Of two features that point the same way one suffices: without the smaller one, the
        residual grows from .01 to .04.

        >>> W_dec = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> acts, sae_in = torch.tensor([[2.0, 0.1, 1.0]]), torch.tensor([[2.2, 1.0]])
        >>> leave_one_out(acts, sae_in, W_dec, 0.05)
        tensor([[2., 0., 1.]])
        >>> leave_one_out(acts, sae_in, W_dec, 0.02)
        tensor([[2.0000, 0.1000, 1.0000]])

        An activation that is far too large does harm. Its direction is a good one.

        >>> acts = torch.tensor([[0.0, 0.0, 3.0]])
        >>> leave_one_out(acts, sae_in, W_dec, 0.05)
        tensor([[0., 0., 0.]])
        >>> leave_one_out(acts, sae_in, W_dec, 0.05, leniency=1.0)
        tensor([[0., 0., 3.]])
    """
    _check(acts, sae_in, W_dec, decoder_norm)
    decoder_norm = _norms(W_dec) if decoder_norm is None else decoder_norm
    of_rows = [
        _for_each_row(acts, name, value)
        for name, value in (("price", price), ("leniency", leniency))
    ]
    return differentiable(_leave_one_out_op, acts, sae_in, W_dec, decoder_norm, *of_rows)


def keep_until_explained(
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    explained: float,
    decoder_norm: Tensor | None = None,
    *,
    max_k: int | None = None,
) -> Tensor:
    """Keep the fewest of the largest features that explain a share of the input.

    With y the input and d_i the decoder's rows, features stand in the order of their scores
    ``acts_i ||d_i||``, the largest first (equal scores: the lower index first), and
    ``e_k = ||y - sum of the first k of acts_i d_i||^2``. The kept number is the smallest k with
    ``e_k <= (1 - explained) ||y||^2``; where no k is, the k with the smallest e_k, the smaller one
    of equals. k is 0 or more, and ``max_k`` at most.

    To TopK and BatchTopK, which hold the number of features, this is what constant quality is to
    a constant rate in video coding, and what error-constrained sparse coding is to
    sparsity-constrained.

    The gradient with respect to ``acts`` passes to the kept features only.

    Args:
        acts: Activations ``[..., d_sae]``, in float16, bfloat16, float32 or float64. Entries
            that are not positive are never kept.
        sae_in: What the features shall explain ``[..., d_in]``, for SAEs z - b_dec.
        W_dec: Decoder ``[d_sae, d_in]``.
        explained: The share of ``||sae_in||^2``, between 0 and 1.
        decoder_norm: Norms of the decoder's rows ``[d_sae]``, if they are at hand.
        max_k: No row keeps more features than that. None: as many as are positive.

    Returns:
        ``[..., d_sae]`` in the dtype of ``acts``. A row of which a score or the input is NaN or
        infinite is NaN throughout; other rows are not affected.

    Raises:
        ValueError: If shapes, devices or dtypes do not fit together, or a number is out of range.

    Example:
        >>> W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> acts, sae_in = torch.tensor([[3.0, 1.0, 0.1]]), torch.tensor([[3.0, 1.0]])
        >>> keep_until_explained(acts, sae_in, W_dec, 0.8)  # e_1 = 1 of 10
        tensor([[3., 0., 0.]])
        >>> keep_until_explained(acts, sae_in, W_dec, 0.95)  # e_2 = 0
        tensor([[3., 1., 0.]])
    """
    _check(acts, sae_in, W_dec, decoder_norm)
    if not 0 <= explained <= 1:
        raise ValueError(f"explained is a share between 0 and 1: got {explained}")
    if max_k is not None and max_k < 1:
        raise ValueError(f"max_k must be at least 1: got {max_k}")
    decoder_norm = _norms(W_dec) if decoder_norm is None else decoder_norm
    max_k = acts.shape[-1] if max_k is None else max_k
    return differentiable(
        _keep_until_explained_op, acts, sae_in, W_dec, decoder_norm, float(explained), max_k
    )


def _for_each_row(acts: Tensor, name: str, value: Tensor | float) -> Tensor:
    value = torch.as_tensor(value, device=acts.device)
    if value.shape not in (torch.Size(), acts.shape[:-1]):
        raise ValueError(
            f"{name} must be one number or have shape {tuple(acts.shape[:-1])}, one for each row of "
            f"acts: got {tuple(value.shape)}"
        )
    return value.expand(acts.shape[:-1])


def _norms(W_dec: Tensor) -> Tensor:
    dtype = torch.promote_types(W_dec.dtype, torch.float32)
    return torch.linalg.vector_norm(W_dec.detach(), dim=-1, dtype=dtype)


def _check(acts: Tensor, sae_in: Tensor, W_dec: Tensor, decoder_norm: Tensor | None) -> None:
    """Refuse what does not fit together."""
    if acts.ndim == 0 or sae_in.ndim == 0 or sae_in.shape[:-1] != acts.shape[:-1]:
        raise ValueError(
            "acts and sae_in must have the same shape but for the last dimension: got "
            f"{tuple(acts.shape)} and {tuple(sae_in.shape)}"
        )
    expected = (acts.shape[-1], sae_in.shape[-1])
    if W_dec.shape != expected:
        raise ValueError(
            f"W_dec must have shape {expected}, (d_sae, d_in) of acts and sae_in: got "
            f"{tuple(W_dec.shape)}"
        )
    if decoder_norm is not None and decoder_norm.shape != expected[:1]:
        raise ValueError(
            f"decoder_norm must have shape {expected[:1]}, one entry for each feature of acts: got "
            f"{tuple(decoder_norm.shape)}"
        )
    check_tensors(acts, sae_in=sae_in, W_dec=W_dec, decoder_norm=decoder_norm)


# --- what runs behind it ---


@functools.cache
def _on_devices() -> ModuleType | None:
    try:
        return import_module("sae_afa_plugin.rules.residual_triton")
    except ImportError as error:
        if (error.name or "").startswith("sae_afa_plugin"):
            raise
        return None  # Triton is not installed


def _implementation(acts: Tensor) -> ModuleType:
    ways = [residual_numba] if acts.is_cpu else [_on_devices()]
    return next((way for way in ways if way and way.supports(acts)), residual_torch)


@torch.library.custom_op("sae_afa_plugin::leave_one_out", mutates_args=())
def _leave_one_out_op(
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    decoder_norm: Tensor,
    price: Tensor,
    leniency: Tensor,
) -> Tensor:
    run = _implementation(acts).leave_one_out
    return run(acts, sae_in, W_dec, decoder_norm, price, leniency)


@torch.library.custom_op("sae_afa_plugin::keep_until_explained", mutates_args=())
def _keep_until_explained_op(
    acts: Tensor, sae_in: Tensor, W_dec: Tensor, decoder_norm: Tensor, explained: float, max_k: int
) -> Tensor:
    run = _implementation(acts).keep_until_explained
    return run(acts, sae_in, W_dec, decoder_norm, explained, max_k)


for _op in (_leave_one_out_op, _keep_until_explained_op):
    register_choice(_op)
    vmap_as_a_loop(_op)
