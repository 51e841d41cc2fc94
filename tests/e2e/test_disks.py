"""Every command that writes, on a disk that is full or read-only: said, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.disks import read_only, small_disk
from sae_lens import StandardSAE, StandardSAEConfig

from sae_afa_plugin import cli
from sae_afa_plugin.demo import DEMOS

HOOK = "blocks.4.hook_resid_pre"
TOKENS = ["--dataset", "embedded", "--tokens", "2000"]
ROOM = 1 << 26


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE, and an evaluation of it."""
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=400))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, "sae-afa-demo"
    folder = tmp_path_factory.mktemp("made")
    sae.save_model(folder / "sae")
    command = ["evaluate", "--path", str(folder / "sae"), *TOKENS]
    assert cli.main([*command, "--out", str(folder / "evaluation")]) == 0
    return folder


def evaluate(made: Path, out: Path) -> list[str]:
    return ["evaluate", "--path", str(made / "sae"), *TOKENS, "--out", str(out)]


def record(made: Path, out: Path) -> list[str]:
    return ["record", "--model", "sae-afa-demo", "--hook", HOOK, *TOKENS, "--out", str(out)]


def demo(made: Path, out: Path) -> list[str]:
    return ["demo", "--out", str(out)]


def plot(made: Path, out: Path) -> list[str]:
    return ["plot", str(made / "evaluation"), "--out", str(out)]


def report(made: Path, out: Path) -> list[str]:
    return ["report", str(made / "evaluation"), "--out", str(out.parent / "report.html")]


COMMANDS = [evaluate, record, pytest.param(demo, marks=pytest.mark.slow), plot, report]


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = DEMOS["embedded"]
    setup = replace(
        embedded.setup, training_tokens=2048, heldout_tokens=500, ce_tokens=256,
        block_tokens=1024, checkpoint_seconds=0.0,
    )  # fmt: skip
    monkeypatch.setitem(DEMOS, "embedded", replace(embedded, d_sae=256, k=4, setup=setup))


def said(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a command ends with."""
    capsys.readouterr()
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def whole_files(folder: Path) -> dict[Path, bytes]:
    """What is finished; nothing is left of what is not, and a checkpoint goes with what it is for."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".lock"]
    assert not [f for f in files if ".partial" in str(f) or f.name.startswith(".")]
    return {
        f: f.read_bytes()
        for f in files
        if (f.name in FINISHED or f.suffix == ".png") and "checkpoint-" not in f.parent.name
    }


FINISHED = ("result.json", "tokens.parquet", "features.parquet", "sae_weights.safetensors")


@contextlib.contextmanager
def disk_for(
    command: Callable[[Path, Path], list[str]], made: Path, folder: Path, share: float
) -> Iterator[Callable[[int], None]]:
    """A disk that has room for a share of what a command writes."""
    with small_disk(folder / "roomy", ROOM):
        assert cli.main(command(made, folder / "roomy" / "out")) == 0
        used = shutil.disk_usage(folder / "roomy").used
    with small_disk(folder / "disk", int(share * used)) as enlarge:
        yield enlarge


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("share", [0.1, 0.75])
def test_a_full_disk_is_said_and_nothing_is_lost(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    small_demo: None,
    command: Callable[[Path, Path], list[str]],
    share: float,
) -> None:
    with disk_for(command, made, tmp_path, share) as enlarge:
        out = tmp_path / "disk" / "out"
        message = said(command(made, out), capsys)
        assert str(tmp_path / "disk") in message
        if command is record:  # knows beforehand
            assert "the recording needs" in message
            assert "record fewer tokens or hooks" in message
        else:
            assert "could not be written in" in message
            assert "(No space left on device)" in message
            assert "make room on that disk and run the same again" in message
        before = whole_files(out.parent)
        enlarge(ROOM)
        assert cli.main(command(made, out)) == 0
        assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_folder_is_said(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    small_demo: None,
    command: Callable[[Path, Path], list[str]],
) -> None:
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            stack.enter_context(small_disk(tmp_path / "disk", ROOM))
        else:
            (tmp_path / "disk").mkdir()
        out = tmp_path / "disk" / "out"
        with read_only(tmp_path / "disk"):
            message = said(command(made, out), capsys)
            assert f"could not be written in '{tmp_path / 'disk'}" in message
            assert "make that folder writable and run the same again" in message
        assert list((tmp_path / "disk").iterdir()) == []
        assert cli.main(command(made, out)) == 0


def test_a_recording_that_filled_the_disk_goes_on(
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else's files may take the room that was free when it began."""
    plenty = shutil.disk_usage(tmp_path)._replace(free=ROOM)
    with disk_for(record, made, tmp_path, 0.5) as enlarge:
        for size in (4096, 3 * 4096, 1 << 16, 1 << 20):
            enlarge(size)
            with monkeypatch.context() as patch:
                patch.setattr(shutil, "disk_usage", lambda place: plenty)
                message = said(record(made, tmp_path / "disk" / "out"), capsys)
            assert "(No space left on device)" in message
            assert f"could not be written in '{tmp_path / 'disk' / 'out'}'" in message
            whole_files(tmp_path / "disk")
        # what a kill leaves of a shard, by safetensors' name for it
        aside = tmp_path / "disk" / "out" / ".00000.safetensors.partial"
        aside.mkdir()
        (aside / ".tmpKcQ0bR").write_bytes(b"half")
        enlarge(ROOM)
        assert cli.main(record(made, tmp_path / "disk" / "out")) == 0
        names = {f.name for f in (tmp_path / "disk" / "out").iterdir()}
        assert sorted(names - {".recording.lock"}) == [  # which filelock may leave
            "00000.safetensors", "manifest.json", "places.parquet", "sequences.parquet",
        ]  # fmt: skip
