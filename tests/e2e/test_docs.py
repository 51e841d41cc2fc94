"""Every fenced block of README and docs is executed, or named here with the reason why not.

Blocks with ``>>>`` are doctests, which pytest collects by itself. The others run in one process,
page by page and in the order in which a reader meets them, against a hub on the loopback that has
a small gpt2, a release of SAEs and text. What is put in place of what is listed below.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.hub import LoopbackHub, run_client
from helpers.releases import (
    RELEASE_REPO,
    pile,
    publish_gpt2,
    publish_lines,
    publish_release,
)
from markdown.extensions.toc import slugify

from sae_afa_plugin import cli
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.sweep.reader import parse_sweep

ROOT = Path(__file__).parents[2]
PAGES = {
    page.relative_to(ROOT).as_posix(): page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}

# --- what is put in place of what ---

_SMALL_RUN = ', device="cpu", **small)'
_DEMO = "sae-afa evaluate --path output/demo/topafa --path output/demo/topk --dataset embedded"

# page: (text, what takes its place). Everywhere: the hub is on the loopback, its gpt2 has a width
# of 16, its release 48 features, its pile 24 documents that fit; the demo is shortened to 3 steps.
SUBSTITUTIONS: dict[str, list[tuple[str, str]]] = {
    "README.md": [
        (', device="cuda")', _SMALL_RUN),
        ("--out output/sweep", "--out output/sweep --dry-run"),
    ],
    "docs/index.md": [
        ("--tokens 20000", "--tokens 200"),
    ],
    "docs/evaluation.md": [
        (_DEMO, f"{_DEMO} --tokens 300"),
        ("n_tokens=20_000", "n_tokens=200"),
        ('dataset="embedded",\n', 'dataset="embedded", n_tokens=200,\n'),
        ("--tokens 200000", "--tokens 200"),
    ],
    "docs/training.md": [
        (', device="cuda")', _SMALL_RUN),
        ("--d_in 768 --d_sae 12288", "--d_in 16 --d_sae 64 --training_tokens 5120 --verbose False"),
        (
            "--n_batches_in_buffer 256",
            "--n_batches_in_buffer 16 --train_batch_size_tokens 512 --context_size 64",
        ),
        ('"d_in": 768, "d_sae": 12288', '"d_in": 16, "d_sae": 64'),
        (
            "    n_batches_in_buffer=256,\n    training_tokens=10_000_000,\n",
            "    n_batches_in_buffer=16, train_batch_size_tokens=512, context_size=64,\n"
            "    training_tokens=1024, checkpoint_path=None,\n",
        ),
        (
            "total_training_samples=10_000_000, train_batch_size_samples=4096",
            "total_training_samples=1024, train_batch_size_samples=256",
        ),
        ("n_tokens=10_000_000", "n_tokens=1000"),
        ('lr=lr, device="cuda"', "lr=lr"),
        (
            '"checkpoints/8x2k9q1z/40962048")',
            "first_checkpoint, **small)",
        ),
    ],
}

# what a page takes for granted: objects that its reader has
_SMALL = """
small = dict(
    d_in=16, d_sae=64, context_size=64, training_tokens=4 * 512, train_batch_size_tokens=512,
    store_batch_size_prompts=8, n_batches_in_buffer=16, verbose=False,
)
"""
_AN_SAE = """
from sae_afa_plugin import TopAFATrainingSAE, TopAFATrainingSAEConfig
trained = TopAFATrainingSAE(TopAFATrainingSAEConfig(d_in=16, d_sae=64))
trained.cfg.metadata.hook_name = "blocks.8.hook_resid_pre"
trained.cfg.metadata.model_name = "gpt2"
trained.cfg.metadata.prepend_bos = True
"""
GIVEN = {
    "README.md": _SMALL,
    "docs/evaluation.md": _AN_SAE
    + """
trained.save_inference_model("output/gpt2-l8")
from sae_lens import SAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer
model = HookedTransformer.from_pretrained("gpt2")
sae = SAE.load_from_disk("output/gpt2-l8")
activation_scaler = ActivationScaler()
activation_store = ActivationsStore.from_sae(
    model, sae, dataset="Skylion007/openwebtext", context_size=64, store_batch_size_prompts=2
)
""",
    "docs/training.md": _SMALL
    + """
