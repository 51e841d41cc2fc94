"""Train several SAEs on one language model and compare them on held-out tokens.

What ``sae-afa demo`` and ``benchmarks/architectures.py`` have in common. What is scored is the
saved inference SAE, as a user would load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import BatchTopKTrainingSAEConfig, TopKTrainingSAEConfig, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from sae_afa_plugin import limits
from sae_afa_plugin.activations.hooks import device_of
from sae_afa_plugin.activations.language_model import LanguageModelActivations
from sae_afa_plugin.activations.tokens import Protocol
from sae_afa_plugin.evaluation import evaluate_saes
from sae_afa_plugin.files import user_path
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.sources import Excluded
from sae_afa_plugin.training.coordinator import train_saes
from sae_afa_plugin.training.run import SAETraining
from sae_afa_plugin.training.stream import default_block

EVALUATION_FOLDER = "evaluation"


@dataclass(frozen=True)
class Comparison:
    """What all SAEs of one comparison share.

    Args:
        hook_name: Where activations are read.
        training_tokens: Tokens that each SAE sees.
        heldout_tokens: Tokens that L0, NMSE, norms and dead features are measured on.
        ce_tokens: Tokens that the cross entropy is measured on (three passes of the model).
        context_size: Tokens in one sequence.
        batch_size: Tokens in one training step.
        lr: Learning rate of Adam.
        adam_beta2: Second moment decay; the paper uses 0.99.
        dead_feature_window: A feature is dead after so many silent steps. 20 batches of 1,024 are
            the tokens that the paper takes.
        seed: For the initial weights and the order of tokens.
        block_tokens: Tokens that are mixed at once, a multiple of the batch; None: about 65,536,
            or all where there are fewer.
        checkpoint_seconds: A kill costs about this much.
    """

    hook_name: str
    training_tokens: int
    heldout_tokens: int = 20_000
    ce_tokens: int = 8_192
    context_size: int = 128
    batch_size: int = 1024
    lr: float = 3e-4
    adam_beta2: float = 0.99
    dead_feature_window: int = 20
    seed: int = 42
    block_tokens: int | None = None
    checkpoint_seconds: float = 10.0

    def __post_init__(self) -> None:
        limits.text(self, "hook_name")
        limits.whole(
            self,
            *("training_tokens", "heldout_tokens", "ce_tokens", "context_size", "batch_size"),
            at_least=1,
        )
        limits.whole(self, "dead_feature_window", "seed")
        limits.whole(self, "block_tokens", at_least=1, none=True)
        limits.real(self, "lr", more_than=0)
        limits.real(self, "adam_beta2", below=1)
        limits.real(self, "checkpoint_seconds")


def train_and_evaluate(
    model: Any,
    model_name: str,
    saes: Mapping[str, TrainingSAEConfig],
    training_tokens: Tensor,
    heldout_tokens: Tensor,
    setup: Comparison,
    out: Path,
) -> AFAResults:
    """Train SAEs on the same activations, save them in ``out`` and evaluate what was saved.

    Interrupted and called again, it goes on where it was; with more SAEs, only those are trained.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge`` with a tokenizer.
        model_name: What the saved SAEs remember as their model.
        saes: Training configs by name; each name becomes a folder in ``out``.
        training_tokens: int64 ``[n, context_size]``, used again from the start when they run out.
        heldout_tokens: int64 ``[m, context_size]``.
        setup: What the SAEs share.
        out: Folder for the SAEs, with the log of each, and for ``evaluation``.

    Returns:
        The AFA metric and SAELens's own metrics of each SAE, with ``training_seconds`` (of this SAE
        alone, without the language model) and ``seconds_per_step`` in the summary. SAEs that were
        left behind are in ``metadata["refused"]`` with the reason.

    Raises:
        ValueError: If a folder in ``out`` holds another training, or no SAE is left.
    """
    out = user_path(out)
    if EVALUATION_FOLDER in saes:
        raise ValueError(f"the folder {EVALUATION_FOLDER!r} is for the results: use another name")
    steps = setup.training_tokens // setup.batch_size
    trainer = SAETrainerConfig(
        total_training_samples=steps * setup.batch_size,
        train_batch_size_samples=setup.batch_size,
        lr=setup.lr,
        adam_beta2=setup.adam_beta2,
        dead_feature_window=setup.dead_feature_window,
        device=str(device_of(model)),
    )
    trained = train_saes(
        {
            name: SAETraining(cfg, setup.hook_name, trainer, setup.seed)
            for name, cfg in saes.items()
        },
        LanguageModelActivations(
            model,
            training_tokens,
            Protocol(training_tokens.numel(), setup.context_size, prepend_bos=True),
        ),
        out,
        metadata={
            "model_name": model_name,
            "model_class_name": "HookedTransformer",
            "model_from_pretrained_kwargs": {},
            "context_size": setup.context_size,
            "prepend_bos": True,
            "exclude_special_tokens": True,
        },
        # a short training need not read a whole block
        block_tokens=setup.block_tokens
        or min(default_block(setup.batch_size), trainer.total_training_samples),
        checkpoint_seconds=setup.checkpoint_seconds,
    )
    to_evaluate: dict[str, Any] = {
        name: one.folder if one.reason is None else Excluded(one.reason)
        for name, one in trained.items()
    }
    results = evaluate_saes(
        to_evaluate,
        model,
        heldout_tokens,
        out=out / EVALUATION_FOLDER,
        n_tokens=setup.heldout_tokens,
        core=True,
        core_tokens=setup.ce_tokens,
    )
    names = [str(name) for name in results.summary.index if name in saes]
    for column, values in {
        "training_seconds": {name: trained[name].seconds for name in names},
        "seconds_per_step": {name: trained[name].seconds / trained[name].step for name in names},
    }.items():
        results.summary[column] = results.summary.index.map(values)
    results.save(out / EVALUATION_FOLDER)
    return results


def topk_pair(d_in: int, d_sae: int, k: int) -> tuple[TrainingSAEConfig, TrainingSAEConfig]:
    """TopK and BatchTopK on the same inputs and with the same initial decoder norm as top-AFA."""
    shared: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "k": k,
        "normalize_activations": "layer_norm",
        "decoder_init_norm": 1.0,
    }
    # the threshold starts at 0, and the default rate would not forget that in a short run
    return (
        TopKTrainingSAEConfig(**shared),
        BatchTopKTrainingSAEConfig(**shared, topk_threshold_lr=0.05),
    )
