"""Evaluate many SAEs on the same activations: plan, read, let groups of metrics look, store.

The activations are read once and kept; then the SAEs are loaded one after the other, each once,
and read them in blocks. So memory holds the language model, one SAE, the activations up to a
stated budget (beyond it they lie in a temporary file) and the matrices of a block.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal

from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.activations.hooks import unusual_state
from sae_afa_plugin.activations.language_model import LanguageModelActivations, Reading
from sae_afa_plugin.activations.models import why_not_loaded
from sae_afa_plugin.activations.recording import RecordedActivations
from sae_afa_plugin.activations.tokens import AnyDataset, Protocol
from sae_afa_plugin.as_trained import (
    DECIDED,
    as_trained,
    of_one_model,
    other_than_wanted,
    wrong_processing,
)
from sae_afa_plugin.files import user_given, user_path
from sae_afa_plugin.groups.base import MetricGroup
from sae_afa_plugin.plan import Evaluation, left_over, none_left, sorted_options
from sae_afa_plugin.results import AFAResults, update_index
from sae_afa_plugin.sources import SAESource, sources_of, sources_of_release
from sae_afa_plugin.store import Store
from sae_afa_plugin.work import Work

__all__ = ["Evaluation", "evaluate_release", "evaluate_saes", "evaluate_sources"]


def evaluate_release(
    release: str,
    sae_ids: str | Sequence[str] | None = None,
    model: Any = None,
    dataset: AnyDataset | None = None,
    **options: Any,
) -> AFAResults:
    """The AFA metric of SAEs that SAELens can load by name.

    Args:
        release: A release of SAELens's catalogue, or a repository on the hub.
        sae_ids: Ids or patterns like ``blocks.*.hook_resid_pre``; None: all.
        model: As for :func:`evaluate_saes`.
        dataset: As for :func:`evaluate_saes`.
        options: As for :func:`evaluate_saes`.

    Raises:
        ValueError: If the release or an id is not known; and as :func:`evaluate_saes`.

    Example::

        results = evaluate_release("gpt2-small-res-jb", "blocks.*.hook_resid_pre", n_tokens=20_000)
    """
    patterns = [sae_ids] if isinstance(sae_ids, str) else sae_ids
    return evaluate_sources(sources_of_release(release, patterns), model, dataset, **options)


def evaluate_saes(
    saes: Mapping[str, Any],
    model: Any = None,
    dataset: AnyDataset | None = None,
    **options: Any,
) -> AFAResults:
    """The AFA metric of several SAEs on the same tokens, in one pass of the language model.

    Args:
        saes: By name: an SAE, the folder of a saved one, or ``(release, sae_id)``; also any
            object with ``encode``, ``decode``, ``W_dec`` and ``b_dec``.
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``; the
            name of a model; a local folder; or None for the one that the SAEs' metadata name.
        dataset: See :func:`sae_afa_plugin.activations.tokens.sample_tokens`. None: the
            OpenWebText2 part of pile-10k.
        options: ``protocol`` (``"default"``, ``"paper"`` or a
            :class:`sae_afa_plugin.activations.tokens.Protocol`) and any field of it,
            ``dataset_config``, ``split``, any field of :class:`Evaluation`; ``activations``: a
            recording of ``sae-afa record``, or any
            :class:`sae_afa_plugin.activations.base.Activations`, in place of a model and a
            dataset; ``groups``: further groups of metrics; and ``out``: a folder where each SAE's
            results are kept as soon as they are known, so that an interrupted evaluation
            continues, and several processes can share the work.

    Returns:
        Summary, tokens and metadata. SAEs that cannot be evaluated are in
        ``metadata["refused"]`` with the reason.

    Raises:
        ValueError: If none of the SAEs can be evaluated, there are no tokens, or ``out`` holds
            results of other settings.

    Example:
        >>> from sae_afa_plugin import TopAFASAE, TopAFASAEConfig
        >>> sae = TopAFASAE(TopAFASAEConfig(d_in=192, d_sae=384))
        >>> sae.cfg.metadata.hook_name = "blocks.4.hook_resid_pre"
        >>> results = evaluate_saes(
        ...     {"fresh": sae}, "sae-afa-demo", "embedded", n_tokens=200, progress=False
        ... )
        >>> len(results.tokens), bool(results.summary.loc["fresh", "norm_ratio_median"] > 0.9)
        (200, True)
    """
    return evaluate_sources(sources_of(saes), model, dataset, **options)


def evaluate_sources(
    sources: Sequence[SAESource],
    model: Any = None,
    dataset: AnyDataset | None = None,
    *,
    activations: Activations | str | Path | None = None,
    protocol: Protocol | Literal["default", "paper"] = "default",
    dataset_config: str | None = None,
    split: str = "train",
    groups: Sequence[MetricGroup] = (),
    out: str | Path | None = None,
    **fields: Any,
) -> AFAResults:
    """What :func:`evaluate_saes` and :func:`evaluate_release` share; see there."""
    model, dataset, activations = map(user_given, (model, dataset, activations))
    if out is not None and not str(out).strip():
        raise ValueError("out must not be empty: name a folder, or pass None to keep nothing")
    names = [source.name for source in sources]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"SAEs need names of their own: got {names}")
    which, how = sorted_options(protocol, fields)
    open_to_saes = {name: getattr(which, name) for name in DECIDED}
    refused: dict[str, str] = {}
    readable = left_over(sources, lambda source: source.why_not(), refused)
    recording = None
    if activations is None:
        if model is None or isinstance(model, str | Path):

            def not_loaded(source: SAESource) -> str | None:
                named = {} if model is None else {"model_name": None}  # the user has named it
                return why_not_loaded({**source.metadata, **named}, how.trust_remote_code)

            readable = left_over(readable, not_loaded, refused)
            readable = of_one_model(readable, model, refused)
        else:
            for line in unusual_state(model):
                how.say(line)
        readable, which, dataset = as_trained(
            which, readable, dataset, protocol, fields, how.say, refused
        )
        activations = LanguageModelActivations(
            model,
            dataset,
            which,
            {source.name: source.metadata for source in readable},
            dataset_config=dataset_config,
            split=split,
            device=how.device,
            batch_size_prompts=how.batch_size_prompts,
            trust_remote_code=how.trust_remote_code,
            progress=how.progress,
        )
    else:
        chosen = set(fields) & {f.name for f in dataclass_fields(Protocol)}
        if dataset is not None or chosen or protocol != "default":
            raise ValueError(
                "activations have their tokens already: pass no dataset and no choice of tokens "
                f"beside them{f' (got {sorted(chosen)})' if chosen else ''}"
            )
        if isinstance(activations, str | Path):
            recording = str(activations)
            activations = RecordedActivations(activations, model, how.device)
        elif model is not None:
            raise ValueError("pass the model to the activations, not beside them")
        settings = activations.settings

        def not_for_these(source: SAESource) -> str | None:
            for line in other_than_wanted(settings, source):
                how.say(line)
            return wrong_processing(settings, source)

        readable = left_over(readable, not_for_these, refused)
    given: Sequence[Any] = groups
    if strangers := [group for group in given if not isinstance(group, MetricGroup)]:
        raise ValueError(f"groups must be groups of metrics, KnownTruth() say: got {strangers}")
    all_groups = [*how.groups(), *groups]
    if len({group.name for group in all_groups}) < len(all_groups):
        raise ValueError(f"groups need names of their own: {[g.name for g in all_groups]}")

    for group in all_groups:
        if group.needs_model and not activations.has_model:
            raise ValueError(
                f"the group {group.name!r} runs the language model, and these activations come "
                "without one: pass the model as well, or leave the group out"
            )

    temporary = tempfile.TemporaryDirectory(prefix="sae-afa-") if out is None else None
    folder = user_path(temporary.name if temporary is not None else str(out))
    store = Store(folder, {**activations.settings, "dtype": how.dtype})
    work = Work(activations, store, all_groups, how, keeps=temporary is None)
    try:
        work.do(readable, refused)
        for name, reason in refused.items():
            how.say(f"{name}: not evaluated: {reason}")
        if not work.done:
            raise none_left(refused)
        text = (str, Path)
        reading = Reading(
            model=str(model) if isinstance(model, text) else None,
            dataset=str(dataset) if isinstance(dataset, text) else None,
            dataset_config=dataset_config,
            split=split,
        )
        options = {**asdict(reading), **asdict(which), **open_to_saes, **asdict(how)}
        options["activations"] = recording
        results = update_index(
            store, work.done, names, refused, {"python": platform.python_version()}, options
        )
        for place, reason in results.metadata["refused"].items():
            if place not in refused and place.startswith("results/"):
                how.say(f"{place} is left out: {reason}")
    finally:
        if not work.done:
            store.leave()
    if temporary is not None:
        results.keep(temporary)
    return results
