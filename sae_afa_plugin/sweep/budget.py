"""What a sweep takes: memory of SAEs in training, groups that fit, time from a short measurement."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE

from sae_afa_plugin.training.run import SAETraining

_STEPS = 3  # that are measured, after one that is not
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


def seconds_of_steps(trainings: Iterable[SAETraining]) -> float:
    """About how long training takes, without reading activations: each kind of SAE is tried.

    Args:
        trainings: All of them.
    """
    of_kind: dict[str, float] = {}
    total = 0.0
    for training in trainings:
        # settings that differ in a coefficient take as long as each other
        kind = f"{type(training.sae).__name__} {training.sae.d_in} {training.sae.d_sae} "
        kind += f"{training.batch_size} {getattr(training.sae, 'k', '')}"
        if kind not in of_kind:
            of_kind[kind] = _seconds_of_a_step(training)
        total += training.steps * of_kind[kind]
    return total


def _seconds_of_a_step(training: SAETraining) -> float:
    cfg: dict[str, Any] = {**training.sae.to_dict(), "normalize_activations": "none"}
    with torch.random.fork_rng(devices=[]):
        sae = TrainingSAE.from_dict({**cfg, "device": training.trainer.device})
        x = torch.randn(training.batch_size, training.sae.d_in, device=training.trainer.device)
        cfg_of_trainer = replace(training.trainer, lr_end=training.trainer.lr)
        trainer: Any = SAETrainer(cfg_of_trainer, sae, data_provider=iter(()))
        trainer.step(x)
        started = time.perf_counter()
        for _ in range(_STEPS):
            trainer.step(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    return (time.perf_counter() - started) / _STEPS
