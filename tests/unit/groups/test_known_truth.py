"""SAEs against a known truth: by counting, by SAELens's own evaluation, and the truth itself."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.afa_oracle import metrics_of_dictionary
from sae_lens import (
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.synthetic import (
    SyntheticModel,
    eval_sae_on_synthetic_data,
    init_sae_to_match_feature_dict,
)

from sae_afa_plugin import evaluate_saes
from sae_afa_plugin.activations.recording import record
from sae_afa_plugin.activations.synthetic import (
    HIERARCHY_WORLD,
    SMALL_WORLD,
    SyntheticActivations,
)
from sae_afa_plugin.activations.tensors import TensorActivations
from sae_afa_plugin.groups.known_truth import KnownTruth, TrueCode
from sae_afa_plugin.report import write_report
from sae_afa_plugin.spaces import DictionaryCode, linear_code
from sae_afa_plugin.tables import results_table
from sae_afa_plugin.training.coordinator import train_saes
from sae_afa_plugin.training.run import SAETraining

N = 2500


@pytest.fixture(scope="module")
def source():
    return SyntheticActivations(HIERARCHY_WORLD, N, seed=1)


def sae_near(source, noise, d_sae=192, **fields):
    """An SAE whose directions are those of the truth, but for noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        sae = StandardSAE(StandardSAEConfig(d_in=96, d_sae=d_sae, **fields))
        init_sae_to_match_feature_dict(sae, source.dictionary, noise)
    with torch.no_grad():
        sae.b_dec[:], sae.b_enc[:] = source.dictionary.bias, -0.3
    sae.cfg.metadata.hook_name = source.hook_name
    return sae


def row_of(sae, source, **options):
    results = evaluate_saes(
        {"a": sae}, activations=source, groups=[KnownTruth()], progress=False, **options
    )
    assert results.metadata["refused"] == {}
    return results.summary.loc["a"]


class Replayed:
    """An activation generator that gives the samples of a source, in their order."""

    def __init__(self, source):
        self._source, self._next = source, 0

    def sample(self, n):
        self._next += n
        return self._source.features(self._next - n, self._next)


@pytest.mark.parametrize("noise", [0.02, 0.15])
def test_it_is_what_saelens_finds_on_the_same_samples(source, noise):
    sae = sae_near(source, noise)
    row = row_of(sae, source)
    expected = eval_sae_on_synthetic_data(sae, source.dictionary, Replayed(source), N)
    assert row["f1"] == pytest.approx(expected.classification.f1_score, rel=1e-5)
    for name in ("precision", "recall", "accuracy"):
        assert row[name] == pytest.approx(getattr(expected.classification, name), rel=1e-5)
    assert row["mcc"] == pytest.approx(expected.mcc, rel=1e-6)
    assert row["uniqueness"] == pytest.approx(expected.uniqueness)
    assert row["true_l0_mean"] == pytest.approx(expected.true_l0, rel=1e-6)
    assert row["l0_mean"] == pytest.approx(expected.sae_l0, rel=1e-5)
    assert 0.05 < row["f1"] < 0.999


def test_it_is_what_counting_finds(source):
    sae = sae_near(source, 0.1)
    row = row_of(sae, source)
    x = source.read([source.hook_name], 0, N)[source.hook_name]
    on = (sae.encode(x) != 0).numpy()
    true = source.features(0, N).numpy() > 0
    W, truth = (
        (m / np.linalg.norm(m, axis=1, keepdims=True))
        for m in (sae.W_dec.detach().numpy(), source.dictionary.feature_vectors.detach().numpy())
    )
    nearest = np.abs(W @ truth.T).argmax(1)
    scores = []
    for latent, feature in enumerate(nearest):
        both = (on[:, latent] & true[:, feature]).sum()
        precision = both / on[:, latent].sum() if on[:, latent].any() else 0.0
        recall = both / true[:, feature].sum() if true[:, feature].any() else 0.0
        f1 = 2 * precision * recall / (precision + recall) if both else 0.0
        scores.append((precision, recall, f1, (on[:, latent] == true[:, feature]).mean()))
    found = row[["precision", "recall", "f1", "accuracy"]].to_numpy(float)
    np.testing.assert_allclose(found, np.mean(scores, 0), rtol=1e-5)
    assert row["uniqueness"] == len(set(nearest)) / 192
    assert row["true_l0_mean"] == pytest.approx(true.sum(1).mean())
    assert row["l0_correlation"] == pytest.approx(np.corrcoef(on.sum(1), true.sum(1))[0, 1])


