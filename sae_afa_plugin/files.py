"""Files that are complete or not there, whatever happens; and what tells contents apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def user_path(path: str | Path) -> Path:
    """A path as its user means it: a leading ``~`` is the home folder.

    Every function that takes a path from a user begins with this. Libraries differ in what they
    make of ``~``, and some make a folder of that name.

    Raises:
        ValueError: If there is no such home.

    Example:
        >>> user_path("results/a").as_posix(), user_path("~").is_absolute()
        ('results/a', True)
    """
    found = os.path.expanduser(path)  # which leaves what it does not know
    if found.startswith("~"):
        raise ValueError(f"the home folder of {str(path)!r} is not known: write out the path")
    return Path(found)


def user_given(given: Any) -> Any:
    """A path, a name or an object, as :func:`user_path` where it begins with ``~``."""
    if isinstance(given, str | Path) and str(given).startswith("~"):
        return type(given)(user_path(given))
    return given


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


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with a digest of itself, which :func:`read_sealed` compares."""
    content = json.loads(json.dumps(content))  # as it will be read
    write_json(path, {**content, "digest": _digest_of_json(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What :func:`write_sealed` has written, without the digest.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not as it was written.
    """
    content = read_object(path)
    if content.pop("digest", None) != _digest_of_json(content):
        raise ValueError("it is not as it was written: its digest does not fit")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """What a file of JSON holds, which has to be an object.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it has brackets in brackets without an end") from error
    if not isinstance(content, dict):
        raise ValueError(f"it must be an object of JSON, and is a {type(content).__name__}")
    return content


def _digest_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Write JSON, as :func:`write_whole` does."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
