"""An SAE beside the dictionary that labels make: approximation, control, interpretability.

After Makelov, Lange and Nanda, "Towards Principled Evaluations of Sparse Autoencoders for
Interpretability and Control" (arXiv 2405.08366). Everything is measured on prompts that neither
the supervised dictionary nor the choice of features has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import nan
from statistics import fmean
from types import SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor
from typing_extensions import override

from sae_afa_plugin import limits
from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.activations.hooks import device_of
from sae_afa_plugin.activations.tasks import LabelledTask
from sae_afa_plugin.activations.tokens import vocabulary_of
from sae_afa_plugin.groups.base import (
    Accumulator,
    Column,
    GroupResult,
    MetricGroup,
    tokens_at_once,
)
from sae_afa_plugin.spaces import EncodedTokens, LinearCode, SAELensCode

# Of the logit difference: where an activation decides less, shares of it say nothing.
_LEAST_EFFECT = 0.05


def supervised_directions(x: Tensor, labels: Tensor, codes: str = "mean") -> Tensor:
    """The supervised dictionary: x is about its mean and the directions of its labels.

    Args:
        x: Activations ``[n, d]``.
        labels: 1 where a token has a value of an attribute, otherwise 0 ``[n, n_values]``.
        codes: ``"mean"``: the mean of the tokens with a value, less the mean of all; ``"mse"``:
            least squares, of which the smallest, for attributes that depend on each other.

    Returns:
        ``[n_values, d]``, zero for a value that no token has.

    Example:
        >>> x = torch.tensor([[0.0, 2.0], [0.0, 4.0]])
        >>> supervised_directions(x, torch.eye(2))
        tensor([[ 0., -1.],
                [ 0.,  1.]])
    """
    x = x - x.mean(0)
    if codes == "mse":
        return torch.linalg.pinv(labels) @ x
    return _class_means(x, labels)


def exchanged(
    f: Tensor, to: Tensor, W_dec: Tensor, change: Tensor, counts: Sequence[int]
) -> dict[int, Tensor]:
    """What few features add to a reconstruction, chosen to come near a change that is wanted.

    One after the other, the feature is set to its value in ``to`` that brings the sum nearest to
    ``change``; none, where each would lead away from it.

    Args:
        f: Features ``[n, d_sae]``.
        to: What they may be set to ``[n, d_sae]``.
        W_dec: ``[d_sae, d]``.
        change: What is to be added ``[n, d]``.
        counts: After how many features to look.

    Returns:
        What has been added, ``[n, d]``, by count.

    Example:
        >>> f, to = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 1.0]])
        >>> exchanged(f, to, torch.eye(3), torch.tensor([[-2.0, 2.0, 5.0]]), [1, 2])
        {1: tensor([[-2.,  0.,  0.]]), 2: tensor([[-2.,  3.,  0.]])}
    """
    step, squares, left = to - f, W_dec.square().sum(-1), change.clone()
    rows, found = torch.arange(len(f), device=f.device), {}
    for count in range(1, max(counts) + 1):
        gain, feature = (2 * step * (left @ W_dec.T) - step.square() * squares).max(-1)
        here = torch.where(gain > 0, step[rows, feature], 0)
        left = left - here[:, None] * W_dec[feature]
        step[rows, feature] -= here
        if count in counts:
            found[count] = change - left
    return found


def best_f1(active: Tensor, labels: Tensor, fit: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """How well one feature says each value: F1 of "it is active" as a detector.

    Args:
        active: Where features are active, bool ``[n, d_sae]``.
        labels: As for :func:`supervised_directions` ``[n, n_values]``.
        fit: Tokens on which each value's best feature is chosen.
        held: Tokens on which its F1 is taken.

    Returns:
        F1 of the chosen features, and of a detector that always says yes, ``[n_values]``; NaN for
        a value that one of the halves does not have.

    Example:
        >>> active = torch.tensor([[True, False], [True, True]] * 2)
        >>> fit, held = torch.arange(2), torch.arange(2, 4)
        >>> best_f1(active, torch.eye(2).repeat(2, 1), fit, held)
        (tensor([0.6667, 1.0000]), tensor([0.6667, 0.6667]))
    """

    def f1(rows: Tensor) -> Tensor:
        said, true = active[rows].to(labels), labels[rows]
        return 2 * true.T @ said / (true.sum(0)[:, None] + said.sum(0)).clamp(min=1)

    chosen = f1(fit).argmax(-1)
    true = labels[held].sum(0)
    absent = (true == 0) | (labels[fit].sum(0) == 0)
    found = f1(held)[torch.arange(len(chosen), device=chosen.device), chosen]
    return (
        found.masked_fill(absent, torch.nan),
        (2 * true / (true + len(held))).masked_fill(absent, torch.nan),
    )


def _class_means(x: Tensor, labels: Tensor) -> Tensor:
    return labels.T @ x / labels.sum(0).clamp(min=1)[:, None]


class _Prompts(Accumulator):
    def __init__(self, code: SAELensCode, activations: Activations, group: Supervised):
        self._code, self._group, self._task = code, group, group.task
        self._model = activations.model
        self._site = activations.site(code.sae.cfg.metadata.to_dict())

    @override
    def add(self, tokens: EncodedTokens) -> None:
        """The model is run at the end, on the task's own prompts."""

    @override
    def merge(self, other: _Prompts) -> None:
        """All see the same prompts."""

    @override
    @torch.no_grad()
    def finish(self) -> GroupResult:
        task, code = self._task, self._code
        self._x, self._clean = x, clean = self._run(task.tokens)
        if clean.mean() <= 0:
            raise ValueError(
                "the language model does not do the task: it prefers the answers of the edited "
                f"prompts, by {-clean.mean():.2f} logits on average"
            )
        # ground truth: what the same prompt with one thing changed has in this place
        self._patched = {
            name: self._run(task.tokens, self._run(edit.tokens)[0])[1]
            for name, edit in task.edits.items()
        }
        self._values = [(a, value) for a in task.attributes for value in task.values(a)]
        self._labels = self._one_hot(task.attributes)
        tokens, self._scale = code.read(x), code.scale(x)
        self._f = tokens.f
        self._recons = x + self._scale * (tokens.recons + code.b_dec - tokens.z)
        rng = torch.Generator().manual_seed(self._group.seed)
        orders = (torch.randperm(len(x), generator=rng) for _ in range(self._group.n_splits))
        found = pd.DataFrame(self._split(*order.tensor_split(2)) for order in orders)
        summary = {"accuracy": (clean > 0).double().mean().item()}
        for name, mean, std in zip(found, found.mean(), found.std(), strict=True):
            summary |= {str(name): mean, f"{name}_std": std}
        return GroupResult({f"supervised_{name}": value for name, value in summary.items()})

    def _split(self, fit: Tensor, held: Tensor) -> dict[str, float]:
        """Everything, of one half of the prompts, with what is known of the other."""
        directions = supervised_directions(self._x[fit], self._labels[fit], self._group.codes)
        return {
            **self._approximation(fit, held, directions),
            **self._control(fit, held, directions),
            **self._interpretability(fit, held),
        }

    def _approximation(self, fit: Tensor, held: Tensor, directions: Tensor) -> dict[str, float]:
        x, mean = self._x[held], self._x[fit].mean(0)
        ablated = self._taken(held, mean.expand_as(x))
        found: dict[str, float] = {}
        for who, recons in {
            "": self._recons[held],
            "_labels": mean + self._labels[held] @ directions,
        }.items():
            kept = ablated - self._taken(held, recons)
            shares = (self._share(held, "the mean", kept, ablated, n) for n in range(len(kept)))
            found[f"logits{who}"] = fmean(shares)
            unexplained = (x - recons).square().sum() / (x - mean).square().sum()
            found[f"variance{who}"] = 1 - unexplained.item()
        return found

    def _control(self, fit: Tensor, held: Tensor, directions: Tensor) -> dict[str, float]:
        task, counts = self._task, self._group.n_exchanged
        f, scale, found = self._f[held], self._scale[held], {}
        usual = _class_means(self._f[fit], self._labels[fit])
        for n, (name, edit) in enumerate(task.edits.items()):
            after = self._one_hot({**task.attributes, name: edit.values})
            change = (after - self._labels)[held]  # 1 at the new value, -1 at the old one
            wanted, to = change @ directions, usual[change.argmax(-1)]
            few = exchanged(f, to, self._code.W_dec, wanted / scale, counts)
            truth = (self._clean - self._patched[name])[held].mean(0)
            for who, added in {
                "labels": wanted,
                **{str(m): scale * added for m, added in few.items()},
            }.items():
                taken = self._taken(held, self._x[held] + added)
                what = f"the activation of another {name}"
                found[f"{name}_control_{who}"] = self._share(held, what, taken, truth, n)
        for who in ("labels", *counts):
            found[f"control_{who}"] = fmean(found[f"{name}_control_{who}"] for name in task.edits)
        for m in counts:
            found[f"control_ratio_{m}"] = found[f"control_{m}"] / (found["control_labels"] or nan)
        return found

    def _interpretability(self, fit: Tensor, held: Tensor) -> dict[str, float]:
        f1, always = best_f1(self._f != 0, self._labels, fit, held)
        found: dict[str, float] = {}
        floors: list[float] = []
        for name in self._task.attributes:
            of = [n for n, (attribute, _) in enumerate(self._values) if attribute == name]
            found[f"{name}_f1"] = f1[of].nanmean().item()
            floors.append(always[of].nanmean().item())
        return {**found, "f1": fmean(found.values()), "f1_always": fmean(floors)}

    def _run(
        self, tokens: Tensor, x: Tensor | None = None, rows: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Activations ``[m, d]``, and how far the right answer is above each edit's ``[m, n_edits]``."""
        task, model = self._task, self._model
        answers = torch.stack([task.answers, *(edit.answers for edit in task.edits.values())], 1)
        at_once = tokens_at_once(device_of(model), vocabulary_of(model) or 1)
        size = max(1, at_once // tokens.shape[1])
        seen, logits = task.run(model, self._site, tokens[rows], answers[rows], x, size)
        return seen.to(self._code.W_dec), logits[:, :1] - logits[:, 1:]

    def _taken(self, held: Tensor, x: Tensor) -> Tensor:
        """What activations in the place of the prompts' own take away, in logits ``[n_edits]``."""
        return (self._clean[held] - self._run(self._task.tokens, x, held)[1]).mean(0)

    def _share(self, held: Tensor, what: str, part: Tensor, whole: Tensor, n: int) -> float:
        """One difference by another, of which is asked that it is one."""
        clean = self._clean[held][:, n].mean()
        if whole[n] < _LEAST_EFFECT * clean:
            raise ValueError(
                f"{what} at {self._site.hook!r}, position {self._task.position}, takes "
                f"{whole[n]:.2f} of {clean:.2f} logits away: nothing there decides the task, "
                "choose another hook or position"
            )
        return (part[n] / whole[n]).item()

    def _one_hot(self, attributes: Mapping[str, Sequence[str]]) -> Tensor:
        """1 where a prompt has a value, ``[n, n_values]``."""
        columns = [
            [float(has == value) for has in attributes[name]] for name, value in self._values
        ]
        return torch.tensor(columns).T.to(self._x)


@dataclass(frozen=True)
class Supervised(MetricGroup):
    """How near an SAE comes to a dictionary that was made of labels, on a task.

    Activations are read at one position of prompts whose attributes are known. On half of them the
    supervised dictionary is made (:func:`supervised_directions`) and features are chosen, on the
    other half all is measured; the summary has the mean of several splits and, as ``..._std``,
    their standard deviation.

    - *Approximation.* ``supervised_logits``: the reconstruction in the activation's place, what is
      kept of the difference between the logits of the right answer and of the edit's: 0 is the
      mean activation, 1 the activation itself. ``supervised_variance``: explained variance of the
      activation. With ``_labels``, of the supervised dictionary.
    - *Control.* ``supervised_control_4``: one attribute is edited by exchanging at most 4 features
      (:func:`exchanged`), which may take the values that they have, on average, where the
      attribute has its new value, and are chosen to do what the supervised edit does. Of what the
      activation of a really edited prompt does to the logit difference, this is the share.
      ``supervised_control_labels``: of the supervised edit, the direction of the new value less
      that of the old one. ``supervised_control_ratio_4``: one by the other.
    - *Interpretability.* ``supervised_f1``: F1 of "it is active" as a detector of a value, of the
      value's best feature; mean over the values of an attribute, then over attributes. The
      supervised dictionary has 1 by construction, and a feature that is always active has
      ``supervised_f1_always``.

    Also by attribute: ``supervised_NAME_control_4``, ``supervised_NAME_f1``; and
    ``supervised_accuracy``, of the language model.

    Args:
        task: The prompts.
        codes: How directions are made, see :func:`supervised_directions`.
        n_exchanged: Numbers of features that an edit may exchange.
        n_splits: Into halves, at random.
        seed: For these.

    Example:
        >>> from sae_afa_plugin.activations.embedded import load_embedded_model
        >>> from sae_afa_plugin.activations.known_tasks import agreement_task
        >>> group = Supervised(agreement_task(load_embedded_model(), n_prompts=40), n_splits=2)
        >>> group.settings["n_exchanged"], group.settings["n_splits"]
        ((1, 2, 4, 8), 2)
    """

    task: LabelledTask
    codes: str = "mean"
    n_exchanged: tuple[int, ...] = (1, 2, 4, 8)
    n_splits: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        limits.kind(self, "task", LabelledTask)
        limits.choice(self, "codes", ("mean", "mse"))
        limits.whole(self, "n_splits", at_least=2)
        limits.whole(self, "seed")
        object.__setattr__(self, "n_exchanged", tuple(self.n_exchanged))
        for count in self.n_exchanged:
            limits.whole(SimpleNamespace(n_exchanged=count), "n_exchanged", at_least=1)
        if not self.n_exchanged:
            raise ValueError("n_exchanged must have a number of features: got none")

    name: ClassVar[str] = "supervised"
    reads_tokens: ClassVar[bool] = False
    needs_model: ClassVar[bool] = True
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "supervised_logits",
            "task\nlogits",
            "Share of a task's logit difference that is kept when the SAE's output stands in at "
            "one position; 0: the mean activation.",
            "{:.3f}".format,
            70,
            30,
        ),
        Column(
            "supervised_logits_labels",
            "by\nlabels",
            "The same of the supervised dictionary.",
            "{:.3f}".format,
            71,
            29,
        ),
        Column(
            "supervised_control_4",
            "control\n(4 fea-\ntures)",
            "What exchanging at most 4 features does to the task's logit difference, as a share of "
            "what the activation of an edited prompt does.",
            "{:.3f}".format,
            72,
            30,
        ),
        Column(
            "supervised_control_labels",
            "by\nlabels",
            "The same of the supervised edit.",
            "{:.3f}".format,
            73,
            29,
        ),
        Column(
            "supervised_f1",
            "F1 of\nfeatures",
            "How well the best single feature says a label, mean over labels; labels: 1.",
            "{:.3f}".format,
            74,
            30,
        ),
        Column(
            "supervised_f1_always",
            "always\nactive",
            "The same of a feature that is always active.",
            "{:.3f}".format,
            75,
            28,
        ),
    )

    @property
    @override
    def settings(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "task": self.task.identity}

    @override
    def why_not(self, code: LinearCode, activations: Activations) -> str | None:
        if not isinstance(code, SAELensCode):
            return "the group needs an SAE of SAELens, whose metadata name its hook"
        if code.sae.cfg.metadata.hook_name_out is not None:
            return "the group does not know transcoders"
        return None

    @override
    def start(self, code: LinearCode, activations: Activations) -> Accumulator:
        assert isinstance(code, SAELensCode)
        return _Prompts(code, activations, self)
