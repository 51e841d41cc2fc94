"""One training step on the CPU: python benchmarks/training.py [--growth]

SAELens's own SAETrainer steps (forward, backward, clipping, Adam, bookkeeping) of top-AFA, TopK
and BatchTopK on the same batch, taking turns, beside a step as the paper's public code does it,
re-expressed from its description: the activation by argsort, gather, cumulative sum and scatter,
the Gram matrix of the dictionary in every step, decoder rows held by hand.

The encoder of top-AFA is scaled so that it keeps about 64 features, as TopK and BatchTopK do, and
the learning rate is next to zero, so that this stays so. Of sparse_topafa it is scaled until 64 are
left where nothing has a price, of constant_quality the share is set so that it takes 64. (TopK's use_sparse_activations cannot
train on the CPU: "Could not run 'aten::view' with arguments from the 'SparseCPU' backend".) Peaks
of memory count everything from the SAE on: weights, gradients, Adam's state, activations. (Numba
itself, loaded before, takes about 110 MB once in a process.)

--growth measures the step over d_sae and over the batch and draws docs/images/training-speed.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from activation import published_way
from measuring import machine, median_seconds, peak_bytes, write
from sae_lens import TrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from sae_afa_plugin import top_afa  # and registers topafa
from sae_afa_plugin.saes import sparse

D_IN, K = 768, 64
LEARNING_RATE = 1e-9


class PublishedStep(nn.Module):
    def __init__(self, d_sae: int, device: str) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(D_IN, d_sae)))
        self.W_dec = nn.Parameter(nn.functional.normalize(self.W_enc.detach().T).contiguous())
        self.b_dec = nn.Parameter(torch.zeros(D_IN))
        self.to(device)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)

    def step(self, x: Tensor) -> None:
        z = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
        centered = z - self.b_dec
        feature_acts = published_way((centered @ self.W_enc).relu(), centered.norm(dim=-1))
        loss = (feature_acts @ self.W_dec + self.b_dec - z).square().mean()
        loss = loss + (feature_acts.norm(dim=-1) - z.norm(dim=-1)).square().mean() / 32
        with torch.no_grad():
            (self.W_dec @ self.W_dec.T).fill_diagonal_(0).abs().max()
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            rows, grad = self.W_dec, self.W_dec.grad
            grad -= (grad * rows).sum(-1, keepdim=True) * rows
            rows /= rows.norm(dim=-1, keepdim=True)
        self.optimizer.step()


def saelens_step(
    architecture: str, d_sae: int, batch: Tensor, compiled: bool = False, autocast: bool = False
) -> Callable[[], object]:
    trainer = new_trainer(architecture, d_sae, batch, LEARNING_RATE, autocast)
    if architecture in ("topafa", "sparse_topafa"):
        keep_about(K, trainer.sae, batch)
    elif architecture == "constant_quality":
        explain_with(K, trainer.sae, batch)
    if compiled:
        trainer.sae.training_forward_pass = torch.compile(trainer.sae.training_forward_pass)
    return lambda: trainer.step(batch)


def new_trainer(
    architecture: str, d_sae: int, batch: Tensor, learning_rate: float, autocast: bool = False
) -> SAETrainer[Any, Any]:
    device = str(batch.device)
    sizes = {"d_in": batch.shape[1], "d_sae": d_sae, "device": device}
    options: dict[str, Any] = {"k": K} if architecture in ("topk", "batchtopk") else {}
    if architecture == "sparse_topafa":
        options = {"price": 0}
    cfg = TrainingSAEConfig.from_dict({"architecture": architecture, **sizes, **options})
    sae = get_sae_training_class(architecture)[0](cfg)
    return SAETrainer(
        cfg=SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=10**9,
            device=device,
            autocast=autocast,
            lr=learning_rate,
            lr_end=learning_rate,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=len(batch),
            dead_feature_window=10**6,
            feature_sampling_window=10**6,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(()),
    )


def keep_about(k: int, sae: Any, batch: Tensor) -> None:
    low, high = 1.0, 64.0
    original = sae.W_enc.detach().clone()
    with torch.no_grad():
        for _ in range(12):
            middle = (low * high) ** 0.5
            sae.W_enc.copy_(original * middle)
            feature_acts = sae.encode(batch[:128])
            # SAELens's layer_norm leaves the mean at the SAE until decode takes it; torch.compile
            # would trip over it
            sae.decode(feature_acts)
            l0 = (feature_acts != 0).sum(-1).float().mean()
            low, high = (middle, high) if l0 > k else (low, middle)


def explain_with(k: int, sae: Any, batch: Tensor) -> None:
    sae.W_enc.data = sae.W_dec.data.T / 2  # so that each of the largest explains something
    low, high = 0.0, 1.0
    for _ in range(12):
        sae.cfg.explained = (low + high) / 2
        with torch.no_grad():
            feature_acts = sae.encode(batch[:128])
            sae.decode(feature_acts)
        l0 = (feature_acts != 0).sum(-1).float().mean()
        low, high = (sae.cfg.explained, high) if l0 < k else (low, sae.cfg.explained)


def published_step(d_sae: int, batch: Tensor) -> Callable[[], object]:
    model = PublishedStep(d_sae, str(batch.device))
    return lambda: model.step(batch)


STEPS: dict[str, Callable[[int, Tensor], Callable[[], object]]] = {
    "as published": published_step,
    "topafa": lambda d, x: saelens_step("topafa", d, x),
    "topk": lambda d, x: saelens_step("topk", d, x),
    "batchtopk": lambda d, x: saelens_step("batchtopk", d, x),
    "sparse_topafa": lambda d, x: saelens_step("sparse_topafa", d, x),
    "constant_quality": lambda d, x: saelens_step("constant_quality", d, x),
    "topafa, compiled": lambda d, x: saelens_step("topafa", d, x, compiled=True),
    "topafa, autocast": lambda d, x: saelens_step("topafa", d, x, autocast=True),
    "topk, autocast": lambda d, x: saelens_step("topk", d, x, autocast=True),
}


def measure(
    names: list[str], d_sae: int, n_batch: int, rounds: int, steps: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of a step and peak GiB of each way, all of them once in every round."""
    torch.manual_seed(0)
    batch = torch.randn(n_batch, D_IN)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}

    def run(name: str) -> None:
        seconds[name].append(median_seconds(STEPS[name](d_sae, batch), steps))

    top_afa(torch.ones(1, 2), torch.ones(1))  # loads the compiled code
    sparse.decode(torch.zeros(1, 2), torch.ones(2, 2))
    for _ in range(rounds):
        for name in names:
            peaks[name].append(peak_bytes(lambda n=name: run(n)) / 2**30)
            print(f"{name}, {n_batch} x {d_sae}: {seconds[name][-1]:.3f} s", flush=True)
    return {name: (statistics.median(seconds[name]), max(peaks[name])) for name in names}


