"""The AFA metric in plain tensors: per token, per dictionary, and summed up over many tokens.

Paper: Lee, Davies, Canby and Hockenmaier, "Evaluating and Designing Sparse Autoencoders by
Approximating Quasi-Orthogonality" (COLM 2025, arXiv 2503.24277). On a nearly orthogonal
dictionary the norm of the feature vector is about the norm of what it reconstructs.

Nothing here knows SAELens: which tensors an SAE of which family brings is in ``spaces``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
_ROWS_AT_ONCE = 2048  # a block of the Gram matrix has as many columns: 16 MiB in float32


def norm_along_last(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, in float32 at least.

    Example:
        >>> norm_along_last(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16))
        tensor([5.])
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype)


def exact_norm(x: Tensor) -> Tensor:
    """The same in float64, also where squares would leave the range of ``x``'s dtype.

    Rows are scaled by powers of two, which rounds nothing.

    Example:
        >>> print(f"{exact_norm(torch.tensor([3e-30, 4e-30])):.1e}")
        5.0e-30
    """
    scaled, power = _near_one(x)
    return norm_along_last(scaled).double() / power.double()


def _near_one(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with their largest entry near 1, and the powers of two that they were multiplied with."""
    x = x.to(_precision(x))
    exponent = torch.frexp(x.abs().amax(-1)).exponent.clamp(-120, 120)
    power = torch.ldexp(torch.ones_like(exponent, dtype=x.dtype), -exponent)
    return x * power[..., None], power


def epsilon_lbo(norm_z: Tensor, norm_f: Tensor, d_sae: int) -> Tensor:
    """The least quasi-orthogonality constant that a token forces on its dictionary.

    ``| ||z||^2 - ||f||^2 | / ((d_sae - 1) ||f||^2)``, section 3 of the paper.

    Args:
        norm_z: Norms of what is reconstructed, any shape.
        norm_f: Norms of the features on the unit-norm dictionary, the same shape.
        d_sae: Number of features, at least 2.

    Returns:
        The same shape, at least float32. NaN where no feature is active: nothing is forced.

    Raises:
        ValueError: If ``d_sae`` is below 2.

    Example:
        >>> epsilon_lbo(torch.tensor([3.0]), torch.tensor([2.0]), d_sae=6)
        tensor([0.2500])
    """
    if d_sae < 2:
        raise ValueError(f"epsilon_lbo needs a dictionary of two features or more: got {d_sae}")
    squared_f = norm_f.double().square()
    epsilon = (norm_z.double().square() - squared_f).abs() / ((d_sae - 1) * squared_f)
    epsilon = torch.where(squared_f == 0, torch.nan, epsilon)
    return epsilon.to(torch.promote_types(norm_f.dtype, torch.float32))


