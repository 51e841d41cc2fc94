"""The AFA metric in plain tensors: by hand, against an oracle, its bounds, and the summary."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.afa_oracle import absolute_cosines, metrics_of_dictionary, metrics_of_tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae_afa_plugin import metrics
from sae_afa_plugin.groups.afa import SHARES
from sae_afa_plugin.metrics import (
    AFATokenMetrics,
    TokenColumns,
    dictionary_coherence,
    epsilon_lbo,
    is_finite,
    norm_along_last,
    summarize,
    token_metrics,
)

NAN = float("nan")


def read(z, f, W_dec, b):
    return token_metrics(z, f @ W_dec, f * W_dec.norm(dim=-1), b)


def assert_agrees(got, expected, rtol, atol):
    for name, tensor in got._asdict().items():
        reference = torch.from_numpy(expected[name])
        if name in ("over_activated", "l0"):
            assert tensor.tolist() == reference.tolist(), name
        else:
            torch.testing.assert_close(
                tensor.double(), reference, rtol=rtol, atol=atol, equal_nan=True
            )


# --- by hand ---

# norms 5, 2, 1, 5; cosines 0, 4/5, -12/25 and 0, -4/5 and -3/5
W_DEC = [[3.0, 4, 0], [0, 0, 2], [0, 1, 0], [0, -3, -4]]
BIAS = [1.0, 2, 2]  # norm 3
TOKENS = {
    "no active feature": (
        [0.0, 0, 0, 0],
        [2.0, 3, 6],
        {
            "norm_z": 7,
            "norm_f": 3,  # the bias alone
            "norm_z_centered": 18**0.5,  # (1, 1, 4)
            "norm_f_centered": 0,
            "over_activated": False,
            "epsilon_lbo": (49 - 9) / (3 * 9),
            "epsilon_lbo_recon": NAN,
            "interference": NAN,
            "nmse": 18 / 49,
            "cosine": 20 / 21,  # (2, 3, 6) and the bias
            "l2_ratio": 3 / 7,
            "share_features": 0,
            "share_interference": 0,
            "share_unexplained": 1,
            "share_shrinkage": 0,
            "l0": 0,
        },
    ),
    "one": (
        [0.0, 2, 0, 0],  # 4 on the unit row: (0, 0, 4)
        [1.0, 4, 8],
        {
            "norm_z": 9,
            "norm_f": 5,  # sqrt(16 + 9)
            "norm_z_centered": 40**0.5,  # (0, 2, 6)
            "norm_f_centered": 4,
            "over_activated": False,
            "epsilon_lbo": (81 - 25) / (3 * 25),
            "epsilon_lbo_recon": 0,  # 16 - 16
            "interference": NAN,
            "nmse": 8 / 81,  # (0, 2, 2)
            "cosine": 57 / (9 * 41**0.5),  # (1, 4, 8) and (1, 2, 6)
            "l2_ratio": 41**0.5 / 9,
            "share_features": 16 / 40,
            "share_interference": 0,
            "share_unexplained": 8 / 40,
            "share_shrinkage": 16 / 40,  # 2 (0, 2, 2) . (0, 0, 4)
            "l0": 1,
        },
    ),
    "two": (
        [1.0, 0, 2, 0],  # 5 and 2 on unit rows: (3, 4, 0) + (0, 2, 0), squared norms 45 and 29
        [2.0, 4, 4],
        {
            "norm_z": 6,
            "norm_f": 38**0.5,  # 29 + 9
            "norm_z_centered": 3,  # (1, 2, 2)
            "norm_f_centered": 29**0.5,
            "over_activated": True,
            "epsilon_lbo": (38 - 36) / (3 * 38),
            "epsilon_lbo_recon": (45 - 29) / (3 * 29),
            "interference": 4 / 5,  # 16 / (7^2 - 29)
            "nmse": 24 / 36,  # (-2, -4, 2)
            "cosine": 48 / (6 * 84**0.5),  # (2, 4, 4) and (4, 8, 2)
            "l2_ratio": 84**0.5 / 6,
            "share_features": 29 / 9,
            "share_interference": 16 / 9,
            "share_unexplained": 24 / 9,
            "share_shrinkage": -60 / 9,  # 2 (-2, -4, 2) . (3, 6, 0)
            "l0": 2,
        },
    ),
    "two of opposite signs": (
        [1.0, 0, -2, 0],  # (3, 4, 0) - (0, 2, 0), squared norms 13 and 29
        [4.0, 4, 2],
        {
            "norm_z": 6,
            "norm_f": 38**0.5,
            "norm_z_centered": 13**0.5,  # (3, 2, 0)
            "norm_f_centered": 29**0.5,
            "over_activated": True,
            "epsilon_lbo": (38 - 36) / (3 * 38),
            "epsilon_lbo_recon": (29 - 13) / (3 * 29),
            "interference": -4 / 5,  # -16 / (7^2 - 29)
            "nmse": 0,
            "cosine": 1,
            "l2_ratio": 1,
            "share_features": 29 / 13,
            "share_interference": -16 / 13,
            "share_unexplained": 0,
            "share_shrinkage": 0,
            "l0": 2,
        },
    ),
    "three": (
        [2.0, 1.5, 0, 1],  # 10, 3, 5: (6, 8, 0) + (0, 0, 3) + (0, -3, -4), norms^2 62 and 134
        [6.0, 6, 3],
        {
            "norm_z": 9,
            "norm_f": 143**0.5,  # 134 + 9
            "norm_z_centered": 42**0.5,  # (5, 4, 1)
            "norm_f_centered": 134**0.5,
            "over_activated": True,
            "epsilon_lbo": (143 - 81) / (3 * 143),
            "epsilon_lbo_recon": (134 - 62) / (3 * 134),
            # 2 (10 * 5 * -12/25 + 3 * 5 * -4/5) / (18^2 - 134)
            "interference": -72 / 190,
            "nmse": 6 / 81,  # (-1, -1, 2)
            "cosine": 87 / (9 * 99**0.5),  # (6, 6, 3) and (7, 7, 1)
            "l2_ratio": 99**0.5 / 9,
            "share_features": 134 / 42,
            "share_interference": -72 / 42,
            "share_unexplained": 6 / 42,
            "share_shrinkage": -26 / 42,  # 2 (-1, -1, 2) . (6, 5, -1)
            "l0": 3,
        },
    ),
}


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_values_by_hand(token, dtype):
    f, z, expected = TOKENS[token]
    z, f, W_dec, b = (torch.tensor(v, dtype=dtype) for v in ([z], [f], W_DEC, BIAS))
    got = {name: tensor.item() for name, tensor in read(z, f, W_dec, b)._asdict().items()}
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)
    assert isinstance(got["over_activated"], bool)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.floats(0.1, 3),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_energy_budget_adds_up_to_one(seed, d, scale, dtype):
    rng = torch.Generator().manual_seed(seed)
    z, W_dec = torch.randn(20, d, generator=rng), torch.randn(9, d, generator=rng)
    f = torch.randn(20, 9, generator=rng).clamp(min=0) * scale
    m = read(*(t.to(dtype) for t in (z, f, W_dec, torch.randn(d, generator=rng))))
    shares = torch.stack([getattr(m, name).double() for name in SHARES])
    # each is rounded to the dtype, and they may be large and of opposite signs
    slack = 8 * torch.finfo(dtype).eps * (1 + shares.abs().sum(0))
    if dtype == torch.float32:  # the reconstruction was rounded before
        slack *= 20
    assert ((shares.sum(0) - 1).abs() <= slack).all()


@pytest.mark.parametrize("exponent", [-100, -70, -30, 30, 60, 110])
def test_numbers_do_not_depend_on_the_unit(exponent):
    """Squares of float32 leave its range beyond 2^-75 and 2^64."""
    rng = torch.Generator().manual_seed(0)
    z, W_dec, b = (torch.randn(*shape, generator=rng) for shape in ((20, 7), (9, 7), (7,)))
    f = torch.randn(20, 9, generator=rng).clamp(min=0)
    here, there = (
        read(z, f, W_dec, b),
        read(*(t * 2.0**exponent for t in (z, f)), W_dec, b * 2.0**exponent),
    )
    for name in here._fields:
        unit = 2.0**-exponent if name.startswith("norm_") else 1
        expected, got = getattr(here, name).double(), getattr(there, name).double() * unit
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True), name
    coherence = dictionary_coherence(W_dec)
    assert dictionary_coherence(W_dec * 2.0**exponent) == pytest.approx(coherence, rel=1e-5)


def test_a_token_at_the_bias_has_no_budget():
    z = torch.tensor([[1.0, 2.0]])
    m = token_metrics(z, torch.zeros(1, 2), torch.zeros(1, 3), z[0])
    assert all(getattr(m, name).isnan().all() for name in SHARES)
    assert m.cosine.item() == pytest.approx(1)


def test_without_bias_a_token_without_features_forces_nothing():
    m = token_metrics(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(2))
    assert m.epsilon_lbo.isnan().all()
    assert m.norm_f.item() == 0


def test_a_token_that_is_zero_has_no_nmse():
    # its features reconstruct something all the same
    m = token_metrics(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 3), torch.zeros(2))
    assert m.nmse.isnan().all()
    assert m.over_activated.all()
    assert m.epsilon_lbo.item() == pytest.approx(1 / 2)  # |0 - 3| / (2 * 3)


def test_equal_norms_are_not_over_activated():
    m = token_metrics(torch.eye(3)[:1], torch.eye(3)[:1], torch.eye(4)[:1], torch.zeros(3))
    assert not m.over_activated.any()
    assert m.epsilon_lbo.item() == 0


def test_a_known_l0_is_passed_on():
    # three features were active, and two of them have no direction
    f_unit = torch.tensor([[2.0, 0, 0, 0]])
    m = token_metrics(torch.ones(1, 2), torch.ones(1, 2), f_unit, torch.zeros(2), torch.tensor([3]))
    assert m.l0.tolist() == [3]


def test_features_without_a_direction_interfere_with_nothing():
    rng = torch.Generator().manual_seed(0)
    W_dec = torch.randn(4, 8, generator=rng)
    W_dec[1:] = 0
    f = torch.rand(50, 4, generator=rng) + 0.5
    m = token_metrics(
        f @ W_dec, f @ W_dec, f * W_dec.norm(dim=-1), torch.zeros(8), (f != 0).sum(-1)
    )
    assert m.interference.isnan().all()


@pytest.mark.parametrize("second", [1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3])
def test_a_second_feature_lost_in_rounding_does_not_pass_the_coherence(second):
    rng = torch.Generator().manual_seed(0)
    W_dec = torch.randn(2, 50, 6, generator=rng)
    W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
    f = torch.tensor([3.0, second])
    for rows in W_dec.unbind(1):
        recons = (f @ rows)[None]
        m = token_metrics(recons, recons, f[None], torch.zeros(6))
        # undefined is an answer too
        beyond = m.interference.abs() - dictionary_coherence(rows).max_abs_cos
        assert beyond.isnan().item() or beyond.item() <= 0.05


def test_low_precision_is_summed_in_float32():
    x = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    expected = 64 * x[0, 0].item()
    norm = norm_along_last(x)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected, rel=1e-5)  # a bf16 sum is off by 4e-3
    assert norm_along_last(x.double()).dtype == torch.float64


def test_epsilon_lbo_needs_two_features():
    with pytest.raises(ValueError, match="needs a dictionary of two features or more: got 1"):
        epsilon_lbo(torch.ones(1), torch.ones(1), d_sae=1)


# --- against the oracle ---


def random_case(dtype=torch.float64, n=200, d=10, h=35, signed=False, seed=0):
    """Uneven rows, a bias, features of every number from 0 on, and an imperfect target."""
    rng = np.random.default_rng(seed)
    W_dec = rng.normal(size=(h, d)) * rng.uniform(0.05, 4, (h, 1))
    b = rng.normal(size=d)
    f = rng.exponential(2, (n, h)) * (rng.random((n, h)) < rng.uniform(0, 0.5, (n, 1)))
    f[:3] = 0
    f[1, 4] = f[2, 5] = f[2, 6] = 1.5
    if signed:
        f *= rng.choice([-1, 1], f.shape)
    z = f @ W_dec + b + rng.normal(size=(n, d)) * rng.uniform(0, 3, (n, 1))
    return [torch.from_numpy(v).to(dtype) for v in (z, f, W_dec, b)]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-5), (torch.float64, 1e-10, 1e-12)]
)
def test_agrees_with_the_oracle(dtype, rtol, atol, signed):
    case = random_case(dtype, signed=signed)
    got = read(*case)
    assert {0, 1, 2, 3} <= set(got.l0.tolist())
    assert 0 < got.over_activated.sum() < len(got.l0)
    assert_agrees(got, metrics_of_dictionary(*case), rtol, atol)
    assert got.epsilon_lbo_recon.dtype == got.nmse.dtype == got.norm_f.dtype == dtype


def test_bf16_inputs_lose_nothing_more():
    z, f, W_dec, b = random_case()
    case = [t.bfloat16() for t in (z, f @ W_dec, f * W_dec.norm(dim=-1), b)]
    got = token_metrics(*case)
    assert_agrees(got, metrics_of_tensors(*case), rtol=1e-4, atol=1e-5)
    assert got.interference.dtype == torch.float32


def test_any_leading_shape():
    z, f, W_dec, b = random_case(n=30)
    flat = read(z, f, W_dec, b)
    nested = read(z.view(2, 3, 5, -1), f.view(2, 3, 5, -1), W_dec, b)
    for one, other in zip(flat, nested, strict=True):
        assert other.shape == (2, 3, 5)
        torch.testing.assert_close(other.flatten(), one, rtol=1e-12, atol=0, equal_nan=True)


# --- properties ---


@st.composite
def dictionaries(draw, min_rows=2):
    # quarters, so that no row is tiny and every dtype holds them
    h, d = draw(st.integers(min_rows, 10)), draw(st.integers(1, 6))
    entry = st.integers(-12, 12)
    rows = draw(st.lists(st.lists(entry, min_size=d, max_size=d), min_size=h, max_size=h))
    W_dec = torch.tensor(rows, dtype=torch.float64) / 4
    assume((W_dec.norm(dim=-1) > 0).sum() >= 2)
    return W_dec


@settings(max_examples=300, deadline=None)
@given(data=st.data(), W_dec=dictionaries(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_interference_and_epsilon_of_the_reconstruction_are_below_the_coherence(data, W_dec, dtype):
    h = len(W_dec)
    value = st.one_of(st.just(0), st.integers(-64, 64))  # signed, as those of AbsTopK are
    f = torch.tensor([data.draw(st.lists(value, min_size=h, max_size=h))], dtype=dtype) / 8
    W_dec = W_dec.to(dtype)
    mu = dictionary_coherence(W_dec).max_abs_cos
    m = read(f @ W_dec, f, W_dec, torch.zeros(W_dec.shape[1], dtype=dtype))
    f_unit = (f * W_dec.norm(dim=-1)).double().abs()
    rounding = 4 * h * torch.finfo(dtype).eps
    if m.norm_f_centered.item() > 0:
        assert m.epsilon_lbo_recon.item() <= mu + rounding * h
    if (f_unit != 0).sum() >= 2:
        pairs = (f_unit.sum().square() - f_unit.square().sum()).item()
        slack = rounding * f_unit.sum().square().item() / pairs
        assert abs(m.interference.item()) <= mu + slack


def test_epsilon_of_two_equal_features_is_the_coherence():
    # two rows at cosine 0.6 with equal features reach the bound: h - 1 = 1 pair
    W_dec = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    f = torch.tensor([[2.5, 1.0]])
    m = read(f @ W_dec, f, W_dec, torch.zeros(2))
    mu = dictionary_coherence(W_dec).max_abs_cos
    assert m.epsilon_lbo_recon.item() == pytest.approx(mu, rel=1e-6)
    assert m.interference.item() == pytest.approx(mu, rel=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_an_orthonormal_dictionary_has_epsilon_zero(signed):
    _, f, W_dec, b = random_case(d=12, h=12, signed=signed)
    rows = torch.linalg.qr(W_dec).Q * (0.1 + torch.rand(12, 1, dtype=torch.float64))
    perfect = read(f @ rows, f, rows, torch.zeros_like(b))
    some = f.any(-1)
    assert perfect.epsilon_lbo[some].abs().max() < 1e-12
    # the bias is not orthogonal to the rest, but takes no part in these
    biased = read(f @ rows + b, f, rows, b)
    assert biased.epsilon_lbo_recon[some].abs().max() < 1e-12
    assert biased.interference[biased.l0 > 1].abs().max() < 1e-12
    assert biased.epsilon_lbo.max() > 1e-3


def simplex(d):
    """d + 1 directions in d dimensions, every pair at cosine -1/d."""
    centered = torch.eye(d + 1, dtype=torch.float64) - 1 / (d + 1)
    basis = torch.linalg.svd(centered).Vh[:d]
    return centered @ basis.T


def test_interference_on_an_equiangular_dictionary_is_its_cosine():
    rng = torch.Generator().manual_seed(0)
    rows = simplex(6) * (0.1 + 3 * torch.rand(7, 1, generator=rng, dtype=torch.float64))
    f = torch.rand(20, 7, generator=rng, dtype=torch.float64)
    m = read(f @ rows, f, rows, torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(m.interference, torch.full_like(m.interference, -1 / 6))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10_000), h=st.integers(2, 8), scale=st.floats(0.05, 20))
def test_the_band_of_the_zf_plot_holds_every_token(seed, h, scale):
    z, f, W_dec, b = random_case(n=20, d=4, h=max(h, 7), seed=seed)
    z, f, W_dec = z * scale, f[:, :h], W_dec[:h]
    m = read(z, f, W_dec, b)
    e = m.epsilon_lbo * (h - 1)
    ratio = m.norm_f / m.norm_z
    inside = e < 1
    lower, upper = (1 / (1 + e[inside])).sqrt(), (1 / (1 - e[inside])).sqrt()
    ratio, over = ratio[inside], m.over_activated[inside]
    assert (ratio >= lower * (1 - 1e-9)).all()
    assert (ratio <= upper * (1 + 1e-9)).all()
    # epsilon is the least constant, so each token lies on an edge of its own band
    torch.testing.assert_close(ratio, torch.where(over, upper, lower), rtol=1e-9, atol=0)


# --- dictionaries ---


@pytest.mark.parametrize(("h", "d"), [(25, 4), (22, 3), (21, 8), (5, 9), (7, 7), (2, 3), (15, 1)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-6)],
)
def test_coherence_is_that_of_the_plain_gram_matrix(h, d, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(metrics, "_ROWS_AT_ONCE", 7)
    rng = torch.Generator().manual_seed(h)
    scale = 10 ** (4 * torch.rand(h, 1, generator=rng) - 2)
    W_dec = (torch.randn(h, d, generator=rng) * scale).to(dtype)
    cosines = absolute_cosines(W_dec)
    got = dictionary_coherence(W_dec)
    assert got.max_abs_cos == pytest.approx(cosines.max(), abs=tolerance)
    assert got.mean_abs_cos == pytest.approx(cosines.mean(), abs=tolerance)
    welch = math.sqrt((h - d) / (d * (h - 1))) if h > d else 0.0
    assert got.welch_bound == pytest.approx(welch, abs=1e-15)


@pytest.mark.parametrize(("i", "j"), [(0, 1), (6, 7), (3, 24), (23, 24), (20, 5)])
@pytest.mark.parametrize("factor", [3.0, -0.5])
def test_a_duplicate_is_found_in_whatever_block_it_lies(i, j, factor, monkeypatch):
    monkeypatch.setattr(metrics, "_ROWS_AT_ONCE", 7)
    W_dec = torch.randn(25, 16, generator=torch.Generator().manual_seed(0))
    assert dictionary_coherence(W_dec).max_abs_cos < 0.95
    W_dec[j] = factor * W_dec[i]
    coherence = dictionary_coherence(W_dec).max_abs_cos
    assert coherence == pytest.approx(1.0, abs=1e-6)
    assert coherence <= 1.0


def test_duplicates_are_never_above_one():
    # the product of a float32 unit row with itself is often just above
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    assert max(dictionary_coherence(row.expand(2, -1)).max_abs_cos for row in rows) == 1.0


def test_rows_of_zeros_are_left_out(monkeypatch):
    monkeypatch.setattr(metrics, "_ROWS_AT_ONCE", 4)
    W_dec = torch.randn(13, 3, generator=torch.Generator().manual_seed(0))
    with_zeros = torch.zeros(20, 3)
    with_zeros[[1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 15, 17, 19]] = W_dec
    got, expected = dictionary_coherence(with_zeros), dictionary_coherence(W_dec)
    assert got.max_abs_cos == pytest.approx(expected.max_abs_cos, abs=1e-6)
    assert got.mean_abs_cos == pytest.approx(expected.mean_abs_cos, abs=1e-6)
    assert got.welch_bound == expected.welch_bound == math.sqrt(10 / (3 * 12))


@pytest.mark.parametrize("d", [2, 5, 11])
def test_the_simplex_reaches_the_welch_bound(d):
    coherence = dictionary_coherence(simplex(d))
    assert coherence == pytest.approx((1 / d, 1 / d, 1 / d), rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(W_dec=dictionaries())
def test_no_dictionary_is_below_the_welch_bound(W_dec):
    coherence = dictionary_coherence(W_dec)
    h, d = int((W_dec.norm(dim=-1) > 0).sum()), W_dec.shape[1]
    assert coherence.welch_bound <= coherence.max_abs_cos + 1e-12
    assert (coherence.welch_bound > 0) == (h > d)
    assert coherence.mean_abs_cos <= coherence.max_abs_cos + 1e-12


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", [0, 4, 9])
def test_a_row_that_is_not_finite_shows(bad, row, monkeypatch):
    monkeypatch.setattr(metrics, "_ROWS_AT_ONCE", 4)
    W_dec = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    W_dec[row, 1] = bad
    coherence = dictionary_coherence(W_dec)
    assert math.isnan(coherence.max_abs_cos)
    assert math.isnan(coherence.mean_abs_cos)


@pytest.mark.parametrize(
    ("rows", "n"), [([[1.0, 2.0]], 1), ([[0.0, 0.0], [0.0, 1.0]], 1), ([[0.0], [0.0]], 0)]
)
def test_one_direction_has_no_coherence(rows, n):
    with pytest.raises(
        ValueError,
        match=f"coherence needs two directions or more: W_dec has {n} that are not zero",
    ):
        dictionary_coherence(torch.tensor(rows))


def test_the_weights_are_left_alone():
    for dtype in (torch.float32, torch.bfloat16):
        W_dec = torch.randn(9, 4).to(dtype).requires_grad_()
        before = W_dec.detach().clone()
        dictionary_coherence(W_dec)
        assert torch.equal(W_dec.detach(), before)


MEASURE_MEMORY = """
import importlib.util, sys
import torch

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

