"""The prefix operator: keep the largest features until a running sum meets a target.

:func:`keep_prefix` is the family, :func:`top_afa` its member of Lee, Davies, Canby and
Hockenmaier, "Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality"
(COLM 2025, arXiv 2503.24277). On a nearly orthogonal dictionary the norm of the feature vector
is about the norm of the input, so the norm of the input says how many features to keep. The
paper's own code is SewoongLee/top-afa-sae (MIT); this is an independent implementation.

It is one PyTorch operator, ``torch.ops.sae_afa_plugin.keep_prefix``. The code that runs behind it
is a :class:`Backend`, found in the modules beside this one whose names end in ``_kernel``:
:mod:`~sae_afa_plugin.rules.numba_kernel` on the CPU, :mod:`~sae_afa_plugin.rules.triton_kernel` on
CUDA, and :mod:`~sae_afa_plugin.rules.torch_kernel` where these are missing. The definition they
share: scores are products in float32 (float64 for float64 inputs); sums of powers and distances
are float64 (float32 on MPS, which has nothing wider). They sum in different orders, so where two
numbers of features are equally near to within the rounding of float64 they may differ; nowhere
else.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor

from sae_afa_plugin.rules.choice import check_tensors, differentiable, register_choice


def keep_prefix(
    acts: Tensor,
    target: Tensor,
    decoder_norm: Tensor | None = None,
    *,
    p: Literal[0, 1, 2] = 2,
    per: Literal["row", "batch"] = "row",
) -> Tensor:
    """Keep the largest features until the running sum of their powers comes nearest to a target.

    The scores are ``s_i = acts_i * decoder_norm_i``, sorted from the largest (equal scores: the
    lower index first), and ``c_k = (s_1^p + ... + s_k^p)^(1/p)``, which for p = 0 is the number k.
    The kept number is the k with the smallest ``|c_k - target|`` over the positive scores, the
    smaller k at equal distance. Selection is by score; the output carries the activation itself.
    Without positive scores the result is zero.

    | p | the target is | per row | per batch |
    |---|---|---|---|
    | 0 | a number of features | TopK | BatchTopK |
    | 1 | a sum of scores | a budget of L1 norm | the same for the batch |
    | 2 | a norm | :func:`top_afa` | one threshold for the batch |

    Per batch, the scores of all rows stand in one order (equal scores: the earlier row first) and
    share one target, ``(sum over rows of target^p)^(1/p)``, for p = 0 the sum of the targets. A
    negative target counts as 0.

    The gradient with respect to ``acts`` passes to the kept features only; the choice itself
    has no gradient. All of ``torch.func`` works: the derivative is the one of a fixed choice.

    Args:
        acts: Activations ``[..., d_sae]``, in float16, bfloat16, float32 or float64. Entries
            that are not positive are never kept, so a ReLU before this call is not needed.
        target: What to match ``[...]``, one value for each row, in the units of
            ``acts * decoder_norm``, or, for p = 0, a number that need not be whole.
        decoder_norm: Norms of the decoder's rows ``[d_sae]``. None means unit rows.
        p: Which power of the scores is summed up.
        per: Whether each row meets its own target or the rows together the sum of theirs.

    Returns:
        ``[..., d_sae]`` in the dtype of ``acts``. A row in which a score or the target is NaN
        or infinite (also -inf) is NaN throughout. Other rows are not affected: per batch, such a
        row offers no scores and its target is not counted.

    Raises:
        ValueError: If shapes, devices or dtypes do not fit together, or p or per is unknown.

    Example:
        >>> acts = torch.tensor([[3.0, 4.0, 1.0, 0.0], [9.0, 1.0, 0.0, 0.0]])
        >>> keep_prefix(acts, torch.tensor([2.0, 1.0]), p=0)
        tensor([[3., 4., 0., 0.],
                [9., 0., 0., 0.]])
        >>> keep_prefix(acts, torch.tensor([7.9, 9.4]), p=1)  # 4 + 3 + 1 = 8; 9
        tensor([[3., 4., 1., 0.],
                [9., 0., 0., 0.]])
        >>> keep_prefix(acts, torch.tensor([1.0, 1.0]), p=0, per="batch")  # the two largest of all
        tensor([[0., 4., 0., 0.],
                [9., 0., 0., 0.]])
    """
    if isinstance(p, bool) or p not in (0, 1, 2):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"p must be 0, 1 or 2: got {p!r}")
    if per not in ("row", "batch"):
        raise ValueError(f"per must be 'row' or 'batch': got {per!r}")
    _check(acts, "target", target, decoder_norm)
    return differentiable(_keep_prefix_op, acts, target, decoder_norm, int(p), per)


def top_afa(acts: Tensor, target_norm: Tensor, decoder_norm: Tensor | None = None) -> Tensor:
    """Keep the largest features of each row until their norm matches a target.

    This is :func:`keep_prefix` with ``p=2, per="row"``. The scores are
    ``s_i = acts_i * decoder_norm_i``, sorted from the largest (equal scores: the
    lower index first), and ``c_k = sqrt(s_1^2 + ... + s_k^2)``. The kept number is the k with the
    smallest ``|c_k - target_norm|`` over the positive scores, the smaller k at equal distance.
    Selection is by score; the output carries the activation itself. A row without positive
    scores gives zeros.

    The gradient with respect to ``acts`` passes to the kept features only; the choice itself
    has no gradient. All of ``torch.func`` works: the derivative is the one of a fixed choice.

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
    _check(acts, "target_norm", target_norm, decoder_norm)
    return differentiable(_keep_prefix_op, acts, target_norm, decoder_norm, 2, "row")


