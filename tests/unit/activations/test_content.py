"""The content of a dataset is what is read of it, however it came about and wherever it lies."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

from sae_afa_plugin.activations.base import different_settings
from sae_afa_plugin.activations.content import content_of, revision_of
from sae_afa_plugin.activations.documents import columns_read
from sae_afa_plugin.files import content_files

TEXTS = [f"text {n} " * 3 for n in range(2500)]
ROWS = [{"text": text, "number": n} for n, text in enumerate(TEXTS)]
IDS = [[1, 2, 3], [4, 5, 6]]
ATTENDED = [[1, 1, 1], [1, 1, 0]]


def rows(**columns):
    return Dataset.from_dict(columns)


@pytest.mark.parametrize(
    "made",
    [
        lambda d: d.map(lambda row: {"number": -row["number"]}),  # which nothing reads
        lambda d: d.select(range(len(d))),
        lambda d: concatenate_datasets([d.select(range(700)), d.select(range(700, len(d)))]),
        lambda d: Dataset.from_list(ROWS).remove_columns("number"),
        lambda d: d.with_format("torch"),
        lambda d: DatasetDict(train=d, test=d.select(range(3))),
        lambda d: TEXTS,
        lambda d: tuple(TEXTS),
    ],
)
def test_equal_content_is_equal_however_it_was_made(made):
    dataset = Dataset.from_list(ROWS)
    assert content_of(made(dataset)) == content_of(dataset)


@pytest.mark.parametrize(
    "other",
    [
        lambda d: d.shuffle(seed=0),
        lambda d: d.select(range(len(d) - 1)),
        lambda d: d.map(
            lambda row, i: {"text": row["text"] + "." * (i == 2400)}, with_indices=True
        ),
        lambda d: DatasetDict(train=d.select(range(3)), test=d),
        lambda d: TEXTS[:-1],
        lambda d: ["".join(TEXTS[:2]), *TEXTS[2:]],
    ],
)
def test_other_content_is_another(other):
    dataset = Dataset.from_list(ROWS)
    assert content_of(other(dataset)) not in (None, content_of(dataset))


def test_ids_count_by_value_and_place():
    ids = content_of(rows(tokens=IDS))
    narrow = torch.tensor(IDS, dtype=torch.int32)
    assert content_of(rows(tokens=narrow.numpy())) == ids
    assert content_of(rows(tokens=[[1, 2], [3, 4, 5, 6]])) != ids
    assert content_of(rows(tokens=IDS, attention_mask=ATTENDED)) != ids
    assert content_of(rows(tokens=IDS, labels=IDS)) == ids
    assert content_of(narrow) == content_of(torch.tensor(IDS)) != content_of(narrow.view(3, 2))


def test_what_cannot_be_read_has_no_content_or_some_but_no_error(tmp_path):
    assert content_of(["a", 2]) is None
    assert content_of("somebody/on-the-hub") is None
    assert content_of(torch.ones(2, 3)) is not None
    Dataset.from_list(ROWS[:3]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/state.json").write_text("{")
    assert content_of(tmp_path / "saved") is not None
    assert content_of(DatasetDict(train=Dataset.from_list(ROWS[:3])), "no such split") is None
    assert (revision_of("embedded"), revision_of(tmp_path), revision_of([])) == (None,) * 3


def test_rows_that_a_function_makes_are_told_apart_as_datasets_does():
    dataset = Dataset.from_list(ROWS)
    louder = dataset.with_transform(lambda batch: {"text": [t.upper() for t in batch["text"]]})
    assert content_of(louder) != content_of(dataset)


def test_a_folder_that_datasets_has_saved_and_written_into_since(tmp_path):
    saved = tmp_path / "saved"
    Dataset.from_list(ROWS).save_to_disk(saved)
    before = content_of(saved)
    assert before == content_of(Dataset.from_list(ROWS))
    dataset = load_from_disk(str(saved))
    dataset.shuffle(seed=1)
    dataset.map(lambda row: {"more": row["number"]})
    assert len(list(saved.glob("cache-*.arrow"))) == 2
    assert content_of(saved) == before
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "_fingerprint": "0123"}))
    assert content_of(saved) == before
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "in shards", num_shards=3)
    assert content_of(tmp_path / "in shards") == before


def test_files_count_by_what_is_in_them(tmp_path):
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "more/b.txt").write_text("two")
    before = content_of(folder)
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(folder / "a.txt", (0, 0))
    (folder / ".cache").mkdir()
    (folder / ".cache/x.txt").write_text("of another program")
    (folder / "a.txt.lock").touch()
    assert content_of(folder) == content_of(tmp_path / "copy") == before
    about = (folder / "a.txt").stat()
    (folder / "a.txt").write_text("eno")
    os.utime(folder / "a.txt", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert content_of(folder) != before  # of the same size and time
    (folder / "a.txt").write_text("one")
    (folder / "more/b.txt").rename(folder / "b.txt")
    assert content_of(folder) != before
    assert [file.name for file in content_files(folder)] == ["a.txt", "b.txt"]
    shutil.copy(folder / "a.txt", tmp_path / "a.csv")  # is read otherwise
    assert content_of(tmp_path / "a.csv") != content_of(folder / "a.txt")


def test_the_columns_that_are_read():
    assert columns_read(["text", "meta", "loss_mask", "id"]) == ["text", "meta"]
    assert columns_read(["loss_mask", "input_ids", "tokens"]) == ["tokens", "loss_mask"]
    assert columns_read(["question"]) == []


SETTINGS = {"model": "a", "dataset": "./x.txt", "dataset_content": "1", "model_revision": "c"}


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({}, []),
        ({"dataset": "/a/x.txt"}, []),  # the same, by another path
        ({"dataset": "y.txt", "dataset_content": "2"}, ["dataset", "dataset_content"]),
        ({"dataset_content": None}, []),  # gone
        ({"dataset": "/z", "dataset_content": None}, ["dataset"]),
        ({"dataset": "z/z", "dataset_content": None}, ["dataset", "dataset_content"]),  # of the hub
        ({"model_argument": "a"}, []),  # an SAE or somebody named it
        ({"model": "b"}, ["model"]),
        ({"model_revision": None}, []),  # the hub does not answer
        ({"model_revision": "d"}, ["model_revision"]),
        ({"seed": 1}, ["seed"]),
    ],
)
def test_settings_by_which_activations_may_differ(change, different):
    assert different_settings(SETTINGS, {**SETTINGS, **change}) == different
    assert sorted(different_settings({**SETTINGS, **change}, SETTINGS)) == sorted(different)
