"""sae-afa record, and evaluations that read what it has written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from sae_afa_plugin import AFAResults, cli
from sae_afa_plugin.activations import recording
from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.activations.recording import RecordedActivations

HOOK = "blocks.4.hook_resid_pre"
TOKENS = ["--dataset", "embedded", "--tokens", "3000"]
RECORD = ["record", "--model", "sae-afa-demo", "--hook", HOOK, *TOKENS]


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=400))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, "sae-afa-demo"
    folder = tmp_path_factory.mktemp("sae") / "a"
    sae.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recording") / "all"
    assert cli.main([*RECORD, "--out", str(out)]) == 0
    return out


def test_an_evaluation_of_a_recording_is_that_of_the_model(
    sae: Path, recorded: Path, tmp_path: Path
) -> None:
    path = ["evaluate", "--path", str(sae)]
    assert cli.main([*path, "--activations", str(recorded), "--out", str(tmp_path / "one")]) == 0
    assert (
        cli.main([*path, *TOKENS, "--model", "sae-afa-demo", "--out", str(tmp_path / "two")]) == 0
    )
    one, two = AFAResults.load(tmp_path / "one"), AFAResults.load(tmp_path / "two")
    pd.testing.assert_frame_equal(one.summary, two.summary, check_exact=True)
    pd.testing.assert_frame_equal(one.tokens, two.tokens, check_exact=True)
    assert one.metadata["settings"] == two.metadata["settings"]
    # equal settings: what was begun with the one goes on with the other
    assert cli.main([*path, "--activations", str(recorded), "--out", str(tmp_path / "two")]) == 0


def test_saelens_own_metrics_need_the_model_beside_a_recording(
    sae: Path, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--path", str(sae), "--activations", str(recorded), "--core"]
    command += ["--core-tokens", "256", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "pass the model as well, or leave the group out" in capsys.readouterr().err
    assert cli.main([*command, "--model", "sae-afa-demo"]) == 0
    assert AFAResults.load(tmp_path / "out").summary["core_ce_loss_score"].notna().all()


def test_the_model_beside_a_recording_is_the_recorded_one(recorded: Path) -> None:
    other = load_embedded_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert RecordedActivations(recorded, load_embedded_model()).model is not None
    with pytest.raises(ValueError, match="does not give what the recording .* % off.*: pass the"):
        assert RecordedActivations(recorded, other).model


def test_kill_9_and_the_same_command_ends_in_the_same_bytes(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = 60_000  # bytes of a shard: about 39 of them
    monkeypatch.setattr(recording, "_SHARD_BYTES", small)
    assert cli.main([*RECORD, "--out", str(tmp_path / "whole")]) == 0
    code = (
        f"from sae_afa_plugin.activations import recording; recording._SHARD_BYTES = {small}\n"
        f"from sae_afa_plugin import cli; cli.main({[*RECORD, '--out', str(tmp_path / 'killed')]!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=dict(os.environ), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("0*.safetensors"))) < 5 and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match="not finished, .* shards are missing"):
        RecordedActivations(tmp_path / "killed")
    assert cli.main([*RECORD, "--out", str(tmp_path / "killed")]) == 0
    names, others = (
        sorted(file.name for file in (tmp_path / folder).iterdir() if file.suffix != ".lock")
        for folder in ("whole", "killed")
    )
    assert others == names
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 30
    for name in shards:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--hook", "blocks.4.hook_resid_pree"],
            "the model has no hook 'blocks.4.hook_resid_pree'",
        ),
        (["--dtype", "float16", "--tokens", "0"], "n_tokens must be at least 1: got 0"),
    ],
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.main([*RECORD, *arguments, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
