"""The prefix operator on CUDA devices, in Triton: per row, the matrix is read once and written once.

One program handles one row. Positive floating point numbers are ordered as their bits are, and the
smallest kept score is searched among these: the sum of powers at and above a pivot is compared with
the goal, the pivot is interpolated (regula falsi on the logarithm of the sum, with the weights of
the Illinois method), and both ends of the bracket are moved to scores that exist. That takes 5 to 10
sums over the row where bisection takes 31. A row of up to 32,768 features stays in registers all
the time. Of a wider one, a sample says from which bits on scores are put aside in one reading of the
row, to be searched in registers, and the second reading writes the result.

The search runs in float32, and one sum in float64 confirms its answer, or else moves it by some
scores, or else the search is repeated in float64. So the result is the one of the definition in
:mod:`sae_afa_plugin.rules.operator`, and cards with few float64 units are rarely slowed down.

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

_RESIDENT = 32_768  # features of a row that fit the registers of 512 threads
_TILE = 1_024  # features that are read at a time in the batch's passes
_WIDE_TILE, _WIDE_WARPS = 4_096, 16  # and of a wide row, and by how many warps
_SAMPLE = 4_096  # features of a wide row that say where to look
_CANDIDATES = 16_384  # scores of a wide row that are put aside and searched in registers
_BITS = tl.constexpr(0x7FFFFFFF)
_WAYS = tl.constexpr(16)
_LAUNCHES = 8  # 16^8 ways are more than 31 bits
_INFINITE = tl.constexpr(0x7F800000)  # as bits; everything above is NaN
_FIRST = tl.constexpr(3)  # sums after which the ends are moved to scores that exist
_PATIENCE = tl.constexpr(14)  # interpolations, after which the bracket is halved


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
    constants = {"HAS_NORMS": decoder_norm is not None, "enable_fp_fusion": False}
    grid = (target.numel(),)
    with torch.cuda.device_of(acts):  # Triton launches on the current device
        if per == "batch":
            _keep_batch(acts, norms, target.view(-1), out, d_sae, p, constants | {"TILE": _TILE})
        elif d_sae <= _RESIDENT:
            size, n = pieces(d_sae)
            constants |= {"P": p, "SIZE": size, "N": n, "num_warps": n_warps(size * n)}
            keep_row[grid](acts, norms, target, out, d_sae, **constants)
        else:
            aside = torch.empty(target.numel(), _CANDIDATES, device=acts.device)
            constants |= {"TILE": _WIDE_TILE, "SAMPLE": _SAMPLE, "CANDIDATES": _CANDIDATES}
            keep_wide_row[grid](
                acts, norms, target, out, aside, d_sae, P=p, num_warps=_WIDE_WARPS, **constants
            )
    return out


def pieces(d_sae: int) -> tuple[int, int]:
    """A row as 1 or 3 pieces of a power of two: 12,288 features are 3 x 4,096, not 16,384."""
    size = 1 << (d_sae - 1).bit_length()
    return (size // 4, 3) if size >= 4 and d_sae <= size // 4 * 3 else (size, 1)


def n_warps(width: int) -> int:
    """How many warps hold a row: 48 or 64 features for each thread."""
    return max(1, (1 << (width - 1).bit_length()) // 2048)


def _keep_batch(
    acts: Tensor,
    norms: Tensor,
    target: Tensor,
    out: Tensor,
    d_sae: int,
    p: int,
    constants: dict[str, bool | int],
) -> None:
    grid, constants = (len(target),), constants | {"num_warps": 8}
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

    above, n_equal = torch.empty_like(sums[:, 0]), torch.empty_like(largest)
    count_row[grid](acts, norms, largest, low.int(), above, n_equal, d_sae, P=p, **constants)
    before = n_equal.cumsum(0) - n_equal
    numbers = torch.stack([low, n_equal.sum()])
    values = torch.stack([above.sum(), total, goal])
    write_row[grid](acts, norms, largest, numbers, values, before, out, d_sae, P=p, **constants)


@triton.jit
def _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS: tl.constexpr):
    """Activations and their scores."""
    inside = columns < d_sae
    acts = tl.load(acts_ptr + row * d_sae + columns, mask=inside, other=0.0)
    scores = acts.to(tl.float32)
    if HAS_NORMS:
        scores *= tl.load(norms_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return acts, scores


@triton.jit
def _bits(scores):
    """In the order of the scores where these are positive, below 1 where they are not."""
    return scores.to(tl.int32, bitcast=True)


@triton.jit
def _powers(scores, mask, P: tl.constexpr, DTYPE: tl.constexpr):
    if P == 0:
        return mask.to(DTYPE)
    masked = tl.where(mask, scores, 0.0).to(DTYPE)
    return masked * masked if P == 2 else masked


@triton.jit
def _add_powers(powers, scores, mask, P: tl.constexpr):
    if P == 2:  # the product of two float32 is exact in float64
        masked = tl.where(mask, scores, 0.0).to(powers.dtype)
        return tl.fma(masked, masked, powers)
    return powers + _powers(scores, mask, P, powers.dtype)


@triton.jit
def _power(bits, P: tl.constexpr):
    """What a score with these bits adds to the sum, in float64."""
    if P == 0:
        return tl.full((), 1.0, tl.float64)
    score = bits.to(tl.float32, bitcast=True).to(tl.float64)
    return score * score if P == 2 else score


# --- the search: its bracket holds sums that meet the goal at low, and miss it at high ---


@triton.jit
def _pivot(low, high, met, missed, n_tried):
    """Where to look next: strictly between low and high.

    ``met`` and ``missed`` are the logarithms of sum over goal at the two ends. They are nearly
    linear in the square of the score.
    """
    lower = low.to(tl.float32, bitcast=True)
    upper = high.to(tl.float32, bitcast=True)
    lower, upper = lower * lower, upper * upper
    value = tl.sqrt(lower + (upper - lower) * (met / (met - missed)))
    pivot = value.to(tl.float32).to(tl.int32, bitcast=True)
    pivot = tl.where(n_tried < _PATIENCE, pivot, low + (high - low) // 2)
    return tl.minimum(tl.maximum(pivot, low + 1), high - 1)


@triton.jit
def _excess(sum, goal):
    """The logarithm of sum over goal, within limits that keep a pivot from an end."""
    ratio = sum / tl.maximum(goal, 1e-30)
    return tl.log(tl.minimum(tl.maximum(ratio, 1e-3), 1e6).to(tl.float32))


@triton.jit
def _narrow(low, high, met, missed, last, pivot, sum, neighbour, goal):
    """The bracket after a sum. An end that stays for a second time gets half of its weight."""
    if sum >= goal:
        low, met = neighbour, tl.maximum(_excess(sum, goal), 1e-9)
        missed = tl.where(last == 1, missed * 0.5, missed)
        last = 1
    else:
        high, missed = neighbour + 1, tl.minimum(_excess(sum, goal), -1e-9)
        met = tl.where(last == -1, met * 0.5, met)
        last = -1
    return low, high, met, missed, last


# --- a row in registers: three pieces, or one ---


@triton.jit
def _sum_from(a, b, c, pivot, N: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """The powers of the scores at and above some bits."""
    powers = _powers(a, _bits(a) >= pivot, P, DTYPE)
    if N == 3:
        powers = _add_powers(powers, b, _bits(b) >= pivot, P)
        powers = _add_powers(powers, c, _bits(c) >= pivot, P)
    return tl.sum(powers, 0)


# Compared as floating point numbers, since the sums compare bits, and not one by the other's
# opposite: where results of a comparison are of use twice, the compiler keeps one for each score.


@triton.jit
def _above(scores, pivot):
    return tl.where(scores >= pivot, scores, float("inf"))


@triton.jit
def _below(scores, pivot):
    return tl.where(scores < pivot, scores, 0.0)


@triton.jit
def _neighbour(a, b, c, pivot, upwards, N: tl.constexpr):
    """The smallest bits at or above some, or the largest below them (0 if none is positive)."""
    pivot = pivot.to(tl.float32, bitcast=True)
    if upwards:
        nearest = _above(a, pivot)
        if N == 3:
            nearest = tl.minimum(nearest, tl.minimum(_above(b, pivot), _above(c, pivot)))
        nearest = tl.min(nearest, 0)
    else:
        nearest = _below(a, pivot)
        if N == 3:
            nearest = tl.maximum(nearest, tl.maximum(_below(b, pivot), _below(c, pivot)))
        nearest = tl.max(nearest, 0)
    return tl.maximum(_bits(nearest), 0)


@triton.jit
def _largest(a, b, c, N: tl.constexpr):
    """The largest bits of a score, at least 0, and those of a magnitude."""
    bits, magnitude = _bits(a), _bits(a) & _BITS
    if N == 3:
        bits = tl.maximum(bits, tl.maximum(_bits(b), _bits(c)))
        magnitude = tl.maximum(magnitude, tl.maximum(_bits(b) & _BITS, _bits(c) & _BITS))
    return tl.maximum(tl.max(bits, 0), 0), tl.max(magnitude, 0)


@triton.jit
def _search(a, b, c, largest, goal, N: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """The largest bits at and above which the powers sum to the goal; 0 if there are none."""
    total = _sum_from(a, b, c, 1, N, P, DTYPE)
    met = (total >= goal) & (largest > 0)
    low = tl.where(met, 1, 0)
    high = tl.where(met, largest + 1, 1)
    f_low = tl.maximum(_excess(total, goal), 1e-9)
    f_high = tl.minimum(_excess(_power(largest, P).to(DTYPE), goal), -1e-3)
    last, n_tried = 0, 0
    while high - low > 1:
        pivot = _pivot(low, high, f_low, f_high, n_tried)
        sum = _sum_from(a, b, c, pivot, N, P, DTYPE)
        # the last steps are from score to score; before them any bits are as good
        neighbour = pivot - tl.where(sum >= goal, 0, 1)
        if n_tried >= _FIRST:
            neighbour = _neighbour(a, b, c, pivot, sum >= goal, N)
        low, high, f_low, f_high, last = _narrow(
            low, high, f_low, f_high, last, pivot, sum, neighbour, goal
        )
        n_tried += 1
    return low


@triton.jit
def _count(a, b, c, cut, N: tl.constexpr, P: tl.constexpr):
    """The powers above the cut, in float64, and how many scores are at it."""
    above = _powers(a, _bits(a) > cut, P, tl.float64)
    equal = (_bits(a) == cut).to(tl.int32)
    if N == 3:
        above = _add_powers(above, b, _bits(b) > cut, P)
        above = _add_powers(above, c, _bits(c) > cut, P)
        equal += (_bits(b) == cut).to(tl.int32) + (_bits(c) == cut).to(tl.int32)
    return tl.sum(above, 0), tl.sum(equal, 0)


@triton.jit
def _is_cut(above, n_equal, cut, goal, P: tl.constexpr):
    """Whether the goal is missed above the cut, and met with it. -1: too high; 1: too low."""
    too_high = (cut > 0) & (above + n_equal * _power(cut, P) < goal)
    too_low = (above > 0) & (above >= goal)
    return tl.where(too_high, -1, tl.where(too_low, 1, 0))


@triton.jit
def _cut(a, b, c, largest, goal, N: tl.constexpr, P: tl.constexpr):
    """The smallest kept score as bits (0: all), the powers above it, how many scores are at it."""
    cut = _search(a, b, c, largest, goal.to(tl.float32), N, P, tl.float32)
    above, n_equal = _count(a, b, c, cut, N, P)
    wrong = _is_cut(above, n_equal, cut, goal, P)
    n_moved = 0
    while (wrong != 0) & (n_moved < 4):  # by the rounding of float32
        cut = _neighbour(a, b, c, cut + tl.maximum(wrong, 0), wrong > 0, N)
        above, n_equal = _count(a, b, c, cut, N, P)
        wrong = _is_cut(above, n_equal, cut, goal, P)
        n_moved += 1
    if wrong != 0:  # beyond the range of float32
        cut = _search(a, b, c, largest, goal, N, P, tl.float64)
        above, n_equal = _count(a, b, c, cut, N, P)
    return cut, above, n_equal


@triton.jit
def _kept_of_equal(above, n_equal, cut, target, goal, P: tl.constexpr, DTYPE: tl.constexpr):
    """How many of the scores equal to the cut are kept; 0 where the cut is 0."""
    power = tl.where(cut > 0, _power(cut, P), 1.0)
    # the first of them with which the goal is met; dividing may miss it by one
    n = tl.ceil((goal - above) / power)
    n = tl.maximum(tl.minimum(n, n_equal.to(tl.float64)), 1.0)
    n = tl.where((n > 1) & (above + (n - 1) * power >= goal), n - 1, n)
    n = tl.where((n < n_equal) & (above + n * power < goal), n + 1, n)
    upper, lower = above + n * power, above + (n - 1) * power
    if P == 2:
        upper, lower = tl.sqrt(upper), tl.sqrt(lower)
    # nothing is above: at least one is kept
    nearer = ((above == 0) & (n == 1)) | (upper - target < target - lower)
    return tl.where(cut > 0, (n - 1).to(DTYPE) + nearer.to(DTYPE), 0)


@triton.jit
def _write_piece(
    acts_ptr,
    norms_ptr,
    out_ptr,
    row,
    columns,
    d_sae,
    cut,
    n_kept,
    n_equal,
    n_before,
    finite,
    HAS_NORMS: tl.constexpr,
):
    """What is above the cut, and the first of what is equal to it; NaN where not finite."""
    acts, scores = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
    keep = _bits(scores) > cut
    if n_kept >= n_equal:
        keep = _bits(scores) >= tl.maximum(cut, 1)
    elif n_kept > n_before:
        equal = (_bits(scores) == cut).to(tl.int32)
        keep = keep | ((equal > 0) & (n_before + tl.cumsum(equal, 0) <= n_kept))
        n_before += tl.sum(equal, 0)
    # in float32: Triton's interpreter knows no constant in bfloat16 up to 3.7
    result = tl.where(finite, tl.where(keep, acts.to(tl.float32), 0.0), float("nan"))
    tl.store(out_ptr + row * d_sae + columns, result.to(acts.dtype), mask=columns < d_sae)
    return n_before


@triton.jit
def _write(
    acts_ptr,
    norms_ptr,
    out_ptr,
    row,
    d_sae,
    cut,
    n_kept,
    n_equal,
    n_before,
    finite,
    HAS_NORMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """All of a row. ``n_before`` scores equal to the cut stand in earlier rows."""
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        n_before = _write_piece(
            acts_ptr,
            norms_ptr,
            out_ptr,
            row,
            columns,
            d_sae,
            cut,
            n_kept,
            n_equal,
            n_before,
            finite,
            HAS_NORMS,
        )


@triton.jit
def _target(target_ptr, row, P: tl.constexpr):
    """The target, at least 0, what the sums have to reach for it, and whether it is finite."""
    target = tl.load(target_ptr + row).to(tl.float64)
    finite = tl.abs(target) < float("inf")
    target = tl.maximum(target, 0.0)
    return target, target * target if P == 2 else target, finite


@triton.jit
def keep_row(
    acts_ptr,
    norms_ptr,
    target_ptr,
    out_ptr,
    d_sae,
    HAS_NORMS: tl.constexpr,
    P: tl.constexpr,
    SIZE: tl.constexpr,
    N: tl.constexpr,
):
    """The kernel for a row that stays in registers, as ``N`` (1 or 3) pieces of ``SIZE``."""
    row = tl.program_id(0).to(tl.int64)
    target, goal, finite = _target(target_ptr, row, P)
    columns = tl.arange(0, SIZE)
    _, a = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
    b, c = a, a
    if N == 3:
        _, b = _load(acts_ptr, norms_ptr, row, columns + SIZE, d_sae, HAS_NORMS)
        _, c = _load(acts_ptr, norms_ptr, row, columns + 2 * SIZE, d_sae, HAS_NORMS)
    largest, magnitude = _largest(a, b, c, N)
    finite = finite & (magnitude < _INFINITE)
    cut, above, n_equal = _cut(a, b, c, largest, goal, N, P)
    n_kept = _kept_of_equal(above, n_equal, cut, target, goal, P, tl.int32)
    n_before = tl.zeros((), tl.int32)
    for i in tl.static_range(N):
        n_before = _write_piece(
            acts_ptr,
            norms_ptr,
            out_ptr,
            row,
            columns + i * SIZE,
            d_sae,
            cut,
            n_kept,
            n_equal,
            n_before,
            finite,
            HAS_NORMS,
        )


# --- a row that does not fit the registers ---


@triton.jit
def _search_memory(
    acts_ptr,
    norms_ptr,
    row,
    d_sae,
    largest,
    goal,
    HAS_NORMS: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
):
    """As :func:`_search`, in float64, with one reading of the row for each sum."""
    low, high = tl.zeros((), tl.int32), largest + 1
    f_low, f_high = tl.zeros((), tl.float32), tl.zeros((), tl.float32) - 1e-3
    last, n_tried = 0, 0
    while high - low > 1:
        pivot = _pivot(low, high, f_low, f_high, n_tried)
        pivot = tl.where(n_tried == 0, 1, pivot)  # first the sum of all
        powers = tl.zeros((TILE,), tl.float64)
        above = tl.full((TILE,), float("inf"), tl.float32)
        below = tl.zeros((TILE,), tl.float32)
        for start in range(0, d_sae, TILE):
            columns = start + tl.arange(0, TILE)
            _a, scores = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
            powers = _add_powers(powers, scores, _bits(scores) >= pivot, P)
            above = tl.minimum(above, _above(scores, pivot.to(tl.float32, bitcast=True)))
            below = tl.maximum(below, _below(scores, pivot.to(tl.float32, bitcast=True)))
        sum = tl.sum(powers, 0)
        neighbour = _bits(tl.where(sum >= goal, tl.min(above, 0), tl.max(below, 0)))
        low, high, f_low, f_high, last = _narrow(
            low, high, f_low, f_high, last, pivot, sum, neighbour, goal
        )
        n_tried += 1
    return low


@triton.jit
def keep_wide_row(
    acts_ptr,
    norms_ptr,
    target_ptr,
    out_ptr,
    aside_ptr,
    d_sae,
    HAS_NORMS: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
    SAMPLE: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """The kernel for a wide row. Scores are put aside in ``[n_rows, CANDIDATES]``."""
    row = tl.program_id(0).to(tl.int64)
    target, goal, finite = _target(target_ptr, row, P)

    # from which bits on about 0.7 x CANDIDATES scores are to be expected, from runs of 32
    runs: tl.constexpr = SAMPLE // 32
    index = tl.arange(0, SAMPLE)
    sampled = index // 32 * (d_sae // runs) + index % 32
    _a, sample = _load(acts_ptr, norms_ptr, row, sampled, d_sae, HAS_NORMS)
    largest, _m = _largest(sample, sample, sample, 1)
    rank = tl.maximum(0.7 * CANDIDATES * SAMPLE / d_sae, 1.0).to(tl.float32)
    floor = tl.maximum(_search(sample, sample, sample, largest, rank, 1, 0, tl.float32), 1)

    n_aside = tl.zeros((), tl.int32)
    most = tl.zeros((TILE,), tl.int32)
    magnitudes = tl.zeros((TILE,), tl.int32)
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        _a, scores = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
        bits = _bits(scores)
        most, magnitudes = tl.maximum(most, bits), tl.maximum(magnitudes, bits & _BITS)
        candidate = (bits >= floor).to(tl.int32)
        place = n_aside + tl.cumsum(candidate, 0) - 1
        fits = (candidate > 0) & (place < CANDIDATES)
        tl.store(aside_ptr + row * CANDIDATES + place, scores, mask=fits)
        n_aside += tl.sum(candidate, 0)
    largest = tl.max(most, 0)
    finite = finite & (tl.max(magnitudes, 0) < _INFINITE)
    tl.debug_barrier()  # what other threads put aside is read

    index = tl.arange(0, CANDIDATES)
    a = tl.load(aside_ptr + row * CANDIDATES + index, mask=index < n_aside, other=0.0)
    cut, above, n_equal = _cut(a, a, a, largest, goal, 1, P)
    if (n_aside > CANDIDATES) | ((cut == 0) & (floor > 1)):
        cut = _search_memory(acts_ptr, norms_ptr, row, d_sae, largest, goal, HAS_NORMS, P, TILE)
        above, n_equal = _sums_at(acts_ptr, norms_ptr, row, d_sae, cut, HAS_NORMS, P, TILE)
    n_kept = _kept_of_equal(above, n_equal, cut, target, goal, P, tl.int32)

    n_before = tl.zeros((), tl.int32)
    _write(
        acts_ptr,
        norms_ptr,
        out_ptr,
        row,
        d_sae,
        cut,
        n_kept,
        n_equal,
        n_before,
        finite,
        HAS_NORMS,
        TILE,
    )


@triton.jit
def _sums_at(
    acts_ptr,
    norms_ptr,
    row,
    d_sae,
    cut,
    HAS_NORMS: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
):
    """As :func:`_count`, for a row in memory."""
    powers, equal = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.int32)
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        _a, scores = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
        powers = _add_powers(powers, scores, _bits(scores) > cut, P)
        equal += (_bits(scores) == cut).to(tl.int32)
    return tl.sum(powers, 0), tl.sum(equal, 0)


# --- per batch: one program for each row in every launch ---


@triton.jit
def scan_row(
    acts_ptr, norms_ptr, target_ptr, largest_ptr, d_sae, HAS_NORMS: tl.constexpr, TILE: tl.constexpr
):
    """The bits of the largest score of each row, at least 0; -1 where a row is not finite."""
    row = tl.program_id(0).to(tl.int64)
    finite = tl.abs(tl.load(target_ptr + row).to(tl.float64)) < float("inf")
    most, magnitudes = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)
    for start in range(0, d_sae, TILE):
        columns = start + tl.arange(0, TILE)
        _a, scores = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
        most = tl.maximum(most, _bits(scores))
        magnitudes = tl.maximum(magnitudes, _bits(scores) & _BITS)
    finite = finite & (tl.max(magnitudes, 0) < _INFINITE)
    tl.store(largest_ptr + row, tl.where(finite, tl.max(most, 0), -1))


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
        for start in range(0, d_sae, TILE):
            columns = start + tl.arange(0, TILE)
            _a, scores = _load(acts_ptr, norms_ptr, row, columns, d_sae, HAS_NORMS)
            mask = _bits(scores)[:, None] >= pivots[None, :]
            sums += tl.sum(_powers(scores[:, None], mask, P, tl.float64), 0)
    tl.store(sums_ptr + row * _WAYS + ways, sums)


@triton.jit
def count_row(
    acts_ptr,
    norms_ptr,
    largest_ptr,
    cut_ptr,
    above_ptr,
    n_equal_ptr,
    d_sae,
    HAS_NORMS: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
):
    """Powers of each row above the cut, and how many of its scores are at it."""
    row = tl.program_id(0).to(tl.int64)
    above, n_equal = tl.zeros((), tl.float64), tl.zeros((), tl.int32)
    if tl.load(largest_ptr + row) >= 0:
        cut = tl.load(cut_ptr)
        above, n_equal = _sums_at(acts_ptr, norms_ptr, row, d_sae, cut, HAS_NORMS, P, TILE)
    tl.store(above_ptr + row, above)
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
    cut, n_equal = tl.load(numbers_ptr).to(tl.int32), tl.load(numbers_ptr + 1)
    above, target, goal = tl.load(values_ptr), tl.load(values_ptr + 1), tl.load(values_ptr + 2)
    n_kept = _kept_of_equal(above, n_equal, cut, target, goal, P, tl.int64)
    n_before = tl.load(before_ptr + row)
    finite = tl.load(largest_ptr + row) >= 0
    _write(
        acts_ptr,
        norms_ptr,
        out_ptr,
        row,
        d_sae,
        cut,
        n_kept,
        n_equal,
        n_before,
        finite,
        HAS_NORMS,
        TILE,
    )


def _supports(acts: Tensor, p: int, per: str) -> bool:
    return acts.is_cuda and acts.dtype != torch.float64


BACKEND = Backend("triton", rank=0, supports=_supports, keep_prefix=keep_prefix)
