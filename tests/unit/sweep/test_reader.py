"""Configs of sweeps: what is read, and everything that is wrong with one at once."""

from __future__ import annotations

from contextlib import suppress

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sae_afa_plugin.sweep.grid import matched, members
from sae_afa_plugin.sweep.reader import SHIPPED, load_sweep, parse_sweep
from sae_afa_plugin.sweep.source_lines import Lines, Mistakes

GOOD = """
model: sae-afa-demo
hooks: [a, b]
training: {dataset: embedded-train}
heldout: {dataset: embedded, n_tokens: 100}
seeds: [0, 1]
d_sae: 64
steps: 5
trainer: {train_batch_size_samples: 16, lr: 1e-3}
defaults: {normalize_activations: layer_norm}
saes:
  - {architecture: topafa, afa_coefficient: [1/128, 1/32]}
  - {architecture: topk, k: 8}
"""


def mistakes(text):
    with pytest.raises(Mistakes) as caught:
        parse_sweep(text, "x.yaml")
    return caught.value.lines


def test_ten_mistakes_are_ten_sentences():
    bad = """modle: gpt2
hooks: a
seeds: [0, 0]
d_sae: many
training: {dataset: a, n_tokns: 5}
trainer: {lr: fast, device: cuda}
saes:
  - {architecture: topkk, k: 5}
  - {architecture: topk, kk: 5}
  - {architecture: topafa, control: random}
  - {k: 5}
"""
    assert mistakes(bad) == [
        "line 1: modle: there is no 'modle': did you mean model?",
        "line 3: seeds[1]: 0 is there twice",
        "line 4: d_sae: must be a whole number, not below 0: got 'many'",
        "line 5: training.n_tokns: there is no 'n_tokns': did you mean n_tokens?",
        "line 6: trainer.device: is decided by the sweep (steps, device, checkpoints): leave it out",
        "line 6: trainer.lr: must be float: got 'fast'",
        "line 8: saes[0].architecture: there is no 'topkk': did you mean topk or abstopk?",
        "line 9: saes[1].kk: there is no 'kk': did you mean k?",
        "line 10: saes[2].control: there is no 'random': known are frozen_decoder, untrained",
        "line 11: saes[3]: names no architecture, like 'architecture: topk'",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("model: sae-afa-demo", "synthetic: {}"), "belongs to a language model, not to a synth"),
        (("model: sae-afa-demo", ""), "name a model, or a synthetic world, or recordings"),
        (("embedded,", "embedded-train,"), "must be other text than that of training"),
        (("steps: 5", "steps: 0"), "steps must be at least 1: got 0"),
        (("lr: 1e-3", "lr: -1.0"), "lr must not be negative: got -1.0"),
        (("k: 8", "k: [8, 0]"), "saes[1].k[1]: must be more than 0: got 0"),
        (("k: 8", "k: 8, hooks: [c]"), "there is no 'c': known are a, b"),
        (("topk, k: 8", "truth"), "the truth is known of a synthetic world alone"),
        (("topk, k: 8", "pca"), "pca needs k, the number of directions"),
        (("topk, k: 8", "pca, k: 8, control: untrained"), "pca is a control itself"),
        (("d_sae: 64", ""), "d_sae is said neither here nor for all"),
        (("topk, k: 8", "matryoshka_batchtopk"), "matryoshka_widths must not be empty"),
        (
            ("topk, k: 8", "matryoshka_batchtopk, matryoshka_widths: [[8, 80, 64]]"),
            "saes[1]: matryoshka_widths must be strictly increasing",
        ),
        (("1/128", "-1.0"), "afa_coefficient must not be negative: got -1.0"),
        (("saes:", "match_l0: [standard]\nsaes:"), "standard cannot be told an L0"),
        (("saes:", "match_l0: [{architecture: topk, k: 3}]\nsaes:"), "is what is matched"),
        (("saes:", "match_l0: [{architecture: topk, match_l0: false}]\nsaes:"), "leave them out"),
        (("k: 8", "k: 8, match_l0: 1"), "saes[1].match_l0: must be bool: got 1"),
        (("1e-3}", "1e-3, total_training_samples: 3}"), "is decided by the sweep"),
        (("layer_norm", "layernorm"), "normalize_activations"),
        (("saes:", "measure: {core_token: 1}\nsaes:"), "did you mean core_tokens?"),
    ],
)
def test_what_does_not_fit_is_said_with_its_line(change, said):
    text = GOOD.replace(*change, 1)
    assert text != GOOD
    found = mistakes(text)
    assert any(said in line for line in found), found
    assert all(line.startswith("line ") for line in found)


