"""The rules of :mod:`sae_afa_plugin.rules.residual` on CUDA devices, in Triton.

The features on offer of each row are put aside and sorted by their scores; then one program handles
one row, with the residual in registers. Rows of the decoder are read as they are needed, from the
cache of the card where tokens share features. How many features the longest row offers is asked of
the device, once for each call.

This module needs Triton. ``TRITON_INTERPRET=1``, set before it is imported, runs it on the CPU.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1_024  # features that are read at a time
_INFINITE = tl.constexpr(0x7F800000)  # as bits; everything above is NaN
_BITS = tl.constexpr(0x7FFFFFFF)


def supports(acts: Tensor) -> bool:
    """Whether these kernels take activations of this device and dtype."""
    return acts.is_cuda and acts.dtype != torch.float64


def leave_one_out(
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    decoder_norm: Tensor,
    price: Tensor,
    leniency: Tensor,
) -> Tensor:
    """The operator, its arguments of shapes that fit, the last two with an entry for each row."""
    of_rows = [each.reshape(-1).float().contiguous() for each in (price, leniency)]
    return _run(leave_one_out_row, acts, sae_in, W_dec, decoder_norm, *of_rows)


def keep_until_explained(
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    decoder_norm: Tensor,
    explained: float,
    max_k: int,
) -> Tensor:
    """The operator, its arguments of shapes that fit."""
    unexplained = 1.0 - explained
    return _run(until_explained_row, acts, sae_in, W_dec, decoder_norm, unexplained, max_k)


def _run(
    kernel: triton.JITFunction,
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    decoder_norm: Tensor,
    *of_the_rule: Tensor | float,
) -> Tensor:
    out = torch.zeros(acts.shape, dtype=acts.dtype, device=acts.device)
    if out.numel() == 0:
        return out
    acts, sae_in, W_dec = acts.contiguous(), sae_in.contiguous(), W_dec.detach().contiguous()
    norms, (d_sae, d_in) = decoder_norm.contiguous(), W_dec.shape
    n = out.numel() // d_sae
    width_of_input = triton.next_power_of_2(d_in)
    with torch.cuda.device_of(acts):  # Triton launches on the current device
        counts = torch.empty(n, dtype=torch.int32, device=acts.device)
        count_offered[(n,)](acts, norms, counts, d_sae, TILE=_TILE)
        width = max(1, int(counts.max()))
        scores = torch.full((n, width), -1.0, device=acts.device)
        features = torch.zeros_like(scores, dtype=torch.int32)
        put_aside[(n,)](acts, norms, counts, scores, features, d_sae, width, TILE=_TILE)
        features = features.gather(1, scores.sort(dim=1, descending=True, stable=True).indices)
        kernel[(n,)](
            acts, sae_in, W_dec, norms, counts, features, *of_the_rule, out, d_sae, d_in, width,
            D=width_of_input, TILE=_TILE, num_warps=max(1, min(8, width_of_input // 256)),
        )  # fmt: skip
    return out


@triton.jit
def _scores(acts_ptr, norms_ptr, row, columns, d_sae):
    inside = columns < d_sae
    acts = tl.load(acts_ptr + row * d_sae + columns, mask=inside, other=0.0).to(tl.float32)
    return acts * tl.load(norms_ptr + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def count_offered(acts_ptr, norms_ptr, counts_ptr, d_sae, TILE: tl.constexpr):
    """How many scores of a row are positive; -1 where one is NaN or infinite."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([TILE], tl.int32)
    count = tl.zeros([TILE], tl.int32)
    for start in range(0, d_sae, TILE):
        scores = _scores(acts_ptr, norms_ptr, row, start + tl.arange(0, TILE), d_sae)
        largest = tl.maximum(largest, scores.to(tl.int32, bitcast=True) & _BITS)
        count += (scores > 0).to(tl.int32)
    bad = tl.max(largest, 0) >= _INFINITE
    tl.store(counts_ptr + row, tl.where(bad, -1, tl.sum(count, 0)))


