"""Evaluate many SAEs on one pass of a language model.

The model runs once and leaves the activations of all hooks; then the SAEs are loaded one after
the other, each once, and read them in chunks. So memory holds the model, one SAE, and two parts
of a stated budget: the activations (beyond it they lie in a temporary file) and the
``[tokens, d_sae]`` matrices of a chunk.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from difflib import get_close_matches
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_afa_plugin.activations.hooks import check_hook, hook_in, hook_shapes, wanted_hooks
from sae_afa_plugin.activations.models import load_language_model, shared_model
from sae_afa_plugin.activations.recording import RecordedActivations
from sae_afa_plugin.activations.tokens import (
    PROTOCOLS,
    AnyDataset,
    Protocol,
    TokenSample,
    content_of,
    sample_tokens,
)
from sae_afa_plugin.evals import core_metrics
from sae_afa_plugin.metrics import TokenColumns, dictionary_coherence, is_finite, summarize
from sae_afa_plugin.results import AFAResults, FinishedSAE, ResultsFolder
from sae_afa_plugin.sources import SAESource, shown_origin, sources_of, sources_of_release
from sae_afa_plugin.spaces import AFAReader, why_not

_DATASETS = {"default": "Skylion007/openwebtext", "paper": "NeelNanda/pile-10k"}
# matrices [tokens, d_sae] that live at once: an encoder has up to three, the metric two
_MATRICES = 5
_MOST_AT_ONCE = 1024  # tokens; larger chunks are slower on CPUs, they leave the caches
_ENDS = ("", "_out")  # of a transcoder; the second is None for the others


@dataclass(frozen=True)
class Evaluation:
    """How SAEs are evaluated, beside which tokens.

    Args:
        batch_size_prompts: Sequences in one forward pass of the language model.
        memory_budget: Bytes for the activations, and again for the matrices of a chunk.
        device: For the model and the SAEs; None: a GPU if there is one.
        dtype: SAEs are loaded in this dtype. Objects stay as they are.
        coherence: Whether to compute the coherence of each dictionary, ``d_sae^2 d_in``
            multiplications.
        core: Whether to add SAELens's own metrics (CE and KL recovered, explained variance, L0)
            as ``core_...``: three more passes of the model for each SAE.
        core_tokens: Tokens for these.
        progress: Whether to show bars and what has been loaded.
    """

    batch_size_prompts: int = 16
    memory_budget: int = 1 << 30
    device: str | None = None
    dtype: str = "float32"
    coherence: bool = True
    core: bool = False
    core_tokens: int = 8192
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size_prompts", "memory_budget", "core_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
                raise ValueError(f"device {self.device!r} cannot be used ({error})") from error

    def say(self, line: str) -> None:
        """Print a line above the progress bars."""
        if self.progress:
            tqdm.write(line)


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
    saes: Mapping[str, SAE[Any] | Path | str | tuple[str, str]],
    model: Any = None,
    dataset: AnyDataset | None = None,
    **options: Any,
) -> AFAResults:
    """The AFA metric of several SAEs on the same tokens, in one pass of the language model.

    Args:
        saes: By name: an SAE, the folder of a saved one, or ``(release, sae_id)``.
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``; the
            name of a model; a local folder; or None for the one that the SAEs' metadata name.
        dataset: See :func:`sae_afa_plugin.activations.tokens.sample_tokens`. None: openwebtext, or pile-10k
            for the paper's protocol.
        options: ``protocol`` (``"default"``, ``"paper"`` or a
            :class:`sae_afa_plugin.activations.tokens.Protocol`) and any field of it, ``dataset_config``,
            ``split``, any field of :class:`Evaluation`, and ``out``: a folder where each SAE's
            results are kept as soon as they are known, so that an interrupted evaluation
            continues.

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
    protocol: Protocol | Literal["default", "paper"] = "default",
    dataset_config: str | None = None,
    split: str = "train",
    out: str | Path | None = None,
    **fields: Any,
) -> AFAResults:
    """What :func:`evaluate_saes` and :func:`evaluate_release` share; see there."""
    names = [source.name for source in sources]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"SAEs need names of their own: got {names}")
    which, how = _options(protocol, fields)
    if dataset is None:
        dataset = _DATASETS["paper" if protocol == "paper" else "default"]
    say = how.say

    readable, refused = _readable(sources)
    if not readable:
        raise _none_left(refused)
    which = _as_trained(which, readable, dataset, protocol == "default", fields, say)
    settings = {
        "model": _identity(model, readable),
        "model_argument": str(model) if isinstance(model, str | Path) else None,
        "model_content": _weights_of(model),
        "dataset": str(dataset) if isinstance(dataset, str | Path) else "in memory",
        "dataset_content": content_of(dataset),
        "dataset_config": dataset_config,
        "split": split,
        **asdict(which),
        "dtype": how.dtype,
        "coherence": how.coherence,
        "core_tokens": how.core_tokens if how.core else 0,
    }
    folder = None if out is None else ResultsFolder(Path(out), settings)
    done: dict[str, FinishedSAE] = {}
    if folder is not None:
        done, damaged = folder.finished()
        for line in damaged:
            say(line)
        for source in sources:
            if source.name in done and _has_changed(source, done[source.name], folder):
                del done[source.name]
                say(f"{source.name} has changed since, and is evaluated again")
    missing = [source for source in readable if source.name not in done]
    if done:
        say(f"{len(done)} SAEs were finished before, {len(missing)} are to do")

    if missing or folder is None:
        try:
            model = _loaded(model, missing, how, which)
            sample = sample_tokens(model, dataset, which, dataset_config, split, how.progress)
            if sample.n_tokens < which.n_tokens:
                say(f"the dataset has {sample.n_tokens:,} tokens, not {which.n_tokens:,}")
            sequences = _sequences_table(sample, model)
            if folder is not None:
                folder.begin(sequences)
            fitting = _fitting(missing, model, refused)
            for one in _evaluate_all(fitting, sample, model, which, how, folder, refused):
                done[one.name] = one
        finally:
            if folder is not None:
                folder.leave()
    else:
        sequences = folder.sequences()
    for name, reason in refused.items():
        say(f"{name}: not evaluated: {reason}")
    if not done:
        raise _none_left(refused)
    order = [name for name in names if name in done]
    order += [name for name in done if name not in names]
    results = _assemble([done[name] for name in order], sequences, settings, refused)
    if folder is not None:
        folder.complete(results)
    return results