from pathlib import Path
import torch
from sae_lens import LoggingConfig, MultiSAETrainingRunnerConfig
from sae_afa_plugin import TopAFATrainingSAEConfig, paper_runner_config
from sae_afa_plugin.training.runners import LoggedTrainingRunner
one_sae_config = paper_runner_config(
    layer=8, n_checkpoints=1, checkpoint_path="checkpoints", output_path="output/first", **small
)
LoggedTrainingRunner(one_sae_config).run()
first_checkpoint = str(next(Path("checkpoints").rglob("trainer_state.pt")).parent)
many_saes = {
    "saes": {"one": TopAFATrainingSAEConfig(d_in=16, d_sae=64)},
    "hook_names": "blocks.8.hook_resid_pre",
    "model_name": "gpt2",
}
activations = torch.randn(32, 16)
""",
}

# (page, beginning of the block or command): why it is not run
NOT_RUN = {
    ("docs/neighbours.md", "pip install sae-bench==0.6.0 ."): (
        "pins NumPy below 2: an environment of its own, tried by hand"
    ),
    ("docs/neighbours.md", "import sae_afa_plugin\nfrom sae_bench.evals.core.main"): (
        "SAEBench cannot be installed beside the test suite's versions; tried by hand"
    ),
    ("docs/contributing.md", "python -m pytest tests/unit/rules"): ("is part of this test suite"),
}
NO_CODE = ("text", "bibtex")


# --- collecting ---


class Block(NamedTuple):
    """One fenced block, or one command of a block of them."""

    page: str
    line: int
    language: str
    text: str


def blocks_of(page: str) -> Iterator[Block]:
    found = re.finditer(
        r"^(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=fence)$",
        PAGES[page].read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    for match in found:
        line = match.string.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["language"].strip(), match["text"])


def commands_of(block: Block) -> Iterator[Block]:
    """The commands of a block of shell, comments left out, one by one."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield block._replace(text=shlex.join(words))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [command for b in BLOCKS if b.language == "bash" for command in commands_of(b)]
PYTHON = [block for block in BLOCKS if block.language == "python" and ">>>" not in block.text]


def why_not_run(block: Block) -> str | None:
    for (page, start), reason in NOT_RUN.items():
        if page == block.page and block.text.startswith(start):
            return reason
    return None


def is_run(block: Block) -> bool:
    return why_not_run(block) is None and (
        block.language == "python" or block.text.startswith("sae-afa ")
    )


RUN = [block for block in [*PYTHON, *COMMANDS] if is_run(block)]


def name_of(block: Block) -> str:
    return f"{block.page}:{block.line} {block.text.splitlines()[0][:40]}"


# --- every block has a place ---


def test_every_block_says_what_it_is():
    assert len(BLOCKS) > 20
    for block in BLOCKS:
        assert block.language in ("python", "bash", "yaml", *NO_CODE), name_of(block)


def test_every_block_of_yaml_is_a_sweep():
    found = [block for block in BLOCKS if block.language == "yaml"]
    assert found
    for block in found:
        assert parse_sweep(block.text, name_of(block)).saes


def test_every_doctest_is_collected(pytestconfig: pytest.Config):
    assert {"README.md", "docs"} <= set(pytestconfig.getini("testpaths"))
    assert "--doctest-glob=*.md" in pytestconfig.getini("addopts")
    for block in BLOCKS:
        if ">>>" in block.text:
            assert block.language == "python", name_of(block)
            # doctest takes what follows the last output for output, also the end of the block
            assert block.text.endswith("\n\n"), name_of(block)


def test_nothing_is_listed_that_is_not_there():
    for page, start in NOT_RUN:
        assert any(b.page == page and b.text.startswith(start) for b in [*PYTHON, *COMMANDS]), start
    for page in (*SUBSTITUTIONS, *GIVEN):
        assert page in PAGES
    for page, pairs in SUBSTITUTIONS.items():
        for old, _ in pairs:
            assert any(old in block.text for block in RUN if block.page == page), (page, old)