@triton.jit
def put_aside(
    acts_ptr, norms_ptr, counts_ptr, scores_ptr, features_ptr, d_sae, width, TILE: tl.constexpr
):
    """The positive scores of a row and which features they are, in the order of the features."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(counts_ptr + row) > 0:
        n = 0
        for start in range(0, d_sae, TILE):
            columns = start + tl.arange(0, TILE)
            scores = _scores(acts_ptr, norms_ptr, row, columns, d_sae)
            offered = scores > 0
            at = row * width + n + tl.cumsum(offered.to(tl.int32), 0) - 1
            tl.store(scores_ptr + at, scores, mask=offered)
            tl.store(features_ptr + at, columns, mask=offered)
            n += tl.sum(offered.to(tl.int32), 0)


@triton.jit
def _feature(acts_ptr, features_ptr, W_dec_ptr, row, rank, columns, d_sae, d_in, width):
    """Which feature has a rank in a row, its activation and its direction."""
    feature = tl.load(features_ptr + row * width + rank).to(tl.int64)
    value = tl.load(acts_ptr + row * d_sae + feature).to(tl.float32)
    direction = tl.load(W_dec_ptr + feature * d_in + columns, mask=columns < d_in, other=0.0)
    return feature, value, direction.to(tl.float32)


@triton.jit
def _fill_with_nan(out_ptr, row, d_sae, TILE: tl.constexpr):
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        nan = tl.full([TILE], float("nan"), tl.float32)
        tl.store(
            out_ptr + row * d_sae + columns,
            nan.to(out_ptr.dtype.element_ty),
            mask=columns < d_sae,
        )


@triton.jit
def _has_infinite(values):
    """Whether one is NaN or infinite."""
    return tl.max(values.to(tl.int32, bitcast=True) & _BITS, 0) >= _INFINITE


@triton.jit
def leave_one_out_row(
    acts_ptr, in_ptr, W_dec_ptr, norms_ptr, counts_ptr, features_ptr, prices_ptr,
    leniencies_ptr, out_ptr, d_sae, d_in, width, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Leave-one-out for one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    residual = tl.load(in_ptr + row * d_in + columns, mask=columns < d_in, other=0.0)
    residual = residual.to(tl.float32)
    n = tl.load(counts_ptr + row)
    price = tl.load(prices_ptr + row)
    leniency = tl.load(leniencies_ptr + row)
    no_price = ((price + leniency).to(tl.int32, bitcast=True) & _BITS) >= _INFINITE
    if (n < 0) | _has_infinite(residual) | no_price:
        _fill_with_nan(out_ptr, row, d_sae, TILE)
    else:
        for rank in range(n):
            feature, value, direction = _feature(
                acts_ptr, features_ptr, W_dec_ptr, row, rank, columns, d_sae, d_in, width
            )
            residual -= value * direction
            tl.store(out_ptr + row * d_sae + feature, value.to(out_ptr.dtype.element_ty))
        for weighing in range(2):
            tl.debug_barrier()  # what is read from out here was written above
            least = tl.where(weighing == 0, 0.0, tl.maximum(price, 0.0))
            for back in range(n):
                feature, value, direction = _feature(
                    out_ptr, features_ptr, W_dec_ptr, row, n - 1 - back, columns, d_sae, d_in, width
                )
                norm = tl.load(norms_ptr + feature).to(tl.float32)
                product = tl.sum(residual * direction, 0)
                size, missing = value * norm, product / norm
                gain = 2 * value * product + size * size + leniency * missing * missing
                if (value > 0) & ((gain < least) | (size + missing <= 0)):
                    residual += value * direction
                    tl.store(out_ptr + row * d_sae + feature, 0.0)


@triton.jit
def until_explained_row(
    acts_ptr, in_ptr, W_dec_ptr, norms_ptr, counts_ptr, features_ptr, unexplained, max_k, out_ptr,
    d_sae, d_in, width, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Constant quality for one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    residual = tl.load(in_ptr + row * d_in + columns, mask=columns < d_in, other=0.0)
    residual = residual.to(tl.float32)
    n = tl.load(counts_ptr + row)
    if (n < 0) | _has_infinite(residual):
        _fill_with_nan(out_ptr, row, d_sae, TILE)
    else:
        least = tl.sum(residual * residual, 0)
        goal = unexplained * least
        limit = tl.minimum(n, max_k)
        k = 0
        best = 0
        while (k < limit) & (least > goal):
            _, value, direction = _feature(
                acts_ptr, features_ptr, W_dec_ptr, row, k, columns, d_sae, d_in, width
            )
            residual -= value * direction
            energy = tl.sum(residual * residual, 0)
            k += 1
            best = tl.where(energy < least, k, best)
            least = tl.minimum(energy, least)
        for rank in range(best):
            feature = tl.load(features_ptr + row * width + rank).to(tl.int64)
            value = tl.load(acts_ptr + row * d_sae + feature)
            tl.store(out_ptr + row * d_sae + feature, value)
