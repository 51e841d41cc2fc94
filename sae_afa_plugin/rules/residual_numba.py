"""The rules of :mod:`sae_afa_plugin.rules.residual` on the CPU, compiled by Numba.

A thread takes one row after the other. Only the decoder's rows of features that are on offer are
read, once from memory and a few times from the cache, so with tens or hundreds of them the rule
costs a fraction of the encoder's product.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_afa_plugin.rules.numba_kernel import compile_kernel, in_threads

_FASTER = {"reassoc", "contract"}  # sums in any order, so that they are vectorised; NaN stays NaN
_INFINITE = 0x7F800000  # as bits; everything above is NaN


def supports(acts: Tensor) -> bool:
    """Whether these loops take activations of this device and dtype."""
    return acts.is_cpu and acts.dtype != torch.float64 and _loops() is not None


def leave_one_out(
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    decoder_norm: Tensor,
    price: Tensor,
    leniency: Tensor,
) -> Tensor:
    """The operator, its arguments of shapes that fit, the last two with an entry for each row."""
    return _run(0, acts, sae_in, W_dec, decoder_norm, price.reshape(-1), leniency.reshape(-1))


def keep_until_explained(
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    decoder_norm: Tensor,
    explained: float,
    max_k: int,
) -> Tensor:
    """The operator, its arguments of shapes that fit."""
    return _run(1, acts, sae_in, W_dec, decoder_norm, explained, max_k)


def _run(
    loop: int,
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    decoder_norm: Tensor,
    *of_the_rule: Any,
) -> Tensor:
    """Call a loop in as many threads as PyTorch uses, each on some rows."""
    loops = _loops()
    assert loops is not None
    out = torch.zeros(acts.shape, dtype=acts.dtype)
    if acts.numel() == 0:
        return out
    rows, inputs = (
        t.detach().reshape(-1, t.shape[-1]).float().contiguous() for t in (acts, sae_in)
    )
    result = out.view(rows.shape) if out.dtype == torch.float32 else torch.zeros_like(rows)
    n_threads = max(1, min(torch.get_num_threads(), len(rows)))
    bounds = [len(rows) * i // n_threads for i in range(n_threads + 1)]
    shared = [t.detach().float().contiguous().numpy() for t in (W_dec, decoder_norm)]
    calls: list[tuple[Any, ...]] = []
    for start, stop in itertools.pairwise(bounds):
        part = [t[start:stop].numpy() for t in (rows, inputs)]
        rule = [
            t[start:stop].float().contiguous().numpy() if isinstance(t, Tensor) else t
            for t in of_the_rule
        ]
        calls.append((*part, *shared, *rule, result[start:stop].numpy()))
    in_threads(loops[loop], calls)
    if result.dtype != out.dtype:
        out.copy_(result.view(out.shape))
    return out


@functools.cache
def _loops() -> list[Callable[..., None]] | None:
    matrix, vector = "f4[:,::1]", "f4[::1]"
    start = f"void({matrix}, {matrix}, {matrix}, {vector}"
    loops = [
        compile_kernel(
            _leave_one_out_rows, f"{start}, {vector}, {vector}, {matrix})", fastmath=_FASTER
        ),
        compile_kernel(_until_explained_rows, f"{start}, f8, i8, {matrix})", fastmath=_FASTER),
    ]
    return None if None in loops else loops  # pyright: ignore[reportReturnType]


# --- compiled ---


def _leave_one_out_rows(
    acts: Any, inputs: Any, W_dec: Any, norms: Any, prices: Any, leniencies: Any, out: Any
) -> None:
    d_sae, d_in = W_dec.shape
    score = np.empty(d_sae, np.float32)
    score_bits = score.view(np.int32)  # ordered as the scores are, where these are positive
    keys = np.empty(d_sae, np.int64)
    residual = np.empty(d_in, np.float32)
    residual_bits = residual.view(np.int32)
    for row in range(acts.shape[0]):
        a, result = acts[row], out[row]
        residual[:] = inputs[row]
        largest = np.int32(0)
        for column in range(d_in):
            largest = max(largest, residual_bits[column] & np.int32(0x7FFFFFFF))
        for i in range(d_sae):
            score[i] = a[i] * norms[i]
            largest = max(largest, score_bits[i] & np.int32(0x7FFFFFFF))
        if largest >= _INFINITE or not np.isfinite(prices[row] + leniencies[row]):
            result[:] = np.nan
            continue
        n = 0
        for i in range(d_sae):  # without a branch, which could not be predicted
            # the higher index first of those with equal scores
            keys[n] = (np.int64(score_bits[i]) << 32) | np.int64(d_sae - 1 - i)
            n += score_bits[i] > 0
        offered = np.sort(keys[:n])  # the smallest score first
        for j in range(n):
            offered[j] = d_sae - 1 - (offered[j] & np.int64(0xFFFFFFFF))
            value, direction = a[offered[j]], W_dec[offered[j]]
            result[offered[j]] = value
            for column in range(d_in):
                residual[column] -= value * direction[column]
        for harmful in (True, False):
            price = np.float32(0.0) if harmful else max(prices[row], np.float32(0.0))
            for j in range(n):
                i = offered[j]
                value, direction = result[i], W_dec[i]
                if value == np.float32(0.0):
                    continue
                product = np.float32(0.0)
                for column in range(d_in):
                    product += residual[column] * direction[column]
                size, missing = value * norms[i], product / norms[i]
                gain = np.float32(2.0) * value * product + size * size
                gain += leniencies[row] * missing * missing
                if gain < price or size + missing <= np.float32(0.0):
                    result[i] = np.float32(0.0)
                    for column in range(d_in):
                        residual[column] += value * direction[column]


def _until_explained_rows(
    acts: Any, inputs: Any, W_dec: Any, norms: Any, explained: Any, max_k: Any, out: Any
) -> None:
    d_sae, d_in = W_dec.shape
    score = np.empty(d_sae, np.float32)
    score_bits = score.view(np.int32)
    keys = np.empty(d_sae, np.int64)
    residual = np.empty(d_in, np.float32)
    residual_bits = residual.view(np.int32)
    floor = np.int32(1)
    for row in range(acts.shape[0]):
        a, result = acts[row], out[row]
        residual[:] = inputs[row]
        largest = np.int32(0)
        for column in range(d_in):
            largest = max(largest, residual_bits[column] & np.int32(0x7FFFFFFF))
        for i in range(d_sae):
            score[i] = a[i] * norms[i]
            largest = max(largest, score_bits[i] & np.int32(0x7FFFFFFF))
        if largest >= _INFINITE:
            result[:] = np.nan
            continue
        least = np.float32(0.0)
        for column in range(d_in):
            least += residual[column] * residual[column]
        goal = np.float32((1.0 - explained) * least)
        # Rows of a batch are alike: sort first what is above half the last score of the row before.
        k = 0
        best = 0
        below = np.int32(0x7FFFFFFF)  # what is looked at is from floor to below this
        chosen = np.empty(0, np.int64)
        while least > goal and k < max_k:
            n = 0
            for i in range(d_sae):
                # the lower index first of those with equal scores, from the largest key down
                keys[n] = (np.int64(score_bits[i]) << 32) | np.int64(d_sae - 1 - i)
                n += score_bits[i] >= floor and score_bits[i] < below
            some = np.sort(keys[:n])
            for j in range(n):
                some[j] = d_sae - 1 - (some[j] & np.int64(0xFFFFFFFF))
            chosen = np.concatenate((chosen, some[::-1]))
            while k < len(chosen) and k < max_k and least > goal:
                value, direction = a[chosen[k]], W_dec[chosen[k]]
                energy = np.float32(0.0)
                for column in range(d_in):
                    rest = residual[column] - value * direction[column]
                    residual[column] = rest
                    energy += rest * rest
                k += 1
                if energy < least:
                    least = energy
                    best = k
            if floor == 1:
                break
            below, floor = floor, np.int32(1)
        for j in range(best):
            result[chosen[j]] = a[chosen[j]]
        floor = np.int32(1)
        if best > 0:
            score[0] = a[chosen[best - 1]] * norms[chosen[best - 1]] / np.float32(2.0)
            floor = max(score_bits[0], np.int32(1))
