"""A sweep from its config to its tables; interrupted and run again, it goes on where it was."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sae_afa_plugin.activations.hooks import usual_device
from sae_afa_plugin.evaluation import evaluate_saes
from sae_afa_plugin.files import user_path, writing
from sae_afa_plugin.groups.known_truth import KnownTruth, TrueCode
from sae_afa_plugin.pages import write_page
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.sources import Excluded
from sae_afa_plugin.sweep.budget import (
    groups_within,
    measured_seconds,
    state_bytes,
    step_bytes,
)
from sae_afa_plugin.sweep.config import PCA, TRUTH, Sweep
from sae_afa_plugin.sweep.controls import write_pca, write_untrained
from sae_afa_plugin.sweep.figures import save_figures
from sae_afa_plugin.sweep.grid import Member, each_once, matched, members
from sae_afa_plugin.sweep.page import render_sweep
from sae_afa_plugin.sweep.reader import load_sweep
from sae_afa_plugin.sweep.results import EVALUATION, SweepResults
from sae_afa_plugin.sweep.sources import Sources, sources_of_sweep
from sae_afa_plugin.sweep.tabulate import tabulated
from sae_afa_plugin.training.coordinator import Trained, train_saes
from sae_afa_plugin.training.folder import is_finished
from sae_afa_plugin.training.run import SAETraining
from sae_afa_plugin.training.stream import default_block

SAES = "saes"


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
        results = tabulated(
            found,
            self.members,
            self.trained,
            [(one.name, other.name) for one, other in pairs],
            self.sweep,
            self._about(),
            progress=self.progress,
        )
        results.save(self.out)
        save_figures(results, self.out / "figures")
        write_page(self.out, lambda: render_sweep(results))
        return results

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
            if member.is_matched and member.name in l0.index
        ]

    # --- the plan ---

    def _say_plan(self) -> None:
        sweep, trainings = self.sweep, self._trainings(self.members)
        groups = groups_within(trainings, sweep.memory)
        tokens = sweep.steps * sweep.batch_size
        n_rows = len({member.row.line for member in self.members})
        self.say(
            f"{len(self.members)} SAEs from {n_rows} rows: {len(trainings)} to train, "
            f"{sweep.steps:,} steps of {sweep.batch_size:,} tokens each"
        )
        n = self.sources.training.n_tokens
        times = f", {tokens / n:.1f} times" if tokens > n else ""
        together = (
            f"{len(groups)} groups of up to {max(map(len, groups))} SAEs, each on one pass over"
            if len(groups) > 1
            else "all on one pass over"
        )
        self.say(
            f"{together} {min(tokens, n):,} tokens{times}; {self.sources.heldout.n_tokens:,} others "
            "are held out"
        )
        if trainings:
            self._say_costs(trainings, groups)

    def _say_costs(
        self, trainings: Mapping[str, SAETraining], groups: Sequence[Mapping[str, SAETraining]]
    ) -> None:
        todo = {n: t for n, t in trainings.items() if not is_finished(self.out / SAES / n)}
        if len(todo) < len(trainings):
            self.say(f"{len(trainings) - len(todo)} of them are trained already")
        if todo:
            passes = sum(any(name in todo for name in group) for group in groups)
            n_saes = len(self.members) - len(trainings) + len(todo)
            seconds = measured_seconds(todo, passes, n_saes, self.sources, self.sweep)
            more = (
                f"; at most {self._matches()} more at equal L0 come on top"
                if self.sweep.match_l0
                else ""
            )
            self.say(
                f"about {_duration(sum(seconds))} here (measured): activations "
                f"{_duration(seconds.reading)}, training steps {_duration(seconds.steps)}, "
                f"evaluation {_duration(seconds.evaluation)}{more}"
            )
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

    def _about(self) -> dict[str, Any]:
        """What a reader has to know of the run."""
        sweep = self.sweep
        return {
            "config": sweep.text,
            "model": sweep.model or (sweep.synthetic and sweep.synthetic.world),
            "hooks": sorted(self.widths),
            "seeds": [*sweep.seeds],
            "steps": sweep.steps,
            "batch_size": sweep.batch_size,
            "training_tokens": min(sweep.steps * sweep.batch_size, self.sources.training.n_tokens),
            "heldout_tokens": self.sources.heldout.n_tokens,
            "device": self.device,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_bytes_on_gpu": (
                torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
            ),
        }

    def _matches(self) -> int:
        return sum(member.is_matched for member in self.members) * len(self.sweep.match_l0)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else (f"{seconds / 3600:.1f} h")
    )
