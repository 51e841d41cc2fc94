"""Top-AFA beside TopK and BatchTopK on SmolLM2-135M: python benchmarks/architectures.py.

First pass of the model: top-AFA at two coefficients, TopK and BatchTopK at k = 32, 64, 128.
Second pass, on the same tokens: TopK and BatchTopK at the L0 that each top-AFA SAE settled at.
All are trained by SAELens's MultiSAETrainingRunner on the same batches and scored on held-out
tokens. Leaves the SAEs, the logs and architectures.md in the output folder.

On 2 cores this takes about half an hour. It needs the extra 'smollm'.
"""

from __future__ import annotations

import argparse
import logging
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens import BatchTopKTrainingSAEConfig, TopKTrainingSAEConfig, TrainingSAEConfig

from sae_afa_plugin import TopAFATrainingSAEConfig
from sae_afa_plugin.comparison import Score, tokenize, train_and_score
from sae_afa_plugin.demo.run import DEMOS, trained_like_topafa
from sae_afa_plugin.demo.text import standard_library_texts

COEFFICIENTS = {"1/32": 1 / 32, "1/128": 1 / 128}
KS = (32, 64, 128)


def topk_pair(d_in: int, d_sae: int, k: int) -> dict[str, TrainingSAEConfig]:
    return {
        f"topk-{k}": trained_like_topafa(TopKTrainingSAEConfig, d_in, d_sae, k),
        f"batchtopk-{k}": trained_like_topafa(
            BatchTopKTrainingSAEConfig, d_in, d_sae, k, topk_threshold_lr=0.05
        ),
    }


def markdown(scores: list[Score]) -> str:
    lines = [
        "| SAE | L0 | NMSE | CE recovered | norm ratio | dead | s / step |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.name} | {s.l0:.1f} | {s.nmse:.4f} | {s.ce_recovered:.4f} | {s.norm_ratio:.3f} "
        f"| {s.dead_features} | {s.seconds_per_step:.3f} |"
        for s in sorted(scores, key=lambda s: s.l0)
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

    def run(saes: dict[str, TrainingSAEConfig], folder: str) -> list[Score]:
        return train_and_score(
            model,
            demo.model_name,
            saes,
            tokens["train"],
            tokens["heldout"],
            setup,
            args.out / folder,
        )

    first: dict[str, TrainingSAEConfig] = {
        f"topafa-{name.replace('/', '-')}": TopAFATrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, afa_coefficient=coefficient
        )
        for name, coefficient in COEFFICIENTS.items()
    }
    for k in KS:
        first.update(topk_pair(d_in, d_sae, k))
    scores = run(first, "first")
    second: dict[str, TrainingSAEConfig] = {}
    for score in scores:
        if score.architecture == "topafa":
            second.update(topk_pair(d_in, d_sae, round(score.l0)))
    scores += run(second, "second")

    report = (
        f"{demo.model_name}, {setup.hook_name}, d_in {d_in}, d_sae {d_sae}, "
        f"{setup.training_tokens:,} tokens, batch {setup.batch_size}, lr {setup.lr:g}, "
        f"seed {setup.seed}; {setup.heldout_tokens:,} held-out tokens, CE on {setup.ce_tokens:,}\n"
        f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {version('torch')}, sae-lens {version('sae-lens')}\n\n"
        f"{markdown(scores)}\n"
    )
    (args.out / "architectures.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
