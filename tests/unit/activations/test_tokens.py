"""Which tokens of which dataset are evaluated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from sae_lens.training.activations_store import ActivationsStore

from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.activations.tokens import PROTOCOLS, Protocol, sample_tokens

TEXTS = [
    "Return a list of the words in the string, using sep as the delimiter string. " * 3,
    "Short.",
    "Raise an exception if the file does not exist and cannot be made either. " * 3,
    "",
    "The name of the module is the name of its file without the extension. " * 3,
]


@pytest.fixture(scope="module")
def model():
    return load_embedded_model()


def sample(model, dataset, protocol=None, progress=False, **more):
    dataset_config, split = more.pop("dataset_config", None), more.pop("split", "train")
    protocol = protocol or Protocol(**{"n_tokens": 40, "context_size": 16, **more})
    return sample_tokens(model, dataset, protocol, dataset_config, split, progress)


def in_a_row(model, texts=TEXTS):
    """All documents after each other, BOS between them."""
    bos = model.tokenizer.bos_token_id
    row = []
    for text in filter(None, texts):
        row += [*([bos] if row else []), *model.to_tokens(text, prepend_bos=False)[0].tolist()]
    return row


def test_texts_are_put_in_a_row_and_each_sequence_begins_with_bos(model):
    found = sample(model, Dataset.from_dict({"text": TEXTS}), prepend_bos=True)
    bos = model.tokenizer.bos_token_id
    assert (found.tokens[:, 0] == bos).all()
    assert found.tokens[:, 1:].flatten().tolist() == in_a_row(model)[: found.tokens[:, 1:].numel()]
    assert not found.keep[found.tokens == bos].any()
    assert found.n_tokens == 40
    assert found.n_special == int((found.tokens == bos).sum())


def test_without_bos_the_text_alone_fills_the_sequences(model):
    found = sample(model, Dataset.from_dict({"text": TEXTS}), prepend_bos=False)
    assert found.tokens.flatten().tolist() == in_a_row(model)[: found.tokens.numel()]


def save_as(kind, folder, rows):
    dataset = Dataset.from_list(rows)
    file = folder / f"data.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        dataset.to_csv(file)
    elif kind == "parquet":
        dataset.to_parquet(file)
    elif kind == "saved":
        dataset.save_to_disk(file)
    elif kind == "saved with splits":
        DatasetDict({"train": dataset}).save_to_disk(file)
    else:
        file = folder / "plain"
        file.mkdir()
        dataset.to_parquet(file / "train.parquet")
    return file


@pytest.mark.parametrize(
    "kind", ["jsonl", "csv", "parquet", "saved", "saved with splits", "folder"]
)
def test_local_files_and_folders(model, tmp_path, kind):
    rows = [{"text": text} for text in TEXTS if text]
    expected = sample(model, Dataset.from_list(rows), prepend_bos=True)
    found = sample(model, str(save_as(kind, tmp_path, rows)), prepend_bos=True)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.keep, expected.keep)


def test_a_text_file_is_one_document(model, tmp_path):
    (tmp_path / "data.txt").write_text(TEXTS[0])
    found = sample(model, tmp_path / "data.txt", prepend_bos=True)
    assert found.tokens[0, 1:].tolist() == in_a_row(model, TEXTS[:1])[:15]


@pytest.mark.parametrize("column", ["tokens", "input_ids"])
def test_a_dataset_of_tokens_and_a_tensor_are_taken_as_they_are(model, column):
    tokens = torch.arange(60).view(3, 20)
    for dataset in (Dataset.from_dict({column: tokens.tolist()}), tokens):
        found = sample(model, dataset, exclude_special_tokens=(5, 25))
        assert torch.equal(found.tokens, tokens[:, :16])
        assert found.n_special == 2
        assert found.keep.sum() == 40
        assert (~found.keep).nonzero().tolist()[:2] == [[0, 5], [1, 5]]


def test_the_embedded_text_is_the_held_out_one(model):
    found = sample(model, "embedded", prepend_bos=False)
    row = in_a_row(model, standard_library_texts("heldout")[:3])
    assert found.tokens.flatten()[:30].tolist() == row[:30]


def pile(parts):
    return Dataset.from_list(
        [
            {"text": f"{n} {TEXTS[0] if n % 3 else 'too short'}", "meta": {"pile_set_name": part}}
            for n, part in enumerate(parts)
        ]
    )


def test_the_papers_protocol(model):
    """The last token of the first 16 of each long document of one part, in random order."""
    parts = ["OpenWebText2", "Github"] * 20
    dataset = pile(parts)
    protocol = replace(PROTOCOLS["paper"], context_size=16, n_tokens=8)
    found = sample(model, dataset, protocol)
    assert found.tokens.shape == (8, 16)
    assert found.keep[:, -1].all()
    assert found.keep.sum() == 8
    documents = {}
    for n, part in enumerate(parts):
        start = model.to_tokens(dataset[n]["text"], prepend_bos=True)[0][:16]
        if part == "OpenWebText2" and len(start) == 16:
            documents[tuple(start.tolist())] = n
    order = [documents[tuple(row.tolist())] for row in found.tokens]
    assert order != sorted(order)
    assert len(set(order)) == 8
    again = sample(model, dataset, protocol)
    assert torch.equal(again.tokens, found.tokens)
    other = sample(model, dataset, replace(protocol, seed=1))
    assert not torch.equal(other.tokens, found.tokens)
    # the same documents from a stream
    streamed = sample(model, dataset.to_iterable_dataset(), protocol)
    assert {documents[tuple(row.tolist())] for row in streamed.tokens} <= set(documents.values())


def test_the_papers_protocol_is_what_the_paper_says():
    assert PROTOCOLS["paper"] == Protocol(
        n_tokens=1000, context_size=128, prepend_bos=True, positions="last", concatenate=False,
        exclude_special_tokens=True, subset="OpenWebText2", shuffle=True, seed=42,
    )  # fmt: skip


def test_a_last_token_that_is_special_is_left_out(model):
    tokens = torch.full((3, 16), 9)
    tokens[1, -1] = model.tokenizer.eos_token_id
    found = sample(model, tokens, positions="last")
    assert found.keep.nonzero().tolist() == [[0, 15], [2, 15]]
    assert found.n_special == 1


def test_special_tokens_stay_on_request(model):
    tokens = torch.full((1, 16), model.tokenizer.bos_token_id)
    assert sample(model, tokens, exclude_special_tokens=False).n_tokens == 16
    with pytest.raises(
        ValueError, match=r"1 sequences of 16 tokens were read and 16 of the tokens"
    ):
        sample(model, tokens)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Dataset.from_dict({"label": [1]}),
            r"neither tokens nor text: it has the columns \['label'\]",
        ),
        (Dataset.from_dict({"text": []}), "the dataset that was passed is empty"),
        (
            Dataset.from_dict({"text": ["Short."]}),
            "no token is left to evaluate: 0 sequences of 16",
        ),
        (Dataset.from_dict({"tokens": [[1, 2, 3]]}), "a sequence of 3 tokens, fewer than"),
        (torch.ones(20), r"must have shape \[n, 16 or more\]: got \(20,\)"),
        ("no/such", "the dataset 'no/such' is neither a local file or folder nor on the hub"),
        (
            DatasetDict({"test": Dataset.from_dict({"text": ["a"]})}),
            r"no split 'train'.*\['test'\]",
        ),
    ],
)
def test_datasets_that_cannot_be_used(model, dataset, message, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        sample(model, dataset)


def test_a_file_of_an_unknown_kind(model, tmp_path):
    (tmp_path / "data.docx").write_text("")
    with pytest.raises(ValueError, match="data.docx' is of no known kind: use .txt or one of"):
        sample(model, tmp_path / "data.docx")


def test_a_progress_bar_counts_tokens(model, capsys):
    sample(model, torch.ones(3, 16).long(), progress=True)
    assert "40/40" in capsys.readouterr().err


# --- one door for whatever people call a dataset ---


@pytest.mark.parametrize("kind", ["DatasetDict", "IterableDatasetDict", "list", "tuple"])
def test_containers_of_the_same_texts_give_the_same_tokens(model, kind):
    rows = Dataset.from_dict({"text": TEXTS})
    same = {
        "DatasetDict": DatasetDict(train=rows),
        "IterableDatasetDict": IterableDatasetDict(train=rows.to_iterable_dataset()),
        "list": TEXTS,
        "tuple": tuple(TEXTS),
    }
    assert torch.equal(sample(model, same[kind]).tokens, sample(model, rows).tokens)


def test_a_folder_of_text_files_is_what_the_files_are(model, tmp_path):
    (tmp_path / "inner").mkdir()
    for name, text in zip(("a", "b", "inner/c"), (TEXTS[0], TEXTS[2], TEXTS[4]), strict=True):
        (tmp_path / f"{name}.txt").write_text(text.replace(". ", ".\n"), encoding="utf-8")
    documents = [file.read_text(encoding="utf-8") for file in sorted(tmp_path.rglob("*.txt"))]
    found, one = sample(model, tmp_path), sample(model, tmp_path / "a.txt", n_tokens=15)
    assert torch.equal(found.tokens, sample(model, documents).tokens)
    assert torch.equal(one.tokens, sample(model, documents[:1], n_tokens=15).tokens)


def _tokens(**columns):
    rows = torch.arange(10, 10 + 6 * 24).view(6, 24).tolist()
    return Dataset.from_dict({"input_ids": rows, **{k: [v] * 6 for k, v in columns.items()}})


@pytest.mark.parametrize(
    ("column", "masked"),
    [("attention_mask", [20, 21, 22, 23]), ("special_tokens_mask", [0, 1, 7]), ("labels", [])],
)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_columns_that_leave_tokens_out_are_followed(model, column, masked, positions):
    mask = [int(i not in masked) for i in range(24)]
    if column == "special_tokens_mask":
        mask = [1 - value for value in mask]
    exclude = column == "special_tokens_mask"
    options = {"context_size": 24, "positions": positions, "exclude_special_tokens": exclude}
    found = sample(model, _tokens(**{column: mask}), **options, n_tokens=40)
    left = [i for i in range(24) if i not in masked]
    expected = left if positions == "all" else left[-1:]
    assert found.keep[0].nonzero()[:, 0].tolist() == expected
    assert found.tokens[0].tolist() == list(range(10, 34))  # padding stays where it was


def test_a_row_of_padding_alone_is_left_out(model):
    rows = {"input_ids": [[5] * 8, [6] * 8], "attention_mask": [[0] * 8, [1] * 8]}
    found = sample(model, Dataset.from_dict(rows), context_size=8, exclude_special_tokens=False)
    assert found.tokens.tolist() == [[6] * 8]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (_tokens(attention_mask=[0] + [1] * 23), "padding before tokens"),
        (_tokens(attention_mask=[1] * 10 + [0] + [1] * 13), "padding before tokens"),
        (_tokens(attention_mask=[1] * 23), r"one entry for each token: got shape \(23,\) for 24"),
        (_tokens(loss_mask=[0] + [1] * 23), "the column 'loss_mask' leaves tokens out"),
        (_tokens(position_ids=[*range(12), *range(12)]), "position_ids are not 0, 1, 2"),
        (torch.full((2, 16), 1024), r"the token id 1024 does not fit .* 0 to 1023 \(1024\)"),
        (torch.full((2, 16), -100), "the token id -100 does not fit the model"),
        (torch.rand(2, 16), "'tokens' must hold a row of ids of tokens: got torch.float32"),
        (torch.ones(2, 16, dtype=torch.bool), "must hold a row of ids of tokens: got torch.bool"),
        (Dataset.from_dict({"tokens": [["EU", "rejects"]]}), "ids of tokens: got a list of str"),
        (Dataset.from_dict({"tokens": [[[1] * 16] * 2]}), r"got torch.int64 of shape \(2, 16\)"),
        (Dataset.from_dict({"tokens": [7, 8]}), r"got torch.int64 of shape \(\)"),
        (Dataset.from_dict({"text": [[{"role": "user"}]]}), "'text' must hold text: got list"),
        (Dataset.from_dict({"text": [3.5]}), "'text' must hold text: got float"),
        ([TEXTS[0], 3], "a list must hold texts: got int"),
        ([[1, 2, 3]], "a list must hold texts: got list"),
        ({"train": 3}, "a dataset must be one of the library datasets.* got dict"),
        (3, "a dataset must be one of .* got int"),
    ],
)  # fmt: skip
def test_what_is_no_dataset_for_this_model_is_said(model, dataset, message):
    with pytest.raises(ValueError, match=message):
        sample(model, dataset)


def test_texts_that_are_missing_are_no_texts(model):
    with_none = Dataset.from_dict({"text": [None, *TEXTS]})
    assert torch.equal(sample(model, with_none).tokens, sample(model, TEXTS).tokens)


def test_a_document_with_bos_gets_no_second_one(model):
    """As SAELens's ActivationsStore reads them, whether documents are put in a row or not."""
    bos = model.tokenizer.bos_token_id
    text = model.tokenizer.decode([bos]) + TEXTS[0]
    assert model.to_tokens(text, prepend_bos=False)[0, 0] == bos
    for document in (text, TEXTS[0]):
        for size in (8, 9):
            found = sample(
                model, [document], context_size=size, prepend_bos=True, concatenate=False
            )
            store = ActivationsStore.from_config_multi_hook(
                model=model, dataset=Dataset.from_dict({"text": [document]}).to_iterable_dataset(),
                hook_names=["blocks.0.hook_resid_pre"], hook_d_ins={"blocks.0.hook_resid_pre": 192},
                context_size=size, disable_concat_sequences=True, prepend_bos=True,
            )  # fmt: skip
            expected = next(store._iterate_tokenized_sequences())
            assert found.tokens.tolist() == [expected.tolist()]
            assert (found.tokens == bos).sum() == 1


