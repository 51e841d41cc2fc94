"""The report as text: what it says, what it escapes, and what it never leaves half-written."""

from __future__ import annotations

import base64
import json
import re
import resource
import shlex
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.results import HOSTILE, made_up_results, results_of
from plotly.offline import get_plotlyjs

from sae_afa_plugin import cli
from sae_afa_plugin.activations.language_model import Reading
from sae_afa_plugin.activations.tokens import PROTOCOLS, Protocol
from sae_afa_plugin.commands import evaluate_commands, evaluation_given, shell_lines
from sae_afa_plugin.evaluation import Evaluation
from sae_afa_plugin.metrics import AFATokenMetrics
from sae_afa_plugin.report import render_report, write_report
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.tables import shown, shown_columns

NAMES = ["topk", "<b>bold</b> & co", "batch"]
RATIO, NMSE, L0, CONTEXT = range(4)  # columns of the lists of tokens


class Page(HTMLParser):
    """Every element of a page, with its attributes and all text inside it."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self._open: list[tuple[str, dict, list[str]]] = []
        self.feed(html.replace(get_plotlyjs(), ""))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in ("meta", "link", "img"):
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self._open:
            text.append(data)

    def texts(self, tag: str, **having: str) -> list[str]:
        return [
            "".join(text)
            for found, attributes, text in self.elements
            if found == tag and having.items() <= attributes.items()
        ]

    def table(self, number: int) -> list[list[str]]:
        """The cells of the body of a table."""
        tables = [n for n, (tag, _, _) in enumerate(self.elements) if tag == "table"]
        rows: list[list[str]] = []
        end = [*tables[1:], None][number]
        for tag, _, text in self.elements[tables[number] : end]:
            if tag == "tr":
                rows.append([])
            elif tag in ("td", "th") and rows:
                rows[-1].append("".join(text))
        return rows[1:]


@pytest.fixture(scope="module")
def results():
    return made_up_results(NAMES, 320)


@pytest.fixture(scope="module")
def html(results):
    return render_report(results)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# --- what it says ---


def test_the_page_loads_nothing_from_elsewhere(html, page):
    assert html.count(get_plotlyjs()) == 1
    loaded = [
        (tag, attributes[name])
        for tag, attributes, _ in page.elements
        for name in ("src", "srcset", "href", "data", "action")
        if name in attributes and tag != "a"
    ]
    assert [tag for tag, _ in loaded] == ["link", *["img"] * 5]
    assert all(address.startswith("data:") for _, address in loaded)
    assert "url(" not in page.texts("style")[0]
    assert "@import" not in page.texts("style")[0]


def test_every_figure_is_a_png(page):
    pictures = [attrs["src"] for tag, attrs, _ in page.elements if tag == "img"]
    for picture in pictures:
        assert base64.b64decode(picture.split(",")[1]).startswith(b"\x89PNG\r\n")
    assert len(set(pictures)) == 5


def test_the_summary_has_the_numbers_of_every_shown_column(results, page):
    columns = shown_columns(results.summary)
    assert len(page.texts("button")) > len(columns)
    headings = [re.sub(r"\W", "", heading) for heading in page.texts("button")[1:][: len(columns)]]
    assert headings == [re.sub(r"\W", "", column.heading) for column in columns]
    explained = [attrs.get("title") for tag, attrs, _ in page.elements if tag == "button"]
    assert explained[1:][: len(columns)] == [column.meaning for column in columns]
    expected = [
        [name, *(shown(column, row[column.name]) for column in columns)]
        for name, row in results.summary.iterrows()
    ]
    assert page.table(0) == expected
    values = [float(attrs["data-value"]) for _, attrs, _ in page.elements if "data-value" in attrs]
    assert (
        values
        == results.summary[[column.name for column in columns]].to_numpy(float).ravel().tolist()
    )


def test_each_sae_has_its_energy_budget_as_a_sentence(results, page):
    rows = [row for _, row in results.summary.iterrows()]
    for name, row, sentence in zip(NAMES, rows, page.texts("li"), strict=True):
        norm = round(100 * row["share_features_mean"] ** 0.5)
        assert sentence.startswith(f"{name}: Features have {norm} % of the input's norm: ")


def test_the_extremes_are_exactly_the_tokens_with_the_outermost_ratios():
    n, size = 40, 20
    sequences = pd.DataFrame(
        {
            "sequence": np.repeat([0, 1], size),
            "position": np.tile(np.arange(size), 2),
            "token_id": range(n),
            "token": [f" w{i}" for i in range(n)],
        }
    )
    table = sequences[["sequence", "position", "token_id"]].assign(
        **dict.fromkeys(AFATokenMetrics._fields, 1.0) | {"over_activated": False, "l0": 7}
    )
    ratio = np.ones(n)
    most, least = [31, 0, 19, 20, 39, 5, 6, 7], [8, 22, 1, 18, 38, 21, 11, 12]
    ratio[most] = np.arange(10, 2, -1)
    ratio[least] = np.arange(1, 9) / 10
    table["norm_z"] = 2.0
    table["norm_f"] = 2 * ratio
    table["nmse"] = np.arange(n) / 1000
    # without a ratio: no extremes
    table.loc[30, "norm_z"] = 0.0
    table.loc[29, ["norm_z", "norm_f"]] = 0.0

    page = Page(render_report(results_of({"one": table}, sequences)))
    for number, tokens in ((1, most), (2, least)):
        rows = page.table(number)
        assert [row[RATIO] for row in rows] == [f"{ratio[i]:.3f}" for i in tokens]
        assert [row[NMSE] for row in rows] == [f"{i / 1000:.3g}" for i in tokens]
        assert [row[L0] for row in rows] == ["7"] * 8
        for row, i in zip(rows, tokens, strict=True):
            start = i - i % size  # the context ends with the sequence
            first, last = max(start, i - 14), min(start + size, i + 15)
            assert row[CONTEXT] == "".join(f" w{j}" for j in range(first, last))
    assert page.texts("mark") == [f" w{i}" for i in most + least]


def test_texts_and_names_are_escaped(html, page):
    assert "<b>" not in html.replace(get_plotlyjs(), "")
    assert [tag for tag, _, _ in page.elements].count("script") == 4
    assert page.texts("summary") == NAMES
    # a token that ends the script would end the data
    data = json.loads(page.texts("script", id="data")[0])
    assert set(HOSTILE) <= set(data["texts"])
    assert [sae["name"] for sae in data["saes"]] == NAMES
    assert set(page.texts("mark")) & {text.replace("\n", "⏎") for text in HOSTILE}


def test_the_data_of_the_plot_are_those_of_the_tokens(results, page):
    data = json.loads(page.texts("script", id="data")[0])

    def unpacked(packed: str, dtype: str) -> list:
        return np.frombuffer(base64.b64decode(packed), dtype).tolist()

    texts = np.array(data["texts"], dtype=object)[unpacked(data["tokens"], "<u4")]
    assert texts.tolist() == results.sequences["token"].tolist()
    for sae in data["saes"]:
        table = results.tokens[results.tokens["sae"] == sae["name"]]
        for column in ("norm_z", "norm_f", "nmse", "interference"):
            assert unpacked(sae[column], "<f4") == table[column].tolist()
        assert unpacked(sae["l0"], "<u4") == table["l0"].tolist()
        place = table["sequence"] * data["size"] + table["position"]
        assert unpacked(sae["place"], "<u4") == place.tolist()


def test_too_many_points_are_sampled_evenly_and_it_says_so(results):
    html = render_report(results, n_points=90)
    data = json.loads(Page(html).texts("script", id="data")[0])
    assert [len(base64.b64decode(sae["l0"])) / 4 for sae in data["saes"]] == [30, 30, 30]
    assert "90 of 960 points, drawn at random" in html


def test_refusals_settings_and_versions_are_listed(results):
    metadata = {**results.metadata, "versions": {"sae-lens": "6.99"}, "refused": {"bad": "no <W>"}}
    told = AFAResults(results.summary, results.tokens, results.sequences, metadata)
    page = Page(render_report(told))
    assert page.table(-1)[-1] == ["bad", "not evaluated: no <W>"]
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert facts["sae-lens"] == "6.99"
    assert facts["context_size"] == "16"
    assert "model_argument" not in facts


# --- other shapes of results ---


def test_a_single_sae_has_no_frontier():
    page = Page(render_report(made_up_results(["only"], 200)))
    headings = page.texts("h2")
    assert "Interference" in headings
    assert "Error against sparsity" not in headings
    assert [row[0] for row in page.table(0)] == ["only"]
    assert "1 SAE, 200 tokens each" in page.texts("p", **{"class": "lead"})[0]


def test_without_coherence_there_is_no_interference_figure(page):
    with_coherence = page.texts("h2")
    page = Page(render_report(made_up_results(NAMES, 200, coherence=False)))
    assert page.texts("h2") == [title for title in with_coherence if title != "Interference"]
    assert len(page.texts("h2")) == len(with_coherence) - 1
    assert not any("cohe" in button for button in page.texts("button"))


def test_results_of_last_positions_only_show_the_words_before():
    results = made_up_results(["a", "b"], 50, last_only=True)
    assert results.tokens["position"].unique().tolist() == [15]
    page = Page(render_report(results))
    table = results.tokens[results.tokens["sae"] == "a"]
    top = table.loc[(table["norm_f"] / table["norm_z"]).idxmax()]
    sequence = results.sequences[results.sequences["sequence"] == top["sequence"]]
    words = "".join(sequence["token"].iloc[1:]).replace("\n", "⏎")
    assert page.table(1)[0][CONTEXT] == words


def test_undefined_quantities_of_tokens_are_left_out():
    results = made_up_results(["a", "b"], 100)
    undefined = ["nmse", "interference", "epsilon_lbo", "epsilon_lbo_recon"]
    results.tokens.loc[results.tokens["position"] == 3, undefined] = np.nan
    results.tokens.loc[results.tokens["position"] == 3, "norm_f"] = 0.0
    page = Page(render_report(results))
    assert page.table(2)[0][:2] == ["0.000", "nan"]
    data = json.loads(page.texts("script", id="data")[0])
    nmse = np.frombuffer(base64.b64decode(data["saes"][0]["nmse"]), "<f4")
    assert np.isnan(nmse).sum() == (results.tokens["position"] == 3).sum() / 2 > 0


# --- once more ---


def parsed(results):
    """What the command understands of the commands that the report shows."""
    lines = [shlex.split(line) for line in shell_lines(evaluate_commands(results)).splitlines()]
    assert all(line[0] == "sae-afa" for line in lines)
    return [cli._parser().parse_args(line[1:]) for line in lines]


def of(sources: list[str], **options):
    results = made_up_results([f"sae {n}" for n in range(len(sources))], 8)
    results.summary["source"] = sources
    results.metadata["options"] = {
        **asdict(Reading(dataset="user/data")),
        **asdict(Protocol()),
        **asdict(Evaluation()),
        "activations": None,
        **options,
    }
    return results


def test_the_command_of_a_release_evaluates_the_same_again():
    options = {
        "model": "gpt2",
        "dataset": "-user/data",
        "dataset_config": "en",
        "split": "test",
        "n_tokens": 5000,
        "context_size": 64,
        "prepend_bos": False,
        "positions": "last",
        "concatenate": False,
        "separator": None,
        "exclude_special_tokens": (3, 50256),
        "subset": "Github",
        "shuffle": True,
        "seed": 7,
        "batch_size_prompts": 3,
        "memory_budget": 12_345_678_901,
        "device": "cpu",
        "dtype": "bfloat16",
        "coherence": False,
        "core": True,
        "core_tokens": 1000,
        "progress": False,
    }
    results = of(["a-release\tblocks.1/width_16k", "a-release\tblocks.2/a b"], **options)
    [args] = parsed(results)
    assert (args.release, args.sae_id) == ("a-release", ["blocks.1/width_16k", "blocks.2/a b"])
    given = evaluation_given(args)
    defaults = asdict(PROTOCOLS[given.pop("protocol", "default")])
    assert {**defaults, **given} == options


def test_the_command_of_folders_names_each():
    [args] = parsed(of(["/saes/one", "/saes/with 'quotes' and $HOME"], prepend_bos=True))
    assert args.release is None
    assert args.sae_id is None
    assert list(map(str, args.path)) == ["/saes/one", "/saes/with 'quotes' and $HOME"]
    assert evaluation_given(args) == {"dataset": "user/data", "prepend_bos": True}


def test_the_command_of_the_papers_protocol_names_it():
    [args] = parsed(of(["r\tx"], **asdict(PROTOCOLS["paper"])))
    assert evaluation_given(args) == {"dataset": "user/data", "protocol": "paper"}


def test_the_command_of_a_recording_reads_it_again():
    [args] = parsed(of(["/saes/one"], activations="a recording", core_tokens=5))
    assert evaluation_given(args) == {"activations": Path("a recording"), "core_tokens": 5}


def test_what_was_in_memory_is_in_no_command():
    [args] = parsed(of(["in memory", "/saes/one", "in memory"], dataset=None))
    assert list(map(str, args.path)) == ["/saes/one"]
    assert args.dataset == "YOUR_DATASET"
    results = of(["/saes/one"])
    results.metadata["settings"]["model_content"] = "0123"
    assert parsed(results)[0].model == "YOUR_MODEL"
    results = of(["in memory"], n_tokens=99)
    assert evaluate_commands(results) == []
    assert "The SAEs were objects in Python" in render_report(results)


def test_there_is_one_command_for_each_release():
    results = of(["first\tx", "/saes/one", "second\ty", "first\tz"], n_tokens=99)
    first, second = parsed(results)
    assert (first.release, first.sae_id) == ("first", ["x", "z"])
    assert list(map(str, first.path)) == ["/saes/one"]
    assert (second.release, second.sae_id, second.path) == ("second", ["y"], [])
    assert first.n_tokens == second.n_tokens == 99
    command = shell_lines(evaluate_commands(results))
    assert command in Page(render_report(results)).texts("code")


# --- files ---


def test_it_is_written_into_a_folder_or_a_file(results, tmp_path):
    assert write_report(results, tmp_path) == tmp_path / "report.html"
    assert write_report(results, tmp_path / "x.html") == tmp_path / "x.html"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "x.html"]
    for file in tmp_path.iterdir():
        assert file.read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_nothing_is_written_where_the_folder_does_not_exist(results, tmp_path):
    with pytest.raises(OSError, match=r"report.html could not be written in .*none"):
        write_report(results, tmp_path / "none" / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_report_of_before(results, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("the report of before, by sae-afa-plugin")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"report.html could not be written"):
            write_report(results, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "the report of before, by sae-afa-plugin"
    assert list(tmp_path.iterdir()) == [path]


# --- the commands ---


@pytest.fixture(scope="module")
def saved(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    results.save(folder)
    return folder


def test_the_command_report_writes_the_page_of_saved_results(saved, results, tmp_path, capsys):
    assert cli.main(["report", str(saved)]) == 0
    assert capsys.readouterr().out.split() == [str(saved / "report.html")]
    page = Page((saved / "report.html").read_text(encoding="utf-8"))
    assert page.table(0) == Page(render_report(results)).table(0)
    assert cli.main(["report", str(saved), "--out", str(tmp_path / "x.html")]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["x.html"]


def test_the_command_plot_draws_every_figure_of_saved_results(saved, tmp_path, capsys):
    assert cli.main(["plot", str(saved)]) == 0
    files = {
        f"{name}.{kind}"
        for name in ("zf", "energy", "violin", "l0", "coherence", "frontier")
        for kind in ("png", "pdf")
    }
    assert {file.name for file in (saved / "figures").iterdir()} == files
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(saved / "figures" / file) for file in files)
    for file in (saved / "figures").iterdir():
        start = {".png": b"\x89PNG", ".pdf": b"%PDF"}[file.suffix]
        assert file.read_bytes().startswith(start)


@pytest.mark.parametrize("command", ["report", "plot"])
def test_a_folder_without_results_is_refused_in_one_sentence(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.strip().splitlines() == [
        f"sae-afa {command}: error: the folder {str(tmp_path)!r} holds no results: "
        "it has no sae-afa.json"
    ]
    assert list(tmp_path.iterdir()) == []