class AFATokenMetrics(NamedTuple):
    """Every quantity of the AFA metric for each token; tensors of one shape.

    Args:
        norm_z: ``||z||``, what the theory expects of the feature norm.
        norm_f: ``sqrt(||f||^2 + ||b||^2)`` with f on the unit-norm dictionary: the paper's
            convention, in which the decoder bias is one feature that is always on.
        norm_z_centered: ``||z - b||``.
        norm_f_centered: ``||f||`` on the unit-norm dictionary, without the bias.
        over_activated: ``norm_f > norm_z``, above the diagonal of the ZF plot.
        epsilon_lbo: :func:`epsilon_lbo` of ``norm_z`` and ``norm_f``. It contains
            reconstruction error, so it may exceed the dictionary's coherence.
        epsilon_lbo_recon: The same of the reconstruction without bias and ``norm_f_centered``:
            never above the coherence.
        interference: ``(||z_hat - b||^2 - ||f||_2^2) / (||f||_1^2 - ||f||_2^2)``, the
            activation-weighted mean cosine between the active directions (for signed features
            no longer a mean). Its absolute value is never above the coherence. NaN where fewer
            than two features are active, or all but one are lost in rounding.
        nmse: ``||z - z_hat||^2 / ||z||^2``; NaN where z is zero.
        cosine: ``<z, z_hat> / (||z|| ||z_hat||)``; NaN where one of them is zero.
        l2_ratio: ``||z_hat|| / ||z||``; NaN where z is zero.
        share_features: ``||f||^2 / ||z - b||^2``, what AFA compares with 1. This and the next
            three are the energy budget of the token: they add up to 1. NaN where z is b.
        share_interference: ``(||z_hat - b||^2 - ||f||^2) / ||z - b||^2``. Above 0 the active
            directions lean the same way, below 0 they cancel.
        share_unexplained: ``||z - z_hat||^2 / ||z - b||^2``, the error.
        share_shrinkage: ``2 <z - z_hat, z_hat - b> / ||z - b||^2``. Above 0 the reconstruction
            is too short, below 0 too long, and 0 at a least-squares fit.
        l0: Number of active features.
    """

    norm_z: Tensor
    norm_f: Tensor
    norm_z_centered: Tensor
    norm_f_centered: Tensor
    over_activated: Tensor
    epsilon_lbo: Tensor
    epsilon_lbo_recon: Tensor
    interference: Tensor
    nmse: Tensor
    cosine: Tensor
    l2_ratio: Tensor
    share_features: Tensor
    share_interference: Tensor
    share_unexplained: Tensor
    share_shrinkage: Tensor
    l0: Tensor


_FIELDS = AFATokenMetrics._fields
_LEAST_ROOM = 1 << 16  # tokens


def token_metrics(
    z: Tensor, recons_centered: Tensor, f_unit: Tensor, b: Tensor, l0: Tensor | None = None
) -> AFATokenMetrics:
    """The AFA metric of tokens whose features and reconstruction are known.

    Args:
        z: What the SAE reconstructs, in the space of its decoder ``[..., d]``.
        recons_centered: The reconstruction without the decoder bias ``[..., d]``.
        f_unit: Features on the unit-norm dictionary, ``f_i * ||d_i||`` ``[..., d_sae]``.
        b: The decoder bias ``[d]``.
        l0: Number of active features ``[...]``, where it is known already. Features whose
            direction is zero count, and are not seen in ``f_unit``.

    Returns:
        Tensors of the leading shape, at least float32.

    Example:
        Two features at 60 degrees (cosine 0.5), a perfect reconstruction of 1 and 2:

        >>> d = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]])
        >>> f = torch.tensor([[1.0, 2.0]])
        >>> m = token_metrics(f @ d, f @ d, f, torch.zeros(2))
        >>> round(m.interference.item(), 4), round(m.epsilon_lbo.item(), 4), m.l0.item()
        (0.5, 0.4, 2)
    """
    l1 = torch.linalg.vector_norm(f_unit, ord=1, dim=-1, dtype=torch.float64)
    l0 = f_unit.count_nonzero(dim=-1) if l0 is None else l0
    squared_f = exact_norm(f_unit).square()
    return metrics_from_sums(z, recons_centered, b, l0, l1, squared_f, f_unit.shape[-1])


