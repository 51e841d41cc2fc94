"""The rules of :mod:`sae_afa_plugin.rules.residual` in plain PyTorch: any device, any dtype.

Rows are dealt with together, one rank of their features after the other, so the number of steps
is that of the row with the most features on offer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ELEMENTS = 1 << 22  # of activations at a time


def leave_one_out(
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    decoder_norm: Tensor,
    price: Tensor,
    leniency: Tensor,
) -> Tensor:
    """The operator, its arguments of shapes that fit, the last two with an entry for each row."""
    out = torch.zeros(acts.shape, dtype=acts.dtype, device=acts.device)
    for some in _ranked(acts, sae_in, W_dec, decoder_norm, out):
        prices, leniencies = (
            each.reshape(-1)[some.rows].to(some.values.dtype) for each in (price, leniency)
        )
        residual = some.sae_in.clone()
        for rank in range(some.width):
            residual -= some.values[:, rank, None] * some.directions(rank)
        kept = some.values > 0
        for least in (torch.zeros_like(prices), prices.clamp(min=0)):
            for rank in reversed(range(some.width)):
                value, direction = some.values[:, rank], some.directions(rank)
                norm = some.norms[:, rank]
                product = torch.linalg.vecdot(residual, direction)
                size, missing = value * norm, product / norm
                gain = 2 * value * product + size.square() + leniencies * missing.square()
                drop = kept[:, rank] & ((gain < least) | (size + missing <= 0))
                residual += torch.where(drop, value, 0)[:, None] * direction
                kept[:, rank] &= ~drop
        some.finite &= (prices + leniencies).isfinite()
        some.write(kept)
    return out


def keep_until_explained(
    acts: Tensor,
    sae_in: Tensor,
    W_dec: Tensor,
    decoder_norm: Tensor,
    explained: float,
    max_k: int,
) -> Tensor:
    """The operator, its arguments of shapes that fit."""
    out = torch.zeros(acts.shape, dtype=acts.dtype, device=acts.device)
    for some in _ranked(acts, sae_in, W_dec, decoder_norm, out):
        residual = some.sae_in.clone()
        least = residual.square().sum(-1)
        goal = (1 - explained) * least
        number = torch.zeros_like(least, dtype=torch.long)
        for rank in range(min(some.width, max_k)):
            open_rows = least > goal
            if not open_rows.any():
                break
            residual -= some.values[:, rank, None] * some.directions(rank)
            energy = residual.square().sum(-1)
            better = open_rows & (some.values[:, rank] > 0) & (energy < least)
            least = torch.where(better, energy, least)
            number = torch.where(better, rank + 1, number)
        kept = torch.arange(some.width, device=acts.device) < number[:, None]
        some.write(kept)
    return out


@dataclass
class _Ranked:
    """Some rows, with their positive features from the largest score down.

    Args:
        rows: Which rows.
        values: Activations by rank ``[n, width]``, zero where a row has no more.
        norms: Norms of their directions ``[n, width]``.
        order: Which features they are ``[n, width]``.
    """

    rows: slice
    values: Tensor
    norms: Tensor
    order: Tensor
    sae_in: Tensor
    W_dec: Tensor
    finite: Tensor
    acts: Tensor
    out: Tensor

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def directions(self, rank: int) -> Tensor:
        rows = self.W_dec[self.order[:, rank]].to(self.values.dtype)
        return torch.where(self.values[:, rank, None] > 0, rows, 0)  # others may be NaN

    def write(self, kept: Tensor) -> None:
        mask = torch.zeros_like(self.acts, dtype=torch.bool).scatter_(-1, self.order, kept)
        self.out.copy_(torch.where(mask, self.acts, 0))
        self.out.masked_fill_(~self.finite[:, None], torch.nan)


def _ranked(
    acts: Tensor, sae_in: Tensor, W_dec: Tensor, decoder_norm: Tensor, out: Tensor
) -> Iterator[_Ranked]:
    if acts.numel() == 0:
        return
    dtype = torch.promote_types(acts.dtype, torch.float32)
    d_sae = acts.shape[-1]
    all_acts, all_in, all_out = (
        acts.reshape(-1, d_sae),
        sae_in.reshape(-1, sae_in.shape[-1]),
        out.view(-1, d_sae),
    )
    step = max(1, _ELEMENTS // d_sae)
    for start in range(0, len(all_acts), step):
        rows = slice(start, start + step)
        some, inputs = all_acts[rows], all_in[rows].to(dtype)
        values = some.to(dtype)
        scores = values * decoder_norm.to(dtype)
        finite = scores.isfinite().all(-1) & inputs.isfinite().all(-1)
        scores = torch.where(finite[:, None], scores, 0)
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        positive = scores > 0
        width = int(positive.sum(-1).max())
        order = order[:, :width]
        yield _Ranked(
            rows=rows,
            values=torch.where(positive[:, :width], values.gather(-1, order), 0),
            norms=decoder_norm.to(dtype)[order],
            order=order,
            sae_in=inputs,
            W_dec=W_dec.detach(),
            finite=finite,
            acts=some,
            out=all_out[rows],
        )
