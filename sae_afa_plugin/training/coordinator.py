"""Train several SAEs on the same activations, each as if it were alone.

Activations are read once for all SAEs. In each block of tokens they train one after the other,
so that memory holds the outputs of one step of one SAE.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm.auto import tqdm

from sae_afa_plugin import limits
from sae_afa_plugin.activations.base import Activations, Site
from sae_afa_plugin.files import claimed, user_path
from sae_afa_plugin.printable import printable
from sae_afa_plugin.training.folder import DIVERGED, FINISHED, UNDER_WAY, TrainingFolder
from sae_afa_plugin.training.run import Run, SAETraining
from sae_afa_plugin.training.stream import Blocks, default_block


@dataclass(frozen=True)
class Trained:
    """What has become of one SAE.

    Args:
        folder: Where it is.
        step: Steps behind it.
        seconds: Spent in them, without reading activations.
        reason: Why it was left behind, in a sentence; None if it is finished.
    """

    folder: Path
    step: int
    seconds: float
    reason: str | None = None


def train_saes(
    trainings: Mapping[str, SAETraining],
    source: Activations,
    out: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    block_tokens: int | None = None,
    checkpoint_seconds: float = 300.0,
    progress: bool = True,
) -> dict[str, Trained]:
    """Train SAEs, each into a folder of its own; called again, it goes on where it was.

    An SAE becomes the same whatever is trained beside it, and (on a CPU, to the last bit) however
    often the training was interrupted. One that is finished is not touched again. One whose loss
    is no longer a number, that has no memory or raises an error, is left behind with the reason in
    its ``training.json``, and the others go on; all but the first kind are tried again when this
    is called again.

    Args:
        trainings: By name; each name becomes a folder.
        source: The activations, used again from the start when they run out.
        out: Folder for the folders.
        metadata: What saved SAEs remember beside their hook: ``model_name``, ``context_size``, ...
        block_tokens: Tokens that are mixed and held in memory at once, a multiple of every batch
            size; None: about 65,536.
        checkpoint_seconds: A checkpoint is written at the end of a block when this much time has
            passed since the last one. It decides nothing but how much a kill can cost.
        progress: Whether to show a bar, and say who was left behind.

    Returns:
        What has become of each.

    Raises:
        ValueError: If a folder holds another training, an SAE does not fit its hook, or another
            process trains in ``out``.
        OSError: If nothing can be saved.
    """
    numbers = SimpleNamespace(block_tokens=block_tokens, checkpoint_seconds=checkpoint_seconds)
    limits.whole(numbers, "block_tokens", at_least=1, none=True)
    limits.real(numbers, "checkpoint_seconds")
    out, metadata = user_path(out), metadata or {}
    block_tokens = _block_tokens(trainings, block_tokens)
    for name in trainings:
        if not name or name.startswith(".") or Path(name).name != name or printable(name) != name:
            raise ValueError(f"an SAE's name becomes a folder, which {name!r} cannot be")
    with claimed(out, "training"):
        folders = {
            name: TrainingFolder(
                out / name,
                {
                    **training.settings(metadata),
                    "block_tokens": block_tokens,
                    "activations": source.settings,
                },
            )
            for name, training in trainings.items()
        }
        todo = [name for name, f in folders.items() if f.state not in (FINISHED, DIVERGED)]
        sites = {name: _site(trainings[name], source) for name in todo}
        for folder in folders.values():
            if folder.state == FINISHED:
                folder.tidy()
        blocks = Blocks(source, block_tokens)
        runs = [
            Run(name, trainings[name], folders[name], blocks, sites[name], metadata, progress)
            for name in todo
        ]
        _train(runs, blocks, checkpoint_seconds, progress)
    return {
        name: Trained(f.path, f.record["step"], f.record["seconds"], f.record.get("reason"))
        for name, f in folders.items()
    }


def _block_tokens(trainings: Mapping[str, SAETraining], given: int | None) -> int:
    """The size of a block, which must not depend on who trains beside whom."""
    wanted = {default_block(training.batch_size) for training in trainings.values()}
    if given is None and len(wanted) > 1:
        raise ValueError(
            f"the batch sizes {sorted({t.batch_size for t in trainings.values()})} have no block "
            "in common by default: pass block_tokens, a multiple of all of them"
        )
    return given or max(wanted, default=1)


def _site(training: SAETraining, source: Activations) -> Site:
    site = source.site(
        {"hook_name": training.hook_name, "hook_head_index": training.hook_head_index}
    )
    reason = source.why_not(site, training.sae.d_in)
    if reason is not None:
        raise ValueError(reason)
    return site


def _train(runs: Iterable[Run], blocks: Blocks, checkpoint_seconds: float, progress: bool) -> None:
    active = [run for run in runs if run.begin()]
    saved = time.monotonic()
    total = sum(run.training.steps for run in active)
    with tqdm(total=total, desc="Training SAEs", unit="step", disable=not progress) as bar:
        bar.update(sum(run.step for run in active))
        while active:
            # those that are ahead, from checkpoints of their own, wait for the others
            number = min(run.block for run in active)
            here = [run for run in active if run.block == number]
            blocks.load(number, [run.site.hook for run in here])
            for run in here:
                before = run.step
                run.train_block()
                bar.update(run.step - before)
            active = [run for run in active if run.folder.state == UNDER_WAY]
            if time.monotonic() - saved >= checkpoint_seconds:
                for run in active:
                    run.checkpoint()
                saved = time.monotonic()
