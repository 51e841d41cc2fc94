"""What every group of metrics is: a name, what it remembers of tokens, and what it makes of that.

A group is a subclass in a file of its own in this package; nothing else has to know it. It works
on any dictionary and any activations, token by token, so any split into batches, shards or
processes gives the same result.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch

from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.spaces import EncodedTokens, LinearCode

# Blocks depend on widths and the device alone, so that no setting of memory can move a number.
_BLOCK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}  # of one matrix: 128 MiB, 1 GiB in float32


def tokens_at_once(device: torch.device, width: int) -> int:
    """How many tokens a matrix of a block has at most, 1 or more.

    Args:
        device: Where.
        width: Of the widest matrix ``[tokens, width]``: d_sae, say.

    Example:
        >>> tokens_at_once(torch.device("cpu"), 65_536)
        512
    """
    return max(1, _BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // width)


class Column(NamedTuple):
    """A number of the summary that people are shown.

    Args:
        name: Its key in the summary.
        heading: Above it in tables, with line breaks for narrow ones. A hyphen before one divides a
            word; one that stays is a non-breaking hyphen.
        meaning: One sentence that explains it.
        form: How a value is written.
        place: Columns stand in this order.
        need: Where a table has to be narrower, the columns with the smallest go first.
    """

    name: str
    heading: str
    meaning: str
    form: Callable[[Any], str] = "{:.4f}".format
    place: int = 100
    need: int = 10

    @property
    def in_a_line(self) -> str:
        """The heading without line breaks.

        Example:
            >>> Column("f1", "preci-\\nsion of\\nall", "").in_a_line
            'precision of all'
        """
        return self.heading.replace("-\n", "").replace("\u2011\n", "-").replace("\n", " ")


@dataclass
class GroupResult:
    """What a group found of one SAE.

    Args:
        summary: Numbers by name.
        tokens: One row for each token that has values, by its number in the source.
        features: One row for each feature.
    """

    summary: dict[str, Any]
    tokens: pd.DataFrame | None = None
    features: pd.DataFrame | None = None


class Accumulator(ABC):
    """Collects what a group needs from the tokens of one SAE."""

    @abstractmethod
    def add(self, tokens: EncodedTokens) -> None:
        """Take some tokens in; each token comes once, in any order and any batches."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Take in what another accumulator of the same SAE has collected of other tokens."""

    @abstractmethod
    def finish(self) -> GroupResult:
        """What was found.

        Raises:
            ValueError: If nothing can be said.
        """


@dataclass(frozen=True)
class MetricGroup(ABC):
    """A group of metrics. Fields of a subclass are its settings.

    Attributes:
        name: Of the group.
        version: Counts up when the same tokens give other numbers or other names.
        columns: Of the summary, those that people are shown.
        reads_tokens: Whether tokens have to be encoded for it.
        needs_model: Whether it runs the language model.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = ()
    reads_tokens: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the numbers, beside the SAE and the activations."""
        return asdict(self)

    @property
    def identity(self) -> str:
        """Name, version and settings in one line; results of equal identities compare."""
        return f"{self.name} {self.version} {json.dumps(self.settings, sort_keys=True)}"

    def why_not(self, code: LinearCode, activations: Activations) -> str | None:
        """Why nothing can be said of this SAE, or None if something can."""
        del code, activations

    @abstractmethod
    def start(self, code: LinearCode, activations: Activations) -> Accumulator:
        """Begin with an SAE.

        Args:
            code: The SAE's dictionary.
            activations: Where its tokens come from.
        """
