"""The top-AFA rule on the CPU in one pass over memory, compiled by Numba where it is installed.

No row is sorted. The squares of a row are summed into buckets of nearly equal scores, which are
the leading bits of the floating point numbers; from the largest bucket down, the sums say in
which bucket the target is met, and only that bucket is sorted. A row is read from memory once and
stays in the cache of its core until its result is written, so the cost hardly depends on how many
features are kept, and in float32 no temporary is larger than a row.

The definition is the one of :mod:`sae_afa_plugin.rules.operator`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SHIFT = 19  # a bucket is an exponent and 4 bits: its largest score is 1/16 above its smallest
_N_BUCKETS = 1 << (31 - _SHIFT)
_INFINITE = 0x7F800000  # as bits; everything above is NaN
_LEAST = 1  # the bits of the smallest positive float32
_ELEMENTS_PER_THREAD = 1 << 17  # fewer are not worth a thread
_CONVERTED = 1 << 22  # elements of half precision that are float32 at a time

_Kernel = Callable[..., None]


def compile_kernel(function: _Kernel, signature: str, **options: Any) -> _Kernel | None:
    """Compile a function that releases the interpreter, or None where Numba does not work.

    The first call on a machine compiles, for a few seconds; later ones read Numba's cache.
    """
    try:
        from numba import njit  # pyright: ignore
    except ImportError:  # also of a Numba that does not know this NumPy
        return None
    try:
        return njit(signature, nogil=True, cache=True, **options)(function)
    except (RuntimeError, OSError):  # the cache cannot be written
        return njit(signature, nogil=True, **options)(function)


def in_threads(kernel: _Kernel, arguments: list[tuple[Any, ...]]) -> None:
    """Call a compiled kernel once for each set of arguments, all at the same time."""
    if len(arguments) == 1:
        kernel(*arguments[0])
        return
    with ThreadPoolExecutor(len(arguments)) as pool:
        list(pool.map(lambda each: kernel(*each), arguments))


@functools.cache
def compiled() -> _Kernel | None:
    """The compiled rule, or None where Numba is missing or does not work with this NumPy."""
    return compile_kernel(_keep_rows, "void(f4[:,::1], f4[::1], f8[::1], f4[:,::1])")


def top_afa(acts: Tensor, target_norm: Tensor, decoder_norm: Tensor | None) -> Tensor:
    """Apply the rule, with as many threads as PyTorch uses.

    Args:
        acts: Activations ``[..., d_sae]``, on the CPU, in float32, bfloat16 or float16.
        target_norm: The norm to match ``[...]``.
        decoder_norm: Norms of the decoder's rows ``[d_sae]``. None means unit rows.

    Returns:
        ``[..., d_sae]`` in the dtype of ``acts``.

    Raises:
        RuntimeError: If :func:`compiled` gives no kernel.
    """
    kernel = compiled()
    if kernel is None:
        raise RuntimeError("the Numba kernel needs Numba: pip install 'sae-afa-plugin[fast]'")
    out = torch.empty(acts.shape, dtype=acts.dtype)
    if out.numel() == 0:
        return out
    d_sae = acts.shape[-1]
    rows, results = acts.detach().reshape(-1, d_sae).contiguous(), out.view(-1, d_sae)
    norms = torch.ones(d_sae) if decoder_norm is None else decoder_norm.detach().float()
    targets = target_norm.detach().reshape(-1).double()
    if acts.dtype == torch.float32:
        _keep(kernel, rows, norms, targets, results)
        return out
    step = max(1, _CONVERTED // d_sae)
    for chunk, target, result in zip(
        rows.split(step), targets.split(step), results.split(step), strict=True
    ):
        wide = chunk.float()
        _keep(kernel, wide, norms, target, wide)
        result.copy_(wide)
    return out


def _keep(kernel: _Kernel, rows: Tensor, norms: Tensor, targets: Tensor, out: Tensor) -> None:
    """Call the kernel on a part of the rows in each thread. ``out`` may be ``rows``."""
    n_threads = min(torch.get_num_threads(), max(1, rows.numel() // _ELEMENTS_PER_THREAD))
    parts = zip(
        rows.tensor_split(n_threads),
        targets.contiguous().tensor_split(n_threads),
        out.tensor_split(n_threads),
        strict=True,
    )
    norm = norms.contiguous().numpy()
    in_threads(kernel, [(r.numpy(), norm, t.numpy(), o.numpy()) for r, t, o in parts])


def _keep_rows(acts: Any, norms: Any, targets: Any, out: Any) -> None:
    """The kernel: ``acts [n, d_sae]`` to ``out``, with ``norms [d_sae]`` and ``targets [n]``."""
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
        goal = target * target

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
                sums[b] += np.float64(candidates[i]) * np.float64(candidates[i])
            squared_norm = 0.0  # of all scores that are certain to be kept
            b = top
            while b >= 0 and not crossed:
                if sums[b] == 0.0 or squared_norm + sums[b] < goal:
                    squared_norm += sums[b]
                    b -= 1
                    continue
                m = 0
                for i in range(n):
                    bucket[m] = candidates[i]
                    m += (candidate_bits[i] >> _SHIFT) == b
                values = np.sort(bucket[:m])
                j = m  # values[j:] are below the target
                following = squared_norm
                while j > 0:
                    following = squared_norm + np.float64(values[j - 1]) ** 2
                    if following >= goal:
                        crossed = True
                        break
                    squared_norm = following
                    j -= 1
                if not crossed:  # the sum in another order rounds to below the target
                    b -= 1
                    continue
                cut[0] = values[j - 1]
                above = j
                while above < m and values[above] == cut[0]:
                    above += 1
                n_equal = above - j
                nearer = np.sqrt(following) - target < target - np.sqrt(squared_norm)
                if nearer or squared_norm == 0.0:
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
