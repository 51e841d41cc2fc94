"""What an evaluation takes beside the SAE's own weights, measured against what the docs promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20
# docs/evaluation.md, "Memory and time"
MATRIX, MATRICES, PER_TOKEN, FIXED = 128 * MIB, 6, 130, 40 * MIB

CLEAR_REFS = Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(
    not os.access(CLEAR_REFS, os.W_OK), reason="the peak of a process is reset by Linux alone"
)

SCRIPT = """
import ctypes, gc, json, sys, tempfile
from dataclasses import replace
from pathlib import Path

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.synthetic import ZipfianFiringProbabilityConfig
from sae_afa_plugin import dictionary_coherence, evaluate_saes
from sae_afa_plugin.activations.synthetic import HIERARCHY_WORLD, SyntheticActivations
from sae_afa_plugin.activations.tensors import TensorActivations
from sae_afa_plugin.groups.known_truth import KnownTruth
from sae_afa_plugin.spaces import linear_code

torch.manual_seed(0)

def status(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

def peak(work):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

def evaluation(d_in, d_sae, n_tokens, shift):
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    with torch.no_grad():
        sae.b_enc += shift
    sae.cfg.metadata.hook_name = "here"
    activations = TensorActivations({"here": torch.randn(n_tokens, d_in)}, settings={"a": 1})

    def work():
        with tempfile.TemporaryDirectory() as out:
            evaluate_saes(
                {"a": sae}, activations=activations, out=out, progress=False, coherence=False
            )

    return work

def synthetic(num_features, n_tokens):
    firing = ZipfianFiringProbabilityConfig(0.5, 0.4, 5e-4)
    cfg = replace(HIERARCHY_WORLD, num_features=num_features, firing_probability=firing)
    source = SyntheticActivations(cfg, n_tokens)

    def work():
        for n in range(0, n_tokens, 64):
            source.read(["synthetic"], n, n + 1)

    return work

def known_truth(d_sae, num_features):
    sae = StandardSAE(StandardSAEConfig(d_in=96, d_sae=d_sae))
    firing = ZipfianFiringProbabilityConfig(0.5, 0.4, 5e-4)
    cfg = replace(HIERARCHY_WORLD, num_features=num_features, firing_probability=firing)
    source = SyntheticActivations(cfg, 2048)
    group, code = KnownTruth().start(linear_code(sae), source), linear_code(sae)
    x = source.read(["synthetic"], 0, 1024)["synthetic"]
    tokens = code.read(x, None, slice(0, 1024))
    tokens.finite
    return lambda: group.add(tokens)

def coherence(d_sae, d_in):
    W_dec = torch.randn(d_sae, d_in)
    return lambda: dictionary_coherence(W_dec)

evaluation(16, 128, 300, 0.0)()  # what is taken once
synthetic(192, 64)()
coherence(64, 16)()
print(json.dumps([peak(work()) for work in (WORKS)]))
"""


def peaks(*works: str) -> list[int]:
    """Bytes beyond what a process holds before, for each; the smaller ones first."""
    lambdas = "".join(f"lambda: {work}, " for work in works)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("WORKS", lambdas)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_coherence_takes_the_same_at_any_width() -> None:
    found = peaks(*(f"coherence({d_sae}, 64)" for d_sae in (16_384, 32_768, 65_536)))
    # two blocks of cosines, four of 2,048 rows in float32; and what an allocator needs
    assert max(found) < 2 * 16 * MIB + 4 * 2048 * 64 * 4 + 8 * MIB, found


@pytest.mark.slow
def test_an_evaluation_takes_a_few_matrices_of_a_block() -> None:
    sizes = (16_384, 65_536, 131_072)
    # about half of the features are active: the way that takes most
    found = peaks(*(f"evaluation(64, {d_sae}, 1100, 0.0)" for d_sae in sizes))
    for d_sae, taken in zip(sizes, found, strict=True):
        matrix = min(MATRIX, 1024 * d_sae * 4)
        assert taken < MATRICES * matrix + FIXED, (d_sae, taken)


@pytest.mark.slow
def test_a_token_of_the_sae_at_work_takes_what_is_promised() -> None:
    sizes = (20_000, 100_000, 400_000)
    found = peaks(*(f"evaluation(16, 512, {n}, -1.5)" for n in sizes))
    for n, taken in zip(sizes, found, strict=True):
        assert taken < PER_TOKEN * n + FIXED, (n, taken)


@pytest.mark.slow
def test_synthetic_samples_take_the_same_at_any_length_and_number_of_features() -> None:
    drawn = ("synthetic(4096, 25_000)", "synthetic(16_384, 5000)")
    *drawn, compared = peaks(*drawn, "known_truth(4096, 16_384)")
    # a dozen matrices of a block; and what an allocator leaves between those that stay
    assert max(drawn) < (12 + 4) * 16 * MIB, drawn
    assert compared < 4 * 16 * MIB, compared
