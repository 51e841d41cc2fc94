"""What is particular to a backend: widths, threads, caches, cards, and how one is found."""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from helpers.backends import BACKENDS
from helpers.oracle import keep_brute_force

from sae_afa_plugin import keep_prefix, rules, top_afa
from sae_afa_plugin.rules import numba_kernel, operator, triton_kernel


def _random(*shape, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    acts = torch.randn(*shape, generator=rng, dtype=dtype).relu()
    return acts, acts.norm(dim=-1) * torch.rand(shape[:-1], generator=rng, dtype=dtype)


# --- Triton ---


@pytest.mark.parametrize("d_sae", [triton_kernel._RESIDENT, triton_kernel._RESIDENT + 100])
def test_triton_at_the_width_where_rows_no_longer_fit(d_sae):
    rng = torch.Generator().manual_seed(0)
    acts = torch.randn(3, d_sae, generator=rng).round(decimals=2)  # with ties
    target = acts.relu().norm(dim=-1) * torch.tensor([0.1, 0.7, 1.1])
    expected = keep_brute_force(acts.numpy(), target.numpy())
    out = BACKENDS["triton"](acts, target)
    assert torch.equal(out, torch.where(torch.from_numpy(expected), acts, 0))


def test_triton_where_the_sample_says_the_wrong_thing():
    """All that is large stands where the sample does not look, or everything does."""
    d_sae, n_runs = triton_kernel._RESIDENT + 7, triton_kernel._SAMPLE // 32
    sampled = torch.arange(d_sae) % (d_sae // n_runs) < 32
    small = torch.rand(d_sae, generator=torch.Generator().manual_seed(0))
    acts = torch.stack(
        [
            torch.where(sampled, small, 100 + small),  # more is put aside than there is room for
            torch.where(sampled, 100 + small, small),  # what is put aside is not enough
            torch.where(sampled, -small, small),  # nothing in the sample is positive
            torch.where(sampled, torch.nan, small),
        ]
    )
    target = acts.nan_to_num().relu().norm(dim=-1) * 0.999
    expected = keep_brute_force(acts[:3].numpy(), target[:3].numpy())
    out = BACKENDS["triton"](acts, target)
    assert torch.equal(out[:3], torch.where(torch.from_numpy(expected), acts[:3], 0))
    assert out[3].isnan().all()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for CUDA on Linux only")
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles_for_cards_that_are_not_here(capability):
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_afa_plugin.rules import residual_triton as residual
from sae_afa_plugin.rules import triton_kernel as kernels

KINDS = dict(
    norms="*fp32", target="*fp32", aside="*fp32", largest="*i32", pivots="*i32", sums="*fp64",
    cut="*i32", above="*fp64", n_equal="*i32", numbers="*i64", values="*fp64", before="*i64",
    counts="*i32", features="*i32", scores="*fp32", prices="*fp32", leniencies="*fp32",
    unexplained="fp32",
)

def compiles(kernel, dtype, num_warps, **constants):
    if "HAS_NORMS" in kernel.arg_names:
        constants |= dict(HAS_NORMS=True)
    kinds = KINDS | {{name: "*" + dtype for name in ("acts", "out", "in", "W_dec")}}
    signature = {{
        name: "constexpr" if name in constants else kinds.get(name.removesuffix("_ptr"), "i32")
        for name in kernel.arg_names
    }}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", {capability}, 32),
        options=dict(num_warps=num_warps, enable_fp_fusion=False),
    )
    print(len(compiled.asm["cubin"]) > 0)

for width, dtype, p in ((12288, "fp32", 2), (32768, "bf16", 1)):
    size, n = kernels.pieces(width)
    compiles(kernels.keep_row, dtype, kernels.n_warps(width), P=p, SIZE=size, N=n)
compiles(kernels.keep_wide_row, "fp16", 16, P=0, TILE=4096, SAMPLE=4096, CANDIDATES=16384)
compiles(kernels.scan_row, "fp32", 8, TILE=1024)
for kernel, p in ((kernels.sum_row, 2), (kernels.count_row, 1), (kernels.write_row, 0)):
    compiles(kernel, "bf16", 8, P=p, TILE=1024)
compiles(residual.count_offered, "bf16", 4, TILE=1024)
compiles(residual.put_aside, "bf16", 4, TILE=1024)
for dtype, width in (("fp32", 1024), ("bf16", 8192)):
    compiles(residual.leave_one_out_row, dtype, 4, D=width, TILE=1024)
    compiles(residual.until_explained_row, dtype, 4, D=width, TILE=1024)
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["True"] * 13, done.stderr


# --- Numba ---


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
            numba_kernel.keep_prefix(acts, target, None, 2, "row")
    finally:
        numba_kernel.compiled.cache_clear()


_DOUBLE = """
def double(values):
    for i in range(values.shape[0]):
        values[i] *= 2.0
"""


def compiled_in(folder, source):
    """Compile a function with its cache in a folder: whether it had to be, or was loaded."""
    if not source.exists():  # Numba looks at its time
        source.write_text(_DOUBLE)
    spec = importlib.util.spec_from_file_location("doubling", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "CACHE_DIR", str(folder))
        kernel = numba_kernel.compile_kernel(module.double, "void(f4[::1])")
    values = np.arange(3, dtype=np.float32)
    kernel(values)
    assert values.tolist() == [0.0, 2.0, 4.0]
    with pytest.raises(TypeError):  # nothing is compiled that was not asked for
        kernel(np.arange(3))
    return "loaded" if sum(kernel.stats.cache_hits.values()) else "compiled"


def _as_a_directory(file):
    file.unlink()
    file.mkdir()


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "noise": lambda file: file.write_bytes(random.Random(0).randbytes(file.stat().st_size)),
    "another pickle": lambda file: file.write_bytes(pickle.dumps(42)),
    "other pickles": lambda file: file.write_bytes(  # of this Numba, as it seems
        pickle.dumps(numba.__version__) + pickle.dumps(("a", "b", "c"))
    ),
    "a class that is gone": lambda file: file.write_bytes(b"cno_such_module\nClass\n."),
    "unreadable": lambda file: file.chmod(0),
    "a directory": _as_a_directory,
}


