"""What a stranger's files cannot do: an SAE whose config would run Python, through the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub import LoopbackHub, client_environment
from sae_lens import StandardSAE, StandardSAEConfig

_MODEL = """
open({marker!r}, "w").close()
from transformers import PretrainedConfig, PreTrainedModel

class Config(PretrainedConfig):
    model_type = "strange"

class Model(PreTrainedModel):
    config_class = Config
"""


def _sae(folder: Path, model_name: str, **metadata: object) -> Path:
    sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=256))
    with torch.no_grad():
        sae.b_enc.fill_(0.1)
    sae.cfg.metadata.model_name = model_name
    sae.cfg.metadata.hook_name = "blocks.4.hook_resid_pre"
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(folder)
    return folder


def _evaluate(hub: LoopbackHub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sae_afa_plugin.cli", "evaluate", *arguments]
    command += ["--dataset", "embedded", "--tokens", "100", "--out", str(tmp_path / "out")]
    return subprocess.run(
        command,
        env=client_environment(hub, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        input="y\n" * 9,
        timeout=300,
        check=False,
    )


@pytest.fixture
def strange(tmp_path):
    """A hub with a model that comes with Python, and where that leaves a mark."""
    with LoopbackHub(tmp_path / "hub") as hub:
        repo = hub.repo("strange/model")
        repo.mkdir(parents=True)
        auto = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}
        config = {"model_type": "strange", "architectures": ["Model"], "auto_map": auto}
        (repo / "config.json").write_text(json.dumps(config))
        marker = tmp_path / "ran"
        (repo / "strange.py").write_text(_MODEL.format(marker=str(marker)))
        yield hub, marker


_TRUSTS = {"model_from_pretrained_kwargs": {"trust_remote_code": True}}
_AUTO = {"model_class_name": "AutoModelForCausalLM"}


@pytest.mark.parametrize(
    "metadata",
    [{**_TRUSTS, **_AUTO}, _AUTO, {**_TRUSTS, "hook_name": "transformer.h.0"}],
    ids=["asked for", "not asked for", "by the name of a hook"],
)
def test_an_sae_cannot_have_the_code_of_its_model_run(strange, tmp_path, metadata):
    hub, marker = strange
    folder = _sae(tmp_path / "sae", "strange/model", **metadata)
    done = _evaluate(hub, tmp_path, "--path", str(folder))
    assert done.returncode == 2
    assert "--trust-remote-code" in done.stderr
    assert "Traceback" not in done.stderr
    assert not marker.exists()


def test_the_user_can(strange, tmp_path):
    hub, marker = strange
    folder = _sae(tmp_path / "sae", "strange/model", **_AUTO)
    _evaluate(hub, tmp_path, "--path", str(folder), "--trust-remote-code")
    assert marker.exists()


def test_it_costs_the_others_nothing(strange, tmp_path):
    hub, marker = strange
    bad = _sae(tmp_path / "bad", "sae-afa-demo", **_TRUSTS)
    good = _sae(tmp_path / "good", "sae-afa-demo")
    done = _evaluate(hub, tmp_path, "--path", str(bad), "--path", str(good))
    assert done.returncode == 1, done.stderr
    assert "bad was not evaluated: its metadata ask for trust_remote_code" in " ".join(
        done.stdout.split()
    )
    assert not marker.exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_cannot_show_everything_loses_nothing(tmp_path, encoding):
    folder = _sae(tmp_path / "größe", "sae-afa-demo")
    command = [sys.executable, "-m", "sae_afa_plugin.cli"]
    evaluate = ["evaluate", "--path", str(folder), "--dataset", "embedded", "--tokens", "100"]
    for arguments in ([*evaluate, "--out", "out"], ["report", "out"], ["evaluate", "--help"]):
        done = subprocess.run(
            [*command, *arguments],
            env={**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding},
            cwd=tmp_path,
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        shown = done.stdout.decode(encoding)
        if arguments[0] == "evaluate" and "--help" not in arguments:
            assert ("größe" if encoding != "ascii" else "gr??e") in shown
    assert (tmp_path / "out" / "results.json").is_file()
