"""Decoding few features on the CPU: only what is not zero is multiplied.

A token has tens or hundreds of active features out of many thousands, so most of a dense product
with the decoder multiplies zeros. Where Numba is installed and features are few, loops over the
active ones take the place of three of the five products of a training step: the reconstruction,
the decoder's gradient and the features' gradient. Everywhere else (on other devices, in other
dtypes, under autocast and ``torch.compile``, with many features) this is ``@``.

Rows of the decoder whose feature is zero are not looked at, also if they hold NaN.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_afa_plugin._upstream import is_transformed
from sae_afa_plugin.rules.numba_kernel import compile_kernel, in_threads

_FEW = 0.02  # the share of active features below which the loops are faster
_FASTER = {"reassoc", "contract"}  # sums in any order, so that they are vectorised; NaN stays NaN
_SAMPLE = 64  # rows from which that share is estimated


def decode(feature_acts: Tensor, W_dec: Tensor, zeros_stay_zero: bool = False) -> Tensor:
    """``feature_acts @ W_dec``: ``[..., d_sae]`` and ``[d_sae, d_in]`` to ``[..., d_in]``.

    Args:
        feature_acts: Features ``[..., d_sae]``.
        W_dec: Decoder ``[d_sae, d_in]``.
        zeros_stay_zero: Say that the gradient of features that are zero is not wanted, because
            the activation that made them stops it. Without this, sparse products are used only
            where no gradient is.

    Example:
        >>> decode(torch.tensor([[0.0, 2.0, 0.0]]), torch.eye(3))
        tensor([[0., 2., 0.]])
    """
    differentiated = torch.is_grad_enabled() and (feature_acts.requires_grad or W_dec.requires_grad)
    if (
        (zeros_stay_zero or not differentiated)
        and _is_possible(feature_acts, W_dec)
        and _are_few(feature_acts)
    ):
        return _Decode.apply(feature_acts, W_dec)  # pyright: ignore
    return feature_acts @ W_dec


def _is_possible(feature_acts: Tensor, W_dec: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not is_transformed()
        # the loops look at no bounds: what does not fit is left to @ and its message
        and W_dec.ndim == 2
        and feature_acts.ndim > 0
        and feature_acts.shape[-1] == W_dec.shape[0]
        and feature_acts.numel() > 0
        and feature_acts.is_cpu
        and W_dec.is_cpu
        and feature_acts.dtype == W_dec.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _loops() is not None
    )


def _are_few(feature_acts: Tensor) -> bool:
    """Whether few features are active, to judge by some of the tokens."""
    rows = feature_acts.detach().reshape(-1, feature_acts.shape[-1])
    # an odd step, or all of them could be at the same position of their sequences
    sample = rows[:: max(1, len(rows) // _SAMPLE) | 1]
    return sample.count_nonzero().item() < _FEW * sample.numel()


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature_acts: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(feature_acts, W_dec)
        out = W_dec.new_zeros(*feature_acts.shape[:-1], W_dec.shape[1])
        _run(0, feature_acts, W_dec, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore
        feature_acts, W_dec = ctx.saved_tensors
        grad_acts = grad_W_dec = None
        if ctx.needs_input_grad[0]:
            grad_acts = feature_acts.new_zeros(feature_acts.shape)
            _run(1, feature_acts, W_dec, grad, grad_acts)
        if ctx.needs_input_grad[1]:
            grad_W_dec = W_dec.new_zeros(W_dec.shape)
            _run(2, feature_acts, grad, grad_W_dec)
        return grad_acts, grad_W_dec


def _run(loop: int, values: Tensor, *matrices: Tensor) -> None:
    """Call a loop in as many threads as PyTorch uses, each on some tokens or some columns.

    The last matrix is where the result goes; it has to be contiguous.
    """
    loops = _loops()
    assert loops is not None
    arrays = [t.detach().reshape(-1, t.shape[-1]).contiguous().numpy() for t in (values, *matrices)]
    n = arrays[-1].shape[1] if loop == 2 else len(arrays[0])
    n_threads = max(1, min(torch.get_num_threads(), n))
    bounds = [n * i // n_threads for i in range(n_threads + 1)]
    in_threads(loops[loop], [(*arrays, *part) for part in itertools.pairwise(bounds)])


@functools.cache
def _loops() -> list[Callable[..., None]] | None:
    matrix, part = "f4[:,::1]", "i8, i8"
    loops = [
        compile_kernel(function, f"void({', '.join([matrix] * n)}, {part})", fastmath=_FASTER)
        for function, n in ((_weighted_rows, 3), (_products, 4), (_outer_products, 3))
    ]
    return None if None in loops else loops  # pyright: ignore[reportReturnType]


def _weighted_rows(values: Any, matrix: Any, out: Any, start: int, stop: int) -> None:
    """out[n] += sum over i of values[n, i] * matrix[i], for tokens from ``start`` to ``stop``."""
    for n in range(start, stop):
        for i in range(values.shape[1]):
            value = values[n, i]
            if value != 0.0:
                for column in range(matrix.shape[1]):
                    out[n, column] += value * matrix[i, column]


def _products(values: Any, matrix: Any, rows: Any, out: Any, start: int, stop: int) -> None:
    """out[n, i] = rows[n] . matrix[i] where values[n, i] is not zero, for some tokens."""
    for n in range(start, stop):
        for i in range(values.shape[1]):
            if values[n, i] != 0.0:
                product = out[n, i]  # zero, of the right type
                for column in range(matrix.shape[1]):
                    product += rows[n, column] * matrix[i, column]
                out[n, i] = product


def _outer_products(values: Any, rows: Any, out: Any, start: int, stop: int) -> None:
    """out[i] += sum over n of values[n, i] * rows[n], for columns from ``start`` to ``stop``."""
    for n in range(values.shape[0]):
        for i in range(values.shape[1]):
            value = values[n, i]
            if value != 0.0:
                for column in range(start, stop):
                    out[i, column] += value * rows[n, column]
