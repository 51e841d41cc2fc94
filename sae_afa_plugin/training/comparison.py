"""Train several SAEs on one pass of a language model and compare them on held-out tokens.

What ``sae-afa demo`` and ``benchmarks/architectures.py`` have in common. Training is SAELens's
``MultiSAETrainingRunner``; what is scored is the saved inference SAE, as a user would load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
    TrainingSAEConfig,
)
from sae_lens.config import LoggingConfig
from torch import Tensor

from sae_afa_plugin.evaluation import evaluate_saes
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.training.runners import LoggedMultiTrainingRunner

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
        seed: For the initial weights and the mixing of activations.
    """

    hook_name: str
    training_tokens: int
    heldout_tokens: int = 20_000
    ce_tokens: int = 8_192
    context_size: int = 128
    batch_size: int = 1024
    lr: float = 3e-4
    adam_beta2: float = 0.99
    seed: int = 42


def train_and_evaluate(
    model: Any,
    model_name: str,
    saes: Mapping[str, TrainingSAEConfig],
    training_tokens: Tensor,
    heldout_tokens: Tensor,
    setup: Comparison,
    out: Path,
) -> AFAResults:
    """Train SAEs on one pass of the model, save them in ``out`` and evaluate what was saved.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge`` with a tokenizer.
        model_name: What the saved SAEs remember as their model.
        saes: Training configs by name; each name becomes a folder in ``out``.
        training_tokens: int64 ``[n, context_size]``, used again from the start when they run out.
        heldout_tokens: int64 ``[m, context_size]``.
        setup: What the SAEs share.
        out: Folder for the SAEs, ``training_log.jsonl`` and ``evaluation``, which must not hold
            another evaluation.

    Returns:
        The AFA metric and SAELens's own metrics of each SAE, with ``training_seconds`` (of this SAE
        alone, without the language model) and ``seconds_per_step`` in the summary.
    """
    torch.manual_seed(setup.seed)
    steps = setup.training_tokens // setup.batch_size
    out.mkdir(parents=True, exist_ok=True)  # before hours are spent
    runner = LoggedMultiTrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes=saes,
            hook_names=setup.hook_name,
            model_name=model_name,
            model_from_pretrained_kwargs={},
            context_size=setup.context_size,
            training_tokens=steps * setup.batch_size,
            train_batch_size_tokens=setup.batch_size,
            n_batches_in_buffer=128,
            lr=setup.lr,
            adam_beta2=setup.adam_beta2,
            # TopK's auxiliary loss refuses layer_norm, so no SAE of a comparison may have one
            dead_feature_window=steps + 1,
            exclude_special_tokens=True,
            seed=setup.seed,
            logger=LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=str(out),
        ),
        override_dataset=Dataset.from_dict(
            {"tokens": training_tokens.tolist()}
        ).to_iterable_dataset(),
        override_model=model,
    )
    runner.run()

    results = evaluate_saes(
        {name: out / name for name in saes},
        model,
        heldout_tokens,
        n_tokens=setup.heldout_tokens,
        core=True,
        core_tokens=setup.ce_tokens,
    )
    log = runner.log
    # what it was trained as: a BatchTopK SAE is saved as a JumpReLU one
    results.summary["trained_as"] = [cfg.architecture() for cfg in saes.values()]
    results.summary["training_seconds"] = [log.seconds[name] for name in saes]
    results.summary["seconds_per_step"] = [log.seconds[name] / log.steps[name] for name in saes]
    results.save(out / EVALUATION_FOLDER)
    return results


def topk_pair(d_in: int, d_sae: int, k: int) -> tuple[TrainingSAEConfig, TrainingSAEConfig]:
    """TopK and BatchTopK on the same inputs and initial decoder norm as top-AFA.

    The loss remains SAELens's: for them it is the error in the space of x, not of z, so tokens
    with a large variance count more than in the NMSE that is reported.
    """
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
