"""The text of each token, so that texts put in a row read as the tokenizer reads their tokens.

A token alone does not say what it stands for: SentencePiece drops the space of a first token,
WordPiece marks what goes on a word, and where a tokenizer works on bytes one character can be
several tokens. So tokens are decoded beside those before them, as text is streamed from a language
model, and what a token adds is its text. A character of several tokens is the text of the one that
completes it; the others add nothing and have an empty text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

Decode = Callable[[list[int]], Any]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how decoders show bytes that are no character yet
_SHOWN_EMPTY = "⟨…⟩"
_MOST_KNOWN = 1 << 18  # decoded again beyond that, lest a long recording fill the memory


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token of a sequence adds to its text.

    Args:
        tokenizer: Anything with ``decode``.
        ids: Of a whole sequence.

    Returns:
        One text for each token. In a row they are what the tokenizer makes of the whole sequence,
        with special tokens by their names.

    Example:
        >>> from sae_afa_plugin.activations.embedded import load_embedded_model
        >>> tokenizer = load_embedded_model().tokenizer
        >>> token_texts(tokenizer, tokenizer("a café")["input_ids"])
        ['<|endoftext|>', 'a', ' c', 'a', 'f', '', 'é']
    """
    return TokenTexts(tokenizer)(ids)


def shown_text(text: str) -> str:
    """How the text of one token is shown, so that it can be seen where it is empty, too.

    Example:
        >>> shown_text(" the"), shown_text("")
        (' the', '⟨…⟩')
    """
    return text or _SHOWN_EMPTY


class TokenTexts:
    """:func:`token_texts` of many sequences; what is met again is not decoded again.

    Args:
        tokenizer: Anything with ``decode``.
    """

    def __init__(self, tokenizer: Any):
        self._decode: Decode = tokenizer.decode
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            self._decode = partial(
                tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, ids: Sequence[int]) -> list[str]:
        ids = [int(i) for i in ids]
        whole = self._decode(ids)
        found = self._by_groups(ids)
        if "".join(found) == whole:
            return found
        # what comes later changes what came before: bytes of SentencePiece that are no character
        # after all, say
        return _shares([self._decode(ids[:end]) for end in range(1, len(ids))], whole, 0)

    def _by_groups(self, ids: Sequence[int]) -> list[str]:
        """Token by token, each beside the last group of tokens that made whole characters."""
        found: list[str] = []
        last = start = 0  # where the last group and the one that is open begin
        before, pending = "", list[str]()
        for end in range(1, len(ids) + 1):
            now = self._of_few(tuple(ids[last:end]))
            open_ = now.endswith(_UNFINISHED) or len(now) <= len(before)
            if open_ and end < len(ids):
                pending.append(now)
                continue
            found += _shares(pending, now, len(before))
            last, start, pending = start, end, []
            before = self._of_few(tuple(ids[last:end]))
        return found

    def _of_few(self, ids: tuple[int, ...]) -> str:
        text = self._known.get(ids)
        if text is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            text = self._known[ids] = self._decode(list(ids))
        return text


def _shares(growing: Sequence[str], whole: str, begin: int) -> list[str]:
    """What each of some tokens adds, and the one that completes the text.

    Args:
        growing: The text after each of the tokens but the last.
        whole: The text after the last.
        begin: Where the text of the first token begins.
    """
    ends = [begin]
    for text in growing:
        # what comes after may have changed it: so much of it has stayed
        pairs = enumerate(zip(text, whole, strict=False))
        stayed = next((n for n, (old, new) in pairs if old != new), min(len(text), len(whole)))
        ends.append(max(ends[-1], stayed))
    ends.append(len(whole))
    return [whole[first:end] for first, end in pairwise(ends)]
