"""A damaged folder of results ends in one sentence or in the right tables, never in others."""

from __future__ import annotations

import json
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from sae_afa_plugin import AFAResults, evaluate_saes
from sae_afa_plugin.activations.recording import RecordedActivations, record
from sae_afa_plugin.activations.tensors import TensorActivations
from sae_afa_plugin.files import read_sealed, write_sealed

# more of them by hand: FOLDERS=500 python -m pytest tests/unit/test_damages.py
FOLDERS = int(os.environ.get("FOLDERS", "40"))
SEQUENCES = pd.DataFrame({"sequence": 0, "position": range(30), "token_id": range(30)})
SEQUENCES["token"] = [f" word{n}" for n in range(30)]


def sae(seed):
    torch.manual_seed(seed)
    made = StandardSAE(StandardSAEConfig(d_in=8, d_sae=20))
    with torch.no_grad():
        made.W_enc.normal_(0, 0.3)
    made.cfg.metadata.hook_name = "here"
    return made


def evaluate(out, names="ab", seed=0):
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(seed))
    sequences = SEQUENCES.assign(token_id=SEQUENCES["token_id"] + seed)
    source = TensorActivations({"here": x}, sequences[["sequence", "position"]], sequences)
    saes = {name: sae(ord(name) + seed) for name in names}
    return evaluate_saes(saes, activations=source, progress=False, out=out)


