"""The top-AFA activation: keep as many features as it takes to match the input's norm.

Lee, Davies, Canby and Hockenmaier, "Evaluating and Designing Sparse Autoencoders by
Approximating Quasi-Orthogonality" (COLM 2025, arXiv 2503.24277). On a nearly orthogonal
dictionary the norm of the feature vector is about the norm of the input, so the norm of the
input says how many features to keep. The paper's own code is SewoongLee/top-afa-sae (MIT);
this is an independent implementation of the rule.

The rule is one PyTorch operator, ``torch.ops.sae_afa_plugin.top_afa``, with a backend for each
kind of device: :mod:`~sae_afa_plugin.rules.numba_kernel` on the CPU, :mod:`~sae_afa_plugin.rules.triton_kernel`
on CUDA, and the PyTorch code here where these are missing. The definition they share: scores are
products in float32 (float64 for float64 inputs); sums of squares and distances are float64
(float32 on MPS, which has nothing wider). They sum in different orders, so where two numbers of
features are equally near to within the rounding of float64 they may differ; nowhere else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sae_afa_plugin.rules import numba_kernel

_CPU_CHUNK = 1 << 20  # elements; 4 MB of float32, so that a chunk and its copies stay in cache
_DEVICE_CHUNK = 1 << 26  # elements; few launches, and the sort's indices stay below 1 GB
_FIRST_WIDTH = 64  # how many of the largest scores are looked at first


def top_afa(acts: Tensor, target_norm: Tensor, decoder_norm: Tensor | None = None) -> Tensor:
    """Keep the largest features of each row until their norm matches a target.

    The scores are ``s_i = acts_i * decoder_norm_i``, sorted from the largest (equal scores: the
    lower index first), and ``c_k = sqrt(s_1^2 + ... + s_k^2)``. The kept number is the k with the
    smallest ``|c_k - target_norm|`` over the positive scores, the smaller k at equal distance.
    Selection is by score; the output carries the activation itself. A row without positive
    scores gives zeros.

    The gradient with respect to ``acts`` passes to the kept features only; the choice itself
    has no gradient. Reverse mode only (``backward``, not ``torch.func.jvp``).

    Args:
        acts: Activations ``[..., d_sae]``, in float16, bfloat16, float32 or float64. Entries
            that are not positive are never kept, so a ReLU before this call is not needed.
        target_norm: The norm to match ``[...]``, for SAEs ``||z - b_dec||``, in the units of
            ``acts * decoder_norm``.
        decoder_norm: Norms of the decoder's rows ``[d_sae]``. None means unit rows.

    Returns:
        ``[..., d_sae]`` in the dtype of ``acts``. A row in which a score or the target is NaN
        or infinite (also -inf) is NaN throughout; other rows are not affected.

    Raises:
        ValueError: If shapes, devices or dtypes do not fit together.

    Example:
        >>> acts = torch.tensor([[3.0, 4.0, 1.0, 0.0]])
        >>> top_afa(acts, torch.tensor([4.8]))  # ||(4, 3)|| = 5 is nearer to 4.8 than 4
        tensor([[3., 4., 0., 0.]])
        >>> top_afa(acts, torch.tensor([4.8]), torch.tensor([1.0, 1.0, 4.7, 1.0]))
        tensor([[0., 0., 1., 0.]])
    """
    if acts.ndim == 0 or target_norm.shape != acts.shape[:-1]:
        raise ValueError(
            "target_norm must have the shape of acts without its last dimension: got "
            f"{tuple(target_norm.shape)} for acts of shape {tuple(acts.shape)}"
        )
    if decoder_norm is not None and decoder_norm.shape != acts.shape[-1:]:
        raise ValueError(
            f"decoder_norm must have shape {tuple(acts.shape[-1:])}, one entry for each "
            f"feature of acts: got {tuple(decoder_norm.shape)}"
        )
    for name, tensor in (
        ("acts", acts),
        ("target_norm", target_norm),
        ("decoder_norm", decoder_norm),
    ):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point: got {tensor.dtype}")
        if tensor.device != acts.device:
            raise ValueError(
                f"{name} must be on the device of acts ({acts.device}): got {tensor.device}"
            )
    return _top_afa_op(acts, target_norm, decoder_norm)


def _kept_number(values: Tensor, targets: Tensor) -> Tensor:
    """The rule itself, on the largest scores of each row.

    Args:
        values: Scores sorted from the largest ``[n, width]``.
        targets: The norms to match ``[n]``.

    Returns:
        How many to keep ``[n]``. Where it equals ``width`` and the row has more scores than
        that, the answer may lie beyond.
    """
    # MPS has no float64
    accumulate = torch.float32 if values.device.type == "mps" else torch.float64
    scores, targets = values.to(accumulate), targets.to(accumulate).clamp(min=0)
    if values.dtype == torch.float64:
        # Squares of float64 can leave its range (those of float32 cannot): bring the largest
        # score near 1, by a power of two so that nothing is rounded.
        exponent = torch.frexp(scores[:, :1]).exponent.long().clamp(-1022, 1022)
        power = ((1023 - exponent) << 52).view(torch.float64)
        scores, targets = scores * power, targets * power[:, 0]

    squared_norms = scores.square().cumsum(-1)
    positive = values > 0
    # Strictly below: sums that rounding has brought to a stop below the target still count as
    # growing, so all positive scores are kept where their norm is below the target.
    below = ((squared_norms < targets.square()[:, None]) & positive).sum(-1)
    has_next = below < positive.sum(-1)
    last = values.shape[1] - 1
    upper = squared_norms.gather(1, below.clamp(max=last)[:, None])[:, 0].sqrt()
    lower = squared_norms.gather(1, (below - 1).clamp(min=0)[:, None])[:, 0].sqrt()
    nearer = (below == 0) | (upper - targets < targets - lower)
    return below + (has_next & nearer)


def _keep_by_stable_sort(scores: Tensor, targets: Tensor) -> Tensor:
    """The mask of kept scores ``[n, d_sae]``, for any device and without synchronisation."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    kept = _kept_number(values, targets)
    first = torch.arange(scores.shape[1], device=scores.device) < kept[:, None]
    return torch.empty_like(first).scatter_(-1, order, first)


