"""``sae-afa evaluate`` with real parts: releases from a hub on the loopback, kills, full disks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.afa_oracle import metrics_of_dictionary
from helpers.disks import small_disk
from helpers.hub import LoopbackHub, client_environment, run_client
from helpers.models import gpt2_tokenizer
from helpers.releases import (
    D_MODEL,
    D_SAE,
    RELEASE,
    RELEASE_IDS,
    RELEASE_REPO,
    SUBSET,
    pile,
    publish_gpt2,
    publish_lines,
    publish_old_sae,
    publish_release,
)
from sae_lens import StandardSAE, StandardSAEConfig
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from sae_afa_plugin import cli
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.results import AFAResults

CATALOGUE_L0 = [10, 10, 18, 23, 31, 41, 51, 54, 60, 70, 52, 56, 70]
MALFORMED = "gpt2-small-res_scefr-ajt"
MALFORMED_IDS = [f"blocks.{i}.hook_resid_pre" for i in (2, 6, 10)]
BOS = 0
# in client_environment it is 2: whether numbers are equal to the last bit may depend on it
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Hub(NamedTuple):
    loopback: LoopbackHub
    texts: list[str]
    pile_texts: list[str]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with gpt2, two releases of SAEs for it, a text and a small pile."""
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as loopback:
        publish_gpt2(loopback.repo("gpt2"))
        publish_release(loopback.repo(RELEASE_REPO))
        repo = loopback.repo("neuronpedia/gpt2-small__res_scefr-ajt")
        for layer in (2, 6, 10):
            publish_old_sae(
                repo / f"{layer}-res_scefr-ajt", f"blocks.{layer}.hook_resid_pre", 100 + layer
            )
        texts = standard_library_texts("train")[:20]
        publish_lines(loopback.repo("somebody/text", "datasets"), [{"text": t} for t in texts])
        rows, pile_texts = pile()
        publish_lines(loopback.repo("somebody/pile", "datasets"), rows)
        yield Hub(loopback, texts, pile_texts)


class Ran(NamedTuple):
    """One run of the command."""

    status: int
    out: str
    err: str

    def error(self) -> str:
        """The one sentence that says what is wrong."""
        assert "Traceback" not in self.out + self.err
        assert self.status == 2, self.err
        (line,) = [line for line in self.err.splitlines() if "sae-afa evaluate: error: " in line]
        assert line == self.err.splitlines()[-1]
        return line.split("error: ", 1)[1]


SESSION = """
import contextlib, io, json, os, traceback
from sae_afa_plugin import cli

os.environ["COLUMNS"] = "220"
for argv in json.loads({commands!r}):
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            status = cli.main(["evaluate", *argv])
        except Exception:  # as the command itself would end; the others go on
            status = 1
            traceback.print_exc()
    print("ran", json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def run_session(loopback: LoopbackHub, commands: dict[str, list[str]], folder: Path) -> Any:
    """Several evaluations in one process that knows only this hub: imports take long."""
    code = SESSION.format(commands=json.dumps(list(commands.values())))
    lines = run_client(loopback, code, folder).splitlines()
    ran = [Ran(*json.loads(line[4:])) for line in lines if line.startswith("ran ")]
    return dict(zip(commands, ran, strict=True))


# --- a release from the hub ---


class Evaluated(NamedTuple):
    ran: Ran
    folder: Path
    requests: list[str]


@pytest.fixture(scope="module")
def release(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """The command as a user runs it, with nothing but the name of a release and a dataset."""
    folder = tmp_path_factory.mktemp("release")
    before = len(hub.loopback.requests)
    command = [sys.executable, "-m", "sae_afa_plugin.cli", "evaluate", RELEASE]
    env = client_environment(hub.loopback, folder)
    done = subprocess.run(
        [*command, "--dataset", "somebody/text", "--tokens", "600", "--out", "results"],
        env={k: v for k, v in env.items() if k not in ("COLUMNS", "LINES")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ran = Ran(done.returncode, done.stdout, done.stderr)
    return Evaluated(ran, folder / "results", hub.loopback.requests[before:])


def test_a_release_is_evaluated_by_its_name_in_the_catalogue(hub: Hub, release: Evaluated) -> None:
    summary = pd.read_csv(release.folder / "summary.csv", index_col="sae")
    assert list(summary.index) == RELEASE_IDS
    assert list(summary["catalogue_l0"]) == CATALOGUE_L0
    assert set(summary["tokens"]) == {600}
    assert set(summary["d_sae"]) == {D_SAE}
    assert list(summary["hook_name"]) == RELEASE_IDS

    tokens = AFAResults.load(release.folder).tokens
    assert len(tokens) == 13 * 600
    assert set(tokens.groupby("sae", observed=True).size()) == {600}

    written = json.loads((release.folder / "results.json").read_text(encoding="utf-8"))
    assert written["schema_version"] == 4
    assert written["refused"] == {}
    assert list(written["saes"]) == RELEASE_IDS
    settings = written["settings"]
    assert settings["dataset"] == "somebody/text"
    assert settings["n_tokens"] == 600
    assert settings["context_size"] == 128
    assert settings["prepend_bos"] is True
    assert settings["seed"] == 42
    assert settings["model"] == "gpt2"  # which that is an alias of
    assert settings["model_kwargs"] == {"center_writing_weights": True}
    for package in ("sae-afa-plugin", "sae-lens", "transformer-lens", "torch", "python"):
        assert written["versions"][package][0].isdigit()

    assert sorted(file.name for file in release.folder.iterdir()) == FILES
    assert not hub.loopback.unknown_requests


def test_it_prints_what_was_loaded(release: Evaluated) -> None:
    for sae_id in RELEASE_IDS:
        said = f"{sae_id}: standard, 48 features of width 16, {sae_id}, normalize_activations none"
        assert release.ran.out.count(said) == 1, sae_id


def cells_of(ran: Ran, sae_id: str) -> list[str]:
    """The SAE's line in the printed table: each SAE is one line, that grep finds."""
    table = ran.out[ran.out.rindex("tokens (medians") :]
    (line,) = [line for line in table.splitlines() if f" {sae_id} " in f" {line} "]
    return line.replace("│", " ").split()


