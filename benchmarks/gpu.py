"""What a GPU makes of it: python benchmarks/gpu.py [STEP ...] [--json FILE]

right      the operator on the card against the CPU's, bit for bit; a training run and an evaluation
           against the CPU's; whether a run repeats itself and goes on to the same bits
tests      the oracle tests of the operator, on the card
choice     the choice of features against copying the matrix, torch.topk, BatchTopK and the way the
           paper's public code does it
step       a step of SAELens's trainer: top-AFA, TopK, BatchTopK and the published way
compiled   the same with SAELens's compile_sae
run        the paper's config through SAELens's own runner on a model of GPT-2 small's shape
evaluator  twelve SAEs of 768 x 24,576 at once against twelve times SAELens's run_evals

A table after every step, which goes on when another has failed. All of it takes about six minutes
on an H100. With ``--device cpu --small`` it runs anywhere, and its figures mean nothing. A machine
without a network: scripts/gpu_bundle.sh.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import evaluator
import torch
import training
from activation import published_way
from measuring import median_seconds
from torch import Tensor

from sae_afa_plugin import evaluate_saes, keep_prefix, paper_runner_config, top_afa
from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.rules import operator

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]


class Card:
    """Where it is measured, and how large."""

    def __init__(self, device: str, small: bool):
        self.device, self.small = device, small
        self.is_cuda = torch.device(device).type == "cuda"

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def ms(self, function: Callable[[], object], repeats: int = 15, warm_up: int = 3) -> float:
        """The median of some calls, each to its end on the card."""

        def whole() -> None:
            function()
            self.wait()

        self.wait()
        return 1000 * median_seconds(whole, repeats, warm_up)

    def peak_gib(self, function: Callable[[], object]) -> float:
        """Memory of the card at most during a call, with all that is there already."""
        if not self.is_cuda:
            return math.nan
        torch.cuda.reset_peak_memory_stats()
        function()
        self.wait()
        return torch.cuda.max_memory_allocated() / 2**30


# --- right ---


def right(card: Card) -> Iterable[Row]:
    yield from _operator(card)
    yield from _training(card)
    yield from _evaluation(card)


def _operator(card: Card) -> Iterable[Row]:
    widths = (8, 257) if card.small else (1, 8, 257, 3000, 12_288, 32_768, 40_000, 131_072)
    started, rows, different, near = time.perf_counter(), 0, 0, 0
    for width in widths:
        rng = torch.Generator().manual_seed(width)
        n = 64 if width < 100_000 else 16
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for ties in (False, True):
                acts = torch.randn(n, width, generator=rng)
                acts = acts.round(decimals=1) if ties else acts
                acts[0] = -acts[0].abs()  # nothing to keep
                acts[1, 0] = torch.nan
                acts = acts.to(dtype)
                norms = 0.5 + torch.rand(width, generator=rng)
                share = 1.2 * torch.rand(n, generator=rng)
                scores = acts.float().relu().nan_to_num()
                cases = [(2, share * scores.norm(dim=-1), "row")]
                if dtype == torch.float32:  # every kernel takes seconds to compile
                    cases += [(0, share * (scores > 0).sum(-1), "row")]
                    cases += [(1, share * scores.sum(-1), "row")]
                    cases += [(2, share * scores.norm(dim=-1), "batch")]
                for p, target, per in cases:
                    given = norms if ties else None
                    here = [t if t is None else t.to(card.device) for t in (target, given)]
                    got = keep_prefix(acts.to(card.device), *here, p=p, per=per).cpu()
                    want = keep_prefix(acts, target, given, p=p, per=per)
                    other = ~(got.nan_to_num(7) == want.nan_to_num(7)).all(-1)
                    rows += n
                    different += int(other.sum())
                    if per == "row" and p:
                        s = acts.double() * (1 if given is None else given.double())
                        near += _near_ties(s[other], got[other], want[other], target[other], p)
    yield {
        "what": "operator, rows",
        "cases": rows,
        "other than on the CPU": different,
        "of these near ties": near,
        "backend": operator.backend(torch.ones(2, 8, device=card.device)),
        "seconds": time.perf_counter() - started,
    }


def _near_ties(scores: Tensor, got: Tensor, want: Tensor, target: Tensor, p: int) -> int:
    """Of some rows, those where both choices are equally near within float64's rounding."""
    sums = [torch.where(kept != 0, scores, 0).pow(p).sum(-1) ** (1 / p) for kept in (got, want)]
    middle = (sums[0] + sums[1]) / 2  # one feature apart, the target is half-way
    return int(((middle - target.double()).abs() < 1e-6 * middle).sum())