class _KeepByPartialSelection:
    """The mask of kept scores ``[n, d_sae]``, looking only at as many scores as it takes.

    Takes the largest scores of each row, more of them for the rows that are not decided yet,
    and then compares the whole row with the smallest kept score. Rows of one batch keep similar
    numbers, so each chunk starts where the last one ended.
    """

    def __init__(self) -> None:
        self.width = _FIRST_WIDTH

    def __call__(self, scores: Tensor, targets: Tensor) -> Tensor:
        n, d_sae = scores.shape
        kept = torch.zeros(n, dtype=torch.long)
        cut = torch.full((n,), torch.inf, dtype=scores.dtype)  # the smallest kept score
        split = torch.zeros(n, dtype=torch.bool)  # equal scores on both sides of the cut
        rows, width = torch.arange(n), self.width
        while len(rows) > 0:
            values = _largest(scores if len(rows) == n else scores[rows], width)
            width = values.shape[1]
            k = _kept_number(values, targets[rows])
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


def _by_chunks(
    acts: Tensor,
    target_norm: Tensor,
    decoder_norm: Tensor | None,
    keep: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Apply a selection to some rows at a time, so that temporaries stay small."""
    out = torch.empty(acts.shape, dtype=acts.dtype, device=acts.device)
    if out.numel() == 0:
        return out
    d_sae = acts.shape[-1]
    dtype = torch.promote_types(acts.dtype, torch.float32)
    rows, targets = acts.reshape(-1, d_sae), target_norm.reshape(-1)
    elements = _CPU_CHUNK if acts.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, elements // d_sae)
    for chunk, target, result in zip(
        rows.split(step), targets.split(step), out.view(-1, d_sae).split(step), strict=True
    ):
        scores = chunk.to(dtype)
        if decoder_norm is not None:
            scores = scores * decoder_norm.to(dtype)
        torch.where(keep(scores, target), chunk, chunk.new_zeros(()), out=result)
        finite = scores.amax(-1).isfinite() & scores.amin(-1).isfinite() & target.isfinite()
        if acts.device.type != "cpu" or not finite.all():  # a device would have to wait
            result.masked_fill_(~finite[:, None], torch.nan)
    return out


def backend(acts: Tensor) -> Literal["numba", "triton", "torch"]:
    """Which code chooses the features of a tensor of this device and dtype.

    Example:
        >>> backend(torch.ones(2, 3, dtype=torch.float64))  # the kernels are for float32 and less
        'torch'
    """
    if acts.dtype == torch.float64:
        return "torch"
    if acts.device.type == "cpu" and numba_kernel.compiled() is not None:
        return "numba"
    if acts.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "torch"


@torch.library.custom_op("sae_afa_plugin::top_afa", mutates_args=())
def _top_afa_op(acts: Tensor, target_norm: Tensor, decoder_norm: Tensor | None) -> Tensor:
    match backend(acts):
        case "numba":
            return numba_kernel.top_afa(acts, target_norm, decoder_norm)
        case "triton":
            from sae_afa_plugin.rules import triton_kernel

            return triton_kernel.top_afa(acts, target_norm, decoder_norm)
        case "torch":
            keep = _KeepByPartialSelection() if acts.is_cpu else _keep_by_stable_sort
            return _by_chunks(acts, target_norm, decoder_norm, keep)


@_top_afa_op.register_fake
def _(acts: Tensor, target_norm: Tensor, decoder_norm: Tensor | None) -> Tensor:
    return torch.empty(acts.shape, dtype=acts.dtype, device=acts.device)


def _setup_context(ctx, inputs, output) -> None:  # pyright: ignore
    # A kept feature is never zero, so the output itself is the mask: nothing else is stored.
    ctx.save_for_backward(output)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
    (output,) = ctx.saved_tensors
    return torch.where(output != 0, grad, 0), None, None


_top_afa_op.register_autograd(_backward, setup_context=_setup_context)
