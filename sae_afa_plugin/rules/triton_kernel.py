"""The prefix operator on CUDA devices, in Triton: per row, one read and one write of the matrix.

One program handles one row. Positive floating point numbers are ordered as their bits are, so the
smallest kept score is found by bisection on 31 bits, each step a sum of powers over the row. For
that a row of up to 32,768 features stays in registers. A wider one is read again for every step,
and 16 ways are tried at once.

The bisection runs in float32, and one pass in float64 confirms its answer, or else it is repeated
in float64. So the result is the one of the definition in :mod:`sae_afa_plugin.rules.operator`, and
cards with few float64 units are rarely slowed down.

Every element is read from memory once and written once. The later reads of a row, 2 of them or 11
for a wide row, find it in the caches, as far as these hold the rows in work.

Per batch, the rows share one bisection, in float64: 8 launches, each with 16 ways at once, and one
before and two after them. A program sums over its row, and a few operations on the device add the
rows up, in the same order every time, and choose the next 16; the host waits for nothing. The
matrix is read 11 times, and beside the output there are about 200 bytes for each row.

This module needs Triton. ``TRITON_INTERPRET=1``, set before it is imported, runs it on the CPU.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_afa_plugin.rules.operator import Backend, total_target

_RESIDENT = 32_768  # features of a row that fit the registers of 1,024 threads
_TILE = 1_024  # features that are read at a time in the other passes
_WAYS = tl.constexpr(16)
_LAUNCHES = 8  # 16^8 ways are more than 31 bits
_INFINITE = tl.constexpr(0x7F800000)  # as bits; everything above is NaN


def keep_prefix(
    acts: Tensor, target: Tensor, decoder_norm: Tensor | None, p: int, per: str
) -> Tensor:
    """The operator on a CUDA device, without synchronisation; arguments as of :class:`Backend`.

    ``acts`` are float32, bfloat16 or float16.
    """
    out = torch.empty(acts.shape, dtype=acts.dtype, device=acts.device)
    if out.numel() == 0:
        return out
    d_sae = acts.shape[-1]
    acts, target = acts.contiguous(), target.contiguous()
    norms = acts if decoder_norm is None else decoder_norm.contiguous()
    constants = {"HAS_NORMS": decoder_norm is not None, "TILE": _TILE, "enable_fp_fusion": False}
    with torch.cuda.device_of(acts):  # Triton launches on the current device
        if per == "batch":
            _keep_batch(acts, norms, target.view(-1), out, d_sae, p, constants)
            return out
        resident = triton.next_power_of_2(d_sae) if d_sae <= _RESIDENT else 0
        keep_row[(target.numel(),)](
            acts,
            norms,
            target,
            out,
            d_sae,
            P=p,
            RESIDENT=resident,
            num_warps=n_warps(resident),
            **constants,
        )
    return out


def _keep_batch(
    acts: Tensor,
    norms: Tensor,
    target: Tensor,
    out: Tensor,
    d_sae: int,
    p: int,
    constants: dict[str, bool | int],
) -> None:
    grid, constants = (len(target),), constants | {"num_warps": n_warps(0)}
    largest = torch.empty_like(target, dtype=torch.int32)
    scan_row[grid](acts, norms, target, largest, d_sae, **constants)
    total = total_target(target.where(largest >= 0, 0), p)
    goal = total * total if p == 2 else total

    n_ways = _WAYS.value
    ways = torch.arange(1, n_ways + 1, device=acts.device)
    sums = total.new_empty(len(target), n_ways)
    low = torch.zeros_like(ways[0])
    high = largest.amax().clamp(min=0).long() + 1
    for _ in range(_LAUNCHES):
        step = (high - low + n_ways - 1) // n_ways
        pivots = low + step * ways
        sum_row[grid](acts, norms, largest, pivots.int(), sums, d_sae, P=p, **constants)
        n_met = ((sums.sum(0) >= goal) & (pivots < high)).sum()
        high = high.minimum(low + step * (n_met + 1))
        low = low + step * n_met

    above, n_above = torch.empty_like(sums[:, 0]), torch.empty_like(largest)
    n_equal = torch.empty_like(largest)
    count_row[grid](
        acts, norms, largest, low.int(), above, n_above, n_equal, d_sae, P=p, **constants
    )
    before = n_equal.cumsum(0) - n_equal
    numbers = torch.stack([low, n_above.sum(), n_equal.sum()])
    values = torch.stack([above.sum(), total, goal])
    write_row[grid](acts, norms, largest, numbers, values, before, out, d_sae, P=p, **constants)


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
def _sum_of_powers(scores, mask, P: tl.constexpr, DTYPE: tl.constexpr):
    if P == 0:
        return tl.sum(mask.to(DTYPE), 0)
    masked = tl.where(mask, scores, 0.0).to(DTYPE)
    return tl.sum(masked * masked if P == 2 else masked, 0)


@triton.jit
def _sums_at_pivots(
    acts_ptr, norms_ptr, row, d_sae, pivots, HAS_NORMS, P, TILE: tl.constexpr, DTYPE: tl.constexpr
):
    """The powers at and above each of ``_WAYS`` bits, for a row in memory."""
    sums = tl.zeros((_WAYS,), DTYPE)
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        _, scores, bits = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
        sums += _sum_of_powers(scores[:, None], bits[:, None] >= pivots[None, :], P, DTYPE)
    return sums


@triton.jit
def _bisect_resident(acts_ptr, norms_ptr, row, d_sae, goal, HAS_NORMS, P, RESIDENT: tl.constexpr):
    """The largest bits at and above which the powers sum to the goal; 0 if there are none."""
    columns = tl.arange(0, RESIDENT)
    _, scores, bits = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
    low = tl.zeros((), tl.int32)
    high = tl.maximum(tl.max(bits), 0) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        if _sum_of_powers(scores, bits >= middle, P, tl.float32) >= goal:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _bisect(
    acts_ptr, norms_ptr, row, d_sae, goal, HAS_NORMS, P, TILE: tl.constexpr, DTYPE: tl.constexpr
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
        sums = _sums_at_pivots(acts_ptr, norms_ptr, row, d_sae, pivots, HAS_NORMS, P, TILE, DTYPE)
        n_met = tl.sum(((sums >= goal) & (pivots < high)).to(tl.int32))
        high = tl.minimum(high, low + step * (n_met + 1))
        low = low + step * n_met
    return low


@triton.jit
def _sums_at(acts_ptr, norms_ptr, row, d_sae, cut, HAS_NORMS, P: tl.constexpr, TILE: tl.constexpr):
    """Powers above the cut, how many scores are above and at it, the largest magnitude."""
    above = tl.zeros((), tl.float64)
    n_above, n_equal = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    magnitude = tl.zeros((), tl.int32)
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        _, scores, bits = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
        above += _sum_of_powers(scores, bits > cut, P, tl.float64)
        n_above += tl.sum((bits > cut).to(tl.int32))
        n_equal += tl.sum((bits == cut).to(tl.int32))
        magnitude = tl.maximum(magnitude, tl.max(bits & 0x7FFFFFFF))
    return above, n_above, n_equal, magnitude


@triton.jit
def _power(cut, P: tl.constexpr):
    """What a score with these bits adds to the sum."""
    if P == 0:
        return tl.full((), 1.0, tl.float64)
    score = cut.to(tl.float32, bitcast=True).to(tl.float64)
    return score * score if P == 2 else score


@triton.jit
def _kept_of_equal(
    above, n_above, n_equal, cut, target, goal, P: tl.constexpr, DTYPE: tl.constexpr
):
    """How many of the scores equal to the cut are kept, for a cut above 0."""
    power = _power(cut, P)
    # the first of them with which the goal is met; dividing may miss it by one
    n = tl.ceil((goal - above) / power)
    n = tl.minimum(tl.maximum(n, 1.0), n_equal.to(tl.float64))
    n = tl.where((n > 1) & (above + (n - 1) * power >= goal), n - 1, n)
    n = tl.where((n < n_equal) & (above + n * power < goal), n + 1, n)
    upper, lower = above + n * power, above + (n - 1) * power
    if P == 2:
        upper, lower = tl.sqrt(upper), tl.sqrt(lower)
    nearer = (n_above + n == 1) | (upper - target < target - lower)
    return (n - 1).to(DTYPE) + nearer.to(DTYPE)


@triton.jit
def _write(
    acts_ptr, norms_ptr, out_ptr, row, d_sae, cut, n_kept, finite, HAS_NORMS, TILE: tl.constexpr
):
    """What is above the cut, and the first of what is equal to it; NaN where not finite."""
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


@triton.jit
def keep_row(
    acts_ptr,
    norms_ptr,
    target_ptr,
    out_ptr,
    d_sae,
    HAS_NORMS: tl.constexpr,
    P: tl.constexpr,
    RESIDENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The kernel per row. ``RESIDENT`` is the row's width as a power of two, or 0 for a wide row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.float64)
    finite_target = tl.abs(target) < float("inf")
    target = tl.maximum(target, 0.0)
    goal = target * target if P == 2 else target

    narrow = goal.to(tl.float32)
    if RESIDENT > 0:
        cut = _bisect_resident(acts_ptr, norms_ptr, row, d_sae, narrow, HAS_NORMS, P, RESIDENT)
    else:
        cut = _bisect(acts_ptr, norms_ptr, row, d_sae, narrow, HAS_NORMS, P, TILE, tl.float32)
    above, n_above, n_equal, magnitude = _sums_at(
        acts_ptr, norms_ptr, row, d_sae, cut, HAS_NORMS, P, TILE
    )
    met = (cut == 0) | (above + n_equal * _power(cut, P) >= goal)
    if not (met & ((n_above == 0) | (above < goal))):
        cut = _bisect(acts_ptr, norms_ptr, row, d_sae, goal, HAS_NORMS, P, TILE, tl.float64)
        above, n_above, n_equal, magnitude = _sums_at(
            acts_ptr, norms_ptr, row, d_sae, cut, HAS_NORMS, P, TILE
        )

    n_kept = tl.zeros((), tl.int32)
    if cut > 0:
        n_kept = _kept_of_equal(above, n_above, n_equal, cut, target, goal, P, tl.int32)
    finite = finite_target & (magnitude < _INFINITE)
    _write(acts_ptr, norms_ptr, out_ptr, row, d_sae, cut, n_kept, finite, HAS_NORMS, TILE)


# --- per batch: one program for each row in every launch ---


@triton.jit
def scan_row(
    acts_ptr, norms_ptr, target_ptr, largest_ptr, d_sae, HAS_NORMS: tl.constexpr, TILE: tl.constexpr
):
    """The bits of the largest score of each row, at least 0; -1 where a row is not finite."""
    row = tl.program_id(0).to(tl.int64)
    finite = tl.abs(tl.load(target_ptr + row).to(tl.float64)) < float("inf")
    largest, magnitude = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        _, _, bits = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
        largest = tl.maximum(largest, tl.max(bits))
        magnitude = tl.maximum(magnitude, tl.max(bits & 0x7FFFFFFF))
    tl.store(largest_ptr + row, tl.where(finite & (magnitude < _INFINITE), largest, -1))


@triton.jit
def sum_row(
    acts_ptr,
    norms_ptr,
    largest_ptr,
    pivots_ptr,
    sums_ptr,
    d_sae,
    HAS_NORMS: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
):
    """The powers of each row at and above each of the pivots, 0 where a row is not finite."""
    row = tl.program_id(0).to(tl.int64)
    ways = tl.arange(0, _WAYS)
    pivots = tl.load(pivots_ptr + ways)
    sums = tl.zeros((_WAYS,), tl.float64)
    if tl.load(largest_ptr + row) >= tl.min(pivots):
        sums = _sums_at_pivots(
            acts_ptr, norms_ptr, row, d_sae, pivots, HAS_NORMS, P, TILE, tl.float64
        )
    tl.store(sums_ptr + row * _WAYS + ways, sums)


@triton.jit
def count_row(
    acts_ptr,
    norms_ptr,
    largest_ptr,
    cut_ptr,
    above_ptr,
    n_above_ptr,
    n_equal_ptr,
    d_sae,
    HAS_NORMS: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
):
    """Powers of each row above the cut, and how many of its scores are above and at it."""
    row = tl.program_id(0).to(tl.int64)
    above = tl.zeros((), tl.float64)
    n_above, n_equal = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    if tl.load(largest_ptr + row) >= 0:
        above, n_above, n_equal, _ = _sums_at(
            acts_ptr, norms_ptr, row, d_sae, tl.load(cut_ptr), HAS_NORMS, P, TILE
        )
    tl.store(above_ptr + row, above)
    tl.store(n_above_ptr + row, n_above)
    tl.store(n_equal_ptr + row, n_equal)


@triton.jit
def write_row(
    acts_ptr,
    norms_ptr,
    largest_ptr,
    numbers_ptr,
    values_ptr,
    before_ptr,
    out_ptr,
    d_sae,
    HAS_NORMS: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
):
    """The result. ``before`` says how many scores equal to the cut stand in earlier rows."""
    row = tl.program_id(0).to(tl.int64)
    cut = tl.load(numbers_ptr).to(tl.int32)
    n_above, n_equal = tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
    above, target, goal = tl.load(values_ptr), tl.load(values_ptr + 1), tl.load(values_ptr + 2)
    n_kept = tl.zeros((), tl.int64)
    if cut > 0:
        n_kept = _kept_of_equal(above, n_above, n_equal, cut, target, goal, P, tl.int64)
    n_kept -= tl.load(before_ptr + row)
    finite = tl.load(largest_ptr + row) >= 0
    _write(acts_ptr, norms_ptr, out_ptr, row, d_sae, cut, n_kept, finite, HAS_NORMS, TILE)


def _supports(acts: Tensor, p: int, per: str) -> bool:
    return acts.is_cuda and acts.dtype != torch.float64


BACKEND = Backend("triton", rank=0, supports=_supports, keep_prefix=keep_prefix)
