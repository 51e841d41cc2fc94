"""The choice of k on the CPU: python benchmarks/activation.py

Times the operator against the way the paper's public code does it, as its description says
(argsort, gather, cumulative sum, scatter over every row), and against TopK's and BatchTopK's
choice and a copy of the matrix, in the same process and taking turns. Peaks of memory count
everything beyond the input: in units of the matrix, so a way that only makes its output has 1.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from measuring import machine, median_seconds, peak_bytes, write
from torch import Tensor

from sae_afa_plugin import activation, numba_kernel, top_afa


def published_way(acts: Tensor, target: Tensor) -> Tensor:
    order = acts.argsort(dim=-1, descending=True)
    values = acts.gather(-1, order)
    norms = values.square().cumsum(-1).sqrt()
    kept = (norms - target[:, None]).abs().argmin(-1)
    mask = torch.arange(acts.shape[-1]) <= kept[:, None]
    return torch.zeros_like(acts).scatter(-1, order, values * mask)


def without_numba(acts: Tensor, target: Tensor) -> Tensor:
    return activation._by_chunks(acts, target, None, activation._KeepByPartialSelection())


WAYS = {
    "as published": published_way,
    "top_afa without Numba": without_numba,
    "top_afa": top_afa,
    "topk(64)": lambda acts, _: acts.topk(64),
    "BatchTopK(64)": lambda acts, _: acts.flatten().topk(64 * len(acts)),
    "copy": lambda acts, _: acts.clone(),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[12_288, 24_576])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("output/performance/activation.md"))
    args = parser.parse_args()
    if numba_kernel.compiled() is None:
        parser.error("Numba is not installed: pip install 'sae-afa-plugin[fast]'")

    lines = [
        f"{args.tokens} tokens, float32, {machine()}; medians of {args.rounds} rounds, ms",
        "",
        "| d_sae | kept | " + " | ".join(WAYS) + " | published / top_afa | top_afa / topk |",
        "|" + "---|" * (len(WAYS) + 4),
    ]
    memory: list[str] = []
    for d_sae in args.d_sae:
        torch.manual_seed(0)
        acts = torch.randn(args.tokens, d_sae).relu_()
        largest_first = acts.sort(dim=-1, descending=True).values
        for k in (64, 600, 6_000):
            target = largest_first[:, :k].norm(dim=-1)
            times: dict[str, list[float]] = {name: [] for name in WAYS}
            for _ in range(args.rounds):
                for name, way in WAYS.items():
                    times[name].append(median_seconds(partial(way, acts, target), 1))
            ms = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
            lines.append(
                f"| {d_sae:,} | {k:,} | "
                + " | ".join(f"{ms[name]:.1f}" for name in WAYS)
                + f" | {ms['as published'] / ms['top_afa']:.1f} "
                f"| {ms['top_afa'] / ms['topk(64)']:.1f} |"
            )
        peaks = {
            name: peak_bytes(partial(way, acts, target)) / (4 * acts.numel())
            for name, way in WAYS.items()
        }
        memory.append(f"| {d_sae:,} | " + " | ".join(f"{peaks[name]:.1f}" for name in WAYS) + " |")
    lines += ["", "Peak memory beyond the input, in matrices, 6,000 kept:", ""]
    lines += ["| d_sae | " + " | ".join(WAYS) + " |", "|" + "---|" * (len(WAYS) + 1), *memory]
    write(args.out, lines)


if __name__ == "__main__":
    main()
