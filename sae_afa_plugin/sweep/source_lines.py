"""YAML that knows in which line each of its values stands."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from typing import Any

import yaml

Path = tuple[str | int, ...]


class Mistakes(ValueError):
    """All that is wrong with a document, a line for each."""

    def __init__(self, name: str, lines: list[str]):
        several = "\n  ".join([f"{name} has {len(lines)} mistakes", *lines])
        super().__init__(f"{name}, {lines[0]}" if len(lines) == 1 else several)
        self.lines = lines


class Lines:
    """A document with the line of each value, and what is wrong with it.

    Args:
        text: The YAML.
        name: What the file is called in messages.

    Raises:
        ValueError: If it is no YAML, has a key twice, or is no mapping.

    Example:
        >>> lines = Lines("hooks: [a]\\nseeds: 3\\n", "x.yaml")
        >>> lines.content, lines.of(("seeds",))
        ({'hooks': ['a'], 'seeds': 3}, 2)
    """

    def __init__(self, text: str, name: str):
        self.name = name
        self._lines: dict[Path, int] = {}
        self.problems: list[tuple[int, str]] = []
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            if (
                node is not None
                and sum(1 for _ in islice(_nodes(node, frozenset()), _MOST)) == _MOST
            ):
                raise ValueError(f"{name} has {_MOST:,} values or more")
            self.content: Any = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = "" if mark is None else f", line {mark.line + 1}"
            problem = getattr(error, "problem", None) or type(error).__name__
            raise ValueError(f"{name}{where}: it is no YAML ({problem})") from error
        if not isinstance(self.content, dict):
            raise ValueError(f"{name}: it must hold a mapping, like 'hooks: [...]'")
        assert node is not None
        self._mark(node, ())
        self.check()

    def _mark(self, node: yaml.Node, path: Path) -> None:
        self._lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            seen: set[Any] = set()
            for key, value in node.value:
                if key.value in seen:
                    self.say((*path, key.value), "is there twice", key.start_mark.line + 1)
                seen.add(key.value)
                self._mark(value, (*path, key.value))
                # the line of the key, where the value begins in another
                self._lines[(*path, key.value)] = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                self._mark(value, (*path, number))

    def of(self, path: Path) -> int:
        """The line of a value, or of the nearest one around it.

        Args:
            path: Keys and numbers that lead to it.
        """
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def say(self, path: Path, problem: str, line: int | None = None) -> None:
        """Note that something is wrong; :meth:`check` raises all of it.

        Args:
            path: Where.
            problem: What, as the end of a sentence.
            line: In which line, where that is not the value's.
        """
        what = f"{_shown(path)}: {problem}" if path else problem
        self.problems.append((self.of(path) if line is None else line, what))

    def unknown(self, path: Path, key: Any, known: Iterator[str] | list[str]) -> None:
        """Note that there is no such key or word, with those that come near.

        Args:
            path: Where.
            key: What was found.
            known: What there is.
        """
        known = sorted(known)
        near = get_close_matches(str(key), known, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
        self.say(path, f"there is no {key!r}: {hint}")

    def check(self) -> None:
        """Raise what is wrong, all at once.

        Raises:
            Mistakes: If something is.
        """
        if self.problems:
            found = [f"line {line}: {what}" for line, what in sorted(set(self.problems))]
            raise Mistakes(self.name, found)


_MOST = 100_000  # values, aliases followed


def _nodes(node: yaml.Node, around: frozenset[int]) -> Iterator[yaml.Node]:
    """All nodes as often as they stand for a value; an alias of what it is in has no end."""
    yield node
    if isinstance(node, yaml.CollectionNode):
        if id(node) in around:
            raise RecursionError
        inner = around | {id(node)}
        for part in node.value:
            for value in part if isinstance(part, tuple) else (part,):
                yield from _nodes(value, inner)


def _shown(path: Path) -> str:
    """A path as people write it: ``saes[2].k``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
