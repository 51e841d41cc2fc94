"""What an SAE's metadata say of tokens, against SAELens's own store and by hand."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.training.activations_store import ActivationsStore

from sae_afa_plugin import evaluate_saes
from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.activations.recording import record
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.as_trained import seen

HOOK = "blocks.1.hook_resid_pre"


def sae(**metadata):
    made = StandardSAE(StandardSAEConfig(d_in=192, d_sae=8))
    with torch.no_grad():
        made.b_enc.fill_(0.1)
    metadata = {"hook_name": HOOK, "model_name": "sae-afa-demo", "context_size": 16, **metadata}
    for name, value in metadata.items():
        setattr(made.cfg.metadata, name, value)
    return made


@pytest.fixture(scope="module")
def texts():
    # some shorter than a sequence, some longer
    return [
        text[: 20 * (1 + i % 9)] for i, text in enumerate(standard_library_texts("heldout")[:40])
    ]


def evaluate(saes, texts, **options):
    options = {"n_tokens": 200, "coherence": False, "progress": False, **options}
    return evaluate_saes(saes, dataset=texts, **options)


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("separator", ["bos", "eos", None, 5])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("positions", [(None,), (3, -2)])
def test_the_tokens_are_those_that_saelens_trains_on(
    texts, prepend_bos, separator, separate, positions
):
    trained = sae(
        prepend_bos=prepend_bos,
        sequence_separator_token=separator,
        disable_concat_sequences=separate,
        seqpos_slice=positions,
    )
    store = ActivationsStore.from_sae(
        load_embedded_model(),
        trained,
        dataset=Dataset.from_dict({"text": texts}),
        context_size=16,
        store_batch_size_prompts=4,
        disable_concat_sequences=separate,
        sequence_separator_token=separator,
        streaming=False,
    )
    expected = store.get_batch_tokens(4)
    results = evaluate({"a": trained}, texts, n_tokens=40, exclude_special_tokens=False)
    found = results.sequences.pivot(index="sequence", columns="position", values="token_id")
    n = min(len(found), 4)
    assert n >= 3
    assert (found.to_numpy()[:n] == expected[:n].numpy()).all()
    allowed = list(range(16)[slice(*positions)])
    assert sorted(results.tokens["position"].unique()) == allowed


def test_what_is_chosen_goes_before_what_was_trained(texts):
    trained = sae(prepend_bos=True, seqpos_slice=(3, -2), sequence_separator_token=None)
    settings = evaluate(
        {"a": trained}, texts, positions="all", separator="eos", prepend_bos=False
    ).metadata["settings"]
    assert (settings["positions"], settings["separator"]) == ("all", "eos")
    assert settings["prepend_bos"] is False


def test_without_a_word_it_is_as_saelens_does_it(texts):
    settings = evaluate({"a": sae()}, texts).metadata["settings"]
    assert settings["positions"] == "all"
    assert settings["concatenate"] is True
    assert settings["separator"] == "bos"
    assert settings["prepend_bos"] is True


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"prepend_bos": False}, "trained with prepend_bos=False, most of the SAEs here with True"),
        ({"seqpos_slice": [2, None]}, "positions='2:16', most of the SAEs here with 'all'"),
        ({"disable_concat_sequences": True}, "concatenate=False, most of the SAEs here with True"),
        ({"sequence_separator_token": None}, "separator='none', most of the SAEs here with 'bos'"),
        ({"model_name": "gpt2"}, "belongs to gpt2, most of the SAEs here to sae-afa-demo"),
        ({"model_name": None}, "names no model"),
        ({"seqpos_slice": "32"}, "no slice of positions"),
        ({"seqpos_slice": [0, 8, 0]}, "no slice of positions"),
        ({"seqpos_slice": [8, 0, -1]}, "do not say in a usable way"),
        ({"seqpos_slice": [8, 8]}, "leaves none of the 16 tokens"),
        ({"sequence_separator_token": 10**12}, "do not say in a usable way"),
        ({"sequence_separator_token": "pad"}, "do not say in a usable way"),
        ({"context_size": -3}, "context_size must be at least 1"),
        ({"context_size": 10**12}, "do not say in a usable way"),
        ({"disable_concat_sequences": "yes"}, "which is str and must be bool"),
    ],
)
def test_one_that_does_not_fit_the_others_costs_only_itself(texts, metadata, sentence):
    usual = {
        "prepend_bos": True,
        "seqpos_slice": [None],
        "disable_concat_sequences": False,
        "sequence_separator_token": "bos",
    }
    saes = {"odd": sae(**{**usual, **metadata}), "a": sae(**usual), "b": sae(**usual)}
    results = evaluate(saes, texts)
    assert list(results.summary.index) == ["a", "b"]
    assert sentence in results.metadata["refused"]["odd"]


def test_an_sae_that_says_nothing_fits_all(texts):
    results = evaluate({"a": sae(seqpos_slice=(2, None)), "b": sae()}, texts)
    assert results.metadata["settings"]["positions"] == "2:16"
    assert not results.metadata["refused"]


def test_one_does_not_decide_for_many_that_say_nothing(texts):
    results = evaluate({"odd": sae(seqpos_slice=(2, None)), "a": sae(), "b": sae()}, texts)
    assert results.metadata["settings"]["positions"] == "all"
    assert list(results.summary.index) == ["a", "b"]
    assert (
        "positions='2:16', most of the SAEs here with 'all'" in results.metadata["refused"]["odd"]
    )


def test_positions_that_need_longer_sequences_get_them(texts, capsys):
    trained = sae(context_size=128, seqpos_slice=(100, -1))
    long = ["".join(texts) * 3]
    settings = evaluate({"a": trained}, long).metadata["settings"]
    assert (settings["context_size"], settings["positions"]) == (128, "100:127")
    with pytest.raises(ValueError, match="positions='100:127' leaves none of the 32 tokens"):
        evaluate({"a": trained}, long, context_size=32)


def test_one_short_context_does_not_decide_for_the_others(texts):
    saes = {f"sae {i}": sae(context_size=n) for i, n in enumerate((32, 32, 2, 64))}
    results = evaluate(saes, ["".join(texts) * 3])
    assert results.metadata["settings"]["context_size"] == 32
    assert list(results.summary.index) == ["sae 0", "sae 1", "sae 3"]
    assert (
        "trained on 2 tokens in a row, most of the SAEs here on 32"
        in (results.metadata["refused"]["sae 2"])
    )
    assert evaluate({"alone": saes["sae 2"]}, texts).metadata["settings"]["context_size"] == 2


def test_sequences_shorter_than_those_of_training_are_said(texts, capsys):
    evaluate({"a": sae(context_size=1024)}, ["".join(texts) * 3], progress=True)
    assert "trained on 1024 tokens in a row, here it is 128" in capsys.readouterr().out


def test_a_recording_of_other_tokens_is_said(texts, tmp_path, capsys):
    from sae_afa_plugin.activations.language_model import LanguageModelActivations
    from sae_afa_plugin.activations.tokens import Protocol

    source = LanguageModelActivations("sae-afa-demo", texts, Protocol(100, 16, positions="2:"))
    record(source, [HOOK], tmp_path / "recording")
    evaluate_saes(
        {"a": sae(seqpos_slice=[None], sequence_separator_token="eos")},
        activations=tmp_path / "recording",
        coherence=False,
    )
    said = capsys.readouterr().out
    assert "a was trained with positions='all', these activations are made with '2:'" in said
    assert "a was trained with separator='eos', these activations are made with 'bos'" in said


# what a file may hold in place of a slice
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=5,
)


@given(anything, st.none() | st.integers(1, 300), anything)
def test_whatever_metadata_say_is_understood_or_refused(seqpos_slice, context_size, separator):
    metadata = {
        "seqpos_slice": seqpos_slice,
        "context_size": context_size,
        "sequence_separator_token": separator,
    }
    try:
        found = seen(metadata)
    except ValueError:
        with pytest.raises(ValueError, match="its metadata"):
            seen(metadata)
        return
    if seqpos_slice is None:
        assert found["positions"] is None
        return
    size = context_size or 1 << 20
    chosen = {"all": slice(None)}.get(found["positions"])
    if chosen is None:
        chosen = slice(*(int(n) if n else None for n in found["positions"].split(":")))
    assert range(size)[chosen] == range(size)[slice(*seqpos_slice)] != range(0)
