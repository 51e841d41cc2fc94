"""The tutorials, executed: what they show is checked, not only that they run."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from helpers.hub import LoopbackHub, client_environment
from helpers.models import gpt2_tokenizer, tiny_gpt2
from notebooks import NOTEBOOKS, Kernel, code_cells, executed, is_up_to_date
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.loading.pretrained_saes_directory import (
    get_pretrained_saes_directory,
    get_repo_id_and_folder_name,
)
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformers import AutoTokenizer

from sae_afa_plugin.activations.embedded import hooked_gpt2
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.activations.tokens import tokenize

MOST_SECONDS = 240
MOST_BYTES = 300_000
SWITCH = "USE_GPT2 = False"
EVALUATE, TRAIN, THEORY, SPLICE = NOTEBOOKS
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def figures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


# --- executed on the embedded model ---


def run(path: Path, folder: Path) -> Iterator[Kernel]:
    started = time.monotonic()
    with executed(path, folder, seconds=MOST_SECONDS) as kernel:
        assert time.monotonic() - started < MOST_SECONDS
        assert kernel.value("__import__('sys').executable") == sys.executable
        assert figures(kernel.notebook) == figures(nbformat.read(path, as_version=4)) > 0
        yield kernel


@pytest.fixture
def evaluate(tmp_path: Path) -> Iterator[Kernel]:
    yield from run(EVALUATE, tmp_path)


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Kernel]:
    yield from run(TRAIN, tmp_path)


@pytest.fixture
def theory(tmp_path: Path) -> Iterator[Kernel]:
    yield from run(THEORY, tmp_path)


@pytest.fixture
def splice(tmp_path: Path) -> Iterator[Kernel]:
    yield from run(SPLICE, tmp_path)


def test_evaluating_saes(evaluate: Kernel) -> None:
    value = evaluate.value
    summary = value("results.summary.select_dtypes('number').to_dict('index')")
    topafa, topk, l1 = (summary[name] for name in ("top-AFA", "TopK", "L1"))
    assert {row["tokens"] for row in summary.values()} == {10_000}
    assert value("{n: s.cfg.architecture() for n, s in saes.items()}") == {
        "top-AFA": "topafa",
        "TopK": "topk",
        "L1": "standard",
    }
    # where they lie in the ZF plot, as the text says
    assert abs(topafa["norm_ratio_median"] - 1) < 0.02
    assert topk["over_activated"] == l1["over_activated"] == 0
    assert l1["norm_ratio_median"] < topk["norm_ratio_median"] < 1 / math.sqrt(2)  # below e = 1
    assert all(row["nmse_median"] < 0.3 for row in summary.values())
    assert topk["l0_mean"] == 32

    # one token by hand: the notebook's own formula against what evaluate_saes found
    by_hand = value("by_hand.select_dtypes('number').to_numpy().tolist()")
    assert len(by_hand) == 4
    for norm_z, norm_f, found_z, found_f in by_hand:
        assert norm_z == pytest.approx(found_z, rel=1e-4)
        assert norm_f == pytest.approx(found_f, rel=1e-4)

    # under-activated, and yet long reconstructions, because the directions lean the same way
    for of_features, of_sum in value("lengths.loc[['TopK', 'L1']].to_numpy().tolist()"):
        assert of_sum > 1.4 * of_features
    assert l1["interference_median"] > topk["interference_median"] > 0.02
    assert abs(topafa["interference_median"]) < 0.01

    for of_sae in value("bounds.to_dict()").values():
        assert of_sae["|interference|, largest"] <= of_sae["coherence"]
        assert of_sae["epsilon_lbo_recon, largest"] <= of_sae["coherence"]
        assert of_sae["Welch bound"] == pytest.approx(math.sqrt((768 - 192) / (192 * 767)))
        assert of_sae["Welch bound"] < of_sae["coherence"]
        least = of_sae["least e of any such dictionary"]
        assert least == pytest.approx(math.sqrt(767 * (768 - 192) / 192))
        assert 1 < least < of_sae["e = coherence * (h - 1)"]

    correlation = value("quality['rank correlation with NMSE'].to_dict()")
    assert correlation["L1"] < -0.15
    spread = value("(quality['ratio, 95 %'] - quality['ratio, 5 %']).to_dict()")
    assert spread["top-AFA"] < 0.05 < spread["TopK"]

    n_special = value("int((is_special == 'special').sum())")
    assert 0 < n_special < 300  # of 3 times 2,000 tokens
    norms = value("with_special.tokens.groupby(is_special).norm_z.median().to_dict()")
    assert norms["special"] > 1.5 * norms["others"]


def test_training_topafa(train: Kernel) -> None:
    value = train.value
    rule = "{n: sae_afa_plugin.top_afa(acts, torch.tensor([n])).count_nonzero().item()}"
    for norm, kept in ((4.2, 1), (4.8, 2), (5.3, 3), (9.0, 4)):  # of 4, 3, 2, 1
        assert value(rule.replace("n:", "'k':").replace("[n]", f"[{norm}]")) == {"k": kept}
    assert value("type(config).__name__") == "TopAFATrainingSAEConfig"

    summary = value("both.summary.select_dtypes('number').to_dict('index')")
    kinds = value("both.summary.trained_as.to_dict()")
    assert sorted(kinds.values()) == ["batchtopk"] * 2 + ["topafa"] * 2 + ["topk"] * 2
    for name, row in summary.items():
        assert 0 < row["nmse_mean"] < 0.3, name
        assert 0.8 < row["core_ce_loss_score"] < 1, name
        if kinds[name] == "topafa":
            assert abs(row["norm_ratio_median"] - 1) < 0.02
        else:
            assert row["norm_ratio_median"] < 0.9

    # equal L0, and then worse
    matched = value("matched")
    assert len(matched) == 2
    for name, (topk, batchtopk) in matched.items():
        assert abs(summary[topk]["l0_mean"] - summary[name]["l0_mean"]) < 1
        assert summary[batchtopk]["l0_mean"] == pytest.approx(summary[name]["l0_mean"], rel=0.1)
    ratios = value("ratios['mean NMSE'].tolist()")
    recomputed = [
        summary[name]["nmse_mean"] / summary[other]["nmse_mean"]
        for name, others in matched.items()
        for other in others
    ]
    assert ratios == pytest.approx(recomputed)
    assert min(ratios) > 0.98
    assert max(ratios) > 1.1

    # the log
    log = value("log[log.sae == 'top-AFA 1-32'].to_dict('list')")
    assert log["step"] == list(range(10, 151, 10))
    assert log["nmse"][-1] < 0.5 * log["nmse"][0]
    assert abs(log["norm_ratio"][-1] - 1) < 0.02
    assert all(low <= mean <= high for low, mean, high in zip(
        log["min_l0"], log["mean_l0"], log["max_l0"], strict=True
    ))  # fmt: skip

    # how many features a token gets
    mine, batchtopk, topk = (summary[name] for name in value("shown"))
    spreads = [row["l0_q95"] - row["l0_q05"] for row in (mine, batchtopk, topk)]
    assert spreads[0] > 1.5 * spreads[1] > spreads[2] == 0
    errors = value("by_l0.nmse.to_dict()")
    assert max(errors, key=errors.__getitem__) == "fewest"
    assert value("float(by_l0.interference['fewest'])") < 0
    assert value("sorted(p.name for p in (out / 'first').iterdir() if p.is_dir())") == [
        "evaluation",
        "top-AFA 1-128",
        "top-AFA 1-32",
    ]


def test_what_the_theory_promises(theory: Kernel) -> None:
    value = theory.value
    # an identity
    assert value("(exact.norm_f / exact.norm_z - 1).abs().max().item()") < 1e-5
    assert value("exact.l0.float().mean().item()") == pytest.approx(8, abs=0.2)

    # spread without drift, and the bounds
    random = value("random_dictionaries.reset_index().to_dict('records')")
    assert [row["features h"] for row in random] == [64, 256, 1024]
    for row in random:
        assert abs(row["median"] - 1) < 0.02
        assert row["ratio, 5 %"] < 0.93
        assert row["95 %"] > 1.07
        assert row["largest |interference|"] <= row["coherence"]
        assert row["largest epsilon_lbo_recon"] <= row["coherence"]
        assert row["Welch bound"] < row["coherence"]

    # drift, as the formula has it
    leans = value("leans")
    for k, measured in value("curve").items():
        formula = [(1 + (int(k) - 1) * c) ** -0.5 for c in leans]
        assert measured == pytest.approx(formula, abs=0.03)
    assert max(value("lean_bounds")) <= 1

    # only features that are together *and* alike interfere
    apart, alike, across = value("correlated['interference, mean'].tolist()")
    assert alike > 3 * apart
    assert across == pytest.approx(apart, rel=0.3)
    assert value("correlated.iloc[:, -1].max()") <= 1
    actives = value("correlated.active.tolist()")
    assert actives == pytest.approx([16, 16, 16], rel=0.05)

    # the vacuous bound
    bound = value("bound.to_dict('index')")
    assert bound["orthogonal, h = d"]["e"] < 1e-3
    assert bound["simplex, h = d + 1"]["e"] == pytest.approx(1)
    assert bound["simplex, h = d + 1"]["coherence"] == pytest.approx(1 / 64)
    for name, row in bound.items():
        if name != "orthogonal, h = d":
            assert row["e"] > 1 - 1e-9
        assert row["its rank"] == min(row["size of the Gram matrix"], 64)
    assert [row["size of the Gram matrix"] for row in bound.values()] == [64, 65, 16, 64, 256]

    # the true dictionary: exact if orthogonal, worse the larger it is if not
    given = value("given.to_dict('index')")
    exact = given.pop("orthogonal, h = d")
    assert exact["NMSE"] < 1e-8
    assert exact["share of the true ones kept"] == 1
    assert exact["kept, above 1 % of the largest"] == pytest.approx(exact["true number"], abs=0.05)
    for row in given.values():
        assert row["kept"] < 0.8 * row["true number"]
        assert row["NMSE"] > 0.2
    found = [row["share of the true ones kept"] for row in given.values()]
    assert found == sorted(found, reverse=True)

    # learned
    learned = value("{' '.join(at): row for at, row in learned.to_dict('index').items()}")
    easy, hard = learned["h = 64 top-AFA"], learned["h = 256 top-AFA"]
    assert easy["mcc"] > 0.9
    assert easy["L0"] < 2 * easy["true L0"]
    assert hard["explained variance"] > 0.98
    assert hard["L0"] > 64
    assert hard["mcc"] < 0.5
    assert learned["h = 256 TopK 8"]["mcc"] > 0.8
    assert learned["h = 256 TopK 8"]["explained variance"] < hard["explained variance"]
    moved = value("{' '.join(at): row for at, row in moved.to_dict('index').items()}")
    for name in ("top-AFA", "TopK 8"):
        assert moved[f"{name} at the truth"]["mcc"] == pytest.approx(1, abs=1e-4)
    assert moved["TopK 8 300 steps later"]["mcc"] > 0.98
    assert moved["top-AFA 300 steps later"]["mcc"] < 0.97
    assert moved["top-AFA 300 steps later"]["L0"] > 64

    # a real dictionary
    together, drawn = value("real.groupby('features').interference.median().tolist()")
    assert together > 2 * drawn > 0
    assert value("real.interference.abs().max()") <= value("mu.max_abs_cos")


def test_splicing(splice: Kernel) -> None:
    value = splice.value
    assert value("sae.cfg.architecture()") == "topafa"
    assert value("same") is True
    losses = value("losses.to_dict()")
    model = losses["model"]
    assert losses["spliced, with error term"] == pytest.approx(model, abs=1e-4)
    assert model + 0.02 < losses["spliced, not at BOS"] < losses["zeros"] - 2
    recovered = value("recovered.to_dict()")
    assert 0.9 < recovered["spliced, not at BOS"] < 1

    assert value("agree.max().item()") >= 12  # of 20
    assert 0.002 < value("share[feature].item()") < 0.02
    assert value("len(set(model.to_str_tokens(tokens[rows, positions])))") < 8

    # ablation: two ways, one result, and not nothing
    assert value("(ablated - by_hand).abs().max().item()") < 1e-3
    assert value("(ablated - clean).abs().max().item()") > 1e-2
    assert value("kl") > 0
    before, ablated, again = value("ablation.to_dict('records')")
    contribution = value("(f_here[feature] * sae.W_dec[feature].norm()).item()")
    assert contribution > 0
    assert ablated["‖f‖"] ** 2 == pytest.approx(before["‖f‖"] ** 2 - contribution**2, rel=1e-4)
    assert ablated["features"] == before["features"] - 1
    assert ablated["target ‖z − b‖"] == again["target ‖z − b‖"] < before["target ‖z − b‖"]
    assert value("((f_again > 0) ^ (f_without > 0)).sum().item()") > 1

    effect = value("steering_effect['probability of the expected ones'].tolist()")
    assert effect == sorted(effect)
    assert effect[-1] > 10 * effect[0]

    # k follows the norm
    rows = value("steering.to_dict('records')")
    start = {row["direction"]: row["features kept"] for row in rows if row["alpha"] == 0}
    assert len(start) == 2
    for row in rows:
        if row["alpha"] == 0:
            assert row["changed"] == row["changed with a fixed k"] == 0
        assert 0.85 < row["ratio"] < 1.02
        if row["alpha"] == 1:
            assert row["features kept"] > 1.5 * start[row["direction"]]
            assert row["changed"] > 1.5 * row["changed with a fixed k"] > 0


# --- what is stored ---


@named
def test_stored_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert is_up_to_date(notebook), "the code has changed: make notebooks"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < MOST_BYTES
    assert figures(notebook) >= 1
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) >= 8
    assert {output.output_type for output in outputs} <= {
        "execute_result",
        "display_data",
        "stream",
    }
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    for output in outputs:
        output.get("data", {}).pop("image/png", None)
    text = json.dumps(outputs)
    for unwanted in ("Warning", "it/s", "Traceback", str(Path.home()), str(path.parent), "/tmp/"):
        assert unwanted not in text


@named
def test_they_say_what_to_expect(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "You will learn" in first.source
    assert re.search(r"takes about (a|two) minutes?", first.source)
    assert "no network" in first.source


def test_links_between_them_lead_somewhere() -> None:
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            for link in re.findall(r"\]\((?!http)([^)#]+)", cell.source):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


# --- the switch to GPT-2 ---


def switched_branch(path: Path) -> ast.If:
    """The ``if USE_GPT2`` of the one cell that has it."""
    cells = [cell.source for cell in code_cells(nbformat.read(path, as_version=4))]
    (source,) = [source for source in cells if SWITCH in source.splitlines()]
    (branch,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "USE_GPT2"
    ]
    assert branch.orelse
    return branch


@named
def test_the_switch_names_what_exists(path: Path) -> None:
    calls = [
        node
        for statement in switched_branch(path).body
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
    ]
    models = 0
    for call in calls:
        name = ast.unparse(call.func)
        if name == "SAE.from_pretrained":
            release, sae_id = (ast.literal_eval(argument) for argument in call.args)
            entry = get_pretrained_saes_directory()[release]
            assert sae_id in entry.saes_map
            assert get_official_model_name(entry.model) == "gpt2"
            inspect.signature(SAE.from_pretrained).bind(
                release, sae_id, **dict.fromkeys(k.arg for k in call.keywords if k.arg)
            )
        elif name.endswith(".from_pretrained_no_processing"):
            models += 1
            assert get_official_model_name(ast.literal_eval(call.args[0])) == "gpt2"
    assert models == 1


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """Stand-ins under the names that GPT-2 small, its SAEs and OpenWebText have.

    As deep as GPT-2 small and 32 wide, with random weights, so what is computed means nothing.
    """
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        gpt2 = tiny_gpt2(12, 32)
        gpt2.save_pretrained(hub.repo("gpt2"))
        gpt2_tokenizer().save_pretrained(hub.repo("gpt2"))

        texts = standard_library_texts("train")[:60]
        dataset = hub.repo("Skylion007/openwebtext", "datasets")
        dataset.mkdir(parents=True)
        (dataset / "train.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8"
        )

        tokenizer = AutoTokenizer.from_pretrained(hub.repo("gpt2"))
        model = hooked_gpt2(gpt2, tokenizer, "gpt2", center_writing_weights=True)
        _, cache = model.run_with_cache(tokenize(model, texts[:2], 128)[:8])
        hooks = {
            "gpt2-small-res-jb": ["blocks.4.hook_resid_pre", "blocks.8.hook_resid_pre"],
            "gpt2-small-resid-post-v5-32k": ["blocks.7.hook_resid_post"],
        }
        for release, names in hooks.items():
            for name in names:
                repo, folder = get_repo_id_and_folder_name(release, name)
                sae = stand_in(release, cache[name].flatten(0, 1))
                sae.cfg.metadata.model_name = "gpt2-small"
                sae.cfg.metadata.hook_name = name
                sae.save_model(hub.repo(repo) / folder)
        yield hub


def stand_in(release: str, x: torch.Tensor) -> SAE:
    """An untrained SAE of the release's kind; one in fifty of its features is active."""
    torch.manual_seed(0)
    if release == "gpt2-small-res-jb":
        sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=256))
    else:
        sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=256, k=8, normalize_activations="layer_norm"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(256, 32), dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
        if isinstance(sae, StandardSAE):
            sae.b_enc.copy_(-(x @ sae.W_enc).quantile(0.985, dim=0))
    return sae


