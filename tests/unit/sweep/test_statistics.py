"""Numbers about differences, against plain NumPy and by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sae_afa_plugin.sweep.statistics import (
    description_length,
    firing_bits,
    interpolated,
    paired_difference,
    reseed_noise,
    stability,
)


def tokens(values, sequence):
    return pd.DataFrame({"sequence": sequence, "nmse": values})


def test_a_difference_by_hand_with_a_token_that_is_undefined():
    sequence = [0, 0, 1, 1]
    first = tokens([0.2, math.nan, 0.4, 0.6], sequence)
    second = tokens([0.4, 9.0, 0.4, 0.8], sequence)
    found = paired_difference([(first, second), (first, first)], "nmse", draws=50)
    assert found.first == pytest.approx((1.2 + 1.2) / 6)
    assert found.second == pytest.approx((1.6 + 1.2) / 6)
    assert found.ratio == pytest.approx(2.4 / 2.8)
    assert found.sd_seeds == pytest.approx(np.std([0.75, 1.0], ddof=1))
    assert found.low < found.ratio <= found.high <= 1


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """300 worlds with dependent tokens in sequences: 95 %, give or take three standard errors."""
    random = np.random.default_rng(0)
    n_sequences, length = 40, 8
    sequence = np.repeat(np.arange(n_sequences), length)
    inside = 0
    for world in range(300):
        common = np.repeat(random.gamma(2, 1, n_sequences), length)  # hard and easy sequences
        noise = np.repeat(random.normal(0, 0.2, n_sequences), length)  # of one SAE alone
        a, b = common * (1.1 + noise), common
        found = paired_difference(
            [(tokens(a, sequence), tokens(b, sequence))], "nmse", draws=200, seed=world
        )
        inside += found.low <= 1.1 <= found.high
    assert 0.95 * 300 - 3 * math.sqrt(300 * 0.95 * 0.05) - 6 <= inside <= 299


def test_other_tokens_are_not_compared():
    one, other = tokens([1.0, 2.0], [0, 0]), tokens([1.0, 2.0], [0, 1])
    with pytest.raises(ValueError, match="on the same tokens"):
        paired_difference([(one, other)], "nmse")
    with pytest.raises(ValueError, match="nothing to compare"):
        paired_difference([], "nmse")


def test_between_two_points_it_is_straight_on_log_log_axes():
    points = {10: 0.1, 1000: 0.001, 100: 0.05}
    assert interpolated(points, 100) == pytest.approx(0.05)
    halfway = math.exp((math.log(0.1) + math.log(0.05)) / 2)
    assert interpolated(points, math.sqrt(1000)) == pytest.approx(halfway)
    assert math.isnan(interpolated(points, 9.9))
    assert math.isnan(interpolated(points, 1001))
    assert math.isnan(interpolated({}, 5))


def test_stability_is_the_best_matching_of_each_pair():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 5, generator=generator)
    order = torch.randperm(12, generator=generator)
    assert stability([W, -W[order] * 3]) == pytest.approx(1, abs=1e-6)
    three = [torch.randn(12, 5, generator=generator) for _ in range(3)]
    expected = []
    for a, b in combinations(three, 2):
        a, b = (w.numpy() / np.linalg.norm(w.numpy(), axis=1, keepdims=True) for w in (a, b))
        cosines = np.abs(a @ b.T)
        expected.append(cosines[linear_sum_assignment(-cosines)].mean())
    assert stability(three) == pytest.approx(np.mean(expected), rel=1e-5)
    assert math.isnan(stability([W]))


def test_description_lengths_by_hand():
    assert description_length(32, 1024) == 32 * 17
    # two features on half of the tokens (1 bit each, and 7 for a value half of the time), one never
    assert firing_bits(np.array([5, 5, 0]), 10) == pytest.approx(2 + 7)


def test_noise_is_over_seeds_of_one_setting():
    summary = pd.DataFrame(
        {"setting": ["a", "a", "b"], "seed": [0, 1, 0], "nmse": [1.0, 3.0, 9.0], "word": "x"}
    )
    found = reseed_noise(summary, ["setting"])
    assert found.to_dict("records") == [
        {"setting": "a", "number": "nmse", "mean": 2.0, "sd": pytest.approx(math.sqrt(2)),
         "relative": pytest.approx(math.sqrt(2) / 2), "seeds": 2},
    ]  # fmt: skip
