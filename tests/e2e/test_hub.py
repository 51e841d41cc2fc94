"""Sharing SAEs and training on hub models, with the real clients against a hub on the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.hub import LoopbackHub, client_environment, run_client
from helpers.models import gpt2_tokenizer, tiny_gpt2
from sae_lens import SAE

from sae_afa_plugin import TopAFASAE, TopAFATrainingSAE, TopAFATrainingSAEConfig
from sae_afa_plugin.activations.text import standard_library_texts

HOOK = "blocks.1.hook_resid_pre"
D_MODEL = 32


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A hub that has a small GPT-2 under the name ``gpt2``, and some text as OpenWebText."""
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        # TransformerLens asks for "gpt2", not for "openai-community/gpt2"
        tiny_gpt2(2, D_MODEL).save_pretrained(hub.repo("gpt2"))
        gpt2_tokenizer().save_pretrained(hub.repo("gpt2"))

        dataset = hub.repo("Skylion007/openwebtext", "datasets")
        dataset.mkdir(parents=True)
        lines = [json.dumps({"text": text}) for text in standard_library_texts("train")[:40]]
        (dataset / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
        yield hub


# --- the hub itself ---

ASK_THE_HUB = """
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
)

def refused(error, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except error:
        return True

api, repo = HfApi(), "somebody/files"
assert refused(RepositoryNotFoundError, api.repo_info, repo)
api.create_repo(repo)
api.create_repo(repo, exist_ok=True)
first = api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="a/b.txt", repo_id=repo)
same = api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="a/b.txt", repo_id=repo)
assert first.oid == same.oid == api.repo_info(repo).sha

with open(hf_hub_download(repo, "a/b.txt", revision=first.oid)) as file:
    assert file.read() == "0123456789"
assert refused(EntryNotFoundError, hf_hub_download, repo, "a/c.txt")
assert refused(RevisionNotFoundError, hf_hub_download, repo, "a/b.txt", revision="v2")
assert [found.path for found in api.get_paths_info(repo, ["a", "a/b.txt", "c"])] == ["a", "a/b.txt"]
with HfFileSystem().open(f"{repo}/a/b.txt") as file:
    file.seek(3)
    assert file.read(4) == b"3456"

api.upload_file(path_or_fileobj=b"x", path_in_repo="c.txt", repo_id=repo)
api.delete_file("a/b.txt", repo)
assert api.list_repo_files(repo) == ["c.txt"]
"""


def test_the_hub_answers_as_the_client_expects(hub: LoopbackHub, tmp_path: Path) -> None:
    run_client(hub, ASK_THE_HUB, tmp_path)
    assert not hub.unknown_requests


# --- sharing ---

UPLOAD = """
import json
import torch
from sae_lens import SAE, upload_saes_to_huggingface
from sae_afa_plugin import TopAFATrainingSAE, TopAFATrainingSAEConfig

def save_trained(seed, folder):
    torch.manual_seed(seed)
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(d_in=16, d_sae=64))
    with torch.no_grad():  # as training may leave it
        sae.W_dec.mul_(torch.rand(64, 1) + 0.5)
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.1)
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)

repo = "somebody/topafa-test"
local = {f"blocks.{layer}.hook_resid_pre": save_trained(layer, f"{layer}") for layer in (0, 1)}
upload_saes_to_huggingface({"blocks.0.hook_resid_pre": "0"}, hf_repo_id=repo)
upload_saes_to_huggingface(
    {"blocks.1.hook_resid_pre": local["blocks.1.hook_resid_pre"]}, hf_repo_id=repo
)

x = torch.randn(32, 16)
for sae_id, expected in local.items():
    sae = SAE.from_pretrained(repo, sae_id)
    print(json.dumps({
        "sae_id": sae_id,
        "class": type(sae).__module__ + "." + type(sae).__name__,
        "architecture": sae.cfg.architecture(),
        "same": torch.equal(sae.encode(x), expected.encode(x)),
        "active": int(sae.encode(x).count_nonzero()),
        "largest_norm_error": float((sae.W_dec.norm(dim=-1) - 1).abs().max()),
    }))
"""


@pytest.fixture(scope="module")
def uploaded(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two SAEs in ``somebody/topafa-test``, and what came back when they were loaded."""
    printed = run_client(hub, UPLOAD, tmp_path_factory.mktemp("uploader"))
    return [json.loads(line) for line in printed.splitlines()]


def test_uploaded_saes_come_back_as_they_were(
    hub: LoopbackHub, uploaded: list[dict[str, Any]]
) -> None:
    assert [sae["sae_id"] for sae in uploaded] == [
        "blocks.0.hook_resid_pre",  # from a folder
        "blocks.1.hook_resid_pre",  # from an object
    ]
    for sae in uploaded:
        assert sae["class"] == "sae_afa_plugin.saes.topafa.TopAFASAE"
        assert sae["architecture"] == "topafa"
        assert sae["same"]
        assert 0 < sae["active"] < 32 * 64
        assert sae["largest_norm_error"] < 1e-6
        path = f"/somebody/topafa-test/resolve/main/{sae['sae_id']}/sae_weights.safetensors"
        assert f"GET {path}" in hub.requests
    assert (hub.repo("somebody/topafa-test") / "README.md").exists()


def test_loading_needs_the_plugin_imported_first(
    hub: LoopbackHub, uploaded: list[dict[str, Any]], tmp_path: Path
) -> None:
    code = """
from sae_lens import SAE

try:
    SAE.from_pretrained("somebody/topafa-test", "blocks.0.hook_resid_pre")
except KeyError as error:
    print(repr(error))

import sae_afa_plugin

sae = SAE.from_pretrained("somebody/topafa-test", "blocks.0.hook_resid_pre")
print(type(sae).__name__)
"""
    assert run_client(hub, code, tmp_path).splitlines() == ["KeyError('topafa')", "TopAFASAE"]


# --- training on a model and a dataset from the hub ---


def assert_trained(folder: Path) -> None:
    sae = SAE.load_from_disk(folder)
    assert isinstance(sae, TopAFASAE)
    assert sae.cfg.architecture() == "topafa"
    assert sae.cfg.metadata.hook_name == HOOK
    assert sae.cfg.metadata.model_name == "gpt2"
    assert sae.W_dec.shape == (128, D_MODEL)
    assert all(weights.isfinite().all() for weights in sae.state_dict().values())


def assert_came_from(hub: LoopbackHub, requests: list[str]) -> None:
    for end in ("model.safetensors", "tokenizer.json", "train.jsonl"):
        assert any(request.startswith("GET") and request.endswith(end) for request in requests)
    assert not hub.unknown_requests


def test_saelens_runner_trains_with_everything_from_the_hub(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    before = len(hub.requests)
    code = """
from sae_lens import LanguageModelSAETrainingRunner
from sae_afa_plugin.training.recipes import paper_runner_config
from transformer_lens import HookedTransformer

print(HookedTransformer.from_pretrained("gpt2").cfg.d_model)
cfg = paper_runner_config(
    layer=1, d_in=32, d_sae=128,
    context_size=32, training_tokens=8 * 512, train_batch_size_tokens=512,
    store_batch_size_prompts=8, n_batches_in_buffer=32,  # a buffer of 32 * 32 tokens
    output_path="sae", checkpoint_path="checkpoints", verbose=False,
)
assert cfg.streaming
LanguageModelSAETrainingRunner(cfg).run()
"""
    assert str(D_MODEL) in run_client(hub, code, tmp_path).split()
    assert_trained(tmp_path / "sae")
    assert_came_from(hub, hub.requests[before:])


def test_paper_config_trains_with_its_own_batch_context_and_buffer(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    code = """
from sae_lens import LanguageModelSAETrainingRunner
from sae_afa_plugin.training.recipes import paper_runner_config

cfg = paper_runner_config(
    layer=1, d_in=32, d_sae=128, training_tokens=2 * 4096,
    output_path="sae", checkpoint_path=None, verbose=False,
)
LanguageModelSAETrainingRunner(cfg).run()
"""
    run_client(hub, code, tmp_path)
    assert_trained(tmp_path / "sae")


# --- the command ---


def sae_afa_train(
    hub: LoopbackHub, tmp_path: Path, **flags: object
) -> subprocess.CompletedProcess[str]:
    """Run ``sae-afa train`` for a few steps, with some flags set differently."""
    settings = {
        "architecture": "topafa",
        "model_name": "gpt2",
        "hook_name": HOOK,
        "d_in": D_MODEL,
        "d_sae": 128,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 32,
        "training_tokens": 8 * 512,
        "train_batch_size_tokens": 512,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 32,
        "output_path": "sae",
        "checkpoint_path": "checkpoints",
        "log_to_wandb": False,
        "wandb_log_frequency": 2,
        "verbose": False,
        **flags,
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, "-m", "sae_afa_plugin.cli", "train", *arguments],
        env=client_environment(hub, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_command_trains_and_leaves_weights_and_a_log(hub: LoopbackHub, tmp_path: Path) -> None:
    before = len(hub.requests)
    done = sae_afa_train(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_trained(tmp_path / "sae")
    assert_came_from(hub, hub.requests[before:])

    log = (tmp_path / "sae" / "training_log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line in lines:
        assert 1 <= line["metrics/mean_l0"] <= 128
        assert line["metrics/norm_ratio"] > 0
        assert line["metrics/nmse"] > 0
        assert 0 <= line["metrics/over_activated"] <= 1
        assert line["losses/afa_loss"] >= 0
    assert "training_log.jsonl" in done.stdout


def broken_sae(folder: Path) -> Path:
    """A training SAE whose weights file was cut off."""
    TopAFATrainingSAE(TopAFATrainingSAEConfig(d_in=D_MODEL, d_sae=128)).save_model(folder)
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        pytest.param(
            {"hook_name": "blocks.1.hook_resid_pree"},
            ["no hook 'blocks.1.hook_resid_pree'", "did you mean 'blocks.1.hook_resid_pre'"],
            id="missing hook",
        ),
        pytest.param(
            {"n_batches_in_buffer": 4},
            ["n_batches_in_buffer=4 times 32 tokens", "train_batch_size_tokens=512", "=32 or more"],
            id="small buffer",
        ),
        pytest.param(
            {"context_size": 999}, ["context_size is 999", "gpt2 takes 128"], id="long context"
        ),
        pytest.param({"log_to_wandb": True}, ["wandb", "login"], id="wandb without a login"),
        pytest.param({"architecture": "topaf"}, ["invalid choice: 'topaf'"], id="unknown name"),
        pytest.param({"d_in": 48}, ["width 32", "d_in=48", HOOK], id="wrong width"),
        pytest.param(
            {"model_name": "gpt3"},
            ["TransformerLens has no model 'gpt3': did you mean ", "gpt2"],
            id="unknown model",
        ),
        pytest.param(
            {"from_pretrained_path": "broken"},
            [
                "the weights in 'broken' cannot be read",
                "Error while deserializing header",
                "the file is damaged or incomplete",
            ],
            id="truncated weights",
        ),
    ],
)
def test_command_says_what_is_wrong(
    hub: LoopbackHub, tmp_path: Path, flags: dict[str, object], said: list[str]
) -> None:
    broken_sae(tmp_path / "broken")
    done = sae_afa_train(hub, tmp_path, **flags)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert ": error: " in message
    for part in said:
        assert part in message
    assert not (tmp_path / "sae").exists()
