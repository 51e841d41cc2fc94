"""A source of activations that is no language model, as someone else might write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_afa_plugin.activations.base import Activations


class SparseMixtures(Activations):
    """Sums of a few directions of each hook's dictionary, made anew for every token.

    The number of a token decides its activation, so any range can be read. The norm differs from
    token to token, and the mean is not zero: standardising makes a difference.
    """

    def __init__(self, n_tokens: int = 1000, seed: int = 0, **shapes: tuple[int, ...]):
        self._n, self._seed = n_tokens, seed
        self._shapes = {h: torch.Size(s) for h, s in (shapes or {"hook": (16,)}).items()}
        self._made: dict[tuple[str, int], Tensor] = {}
        self.reads: list[tuple[tuple[str, ...], int, int]] = []

    @property
    def settings(self) -> dict[str, Any]:
        return {"source": "mixtures", "n_tokens": self._n, "seed": self._seed}

    @property
    def places(self) -> pd.DataFrame:
        return pd.DataFrame({"sequence": np.arange(self._n)})

    def shapes(self, hooks: Sequence[str]) -> dict[str, torch.Size]:
        return {hook: self._shapes[hook] for hook in hooks if hook in self._shapes}

    def read(self, hooks: Sequence[str], start: int, stop: int) -> dict[str, Tensor]:
        assert 0 <= start < stop <= self._n
        self.reads.append((tuple(hooks), start, stop))
        return {
            hook: torch.stack([self._kept(hook, i) for i in range(start, stop)]) for hook in hooks
        }

    def _kept(self, hook: str, number: int) -> Tensor:
        if (hook, number) not in self._made:
            self._made[hook, number] = self.token(hook, number)
        return self._made[hook, number]

    def token(self, hook: str, number: int) -> Tensor:
        shape = self._shapes[hook]
        wide = torch.Generator().manual_seed(self._seed + sum(hook.encode()))
        dictionary = torch.randn(4 * shape.numel(), shape.numel(), generator=wide)
        own = torch.Generator().manual_seed(1000 * self._seed + number)
        chosen = torch.randint(len(dictionary), (4,), generator=own)
        weights = torch.rand(4, 1, generator=own) * (1 + number % 7)
        return (0.5 + (weights * dictionary[chosen]).sum(0)).view(shape)
