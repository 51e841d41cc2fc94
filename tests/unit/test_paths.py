"""A ``~`` is the user's home, whoever would read it otherwise: no folder of that name is made."""

from __future__ import annotations

import shutil

import pytest
import torch
from datasets import Dataset
from helpers.models import tiny_hooked_sae_transformer
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, StandardSAE, StandardSAEConfig
from sae_lens.config import SAETrainerConfig

from sae_afa_plugin import AFAResults, TopAFATrainingSAEConfig, cli, evaluate_saes, write_report
from sae_afa_plugin.activations.language_model import LanguageModelActivations
from sae_afa_plugin.activations.recording import RecordedActivations, record
from sae_afa_plugin.activations.tensors import TensorActivations
from sae_afa_plugin.activations.tokens import Protocol, sample_tokens
from sae_afa_plugin.files import user_given, user_path
from sae_afa_plugin.plots import save_plots
from sae_afa_plugin.training.coordinator import train_saes
from sae_afa_plugin.training.log import LOG_FILENAME, TrainingLog, read_logs
from sae_afa_plugin.training.run import SAETraining
from sae_afa_plugin.training.runners import LoggedTrainingRunner

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder, and a working folder in which nothing may be left."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "home"
    assert list((tmp_path / "work").iterdir()) == []
    assert not list(tmp_path.rglob("~*"))


def save_sae(folder):
    sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=200))
    torch.nn.init.normal_(sae.W_enc, std=0.3)
    sae.cfg.metadata.hook_name = "blocks.4.hook_resid_pre"
    sae.cfg.metadata.model_name = "sae-afa-demo"
    sae.save_model(folder)


def test_evaluations_recordings_and_pages(home):
    save_sae(home / "sae")
    (home / "text.txt").write_text("Some words in a row, and again some words in a row. " * 20)
    options = {"n_tokens": 60, "context_size": 16, "progress": False}
    evaluate_saes({"a": "~/sae"}, dataset="~/text.txt", out="~/out", **options)
    results = AFAResults.load("~/out")
    assert results.metadata["settings"]["dataset"] == str(home / "text.txt")
    results.save("~/copy")
    write_report(results, "~/page.html")
    save_plots(results, "~/figures")
    source = LanguageModelActivations("sae-afa-demo", "~/text.txt", Protocol(60, 16))
    assert source.n_tokens == 60
    assert (
        sample_tokens(source.model, "~/text.txt", Protocol(60, 16), progress=False).n_tokens == 60
    )
    record(source, ["blocks.4.hook_resid_pre"], "~/recording")
    assert RecordedActivations("~/recording").n_tokens == 60
    evaluate_saes({"a": "~/sae"}, activations="~/recording", progress=False)
    assert sorted(place.name for place in home.iterdir()) == [
        "copy", "figures", "out", "page.html", "recording", "sae", "text.txt",
    ]  # fmt: skip


def test_commands(home, capsys):
    save_sae(home / "sae")
    (home / "text.txt").write_text("Some words in a row, and again some words in a row. " * 20)
    reading = ["--dataset=~/text.txt", "--tokens=60", "--context-size=16"]
    for command in (
        ["evaluate", "--path=~/sae", "--out=~/out", *reading],
        ["plot", "~/out", "--out=~/figures"],
        ["report", "~/out", "--out=~/page.html"],
        ["record", "--model=sae-afa-demo", f"--hook={HOOK}", "--out=~/recording", *reading],
    ):
        assert cli.main(command) == 0, capsys.readouterr().err
    assert sorted(place.name for place in home.iterdir()) == [
        "figures", "out", "page.html", "recording", "sae", "text.txt",
    ]  # fmt: skip


def test_trainings(home):
    cfg = TopAFATrainingSAEConfig(d_in=16, d_sae=32)
    source = TensorActivations({HOOK: torch.randn(512, 16)})
    trainer = SAETrainerConfig(
        total_training_samples=512,
        train_batch_size_samples=64,
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=1),
    )
    train_saes({"one": SAETraining(cfg, HOOK, trainer)}, source, "~/trained", progress=False)
    assert len(read_logs(["~/trained/one"]))
    model = tiny_hooked_sae_transformer()
    runner = LoggedTrainingRunner(
        LanguageModelSAERunnerConfig(
            sae=cfg, hook_name=HOOK, output_path="~/runner", checkpoint_path="~/checkpoints",
            resume_from_checkpoint="~/none", context_size=32, is_dataset_tokenized=True,
        ),
        override_dataset=Dataset.from_dict({"tokens": [list(range(32))] * 9}),
        override_model=model,
    )  # fmt: skip
    assert runner.cfg.output_path == str(home / "runner")
    assert str(runner.cfg.checkpoint_path).startswith(str(home / "checkpoints"))
    assert runner.cfg.resume_from_checkpoint == str(home / "none")


def test_what_a_path_means(home):
    assert user_path("~") == home
    assert user_path("a/~") == user_path("a") / "~"
    assert user_given("somebody/model") == "somebody/model"
    assert user_given(None) is None
    with pytest.raises(ValueError, match="the home folder of '~nobody-at-all/x' is not known"):
        user_path("~nobody-at-all/x")
    shutil.rmtree(home)


def test_lines_of_a_log_that_are_none_are_passed_over(tmp_path):
    file = tmp_path / LOG_FILENAME
    lines = [
        b'{"step": 1, "a": 5}',
        b"[1]",
        b"5",
        b"null",
        b'"x"',
        b'{"step": "x"}',
        b'{"a": 1}',
        b"[" * 10_000,
    ]
    file.write_bytes(
        b"\n".join([*lines, b'\xff{"step": 2}', b'{"step": 3, "a": 6}', b'{"step": 4, "a": 7}'])
    )
    assert read_logs([tmp_path])[["step", "a"]].values.tolist() == [[1, 5], [3, 6], [4, 7]]
    TrainingLog(file, first_step=3)
    assert read_logs([tmp_path])["step"].tolist() == [1, 3]
