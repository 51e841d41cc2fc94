"""Tasks with labels: prompts of which is known what they say, and the same with one thing changed.

A task is what a supervised dictionary is made of (:mod:`sae_afa_plugin.groups.supervised`): at one
position of each prompt the activation has to carry some attributes (the number of a noun, say), of
which one decides the next token.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_afa_plugin import limits
from sae_afa_plugin.activations.base import Site
from sae_afa_plugin.activations.hooks import device_of, known_state
from sae_afa_plugin.files import add_tensor


class Edit(NamedTuple):
    """What the prompts of a task become when one attribute takes another value, all else equal.

    Args:
        tokens: The changed prompts, int64 ``[n, n_ctx]``.
        values: The new value of each.
        answers: The token that is right then, int64 ``[n]``.
    """

    tokens: Tensor
    values: Sequence[str]
    answers: Tensor


@dataclass(frozen=True, eq=False)
class LabelledTask:
    """Prompts with labels, and with an answer that follows from them.

    Args:
        tokens: Prompts of one length, int64 ``[n, n_ctx]``. Each should be there once: half of
            them are held out. What follows the last token is the answer.
        answers: The right next token, int64 ``[n]``.
        attributes: By name, the value in each prompt.
        edits: By attribute, the same prompts with another value of it. Those without an edit are
            described, but not controlled.
        position: Where the activation is read and replaced, counted as in a list.

    Raises:
        ValueError: If lengths do not fit, an attribute never changes, or an edit is of no
            attribute or leaves a value or an answer as it was.
    """

    tokens: Tensor
    answers: Tensor
    attributes: Mapping[str, Sequence[str]]
    edits: Mapping[str, Edit]
    position: int = -1

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or len(self.tokens) < 4:
            raise ValueError(
                "tokens must be [n, n_ctx] with 4 prompts or more: got shape "
                f"{tuple(self.tokens.shape)}"
            )
        n, n_ctx = self.tokens.shape
        if not self.edits:
            raise ValueError("edits must have an attribute: without one nothing can be controlled")
        if not -n_ctx <= self.position < n_ctx:
            raise ValueError(f"position must be in prompts of {n_ctx}: got {self.position}")
        lengths = {"answers": len(self.answers)}
        lengths |= {name: len(values) for name, values in self.attributes.items()}
        for name, edit in self.edits.items():
            lengths[f"the edit's values ({name})"] = len(edit.values)
            lengths[f"the edit's answers ({name})"] = len(edit.answers)
        for name, length in lengths.items():
            if length != n:
                raise ValueError(
                    f"{name} must have one entry for each of {n} prompts: got {length}"
                )
        for name in self.attributes:
            if len(self.values(name)) < 2:
                raise ValueError(f"the attribute {name!r} has the same value in every prompt")
        for name, edit in self.edits.items():
            if name not in self.attributes:
                raise ValueError(
                    f"there is an edit of {name!r}, but the attributes are {sorted(self.attributes)}"
                )
            if edit.tokens.shape != self.tokens.shape:
                raise ValueError(
                    f"the edit of {name!r} must have prompts of shape {n, n_ctx}: got "
                    f"{tuple(edit.tokens.shape)}"
                )
            if unknown := set(edit.values) - set(self.attributes[name]):
                raise ValueError(
                    f"the edit of {name!r} has values that no prompt has: {sorted(unknown)}"
                )
            same = (a == b for a, b in zip(self.attributes[name], edit.values, strict=True))
            if any(same) or bool((edit.answers == self.answers).any()):
                raise ValueError(f"the edit of {name!r} must change its value and the answer")

    def values(self, attribute: str) -> list[str]:
        """The values that an attribute has, in the order of the alphabet."""
        return sorted(set(self.attributes[attribute]))

    @cached_property
    def identity(self) -> str:
        """A short digest of everything in it."""
        digest = hashlib.sha256(repr((self.position, dict(self.attributes))).encode())
        for tensor in (self.tokens, self.answers):
            add_tensor(digest, tensor)
        for name, edit in self.edits.items():
            digest.update(repr((name, list(edit.values))).encode())
            add_tensor(digest, edit.tokens)
            add_tensor(digest, edit.answers)
        return digest.hexdigest()[:16]

    def run(
        self,
        model: Any,
        site: Site,
        tokens: Tensor,
        wanted: Tensor,
        x: Tensor | None = None,
        batch_size: int = 32,
    ) -> tuple[Tensor, Tensor]:
        """Run the language model on prompts of the task.

        Args:
            model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.
            site: Where to read.
            tokens: Prompts, int64 ``[m, n_ctx]``.
            wanted: Tokens whose logits are asked for, int64 ``[m, k]``.
            x: What to put in the activation's place, ``[m, d]``; None: nothing.
            batch_size: Prompts in one pass.

        Returns:
            The activations at the task's position ``[m, d]``, as they were, heads flattened; and
            the logits behind the last token ``[m, k]``, in float32.
        """
        seen: list[Tensor] = []
        logits: list[Tensor] = []
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)

            def at_hook(acts: Tensor, hook: Any, rows: slice = rows) -> Tensor:
                del hook
                acts = acts.clone()
                here = acts[:, self.position]
                here = here if site.head is None else here[:, site.head]
                seen.append(here.flatten(1).clone())
                if x is not None:
                    here.copy_(x[rows].view_as(here))
                return acts

            with known_state(model):
                out: Tensor = model.run_with_hooks(
                    tokens[rows].to(device_of(model)), fwd_hooks=[(site.hook, at_hook)]
                )
            logits.append(out[:, -1].float().gather(1, wanted[rows].to(out.device)).cpu())
        return torch.cat(seen), torch.cat(logits)


def write_task(
    model: Any,
    write: Callable[..., tuple[str, str]],
    values: Mapping[str, Sequence[str]],
    edits: Sequence[str],
    *,
    allowed: Callable[..., bool] = lambda **values: True,
    n_prompts: int = 256,
    seed: int = 0,
    position: int = -1,
    prepend_bos: bool = True,
) -> LabelledTask:
    """A task from a template: some of all combinations of values, each once, drawn by the seed.

    Args:
        model: The language model, of which only the tokenizer is used.
        write: From a value for each attribute (as keyword arguments) to a prompt and its answer,
            with the space before it where the tokenizer wants one.
        values: Of each attribute.
        edits: The attributes that are changed; each change has to change the answer.
        allowed: Whether a combination makes sense.
        n_prompts: How many; fewer where there are fewer combinations.
        seed: Which of them, and what their edits change to.
        position: Where activations are read, counted as in a list.
        prepend_bos: Whether prompts begin with BOS, where the tokenizer has one.

    Raises:
        ValueError: If prompts differ in length, an answer is not one token, or as for
            :class:`LabelledTask`.

    Example:
        >>> from sae_afa_plugin.activations.embedded import load_embedded_model
        >>> task = write_task(
        ...     load_embedded_model(),
        ...     lambda bracket, name: (f">>> {bracket[0]}{name}", bracket[1]),
        ...     {"bracket": ["()", "[]"], "name": ["a", "b", "x"]},
        ...     edits=["bracket"],
        ... )
        >>> task.tokens.shape, sorted(set(task.attributes["bracket"]))
        (torch.Size([6, 4]), ['()', '[]'])
    """
    limits.whole(SimpleNamespace(n_prompts=n_prompts, seed=seed), "n_prompts", "seed")
    rng = random.Random(seed)
    combinations = [dict(zip(values, found, strict=True)) for found in product(*values.values())]
    chosen = [one for one in combinations if allowed(**one)]
    rng.shuffle(chosen)
    del chosen[n_prompts:]

    def changed(one: Mapping[str, str], name: str) -> dict[str, str]:
        others = [{**one, name: value} for value in values[name] if value != one[name]]
        return rng.choice([other for other in others if allowed(**other)])

    def written(prompts: Sequence[Mapping[str, str]]) -> tuple[Tensor, Tensor]:
        texts, answers = zip(*(write(**one) for one in prompts), strict=True)
        rows = [token_ids(model, text) for text in texts]
        short, long = min(rows, key=len), max(rows, key=len)
        if len(short) != len(long):
            raise ValueError(
                f"prompts must have equally many tokens: {texts[rows.index(short)]!r} has "
                f"{len(short)}, {texts[rows.index(long)]!r} has {len(long)}"
            )
        ids = [token_ids(model, answer) for answer in answers]
        for answer, found in zip(answers, ids, strict=True):
            if len(found) != 1:
                raise ValueError(f"an answer must be one token: {answer!r} is {len(found)}")
        bos = model.tokenizer.bos_token_id
        lead = [bos] if prepend_bos and bos is not None else []
        return torch.tensor([lead + row for row in rows]), torch.tensor(ids)[:, 0]

    tokens, answers = written(chosen)
    edited = {name: [changed(one, name) for one in chosen] for name in edits}
    return LabelledTask(
        tokens,
        answers,
        {name: [one[name] for one in chosen] for name in values},
        {
            name: Edit(after[0], [one[name] for one in ones], after[1])
            for name, ones in edited.items()
            for after in [written(ones)]
        },
        position,
    )


def token_ids(model: Any, text: str) -> list[int]:
    """The tokens of a text, without special ones."""
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]
