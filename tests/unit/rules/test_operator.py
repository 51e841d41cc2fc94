"""The top-AFA rule: by hand, by brute force, by exact arithmetic, and its properties."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.oracle import keep_brute_force, kept_exactly
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_afa_plugin.rules import numba_kernel, operator, triton_kernel
from sae_afa_plugin.rules.operator import top_afa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets itself on the CPU


def _numba(acts, target_norm, decoder_norm=None):
    return numba_kernel.top_afa(acts, target_norm, decoder_norm)


def _triton(acts, target_norm, decoder_norm=None):
    norms = None if decoder_norm is None else decoder_norm.to(DEVICE)
    return triton_kernel.top_afa(acts.to(DEVICE), target_norm.to(DEVICE), norms).cpu()


def _triton_wide(acts, target_norm, decoder_norm=None):
    with pytest.MonkeyPatch.context() as patch:  # rows of any width as if they did not fit
        patch.setattr(triton_kernel, "_RESIDENT", 0)
        patch.setattr(triton_kernel, "_TILE", 64)
        return _triton(acts, target_norm, decoder_norm)


def _partial_selection(acts, target_norm, decoder_norm=None):
    keep = operator._KeepByPartialSelection()
    return operator._by_chunks(acts, target_norm, decoder_norm, keep)


def _stable_sort(acts, target_norm, decoder_norm=None):
    return operator._by_chunks(acts, target_norm, decoder_norm, operator._keep_by_stable_sort)


EVERY_DTYPE = {"partial selection": _partial_selection, "stable sort": _stable_sort}
BACKENDS = {**EVERY_DTYPE, "numba": _numba, "triton": _triton, "triton wide": _triton_wide}


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


# --- against the oracles ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_agrees_with_brute_force_on_many_rows(dtype, with_norms, backend):
    if dtype is torch.float64 and backend not in EVERY_DTYPE:
        pytest.skip("the kernels are for float32 and less")
    interpreted = "triton" in backend and DEVICE == "cpu"
    rows = 0
    rng = torch.Generator().manual_seed(0)
    for d_sae in (1, 7, 33, 150) if interpreted else (1, 2, 7, 33, 300, 1100):
        n = 12 if interpreted else 10_000 if d_sae < 100 else 300
        acts = torch.randn(n, d_sae, generator=rng).relu().to(dtype)
        decoder_norm = torch.rand(d_sae, generator=rng) + 0.5 if with_norms else None
        wide = acts.to(torch.promote_types(dtype, torch.float32))
        scores = wide if decoder_norm is None else wide * decoder_norm.to(wide.dtype)
        # targets from nothing to beyond the norm of everything
        targets = scores.norm(dim=-1) * torch.rand(n, generator=rng).to(wide.dtype) * 1.2
        expected = torch.where(
            torch.from_numpy(keep_brute_force(scores.numpy(), targets.numpy())), acts, 0
        )
        assert torch.equal(BACKENDS[backend](acts, targets, decoder_norm), expected)
        rows += n
    assert rows == (48 if interpreted else 40_600)


_VALUES = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, 0.5, 1e-3, 1e3]),
    st.floats(0, 100, width=16),
)


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(_VALUES, min_size=1, max_size=140),
    norms=st.one_of(
        st.none(), st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=140, max_size=140)
    ),
    target=st.floats(0, 400, width=16),
    exponent=st.integers(-90, 90),  # squares of float32 leave the range of float32
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    backend=st.sampled_from(sorted(BACKENDS)),
)
def test_agrees_with_exact_arithmetic(values, norms, target, exponent, dtype, backend):
    if dtype is torch.float64 and backend not in EVERY_DTYPE:
        dtype = torch.float32
    if dtype is torch.float16:
        exponent = 0  # it has no room
    acts = (torch.tensor(values, dtype=torch.float64) * 2.0**exponent).to(dtype)
    norm = None if norms is None else torch.tensor(norms[: len(values)])
    wide = acts.to(torch.promote_types(dtype, torch.float32))
    scores = wide if norm is None else wide * norm
    t = (torch.tensor([target], dtype=torch.float64) * 2.0**exponent).to(wide.dtype)
    out = BACKENDS[backend](acts[None], t, norm)[0]
    expected = torch.zeros_like(acts)
    kept = kept_exactly(scores.tolist(), t.item())
    expected[kept] = acts[kept]
    assert torch.equal(out, expected)


def test_the_oracles_agree_with_each_other():
    rng = np.random.default_rng(0)
    scores = np.maximum(rng.integers(-3, 6, (500, 9)), 0).astype(np.float64)
    targets = rng.uniform(0, 12, 500)
    for row, target, mask in zip(scores, targets, keep_brute_force(scores, targets), strict=True):
        assert np.flatnonzero(mask).tolist() == kept_exactly(row.tolist(), target)


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
def test_scaling_acts_and_target_keeps_the_same_features(power):
    acts, target = _random(50, 40)
    scale = 2.0**power
    assert torch.equal(top_afa(acts * scale, target * scale), top_afa(acts, target) * scale)


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
    whole = top_afa(acts, target)
    monkeypatch.setattr(operator, "_CPU_CHUNK", 150)
    assert torch.equal(top_afa(acts, target), whole)


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


# --- the kernels ---


@pytest.mark.parametrize("d_sae", [triton_kernel._RESIDENT, triton_kernel._RESIDENT + 100])
def test_triton_at_the_width_where_rows_no_longer_fit(d_sae):
    rng = torch.Generator().manual_seed(0)
    acts = torch.randn(2, d_sae, generator=rng).round(decimals=2)  # with ties
    target = acts.relu().norm(dim=-1) * torch.tensor([0.1, 0.7])
    expected = keep_brute_force(acts.numpy(), target.numpy())
    assert torch.equal(_triton(acts, target), torch.where(torch.from_numpy(expected), acts, 0))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for CUDA on Linux only")
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles_for_cards_that_are_not_here(capability):
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_afa_plugin.rules.triton_kernel import keep_row, n_warps

for resident, dtype in ((16384, "fp32"), (32768, "bf16"), (0, "fp16")):
    pointers = dict(acts_ptr="*" + dtype, norms_ptr="*fp32", target_ptr="*fp32")
    constants = dict(HAS_NORMS=True, RESIDENT=resident, TILE=1024)
    signature = pointers | dict(out_ptr="*" + dtype, d_sae="i32") | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(keep_row, signature, constexprs=constants),
        target=GPUTarget("cuda", {capability}, 32),
        options=dict(num_warps=n_warps(resident), enable_fp_fusion=False),
    )
    print(len(compiled.asm["cubin"]) > 0)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["True"] * 3, done.stderr


def test_numba_is_what_runs_here_and_torch_without_it(monkeypatch):
    acts, target = _random(40, 300)
    assert operator.backend(acts) == "numba"
    assert operator.backend(acts.double()) == "torch"
    expected = top_afa(acts, target)
    monkeypatch.setitem(sys.modules, "numba", None)  # as if it were not installed
    numba_kernel.compiled.cache_clear()
    try:
        assert operator.backend(acts) == "torch"
        assert torch.equal(top_afa(acts, target), expected)
        with pytest.raises(
            RuntimeError, match=r"needs Numba: pip install 'sae-afa-plugin\[fast\]'"
        ):
            numba_kernel.top_afa(acts, target, None)
    finally:
        numba_kernel.compiled.cache_clear()


def test_numba_compiles_where_no_cache_can_be_written(monkeypatch):
    import numba

    def njit(signature, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba_njit(signature, **options)

    numba_njit = numba.njit
    monkeypatch.setattr(numba, "njit", njit)
    acts, target = _random(40, 300)
    expected = numba_kernel.top_afa(acts, target, None)
    numba_kernel.compiled.cache_clear()
    try:
        assert torch.equal(numba_kernel.top_afa(acts, target, None), expected)
    finally:
        numba_kernel.compiled.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numba_does_not_depend_on_threads_and_chunks(monkeypatch, dtype):
    acts, target = _random(61, 500)
    acts = acts.to(dtype)
    whole = numba_kernel.top_afa(acts, target, None)
    monkeypatch.setattr(numba_kernel, "_ELEMENTS_PER_THREAD", 1500)
    monkeypatch.setattr(numba_kernel, "_CONVERTED", 3500)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(numba_kernel.top_afa(acts, target, None), whole)
    finally:
        torch.set_num_threads(threads)


def test_flushed_denormals_are_not_kept(keep):
    acts, norms = torch.tensor([[5.0, 3.0, -1.0]]), torch.tensor([0.0, 1.0, 1.0])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert keep(acts, torch.tensor([100.0]), norms).tolist() == [[0, 3, 0]]
    finally:
        torch.set_flush_denormal(False)


def test_numba_looks_again_where_the_next_row_keeps_much_more():
    # the second row's cut is far below half the cut of the first one
    acts = torch.cat([torch.full((1, 200), 100.0), torch.full((1, 200), 1.0)])
    kept = numba_kernel.top_afa(acts, torch.tensor([100.0, 9.9]), None).count_nonzero(-1)
    assert kept.tolist() == [1, 98]  # sqrt(98) = 9.8995, sqrt(99) = 9.95


# --- what autograd and the compiler see ---


def test_gradient_passes_to_kept_features_only():
    acts, target = _random(5, 30)
    acts.requires_grad_()
    norms = (torch.rand(30) + 0.5).requires_grad_()
    target = target.clone().requires_grad_()
    out = top_afa(acts, target, norms)
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


def test_opcheck():
    acts, target = _random(5, 30)
    torch.library.opcheck(
        torch.ops.sae_afa_plugin.top_afa.default,
        (acts.requires_grad_(), target, torch.ones(30)),
    )


def test_compiles_without_graph_breaks():
    acts, target = _random(5, 30)
    acts.requires_grad_()
    compiled = torch.compile(
        lambda a, t: (2 * top_afa(a, t)).square().sum(), fullgraph=True, backend="aot_eager"
    )
    (expected,) = torch.autograd.grad((2 * top_afa(acts, target)).square().sum(), acts)
    (grad,) = torch.autograd.grad(compiled(acts, target), acts)
    assert torch.equal(grad, expected)


def test_meta_device():
    acts = torch.empty(3, 7, 40, device="meta", dtype=torch.bfloat16)
    out = top_afa(acts, torch.empty(3, 7, device="meta"), torch.empty(40, device="meta"))
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
