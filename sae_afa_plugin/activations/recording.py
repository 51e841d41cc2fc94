"""The activations of several hooks at chosen tokens, from one pass of a language model."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_afa_plugin.activations.hooks import stop_layer
from sae_afa_plugin.activations.tokens import TokenSample


class RecordedActivations:
    """What a language model computes at some hooks, at the tokens that are evaluated.

    The activations stay in the model's dtype, in memory or, where they exceed the budget, in a
    temporary file that vanishes with the process. The model stops after the last hook.

    Args:
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.
        sample: The sequences, and which of their tokens count.
        hook_names: Hooks that exist in the model.
        batch_size_prompts: Sequences in one forward pass.
        memory_budget: Bytes of memory for the activations.
        scratch: Folder for the temporary file; None: the system's.
        progress: Whether to show a bar.

    Raises:
        OSError: If the disk has no room for them.
    """

    def __init__(
        self,
        model: Any,
        sample: TokenSample,
        hook_names: Collection[str],
        batch_size_prompts: int = 16,
        memory_budget: int = 1 << 30,
        scratch: Path | None = None,
        progress: bool = False,
    ):
        self._acts: dict[str, Tensor] = {}
        names = sorted(hook_names)
        if not names:
            return
        stop = stop_layer(names)
        device = next(model.parameters()).device
        n_tokens, start = sample.n_tokens, 0
        with tqdm(total=n_tokens, desc="Language model", unit="tok", disable=not progress) as bar:
            for tokens, keep in zip(
                sample.tokens.split(batch_size_prompts),
                sample.keep.split(batch_size_prompts),
                strict=True,
            ):
                with torch.no_grad():
                    _, cache = model.run_with_cache(
                        tokens.to(device), names_filter=names, stop_at_layer=stop, prepend_bos=False
                    )
                if not self._acts:
                    shapes = {name: (n_tokens, *cache[name].shape[2:]) for name in names}
                    dtypes = {name: cache[name].dtype for name in names}
                    self._acts = _room_for(shapes, dtypes, memory_budget, scratch)
                count = int(keep.sum())
                for name in names:
                    self._acts[name][start : start + count] = cache[name][
                        keep.to(cache[name].device)
                    ].cpu()
                start += count
                bar.update(count)

    def chunks(self, hook_name: str, head_index: int | None, size: int) -> Iterator[Tensor]:
        """The activations at one hook, some tokens at a time.

        Args:
            hook_name: One of the recorded hooks.
            head_index: The head that is wanted, where the hook has heads and not all are.
            size: Tokens in one chunk.

        Yields:
            ``[tokens, d]``, or ``[tokens, n_heads, d_head]``.
        """
        for acts in self._acts[hook_name].split(size):
            yield acts if head_index is None else acts[:, head_index]


def _room_for(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    budget: int,
    scratch: Path | None,
) -> dict[str, Tensor]:
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    total = sum(sizes.values())
    if total <= budget:
        return {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
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
