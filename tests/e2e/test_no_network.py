"""Without a network: what is in the hub's cache is evaluated, the rest is said at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_afa_plugin import TopAFASAE, TopAFASAEConfig

SAE_ID = "blocks.4.hook_resid_pre"
COMMIT = "a" * 40


def save(folder: Path, model_name: str = "sae-afa-demo") -> None:
    sae = TopAFASAE(TopAFASAEConfig(d_in=192, d_sae=384))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = SAE_ID, model_name
    sae.save_model(folder)


@pytest.fixture
def cached(tmp_path):
    """A cache of the hub, as huggingface_hub leaves it, with one SAE of a repository."""
    repo = tmp_path / "home" / "hub" / "models--someone--saes"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    save(repo / "snapshots" / COMMIT / SAE_ID)
    return tmp_path


def evaluate(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    return subprocess.run(
        [sys.executable, "-m", "sae_afa_plugin.cli", "evaluate", *arguments, "--tokens", "100"],
        env={**os.environ, **nobody, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_what_is_named_exactly_is_read_from_the_cache(cached):
    done = evaluate(
        *(cached, "someone/saes", "--sae-id", SAE_ID, "--dataset", "embedded"),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ids", [[], ["--sae-id", "blocks.*"], ["--sae-id", "blocks.5"]])
def test_what_would_need_a_list_is_said(cached, ids):
    done = evaluate(cached, "someone/saes", *ids, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "cannot be listed, because HF_HUB_OFFLINE forbids to ask the hub" in done.stderr


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("'nobody/saes'", ["nobody/saes", "--sae-id", SAE_ID]),
        ("'jbloom/GPT2-Small-SAEs-Reformatted'", ["gpt2-small-res-jb"]),
        ("'gpt2'", ["--path", "of-gpt2", "--dataset", "embedded"]),
        ("'nobody/texts'", ["--path", "mine", "--dataset", "nobody/texts"]),
    ],
    ids=["repository", "release", "model", "dataset"],
)
def test_without_an_answer_it_is_one_sentence_and_no_second_try(tmp_path, what, arguments, offline):
    save(tmp_path / "mine")
    save(tmp_path / "of-gpt2", "gpt2")
    done = evaluate(tmp_path, *arguments, HF_HUB_OFFLINE=offline)
    assert done.returncode == 2
    assert "Retrying" not in done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert what in last
    assert ("offline" in last.lower()) if offline == "1" else ("the hub does not answer" in last)
