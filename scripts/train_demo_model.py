"""Train the embedded language model: python scripts/train_demo_model.py [--steps N].

A GPT-2 of 3.4 million parameters on the documentation of Python: the standard library's
(without its held-out part, see ``sae_afa_plugin/activations/text.py``) and the docstrings of the
packages installed beside this one. Nothing is downloaded. The tokenizer is a byte-level BPE
trained on the same text. A docstring that shares a line of 40 characters or more with the
held-out text is dropped, since packages carry copies of standard library modules.

Writes model.safetensors (float16), config.json, tokenizer.json and training.json (how it was
made, the validation loss and the unigram entropy of the held-out text) to
``sae_afa_plugin/activations/assets``. With the default 2,200 steps it takes about an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from sae_afa_plugin.activations.text import (
    docstrings,
    python_sources,
    standard_library_documents,
)

ASSETS = Path(__file__).parents[1] / "sae_afa_plugin" / "activations" / "assets"
PACKAGES = [
    "torch",
    "transformers",
    "huggingface_hub",
    "datasets",
    "numpy",
    "pandas",
    "sympy",
    "networkx",
    "scipy",
    "transformer_lens",
    "sae_lens",
    "einops",
    "tokenizers",
    "safetensors",
    "pip",
    "setuptools",
    "rich",
    "typer",
    "click",
    "hypothesis",
    "pytest",
    "_pytest",
    "pydantic",
    "fsspec",
    "jinja2",
    "packaging",
    "joblib",
    "nltk",
    "statsmodels",
    "accelerate",
    "pyarrow",
    "requests",
    "urllib3",
    "httpx",
    "anyio",
    "mpmath",
    "pygments",
]
EOS = "<|endoftext|>"
VOCAB_SIZE = 1024
CONTEXT = 256
BATCH = 32
STDLIB_REPEATS = 8  # the standard library is the domain; the rest is there for volume
LONG_LINE = 40


def long_lines(text: str) -> set[str]:
    """The normalised lines of a text that are long enough to identify it."""
    lines = (" ".join(line.split()).lower() for line in text.splitlines())
    return {line for line in lines if len(line) >= LONG_LINE}


def package_documents(forbidden: set[str]) -> list[str]:
    """Docstrings of the installed packages, one document per file, copies dropped."""
    seen: set[str] = set()
    documents: list[str] = []
    for package in tqdm(PACKAGES, desc="reading packages"):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for source in python_sources(Path(spec.origin).parent):
            kept = []
            for text in docstrings(source):
                if text not in seen and not (long_lines(text) & forbidden):
                    seen.add(text)
                    kept.append(text)
            if kept:
                documents.append("\n\n".join(kept))
    return documents


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts in a row, an end-of-text token before each: int64 ``[n, CONTEXT]``."""
    eos = tokenizer.token_to_id(EOS)
    ids: list[int] = []
    for start in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(texts[start : start + 1000]):
            ids.append(eos)
            ids.extend(encoding.ids)
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


def unigram_entropy(rows: torch.Tensor) -> float:
    """Bits per token of the held-out text under its own token frequencies."""
    counts = Counter(rows.flatten().tolist())
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


@torch.no_grad()
def bits_per_token(model: GPT2LMHeadModel, rows: torch.Tensor) -> float:
    model.eval()
    losses = [
        model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in rows.split(BATCH)
    ]
    model.train()
    return sum(losses) / len(rows) / math.log(2)


def optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks (half the steps of AdamW), AdamW for the rest."""
    blocks = model.transformer.h
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = random.Random(0)
    heldout = ["\n\n".join(d) for d in standard_library_documents("heldout")]
    forbidden = {line for text in heldout for line in long_lines(text)}
    stdlib = []
    for document in standard_library_documents("train"):
        kept = [text for text in document if not (long_lines(text) & forbidden)]
        if kept:
            stdlib.append("\n\n".join(kept))
    packages = package_documents(forbidden)
    print(
        f"characters: standard library {sum(map(len, stdlib)):,}, packages "
        f"{sum(map(len, packages)):,}, held out {sum(map(len, heldout)):,}"
    )

    tokenizer = train_tokenizer(stdlib * STDLIB_REPEATS + packages)
    valid = pack(tokenizer, heldout)
    own = pack(tokenizer, stdlib)
    rng.shuffle(packages)
    needed = args.steps * BATCH
    others = pack(tokenizer, packages)[: max(0, needed - STDLIB_REPEATS * len(own))]
    rows = torch.cat([own] * STDLIB_REPEATS + [others])
    rows = rows[torch.randperm(len(rows))][:needed]
    entropy = unigram_entropy(valid)
    print(
        f"tokens: {rows.numel():,} in {args.steps} steps; held out {valid.numel():,}; "
        f"unigram entropy {entropy:.2f} bits"
    )

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=CONTEXT,
            n_embd=192,
            n_layer=7,
            n_head=6,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    opts = optimizers(model)
    peak = [opt.param_groups[0]["lr"] for opt in opts]
    started = time.time()
    bar = tqdm(range(args.steps), desc="training", mininterval=10)
    for step in bar:
        # warm up, hold, and go down linearly over the last 60 %
        scale = min((step + 1) / 60, 1.0, (args.steps - step) / (0.6 * args.steps))
        for opt, lr in zip(opts, peak, strict=True):
            opt.param_groups[0]["lr"] = lr * scale
        batch = rows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(rows)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        model.zero_grad()
        if step % 100 == 0:
            bar.write(
                f"step {step} loss {loss.item() / math.log(2):.3f} bits, held out "
                f"{bits_per_token(model, valid[::8]):.3f}"
            )

    state = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to wte
    }
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    final = bits_per_token(model, valid)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))
    report = {
        "validation_bits_per_token": round(final, 4),
        "unigram_bits_per_token": round(entropy, 4),
        "heldout_tokens": valid.numel(),
        "training_tokens": rows.numel(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round((time.time() - started) / 60, 1),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