def test_known_errors_give_known_scores():
    """Four features along four axes, so that what fires when can be read from x."""
    model = SyntheticModel(replace(SMALL_WORLD, num_features=4, hidden_dim=4, bias=False))
    model.feature_dict.feature_vectors.data = torch.eye(4)
    source = SyntheticActivations(model, 600)
    W_dec = torch.eye(4)[[0, 1, 1, 2, 3]]
    W_dec[3] = -2 * W_dec[3]  # neither sign nor length count
    W_dec[4, :2] = 1  # at 1 / sqrt(3) to three axes: the first of them is its nearest

    def encode(x):
        on = x > 0
        often = on[:, 0] | on[:, 1]
        never = torch.zeros_like(often)
        return torch.stack([on[:, 0], often, never, on[:, 2] & on[:, 0], ~on[:, 0]], 1).float()

    code = DictionaryCode(W_dec, encode)
    code.metadata = {"hook_name": "synthetic"}
    row = row_of(code, source)
    on = (source.features(0, 600) > 0).double()
    p = on.mean(0)
    p01, p20 = (on[:, 0] * on[:, 1]).mean(), (on[:, 2] * on[:, 0]).mean()
    precision = [1, p[1] / (p[0] + p[1] - p01), 0, 1, 0]
    recall = [1, 1, 0, p20 / p[2], 0]
    agree = [1, 1 - (p[0] - p01), 1 - p[1], 1 - (p[2] - p20), 0]
    f1 = [2 * a * b / (a + b) if a and b else 0 for a, b in zip(precision, recall, strict=True)]
    for name, values in zip(
        ("precision", "recall", "f1", "accuracy"), (precision, recall, f1, agree), strict=True
    ):
        assert row[name] == pytest.approx(sum(map(float, values)) / 5, rel=1e-5), name
    assert row["mcc"] == pytest.approx((3 + 1 / math.sqrt(3)) / 4)
    assert row["uniqueness"] == 3 / 5


