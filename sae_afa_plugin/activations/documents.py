"""Where documents come from: names, folders, files, lists and the library ``datasets``.

What is read is what was named. A path is a path and no pattern; a file that has changed is read
again; and what is written in a stranger's folder chooses no other files.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from huggingface_hub import metadata_load
from torch import Tensor

from sae_afa_plugin._upstream import datasets_cache
from sae_afa_plugin.activations.text import Split, standard_library_texts
from sae_afa_plugin.files import content_files, digest_of_files
from sae_afa_plugin.hub import check_readable, offline

AnyDataset: TypeAlias = "Dataset | DatasetDict | IterableDataset | IterableDatasetDict | Tensor | Sequence[str] | str | Path"

# the embedded model was trained on the second
_EMBEDDED: dict[str, Split] = {"embedded": "heldout", "embedded-train": "train"}
TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "problem")  # as SAELens's ActivationsStore looks for them
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_DESCRIPTIONS = ("README.md", ".huggingface.yaml")  # which datasets reads
_SHUFFLE_BUFFER = 10_000  # documents of a stream that are mixed


def columns_read(names: Collection[str]) -> list[str]:
    """The columns of a dataset that decide which tokens are read; none if it has no such.

    Args:
        names: Of all columns.
    """
    tokens = [column for column in TOKEN_COLUMNS if column in names]
    texts = [column for column in TEXT_COLUMNS if column in names]
    beside = [name for name in names if name == "meta" or (tokens and leaves_out(name))]
    return [*(tokens or texts)[:1], *sorted(beside)] if tokens or texts else []


def leaves_out(column: str) -> bool:
    """Whether a column beside tokens may say of some that they are not to be read.

    Args:
        column: Its name.
    """
    return "mask" in column or column == "position_ids"


def is_embedded(dataset: Any) -> bool:
    """Whether this is text that needs no network, by its name."""
    return str(dataset) in _EMBEDDED


def is_saved_dataset(place: Path) -> bool:
    """Whether this is a folder that ``save_to_disk`` of the library datasets has written."""
    return any((place / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def shown_dataset(dataset: AnyDataset) -> str:
    """What a dataset is called in messages."""
    return repr(str(dataset)) if isinstance(dataset, str | Path) else "that was passed"


def documents_of(
    dataset: AnyDataset, config: str | None, split: str, shuffle_seed: int | None = None
) -> Iterator[Mapping[str, Any]]:
    """The rows of a dataset, with the columns that decide which tokens are read.

    Args:
        dataset: As for :func:`sae_afa_plugin.activations.tokens.sample_tokens`, but no tensor.
        config: Configuration of a dataset on the hub.
        split: The one that is read, of several.
        shuffle_seed: For a random order; None: in theirs.

    Raises:
        ValueError: If the dataset cannot be read, or is nothing that is one.
    """
    name = shown_dataset(dataset)
    if isinstance(dataset, str | Path):
        if not str(dataset).strip():
            raise ValueError("the name of a dataset must not be empty")
        place = Path(dataset)
        if place.is_file() and split != "train":
            raise ValueError(f"the file {name} has only the split 'train': got split={split!r}")
        if place.is_file() and place.suffix not in (".txt", *_READERS):
            raise ValueError(
                f"the file {name} is of no known kind: use .txt or one of {sorted(_READERS)}"
            )
        known = place.exists() or is_embedded(dataset)
        what = "" if known else "neither a local file or folder nor on the hub: it "
        try:
            dataset = _open(str(dataset), config, split)
        except Exception as error:  # of any kind where somebody's files are damaged
            # of folders and files in which datasets finds nothing
            empty = isinstance(error, IndexError | StopIteration)
            told = "nothing is in it" if empty else f"{type(error).__name__}: {error}"
            raise ValueError(
                f"the dataset {name} {'is ' + what if what else ''}cannot be read ({told})"
            ) from error
    if isinstance(dataset, list | tuple):
        kinds = sorted({type(text).__name__ for text in dataset} - {"str"})
        if kinds:
            raise ValueError(f"a list must hold texts: got {', '.join(kinds)}")
        dataset = Dataset.from_dict({"text": list(dataset)})
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        if split not in dataset:
            raise ValueError(
                f"the dataset has no split {split!r}: it has {sorted(map(str, dataset))}"
            )
        dataset = dataset[split]
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            "a dataset must be one of the library datasets, a tensor of tokens, a list of texts, "
            f"a name or a path: got {type(dataset).__name__}"
        )
    dataset = _only_what_is_read(dataset)
    if shuffle_seed is not None and isinstance(dataset, IterableDataset):
        dataset = dataset.shuffle(seed=shuffle_seed, buffer_size=_SHUFFLE_BUFFER)
    elif shuffle_seed is not None:
        dataset = dataset.shuffle(seed=shuffle_seed)  # pyright: ignore[reportCallIssue]
    rows: Any = dataset  # IterableDataset tells type checkers of other kinds of rows
    try:
        yield from rows
    except (OSError, ValueError, DatasetsError) as error:  # a stream is read only now
        raise ValueError(
            f"the dataset {name} cannot be read ({type(error).__name__}: {error})"
        ) from error


def _only_what_is_read(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Without columns that nobody asks for, a broken image among them, as Python's own values."""
    if isinstance(dataset, IterableDataset):
        columns = columns_read(dataset.column_names or [])  # a stream may not know them
        return dataset.select_columns(columns) if columns else dataset
    form: dict[str, Any] = dataset.format
    if form["type"] == "custom":
        return dataset  # its rows come from a function
    shown = dataset.column_names if form["output_all_columns"] else form["columns"]
    return dataset.with_format(None).select_columns(columns_read(shown) or list(shown))