# --- before anything is loaded ---


def _options(protocol: Any, given: Mapping[str, Any]) -> tuple[Protocol, Evaluation]:
    """Sort the options into those about tokens and those about the evaluation."""
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {sorted(PROTOCOLS)}: got {protocol!r}")
        protocol = PROTOCOLS[protocol]
    known = {cls: [f.name for f in dataclass_fields(cls)] for cls in (Protocol, Evaluation)}
    for name in given:
        if name not in known[Protocol] + known[Evaluation]:
            near = get_close_matches(name, known[Protocol] + known[Evaluation], n=2)
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"there is no option {name!r}{hint}")
    return (
        replace(protocol, **{k: v for k, v in given.items() if k in known[Protocol]}),
        Evaluation(**{k: v for k, v in given.items() if k in known[Evaluation]}),
    )


def _readable(sources: Iterable[SAESource]) -> tuple[list[SAESource], dict[str, str]]:
    """The SAEs that can be evaluated, and why the others cannot."""
    readable: list[SAESource] = []
    refused: dict[str, str] = {}
    for source in sources:
        try:
            reason = source.why_not()
        except ValueError as error:
            reason = str(error)
        if reason is None:
            readable.append(source)
        else:
            refused[source.name] = reason
    return readable, refused


def _none_left(refused: Mapping[str, str]) -> ValueError:
    name, reason = next(iter(refused.items()))
    others = f" ({len(refused) - 1} others neither)" if len(refused) > 1 else ""
    return ValueError(f"{name!r} cannot be evaluated{others}: {reason}")


def _as_trained(
    which: Protocol,
    sources: Iterable[SAESource],
    dataset: AnyDataset,
    may_shorten: bool,
    given: Mapping[str, Any],
    say: Callable[[str], None],
) -> Protocol:
    """Fill in what follows from the SAEs: whether they know BOS, and how long their contexts are."""
    metadata = [source.metadata for source in sources]
    if which.prepend_bos is None:
        known = {data["prepend_bos"] for data in metadata if data.get("prepend_bos") is not None}
        if len(known) > 1:
            raise ValueError(
                "some of the SAEs were trained with BOS and some without: evaluate them one after "
                "the other, or pass prepend_bos (--bos or --no-bos)"
            )
        which = replace(which, prepend_bos=known.pop() if known else True)
    if "context_size" in given:
        return which
    if isinstance(dataset, Tensor):
        return replace(which, context_size=min(which.context_size, dataset.shape[-1]))
    shortest = min(
        (data["context_size"] for data in metadata if data.get("context_size")), default=0
    )
    if may_shorten and 0 < shortest < which.context_size:
        say(f"context_size is {shortest}: an SAE was trained with no more")
        return replace(which, context_size=shortest)
    return which


def _identity(model: Any, sources: Iterable[SAESource]) -> str:
    """What the settings remember of the language model."""
    if model is None:
        wanted = shared_model({source.name: source.metadata for source in sources})
        return " ".join(str(value) for value in wanted.values() if value)
    if isinstance(model, str | Path):
        return str(model)
    name = getattr(getattr(model, "cfg", None), "model_name", None)
    return f"{type(model).__name__} {name or ''}".strip()