def growth(out: Path, rounds: int, steps: int) -> None:
    from matplotlib.figure import Figure

    # the Gram matrix of the published step: 38 GB at 98,304
    widths, batches, largest_gram = [3_072, 6_144, 12_288, 24_576, 49_152, 98_304], 1024, 24_576
    names = ["as published", "batchtopk", "topk", "topafa"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = [f"Batch {batches}, seconds a step (peak, GiB); {machine()}", ""]
    lines += ["| d_sae | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    for d_sae in widths:
        here = [name for name in names if name != "as published" or d_sae <= largest_gram]
        step = measure(here, d_sae, batches, rounds, steps)
        for name in here:
            found[name].append((d_sae, step[name][0]))
        cells = [f"{step[n][0]:.2f} ({step[n][1]:.1f})" if n in step else "" for n in names]
        lines.append(f"| {d_sae:,} | " + " | ".join(cells) + " |")
    draw(left, found, "d_sae (batch 1,024)", widths)

    sizes = [256, 512, 1024, 2048, 4096]
    lines += ["", "d_sae 12,288:", "", "| batch | " + " | ".join(names) + " |"]
    lines += ["|" + "---|" * (len(names) + 1)]
    found = {name: [] for name in names}
    for n_batch in sizes:
        step = measure(names, 12_288, n_batch, rounds, steps)
        for name in names:
            found[name].append((n_batch, step[name][0]))
        cells = [f"{step[n][0]:.2f} ({step[n][1]:.1f})" for n in names]
        lines.append(f"| {n_batch:,} | " + " | ".join(cells) + " |")
    draw(right, found, "batch (d_sae 12,288)", sizes)
    left.set_ylabel("seconds for a training step")
    left.legend(frameon=False)
    figure.savefig("docs/images/training-speed.png", dpi=150)
    write(out, lines)


def draw(axes: Any, found: dict[str, list[tuple[int, float]]], label: str, ticks: Any) -> None:
    styles = {"as published": ":", "batchtopk": "-.", "topk": "--", "topafa": "-"}
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), styles[name], marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    axes.minorticks_off()
    axes.set_yticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("output/performance"))
    args = parser.parse_args()
    if args.growth:
        growth(args.out / "growth.md", rounds=1, steps=3)
        return
    step = measure(args.only, args.d_sae, args.batch, args.rounds, args.steps)
    base_seconds, base_peak = step.get("topk", step[args.only[0]])
    lines = [
        f"Batch {args.batch}, d_in {D_IN}, d_sae {args.d_sae:,}, L0 about {K}, float32, "
        f"{machine()}; medians of {args.rounds} times {args.steps} steps",
        "",
        "| step | seconds | of topk's | peak, GiB | of topk's |",
        "|---|---|---|---|---|",
    ]
    for name, (seconds, peak) in step.items():
        lines.append(
            f"| {name} | {seconds:.2f} | {seconds / base_seconds:.2f} | {peak:.2f} "
            f"| {peak / base_peak:.2f} |"
        )
    write(args.out / "training.md", lines)


if __name__ == "__main__":
    main()