@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_of_numba_is_made_again(tmp_path, damage, kind):
    folder, source = tmp_path / "cache", tmp_path / "doubling.py"
    assert [compiled_in(folder, source) for _ in range(2)] == ["compiled", "loaded"]
    (file,) = folder.rglob(f"*{kind}")
    if damage == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads it: see the test without its capabilities")
    DAMAGES[damage](file)
    assert compiled_in(folder, source) == "compiled"
    # a directory is not deleted: somebody may have put something there
    assert compiled_in(folder, source) == ("compiled" if damage == "a directory" else "loaded")


def test_a_cache_of_numba_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    in_the_way = tmp_path / "__pycache__"
    for name in ("HOME", "XDG_CACHE_HOME"):  # where it would go if not there
        monkeypatch.setenv(name, str(in_the_way))
    in_the_way.write_text("a file")
    source = tmp_path / "doubling.py"
    assert [compiled_in(in_the_way, source) for _ in range(2)] == ["compiled"] * 2


_WITHOUT_CAPABILITIES = """
import sys
from pathlib import Path
from unit.rules import test_backends as tests

for kind in (".nbi", ".nbc"):
    folder = Path(sys.argv[1]) / kind
    folder.mkdir()
    tests.compiled_in(folder / "cache", folder / "doubling.py")
    (file,) = (folder / "cache").rglob(f"*{kind}")
    file.chmod(0)
    print(*(tests.compiled_in(folder / "cache", folder / "doubling.py") for _ in range(2)))
(folder,) = (Path(sys.argv[1]) / ".nbi" / "cache").iterdir()
for file in folder.iterdir():
    file.write_bytes(b"damaged")
folder.chmod(0o555)
print(*(tests.compiled_in(folder.parent, folder.parents[1] / "doubling.py") for _ in range(2)))
folder.chmod(0o755)
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_a_cache_of_numba_without_permissions_is_no_mistake(tmp_path):
    """Root, who may do anything, lets go of that."""
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    tests = Path(__file__).parents[2]
    done = subprocess.run(
        [*drop, sys.executable, "-c", _WITHOUT_CAPABILITIES, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["compiled loaded"] * 2
    assert done.stdout.splitlines()[2].startswith("compiled")


def test_top_afa_survives_a_cache_that_is_all_damaged(tmp_path, monkeypatch):
    acts, target = _random(40, 300)
    expected = numba_kernel.keep_prefix(acts, target, None, 2, "row")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    try:
        for _ in range(2):
            numba_kernel.compiled.cache_clear()
            assert operator.backend(acts) == "numba"
            assert torch.equal(top_afa(acts, target), expected)
            files = [file for file in tmp_path.rglob("*") if file.is_file()]
            assert len(files) == 2
            for file in files:
                file.write_bytes(b"damaged")
    finally:
        numba_kernel.compiled.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("per", ["row", "batch"])
def test_numba_does_not_depend_on_threads_and_chunks(monkeypatch, dtype, p, per):
    acts, target = _random(61, 500)
    acts = acts.round(decimals=1).to(dtype)  # with ties across the parts
    whole = numba_kernel.keep_prefix(acts, target, None, p, per)
    monkeypatch.setattr(numba_kernel, "_ELEMENTS_PER_THREAD", 1500)
    monkeypatch.setattr(numba_kernel, "_CONVERTED", 3500)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(numba_kernel.keep_prefix(acts, target, None, p, per), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("per", ["row", "batch"])
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_flushed_denormals_are_not_kept(name, per):
    acts, norms = torch.tensor([[5.0, 3.0, -1.0]]), torch.tensor([0.0, 1.0, 1.0])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        for target in (0.0, 100.0):
            out = BACKENDS[name](acts, torch.tensor([target]), norms, 2, per)
            assert out.tolist() == [[0, 3, 0]]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("per", ["row", "batch"])
def test_numba_keeps_the_smallest_score_of_the_bucket_above_the_cut(per):
    # 2 is the first number of the bucket above that of 1.97, and 1.4 features are nearer to 1 than to 2
    acts = torch.tensor([[1.97, 2.0]])
    out = numba_kernel.keep_prefix(acts, torch.tensor([1.4]), None, 0, per)
    assert out.tolist() == [[0, 2]]


def test_numba_looks_again_where_the_next_row_keeps_much_more():
    # the second row's cut is far below half the cut of the first one
    acts = torch.cat([torch.full((1, 200), 100.0), torch.full((1, 200), 1.0)])
    kept = numba_kernel.keep_prefix(acts, torch.tensor([100.0, 9.9]), None, 2, "row").count_nonzero(
        -1
    )
    assert kept.tolist() == [1, 98]  # sqrt(98) = 9.8995, sqrt(99) = 9.95


# --- finding them ---

NEW_BACKEND = """
from sae_afa_plugin.rules.operator import Backend

