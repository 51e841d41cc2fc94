"""The evaluator against SAELens's run_evals: python benchmarks/evaluator.py.

A language model of GPT-2 small's shape with random weights, and one SAE (768 x 24,576) before
each of its 12 layers, biased so that about 60 features are active. The SAEs lie on disk.

- "evaluator": one call of evaluate_saes for all twelve (without the coherence of the
  dictionaries, which is timed apart, since run_evals has nothing like it);
- "run_evals": sae_lens.run_evals with its variance and norm metrics, for one SAE after the other.

Both load each SAE once and see the same tokens. Each way runs in a process of its own, which
tells its peak memory; they take turns, so that a busy machine is unfair to none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from measuring import machine, peak_so_far, write

D_IN, LAYERS, CONTEXT, PROMPTS = 768, 12, 128, 8


def load_model(device: str = "cpu"):
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D_IN,
        n_ctx=CONTEXT,
        d_head=64,
        n_heads=12,
        d_vocab=50_257,
        act_fn="gelu_new",
        normalization_type="LN",
        seed=0,
        device=device,
    )
    return HookedTransformer(cfg).eval()


def tokens_of(n_tokens: int):
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 50_257, (n_tokens // CONTEXT, CONTEXT), generator=generator)


def make_saes(folder: Path, d_sae: int, active: int, device: str = "cpu") -> None:
    import torch
    from sae_lens import StandardSAE, StandardSAEConfig

    model, tokens = load_model(device), tokens_of(4 * CONTEXT)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: "hook_resid_pre" in name)
    for layer in range(LAYERS):
        hook = f"blocks.{layer}.hook_resid_pre"
        x = cache[hook].flatten(0, 1)
        sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=d_sae, device=device))
        with torch.no_grad():
            sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
            sae.W_enc.copy_(sae.W_dec.T)
            hidden = (x @ sae.W_enc).flatten()[::97]
            sae.b_enc.fill_(-torch.quantile(hidden, 1 - active / d_sae).item())
        sae.cfg.metadata.hook_name = hook
        sae.save_model(folder / str(layer))


def evaluator(
    folder: Path, n_tokens: int, coherence: bool, device: str = "cpu"
) -> dict[str, float]:
    from sae_afa_plugin import evaluate_saes

    model, tokens = load_model(device), tokens_of(n_tokens)
    started = time.perf_counter()
    results = evaluate_saes(
        {str(layer): folder / str(layer) for layer in range(LAYERS)},
        model,
        tokens,
        n_tokens=n_tokens,
        batch_size_prompts=PROMPTS,
        exclude_special_tokens=False,
        coherence=coherence,
        device=device,
        progress=False,
    )
    return {
        "seconds": time.perf_counter() - started,
        "l0": float(results.summary["l0_mean"].mean()),
    }


def run_evals(folder: Path, n_tokens: int, device: str = "cpu") -> dict[str, float]:
    import sae_lens
    from datasets import Dataset
    from sae_lens import SAE
    from sae_lens.evals import EvalConfig
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    model, tokens = load_model(device), tokens_of(n_tokens)
    dataset = Dataset.from_dict({"tokens": tokens.tolist()}).to_iterable_dataset()
    started = time.perf_counter()
    for layer in range(LAYERS):
        sae = SAE.load_from_disk(folder / str(layer), device=device)
        store = ActivationsStore.from_config_multi_hook(
            model=model,
            dataset=dataset,
            hook_names=[sae.cfg.metadata.hook_name],
            hook_d_ins={sae.cfg.metadata.hook_name: D_IN},
            context_size=CONTEXT,
            store_batch_size_prompts=PROMPTS,
            device=device,
        )
        sae_lens.run_evals(
            sae=sae,
            activation_store=store,
            model=model,
            activation_scaler=ActivationScaler(),
            eval_config=EvalConfig(
                compute_variance_metrics=True,
                compute_l2_norms=True,
                n_eval_sparsity_variance_batches=n_tokens // (PROMPTS * CONTEXT),
            ),
            exclude_special_tokens=False,
        )
    return {"seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-sae", type=int, default=24_576)
    parser.add_argument("--active", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("output/performance/evaluator.md"))
    parser.add_argument("--only", choices=["evaluator", "coherence", "run_evals"])
    parser.add_argument("--saes", type=Path, help="folder of the SAEs (with --only)")
    args = parser.parse_args()
    if args.only is not None:
        if args.only == "run_evals":
            measured = run_evals(args.saes, args.tokens)
        else:
            measured = evaluator(args.saes, args.tokens, coherence=args.only == "coherence")
        print(json.dumps({**measured, "peak": peak_so_far() / 2**30}))
        return

    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as saes:
        make_saes(Path(saes), args.d_sae, args.active)
        for repeat in range(args.repeats):
            # the coherence does not depend on the tokens: once is enough
            for only in ["evaluator", "run_evals"] + ["coherence"] * (repeat == 0):
                command = [sys.executable, __file__, "--only", only, "--saes", saes]
                command += ["--tokens", str(args.tokens)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                measured = json.loads(done.stdout.splitlines()[-1])
                print(only, measured, flush=True)
                found.setdefault(only, []).append(measured)

    seconds = {name: median(run["seconds"] for run in runs) for name, runs in found.items()}
    ratios = [
        theirs["seconds"] / ours["seconds"]
        for ours, theirs in zip(found["evaluator"], found["run_evals"], strict=True)
    ]
    lines = [
        f"{LAYERS} SAEs {D_IN} x {args.d_sae:,}, {args.tokens:,} tokens, mean L0 "
        f"{found['evaluator'][0]['l0']:.0f}, {args.repeats} runs each, {machine()}",
        "",
        "| | seconds (median) | tokens x SAEs / s | peak memory, GiB |",
        "|---|---|---|---|",
    ]
    for name in ("evaluator", "run_evals"):
        peak = max(run["peak"] for run in found[name])
        lines.append(
            f"| {name} | {seconds[name]:.1f} | {LAYERS * args.tokens / seconds[name]:,.0f} "
            f"| {peak:.2f} |"
        )
    lines += [
        "",
        f"run_evals / evaluator: {median(ratios):.2f} "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}). Coherence of the twelve dictionaries: "
        f"{found['coherence'][0]['seconds'] - seconds['evaluator']:.0f} s more, whatever the "
        "number of tokens.",
    ]
    write(args.out, lines)


if __name__ == "__main__":
    main()
