"""Sources of activations: one contract for a language model, tensors, recordings, and yours."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import tiny_hooked_sae_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig

from sae_afa_plugin import evaluate_saes
from sae_afa_plugin.activations import recording, tensors
from sae_afa_plugin.activations.base import Activations, Site
from sae_afa_plugin.activations.language_model import LanguageModelActivations
from sae_afa_plugin.activations.recording import RecordedActivations, record
from sae_afa_plugin.activations.tensors import TensorActivations, hold
from sae_afa_plugin.activations.tokens import Protocol
from sae_afa_plugin.files import claimed, write_sealed

HOOKS = ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"]
TOKENS = torch.randint(1, 50, (9, 12), generator=torch.Generator().manual_seed(1))
TOKENS[:, 0] = 0


def language_model(**options):
    model = tiny_hooked_sae_transformer(16)
    protocol = Protocol(90, 12, exclude_special_tokens=(0,))
    return LanguageModelActivations(model, TOKENS, protocol, batch_size_prompts=4, **options)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same activations from everywhere."""
    source = language_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "_SHARD_BYTES", 3000)
        recorded = record(source, HOOKS, tmp_path_factory.mktemp("recording") / "all")
    assert len(list(recorded.folder.glob("*.safetensors"))) > 2
    return {
        "language model": source,
        "in memory": hold(source, HOOKS, 1 << 30),
        "in a file": hold(source, HOOKS, 1),
        "recorded": recorded,
    }


KINDS = ["language model", "in memory", "in a file", "recorded"]


@pytest.fixture(scope="module")
def expected():
    cache = tiny_hooked_sae_transformer(16).run_with_cache(TOKENS, names_filter=HOOKS)[1]
    return {hook: cache[hook].detach()[TOKENS != 0][:90] for hook in HOOKS}


