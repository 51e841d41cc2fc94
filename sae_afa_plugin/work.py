"""The work of an evaluation: one SAE after the other, each kept before the next is loaded."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from sae_afa_plugin.activations.base import Activations, Site
from sae_afa_plugin.activations.hooks import (
    device_of,
    hooks_left_on,
    not_training,
    usual_device,
    without_autocast,
)
from sae_afa_plugin.activations.language_model import LanguageModelActivations
from sae_afa_plugin.activations.tensors import hold
from sae_afa_plugin.files import NotWrittenError, digest_of_table
from sae_afa_plugin.groups.afa import AFA
from sae_afa_plugin.groups.base import Accumulator, GroupResult, MetricGroup, tokens_at_once
from sae_afa_plugin.plan import Evaluation, sentence
from sae_afa_plugin.printable import short
from sae_afa_plugin.sources import SAESource, shown_origin
from sae_afa_plugin.spaces import LinearCode, linear_code, why_not
from sae_afa_plugin.store import Store, StoredResult, versions

_MOST_AT_ONCE = {"cpu": 1024, "cuda": 16_384}  # larger blocks leave the caches of a CPU


class Work:
    """What has to be done for some SAEs in one store, and what is done."""

    def __init__(
        self,
        activations: Activations,
        store: Store,
        groups: Sequence[MetricGroup],
        how: Evaluation,
        keeps: bool,
    ):
        self.keeps = keeps  # whether somebody will look for these results again
        self.activations, self.store, self.groups, self.how = activations, store, groups, how
        self.done: dict[str, dict[str, StoredResult]] = {}

    def do(self, sources: Sequence[SAESource], refused: dict[str, str]) -> None:
        """Evaluate what is missing; each SAE is kept before the next is loaded."""
        missing: list[SAESource] = []
        before = {result.sae: result for result in self.store.results()}  # the newest of each
        for source in sources:
            if source.name in before:
                try:
                    self.look_up(source, source.fingerprint(), before[source.name])
                except OSError as error:
                    refused[source.name] = sentence(error)
                    continue
            if len(self.done.get(source.name, {})) < len(self.groups):
                missing.append(source)
        if self.done:
            self._say_versions()
            self.how.say(
                f"{len(sources) - len(missing)} SAEs were finished before, {len(missing)} are to do"
            )
        if missing:
            self._evaluate(missing, refused)
        elif self.done and self._of_a_stream():
            self._begin()  # it may give other tokens than before, and nothing else would tell

    def _of_a_stream(self) -> bool:
        settings = self.activations.settings
        return settings.get("dataset") == "in memory" and settings["dataset_content"] is None

    def _begin(self) -> None:
        activations = self.activations
        self.store.begin(activations.sequences, digest_of_table(activations.places))

    def _say_versions(self) -> None:
        """Say if what is taken over was made with other versions: numbers may differ by that.

        It is no part of the key: this package counts up a group's version when its numbers change,
        and other libraries seldom change any, while an evaluation may take hours.
        """
        here = versions()
        for package in here:
            of = {
                part.versions.get(package) for done in self.done.values() for part in done.values()
            }
            other = ", ".join(sorted(v for v in of if v is not None and v != here[package]))
            if other:
                self.how.say(
                    f"some of what was finished before was made with {package} {other}, and this "
                    f"is {here[package]}: it is kept; to evaluate it again, use another folder"
                )

    def look_up(self, source: SAESource, fingerprint: str, before: StoredResult) -> None:
        """Take over what the store has of an SAE, as far as it is of this one."""
        if before.fingerprint.startswith(f"{fingerprint}@"):
            fingerprint = before.fingerprint  # the hub does not say today which commit it is at
        if before.fingerprint != fingerprint:
            origin = str(before.facts.get("source"))
            if origin != source.origin:
                raise ValueError(
                    f"{source.name!r} in {str(self.store.folder)!r} is another SAE "
                    f"({shown_origin(origin)}): use another folder"
                )
            self.how.say(f"{source.name} has changed since, and is evaluated again")
        known: dict[str, StoredResult] = {}
        for group in self.groups:
            key = self.store.key(fingerprint, group.identity)
            try:
                result = self.store.find(source.name, group.name, key)
            except ValueError as error:
                self.how.say(f"{error}: it is evaluated again")
                continue
            if result is not None:
                known[group.name] = result
        if known:
            self.done[source.name] = known

    def _evaluate(self, missing: list[SAESource], refused: dict[str, str]) -> None:
        how, activations = self.how, self.activations
        asked = activations.settings.get("n_tokens", activations.n_tokens)
        if activations.n_tokens < asked:
            how.say(f"the dataset has {activations.n_tokens:,} tokens, not {asked:,}")
        self._begin()
        fitting = self._fitting(missing, refused)
        if isinstance(activations, LanguageModelActivations):
            # a model is run once; other sources are read as often as there are SAEs
            hooks = [hook for _, site in fitting for hook in site.hooks]
            if hooks:
                activations = hold(
                    activations, hooks, how.memory_budget, self.store.folder, how.progress
                )
        places = activations.places
        waiting: list[tuple[SAESource, Site]] = []
        with tqdm(total=len(fitting), desc="SAEs", unit="SAE", disable=not how.progress) as bar:
            for wait, todo in ((False, fitting), (True, waiting)):
                for source, site in todo:
                    with self.store.claim(source.name, wait) as mine:
                        if not mine:  # another process is at it
                            waiting.append((source, site))
                            continue
                        try:
                            with without_autocast():
                                _One(self, source, site, activations, places).evaluate(refused)
                        except NotWrittenError:
                            raise  # the next one could not be kept either
                        except Exception as error:
                            # the others go on, and what this one needs may be mended
                            refused[source.name] = sentence(error)
                            error.__traceback__ = None  # it holds what did not fit into memory
                            _free_memory()
                        bar.update()

    def _fitting(
        self, sources: Iterable[SAESource], refused: dict[str, str]
    ) -> list[tuple[SAESource, Site]]:
        """The SAEs whose hooks exist and are as wide as they need; the others are refused."""
        sites = [(source, self.activations.site(source.metadata)) for source in sources]
        self.activations.shapes([hook for _, site in sites for hook in site.hooks])  # one look
        fitting: list[tuple[SAESource, Site]] = []
        for source, site in sites:
            config = source.config
            reason = self.activations.why_not(site, config["d_in"], config.get("d_out"))
            if reason is None:
                fitting.append((source, site))
            else:
                refused[source.name] = short(reason)
        return fitting


class _One:
    """The evaluation of one SAE."""

    def __init__(
        self, work: Work, source: SAESource, site: Site, activations: Activations, places: Any
    ):
        self.work, self.source, self.site = work, source, site
        self.activations, self.places = activations, places

    def evaluate(self, refused: dict[str, str]) -> None:
        """Load the SAE, let the groups look that have not yet, and keep what they found."""
        work, source, how = self.work, self.source, self.work.how
        # before loading: a file may change meanwhile
        fingerprint = source.fingerprint() if work.keeps else ""
        before = work.store.results(source.name) if work.keeps else []
        if before:
            work.look_up(source, fingerprint, before[-1])  # another process may have finished it
        done = work.done.setdefault(source.name, {})
        groups = [group for group in work.groups if group.name not in done]
        as_it_was = ExitStack()
        try:
            if not groups:
                return
            sae = source.load(self._device(), how.dtype)
            if isinstance(sae, nn.Module):
                as_it_was.enter_context(not_training(sae))
            code, facts = linear_code(sae), self._facts(sae)
            for line in hooks_left_on(sae) if hasattr(sae, "hook_dict") else []:
                how.say(f"{source.name} {line}")
            started: dict[str, Accumulator] = {}
            for group in groups:
                reason = group.why_not(code, self.activations)
                if reason is None:
                    started[group.name] = group.start(code, self.activations)
                else:
                    how.say(f"{source.name}: no {group.name}: {reason}")
            reading = [started[g.name] for g in groups if g.name in started and g.reads_tokens]
            self._read(code, reading)
            for group in groups:
                try:
                    accumulator = started.pop(group.name, None)
                    result = GroupResult({}) if accumulator is None else accumulator.finish()
                except Exception as error:
                    if group.name == AFA.name:
                        raise
                    refused[f"{source.name} ({group.name})"] = sentence(error)
                    continue
                done[group.name] = work.store.add(
                    source.name,
                    group.name,
                    work.store.key(fingerprint, group.identity),
                    fingerprint,
                    facts,
                    result,
                    self.places,
                )
            self._compare_with_catalogue(done["afa"].summary["l0_mean"])
        finally:
            as_it_was.close()
            if "afa" not in done:  # whatever else is known of it, the table is about the metric
                work.done.pop(source.name)
            else:
                refused.pop(source.name, None)

    def _device(self) -> str:
        if self.work.how.device is not None:
            return self.work.how.device
        if isinstance(self.work.activations, LanguageModelActivations):
            return str(device_of(self.work.activations.model))  # loaded already
        return usual_device()

    def _read(self, code: LinearCode, accumulators: Sequence[Accumulator]) -> None:
        if not accumulators:
            return
        device = code.W_dec.device
        most = _MOST_AT_ONCE["cpu" if device.type == "cpu" else "cuda"]
        size = min(most, tokens_at_once(device, len(code.W_dec)))
        with tqdm(
            total=self.activations.n_tokens,
            desc=self.source.name,
            unit="tok",
            leave=False,
            disable=not self.work.how.progress,
        ) as bar:
            for batch in self.activations.batches(self.site, device, size):
                if batch.rows.start == 0:
                    code.check(batch.x[:8], f"architecture {self.source.config['architecture']!r}")
                tokens = code.read(batch.x, batch.x_out, batch.rows)
                for accumulator in accumulators:
                    accumulator.add(tokens)
                del tokens  # the next block needs the room
                bar.update(len(batch.x))

    def _facts(self, sae: Any) -> dict[str, Any]:
        """What the SAE is, as it was loaded; said as well, because loading is where most goes wrong."""
        source, how = self.source, self.work.how
        config = source.config
        cfg = getattr(sae, "cfg", None)
        loaded = {
            name: getattr(cfg, name, config[name])
            for name in ("d_in", "d_sae", "normalize_activations", "dtype")
            if name in config or hasattr(cfg, name)
        }
        named = getattr(cfg, "architecture", None)
        architecture = str(named() if callable(named) else config["architecture"])
        metadata = source.metadata
        hooks = " to ".join(filter(None, (metadata["hook_name"], metadata.get("hook_name_out"))))
        how.say(
            f"{source.name}: {architecture}, {loaded['d_sae']:,} features of width "
            f"{loaded['d_in']:,}, {hooks}, normalize_activations "
            f"{loaded['normalize_activations']}, {loaded.get('dtype')}"
        )
        reason = why_not(architecture, loaded["normalize_activations"], True)
        if reason is not None:
            raise ValueError(reason)
        return {
            "source": source.origin,
            "architecture": architecture,
            **source.facts(),
            "d_in": loaded["d_in"],
            "d_sae": loaded["d_sae"],
            "hook_name": metadata["hook_name"],
            "hook_name_out": metadata.get("hook_name_out"),
            "normalize_activations": loaded["normalize_activations"],
            "dtype": loaded.get("dtype"),
            "special_tokens": self.activations.n_special,
            "catalogue_l0": source.catalogue_l0,
        }

    def _compare_with_catalogue(self, l0: float) -> None:
        expected = self.source.catalogue_l0
        if expected and not 0.5 < l0 / expected < 2:
            self.work.how.say(
                f"{self.source.name}: L0 is {l0:.1f}, but the catalogue says {expected:g}: is "
                "this the model, and are these the tokens, that the SAE was made for?"
            )


def _free_memory() -> None:
    gc.collect()  # what a failed SAE has left in a traceback
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
