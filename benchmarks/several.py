"""Eight SAEs at once, or more: python benchmarks/several.py

The project's coordinator beside SAELens's MultiSAETrainer on the same activations in memory, taking
turns: half of the SAEs are of top-AFA and half of TopK. Times are of the whole training, with the
gathering of batches and what is saved at the end; peaks of memory count everything from the SAEs on
(weights, gradients, Adam's state, activations of a step). The trainer mixes all tokens at once in
memory, the coordinator half of what it trains on. Linux only.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measuring import machine, peak_bytes, write
from sae_lens import TopKTrainingSAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

from sae_afa_plugin import TopAFATrainingSAEConfig
from sae_afa_plugin.activations.tensors import TensorActivations
from sae_afa_plugin.training.coordinator import train_saes
from sae_afa_plugin.training.run import SAETraining


def configs(n_saes: int, d_in: int, d_sae: int) -> dict[str, TrainingSAEConfig]:
    found: dict[str, TrainingSAEConfig] = {}
    for n in range(n_saes // 2):
        found[f"topafa-{n}"] = TopAFATrainingSAEConfig(
            d_in=d_in, d_sae=d_sae, normalize_activations="none"
        )
        found[f"topk-{n}"] = TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=64)
    return found


def coordinator(x: Tensor, n_saes: int, d_sae: int, trainer: SAETrainerConfig) -> None:
    with TemporaryDirectory() as folder:
        trained = train_saes(
            {
                name: SAETraining(cfg, "hook", trainer, seed)
                for seed, (name, cfg) in enumerate(configs(n_saes, x.shape[1], d_sae).items())
            },
            TensorActivations({"hook": x}, settings={}),
            folder,
            # two blocks at least, or each SAE would be finished and gone before the next begins
            block_tokens=trainer.total_training_samples // 2,
            progress=False,
        )
    assert all(one.reason is None for one in trained.values())


def saelens(x: Tensor, n_saes: int, d_sae: int, trainer: SAETrainerConfig) -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        while True:
            for rows in torch.randperm(len(x)).split(trainer.train_batch_size_samples):
                yield {"hook": x[rows]}

    of_each = configs(n_saes, x.shape[1], d_sae)
    saes = {name: TrainingSAE.from_dict(cfg.to_dict()) for name, cfg in of_each.items()}
    MultiSAETrainer(trainer, saes, dict.fromkeys(saes, "hook"), batches()).fit()
    with TemporaryDirectory() as folder:
        for name, sae in saes.items():
            sae.save_inference_model(Path(folder, name))


WAYS = {"coordinator": coordinator, "MultiSAETrainer": saelens}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saes", type=int, default=8)
    parser.add_argument("--way", choices=[*WAYS], action="append", help="default: both")
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("output/performance"))
    args = parser.parse_args()
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    trainer = SAETrainerConfig(args.steps * args.batch, args.batch, lr_end=3e-5)
    x = torch.randn(8 * args.batch, args.d_in)
    ways = args.way or [*WAYS]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}

    def run(name: str) -> None:
        started = time.perf_counter()
        WAYS[name](x, args.saes, args.d_sae, trainer)
        seconds[name].append(time.perf_counter() - started)

    coordinator(x, 2, 512, SAETrainerConfig(2 * args.batch, args.batch))  # compiles, loads
    for _ in range(args.rounds):
        for name in ways:
            peaks[name].append(peak_bytes(lambda n=name: run(n)) / 2**20)
            print(f"{name}: {seconds[name][-1]:.1f} s, {peaks[name][-1]:.0f} MiB", flush=True)
    lines = [
        f"{args.saes} SAEs, batch {args.batch}, d_in {args.d_in}, d_sae {args.d_sae:,}, {args.steps} "
        f"steps, float32, {machine()}; medians of {args.rounds} runs",
        "",
        "| | s / step of all | peak, MiB |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {statistics.median(seconds[name]) / args.steps:.2f} "
        f"| {statistics.median(peaks[name]):.0f} |"
        for name in ways
    ]
    write(args.out / "several.md", lines)


if __name__ == "__main__":
    main()
