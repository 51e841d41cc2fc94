"""What an evaluation is to do: its options, which SAEs it can read, which tokens follow from them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from difflib import get_close_matches
from typing import Any

import torch
from tqdm.auto import tqdm

from sae_afa_plugin import limits
from sae_afa_plugin._upstream import DTYPE_MAP
from sae_afa_plugin.activations.tokens import PROTOCOLS, Protocol
from sae_afa_plugin.groups.afa import AFA
from sae_afa_plugin.groups.base import MetricGroup
from sae_afa_plugin.groups.coherence import Coherence
from sae_afa_plugin.groups.core import Core
from sae_afa_plugin.groups.frequencies import Frequencies
from sae_afa_plugin.options import flag
from sae_afa_plugin.printable import printable, short
from sae_afa_plugin.sources import SAESource


def _bytes_of_gib(text: str) -> int:
    try:
        return int(float(text) * 2**30)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"must be a number of GiB: got {text!r}") from None


def _gib_of_bytes(value: int) -> str:
    return repr(value / 2**30)


@dataclass(frozen=True)
class Evaluation:
    """How SAEs are evaluated, beside which tokens.

    Args:
        batch_size_prompts: Sequences in one forward pass of the language model.
        memory_budget: Memory for the activations, in bytes (in GiB on the command line); beyond
            it a temporary file is used.
        device: For the model and the SAEs; without it, a GPU if there is one.
        dtype: SAEs are loaded in this dtype. Objects stay as they are.
        coherence: Whether to compute the coherence of each dictionary, ``d_sae^2 d_in``
            multiplications.
        core: Whether to add SAELens's own metrics (CE and KL recovered, explained variance, L0)
            as ``core_...``: three more passes of the model for each SAE.
        core_tokens: Tokens for these.
        trust_remote_code: Whether Python from the language model's repository may run
            (transformers' option of this name). Only you can say so, never an SAE's files.
        progress: Whether to show bars and what has been loaded.
    """

    batch_size_prompts: int = 16
    memory_budget: int = field(
        default=1 << 30,
        metadata=flag("--memory", "GIB", parse=_bytes_of_gib, write=_gib_of_bytes),
    )
    device: str | None = None
    dtype: str = "float32"
    coherence: bool = True
    core: bool = False
    core_tokens: int = 8192
    trust_remote_code: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        limits.whole(self, "batch_size_prompts", "memory_budget", "core_tokens", at_least=1)
        limits.truth(self, "coherence", "core", "trust_remote_code", "progress")
        limits.dtype_and_device(self, none=True)
        # one name for each, which settings keep
        object.__setattr__(self, "dtype", str(DTYPE_MAP[self.dtype]).removeprefix("torch."))
        if self.device is not None:
            try:
                torch.empty(0, device=self.device).cpu()  # which "meta" cannot do
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                raise ValueError(f"device {self.device!r} cannot be used ({error})") from error

    def say(self, line: str) -> None:
        """Print a line above the progress bars."""
        if self.progress:
            tqdm.write(printable(line))

    def groups(self) -> list[MetricGroup]:
        """The groups of metrics that these options ask for."""
        found: list[MetricGroup] = [AFA(), Frequencies()]
        if self.coherence:
            found.append(Coherence())
        if self.core:
            found.append(Core(self.core_tokens, self.batch_size_prompts))
        return found


def sorted_options(protocol: Any, given: Mapping[str, Any]) -> tuple[Protocol, Evaluation]:
    """Sort the options into those about tokens and those about the evaluation."""
    if not isinstance(protocol, Protocol):
        if not isinstance(protocol, str) or protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {sorted(PROTOCOLS)}: got {protocol!r}")
        protocol = PROTOCOLS[protocol]
    known = {cls: [f.name for f in dataclass_fields(cls)] for cls in (Protocol, Evaluation)}
    for name in given:
        if name not in known[Protocol] + known[Evaluation]:
            near = get_close_matches(name, known[Protocol] + known[Evaluation], n=2)
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"there is no option {name!r}{hint}")
    return (
        replace(protocol, **{k: v for k, v in given.items() if k in known[Protocol]}),
        Evaluation(**{k: v for k, v in given.items() if k in known[Evaluation]}),
    )


def left_over(
    sources: Iterable[SAESource],
    reason_of: Callable[[SAESource], str | None],
    refused: dict[str, str],
) -> list[SAESource]:
    """The SAEs for which there is no reason not to evaluate them.

    Args:
        sources: SAEs.
        reason_of: Why one cannot be evaluated. If it raises an error, that is why: whatever one
            SAE's files contain costs only itself.
        refused: Reasons by name; those that are found are added.

    Raises:
        ValueError: If none is left.
    """
    left: list[SAESource] = []
    for source in sources:
        try:
            reason = reason_of(source)
        except Exception as error:
            reason = sentence(error)
        if reason is None:
            left.append(source)
        else:
            refused[source.name] = short(reason)
    if not left:
        raise none_left(refused)
    return left


def sentence(error: BaseException) -> str:
    """An error in one line, with its kind where its text alone may say nothing."""
    text = short(str(error))
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"there is not enough memory for it ({text or type(error).__name__})"
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def none_left(refused: Mapping[str, str]) -> ValueError:
    """That nothing can be evaluated, with the first of the reasons."""
    name, reason = next(iter(refused.items()))
    others = f" ({len(refused) - 1} others neither)" if len(refused) > 1 else ""
    return ValueError(f"{name!r} cannot be evaluated{others}: {reason}")
