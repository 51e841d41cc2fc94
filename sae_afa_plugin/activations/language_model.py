"""Activations that a language model computes on text or tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from typing_extensions import override

from sae_afa_plugin.activations.base import Activations, Site
from sae_afa_plugin.activations.content import content_of, revision_of
from sae_afa_plugin.activations.contexts import TokenTexts
from sae_afa_plugin.activations.hooks import (
    device_of,
    hook_in,
    hook_shapes,
    known_state,
    stop_layer,
    usual_device,
    wanted_hooks,
)
from sae_afa_plugin.activations.models import (
    load_language_model,
    model_identity,
    model_revision,
    shared_model,
)
from sae_afa_plugin.activations.tokens import (
    AnyDataset,
    Protocol,
    TokenSample,
    sample_tokens,
)
from sae_afa_plugin.files import user_given


@dataclass(frozen=True)
class Reading:
    """What is read by which language model, beside which of its tokens.

    Args:
        model: Name or local folder of the language model; without it, the one that the SAEs name.
        dataset: Dataset on the hub (streamed), local folder or file (.txt, .jsonl, .csv,
            .parquet) with text or tokens, or ``embedded`` for the documentation of Python;
            without it, the OpenWebText2 part of NeelNanda/pile-10k.
        dataset_config: Configuration of the dataset on the hub.
        split: Split of the dataset.
    """

    model: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"


class LanguageModelActivations(Activations):
    """The activations of a language model at the tokens that a protocol asks for.

    Nothing is loaded until it is needed. The model runs in batches of sequences that do not
    depend on the tokens that are asked for, and no further than the last hook, so a token's
    activations are the same bits in whatever part of the tokens they are read.

    Args:
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``; the
            name of a model; a local folder; or None for the one that ``metadata`` name.
        dataset: See :func:`sae_afa_plugin.activations.tokens.sample_tokens`.
        protocol: Which tokens.
        metadata: Of the SAEs that will read, by name: which model they want, and how processed.
        model_kwargs: How a model is loaded and processed, where SAEs do not say so, as
            ``{"center_writing_weights": True}``.
        dataset_config: Configuration of a dataset on the hub.
        split: Split of the dataset.
        device: Where a model is loaded; None: a GPU if there is one.
        batch_size_prompts: Sequences in one forward pass.
        trust_remote_code: Whether Python from the model's repository may run.
        progress: Whether to show a bar while tokens are collected.

    Raises:
        ValueError: If the SAEs belong to different models and none is given.

    Example:
        >>> source = LanguageModelActivations("sae-afa-demo", "embedded", Protocol(n_tokens=100))
        >>> source.read(["blocks.4.hook_resid_pre"], 10, 13)["blocks.4.hook_resid_pre"].shape
        torch.Size([3, 192])
    """

    def __init__(
        self,
        model: Any,
        dataset: AnyDataset,
        protocol: Protocol,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        dataset_config: str | None = None,
        split: str = "train",
        device: str | None = None,
        batch_size_prompts: int = 16,
        trust_remote_code: bool = False,
        progress: bool = False,
    ):
        model, dataset = user_given(model), user_given(dataset)
        self._trust_remote_code = trust_remote_code
        self._given, self._dataset, self._protocol = model, dataset, protocol.filled()
        self._metadata = metadata or {}
        self._dataset_config, self._split = dataset_config, split
        self._device, self._progress = device, progress
        self._batch_size_prompts = batch_size_prompts
        self._shapes: dict[str, torch.Size | None] = {}
        self._last: tuple[Any, dict[str, Tensor]] | None = None
        self._wanted: dict[str, Any] = {"model_class_name": None}
        if model is None or isinstance(model, str | Path):
            described = dict(self._metadata) or {"": {}}
            if model is not None:  # it stands in for the one that the metadata name, or do not
                described = {n: {**d, "model_name": str(model)} for n, d in described.items()}
            self._wanted = shared_model(described)
            if model_kwargs is not None:
                self._wanted = {**self._wanted, "model_from_pretrained_kwargs": dict(model_kwargs)}

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return self._settings

    @cached_property
    def _settings(self) -> dict[str, Any]:
        dataset = self._dataset
        settings = {
            "source": "language model",
            **model_identity(self._given, self._wanted),
            "model_revision": model_revision(self._given, self._wanted),
            "dataset": str(dataset) if isinstance(dataset, str | Path) else "in memory",
            "dataset_content": content_of(dataset, self._split),
            "dataset_revision": revision_of(dataset),
            "dataset_config": self._dataset_config,
            "split": self._split,
            **asdict(self._protocol),
        }
        return json.loads(json.dumps(settings))  # tuples become lists, as in a file

    @cached_property
    def model(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The language model, loaded when it is first asked for."""
        model = self._given
        if model is None or isinstance(model, str | Path):
            device = usual_device(self._device)
            hooks = {hook for data in self._metadata.values() for hook in wanted_hooks(data)}
            model = load_language_model(
                model, self._wanted, sorted(hooks), device, self._trust_remote_code
            )
        longest = getattr(getattr(model, "cfg", None), "n_ctx", None)
        if longest is not None and self._protocol.context_size > longest:
            raise ValueError(
                f"context_size is {self._protocol.context_size}, but the model takes {longest} "
                "tokens at most"
            )
        return model

    @property
    @override
    def has_model(self) -> bool:
        return True

    @cached_property
    def sample(self) -> TokenSample:
        """The sequences, and which of their tokens are read."""
        return sample_tokens(
            self.model,
            self._dataset,
            self._protocol,
            self._dataset_config,
            self._split,
            self._progress,
        )

    @property
    @override
    def n_special(self) -> int:
        return self.sample.n_special

    @property
    @override
    def n_tokens(self) -> int:
        return self.sample.n_tokens

    @property
    @override
    def places(self) -> pd.DataFrame:
        sequence, position = self.sample.keep.nonzero(as_tuple=True)
        return pd.DataFrame(
            {
                "sequence": sequence.int().numpy(),
                "position": position.int().numpy(),
                "token_id": self.sample.tokens[self.sample.keep].int().numpy(),
            }
        )

    @property
    @override
    def sequences(self) -> pd.DataFrame:
        return self._sequences

    @cached_property
    def _sequences(self) -> pd.DataFrame:
        n, size = self.sample.tokens.shape
        rows = self.sample.tokens.tolist()
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            texts = [f"<{i}>" for row in rows for i in row]
        else:
            texts_of = TokenTexts(tokenizer)
            texts = [text for row in rows for text in texts_of(row)]
        return pd.DataFrame(
            {
                "sequence": np.repeat(np.arange(n, dtype=np.int32), size),
                "position": np.tile(np.arange(size, dtype=np.int32), n),
                "token_id": self.sample.tokens.flatten().int().numpy(),
                "token": texts,
            }
        )

    @override
    def hook_names(self) -> list[str]:
        return list(self.model.hook_dict)

    @override
    def site(self, metadata: Mapping[str, Any]) -> Site:
        return Site(
            str(hook_in(self.model, metadata)),
            metadata.get("hook_head_index"),
            hook_in(self.model, metadata, "_out"),
            metadata.get("hook_head_index_out"),
        )

    @override
    def shapes(self, hooks: Sequence[str]) -> dict[str, torch.Size]:
        unknown = sorted(set(hooks) - set(self._shapes))
        if unknown:
            found = hook_shapes(self.model, unknown)
            self._shapes.update({hook: found.get(hook) for hook in unknown})
        known = {hook: self._shapes[hook] for hook in hooks}
        return {hook: shape for hook, shape in known.items() if shape is not None}

    @cached_property
    def _starts(self) -> list[int]:
        """The first token of each batch of sequences, and the number of all tokens."""
        counts = self.sample.keep.sum(1).split(self._batch_size_prompts)
        ends = torch.stack([count.sum() for count in counts]).cumsum(0)
        return [0, *ends.tolist()]

    @override
    def read(self, hooks: Sequence[str], start: int, stop: int) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
        starts = self._starts
        first = int(np.searchsorted(starts, start, side="right")) - 1
        for number in range(first, len(starts) - 1):
            if starts[number] >= stop:
                break
            within = slice(max(0, start - starts[number]), stop - starts[number])
            for hook, acts in self._batch(number, hooks).items():
                parts[hook].append(acts[within])
        return {hook: torch.cat(found) for hook, found in parts.items()}

    def _batch(self, number: int, hooks: Iterable[str]) -> dict[str, Tensor]:
        """One forward pass; the last one is kept, for ranges that begin where the last ended."""
        names = sorted(set(hooks))
        key = number, tuple(names)
        if self._last is None or self._last[0] != key:
            self._last = None  # two at once would be memory for nothing
            model, size = self.model, self._batch_size_prompts
            rows = slice(number * size, (number + 1) * size)
            keep = self.sample.keep[rows]
            with known_state(model):
                _, cache = model.run_with_cache(
                    self.sample.tokens[rows].to(device_of(model)),
                    names_filter=names,
                    stop_at_layer=stop_layer(names),
                    prepend_bos=False,
                )
            self._last = key, {name: cache[name][keep.to(cache[name].device)] for name in names}
        return self._last[1]
