"""The prefix operator in plain PyTorch: for every device and dtype, and where nothing else is.

On the CPU only as many of the largest scores are looked at as it takes; elsewhere rows are sorted,
which needs no answer from the device. Per batch the same is done to all rows as one long row, so
the matrix of scores, and on a device its sort with indices, is held at once.

The definition is the one of :mod:`sae_afa_plugin.rules.operator`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_afa_plugin.rules.operator import Backend, accumulated, power_near_one, total_target

_CPU_CHUNK = 1 << 20  # elements; 4 MB of float32, so that a chunk and its copies stay in cache
_DEVICE_CHUNK = 1 << 26  # elements; few launches, and the sort's indices stay below 1 GB
_FIRST_WIDTH = 64  # how many of the largest scores of a row are looked at first


def keep_prefix(
    acts: Tensor, target: Tensor, decoder_norm: Tensor | None, p: int, per: str
) -> Tensor:
    """The operator for any device and dtype; arguments as of :class:`Backend`."""
    if not acts.is_cpu:
        return _apply(acts, target, decoder_norm, KeepByStableSort(p), per)
    n_rows = 1 if per == "row" else target.numel()
    return _apply(acts, target, decoder_norm, KeepByPartialSelection(p, n_rows), per)


def _apply(
    acts: Tensor,
    target: Tensor,
    decoder_norm: Tensor | None,
    keep: KeepByStableSort | KeepByPartialSelection,
    per: str,
) -> Tensor:
    """Apply a selection to some rows at a time, so that temporaries stay small, or to all."""
    out = torch.empty(acts.shape, dtype=acts.dtype, device=acts.device)
    if out.numel() == 0:
        return out
    d_sae = acts.shape[-1]
    dtype = torch.promote_types(acts.dtype, torch.float32)
    rows, targets = acts.reshape(-1, d_sae), target.reshape(-1)
    elements = _CPU_CHUNK if acts.is_cpu else _DEVICE_CHUNK
    step = max(1, elements // d_sae) if per == "row" else len(rows)
    for chunk, some, result in zip(
        rows.split(step), targets.split(step), out.view(-1, d_sae).split(step), strict=True
    ):
        scores = chunk.to(dtype)
        if decoder_norm is not None:
            scores = scores * decoder_norm.to(dtype)
        finite = scores.amax(-1).isfinite() & scores.amin(-1).isfinite() & some.isfinite()
        some_bad = not acts.is_cpu or not finite.all()  # a device would have to wait
        if per == "batch":
            if some_bad:
                scores, some = scores.where(finite[:, None], 0), some.where(finite, 0)
            mask = keep(scores.view(1, -1), total_target(some, keep.p)[None]).view_as(chunk)
        else:
            mask = keep(scores, some)
        torch.where(mask, chunk, chunk.new_zeros(()), out=result)
        if some_bad:
            result.masked_fill_(~finite[:, None], torch.nan)
    return out


def _kept_number(values: Tensor, targets: Tensor, p: int) -> Tensor:
    """The rule itself, on the largest scores of each row.

    Args:
        values: Scores sorted from the largest ``[n, width]``.
        targets: What to match ``[n]``.
        p: 0, 1 or 2.

    Returns:
        How many to keep ``[n]``. Where it equals ``width`` and the row has more scores than
        that, the answer may lie beyond.
    """
    positive = values > 0
    targets = accumulated(targets).clamp(min=0)
    if p == 0:  # the nearest whole number, the smaller one halfway
        nearest = (targets.nan_to_num(nan=0) - 0.5).ceil().clamp(min=1)
        return nearest.minimum(positive.sum(-1).to(nearest)).long()
    scores = accumulated(values)
    if values.dtype == torch.float64:
        # Squares and sums of float64 can leave its range (those of float32 cannot): bring the
        # largest score near 1.
        power = power_near_one(scores[:, :1])
        scores, targets = scores * power, targets * power[:, 0]

    sums = (scores.square() if p == 2 else scores).cumsum(-1)
    goal = targets.square() if p == 2 else targets
    # Strictly below: sums that rounding has brought to a stop below the target still count as
    # growing, so all positive scores are kept where their norm is below the target.
    below = ((sums < goal[:, None]) & positive).sum(-1)
    has_next = below < positive.sum(-1)
    last = values.shape[1] - 1
    upper = sums.gather(1, below.clamp(max=last)[:, None])[:, 0]
    lower = sums.gather(1, (below - 1).clamp(min=0)[:, None])[:, 0]
    if p == 2:
        upper, lower = upper.sqrt(), lower.sqrt()
    nearer = (below == 0) | (upper - targets < targets - lower)
    return below + (has_next & nearer)


class KeepByStableSort:
    """The mask of kept scores ``[n, width]``, for any device and without synchronisation."""

    def __init__(self, p: int) -> None:
        self.p = p

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        values, order = scores.sort(dim=-1, descending=True, stable=True)
        kept = _kept_number(values, targets, self.p)
        first = torch.arange(scores.shape[1], device=scores.device) < kept[:, None]
        return torch.empty_like(first).scatter_(-1, order, first)


class KeepByPartialSelection:
    """The mask of kept scores ``[n, width]``, looking only at as many scores as it takes.

    Takes the largest scores of each row, more of them for the rows that are not decided yet,
    and then compares the whole row with the smallest kept score. Rows of one batch keep similar
    numbers, so each chunk starts where the last one ended.

    Args:
        p: 0, 1 or 2.
        n_rows: How many rows stand in one, which says where to start.
    """

    def __init__(self, p: int, n_rows: int = 1) -> None:
        self.p = p
        self.width = _FIRST_WIDTH * n_rows

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        n, d_sae = scores.shape
        kept = torch.zeros(n, dtype=torch.long)
        cut = torch.full((n,), torch.inf, dtype=scores.dtype)  # the smallest kept score
        split = torch.zeros(n, dtype=torch.bool)  # equal scores on both sides of the cut
        rows, width = torch.arange(n), self.width
        while len(rows) > 0:
            values = _largest(scores if len(rows) == n else scores[rows], width)
            width = values.shape[1]
            k = _kept_number(values, targets[rows], self.p)
            smallest = values.gather(1, (k - 1).clamp(min=0)[:, None])[:, 0]
            following = values.gather(1, k.clamp(max=width - 1)[:, None])[:, 0]
            # with k < width the next score is known, and with it whether a tie is cut in two
            decided = (k < width) | (width == d_sae)
            some = decided & (k > 0)
            kept[rows[some]], cut[rows[some]] = k[some], smallest[some]
            split[rows[some]] = ((k < width) & (following == smallest))[some]
            rows, width = rows[~decided], 4 * width
        self.width = max(_FIRST_WIDTH, int(kept.max()) * 5 // 4)

        mask = scores >= cut[:, None]
        if split.any():
            above = scores[split] > cut[split, None]
            equal = scores[split] == cut[split, None]
            needed = kept[split] - above.sum(-1)
            mask[split] = above | (equal & (equal.cumsum(-1) <= needed[:, None]))
        return mask


def _largest(scores: Tensor, width: int) -> Tensor:
    """At least the ``width`` largest scores of each row, sorted from the largest."""
    if 8 * width <= scores.shape[1]:
        return scores.topk(width, dim=-1).values
    # NumPy sorts several times faster than PyTorch here: it carries no indices
    return torch.from_numpy(np.sort(scores.detach().numpy(), axis=-1)).flip(-1)


BACKEND = Backend("torch", rank=100, supports=lambda acts, p, per: True, keep_prefix=keep_prefix)