@pytest.mark.parametrize("name", SHIPPED)
def test_configs_that_come_with_the_package_are_right(name):
    sweep = load_sweep(f"{name}.yaml")
    found = members(sweep, "synthetic" if sweep.synthetic else None)
    assert len({member.name for member in found}) == len(found)
    trained = [member for member in found if member.row.is_trained and not member.row.control]
    if name in ("demo", "paper"):  # the paper's table: 23 settings at three hooks
        assert len(trained) == 23 * 3 * len(sweep.seeds)
        assert len({member.setting for member in trained}) == 23


def test_a_grid_is_every_point_once_and_names_do_not_depend_on_other_rows():
    sweep = parse_sweep(GOOD)
    found = members(sweep)
    assert len(found) == 3 * 2 * 2
    assert found[0].name == "topafa_afa-coefficient=0.007812_d-sae=64_a_seed=0"
    assert [m.chooses_l0 for m in found] == [True] * 8 + [False] * 4
    assert {m.family for m in found} == {"topafa d_sae=64", "topk d_sae=64"}
    more = members(parse_sweep(GOOD + "  - {architecture: topk, k: [8, 16]}\n"))
    assert [m.name for m in more[: len(found)]] == [m.name for m in found]
    assert len(more) == len(found) + 4  # k=8 is there already
    training = found[0].training(sweep, 16, "cpu")
    assert (training.steps, training.batch_size, training.seed) == (5, 16, 0)
    assert training.trainer.lr == 1e-3
    assert training.sae.normalize_activations == "layer_norm"


def test_what_is_told_the_l0_of_others():
    sweep = parse_sweep(
        GOOD.replace("saes:", "match_l0: [topk, {architecture: jumprelu, hooks: [b]}]\nsaes:")
    )
    one, two = (next(m for m in members(sweep) if m.hook == hook) for hook in "ab")
    pairs = matched(sweep, [(one, 20.4), (two, 0.2)])
    assert [(a.hook, b.row.architecture, b.options.get("k"), b.options.get("target_l0"))
            for a, b in pairs] == [
        ("a", "topk", 20, None), ("b", "topk", 1, None), ("b", "jumprelu", None, 1.0),
    ]  # fmt: skip
    assert all(b.seed == a.seed and b.options["d_sae"] == 64 for a, b in pairs)


def test_a_row_can_be_left_out_of_the_matching():
    rows = "saes:\n  - {architecture: standard, match_l0: false}"
    found = members(parse_sweep(GOOD.replace("saes:", rows)))
    matched_ones = {m.row.architecture for m in found if m.is_matched}
    assert {m.row.architecture for m in found if m.chooses_l0} == {"standard", "topafa"}
    assert matched_ones == {"topafa"}
    told = [m for m in found if m.row.architecture == "standard"]
    assert [m.name for m in told] == [
        f"standard_d-sae=64_{hook}_seed={seed}" for hook in "ab" for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2", "it is no YAML"),
        ("- 1", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("a: &a [1, *a]", "it is no YAML"),
        ("a: !!python/object/apply:os.system [echo]", "it is no YAML"),
        ("a: 1\na: 2", "line 2: a: is there twice"),
        ("a0: &a0 [1,1,1,1,1,1,1,1]\n" + "".join(
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)
        ), "values or more"),
    ],
)  # fmt: skip
def test_what_is_no_config_is_one_sentence(text, said):
    with pytest.raises(ValueError, match=said):
        Lines(text, "x.yaml")


KEYS = [*GOOD.replace(":", " ").split(), "match_l0", "measure", "synthetic", "memory", "device"]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(KEYS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=6))
def test_whatever_it_holds_it_is_read_or_refused_in_sentences(content):
    text = yaml.safe_dump({**yaml.safe_load(GOOD), **content})
    with suppress(ValueError):  # nothing else
        parse_sweep(text)
