"""Files that are complete or not there, whatever happens; and what tells contents apart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is complete or not there, whatever happens.

    Args:
        path: The file.
        write: Writes to the path that it is given.

    Raises:
        OSError: If that fails, with what to do.
    """
    partial = path.with_name(f".{path.name}.partial")  # what a kill leaves, the next run replaces
    try:
        partial.unlink(missing_ok=True)  # or a link that somebody left there would be followed
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise os_error(path, error) from error
        raise


class NotWrittenError(OSError):
    """A file could not be written: the disk is full, say, or the folder is not ours."""


def os_error(path: Path, error: OSError) -> NotWrittenError:
    """An error of the system, with what to do."""
    return NotWrittenError(
        f"{path.name} could not be written in {str(path.parent)!r} ({error.strerror or error}): "
        "nothing that was finished is lost, mend this and run the same again"
    )


def content_files(folder: Path) -> list[Path]:
    """The files below a folder, in order, but for hidden ones and locks, which are no content."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file.suffix != ".lock"
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def add_file(digest: Any, path: Path) -> None:
    """Let a file's content count in a digest of ``hashlib``."""
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)


def add_tensor(digest: Any, tensor: Tensor) -> None:
    """Let a tensor's values count in a digest of ``hashlib``, bit for bit, in any dtype."""
    values = tensor.detach().cpu().contiguous().view(-1)
    digest.update(values.view(torch.uint8).numpy().data)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, as :func:`write_whole` does."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
