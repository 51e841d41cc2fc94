"""Words of strangers, wherever they are shown: names, hooks, reasons, from folders and results."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import re
import shutil
import unicodedata
import warnings
from html.parser import HTMLParser

import pytest
import torch
from helpers.results import made_up_results
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig

from sae_afa_plugin import AFAResults, cli, evaluate_saes
from sae_afa_plugin.files import write_sealed
from sae_afa_plugin.printable import cell, printable, show_only_printable_messages

ESCAPE = "\x1b]0;pwned\x07\x1b[2J\x1b[1;1H"
PIECES = (
    ESCAPE,
    "\x9b2J",
    "\x08" * 4,
    "\r",
    "\n",
    "\x00",
    "\u202e",
    "\u2028",
    "\x7f",
    *("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "'=1"),
    *(
        "<script>window.hacked=1</script>",
        "</title>",
        '" onmouseover="alert(1)',
        "{{ 7*7 }}",
        "&lt;",
    ),
    *("../../outside", "..", "/etc/passwd", "C:\\con", "a/b", "."),
    *("$\\frac{", "$x$", "\\", "%s", "{0}", "[bold]", "[/]", "_", "%"),
    *("größe", "语言", "🦎", "e\u0301", "\ufeff", "a\u200db"),
)
words = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
    min_size=1,
    max_size=4,
).map("".join)

# what a terminal obeys, by Unicode's own tables and not by ours
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def obeyed(text: str) -> list[str]:
    """The characters of a text that a terminal does not show but follows."""
    text = text.replace("\x1b[A", "")  # bars in several lines, of tqdm
    return [
        c
        for c in text
        if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\r\t")
        or unicodedata.bidirectional(c) in _TURNS
    ]


class _Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, tuple(name for name, _ in attrs)))


def run(*arguments: str) -> tuple[int, str]:
    """The command in this process: its exit status, and all that it has printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = cli.main(arguments)
        except SystemExit as stopped:  # of argparse
            status = int(str(stopped.code))
    return status, said.getvalue()


@pytest.fixture(autouse=True)
def _messages():
    """The command changes how messages are written, for its process."""
    factory, written = logging.getLogRecordFactory(), warnings.formatwarning
    yield
    logging.setLogRecordFactory(factory)
    warnings.formatwarning = written


@given(words)
@example("\udcff\x85")
def test_what_is_printable_is_shown_as_it_is_and_the_rest_can_be_read(text):
    shown = printable(text)
    assert not obeyed(shown)
    assert not set(shown) & set("\n\r\t")
    if not obeyed(text) and not set(text) & set("\n\r\t\u200e\u200f\u061c"):
        assert shown == text
    assert printable(shown) == shown


@given(words | st.integers() | st.floats())
def test_no_cell_is_a_formula(value):
    shown = cell(value)
    if isinstance(value, str):
        assert shown[0] not in "=+-@\t\r"
        assert shown.removeprefix("'") in (printable(value), printable(value).removeprefix("'"))
    else:
        assert shown is value


