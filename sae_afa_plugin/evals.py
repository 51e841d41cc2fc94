"""The AFA metric inside SAELens's evals and during training, and SAELens's evals inside ours.

``run_evals`` here takes what ``sae_lens.run_evals`` takes and returns what it returns, with the
group ``afa`` beside SAELens's own; nothing of SAELens is copied or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import sae_lens
import torch
from sae_lens import SAE
from sae_lens.evals import EvalConfig
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_afa_plugin import limits
from sae_afa_plugin._upstream import ActivationScaler, get_special_token_ids
from sae_afa_plugin.activations.hooks import hook_in, stop_layer
from sae_afa_plugin.metrics import TokenColumns, is_finite, summarize
from sae_afa_plugin.spaces import linear_code, why_not

# [tokens, d_sae] matrices of a chunk: 200 MB each in float32 for 49,152 features
_TOKENS_AT_ONCE = 1024


@dataclass
class AFAEvalConfig(EvalConfig):
    """SAELens's EvalConfig with the AFA group, which is on by default.

    Args:
        compute_afa: Whether to compute the AFA group.
        n_eval_afa_batches: Batches of prompts for it.

    Example:
        >>> AFAEvalConfig(compute_ce_loss=True).compute_afa
        True
    """

    compute_afa: bool = True
    n_eval_afa_batches: int = 1

    def __post_init__(self) -> None:
        limits.truth(self, "compute_afa")
        limits.whole(self, "n_eval_afa_batches", at_least=1)


@torch.no_grad()
def run_evals(
    sae: SAE[Any],
    activation_store: ActivationsStore,
    model: Any,
    activation_scaler: ActivationScaler,
    eval_config: EvalConfig | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    exclude_special_tokens: Iterable[int] | bool = True,
    verbose: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``sae_lens.run_evals`` with the AFA metric as one more group.

    Args:
        sae: Any SAE or training SAE with a linear decoder, and with metadata that name its hook.
        activation_store: Where the tokens come from; the AFA group takes the batches that follow
            those of SAELens's groups.
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.
        activation_scaler: The scaling that the SAE's input needs; ``ActivationScaler()`` for none.
        eval_config: An :class:`AFAEvalConfig` (None: only the AFA group), or an ``EvalConfig``.
        model_kwargs: Passed to the model.
        exclude_special_tokens: Leave out BOS, EOS and the like, or the tokens of these ids.
        verbose: Whether to show progress.

    Returns:
        As ``sae_lens.run_evals``: groups of metrics, and metrics for each feature. The group
        ``afa`` has what :func:`sae_afa_plugin.metrics.summarize` gives, and ``tokens`` and
        ``nonfinite_tokens``.

    Raises:
        ValueError: If the SAE is of a family that cannot be evaluated.
    """
    config = AFAEvalConfig() if eval_config is None else eval_config
    with_afa = isinstance(config, AFAEvalConfig) and config.compute_afa
    if with_afa:  # before SAELens's groups, which may take long
        _check_supported(sae)
        if sae.cfg.metadata.hook_name is None:
            raise ValueError("the SAE's metadata has no hook_name: set sae.cfg.metadata.hook_name")
    exclude = exclude_special_tokens
    if not isinstance(exclude, bool):
        exclude = list(exclude)  # an iterator would be used up by the first of the two
    groups, features = sae_lens.run_evals(
        sae=sae,
        activation_store=activation_store,
        model=model,
        activation_scaler=activation_scaler,
        eval_config=config,
        model_kwargs=model_kwargs or {},
        exclude_special_tokens=exclude,
        verbose=verbose,
    )
    if with_afa:
        assert isinstance(config, AFAEvalConfig)
        prompts = config.batch_size_prompts or activation_store.store_batch_size_prompts
        batches = _token_batches(activation_store, prompts, config.n_eval_afa_batches)
        special = _special_tokens(model, exclude)
        activations = _activations(sae, model, batches, special, model_kwargs or {})
        groups["afa"] = _afa_group(
            sae, ((activation_scaler.scale(x), out) for x, out in activations)
        )
    return groups, features


def _token_batches(store: ActivationsStore, n_prompts: int, n_batches: int) -> Iterator[Tensor]:
    for _ in range(n_batches):
        try:
            yield store.get_batch_tokens(n_prompts)
        except StopIteration:  # the dataset has no more
            return


