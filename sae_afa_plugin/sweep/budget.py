"""What a sweep takes: memory of SAEs in training, groups that fit, time from a short measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sae_lens import SAETrainer, TrainingSAE

from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.activations.hooks import device_of, known_state
from sae_afa_plugin.sweep.config import Sweep
from sae_afa_plugin.sweep.sources import Sources
from sae_afa_plugin.training.run import SAETraining

_REPEATS = 3  # that are measured, after one that is not
_PASSES = 4  # of the model, in SAELens's evaluation
_STATES = 4  # weights, gradients, two moments of Adam
_MATRICES = 6  # [batch, d_sae] at the peak of a step


def state_bytes(training: SAETraining) -> int:
    """What one SAE holds while it is trained.

    Args:
        training: How it is trained.
    """
    cfg = training.sae
    return _STATES * 4 * (2 * cfg.d_in * cfg.d_sae + 2 * cfg.d_sae + cfg.d_in)


def step_bytes(training: SAETraining) -> int:
    """What one step takes beside that; steps come one after the other.

    Args:
        training: How it is trained.
    """
    return _MATRICES * 4 * training.batch_size * training.sae.d_sae


def groups_within(
    trainings: Mapping[str, SAETraining], memory: float
) -> list[dict[str, SAETraining]]:
    """SAEs in groups that fit, in their order; each reads the activations once.

    Args:
        trainings: By name.
        memory: GiB.

    Raises:
        ValueError: If one SAE alone does not fit.
    """
    budget = memory * 2**30
    groups: list[dict[str, SAETraining]] = []
    held = largest = 0
    for name, training in trainings.items():
        own, step = state_bytes(training), step_bytes(training)
        if own + step > budget:
            raise ValueError(
                f"{name} alone takes {(own + step) / 2**30:.1f} GiB in training, and memory is "
                f"{memory:g}: raise memory, or lower d_sae or the batch"
            )
        if not groups or held + own + max(largest, step) > budget:
            groups.append({})
            held = largest = 0
        groups[-1][name] = training
        held, largest = held + own, max(largest, step)
    return groups


class Seconds(NamedTuple):
    """About how long the parts of a sweep take.

    Args:
        reading: Activations, to train on and to evaluate on.
        steps: Training steps.
        evaluation: Evaluating SAEs on activations that are read.
    """

    reading: float
    steps: float
    evaluation: float


def measured_seconds(
    trainings: Mapping[str, SAETraining], passes: int, n_saes: int, sources: Sources, sweep: Sweep
) -> Seconds:
    """About how long a sweep takes, from a short measurement of each kind of work.

    Args:
        trainings: Those that are still to be done.
        passes: How often their activations are read: one for each group.
        n_saes: How many SAEs are evaluated, with those that are not trained.
        sources: What is read.
        sweep: The config.
    """
    of_kind: dict[str, tuple[float, float]] = {}
    kinds = {name: _kind(training) for name, training in trainings.items()}
    for name, kind in kinds.items():
        if kind not in of_kind:
            of_kind[kind] = _seconds_of(trainings[name])
    steps = sum(t.steps * of_kind[kinds[name]][0] for name, t in trainings.items())
    tokens = max((t.steps * t.batch_size for t in trainings.values()), default=0)
    heldout, hooks = sources.heldout, sorted({t.hook_name for t in trainings.values()})
    reading = 0.0
    if hooks:
        of_a_token = _seconds_of_reading(sources.training, hooks, sweep.measure.batch_size_prompts)
        reading = (passes * tokens + heldout.n_tokens) * of_a_token
    forward = sum(of_kind[kind][1] for kind in kinds.values()) / max(len(kinds), 1)
    evaluation = n_saes * heldout.n_tokens * forward
    if sweep.measure.core and heldout.has_model:
        core = min(sweep.measure.core_tokens, heldout.n_tokens)
        evaluation += n_saes * _PASSES * core * _seconds_of_model(heldout, sweep)
    return Seconds(reading, steps, evaluation)


def _kind(training: SAETraining) -> str:
    """Settings that differ in a coefficient take as long as each other."""
    sae = training.sae
    words = (type(sae).__name__, sae.d_in, sae.d_sae, training.batch_size, getattr(sae, "k", ""))
    return " ".join(map(str, words))


def _seconds_of(training: SAETraining) -> tuple[float, float]:
    """Of a training step, and of evaluating one token."""
    cfg: dict[str, Any] = {**training.sae.to_dict(), "normalize_activations": "none"}
    with torch.random.fork_rng(devices=[]):
        sae = TrainingSAE.from_dict({**cfg, "device": training.trainer.device})
        x = torch.randn(training.batch_size, training.sae.d_in, device=training.trainer.device)
        cfg_of_trainer = replace(training.trainer, lr_end=training.trainer.lr)
        trainer: Any = SAETrainer(cfg_of_trainer, sae, data_provider=iter(()))
        step = _median_seconds(lambda: trainer.step(x), x)
        with torch.no_grad():
            forward = _median_seconds(lambda: sae.decode(sae.encode(x)), x)
    return step, forward / len(x)


def _median_seconds(action: Callable[[], Any], x: torch.Tensor) -> float:
    times: list[float] = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        action()
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one compiles


def _seconds_of_reading(source: Activations, hooks: Sequence[str], prompts: int) -> float:
    """Of one token, from one forward pass of a model or some samples."""
    sequence = source.places["sequence"]
    n = min(max(1024, prompts * int((sequence == sequence.iloc[0]).sum())), source.n_tokens)
    started = time.perf_counter()
    found = source.read(hooks, 0, n)
    for x in found.values():
        x[:1].sum().item()  # waits for a GPU
    return (time.perf_counter() - started) / n


def _seconds_of_model(source: Activations, sweep: Sweep) -> float:
    """Of one token, to the logits."""
    table, model = source.sequences, source.model
    assert model is not None  # the caller has asked
    size = int(table["position"].max()) + 1
    prompts = sweep.measure.batch_size_prompts
    tokens = torch.tensor(table["token_id"].to_numpy()[: prompts * size], dtype=torch.long)
    tokens = tokens.view(-1, size).to(device_of(model))
    started = time.perf_counter()
    with known_state(model):
        model(tokens, return_type="logits")[:1, :1].sum().item()
    return (time.perf_counter() - started) / tokens.numel()