# --- commands that are not sae-afa ---


def targets_and_variables() -> tuple[set[str], set[str]]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    return set(phony.split()), set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))


def assert_make_can(words: list[str]) -> None:
    targets, variables = targets_and_variables()
    for word in words:
        name, is_set, _ = word.partition("=")
        assert name in (variables if is_set else targets), word


def assert_pip_can(words: list[str]) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (section,) = re.findall(
        r"^\[project\.optional-dependencies\]\n(.*?)^\[", pyproject, re.MULTILINE | re.DOTALL
    )
    extras = re.findall(r"^(\w+) = ", section, re.MULTILINE)
    assert words[0] == "install"
    for word in words[1:]:
        match = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        assert match, f"pip install {word}: not this package"
        assert set((match[1] or "").split(",")) - {""} <= set(extras), word


@pytest.mark.parametrize("command", [c for c in COMMANDS if not is_run(c)], ids=name_of)
def test_a_command_that_is_not_ours_can_work(command: Block):
    program, *words = shlex.split(command.text)
    if why_not_run(command) is not None:
        pytest.skip(str(why_not_run(command)))
    assert program in ("make", "pip"), f"run it, or list it: {command.text}"
    {"make": assert_make_can, "pip": assert_pip_can}[program](words)


_NEEDED = {  # by a command that stands alone in a text
    "plot": ["DIR"],
    "report": ["DIR"],
    "record": ["--hook", "HOOK", "--out", "DIR"],
    "sweep": ["CONFIG", "--out", "DIR"],
}


def test_commands_in_the_text_can_be_parsed():
    found = 0
    for page, path in PAGES.items():
        text = re.sub(r"^(`{3,}).*?^\1$", "", path.read_text("utf-8"), flags=re.M | re.S)
        for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
            program, *words = span.split(" ", 1)
            arguments = shlex.split(words[0]) if words else []
            if program == "sae-afa" and arguments[:1] not in (["train"], []):
                needed = _NEEDED.get(arguments[0], []) if arguments == [arguments[0]] else []
                if "--help" not in arguments:
                    _, rest = cli._parser().parse_known_args([*arguments, *needed])
                    assert not rest, (page, span)
                found += 1
            elif program == "make" and arguments:
                assert_make_can(arguments)
            elif span.startswith("pip install '."):
                assert_pip_can(arguments)
    assert found > 5


# --- running the others ---

SESSION = """
import contextlib, io, json, os, shlex, shutil, sys, time, traceback, warnings
from dataclasses import replace
from pathlib import Path

os.environ["COLUMNS"] = "120"
from sae_afa_plugin import cli
from sae_afa_plugin.demo import DEMOS

demo = DEMOS["embedded"]
short = replace(demo.setup, training_tokens=3 * 1024, heldout_tokens=500, ce_tokens=1024)
DEMOS["embedded"] = replace(demo, d_sae=256, k=20, setup=short)
steps = json.loads(Path("steps.json").read_text())
start = Path.cwd()

def run(kind, text, namespace):
    if kind == "python":
        exec(compile(text, "<block>", "exec"), namespace)
    else:
        status = cli.main(shlex.split(text)[1:])
        assert status == 0, f"exit status {status}"

for page, todo in steps.items():  # the first one trains the SAEs of the demo
    folder = start / page.replace("/", "_")
    folder.mkdir()
    os.chdir(folder)
    if page != next(iter(steps)):
        shutil.copytree(start / "docs_index.md" / "output" / "demo", Path("output", "demo"))
    namespace = {"__name__": page}
    for name, kind, text in todo:
        said, error, began = io.StringIO(), None, time.perf_counter()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                run(kind, text, namespace)
        except BaseException:
            error = said.getvalue()[-2000:] + traceback.format_exc()
        print("ran", json.dumps([name, error, round(time.perf_counter() - began, 1)]), flush=True)
"""


