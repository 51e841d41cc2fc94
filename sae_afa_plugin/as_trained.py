"""Tokens as the SAEs were trained on them, where nobody has chosen others; or what differs.

An SAE's metadata say which model it belongs to and which tokens of a text it has seen. One
evaluation has one model and one choice of tokens: that of most of its SAEs. The others are refused
by name, so that a wrong file costs only itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sae_afa_plugin.activations.models import shared_model, told
from sae_afa_plugin.activations.tokens import AnyDataset, Protocol, with_default_text
from sae_afa_plugin.plan import left_over
from sae_afa_plugin.sources import SAESource

# fields of the protocol that an SAE can decide, and how people are told of them
DECIDED = {
    "prepend_bos": "--bos or --no-bos",
    "positions": "--positions",
    "concatenate": "--concatenate or --no-concatenate",
    "separator": "--separator",
}

_LONGEST = 1 << 20  # tokens in a row that a file may ask for


def seen(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What an SAE's metadata say of the fields of a protocol; None where they say nothing.

    Args:
        metadata: ``sae.cfg.metadata`` as a dictionary.

    Raises:
        ValueError: If they say nothing that can be understood.

    Example:
        >>> seen({"context_size": 64, "seqpos_slice": [32, -4]})["positions"]
        '32:60'
    """
    separate = metadata.get("disable_concat_sequences")
    separator = None
    if "sequence_separator_token" in metadata:
        separator = metadata["sequence_separator_token"]
        separator = "none" if separator is None else separator
    found: dict[str, Any] = {
        "prepend_bos": metadata.get("prepend_bos"),
        "positions": _positions(metadata.get("seqpos_slice"), metadata.get("context_size")),
        "concatenate": None if separate is None else not separate,
        "separator": separator,
    }
    try:
        Protocol(context_size=metadata.get("context_size") or _LONGEST, **found)
        if (metadata.get("context_size") or 0) > _LONGEST:
            raise ValueError(f"context_size is {metadata['context_size']}")
    except ValueError as error:
        raise ValueError(
            f"its metadata do not say in a usable way on which tokens it was trained ({error})"
        ) from error
    return found


def _positions(seqpos_slice: Any, context_size: int | None) -> str | None:
    if seqpos_slice is None:
        return None
    try:
        chosen = slice(*seqpos_slice)
        positions = range(context_size or 1)[chosen]
        if any(isinstance(part, bool) for part in seqpos_slice):
            raise TypeError
    except (TypeError, ValueError):
        raise ValueError(
            f"its metadata have seqpos_slice={seqpos_slice!r}, which is no slice of positions"
        ) from None
    if chosen == slice(None) or (context_size and positions == range(context_size)):
        return "all"
    # what is counted from the end is so in its own sequences, not in ours
    of = chosen if context_size is None else positions
    start, stop, step = ("" if part is None else part for part in (of.start, of.stop, of.step))
    return f"{start}:{stop}" if step in ("", 1) else f"{start}:{stop}:{step}"


def _read(
    sources: Sequence[SAESource], value_of: Callable[[SAESource], Any], refused: dict[str, str]
) -> tuple[list[SAESource], dict[str, Any]]:
    """The SAEs whose metadata can be understood, and what is in them, by name."""
    values: dict[str, Any] = {}

    def cannot_say(source: SAESource) -> None:
        values[source.name] = value_of(source)

    return left_over(sources, cannot_say, refused), values


def _agreeing(
    sources: Sequence[SAESource],
    values: Mapping[str, Any],
    reason: Callable[[Any, Any], str],
    refused: dict[str, str],
    usual: Any = None,
) -> tuple[list[SAESource], Any]:
    """The SAEs that have the value that most have (of several the first), or say nothing of it.

    Who says nothing is counted for what is usual: one file must not decide for all others.
    """
    known = [values[source.name] for source in sources]
    known = [usual if value is None else value for value in known]
    known = [value for value in known if value is not None]
    common = max(known, key=known.count) if known else None

    def differs(source: SAESource) -> str | None:
        value = values[source.name]
        return None if value in (None, common) else reason(value, common)

    return left_over(sources, differs, refused), common


def of_one_model(
    sources: Sequence[SAESource], model: Any | None, refused: dict[str, str]
) -> list[SAESource]:
    """The SAEs that belong to the model that most of them name.

    Args:
        sources: SAEs.
        model: Name or folder of a model that stands in for the one that they name.
        refused: Reasons by name; those that are found are added.

    Raises:
        ValueError: If none is left.
    """

    def wanted(source: SAESource) -> dict[str, Any]:
        named = {} if model is None else {"model_name": str(model)}
        return shared_model({source.name: {**source.metadata, **named}})

    def reason(own: Any, common: Any) -> str:
        return (
            f"it belongs to {told(own)}, most of the SAEs here to {told(common)}: evaluate it by "
            "itself, or pass the model"
        )

    return _agreeing(*_read(sources, wanted, refused), reason, refused)[0]