def test_the_table_in_80_columns_has_whole_numbers(release: Evaluated) -> None:
    assert "…" not in release.ran.out
    summary = pd.read_csv(release.folder / "summary.csv", index_col="sae")
    for sae_id, row in summary.iterrows():
        assert cells_of(release.ran, str(sae_id))[:2] == [sae_id, f"{row['l0_mean']:.1f}"]


def test_a_wide_table_has_the_l0_of_the_catalogue_beside_the_measured(
    chosen: tuple[dict[str, Ran], Path],
) -> None:
    ran, folder = chosen
    assert "…" not in ran["glob"].out
    summary = AFAResults.load(folder / "glob").summary
    for sae_id, listed in zip(summary.index, ("10.0", "52.0", "56.0"), strict=True):
        l0 = f"{summary.loc[sae_id, 'l0_mean']:.1f}"
        assert cells_of(ran["glob"], sae_id)[:3] == [sae_id, l0, listed]


def test_an_l0_far_from_the_catalogue_is_pointed_out_and_only_then(release: Evaluated) -> None:
    summary = pd.read_csv(release.folder / "summary.csv", index_col="sae")
    far = [
        sae_id
        for sae_id, l0, listed in zip(RELEASE_IDS, summary["l0_mean"], CATALOGUE_L0, strict=True)
        if not 0.5 < l0 / listed < 2
    ]
    assert 0 < len(far) < 13, "this test needs both"
    for sae_id, l0, listed in zip(RELEASE_IDS, summary["l0_mean"], CATALOGUE_L0, strict=True):
        said = f"{sae_id}: L0 is {l0:.1f}, but the catalogue says {listed}"
        assert (said in release.ran.out) == (sae_id in far)


def test_the_model_is_read_once_for_all_saes(release: Evaluated) -> None:
    gets = [request for request in release.requests if request.startswith("GET ")]
    assert len([r for r in gets if "/gpt2/" in r and r.endswith("/model.safetensors")]) == 1
    assert len([r for r in gets if r.endswith("/sae_weights.safetensors")]) == 13


def residual_stream(hub: Hub, tokens: np.ndarray) -> list[np.ndarray]:
    """What transformers computes before each block and after the last: ``[n, position, d]``."""
    model = GPT2LMHeadModel.from_pretrained(hub.loopback.repo("gpt2")).eval()
    last: list[torch.Tensor] = []
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    with torch.no_grad():
        hidden = model(torch.as_tensor(tokens).long(), output_hidden_states=True).hidden_states
    return [h.double().numpy() for h in (*hidden[:12], last[0])]


def centred(x: np.ndarray) -> np.ndarray:
    """The residual stream of a model whose writing weights have been centred."""
    return x - x.mean(-1, keepdims=True)


def by_position(table: pd.DataFrame, column: str) -> np.ndarray:
    n, length = table["sequence"].max() + 1, table["position"].max() + 1
    values = np.zeros((n, length), dtype=np.int64)
    values[table["sequence"], table["position"]] = table[column]
    return values


def test_the_tokens_are_the_documents_in_a_row(hub: Hub, release: Evaluated) -> None:
    sequences = pd.read_parquet(release.folder / "sequences.parquet")
    ids = by_position(sequences, "token_id")
    assert ids.shape[1] == 128
    assert (ids[:, 0] == BOS).all()
    tokenizer = gpt2_tokenizer()
    stream = [i for text in hub.texts for i in tokenizer(text)["input_ids"]]
    read = ids.flatten()[ids.flatten() != BOS]
    # a sequence's first place is taken by BOS, nothing else may be lost
    assert read.tolist() == stream[: len(read)]
    tokens = AFAResults.load(release.folder).tokens
    for _, part in tokens.groupby("sae", observed=True):
        assert part["token_id"].tolist() == stream[:600]
        assert (ids[part["sequence"], part["position"]] == part["token_id"]).all()


@pytest.mark.parametrize("sae_id", ["blocks.3.hook_resid_pre", "blocks.11.hook_resid_post"])
def test_the_numbers_are_those_of_a_slow_computation(
    hub: Hub, release: Evaluated, sae_id: str
) -> None:
    ids = by_position(pd.read_parquet(release.folder / "sequences.parquet"), "token_id")
    tokens = AFAResults.load(release.folder).tokens
    tokens = tokens.loc[tokens["sae"] == sae_id]
    hidden = residual_stream(hub, ids)[12 if "post" in sae_id else 3]
    raw = hidden[tokens["sequence"], tokens["position"]]
    z = centred(raw)
    repo = hub.loopback.repo("jbloom/GPT2-Small-SAEs-Reformatted")
    weights = load_file(repo / sae_id / "sae_weights.safetensors")
    W_enc, W_dec, b_enc, b_dec = (
        weights[name].double().numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    f = np.maximum((z - b_dec) @ W_enc + b_enc, 0)
    expected = metrics_of_dictionary(z, f, W_dec, b_dec)
    # these would be seen: a model that is not centred, coefficients on rows as long as they are
    uncentred = np.linalg.norm(raw, axis=1) / expected["norm_z"]
    assert np.median(uncentred) > 1.05
    unweighted = np.sqrt((f**2).sum(1) + b_dec @ b_dec) / expected["norm_f"]
    assert abs(np.median(unweighted) - 1) > 0.05
    for column, values in expected.items():
        if column == "over_activated":
            assert (tokens[column] == values).mean() > 0.995
        elif column == "l0":
            assert (tokens[column] != values).mean() < 0.01  # a value that rounds to zero or not
        else:
            np.testing.assert_allclose(tokens[column], values, rtol=2e-3, atol=1e-5, err_msg=column)
    row = pd.read_csv(release.folder / "summary.csv", index_col="sae").loc[sae_id]
    assert row["norm_f_median"] == pytest.approx(np.median(expected["norm_f"]), rel=1e-4)
    assert row["norm_ratio_mean"] == pytest.approx(
        np.mean(expected["norm_f"] / expected["norm_z"]), rel=1e-4
    )
    assert row["dead_features"] == pytest.approx((f == 0).all(0).sum(), abs=1)


# --- other ways to choose: one process for all of them ---


@pytest.fixture(scope="module")
def chosen(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Ran], Path]:
    folder = tmp_path_factory.mktemp("chosen")
    text = ["--dataset", "somebody/text", "--tokens", "200"]
    paper = ["--protocol", "paper", "--dataset", "somebody/pile"]
    one = [RELEASE, "--sae-id", "blocks.3.hook_resid_pre"]
    commands = {
        "glob": [RELEASE, "--sae-id", "blocks.1*.hook_resid_pre", *text],
        "two": [RELEASE, "--sae-id", "*resid_post", "--sae-id", "blocks.0.*", *text],
        "repository": ["jbloom/GPT2-Small-SAEs-Reformatted", "--sae-id", "*.11.*", *text],
        "core": [*one, "--core", *text],
        "malformed": [MALFORMED, *text],
        "all of it": [*one, *paper],
        "seed 1": [*one, *paper, "--tokens", "20", "--seed", "1"],
        "seed 1 again": [*one, *paper, "--tokens", "20", "--seed", "1"],
        "seed 2": [*one, *paper, "--tokens", "20", "--seed", "2"],
    }
    commands = {name: [*argv, "--out", name] for name, argv in commands.items()}
    return run_session(hub.loopback, commands, folder), folder


