"""What the metric measures, where the truth is known: python benchmarks/audit.py.

The numbers of the AFA group are looked at through the three lenses that arXiv 2605.18229 puts
before benchmarks of SAEs. (1) Reseed noise: do settings differ by more than seeds do? (2) Known
truth: do settings that find the true features (F1, MCC) have better numbers, and is a number best at
the L0 with the best F1? (3) The course over
training: do the numbers get better while F1 does? TopK, BatchTopK, Matryoshka BatchTopK, JumpReLU
and top-AFA are trained on a small synthetic world, told half, right and twice the true L0, with
three seeds, for 62, 250 and 1,000 steps. Leaves three sweeps and audit.md in the output
folder; interrupted and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from measuring import machine, write
from scipy.stats import spearmanr

from sae_afa_plugin.sweep.reader import load_sweep
from sae_afa_plugin.sweep.results import SweepResults
from sae_afa_plugin.sweep.run import run_sweep
from sae_afa_plugin.sweep.statistics import noise_of_numbers, reseed_noise

STEPS = (62, 250, 1000)
# of each number: how it is called, and what would be good
NUMBERS = {
    "distance": ("distance of ‖f‖/‖z‖ from 1", "low"),
    "epsilon_lbo_median": ("ε LBO", "low"),
    "interference_size": ("size of interference", "low"),
    "share_features_distance": ("distance of the features' share of energy from 1", "low"),
    "share_unexplained_mean": ("unexplained share of energy", "low"),
    "share_shrinkage_size": ("size of the shrinkage share", "low"),
    "mean_abs_cos": ("mean \\|cos\\| of the dictionary (c_dec)", "low"),
    "max_abs_cos": ("coherence", "low"),
    "nmse_mean": ("NMSE, to compare", "low"),
}
TRUTHS = ("f1", "mcc")


def with_distances(summary: pd.DataFrame) -> pd.DataFrame:
    """With every number such that less is what the theory calls better."""
    return summary.assign(
        distance=(summary["norm_ratio_median"] - 1).abs(),
        interference_size=summary["interference_median"].abs(),
        share_features_distance=(summary["share_features_mean"] - 1).abs(),
        share_shrinkage_size=summary["share_shrinkage_mean"].abs(),
    )


def means(summary: pd.DataFrame) -> pd.DataFrame:
    """A row for each setting that was trained on its own terms."""
    of: Any = summary[summary["control"].isna()].groupby("setting", sort=False)
    return of[[*NUMBERS, *TRUTHS, "l0_mean"]].mean()


def agreement(one: Any, other: Any) -> float:
    """Rank correlation of a number that should be low with one that should be high, turned round."""
    found: Any = spearmanr(one, other)
    return -float(found.statistic)


def picks(trained: Any, number: str) -> float:
    """How often the least of a number is at the L0 with the highest F1, of those that were told."""
    told = trained[~trained["chooses_l0"].astype(bool)]
    hits = [
        of_run[number].idxmin() == of_run["f1"].idxmax()
        for _, of_run in told.groupby(["family", "seed"])
    ]
    return float(np.mean(hits))


def audited(sweeps: Mapping[int, SweepResults]) -> pd.DataFrame:
    """For each number: what the three lenses show."""
    summaries = {steps: with_distances(results.summary) for steps, results in sweeps.items()}
    last = summaries[max(summaries)]
    trained: Any = last[last["control"].isna()]
    noise = noise_of_numbers(reseed_noise(trained, ["hook_name", "setting"]))
    at_end = means(last)
    others = at_end[~at_end.index.str.startswith("topafa")]
    course = {steps: means(summary) for steps, summary in summaries.items()}
    rows: dict[str, dict[str, float]] = {}
    for number in NUMBERS:
        over_time = [
            agreement(
                [course[steps].loc[setting, number] for steps in course],
                [course[steps].loc[setting, "f1"] for steps in course],
            )
            for setting in at_end.index
        ]
        truth: Any = last.loc[last["control"] == "truth", number]
        rows[number] = {
            "noise": float(noise.loc[number, "relative"]),  # pyright: ignore[reportArgumentType]
            "signal": float(noise.loc[number, "signal"]),  # pyright: ignore[reportArgumentType]
            "f1": agreement(at_end[number], at_end["f1"]),
            "mcc": agreement(at_end[number], at_end["mcc"]),
            "f1 told": agreement(others[number], others["f1"]),
            "picks": picks(trained, number),
            "course": float(np.nanmean(over_time)),
            "truth": float(truth.iloc[0]),
            "best": float(at_end[number].min()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def markdown(table: pd.DataFrame, at_end: pd.DataFrame) -> list[str]:
    lines = [
        "| number | reseed noise | settings / reseed | with F1 | with MCC | the same without "
        "top-AFA | picks the best L0 | over training | of the truth | least of an SAE |",
        "|---" * 10 + "|",
    ]
    for number, row in table.iterrows():
        title = NUMBERS[str(number)][0]
        lines.append(
            f"| {title} | {row['noise']:.1%} | {row['signal']:.1f} | {row['f1']:+.2f} | "
            f"{row['mcc']:+.2f} | {row['f1 told']:+.2f} | {row['picks']:.0%} | {row['course']:+.2f} | "
            f"{row['truth']:.3g} | {row['best']:.3g} |"
        )
    lines += ["", "| setting | L0 | F1 | MCC | NMSE | ‖f‖/‖z‖ from 1 | interference |"]
    lines.append("|---" * 7 + "|")
    for setting, row in at_end.sort_values("f1", ascending=False).iterrows():
        lines.append(
            f"| {setting} | {row['l0_mean']:.1f} | {row['f1']:.3f} | {row['mcc']:.3f} | "
            f"{row['nmse_mean']:.4f} | {row['distance']:.3f} | {row['interference_size']:.4f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("output/audit"))
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    sweep = replace(load_sweep("truth.yaml"), match_l0=(), seeds=tuple(range(args.seeds)))
    sweeps: dict[int, SweepResults] = {}
    for steps in args.steps:
        found = run_sweep(replace(sweep, steps=steps), args.out / f"steps-{steps}", say=print)
        assert found is not None
        sweeps[steps] = found
    at_end = means(with_distances(sweeps[max(sweeps)].summary))
    write(args.out / "audit.md", [machine(), "", *markdown(audited(sweeps), at_end)])


if __name__ == "__main__":
    main()
