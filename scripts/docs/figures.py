"""The figures that explain the method: python scripts/docs/figures.py.

``top-afa.png`` draws the worked example of docs/top-afa.md with the package's own rule.
``zf-reading.png`` and ``energy.png``, for docs/metric.md, train four SAEs on the embedded language
model (about five minutes on one core) and draw the norms of three and the energy budgets of all.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sae_lens import StandardTrainingSAEConfig, TopKTrainingSAEConfig

from sae_afa_plugin import AFAResults, TopAFATrainingSAEConfig, plots, top_afa
from sae_afa_plugin.activations.embedded import EMBEDDED_NAME, load_embedded_model
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.activations.tokens import tokenize
from sae_afa_plugin.groups.afa import energy_sentence
from sae_afa_plugin.training.comparison import Comparison, train_and_evaluate

IMAGES = Path(__file__).parents[2] / "docs" / "images"
KEPT, DROPPED, TARGET = "#0072B2", "#BBBBBB", "#D55E00"

# the example of docs/top-afa.md
ACTS = torch.tensor([1.0, 4.0, 0.5, 3.0, 2.0])
TARGET_NORM = torch.tensor(5.3)


def worked_example() -> Figure:
    kept = top_afa(ACTS, TARGET_NORM) != 0
    scores, order = ACTS.sort(descending=True)
    norms = scores.square().cumsum(0).sqrt()
    colours = [KEPT if kept[i] else DROPPED for i in order]
    number = int(kept.sum())

    figure = Figure(figsize=(8.2, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    ranks = range(1, len(scores) + 1)
    left.bar(ranks, scores, color=colours)
    left.set_xticks(ranks, [f"feature {i}" for i in order.tolist()], rotation=35, ha="right")
    left.set_ylabel("score $s_i$")
    left.set_title("1. the largest first", fontsize=10, loc="left")

    t = TARGET_NORM.item()
    right.axhline(t, color=TARGET, lw=1.5)
    right.text(0.62, t + 0.06, f"$t$ = {t:g}", color=TARGET, va="bottom")
    right.vlines(ranks, [min(t, c) for c in norms], [max(t, c) for c in norms], "#888888", lw=1)
    right.scatter(
        ranks, norms, color=[KEPT if k == number else "#555555" for k in ranks], s=45, zorder=3
    )
    for k, c in zip(ranks, norms.tolist(), strict=True):
        distance = f"$|c_{k} - t|$\n= {abs(c - t):.3f}"
        above = c > t
        right.annotate(
            distance,
            (k, c),
            (0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8.5,
            fontweight="bold" if k == number else "normal",
            color=KEPT if k == number else "black",
        )
    right.set(xlim=(0.5, 5.6), ylim=(3.4, 6.05), xticks=ranks, xlabel="$k$, features kept")
    right.set_ylabel("norm of the first $k$, $c_k$")
    right.set_title(f"2. the norm nearest to the target: k = {number}", fontsize=10, loc="left")
    return figure


def norms_of_four(folder: Path) -> AFAResults:
    """Four SAEs on inputs whose norm varies, so that the ZF plot shows clouds."""
    # SAELens folds the scaling factor when training ends, so norms are those of the activations
    shape: dict[str, Any] = {
        "d_in": 192,
        "d_sae": 1536,
        "normalize_activations": "expected_average_only_in",
        "decoder_init_norm": 1.0,
    }
    model = load_embedded_model()
    return train_and_evaluate(
        model,
        EMBEDDED_NAME,
        {
            "TopK, k = 32": TopKTrainingSAEConfig(k=32, **shape),
            "TopK, k = 256": TopKTrainingSAEConfig(k=256, **shape),
            "top-AFA": TopAFATrainingSAEConfig(**shape),
            "L1 penalty": StandardTrainingSAEConfig(l1_coefficient=2.0, **shape),
        },
        tokenize(model, standard_library_texts("train"), 128),
        tokenize(model, standard_library_texts("heldout"), 128),
        Comparison("blocks.4.hook_resid_pre", training_tokens=256 * 1024, heldout_tokens=4000),
        folder,
    )


def zf_reading(results: AFAResults) -> Figure:
    # the one with an L1 penalty is so low that the axes would have to be logarithmic
    summary = results.summary.drop(index="L1 penalty")
    tokens = results.tokens[results.tokens["sae"].isin(summary.index)]
    figure = plots.zf_plot(AFAResults(summary, tokens, results.sequences))
    axes = figure.axes[0]
    for x, y, text in (
        (0.03, 0.93, "over-activated: ‖f‖ > ‖z‖"),
        (0.55, 0.07, "under-activated: ‖f‖ < ‖z‖"),
    ):
        axes.text(x, y, text, transform=axes.transAxes, color="#555555", va="top", style="italic")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--example-only", action="store_true", help="train nothing")
    args = parser.parse_args()
    worked_example().savefig(IMAGES / "top-afa.png", dpi=160)
    if not args.example_only:
        with tempfile.TemporaryDirectory() as folder:
            results = norms_of_four(Path(folder) / "saes")
        columns = ["l0_mean", "nmse_mean", "norm_ratio_median", "over_activated"]
        columns += ["interference_median", "interference_q05", "interference_q95", "max_abs_cos"]
        print(results.summary[columns].T.to_string())
        for name, row in results.summary.iterrows():
            print(f"{name}: {energy_sentence(row.to_dict())}")
        zf_reading(results).savefig(IMAGES / "zf-reading.png", dpi=130)
        plots.energy_plot(results).savefig(IMAGES / "energy.png", dpi=130)


if __name__ == "__main__":
    main()
