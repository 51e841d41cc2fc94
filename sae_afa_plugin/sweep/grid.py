"""The SAEs of a sweep: a row of the config for every value of every option, hook and seed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig

from sae_afa_plugin.sweep.config import (
    PCA,
    TRUTH,
    Row,
    Sweep,
    fields_of,
    l0_option,
    row_options,
    sae_config,
)
from sae_afa_plugin.training.run import SAETraining


@dataclass(frozen=True)
class Member:
    """One SAE of a sweep.

    Args:
        row: Where it comes from.
        hook: What it reads.
        seed: For its initial weights and the order of tokens.
        options: Fields of its config.
    """

    row: Row
    hook: str
    seed: int
    options: Mapping[str, Any]

    @property
    def setting(self) -> str:
        """What the runs of one setting with different seeds have in common, as people write it."""
        row = self.row
        told = [f"{name}={_written(value)}" for name, value in self._told()]
        told += [f"{name}={_written(value)}" for name, value in row.trainer.items()]
        control = [] if row.control is None else [row.control]
        return " ".join([row.architecture, *control, *told])

    def _told(self) -> list[tuple[str, Any]]:
        """The options that tell it from others: those of the row, and the width."""
        names = [name for name in self.row.options if name != "d_sae"] + ["d_sae"]
        return [(name, self.options[name]) for name in names if name in self.options]

    @property
    def name(self) -> str:
        """Of the SAE and of its folder."""
        words = [*self.setting.split(), self.hook, f"seed={self.seed}"]
        return "_".join(re.sub(r"[^A-Za-z0-9.=,+-]+", "-", word) for word in words)

    @property
    def family(self) -> str:
        """Runs that differ by seed and sparsity alone: a line of the frontier."""
        sparsity = _sparsity_options(self.row.architecture)
        told = [f"{n}={_written(v)}" for n, v in self._told() if n not in sparsity]
        told += [f"{name}={_written(value)}" for name, value in self.row.trainer.items()]
        control = [] if self.row.control is None else [self.row.control]
        return " ".join([self.row.architecture, *control, *told])

    @property
    def chooses_l0(self) -> bool:
        """Whether its L0 is its own: nobody has told it one."""
        told = l0_option(self.row.architecture)
        return self.row.is_trained and (told is None or self.options.get(told) is None)

    @property
    def is_matched(self) -> bool:
        """Whether ``match_l0`` trains others at its L0."""
        return self.chooses_l0 and self.row.control is None and self.row.match_l0

    def training(self, sweep: Sweep, d_in: int, device: str) -> SAETraining:
        """How it is trained.

        Args:
            sweep: Which decides the rest.
            d_in: Width of the hook.
            device: Where.
        """
        trainer = {**sweep.trainer, **self.row.trainer}
        batch = int(trainer.pop("train_batch_size_samples", sweep.batch_size))
        return SAETraining(
            sae_config(self.row.architecture, d_in, self.options),
            self.hook,
            SAETrainerConfig(
                train_batch_size_samples=batch,
                total_training_samples=sweep.steps * batch,
                device=device,
                logger=LoggingConfig(log_to_wandb=False),
                **trainer,
            ),
            seed=self.seed,
            frozen_decoder=self.row.control == "frozen_decoder",
        )


def _sparsity_options(architecture: str) -> set[str]:
    """Options whose values lie along a frontier."""
    words = ("coefficient", "threshold", "price", "explained")
    found = {name for name in fields_of(architecture) if name.endswith(words)}
    return {*found, *filter(None, [l0_option(architecture)])} - {"aux_loss_coefficient"}


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def members(sweep: Sweep, hook_of_world: str | None = None) -> list[Member]:
    """All SAEs that the config names, in its order, each once.

    Args:
        sweep: The config.
        hook_of_world: What a synthetic world calls its one hook.
    """
    hooks = sweep.hooks if hook_of_world is None else (hook_of_world,)
    found = [
        Member(row, hook, seed, options)
        for row in sweep.saes
        for options in row_options(sweep, row)
        for hook in row.hooks or hooks
        for seed in _seeds(sweep, row)
    ]
    return each_once(found)


def _seeds(sweep: Sweep, row: Row) -> tuple[int, ...]:
    # the same for every seed
    return (0,) if row.architecture in (PCA, TRUTH) else row.seeds or sweep.seeds


def each_once(found: Iterable[Member]) -> list[Member]:
    """SAEs without those that are there already, by name."""
    return list({member.name: member for member in found}.values())


def matched(sweep: Sweep, of: Iterable[tuple[Member, float]]) -> list[tuple[Member, Member]]:
    """What ``match_l0`` adds: pairs of an SAE and another architecture at the L0 it settled at.

    Args:
        sweep: The config.
        of: SAEs that choose their L0, and where they settled.
    """
    found: list[tuple[Member, Member]] = []
    for member, l0 in of:
        for row in sweep.match_l0:
            told = l0_option(row.architecture)
            assert told is not None
            if row.hooks is not None and member.hook not in row.hooks:
                continue
            kind = fields_of(row.architecture)[told]
            value = max(1.0, round(l0, 1)) if float in _kinds(kind) else max(1, round(l0))
            width = {"d_sae": (member.options["d_sae"],)} if "d_sae" not in row.options else {}
            at = Row(
                row.architecture,
                {**row.options, **width, told: (value,)},
                trainer={**member.row.trainer, **row.trainer},
                line=row.line,
            )
            found += [
                (member, Member(at, member.hook, member.seed, options))
                for options in row_options(sweep, at)
            ]
    return found


def _kinds(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", (hint,))
