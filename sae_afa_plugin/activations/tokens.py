"""Text or tokens from wherever they are, as sequences that a language model can read."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_afa_plugin import limits
from sae_afa_plugin._upstream import (
    concat_and_batch_sequences,
    get_special_token_from_cfg,
    get_special_token_ids,
)
from sae_afa_plugin.activations.documents import (
    TEXT_COLUMNS,
    TOKEN_COLUMNS,
    AnyDataset,
    documents_of,
    leaves_out,
    shown_dataset,
)
from sae_afa_plugin.files import user_given
from sae_afa_plugin.options import flag

_DATASET, _PART = "NeelNanda/pile-10k", "OpenWebText2"
_SEPARATORS = ("bos", "eos", "sep", "none")


def _parse_ids(text: str) -> bool | tuple[int, ...]:
    if text in ("yes", "no"):
        return text == "yes"
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be yes, no or ids of tokens like 0,50256: got {text!r}"
        ) from None


def _parse_separator(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _write_ids(value: bool | tuple[int, ...]) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else ",".join(map(str, value)) or ","


@dataclass(frozen=True)
class Protocol:
    """Which tokens of a dataset are read.

    Args:
        n_tokens: How many, special tokens not counted.
        context_size: Tokens in one sequence.
        prepend_bos: Whether each sequence begins with BOS, where the tokenizer has one. Without a
            word: as the SAEs were trained, else yes.
        positions: "all" tokens of a sequence, only the "last" one of each, or a slice like
            "32:-4". Without a word: as the SAEs were trained, else all.
        concatenate: Whether documents are put in a row and cut into sequences. Otherwise each
            sequence is the beginning of one document, and documents that are too short are left
            out. Without a word: as the SAEs were trained, else yes.
        separator: What stands between documents in a row: "bos", "eos", "sep", the id of a token,
            or "none". Without a word: as the SAEs were trained, else BOS.
        exclude_special_tokens: Leave out BOS, EOS, padding and the like, or the tokens of these
            ids: their norms are up to 100 times those of other tokens.
        subset: Of a dataset with ``meta.pile_set_name``, only this part.
        shuffle: Whether the documents are taken in random order, by ``seed``.
        seed: For the order of documents.
    """

    n_tokens: int = field(default=50_000, metadata=flag("--tokens"))
    context_size: int = 128
    prepend_bos: bool | None = field(default=None, metadata=flag("--bos"))
    positions: str | None = field(default=None, metadata=flag(metavar="all|last|FROM:TO"))
    concatenate: bool | None = None
    separator: str | int | None = field(
        default=None, metadata=flag(metavar="bos|eos|sep|none|ID", parse=_parse_separator)
    )
    exclude_special_tokens: bool | tuple[int, ...] = field(
        default=True,
        metadata=flag(metavar="yes|no|ID,ID", parse=_parse_ids, write=_write_ids),
    )
    subset: str | None = None
    shuffle: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        if isinstance(self.exclude_special_tokens, list):  # as JSON gives it back
            object.__setattr__(self, "exclude_special_tokens", tuple(self.exclude_special_tokens))
        limits.whole(self, "n_tokens", "context_size", at_least=1)
        limits.whole(self, "seed")
        limits.truth(self, "shuffle")
        limits.truth(self, "prepend_bos", "concatenate", none=True)
        limits.text(self, "positions", "subset", none=True)
        ids: Any = self.exclude_special_tokens
        if not isinstance(ids, bool) and not (
            isinstance(ids, tuple) and all(type(i) is int and 0 <= i < 1 << 31 for i in ids)
        ):
            raise ValueError(
                "exclude_special_tokens must be True, False or ids of tokens, which are whole "
                f"numbers: got {ids!r}"
            )
        is_id = type(self.separator) is int and 0 <= self.separator < 1 << 31
        if self.separator not in (None, *_SEPARATORS) and not is_id:
            raise ValueError(
                f"separator must be one of {list(_SEPARATORS)} or the id of a token: got "
                f"{self.separator!r}"
            )
        if not range(self.context_size)[self.chosen]:
            raise ValueError(
                f"positions={self.positions!r} leaves none of the {self.context_size} tokens of a "
                "sequence: choose others, or a larger context_size"
            )

    @property
    def chosen(self) -> slice:
        """Which positions of a full sequence are read; all where that depends on the SAEs."""
        if self.positions in (None, "all"):
            return slice(None)
        if self.positions == "last":
            return slice(-1, None)
        parts = str(self.positions).split(":")
        try:
            numbers = [int(part) if part else None for part in parts]
            if not 2 <= len(parts) <= 3 or (len(parts) == 3 and (numbers[2] or 1) < 1):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"positions must be 'all', 'last' or a slice like '32:-4': got {self.positions!r}"
            ) from None
        return slice(*numbers)

    def filled(self, **as_trained: Any) -> Protocol:
        """The same protocol with nothing left open.

        Args:
            as_trained: What SAEs say of the fields that are None. What they do not say either is
                as SAELens does it.

        Example:
            >>> Protocol(prepend_bos=False).filled(prepend_bos=True, positions="32:60").positions
            '32:60'
        """
        known = {name: value for name, value in as_trained.items() if value is not None}
        usual = {"prepend_bos": True, "positions": "all", "concatenate": True, "separator": "bos"}
        missing = {name for name in usual if getattr(self, name) is None}
        return replace(self, **{n: v for n, v in {**usual, **known}.items() if n in missing})


PROTOCOLS = {
    "default": Protocol(),
    # the paper's own evaluation, on NeelNanda/pile-10k
    "paper": Protocol(
        n_tokens=1000,
        prepend_bos=True,
        positions="last",
        concatenate=False,
        subset=_PART,
        shuffle=True,
    ),
}


def with_default_text(
    dataset: AnyDataset | None, protocol: Protocol, given: Collection[str]
) -> tuple[AnyDataset, Protocol]:
    """The dataset, or where none is given the one of the paper's evaluation.

    Not the text that the paper's recipe (and most SAEs) begin to train on: that would be no
    held-out text.

    Args:
        dataset: What was given.
        protocol: Which tokens.
        given: Fields of the protocol that somebody has chosen.
    """
    if dataset is not None:
        return dataset, protocol
    return _DATASET, protocol if "subset" in given else replace(protocol, subset=_PART)


class TokenSample(NamedTuple):
    """Sequences, and which of their tokens are evaluated.

    Args:
        tokens: int64 ``[n, context_size]``.
        keep: bool ``[n, context_size]``.
        n_special: Special tokens among the positions that were asked for, left out.
    """

    tokens: Tensor
    keep: Tensor
    n_special: int

    @property
    def n_tokens(self) -> int:
        """How many tokens are evaluated."""
        return int(self.keep.sum())


def tokenize(
    model: Any, texts: Iterable[str], context_size: int, prepend_bos: bool = True
) -> Tensor:
    """Texts in a row, cut into sequences: int64 ``[n, context_size]``.

    Args:
        model: Anything with TransformerLens's ``to_tokens`` and ``tokenizer``.
        texts: Documents; the BOS token separates them.
        context_size: Tokens in one sequence.
        prepend_bos: Whether each sequence is led by BOS.

    Raises:
        ValueError: If the texts do not fill one sequence.
    """
    rows = list(_sequences(model, texts, Protocol(1, context_size, prepend_bos)))
    if not rows:
        raise ValueError(
            f"the texts do not fill one sequence of {context_size} tokens: bring more text or "
            "use a smaller context_size"
        )
    return torch.stack(rows)


def sample_tokens(
    model: Any,
    dataset: AnyDataset,
    protocol: Protocol,
    dataset_config: str | None = None,
    split: str = "train",
    progress: bool = True,
) -> TokenSample:
    """The first tokens of a dataset that the protocol asks for.

    Args:
        model: Anything with TransformerLens's ``to_tokens`` and ``tokenizer``.
        dataset: A dataset with a column ``tokens``, ``input_ids`` or ``text``; texts in a list;
            token sequences int64 ``[n, at least context_size]``; a folder or file (``.txt``,
            ``.jsonl``, ``.csv``, ``.parquet``); ``"embedded"``, the documentation of Python that
            the embedded model has not seen; or the name of a dataset on the hub, which is
            streamed. Beside tokens, ``attention_mask`` and ``special_tokens_mask`` are followed.
        protocol: Which tokens.
        dataset_config: Configuration of a dataset on the hub, where it has several.
        split: Split of a dataset that has several.
        progress: Whether to show a bar.

    Raises:
        ValueError: If the dataset has neither text nor tokens, its tokens are not of this model,
            it has padding before tokens, or no token is left.
    """
    protocol = protocol.filled()
    not_chosen = torch.ones(protocol.context_size, dtype=torch.bool)
    not_chosen[protocol.chosen] = False
    dataset = user_given(dataset)
    special = _special_tokens(model, protocol.exclude_special_tokens)
    vocabulary = vocabulary_of(model)
    kept: list[Tensor] = []
    masks: list[Tensor] = []
    n_kept = n_special = 0
    with tqdm(total=protocol.n_tokens, desc="Tokens", unit="tok", disable=not progress) as bar:
        for row, wanted, told_special in _rows(model, dataset, protocol, dataset_config, split):
            _check_ids(row, vocabulary)
            wanted = wanted.clone()
            if protocol.positions == "last":  # of what is no padding
                wanted[: wanted.nonzero().amax()] = False
            else:
                wanted[not_chosen] = False
            is_special = torch.isin(row, special)
            if protocol.exclude_special_tokens is True:
                is_special |= told_special
            is_special &= wanted
            mask = wanted & ~is_special
            surplus = n_kept + int(mask.sum()) - protocol.n_tokens
            if surplus > 0:
                mask[mask.nonzero()[-surplus:, 0]] = False
            kept.append(row)
            masks.append(mask)
            n_special += int(is_special.sum())
            n_kept += int(mask.sum())
            bar.update(int(mask.sum()))
            if n_kept >= protocol.n_tokens:
                break
    if n_kept == 0:
        raise ValueError(
            f"no token is left to evaluate: {len(kept)} sequences of {protocol.context_size} "
            f"tokens were read and {n_special} of the tokens asked for are special. Bring more or "
            "longer text, use a smaller context_size, or pass exclude_special_tokens=False "
            "(--exclude-special-tokens=no)"
        )
    return TokenSample(torch.stack(kept), torch.stack(masks), n_special)


def _special_tokens(model: Any, exclude: bool | tuple[int, ...]) -> Tensor:
    if exclude is False:
        return torch.empty(0, dtype=torch.long)
    if exclude is not True:
        return torch.tensor(exclude, dtype=torch.long)
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(
            "the model has no tokenizer, so its special tokens are unknown: pass their ids as "
            "exclude_special_tokens, or False to leave none out"
        )
    return torch.tensor(get_special_token_ids(model.tokenizer), dtype=torch.long)


def vocabulary_of(model: Any) -> int | None:
    """How many tokens a model knows, if it says so."""
    for cfg in (
        getattr(model, "cfg", None),
        getattr(getattr(model, "model", None), "config", None),
    ):
        for name in ("d_vocab", "vocab_size"):
            if isinstance(getattr(cfg, name, None), int):
                return getattr(cfg, name)
    return None


def _check_ids(row: Tensor, vocabulary: int | None) -> None:
    least, most = int(row.min()), int(row.max())
    if least < 0 or (vocabulary is not None and most >= vocabulary):
        known = (
            "" if vocabulary is None else f", whose ids are 0 to {vocabulary - 1} ({vocabulary})"
        )
        raise ValueError(
            f"the token id {least if least < 0 else most} does not fit the model{known}: the "
            "tokens were made with another tokenizer, or are labels"
        )


def _rows(
    model: Any, dataset: AnyDataset, protocol: Protocol, config: str | None, split: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sequences of exactly context_size tokens; which are no padding: some; which are special."""
    size = protocol.context_size
    everything, nothing = torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    if isinstance(dataset, Tensor):
        if dataset.ndim != 2 or dataset.shape[1] < size:
            raise ValueError(
                f"token sequences must have shape [n, {size} or more]: got {tuple(dataset.shape)}; "
                "pass the right context_size"
            )
        for row in dataset[:, :size]:
            yield _ids(row, "tokens").cpu(), everything, nothing
        return
    documents = _part(
        documents_of(dataset, config, split, protocol.seed if protocol.shuffle else None),
        protocol.subset,
    )
    first = next(documents, None)
    if first is None:
        part = "" if protocol.subset is None else f", or has no part {protocol.subset!r}"
        raise ValueError(f"the dataset {shown_dataset(dataset)} is empty{part}")
    documents = chain([first], documents)
    for column in TOKEN_COLUMNS:
        if column in first:
            for document in documents:
                row = _ids(document[column], column)
                if len(row) < size:
                    raise ValueError(
                        f"the column {column!r} has a sequence of {len(row)} tokens, fewer than "
                        f"context_size={size}: pass context_size={len(row)} or less"
                    )
                usable, is_special = (mask[:size] for mask in _masks(document, len(row)))
                if usable.any():
                    yield row[:size], usable, is_special
            return
    for column in TEXT_COLUMNS:
        if column in first:
            texts = (_text(row[column], column) for row in documents)
            for row in _sequences(model, texts, protocol):
                yield row, everything, nothing
            return
    raise ValueError(
        f"the dataset {shown_dataset(dataset)} has neither tokens nor text: it has the columns "
        f"{sorted(first)}, and one of {[*TOKEN_COLUMNS, *TEXT_COLUMNS]} is needed"
    )


