"""What is not finite: tokens that are left out of training, weights that are not saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sae_afa_plugin.metrics import norm_along_last

# in the lines of a log: how many were left out so far
LEFT_OUT_METRIC = "non_finite_tokens"


def finite_rows(x: Tensor) -> Tensor:
    """Which tokens have no NaN and nothing infinite: ``[..., d]`` to boolean ``[...]``.

    Those are not finite either whose squared norm overflows, since no error of theirs would be.

    Example:
        >>> finite_rows(torch.tensor([[1.0, 2.0], [torch.nan, 2.0], [1.0, -torch.inf]]))
        tensor([ True, False, False])
    """
    return norm_along_last(x.detach()).isfinite()  # one pass, in float32 at least


def mean_over_kept(values: Tensor, z: Tensor) -> Tensor:
    """The mean over tokens that take part in a training step; those left out have z = 0.

    Args:
        values: One for each token ``[...]``.
        z: The normalised inputs ``[..., d_in]``.

    Example:
        >>> z = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]])
        >>> mean_over_kept(torch.tensor([4, 100, 6]), z)
        tensor(5.)
    """
    kept = z.any(dim=-1)
    exact = torch.promote_types(values.dtype, torch.float32)
    return torch.where(kept, values, 0).sum(dtype=exact) / kept.sum().clamp(min=1)


def nothing_finite() -> ValueError:
    """That a batch has no token to train on."""
    return ValueError(
        "all activations of a batch are NaN or infinite: mend the language model, its dtype or the "
        "recording they come from"
    )


def say_left_out(n: int, what: str) -> None:
    """Warn that tokens were left out of training.

    Args:
        n: How many, so far.
        what: The SAE that is trained.
    """
    warnings.warn(
        f"{n} {'token' if n == 1 else 'tokens'} of the training of {what} had values that are NaN "
        "or infinite and will be left out, as all such tokens to come "
        f"(metrics/{LEFT_OUT_METRIC} in its log counts them): look for their cause in the language "
        "model and its dtype",
        stacklevel=3,
    )


class LeftOut(nn.Module):
    """Counts the tokens that one SAE leaves out, and says so once.

    The count stays on the SAE's device, so that no step waits for it: on the CPU it is said in
    the same step, elsewhere a step or two later.

    Args:
        what: The SAE, for the message.
        device: Where the SAE is.
    """

    count: Tensor

    def __init__(self, what: str, device: torch.device):
        super().__init__()
        self.what, self.said = what, False
        # weights that are yet to be loaded are on "meta", where nothing can be counted
        device = torch.device("cpu") if device.type == "meta" else device
        count = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("count", count, persistent=False)
        self._seen: Tensor | None = None  # the count as it arrived from another device

    def keep(self, z: Tensor) -> Tensor:
        """Which tokens take part: ``[..., d_in]`` to boolean ``[..., 1]``; the others are counted."""
        kept = finite_rows(z)
        self.count.add_((~kept).sum())
        return kept[..., None]

    def say(self, wait: bool = False) -> None:
        """Warn if tokens were left out, unless it has been said.

        Args:
            wait: For what the device has not computed yet.
        """
        if self.said:
            return
        seen = self.count
        if not (wait or seen.is_cpu):
            if self._seen is None:
                pinned = seen.is_cuda
                self._seen = torch.zeros((), dtype=seen.dtype, pin_memory=pinned)
            # read before it has arrived it is an older count, and this one is read the next time
            seen = self._seen.copy_(seen, non_blocking=True)
        if n := int(seen):
            self.said = True
            say_left_out(n, self.what)


def check_weights(what: str, weights: Mapping[str, Tensor]) -> None:
    """Make sure that weights can be saved.

    Args:
        what: Whose they are, for the message.
        weights: By name.

    Raises:
        ValueError: If one of them is NaN or infinite.
    """
    for name, tensor in weights.items():
        n = tensor.numel() - int(tensor.isfinite().sum())
        if n:
            raise ValueError(
                f"{what} is not saved, because {n} of {tensor.numel()} values of {name} are NaN or "
                "infinite: go back to weights from before that, and train with a lower lr, a "
                "longer lr_warm_up_steps or another dtype"
            )
