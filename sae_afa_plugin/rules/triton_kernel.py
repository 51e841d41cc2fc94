"""The top-AFA rule on CUDA devices, in Triton: one read and one write of the matrix.

One program handles one row. Positive floating point numbers are ordered as their bits are, so the
smallest kept score is found by bisection on 31 bits, each step a sum of squares over the row. For
that a row of up to 32,768 features stays in registers. A wider one is read again for every step,
and 16 ways are tried at once.

The bisection runs in float32, and one pass in float64 confirms its answer, or else it is repeated
in float64. So the result is the one of the definition in :mod:`sae_afa_plugin.rules.operator`, and
cards with few float64 units are rarely slowed down.

Every element is read from memory once and written once. The later reads of a row, 2 of them or 11
for a wide row, find it in the caches, as far as these hold the rows in work.

This module needs Triton. ``TRITON_INTERPRET=1``, set before it is imported, runs it on the CPU.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_RESIDENT = 32_768  # features of a row that fit the registers of 1,024 threads
_TILE = 1_024  # features that are read at a time in the other passes
_WAYS = tl.constexpr(16)
_INFINITE = tl.constexpr(0x7F800000)  # as bits; everything above is NaN


def top_afa(acts: Tensor, target_norm: Tensor, decoder_norm: Tensor | None) -> Tensor:
    """Apply the rule on a CUDA device, without synchronisation.

    Args:
        acts: Activations ``[..., d_sae]`` in float32, bfloat16 or float16.
        target_norm: The norm to match ``[...]``.
        decoder_norm: Norms of the decoder's rows ``[d_sae]``. None means unit rows.

    Returns:
        ``[..., d_sae]`` in the dtype of ``acts``.
    """
    out = torch.empty(acts.shape, dtype=acts.dtype, device=acts.device)
    if out.numel() == 0:
        return out
    d_sae = acts.shape[-1]
    acts = acts.contiguous()
    resident = triton.next_power_of_2(d_sae) if d_sae <= _RESIDENT else 0
    with torch.cuda.device_of(acts):  # Triton launches on the current device
        keep_row[(out.numel() // d_sae,)](
            acts,
            acts if decoder_norm is None else decoder_norm.contiguous(),
            target_norm.contiguous(),
            out,
            d_sae,
            HAS_NORMS=decoder_norm is not None,
            RESIDENT=resident,
            TILE=_TILE,
            num_warps=n_warps(resident),
            enable_fp_fusion=False,
        )
    return out


def n_warps(resident: int) -> int:
    """16 features for each thread where the row stays in registers, 32 in the widest."""
    return min(32, max(4, resident // 512)) if resident else 8


@triton.jit
def _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS: tl.constexpr):
    """Activations, their scores, and these as bits (below 1 where a score is not positive)."""
    inside = columns < d_sae
    acts = tl.load(acts_ptr + row * d_sae + columns, mask=inside, other=0.0)
    scores = acts.to(tl.float32)
    if HAS_NORMS:
        scores *= tl.load(norms_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return acts, scores, scores.to(tl.int32, bitcast=True)


@triton.jit
def _sum_of_squares(scores, mask, DTYPE: tl.constexpr):
    masked = tl.where(mask, scores, 0.0).to(DTYPE)
    return tl.sum(masked * masked, 0)


@triton.jit
def _bisect_resident(acts_ptr, norms_ptr, row, d_sae, goal, HAS_NORMS, RESIDENT: tl.constexpr):
    """The largest bits at and above which the squares sum to the goal; 0 if there are none."""
    columns = tl.arange(0, RESIDENT)
    _, scores, bits = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
    low = tl.zeros((), tl.int32)
    high = tl.maximum(tl.max(bits), 0) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        if _sum_of_squares(scores, bits >= middle, tl.float32) >= goal:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _bisect(
    acts_ptr, norms_ptr, row, d_sae, goal, HAS_NORMS, TILE: tl.constexpr, DTYPE: tl.constexpr
):
    """The same for a row in memory, ``_WAYS`` ways at once."""
    low = tl.zeros((), tl.int32)
    largest = tl.zeros((), tl.int32)
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        _, _, bits = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
        largest = tl.maximum(largest, tl.max(bits))
    high = largest + 1
    while high - low > 1:
        step = (high - low + _WAYS - 1) // _WAYS
        pivots = low + step * (1 + tl.arange(0, _WAYS))
        sums = tl.zeros((_WAYS,), DTYPE)
        for start in range(0, d_sae, TILE):
            columns = start + tl.arange(0, TILE)
            _, scores, bits = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
            sums += _sum_of_squares(scores[:, None], bits[:, None] >= pivots[None, :], DTYPE)
        n_met = tl.sum(((sums >= goal) & (pivots < high)).to(tl.int32))
        high = tl.minimum(high, low + step * (n_met + 1))
        low = low + step * n_met
    return low


@triton.jit
def _sums_at(acts_ptr, norms_ptr, row, d_sae, cut, HAS_NORMS, TILE: tl.constexpr):
    """Squares above the cut, how many scores are above and at it, the largest magnitude."""
    above = tl.zeros((), tl.float64)
    n_above, n_equal = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    magnitude = tl.zeros((), tl.int32)
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        _, scores, bits = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
        above += _sum_of_squares(scores, bits > cut, tl.float64)
        n_above += tl.sum((bits > cut).to(tl.int32))
        n_equal += tl.sum((bits == cut).to(tl.int32))
        magnitude = tl.maximum(magnitude, tl.max(bits & 0x7FFFFFFF))
    return above, n_above, n_equal, magnitude


@triton.jit
def keep_row(
    acts_ptr,
    norms_ptr,
    target_ptr,
    out_ptr,
    d_sae,
    HAS_NORMS: tl.constexpr,
    RESIDENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The kernel. ``RESIDENT`` is the row's width as a power of two, or 0 for a wide row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.float64)
    finite_target = tl.abs(target) < float("inf")
    target = tl.maximum(target, 0.0)
    goal = target * target

    narrow = goal.to(tl.float32)
    if RESIDENT > 0:
        cut = _bisect_resident(acts_ptr, norms_ptr, row, d_sae, narrow, HAS_NORMS, RESIDENT)
    else:
        cut = _bisect(acts_ptr, norms_ptr, row, d_sae, narrow, HAS_NORMS, TILE, tl.float32)
    above, n_above, n_equal, magnitude = _sums_at(
        acts_ptr, norms_ptr, row, d_sae, cut, HAS_NORMS, TILE
    )
    score = cut.to(tl.float32, bitcast=True).to(tl.float64)
    met = (cut == 0) | (above + n_equal * (score * score) >= goal)
    if not (met & ((n_above == 0) | (above < goal))):
        cut = _bisect(acts_ptr, norms_ptr, row, d_sae, goal, HAS_NORMS, TILE, tl.float64)
        above, n_above, n_equal, magnitude = _sums_at(
            acts_ptr, norms_ptr, row, d_sae, cut, HAS_NORMS, TILE
        )

    n_kept = tl.zeros((), tl.int32)  # of the scores equal to the cut
    if cut > 0:
        score = cut.to(tl.float32, bitcast=True).to(tl.float64)
        square = score * score
        # the first of them with which the goal is met; dividing may miss it by one
        n = tl.ceil((goal - above) / square)
        n = tl.minimum(tl.maximum(n, 1.0), n_equal.to(tl.float64))
        n = tl.where((n > 1) & (above + (n - 1) * square >= goal), n - 1, n)
        n = tl.where((n < n_equal) & (above + n * square < goal), n + 1, n)
        upper, lower = tl.sqrt(above + n * square), tl.sqrt(above + (n - 1) * square)
        nearer = (n_above + n == 1) | (upper - target < target - lower)
        n_kept = (n - 1).to(tl.int32) + nearer.to(tl.int32)

    finite = finite_target & (magnitude < _INFINITE)
    n_before = tl.zeros((), tl.int32)  # scores equal to the cut at lower indices
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        acts, _, bits = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
        equal = (bits == cut).to(tl.int32)
        keep = (bits > cut) | ((equal > 0) & (n_before + tl.cumsum(equal, 0) <= n_kept))
        n_before += tl.sum(equal)
        # in float32: Triton's interpreter knows no constant in bfloat16 up to 3.7
        result = tl.where(finite, tl.where(keep, acts.to(tl.float32), 0.0), float("nan"))
        tl.store(out_ptr + row * d_sae + columns, result.to(acts.dtype), mask=columns < d_sae)
