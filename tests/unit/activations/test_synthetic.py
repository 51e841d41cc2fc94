"""Samples of synthetic models: the same bits in any range, with the truth that made them."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.synthetic import (
    ActivationGenerator,
    FoldedNormalMagnitudeConfig,
    LinearMagnitudeConfig,
    OrthogonalizationConfig,
    SyntheticModel,
)
from safetensors.torch import load_file, save_file

from sae_afa_plugin.activations.synthetic import (
    HIERARCHY_WORLD,
    SMALL_WORLD,
    SYNTH_SAE_BENCH_16K,
    SyntheticActivations,
    built_model,
)
from sae_afa_plugin.files import NotWrittenError

N, HOOK = 2600, "synthetic"  # two blocks and a half
WORLDS = {"small": SMALL_WORLD, "hierarchy": HIERARCHY_WORLD}
# one that is kept, since its directions are made nearly orthogonal
SLOW = replace(HIERARCHY_WORLD, orthogonalization=OrthogonalizationConfig(num_steps=3))


@pytest.fixture(autouse=True)
def no_cache_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def x_of(source, start=0, stop=N):
    return source.read([HOOK], start, stop)[HOOK]


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    """A source, and the same samples drawn with SAELens alone, one block after the other."""
    cfg = WORLDS[request.param]
    model, expected = SyntheticModel(cfg), []
    for block in range(3):
        state = np.random.SeedSequence([5, block]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))
        expected.append(model.sample_with_features(1024))
    x, features = (torch.cat(parts)[:N] for parts in zip(*expected, strict=True))
    return SyntheticActivations(cfg, N, seed=5), x, features


@settings(max_examples=60)
@given(ends=st.tuples(st.integers(0, N - 1), st.integers(0, N - 1)), features_first=st.booleans())
def test_any_range_gives_the_same_bits(world, ends, features_first):
    source, x, features = world
    start, stop = min(ends), max(ends) + 1
    if features_first:
        assert torch.equal(source.features(start, stop), features[start:stop])
    found = x_of(source, start, stop)
    # those of a source that has read nothing else
    assert torch.equal(found, x_of(SyntheticActivations(source._model, N, 5), start, stop))
    torch.testing.assert_close(found, x[start:stop], rtol=1e-5, atol=1e-5)
    assert torch.equal(source.features(start, stop), features[start:stop])


def test_noise_is_added_to_the_same_samples():
    plain, noisy = (SyntheticActivations(SMALL_WORLD, N, seed=5, noise=s) for s in (0.0, 0.3))
    assert torch.equal(plain.features(0, N), noisy.features(0, N))
    noise = x_of(noisy) - x_of(plain)
    assert noise.std().item() == pytest.approx(0.3, rel=0.01)
    assert noise.mean().abs() < 0.005
    # independent of the sample, of the dimension and of the block
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.12
    assert (noise[:1024] * noise[1024:2048]).mean().abs() < 0.005
    assert torch.equal(x_of(noisy, 1500, 1600), x_of(noisy)[1500:1600])
    assert "noise" not in plain.settings  # as before there was any
    assert noisy.settings["noise"] == 0.3
    with pytest.raises(ValueError, match="noise must not be negative: got -1"):
        SyntheticActivations(SMALL_WORLD, N, noise=-1)


def test_blocks_that_were_forgotten_are_drawn_again(monkeypatch):
    monkeypatch.setattr("sae_afa_plugin.activations.synthetic._LARGEST_BLOCK", 16)
    monkeypatch.setattr("sae_afa_plugin.activations.synthetic._KEPT", 16)
    source = SyntheticActivations(HIERARCHY_WORLD, 500)
    first = x_of(source, 0, 500)
    for start, stop in ((480, 500), (0, 10), (10, 300), (7, 9), (0, 500)):
        assert torch.equal(x_of(source, start, stop), first[start:stop])


def test_places_shapes_and_ranges(world):
    source = world[0]
    assert source.n_tokens == len(source.places) == N
    assert list(source.places) == ["sequence"]
    assert source.hook_names() == [HOOK]
    assert source.shapes([HOOK, "elsewhere"]) == {HOOK: torch.Size([96])}
    assert source.features(0, 3).shape == (3, 192)
    assert not x_of(source).requires_grad
    for start, stop in ((0, N + 1), (5, 5), (-1, 3)):
        with pytest.raises(ValueError, match="there are samples 0 to 2600: got"):
            source.read([HOOK], start, stop)


def test_the_random_states_of_the_process_are_left_alone(tmp_path):
    SyntheticModel(SLOW).save(tmp_path / "saved")
    np.random.seed(0), random.seed(0), torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for model in (HIERARCHY_WORLD, SLOW, tmp_path / "saved"):
        x_of(SyntheticActivations(model, 100), 0, 100)
    built_model(SLOW, tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_what_decides_the_numbers_is_in_the_settings():
    source = SyntheticActivations(SMALL_WORLD, 50)
    assert json.loads(json.dumps(source.settings)) == source.settings
    assert source.identity == SyntheticActivations(SMALL_WORLD, 50).identity
    changed = SyntheticModel(SMALL_WORLD)
    with torch.no_grad():  # the last element of the last row
        changed.feature_dict.feature_vectors[-1, -1] += 1e-4
    others = [
        SyntheticActivations(SMALL_WORLD, 50, seed=1),
        SyntheticActivations(SMALL_WORLD, 51),
        SyntheticActivations(SMALL_WORLD, 50, hook_name="elsewhere"),
        SyntheticActivations(replace(SMALL_WORLD, seed=1), 50),
        SyntheticActivations(changed, 50),
        SyntheticActivations(HIERARCHY_WORLD, 50),
    ]
    assert len({source.identity, *(other.identity for other in others)}) == 7
    # held out from what is trained on
    assert not torch.equal(x_of(source, 0, 50), x_of(others[0], 0, 50))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_tokens": 0}, "n_tokens must be at least 1: got 0"),
        ({"n_tokens": 2.5}, "n_tokens must be a whole number: got 2.5"),
        ({"n_tokens": True}, "n_tokens must be a whole number: got True"),
        ({"n_tokens": 9, "seed": -1}, "seed must not be negative: got -1"),
        ({"n_tokens": 9, "seed": None}, "seed must be a whole number: got None"),
        ({"n_tokens": 9, "hook_name": ""}, "hook_name must be text: got ''"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticActivations(SMALL_WORLD, **arguments)


def _in_double_precision():
    return SyntheticModel(replace(SMALL_WORLD, dtype="float64"))


def _with_a_function():
    generator = ActivationGenerator(192, 0.1, modify_activations=lambda acts: acts * 2)
    return SyntheticModel(SMALL_WORLD, activation_generator=generator)


def _infinite():
    return SyntheticModel(replace(SMALL_WORLD, mean_firing_magnitudes=float("inf")))


def _too_probable():
    generator = ActivationGenerator(192, 1.5)
    return SyntheticModel(SMALL_WORLD, activation_generator=generator)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_in_double_precision, "in float32 and on the CPU.*firing_probabilities is in float64 on"),
        (_with_a_function, "changes its samples by a function"),
        (
            _infinite,
            "mean_firing_magnitudes of the synthetic model has numbers that are not finite",
        ),
        (_too_probable, "firing_probabilities of the synthetic model must be between 0 and 1"),
    ],
)
def test_models_whose_samples_cannot_be_known_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        SyntheticActivations(make(), 10)


def test_sparse_samples_are_read_and_are_others():
    model = SyntheticModel(HIERARCHY_WORLD)
    model.use_sparse_tensors = True
    source = SyntheticActivations(model, 100)
    x, features = x_of(source, 0, 100), source.features(0, 100)
    truth = source.dictionary
    torch.testing.assert_close(x, features @ truth.feature_vectors.detach() + truth.bias.detach())
    assert source.identity != SyntheticActivations(HIERARCHY_WORLD, 100).identity


# --- the worlds ---


def test_the_small_world_is_as_it_says():
    features = SyntheticActivations(SMALL_WORLD, 20_000).features(0, 20_000)
    on = features > 0
    assert on.sum(-1).double().mean().item() == pytest.approx(5.806, abs=0.06)
    ranks = np.arange(1, 193) ** -0.5
    p = 0.01 + 0.29 * (ranks - ranks[-1]) / (1 - ranks[-1])
    np.testing.assert_allclose(on.double().mean(0), p, atol=5 * (0.25 / 20_000) ** 0.5)
    assert features[on].mean().item() == pytest.approx(1, abs=0.01)
    assert features[on].std().item() == pytest.approx(0.2, abs=0.01)


def test_the_world_with_a_hierarchy_is_as_it_says():
    source = SyntheticActivations(HIERARCHY_WORLD, 20_000)
    on = source.features(0, 20_000) > 0
    assert 5 < on.sum(-1).double().mean() < 8
    exclusive = 0

    def look(node):
        nonlocal exclusive
        for child in node.children:
            assert not (on[:, child.feature_index] & ~on[:, node.feature_index]).any()
            look(child)
        if node.mutually_exclusive_children:
            exclusive += 1
            assert on[:, [child.feature_index for child in node.children]].sum(-1).max() <= 1

    for root in source._model.hierarchy.roots:
        look(root)
    assert exclusive == (12 + 36) // 2
    # what their common factors say, between features that have no tree
    factor = source._model.correlation_matrix.correlation_factor[156:].double()
    expected = (factor @ factor.T).numpy()[np.triu_indices(36, 1)]
    found = np.corrcoef(on[:, 156:].T.numpy())[np.triu_indices(36, 1)]
    assert np.corrcoef(expected, found)[0, 1] > 0.5


def test_the_large_world_has_the_published_number_of_active_features():
    cfg = replace(SYNTH_SAE_BENCH_16K, orthogonalization=None)  # which takes over an hour
    features = SyntheticActivations(cfg, 1024).features(0, 1024)
    assert features.count_nonzero(-1).double().mean().item() == pytest.approx(34.5, abs=1.5)


# --- saved models ---


@pytest.mark.parametrize("cfg", [SMALL_WORLD, HIERARCHY_WORLD, SLOW])
def test_a_saved_model_gives_the_same_bits(cfg, tmp_path):
    model = SyntheticModel(cfg)
    model.save(tmp_path)
    torch.manual_seed(99)
    built, saved = SyntheticActivations(model, 300), SyntheticActivations(tmp_path, 300)
    assert torch.equal(x_of(built, 0, 300), x_of(saved, 0, 300))
    assert torch.equal(built.features(0, 300), saved.features(0, 300))
    assert built.identity == saved.identity


def test_a_saved_model_without_a_seed_is_the_same_every_time(tmp_path):
    cfg = replace(HIERARCHY_WORLD, seed=None)
    SyntheticModel(cfg).save(tmp_path)
    one, other = SyntheticActivations(tmp_path, 9), SyntheticActivations(str(tmp_path), 9)
    assert one.identity == other.identity
    assert torch.equal(x_of(one, 0, 9), x_of(other, 0, 9))
    with pytest.raises(ValueError, match="seed=None, so its model cannot be made again: set a"):
        built_model(cfg)


def edit(name, **fields):
    def damage(folder):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return damage


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def weights(**tensors):
    def damage(folder):
        file = folder / "synthetic_model.safetensors"
        save_file({**load_file(file), **tensors}, file)

    return damage


CONFIG, WEIGHTS = "synthetic_model_config.json", "synthetic_model.safetensors"
HUGE = 10**12
DAMAGES = [
    (lambda folder: (folder / CONFIG).unlink(), "No such file"),
    (lambda folder: (folder / WEIGHTS).unlink(), "No such file"),
    (put(CONFIG, b"{"), "Expecting property name"),
    (put(CONFIG, b"[]"), "must be an object of JSON"),
    (put(CONFIG, b"[" * 200_000), "brackets in brackets"),
    (put(CONFIG, b"\xff\xfe"), "decode"),
    (put(CONFIG, b"{}"), "KeyError: 'firing_probability'"),
    (
        edit(CONFIG, num_features=HUGE),
        r"feature_vectors has shape \[192, 96\], and its config asks",
    ),
    (edit(CONFIG, num_features="many"), "TypeError"),
    (edit(CONFIG, num_features=0), "num_features must be at least 1"),
    (edit(CONFIG, hidden_dim=HUGE), "feature_vectors has shape"),
    (edit(CONFIG, correlation={"rank": HUGE, "correlation_scale": 1.0}), "correlation_factor has"),
    (edit(CONFIG, firing_probability={"generator_name": "magic"}), "magic"),
    (edit(CONFIG, seed="one"), "invalid literal for int"),
    (edit(CONFIG, dtype="float64"), "in float32 and on the CPU"),
    (edit(CONFIG, std_firing_magnitudes=float("nan")), "std_firing_magnitudes .* not finite"),
    (edit(CONFIG, somebody="else"), "unexpected keyword argument 'somebody'"),
    (put(WEIGHTS, b"12345678"), "SafetensorError"),
    (lambda f: put(WEIGHTS, (f / WEIGHTS).read_bytes()[:-8])(f), "SafetensorError"),
    (weights(bias=torch.zeros(3)), r"bias has shape \[3\]"),
    (weights(bias=torch.full([96], torch.nan)), "bias of the synthetic model has numbers"),
    (weights(bias=torch.zeros(96, dtype=torch.float16)), "in float32 and on the CPU"),
    (weights(firing_probabilities=torch.full([192], -0.1)), "must be between 0 and 1"),
    (weights(correlation_diag=torch.zeros(192)), "must have all positive values"),
    (put("hierarchy.json", b'{"roots": 3}'), "TypeError"),
    (put("hierarchy.json", b'{"roots": [3]}'), "AttributeError"),
    (put("hierarchy.json", b'{"roots": [{"feature_index": 999999999999}]}'), "a feature 9999"),
    (put("hierarchy.json", b'{"roots": [{"feature_index": -1}]}'), "has a feature -1 of 192"),
    (put("hierarchy.json", b'{"roots": [{"feature_index": 1.0}]}'), "has a feature 1.0 of 192"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_folder_is_one_sentence(tmp_path, damage, message):
    SyntheticModel(HIERARCHY_WORLD).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        SyntheticActivations(tmp_path, 10)
    said = str(error.value)
    assert said.startswith(
        f"the folder {str(tmp_path)!r} holds no synthetic model that can be read"
    )
    assert said.endswith("write it with SyntheticModel.save")
    assert "\n" not in said


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, "hierarchy.json"])
def test_bytes_that_were_changed_make_a_sentence_or_another_model(tmp_path, file):
    SyntheticModel(HIERARCHY_WORLD).save(tmp_path)
    before, whole = SyntheticActivations(tmp_path, 10), (tmp_path / file).read_bytes()
    rng, said = random.Random(0), []
    for _ in range(25):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        (tmp_path / file).write_bytes(content)
        try:
            found = SyntheticActivations(tmp_path, 10)
        except ValueError as error:
            said.append(str(error))
        else:
            same = torch.equal(x_of(found, 0, 10), x_of(before, 0, 10))
            assert same or found.identity != before.identity
    assert all("holds no synthetic model that can be read" in sentence for sentence in said)


# --- models that are kept ---


def kept(cache):
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_a_model_that_takes_long_is_made_once(tmp_path):
    cache = tmp_path / "cache"
    built = built_model(SLOW, cache)
    (folder,) = kept(cache)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = built_model(SLOW, cache)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    for source in (built, again, SyntheticModel(SLOW)):
        one, other = SyntheticActivations(source, 200), SyntheticActivations(built, 200)
        assert torch.equal(x_of(one, 0, 200), x_of(other, 0, 200))
        assert one.identity == other.identity
    built_model(replace(SLOW, seed=8), cache)
    assert len(kept(cache)) == 2
    SyntheticActivations(SLOW, 5)
    assert len(kept(tmp_path / "home" / "sae-afa-plugin" / "synthetic")) == 1
    assert built_model(SMALL_WORLD, tmp_path / "none").cfg is SMALL_WORLD
    assert not (tmp_path / "none").exists()  # made in a moment


@pytest.mark.parametrize(
    "damage",
    [
        *(damage for damage, _ in DAMAGES[:8]),
        weights(bias=torch.zeros(96)),  # sound, but not what was kept
        edit(CONFIG, seed=1),
        edit("content.json", content="0123456789abcdef"),
        put("content.json", b""),
    ],
)
def test_a_model_that_was_damaged_is_made_again(tmp_path, damage):
    cfg = replace(
        SLOW,
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(0.2, 0.1),
        mean_firing_magnitudes=LinearMagnitudeConfig(2.0, 1.0),
    )
    source = SyntheticActivations(built_model(cfg, tmp_path), 20)
    (folder,) = kept(tmp_path)
    damage(folder)
    again = SyntheticActivations(built_model(cfg, tmp_path), 20)
    assert again.identity == source.identity
    mended = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    built_model(cfg, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == mended


def test_whoever_comes_second_waits_for_the_first(tmp_path):
    built_model(SLOW, tmp_path / "first")
    (made,) = kept(tmp_path / "first")
    cache, found = tmp_path / "cache", []
    cache.mkdir()
    with FileLock(cache / f"{made.name}.lock"):  # as the first does
        second = threading.Thread(target=lambda: found.append(built_model(SLOW, cache)))
        second.start()
        time.sleep(0.3)
        assert second.is_alive()
        made.rename(cache / made.name)
        before = (cache / made.name / WEIGHTS).stat().st_mtime_ns
    second.join(30)
    assert len(found) == 1
    assert (cache / made.name / WEIGHTS).stat().st_mtime_ns == before


def test_a_cache_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(SyntheticModel, "__init__", lambda *_: pytest.fail("it was built"))
    with pytest.raises(NotWrittenError, match=r"could not be written in .*file"):
        built_model(SLOW, tmp_path / "file")
