"""A whole sweep on a world whose truth is known: its tables, equal L0, rows that are added, kills."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.kills import kill_before_writes
from safetensors.torch import load_file

from sae_afa_plugin import cli
from sae_afa_plugin.sweep.budget import groups_within, state_bytes
from sae_afa_plugin.sweep.figures import drawn
from sae_afa_plugin.sweep.grid import members
from sae_afa_plugin.sweep.page import render_sweep
from sae_afa_plugin.sweep.reader import parse_sweep
from sae_afa_plugin.sweep.results import AT_THIS_L0, MISSED, TABLES, SweepResults
from sae_afa_plugin.sweep.run import run_sweep
from sae_afa_plugin.sweep.sources import sources_of_sweep
from sae_afa_plugin.sweep.tabulate import _how

CONFIG = """
synthetic: {world: small, heldout_tokens: 2000}
seeds: [0, 1]
d_sae: 64
steps: 30
trainer: {train_batch_size_samples: 128, lr: 1e-3}
saes:
  - architecture: truth
  - {architecture: topafa, normalize_activations: none, afa_coefficient: 1/32}
  - {architecture: topk, k: [4, 40]}
  - {architecture: topk, k: 6, control: frozen_decoder}
  - {architecture: topk, k: 6, control: untrained}
  - {architecture: pca, k: 6}
match_l0: [topk]
measure: {bootstrap: 50}
"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    said = []
    results = run_sweep(parse_sweep(CONFIG), out, progress=False, say=said.append)
    return out, results, said


def test_the_tables_say_what_was_trained(sweep):
    out, results, said = sweep
    summary = results.summary
    assert results.refused == {}
    assert len(summary) == 1 + 2 + 4 + 2 + 2 + 1 + 2
    assert said[0] == "12 SAEs from 6 rows: 8 to train, 30 steps of 128 tokens each"
    assert {file.name for file in out.iterdir() if file.is_file()} == {
        *(f"{name}.csv" for name in TABLES), "sweep.json", "report.html",
    }  # fmt: skip
    written = pd.read_csv(out / "summary.csv", index_col="sae")
    assert list(written.index) == list(summary.index)
    assert np.allclose(written["nmse_mean"], summary["nmse_mean"])
    truth = summary.loc[summary["control"] == "truth"].iloc[0]
    assert truth["f1"] == 1
    pca = summary.loc[summary["control"] == "pca"].iloc[0]
    assert pca["l0_mean"] == 6
    frontier = results.frontier.set_index("setting")
    of = summary.groupby("setting")
    assert frontier["nmse_mean"].to_dict() == pytest.approx(of["nmse_mean"].mean().to_dict())
    assert frontier["nmse_mean_sd"].dropna().to_dict() == pytest.approx(
        of["nmse_mean"].std(ddof=1).dropna().to_dict()
    )


def test_others_are_trained_at_the_l0_that_was_chosen(sweep):
    _, results, _ = sweep
    summary, comparisons = results.summary, results.comparisons
    chosen = summary[summary["chooses_l0"]]
    told = summary[
        summary["setting"].str.fullmatch(r"topk k=\d+ d_sae=64")
        & ~summary["setting"].str.contains("k=4 |k=40 ")
    ]
    assert sorted(told["l0_mean"].round()) == sorted(chosen["l0_mean"].round())
    how = comparisons.set_index("how")
    trained, between = how.loc["trained at this L0"], how.loc[["interpolated"]]
    assert trained["nmse_seeds"] == 2
    assert trained["nmse_low"] <= trained["nmse_ratio"] <= trained["nmse_high"]
    by_seed = chosen.set_index("seed")["nmse_mean"] / told.set_index("seed")["nmse_mean"]
    assert by_seed.min() <= trained["nmse_ratio"] <= by_seed.max()
    assert trained["nmse_sd_seeds"] == pytest.approx(by_seed.std(ddof=1), rel=1e-3)
    assert set(between["against"]) == {"topk d_sae=64"}