def test_patterns_choose_the_saes_of_a_release(chosen: tuple[dict[str, Ran], Path]) -> None:
    ran, folder = chosen
    for name, expected in (
        ("glob", [f"blocks.{i}.hook_resid_pre" for i in (1, 10, 11)]),
        ("two", ["blocks.11.hook_resid_post", "blocks.0.hook_resid_pre"]),
        ("repository", ["blocks.11.hook_resid_post", "blocks.11.hook_resid_pre"]),
    ):
        assert ran[name].status == 0, ran[name].err
        assert list(AFAResults.load(folder / name).summary.index) == expected


def test_a_repository_outside_the_catalogue_has_no_catalogue_l0(
    chosen: tuple[dict[str, Ran], Path],
) -> None:
    ran, folder = chosen
    assert AFAResults.load(folder / "repository").summary["catalogue_l0"].isna().all()
    assert "catalogue" not in ran["repository"].out
    assert "catalogue" in ran["glob"].out


def test_core_adds_what_saelens_measures(chosen: tuple[dict[str, Ran], Path]) -> None:
    ran, folder = chosen
    assert ran["core"].status == 0, ran["core"].err
    row = AFAResults.load(folder / "core").summary.loc["blocks.3.hook_resid_pre"]
    assert np.isfinite(row["core_ce_loss_score"])
    # SAELens measures L0 on the sequences that we read, which have a few tokens more
    assert row["core_l0"] == pytest.approx(row["l0_mean"], rel=0.1)
    assert "recovered" in ran["core"].out
    assert "recovered" not in ran["glob"].out
    without = AFAResults.load(folder / "glob").summary
    assert not [column for column in without if column.startswith("core_")]


def test_the_malformed_entry_of_the_catalogue_is_evaluated(
    chosen: tuple[dict[str, Ran], Path],
) -> None:
    ran, folder = chosen
    assert ran["malformed"].status == 0, ran["malformed"].err
    results = AFAResults.load(folder / "malformed")
    assert list(results.summary.index) == MALFORMED_IDS
    assert results.summary["catalogue_l0"].isna().all()  # unknown, not 0
    assert "catalogue" not in ran["malformed"].out
    # this entry asks for no centring
    assert "center_writing_weights" not in results.metadata["settings"]["model"]


def paper_documents(hub: Hub, folder: Path) -> list[int]:
    """Which of the pile's texts were read, in order."""
    tokenizer = gpt2_tokenizer()
    known = {(BOS, *tokenizer(text)["input_ids"][:127]): i for i, text in enumerate(hub.pile_texts)}
    ids = by_position(pd.read_parquet(folder / "sequences.parquet"), "token_id")
    return [known[tuple(row)] for row in ids.tolist()]


def test_the_papers_protocol_reads_the_last_token_of_each_long_document_of_one_part(
    hub: Hub, chosen: tuple[dict[str, Ran], Path]
) -> None:
    ran, folder = chosen
    assert ran["all of it"].status == 0, ran["all of it"].err
    read = paper_documents(hub, folder / "all of it")
    assert sorted(read) == list(range(24))  # none of Github, none too short, none twice
    assert read != sorted(read)  # in random order
    assert "24 tokens, not 1,000" in ran["all of it"].out
    tokens = AFAResults.load(folder / "all of it").tokens
    assert tokens["sequence"].tolist() == list(range(24))
    assert set(tokens["position"]) == {127}
    ids = by_position(pd.read_parquet(folder / "all of it" / "sequences.parquet"), "token_id")
    z = centred(residual_stream(hub, ids)[3][:, 127])
    np.testing.assert_allclose(tokens["norm_z"], np.linalg.norm(z, axis=1), rtol=1e-4)


def test_the_seed_decides_which_documents_come_first(
    hub: Hub, chosen: tuple[dict[str, Ran], Path]
) -> None:
    _, folder = chosen
    one, again, two = (
        paper_documents(hub, folder / name) for name in ("seed 1", "seed 1 again", "seed 2")
    )
    assert len(one) == 20
    assert one == again
    assert one != two
    assert set(one) != set(two)


