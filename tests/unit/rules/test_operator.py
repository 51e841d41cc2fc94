"""The prefix operator: by hand, by brute force, by exact arithmetic, and its properties."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from helpers.backends import BACKENDS, EVERY_DTYPE, is_slow
from helpers.oracle import keep_brute_force, kept_exactly, kept_exactly_of_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.topk_sae import TopK

from sae_afa_plugin import keep_prefix, top_afa
from sae_afa_plugin.rules import torch_kernel


@pytest.fixture(params=sorted(BACKENDS))
def keep(request):
    """Every backend, on tensors of the CPU."""
    return BACKENDS[request.param]


# --- by hand ---


def test_keeps_what_comes_nearest_to_the_target(keep):
    # sorted 4, 3, 2, 1: norms 4, 5, 5.385, 5.477
    acts = torch.tensor([[2.0, 3.0, 4.0, 1.0]] * 5)
    out = keep(acts, torch.tensor([0.1, 4.4, 4.6, 5.3, 9.0]))
    assert out.tolist() == [
        [0, 0, 4, 0],  # at least one feature is kept
        [0, 0, 4, 0],
        [0, 3, 4, 0],
        [2, 3, 4, 0],
        [2, 3, 4, 1],  # the norm of all of them is below the target
    ]


def test_equal_distance_takes_the_smaller_number(keep):
    # norms 4 and 5, both half a unit away
    assert keep(torch.tensor([[3.0, 4.0]]), torch.tensor([4.5])).tolist() == [[0, 4]]


def test_equal_scores_take_the_lower_index_first(keep):
    acts = torch.tensor([[0.0, 2.0, 2.0, 2.0, 2.0]])
    # norms 2, 2.83, 3.46, 4
    assert keep(acts, torch.tensor([2.9])).tolist() == [[0, 2, 2, 0, 0]]


def test_selects_by_score_and_returns_the_activation(keep):
    # scores 1, 6, 2: the feature with the smallest activation comes first
    out = keep(torch.tensor([[10.0, 1.0, 4.0]]), torch.tensor([6.0]), torch.tensor([0.1, 6.0, 0.5]))
    assert out.tolist() == [[0, 1, 0]]


def test_no_positive_score_gives_zeros(keep):
    acts = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [3.0, 0.0]])
    out = keep(acts, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert out.tolist() == [[0, 0]] * 3


def test_all_positive_and_below_the_target_keeps_the_smallest_too(keep):
    # a sentinel in place of a definition would drop the last one
    acts = torch.full((1, 8), 1e5)
    assert keep(acts, torch.tensor([1e9])).tolist() == acts.tolist()


def test_features_too_small_to_move_the_sum_are_kept_below_the_target(keep):
    acts = torch.tensor([[1.0, 1e-20, 1e-30]])
    assert keep(acts, torch.tensor([1.5])).tolist() == acts.tolist()
    assert keep(acts, torch.tensor([1.0])).count_nonzero() == 1


@pytest.mark.parametrize("scale", [1e-300, 1e300, 5e-324])
@pytest.mark.parametrize("backend", EVERY_DTYPE)
def test_float64_squares_do_not_leave_the_range(backend, scale):
    acts = torch.tensor([[3.0, 4.0, 1.0]], dtype=torch.float64) * scale
    out = BACKENDS[backend](acts, torch.tensor([5 * scale], dtype=torch.float64))
    assert (out != 0).tolist() == [[True, True, False]]


# --- by hand, other powers and the batch ---


def test_a_number_of_features_need_not_be_whole(keep):
    acts = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0]] * 6)
    kept = keep(acts, torch.tensor([-1.0, 1.4, 1.5, 1.6, 3.9, 9.0]), None, 0).count_nonzero(-1)
    # at least one, the smaller number halfway, no more than are positive
    assert kept.tolist() == [1, 1, 1, 2, 4, 4]


def test_a_sum_of_scores(keep):
    # sums 4, 7, 9, 10; 5.5 is as near to 4 as to 7
    acts = torch.tensor([[2.0, 3.0, 4.0, 1.0]] * 5)
    assert keep(acts, torch.tensor([0.0, 5.5, 5.6, 8.1, 20.0]), None, 1).tolist() == [
        [0, 0, 4, 0],
        [0, 0, 4, 0],
        [0, 3, 4, 0],
        [2, 3, 4, 0],
        [2, 3, 4, 1],
    ]


@pytest.mark.parametrize(
    ("p", "target", "expected"),
    [
        # the targets together are 4 features, a sum of 15, a norm of 7.68
        (0, [1.0, 3.0], [[5, 0, 3], [4, 3, 0]]),
        (1, [15.0, 0.0], [[5, 0, 3], [4, 3, 0]]),
        (2, [6.144, 4.608], [[5, 0, 3], [4, 3, 0]]),
        # 6.4031 is 5 and 4; one of the two scores of 3 is added above 6.7372
        (2, [6.73, 0.0], [[5, 0, 0], [4, 0, 0]]),
        (2, [6.74, 0.0], [[5, 0, 3], [4, 0, 0]]),
        # a negative target does not take from the others
        (0, [2.0, -50.0], [[5, 0, 0], [4, 0, 0]]),
        (1, [-7.0, 9.0], [[5, 0, 0], [4, 0, 0]]),
        (2, [-7.0, 0.0], [[5, 0, 0], [0, 0, 0]]),
    ],
)
def test_rows_of_a_batch_share_their_target(keep, p, target, expected):
    acts = torch.tensor([[5.0, 0.5, 3.0], [4.0, 3.0, 2.0]])
    assert keep(acts, torch.tensor(target), None, p, "batch").tolist() == expected


def test_equal_scores_of_a_batch_take_the_earlier_row_first(keep):
    acts = torch.tensor([[1.0, 2.0, 2.0], [2.0, 3.0, 2.0], [2.0, 0.0, 2.0]])
    for n in range(2, 8):
        kept = keep(acts, torch.tensor([n, 0.0, 0.0]), None, 0, "batch").flatten().nonzero()
        assert kept.flatten().tolist() == sorted([4, *[1, 2, 3, 5, 6, 8][: n - 1]])


@pytest.mark.parametrize("p", [0, 1, 2])
def test_a_batch_without_positive_scores_gives_zeros(keep, p):
    acts = torch.tensor([[0.0, 0.0], [-1.0, 3.0]])
    out = keep(acts, torch.ones(2), torch.tensor([1.0, 0.0]), p, "batch")
    assert out.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("per", ["row", "batch"])
@pytest.mark.parametrize("where", ["acts", "target", "every row"])
def test_a_row_that_is_not_finite_takes_no_part(keep, p, per, where):
    acts, target = _random(6, 30)
    acts, target = acts.round(decimals=1), {0: 5 * target, 1: 3 * target, 2: target}[p]
    others = [0, 1, 3, 4, 5]
    without = keep(acts[others], target[others], None, p, per)
    if where == "acts":
        acts[2, 3], acts[2, 5] = torch.inf, -torch.inf  # their sum is NaN
    elif where == "target":
        acts[2], target[2] = 100.0, torch.nan
    else:
        target[:] = torch.inf
    out = keep(acts, target, None, p, per)
    assert out[2].isnan().all()
    if where == "every row":
        assert out.isnan().all()
    else:
        assert torch.equal(out[others], without)
        assert 0 < without.count_nonzero() < (acts[others] > 0).sum()


@pytest.mark.parametrize("scale", [1e-300, 1e300, 5e-324])
@pytest.mark.parametrize("per", ["row", "batch"])
@pytest.mark.parametrize("backend", EVERY_DTYPE)
def test_float64_sums_do_not_leave_the_range(backend, per, scale):
    acts = torch.tensor([[3.0, 4.0, 1.0]], dtype=torch.float64) * scale
    for p, target in ((1, 7), (2, 5)):
        goal = torch.tensor([target * scale], dtype=torch.float64)
        out = BACKENDS[backend](acts, goal, None, p, per)
        assert (out != 0).tolist() == [[True, True, False]]


# --- against the oracles ---

# of each narrow width; a million for each backend: ROWS=14000
ROWS = int(os.environ.get("ROWS", "4000"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("per", ["row", "batch"])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_agrees_with_brute_force_on_many_rows(dtype, p, per, backend):
    if dtype is torch.float64 and backend not in EVERY_DTYPE:
        pytest.skip("the kernels are for float32 and less")
    rng = torch.Generator().manual_seed(0)
    kept, positive = 0, 0
    for d_sae in (7, 150) if is_slow(backend) else (1, 2, 7, 33, 300, 1100):
        n = 3 if is_slow(backend) else ROWS if d_sae < 100 else ROWS * 3 // 40
        acts = torch.randn(n, d_sae, generator=rng).relu().to(dtype)
        # norms for half of the widths, so that both ways of calling are there
        decoder_norm = torch.rand(d_sae, generator=rng) + 0.5 if d_sae % 2 else None
        wide = acts.to(torch.promote_types(dtype, torch.float32))
        scores = wide if decoder_norm is None else wide * decoder_norm.to(wide.dtype)
        # targets from nothing to beyond all of the row
        share = torch.rand(n, generator=rng).to(wide.dtype) * 1.2
        targets = share * ((scores > 0).sum(-1) if p == 0 else scores.norm(p, dim=-1))
        size = n if per == "row" or is_slow(backend) else n // 20  # rows of a batch
        for some in range(0, n, size):
            part = slice(some, some + size)
            out = BACKENDS[backend](acts[part], targets[part], decoder_norm, p, per)
            mask = keep_brute_force(scores[part].numpy(), targets[part].numpy(), p, per)
            assert torch.equal(out, torch.where(torch.from_numpy(mask), acts[part], 0))
        kept, positive = kept + mask.sum(), positive + (acts[part] > 0).sum()
    assert 0.05 * positive < kept < 0.95 * positive


_VALUES = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, 0.5, 2**-10, 1e3]),
    st.floats(0, 100, width=16),
)


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(_VALUES, min_size=1, max_size=140),
    norms=st.one_of(
        st.none(), st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=140, max_size=140)
    ),
    target=st.floats(-1, 400, width=16),
    exponent=st.integers(-90, 90),  # squares of float32 leave the range of float32
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    backend=st.sampled_from(sorted(BACKENDS)),
    p=st.sampled_from([0, 1, 2]),
)
def test_agrees_with_exact_arithmetic(values, norms, target, exponent, dtype, backend, p):
    if dtype is torch.float64 and backend not in EVERY_DTYPE:
        dtype = torch.float32
    if dtype is torch.float16:
        exponent = 0  # it has no room
    acts = (torch.tensor(values, dtype=torch.float64) * 2.0**exponent).to(dtype)
    norm = None if norms is None else torch.tensor(norms[: len(values)])
    wide = acts.to(torch.promote_types(dtype, torch.float32))
    scores = wide if norm is None else wide * norm
    unit = 1.0 if p == 0 else 2.0**exponent
    t = (torch.tensor([target], dtype=torch.float64) * unit).to(wide.dtype)
    out = BACKENDS[backend](acts[None], t, norm, p)[0]
    expected = torch.zeros_like(acts)
    kept = kept_exactly(scores.tolist(), t.item(), p)
    expected[kept] = acts[kept]
    assert torch.equal(out, expected)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(_VALUES, min_size=1, max_size=80),
    n_rows=st.integers(1, 5),
    target=st.lists(st.floats(-1, 200, width=16), min_size=5, max_size=5),
    bad=st.one_of(st.none(), st.integers(0, 4)),
    exponent=st.integers(-90, 90),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    backend=st.sampled_from(sorted(BACKENDS)),
    p=st.sampled_from([0, 1, 2]),
)
def test_a_batch_agrees_with_exact_arithmetic(
    values, n_rows, target, bad, exponent, dtype, backend, p
):
    if dtype is torch.float64 and backend not in EVERY_DTYPE:
        dtype = torch.float32
    width = -(-len(values) // n_rows)
    values = values + [1.0] * (n_rows * width - len(values))
    acts = (torch.tensor(values, dtype=torch.float64).view(n_rows, width) * 2.0**exponent).to(dtype)
    unit = 1.0 if p == 0 else 2.0**exponent
    t = torch.tensor(target[:n_rows], dtype=torch.float64) * unit
    t = t.to(torch.promote_types(dtype, torch.float32))
    if bad is not None and bad < n_rows:
        acts[bad, -1] = torch.nan
    out = BACKENDS[backend](acts, t, None, p, "batch")
    expected = torch.zeros_like(acts)
    kept = kept_exactly_of_batch(acts.tolist(), t.tolist(), p)
    for i in range(n_rows):
        expected[i, kept[i]] = acts[i, kept[i]]
        if i == bad:
            expected[i] = torch.nan
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("p", [0, 1, 2])
def test_the_oracles_agree_with_each_other(p):
    rng = np.random.default_rng(0)
    scores = np.maximum(rng.integers(-3, 6, (500, 9)), 0).astype(np.float64)
    targets = rng.uniform(-1, 12, 500)
    masks = keep_brute_force(scores, targets, p)
    for row, target, mask in zip(scores, targets, masks, strict=True):
        assert np.flatnonzero(mask).tolist() == kept_exactly(row.tolist(), target, p)
    for i in range(0, 500, 5):
        rows, some = scores[i : i + 5], targets[i : i + 5] * 1.5
        rows[i % 4, 2] = [np.nan, 1.0, -np.inf][i % 3]
        kept = kept_exactly_of_batch(rows.tolist(), some.tolist(), p)
        masks = keep_brute_force(rows, some, p, "batch")
        assert [np.flatnonzero(mask).tolist() for mask in masks] == kept


# --- properties ---


def _random(*shape, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    acts = torch.randn(*shape, generator=rng, dtype=dtype).relu()
    return acts, acts.norm(dim=-1) * torch.rand(shape[:-1], generator=rng, dtype=dtype)


def test_any_leading_shape():
    acts, target = _random(4, 3, 20)
    out = top_afa(acts, target)
    assert out.shape == acts.shape
    for i in range(4):
        for j in range(3):
            assert torch.equal(out[i, j], top_afa(acts[i, j], target[i, j]))
    assert top_afa(acts[:0], target[:0]).shape == (0, 3, 20)


@pytest.mark.parametrize("p", [0, 1, 2])
def test_any_leading_shape_of_a_batch(p):
    acts, target = _random(4, 3, 20)
    out = keep_prefix(acts, target, p=p, per="batch")
    flat = keep_prefix(acts.view(12, 20), target.view(12), p=p, per="batch")
    assert torch.equal(out, flat.view_as(acts))
    assert 0 < out.count_nonzero() < (acts > 0).sum()
    one = keep_prefix(acts[0, 0], target[0, 0], p=p, per="batch")
    assert torch.equal(one, keep_prefix(acts[0, 0], target[0, 0], p=p))
    assert keep_prefix(acts[:0], target[:0], p=p, per="batch").shape == (0, 3, 20)


def test_top_afa_is_its_case():
    acts, target = _random(50, 40)
    norms = torch.rand(40) + 0.5
    out = top_afa(acts, target, norms)
    assert torch.equal(out, keep_prefix(acts, target, norms))
    assert torch.equal(out, keep_prefix(acts, target, norms, p=2, per="row"))
    assert not torch.equal(out, keep_prefix(acts, target, norms, p=1))
    assert not torch.equal(out, keep_prefix(acts, target, norms, per="batch"))


def test_numbers_of_features_are_what_saelens_keeps():
    acts = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    k = torch.full((30,), 7.0)
    assert torch.equal(keep_prefix(acts, k, p=0), TopK(7)(acts))
    assert torch.equal(keep_prefix(acts, k, p=0, per="batch"), BatchTopK(7)(acts))


def test_a_batch_has_one_threshold():
    acts, target = _random(30, 40)
    kept = keep_prefix(acts, target, per="batch") != 0
    assert acts[kept].min() > acts[~kept].max()
    norm, total = acts[kept].norm(), target.norm()
    assert (norm - total).abs() <= acts[kept].min()  # one feature less or more is further away
    order = torch.randperm(30)
    permuted = keep_prefix(acts[order], target[order], per="batch")
    assert torch.equal(permuted != 0, kept[order])


def test_non_contiguous_input():
    acts, target = _random(20, 6)
    transposed = torch.empty(6, 20).t().copy_(acts)
    assert torch.equal(top_afa(transposed, target), top_afa(acts, target))


def test_permuting_features_permutes_the_result():
    acts, target = _random(50, 40)
    norms = torch.rand(40) + 0.5
    order = torch.randperm(40)
    assert torch.equal(
        top_afa(acts[:, order], target, norms[order]), top_afa(acts, target, norms)[:, order]
    )


@pytest.mark.parametrize("power", [-30, 30])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("per", ["row", "batch"])
def test_scaling_acts_and_target_keeps_the_same_features(power, p, per):
    acts, target = _random(50, 40)
    scale = 2.0**power
    scaled = keep_prefix(acts * scale, target * scale, p=p, per=per)
    assert torch.equal(scaled, keep_prefix(acts, target, p=p, per=per) * scale)


def test_moving_scale_between_acts_and_norms_keeps_the_same_features():
    acts, target = _random(50, 40)
    powers = 2.0 ** torch.randint(-3, 4, (40,))
    assert torch.equal(top_afa(acts / powers, target, powers) * powers, top_afa(acts, target))


def test_not_positive_entries_need_no_relu():
    pre = torch.randn(50, 40)
    target = pre.relu().norm(dim=-1) * 0.7
    assert torch.equal(top_afa(pre, target), top_afa(pre.relu(), target))


def test_rows_are_independent_across_chunks(monkeypatch):
    acts, target = _random(64, 50)
    whole = torch_kernel.keep_prefix(acts, target, None, 2, "row")
    monkeypatch.setattr(torch_kernel, "_CPU_CHUNK", 150)
    assert torch.equal(torch_kernel.keep_prefix(acts, target, None, 2, "row"), whole)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["acts", "target"])
def test_a_row_that_is_not_finite_shows_and_stays_alone(keep, bad, where):
    acts, target = _random(6, 30)
    clean = keep(acts, target)
    acts, target = acts.clone(), target.clone()
    if where == "acts":
        acts[2, 5] = bad
    else:
        target[2] = bad
    out = keep(acts, target)
    assert out[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(out[others], clean[others])


# --- what autograd and the compiler see ---


@pytest.mark.parametrize("per", ["row", "batch"])
def test_gradient_passes_to_kept_features_only(per):
    acts, target = _random(5, 30)
    acts.requires_grad_()
    norms = (torch.rand(30) + 0.5).requires_grad_()
    target = target.clone().requires_grad_()
    out = keep_prefix(acts, target, norms, per=per)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    assert torch.equal(acts.grad, torch.where(out != 0, weights, 0))
    assert target.grad is None
    assert norms.grad is None


def test_gradcheck():
    # far from the points where the choice changes
    acts = torch.tensor([[3.0, 4.0, 1.0, 0.2], [1.0, 0.5, 2.0, 0.3]], dtype=torch.float64)
    acts.requires_grad_()
    target = torch.tensor([5.02, 2.2], dtype=torch.float64)
    norms = torch.tensor([1.0, 1.1, 0.9, 1.2], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: top_afa(a, target, norms), (acts,))


@pytest.mark.parametrize("per", ["row", "batch"])
def test_opcheck(per):
    acts, target = _random(5, 30)
    torch.library.opcheck(
        torch.ops.sae_afa_plugin.keep_prefix.default,
        (acts.requires_grad_(), target, torch.ones(30), 1, per),
    )


@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("per", ["row", "batch"])
def test_compiles_without_graph_breaks(p, per):
    acts, target = _random(5, 30)
    acts.requires_grad_()

    def loss(acts, target):
        return (2 * keep_prefix(acts, target, p=p, per=per)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(acts, target), acts)
    (grad,) = torch.autograd.grad(compiled(acts, target), acts)
    assert torch.equal(grad, expected)
    assert 0 < expected.count_nonzero() < (acts > 0).sum()


@pytest.mark.parametrize("per", ["row", "batch"])
def test_meta_device(per):
    acts = torch.empty(3, 7, 40, device="meta", dtype=torch.bfloat16)
    target, norms = torch.empty(3, 7, device="meta"), torch.empty(40, device="meta")
    out = keep_prefix(acts, target, norms, p=1, per=per)
    assert (out.shape, out.dtype, out.device.type) == (acts.shape, acts.dtype, "meta")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (torch.ones(2, 3), torch.ones(3)),
            r"target_norm must have the shape of acts without its last dimension: got \(3,\) for "
            r"acts of shape \(2, 3\)",
        ),
        (
            (torch.ones(2, 3), torch.ones(2), torch.ones(2)),
            r"decoder_norm must have shape \(3,\), one entry for each feature of acts: got \(2,\)",
        ),
        ((torch.ones(2, 3).long(), torch.ones(2)), "acts must be floating point: got torch.int64"),
        (
            (torch.ones(2, 3), torch.ones(2, device="meta")),
            r"target_norm must be on the device of acts \(cpu\): got meta",
        ),
    ],
)
def test_what_does_not_fit_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        top_afa(*args)


def test_what_keep_prefix_does_not_know_is_refused():
    acts, target = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="^p must be 0, 1 or 2: got 3$"):
        keep_prefix(acts, target, p=3)
    with pytest.raises(ValueError, match="^per must be 'row' or 'batch': got 'token'$"):
        keep_prefix(acts, target, per="token")
    with pytest.raises(ValueError, match=r"^target must have the shape of acts without its last"):
        keep_prefix(acts, torch.ones(2, 1))