def as_trained(
    which: Protocol,
    sources: Sequence[SAESource],
    dataset: AnyDataset | None,
    protocol: Any,
    given: Mapping[str, Any],
    say: Callable[[str], None],
    refused: dict[str, str],
) -> tuple[list[SAESource], Protocol, AnyDataset]:
    """Fill in what follows from the SAEs: BOS, positions, separators, the length of sequences.

    Args:
        which: Tokens, as far as somebody has chosen.
        sources: SAEs.
        dataset: What is read; None: the default.
        protocol: By which name it was chosen.
        given: What somebody has chosen by name.
        say: Gets a line about whatever is not as it usually is.
        refused: Reasons by name; those that are found are added.

    Returns:
        The SAEs that were trained so, the tokens, the dataset.

    Raises:
        ValueError: If none is left.
    """
    dataset, which = with_default_text(dataset, which, given)
    left, found, usual = list(sources), dict[str, Any](), Protocol().filled()
    undecided = {name: flags for name, flags in DECIDED.items() if getattr(which, name) is None}
    said: dict[str, dict[str, Any]] = {}
    if undecided:
        left, said = _read(left, lambda source: seen(source.metadata), refused)
    for name, flags in undecided.items():

        def reason(own: Any, common: Any, name: str = name, flags: str = flags) -> str:
            return (
                f"it was trained with {name}={own!r}, most of the SAEs here with {common!r}: "
                f"evaluate it by itself, or pass {name} for all of them ({flags})"
            )

        left, found[name] = _agreeing(
            left,
            {source.name: said[source.name][name] for source in left},
            reason,
            refused,
            getattr(usual, name),
        )
    for source in left:
        if source.metadata.get("dataset_path") == str(dataset):
            say(trained_on(source, dataset))
    size = which.context_size
    if "context_size" not in given:
        if isinstance(dataset, Tensor):
            size = min(size, dataset.shape[-1])
        elif protocol == "default":
            left = _of_usual_length(size, left, refused)
            size = _context_size(size, left, found.get("positions"), say)
    filled = replace(which, context_size=size).filled(**found)
    for name in ("positions", "concatenate", "separator"):
        if getattr(filled, name) != getattr(usual, name) and name in found:
            say(f"{name} is {getattr(filled, name)!r}, as the SAEs were trained")
    return left, filled, dataset


def _of_usual_length(
    size: int, sources: Sequence[SAESource], refused: dict[str, str]
) -> list[SAESource]:
    """The SAEs but for those that most others would have to be read in shorter sequences for."""
    lengths = {
        source.name: min(size, source.metadata.get("context_size") or size) for source in sources
    }
    common = max(lengths.values(), key=list(lengths.values()).count)

    def too_short(source: SAESource) -> str | None:
        own = lengths[source.name]
        if own >= common:
            return None
        return (
            f"it was trained on {own} tokens in a row, most of the SAEs here on {common} or more: "
            "evaluate it by itself, or pass context_size for all of them (--context-size)"
        )

    return left_over(sources, too_short, refused)


def _context_size(
    size: int, sources: Sequence[SAESource], positions: str | None, say: Callable[[str], None]
) -> int:
    known = [n for source in sources if (n := source.metadata.get("context_size"))]
    if not known:
        return size
    shortest = min(known)
    if shortest < size:
        say(f"context_size is {shortest}: an SAE was trained with no more")
        return shortest
    if not range(size)[Protocol(context_size=_LONGEST, positions=positions).chosen]:
        say(f"context_size is {shortest}: the positions that the SAEs know need it")
        return shortest
    if shortest > size:
        say(f"the SAEs were trained on {shortest} tokens in a row, here it is {size}")
    return size


def wrong_processing(settings: Mapping[str, Any], source: SAESource) -> str | None:
    """Why the numbers would be wrong, if activations are of a model that was processed otherwise.

    Args:
        settings: Of the activations.
        source: The SAE.
    """
    wanted = source.metadata.get("model_from_pretrained_kwargs") or {}
    made_with = settings.get("model_kwargs")
    if made_with is None or made_with == wanted:  # of an object, whoever made it knows
        return None
    return (
        f"it needs its model loaded with {wanted}, but these activations are of one that was loaded "
        f"with {made_with}: record them with --model-kwargs '{json.dumps(wanted)}'"
    )


def other_than_wanted(settings: Mapping[str, Any], source: SAESource) -> Iterator[str]:
    """What differs between activations and what an SAE was trained on, one line each.

    Args:
        settings: Of the activations.
        source: The SAE.
    """
    metadata = source.metadata
    for name, wanted in {"model": metadata.get("model_name"), **seen(metadata)}.items():
        found = settings.get(name)
        if wanted is not None and found is not None and wanted != found:
            yield (
                f"{source.name} was trained with {name}={wanted!r}, these activations are made "
                f"with {found!r}"
            )
    if metadata.get("dataset_path") and metadata["dataset_path"] == settings.get("dataset"):
        yield trained_on(source, settings["dataset"])


def trained_on(source: SAESource, dataset: Any) -> str:
    """That an SAE may have seen the tokens that it is evaluated on."""
    return (
        f"{source.name} was trained on {dataset}: it may have seen these tokens, which flatters its "
        "error"
    )
