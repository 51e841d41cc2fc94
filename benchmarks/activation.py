"""The choice of k on the CPU: python benchmarks/activation.py [--d-sae N].

Times top_afa against the way the paper's public code does it, as its description says (argsort,
gather, cumulative sum, scatter over every row), torch.topk(k=64) and a copy of the matrix, in
the same process. Prints medians and their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sae_afa_plugin import top_afa


def published_way(acts: Tensor, target: Tensor) -> Tensor:
    order = acts.argsort(dim=-1, descending=True)
    values = acts.gather(-1, order)
    norms = values.square().cumsum(-1).sqrt()
    kept = (norms - target[:, None]).abs().argmin(-1)
    mask = torch.arange(acts.shape[-1]) <= kept[:, None]
    return torch.zeros_like(acts).scatter(-1, order, values * mask)


def median_ms(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    torch.manual_seed(0)
    acts = torch.randn(args.tokens, args.d_sae).relu_()
    largest_first = acts.sort(dim=-1, descending=True).values
    print(
        f"{args.tokens} x {args.d_sae} float32, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; median ms of {args.repeats}"
    )
    print("| kept | published | top_afa | ratio | topk(64) | copy |")
    print("|---|---|---|---|---|---|")
    for k in (64, 600, args.d_sae * 6_000 // 12_288):
        target = largest_first[:, :k].norm(dim=-1)
        published = median_ms(lambda t=target: published_way(acts, t), args.repeats)
        ours = median_ms(lambda t=target: top_afa(acts, t), args.repeats)
        topk = median_ms(lambda: acts.topk(64), args.repeats)
        copy = median_ms(acts.clone, args.repeats)
        kept = top_afa(acts, target).count_nonzero().item() / args.tokens
        print(
            f"| {kept:.0f} | {published:.1f} | {ours:.1f} | {published / ours:.1f} "
            f"| {topk:.1f} | {copy:.1f} |"
        )


if __name__ == "__main__":
    main()
