"""What the hub on the loopback has: gpt2, a release of SAEs for it, and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from helpers.models import gpt2_tokenizer, tiny_gpt2
from sae_afa_plugin.activations.text import standard_library_texts

RELEASE = "gpt2-small-res-jb"
RELEASE_IDS = [*(f"blocks.{i}.hook_resid_pre" for i in range(12)), "blocks.11.hook_resid_post"]
RELEASE_REPO = "jbloom/GPT2-Small-SAEs-Reformatted"
D_MODEL, D_SAE = 16, 48
SUBSET = "OpenWebText2"


def publish_gpt2(folder: Path) -> None:
    """Twelve layers, whose residual stream has a mean that is far from zero."""
    model = tiny_gpt2(12, D_MODEL, initializer_range=0.3)
    with torch.no_grad():
        model.transformer.wte.weight += 0.2
        for block in model.transformer.h:
            block.mlp.c_proj.bias += 0.1
    model.save_pretrained(folder)
    gpt2_tokenizer().save_pretrained(folder)


def publish_old_sae(folder: Path, hook: str, seed: int) -> None:
    """An SAE as it was saved in 2024: the config's names are those of SAELens before 6.0."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    folder.mkdir(parents=True)
    lengths = torch.rand(D_SAE, 1, generator=generator) * 2 + 0.25
    weights = {
        "W_enc": random(D_MODEL, D_SAE) / D_MODEL**0.5,
        "W_dec": random(D_SAE, D_MODEL) / D_MODEL**0.5 * lengths,
        "b_enc": random(D_SAE) * 0.2,
        "b_dec": random(D_MODEL) * 0.5,
    }
    save_file(weights, folder / "sae_weights.safetensors")
    config = {
        "model_name": "gpt2-small",
        "hook_point": hook,
        "hook_point_layer": int(hook.split(".")[1]),
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "use_cached_activations": False,
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "expansion_factor": D_SAE // D_MODEL,
        "activation_fn": "relu",
        "normalize_activations": False,  # a boolean then
        "b_dec_init_method": "geometric_median",
        "l1_coefficient": 8e-5,
        "device": "cuda",
        "dtype": "torch.float32",
        "seed": 42,
        "from_pretrained_path": None,
    }
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")


def publish_lines(repo: Path, rows: list[dict[str, Any]]) -> None:
    repo.mkdir(parents=True)
    lines = "\n".join(map(json.dumps, rows))
    (repo / "train.jsonl").write_text(lines, encoding="utf-8")


def text_of_exactly(n: int) -> str:
    """A text that the tokenizer turns into n tokens."""
    tokenizer = gpt2_tokenizer()
    for text in standard_library_texts("heldout"):
        cut = tokenizer.decode(tokenizer(text)["input_ids"][:n])
        if len(tokenizer(cut)["input_ids"]) == n:
            return cut
    raise AssertionError(f"no text has a beginning of {n} tokens")


def publish_release(hub_repo: Path) -> None:
    """The thirteen SAEs of :data:`RELEASE`."""
    for seed, hook in enumerate(RELEASE_IDS):
        publish_old_sae(hub_repo / hook, hook, seed)


def pile() -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a dataset like pile-10k, and the texts that the paper's protocol may use."""
    tokenizer = gpt2_tokenizer()
    long = [
        t for t in standard_library_texts("train")[:200] if len(tokenizer(t)["input_ids"]) >= 200
    ]
    assert len(long) >= 84
    fitting = [*long[:23], text_of_exactly(127)]  # with BOS, 127 are just enough
    rows: list[dict[str, Any]] = []
    for i, text in enumerate(fitting):
        rows.append({"text": long[30 + i], "meta": {"pile_set_name": "Github"}})
        rows.append({"text": text, "meta": {"pile_set_name": SUBSET}})
        rows.append({"text": long[60 + i][:80], "meta": {"pile_set_name": SUBSET}})
    rows.append({"text": text_of_exactly(126), "meta": {"pile_set_name": SUBSET}})
    return rows, fitting