def test_pca_is_the_best_projection_and_its_directions_are_those_of_numpy(sweep):
    out, results, _ = sweep
    name = results.summary.index[results.summary["control"] == "pca"][0]
    weights = load_file(out / "saes" / name / "sae_weights.safetensors")
    x = sources_of_sweep(parse_sweep(CONFIG), "cpu").training
    x = x.read(["synthetic"], 0, x.n_tokens)["synthetic"].double().numpy()
    _, _, vectors = np.linalg.svd(x - x.mean(0), full_matrices=False)
    cosines = np.abs(weights["W_dec"][:6].double().numpy() @ vectors[:6].T)
    assert np.allclose(np.linalg.svd(cosines)[1], 1, atol=0.02)


def test_a_frozen_decoder_is_the_one_it_began_with(sweep):
    out, results, _ = sweep
    of = results.summary["control"]
    for seed in (0, 1):
        frozen, fresh = (
            load_file(out / "saes" / name / "sae_weights.safetensors")
            for control in ("frozen_decoder", "untrained")
            for name in of.index[(of == control) & (results.summary["seed"] == seed)]
        )
        assert torch.equal(frozen["W_dec"], fresh["W_dec"])
        assert not torch.equal(frozen["W_enc"], fresh["W_enc"])


def test_a_row_that_is_added_is_all_that_is_trained(sweep):
    out, results, _ = sweep
    before = {f: f.stat().st_mtime_ns for f in (out / "saes").rglob("*.safetensors")}
    said = []
    run_sweep(parse_sweep(CONFIG), out, dry_run=True, progress=False, say=said.append)
    assert "8 of them are trained already" in said
    assert not any("measured" in line for line in said)
    more = CONFIG.replace("k: [4, 40]", "k: [4, 8, 40]")
    again = run_sweep(parse_sweep(more), out, progress=False)
    after = {f: f.stat().st_mtime_ns for f in (out / "saes").rglob("*.safetensors")}
    assert {f: after[f] for f in before} == before
    new = {f.parent.name for f in set(after) - set(before)}
    assert new == {f"topk_k=8_d-sae=64_synthetic_seed={seed}" for seed in (0, 1)}
    kept = again.summary.loc[results.summary.index, "nmse_mean"]
    pd.testing.assert_series_equal(kept, results.summary["nmse_mean"])


def test_groups_fit_the_memory():
    sweep = parse_sweep(CONFIG)
    trainings = {
        m.name: m.training(sweep, 96, "cpu") for m in members(sweep, "x") if m.row.is_trained
    }
    one = state_bytes(next(iter(trainings.values())))
    groups = groups_within(trainings, (3.5 * one + 6 * 4 * 128 * 64) / 2**30)
    assert [len(group) for group in groups] == [3, 3, 2]
    assert {n: t for group in groups for n, t in group.items()} == trainings
    with pytest.raises(ValueError, match="alone takes .* raise memory, or lower d_sae"):
        groups_within(trainings, 1e-6)


KILLED = """
from test_run import CONFIG, contents
from sae_afa_plugin.sweep.reader import parse_sweep
from sae_afa_plugin.sweep.run import run_sweep

sweep = parse_sweep(CONFIG.replace("steps: 30", "steps: 4").replace("seeds: [0, 1]", "seeds: [0]"))

def job(folder):
    run_sweep(sweep, folder, progress=False)
"""


def contents(folder: Path):
    """What must be equal: weights, and the tables without times."""
    weights = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}
    summary = pd.read_csv(folder / "summary.csv", index_col="sae")
    times = [column for column in summary if "second" in column or column == "source"]
    comparisons = (folder / "comparisons.csv").read_text()
    return weights, summary.drop(columns=times).to_csv(), comparisons


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it kills copies of a process")
def test_killed_anywhere_it_is_the_same(tmp_path):
    assert kill_before_writes(KILLED, tmp_path, 97) > 3