spec = importlib.util.spec_from_file_location("metrics", sys.argv[1])
metrics = importlib.util.module_from_spec(spec)
spec.loader.exec_module(metrics)
W_dec = torch.randn(24576, 64)
before = peak()
metrics.dictionary_coherence(W_dec)
print("sae_lens" in sys.modules, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_coherence_of_24576_features_takes_less_than_a_copy_of_the_decoder_of_gpt2():
    # VmHWM, because ru_maxrss begins with what the parent used
    command = [sys.executable, "-c", MEASURE_MEMORY, metrics.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    loaded_saelens, grown = done.stdout.split()
    assert loaded_saelens == "False"
    assert float(grown) < 64


# --- many tokens ---


TABLE = pd.DataFrame(
    {
        "norm_z": [2.0, 3, 0, 4, 1],
        "norm_f": [1.0, 6, 2, 3, 4],
        "norm_z_centered": [1.0, 5, 1, 2, 4],
        "norm_f_centered": [0.0, 5, 2, 1, 3],
        "over_activated": [False, True, True, False, True],
        "epsilon_lbo": [NAN, 0.1, 0.2, 0.3, 0.4],
        "epsilon_lbo_recon": [NAN, 0.0, 0.1, 0.3, 0.2],
        "interference": [NAN, NAN, 0.5, -0.25, NAN],
        "nmse": [0.1, 0.4, NAN, 0.2, 0.8],
        "cosine": [0.5, 1.0, NAN, 0.25, 0.0],
        "l2_ratio": [0.5, 1.0, NAN, 0.5, 2.0],
        "share_features": [0.0, 1.0, 4.0, 0.25, 0.5],
        "share_interference": [0.0, 0.5, -3.0, 0.25, 0.0],
        "share_unexplained": [1.0, 0.0, 0.5, 0.25, 0.25],
        "share_shrinkage": [0.0, -0.5, -0.5, 0.25, 0.25],
        "l0": [0, 1, 2, 3, 9],
    }
)
CUTS = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def test_the_summary_by_hand():
    summary = summarize(TABLE.assign(token="text", position=7))
    expected = {
        "over_activated": 3 / 5,
        "over_activated_centered": 1 / 5,  # the equal one does not count
        # of 0.1, 0.2, 0.4, 0.8 at 0.15, 0.75, 1.5, 2.25 and 2.85
        "nmse_mean": 1.5 / 4,
        "nmse_q05": 0.115,
        "nmse_q25": 0.175,
        "nmse_median": 0.3,
        "nmse_q75": 0.5,
        "nmse_q95": 0.74,
        # of -0.25 and 0.5
        "interference_mean": 0.125,
        "interference_q05": -0.2125,
        "interference_q95": 0.4625,
        "interference_undefined": 3,
        "epsilon_lbo_mean": 0.25,
        "epsilon_lbo_undefined": 1,
        "epsilon_lbo_recon_mean": 0.15,
        # of 1/2, 6/3, 3/4 and 4/1
        "norm_ratio_mean": 7.25 / 4,
        "norm_ratio_median": 1.375,
        "norm_ratio_undefined": 1,
        "share_unexplained_mean": 0.4,
        # reconstructions of norm 1, 3, 2, 2 at inputs of 2, 3, 4, 1:
        # (1 + 9 + 4 + 4) / (0.5 * 1 * 2 + 3 * 3 + 0.25 * 2 * 4 + 0)
        "relative_reconstruction_bias": 18 / 12,
        "l0_mean": 3,
        "l0_median": 2,
        "l0_q95": 7.8,  # of 0, 1, 2, 3, 9 at 3.8
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_the_summary_names_every_quantity():
    quantities = [*(name for name in TABLE if name != "over_activated"), "norm_ratio"]
    assert set(summarize(TABLE)) == {
        "over_activated",
        "over_activated_centered",
        "relative_reconstruction_bias",
        *(f"{name}_{what}" for name in quantities for what in ("mean", *CUTS)),
        *(f"{name}_undefined" for name in ("interference", "epsilon_lbo", "norm_ratio")),
    }


def table_of(m):
    columns = TokenColumns()
    columns.add(m)
    return columns.frame()


@pytest.mark.parametrize("name", [name for name in TABLE if name != "over_activated"])
def test_the_quantiles_are_numpys(name):
    table = table_of(read(*random_case(torch.float32, n=333)))
    values = table[name].to_numpy(np.float64)
    defined = values[~np.isnan(values)]
    assert len(defined) > 100
    summary = summarize(table)
    for cut, q in CUTS.items():
        assert summary[f"{name}_{cut}"] == np.quantile(defined, q)
    assert summary[f"{name}_mean"] == pytest.approx(defined.mean(), rel=1e-12)


MANY = read(*random_case(torch.float32, n=61))
WHOLE = summarize(table_of(MANY))


@settings(max_examples=100, deadline=None)
@given(order=st.permutations(range(61)), cuts=st.lists(st.integers(0, 61), max_size=8).map(sorted))
def test_the_summary_does_not_depend_on_order_or_batches(order, cuts):
    columns = TokenColumns()
    for start, stop in zip([0, *cuts], [*cuts, 61], strict=True):
        columns.add(AFATokenMetrics(*(tensor[order[start:stop]] for tensor in MANY)))
    assert summarize(columns.frame()) == WHOLE
    assert not any(math.isnan(value) for value in WHOLE.values())


def test_columns_keep_the_order_and_flatten():
    columns = TokenColumns()
    first = read(*random_case(torch.float32, n=6))
    second = read(*random_case(torch.float32, n=5, seed=1))
    columns.add(AFATokenMetrics(*(tensor.view(2, 3) for tensor in first)))
    columns.add(second)
    frame = columns.frame()
    assert tuple(frame) == AFATokenMetrics._fields
    assert frame["over_activated"].dtype == bool
    for name in frame:
        both = torch.cat([getattr(first, name), getattr(second, name)])
        np.testing.assert_array_equal(frame[name].to_numpy(), both.numpy())


def test_no_tokens_at_all():
    frame = TokenColumns().frame()
    assert tuple(frame) == AFATokenMetrics._fields
    assert len(frame) == len(is_finite(frame)) == 0
    summary = summarize(frame)
    for name, value in summary.items():
        if name.endswith("_undefined"):
            assert value == 0
        else:
            assert math.isnan(value), name
    assert set(summary) == set(WHOLE)


def test_a_quantity_that_no_token_defines():
    summary = summarize(TABLE.assign(interference=NAN))
    assert math.isnan(summary["interference_mean"])
    assert math.isnan(summary["interference_q95"])
    assert summary["interference_undefined"] == 5
    assert summary["nmse_mean"] == pytest.approx(0.375)


def test_finite_tokens_by_column():
    # undefined values are no error, and neither is the NMSE of a z that is zero
    assert is_finite(TABLE).tolist() == [True] * 5
    for name in ("norm_z", "norm_f", "norm_z_centered", "norm_f_centered", "nmse"):
        for bad in (NAN, math.inf):
            table = TABLE.copy()
            table.loc[3, name] = bad
            assert is_finite(table).tolist() == [True, True, True, False, True], name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["z", "f"])
def test_a_token_that_is_not_finite_shows_and_stays_alone(where, bad):
    z, f, W_dec, b = random_case(torch.float32, n=8)
    z[1] = 0
    clean = read(z, f, W_dec, b)
    (z if where == "z" else f)[5, 2] = bad
    m = read(z, f, W_dec, b)
    expected = [True] * 8
    expected[5] = False
    assert is_finite(table_of(m)).tolist() == expected
    assert is_finite(table_of(clean)).all()
    others = torch.tensor(expected)
    for one, other in zip(m, clean, strict=True):
        torch.testing.assert_close(one[others], other[others], rtol=1e-5, atol=0, equal_nan=True)
