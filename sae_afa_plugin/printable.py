"""Other people's words on a terminal and in a spreadsheet: shown, and never obeyed.

Names and reasons come from files of strangers: SAEs, folders, repositories, results. A terminal
obeys control sequences in them, and a spreadsheet computes cells that begin like a formula.
"""

from __future__ import annotations

import logging
import re
import unicodedata
import warnings
from typing import Any

from typing_extensions import override

# control characters, line and paragraph separators, whatever turns the direction of writing, and
# bytes of file names that are no UTF-8
_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_FORMULA = ("=", "+", "-", "@")
_LONGEST = 600  # characters of a reason


def printable(text: str) -> str:
    r"""A text whose characters all stand for themselves; the others are written as Python would.

    Args:
        text: In one line.

    Example:
        >>> printable("größe \x1b[2J")
        'größe \\x1b[2J'
    """
    return _OBEYED.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def cell(value: Any) -> Any:
    """A value of a table as a spreadsheet is to show it: a text that reads as a formula is quoted.

    Args:
        value: Anything; what is no text is left as it is.

    Example:
        >>> cell('=HYPERLINK("https://example.com")'), cell("layer 4"), cell(-1.5)
        ('\\'=HYPERLINK("https://example.com")', 'layer 4', -1.5)
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    # full-width signs are signs to some of them
    begins = unicodedata.normalize("NFKC", text.lstrip()[:1])
    return f"'{text}" if begins in _FORMULA else text


def shown_name(name: str, most: int = 48) -> str:
    """A name where room is short: its beginning and its end; files and pages have it whole.

    Args:
        name: Of an SAE.
        most: Characters.

    Example:
        >>> shown_name("a" * 100, 9)
        'aaaa…aaaa'
    """
    name = " ".join(name.split())  # a line break would cover the next name
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def short(text: str) -> str:
    """A text in one line that is no longer than people read; files may hold what they like."""
    line = printable(" ".join(text[: 2 * _LONGEST].split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def show_only_printable_messages() -> None:
    """From now on, what other libraries log or warn of in this process is printable as well.

    They quote the files that they read. For commands, whose process is their own.
    """
    written = warnings.formatwarning

    def warning(message: Any, *args: Any, **kwargs: Any) -> str:
        return written(_lines(str(message)), *args, **kwargs)

    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = warning


class _Record(logging.LogRecord):
    @override
    def getMessage(self) -> str:
        return _lines(super().getMessage())


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))
