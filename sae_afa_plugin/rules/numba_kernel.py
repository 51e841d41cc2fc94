"""The prefix operator on the CPU in one pass over memory, compiled by Numba where it is installed.

Nothing is sorted as a whole. The powers of the scores are summed into buckets of nearly equal
scores, which are the leading bits of the floating point numbers; from the largest bucket down, the
sums say in which bucket the target is met, and only that bucket is sorted.

Per row, a row is read from memory once and stays in the cache of its core until its result is
written, so the cost hardly depends on how many features are kept, and in float32 no temporary is
larger than a row. Per batch, the matrix is read three times: every thread sums the buckets of its
rows, then collects its scores of the bucket in which the sum of all of them meets the target, then
writes; no temporary is larger than that bucket.

The definition is the one of :mod:`sae_afa_plugin.rules.operator`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_afa_plugin.rules.operator import Backend, total_target

_SHIFT = 19  # a bucket is an exponent and 4 bits: its largest score is 1/16 above its smallest
_N_BUCKETS = 1 << (31 - _SHIFT)
_INFINITE = 0x7F800000  # as bits; everything above is NaN
_LEAST = 1  # the bits of the smallest positive float32
_TINY = float(np.finfo(np.float64).tiny)  # below every power of a positive float32
_ELEMENTS_PER_THREAD = 1 << 17  # fewer are not worth a thread
_CONVERTED = 1 << 22  # elements of half precision that are float32 at a time

_Kernel = Callable[..., None]


def compile_kernel(function: _Kernel, signature: str, **options: Any) -> _Kernel | None:
    """Compile a function that releases the interpreter, or None where Numba does not work.

    The first call on a machine compiles, for a few seconds; later ones read Numba's cache. One that
    is damaged is made again, and one that cannot be read or written is done without.
    """
    try:
        from numba import njit  # pyright: ignore
    except ImportError:  # also of a Numba that does not know this NumPy
        return None
    with suppress(Exception):  # whatever reading a damaged file can raise
        kernel: Any = njit(nogil=True, cache=True, **options)(function)
        try:
            kernel.compile(signature)
        except Exception:
            if not kernel.signatures:  # else it is compiled, and only could not be kept
                kernel.recompile()  # of what is not compiled yet: empties the cache, unread
                with suppress(Exception):
                    kernel.compile(signature)
        if kernel.signatures:
            kernel.disable_compile()  # for other types, as where the signature is given at once
            return kernel
    return njit(signature, nogil=True, **options)(function)


def in_threads(kernel: _Kernel, arguments: list[tuple[Any, ...]]) -> None:
    """Call a compiled kernel once for each set of arguments, all at the same time."""
    if len(arguments) == 1:
        kernel(*arguments[0])
        return
    with ThreadPoolExecutor(len(arguments)) as pool:
        list(pool.map(lambda each: kernel(*each), arguments))


@functools.cache
def compiled(p: int) -> _Kernel | None:
    """The compiled rule per row, or None where Numba is missing or does not know this NumPy."""
    return compile_kernel(_rows_kernel(p), "void(f4[:,::1], f4[::1], f8[::1], f4[:,::1])")


@functools.cache
def _compiled_batch(p: int) -> tuple[_Kernel, _Kernel, _Kernel]:
    """The three passes of the rule per batch."""
    matrix, norms, finite = "f4[:,::1]", "f4[::1]", "b1[::1]"
    sum_up = compile_kernel(
        _sum_up_kernel(p), f"void({matrix}, {norms}, f8[::1], {finite}, f8[::1])"
    )
    collect = compile_kernel(_collect, f"void({matrix}, {norms}, {finite}, i4, i4[::1], i8[::1])")
    write = compile_kernel(_write, f"void({matrix}, {norms}, {finite}, i4, i8, {matrix})")
    assert sum_up is not None
    assert collect is not None
    assert write is not None
    return sum_up, collect, write


def keep_prefix(
    acts: Tensor, target: Tensor, decoder_norm: Tensor | None, p: int, per: str
) -> Tensor:
    """The operator, with as many threads as PyTorch uses; arguments as of :class:`Backend`.

    ``acts`` are on the CPU, in float32, bfloat16 or float16.

    Raises:
        RuntimeError: If :func:`compiled` gives no kernel.
    """
    kernel = compiled(p)
    if kernel is None:
        raise RuntimeError("the Numba kernel needs Numba: pip install 'sae-afa-plugin[fast]'")
    out = torch.empty(acts.shape, dtype=acts.dtype)
    if out.numel() == 0:
        return out
    rows = acts.detach().reshape(-1, acts.shape[-1]).contiguous()
    norm = torch.ones(rows.shape[1]) if decoder_norm is None else decoder_norm.detach().float()
    targets = target.detach().reshape(-1).double().contiguous().numpy()
    keep = _keep_rows if per == "row" else _keep_batch
    keep(p, rows, norm.contiguous().numpy(), targets, out.view(rows.shape))
    return out


def _split(rows: Tensor) -> list[list[slice]]:
    """Which rows each thread takes, for every set of rows that is in float32 at a time."""
    n, d_sae = rows.shape
    step = n if rows.dtype == torch.float32 else max(1, _CONVERTED // d_sae)
    sets: list[list[slice]] = []
    for start in range(0, n, step):
        size = min(step, n - start)
        n_threads = min(torch.get_num_threads(), max(1, size * d_sae // _ELEMENTS_PER_THREAD))
        bounds = [start + size * i // n_threads for i in range(n_threads + 1)]
        sets.append([slice(*pair) for pair in itertools.pairwise(bounds)])
    return sets


def _run(
    kernel: _Kernel,
    rows: Tensor,
    norm: Any,
    sets: list[list[slice]],
    arguments: Iterable[tuple[Any, ...]],
    out: Tensor | None = None,
) -> None:
    """Call a kernel on each part of the rows: their float32, the norms, arguments, the output."""
    remaining = iter(arguments)
    for parts in sets:
        start, stop = parts[0].start, parts[-1].stop
        wide = rows[start:stop].float()
        matrices = [wide]
        if out is not None:  # in half precision a row is overwritten by its result
            matrices.append(out[start:stop] if out.dtype == torch.float32 else wide)
        calls: list[tuple[Any, ...]] = []
        for part in parts:
            acts, *result = (m[part.start - start : part.stop - start].numpy() for m in matrices)
            calls.append((acts, norm, *next(remaining), *result))
        in_threads(kernel, calls)
        if out is not None and out.dtype != torch.float32:
            out[start:stop] = wide


def _keep_rows(p: int, rows: Tensor, norm: Any, targets: Any, out: Tensor) -> None:
    kernel, sets = compiled(p), _split(rows)
    assert kernel is not None
    _run(kernel, rows, norm, sets, ((targets[part],) for parts in sets for part in parts), out)


def _keep_batch(p: int, rows: Tensor, norm: Any, targets: Any, out: Tensor) -> None:
    sum_up, collect, write = _compiled_batch(p)
    sets = _split(rows)
    parts = [part for each in sets for part in each]
    finite = np.empty(len(rows), np.bool_)
    sums = np.zeros((len(parts), _N_BUCKETS))
    arguments = ((targets[part], finite[part], sums[i]) for i, part in enumerate(parts))
    _run(sum_up, rows, norm, sets, arguments)
    target = total_target(torch.from_numpy(np.where(finite, targets, 0.0)), p).item()
    goal = max(target * target if p == 2 else target, _TINY)  # so that one score is kept

    totals = sums.sum(0)[::-1].cumsum()  # from the largest bucket down
    bucket = _N_BUCKETS - 1 - int(np.searchsorted(totals, goal))
    n_allowed = [rows.numel()] * len(parts)  # of the scores equal to the cut
    if bucket < 0:  # all positive scores are below the target
        cut = _LEAST
    else:
        above = float(totals[_N_BUCKETS - 2 - bucket]) if bucket < _N_BUCKETS - 1 else 0.0
        # memory that is not written to is not taken
        found = [np.empty((part.stop - part.start) * rows.shape[1], np.int32) for part in parts]
        n_found = np.empty((len(parts), 1), np.int64)
        _run(
            collect,
            rows,
            norm,
            sets,
            (
                (finite[part], np.int32(bucket), found[i], n_found[i])
                for i, part in enumerate(parts)
            ),
        )
        found = [some[: int(n)] for some, (n,) in zip(found, n_found, strict=True)]
        bits = np.sort(np.concatenate(found))[::-1]  # ordered as the scores are
        kept = _kept_of_bucket(p, bits.view(np.float32).astype(np.float64), above, target, goal)
        cut = int(bits[kept - 1]) if kept > 0 else (bucket + 1) << _SHIFT
        n_left = int((bits[:kept] == cut).sum())
        for i, some in enumerate(found if kept > 0 else []):
            n_allowed[i] = min(int((some == cut).sum()), n_left)
            n_left -= n_allowed[i]
    _run(
        write,
        rows,
        norm,
        sets,
        ((finite[part], np.int32(cut), n) for part, n in zip(parts, n_allowed, strict=True)),
        out,
    )


def _kept_of_bucket(p: int, values: Any, above: float, target: float, goal: float) -> int:
    """How many of the sorted scores of a bucket are kept, after scores whose sum is ``above``."""
    powers = values**p
    sums = above + powers.cumsum()
    kept = int(np.searchsorted(sums, goal))
    if kept < len(values):
        upper, lower = sums[kept], sums[kept - 1] if kept > 0 else above
        if p == 2:
            upper, lower = np.sqrt(upper), np.sqrt(lower)
        kept += bool(lower == 0.0 or upper - target < target - lower)
    return kept


# --- compiled ---


def _rows_kernel(p: int) -> _Kernel:
    """The rule per row. Numba takes ``p`` for a constant, so each p is code of its own."""

    def keep_rows(acts: Any, norms: Any, targets: Any, out: Any) -> None:
        """``acts [n, d_sae]`` to ``out``, with ``norms [d_sae]`` and ``targets [n]``."""
        d_sae = acts.shape[1]
        scores = np.empty(d_sae, np.float32)
        score_bits = scores.view(np.int32)  # ordered as the scores are, where these are positive
        candidates = np.empty(d_sae, np.float32)
        candidate_bits = candidates.view(np.int32)
        bucket = np.empty(d_sae, np.float32)
        sums = np.zeros(_N_BUCKETS, np.float64)
        cut = np.empty(1, np.float32)
        cut_bits = cut.view(np.int32)
        floor = np.int32(_LEAST)
        for row in range(acts.shape[0]):
            a, result = acts[row], out[row]
            largest = np.int32(0)
            for i in range(d_sae):
                scores[i] = a[i] * norms[i]
                largest = max(largest, score_bits[i] & np.int32(0x7FFFFFFF))
            if largest >= _INFINITE or not np.isfinite(targets[row]):
                result[:] = np.nan
                continue
            target = max(targets[row], 0.0)
            goal = target * target if p == 2 else target

            # Rows of a batch are alike: look first at what is above half the cut of the row before.
            crossed = False
            n_equal = d_sae  # how many scores equal to the cut are kept
            while True:
                n = 0
                for i in range(d_sae):  # without a branch, which could not be predicted
                    candidates[n] = scores[i]
                    n += score_bits[i] >= floor
                top = 0
                for i in range(n):
                    b = candidate_bits[i] >> _SHIFT
                    top = max(top, b)
                    value = np.float64(candidates[i])
                    sums[b] += value * value if p == 2 else value if p == 1 else 1.0
                total = 0.0  # of all scores that are certain to be kept
                b = top
                while b >= 0 and not crossed:
                    if sums[b] == 0.0 or total + sums[b] < goal:
                        total += sums[b]
                        b -= 1
                        continue
                    m = 0
                    for i in range(n):
                        bucket[m] = candidates[i]
                        m += (candidate_bits[i] >> _SHIFT) == b
                    values = np.sort(bucket[:m])
                    j = m  # values[j:] are below the target
                    following = total
                    while j > 0:
                        value = np.float64(values[j - 1])
                        following = total + (value * value if p == 2 else value if p == 1 else 1.0)
                        if following >= goal:
                            crossed = True
                            break
                        total = following
                        j -= 1
                    if not crossed:  # the sum in another order rounds to below the target
                        b -= 1
                        continue
                    cut[0] = values[j - 1]
                    above = j
                    while above < m and values[above] == cut[0]:
                        above += 1
                    n_equal = above - j
                    if p == 2:
                        nearer = np.sqrt(following) - target < target - np.sqrt(total)
                    else:
                        nearer = following - target < target - total
                    if nearer or total == 0.0:
                        n_equal += 1
                    elif n_equal == 0:  # the cut is the score before
                        n_equal = d_sae
                        if above < m:
                            cut[0] = values[above]
                        else:  # anything between the two buckets will do
                            cut_bits[0] = (b + 1) << _SHIFT
                sums[: top + 1] = 0.0
                if crossed or floor == _LEAST:
                    break
                floor = np.int32(_LEAST)
            if not crossed:  # all positive scores
                cut_bits[0] = _LEAST

            for i in range(d_sae):
                # as integers: where the processor flushes denormals, 0.0 >= cut could be true
                result[i] = a[i] if score_bits[i] >= cut_bits[0] else np.float32(0.0)
            if n_equal < d_sae:
                for i in range(d_sae):
                    if score_bits[i] == cut_bits[0]:
                        n_equal -= 1
                        if n_equal < 0:
                            result[i] = np.float32(0.0)
            cut[0] /= np.float32(2.0)
            floor = max(cut_bits[0], np.int32(_LEAST))

    return keep_rows


def _sum_up_kernel(p: int) -> _Kernel:
    """The first pass per batch: which rows are finite, and the sums of their buckets."""

    def sum_up(acts: Any, norms: Any, targets: Any, finite: Any, sums: Any) -> None:
        d_sae = acts.shape[1]
        scores = np.empty(d_sae, np.float32)
        score_bits = scores.view(np.int32)
        candidates = np.empty(d_sae, np.float32)
        candidate_bits = candidates.view(np.int32)
        for row in range(acts.shape[0]):
            a = acts[row]
            largest = np.int32(0)
            for i in range(d_sae):
                scores[i] = a[i] * norms[i]
                largest = max(largest, score_bits[i] & np.int32(0x7FFFFFFF))
            finite[row] = largest < _INFINITE and np.isfinite(targets[row])
            if not finite[row]:
                continue
            n = 0
            for i in range(d_sae):  # without a branch, which could not be predicted
                candidates[n] = scores[i]
                n += score_bits[i] >= _LEAST
            for i in range(n):
                value = np.float64(candidates[i])
                power = value * value if p == 2 else value if p == 1 else 1.0
                sums[candidate_bits[i] >> _SHIFT] += power

    return sum_up


def _collect(acts: Any, norms: Any, finite: Any, bucket: Any, found: Any, n_found: Any) -> None:
    """The second pass per batch: the scores of one bucket, as bits, and how many they are."""
    d_sae = acts.shape[1]
    scores = np.empty(d_sae, np.float32)
    score_bits = scores.view(np.int32)
    n = 0
    for row in range(acts.shape[0]):
        if finite[row]:
            a = acts[row]
            for i in range(d_sae):
                scores[i] = a[i] * norms[i]
            for i in range(d_sae):
                found[n] = score_bits[i]
                n += (score_bits[i] >> _SHIFT) == bucket
    n_found[0] = n


def _write(acts: Any, norms: Any, finite: Any, cut: Any, n_allowed: Any, out: Any) -> None:
    """The third pass per batch: what is above the cut, and the first of what is equal to it."""
    d_sae = acts.shape[1]
    scores = np.empty(d_sae, np.float32)
    score_bits = scores.view(np.int32)
    for row in range(acts.shape[0]):
        a, result = acts[row], out[row]
        if not finite[row]:
            result[:] = np.nan
            continue
        for i in range(d_sae):
            scores[i] = a[i] * norms[i]
        n_equal = 0
        for i in range(d_sae):
            # as integers: where the processor flushes denormals, 0.0 >= cut could be true
            result[i] = a[i] if score_bits[i] >= cut else np.float32(0.0)
            n_equal += score_bits[i] == cut
        if n_equal > n_allowed:
            for i in range(d_sae):
                if score_bits[i] == cut:
                    n_allowed -= 1
                    if n_allowed < 0:
                        result[i] = np.float32(0.0)
        else:
            n_allowed -= n_equal


def _supports(acts: Tensor, p: int, per: str) -> bool:
    return acts.is_cpu and acts.dtype != torch.float64 and compiled(p) is not None


BACKEND = Backend("numba", rank=0, supports=_supports, keep_prefix=keep_prefix)
