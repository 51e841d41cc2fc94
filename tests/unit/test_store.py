"""The folder of results: immutable, shared by processes, and careful with what is not ours."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from contextlib import nullcontext, suppress

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import IterableDataset
from helpers.models import tiny_hooked_sae_transformer
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig

from sae_afa_plugin import AFAResults, evaluate_saes
from sae_afa_plugin.activations.tensors import TensorActivations
from sae_afa_plugin.files import NotWrittenError
from sae_afa_plugin.groups.base import GroupResult
from sae_afa_plugin.plots import save_plots
from sae_afa_plugin.report import write_report
from sae_afa_plugin.sources import Excluded, sources_of_release
from sae_afa_plugin.store import Store, digest_of

SETTINGS = {"dataset": "text", "ids": (1, 2)}
SEQUENCES = pd.DataFrame({"sequence": [0, 0], "position": [0, 1], "token_id": [5, 6]})
PLACES = pd.DataFrame({"sequence": [0, 0, 0], "position": [1, 2, 3], "token_id": [6, 7, 8]})
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def result(value=1.0):
    table = pd.DataFrame({"l0": [3, 4]}, index=[0, 2])
    return GroupResult({"value": value, "undefined": np.nan, "n": np.int64(3)}, table)


def new_store(folder):
    store = Store(folder, SETTINGS)
    store.begin(SEQUENCES)
    return store


def add(store, name="a", group="afa", fingerprint="1", value=1.0):
    key = store.key(fingerprint, group)
    return store.add(name, group, key, fingerprint, {"source": "x"}, result(value), PLACES)


def small_sae(seed=0, d_in=8):
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=20))
    with torch.no_grad():
        sae.W_enc.normal_(0, 0.3)
    sae.cfg.metadata.hook_name = "here"
    return sae


def evaluate(saes, **options):
    source = TensorActivations({"here": X})
    return evaluate_saes(saes, activations=source, progress=False, **options)


def test_a_result_comes_back_as_it_was(tmp_path):
    store = new_store(tmp_path / "out")
    written = add(store)
    found = Store(tmp_path / "out").find("a", "afa", store.key("1", "afa"))
    assert found == written
    assert found.summary == {"value": 1.0, "undefined": None, "n": 3}
    table = found.table("tokens")
    assert table.to_dict("list") == {
        "token_number": [0, 2], "sequence": [0, 0], "position": [1, 3], "token_id": [6, 8],
        "l0": [3, 4],
    }  # fmt: skip
    assert list(found.table("tokens", ["l0", "nothing"])) == ["l0"]
    assert found.table("features") is None


def test_what_decides_a_number_is_in_its_name(tmp_path):
    store = new_store(tmp_path / "out")
    keys = {
        store.key("1", "afa 1"), store.key("2", "afa 1"), store.key("1", "afa 2"),
        Store(tmp_path / "other", {**SETTINGS, "dataset": "x"}).key("1", "afa 1"),
    }  # fmt: skip
    assert len(keys) == 4
    assert Store(tmp_path / "third", SETTINGS).key("1", "afa 1") == store.key("1", "afa 1")


@settings(max_examples=60)
@given(st.lists(st.text(min_size=1, max_size=80), min_size=2, max_size=5, unique=True))
def test_any_names_are_told_apart_and_stay_inside(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("store")
    store = new_store(folder / "out")
    for number, name in enumerate(names):
        add(store, name, value=float(number))
    assert [place.name for place in folder.iterdir()] == ["out"]
    found = {r.sae: r.summary["value"] for r in Store(folder / "out").results()}
    assert found == {name: float(number) for number, name in enumerate(names)}


@pytest.mark.parametrize("name", ["None", "NA", "null", "nan", "1", "../up", "a/b", "=1+1"])
def test_names_that_mean_something_elsewhere_are_continued(tmp_path, name):
    saes = {name: small_sae(), "other": small_sae(1)}
    out = tmp_path / "out"
    evaluate({name: saes[name]}, out=out)
    results = evaluate(saes, out=out)
    assert list(results.summary.index) == [name, "other"]
    loaded = AFAResults.load(out)
    assert list(loaded.summary.index) == [name, "other"]
    assert len(loaded.tokens_of(name)) == 40
    assert [place.name for place in tmp_path.iterdir()] == ["out"]


def test_files_of_somebody_else_are_in_the_way_or_left_alone(tmp_path):
    for name in ("summary.csv", "results.json", "sequences.parquet", "results", ".claims"):
        out = tmp_path / f"with {name}"
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match=r"was not written by sae-afa and would be in the way"):
            evaluate({"a": small_sae()}, out=out)
        assert (out / name).read_text() == "mine"
        assert len(list(out.iterdir())) == 1
    out = tmp_path / "beside"
    for name in ("notes.txt", "unfinished/half.txt", "figures/zf.png"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    bad = small_sae()
    bad.W_enc.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="none of its tokens has finite norms"):
        evaluate({"bad": bad}, out=out)
    evaluate({"a": small_sae()}, out=out)
    for name in ("notes.txt", "unfinished/half.txt", "figures/zf.png"):
        assert (out / name).read_text() == "mine"


LOCK = ".claims/folder.lock"


@pytest.mark.parametrize(
    "left", [[], [LOCK], [LOCK, "sequences.parquet"], [LOCK, ".sequences.parquet.partial/x"]]
)
def test_a_kill_while_the_folder_is_made_is_continued(tmp_path, left):
    out = tmp_path / "out"
    (out / ".claims").mkdir(parents=True)
    for name in left:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"")
    results = evaluate({"a": small_sae()}, out=out)
    assert len(AFAResults.load(out).sequences) == len(results.sequences)
    # and what is there of somebody else is still left alone
    (tmp_path / "other" / ".claims").mkdir(parents=True)
    (tmp_path / "other" / ".claims" / "deed.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match="was not written by sae-afa"):
        evaluate({"a": small_sae()}, out=tmp_path / "other")


def test_links_are_replaced_and_not_followed(tmp_path):
    evaluate({"a": small_sae()}, out=tmp_path / "out")
    names = ("summary.csv", "results.json", "report.html")
    for name in names:
        (tmp_path / name).write_text("mine")
        (tmp_path / "out" / name).unlink(missing_ok=True)
        (tmp_path / "out" / name).symlink_to(tmp_path / name)
        for partial in (f".{name}.partial", f".{name}"):  # where it is written first
            (tmp_path / "out" / partial).symlink_to(tmp_path / name)
    with suppress(ValueError):  # an index that is no index of these results
        evaluate({"a": small_sae(), "b": small_sae(1)}, out=tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    results = evaluate({"a": small_sae(), "b": small_sae(1)}, out=tmp_path / "out")
    write_report(results, tmp_path / "out" / "report.html")
    for name in names:
        assert (tmp_path / name).read_text() == "mine"
        assert not (tmp_path / "out" / name).is_symlink()


def test_a_failed_call_leaves_the_results_of_others(tmp_path):
    out = tmp_path / "out"
    evaluate({"a": small_sae()}, out=out)
    files = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match="have width 8, but the SAE has d_in=9"):
        evaluate({"b": small_sae(d_in=9)}, out=out)
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == files


# --- one bad SAE ---


class OutOfMemorySAE(StandardSAE):
    def encode(self, x):
        if len(x) > 8:  # it loads, it passes the check of the first tokens, then it is too much
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().encode(x)


class TypoSAE(StandardSAE):
    def encode(self, x):
        return super().encode(x)[self.cfg.no_such_thing]


def with_class(cls):
    sae = small_sae()
    sae.__class__ = cls
    return sae


def test_one_bad_sae_costs_only_itself(tmp_path):
    damaged = tmp_path / "damaged"
    small_sae().save_model(damaged)
    (damaged / "sae_weights.safetensors").write_bytes(b"no weights at all")
    unreadable = tmp_path / "unreadable"
    small_sae().save_model(unreadable)
    (unreadable / "cfg.json").write_text('{"architecture": ["standard"], "d_in": {}}')
    diverged = small_sae()
    diverged.W_dec.data.fill_(torch.nan)
    saes = {
        "first": small_sae(1),
        "diverged": diverged,
        "too large": with_class(OutOfMemorySAE),
        "damaged": damaged,
        "unreadable": unreadable,
        "typo": with_class(TypoSAE),
        "left out": Excluded("its training diverged at step 12: use a lower lr"),
        "last": small_sae(2),
    }
    results = evaluate(saes, out=tmp_path / "out")
    assert list(results.summary.index) == ["first", "last"]
    refused = results.metadata["refused"]
    assert list(refused) == ["unreadable", "left out", "diverged", "too large", "damaged", "typo"]
    assert refused["left out"] == "its training diverged at step 12: use a lower lr"
    assert "decoder rows are NaN or infinite" in refused["diverged"]
    assert refused["too large"].startswith("there is not enough memory for it (CUDA out of memory")
    assert "damaged or incomplete" in refused["damaged"]
    assert "cfg.json" in refused["unreadable"]
    assert "no_such_thing" in refused["typo"]
    assert AFAResults.load(tmp_path / "out").metadata["refused"] == refused
    alone = evaluate({name: saes[name] for name in ("first", "last")})
    pd.testing.assert_frame_equal(alone.tokens, results.tokens, check_exact=True)
    # mended, it is no longer listed
    results = evaluate({"too large": small_sae(3)}, out=tmp_path / "out")
    assert "too large" not in results.metadata["refused"]
    assert list(results.summary.index) == ["too large", "first", "last"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("hook_name", 5, "its config has hook_name=5, which is int and must be str"),
        ("hook_head_index", "2", "has hook_head_index='2', which is str and must be int"),
        ("prepend_bos", {}, "its config has prepend_bos={}, which is dict and must be bool"),
        ("context_size", "long", "has context_size='long', which is str and must be int"),
        ("model_from_pretrained_kwargs", [1], "kwargs=[1], which is list and must be dict"),
    ],
)
def test_metadata_of_wrong_kinds_cost_only_their_sae(tmp_path, name, value, said):
    small_sae().save_model(tmp_path / "sae")
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    config["metadata"][name] = value
    (tmp_path / "sae/cfg.json").write_text(json.dumps(config))
    results = evaluate({"wrong": tmp_path / "sae", "good": small_sae(1)})
    assert list(results.summary.index) == ["good"]
    assert said in results.metadata["refused"]["wrong"]


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("batchtopk", "it is a training checkpoint of architecture 'batchtopk', which cannot be"),
        ("matryoshka_batchtopk", "save it with save_inference_model, and evaluate that"),
        ("jumprelo", "SAELens knows no architecture 'jumprelo': did you mean 'jumprelu'"),
        ("zzz", "SAELens knows no architecture 'zzz')"),
        (3, "its config has architecture=3, which is int and must be str"),
        (None, "cannot be used (it names no architecture)"),
    ],
)
def test_architectures_that_cannot_be_loaded_cost_only_their_sae(tmp_path, architecture, said):
    small_sae().save_model(tmp_path / "sae")
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    config["architecture"] = architecture
    (tmp_path / "sae/cfg.json").write_text(json.dumps(config))
    results = evaluate({"wrong": tmp_path / "sae", "good": small_sae(1)})
    assert list(results.summary.index) == ["good"]
    assert said in results.metadata["refused"]["wrong"]


# --- several at once ---


def test_a_claim_is_one_processs_alone(tmp_path):
    store, other = new_store(tmp_path), Store(tmp_path)
    with store.claim("a") as mine, other.claim("a") as theirs, other.claim("b") as another:
        assert (mine, theirs, another) == (True, False, True)
    with other.claim("a") as theirs:
        assert theirs
    taken = []

    def wait():
        with other.claim("a", wait=True) as mine:
            taken.append(mine)

    with store.claim("a"):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.3)
        assert taken == []
    thread.join(10)
    assert taken == [True]


def test_a_result_that_is_there_is_not_written_again(tmp_path):
    store = new_store(tmp_path)
    first = add(store, value=1.0)
    second = add(Store(tmp_path), value=2.0)  # as of a process that saw no lock
    assert second.summary == first.summary
    assert not [p for p in (tmp_path / "results").iterdir() if p.name.startswith(".")]


def test_the_index_is_made_from_what_is_there(tmp_path):
    evaluate({"b": small_sae(1), "a": small_sae(2)}, out=tmp_path)
    before = AFAResults.load(tmp_path)
    index = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").unlink()
    (tmp_path / "summary.csv").unlink()
    evaluate({"b": small_sae(1)}, out=tmp_path)  # knows nothing of the other
    after = AFAResults.load(tmp_path)
    pd.testing.assert_frame_equal(after.summary, before.summary, check_exact=True)
    assert json.loads((tmp_path / "results.json").read_text())["parts"] == index["parts"]


def test_results_are_saved_elsewhere_and_edited(tmp_path):
    results = evaluate({"a": small_sae(1), "b": small_sae(2)}, out=tmp_path / "out")
    results.summary["training_seconds"] = [1.5, 2.5]
    results.save(tmp_path / "copy")
    results.save(tmp_path / "out")
    for folder in ("copy", "out"):
        loaded = AFAResults.load(tmp_path / folder)
        assert loaded.summary["training_seconds"].tolist() == [1.5, 2.5]
        pd.testing.assert_frame_equal(loaded.tokens, results.tokens, check_exact=True)
        assert loaded.features_of("a")["fired"].sum() == results.tokens_of("a")["l0"].sum()
    without_folder = evaluate({"a": small_sae(1)})
    without_folder.save(tmp_path / "kept")
    pd.testing.assert_frame_equal(
        AFAResults.load(tmp_path / "kept").tokens, without_folder.tokens, check_exact=True
    )
    in_memory = AFAResults(
        without_folder.summary, without_folder.tokens, without_folder.sequences,
        {"settings": {}, "fingerprints": {}},
    )  # fmt: skip
    in_memory.save(tmp_path / "frames")
    loaded = AFAResults.load(tmp_path / "frames")
    pd.testing.assert_frame_equal(loaded.summary, in_memory.summary, check_exact=True)
    pd.testing.assert_frame_equal(loaded.tokens, in_memory.tokens, check_exact=True)


def test_some_of_the_saes_alone(tmp_path):
    results = evaluate({name: small_sae(n) for n, name in enumerate("abc")}, out=tmp_path)
    lazily, at_hand = results.only(["c", "a"]), results
    assert at_hand.tokens is not None  # now they are read
    for some in (lazily, at_hand.only(["c", "a"])):
        assert list(some.summary.index) == ["c", "a"]
        assert set(some.tokens["sae"]) == {"a", "c"}
        pd.testing.assert_series_equal(
            some.tokens_of("c")["nmse"].reset_index(drop=True),
            results.tokens_of("c")["nmse"].reset_index(drop=True),
        )
    with pytest.raises(KeyError):
        results.only(["d"])


def test_a_folder_that_cannot_be_written_ends_the_run_with_what_to_do(tmp_path, monkeypatch):
    written = []
    to_parquet = pd.DataFrame.to_parquet

    def full(self, path, **options):
        written.append(path)
        if len(written) > 4:
            raise OSError(28, "No space left on device")
        return to_parquet(self, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    saes = {str(n): small_sae(n) for n in range(4)}
    with pytest.raises(NotWrittenError, match="No space left on device.*nothing that was finished"):
        evaluate(saes, out=tmp_path)
    n_before = len(written)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", to_parquet)
    assert n_before == 5  # it did not go on with the others
    assert list(evaluate(saes, out=tmp_path).summary.index) == list(saes)


@pytest.mark.parametrize("age", [0, 10])
def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path, age):
    file = tmp_path / "tokens.parquet"
    file.write_bytes(b"before")
    then = file.stat().st_mtime_ns - age * 10**9
    os.utime(file, ns=(then, then))
    before = digest_of(file)
    assert digest_of(file) == before
    file.write_bytes(b"after.")
    os.utime(file, ns=(then, then))
    assert digest_of(file) != before


def test_a_repository_without_a_network_is_one_sentence(monkeypatch):
    monkeypatch.setattr("sae_afa_plugin.sources.HfApi", lambda: HfApi("http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="the hub does not answer|HF_HUB_OFFLINE"):
        sources_of_release("somebody/saes")


# --- the same object, or is it? ---


def changed_activation(sae):
    sae.activation_fn = torch.nn.GELU()


def changed_class(sae):
    sae.__class__ = type(
        "Other", (StandardSAE,), {"encode": lambda self, x: x[:, :1] @ self.W_enc[:1]}
    )


def changed_weights(sae):
    sae.b_enc.data += 1


@pytest.mark.parametrize("change", [changed_activation, changed_class, changed_weights])
def test_an_sae_that_behaves_otherwise_is_evaluated_again(tmp_path, change):
    sae = small_sae()
    before = evaluate({"a": sae}, out=tmp_path / "out").summary.loc["a", "l0_mean"]
    assert evaluate({"a": sae}, out=tmp_path / "out").summary.loc["a", "l0_mean"] == before
    change(sae)
    expected = evaluate({"a": sae}).summary.loc["a", "l0_mean"]
    assert expected != before
    assert evaluate({"a": sae}, out=tmp_path / "out").summary.loc["a", "l0_mean"] == expected


def test_hooks_left_on_an_sae_and_autocast_change_no_number(tmp_path, capsys):
    sae, source = small_sae(), TensorActivations({"here": X})
    expected = evaluate({"a": sae}).summary
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts * 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate_saes({"a": sae}, activations=source, out=tmp_path / "out")
    pd.testing.assert_frame_equal(found.summary, expected)
    assert "a has hooks on hook_sae_acts_post: it is read without them" in capsys.readouterr().out
    assert len(sae.hook_sae_acts_post.fwd_hooks) == 1


def test_which_tokens_are_kept_is_part_of_the_results(tmp_path):
    model, sae = tiny_hooked_sae_transformer(8), small_sae()
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    ids = [list(range(i, i + 8)) for i in range(6)]

    def rows(masked):
        mask = [int(i not in masked) for i in range(8)]
        return ({"tokens": row, "attention_mask": mask} for row in ids)

    def run(masked, **options):
        stream = IterableDataset.from_generator(rows, gen_kwargs={"masked": masked})
        options |= {"n_tokens": 20, "context_size": 8, "exclude_special_tokens": False}
        return evaluate_saes({"a": sae}, model, stream, progress=False, **options).summary

    before = run({6, 7}, out=tmp_path / "out")
    pd.testing.assert_frame_equal(run({6, 7}, out=tmp_path / "out"), before)
    with pytest.raises(ValueError, match="the dataset gives other tokens than those"):
        run({7}, out=tmp_path / "out")
    places = pd.DataFrame({"sequence": 0, "position": range(40)})
    one, other = (TensorActivations({"here": X}, p) for p in (places, places + 1))
    assert one.settings == TensorActivations({"here": X}, places).settings != other.settings


def test_a_run_that_fails_leaves_the_users_files(tmp_path):
    out = tmp_path / "out"
    evaluate({"a": small_sae()}, out=out)
    for folder in (out / "results").iterdir():
        shutil.rmtree(folder)
    mine = [out / "results" / "notes.txt", out / "results" / "backup" / "b", out / ".claims" / "c"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    sae = small_sae()
    sae.cfg.metadata.hook_name = "elsewhere"
    with pytest.raises(ValueError, match="has no hook 'elsewhere'"):
        evaluate({"a": sae}, out=out)
    assert [file.read_text() for file in mine] == ["mine"] * 3
    assert evaluate({"a": small_sae()}, out=out).summary.loc["a", "tokens"] == 40


# --- what was found by a review ---


def test_rows_of_a_decoder_that_are_not_finite_are_said():
    sae = small_sae()
    sae.W_dec.data[3] = torch.nan
    results = evaluate({"a": sae, "b": small_sae()})
    assert list(results.summary.index) == ["b"]
    assert "1 of the 20 decoder rows are NaN or infinite" in results.metadata["refused"]["a"]


def test_a_dtype_has_one_name(tmp_path):
    evaluate({"a": small_sae()}, out=tmp_path / "out", dtype="float32")
    evaluate({"a": small_sae()}, out=tmp_path / "out", dtype="torch.float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": ""}, "out must not be empty"),
        ({"groups": ["afa"]}, r"groups must be groups of metrics, .*got \['afa'\]"),
        ({"protocol": None}, r"protocol must be one of \['default', 'paper'\]: got None"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
    ],
)
def test_options_of_a_wrong_kind(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate({"a": small_sae()}, **options)


class Dropping(torch.nn.Module):
    """A stranger's, in training mode, with statistics that a pass would move."""

    def __init__(self):
        super().__init__()
        self.W_dec = torch.nn.Parameter(small_sae().W_dec.detach())
        self.b_dec = torch.nn.Parameter(torch.zeros(8))
        self.drop, self.norm = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(20)
        self.metadata = {"hook_name": "here"}

    def encode(self, x):
        return self.drop(self.norm(x @ self.W_dec.T)).relu()

    def decode(self, f):
        return f @ self.W_dec + self.b_dec


