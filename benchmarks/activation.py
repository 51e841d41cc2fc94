"""The choice of features on the CPU: python benchmarks/activation.py

Times the operator against the way the paper's public code does it, as its description says
(argsort, gather, cumulative sum, scatter over every row), and against TopK's and BatchTopK's
choice and a copy of the matrix, in the same process and taking turns. Peaks of memory count
everything beyond the input: in units of the matrix, so a way that only makes its output has 1.

``--family`` times the other members of the prefix operator instead, each with the target that k
features of a token would meet, against ``top_afa`` and against TopK's and BatchTopK's choice of k.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import machine, median_seconds, peak_bytes, write
from torch import Tensor

from sae_afa_plugin import keep_prefix, top_afa
from sae_afa_plugin.rules import numba_kernel, torch_kernel


def published_way(acts: Tensor, target: Tensor) -> Tensor:
    order = acts.argsort(dim=-1, descending=True)
    values = acts.gather(-1, order)
    norms = values.square().cumsum(-1).sqrt()
    kept = (norms - target[:, None]).abs().argmin(-1)
    mask = torch.arange(acts.shape[-1], device=acts.device) <= kept[:, None]
    return torch.zeros_like(acts).scatter(-1, order, values * mask)


def without_numba(acts: Tensor, target: Tensor) -> Tensor:
    return torch_kernel.keep_prefix(acts, target, None, 2, "row")


WAYS = {
    "as published": published_way,
    "top_afa without Numba": without_numba,
    "top_afa": top_afa,
    "topk(64)": lambda acts, _: acts.topk(64),
    "BatchTopK(64)": lambda acts, _: acts.flatten().topk(64 * len(acts)),
    "copy": lambda acts, _: acts.clone(),
}


def taking_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each way, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(median_seconds(way, 1))
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}


def time_family(tokens: int, widths: list[int], rounds: int, out: Path) -> None:
    lines: list[str] = []
    for d_sae in widths:
        torch.manual_seed(0)
        acts = torch.randn(tokens, d_sae).relu_()
        largest_first = acts.sort(dim=-1, descending=True).values
        for k in (64, 600, 6_000):
            ways: dict[str, Callable[[], object]] = {}
            for per in ("row", "batch"):
                for p in (0, 1, 2):
                    target = largest_first[:, :k].norm(p, dim=-1)
                    ways[f"p = {p} per {per}"] = partial(keep_prefix, acts, target, p=p, per=per)
            ways["topk(k)"] = partial(acts.topk, k)
            ways["BatchTopK(k)"] = partial(acts.flatten().topk, k * tokens)
            if not lines:
                lines += [
                    f"{tokens} tokens, float32, {machine()}; medians of {rounds} rounds, ms",
                    "",
                    "| d_sae | k | " + " | ".join(ways) + " |",
                    "|" + "---|" * (len(ways) + 2),
                ]
            ms = taking_turns(ways, rounds)
            lines.append(
                f"| {d_sae:,} | {k:,} | " + " | ".join(f"{v:.1f}" for v in ms.values()) + " |"
            )
    write(out, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[12_288, 24_576])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--family", action="store_true")
    args = parser.parse_args()
    name = "family" if args.family else "activation"
    out = args.out or Path(f"output/performance/{name}.md")
    if numba_kernel.compiled(2) is None:
        parser.error("Numba is not installed: pip install 'sae-afa-plugin[fast]'")
    if args.family:
        time_family(args.tokens, args.d_sae, args.rounds, out)
        return

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
            ways = {name: partial(way, acts, target) for name, way in WAYS.items()}
            ms = taking_turns(ways, args.rounds)
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
    write(out, lines)


if __name__ == "__main__":
    main()