# twenty names in each; more of them by hand: NAMES=500 python -m pytest tests/unit/test_printable.py
# not every font has every letter, and not every script can be written
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:Matplotlib currently does not support")
@settings(
    max_examples=int(os.environ.get("NAMES", "80")) // 20,
    deadline=None,
    derandomize="NAMES" not in os.environ,
    phases=[Phase.generate],  # to make such a case smaller takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(words.map(printable), min_size=20, max_size=20, unique=True), st.data())
def test_words_in_results_reach_no_terminal_page_or_table_as_more_than_words(
    tmp_path_factory, names, data
):
    tmp_path = tmp_path_factory.mktemp("words")
    results = made_up_results(names, 24)
    for column in ("source", "hook_name", "architecture"):
        results.summary[column] = [data.draw(words) for _ in names]
    results.metadata["refused"] = {data.draw(words): data.draw(words) for _ in range(5)}
    results.metadata["settings"] = {"dataset": data.draw(words), data.draw(words): data.draw(words)}
    plain = made_up_results([f"sae {i}" for i in range(20)], 24)
    for column in ("source", "hook_name", "architecture"):
        plain.summary[column] = "x"
    plain.metadata["refused"] = {f"r {i}": "x" for i in range(len(results.metadata["refused"]))}
    n = len(results.metadata["settings"])
    plain.metadata["settings"] = {"dataset": "x", **{f"s {i}": "x" for i in range(n - 1)}}
    results.save(tmp_path / "out")
    plain.save(tmp_path / "plain")
    for folder in ("out", "plain"):
        status, said = run("report", str(tmp_path / folder))
        assert status == 0, said
        assert not obeyed(said)
    assert not obeyed(str(AFAResults.load(tmp_path / "out")))

    pages = [(tmp_path / folder / "report.html").read_text("utf-8") for folder in ("out", "plain")]
    assert _Tags(pages[0]).found == _Tags(pages[1]).found

    with (tmp_path / "out" / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 21
    for text in (text for row in rows for text in row if text):
        assert not obeyed(text)
        assert text[0] not in "=+@"
        if text[0] == "-":
            assert re.fullmatch(r"-[\d.e+-]+|-inf", text)

    assert {path.name for path in tmp_path.iterdir()} == {"out", "plain"}
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {
        *("sae-afa.json", "sequences.parquet", "results", ".claims"),
        *("summary.csv", "results.json", "report.html"),
    }
    assert list(AFAResults.load(tmp_path / "out").summary.index) == names
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", [ESCAPE, "a\nb", "\udcff", "", 3, None])
def test_a_name_that_is_no_printable_text_is_refused_before_anything_is_done(name, tmp_path):
    sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=8))
    with pytest.raises(ValueError, match="name must be printable text: got"):
        evaluate_saes({name: sae}, "sae-afa-demo", "embedded", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_sae_without_a_name_is_refused():
    with pytest.raises(ValueError, match="as {'mine': sae}: got StandardSAE"):
        evaluate_saes(StandardSAE(StandardSAEConfig(d_in=192, d_sae=8)))  # pyright: ignore


def test_results_of_a_stranger_with_an_unprintable_name_are_damaged(tmp_path):
    made_up_results(["mine"], 24).save(tmp_path / "out")
    index = tmp_path / "out" / "results.json"
    content = json.loads(index.read_text().replace('"mine"', json.dumps(ESCAPE)))
    content.pop("digest")
    write_sealed(index, content)  # by somebody who knows how
    status, said = run("report", str(tmp_path / "out"))
    assert status == 2
    assert not obeyed(said)
    assert "no name of an SAE" in said


def test_folders_and_configs_of_strangers_are_evaluated_without_a_word_that_is_obeyed(tmp_path):
    texts = [piece.replace("/", "").replace("\x00", "") for piece in PIECES]
    folders = []
    for number, text in enumerate(dict.fromkeys(t for t in texts if t.strip("."))):
        sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=8))
        with torch.no_grad():
            sae.b_enc.fill_(0.1)
        sae.cfg.metadata.model_name = "sae-afa-demo"
        sae.cfg.metadata.hook_name = "blocks.4.hook_resid_pre"
        folder = tmp_path / "saes" / f"{text}{number}"
        sae.save_model(folder)
        if number % 3:
            config = json.loads((folder / "cfg.json").read_text())
            place = (
                config["metadata"],
                *((config["metadata"], "hook_name"), (config, "architecture")),
                *((config["metadata"], "model_name"), (config, "normalize_activations")),
            )[1 + number % 4]
            place[0][place[1]] += text
            (folder / "cfg.json").write_text(json.dumps(config))
        folders.append(folder)
    paths = [argument for folder in folders for argument in ("--path", str(folder))]
    status, said = run(
        *("evaluate", *paths, "--dataset", "embedded", "--tokens", "50", "--no-coherence"),
        *("--context-size", "16", "--out", str(tmp_path / "out")),
    )
    assert status == 1, said
    assert not obeyed(said)
    results = AFAResults.load(tmp_path / "out")
    assert len(results.summary) >= len(folders) // 3
    assert len(results.summary) + len(results.metadata["refused"]) == len(folders)
    assert not obeyed((tmp_path / "out" / "summary.csv").read_text("utf-8"))
    status, said = run("report", str(tmp_path / "out"), str(folders[0]))  # as a shell expands *
    assert status == 2
    assert not obeyed(said)


def test_what_libraries_log_and_warn_of_is_printable(capsys):
    show_only_printable_messages()
    logger = logging.getLogger("of a library")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    logger.warning("unknown key %s in\nthe file", ESCAPE)
    logger.warning("a literal %s")
    logger.removeHandler(handler)
    said = capsys.readouterr().err
    said += warnings.formatwarning(f"unknown key {ESCAPE}", UserWarning, "a file", 1, "")
    assert not obeyed(said)
    assert said.count("pwned") == 2
    assert "in\nthe file" in said
    assert "a literal %s" in said


def test_folders_that_print_alike_are_not_one(tmp_path):
    (tmp_path / "a\x1b").mkdir()
    (tmp_path / "a\\x1b").mkdir()
    (tmp_path / "b").mkdir()
    places = [tmp_path / "a\x1b", tmp_path / "a\\x1b", tmp_path / "b"]
    with pytest.raises(ValueError, match=r"two folders are both shown as '.*a\\\\x1b': rename one"):
        cli._by_shortest_names(places)
    assert cli._by_shortest_names([*places[1:], places[2]]) == {
        "a\\x1b": places[1], str(places[2]): places[2],
    }  # fmt: skip


@pytest.mark.parametrize("text", ["\uff1d1+1", " =1+1", "\uff0d2", "\uff20a"])
def test_a_sign_is_a_sign_in_any_width(text):
    assert cell(text) == f"'{text}"