def _part(
    documents: Iterator[Mapping[str, Any]], subset: str | None
) -> Iterator[Mapping[str, Any]]:
    """The documents of one part of the Pile, or all where they do not say."""
    for document in documents:
        meta = document.get("meta")
        part = meta.get("pile_set_name") if isinstance(meta, dict) else None
        if subset is None or part in (None, subset):
            yield document


def _ids(values: Any, column: str) -> Tensor:
    """Ids of tokens as int64 ``[n]``."""
    try:
        ids = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        inside = values[0] if isinstance(values, list) and values else values
        raise ValueError(
            f"the column {column!r} must hold ids of tokens: got a {type(values).__name__} of "
            f"{type(inside).__name__}"
        ) from None
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(
            f"the column {column!r} must hold a row of ids of tokens: got {ids.dtype} of shape "
            f"{tuple(ids.shape)}"
        )
    return ids.long()


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"the column {column!r} must hold text: got {type(value).__name__} "
            f"({str(value)[:60]}...); turn it into text first, with a chat template, say"
        )
    return value


def _masks(document: Mapping[str, Any], n: int) -> tuple[Tensor, Tensor]:
    """Which of a row's ``n`` tokens its other columns leave, and which they call special."""
    usable, is_special = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    for column, values in document.items():
        if values is None or not leaves_out(column):
            continue
        mask = _numbers(values, column, n)
        if mask is None:
            continue
        if column == "attention_mask":
            if not torch.isin(mask, torch.tensor([0, 1])).all():
                raise ValueError(
                    f"attention_mask must hold 0 and 1: got {sorted(set(mask.tolist()))[:5]}, which "
                    "may number documents in one row; cut the rows where documents begin"
                )
            real = mask.bool()
            if not real[: int(real.sum())].all():
                raise ValueError(
                    "attention_mask has padding before tokens, which would shift their positions: "
                    "pad on the right, or leave the padding out"
                )
            usable &= real
        elif column == "special_tokens_mask":
            is_special |= mask.bool()
        elif column == "position_ids":
            if not torch.equal(mask.long(), torch.arange(n)):
                raise ValueError(
                    "position_ids are not 0, 1, 2, ..., and the model would not be told: cut the "
                    "sequences where positions begin again, and leave the column out"
                )
        elif not mask.bool().all():
            raise ValueError(
                f"the column {column!r} leaves tokens out, and what it means is not known here: "
                "apply it and remove it, or call it attention_mask or special_tokens_mask"
            )
    return usable, is_special


