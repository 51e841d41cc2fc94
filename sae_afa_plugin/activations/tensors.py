"""Activations that are at hand as tensors, in memory or in a temporary file."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.files import add_tensor, digest_of_table

_AT_ONCE = 1 << 26  # bytes that are read from a source at a time


class TensorActivations(Activations):
    """Activations in tensors, one for each hook.

    Args:
        tensors: By hook, ``[n_tokens, d]`` or ``[n_tokens, n_heads, d_head]``.
        places: One row for each token; None: tokens have no place in a text, and are numbered as
            ``sequence``.
        sequences: As :attr:`Activations.sequences`.
        settings: What decides the numbers; None: a digest of the tensors.
        n_special: How many special tokens were left out.
        model: The language model they come from, for metrics that run it again.

    Raises:
        ValueError: If there is no tensor, or they are not of the same tokens.

    Example:
        >>> from sae_afa_plugin.activations.base import Site
        >>> source = TensorActivations({"blocks.0.hook_resid_pre": torch.randn(5, 16)})
        >>> [batch.x.shape for batch in source.batches(Site("blocks.0.hook_resid_pre"), "cpu", 3)]
        [torch.Size([3, 16]), torch.Size([2, 16])]
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        places: pd.DataFrame | None = None,
        sequences: pd.DataFrame | None = None,
        settings: dict[str, Any] | None = None,
        n_special: int = 0,
        model: Any | None = None,
    ):
        lengths = {hook: len(acts) for hook, acts in tensors.items()}
        if not lengths or len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError(
                f"activations must be of the same tokens, and of some: got {lengths or 'none'}"
            )
        self._tensors = {hook: acts.detach() for hook, acts in tensors.items()}
        n = next(iter(lengths.values()))
        if places is None:
            places = pd.DataFrame({"sequence": np.arange(n, dtype=np.int32)})
        if len(places) != n:
            raise ValueError(f"places must have a row for each token: got {len(places)} for {n}")
        # rows are numbered by where they stand, whatever index they came with
        self._places, self._sequences = places.reset_index(drop=True), sequences
        self._settings = self._made_up() if settings is None else settings
        self._n_special, self._model = n_special, model

    def _made_up(self) -> dict[str, Any]:
        tables = digest_of_table(self._places) + digest_of_table(self.sequences)
        content = digest_of_tensors(self._tensors)
        return {"source": "tensors", "content": content, "tables": tables}

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return self._settings

    @property
    @override
    def places(self) -> pd.DataFrame:
        return self._places

    @property
    @override
    def sequences(self) -> pd.DataFrame:
        return super().sequences if self._sequences is None else self._sequences

    @property
    @override
    def n_special(self) -> int:
        return self._n_special

    @property
    @override
    def model(self) -> Any | None:
        return self._model

    @override
    def hook_names(self) -> list[str]:
        return list(self._tensors)

    @override
    def shapes(self, hooks: Sequence[str]) -> dict[str, torch.Size]:
        return {hook: self._tensors[hook].shape[1:] for hook in hooks if hook in self._tensors}

    @override
    def read(self, hooks: Sequence[str], start: int, stop: int) -> dict[str, Tensor]:
        return {hook: self._tensors[hook][start:stop] for hook in hooks}


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """What tells tensors apart: equal for equal names, shapes, dtypes and bits.

    Args:
        tensors: By name.
    """
    digest = hashlib.sha256()
    for hook, acts in sorted(tensors.items()):
        digest.update(f"{hook} {tuple(acts.shape)} {acts.dtype}".encode())
        add_tensor(digest, acts)
    return digest.hexdigest()[:16]


def hold(
    source: Activations,
    hooks: Sequence[str],
    memory_budget: int,
    scratch: Path | None = None,
    progress: bool = False,
) -> TensorActivations:
    """Read a source once, and keep what it gave.

    Args:
        source: Where to read.
        hooks: Hooks that exist there.
        memory_budget: Bytes; what is larger lies in a temporary file that vanishes with the
            process.
        scratch: Folder for the temporary file; None: the system's.
        progress: Whether to show a bar.

    Raises:
        OSError: If the disk has no room for them.
    """
    names = sorted(set(hooks))
    kept: dict[str, Tensor] = {}
    n_tokens = source.n_tokens
    with tqdm(total=n_tokens, desc="Activations", unit="tok", disable=not progress) as bar:
        start, step = 0, 1
        while start < n_tokens:
            found = source.read(names, start, min(start + step, n_tokens))
            if not kept:
                shapes = {hook: (n_tokens, *acts.shape[1:]) for hook, acts in found.items()}
                kept = _room_for(
                    shapes,
                    {hook: acts.dtype for hook, acts in found.items()},
                    memory_budget,
                    scratch,
                )
                a_token = sum(acts[0].nbytes for acts in kept.values())
            count = len(next(iter(found.values())))
            for hook, acts in found.items():
                kept[hook][start : start + count] = acts
            start, step = start + count, max(1, _AT_ONCE // max(1, a_token))  # pyright: ignore
            bar.update(count)
    return TensorActivations(
        kept, source.places, source.sequences, source.settings, source.n_special, source.model
    )


def _room_for(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    budget: int,
    scratch: Path | None,
) -> dict[str, Tensor]:
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    total = sum(sizes.values())
    if total <= budget:
        pinned = torch.cuda.is_available()  # copies to the device need not wait then
        return {
            name: torch.empty(shape, dtype=dtypes[name], pin_memory=pinned)
            for name, shape in shapes.items()
        }
    try:
        with tempfile.TemporaryFile(dir=scratch) as file:
            # now, while a full disk is an error and not yet a crash (where the system can tell)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, total)
            else:
                file.truncate(total)
            raw = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+", shape=(total,)))
    except OSError as error:
        raise OSError(
            f"the activations need {math.ceil(total / 2**20):,} MiB on disk in "
            f"{str(scratch or tempfile.gettempdir())!r} ({error.strerror}): evaluate fewer tokens, "
            "or raise memory_budget (--memory) to keep them in memory"
        ) from error
    parts = raw.split(list(sizes.values()))
    return {
        name: part.view(dtypes[name]).view(shapes[name])
        for name, part in zip(shapes, parts, strict=True)
    }