def _training(card: Card) -> Iterable[Row]:
    steps = 20 if card.small else 200

    batches = torch.randn(8, 256, 64, generator=torch.Generator().manual_seed(0))

    def trained(device: str, first: int = 0, state: Any = None) -> tuple[dict[str, Tensor], Any]:
        """The weights at the end and, as from a file, everything halfway."""
        torch.manual_seed(0)
        trainer = training.new_trainer("topafa", 512, batches[0].to(device), 1e-3)
        if state is not None:
            trainer.sae.load_state_dict(state["sae"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.n_training_steps, trainer.n_training_samples = first, first * 256
        for i in range(first, steps):
            if i == steps // 2:
                with tempfile.TemporaryFile() as file:
                    parts = {"sae": trainer.sae, "optimizer": trainer.optimizer}
                    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
                    file.seek(0)
                    state = torch.load(file)
            trainer.step(batches[i % 8].to(device))
        return {k: v.detach().cpu() for k, v in trainer.sae.state_dict().items()}, state

    def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return max(float((a[k] - b[k]).norm() / b[k].norm().clamp(min=1e-9)) for k in a)

    here, half = trained(card.device)
    yield {
        "what": f"training, {steps} steps",
        "relative distance to the CPU's weights": apart(here, trained("cpu")[0]),
        "to its own repeated": apart(trained(card.device)[0], here),
        "to its own resumed halfway": apart(trained(card.device, steps // 2, half)[0], here),
    }


def _evaluation(card: Card) -> Iterable[Row]:
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=192, d_sae=1536, k=32))
    sae.cfg.metadata.hook_name = "blocks.4.hook_resid_pre"
    options = {"n_tokens": 2_000, "coherence": True, "progress": False}
    summaries = []
    for device in ("cpu", card.device):
        model = load_embedded_model(device)
        results = evaluate_saes(
            {"topk": sae.to(device)}, model, "embedded", device=device, **options
        )
        summaries.append(results.summary.select_dtypes("number").iloc[0])
    difference = ((summaries[0] - summaries[1]).abs() / summaries[0].abs().clip(lower=1e-3)).max()
    yield {"what": "evaluation, columns", "largest relative difference to the CPU": difference}


def tests(card: Card) -> Iterable[Row]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/rules"]
    command += ["-k", "triton and not compiles"] if card.is_cuda else ["-k", "numba"]
    command += ["-n", "12"] if find_spec("xdist") else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 5):
        print(done.stdout[-4000:])
    yield {"what": "tests/unit/rules", "result": done.stdout.strip().splitlines()[-1]}


# --- speed ---


def choice(card: Card) -> Iterable[Row]:
    sizes = [(64, 512)] if card.small else [(4096, 12_288), (4096, 24_576), (1024, 131_072)]
    for n, d_sae in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            yield _choice(card, torch.randn(n, d_sae, device=card.device).to(dtype))


def _choice(card: Card, acts: Tensor) -> Row:
    n, d_sae = acts.shape
    norms, out = 1 + 0.01 * torch.rand(d_sae, device=card.device), torch.empty_like(acts)
    largest = acts.float().topk(min(6001, d_sae // 2), -1).values.square().cumsum(-1)
    # between two sums: a target equal to one is decided by rounding alone
    target = {
        kept: (0.6 * largest[:, kept - 1] + 0.4 * largest[:, kept]).sqrt()
        for kept in (64, 600, 6000)
        if kept < largest.shape[1]
    }
    copy = card.ms(lambda: out.copy_(acts))
    row: Row = {"matrix": f"{n} x {d_sae}", "dtype": str(acts.dtype)[6:], "copy, ms": copy}
    took = {kept: card.ms(lambda t=t: top_afa(acts, t)) for kept, t in target.items()}
    row |= {f"top_afa {kept} / copy": ms / copy for kept, ms in took.items()}
    row["with norms / copy"] = card.ms(lambda: top_afa(acts, target[64], norms)) / copy
    batch = card.ms(lambda: keep_prefix(acts, target[64], p=2, per="batch"), 5, 1)
    row["per batch / copy"] = batch / copy
    others: dict[str, Callable[[], object]] = {
        "topk(64)": lambda: acts.topk(64, -1, sorted=False),
        "BatchTopK(64)": lambda: acts.flatten().topk(64 * n, sorted=False),
    }
    if acts.dtype == torch.float32:
        others["published"] = lambda: published_way(acts, target[64])
    for name, way in others.items():
        row[f"{name} / top_afa"] = card.ms(way, 5, 1) / took[64]
    return row


def step(card: Card) -> Iterable[Row]:
    yield from _steps(card, [12_288, 49_152], ["float32", "tf32", "autocast"])


def compiled(card: Card) -> Iterable[Row]:
    yield from _steps(card, [12_288], ["compiled"])


def _steps(card: Card, widths: list[int], modes: list[str]) -> Iterable[Row]:
    n, widths = (256, [512]) if card.small else (4096, widths)
    ways = ("topk", "topafa", "batchtopk", "as published")
    for d_sae in widths:
        for mode in modes:
            torch.set_float32_matmul_precision("highest" if mode == "float32" else "high")
            torch.manual_seed(0)
            batch = torch.randn(n, training.D_IN, device=card.device)
            took: dict[str, float] = {}
            row: Row = {"d_sae": d_sae, "mode": mode}
            for way in ways:
                if way == "as published":
                    if mode not in ("float32", "tf32") or d_sae > 20_000:
                        continue
                    one = training.published_step(d_sae, batch)
                else:
                    one = training.saelens_step(
                        way, d_sae, batch, mode == "compiled", mode == "autocast"
                    )
                try:
                    took[way] = card.ms(one, 10, 3)
                    row[f"{way}, GiB"] = card.peak_gib(one)
                except Exception as error:
                    row[f"{way}, failed"] = f"{type(error).__name__}: {str(error)[:80]}"
                del one
            row |= {f"{way}, ms": ms for way, ms in took.items()}
            if "topk" in took:
                row |= {f"{way} / topk": took[way] / took["topk"] for way in took if way != "topk"}
            yield row
    torch.set_float32_matmul_precision("highest")


def run(card: Card) -> Iterable[Row]:
    from datasets import Dataset
    from sae_lens import LanguageModelSAETrainingRunner, TopKTrainingSAEConfig

    torch.set_float32_matmul_precision("high")
    if card.small:
        model, warm, n_tokens = load_embedded_model(card.device), 4_096, 8_192
        sizes = {"d_in": 192, "d_sae": 1024, "hook_name": "blocks.4.hook_resid_pre"}
    else:
        model, warm, n_tokens = evaluator.load_model(card.device), 204_800, 4_096_000
        sizes = {"d_in": 768, "d_sae": 12_288}
    tokens = torch.randint(1, model.cfg.d_vocab, (2_048, 128))
    dataset = Dataset.from_dict({"tokens": tokens.repeat(1 if card.small else 20, 1).tolist()})
    # SAELens says once for each run that a model and a dataset were passed in
    logging.getLogger("sae_lens").setLevel(logging.ERROR)

    def seconds(architecture: str, n: int) -> float:
        cfg = paper_runner_config(
            is_dataset_tokenized=True,
            training_tokens=n,
            device=card.device,
            store_batch_size_prompts=32,
            output_path=None,
            checkpoint_path=None,
            verbose=False,
            **sizes,
        )
        if architecture == "topk":
            cfg.sae = TopKTrainingSAEConfig(
                d_in=cfg.sae.d_in, d_sae=cfg.sae.d_sae, k=64, device=card.device
            )
        runner = LanguageModelSAETrainingRunner(
            cfg, override_model=model, override_dataset=dataset.to_iterable_dataset()
        )
        card.wait()
        started = time.perf_counter()
        runner.run()
        card.wait()
        return time.perf_counter() - started

    rates: dict[str, float] = {}
    for architecture in ("topk", "topafa"):
        seconds(architecture, warm)
        rates[architecture] = n_tokens / seconds(architecture, n_tokens)
    batch = tokens[:32].to(card.device)
    until = 4 if card.small else 8
    forward = card.ms(lambda: model(batch, stop_at_layer=until, return_type=None), 5) / 32 / 128
    acts = torch.randn(4096, sizes["d_in"], device=card.device)
    for architecture, rate in rates.items():
        one = training.saelens_step(architecture, sizes["d_sae"], acts)
        step_ms = card.ms(one, 10) / 4096
        yield {
            "runner": architecture,
            "tokens / s": rate,
            "81.9 M tokens, minutes": 81_924_096 / rate / 60,
            "model, share": forward * rate / 1000,
            "SAE, share": step_ms * rate / 1000,
        }
    yield {"runner": "time of topafa / topk", "tokens / s": rates["topk"] / rates["topafa"]}
    torch.set_float32_matmul_precision("highest")


def compare_evaluators(card: Card) -> Iterable[Row]:
    d_sae, n_tokens = (512, 1024) if card.small else (24_576, 32_768)
    with tempfile.TemporaryDirectory() as folder:
        saes = Path(folder)
        evaluator.make_saes(saes, d_sae, 60, card.device)
        for _ in range(1 if card.small else 2):  # the first time is a warm-up
            ours = evaluator.evaluator(saes, n_tokens, False, card.device)["seconds"]
            theirs = evaluator.run_evals(saes, n_tokens, card.device)["seconds"]
    for name, took in (("evaluate_saes", ours), ("run_evals", theirs)):
        yield {"way": name, "seconds": took, "tokens x SAEs / s": 12 * n_tokens / took}
    yield {"way": "run_evals / evaluate_saes", "seconds": theirs / ours}


STEPS: dict[str, Callable[[Card], Iterable[Row]]] = {
    "right": right,
    "choice": choice,
    "step": step,
    "run": run,
    "evaluator": compare_evaluators,
    "tests": tests,
    "compiled": compiled,
}


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if 0 < abs(value) < 0.005:
        return f"{value:.2e}"
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go")
    args = parser.parse_args()
    unknown = sorted(set(args.steps) - set(STEPS))
    if unknown:
        parser.error(f"no such step: {', '.join(unknown)}; there are {', '.join(STEPS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; to try the script out: --device cpu --small")
    warnings.filterwarnings("ignore")

    card = Card(args.device, args.small)
    name = torch.cuda.get_device_name() if card.is_cuda else "CPU"
    packages = {p: version(p) for p in ("torch", "sae-lens", "transformer-lens")}
    packages |= {"triton": version("triton")} if find_spec("triton") else {}
    figures: dict[str, Any] = {"card": name, "small": args.small, "versions": packages}
    print(f"{name}; {', '.join(f'{p} {v}' for p, v in packages.items())}", flush=True)
    failed = []
    for step_name in args.steps or STEPS:
        started = time.perf_counter()
        rows: list[Row] = []
        try:
            for row in STEPS[step_name](card):
                rows.append(row)
                print("  " + "; ".join(f"{k}: {_shown(v)}" for k, v in row.items()), flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(step_name)
        figures[step_name] = rows
        print(f"{step_name}: {time.perf_counter() - started:.0f} s", flush=True)
        if args.json is not None:  # after every step: a run may be cut off
            args.json.write_text(json.dumps(figures, indent=1, default=str), encoding="utf-8")
        if card.is_cuda:
            torch.cuda.empty_cache()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