def _weights_of(model: Any) -> str | None:
    """Tells one model object from another: the beginning of each of its parameters."""
    if model is None or isinstance(model, str | Path):
        return None
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:64].double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _has_changed(source: SAESource, before: FinishedSAE, folder: ResultsFolder) -> bool:
    if before.fingerprint == source.fingerprint():
        return False
    origin = str(before.summary.get("source"))
    if origin != source.origin:
        raise ValueError(
            f"{source.name!r} in {str(folder.folder)!r} is another SAE "
            f"({shown_origin(origin)}): use another folder"
        )
    return True


# --- the language model ---


def _loaded(
    model: Any,
    missing: Iterable[SAESource],
    how: Evaluation,
    which: Protocol,
) -> Any:
    if model is None or isinstance(model, str | Path):
        device = how.device or ("cuda" if torch.cuda.is_available() else "cpu")
        metadata = {source.name: source.metadata for source in missing}
        if model is not None:  # it stands in for the one that the metadata name, or do not
            metadata = {name: {**d, "model_name": str(model)} for name, d in metadata.items()}
        hooks = {hook for data in metadata.values() for hook in wanted_hooks(data)}
        model = load_language_model(model, shared_model(metadata), sorted(hooks), device)
    longest = getattr(getattr(model, "cfg", None), "n_ctx", None)
    if longest is not None and which.context_size > longest:
        raise ValueError(
            f"context_size is {which.context_size}, but the model takes {longest} tokens at most"
        )
    return model


def _fitting(sources: Iterable[SAESource], model: Any, refused: dict[str, str]) -> list[SAESource]:
    """The SAEs whose hooks exist and are as wide as they need; the others are refused."""
    wanted = [(source, _hooks_of(source, model)) for source in sources]
    known = hook_shapes(model, sorted({hook for _, hooks in wanted for hook, *_ in hooks}))
    fitting: list[SAESource] = []
    for source, hooks in wanted:
        try:
            for hook, width, head in hooks:
                check_hook(model, hook, width, head, known)
            fitting.append(source)
        except ValueError as error:
            refused[source.name] = str(error)
    return fitting


def _hooks_of(source: SAESource, model: Any) -> list[tuple[str, int, int | None]]:
    """The hooks that an SAE reads, their widths, and the heads if it reads one."""
    config, metadata = source.config, source.metadata
    ends = zip(_ENDS, (config["d_in"], config.get("d_out")), strict=True)
    named = [(end, hook_in(model, metadata, end), width) for end, width in ends]
    return [
        (hook, width, metadata.get(f"hook_head_index{end}"))
        for end, hook, width in named
        if hook is not None and width is not None
    ]


# --- the SAEs ---


def _evaluate_all(
    sources: Sequence[SAESource],
    sample: TokenSample,
    model: Any,
    which: Protocol,
    how: Evaluation,
    folder: ResultsFolder | None,
    refused: dict[str, str],
) -> Iterator[FinishedSAE]:
    """One pass of the model, then each SAE; each is kept in the folder before it is given."""
    hooks = {
        hook
        for source in sources
        for suffix in _ENDS
        if (hook := hook_in(model, source.metadata, suffix)) is not None
    }
    activations = RecordedActivations(
        model,
        sample,
        hooks,
        how.batch_size_prompts,
        how.memory_budget,
        scratch=None if folder is None else folder.folder,
        progress=how.progress,
    )
    keep = folder is not None
    with tqdm(sources, desc="SAEs", unit="SAE", disable=not how.progress) as bar:
        for source in bar:
            try:
                one = _evaluate(source, activations, sample, model, which, how, keep)
            except (ValueError, OSError) as error:
                # the others go on, and what this one needs may be mended before the next run
                refused[source.name] = " ".join(str(error).split())
                continue
            if folder is not None:
                folder.add(one)
            yield one


