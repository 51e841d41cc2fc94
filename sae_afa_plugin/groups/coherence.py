"""How far a dictionary is from orthogonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.groups.base import Accumulator, Column, GroupResult, MetricGroup
from sae_afa_plugin.metrics import dictionary_coherence
from sae_afa_plugin.spaces import EncodedTokens, LinearCode


class _Decoder(Accumulator):
    def __init__(self, code: LinearCode):
        self._code = code

    @override
    def add(self, tokens: EncodedTokens) -> None:
        """Tokens do not matter."""

    @override
    def merge(self, other: _Decoder) -> None:
        """Nor do those of others."""

    @override
    def finish(self) -> GroupResult:
        return GroupResult(dict(dictionary_coherence(self._code.W_dec)._asdict()))


@dataclass(frozen=True)
class Coherence(MetricGroup):
    """The largest and the mean cosine between decoder rows, and the Welch bound.

    Of ``d_sae^2 d_in`` multiplications, see :func:`sae_afa_plugin.dictionary_coherence`.
    """

    name: ClassVar[str] = "coherence"
    reads_tokens: ClassVar[bool] = False
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "max_abs_cos",
            "cohe-\nrence",
            "The largest |cos| between two directions of the decoder.",
            "{:.4f}".format,
            72,
            3,
        ),
        Column(
            "mean_abs_cos",
            "mean\n|cos|",
            "The mean |cos| over all pairs of directions, called c_dec elsewhere.",
            "{:.4f}".format,
            73,
            2,
        ),
    )

    @override
    def start(self, code: LinearCode, activations: Activations) -> Accumulator:
        return _Decoder(code)
