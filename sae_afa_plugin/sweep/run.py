"""A sweep from its config to its tables; interrupted and run again, it goes on where it was."""

from __future__ import annotations

import math
import resource
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from sae_afa_plugin._upstream import SAE_WEIGHTS_FILENAME
from sae_afa_plugin.evaluation import evaluate_saes
from sae_afa_plugin.files import user_path, write_json, write_whole, writing
from sae_afa_plugin.groups.known_truth import KnownTruth, TrueCode
from sae_afa_plugin.printable import cell
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.sources import Excluded
from sae_afa_plugin.sweep.budget import (
    groups_within,
    seconds_of_steps,
    state_bytes,
    step_bytes,
)
from sae_afa_plugin.sweep.config import PCA, TRUTH, Sweep, load_sweep
from sae_afa_plugin.sweep.controls import write_pca, write_untrained
from sae_afa_plugin.sweep.grid import Member, each_once, matched, members
from sae_afa_plugin.sweep.sources import Sources, sources_of_sweep, usual_device
from sae_afa_plugin.sweep.statistics import (
    description_length,
    firing_bits,
    interpolated,
    paired_difference,
    reseed_noise,
    stability,
)
from sae_afa_plugin.training.coordinator import Trained, train_saes
from sae_afa_plugin.training.run import SAETraining
from sae_afa_plugin.training.stream import default_block

SAES, EVALUATION = "saes", "evaluation"
TABLES = ("summary", "frontier", "comparisons", "noise", "stability")
_SETTING = ["hook_name", "setting"]


@dataclass
class SweepResults:
    """What a sweep found.

    Args:
        summary: One row for each SAE: what it is, and everything that was measured.
        frontier: One row for each setting and hook: means and standard deviations over seeds.
        comparisons: SAEs that choose their L0 beside others at equal L0: trained at it, or
            interpolated, which the column ``how`` says.
        noise: How much each number moves when nothing but the seed does.
        stability: How alike the dictionaries of different seeds are.
        evaluation: Tables of tokens and features.
        refused: Why SAEs are missing, by name.
    """

    summary: pd.DataFrame
    frontier: pd.DataFrame
    comparisons: pd.DataFrame
    noise: pd.DataFrame
    stability: pd.DataFrame
    evaluation: AFAResults
    refused: dict[str, str]