def _numbers(values: Any, column: str, n: int) -> Tensor | None:
    """A column that may leave tokens out; None for one that holds something else, a text say."""
    known = column in ("attention_mask", "special_tokens_mask", "position_ids")
    try:
        mask = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        if not known:
            return None
        raise ValueError(
            f"the column {column!r} must hold a number for each token: got {str(values)[:60]}"
        ) from None
    if mask.shape != (n,):
        raise ValueError(
            f"the column {column!r} must have one entry for each token: got shape "
            f"{tuple(mask.shape)} for {n} tokens"
        )
    return mask


def _sequences(model: Any, texts: Iterable[str], protocol: Protocol) -> Iterator[Tensor]:
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("the model has no tokenizer: bring a dataset of tokens instead of text")
    protocol, bos = protocol.filled(), model.tokenizer.bos_token_id
    separator: Any = None if protocol.separator == "none" else protocol.separator
    separator_id = get_special_token_from_cfg(separator, model.tokenizer)
    if separator_id is None and separator in ("eos", "sep"):
        raise ValueError(
            f"the tokenizer has no {separator.upper()} token to stand between documents: choose "
            "another separator, or 'none'"
        )
    tokens: Iterator[Tensor] = (
        model.to_tokens(text, prepend_bos=False, truncate=False, move_to_device=False)[0].cpu()
        for text in texts
        if text
    )
    if protocol.prepend_bos and bos is not None and protocol.context_size < 2:
        raise ValueError(
            "sequences of one token would be BOS alone: pass a larger context_size, or "
            "prepend_bos=False (--no-bos)"
        )
    yield from concat_and_batch_sequences(
        tokens_iterator=tokens,
        context_size=protocol.context_size,
        begin_batch_token_id=bos if protocol.prepend_bos else None,
        sequence_separator_token_id=separator_id,
        disable_concat_sequences=not protocol.concatenate,
    )
