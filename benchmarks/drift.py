"""Why the error of top-AFA rises again on SmolLM2, one thing at a time: python benchmarks/drift.py

The paper's settings at a batch of 1,024 (Adam 3e-4, betas (0.9, 0.99), coefficient 1/32), and each
of the suspects changed alone: SAELens's clipping of the gradient, beta2, beta1, the learning rate,
the losses. About two minutes on one thread for each; interrupted and started again, it goes on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from unittest.mock import patch

from measuring import machine, write
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor, nn

from sae_afa_plugin import SAETraining, TopAFATrainingSAEConfig, train_saes
from sae_afa_plugin.sweep.reader import load_sweep
from sae_afa_plugin.sweep.sources import sources_of_sweep
from sae_afa_plugin.training.log import read_logs

BATCH = 1024
NO_CLIPPING = "no clipping"
_clip = nn.utils.clip_grad_norm_

# what differs in the trainer, and in the SAE
VARIANTS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "the paper's settings": ({}, {}),
    NO_CLIPPING: ({}, {}),
    "beta2 .999": ({"adam_beta2": 0.999}, {}),
    "beta1 0": ({"adam_beta1": 0.0}, {}),
    "learning rate 1e-4": ({"lr": 1e-4}, {}),
    "no AFA loss": ({}, {"afa_coefficient": 0.0}),
    "no auxiliary loss": ({}, {"aux_loss_coefficient": 0.0}),
    "AFA loss eight times": ({}, {"afa_coefficient": 1 / 4}),
}


def training(name: str, hook: str, d_in: int, steps: int, every: int) -> SAETraining:
    of_trainer, of_sae = VARIANTS[name]
    return SAETraining(
        TopAFATrainingSAEConfig(d_in=d_in, d_sae=2304, **of_sae),  # pyright: ignore
        hook,
        SAETrainerConfig(
            total_training_samples=steps * BATCH,
            train_batch_size_samples=BATCH,
            dead_feature_window=100,
            logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=every),
            **{"lr": 3e-4, "adam_beta2": 0.99, **of_trainer},  # pyright: ignore
        ),
    )


def not_clipped(parameters: object, max_norm: float) -> Tensor:
    return _clip(parameters, float("inf"))  # pyright: ignore


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("output/drift"))
    args = parser.parse_args()
    sweep = load_sweep("smollm2.yaml")
    source = sources_of_sweep(sweep, "cpu").training
    (hook,) = sweep.hooks
    d_in = source.read([hook], 0, 1)[hook].shape[-1]
    every = max(1, args.steps // 4)
    trainings = {name: training(name, hook, d_in, args.steps, every) for name in args.only}
    clipped = {name: each for name, each in trainings.items() if name != NO_CLIPPING}
    train_saes(clipped, source, args.out)
    if NO_CLIPPING in trainings:
        with patch.object(nn.utils, "clip_grad_norm_", not_clipped):
            train_saes({NO_CLIPPING: trainings[NO_CLIPPING]}, source, args.out)
    steps = range(every, args.steps + 1, every)
    lines = [
        f"SmolLM2-135M, {hook}, {source.n_tokens:,} tokens, {time.strftime('%Y-%m-%d')}, "
        f"{machine()}.",
        "L0 (that of the token with fewest), NMSE of the batch.",
        "",
        "| | " + " | ".join(f"step {step}" for step in steps) + " |",
        "|---" * (1 + len(steps)) + "|",
    ]
    for name in args.only:
        log = read_logs([args.out / name]).set_index("step")
        cells = [
            f"{row['metrics/mean_l0']:.0f} ({row['metrics/min_l0']:.0f}), {row['metrics/nmse']:.3f}"
            for _, row in log.loc[log.index.isin(steps)].iterrows()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    write(args.out / "drift.md", lines)


if __name__ == "__main__":
    main()
