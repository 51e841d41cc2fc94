"""Memory of the evaluator as SAEs and tokens grow: python benchmarks/memory.py

SAEs of 64 x 2,048 on made-up activations, each size in a process of its own. The peak of anonymous
memory (what a machine has to have; pages of files do not count) is taken beyond what the process
holds before. It is a constant, something for each token of the SAE at work, and something for each
SAE and token that is finished; from these the peak of 100 SAEs on 1,000,000 tokens follows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from measuring import machine, write

SIZES = ((8, 100_000), (8, 400_000), (16, 100_000), (16, 400_000))


def anonymous() -> int:
    """Bytes of anonymous memory that this process holds."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def peak_of(n_saes: int, n_tokens: int) -> dict[str, float]:
    import torch
    from sae_lens import StandardSAE, StandardSAEConfig

    from sae_afa_plugin import evaluate_saes
    from sae_afa_plugin.activations.tensors import TensorActivations

    torch.manual_seed(0)
    x = torch.randn(n_tokens, 64)
    saes = {}
    for number in range(n_saes):
        sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=2048))
        with torch.no_grad():
            sae.b_enc -= 0.6  # few are active, as in real SAEs
        sae.cfg.metadata.hook_name = "here"
        saes[str(number)] = sae
    source = TensorActivations({"here": x}, settings={"made up": True})
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        evaluate_saes(saes, activations=source, out=out, coherence=False, progress=False)
    done.set()
    watcher.join()
    return {"seconds": time.perf_counter() - started, "peak": peak[0] - before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs=2, metavar=("SAES", "TOKENS"))
    parser.add_argument("--out", type=Path, default=Path("output/performance/memory.md"))
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps(peak_of(*args.only)))
        return
    peaks: list[float] = []
    lines = [machine(), "", "| SAEs | tokens | peak, MiB |", "|---|---|---|"]
    for n_saes, n_tokens in SIZES:
        command = [sys.executable, __file__, "--only", str(n_saes), str(n_tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout.splitlines()[-1])["peak"])
        lines.append(f"| {n_saes} | {n_tokens:,} | {peaks[-1] / 2**20:.0f} |")
        print(lines[-1], flush=True)
    terms = [[1, n_tokens, n_saes * n_tokens] for n_saes, n_tokens in SIZES]
    constant, per_token, per_both = np.linalg.lstsq(np.array(terms, float), peaks, rcond=None)[0]
    # what measures below nothing is noise
    expected = constant + 1e6 * per_token + 1e8 * max(0.0, per_both)
    lines += [
        "",
        f"{constant / 2**20:.0f} MiB, {per_token:.0f} bytes for each token of the SAE at work, "
        f"{per_both:.1f} bytes for each SAE and token: 100 SAEs on 1,000,000 tokens take "
        f"{expected / 1e9:.2f} GB beside the language model, the SAE and the activations.",
    ]
    write(args.out, lines)


if __name__ == "__main__":
    main()
