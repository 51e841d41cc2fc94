"""Batches of activations as a function of a seed and the number of the step.

The tokens of a source stand in a row that repeats (epochs). It is cut into blocks, each block is
mixed by a generator of its own, seeded by the SAE's seed and the block's number, and batch t is
the t-th part of what comes out. Nothing has to be remembered between two batches, so a training
that goes on at step t sees what it would have seen without the interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from torch import Tensor

from sae_afa_plugin.activations.base import Activations, Site
from sae_afa_plugin.saes.finite import finite_rows, nothing_finite

BLOCK_TOKENS = 1 << 16
# each token by itself, so that it can be done before the SAE
PER_TOKEN_NORMALIZATIONS = ("layer_norm", "constant_norm_rescale")


def default_block(batch_size: int) -> int:
    """The largest multiple of a batch that is at most 65,536 tokens, or one batch.

    Args:
        batch_size: Tokens in one batch.

    Example:
        >>> default_block(4096), default_block(1000), default_block(100_000)
        (65536, 65000, 100000)
    """
    return max(1, BLOCK_TOKENS // batch_size) * batch_size


class Blocks:
    """The row of tokens, repeated and cut into blocks; the block that was read last is kept.

    Args:
        source: Where the activations come from.
        size: Tokens in one block.
    """

    def __init__(self, source: Activations, size: int):
        self.source, self.size = source, size
        self._window: tuple[int, int] | None = None
        self._read: dict[str, Tensor] = {}
        self._moved: dict[tuple[str, torch.device], Tensor] = {}

    @cached_property
    def n_tokens(self) -> int:
        """Tokens in the row, before it repeats."""
        return self.source.n_tokens

    def load(self, number: int, hooks: Sequence[str]) -> None:
        """Read a block at all these hooks at once, unless it is there.

        Args:
            number: Of the block, from 0.
            hooks: Hooks that exist.
        """
        n = self.n_tokens
        # a row that is shorter than a block is read once for all blocks
        window = (0, n) if n <= self.size else (number * self.size % n, self.size)
        if window != self._window:
            self._read, self._moved, self._window = {}, {}, window
        missing = sorted(set(hooks) - set(self._read))
        if not missing:
            return
        start, stop = window[0], window[0] + window[1]
        found = self.source.read(missing, start, min(stop, n))
        if stop > n:  # the end of the row, and its beginning
            rest = self.source.read(missing, 0, stop - n)
            found = {hook: torch.cat([found.pop(hook), rest.pop(hook)]) for hook in missing}
        self._read.update(found)

    def on(self, device: torch.device, number: int, hook: str) -> Tensor:
        """A block at one hook, on the device of an SAE.

        Args:
            device: Where it is wanted; it is brought there once.
            number: Of the block.
            hook: The hook.
        """
        self.load(number, [hook])
        if (hook, device) not in self._moved:
            self._moved[hook, device] = self._read[hook].to(device)
        return self._moved[hook, device]

    def rows(self, number: int, order: Tensor) -> Tensor:
        """Where tokens of a block stand in what :meth:`on` gives.

        Args:
            number: Of the block.
            order: Places in the block.
        """
        return (number * self.size + order) % self.n_tokens if self.n_tokens <= self.size else order


class Stream:
    """The batches of one SAE.

    Args:
        blocks: The row of tokens; several SAEs may share it.
        site: Where the SAE reads.
        batch_size: Tokens in one batch; a block must hold a whole number of batches.
        seed: For the order of tokens.
        normalize: ``normalize_activations`` of the SAE. What is done to each token by itself is
            done here, so that the SAE is trained in the space of what comes out.
        dtype: Of the SAE.
        device: Of the SAE.

    Raises:
        ValueError: If a block does not hold a whole number of batches.

    Example:
        >>> from sae_afa_plugin.activations.tensors import TensorActivations
        >>> source = TensorActivations({"hook": torch.arange(6.0)[:, None]})
        >>> stream = Stream(Blocks(source, 6), Site("hook"), 2, seed=0)
        >>> sorted(torch.cat([stream.batch(t) for t in range(3)]).flatten().tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        >>> torch.equal(stream.batch(4), Stream(Blocks(source, 6), Site("hook"), 2, 0).batch(4))
        True
    """

    def __init__(
        self,
        blocks: Blocks,
        site: Site,
        batch_size: int,
        seed: int,
        normalize: str = "none",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if blocks.size % batch_size:
            raise ValueError(
                f"a block of {blocks.size} tokens holds no whole number of batches of "
                f"{batch_size}: pass block_tokens={default_block(batch_size)} or another multiple "
                "of every batch size"
            )
        self._blocks, self._site, self._batch_size, self._seed = blocks, site, batch_size, seed
        self.dtype = dtype
        self._normalize, self._device = normalize, torch.device(device)
        self._rows: tuple[int, Sequence[Tensor]] | None = None

    @property
    def steps_per_block(self) -> int:
        """How many batches a block holds."""
        return self._blocks.size // self._batch_size

    def batch(self, step: int) -> Tensor:
        """The batch of one step ``[at most batch_size, d_in]``, with heads flattened.

        Tokens that are NaN or infinite, also where they become so in the SAE's dtype or when they
        are normalised, are left out.

        Args:
            step: From 0.

        Raises:
            ValueError: If all of its tokens are.
        """
        number, within = divmod(step, self.steps_per_block)
        if self._rows is None or self._rows[0] != number:
            self._rows = number, self._rows_of(number)
        rows = self._rows[1][within]
        if not len(rows):
            raise nothing_finite()
        return self._take(number, rows)

    def _take(self, number: int, rows: Tensor) -> Tensor:
        acts = self._blocks.on(self._device, number, self._site.hook)
        if self._site.head is not None:
            acts = acts[:, self._site.head]
        x = acts[rows].flatten(1).to(self.dtype)
        return x if self._normalize not in PER_TOKEN_NORMALIZATIONS else self._normalizer(x)

    def _rows_of(self, number: int) -> Sequence[Tensor]:
        """The rows of each batch of a block, without those that are not finite."""
        digest = hashlib.sha256(f"{self._seed} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        order = torch.randperm(self._blocks.size, generator=generator)
        rows = self._blocks.rows(number, order).to(self._device)
        batches = rows.split(self._batch_size)
        # once for a block, since the number of those that are left has to be waited for
        keep = torch.cat([finite_rows(self._take(number, batch)) for batch in batches])
        if keep.all():
            return batches
        return [
            batch[kept] for batch, kept in zip(batches, keep.split(self._batch_size), strict=True)
        ]

    @cached_property
    def _normalizer(self) -> Callable[[Tensor], Tensor]:
        """SAELens's own formula, from an SAE of one feature."""
        (hook,) = self._blocks.source.shapes([self._site.hook]).values()
        width = hook[-1] if self._site.head is not None else hook.numel()
        normalize: Any = self._normalize
        with torch.random.fork_rng(devices=[]):  # its weights are of no use
            sae = StandardSAE(StandardSAEConfig(width, 1, normalize_activations=normalize))
        return sae.run_time_activation_norm_fn_in
