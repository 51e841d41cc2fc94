"""SAEs beside the dictionary that labels make: python benchmarks/supervised.py.

Trains the SAEs of the demo (top-AFA, and TopK and BatchTopK at about its L0) and a TopK at 16 on
the embedded model; beside them stand two of them untrained. Each is compared with supervised
dictionaries on two tasks, agreement and brackets. With --ioi, untrained SAEs alone, on SmolLM2 and
the task of the paper. Leaves the SAEs and supervised.md in the output folder; interrupted and
started again, it trains on where it was. On 2 busy cores it took 15 minutes.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from measuring import machine, write
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from sae_afa_plugin import TopAFATrainingSAEConfig, evaluate_saes
from sae_afa_plugin.activations.known_tasks import agreement_task, bracket_task, ioi_task
from sae_afa_plugin.activations.language_model import LanguageModelActivations
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.activations.tokens import Protocol, tokenize
from sae_afa_plugin.demo import DEMOS, Demo
from sae_afa_plugin.groups.supervised import Supervised
from sae_afa_plugin.training.comparison import topk_pair
from sae_afa_plugin.training.coordinator import train_saes
from sae_afa_plugin.training.run import SAETraining

EXCHANGED = (1, 2, 4, 8, 64)
COLUMNS = ("logits", "variance", *(f"control_{m}" for m in EXCHANGED), "f1")
BY_LABELS = ("logits_labels", "variance_labels", *["control_labels"] * len(EXCHANGED), "1")
HEADINGS = ("task logits", "variance", *(f"control, {m}" for m in EXCHANGED), "F1")


def markdown(summary: pd.DataFrame) -> list[str]:
    """A row for each SAE; of the supervised dictionary, which all have in common, one more."""

    def row(name: str, l0: str, of: Any, columns: tuple[str, ...]) -> str:
        cells = (
            column
            if column == "1"
            else f"{of[f'supervised_{column}']:.2f} ± {of[f'supervised_{column}_std']:.2f}"
            for column in columns
        )
        return f"| {name} | {l0} | {' | '.join(cells)} |"

    first = summary.iloc[0]
    return [
        f"| SAE | L0 | {' | '.join(HEADINGS)} |",
        "|---" * (len(HEADINGS) + 2) + "|",
        row("labels", "-", first, BY_LABELS),
        *(row(str(name), f"{of.l0_mean:.0f}", of, COLUMNS) for name, of in summary.iterrows()),
        "",
        f"Accuracy of the model {first.supervised_accuracy:.3f}; F1 of a feature that is always "
        f"active {first.supervised_f1_always:.2f}",
    ]


def trained(
    demo: Demo, model: Any, saes: Mapping[str, TrainingSAEConfig], tokens: int, lr: float, out: Path
) -> dict[str, Any]:
    setup, texts = demo.setup, standard_library_texts("train")
    batches = tokenize(model, texts, setup.context_size)
    trainer = SAETrainerConfig(
        tokens,
        setup.batch_size,
        lr=lr,
        adam_beta2=setup.adam_beta2,
        dead_feature_window=setup.dead_feature_window,
    )
    found = train_saes(
        {name: SAETraining(cfg, setup.hook_name, trainer) for name, cfg in saes.items()},
        LanguageModelActivations(
            model, batches, Protocol(batches.numel(), setup.context_size, prepend_bos=True)
        ),
        out,
        metadata={"model_name": demo.model_name},
        checkpoint_seconds=60,
    )
    return {name: one.folder for name, one in found.items() if one.reason is None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=256 * 1024)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--ioi", action="store_true")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("output/supervised"))
    args = parser.parse_args()
    logging.getLogger("sae_lens").setLevel(logging.ERROR)

    demo = DEMOS["smollm2" if args.ioi else "embedded"]
    model, pair = demo.load(), partial(topk_pair, demo.d_in, demo.d_sae)
    configs: dict[str, TrainingSAEConfig] = {
        "topafa": TopAFATrainingSAEConfig(
            d_in=demo.d_in, d_sae=demo.d_sae, afa_coefficient=demo.afa_coefficient
        ),
        **dict(zip(("topk", "batchtopk"), pair(demo.k), strict=True)),
        "topk-16": pair(16)[0],
    }
    saes: dict[str, Any] = {}
    if not args.ioi:
        saes = trained(demo, model, configs, args.tokens, args.lr, args.out)
    # where the answer is known at the last token: in SmolLM2 only after layer 24
    hook = "blocks.25.hook_resid_pre" if args.ioi else demo.setup.hook_name
    for name in ("topk", "topk-16"):
        sae = TrainingSAE.from_dict(configs[name].to_dict())
        sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = hook, demo.model_name
        saes[f"{name}, untrained"] = sae
    lines = [f"{demo.model_name}, {hook}, {args.splits} splits, {machine()}"]
    tasks = (
        {"ioi": ioi_task} if args.ioi else {"agreement": agreement_task, "brackets": bracket_task}
    )
    for name, task in tasks.items():
        group = Supervised(task(model, args.prompts), n_exchanged=EXCHANGED, n_splits=args.splits)
        results = evaluate_saes(
            saes, model, "embedded", n_tokens=2000, groups=[group], coherence=False
        )
        lines += ["", f"**{name}**, {len(group.task.tokens)} prompts", ""]
        lines += markdown(results.summary)
    write(args.out / f"supervised{'-ioi' * args.ioi}.md", lines)


if __name__ == "__main__":
    main()
