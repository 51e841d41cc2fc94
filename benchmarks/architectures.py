"""Top-AFA beside TopK and BatchTopK on SmolLM2-135M: python benchmarks/architectures.py.

First: top-AFA at two coefficients, TopK and BatchTopK at k = 32, 64, 128.
Then, on the same tokens: TopK and BatchTopK at the L0 that each top-AFA SAE settled at.
All are trained on the same batches and scored on held-out tokens. Leaves the SAEs, their logs and
architectures.md in the output folder; interrupted and started again, it goes on where it was.

On 2 cores this takes about half an hour. ``make bench`` installs what SmolLM2 needs.
"""

from __future__ import annotations

import argparse
import logging
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from sae_lens import TrainingSAEConfig

from sae_afa_plugin import TopAFATrainingSAEConfig
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.activations.tokens import tokenize
from sae_afa_plugin.demo import DEMOS
from sae_afa_plugin.training.comparison import topk_pair, train_and_evaluate

COEFFICIENTS = {"1/32": 1 / 32, "1/128": 1 / 128}
KS = (32, 64, 128)


def at_k(d_in: int, d_sae: int, k: int) -> dict[str, TrainingSAEConfig]:
    topk, batchtopk = topk_pair(d_in, d_sae, k)
    return {f"topk-{k}": topk, f"batchtopk-{k}": batchtopk}


def markdown(summary: pd.DataFrame) -> str:
    lines = [
        "| SAE | L0 | NMSE | CE recovered | norm ratio | dead | s / step |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {s.l0_mean:.1f} | {s.nmse_mean:.4f} | {s.core_ce_loss_score:.4f} "
        f"| {s.norm_ratio_mean:.3f} | {s.dead_features} | {s.seconds_per_step:.3f} |"
        for name, s in summary.sort_values("l0_mean").iterrows()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(DEMOS), default="smollm2")
    parser.add_argument("--tokens", type=int, default=320 * 1024)
    parser.add_argument("--d-sae", type=int, default=None, help="default: the demo's")
    parser.add_argument("--heldout", type=int, default=30_000)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=Path("output/architectures"))
    args = parser.parse_args()
    logging.getLogger("sae_lens").setLevel(logging.ERROR)

    demo = DEMOS[args.model]
    d_in, d_sae = demo.d_in, args.d_sae or demo.d_sae
    setup = replace(
        demo.setup, training_tokens=args.tokens, heldout_tokens=args.heldout, lr=args.lr
    )
    model = demo.load()
    texts = {split: standard_library_texts(split) for split in ("train", "heldout")}
    tokens = {split: tokenize(model, texts[split], setup.context_size) for split in texts}

    def run(saes: dict[str, TrainingSAEConfig], folder: str) -> pd.DataFrame:
        return train_and_evaluate(
            model,
            demo.model_name,
            saes,
            tokens["train"],
            tokens["heldout"],
            setup,
            args.out / folder,
        ).summary

    first: dict[str, TrainingSAEConfig] = {
        f"topafa-{name.replace('/', '-')}": TopAFATrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, afa_coefficient=coefficient
        )
        for name, coefficient in COEFFICIENTS.items()
    }
    for k in KS:
        first.update(at_k(d_in, d_sae, k))
    summary = run(first, "first")
    second: dict[str, TrainingSAEConfig] = {}
    for l0 in summary.loc[summary["architecture"] == "topafa", "l0_mean"]:
        second.update(at_k(d_in, d_sae, round(l0)))
    summary = pd.concat([summary, run(second, "second")])

    report = (
        f"{demo.model_name}, {setup.hook_name}, d_in {d_in}, d_sae {d_sae}, "
        f"{setup.training_tokens:,} tokens, batch {setup.batch_size}, lr {setup.lr:g}, "
        f"seed {setup.seed}; {setup.heldout_tokens:,} held-out tokens, CE on {setup.ce_tokens:,}\n"
        f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {version('torch')}, sae-lens {version('sae-lens')}\n\n"
        f"{markdown(summary)}\n"
    )
    (args.out / "architectures.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
