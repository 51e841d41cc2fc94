"""Train several SAEs on one pass of a language model and compare them on held-out tokens.

What ``sae-afa demo`` and ``benchmarks/architectures.py`` have in common. Training is SAELens's
``MultiSAETrainingRunner``; what is scored is the saved inference SAE, as a user would load it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.table import Table
from sae_lens import SAE, MultiSAETrainingRunnerConfig, TrainingSAEConfig, run_evals
from sae_lens.config import LoggingConfig
from sae_lens.evals import EvalConfig
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm

from sae_afa_plugin.metrics import norm_along_last
from sae_afa_plugin.training import LoggedMultiTrainingRunner

_SCORED_AT_ONCE = 1024  # tokens; bounds the [tokens, d_sae] matrices
_PROMPTS_AT_ONCE = 16


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


@dataclass(frozen=True)
class Score:
    """One SAE on held-out tokens, special tokens left out.

    Args:
        name: The name it was trained under.
        architecture: The architecture it was trained as.
        l0: Mean number of active features.
        nmse: Mean of ``||z - z_hat||^2 / ||z||^2``, z the normalised input.
        ce_recovered: Share of the model's loss that is kept when the reconstruction replaces
            the activation: 1 is the original, 0 is an activation of zeros.
        norm_ratio: Mean of ``||f|| / ||z||`` with features on the unit-norm dictionary.
        dead_features: Features that are active on none of the tokens.
        seconds: Training time of this SAE alone, without the language model.
        seconds_per_step: The same for one step.
    """

    name: str
    architecture: str
    l0: float
    nmse: float
    ce_recovered: float
    norm_ratio: float
    dead_features: int
    seconds: float
    seconds_per_step: float


def tokenize(model: Any, texts: Iterable[str], context_size: int) -> Tensor:
    """Texts in a row, cut into sequences: int64 ``[n, context_size]``, each led by BOS.

    Args:
        model: Anything with TransformerLens's ``to_tokens`` and ``tokenizer``.
        texts: Documents; the BOS token separates them.
        context_size: Tokens in one sequence.

    Raises:
        ValueError: If the texts do not fill one sequence.
    """
    bos = model.tokenizer.bos_token_id
    tokens = (
        model.to_tokens(text, prepend_bos=False, truncate=False, move_to_device=False)[0]
        for text in texts
    )
    rows = list(
        concat_and_batch_sequences(
            tokens_iterator=tokens,
            context_size=context_size,
            begin_batch_token_id=bos,
            sequence_separator_token_id=bos,
        )
    )
    if not rows:
        raise ValueError(
            f"the texts do not fill one sequence of {context_size} tokens: bring more text or "
            "use a smaller context_size"
        )
    return torch.stack(rows)


def train_and_score(
    model: Any,
    model_name: str,
    saes: Mapping[str, TrainingSAEConfig],
    training_tokens: Tensor,
    heldout_tokens: Tensor,
    setup: Comparison,
    out: Path,
) -> list[Score]:
    """Train SAEs on one pass of the model, save them in ``out`` and score what was saved.

    Args:
        model: A ``HookedTransformer`` or ``TransformerBridge`` with a tokenizer.
        model_name: What the saved SAEs remember as their model.
        saes: Training configs by name; each name becomes a folder in ``out``.
        training_tokens: int64 ``[n, context_size]``, used again from the start when they run out.
        heldout_tokens: int64 ``[m, context_size]``.
        setup: What the SAEs share.
        out: Folder for SAEs, ``training_log.jsonl`` and ``scores.json``.
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
        override_dataset=_as_stream(training_tokens),
        override_model=model,
    )
    runner.run()

    d_in = next(iter(saes.values())).d_in
    activations = _held_out_activations(model, heldout_tokens, setup, d_in)
    scores = [
        _score(
            name,
            cfg,
            SAE.load_from_disk(out / name),
            model,
            activations,
            # a new store for each, so that all are scored on the same tokens
            _store(model, heldout_tokens, setup, d_in),
            setup,
            runner,
        )
        for name, cfg in tqdm(saes.items(), desc="Scoring on held-out tokens")
    ]
    (out / "scores.json").write_text(
        json.dumps(
            {"setup": asdict(setup), "scores": [asdict(score) for score in scores]}, indent=2
        )
        + "\n",
        encoding="utf-8",
    )
    return scores


