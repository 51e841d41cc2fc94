"""Why the error of top-AFA rises again on SmolLM2, one thing at a time: python benchmarks/drift.py

The paper's settings at a batch of 1,024 (Adam 3e-4, betas (0.9, 0.99), coefficient 1/32), and each
of the suspects changed alone: SAELens's clipping of the gradient, beta2, beta1, the learning rate,
the losses. About two minutes on one thread for each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from unittest.mock import patch

import torch
from measuring import machine, write
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from torch import Tensor, nn

from sae_afa_plugin import TopAFATrainingSAE, TopAFATrainingSAEConfig
from sae_afa_plugin.sweep.reader import load_sweep
from sae_afa_plugin.sweep.sources import sources_of_sweep

BATCH = 1024
_clip = nn.utils.clip_grad_norm_

# what differs in the trainer, in the SAE, and the norm at which gradients are clipped
VARIANTS: dict[str, tuple[dict[str, float], dict[str, float], float]] = {
    "the paper's settings": ({}, {}, 1.0),
    "no clipping": ({}, {}, float("inf")),
    "beta2 .999": ({"adam_beta2": 0.999}, {}, 1.0),
    "beta1 0": ({"adam_beta1": 0.0}, {}, 1.0),
    "learning rate 1e-4": ({"lr": 1e-4}, {}, 1.0),
    "no AFA loss": ({}, {"afa_coefficient": 0.0}, 1.0),
    "no auxiliary loss": ({}, {"aux_loss_coefficient": 0.0}, 1.0),
    "AFA loss eight times": ({}, {"afa_coefficient": 1 / 4}, 1.0),
}


def trained(name: str, x: Tensor, steps: int, every: int) -> list[str]:
    """Cells of the table: L0, the smallest L0 of a token and NMSE, every so many steps."""
    trainer_fields, sae_fields, limit = VARIANTS[name]
    torch.manual_seed(42)
    cfg = TopAFATrainingSAEConfig(
        **{"d_in": x.shape[1], "d_sae": 2304, "afa_coefficient": 1 / 32, **sae_fields}  # pyright: ignore
    )
    settings = {"lr": 3e-4, "adam_beta1": 0.9, "adam_beta2": 0.99, **trainer_fields}
    trainer = SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=steps * BATCH,
            device="cpu",
            autocast=False,
            lr_end=settings["lr"],
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=BATCH,
            dead_feature_window=100,
            feature_sampling_window=10**9,
            logger=LoggingConfig(log_to_wandb=False),
            **settings,
        ),
        TopAFATrainingSAE(cfg),
        iter([]),
    )
    cells: list[str] = []

    def clip(parameters: object, max_norm: float) -> Tensor:
        return _clip(parameters, limit)  # pyright: ignore

    with patch.object(nn.utils, "clip_grad_norm_", clip):
        for step in range(1, steps + 1):
            trainer.sae.train()
            start = (step - 1) * BATCH % (len(x) - BATCH + 1)
            output = trainer.step(x[start : start + BATCH].float())
            trainer.n_training_steps += 1
            if step % every == 0:
                l0, least, nmse = (
                    float(output.metrics[key]())  # pyright: ignore
                    for key in ("mean_l0", "min_l0", "nmse")
                )
                cells.append(f"{l0:.0f} ({least:.0f}), {nmse:.3f}")
    return cells


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
    n = min(args.steps * BATCH, source.n_tokens)
    x = torch.cat(
        [source.read([hook], i, min(i + 8192, n))[hook].half() for i in range(0, n, 8192)]
    )
    x = x[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    every = max(1, args.steps // 4)
    steps = range(every, args.steps + 1, every)
    lines = [
        f"SmolLM2-135M, {hook}, {n:,} tokens, {time.strftime('%Y-%m-%d')}, {machine()}.",
        "L0 (that of the token with fewest), NMSE of the batch.",
        "",
        "| | " + " | ".join(f"step {step}" for step in steps) + " |",
        "|---" * (1 + len(steps)) + "|",
    ]
    for name in args.only:
        lines.append(f"| {name} | " + " | ".join(trained(name, x, args.steps, every)) + " |")
        write(args.out / "drift.md", lines)


if __name__ == "__main__":
    main()