@pytest.fixture(scope="module")
def refused_by_hub(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ran]]:
    """Commands against a hub that has the model, some text, and not much else."""
    root = tmp_path_factory.mktemp("bare_hub")
    with LoopbackHub(root) as bare:
        shutil.copytree(hub.loopback.repo("gpt2"), bare.repo("gpt2"))
        publish_old_sae(bare.repo("somebody/sae") / "sae", "blocks.1.hook_resid_pre", 0)
        publish_lines(bare.repo("somebody/text", "datasets"), [{"text": t} for t in hub.texts])
        broken = bare.repo("somebody/broken", "datasets")
        publish_lines(broken, [])
        (broken / "train.jsonl").write_text('{"text": "one"}\n{"text": ', encoding="utf-8")
        cut_off = bare.repo("somebody/cut-off") / "sae"
        publish_old_sae(cut_off, "blocks.1.hook_resid_pre", 0)
        truncate(cut_off / "sae_weights.safetensors")
        publish_lines(bare.repo("somebody/no-saes"), [])
        others = {
            "jbloom/GPT2-Small-SAEs-Reformatted": "readme.txt",
            "somebody/dictionaries": "layer_8/trainer_0/ae.pt",
            "somebody/sparse": "layers.8/sae.safetensors",
            "somebody/half": "sae/cfg.json",
        }
        for repo, file in others.items():
            (bare.repo(repo) / file).parent.mkdir(parents=True)
            (bare.repo(repo) / file).write_text("{}")
        text = ["--dataset", "somebody/text", "--tokens", "100"]
        commands = {
            "malformed": [MALFORMED, *text],
            "repository": ["somebody/nothing", *text],
            "no saes": ["somebody/no-saes", *text],
            **{repo: [repo, *text] for repo in others},
            "cut off": ["somebody/cut-off", *text],
            "dataset": ["somebody/sae", "--dataset", "somebody/nothing"],
            "broken dataset": ["somebody/sae", "--dataset", "somebody/broken"],
            "split": ["somebody/sae", *text, "--split", "tarin"],
        }
        commands = {name: [*argv, "--out", name] for name, argv in commands.items()}
        yield run_session(bare, commands, tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("malformed", ["blocks.2.hook_resid_pre", MALFORMED, "RepositoryNotFoundError"]),
        ("repository", ["'somebody/nothing' is neither a release", "RepositoryNotFoundError"]),
        ("no saes", ["'somebody/no-saes' holds no SAE", "cfg.json"]),
        (
            "jbloom/GPT2-Small-SAEs-Reformatted",
            ["catalogue has 'jbloom/GPT2-Small-SAEs-Reformatted' as", "'gpt2-small-res-jb'"],
        ),
        (
            "somebody/dictionaries",
            [
                "ae.pt is how dictionary_learning saves",
                "dictionary_learning_sae_huggingface_loader_1",
            ],
        ),
        (
            "somebody/sparse",
            ["sae.safetensors is how sparsify saves", "sparsify_huggingface_loader"],
        ),
        ("somebody/half", ["no folder has both cfg.json and sae_weights.safetensors"]),
        ("cut off", ["'sae' cannot be evaluated", "damaged or incomplete"]),
        ("dataset", ["the dataset 'somebody/nothing'", "hub"]),
        ("broken dataset", ["somebody/broken"]),
        ("split", ["somebody/text", "tarin", "train"]),
    ],
)
def test_what_the_hub_lacks_is_one_sentence(
    refused_by_hub: dict[str, Ran], name: str, parts: list[str]
) -> None:
    message = refused_by_hub[name].error()
    for part in parts:
        assert part in message


# --- SAEs in folders, on the embedded model ---


def save_sae(folder: Path, hook: str, d_sae: int = 64, seed: int = 0, **other: Any) -> Path:
    """An SAE of the embedded model: rows of different lengths, biases that are not zero."""
    d_in = other.pop("d_in", 192)
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(d_in, d_sae) / d_in**0.5)
        sae.W_dec.copy_(torch.randn(d_sae, d_in) / d_in**0.5 * (torch.rand(d_sae, 1) + 0.5))
        sae.b_enc.normal_(std=0.5)
        sae.b_dec.normal_(std=0.3)
    sae.cfg.metadata.hook_name = hook
    for name, value in {"model_name": "sae-afa-demo", **other}.items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(folder)
    return folder


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def hidden_files(folder: Path) -> list[Path]:
    """But for the locks."""
    return [place for place in folder.rglob(".*") if place.name != ".claims"]


def loaded(ran: Ran) -> list[str]:
    """The SAEs that a run has loaded, in order."""
    return [line.split(":")[0] for line in ran.out.splitlines() if " features of width " in line]


def counts(ran: Ran) -> tuple[int, int]:
    """How many SAEs were finished before and how many are to do, as a run says."""
    match = re.search(r"^(\d+) SAEs? .*finished before, (\d+) .*to do$", ran.out, re.MULTILINE)
    assert match, ran.out
    return int(match[1]), int(match[2])


def assert_same_results(found: Path, expected: Path) -> None:
    """Exactly, column by column, in the tables and in the files."""
    one, other = AFAResults.load(found), AFAResults.load(expected)
    same_folders = one.summary.pop("source").equals(other.summary.pop("source"))
    for name in ("summary", "tokens", "sequences"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)
    assert one.metadata == other.metadata
    for file in ("summary.csv", "results.json") if same_folders else ():
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file
    assert sorted(place.name for place in found.iterdir()) == FILES


FILES = [
    ".claims", "results", "results.json", "sae-afa.json", "sequences.parquet", "summary.csv",
]  # fmt: skip
GROUPS = 3  # afa, frequencies, coherence


def kept(out: Path) -> dict[Path, bytes]:
    """The files of every result that is complete."""
    folders = [file.parent for file in out.glob("results/[!.]*/result.json")]
    return {file: file.read_bytes() for folder in folders for file in folder.iterdir()}


def kept_saes(out: Path) -> int:
    """How many SAEs have all of their results."""
    files = [file for file in kept(out) if file.name == "result.json"]
    names = [json.loads(file.read_text())["sae"] for file in files]
    return sum(names.count(name) == GROUPS for name in set(names))


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run the command in this process, with as many threads as the child processes have."""
    monkeypatch.setenv("COLUMNS", "220")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        status = cli.main(["evaluate", *map(str, arguments)])
        return Ran(status, *capfd.readouterr())

    yield run
    torch.set_num_threads(threads)


EMBEDDED = ["--model", "sae-afa-demo", "--dataset", "embedded", "--tokens", "2000"]


def command_for(folder: Path, *names: str) -> list[str]:
    return [*EMBEDDED, *(part for name in names for part in ("--path", str(folder / name)))]


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small SAEs, and a wide one that takes seconds: time enough to end the process."""
    folder = tmp_path_factory.mktemp("saes")
    for seed, name in enumerate(("a", "b", "c")):
        save_sae(folder / name, f"blocks.{seed + 1}.hook_resid_pre", seed=seed)
    save_sae(folder / "wide", "blocks.4.hook_resid_pre", d_sae=16384, seed=3)
    return folder


KILL_ORDER = ("a", "b", "wide", "c")


