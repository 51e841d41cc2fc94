"""What is read is what was named: no pattern, no other file, no older content."""

from __future__ import annotations

import json
import os

import pytest
from datasets import Dataset, Features, Image, Value
from helpers.models import tiny_hooked_sae_transformer

from sae_afa_plugin.activations.documents import documents_of
from sae_afa_plugin.activations.tokens import Protocol, sample_tokens


def texts(dataset, split="train"):
    return [row["text"] for row in documents_of(dataset, None, split)]


def write(file, text, **more):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"text": text, **more}) + "\n")
    return str(file)


@pytest.mark.parametrize("name", ["run[12].jsonl", "a*.jsonl", "b?.jsonl", "c[!x].jsonl"])
def test_a_path_is_no_pattern(tmp_path, name):
    for other in ("run1.jsonl", "ab.jsonl", "bb.jsonl", "cd.jsonl"):
        write(tmp_path / other, "another file")
    assert texts(write(tmp_path / name, "this one")) == ["this one"]
    assert texts(write(tmp_path / "sub[1]" / "x.jsonl", "in brackets")) == ["in brackets"]
    with pytest.raises(ValueError, match="in the path of a folder as a pattern: rename it"):
        texts(str(tmp_path / "sub[1]"))


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_file_that_kept_its_time_is_read_again(tmp_path, whole_folder):
    file = tmp_path / "data" / "train.jsonl"
    named = str(file.parent if whole_folder else file)
    write(file, "first content")
    before = file.stat()
    assert texts(named) == ["first content"]
    write(file, "other content")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts(named) == ["other content"]


@pytest.mark.parametrize(
    "named", ["../private/*.jsonl", "{private}", "https://example.com/x", "~/x"]
)
@pytest.mark.parametrize(
    "form", ["data_files: {}", "data_files:\n  - split: train\n    path: {}", "data_dir: {}"]
)
@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_a_folder_names_no_files_outside(tmp_path, named, form, file):
    write(tmp_path / "private" / "mine.jsonl", "private")
    folder = tmp_path / "folder"
    write(folder / "own.jsonl", "own")
    lines = form.format('"' + named.format(private=tmp_path / "private") + '"').replace(
        "\n", "\n  "
    )
    content = f"configs:\n- config_name: default\n  {lines}\n"

    def describe(content):
        (folder / file).write_text(f"---\n{content}---\n" if file.endswith("md") else content)

    describe(content)
    with pytest.raises(ValueError, match=r"its .* names .*, which is outside the folder"):
        texts(str(folder))
    describe("configs:\n- config_name: default\n  data_files: own.jsonl\n")
    assert texts(str(folder)) == ["own"]


def test_columns_that_are_not_read_may_be_broken():
    features = Features({"text": Value("string"), "image": Image()})
    rows = {"text": ["a", "b"], "image": [None, {"bytes": b"no image", "path": None}]}
    assert texts(Dataset.from_dict(rows, features=features)) == ["a", "b"]


@pytest.mark.parametrize("form", ["arrow", "pandas", "numpy", "torch", None])
def test_rows_are_the_same_in_any_format(form):
    dataset = Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).with_format(form)
    assert texts(dataset) == ["a", "b"]
    dataset = Dataset.from_dict({"tokens": [[1, 2, 3, 4]] * 3}).with_format(form)
    protocol = Protocol(12, 4, exclude_special_tokens=False)
    found = sample_tokens(tiny_hooked_sae_transformer(), dataset, protocol, progress=False)
    assert found.tokens.tolist() == [[1, 2, 3, 4]] * 3


def test_text_files_are_documents_whatever_lies_beside_them(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(f"{split}\n\nof two lines\n")
    for _ in range(2):
        assert texts(str(tmp_path)) == ["train\n\nof two lines\n"]
        assert texts(str(tmp_path), "test") == ["test\n\nof two lines\n"]
        (tmp_path / "README.md").write_text("# About")
        (tmp_path / "LICENSE").write_text("MIT\n\n")
    write(tmp_path / "train" / "more.jsonl", "more")
    with pytest.raises(ValueError, match=r"several kinds \(.jsonl, .txt\), of which only one"):
        texts(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ({"a/state.json": "[]", "a/dataset_info.json": "{}"}, "train", "cannot be read"),
        ({"a/dataset_dict.json": "[]"}, "train", "cannot be read"),
        ({"a/dataset_dict.json": '{"splits": [1]}'}, "train", "cannot be read"),
        ({"a": ""}, "train", "of no known kind"),
        ({"a.jsonl": ""}, "train", r"nothing is in it|is empty|cannot be read"),
        ({"a.jsonl": '{"text": "a"}'}, "test", "has only the split 'train': got split='test'"),
        ({}, "train", "must not be empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence(tmp_path, files, split, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    named = str(tmp_path / next(iter(files)).split("/")[0]) if files else " "
    with pytest.raises(ValueError, match=message):
        texts(named, split)
