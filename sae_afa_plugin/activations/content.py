"""What tells the content of one dataset from that of another, however it came about."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_from_disk
from torch import Tensor

from sae_afa_plugin._upstream import dataset_fingerprint
from sae_afa_plugin.activations.documents import (
    AnyDataset,
    columns_read,
    is_embedded,
    is_saved_dataset,
)
from sae_afa_plugin.files import add_tensor, digest_of_files
from sae_afa_plugin.hub import commit_of

_ROWS = 1000  # at a time
_MOST_BYTES = 1 << 31  # of a dataset in memory; a few seconds


def content_of(dataset: AnyDataset, split: str = "train") -> str | None:
    """A digest of what a local or in-memory dataset holds; None for the hub and streams.

    Equal for equal content: neither times nor the way a dataset was made count, nor columns that
    are not read, nor files that ``datasets`` writes beside its own.

    Args:
        dataset: As for :func:`sae_afa_plugin.activations.tokens.sample_tokens`.
        split: The one that is read, of several.
    """
    if isinstance(dataset, Tensor):
        digest = hashlib.sha256(f"tokens {tuple(dataset.shape)}".encode())
        whole = not dataset.is_floating_point() and not dataset.is_complex()
        add_tensor(digest, dataset.long() if whole else dataset)
        return digest.hexdigest()[:16]
    if isinstance(dataset, str | Path):
        if is_embedded(dataset):
            return f"Python {platform.python_version()}"  # whose documentation it is
        place = Path(dataset)
        if not place.exists():
            return None
        if not is_saved_dataset(place):
            return digest_of_files(place)
        try:
            dataset = load_from_disk(str(place))
        except Exception:  # of any kind where files are damaged: said when it is read
            return digest_of_files(place)
    elif isinstance(dataset, list | tuple):
        try:
            dataset = Dataset.from_dict({"text": list(dataset)})
        except (pa.ArrowException, TypeError, ValueError):
            return None  # no texts: said when it is read
    if isinstance(dataset, DatasetDict):
        dataset = dataset.get(split)  # pyright: ignore[reportAssignmentType]
    return _digest_of_rows(dataset) if isinstance(dataset, Dataset) else None


def revision_of(dataset: AnyDataset) -> str | None:
    """The commit of a dataset on the hub; None for others, and where it is not known."""
    if not isinstance(dataset, str | Path) or is_embedded(dataset):
        return None
    return None if Path(dataset).exists() else commit_of(str(dataset), "dataset", file="README.md")


def _digest_of_rows(dataset: Dataset) -> str:
    form: dict[str, Any] = dataset.format
    if form["type"] == "custom" or dataset.data.nbytes > _MOST_BYTES:
        return dataset_fingerprint(dataset)  # rows come from a function, or are too many
    names = dataset.column_names if form["output_all_columns"] else form["columns"]
    columns = columns_read(names) or sorted(names)
    digest = hashlib.sha256(json.dumps([columns, len(dataset)]).encode())
    for rows in dataset.select_columns(columns).with_format("arrow").iter(_ROWS):
        table: Any = rows
        for column in columns:
            _add_column(digest, table[column])
    return digest.hexdigest()[:16]


def _add_column(digest: Any, column: Any) -> None:
    """By value: neither chunks nor the width of numbers and offsets count."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = pa.concat_arrays([chunk.flatten() for chunk in column.chunks] or [pa.array([])])
        if (pa.types.is_integer(inner.type) or pa.types.is_boolean(inner.type)) and (
            inner.null_count == 0
        ):
            lengths = pc.fill_null(pc.list_value_length(column), -1)  # pyright: ignore
            digest.update(lengths.to_numpy().astype(np.int64).tobytes())
            digest.update(inner.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
            return
    digest.update(json.dumps(column.to_pylist(), sort_keys=True, default=str).encode())
