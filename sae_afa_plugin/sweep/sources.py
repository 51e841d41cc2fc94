"""Where a sweep reads: tokens to train on, and tokens that no training sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.activations.embedded import EMBEDDED_NAME, SMOLLM2_NAME, load_smollm2
from sae_afa_plugin.activations.language_model import LanguageModelActivations
from sae_afa_plugin.activations.models import load_language_model, shared_model
from sae_afa_plugin.activations.recording import RecordedActivations
from sae_afa_plugin.activations.synthetic import (
    HIERARCHY_WORLD,
    SMALL_WORLD,
    SYNTH_SAE_BENCH_16K,
    SyntheticActivations,
    built_model,
)
from sae_afa_plugin.sweep.config import Sweep, Text

WORLDS = {"small": SMALL_WORLD, "hierarchy": HIERARCHY_WORLD, "16k": SYNTH_SAE_BENCH_16K}
_HELDOUT_TOKENS = 20_000


@dataclass(frozen=True)
class Sources:
    """What SAEs are trained on and evaluated on.

    Args:
        training: The activations to train on.
        heldout: Those to evaluate on.
        metadata: What saved SAEs remember of how they were trained.
    """

    training: Activations
    heldout: Activations
    metadata: dict[str, Any]


def sources_of_sweep(sweep: Sweep, device: str, progress: bool = True) -> Sources:
    """The sources that a config names; a model is loaded once.

    Args:
        sweep: The config.
        device: Where the model is loaded.
        progress: Whether to show bars while tokens are collected.
    """
    wanted = sweep.steps * sweep.batch_size
    if sweep.synthetic is not None:
        given = sweep.synthetic
        config = WORLDS.get(given.world)
        world = given.world if config is None else built_model(config)
        training = SyntheticActivations(
            world, given.n_tokens or wanted, given.seed, noise=given.noise
        )
        heldout = SyntheticActivations(
            world, given.heldout_tokens, given.seed + 1, noise=given.noise
        )
        return Sources(training, heldout, {})
    if sweep.training.recording is not None and sweep.heldout.recording is not None:
        training = RecordedActivations(sweep.training.recording)
        heldout = RecordedActivations(sweep.heldout.recording, sweep.model, device)
        return Sources(training, heldout, _metadata(sweep, training.settings))
    model = _model(sweep, device)

    def read(text: Text, n_tokens: int) -> LanguageModelActivations:
        return LanguageModelActivations(
            model,
            text.dataset or "",
            text.protocol(n_tokens),
            dataset_config=text.dataset_config,
            split=text.split,
            batch_size_prompts=sweep.measure.batch_size_prompts,
            progress=progress,
        )

    training = read(sweep.training, wanted)
    return Sources(
        training, read(sweep.heldout, _HELDOUT_TOKENS), _metadata(sweep, training.settings)
    )


def _model(sweep: Sweep, device: str) -> Any:
    assert sweep.model is not None
    if sweep.model == "smollm2":
        return load_smollm2(device=device)
    described = {
        "model_name": sweep.model,
        "model_from_pretrained_kwargs": dict(sweep.model_kwargs),
    }
    return load_language_model(sweep.model, shared_model({"": described}), sweep.hooks, device)


def _metadata(sweep: Sweep, settings: dict[str, Any]) -> dict[str, Any]:
    """As SAELens's runners fill it in, so that an evaluation reads the tokens as training did."""
    name = {"smollm2": SMOLLM2_NAME, None: settings.get("model")}.get(sweep.model, sweep.model)
    found = {
        "model_name": name,
        "model_class_name": None if name == EMBEDDED_NAME else "HookedTransformer",
        "model_from_pretrained_kwargs": dict(sweep.model_kwargs),
        "dataset_path": sweep.training.dataset,
    }
    known = ("context_size", "prepend_bos", "exclude_special_tokens")
    return {**found, **{key: settings[key] for key in known if key in settings}}
