"""Files that are complete or not there, whatever happens; and what tells contents apart."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor, nn
from xxhash import xxh3_128

PARTIAL = ".partial"  # how hidden names end of what is not complete
LOCK = ".lock"  # how names end that say who is at work


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


def cache_folder() -> Path:
    """Where this package keeps what takes long to make: below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae-afa-plugin"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is complete or not there, whatever happens.

    Args:
        path: The file.
        write: Writes to the path that it is given, beside which it may leave what it likes.

    Raises:
        NotWrittenError: If that fails.
    """
    with aside_of(path) as aside:
        aside.mkdir()
        write(aside / path.name)
        with (aside / path.name).open("rb+") as file:
            os.fsync(file.fileno())
        (aside / path.name).replace(path)


OURS = "sae-afa-plugin"  # stands in each figure and page that is written


def check_ours(path: Path) -> None:
    """Make sure that a figure or page takes nobody's place.

    Args:
        path: Where it is to be written.

    Raises:
        ValueError: If there is a file that this package has not written.
    """
    if path.is_file() and not path.is_symlink() and OURS.encode() not in path.read_bytes():
        raise ValueError(
            f"{str(path)!r} was not written by sae-afa: choose another place, or move it away"
        )


@contextmanager
def aside_of(path: Path) -> Generator[Path]:
    """Where something is written before it takes its place; what is left there is removed.

    Args:
        path: The file or folder that it becomes.

    Raises:
        NotWrittenError: If something fails.
    """
    try:
        with writing(path):
            clear_aside(path)
            yield _aside(path)
    finally:
        clear_aside(path)


def clear_aside(path: Path) -> None:
    """Remove what a kill has left of something that was written aside.

    Args:
        path: The file or folder that it would have become.
    """
    shutil.rmtree(_aside(path), ignore_errors=True)
    with suppress(OSError):
        _aside(path).unlink(missing_ok=True)


def clear_asides(folder: Path, beginning: str = "") -> None:
    """The same for all that would have become something of a folder.

    Args:
        folder: Where.
        beginning: Only what would have had a name that begins so.
    """
    for left in folder.glob(f".{beginning}*{PARTIAL}"):
        clear_aside(left.with_name(left.name.removeprefix(".").removesuffix(PARTIAL)))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}")


class NotWrittenError(OSError):
    """A file could not be written: the disk is full, say, or the folder is not ours."""


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Let what fails in writing be said in one sentence, with the folder and what to do.

    Args:
        path: The file or folder that people know.

    Raises:
        NotWrittenError: If something fails.
    """
    try:
        yield
    except Timeout:
        raise  # a lock that another process holds
    # of files and Arrow; of safetensors; of torch.save
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, NotWrittenError):  # of a part of it: the whole is what people know
            error = error.__cause__ or error
        number = _number_of(path, error)
        reason = os.strerror(number) if number else " ".join(str(error).split())
        raise NotWrittenError(
            f"{path.name} could not be written in {str(path.parent)!r} ({reason}): nothing that "
            f"was finished is lost, {_WHAT_TO_DO.get(number, 'mend this')} and run the same again"
        ) from error


_ROOM, _WRITABLE = "make room on that disk", "make that folder writable"
_WHAT_TO_DO = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.ENOENT: "make that folder",
}
_NO_ROOM = 1 << 20  # bytes


def _number_of(path: Path, error: BaseException) -> int:
    """The system's number of an error, 0 if there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    # of safetensors, by its versions
    if found := re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error)):
        return int(found[1] or found[2])
    with suppress(OSError):
        # torch.save says at which byte it could not go on, and not why
        if not isinstance(error, OSError) and shutil.disk_usage(path.parent).free < _NO_ROOM:
            return errno.ENOSPC
    return 0


@contextmanager
def claimed(folder: Path, what: str) -> Generator[None]:
    """Keep other processes from doing the same in a folder; a kill frees it.

    Args:
        folder: Made if it does not exist.
        what: Is done there: training, say.

    Raises:
        ValueError: If another process does.
        NotWrittenError: If nothing can be written there.
    """
    path = folder / f".{what}{LOCK}"
    lock = FileLock(path)
    try:
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another process is {what} in {str(folder)!r}: wait until it has finished, or use "
            "another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def content_files(folder: Path) -> list[Path]:
    """The files below a folder, in order, but for hidden ones and locks, which are no content."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file.suffix != LOCK
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def add_file(digest: Any, path: Path) -> None:
    """Let a file's content count in a digest of ``hashlib``."""
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)


def digest_of_files(place: Path) -> str:
    """A digest of a file's content, or of all files below a folder with their names.

    Args:
        place: The file or folder.
    """
    digest = hashlib.sha256()
    for file in content_files(place) if place.is_dir() else [place]:
        name = file.relative_to(place).as_posix() if place.is_dir() else place.suffix
        digest.update(f"{name} {file.stat().st_size}\n".encode())
        add_file(digest, file)
    return digest.hexdigest()[:16]


def add_tensor(digest: Any, tensor: Tensor) -> None:
    """Let a tensor's values count in a digest of ``hashlib``, bit for bit, in any dtype."""
    values = tensor.detach().cpu().contiguous().view(-1)
    digest.update(values.view(torch.uint8).numpy().data)


def digest_of_table(table: pd.DataFrame) -> str:
    """A digest of a table's columns, by value.

    Args:
        table: The table.
    """
    digest = xxh3_128()
    for name, column in table.items():
        digest.update(f"{name}\n".encode())
        if column.dtype.kind in "iu":
            digest.update(np.ascontiguousarray(column.to_numpy(dtype="int64")).data)
        else:
            digest.update("\0".join(column.astype(str)).encode())
    return digest.hexdigest()


def digest_of_module(module: nn.Module) -> str:
    """A digest of what decides the outputs of a module, as far as it is not in its code.

    Weights and buffers, and of each part its class, its numbers, words and functions: an
    activation function, a scale. Neither its device nor whether it is in training counts.

    Args:
        module: The module.

    Example:
        >>> first, second = nn.GELU(), nn.GELU(approximate="tanh")
        >>> digest_of_module(first) == digest_of_module(nn.GELU())
        True
        >>> digest_of_module(first) == digest_of_module(second)
        False
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        digest.update(f"{name} {_called(type(part))}\n".encode())
        for attribute, value in sorted(vars(part).items()):
            if attribute.startswith("_") or attribute in ("training", "device"):
                continue
            if isinstance(value, bool | int | float | str):
                digest.update(f"{attribute} {value!r}\n".encode())
            elif callable(value) and not isinstance(value, nn.Module):
                digest.update(f"{attribute} {_called(value)}\n".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        add_tensor(digest, tensor)
    return digest.hexdigest()[:16]


def _called(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"


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