def test_a_module_in_training_mode_is_read_without_it():
    sae = Dropping().eval()
    expected = evaluate({"a": sae}).summary
    sae.train()
    before = sae.norm.running_mean.clone()
    pd.testing.assert_frame_equal(evaluate({"a": sae}).summary, expected)
    assert torch.equal(sae.norm.running_mean, before)
    assert all(module.training for module in sae.modules())


@pytest.mark.parametrize("change", [lambda s: s.iloc[::-1], lambda s: s.iloc[:-1], lambda s: s + 1])
def test_sequences_that_could_not_be_looked_up_are_refused(change):
    n = range(40)
    table = pd.DataFrame(
        {
            "sequence": [i // 8 for i in n],
            "position": [i % 8 for i in n],
            "token_id": n,
            "token": "a",
        }
    )
    changed = table.assign(**change(table[["sequence", "position"]]).reset_index(drop=True))
    if changed[["sequence", "position"]].isna().any().any():
        changed = changed.dropna().astype({"sequence": int, "position": int})
    places = table[["sequence", "position"]]
    for sequences, refused in ((table, False), (changed, True)):
        source = TensorActivations({"here": X}, places, sequences)
        with pytest.raises(ValueError, match="same number of tokens") if refused else nullcontext():
            evaluate_saes({"a": small_sae()}, activations=source, progress=False)


def test_saving_beside_others_keeps_them(tmp_path):
    out = tmp_path / "out"
    evaluate({"a": small_sae(), "b": small_sae(1)}, out=out)
    alone = evaluate({"a": small_sae()})
    alone.summary["hours"] = 2.5
    alone.save(out)
    both = AFAResults.load(out)
    assert sorted(both.summary.index) == ["a", "b"]
    assert set(both.metadata["fingerprints"]) == {"a", "b"}
    assert len(both.tokens_of("b")) == 40
    after = evaluate({"a": small_sae(), "c": small_sae(2)}, out=out).summary
    assert after.loc["a", "hours"] == 2.5  # what somebody has added stays
    assert sorted(after.index) == ["a", "b", "c"]
    both.only(["b"]).save(tmp_path / "other")
    assert set(AFAResults.load(tmp_path / "other").metadata["fingerprints"]) == {"b"}


def test_results_that_are_pickled_have_their_tables():
    results = evaluate({"a": small_sae()})
    copied = pickle.loads(pickle.dumps(results))
    expected = results.tokens
    del results
    pd.testing.assert_frame_equal(copied.tokens, expected)


def test_a_users_empty_folder_stays(tmp_path):
    sae = small_sae()
    sae.cfg.metadata.hook_name = "elsewhere"
    for folder, is_there in ((tmp_path / "mine", True), (tmp_path / "new", False)):
        if is_there:
            folder.mkdir()
        with pytest.raises(ValueError, match="no hook 'elsewhere'"):
            evaluate({"a": sae}, out=folder)
        assert folder.is_dir() == is_there


def test_figures_and_pages_take_nobodys_place(tmp_path):
    results = evaluate({"a": small_sae()}, out=tmp_path / "out")
    for write, name in ((write_report, "report.html"), (save_plots, "figures/zf.png")):
        place = tmp_path / "out" / name
        where = place if write is write_report else place.parent
        place.parent.mkdir(exist_ok=True)
        place.write_text("mine")
        with pytest.raises(ValueError, match=f"{place.name}' was not written by sae-afa"):
            write(results, where)
        assert place.read_text() == "mine"
        place.unlink()
        write(results, where)
        write(results, where)  # what is ours is written again
