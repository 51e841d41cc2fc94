"""What every source of activations offers, whether a language model, a recording or a synthetic one.

One source serves every SAE that is evaluated or trained on it. It knows how many tokens it has,
where they stand, and what decides their numbers; it gives the activations of some hooks for any
range of its tokens, always the same ones. A new kind of source is a subclass in a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from sae_afa_plugin.activations.hooks import misfit

_ON_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # what a name there may look like


class Site(NamedTuple):
    """Where an SAE reads and, for transcoders, what its features are to add up to.

    Args:
        hook: The hook it reads.
        head: The head it reads, where it reads one of several.
        hook_out: The hook that its features reconstruct, where that is another one.
        head_out: The head of that.
    """

    hook: str
    head: int | None = None
    hook_out: str | None = None
    head_out: int | None = None

    @property
    def hooks(self) -> list[str]:
        """The hooks that have to be read for it."""
        return [self.hook] if self.hook_out is None else [self.hook, self.hook_out]


class Batch(NamedTuple):
    """Some tokens in a row.

    Args:
        x: What the SAE reads ``[n, d_in]``, or ``[n, n_heads, d_head]``.
        x_out: What it is to give, for transcoders; otherwise None.
        rows: Which tokens of the source these are.
    """

    x: Tensor
    x_out: Tensor | None
    rows: slice


class Activations(ABC):
    """Activations at hooks, for a fixed row of tokens.

    Subclasses give ``settings``, ``places``, :meth:`shapes` and :meth:`read`.
    """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON holds it; known before anything is run."""

    @property
    @abstractmethod
    def places(self) -> pd.DataFrame:
        """One row for each token, with the columns ``sequence``, ``position``, ``token_id``.

        Where tokens have no such place (samples of a synthetic model), columns may be missing.
        """

    @abstractmethod
    def shapes(self, hooks: Sequence[str]) -> dict[str, torch.Size]:
        """Shapes of one token's activations, ``(d,)`` or ``(n_heads, d_head)``.

        Args:
            hooks: Hooks that may exist. Those that do not are left out.
        """

    @abstractmethod
    def read(self, hooks: Sequence[str], start: int, stop: int) -> dict[str, Tensor]:
        """The activations of the tokens from ``start`` to ``stop``, ``[stop - start, ...]``.

        Args:
            hooks: Hooks that exist.
            start: The first token.
            stop: The token after the last.
        """

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        return len(self.places)

    @property
    def n_special(self) -> int:
        """How many special tokens were left out."""
        return 0

    @property
    def sequences(self) -> pd.DataFrame:
        """Every token that was read, with its text in ``token``, for context; empty without text."""
        return pd.DataFrame(
            {
                "sequence": pd.Series(dtype="int32"),
                "position": pd.Series(dtype="int32"),
                "token_id": pd.Series(dtype="int32"),
                "token": pd.Series(dtype="object"),
            }
        )

    @property
    def model(self) -> Any | None:
        """The language model, for metrics that have to run it again; None where there is none."""
        return None

    @property
    def has_model(self) -> bool:
        """Whether :attr:`model` is one, without loading it."""
        return self.model is not None

    def hook_names(self) -> list[str]:
        """The hooks that exist, as far as they can be listed; for messages."""
        return []

    def site(self, metadata: Mapping[str, Any]) -> Site:
        """Where an SAE with these metadata reads.

        Args:
            metadata: ``sae.cfg.metadata`` as a dictionary, with ``hook_name``.
        """
        return Site(
            str(metadata["hook_name"]),
            metadata.get("hook_head_index"),
            metadata.get("hook_name_out"),
            metadata.get("hook_head_index_out"),
        )

    def why_not(self, site: Site, d_in: int, d_out: int | None = None) -> str | None:
        """Why an SAE of these widths cannot be read here, or None if it can.

        Args:
            site: Where it reads.
            d_in: Width of what it reads.
            d_out: Width of what it gives, for transcoders.
        """
        shapes = self.shapes(site.hooks)
        for hook, head, width in (
            (site.hook, site.head, d_in),
            (site.hook_out, site.head_out, d_out),
        ):
            if hook is None:
                continue
            shape = shapes.get(hook)
            if width is None:  # of an output that is named although nothing is known of it
                width = 0 if shape is None else shape.numel() if head is None else shape[-1]
            reason = misfit(hook, shape, width, head, self.hook_names())
            if reason is not None:
                return reason
        return None

    def batches(self, site: Site, device: torch.device | str, size: int) -> Iterator[Batch]:
        """All tokens in their order, some at a time.

        Args:
            site: Where to read.
            device: Where the SAE is.
            size: Tokens in one batch; the last has what is left.
        """
        for start in range(0, self.n_tokens, size):
            rows = slice(start, min(start + size, self.n_tokens))
            found = self.read(site.hooks, rows.start, rows.stop)
            x = _head(found[site.hook], site.head)
            out = None if site.hook_out is None else _head(found[site.hook_out], site.head_out)
            # without waiting, where the memory is pinned
            x = x.to(device, non_blocking=True)
            yield Batch(x, None if out is None else out.to(device, non_blocking=True), rows)

    @cached_property
    def identity(self) -> str:
        """A short digest of the settings: equal for sources that give equal activations."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def different_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings by which activations of two sources may differ.

    Args:
        before: Settings of one.
        now: Settings of the other.
    """

    def alike(name: str) -> bool:
        if before.get(name) == now.get(name):
            return True
        if name == "model_argument":  # whether an SAE or somebody named it
            return alike("model")
        if name.endswith("_revision"):  # without the hub it may not be known
            return None in (before.get(name), now.get(name))
        if name.endswith("_content"):
            # what is gone cannot have changed, unless the hub has something of that name
            gone = None in (before.get(name), now.get(name))
            called = [str(of.get(name.removesuffix("_content"))) for of in (before, now)]
            return gone and not any(map(_ON_HUB.fullmatch, called))
        content = f"{name.removesuffix('_argument')}_content"  # of the same, by another path
        return before.get(content) is not None and before[content] == now.get(content)

    return [name for name in {**before, **now} if not alike(name)]


def _head(acts: Tensor, head: int | None) -> Tensor:
    return acts if head is None else acts[:, head]
