"""Two processes with ten SAEs each in one folder, and kill -9 of either at random moments."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from sae_afa_plugin import AFAResults

# more of them by hand: KILLS=20 python -m pytest tests/e2e/test_two_processes.py
KILLS = int(os.environ.get("KILLS", "1"))
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("saes")
    for seed in range(20):
        torch.manual_seed(seed)
        sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=2048))
        sae.cfg.metadata.hook_name = f"blocks.{1 + seed % 4}.hook_resid_pre"
        sae.cfg.metadata.model_name = "sae-afa-demo"
        sae.save_model(folder / f"sae {seed:02d}")
    return sorted(folder.iterdir())


def start(saes: list[Path], out: Path) -> subprocess.Popen[str]:
    paths = [argument for sae in saes for argument in ("--path", str(sae))]
    command = [sys.executable, "-m", "sae_afa_plugin.cli", "evaluate", *paths]
    return subprocess.Popen(
        [*command, "--dataset", "embedded", "--tokens", "3000", "--out", str(out)],
        env={**os.environ, **ONE_THREAD},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err


@pytest.fixture(scope="module")
def one_process(saes: list[Path], tmp_path_factory: pytest.TempPathFactory) -> AFAResults:
    out = tmp_path_factory.mktemp("one") / "out"
    finish(start(saes, out))
    return AFAResults.load(out)


def assert_equal(found: AFAResults, expected: AFAResults) -> None:
    names = sorted(expected.summary.index)
    assert sorted(found.summary.index) == names
    pd.testing.assert_frame_equal(
        found.summary.loc[names], expected.summary.loc[names], check_exact=True
    )
    for name in names:
        pd.testing.assert_frame_equal(
            found.tokens_of(name), expected.tokens_of(name), check_exact=True
        )


@pytest.mark.parametrize("overlap", [0, 5])
def test_two_processes_share_a_folder(
    saes: list[Path], one_process: AFAResults, tmp_path: Path, overlap: int
) -> None:
    """Also where both want some of the SAEs: each is read by one of them."""
    both = [
        start(saes[: 10 + overlap], tmp_path / "out"),
        start(saes[10 - overlap :], tmp_path / "out"),
    ]
    for process in both:
        finish(process)
    assert_equal(AFAResults.load(tmp_path / "out"), one_process)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_kill_9_of_either_loses_what_it_was_doing_and_nothing_else(
    saes: list[Path], one_process: AFAResults, tmp_path: Path, seed: int
) -> None:
    out, moment = tmp_path / "out", random.Random(seed)
    processes = [start(saes[:10], out), start(saes[10:], out)]
    end = time.monotonic() + 120
    while not list(out.glob("results/*")) and time.monotonic() < end:  # imports take most of it
        time.sleep(0.01)
    time.sleep(moment.uniform(0, 2.5))
    victim = moment.randrange(2)
    processes[victim].kill()
    processes[victim].communicate()
    before = {f: f.read_bytes() for f in out.glob("results/[!.]*/*")}
    finish(processes[1 - victim])
    finish(start(saes[:10] if victim == 0 else saes[10:], out))
    # what was complete at the time has not been touched
    assert {f: f.read_bytes() for f in before} == before
    assert not [p for p in (out / "results").iterdir() if p.name.startswith(".")]
    assert_equal(AFAResults.load(out), one_process)