def test_the_truth_is_a_row_of_its_own(source, tmp_path):
    saes = {"truth": TrueCode(source), "near": sae_near(source, 0.1)}
    results = evaluate_saes(
        saes, activations=source, groups=[KnownTruth()], progress=False, out=tmp_path / "out"
    )
    truth, near = results.summary.loc["truth"], results.summary.loc["near"]
    for name in ("f1", "precision", "recall", "accuracy", "mcc", "l0_correlation"):
        assert truth[name] == pytest.approx(1, abs=1e-6), name
        assert near[name] < 0.999, name
    assert truth["uniqueness"] == 1
    assert truth["l0_mean"] == truth["true_l0_mean"] == near["true_l0_mean"]
    # what stands beside the SAE's own is the truth's row
    names = [name for name in results.summary if name.startswith("truth_")]
    assert len(names) == 7
    for name in names:
        assert truth[name] == near[name] == truth[name.removeprefix("truth_")]
    x = source.read(["synthetic"], 0, N)["synthetic"]
    W_dec, b = (t.detach() for t in (source.dictionary.feature_vectors, source.dictionary.bias))
    expected = metrics_of_dictionary(x, source.features(0, N), W_dec, b)
    for name in ("interference", "epsilon_lbo"):
        median = np.nanmedian(expected[name].astype(float))
        assert near[f"truth_{name}_median"] == pytest.approx(median, rel=1e-4)
    shares = [near[f"truth_share_{s}_mean"] for s in ("features", "interference")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert near["truth_share_unexplained_mean"] == pytest.approx(0, abs=1e-9)
    headings = [str(column.header) for column in results_table(results).columns]
    assert {"F1", "MCC", "true\nL0"} <= set(headings)
    assert "true features on the true dictionary" in write_report(results, tmp_path).read_text()


def test_other_samples_than_its_own_have_no_truth(source):
    truth = TrueCode(source)
    options = {"groups": [KnownTruth()], "progress": False}
    for other in (
        SyntheticActivations(HIERARCHY_WORLD, N, seed=2),
        SyntheticActivations(SMALL_WORLD, N, seed=1),
        TensorActivations({"synthetic": torch.randn(50, 96)}),
    ):
        with pytest.raises(ValueError, match="not the samples whose truth is known: evaluate it"):
            evaluate_saes({"truth": truth}, activations=other, **options)
    x = source.read(["synthetic"], 5, 9)["synthetic"]
    assert torch.equal(truth.read(x, rows=slice(5, 9)).f, source.features(5, 9))
    assert linear_code(truth) is truth
    for rows in (slice(0), slice(4, 8)):
        with pytest.raises(ValueError, match="not the samples whose truth is known"):
            truth.read(x, rows=rows)
    with pytest.raises(ValueError, match="belong to samples, not to activations: use read"):
        truth.encode(x)


def test_recorded_samples_keep_their_truth_as_a_row(source, tmp_path):
    recorded = record(source, ["synthetic"], tmp_path / "all")
    results = evaluate_saes({"truth": TrueCode(source)}, activations=recorded, progress=False)
    assert results.summary.loc["truth", "nmse_mean"] < 1e-9


def test_a_constant_number_of_features_has_no_correlation(source):
    sae = TopKSAE(TopKSAEConfig(d_in=96, d_sae=192, k=4))
    sae.cfg.metadata.hook_name = "synthetic"
    with torch.no_grad():
        sae.b_enc += 100
    row = row_of(sae, source)
    assert row["l0_q05"] == row["l0_q95"] == 4
    assert math.isnan(row["l0_correlation"])


def test_standardising_takes_one_direction_away(source):
    """A perfect SAE of standardised activations has the true directions less their mean."""
    sae = sae_near(source, 0.0, normalize_activations="layer_norm")
    true = source.dictionary.feature_vectors.detach()
    with torch.no_grad():
        sae.W_dec[:] = true - true.mean(-1, keepdim=True)
    row = row_of(sae, source)
    left = (1 - 96 * true.double().mean(-1) ** 2).sqrt()
    assert row["mcc"] == pytest.approx(left.mean().item(), rel=1e-6)
    assert row["mcc"] == pytest.approx(1 - 1 / (2 * 96), abs=1e-3)
    assert row["uniqueness"] == 1


def test_activations_without_a_truth_are_evaluated_without_it(source, capsys):
    x = source.read(["synthetic"], 0, 300)["synthetic"]
    results = evaluate_saes(
        {"a": sae_near(source, 0.1)}, activations=TensorActivations({"synthetic": x}),
        groups=[KnownTruth()],
    )  # fmt: skip
    assert "mcc" not in results.summary
    assert results.summary.loc["a", "tokens"] == 300
    assert "a: no known_truth: these activations come without a truth" in capsys.readouterr().out


def test_other_seeds_do_not_mix(source, tmp_path):
    sae = sae_near(source, 0.1)
    before = row_of(sae, source, out=tmp_path)
    assert row_of(sae, SyntheticActivations(HIERARCHY_WORLD, N, 1), out=tmp_path).equals(before)
    with pytest.raises(ValueError, match="holds results of other settings .seed was 1 and is 2"):
        row_of(sae, SyntheticActivations(HIERARCHY_WORLD, N, 2), out=tmp_path)


def test_what_is_trained_on_one_seed_is_compared_on_another(tmp_path):
    """Directions at random reach an MCC of .28 here."""
    training = SAETraining(
        TopKTrainingSAEConfig(d_in=96, d_sae=192, k=6), "synthetic",
        SAETrainerConfig(100_000, 500, lr=3e-3, lr_end=3e-4),
    )  # fmt: skip
    train, heldout = (SyntheticActivations(SMALL_WORLD, 20_000, seed) for seed in (0, 1))
    train_saes({"topk": training}, train, tmp_path, progress=False)
    row = row_of(str(tmp_path / "topk"), heldout)
    assert row["mcc"] > 0.45
    assert row["f1"] > 0.15


def test_large_blocks_are_compared_in_parts(source):
    code = linear_code(sae_near(source, 0.1))
    x = source.read(["synthetic"], 0, N)["synthetic"]
    found = []
    for step in (N, 100, 7):
        one = KnownTruth().start(code, source)
        for start, stop in itertools.pairwise([*range(0, N, step), N]):
            one.add(code.read(x[start:stop], None, slice(start, stop)))
        found.append(one.finish().summary)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-7)