def started(saes: Path, out: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, when it has finished two SAEs of four."""
    arguments = [*command_for(saes, *KILL_ORDER), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_afa_plugin.cli", "evaluate", *arguments],
        env={**os.environ, **ONE_THREAD, "COLUMNS": "220"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # shells start background jobs with Ctrl-C switched off
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 120
    while kept_saes(out) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)
    return process


@pytest.fixture(scope="module")
def killed(saes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What kill -9 leaves behind; tests work on copies."""
    out = tmp_path_factory.mktemp("killed") / "out"
    process = started(saes, out)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert kept_saes(out) == 2, "it was killed too late"
    return out


@pytest.fixture(scope="module")
def uninterrupted(saes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli.main(["evaluate", *command_for(saes, *KILL_ORDER), "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    assert list(AFAResults.load(out).summary.index) == list(KILL_ORDER)
    return out


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Path:
    """A folder as kill -9 left it."""
    return Path(shutil.copytree(killed, tmp_path / "out"))


def test_a_killed_evaluation_holds_no_results_yet(left: Path) -> None:
    with pytest.raises(ValueError, match="not finished, run it again to continue"):
        AFAResults.load(left)


def test_a_killed_evaluation_goes_on_and_ends_in_the_same_results(
    saes: Path, left: Path, uninterrupted: Path, run: Run
) -> None:
    ran = run(*command_for(saes, *KILL_ORDER), "--out", left)
    assert ran.status == 0, ran.err
    assert counts(ran) == (2, 2)
    assert loaded(ran) == ["wide", "c"]
    assert_same_results(left, uninterrupted)


def test_ctrl_c_is_130_and_goes_on_as_well(
    saes: Path, uninterrupted: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    process = started(saes, out)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "sae-afa evaluate: interrupted" in err
    assert "run the same again" in err.splitlines()[-1]
    assert "Traceback" not in printed + err
    assert not hidden_files(out)
    assert kept_saes(out) == 2

    ran = run(*command_for(saes, *KILL_ORDER), "--out", out)
    assert ran.status == 0, ran.err
    assert loaded(ran) == ["wide", "c"]
    assert_same_results(out, uninterrupted)


@pytest.mark.parametrize("damage", ["cut off", "empty", "not ours"])
def test_a_damaged_part_is_said_and_evaluated_again(
    saes: Path, left: Path, uninterrupted: Path, run: Run, damage: str
) -> None:
    part = sorted(left.glob("results/[!.]*.afa.*/tokens.parquet"))[0]
    whose = json.loads((part.parent / "result.json").read_text())["sae"]
    if damage == "cut off":
        truncate(part)
    elif damage == "empty":
        part.write_bytes(b"")
    else:
        pd.DataFrame({"x": [1]}).to_parquet(part)
    # without the wide one: not every one of its seconds is needed
    names = [name for name in KILL_ORDER if name != "wide"]
    ran = run(*command_for(saes, *names), "--out", left)
    assert ran.status == 0, ran.err
    said = f"{part.parent.name} is damaged (tokens.parquet has changed): it is evaluated again"
    assert said in ran.out
    assert counts(ran) == (1, 2)
    assert sorted(loaded(ran)) == sorted([whose, "c"])
    expected = AFAResults.load(uninterrupted)
    found = AFAResults.load(left)
    pd.testing.assert_frame_equal(found.summary, expected.summary.loc[names], check_exact=True)


def test_what_a_kill_left_half_written_is_cleared_away(
    saes: Path, tmp_path: Path, run: Run
) -> None:
    """A process that is killed while it writes cannot remove its own temporary file."""
    out = tmp_path / "out"
    assert run(*command_for(saes, "a"), "--out", out).status == 0
    (whole,) = out.glob("results/*.afa.*")
    whole.rename(whole.with_name(f".{whole.name}.partial"))  # killed before it was renamed
    for place in (out / ".results.json.partial", out / ".summary.csv.partial"):
        place.write_bytes(b"half")
    (out / "results.json").unlink()
    ran = run(*command_for(saes, "a"), "--out", out)
    assert ran.status == 0, ran.err
    assert loaded(ran) == ["a"]
    assert not hidden_files(out)


# --- a disk that is full ---


PAGE = 4096


def in_pages(*sizes: int) -> int:
    """What files take on such a disk."""
    return sum(-(-size // PAGE) * PAGE for size in sizes)


def test_a_full_disk_loses_nothing_and_the_same_command_finishes(
    saes: Path, tmp_path: Path, run: Run
) -> None:
    command = command_for(saes, "a", "b", "c")
    assert run(*command, "--out", tmp_path / "roomy").status == 0
    one = in_pages(*map(len, kept(tmp_path / "roomy").values())) / 3
    about = in_pages(
        *((tmp_path / "roomy" / f).stat().st_size for f in ("sequences.parquet", "sae-afa.json"))
    )
    with small_disk(tmp_path / "disk", int(about + 2.5 * one)) as enlarge:
        out = tmp_path / "disk" / "out"

        # no room for the third SAE, then for the results as a whole
        finished: dict[Path, bytes] = {}
        for room, n in ((None, 2), (int(about + 3 * one) + 2 * PAGE, 3)):
            if room is not None:
                enlarge(room)
            ran = run(*command, "--out", out)
            message = ran.error()
            assert "No space left on device" in message
            assert str(out) in message
            assert "nothing that was finished is lost" in message
            assert not hidden_files(out)
            assert all(file.read_bytes() == content for file, content in finished.items())
            finished = kept(out)
            assert kept_saes(out) == n
            assert not (out / "results.json").exists()

        enlarge(1 << 24)
        ran = run(*command, "--out", out)
        assert ran.status == 0, ran.err
        assert counts(ran) == (3, 0)
        assert loaded(ran) == []
        assert_same_results(out, tmp_path / "roomy")


def test_a_disk_without_room_for_the_activations_is_one_sentence(
    saes: Path, tmp_path: Path, run: Run
) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as enlarge:
        out = tmp_path / "disk" / "out"
        command = [*command_for(saes, "a"), "--memory", "0.001", "--out", out]
        message = run(*command).error()
        assert "the activations need" in message
        assert str(out) in message
        assert not hidden_files(out)
        enlarge(1 << 24)
        assert run(*command).status == 0
        # the temporary file has vanished and its room is free again
        assert shutil.disk_usage(tmp_path / "disk").used < 1 << 20


# --- the same folder again ---


@pytest.fixture
def finished(saes: Path, tmp_path: Path, run: Run) -> tuple[Path, list[str], Ran]:
    """A folder with finished results of SAEs that this test may change, and their command."""
    for name in ("a", "b"):
        shutil.copytree(saes / name, tmp_path / "saes" / name)
    command = [*command_for(tmp_path / "saes", "a", "b"), "--out", str(tmp_path / "out")]
    ran = run(*command)
    assert ran.status == 0, ran.err
    return tmp_path / "out", command, ran


def table_in(ran: Ran) -> str:
    return ran.out[ran.out.index("tokens (medians") :]


def test_a_finished_evaluation_is_printed_again_without_the_model(
    saes: Path, hub: Hub, tmp_path: Path, run: Run
) -> None:
    gpt2, text = tmp_path / "gpt2", tmp_path / "text.txt"
    shutil.copytree(hub.loopback.repo("gpt2"), gpt2)
    text.write_text("\n".join(hub.texts), encoding="utf-8")
    sae = save_sae(
        tmp_path / "sae", "blocks.2.hook_resid_pre", d_in=D_MODEL, model_name="gpt2-small"
    )
    command = ["--path", sae, "--model", gpt2, "--dataset", text, "--tokens", 300]
    first = run(*command, "--out", tmp_path / "out")
    assert first.status == 0, first.err
    files = {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}

    shutil.rmtree(gpt2)  # what is not read need not be there
    text.unlink()
    again = run(*command, "--out", tmp_path / "out")
    assert again.status == 0, again.err
    assert counts(again) == (1, 0)
    assert loaded(again) == []
    assert table_in(again) == table_in(first)
    assert {f: f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()} == files


def test_a_changed_sae_is_evaluated_again_and_only_that(
    finished: tuple[Path, list[str], Ran], run: Run
) -> None:
    out, command, _ = finished
    before = AFAResults.load(out)
    save_sae(out.parent / "saes" / "b", "blocks.2.hook_resid_pre", seed=99)
    ran = run(*command)
    assert ran.status == 0, ran.err
    assert loaded(ran) == ["b"]
    after = AFAResults.load(out)
    assert list(after.summary.index) == ["a", "b"]
    assert len(after.tokens) == len(before.tokens)
    pd.testing.assert_series_equal(after.summary.loc["a"], before.summary.loc["a"])
    assert after.summary.loc["b", "norm_f_median"] != before.summary.loc["b", "norm_f_median"]


def test_one_more_sae_leaves_the_others_as_they_are(
    saes: Path, finished: tuple[Path, list[str], Ran], tmp_path: Path, run: Run
) -> None:
    out, command, _ = finished
    ran = run(*command, "--path", saes / "c")
    assert ran.status == 0, ran.err
    assert loaded(ran) == ["c"]
    assert run(*command_for(saes, "a", "b", "c"), "--out", tmp_path / "at once").status == 0
    assert_same_results(out, tmp_path / "at once")


def test_a_part_of_the_saes_again_keeps_the_others(
    saes: Path, finished: tuple[Path, list[str], Ran], run: Run
) -> None:
    out, _, _ = finished
    ran = run(*command_for(saes, "b"), "--out", out)
    assert ran.status == 0, ran.err
    assert loaded(ran) == []
    assert sorted(AFAResults.load(out).summary.index) == ["a", "b"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokens", "300"], "n_tokens was 2000 and is 300"),
        (["--context-size", "64"], "context_size was 128 and is 64"),
        (["--exclude-special-tokens", "no"], "exclude_special_tokens was True and is False"),
        (["--dataset", "somebody/text"], "dataset was 'embedded' and is 'somebody/text'"),
        (["--model", "gpt2"], "model was 'sae-afa-demo' and is 'gpt2'"),
        (["--dtype", "bfloat16"], "dtype was 'float32' and is 'bfloat16'"),
        (["--protocol", "paper"], "positions was 'all' and is 'last'"),
    ],
)
def test_a_folder_keeps_to_its_settings(
    saes: Path, left: Path, uninterrupted: Path, run: Run, flags: list[str], said: str
) -> None:
    for folder in (left, uninterrupted):  # begun, and finished
        files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        message = run(*command_for(saes, *KILL_ORDER), *flags, "--out", folder).error()
        assert said in message
        assert str(folder) in message
        assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == files


def test_a_dataset_that_has_changed_is_refused(saes: Path, tmp_path: Path, run: Run) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    command = ["--model", "sae-afa-demo", "--dataset", text, "--tokens", 200, "--out", out]
    texts = standard_library_texts("heldout")
    text.write_text(texts[0] + texts[1], encoding="utf-8")
    assert run("--path", saes / "a", *command).status == 0
    before = AFAResults.load(out)
    text.write_text(texts[2] + texts[3], encoding="utf-8")
    message = run("--path", saes / "a", "--path", saes / "b", *command).error()
    assert "dataset_content was" in message
    pd.testing.assert_frame_equal(AFAResults.load(out).tokens, before.tokens)


def test_a_damaged_index_is_made_again(finished: tuple[Path, list[str], Ran], run: Run) -> None:
    out, command, before = finished
    whole = (out / "results.json").read_bytes()
    truncate(out / "results.json")
    with pytest.raises(ValueError, match=r"results.json: .* Run the evaluation again"):
        AFAResults.load(out)
    ran = run(*command)
    assert ran.status == 0, ran.err
    assert loaded(ran) == []
    assert table_in(ran) == table_in(before)
    assert (out / "results.json").read_bytes() == whole


@pytest.mark.parametrize("file", ["sae-afa.json", "sequences.parquet"])
def test_damaged_results_are_named(
    finished: tuple[Path, list[str], Ran], saes: Path, run: Run, file: str
) -> None:
    out, command, _ = finished
    truncate(out / file)
    message = run(*command, "--path", saes / "c").error()
    assert str(out) in message
    assert "elete" in message  # what to do about it


def test_other_groups_are_added_to_what_is_there(
    finished: tuple[Path, list[str], Ran], run: Run
) -> None:
    out, command, _ = finished
    before, files = AFAResults.load(out), kept(out)
    ran = run(*command, "--core", "--core-tokens", "256")
    assert ran.status == 0, ran.err
    after = AFAResults.load(out).summary
    assert after["core_ce_loss_score"].notna().all()
    pd.testing.assert_frame_equal(after[list(before.summary)], before.summary, check_exact=True)
    assert files.items() <= kept(out).items()


# --- what cannot be evaluated ---


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(
            ["gpt2-small-res-jbb"],
            ["no release 'gpt2-small-res-jbb'", "did you mean", f"'{RELEASE}'"],
            id="unknown release",
        ),
        pytest.param(
            [RELEASE, "--sae-id", "blocks.3.hook_resid_prr"],
            [f"release '{RELEASE}' has no SAE 'blocks.3.hook_resid_prr'", "blocks.3.hook_resid_pr"],
            id="unknown id",
        ),
        pytest.param(
            [RELEASE, "--sae-id", "blocks.0.*", "--sae-id", "layer*"],
            ["no SAE 'layer*'", "blocks.0.hook_resid_pre"],
            id="a pattern that fits nothing",
        ),
        pytest.param([], ["name a release, or a folder with --path"], id="nothing named"),
        pytest.param(["--sae-id", "x"], ["name the release first"], id="an id of no release"),
    ],
)
def test_names_that_are_not_known(
    tmp_path: Path, run: Run, arguments: list[str], parts: list[str]
) -> None:
    message = run(*arguments, "--out", tmp_path / "out").error()
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()


def rewrite_config(folder: Path, **changes: Any) -> Path:
    """Change some of the config's entries; None removes one."""
    config = {**json.loads((folder / "cfg.json").read_text(encoding="utf-8")), **changes}
    config = {name: value for name, value in config.items() if name not in changes or value}
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def rewrite_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    save_file(change(load_file(folder / "sae_weights.safetensors")), folder / "weights")
    (folder / "weights").rename(folder / "sae_weights.safetensors")
    return folder


HOOK = "blocks.2.hook_resid_pre"
BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "another width": (
        lambda folder: save_sae(folder, HOOK, d_in=64),
        [HOOK, "width 192", "d_in=64"],
    ),
    "no such hook": (
        lambda folder: save_sae(folder, "blocks.2.hook_resid_prr"),
        ["no hook 'blocks.2.hook_resid_prr'", f"did you mean '{HOOK}'"],
    ),
    "a layer too many": (
        lambda folder: save_sae(folder, "blocks.70.hook_resid_pre"),
        ["no hook 'blocks.70.hook_resid_pre'"],
    ),
    "no hook name": (lambda folder: save_sae(folder, ""), ["hook_name"]),
    "weights cut off": (
        lambda folder: truncate(save_sae(folder, HOOK) / "sae_weights.safetensors"),
        ["sae' cannot be read", "damaged or incomplete"],
    ),
    "weights empty": (
        lambda folder: (save_sae(folder, HOOK) / "sae_weights.safetensors").write_bytes(b""),
        ["sae' cannot be read", "damaged or incomplete"],
    ),
    "a tensor missing": (
        lambda folder: rewrite_weights(
            save_sae(folder, HOOK), lambda w: {k: v for k, v in w.items() if k != "W_dec"}
        ),
        ["W_dec"],
    ),
    "a tensor of another shape": (
        lambda folder: rewrite_weights(
            save_sae(folder, HOOK), lambda w: {**w, "W_dec": torch.zeros(65, 192)}
        ),
        ["W_dec"],
    ),
    "not a number": (
        lambda folder: rewrite_weights(
            save_sae(folder, HOOK), lambda w: {**w, "W_enc": w["W_enc"] * torch.nan}
        ),
        ["not finite"],
    ),
    "config cut off": (
        lambda folder: truncate(save_sae(folder, HOOK) / "cfg.json"),
        ["cfg.json"],
    ),
    "config of an unknown architecture": (
        lambda folder: rewrite_config(save_sae(folder, HOOK), architecture="standerd"),
        ["standerd"],
    ),
    "config without a width": (
        lambda folder: rewrite_config(save_sae(folder, HOOK), d_in=None),
        ["d_in"],
    ),
    "unknown scaling": (
        lambda folder: rewrite_config(
            save_sae(folder, HOOK), normalize_activations="expected_average_only_in"
        ),
        ["expected_average_only_in", "no norm_scaling_factor is known"],
    ),
    "no weights": (
        lambda folder: (save_sae(folder, HOOK) / "sae_weights.safetensors").unlink(),
        ["sae' holds no SAE", "no sae_weights.safetensors"],
    ),
    "an SAE of sparsify": (
        lambda folder: (save_sae(folder, HOOK) / "sae_weights.safetensors").rename(
            folder / "sae.safetensors"
        ),
        ["no sae_weights.safetensors", "sparsify_disk_loader"],
    ),
    "an empty folder": (lambda folder: folder.mkdir(), ["sae' holds no SAE", "no cfg.json"]),
    "no folder": (lambda folder: None, ["sae' holds no SAE", "no cfg.json"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_sae_that_cannot_be_evaluated(tmp_path: Path, run: Run, kind: str) -> None:
    make, parts = BROKEN[kind]
    make(tmp_path / "sae")
    ran = run(*EMBEDDED, "--path", tmp_path / "sae", "--out", tmp_path / "out")
    message = ran.error()
    for part in parts:
        assert part in message
    assert not (tmp_path / "out" / "results.json").exists()
    assert not hidden_files(tmp_path)


@pytest.mark.parametrize(
    "kind", ["another width", "weights cut off", "config cut off", "no weights", "an empty folder"]
)
def test_one_of_several_that_cannot_be_evaluated_is_status_1(
    saes: Path, tmp_path: Path, run: Run, kind: str
) -> None:
    make, parts = BROKEN[kind]
    make(tmp_path / "sae")
    paths = ("--path", saes / "a", "--path", tmp_path / "sae", "--path", saes / "b")
    ran = run(*EMBEDDED, *paths, "--out", tmp_path / "out")
    assert ran.status == 1, ran.err
    assert "Traceback" not in ran.out + ran.err
    said = table_in(ran)
    (line,) = [line for line in said.splitlines() if line.startswith("sae was not evaluated: ")]
    for part in parts:
        # long lines are wrapped
        assert part in " ".join(said[said.index(line) :].split())
    results = AFAResults.load(tmp_path / "out")
    assert list(results.summary.index) == ["a", "b"]
    assert list(results.metadata["refused"]) == ["sae"]

    # mended, it is the only one that is done
    shutil.rmtree(tmp_path / "sae")
    save_sae(tmp_path / "sae", HOOK)
    ran = run(*EMBEDDED, *paths, "--out", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert loaded(ran) == ["sae"]
    results = AFAResults.load(tmp_path / "out")
    assert list(results.summary.index) == ["a", "sae", "b"]
    assert results.metadata["refused"] == {}


def test_folders_of_one_name_are_told_apart(tmp_path: Path, run: Run) -> None:
    for i in (1, 2):
        save_sae(tmp_path / f"run{i}" / "sae", HOOK, seed=i)
    paths = [tmp_path / f"run{i}" / "sae" for i in (1, 2)]
    ran = run(*EMBEDDED, "--path", paths[0], "--path", paths[1], "--out", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert list(AFAResults.load(tmp_path / "out").summary.index) == list(map(str, paths))


def test_an_sae_of_another_model_is_refused_unless_the_model_is_passed(
    saes: Path, tmp_path: Path, run: Run
) -> None:
    save_sae(tmp_path / "other", HOOK, model_name="gpt2-small")
    paths = ["--path", saes / "a", "--path", tmp_path / "other"]
    rest = ["--dataset", "embedded", "--tokens", 100, "--out", tmp_path / "out"]
    ran = run(*paths, *rest)
    assert ran.status == 1, ran.err
    said = " ".join(ran.out.split())
    assert "other was not evaluated: it belongs to gpt2-small, most of the SAEs here to" in said
    assert "or pass the model" in said
    ran = run(*paths, "--model", "sae-afa-demo", *rest)  # as it says
    assert ran.status == 0, ran.err
    assert list(AFAResults.load(tmp_path / "out").summary.index) == ["a", "other"]


def test_an_sae_that_names_no_model_is_refused_unless_the_model_is_passed(
    saes: Path, tmp_path: Path, run: Run
) -> None:
    save_sae(tmp_path / "nameless", HOOK, model_name=None)
    command = ["--path", tmp_path / "nameless", "--dataset", "embedded", "--tokens", 100]
    message = run(*command, "--out", tmp_path / "out").error()
    assert "'nameless' names no model: pass the model" in message
    ran = run(*command, "--model", "sae-afa-demo", "--out", tmp_path / "out")
    assert ran.status == 0, ran.err


def write_rows(rows: list[dict[str, Any]]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        file = folder / "data.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return file

    return write


def write_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def empty_dataset(folder: Path) -> Path:
    Dataset.from_dict({"text": []}).save_to_disk(folder / "data")
    return folder / "data"


def folder_without_data(folder: Path) -> Path:
    (folder / "data").mkdir()
    return folder / "data"


DATASETS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "neither text nor tokens": (
        write_rows([{"body": "x", "title": "y"}]),
        ["data.jsonl' has neither tokens nor text", "['body', 'title']", "'text'"],
    ),
    "text too short": (
        write_rows([{"text": "Hello."}]),
        ["no token is left to evaluate", "0 sequences of 128"],
    ),
    "only special tokens": (
        write_rows([{"tokens": [BOS] * 128}] * 3),
        ["no token is left to evaluate", "3 sequences of 128", "384 of the tokens", "special"],
    ),
    "tokens too short": (
        write_rows([{"tokens": [5] * 100}]),
        ["'tokens' has a sequence of 100 tokens", "context_size=128"],
    ),
    "empty dataset": (empty_dataset, ["data'"]),
    "empty text file": (write_file("data.txt", b""), ["no token is left", "0 sequences"]),
    "empty jsonl file": (write_file("data.jsonl", b""), ["data.jsonl"]),
    "damaged jsonl file": (write_file("data.jsonl", b'{"text": "a"}\n{"te'), ["data.jsonl"]),
    "damaged parquet file": (write_file("data.parquet", b"PAR1 no"), ["data.parquet"]),
    "damaged text file": (write_file("data.txt", b"\xff\xfe\xff"), ["data.txt"]),
    "file of no known kind": (write_file("data.doc", b"x"), ["data.doc' is of no known kind"]),
    "folder without data": (folder_without_data, ["data"]),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_a_dataset_that_cannot_be_read(saes: Path, tmp_path: Path, run: Run, kind: str) -> None:
    make, parts = DATASETS[kind]
    sae = ["--path", saes / "a", "--model", "sae-afa-demo", "--tokens", 100]
    message = run(*sae, "--dataset", make(tmp_path), "--out", tmp_path / "out").error()
    for part in parts:
        assert part in message
    assert not (tmp_path / "out" / "results.json").exists()


def test_documents_without_text_are_not_read_as_words(saes: Path, tmp_path: Path, run: Run) -> None:
    texts = standard_library_texts("heldout")[:3]
    for name, rows in (("with", [texts[0], None, *texts[1:]]), ("without", texts)):
        (tmp_path / name).mkdir()
        file = write_rows([{"text": text} for text in rows])(tmp_path / name)
        command = ["--path", saes / "a", "--model", "sae-afa-demo", "--tokens", 1000]
        ran = run(*command, "--dataset", file, "--out", tmp_path / name / "out")
        assert ran.status == 0, ran.err
    with_none, without = (
        AFAResults.load(tmp_path / name / "out").sequences for name in ("with", "without")
    )
    assert "".join(with_none["token"]) == "".join(without["token"])


def test_a_pile_without_the_papers_part_is_said(saes: Path, tmp_path: Path, run: Run) -> None:
    rows = [
        {"text": t, "meta": {"pile_set_name": "Github"}}
        for t in standard_library_texts("heldout")[:3]
    ]
    command = ["--path", saes / "a", "--model", "sae-afa-demo", "--protocol", "paper"]
    dataset = write_rows(rows)(tmp_path)
    message = run(*command, "--dataset", dataset, "--out", tmp_path / "out").error()
    assert SUBSET in message
    assert "data.jsonl" in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--tokens", "0"], ["n_tokens must be at least 1"]),
        (["--context-size", "-3"], ["context_size must be at least 1"]),
        (["--context-size", "1000"], ["context_size is 1000", "256 tokens at most"]),
        (["--model", "gpt-2-smal"], ["no model 'gpt-2-smal'", "did you mean"]),
        (["--device", "gpu"], ["gpu"]),
        (["--split", "test"], ["test"]),
    ],
)
def test_arguments_that_cannot_work(
    saes: Path, tmp_path: Path, run: Run, arguments: list[str], parts: list[str]
) -> None:
    data = Dataset.from_dict({"text": standard_library_texts("heldout")[:3]})
    DatasetDict({"train": data}).save_to_disk(tmp_path / "data")
    command = command_for(saes, "a")
    command[command.index("embedded")] = str(tmp_path / "data")
    message = run(*command, *arguments, "--out", tmp_path / "out").error()
    for part in parts:
        assert part in message


def test_a_folder_for_results_that_cannot_be_made(saes: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    message = run(*command_for(saes, "a"), "--out", tmp_path / "file" / "out").error()
    assert str(tmp_path / "file") in message