def _special_tokens(model: Any, exclude: list[int] | bool) -> Tensor:
    if exclude is True:
        exclude = get_special_token_ids(model.tokenizer)
    return torch.tensor(exclude or [], dtype=torch.long)


def _activations(
    sae: SAE[Any],
    model: Any,
    batches: Iterable[Tensor],
    special: Tensor,
    model_kwargs: Mapping[str, Any],
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What the SAE reads, and for transcoders what it is to give, at ordinary tokens."""
    metadata = sae.cfg.metadata.to_dict()
    hook, hook_out = hook_in(model, metadata), hook_in(model, metadata, "_out")
    head = metadata.get("hook_head_index")
    assert hook is not None
    names = [hook] if hook_out is None else [hook, hook_out]
    for tokens in batches:
        _, cache = model.run_with_cache(
            tokens,
            prepend_bos=False,
            names_filter=names,
            stop_at_layer=stop_layer(names),
            **model_kwargs,
        )
        keep = ~torch.isin(tokens, special.to(tokens.device))
        x = cache[hook][keep.to(cache[hook].device)]
        out = None if hook_out is None else cache[hook_out][keep.to(cache[hook_out].device)]
        yield (x if head is None else x[:, head]), out


def _check_supported(sae: SAE[Any]) -> None:
    # the scaler brings activations to the scale that the config asks for
    reason = why_not(sae.cfg.architecture(), "none", sae.cfg.metadata.hook_name_out is not None)
    if reason is not None:
        raise ValueError(reason)


def _afa_group(
    sae: SAE[Any], activations: Iterable[tuple[Tensor, Tensor | None]]
) -> dict[str, float]:
    code, columns = linear_code(sae), TokenColumns()
    for x, out in activations:
        # what encodes whole batches is read in those that it is trained on
        size = _TOKENS_AT_ONCE if code.per_token else len(x)
        outs = [None] * len(x) if out is None else out.split(size)
        for part, part_out in zip(x.split(size), outs, strict=False):
            columns.add(code.read(part, part_out).metrics())
    table = columns.frame()
    finite = is_finite(table)
    return {
        **summarize(table.loc[finite]),
        "tokens": int(finite.sum()),
        "nonfinite_tokens": int((~finite).sum()),
    }


@dataclass
class AFAEvaluator:
    """The AFA metric during training, for SAEs of any architecture.

    For one SAE, beside SAELens's own evaluator::

        runner = LanguageModelSAETrainingRunner(cfg)
        runner.evaluator = AFAEvaluator(beside=runner.evaluator)
        runner.run()

    For several: ``MultiSAETrainingRunnerConfig(..., evaluator=AFAEvaluator())``. SAELens calls
    evaluators when it logs to wandb, every ``eval_every_n_wandb_logs`` logs.

    The evaluator takes its batches from those that training would see next, as SAELens's
    documentation of evaluators says: activations that have been mixed, without the special tokens
    that the runner excludes.

    Args:
        n_batches: Training batches to evaluate.
        beside: Another evaluator whose metrics are returned as well.

    Example:
        >>> from sae_afa_plugin import TopAFATrainingSAE, TopAFATrainingSAEConfig
        >>> sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(d_in=8, d_sae=32))
        >>> batches = iter([torch.randn(64, 8)])
        >>> metrics = AFAEvaluator()(sae, batches, ActivationScaler())
        >>> metrics["afa/norm_z_median"], metrics["afa/tokens"]
        (2.64..., 64)
    """

    n_batches: int = 1
    beside: Callable[..., dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        limits.whole(self, "n_batches", at_least=1)
        if self.beside is not None:
            limits.kind(self, "beside", Callable)  # pyright: ignore[reportArgumentType]

    def __call__(
        self,
        sae: SAE[Any],
        data_provider: Iterator[Tensor],
        activation_scaler: ActivationScaler,
    ) -> dict[str, Any]:
        """Metrics by name, the AFA metric as ``afa/...``.

        Args:
            sae: The SAE that is trained.
            data_provider: Gives activations ``[batch, d_in]``.
            activation_scaler: Brings them to the scale that the SAE is trained on.
        """
        _check_supported(sae)
        metrics = {}
        if self.beside is not None:
            metrics = self.beside(sae, data_provider, activation_scaler)
        batches = islice(data_provider, self.n_batches)  # there may be fewer
        group = _afa_group(sae, ((activation_scaler.scale(x), None) for x in batches))
        return {**metrics, **{f"afa/{name}": value for name, value in group.items()}}
