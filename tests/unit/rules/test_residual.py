"""Leave-one-out and constant quality: by hand, in exact arithmetic, and their properties."""

from __future__ import annotations

import pytest
import torch
from helpers.oracle import explained_exactly, left_one_out_exactly, order_is_clear
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sae_afa_plugin import keep_until_explained, leave_one_out
from sae_afa_plugin.rules import residual, residual_numba, residual_torch

IMPLEMENTATIONS = {"torch": residual_torch}
if residual_numba.supports(torch.ones(1)):
    IMPLEMENTATIONS["numba"] = residual_numba
if (residual_triton := residual._on_devices()) is not None:
    IMPLEMENTATIONS["triton"] = residual_triton

PLANE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-0.8, 0.6]])


@pytest.fixture(params=sorted(IMPLEMENTATIONS), autouse=True, scope="module")
def implementation(request):
    """Every way in which the rules are computed."""
    way = IMPLEMENTATIONS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            residual,
            "_implementation",
            lambda acts: residual_torch if acts.dtype == torch.float64 else way,
        )
        yield request.param


# --- leave-one-out by hand ---


def test_a_feature_is_worth_what_the_residual_would_grow():
    # y = (3, 1), features 3 and 1 along the axes: leaving one out costs 9 or 1
    acts, sae_in = torch.tensor([[3.0, 1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    for price, kept in ((0.9, [3, 1]), (1.0, [3, 1]), (1.1, [3, 0]), (9.0, [3, 0]), (9.1, [0, 0])):
        out = leave_one_out(acts, sae_in, PLANE, price)
        assert out.tolist() == [[*kept, 0, 0]], price


def test_a_feature_that_does_harm_is_dropped_at_any_price():
    # (3, 0) explained by 3 along it; .5 * (.6, .8) makes it worse by .25 + ...: r = (-.3, -.4)
    acts, sae_in = torch.tensor([[3.0, 0.0, 0.5, 0.0]]), torch.tensor([[3.0, 0.0]])
    for price in (0.0, -5.0):
        assert leave_one_out(acts, sae_in, PLANE, price).tolist() == [[3, 0, 0, 0]]


def test_leniency_judges_a_feature_by_its_direction():
    # y = (3, 1). 7 along the first axis leaves (-4, 1): 17 for 10, a gain of -7; with 3 it would
    # have explained 9. -1 along the second could explain nothing with any positive activation.
    acts, sae_in = torch.tensor([[7.0, 0.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    for leniency, price, kept in (
        (0.0, 0.0, 0), (0.4, 0.0, 0), (0.5, 0.0, 7), (0.5, 1.1, 0), (1.0, 8.9, 7), (1.0, 9.1, 0),
    ):  # fmt: skip
        out = leave_one_out(acts, sae_in, PLANE, price, leniency=leniency)
        assert out.tolist() == [[kept, 0, 0, 0]], (leniency, price)
    assert not leave_one_out(acts, -sae_in, PLANE, 0.0, leniency=1.0).any()
    rows = leave_one_out(
        acts.repeat(2, 1), sae_in.repeat(2, 1), PLANE, 1.0, leniency=torch.tensor([0.0, 1.0])
    )
    assert rows[:, 0].tolist() == [0, 7]


def test_the_residual_is_kept_up_to_date():
    # Two features on the same direction, each of which suffices. Against the residual of both
    # together the second would be dropped too.
    W_dec = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    out = leave_one_out(torch.tensor([[2.0, 1.9]]), torch.tensor([[2.0, 0.0]]), W_dec, 0.5)
    assert out.tolist() == [[2, 0]]


def test_what_does_harm_goes_before_anything_is_weighed():
    # y = (2, 0): 0.6 of (0, 1) does harm (gain -.36). Score order: 0.5 along y first, whose gain
    # is 2 * .5 * (-.3) + .25 = -.05 while the larger one overshoots.
    W_dec = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    acts, sae_in = torch.tensor([[1.8, 0.5, 0.6]]), torch.tensor([[2.0, 0.0]])
    assert leave_one_out(acts, sae_in, W_dec, 0.0).tolist() == [[pytest.approx(1.8), 0, 0]]


def test_equal_scores_drop_the_higher_index_first():
    W_dec = torch.eye(2)[[0, 0, 0]]
    out = leave_one_out(torch.full((1, 3), 2.0), torch.tensor([[4.0, 0.0]]), W_dec, 1.0)
    assert out.tolist() == [[2, 2, 0]]


def test_scores_have_the_norms_of_the_decoder_in_them():
    # by activation the first is the smaller one; by score the second, which is tested first
    W_dec = torch.tensor([[4.0, 0.0], [1.0, 0.0]])
    out = leave_one_out(torch.tensor([[1.0, 3.0]]), torch.tensor([[4.0, 0.0]]), W_dec, 0.0)
    assert out.tolist() == [[1, 0]]


def test_a_price_for_each_row():
    acts, sae_in = torch.tensor([[3.0, 1.0, 0.0, 0.0]] * 3), torch.tensor([[3.0, 1.0]] * 3)
    out = leave_one_out(acts, sae_in, PLANE, torch.tensor([0.5, 2.0, 10.0]))
    assert out[:, :2].tolist() == [[3, 1], [3, 0], [0, 0]]


# --- constant quality by hand ---


def test_as_few_as_reach_the_share():
    # y = (3, 1): after the first 1 of 10 is left, after the second nothing
    acts, sae_in = torch.tensor([[3.0, 1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    for explained, kept in ((0.0, [0, 0]), (0.89, [3, 0]), (0.91, [3, 1]), (1.0, [3, 1])):
        out = keep_until_explained(acts, sae_in, PLANE, explained)
        assert out.tolist() == [[*kept, 0, 0]], explained


def test_out_of_reach_it_stops_where_the_residual_is_smallest():
    # after 2 along the first axis: (0, 1), 1 left; then 1.5 of (-.8, .6): (1.2, .1), 1.45 left
    acts, sae_in = torch.tensor([[2.0, 0.0, 0.0, 1.5]]), torch.tensor([[2.0, 1.0]])
    assert keep_until_explained(acts, sae_in, PLANE, 0.99).tolist() == [[2, 0, 0, 0]]


def test_max_k_is_never_exceeded():
    acts, sae_in = torch.tensor([[3.0, 1.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    out = keep_until_explained(acts, sae_in, PLANE, 1.0, max_k=1)
    assert out.tolist() == [[3, 0, 0, 0]]


def test_a_row_of_zeros_needs_no_features():
    acts = torch.tensor([[3.0, 1.0, 0.0, 0.0]])
    assert keep_until_explained(acts, torch.zeros(1, 2), PLANE, 0.9).tolist() == [[0] * 4]


def test_rows_after_others_are_as_they_are_alone():
    """The Numba loop starts where the row before ended."""
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(40, 8), dim=-1)
    sae_in = torch.randn(20, 8) * torch.logspace(-2, 2, 20)[torch.randperm(20), None]
    acts = (sae_in @ W_dec.T * 0.4).relu()
    together = keep_until_explained(acts, sae_in, W_dec, 0.7)
    alone = [
        keep_until_explained(a[None], x[None], W_dec, 0.7)
        for a, x in zip(acts, sae_in, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
    l0 = together.count_nonzero(-1)
    assert l0.min() < l0.max()


# --- exactly ---

# multiples of 1/8, so that sums of products are exact in float32 and only norms are rounded
eighths = st.integers(-24, 24).map(lambda n: n / 8)


@st.composite
def problems(draw):
    d_sae, d_in = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    row = st.lists(eighths, min_size=d_in, max_size=d_in)
    return (
        draw(st.lists(eighths, min_size=d_sae, max_size=d_sae)),
        draw(row),
        draw(st.lists(row, min_size=d_sae, max_size=d_sae)),
    )


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
_FAR_ENOUGH = 1e-4  # from where rounding decides


def _kept(out: torch.Tensor) -> list[int]:
    return out[0].nonzero()[:, 0].tolist()


@settings(max_examples=300)
@given(
    problem=problems(),
    price=st.integers(-8, 300).map(lambda n: n / 16),
    leniency=st.sampled_from([0.0, 0.25, 1.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_leave_one_out_is_its_definition(implementation, problem, price, leniency, dtype):
    acts, sae_in, W_dec = problem
    kept, nearest = left_one_out_exactly(acts, sae_in, W_dec, price, leniency)
    assume(nearest > _FAR_ENOUGH and order_is_clear(acts, W_dec))
    tensors = [torch.tensor(x, dtype=dtype) for x in ([acts], [sae_in], W_dec)]
    out = leave_one_out(*tensors, price, leniency=leniency)
    assert out.dtype == dtype
    assert _kept(out) == kept
    assert torch.equal(out, torch.where(out != 0, tensors[0], 0))


@settings(max_examples=300)
@given(
    problem=problems(),
    explained=st.integers(0, 32).map(lambda n: n / 32),
    max_k=st.none() | st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
)
def test_constant_quality_is_its_definition(implementation, problem, explained, max_k, dtype):
    acts, sae_in, W_dec = problem
    kept, apart = explained_exactly(acts, sae_in, W_dec, explained, max_k)
    assume((apart > _FAR_ENOUGH or not any(sae_in)) and order_is_clear(acts, W_dec))
    tensors = [torch.tensor(x, dtype=dtype) for x in ([acts], [sae_in], W_dec)]
    out = keep_until_explained(*tensors, explained, max_k=max_k)
    assert out.dtype == dtype
    assert _kept(out) == kept
    assert torch.equal(out, torch.where(out != 0, tensors[0], 0))


# --- what both have in common ---


def _leave(acts, sae_in, W_dec, decoder_norm=None):
    return leave_one_out(acts, sae_in, W_dec, 0.4, decoder_norm)


def _explain(acts, sae_in, W_dec, decoder_norm=None):
    return keep_until_explained(acts, sae_in, W_dec, 0.7, decoder_norm)


@pytest.fixture(params=[_leave, _explain], ids=["leave_one_out", "keep_until_explained"])
def rule(request):
    return request.param


def _random(*shape, d_in=8, d_sae=40, dtype=torch.float32):
    torch.manual_seed(0)
    W_dec = torch.randn(d_sae, d_in, dtype=dtype)
    sae_in = torch.randn(*shape, d_in, dtype=dtype)
    return (sae_in @ W_dec.T) * 0.4 / W_dec.square().sum(-1), sae_in, W_dec


def test_any_shape_and_any_strides(rule):
    acts, sae_in, W_dec = _random(3, 5)
    expected = torch.stack([rule(a, x, W_dec) for a, x in zip(acts, sae_in, strict=True)])
    assert torch.equal(rule(acts, sae_in, W_dec), expected)
    assert torch.equal(rule(acts[0, 0], sae_in[0, 0], W_dec), expected[0, 0])
    strided = rule(acts.mT.contiguous().mT, sae_in.mT.contiguous().mT, W_dec.T.contiguous().T)
    assert torch.equal(strided, expected)
    nothing = rule(acts[:0], sae_in[:0], W_dec)
    assert nothing.shape == (0, 5, 40)
    assert 0 < expected.count_nonzero() < (acts > 0).sum()


def test_norms_at_hand_change_nothing(rule):
    acts, sae_in, W_dec = _random(20)
    assert torch.equal(rule(acts, sae_in, W_dec), rule(acts, sae_in, W_dec, W_dec.norm(dim=-1)))


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_it_does_not_matter_where_the_norm_is(implementation, seed, dtype):
    """Neither a factor between encoder and decoder nor one of the input changes the choice."""
    torch.manual_seed(seed)
    W_dec, sae_in = torch.randn(16, 6, dtype=dtype), torch.randn(2, 6, dtype=dtype)
    acts = torch.randn(2, 16, dtype=dtype) * 0.5
    powers = 2.0 ** torch.randint(-6, 6, (16,)).to(dtype)  # nothing is rounded
    for kept, folded, scaled in (
        (
            leave_one_out(acts, sae_in, W_dec, 0.3),
            leave_one_out(acts * powers, sae_in, W_dec / powers[:, None], 0.3),
            leave_one_out(acts, sae_in * 4, W_dec * 4, 0.3 * 16),
        ),
        (
            keep_until_explained(acts, sae_in, W_dec, 0.4),
            keep_until_explained(acts * powers, sae_in, W_dec / powers[:, None], 0.4),
            keep_until_explained(acts * 8, sae_in * 8, W_dec, 0.4) / 8,
        ),
    ):
        assert torch.equal(folded, kept * powers)
        assert torch.equal(scaled, kept)


def test_nothing_positive_gives_zeros(rule):
    _, sae_in, W_dec = _random(3)
    acts = torch.zeros(3, 40)
    acts[1] = -1.0
    assert not rule(acts, sae_in, W_dec).any()
    assert not rule(torch.ones(3, 40), sae_in, torch.zeros(40, 8)).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_row_nan_and_no_other(rule, value):
    acts, sae_in, W_dec = _random(4)
    expected = rule(acts, sae_in, W_dec)
    spoiled = acts.clone()
    spoiled[1, 7] = value
    out = rule(spoiled, sae_in, W_dec)
    assert out[1].isnan().all()
    spoiled = sae_in.clone()
    spoiled[3, 2] = value
    other = rule(acts, spoiled, W_dec)
    assert other[3].isnan().all()
    assert torch.equal(out[[0, 2, 3]], expected[[0, 2, 3]])
    assert torch.equal(other[:3], expected[:3])
    norms = W_dec.norm(dim=-1)
    norms[5] = value
    assert rule(acts, sae_in, W_dec, norms).isnan().all()


def test_a_price_that_is_not_finite(implementation):
    acts, sae_in, W_dec = _random(3)
    out = leave_one_out(acts, sae_in, W_dec, torch.tensor([0.4, torch.nan, torch.inf]))
    assert out[1:].isnan().all()
    assert torch.equal(out[0], leave_one_out(acts[0], sae_in[0], W_dec, 0.4))
    assert leave_one_out(acts, sae_in, W_dec, float("nan")).isnan().all()


def test_decoder_rows_of_features_that_are_off_are_not_looked_at(rule):
    acts, sae_in, W_dec = _random(4)
    acts[:, 9] = -1.0
    expected = rule(acts, sae_in, W_dec)
    W_dec[9] = torch.nan
    norms = torch.where(W_dec.isnan().any(-1), 0, W_dec.norm(dim=-1))
    assert torch.equal(rule(acts, sae_in, W_dec, norms), expected)
