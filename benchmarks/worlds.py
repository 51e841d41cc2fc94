"""sparse_topafa, told nothing, beside BatchTopK told the number: python benchmarks/worlds.py

Seven synthetic worlds. They differ in size, in how many features are on, in hierarchy, correlation,
magnitudes and noise; docs/results.md says which were looked at when defaults were chosen. Each is a sweep of its own, on
samples of SAELens's synthetic models; the scores are SAELens's. Interrupted and started again, it
goes on. On one thread a world takes about five minutes with three seeds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from measuring import machine, write
from sae_lens import SAE
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from scipy.optimize import nnls

from sae_afa_plugin import run_sweep
from sae_afa_plugin.activations.synthetic import SyntheticActivations


def zipf(exponent: float, largest: float, smallest: float) -> ZipfianFiringProbabilityConfig:
    return ZipfianFiringProbabilityConfig(exponent=exponent, max_prob=largest, min_prob=smallest)


# name: model, and noise in each dimension
WORLDS: dict[str, tuple[SyntheticModelConfig, float]] = {
    "half the size": (
        SyntheticModelConfig(
            num_features=96, hidden_dim=48, firing_probability=zipf(0.5, 0.25, 0.01),
            std_firing_magnitudes=0.2, seed=11,
        ),
        0.0,
    ),
    "four for each dimension": (
        SyntheticModelConfig(
            num_features=512, hidden_dim=128, firing_probability=zipf(0.8, 0.3, 0.003),
            std_firing_magnitudes=0.3, seed=12,
        ),
        0.0,
    ),
    "many on": (
        SyntheticModelConfig(
            num_features=200, hidden_dim=160, firing_probability=zipf(0.3, 0.25, 0.05),
            std_firing_magnitudes=0.2, seed=13,
        ),
        0.0,
    ),
    "correlated": (
        SyntheticModelConfig(
            num_features=224, hidden_dim=112, firing_probability=zipf(0.5, 0.3, 0.01),
            correlation=LowRankCorrelationConfig(rank=12, correlation_scale=0.3),
            std_firing_magnitudes=0.2, seed=14,
        ),
        0.0,
    ),
    "unequal magnitudes": (
        SyntheticModelConfig(
            num_features=192, hidden_dim=96, firing_probability=zipf(0.5, 0.3, 0.01),
            mean_firing_magnitudes=LinearMagnitudeConfig(start=2.0, end=0.6),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.2, std=0.1), seed=15,
        ),
        0.0,
    ),
    "noise": (
        SyntheticModelConfig(
            num_features=160, hidden_dim=80, firing_probability=zipf(0.5, 0.3, 0.015),
            std_firing_magnitudes=0.2, seed=16,
        ),
        0.07,
    ),
    "deep trees": (
        SyntheticModelConfig(
            num_features=320, hidden_dim=128, firing_probability=zipf(0.5, 0.4, 0.005),
            hierarchy=HierarchyConfig(
                total_root_nodes=16, branching_factor=4, max_depth=2,
                mutually_exclusive_portion=1.0, compensate_probabilities=True,
            ),
            std_firing_magnitudes=0.2, seed=17,
        ),
        0.0,
    ),
}  # fmt: skip

CONFIG = """
synthetic: {{world: {world}, heldout_tokens: 20000, noise: {noise}}}
seeds: [{seeds}]
d_sae: {d_sae}
steps: {steps}
trainer: {{train_batch_size_samples: 1024, lr: 1e-3, adam_beta2: 0.99, dead_feature_window: 100}}
defaults: {{decoder_init_norm: 1.0}}
saes:
  - {{architecture: sparse_topafa, normalize_activations: none}}
  - {{architecture: batchtopk, topk_threshold_lr: 0.05, k: [{k}]}}