def keep_prefix(acts, target, decoder_norm, p, per):
    return -acts

BACKEND = Backend("new", -1, lambda acts, p, per: p == 1 and per == "row", keep_prefix)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose modules belong to the package of rules."""
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    before = set(sys.modules)
    operator.backends.cache_clear()
    yield tmp_path
    operator.backends.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith(rules.__name__):
            del sys.modules[name], rules.__dict__[name.rpartition(".")[2]]


def test_a_new_backend_is_a_new_file(folder):
    acts, target = _random(40, 300)
    expected = BACKENDS["numba"](acts, target)
    (folder / "new_kernel.py").write_text(NEW_BACKEND)
    (folder / "new_helper.py").write_text("raise AssertionError('not a backend')")
    assert torch.equal(keep_prefix(acts, target, p=1), -acts)
    assert operator.backend(acts, p=1) == "new"
    assert operator.backend(acts, p=1, per="batch") == operator.backend(acts) == "numba"
    assert torch.equal(keep_prefix(acts, target), expected)


def test_a_backend_in_a_language_that_is_not_installed_is_left_out(folder):
    (folder / "new_kernel.py").write_text("import a_language_that_is_not_installed")
    assert [each.name for each in operator.backends()] == ["numba", "triton", "torch"]


def test_a_backend_with_a_mistake_is_not_passed_over(folder):
    (folder / "new_kernel.py").write_text("from sae_afa_plugin.rules.operator import Backends")
    with pytest.raises(ImportError, match="cannot import name 'Backends'"):
        operator.backends()