@pytest.mark.parametrize("kind", KINDS)
def test_places_shapes_and_settings(sources, kind):
    source = sources[kind]
    assert source.n_tokens == len(source.places) == 90
    sequence, position, token_id = (source.places[c].to_numpy() for c in source.places)
    assert (TOKENS.numpy()[sequence, position] == token_id).all()
    assert source.n_special == 9
    assert source.shapes([*HOOKS, "hook_nowhere"]) == {HOOKS[0]: (16,), HOOKS[1]: (4, 4)}
    assert source.settings == sources["language model"].settings
    assert source.identity == sources["language model"].identity
    pd.testing.assert_frame_equal(source.sequences, sources["language model"].sequences)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(
    st.tuples(st.integers(0, 89), st.integers(1, 90)),
    st.sampled_from([HOOKS, HOOKS[:1], HOOKS[1:]]),
)
def test_any_range_gives_the_same_bits(sources, expected, kind, ends, hooks):
    start, stop = min(ends), max(ends)
    if start == stop:
        stop += 1
    found = sources[kind].read(hooks, start, stop)
    assert list(found) == hooks
    for hook in hooks:
        # computed in the same batches of sequences everywhere
        assert torch.equal(found[hook], sources["in memory"].read([hook], 0, 90)[hook][start:stop])
        torch.testing.assert_close(found[hook], expected[hook][start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_by_site(sources, expected, kind):
    site = Site(HOOKS[1], 2, HOOKS[0])
    batches = list(sources[kind].batches(site, "cpu", 40))
    assert [batch.rows for batch in batches] == [slice(0, 40), slice(40, 80), slice(80, 90)]
    torch.testing.assert_close(torch.cat([b.x for b in batches]), expected[HOOKS[1]][:, 2])
    torch.testing.assert_close(torch.cat([b.x_out for b in batches]), expected[HOOKS[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_is_said(sources, kind):
    source = sources[kind]
    assert source.why_not(Site(HOOKS[0]), 16) is None
    assert source.why_not(Site(HOOKS[1], 3), 4) is None
    assert source.why_not(Site(HOOKS[1]), 16, 16) is None
    assert "have width 16, but the SAE has d_in=20" in source.why_not(Site(HOOKS[0]), 20)
    assert "hook_head_index=4 does not fit" in source.why_not(Site(HOOKS[1], 4), 4)
    assert source.why_not(Site(HOOKS[0], None, HOOKS[1]), 16) is None
    assert "no hook 'blocks.77'" in source.why_not(Site(HOOKS[0], None, "blocks.77"), 16)
    near = source.why_not(Site("blocks.1.hook_resid_pr"), 16)
    assert near.startswith(
        "the model has no hook 'blocks.1.hook_resid_pr': did you mean 'blocks.1."
    )


def test_the_identity_holds_every_weight_and_every_token():
    before = language_model()
    assert before.identity == language_model().identity
    other = LanguageModelActivations(
        tiny_hooked_sae_transformer(16), TOKENS.flip(0), before._protocol
    )
    assert other.identity != before.identity
    for name in ("embed.W_E", "blocks.1.mlp.b_out", "unembed.b_U"):
        changed = tiny_hooked_sae_transformer(16)
        with torch.no_grad():  # the last element of the last row: no beginning would show it
            dict(changed.named_parameters())[name].view(-1)[-1] += 1e-3
        assert (
            LanguageModelActivations(changed, TOKENS, before._protocol).identity != before.identity
        )


def test_a_folder_is_known_by_its_content(tmp_path):
    def identity():
        metadata = {"sae": {"model_name": "tiny"}}
        return LanguageModelActivations(tmp_path, TOKENS, Protocol(), metadata).identity

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1" * 5000)
    before = identity()
    (tmp_path / "model.safetensors").touch()  # no time is part of it
    assert identity() == before
    (tmp_path / "model.safetensors").write_bytes(b"1" * 4999 + b"2")
    assert identity() != before


def test_the_model_runs_once_for_ranges_that_follow_each_other():
    source = language_model()
    seen = []
    # of PyTorch, on the block: hooks of TransformerLens are taken off
    source.model.blocks[0].register_forward_hook(lambda _, __, output: seen.append(len(output)))
    for start in range(0, 90, 7):
        source.read(HOOKS[:1], start, min(start + 7, 90))
    assert seen == [4, 4, 1]


def test_tensors_of_no_text():
    x = torch.randn(30, 8)
    source = TensorActivations({"anywhere": x})
    assert list(source.places) == ["sequence"]
    assert source.identity == TensorActivations({"anywhere": x.clone()}).identity
    assert source.identity != TensorActivations({"anywhere": x + 1e-6}).identity
    assert source.sequences.empty
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=20))
    sae.cfg.metadata.hook_name = "anywhere"
    results = evaluate_saes({"a": sae}, activations=source, progress=False)
    assert len(results.tokens) == 30
    for bad in ({}, {"a": torch.ones(2, 3), "b": torch.ones(3, 3)}, {"a": torch.ones(0, 3)}):
        with pytest.raises(ValueError, match="must be of the same tokens, and of some: got"):
            TensorActivations(bad)
    with pytest.raises(ValueError, match="a row for each token: got 2 for 30"):
        TensorActivations({"a": x}, pd.DataFrame({"sequence": [0, 1]}))


class Waves(Activations):
    """A source that somebody else has written: no model, no text."""

    def __init__(self, n, d, seed):
        self._n, self._d, self._seed = n, d, seed

    @property
    def settings(self):
        return {"source": "waves", "n": self._n, "d": self._d, "seed": self._seed}

    @property
    def places(self):
        return pd.DataFrame({"sequence": np.arange(self._n)})

    def shapes(self, hooks):
        return {hook: torch.Size([self._d]) for hook in hooks if hook == "wave"}

    def read(self, hooks, start, stop):
        at = torch.arange(start, stop)[:, None] * torch.arange(1, self._d + 1)
        return {hook: torch.sin(0.1 * at + self._seed) for hook in hooks}


def test_a_new_source_is_evaluated_recorded_and_held(tmp_path):
    source = Waves(200, 8, 3)
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=20))
    sae.cfg.metadata.hook_name = "wave"
    direct = evaluate_saes({"a": sae}, activations=source, out=tmp_path / "out", progress=False)
    assert direct.summary.loc["a", "tokens"] == 200
    assert direct.metadata["settings"]["source"] == "waves"
    recorded = record(source, ["wave"], tmp_path / "waves")
    again = evaluate_saes({"a": sae}, activations=recorded, progress=False)
    pd.testing.assert_frame_equal(direct.tokens, again.tokens, check_exact=True)
    held = evaluate_saes({"a": sae}, activations=hold(source, ["wave"], 1), progress=False)
    pd.testing.assert_frame_equal(direct.tokens, held.tokens, check_exact=True)
    sae.cfg.metadata.hook_name = "particle"
    with pytest.raises(ValueError, match="the model has no hook 'particle'"):
        evaluate_saes({"a": sae}, activations=source, progress=False)
    with pytest.raises(ValueError, match="'core' runs the language model, and these activations"):
        evaluate_saes({"a": sae}, activations=source, core=True, progress=False)


# --- recordings ---


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(recording, "_SHARD_BYTES", 2000)


def test_the_size_is_said_and_a_part_is_finished(small_shards, tmp_path):
    source, said = Waves(1000, 8, 0), []
    record(source, ["wave"], tmp_path / "all", say=said.append)
    assert said == ["1,000 tokens at 1 hooks, 32 bytes each: 0.0 MiB"]
    shards = sorted((tmp_path / "all").glob("*.safetensors"))
    assert len(shards) == 17
    before = {shard: shard.stat().st_mtime_ns for shard in shards}
    shards[3].unlink()
    with pytest.raises(ValueError, match="not finished, 1 of 17 shards are missing: run the same"):
        RecordedActivations(tmp_path / "all")
    record(source, ["wave"], tmp_path / "all", say=said.append)
    assert "of which 0.0 MiB are missing" in said[1]
    after = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert {s for s in shards if after[s] != before[s]} == {shards[3]}
    x = RecordedActivations(tmp_path / "all").read(["wave"], 0, 1000)["wave"]
    assert torch.equal(x, source.read(["wave"], 0, 1000)["wave"])


def test_another_process_that_records_there_is_said(tmp_path):
    with (
        claimed(tmp_path / "all", "recording"),
        pytest.raises(ValueError, match="another process is recording in .*: wait until it has"),
    ):
        record(Waves(50, 8, 0), ["wave"], tmp_path / "all")
    assert record(Waves(50, 8, 0), ["wave"], tmp_path / "all").n_tokens == 50


def test_lower_precision_is_a_setting_of_its_own(tmp_path):
    source = Waves(50, 8, 0)
    half = record(source, ["wave"], tmp_path / "half", "float16")
    assert half.read(["wave"], 0, 50)["wave"].dtype == torch.float16
    assert half.settings["recorded_dtype"] == "float16"
    assert half.identity != source.identity
    huge = TensorActivations({"wave": torch.tensor([[1.0], [7e4]])})
    with pytest.raises(
        ValueError, match=r"at 'wave' leave the range of float16 \(the largest is 7e\+04\)"
    ):
        record(huge, ["wave"], tmp_path / "huge", "float16")
    with pytest.raises(ValueError, match="dtype must be one of"):
        record(source, ["wave"], tmp_path / "x", "int8")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    source = Waves(50, 8, 0)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no recording: use another"):
        record(source, ["wave"], tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]
    record(source, ["wave"], tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"holds a recording of something else \(settings differ\)"
    ):
        record(Waves(50, 8, 1), ["wave"], tmp_path / "a")
    with pytest.raises(ValueError, match="the model has no hook 'water'"):
        record(source, ["water"], tmp_path / "b")
    with pytest.raises(ValueError, match="name at least one hook"):
        record(source, [], tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no recording of activations"),
        (lambda f: (f / "manifest.json").write_text("[]"), "must be an object of JSON"),
        (lambda f: (f / "manifest.json").write_text("{"), "holds no recording of activations"),
        (lambda f: (f / "places.parquet").write_bytes(b"PAR1"), "is damaged"),
        (lambda f: edit(f, version=9), "has version 9, this version of sae-afa-plugin reads 2"),
        (lambda f: edit(f, format="else"), "it is no manifest of sae-afa"),
        (lambda f: (f / "manifest.json").write_text('{"format": "sae-afa activations"}'), "None"),
        # by somebody who knows how: sizes are looked at before room is made for them
        (lambda f: edit(f, n_tokens="many"), "n_tokens must be a whole number: got 'many'"),
        (lambda f: edit(f, n_tokens=10**15), "is not finished, .* shards are missing"),
        (lambda f: edit(f, n_tokens=10**15, shard_tokens=10**15), "places.parquet has 50 rows"),
        (lambda f: edit(f, shard_tokens=0), "shard_tokens must be at least 1"),
        (
            lambda f: edit(f, hooks={"wave": {"shape": [10**12], "dtype": "float32"}}),
            "shape .50, 8",
        ),
        (lambda f: edit(f, hooks={"wave": {"shape": [-1], "dtype": "float32"}}), "has shape"),
        (lambda f: edit(f, hooks={"wave": {"shape": [8], "dtype": "load"}}), "dtype 'load'"),
        (lambda f: edit(f, hooks={"wave": 3}), "is damaged"),
        (
            lambda f: (f / "00000.safetensors").write_bytes(b"12345678"),
            "shard 00000.safetensors of",
        ),
    ],
)
def test_damage_is_one_sentence(tmp_path, damage, message):
    record(Waves(50, 8, 0), ["wave"], tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=message) as error:
        RecordedActivations(tmp_path / "a").read(["wave"], 0, 5)
    assert str(tmp_path / "a") in str(error.value)


