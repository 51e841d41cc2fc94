"""Tasks that small language models can do: agreement, brackets, and the indirect object.

How well which model does them is in docs/supervised.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from sae_afa_plugin.activations.tasks import LabelledTask, token_ids, write_task

_NOUNS = (
    "argument attribute value parameter name option exception byte operation example header node "
    "user implementation container unit date integer key book cat dog boy girl car letter door "
    "house picture report author"
)
_OPENINGS = ("If the", "When the", "Here the", "Then the", "While the", "Since the", "Because the")
_BRACKETS = {"round": "()", "square": "[]", "curly": "{}"}
_LETTERS = "a b c d f k n p s t x y z"
_PEOPLE = (
    "Mary John Tom James Anna Paul Sarah Peter David Emily Alice Robert Susan Mark Laura George"
)
_PLACES = "store park school garden station library"
_THINGS = "drink book ring letter ball key"


def agreement_task(model: Any, n_prompts: int = 256, seed: int = 0) -> LabelledTask:
    """``If the options`` is followed by ``are``, not by ``is``; read at the noun's last token.

    Args:
        model: The language model; only its tokenizer is used.
        n_prompts: At most so many.
        seed: Which combinations of number, noun and opening.
    """
    aligned = _aligned(model, ([f" {noun}", f" {noun}s"] for noun in _NOUNS.split()))
    nouns = {singular: plural for singular, plural in aligned}  # noqa: C416  # for pyright
    openings = [opening for (opening,) in _aligned(model, ([one] for one in _OPENINGS))]

    def write(number: str, noun: str, opening: str) -> tuple[str, str]:
        singular = number == "singular"
        return opening + (noun if singular else nouns[noun]), " is" if singular else " are"

    values = {"number": ["singular", "plural"], "noun": [*nouns], "opening": openings}
    return write_task(model, write, values, ["number"], n_prompts=n_prompts, seed=seed)


def bracket_task(model: Any, n_prompts: int = 256, seed: int = 0) -> LabelledTask:
    """``x = [a, b`` is closed by ``]``, for three kinds of brackets; read at the last token.

    Args:
        model: The language model; only its tokenizer is used.
        n_prompts: At most so many.
        seed: Which combinations of bracket, names inside and name before.
    """

    def write(bracket: str, name: str, first: str, second: str) -> tuple[str, str]:
        opening, closing = _BRACKETS[bracket]
        return f"\n    {name} = {opening}{first}, {second}", closing

    letters = _LETTERS.split()
    values = {"bracket": [*_BRACKETS], **dict.fromkeys(("name", "first", "second"), letters)}
    return write_task(model, write, values, ["bracket"], n_prompts=n_prompts, seed=seed)


def ioi_task(model: Any, n_prompts: int = 256, seed: int = 0, n_names: int = 6) -> LabelledTask:
    """Indirect object identification (arXiv 2211.00593), read at the last token.

    ``When Mary and John went to the store, John gave a drink to`` is followed by ``Mary``. It is
    the task of the paper on supervised dictionaries, with GPT-2 small.

    Args:
        model: The language model; only its tokenizer is used.
        n_prompts: At most so many.
        seed: Which combinations of names, their order, place and thing.
        n_names: How many names there are; each needs enough prompts for a mean.
    """
    people = [name for name in _PEOPLE.split() if len(token_ids(model, f" {name}")) == 1]

    def write(io: str, subject: str, order: str, place: str, thing: str) -> tuple[str, str]:
        one, other = (io, subject) if order == "io first" else (subject, io)
        return (
            f"When {one} and {other} went to the {place}, {subject} gave a {thing} to",
            f" {io}",
        )

    values = {
        **dict.fromkeys(("io", "subject"), people[:n_names]),
        "order": ["io first", "subject first"],
        "place": _PLACES.split(),
        "thing": _THINGS.split(),
    }

    def allowed(io: str, subject: str, **others: str) -> bool:
        return io != subject

    return write_task(
        model,
        write,
        values,
        ["io"],
        allowed=allowed,
        n_prompts=n_prompts,
        seed=seed,
    )


def _aligned(model: Any, rows: Iterable[list[str]]) -> list[list[str]]:
    """Those rows whose texts all have one number of tokens, that which most of them have."""
    lengths = [(row, {len(token_ids(model, text)) for text in row}) for row in rows]
    even = [(row, found.pop()) for row, found in lengths if len(found) == 1]
    common = Counter(length for _, length in even).most_common(1)
    return [row for row, length in even if length == common[0][0]]