def _evaluate(
    source: SAESource,
    activations: RecordedActivations,
    sample: TokenSample,
    model: Any,
    which: Protocol,
    how: Evaluation,
    keep: bool,
) -> FinishedSAE:
    # hashing the weights takes seconds, and before loading: a file may change meanwhile
    fingerprint = source.fingerprint() if keep else ""
    sae = source.load(str(how.device or next(model.parameters()).device), how.dtype)
    cfg, metadata = sae.cfg, sae.cfg.metadata.to_dict()
    hooks = " to ".join(filter(None, (metadata["hook_name"], metadata.get("hook_name_out"))))
    how.say(
        f"{source.name}: {cfg.architecture()}, {cfg.d_sae:,} features of width {cfg.d_in:,}, "
        f"{hooks}, normalize_activations {cfg.normalize_activations}, {cfg.dtype}"
    )
    reason = why_not(cfg.architecture(), cfg.normalize_activations, True)
    if reason is not None:
        raise ValueError(reason)
    reader = AFAReader(sae)
    size = min(_MOST_AT_ONCE, max(1, how.memory_budget // (_MATRICES * 4 * cfg.d_sae)))
    columns = TokenColumns()
    with tqdm(
        total=sample.n_tokens, desc=source.name, unit="tok", leave=False, disable=not how.progress
    ) as bar:
        for x, x_out in _pairs(activations, model, metadata, size):
            if len(columns) == 0:
                reader.check_decoder(x[:8])
            columns.add(reader(x, x_out))
            bar.update(len(x))
    table = columns.frame()
    finite = is_finite(table)
    if not finite.any():
        raise ValueError(
            "none of its tokens has finite norms: its weights or inputs are not finite"
        )
    table = pd.concat([_places(sample), table], axis=1).loc[finite]
    table.insert(0, "sae", pd.Categorical.from_codes([0] * len(table), [source.name]))
    summary: dict[str, Any] = {
        "source": source.origin,
        "architecture": cfg.architecture(),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "hook_name": metadata["hook_name"],
        "hook_name_out": metadata.get("hook_name_out"),
        "normalize_activations": cfg.normalize_activations,
        "dtype": cfg.dtype,
        "tokens": int(finite.sum()),
        "nonfinite_tokens": int((~finite).sum()),
        "special_tokens": sample.n_special,
        "catalogue_l0": source.catalogue_l0,
        "dead_features": int((~reader.fired).sum()),
        **summarize(table),
    }
    l0 = summary["l0_mean"]
    if source.catalogue_l0 and not 0.5 < l0 / source.catalogue_l0 < 2:
        how.say(
            f"{source.name}: L0 is {l0:.1f}, but the catalogue says {source.catalogue_l0:g}: is "
            "this the model, and are these the tokens, that the SAE was made for?"
        )
    if how.coherence:
        summary.update(dictionary_coherence(sae.W_dec)._asdict())
    if how.core:
        summary.update(
            core_metrics(
                sae,
                model,
                sample,
                which.exclude_special_tokens,
                how.core_tokens,
                how.batch_size_prompts,
            )
        )
    return FinishedSAE(source.name, fingerprint, summary, table)


def _pairs(
    activations: RecordedActivations, model: Any, metadata: Mapping[str, Any], size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What an SAE reads and, for transcoders, what it is to give; some tokens at a time."""
    read, write = (
        None
        if (hook := hook_in(model, metadata, suffix)) is None
        else activations.chunks(hook, metadata.get(f"hook_head_index{suffix}"), size)
        for suffix in _ENDS
    )
    assert read is not None  # an SAE without a hook has been refused
    return zip(read, repeat(None) if write is None else write, strict=False)


# --- tables ---


def _places(sample: TokenSample) -> pd.DataFrame:
    """Where the evaluated tokens stand: one row each."""
    sequence, position = sample.keep.nonzero(as_tuple=True)
    return pd.DataFrame(
        {
            "sequence": sequence.int().numpy(),
            "position": position.int().numpy(),
            "token_id": sample.tokens[sample.keep].int().numpy(),
        }
    )


def _sequences_table(sample: TokenSample, model: Any) -> pd.DataFrame:
    n, size = sample.tokens.shape
    ids = sample.tokens.flatten().int().numpy()
    unique, where = np.unique(ids, return_inverse=True)
    tokenizer = getattr(model, "tokenizer", None)
    texts = [f"<{i}>" if tokenizer is None else tokenizer.decode([int(i)]) for i in unique]
    return pd.DataFrame(
        {
            "sequence": np.repeat(np.arange(n, dtype=np.int32), size),
            "position": np.tile(np.arange(size, dtype=np.int32), n),
            "token_id": ids,
            "token": np.array(texts, dtype=object)[where],
        }
    )


def _assemble(
    finished: Sequence[FinishedSAE],
    sequences: pd.DataFrame,
    settings: dict[str, Any],
    refused: dict[str, str],
) -> AFAResults:
    names = [one.name for one in finished]
    tokens = pd.concat(
        [
            one.tokens.assign(sae=pd.Categorical([one.name] * len(one.tokens), names))
            for one in finished
        ],
        ignore_index=True,
    )
    return AFAResults(
        # NaN for whatever is missing, as it comes back from a file
        summary=pd.DataFrame.from_dict(
            {one.name: one.summary for one in finished}, orient="index"
        ).fillna(np.nan),
        tokens=tokens,
        sequences=sequences,
        metadata={
            "settings": settings,
            "versions": {
                "python": platform.python_version(),
                **{
                    p: version(p)
                    for p in ("sae-afa-plugin", "sae-lens", "transformer-lens", "torch")
                },
            },
            "refused": refused,
            "fingerprints": {one.name: one.fingerprint for one in finished if one.fingerprint},
        },
    )