def test_a_separator_that_the_tokenizer_does_not_have(model):
    assert model.tokenizer.sep_token is None
    with pytest.raises(ValueError, match="has no SEP token to stand between documents: choose"):
        sample(model, TEXTS, separator="sep")


# --- columns beside tokens ---


ROW = [0, 5, 6, 7, 8, 9, 10, 0]


def beside(model, positions=None, exclude=True, **columns):
    rows = Dataset.from_dict({"tokens": [ROW], **{name: [v] for name, v in columns.items()}})
    return sample(
        model, rows, context_size=8, positions=positions, exclude_special_tokens=exclude,
    )  # fmt: skip


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_special_tokens_mask_is_like_the_tokenizers_own(model, exclude, positions):
    """7 and the last are special, by the mask alone; 0 is the tokenizer's BOS."""
    mask = [1, 0, 0, 1, 0, 0, 0, 1]
    if exclude and positions == "last":
        with pytest.raises(ValueError, match="no token is left to evaluate: .* 1 of the tokens"):
            beside(model, positions, exclude, special_tokens_mask=mask)
        return
    found = beside(model, positions, exclude, special_tokens_mask=mask)
    kept = found.keep[0].nonzero()[:, 0].tolist()
    expected = [1, 2, 4, 5, 6] if exclude else list(range(8))
    assert kept == (expected if positions == "all" else [7])
    assert found.n_special == (3 if exclude else 0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"attention_mask": [1, 1, 1, 2, 2, 2, 0, 0]}, r"must hold 0 and 1: got \[0, 1, 2\]"),
        ({"attention_mask": [1, None] * 4}, "'attention_mask' must hold a number for each token"),
        ({"position_ids": ["a"] * 8}, "'position_ids' must hold a number for each token"),
        ({"special_tokens_mask": [[0]] * 8}, "must have one entry for each token"),
        ({"loss_mask": [1, 0] * 4}, "leaves tokens out, and what it means is not known"),
    ],
)
def test_columns_that_cannot_be_followed_are_named(model, columns, message):
    with pytest.raises(ValueError, match=message):
        beside(model, **columns)


@pytest.mark.parametrize("value", ["a <mask> text", {"a": 1}, [None] * 8, ["x"] * 8])
def test_a_column_of_another_kind_is_no_mask(model, value):
    assert beside(model, masked_text=value).keep[0].sum() == 6


def test_a_sequence_is_more_than_bos(model):
    with pytest.raises(ValueError, match="would be BOS alone: pass a larger context_size"):
        sample(model, TEXTS, context_size=1)
    assert sample(model, TEXTS, context_size=1, prepend_bos=False).n_tokens == 40