def substituted(block: Block) -> str:
    text = block.text
    for old, new in SUBSTITUTIONS.get(block.page, []):
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What went wrong in each block, by name; None where nothing did."""
    folder = tmp_path_factory.mktemp("reader")
    steps: dict[str, list[tuple[str, str, str]]] = {}
    for page in sorted(PAGES, key=lambda page: page != "docs/index.md"):
        todo = [
            (name_of(part), part.language, substituted(part))
            for block in blocks_of(page)
            for part in (commands_of(block) if block.language == "bash" else [block])
            if part in RUN
        ]
        if todo:
            given = GIVEN.get(page, "")
            steps[page] = [(f"{page}: given", "python", given), *todo]
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        publish_gpt2(hub.repo("gpt2"))
        publish_release(hub.repo(RELEASE_REPO))
        texts = [{"text": text} for text in standard_library_texts("train")[:60]]
        publish_lines(hub.repo("Skylion007/openwebtext", "datasets"), texts)
        publish_lines(hub.repo("NeelNanda/pile-10k", "datasets"), pile()[0])
        printed = run_client(hub, SESSION, folder)
        assert not hub.unknown_requests
    lines = [json.loads(line[4:]) for line in printed.splitlines() if line.startswith("ran ")]
    return {name: error for name, error, _ in lines}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(GIVEN))
def test_what_a_page_takes_for_granted_can_be_made(ran: dict[str, Any], page: str):
    assert ran[f"{page}: given"] is None, ran[f"{page}: given"]


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=name_of)
def test_the_block_runs(ran: dict[str, Any], block: Block):
    assert ran[name_of(block)] is None, ran[name_of(block)]


# --- links and the site ---


def anchors_of(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slugify(h.replace("`", ""), "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    own = [link for link in links if not link.startswith("https://")]
    assert len(own) > 10
    for link in own:
        path, _, anchor = link.partition("#")
        target = ROOT / path if path else ROOT / "README.md"
        assert target.is_file(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_tests_that_the_pages_name_are_there():
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {
        found
        for page in pages
        for found in re.findall(r"`(tests/\S+?\.py)::(\w+)`", page.read_text())
    }
    assert len(named) > 10
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)


def scripts_pages() -> Any:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "scripts" / "docs" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_site(folder: Path) -> subprocess.CompletedProcess[str]:
    """What ``make docs`` does, with the site somewhere else."""
    scripts_pages().write(ROOT / "build" / "docs")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_site_is_built_and_asks_nothing_of_other_servers(tmp_path: Path):
    done = built_site(tmp_path / "site")
    assert done.returncode == 0, done.stderr
    for notebook in (ROOT / "tutorials").glob("*.ipynb"):
        assert (tmp_path / "site" / "tutorials" / f"{notebook.stem}.html").is_file()
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1  # without the README
    for page in pages:
        html = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", html):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (page.name, tag)
        # roles of Sphinx and prompts outside of code are signs of a docstring that was misread
        assert not re.search(r":(?:func|class|meth|mod|math):", html), page.name
        assert "<p>&gt;&gt;&gt;" not in html, page.name
        assert "<blockquote>" not in html, page.name


def test_a_notebook_becomes_a_page():
    png = "iVBORw0KGgo="
    notebook = {
        "cells": [
            {
                "cell_type": "markdown",
                "source": ["# Title\n", "[a](../docs/metric.md#b) [c](2_next.ipynb)"],
            },
            {
                "cell_type": "code",
                "source": ["print('```')"],
                "outputs": [
                    {"output_type": "stream", "text": ["\x1b[31m<b>\x1b[0m\n"]},
                    {"output_type": "display_data", "data": {"image/png": png, "text/plain": "x"}},
                    {
                        "output_type": "execute_result",
                        "data": {
                            "text/html": ["<div><style>a</style><table>\n  <tr></tr></table>"]
                        },
                    },
                ],
            },
            {"cell_type": "code", "source": [], "outputs": []},
        ]
    }
    text, pictures = scripts_pages().page(notebook, "1_first")
    assert text == (
        "# Title\n[a](../metric.md#b) [c](2_next.md)\n\n"
        "````python\nprint('```')\n````\n\n"
        '<pre class="output">&lt;b&gt;</pre>\n\n'
        "![output of the cell above](1_first-1.png)\n\n"
        "<div><table>\n<tr></tr></table>\n"
    )
    assert pictures == {"1_first-1.png": b"\x89PNG\r\n\x1a\n"}