def tables(results):
    """All that is in results, read."""
    names = list(results.summary.index)
    return [
        results.summary, results.sequences,
        *(results.tokens_of(name) for name in names), *(results.features_of(name) for name in names),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Results, those of a stranger on other activations, and what is in the first."""
    base = tmp_path_factory.mktemp("folders")
    evaluate(base / "ours")
    evaluate(base / "theirs", seed=1)
    return base / "ours", base / "theirs", tables(AFAResults.load(base / "ours"))


def place(folder, file):
    """The file of this name, of the SAE ``a`` where each result has one."""
    if "/" not in file:
        return folder / file
    (part,) = (folder / "results").glob(f"a-*.{file.split('/')[0]}.*")
    return part / file.split("/")[1]


def edit_a_number(file, other):
    content = bytearray(file.read_bytes())
    digits = [at for at, byte in enumerate(content) if byte in b"12345678"]
    at = digits[len(digits) // 2]
    content[at] += 1
    file.write_bytes(content)


def as_directory(file, other):
    file.unlink()
    file.mkdir()


DAMAGES = {
    "cut": lambda file, other: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "emptied": lambda file, other: file.write_bytes(b""),
    "no text": lambda file, other: file.write_bytes(b"\xff\xfe\x00"),
    "deleted": lambda file, other: file.unlink(),
    "a directory": as_directory,
    "a stranger's": lambda file, other: shutil.copy(other, file),
    "edited": edit_a_number,
    "longer": lambda file, other: file.write_bytes(file.read_bytes() + b"0"),
}
FILES = (
    "sae-afa.json", "results.json", "summary.csv", "sequences.parquet",
    "afa/result.json", "afa/tokens.parquet", "frequencies/features.parquet",
)  # fmt: skip


def rewritten(change, sealed=False):
    def rewrite(file, other):
        content = change(json.loads(file.read_text()))
        if sealed:  # as by somebody who knows how
            content.pop("digest", None)
            write_sealed(file, content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))

    return rewrite


OF_JSON = {
    **{
        f"{value!r}": rewritten(lambda _, v=value: v) for value in (None, [], 5, True, {}, '"text"')
    },
    "brackets": rewritten(lambda _: "[" * 200_000),
    "without its last": rewritten(lambda found: dict(list(found.items())[:-2])),
    "all lists": rewritten(lambda found: {name: [] for name in found}, sealed=True),
    "all numbers": rewritten(lambda found: dict.fromkeys(found, 3), sealed=True),
    "nothing": rewritten(lambda _: {}, sealed=True),
}
CASES = [
    *((file, what, damage) for file in FILES for what, damage in DAMAGES.items()),
    *(
        (file, what, damage)
        for file in FILES
        if file.endswith(".json")
        for what, damage in OF_JSON.items()
    ),
]


def read_or_say(read, folder: Path, file: str, expected, at_least=("a", "b")):
    """The right tables, or one sentence that names what is wrong."""
    try:
        results = read()
        found = tables(results)
    except (ValueError, OSError) as error:
        said = str(error)
        assert str(folder) in said or Path(file).name in said, said
        assert "\n" not in said.strip(), said
        return said
    assert list(results.summary.index) == list(at_least)
    assert len(found) == len(expected)
    for one, right in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(one, right, check_dtype=False)
    return None


@contextmanager
def allowed(folder):
    """One sentence that names the folder."""
    try:
        yield
    except (ValueError, OSError) as error:
        if str(folder) not in str(error):
            raise


def damaged_somewhere(chance, folder):
    """Cut a file of a folder, change some of its bytes, or remove it; returns which it was."""
    file = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    # often near the beginning or the end, where formats say what they hold
    at = int(len(content) * chance.random() ** chance.choice((1, 6, 1 / 6)))
    kind = chance.choice(("cut", "changed", "changed", "removed"))
    if kind == "removed":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[:at])
    else:
        for i in range(at, min(len(content), at + chance.choice((1, 4, 50)))):
            content[i] = chance.randrange(256)
        file.write_bytes(content)
    return file.name


@pytest.mark.parametrize("seed", range(FOLDERS))
def test_damage_anywhere_is_said_or_does_no_harm(folders, tmp_path, seed):
    ours, _, expected = folders
    chance = random.Random(seed)
    shutil.copytree(ours, tmp_path / "out")
    file = damaged_somewhere(chance, tmp_path / "out")
    read_or_say(lambda: AFAResults.load(tmp_path / "out"), tmp_path / "out", file, expected)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    places = pd.DataFrame({"sequence": 0, "position": range(60), "token_id": range(60)})
    source = TensorActivations({"here": x}, places, SEQUENCES)
    folder = tmp_path_factory.mktemp("recording") / "out"
    record(source, ["here"], folder)
    return folder, x, places


@pytest.mark.parametrize("seed", range(FOLDERS))
def test_damage_anywhere_in_a_recording_gives_no_other_activations(recording, tmp_path, seed):
    ours, x, places = recording
    shutil.copytree(ours, tmp_path / "out")
    file = damaged_somewhere(random.Random(seed), tmp_path / "out")
    with allowed(tmp_path / "out"):
        source = RecordedActivations(tmp_path / "out")
        found = source.read(["here"], 0, 60)["here"]
        assert torch.equal(found, x), file
        pd.testing.assert_frame_equal(source.places, places, check_dtype=False)
        pd.testing.assert_frame_equal(source.sequences, SEQUENCES, check_dtype=False)


@pytest.mark.parametrize(
    ("file", "what", "damage"), CASES, ids=[f"{file} {what}" for file, what, _ in CASES]
)
def test_any_damage_is_said_or_does_no_harm(folders, tmp_path, file, what, damage):
    ours, theirs, expected = folders
    folder = tmp_path / "out"
    shutil.copytree(ours, folder)
    damage(place(folder, file), place(theirs, file))

    said = read_or_say(lambda: AFAResults.load(folder), folder, file, expected)
    assert (said is None) == (file == "summary.csv")  # that nobody reads

    # somebody goes on with the other: what is not in the table is named
    with_the_other = tmp_path / "with the other"
    shutil.copytree(folder, with_the_other)
    with allowed(with_the_other):
        results = evaluate(with_the_other, "b")
        full = expected[0].notna().all()  # columns that every SAE has
        whole = "a" in results.summary.index and results.summary.loc["a", full].notna().all()
        assert whole or "results/a-" in " ".join(results.metadata["refused"])

    # and with both
    read_or_say(lambda: evaluate(folder), folder, file, expected)


def move(folder, to):
    part = place(folder, "afa/result.json").parent
    part.rename(part.with_name(to(part.name)))


def put_in(folder, other):
    for part in (other / "results").iterdir():
        if not (folder / "results" / part.name).exists():
            shutil.copytree(part, folder / "results" / part.name)


def of_another(folder, other):
    part = place(folder, "afa/result.json").parent
    (b,) = (folder / "results").glob("b-*.afa.*")
    shutil.rmtree(part)
    shutil.copytree(b, part)


def a_file_instead(folder, other):
    part = place(folder, "afa/result.json").parent
    shutil.rmtree(part)
    part.write_text("no folder")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder, other: move(folder, lambda name: name.replace("a-", "c-", 1)),
        lambda folder, other: move(folder, lambda name: name[:-1] + "_"),
        lambda folder, other: move(folder, lambda name: "x"),
        lambda folder, other: shutil.rmtree(place(folder, "afa/result.json").parent),
        lambda folder, other: shutil.rmtree(folder / "results"),
        put_in,
        of_another,
        a_file_instead,
    ],
)
def test_folders_that_are_not_where_they_belong(folders, tmp_path, damage):
    ours, theirs, expected = folders
    folder = tmp_path / "out"
    shutil.copytree(ours, folder)
    damage(folder, theirs)
    said = read_or_say(lambda: AFAResults.load(folder), folder, "results.json", expected)
    assert (said is None) == (damage is put_in)
    said = read_or_say(lambda: evaluate(folder), folder, "results", expected)
    assert (said is None) == (damage is not a_file_instead)  # which may be the user's


def test_results_of_a_stranger_are_named_and_not_adopted(folders, tmp_path):
    ours, theirs, _ = folders
    folder = tmp_path / "out"
    evaluate(folder, "a")
    put_in(folder, theirs)  # of the same names, on other activations
    results = evaluate(folder, "a")
    assert list(results.summary.index) == ["a"]
    refused = results.metadata["refused"]
    assert len(refused) == 6
    assert all(place.startswith(("results/a-", "results/b-")) for place in refused)
    assert all("is of other settings (content" in reason for reason in refused.values())
    shutil.rmtree(folder / "results")
    shutil.copytree(ours / "results", folder / "results")
    assert evaluate(folder, "a").metadata["refused"] == {}
    assert list(AFAResults.load(folder).summary.index) == ["a", "b"]


def test_no_path_in_an_index_leads_out_of_the_folder(folders, tmp_path):
    ours, _, _ = folders
    shutil.copytree(ours, tmp_path / "out")
    shutil.copytree(ours / "results", tmp_path / "elsewhere")
    index = read_sealed(tmp_path / "out/results.json")
    index["parts"]["a"]["afa"] = "../../elsewhere/" + index["parts"]["a"]["afa"]
    write_sealed(tmp_path / "out/results.json", index)
    with pytest.raises(ValueError, match=r"results\.json: .* is damaged"):
        AFAResults.load(tmp_path / "out")


def test_other_versions_are_said_and_their_results_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sae_afa_plugin.store.versions", lambda: {"sae-lens": "6.0"})
    evaluate(tmp_path, "a")
    monkeypatch.undo()
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    source = TensorActivations({"here": x}, SEQUENCES[["sequence", "position"]], SEQUENCES)
    saes = {"a": sae(ord("a")), "b": sae(ord("b"))}
    results = evaluate_saes(saes, activations=source, out=tmp_path)
    assert "was made with sae-lens 6.0, and this is 6." in capsys.readouterr().out
    assert results.metadata["versions"]["sae-lens"].startswith("6.0, 6.")
    assert list(results.summary.index) == ["a", "b"]