def metrics_from_sums(
    z: Tensor,
    recons_centered: Tensor,
    b: Tensor,
    l0: Tensor,
    l1: Tensor,
    squared_f: Tensor,
    d_sae: int,
) -> AFATokenMetrics:
    """The same where only sums over the features are at hand.

    Args:
        z: As for :func:`token_metrics` ``[..., d]``.
        recons_centered: As there ``[..., d]``.
        b: As there ``[d]``.
        l0: Number of active features ``[...]``.
        l1: Sum of ``|f_i| ||d_i||``, float64 ``[...]``.
        squared_f: Sum of ``(f_i ||d_i||)^2``, float64 ``[...]``.
        d_sae: Number of features.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    z, recons_centered, b = z.to(dtype), recons_centered.to(dtype), b.to(dtype)
    z_centered, z_hat = z - b, recons_centered + b
    error = z_centered - recons_centered
    norm_z, norm_z_hat = exact_norm(z), exact_norm(z_hat)
    norm_z_centered, norm_recons = exact_norm(z_centered), exact_norm(recons_centered)
    norm_f = (squared_f + b.double().square().sum()).sqrt()
    norm_f_centered = squared_f.sqrt()

    pairs = l1.square() - squared_f
    # one active direction, or others that are lost beside it in this precision
    alone = pairs <= 100 * torch.finfo(dtype).eps * squared_f
    pairs = torch.where(alone, torch.nan, pairs)
    interference = norm_recons.square() - squared_f
    squared_error = exact_norm(error).square()
    # NaN where there is nothing to compare with
    squared_z = _nonzero(norm_z.square())
    energy = _nonzero(norm_z_centered.square())
    return AFATokenMetrics(
        norm_z=norm_z.to(dtype),
        norm_f=norm_f.to(dtype),
        norm_z_centered=norm_z_centered.to(dtype),
        norm_f_centered=norm_f_centered.to(dtype),
        over_activated=norm_f > norm_z,
        epsilon_lbo=epsilon_lbo(norm_z, norm_f, d_sae).to(dtype),
        epsilon_lbo_recon=epsilon_lbo(norm_recons, norm_f_centered, d_sae).to(dtype),
        interference=(interference / pairs).to(dtype),
        nmse=(squared_error / squared_z).to(dtype),
        cosine=(_dot(z, z_hat) / (squared_z.sqrt() * _nonzero(norm_z_hat))).to(dtype),
        l2_ratio=(norm_z_hat / squared_z.sqrt()).to(dtype),
        share_features=(squared_f / energy).to(dtype),
        share_interference=(interference / energy).to(dtype),
        share_unexplained=(squared_error / energy).to(dtype),
        share_shrinkage=(2 * _dot(error, recons_centered) / energy).to(dtype),
        l0=l0,
    )


def _nonzero(values: Tensor) -> Tensor:
    """Values to divide by: NaN in place of zero."""
    return torch.where(values == 0, torch.nan, values)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    (a, power_a), (b, power_b) = _near_one(a), _near_one(b)
    return (a * b).sum(-1, dtype=torch.float64) / (power_a.double() * power_b.double())


# --- dictionaries ---


class DictionaryCoherence(NamedTuple):
    """How far a dictionary is from orthogonal.

    Args:
        max_abs_cos: The coherence, the largest ``|cos|`` between two different directions.
        mean_abs_cos: The mean of ``|cos|`` over all pairs of different directions.
        welch_bound: ``sqrt((h - d) / (d (h - 1)))``, the least coherence that any dictionary
            of h directions in d dimensions can have; 0 for h <= d.
    """

    max_abs_cos: float
    mean_abs_cos: float
    welch_bound: float


@torch.no_grad()
def dictionary_coherence(W_dec: Tensor) -> DictionaryCoherence:
    """The coherence of a decoder, in square blocks.

    Beside the decoder it takes 32 MiB and four times 2,048 of its rows in float32, however many
    features there are.

    Args:
        W_dec: Decoder directions ``[d_sae, d]``, of any norm. Rows of zeros have no direction
            and are left out.

    Raises:
        ValueError: If fewer than two rows have a direction.

    Example:
        >>> dictionary_coherence(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 4.0]]))
        DictionaryCoherence(max_abs_cos=0.8..., mean_abs_cos=0.46..., welch_bound=0.5)
    """
    # added up where the decoder is: a device that is asked for every block would wait for it
    total = torch.zeros((), dtype=torch.float64, device=W_dec.device)
    largest, h = torch.zeros((), dtype=_precision(W_dec), device=W_dec.device), 0
    starts = range(0, len(W_dec), _ROWS_AT_ONCE)
    # taken once: from room that comes and goes, small tensors that stay make a heap full of holes
    room = largest.new_empty(2 * [min(_ROWS_AT_ONCE, len(W_dec))])
    for start in starts:
        rows, n = _unit_rows(W_dec[start : start + _ROWS_AT_ONCE])
        h = h + n
        for other in starts[start // _ROWS_AT_ONCE :]:  # each pair once
            same = other == start
            columns = rows if same else _unit_rows(W_dec[other : other + _ROWS_AT_ONCE])[0]
            cosines = room[: len(rows), : len(columns)]
            torch.mm(rows, columns.T, out=cosines).abs_()
            if same:
                cosines.fill_diagonal_(0.0)
            # float64 across rows is enough, and twelve times as fast as inside them
            total += cosines.sum(1).double().sum() / (2 if same else 1)
            largest = torch.maximum(largest, cosines.max())  # keeps NaN
    h, d = int(h), W_dec.shape[1]
    if h < 2:
        raise ValueError(f"coherence needs two directions or more: W_dec has {h} that are not zero")
    welch = ((h - d) / (d * (h - 1))) ** 0.5 if h > d else 0.0
    # rounding alone may leave two equal directions just above 1
    most = float(np.minimum(largest.item(), 1.0))
    return DictionaryCoherence(most, total.item() / (h * (h - 1) / 2), welch)


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of norm 1 in float32 at least, where they have a direction, and how many have one."""
    rows, _ = _near_one(rows.detach())
    norms = norm_along_last(rows)
    unit = rows / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
    directed = norms != 0
    return torch.where(directed[:, None], unit, 0.0), directed.sum()