measure: {{coherence: false}}
"""
COLUMNS = {"l0_mean": "L0", "f1": "F1", "mcc": "MCC", "nmse_mean": "NMSE"}


def of_world(name: str, out: Path, seeds: int, steps: int) -> list[str]:
    """The rows of the table for one world."""
    cfg, noise = WORLDS[name]
    folder = out / name.replace(" ", "-")
    if not (folder / "world").exists():
        SyntheticModel(cfg).save(folder / "world")
    source = SyntheticActivations(folder / "world", 20_000, noise=noise)
    true_l0 = float((source.features(0, 20_000) > 0).sum(-1).float().mean())
    told = {"half": true_l0 / 2, "right": true_l0, "twice": 2 * true_l0}
    (folder / "sweep.yaml").write_text(
        CONFIG.format(
            world=(folder / "world").resolve(),
            noise=noise,
            seeds=", ".join(map(str, range(seeds))),
            d_sae=cfg.num_features,
            steps=steps,
            k=", ".join(f"{k:.2f}" for k in told.values()),
        )
    )
    results = run_sweep(folder / "sweep.yaml", folder / "sweep")
    assert results is not None  # as of a dry run
    found = results.summary
    x = source.read(source.hook_names(), 0, 20_000)[source.hook_name]
    share = noise**2 * cfg.hidden_dim / float(x.square().sum(-1).mean())
    rows = [
        f"| {name}: {cfg.num_features} in {cfg.hidden_dim}"
        + (f", {share:.0%} noise" if noise else "")
        + f" | truth | {true_l0:.1f} | 1 | 1 | |"
    ]
    for _, group in found.groupby("setting", sort=False):
        first = group.iloc[0]
        who = "**sparse_topafa**"
        if first["trained_as"] == "batchtopk":
            k = float(str(first["setting"]).split("k=")[-1].split()[0])
            who = "BatchTopK, " + min(told, key=lambda word: abs(told[word] - k))
        cells = [spread(group[column]) for column in COLUMNS]
        rows.append(f"| | {who} | " + " | ".join(cells) + " |")
        if cfg.hierarchy is not None:
            true = source.dictionary.feature_vectors.detach()
            seen = [
                true_features_of(folder / "sweep" / "saes" / sae, x, true) for sae in group.index
            ]
            counts = pd.concat(seen).value_counts(normalize=True).sort_index()
            told_shares = ", ".join(f"{n}: {share:.0%}" for n, share in counts.items() if n < 6)
            rows.append(f"| | of how many features one of its is the sum | {told_shares} | | | |")
    return rows


def true_features_of(folder: Path, x: torch.Tensor, true: torch.Tensor) -> pd.Series:
    """Of how many true features each living feature is the sum.

    Its direction is written as a sum of true ones with weights that are not negative; those count
    that have at least .3 of the largest weight.
    """
    sae = SAE.load_from_disk(next(folder.rglob("cfg.json")).parent)
    with torch.no_grad():
        alive = (sae.encode(x) > 0).float().mean(0) > 1e-3
    true = torch.nn.functional.normalize(true, dim=-1)
    directions = torch.nn.functional.normalize(sae.W_dec.detach()[alive], dim=-1)
    weights = [nnls(true.T.numpy(), direction.numpy())[0] for direction in directions]
    return pd.Series([int((w > 0.3 * w.max()).sum()) for w in weights])


def spread(values: pd.Series) -> str:
    text = f"{values.mean():.1f}" if values.name == "l0_mean" else f"{values.mean():.3f}"
    return text + (f" ± {values.std():.3f}" if values.name == "f1" and len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("output/worlds"))
    args = parser.parse_args()
    lines = [
        f"{args.steps} steps of 1,024 samples, {args.seeds} seeds, 20,000 held-out samples, "
        f"{time.strftime('%Y-%m-%d')}, {machine()}",
        "",
        "| world | SAE | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for name in args.only:
        lines += of_world(name, args.out, args.seeds, args.steps)
        write(args.out / "worlds.md", lines)


if __name__ == "__main__":
    main()