def _check(acts: Tensor, target_name: str, target: Tensor, decoder_norm: Tensor | None) -> None:
    """Refuse what does not fit together."""
    if acts.ndim == 0 or target.shape != acts.shape[:-1]:
        raise ValueError(
            f"{target_name} must have the shape of acts without its last dimension: got "
            f"{tuple(target.shape)} for acts of shape {tuple(acts.shape)}"
        )
    if decoder_norm is not None and decoder_norm.shape != acts.shape[-1:]:
        raise ValueError(
            f"decoder_norm must have shape {tuple(acts.shape[-1:])}, one entry for each "
            f"feature of acts: got {tuple(decoder_norm.shape)}"
        )
    check_tensors(acts, **{target_name: target}, decoder_norm=decoder_norm)


# --- what runs behind it ---


@dataclass(frozen=True)
class Backend:
    """One way to compute the operator. A module named ``*_kernel`` has it as ``BACKEND``.

    Args:
        name: What :func:`backend` calls it.
        rank: Of those that support a tensor, the one with the lowest rank is used.
        supports: Whether it takes ``acts`` (by device and dtype) with this p and per.
        keep_prefix: The operator, from ``acts [..., d_sae]``, ``target [...]``,
            ``decoder_norm [d_sae]`` or None, p and per, which fit together, to a new tensor of
            the shape and dtype of ``acts``. Autograd and meta tensors never reach it.
    """

    name: str
    rank: int
    supports: Callable[[Tensor, int, str], bool]
    keep_prefix: Callable[[Tensor, Tensor, Tensor | None, int, str], Tensor]


@functools.cache
def backends() -> tuple[Backend, ...]:
    """All backends whose language is installed, those that are preferred first.

    Example:
        >>> backends()[-1].name  # takes everything
        'torch'
    """
    assert __package__ is not None
    found: list[Backend] = []
    for module in pkgutil.iter_modules(import_module(__package__).__path__, f"{__package__}."):
        if not module.name.endswith("_kernel"):
            continue
        try:
            found.append(import_module(module.name).BACKEND)
        except ImportError as error:
            if (error.name or "").startswith(__package__):
                raise
            # what the module is written in is not installed here
    return tuple(sorted(found, key=lambda each: each.rank))


def _choose(acts: Tensor, p: int, per: str) -> Backend:
    return next(each for each in backends() if each.supports(acts, p, per))


def backend(acts: Tensor, p: Literal[0, 1, 2] = 2, per: Literal["row", "batch"] = "row") -> str:
    """Which backend chooses the features of a tensor of this device and dtype.

    Example:
        >>> backend(torch.ones(2, 3, dtype=torch.float64))  # the kernels are for float32 and less
        'torch'
    """
    return _choose(acts, p, per).name


def total_target(targets: Tensor, p: int) -> Tensor:
    """The target that rows share: ``(sum of targets^p)^(1/p)``, for p = 0 their sum.

    Args:
        targets: The targets of the rows ``[n]``, all finite.
        p: 0, 1 or 2.

    Returns:
        A scalar tensor, in float64 (float32 on MPS).

    Example:
        >>> total_target(torch.tensor([3.0, 4.0]), p=2)
        tensor(5., dtype=torch.float64)
    """
    targets = accumulated(targets).clamp(min=0)
    if p != 2:
        return targets.sum()
    largest = targets.amax().clamp(min=torch.finfo(targets.dtype).tiny)
    # as a fraction of the largest, whose square stays within the range
    power = power_near_one(largest) if targets.dtype == torch.float64 else 1 / largest
    return (targets * power).square().sum().sqrt() / power


def accumulated(tensor: Tensor) -> Tensor:
    """In the dtype in which powers are summed: MPS has no float64."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def power_near_one(values: Tensor) -> Tensor:
    """Powers of two that bring positive float64 values near 1, so that nothing is rounded."""
    exponent = torch.frexp(values).exponent.long().clamp(-1022, 1022)
    return ((1023 - exponent) << 52).view(torch.float64)


@torch.library.custom_op("sae_afa_plugin::keep_prefix", mutates_args=())
def _keep_prefix_op(
    acts: Tensor, target: Tensor, decoder_norm: Tensor | None, p: int, per: str
) -> Tensor:
    return _choose(acts, p, per).keep_prefix(acts, target, decoder_norm, p, per)


register_choice(_keep_prefix_op)


@_keep_prefix_op.register_vmap
def _(info, in_dims, acts, target, decoder_norm, p, per):  # pyright: ignore
    """One call for a batch of rows; one for each entry where entries do not share a choice."""

    def batched(tensor, dim):  # pyright: ignore
        return (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        )

    acts, target = batched(acts, in_dims[0]), batched(target, in_dims[1])
    if per == "row" and in_dims[2] is None:
        return _keep_prefix_op(acts, target, decoder_norm, p, per), 0
    norms = [None] * info.batch_size
    if decoder_norm is not None:
        norms = batched(decoder_norm, in_dims[2]).unbind()
    each = zip(acts.unbind(), target.unbind(), norms, strict=True)
    return torch.stack([_keep_prefix_op(a, t, norm, p, per) for a, t, norm in each]), 0
