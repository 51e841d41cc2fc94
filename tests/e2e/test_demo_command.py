"""``sae-afa demo`` on the embedded model, shortened, and its scores against a slow computation."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.kills import kill_before_writes
from sae_lens import SAE

from sae_afa_plugin import cli
from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.activations.tokens import tokenize
from sae_afa_plugin.demo import DEMOS
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.training.log import read_logs


def shortened(demo):
    short = replace(demo.setup, training_tokens=30 * 1024, heldout_tokens=2000, ce_tokens=2048)
    return replace(demo, d_sae=384, k=40, setup=short)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the printed text of one short demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEMOS, "embedded", shortened(DEMOS["embedded"]))
        patch.setenv("COLUMNS", "300")
        printed = []
        patch.setattr(cli.Console, "print", lambda self, *things, **how: printed.extend(things))
        assert cli.main(["demo", "--out", str(out)]) == 0
    table = next(thing for thing in printed if hasattr(thing, "columns"))
    return out, table


def test_the_table_has_the_three_architectures(finished):
    _, table = finished
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [str(row[0]) for row in rows] == ["topafa", "topk", "batchtopk"]
    assert [column.header.replace("\n", " ") for column in table.columns] == [
        "SAE", "L0", "NMSE (mean)", "NMSE (median)", "CE recovered", "‖z‖", "‖f‖", "‖f‖/‖z‖",
        "over\u2011 activated", "inter- ference energy", "unex- plained energy", "shrink- age energy",
        "cosine", "L2 ratio", "recon. bias", "ε LBO", "inter- ference", "cohe- rence", "mean |cos|",
        "dead", "alive", "> 1 %", "> 10 %", "training seconds",
    ]  # fmt: skip
    assert rows[1][1] == "40.0"


def test_the_results_are_what_a_slow_computation_gives(finished):
    out, _ = finished
    results = AFAResults.load(out / "evaluation")
    assert list(results.summary.index) == ["topafa", "topk", "batchtopk"]
    model = load_embedded_model()
    tokens = tokenize(model, standard_library_texts("heldout"), 128)[:16]
    hook = DEMOS["embedded"].setup.hook_name
    _, cache = model.run_with_cache(tokens, names_filter=hook)
    x = cache[hook][tokens != model.tokenizer.bos_token_id][:2000]
    z = ((x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)).double().numpy()
    for name, found in results.summary.iterrows():
        sae = SAE.load_from_disk(out / name)
        f = sae.encode(x).detach().double().numpy()
        W, b = sae.W_dec.detach().double().numpy(), sae.b_dec.detach().double().numpy()
        error = z - (f @ W + b)
        expected = {
            "l0_mean": np.mean([np.count_nonzero(row) for row in f]),
            "nmse_mean": np.mean(np.sum(error**2, 1) / np.sum(z**2, 1)),
            "norm_ratio_mean": np.mean(
                np.sqrt(((f * np.linalg.norm(W, axis=1)) ** 2).sum(1) + (b**2).sum())
                / np.linalg.norm(z, axis=1)
            ),
            "dead_features": np.sum(~(f != 0).any(0)),
        }
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4), name
        # CE: the definition, with special tokens left as they are and out of the mean
        keep = tokens != model.tokenizer.bos_token_id

        def loss(hook_fn, keep=keep):
            hooks = [] if hook_fn is None else [(hook, hook_fn)]
            with torch.no_grad():
                each = model.run_with_hooks(
                    tokens, return_type="loss", loss_per_token=True, fwd_hooks=hooks
                )
            return each[keep[:, :-1]].mean().item()

        def splice(acts, hook, sae=sae, keep=keep):
            return torch.where(keep[..., None], sae.decode(sae.encode(acts)), acts)

        zero = loss(lambda acts, hook: torch.zeros_like(acts))
        recovered = (zero - loss(splice)) / (zero - loss(None))
        assert found["core_ce_loss_score"] == pytest.approx(recovered, abs=1e-3), name


def test_every_sae_has_its_log(finished):
    out, _ = finished
    log = read_logs(out / name for name in ("topafa", "topk", "batchtopk"))
    assert log[["step", "sae"]].values.tolist() == [
        [step, name] for name in ("topafa", "topk", "batchtopk") for step in (10, 20, 30)
    ]
    assert (
        log.groupby("sae")["losses/mse_loss"].nth(2) < 100
    ).all()  # of 191 before the first step


def test_run_again_it_trains_and_evaluates_nothing(finished, monkeypatch):
    out, _ = finished
    demo = DEMOS["embedded"]
    monkeypatch.setitem(DEMOS, "embedded", shortened(demo))
    files = [file for file in out.glob("*/*") if file.parent.name != "evaluation"]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    summary = AFAResults.load(out / "evaluation").summary
    assert cli.main(["demo", "--out", str(out)]) == 0
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files} == before
    pd.testing.assert_frame_equal(AFAResults.load(out / "evaluation").summary, summary)


def test_other_settings_need_another_folder(finished, monkeypatch, capsys):
    out, _ = finished
    monkeypatch.setitem(DEMOS, "embedded", replace(shortened(DEMOS["embedded"]), k=41))
    assert cli.main(["demo", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert (
        "topk' holds a training with other settings (sae.k was 40 and is 41): use another" in error
    )


KILLED = """
from dataclasses import replace

import torch
from sae_afa_plugin import cli, top_afa
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.demo import DEMOS
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.saes import sparse
from sae_afa_plugin.training.log import read_logs

demo = DEMOS["embedded"]
# 4 blocks of 4 steps, with checkpoints behind each
short = replace(
    demo.setup, training_tokens=16 * 256, batch_size=256, block_tokens=1024,
    heldout_tokens=500, ce_tokens=1024, checkpoint_seconds=0.0,
)
DEMOS["embedded"] = replace(demo, d_sae=256, k=20, setup=short)
top_afa(torch.ones(1, 2), torch.ones(1))
sparse.decode(torch.zeros(1, 2), torch.ones(2, 2))
standard_library_texts("train"), standard_library_texts("heldout")

def job(folder):
    assert cli.main(["demo", "--out", folder]) == 0

def contents(folder):
    saes = [folder / name for name in ("topafa", "topk", "batchtopk")]
    files = ("sae_weights.safetensors", "cfg.json", "sparsity.safetensors")
    summary = AFAResults.load(folder / "evaluation").summary
    return (
        [sorted(file.name for file in sae.iterdir()) for sae in saes],
        [(sae / file).read_bytes() for sae in saes for file in files],
        read_logs(saes).drop(columns="seconds").to_csv(),
        summary[[c for c in summary if "seconds" not in c and c != "source"]].to_csv(),
    )
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it kills copies of a process")
def test_killed_and_run_again_the_saes_are_the_same(tmp_path):
    assert kill_before_writes(KILLED, tmp_path, 131) > 2


def test_an_unknown_model_and_an_unknown_flag(capsys):
    for arguments, message in (
        (["demo", "--model", "gpt5"], "invalid choice: 'gpt5'"),
        (["demo", "--layers", "3"], "unrecognized arguments: --layers 3"),
        ([], "the following arguments are required: COMMAND"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setitem(
        DEMOS,
        "embedded",
        replace(
            DEMOS["embedded"],
            d_sae=64,
            k=4,
            setup=replace(DEMOS["embedded"].setup, training_tokens=1024),
        ),
    )
    assert cli.main(["demo", "--out", str(blocked / "out")]) == 2
    error = capsys.readouterr().err
    assert "sae-afa demo: error: " in error
    assert str(blocked) in error