def run_sweep(
    config: Sweep | str | Path,
    out: str | Path,
    *,
    dry_run: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> SweepResults | None:
    """Train and evaluate what a config asks for.

    What is finished in ``out`` is kept: with more rows in the config only those are trained.

    Args:
        config: The config, its file, or the name of one that comes with the package.
        out: Folder for the SAEs, the evaluation and the tables.
        dry_run: Whether to stop after the plan.
        progress: Whether to show bars.
        say: Gets the plan, line by line.

    Returns:
        What was found; None for a dry run.

    Raises:
        ValueError: If something of the config does not fit the model, or ``out`` holds other SAEs.
        OSError: If something cannot be written.
    """
    sweep = config if isinstance(config, Sweep) else load_sweep(config)
    return _Running(sweep, user_path(out), progress, say).run(dry_run)


class _Running:
    def __init__(self, sweep: Sweep, out: Path, progress: bool, say: Callable[[str], None]):
        self.sweep, self.out, self.progress, self.say = sweep, out, progress, say
        self.device = usual_device(sweep.device)
        self.sources: Sources = sources_of_sweep(sweep, self.device, progress)
        hook = "synthetic" if sweep.synthetic is not None else None
        self.members = members(sweep, hook)
        self.widths = self._widths({member.hook for member in self.members})
        self.trained: dict[str, Trained] = {}

    def _widths(self, hooks: set[str]) -> dict[str, int]:
        source = self.sources.training
        shapes = source.shapes(sorted(hooks))
        for hook in sorted(hooks):
            width = shapes[hook].numel() if hook in shapes else 0
            reason = source.why_not(source.site({"hook_name": hook}), width)
            if reason is not None:
                raise ValueError(reason)
        return {hook: shape.numel() for hook, shape in shapes.items()}

    # --- the steps ---

    def run(self, dry_run: bool) -> SweepResults | None:
        self._say_plan()
        if dry_run:
            return None
        found = self._train_and_evaluate(self.members)
        pairs = matched(self.sweep, self._settled(found)) if self.sweep.match_l0 else []
        if pairs:
            more = each_once([*self.members, *(other for _, other in pairs)])
            self.say(f"{len(more) - len(self.members)} SAEs at the L0 of others")
            self.members = more
            found = self._train_and_evaluate(self.members)
        return self._tables(found, [(one.name, other.name) for one, other in pairs])

    def _trainings(self, of: Iterable[Member]) -> dict[str, SAETraining]:
        return {
            member.name: member.training(self.sweep, self.widths[member.hook], self.device)
            for member in of
            if member.row.is_trained
        }

    def _train_and_evaluate(self, of: Sequence[Member]) -> AFAResults:
        trainings = self._trainings(of)
        for group in groups_within(trainings, self.sweep.memory):
            todo = {name: one for name, one in group.items() if name not in self.trained}
            if todo:
                self.trained.update(self._train(todo))
        saes: dict[str, Any] = {}
        for member in of:
            name, folder = member.name, self.out / SAES / member.name
            if name in self.trained:
                one = self.trained[name]
                saes[name] = one.folder if one.reason is None else Excluded(one.reason)
            else:
                saes[name] = self._control(member, folder)
        measure, synthetic = self.sweep.measure, self.sweep.synthetic is not None
        return evaluate_saes(
            saes,
            activations=self.sources.heldout,
            groups=[KnownTruth()] if synthetic else [],
            core=measure.core and not synthetic and self.sources.heldout.has_model,
            core_tokens=measure.core_tokens,
            coherence=measure.coherence,
            batch_size_prompts=measure.batch_size_prompts,
            device=self.device,
            progress=self.progress,
            out=self.out / EVALUATION,
        )

    def _train(self, trainings: Mapping[str, SAETraining]) -> dict[str, Trained]:
        batch = self.sweep.batch_size
        block = self.sweep.block_tokens or min(default_block(batch), self.sweep.steps * batch)
        return train_saes(
            trainings,
            self.sources.training,
            self.out / SAES,
            metadata=self.sources.metadata,
            block_tokens=block,
            checkpoint_seconds=self.sweep.checkpoint_seconds,
            progress=self.progress,
        )

    def _control(self, member: Member, folder: Path) -> Any:
        row, metadata = member.row, self.sources.metadata
        if row.architecture == TRUTH:
            return TrueCode(self.sources.heldout)  # pyright: ignore[reportArgumentType]
        try:
            if row.architecture == PCA:
                normalize = str(self.sweep.defaults.get("normalize_activations", "none"))
                k = int(member.options["k"])
                write_pca(self.sources.training, member.hook, k, normalize, folder, metadata)
            else:
                training = member.training(self.sweep, self.widths[member.hook], self.device)
                write_untrained(training, folder, metadata)
        except ValueError as error:
            return Excluded(str(error))
        return folder

    def _settled(self, found: AFAResults) -> list[tuple[Member, float]]:
        l0: Any = found.summary["l0_mean"]
        return [
            (member, float(l0[member.name]))
            for member in self.members
            if member.chooses_l0 and member.row.control is None and member.name in l0.index
        ]

    # --- the plan ---

    def _say_plan(self) -> None:
        sweep, trainings = self.sweep, self._trainings(self.members)
        groups = groups_within(trainings, sweep.memory)
        tokens = sweep.steps * sweep.batch_size
        rows = [
            (key, len(list(of)))
            for key, of in groupby(self.members, key=lambda member: member.row.line)
        ]
        self.say(
            f"{len(self.members)} SAEs from {len(rows)} rows: {len(trainings)} to train, "
            f"{sweep.steps:,} steps of {sweep.batch_size:,} tokens each"
        )
        n = self.sources.training.n_tokens
        times = f", {tokens / n:.1f} times" if tokens > n else ""
        self.say(
            f"{len(groups)} groups of {max(map(len, groups), default=0)} SAEs or fewer, each reads "
            f"{min(tokens, n):,} tokens{times}; held out are {self.sources.heldout.n_tokens:,}"
        )
        if trainings:
            seconds = seconds_of_steps(trainings.values())
            more = f", and at most {self._matches()} more at equal L0" if sweep.match_l0 else ""
            self.say(f"training steps take about {_duration(seconds)} here (measured){more}")
            biggest = max(trainings.values(), key=step_bytes)
            disk = sum(8 * t.sae.d_in * t.sae.d_sae for t in trainings.values())
            held = max(sum(map(state_bytes, group.values())) for group in groups)
            self.say(
                f"on disk {disk / 2**30:.2f} GiB of SAEs, while training up to four times that; in "
                f"memory {(held + step_bytes(biggest)) / 2**30:.2f} GiB beside the model"
            )
            with writing(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.out).free
            if disk > free:
                raise OSError(
                    f"the SAEs need {disk / 2**30:.1f} GiB in {str(self.out)!r}, where "
                    f"{free / 2**30:.1f} are free: choose another place, or fewer rows"
                )

    def _matches(self) -> int:
        choose = sum(member.chooses_l0 and member.row.control is None for member in self.members)
        return choose * len(self.sweep.match_l0)

    # --- the tables ---

    def _tables(self, found: AFAResults, pairs: list[tuple[str, str]]) -> SweepResults:
        by_name = {member.name: member for member in self.members}
        summary = found.summary.loc[
            [name for name in by_name if name in found.summary.index]
        ].copy()
        known = [by_name[str(name)] for name in summary.index]
        summary.insert(0, "family", [member.family for member in known])
        summary.insert(1, "setting", [member.setting for member in known])
        summary.insert(2, "seed", [member.seed for member in known])
        summary["control"] = [
            member.row.control or (None if member.row.is_trained else member.row.architecture)
            for member in known
        ]
        summary["chooses_l0"] = [member.chooses_l0 for member in known]
        for column, value in (
            ("training_seconds", lambda one: one.seconds),
            ("seconds_per_step", lambda one: one.seconds / max(one.step, 1)),
        ):
            summary[column] = [
                value(self.trained[name]) if name in self.trained else math.nan
                for name in map(str, summary.index)
            ]
        summary["description_length"] = [
            description_length(row["l0_mean"], int(row["d_sae"])) for _, row in summary.iterrows()
        ]
        summary["firing_bits"] = [self._firing_bits(found, name) for name in summary.index]
        results = SweepResults(
            summary,
            _frontier(summary),
            self._comparisons(found, summary, pairs),
            reseed_noise(summary, _SETTING),
            self._stability(summary),
            found,
            dict(found.metadata["refused"]),
        )
        for name in TABLES:
            table: pd.DataFrame = getattr(results, name)
            shown = table.map(cell)
            index_label = "sae" if name == "summary" else None
            write_whole(
                self.out / f"{name}.csv",
                lambda path, t=shown, label=index_label: t.to_csv(
                    path, index=label is not None, index_label=label
                ),
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        write_json(
            self.out / "sweep.json",
            {"refused": results.refused, "peak_bytes": peak, "peak_bytes_on_gpu": cuda},
        )
        return results

    def _firing_bits(self, found: AFAResults, name: Any) -> float:
        features = found.features_of(str(name))
        if features is None:
            return math.nan
        n = int(found.summary.loc[name, "tokens"])  # pyright: ignore[reportArgumentType]
        return firing_bits(features["fired"].to_numpy(float), n)

    def _comparisons(
        self, found: AFAResults, summary: pd.DataFrame, pairs: list[tuple[str, str]]
    ) -> pd.DataFrame:
        """Each setting that chooses its L0 beside others at that L0, over seeds and sequences."""
        rows: list[dict[str, Any]] = []
        alike: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
        for one, other in pairs:
            if one in summary.index and other in summary.index:
                key = (summary.hook_name[one], summary.setting[one], summary.family[other])
                alike.setdefault(key, []).append((one, other))
        for (hook, setting, family), names in alike.items():
            tables = [
                tuple(found.tokens_of(name, ["sequence", "nmse"]) for name in pair)
                for pair in names
            ]
            difference = paired_difference(tables, "nmse", self.sweep.measure.bootstrap)  # pyright: ignore
            ones, others = zip(*names, strict=True)
            rows.append(
                {
                    "hook_name": hook,
                    "setting": setting,
                    "against": family,
                    "how": "trained at this L0",
                    "l0": summary.l0_mean[list(ones)].mean(),
                    "l0_against": summary.l0_mean[list(others)].mean(),
                    **{f"nmse_{key}": value for key, value in difference._asdict().items()},
                }
            )
        rows += _interpolations(summary)
        return pd.DataFrame(rows)

    def _stability(self, summary: pd.DataFrame) -> pd.DataFrame:
        if not self.sweep.measure.stability:
            return pd.DataFrame(columns=[*_SETTING, "pw_mcc", "seeds"])
        rows: list[dict[str, Any]] = []
        trained = summary[[name in self.trained for name in summary.index]]
        groups: Any = trained.groupby(_SETTING, sort=False)
        several = [(key, group) for key, group in groups if len(group) > 1]
        for (hook, setting), group in tqdm(
            several, desc="Matching dictionaries", unit="setting", disable=not self.progress
        ):
            W_decs = [
                load_file(self.out / SAES / str(name) / SAE_WEIGHTS_FILENAME)["W_dec"]
                for name in group.index
            ]
            rows.append(
                {
                    "hook_name": hook,
                    "setting": setting,
                    "pw_mcc": stability(W_decs),
                    "seeds": len(group),
                }
            )
        return pd.DataFrame(rows, columns=[*_SETTING, "pw_mcc", "seeds"])


def _frontier(summary: pd.DataFrame) -> pd.DataFrame:
    """Means and standard deviations over seeds of every number."""
    numbers = [
        column
        for column in summary.select_dtypes("number").columns
        if column not in ("seed", "d_in", "d_sae")
    ]
    keys = ["hook_name", "family", "setting"]
    groups: Any = summary.groupby(keys, sort=False)[numbers]
    mean, sd = groups.mean(), groups.std(ddof=1).add_suffix("_sd")
    columns = [name for column in numbers for name in (column, f"{column}_sd")]
    table = pd.concat([mean, sd], axis=1)[columns]
    table.insert(0, "seeds", groups.size())
    return table.reset_index()


def _interpolations(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Each setting that chooses its L0 beside every family that is told one, by its neighbours."""
    rows: list[dict[str, Any]] = []
    plain: Any = summary[summary["control"].isna()]
    chosen: Any = plain[plain["chooses_l0"].astype(bool)].groupby(
        ["hook_name", "setting"], sort=False
    )
    told: Any = plain[~plain["chooses_l0"].astype(bool)].groupby(
        ["hook_name", "family"], sort=False
    )
    lines = {key: group.groupby("setting")[["l0_mean", "nmse_mean"]].mean() for key, group in told}
    for (hook, setting), group in chosen:
        l0, nmse = group["l0_mean"].mean(), group["nmse_mean"].mean()
        for (other_hook, family), line in lines.items():
            if other_hook != hook:
                continue
            there = interpolated(dict(zip(line["l0_mean"], line["nmse_mean"], strict=True)), l0)
            rows.append(
                {
                    "hook_name": hook,
                    "setting": setting,
                    "against": family,
                    "how": "interpolated",
                    "l0": l0,
                    "l0_against": l0,
                    "nmse_first": nmse,
                    "nmse_second": there,
                    "nmse_ratio": nmse / there if np.isfinite(there) else math.nan,
                    "nmse_seeds": len(group),
                }
            )
    return rows


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else (f"{seconds / 3600:.1f} h")
    )
