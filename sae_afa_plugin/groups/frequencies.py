"""How often each feature fires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from typing_extensions import override

from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.groups.base import Accumulator, Column, GroupResult, MetricGroup
from sae_afa_plugin.spaces import EncodedTokens, LinearCode


class _Counts(Accumulator):
    def __init__(self, code: LinearCode):
        device = code.W_dec.device
        self._fired = torch.zeros(len(code.W_dec), dtype=torch.long, device=device)
        self._n_tokens = torch.zeros((), dtype=torch.long, device=device)

    @override
    def add(self, tokens: EncodedTokens) -> None:
        self._fired += tokens.fired
        self._n_tokens += tokens.finite.sum()

    @override
    def merge(self, other: _Counts) -> None:
        self._fired += other._fired
        self._n_tokens += other._n_tokens

    @override
    def finish(self) -> GroupResult:
        fired = self._fired.cpu()
        frequency = fired.double() / max(1, int(self._n_tokens))
        return GroupResult(
            {
                "dead_features": int((fired == 0).sum()),
                "share_alive": (fired > 0).double().mean().item(),
                "share_above_1_percent": (frequency > 0.01).double().mean().item(),
                "share_above_10_percent": (frequency > 0.1).double().mean().item(),
            },
            features=pd.DataFrame({"fired": fired.numpy(), "frequency": frequency.numpy()}),
        )


@dataclass(frozen=True)
class Frequencies(MetricGroup):
    """On how many tokens each feature is active; tokens that are not finite do not count."""

    name: ClassVar[str] = "frequencies"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "dead_features",
            "dead",
            "Features that were active on none of the tokens.",
            "{:,.0f}".format,
            80,
            5,
        ),
        Column(
            "share_alive",
            "alive",
            "Share of the features that were active on at least one token.",
            "{:.1%}".format,
            81,
            6,
        ),
        Column(
            "share_above_1_percent",
            "> 1 %",
            "Share of the features that fire on more than 1 % of the tokens.",
            "{:.1%}".format,
            82,
            1,
        ),
        Column(
            "share_above_10_percent",
            "> 10 %",
            "Share of the features that fire on more than 10 % of the tokens.",
            "{:.1%}".format,
            83,
            1,
        ),
    )

    @override
    def start(self, code: LinearCode, activations: Activations) -> Accumulator:
        return _Counts(code)