# --- many tokens ---


def summarize(tokens: pd.DataFrame) -> dict[str, float]:
    """Sum up a table of tokens: exact quantiles, whatever the order or batches they came in.

    Args:
        tokens: One row for each token, with the columns of :class:`AFATokenMetrics`; others are
            ignored. Values that are NaN are undefined for that token (see there) and left out
            of that quantity.

    Returns:
        ``<quantity>_mean``, ``_q05``, ``_q25``, ``_median``, ``_q75`` and ``_q95`` for each
        quantity and for ``norm_ratio`` (``norm_f / norm_z``), the shares ``over_activated`` and
        ``over_activated_centered``, how many tokens have an undefined ``interference``,
        ``epsilon_lbo`` or ``norm_ratio`` as ``<quantity>_undefined``, and
        ``relative_reconstruction_bias``, ``sum ||z_hat||^2 / sum <z, z_hat>`` over all tokens
        (Rajamanoharan et al., arXiv 2404.16014, equation 10): below 1 the SAE shrinks.

    Example:
        >>> table = pd.DataFrame(
        ...     {name: [1.0, 2.0, 6.0] for name in AFATokenMetrics._fields}
        ... ).assign(over_activated=[True, False, False])
        >>> summary = summarize(table)
        >>> summary["nmse_mean"], summary["nmse_median"], round(summary["over_activated"], 2)
        (3.0, 2.0, 0.33)
    """

    def column(name: str) -> np.ndarray:
        if name != "norm_ratio":
            return tokens[name].to_numpy(dtype=np.float64)
        norm_z = column("norm_z")
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(norm_z > 0, column("norm_f") / norm_z, np.nan)

    summary: dict[str, float] = {
        "over_activated": _share(tokens["over_activated"].to_numpy(dtype=bool)),
        "over_activated_centered": _share(column("norm_f_centered") > column("norm_z_centered")),
    }
    for name in (*(field for field in _FIELDS if field != "over_activated"), "norm_ratio"):
        values = column(name)  # one at a time: all of them in float64 are 128 bytes for a token
        values = values[~np.isnan(values)]
        # sorted first, so that the sum does not depend on the order of the tokens
        values.sort()
        summary[f"{name}_mean"] = float(values.mean()) if len(values) else float("nan")
        cuts = np.quantile(values, list(QUANTILES.values())) if len(values) else [np.nan] * 5
        summary.update({f"{name}_{q}": float(c) for q, c in zip(QUANTILES, cuts, strict=True)})
        if name in ("interference", "epsilon_lbo", "norm_ratio"):
            summary[f"{name}_undefined"] = len(tokens) - len(values)
    norm_z_hat = column("l2_ratio") * column("norm_z")
    along = _sum(column("cosine") * norm_z_hat * column("norm_z"))
    squared = _sum(norm_z_hat**2)
    summary["relative_reconstruction_bias"] = squared / along if along else float("nan")
    return summary