def edit(folder, **fields):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    write_sealed(folder / "manifest.json", {**manifest, **fields})


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda place: type("", (), {"free": 100}))
    with pytest.raises(
        OSError, match=r"needs 0\.0 MiB in .*, where 0\.0 MiB are free: record fewer"
    ):
        record(Waves(50, 8, 0), ["wave"], tmp_path / "a")
    assert [file for file in (tmp_path / "a").iterdir() if file.suffix != ".lock"] == []


def test_a_recording_takes_no_other_tokens(tmp_path, sources):
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=20))
    sae.cfg.metadata.hook_name = HOOKS[0]
    with pytest.raises(ValueError, match="activations have their tokens already"):
        evaluate_saes({"a": sae}, activations=sources["recorded"].folder, n_tokens=5)


def test_room_is_made_before_a_source_is_read(tmp_path):
    assert tensors._AT_ONCE > 0
    held = hold(Waves(5, 3, 0), ["wave"], 1, tmp_path)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert held.read(["wave"], 0, 5)["wave"].shape == (5, 3)


def test_rows_stand_where_they_stand_whatever_their_index():
    places = pd.DataFrame({"sequence": [7, 8, 9], "position": [1, 2, 3]}, index=[102, 100, 101])
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=20))
    sae.cfg.metadata.hook_name = "here"
    x = torch.randn(3, 8, requires_grad=True)
    results = evaluate_saes({"a": sae}, activations=TensorActivations({"here": x}, places),
                            progress=False)  # fmt: skip
    assert results.tokens["sequence"].tolist() == [7, 8, 9]
    norms = x.detach().norm(dim=-1).tolist()
    assert results.tokens["norm_z"].tolist() == pytest.approx(norms)


