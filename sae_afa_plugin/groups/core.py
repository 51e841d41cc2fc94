"""SAELens's own metrics: cross entropy and KL recovered, explained variance, L0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import sae_lens
import torch
from datasets import Dataset
from sae_lens.evals import EvalConfig
from sae_lens.training.activations_store import ActivationsStore
from typing_extensions import override

from sae_afa_plugin import limits
from sae_afa_plugin._upstream import ActivationScaler, without_hooks
from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.activations.hooks import device_of, known_state
from sae_afa_plugin.activations.tokens import vocabulary_of
from sae_afa_plugin.groups.base import (
    Accumulator,
    Column,
    GroupResult,
    MetricGroup,
    tokens_at_once,
)
from sae_afa_plugin.spaces import EncodedTokens, LinearCode, SAELensCode


class _Passes(Accumulator):
    def __init__(self, sae: Any, activations: Activations, group: Core):
        self._sae, self._activations, self._group = sae, activations, group

    @override
    def add(self, tokens: EncodedTokens) -> None:
        """The model is run again at the end, on the sequences themselves."""

    @override
    def merge(self, other: _Passes) -> None:
        """All see the same sequences."""

    @override
    def finish(self) -> GroupResult:
        group, model = self._group, self._activations.model
        assert model is not None  # the group says that it needs one
        table = self._activations.sequences
        size = int(table["position"].max()) + 1
        tokens = torch.tensor(table["token_id"].to_numpy(), dtype=torch.long).view(-1, size)
        # of a matrix of a pass: logits over the vocabulary, features
        widest = max(self._sae.cfg.d_sae, vocabulary_of(model) or 1)
        fitting = tokens_at_once(device_of(model), widest) // size
        prompts = max(1, min(group.batch_size_prompts, len(tokens), fitting))
        wanted = math.ceil(group.n_tokens / (prompts * size))
        batches = max(1, min(wanted, len(tokens) // prompts))
        metadata = self._sae.cfg.metadata
        used = tokens[: 2 * prompts * batches]  # by losses, then by the other metrics
        store = ActivationsStore.from_config_multi_hook(
            model=model,
            dataset=Dataset.from_dict({"tokens": used.tolist()}).to_iterable_dataset(),
            hook_names=[str(metadata.hook_name)],
            hook_d_ins={str(metadata.hook_name): self._sae.cfg.d_in},
            context_size=size,
            store_batch_size_prompts=prompts,
            device=device_of(model),
        )
        exclude = self._activations.settings.get("exclude_special_tokens", True)
        with known_state(model), without_hooks(self._sae):
            groups, _ = sae_lens.run_evals(
                sae=self._sae,
                activation_store=store,
                model=model,
                activation_scaler=ActivationScaler(),
                eval_config=EvalConfig(
                    compute_kl=True,
                    compute_ce_loss=True,
                    compute_variance_metrics=True,
                    compute_sparsity_metrics=True,
                    n_eval_reconstruction_batches=batches,
                    n_eval_sparsity_variance_batches=batches,
                ),
                exclude_special_tokens=exclude if isinstance(exclude, bool) else list(exclude),
            )
        groups.pop("token_stats")
        return GroupResult(
            {f"core_{name}": value for found in groups.values() for name, value in found.items()}
        )


@dataclass(frozen=True)
class Core(MetricGroup):
    """``sae_lens.run_evals`` on the first of the sequences: three more passes of the model.

    Args:
        n_tokens: About how many tokens to use.
        batch_size_prompts: Sequences in one forward pass; fewer where its logits or features would
            be larger than :func:`sae_afa_plugin.groups.base.tokens_at_once` says.
    """

    n_tokens: int = 8192
    batch_size_prompts: int = 16

    def __post_init__(self) -> None:
        limits.whole(self, "n_tokens", "batch_size_prompts", at_least=1)

    name: ClassVar[str] = "core"
    version: ClassVar[int] = 2
    reads_tokens: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "core_ce_loss_score",
            "CE\nrecovered",
            "Share of the model's loss that is kept when the SAE's output stands in for its input.",
            "{:.4f}".format,
            40,
            96,
        ),
    )

    @override
    def why_not(self, code: LinearCode, activations: Activations) -> str | None:
        if activations.sequences.empty:
            return "SAELens's metrics need the sequences of tokens, and these activations have none"
        if _some_are_left_out(activations):
            return (
                "SAELens's metrics read whole sequences, and of these some tokens are left out (by "
                "positions or a mask)"
            )
        if not isinstance(code, SAELensCode):
            return "SAELens's metrics need an SAE of SAELens"
        metadata = code.sae.cfg.metadata
        if metadata.hook_name_out is not None:
            return "sae_lens.run_evals does not know transcoders"
        if activations.site(metadata.to_dict()).hook != metadata.hook_name:
            return "sae_lens.run_evals does not know hooks with names of other libraries"
        return None

    @override
    def start(self, code: LinearCode, activations: Activations) -> Accumulator:
        assert isinstance(code, SAELensCode)
        return _Passes(code.sae, activations, self)


def _some_are_left_out(activations: Activations) -> bool:
    """Whether tokens are left out that are not special, but for the end of the last sequence."""
    places = activations.places
    of_last = places.loc[places["sequence"] == places["sequence"].max(), "position"]
    behind = int(activations.sequences["position"].max()) - int(of_last.max())
    read = len(places) + activations.n_special + behind
    return read < len(activations.sequences)
