"""Options that are declared once: as fields of a dataclass, explained by its docstring.

From that come the flags of a command with their help, the options that a command line gives, and
the command line that gives these options again.

A field is ``--its-name``; ``field(metadata=flag("--other", ...))`` says otherwise. Booleans are
``--name`` and ``--no-name``. A field without a flag of its own in the command line keeps its
default.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from docstring_parser import parse as parse_docstring

_METADATA = "sae_afa_flag"


def flag(
    name: str | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    write: Callable[[Any], str] = str,
    choices: list[str] | None = None,
    hidden: bool = False,
) -> dict[str, Any]:
    """How a field appears on the command line, for ``field(metadata=...)``.

    Args:
        name: The flag; None: from the field's name.
        metavar: What its value is called in the help.
        parse: Makes the value from text; None: by the field's type.
        write: Makes text from the value, so that ``parse(write(value)) == value``.
        choices: The only values that are allowed.
        hidden: There is no flag.
    """
    return {
        _METADATA: {
            "name": name,
            "metavar": metavar,
            "parse": parse,
            "write": write,
            "choices": choices,
            "hidden": hidden,
        }
    }


class _Option:
    """One field as a flag."""

    def __init__(self, of: Field[Any], kind: Any, meaning: str):
        about = {**flag()[_METADATA], **of.metadata.get(_METADATA, {})}
        self.field, self.meaning, self.hidden = of, meaning, about["hidden"]
        self.name = about["name"] or "--" + of.name.replace("_", "-")
        self.metavar, self.choices, self.write = about["metavar"], about["choices"], about["write"]
        kinds = set(getattr(kind, "__args__", (kind,))) - {type(None)}
        self.boolean = kinds == {bool} and about["parse"] is None
        self.parse = about["parse"] or (next(iter(kinds)) if len(kinds) == 1 else str)

    @property
    def default(self) -> Any:
        return None if self.field.default is MISSING else self.field.default

    @property
    def no(self) -> str:
        """The flag that says no."""
        return "--no-" + self.name.removeprefix("--")

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        if self.hidden:
            return
        common: dict[str, Any] = {
            "dest": self.field.name,
            "default": argparse.SUPPRESS,
            "help": self.help,
        }
        if self.boolean:
            parser.add_argument(self.name, action=argparse.BooleanOptionalAction, **common)
        else:
            parser.add_argument(
                self.name, type=self.parse, metavar=self.metavar, choices=self.choices, **common
            )

    @property
    def help(self) -> str:
        text = " ".join(self.meaning.replace("``", "").split()).replace("%", "%%").rstrip(".")
        if self.boolean:
            shown = None if self.default is None else "yes" if self.default else "no"
        else:
            shown = None if self.default is None else self.write(self.default)
        return text if shown is None else f"{text} (default: {shown})".replace("%", "%%")

    def arguments(self, value: Any) -> list[str]:
        if self.boolean:
            return [self.name if value else self.no]
        # with "=", a value may begin with a dash
        return [f"{self.name}={self.write(value)}"]


def options_of(cls: type[Any]) -> list[_Option]:
    """The options that a dataclass declares.

    Args:
        cls: A dataclass with Google-style ``Args`` in its docstring.
    """
    found = parse_docstring(inspect.getdoc(cls) or "").params
    meanings = {param.arg_name: param.description or "" for param in found}
    hints = get_type_hints(cls)
    return [_Option(f, hints[f.name], meanings.get(f.name, "")) for f in fields(cls)]


def add_options(parser: argparse._ActionsContainer, *classes: type[Any]) -> None:
    """Add a flag for each option; what is not given is missing from the parsed arguments.

    Args:
        parser: A parser or a group of one.
        classes: Dataclasses.
    """
    for cls in classes:
        for option in options_of(cls):
            option.add_to(parser)


def given_options(args: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """The options of a dataclass that a command line gave.

    Args:
        args: What was parsed.
        cls: The dataclass.
    """
    return {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}


def arguments_for(
    cls: type[Any], values: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> list[str]:
    """The arguments that give these values, as far as they are not there without.

    Args:
        cls: The dataclass.
        values: By field. Fields that are missing keep their value.
        base: What holds without arguments; None: the defaults.

    Example:
        >>> from sae_afa_plugin.activations.tokens import Protocol
        >>> arguments_for(Protocol, {"n_tokens": 1000, "prepend_bos": False})
        ['--tokens=1000', '--no-bos']
    """
    found: list[str] = []
    for option in options_of(cls):
        name = option.field.name
        before = option.default if base is None else base[name]
        if not option.hidden and name in values and values[name] != before:
            if values[name] is None:
                continue  # nothing says "as if it had not been said"
            found += option.arguments(values[name])
    return found