def score_table(scores: Iterable[Score], title: str) -> Table:
    """The scores as a table for the terminal, in their order."""
    table = Table(title=title, title_justify="left")
    table.add_column("SAE")
    for column in ("L0", "NMSE", "CE recovered", "||f||/||z||", "dead", "seconds"):
        table.add_column(column, justify="right")
    for score in scores:
        table.add_row(
            score.name,
            f"{score.l0:.1f}",
            f"{score.nmse:.4f}",
            f"{score.ce_recovered:.3f}",
            f"{score.norm_ratio:.3f}",
            str(score.dead_features),
            f"{score.seconds:.1f}",
        )
    return table


def _as_stream(tokens: Tensor) -> Any:
    return Dataset.from_dict({"tokens": tokens.tolist()}).to_iterable_dataset()


def _store(model: Any, tokens: Tensor, setup: Comparison, d_in: int) -> ActivationsStore:
    """A store that yields these tokens from their start."""
    return ActivationsStore.from_config_multi_hook(
        model=model,
        dataset=_as_stream(tokens),
        hook_names=[setup.hook_name],
        hook_d_ins={setup.hook_name: d_in},
        context_size=setup.context_size,
        store_batch_size_prompts=_PROMPTS_AT_ONCE,
        exclude_special_tokens=torch.tensor(get_special_token_ids(model.tokenizer)),
    )


def _held_out_activations(model: Any, tokens: Tensor, setup: Comparison, d_in: int) -> Tensor:
    """Activations of the first held-out tokens ``[n, d_in]``, special tokens left out."""
    store = _store(model, tokens, setup, d_in)
    batches: list[Tensor] = []
    for _ in range(len(tokens) // _PROMPTS_AT_ONCE):
        batches.append(store.get_filtered_llm_batch())
        if sum(map(len, batches)) >= setup.heldout_tokens:
            return torch.cat(batches)[: setup.heldout_tokens]
    raise ValueError(
        f"{len(tokens)} held-out sequences do not give heldout_tokens={setup.heldout_tokens}: "
        "bring more text or ask for fewer"
    )


@torch.no_grad()
def _score(
    name: str,
    cfg: TrainingSAEConfig,
    sae: SAE[Any],
    model: Any,
    activations: Tensor,
    store: ActivationsStore,
    setup: Comparison,
    runner: LoggedMultiTrainingRunner,
) -> Score:
    decoder_norm = norm_along_last(sae.W_dec)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    l0, nmse, ratio = 0.0, 0.0, 0.0
    for x in activations.split(_SCORED_AT_ONCE):
        z = sae.run_time_activation_norm_fn_in(x)
        f = sae.encode(x)
        error = z - (f @ sae.W_dec + sae.b_dec)
        nmse += (error.square().sum(-1) / z.square().sum(-1)).sum().item()
        l0 += float(f.count_nonzero())
        ratio += (norm_along_last(f * decoder_norm) / norm_along_last(z)).sum().item()
        fired |= (f != 0).any(0)
    n = len(activations)

    metrics, _ = run_evals(
        sae=sae,
        activation_store=store,
        model=model,
        activation_scaler=ActivationScaler(),
        eval_config=EvalConfig(
            compute_ce_loss=True,
            n_eval_reconstruction_batches=max(
                1, setup.ce_tokens // (_PROMPTS_AT_ONCE * setup.context_size)
            ),
        ),
    )
    return Score(
        name=name,
        architecture=cfg.architecture(),
        l0=l0 / n,
        nmse=nmse / n,
        ce_recovered=metrics["model_performance_preservation"]["ce_loss_score"],
        norm_ratio=ratio / n,
        dead_features=int((~fired).sum()),
        seconds=runner.log.seconds[name],
        seconds_per_step=runner.log.seconds[name] / runner.log.steps[name],
    )