def test_a_recording_of_another_processing_is_refused(sources, capsys):
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=20))
    sae.cfg.metadata.hook_name = HOOKS[0]
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    source = sources["recorded"]  # of a model object: whoever made it knows
    assert len(evaluate_saes({"a": sae}, activations=source, progress=False).summary) == 1
    settings = {**source.settings, "model_kwargs": {}, "model": "gpt2", "prepend_bos": False}
    named = TensorActivations(
        {HOOKS[0]: torch.randn(9, 16)}, settings={**settings, "dataset": "somebody/text"}
    )
    with pytest.raises(ValueError, match=r"needs its model loaded with \{'center_writing_weights'"):
        evaluate_saes({"a": sae}, activations=named, progress=False)
    sae.cfg.metadata.model_from_pretrained_kwargs = {}
    sae.cfg.metadata.model_name, sae.cfg.metadata.prepend_bos = "gpt2-small", True
    sae.cfg.metadata.dataset_path = "somebody/text"
    evaluate_saes({"a": sae}, activations=named)
    said = capsys.readouterr().out
    assert "a was trained with model='gpt2-small', these activations are made with 'gpt2'" in said
    assert "a was trained with prepend_bos=True, these activations are made with False" in said
    assert "a was trained on somebody/text: it may have seen these tokens" in said


def test_activations_take_no_other_choice_of_tokens_or_model(sources):
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=20))
    sae.cfg.metadata.hook_name = HOOKS[0]
    for options in ({"n_tokens": 5}, {"protocol": "paper"}, {"dataset": TOKENS}):
        with pytest.raises(ValueError, match="activations have their tokens already: pass no"):
            evaluate_saes({"a": sae}, activations=sources["in memory"], **options)
    with pytest.raises(ValueError, match="pass the model to the activations, not beside them"):
        evaluate_saes({"a": sae}, "gpt2", activations=sources["in memory"])
