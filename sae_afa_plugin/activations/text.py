"""English text that every Python carries: the standard library's own documentation.

The embedded language model was trained on it, SAEs are trained and evaluated on it, and
nothing is downloaded or shipped. Two sources are read: the help topics of
``pydoc_data.topics`` and the docstrings of every module of the standard library.

The split is made by top-level module (or topic) name, so that no module is on both sides.
The text differs a little between Python versions; the split rule does not.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
_SHORTEST_DOCSTRING = 20  # characters; shorter ones are "Return x." and the like
_HELD_OUT_ONE_IN = 8
_SHUFFLE_SEED = 0


def docstrings(source: Path) -> list[str]:
    """Every docstring of one Python file: the module's first, then by depth and as they stand.

    Args:
        source: A ``.py`` file. One that does not parse or decode yields nothing.
    """
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return []
    found: list[str] = []
    level: list[ast.AST] = [tree]
    while level:  # by depth, and inside a level as they stand
        for node in level:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= _SHORTEST_DOCSTRING:
                    found.append(text)
        level = [inner for node in level for inner in _statements_in(node)]
    return found


def _statements_in(node: ast.AST) -> Iterator[ast.AST]:
    """What may hold a definition; expressions, nine tenths of a tree, cannot."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        inner = getattr(node, field, ())
        if isinstance(inner, list):
            yield from inner


def python_sources(root: Path) -> Iterator[Path]:
    """The ``.py`` files below ``root`` without tests and installed packages, sorted."""
    for source in sorted(root.rglob("*.py")):
        if not _SKIPPED_FOLDERS.intersection(source.relative_to(root).parts):
            yield source


def is_held_out(name: str) -> bool:
    """Whether the module or topic of this name belongs to the held-out split.

    Example:
        >>> is_held_out("argparse"), is_held_out("json")
        (False, False)
    """
    return zlib.crc32(name.encode()) % _HELD_OUT_ONE_IN == 0


def standard_library_documents(split: Split) -> list[list[str]]:
    """The standard library's documentation, one document per file or help topic.

    Args:
        split: ``"train"`` (about seven eighths) or ``"heldout"``. The embedded language
            model has never seen the held-out modules and topics.

    Returns:
        Documents, each a list of docstrings, shuffled with a fixed seed. About 2.2 million
        characters over both splits.

    Raises:
        RuntimeError: If this Python comes without the sources of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    return [[*document] for document in _documents(root, split == "heldout")]


@cache  # two seconds of parsing, for 2 MB
def _documents(root: Path, wanted: bool) -> tuple[list[str], ...]:
    documents: list[list[str]] = []
    for source in python_sources(root):
        # "asyncio/tasks.py" -> "asyncio", "heapq.py" -> "heapq"
        name = source.relative_to(root).parts[0].removesuffix(".py")
        if name != "pydoc_data" and is_held_out(name) == wanted:
            found = docstrings(source)
            if found:
                documents.append(found)
    for name, topic in sorted(_help_topics().items()):
        if is_held_out(name) == wanted:
            documents.append([topic])
    if not documents:
        raise RuntimeError(
            f"no documentation was found below {root}: this Python comes without the sources "
            "of its standard library; use a regular CPython, or bring a dataset of your own"
        )
    random.Random(_SHUFFLE_SEED).shuffle(documents)
    return tuple(documents)


def _help_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return {}
    return {str(name): str(topic) for name, topic in topics.items()}


def standard_library_texts(split: Split) -> list[str]:
    """The documents of :func:`standard_library_documents`, each joined to one text.

    Example:
        >>> texts = standard_library_texts("heldout")
        >>> all(isinstance(text, str) and text for text in texts)
        True
    """
    return ["\n\n".join(document) for document in standard_library_documents(split)]