# the sizes of the second tutorial are made for a GPU, the synthetic part of the third is the same
SMALLER = {
    TRAIN: {
        'd_sae = "gpt2", 12_288': 'd_sae = "gpt2", 128',
        "training_tokens=1000 * 4096, batch_size=4096": "training_tokens=20 * 512, batch_size=512",
        "n_tokens=4_300_000": "n_tokens=40_000",
    },
    THEORY: {"steps=600": "steps=2", '"300 steps later": 300': '"300 steps later": 2'},
}


@named
def test_the_switch_works_with_stand_ins(path: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    replacements = {SWITCH: "USE_GPT2 = True"} | SMALLER.get(path, {})
    hub.requests.clear()
    with executed(path, tmp_path, client_environment(hub, tmp_path), replacements) as kernel:
        assert kernel.value("model.cfg.n_layers") == 12
        assert kernel.value("model.cfg.d_model") == 32
        if path == EVALUATE:
            architectures = "[sae.cfg.architecture() for sae in saes.values()]"
            assert kernel.value(architectures) == ["standard", "standard", "topk"]
            assert kernel.value("len(results.tokens)") == 3 * 10_000
            assert np.isfinite(kernel.value("results.summary.nmse_median.tolist()")).all()
        elif path == TRAIN:
            assert kernel.value("both.summary.hook_name.unique().tolist()") == [
                "blocks.8.hook_resid_pre"
            ]
            assert kernel.value("len(both.summary)") == 6
        else:
            assert kernel.value("sae.cfg.d_sae") == 256
    assert not hub.unknown_requests
    assert any("/gpt2/resolve" in request for request in hub.requests)
    assert (path == THEORY) or figures(kernel.notebook) == figures(
        nbformat.read(path, as_version=4)
    )
