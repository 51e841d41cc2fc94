"""Configs and weights of strangers, with every field wrong in every way: one SAE costs itself."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)

from sae_afa_plugin import TopAFASAE, TopAFASAEConfig, evaluate_saes

# more of them by hand: CONFIGS=2000 python -m pytest tests/unit/test_wrong_files.py
CONFIGS = int(os.environ.get("CONFIGS", "240"))
AT_ONCE = 60
SIZE = {"d_in": 192, "d_sae": 16}
HOOK = "blocks.1.hook_resid_pre"
SAES = {
    "standard": lambda: StandardSAE(StandardSAEConfig(**SIZE)),
    "topk": lambda: TopKSAE(TopKSAEConfig(**SIZE, k=3)),
    "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(**SIZE)),
    "gated": lambda: GatedSAE(GatedSAEConfig(**SIZE)),
    "matching_pursuit": lambda: MatchingPursuitSAE(MatchingPursuitSAEConfig(**SIZE)),
    "topafa": lambda: TopAFASAE(TopAFASAEConfig(**SIZE)),
    "skip_transcoder": lambda: SkipTranscoder(
        SkipTranscoderConfig(**SIZE, d_out=192, apply_b_dec_to_input=False)
    ),
}
# what metadata may say beside what these say
METADATA = (
    *("hook_name_out", "hook_head_index", "hook_head_index_out", "hf_hook_name", "prepend_bos"),
    *("model_class_name", "model_from_pretrained_kwargs", "context_size", "seqpos_slice"),
    *("disable_concat_sequences", "sequence_separator_token", "exclude_special_tokens"),
    *("dataset_path", "training_architecture", "neuronpedia_id", "sae_lens_version", "name"),
)


def deep(n: int) -> Any:
    value: Any = []
    for _ in range(n):
        value = [value]
    return value


VALUES = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 10**12, 10**400, -(10**12), 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "float16", "cuda:7", "meta", "../../up", "\x00\x1b[2J"),
    *("a" * 100_000, "layer_norm", "temporal", "covariance_whitening", HOOK, "hook_z", "😀\udcff"),
    *([], [1], ["x"], [None, None], {}, {"x": 1}, {"trust_remote_code": True}, {"n_ctx": 10**9}),
    *(deep(300), {"architecture": "standard"}),
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for number, (name, make) in enumerate(SAES.items()):
        torch.manual_seed(number)
        sae = make()
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.add_(0.05 * torch.rand_like(parameter))
        sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "sae-afa-demo", HOOK
        if "transcoder" in name:
            sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
        found[name] = tmp_path_factory.mktemp("saes") / name
        sae.save_model(found[name])
    return found


def evaluate(saes: dict[str, Path]):
    return evaluate_saes(
        saes,
        dataset="embedded",
        n_tokens=40,
        context_size=16,
        coherence=False,
        progress=False,
    )


@pytest.fixture(scope="module")
def alone(originals):
    return evaluate({"good": originals["standard"], "also good": originals["topafa"]})


def wrong_config(chance: random.Random, folder: Path) -> str:
    """Put a wrong value at a field of cfg.json, or take it out; returns what was done."""
    config = json.loads((folder / "cfg.json").read_text())
    metadata = config["metadata"]
    inside = chance.random() < 0.5
    place = metadata if inside else config
    name = chance.choice(sorted({*place, *(METADATA if inside else ())}))
    if chance.random() < 0.1:
        place.pop(name, None)
        done = f"{name} taken out"
    else:
        place[name] = value = chance.choice(VALUES)
        done = f"{name}={str(value)[:40]!r}"
    (folder / "cfg.json").write_text(json.dumps(config))
    return done


def wrong_bytes(chance: random.Random, folder: Path) -> str:
    """Cut a file somewhere, or change some of its bytes; returns what was done."""
    file = folder / chance.choice(("cfg.json", "sae_weights.safetensors"))
    content = bytearray(file.read_bytes())
    # often in the header, which is short
    at = int(len(content) * chance.random() ** chance.choice((1, 8)))
    if chance.random() < 0.5:
        file.write_bytes(content[:at])
        return f"{file.name} cut at {at} of {len(content)}"
    for i in range(at, min(len(content), at + chance.choice((1, 8, 100)))):
        content[i] = chance.randrange(256)
    file.write_bytes(content)
    return f"{file.name} changed at {at}"


@pytest.mark.parametrize("seed", range(-(-CONFIGS // AT_ONCE)))
def test_whatever_one_of_them_holds_the_others_are_evaluated(originals, alone, tmp_path, seed):
    chance = random.Random(seed)
    saes = {"good": originals["standard"]}
    done: dict[str, str] = {}
    for number in range(AT_ONCE):
        architecture = chance.choice(sorted(originals))
        folder = tmp_path / f"{architecture} {number}"
        shutil.copytree(originals[architecture], folder)
        change = wrong_config if chance.random() < 0.75 else wrong_bytes
        done[folder.name] = change(chance, folder)
        saes[folder.name] = folder
    saes["also good"] = originals["topafa"]
    results = evaluate(saes)
    refused = results.metadata["refused"]
    assert {*results.summary.index, *refused} == set(saes)
    for name in ("good", "also good"):
        pd.testing.assert_frame_equal(results.tokens_of(name), alone.tokens_of(name))
    for name, reason in refused.items():
        assert 0 < len(reason) < 700, done[name]
        assert "\n" not in reason, (done[name], reason)
        assert "Traceback" not in reason, (done[name], reason)
    # something was wrong with most of them, and some of what was changed decides nothing
    assert AT_ONCE / 4 < len(refused) < AT_ONCE