def _open(dataset: str, config: str | None, split: str) -> Dataset | DatasetDict | IterableDataset:
    place = Path(dataset)
    if dataset in _EMBEDDED:
        return Dataset.from_dict({"text": standard_library_texts(_EMBEDDED[dataset])})
    if place.is_file():
        if place.suffix == ".txt":
            return Dataset.from_dict({"text": [place.read_text(encoding="utf-8")]})
        return load_dataset(
            _READERS[place.suffix],
            data_files=glob.escape(dataset),
            split="train",
            cache_dir=_cache_for(place),
        )
    if place.is_dir():
        if is_saved_dataset(place):
            return load_from_disk(dataset)
        _check_folder(place)
        kinds = {file.suffix for file in content_files(place)} & {".txt", *_READERS}
        if ".txt" in kinds and len(kinds) > 1:
            raise ValueError(
                f"it holds files of several kinds ({', '.join(sorted(kinds))}), of which only one "
                "would be read: name a file, or a folder of one kind"
            )
        # each file is a document, as when it is named alone
        whole: Any = {"sample_by": "document"} if kinds == {".txt"} else {}
        return load_dataset(dataset, config, split=split, cache_dir=_cache_for(place), **whole)
    if offline():  # a stream has no cache
        return load_dataset(dataset, config, split=split)
    check_readable(dataset, "dataset")
    return load_dataset(dataset, config, split=split, streaming=True)


def _cache_for(place: Path) -> str:
    """Where ``datasets`` keeps what it has read of this content.

    Its own cache goes by times, which copies and archives keep.
    """
    return str(datasets_cache() / "sae-afa-plugin" / digest_of_files(place))


def _check_folder(place: Path) -> None:
    """Refuse a folder in which ``datasets`` would read other files than its own.

    Raises:
        ValueError: If it would.
    """
    if glob.escape(str(place.absolute())) != str(place.absolute()):
        raise ValueError(
            "the library datasets reads *, ?, [ and ] in the path of a folder as a pattern: "
            "rename it, or name one of its files"
        )
    for file in _DESCRIPTIONS:
        for named in _files_named_in(place / file):
            if ".." in Path(named).parts or re.match(r"[/\\~]|\w[\w+.-]*:", named):
                raise ValueError(
                    f"its {file} names {named!r}, which is outside the folder: if you want that, "
                    "name it yourself"
                )


def _files_named_in(description: Path) -> list[str]:
    """Paths and patterns of data files that a description of a dataset gives."""
    if not description.is_file():
        return []
    try:
        if description.suffix == ".md":
            content = metadata_load(description) or {}
        else:
            content = yaml.safe_load(description.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        return []  # datasets says it better
    return list(_named(content))


def _named(value: Any, of_files: bool = False) -> Iterator[str]:
    if isinstance(value, str) and of_files:
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _named(inner, of_files or key in ("data_files", "data_dir"))
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner, of_files)