def _sum(values: np.ndarray) -> float:
    """Of what is not NaN, whatever the order it comes in."""
    return float(np.nansum(np.sort(values)))


def _share(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


class TokenColumns:
    """Collects the metrics of batches of tokens; :meth:`frame` is their table.

    Exact and simple rather than sketched: 61 bytes a token, so a million tokens of one SAE are
    61 MB.

    Args:
        room: For how many tokens to take room at once; where more come, it is doubled.

    Example:
        >>> columns = TokenColumns()
        >>> f = torch.tensor([[1.0, 2.0]])
        >>> columns.add(token_metrics(f, f, f, torch.zeros(2)))
        >>> summarize(columns.frame())["l0_mean"]
        2.0
    """

    def __init__(self, room: int = _LEAST_ROOM) -> None:
        # Room is taken rarely and for many tokens. Small tensors that stay, between large ones that
        # go, would leave a heap full of holes: 7 kB for a token instead of 61 bytes.
        self._room: AFATokenMetrics | None = None
        self._length, self._wanted = 0, room

    def __len__(self) -> int:
        return self._length

    def add(self, metrics: AFATokenMetrics) -> None:
        """Append one batch, of any leading shape. It stays on its device: nothing waits for it."""
        batch = metrics._replace(l0=metrics.l0.int())
        end = self._length + batch.l0.numel()
        if self._room is None or end > len(self._room.l0):
            self._grow(batch, end)
        assert self._room is not None
        for room, column in zip(self._room, batch, strict=True):
            room[self._length : end] = column.flatten()
        self._length = end

    def _grow(self, like: AFATokenMetrics, needed: int) -> None:
        size = max(self._wanted, needed, 2 * self._length)
        room = AFATokenMetrics(*(c.new_empty(size, device=c.device) for c in like))
        if self._room is not None:
            for new, old in zip(room, self._room, strict=True):
                new[: self._length] = old[: self._length]
        self._room = room

    def extend(self, other: TokenColumns) -> None:
        """Append what another one has collected."""
        if other._room is not None:
            self.add(AFATokenMetrics(*(column[: len(other)] for column in other._room)))

    def frame(self) -> pd.DataFrame:
        """One row for each token, in the order they came."""
        if self._room is None:
            return pd.DataFrame({name: np.empty(0) for name in _FIELDS})
        full = len(self._room.l0) == self._length  # else what is shown would hold the rest as well
        found = (column if full else column[: self._length].clone() for column in self._room)
        columns = {name: c.cpu().numpy() for name, c in zip(_FIELDS, found, strict=True)}
        return pd.DataFrame(columns, copy=False)


def is_finite(tokens: pd.DataFrame) -> np.ndarray:
    """Which tokens have finite norms and errors: the others come from NaN or overflow.

    Args:
        tokens: A table as :meth:`TokenColumns.frame` gives it.
    """
    norms = ["norm_z", "norm_f", "norm_z_centered", "norm_f_centered"]
    finite = np.isfinite(tokens[norms].to_numpy()).all(axis=1)
    # an NMSE is also NaN where z is zero, which is a value like any other
    nmse = tokens["nmse"].to_numpy()
    return finite & (np.isfinite(nmse) | (tokens["norm_z"].to_numpy() == 0))
