"""What every group of metrics promises: any split of the tokens gives the same result."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.afa_oracle import metrics_of_dictionary
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.synthetic import SyntheticModelConfig, ZipfianFiringProbabilityConfig

from sae_afa_plugin import AFAResults, evaluate_saes
from sae_afa_plugin.activations.base import Site
from sae_afa_plugin.activations.synthetic import SyntheticActivations
from sae_afa_plugin.activations.tensors import TensorActivations
from sae_afa_plugin.groups import known_groups, shown_columns
from sae_afa_plugin.groups.afa import energy_sentence
from sae_afa_plugin.groups.base import Accumulator, Column, GroupResult, MetricGroup
from sae_afa_plugin.plots import save_plots
from sae_afa_plugin.report import write_report
from sae_afa_plugin.spaces import DictionaryCode
from sae_afa_plugin.tables import results_table

N, D, H = 60, 6, 15


@pytest.fixture(scope="module")
def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def code():
    rng, kind = torch.Generator().manual_seed(1), {"dtype": torch.float64}
    W_dec, b_dec = torch.randn(H, D, generator=rng, **kind), torch.randn(D, generator=rng, **kind)
    W_enc, b_enc = (
        torch.randn(D, H, generator=rng, **kind),
        torch.randn(H, generator=rng, **kind) - 0.5,
    )
    return DictionaryCode(W_dec, lambda x: ((x - b_dec) @ W_enc + b_enc).relu(), b_dec)


TOKEN_GROUPS = [name for name, group in known_groups().items() if group.reads_tokens]
# of a sum in float32, as the true samples are, the rounding depends on the batch
ROUNDING = {"known_truth": 1e-6}
TRUTH = SyntheticModelConfig(12, D, ZipfianFiringProbabilityConfig(0.5, 0.5, 0.2), seed=0)


class Some(SyntheticActivations):
    """Some of the samples."""

    def __init__(self, kept):
        super().__init__(TRUTH, N, hook_name="hook")
        self.kept = kept

    def read(self, hooks, start, stop):
        found = super().read(hooks, 0, N)
        return {hook: acts[self.kept][start:stop] for hook, acts in found.items()}

    def features(self, start, stop):
        return super().features(0, N)[self.kept][start:stop]


def source_of(name, x, kept=slice(None)):
    """Of tokens, with a truth for the group that compares with one."""
    return Some(kept) if name == "known_truth" else TensorActivations({"hook": x[kept]})


def result_of(name, code, x, cuts, shards, order):
    """What a group finds if tokens come in these batches, in this order, on several shards."""
    source = source_of(name, x)
    group = known_groups()[name]()
    bounds = sorted({0, N, *cuts})
    batches = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    batches = [batches[i % len(batches)] for i in np.argsort(order[: len(batches)])]
    parts = [group.start(code, source) for _ in range(shards)]
    for number, rows in enumerate(batches):
        parts[number % shards].add(code.read(x[rows], None, rows))
    for part in parts[1:]:
        parts[0].merge(part)
    return parts[0].finish()


@pytest.mark.parametrize("name", TOKEN_GROUPS)
@settings(max_examples=25)
@given(
    cuts=st.lists(st.integers(1, N - 1), max_size=9),
    shards=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_split_into_batches_and_shards_gives_the_same(name, code, x, cuts, shards, seed):
    whole = result_of(name, code, x, [], 1, np.array([0]))
    order = np.random.default_rng(seed).permutation(len({0, N, *cuts}) - 1)
    split = result_of(name, code, x, cuts, shards, order)
    assert list(split.summary) == list(whole.summary)
    slack = ROUNDING.get(name, 1e-9)
    assert split.summary == pytest.approx(whole.summary, rel=slack, abs=slack, nan_ok=True)
    for table in ("tokens", "features"):
        one, other = getattr(split, table), getattr(whole, table)
        assert (one is None) == (other is None)
        if one is not None:
            pd.testing.assert_frame_equal(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TOKEN_GROUPS)
def test_a_token_that_is_not_finite_counts_nowhere(name, code, x):
    bad = x.clone()
    bad[7], bad[30, 2] = torch.nan, torch.inf
    keep = torch.ones(N, dtype=torch.bool)
    keep[[7, 30]] = False
    found = result_of(name, code, bad, [20], 2, np.array([0, 1])).summary
    source = source_of(name, bad, keep)
    accumulator = known_groups()[name]().start(code, source)
    accumulator.add(code.read(bad[keep], None, slice(0, N - 2)))
    expected = accumulator.finish().summary
    found.pop("nonfinite_tokens", None), expected.pop("nonfinite_tokens", None)
    slack = ROUNDING.get(name, 1e-9)
    assert found == pytest.approx(expected, rel=slack, abs=slack, nan_ok=True)


def test_frequencies_by_counting(code, x):
    f = code.encode(x)
    result = result_of("frequencies", code, x, [13, 40], 2, np.array([2, 0, 1]))
    fired = [sum(float(f[t, i]) != 0 for t in range(N)) for i in range(H)]
    assert result.features["fired"].tolist() == fired
    assert result.summary == {
        "dead_features": sum(n == 0 for n in fired),
        "share_alive": sum(n > 0 for n in fired) / H,
        "share_above_1_percent": sum(n / N > 0.01 for n in fired) / H,
        "share_above_10_percent": sum(n / N > 0.1 for n in fired) / H,
    }


def test_names_of_groups_and_of_their_numbers_are_their_own(code, x):
    columns = [column.name for column in shown_columns()]
    assert len(set(columns)) == len(columns)
    summaries = [result_of(name, code, x, [], 1, np.array([0])).summary for name in TOKEN_GROUPS]
    names = [name for summary in summaries for name in summary]
    assert len(set(names)) == len(names)
    known = {name for name in names if name in columns}
    assert {column for column in columns if column.startswith("share_")} <= known
    for column in shown_columns():
        assert column.meaning.endswith(".")


# --- a group of somebody else ---


class _Largest(Accumulator):
    def __init__(self, at_least):
        self.at_least, self.found = at_least, {}

    def add(self, tokens):
        self.found[tokens.rows.start] = tokens.f.amax(-1).clamp(min=self.at_least)

    def merge(self, other):
        self.found.update(other.found)

    def finish(self):
        values = torch.cat([self.found[start] for start in sorted(self.found)])
        table = pd.DataFrame({"largest": values.numpy()})
        return GroupResult({"largest_mean": values.mean().item()}, table)


@dataclass(frozen=True)
class Largest(MetricGroup):
    """The largest feature of each token."""

    at_least: float = 0.0

    name: ClassVar[str] = "largest"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("largest_mean", "largest", "The largest feature, mean.", "{:.2f}!".format, 1, 1000),
    )

    def start(self, code, activations):
        return _Largest(self.at_least)


def test_a_new_group_is_evaluated_stored_and_shown(code, x, tmp_path):
    code.metadata = {"hook_name": "hook"}
    options = {"activations": TensorActivations({"hook": x}), "progress": False}
    results = evaluate_saes({"a": code}, groups=[Largest(0.5)], out=tmp_path, **options)
    expected = code.encode(x).amax(-1).clamp(min=0.5)
    assert results.summary.loc["a", "largest_mean"] == pytest.approx(expected.mean().item())
    loaded = AFAResults.load(tmp_path)
    np.testing.assert_allclose(loaded.tokens["largest"], expected)
    assert len(loaded.tokens.columns) == 1 + 1 + 16 + 1  # sae, sequence, the metric, the largest
    table = results_table(loaded)
    assert [str(c.header) for c in table.columns][:2] == ["SAE", "largest"]
    assert list(table.columns[1].cells) == [f"{expected.mean().item():.2f}!"]
    # its settings are its identity: with others it is evaluated again, beside what was there
    other = evaluate_saes({"a": code}, groups=[Largest(99.0)], out=tmp_path, **options)
    assert other.summary.loc["a", "largest_mean"] == 99
    assert len(list((tmp_path / "results").glob("*.largest.*"))) == 2


def test_a_group_that_fails_costs_only_itself(code, x, tmp_path):
    class Broken(_Largest):
        def finish(self):
            raise RuntimeError("no idea")

    @dataclass(frozen=True)
    class BrokenGroup(Largest):
        name: ClassVar[str] = "broken"
        columns: ClassVar[tuple[Column, ...]] = ()

        def start(self, code, activations):
            return Broken(0.0)

    code.metadata = {"hook_name": "hook"}
    options = {"activations": TensorActivations({"hook": x}), "progress": False, "out": tmp_path}
    results = evaluate_saes({"a": code}, groups=[BrokenGroup()], **options)
    assert results.metadata["refused"] == {"a (broken)": "RuntimeError: no idea"}
    assert results.summary.loc["a", "tokens"] == N
    again = evaluate_saes({"a": code}, **options)
    assert list(again.summary.index) == ["a"]


def test_the_metric_of_a_known_dictionary_is_the_oracles(code, x):
    code.metadata = {"hook_name": "hook"}
    results = evaluate_saes({"a": code}, activations=TensorActivations({"hook": x}), progress=False)
    expected = metrics_of_dictionary(x, code.encode(x), code.W_dec, code.b_dec)
    for name, values in expected.items():
        np.testing.assert_allclose(
            results.tokens[name].to_numpy(float), values.astype(float), rtol=2e-4, atol=1e-5,
            err_msg=name,
        )  # fmt: skip
    assert Site("hook").hooks == ["hook"]


def test_an_object_whose_code_is_not_known_is_evaluated_again(x, tmp_path):
    def l0(threshold):
        code = DictionaryCode(torch.eye(D), lambda x: torch.where(x > threshold, x, 0))
        code.metadata = {"hook_name": "hook"}
        source = TensorActivations({"hook": x})
        results = evaluate_saes({"a": code}, activations=source, out=tmp_path, progress=False)
        return results.summary.loc["a", "l0_mean"]

    for threshold in (0.0, 1.0):
        assert l0(threshold) == pytest.approx((x > threshold).sum(-1).double().mean().item())


def test_a_dictionary_of_another_precision_is_read(x):
    code = DictionaryCode(
        torch.eye(D, dtype=torch.bfloat16), lambda x: x.relu() @ torch.eye(D).bfloat16()
    )
    assert code.read(x).l0.tolist() == (x > 0).sum(-1).tolist()


def test_nobody_takes_the_name_of_one_of_ours():
    @dataclass(frozen=True)
    class Mine(Largest):
        name: ClassVar[str] = "afa"

    assert known_groups()["afa"].__module__ == "sae_afa_plugin.groups.afa"
    assert Mine is not known_groups()["afa"]


def test_results_without_text_make_a_page_and_figures(x, tmp_path):
    silent = DictionaryCode(torch.eye(D, dtype=torch.float64), torch.zeros_like)
    silent.metadata = {"hook_name": "hook"}
    results = evaluate_saes(
        {"silent": silent}, activations=TensorActivations({"hook": x}), progress=False
    )
    page = write_report(results, tmp_path).read_text()
    assert "Features have 0 % of the input" in page
    assert {file.name for file in save_plots(results, tmp_path)} >= {"zf.png", "energy.png"}
    with pytest.raises(ValueError, match="the results have no SAE 'loud': they have 'silent'"):
        results.tokens_of("loud")
    at_the_bias = DictionaryCode(torch.eye(D), torch.zeros_like, torch.ones(D))
    at_the_bias.metadata = {"hook_name": "hook"}
    ones = TensorActivations({"hook": torch.ones(5, D)})
    row = evaluate_saes({"a": at_the_bias}, activations=ones, progress=False).summary.loc["a"]
    assert energy_sentence(row).startswith("The energy budget is not defined")