def test_the_command(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.replace("steps: 30", "steps: 2"))
    command = ["sweep", str(config), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--dry-run"]) == 0
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    said = capsys.readouterr().out
    assert "12 SAEs from 6 rows: 8 to train" in said
    assert re.search(
        r"about \d.* here \(measured\): activations \d.*, training steps \d.*, evaluation \d", said
    )
    config.write_text("hooks: a\nstepps: 3\nsaes: [topkk]")
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "mine.yaml has 2 mistakes\n  line 2: stepps" in said
    assert "did you mean steps" in said
    assert cli.main(["sweep", "nothing.yaml", "--out", str(tmp_path / "out")]) == 2
    assert "name a file, or one of demo.yaml, paper.yaml" in capsys.readouterr().err


# --- what people look at ---


def test_what_was_written_is_what_is_read(sweep, tmp_path):
    out, results, _ = sweep
    (tmp_path / "evaluation").symlink_to(out / "evaluation")
    results.save(tmp_path)
    read = SweepResults.load(tmp_path)
    for name in TABLES:
        pd.testing.assert_frame_equal(
            getattr(read, name), getattr(results, name), check_dtype=False, check_names=False
        )
    assert read.about == results.about
    assert parse_sweep(read.about["config"]) == parse_sweep(CONFIG)
    with pytest.raises(ValueError, match="no sweep.json: name the folder of a finished sae-afa"):
        SweepResults.load(out / "saes")


def test_the_figures_show_the_means_and_deviations_of_the_tables(sweep):
    _, results, _ = sweep
    shown = {one.name: one.draw(results) for one in drawn(results)}
    assert [*shown] == ["frontier", "equal_l0", "ratio", "stability"]
    frontier = results.frontier[results.frontier["family"] == "topk d_sae=64"].sort_values(
        "l0_mean"
    )
    for ax, column in zip(shown["frontier"].axes, ("nmse_mean", "f1", "mcc"), strict=True):
        (line, _, (_, upright)) = next(c for c in ax.containers if c.get_label() == "topk")
        np.testing.assert_allclose(line.get_xdata(orig=False), frontier["l0_mean"])
        np.testing.assert_allclose(line.get_ydata(orig=False), frontier[column])
        ends = np.array(upright.get_segments())[:, :, 1]
        np.testing.assert_allclose(
            (ends[:, 1] - ends[:, 0]) / 2, frontier[f"{column}_sd"].fillna(0), atol=1e-12
        )
    # the truth has no error but rounding, which would be all that is seen of that axis
    labels = [[c.get_label() for c in ax.containers] for ax in shown["frontier"].axes]
    assert ["truth" in of_panel for of_panel in labels] == [False, True, True]
    points = [c[0].get_xdata(orig=False)[0] for c in shown["equal_l0"].axes[0].containers]
    ratios = results.comparisons["nmse_ratio"].dropna()
    assert sorted(points) == pytest.approx(sorted(ratios))


def test_what_was_told_an_l0_and_missed_it_is_no_comparison(sweep):
    for l0_against, how in ((110, AT_THIS_L0), (91, AT_THIS_L0), (111, MISSED), (90, MISSED)):
        assert _how(100.0, l0_against) == how
    _, results, _ = sweep
    missed = replace(results, comparisons=results.comparisons.assign(how=MISSED))
    assert "equal_l0" not in [one.name for one in drawn(missed)]
    page = render_sweep(missed)
    assert MISSED in page
    assert "more error in" not in page


def test_the_page_says_it_in_words_and_numbers_and_escapes(sweep, tmp_path):
    _, results, _ = sweep
    page = render_sweep(results)
    of_topk = results.frontier.set_index("setting").loc["topk k=4 d_sae=64"]
    assert f"{of_topk['nmse_mean']:.4f} ± {of_topk['nmse_mean_sd']:.4f}" in page
    trained = results.comparisons.set_index("how").loc["trained at this L0"]
    assert f"<td>{trained['nmse_low']:.3f} to {trained['nmse_high']:.3f}</td>" in page
    more, less = int(trained["nmse_low"] > 1), int(trained["nmse_high"] < 1)
    assert f"<strong>more error in {more} of 1</strong>" in page
    assert f"less in {less}" in page
    hostile = "<script>alert(1)</script>"
    told = replace(
        results,
        refused={hostile: hostile},
        about={**results.about, "config": hostile, "model": hostile},
        **{
            name: getattr(results, name).assign(
                hook_name=hostile, setting=hostile + getattr(results, name)["setting"]
            )
            for name in TABLES
        },
    )
    assert "<script>alert" not in render_sweep(told)


def test_plot_and_report_know_the_folder_of_a_sweep(sweep, tmp_path, capsys):
    out, _, _ = sweep
    assert cli.main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert "Which SAE reaches what" in (tmp_path / "page.html").read_text()
    assert cli.main(["plot", str(out), "--out", str(tmp_path / "figures")]) == 0
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {"frontier.png", "frontier.pdf", "equal_l0.png", "stability.pdf"} <= names
