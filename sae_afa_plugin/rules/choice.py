"""What every operator that chooses features tells PyTorch, whatever its rule.

Such an operator takes activations ``[..., d_sae]`` and whatever its rule looks at, and returns a
tensor of the same shape in which some activations stand and the others are zero, or a row of NaN
where no choice can be made. Its gradient passes to what is kept; the choice itself has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef  # pyright: ignore[reportPrivateImportUsage]

from sae_afa_plugin._upstream import is_transformed


def check_tensors(acts: Tensor, **others: Tensor | None) -> None:
    """Refuse arguments that are not floating point, or not where ``acts`` are."""
    for name, tensor in {"acts": acts, **others}.items():
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point: got {tensor.dtype}")
        if tensor.device != acts.device:
            raise ValueError(
                f"{name} must be on the device of acts ({acts.device}): got {tensor.device}"
            )


def register_choice(op: CustomOpDef) -> None:
    """Give an operator whose first argument is ``acts`` its shape and its gradient."""

    def fake(acts: Tensor, *args: Any) -> Tensor:
        return torch.empty(acts.shape, dtype=acts.dtype, device=acts.device)

    op.register_fake(fake)
    op.register_autograd(_backward, setup_context=_setup_context)


def vmap_as_a_loop(op: CustomOpDef) -> None:
    """Let ``torch.func.vmap`` call an operator once for each entry, which newer PyTorch asks for."""

    def loop(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        entries = [
            [arg] * info.batch_size if dim is None else arg.unbind(dim)
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        return torch.stack([op(*each) for each in zip(*entries, strict=True)]), 0

    op.register_vmap(loop)


def _setup_context(ctx, inputs, output) -> None:  # pyright: ignore
    # A kept feature is never zero, so the output itself is the mask: nothing else is stored.
    ctx.save_for_backward(output)
    ctx.n_inputs = len(inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
    (output,) = ctx.saved_tensors
    return torch.where(output != 0, grad, 0), *[None] * (ctx.n_inputs - 1)


def differentiable(op: CustomOpDef, acts: Tensor, *args: Any) -> Tensor:
    """The operator under whatever differentiates it.

    Autograd's formula, which stores nothing but the output, is for the reverse mode alone: the
    tangents of the forward mode would be lost without a word, and ``torch.func`` refuses it. There,
    the choice is made without derivatives and applied with PyTorch's own operators.
    """
    if not is_transformed():
        return op(acts, *args)
    fixed = [x.detach() if isinstance(x, Tensor) else x for x in args]
    kept = op(acts.detach(), *fixed)
    return torch.where(kept.isnan(), kept, torch.where(kept != 0, acts, 0))
