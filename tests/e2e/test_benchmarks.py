"""Benchmarks and scripts still fit the package: they are run by hand, and rarely."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_all_can_be_imported():
    modules = {
        folder: sorted(path.stem for path in (ROOT / folder).glob("*.py"))
        for folder in ("benchmarks", "scripts", "scripts/docs")
    }
    code = f"""
import importlib, sys
for folder, names in {modules!r}.items():
    sys.path.insert(0, folder)
    for name in names:
        importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gpu" in modules["benchmarks"]
    assert "pages" in modules["scripts/docs"]


def _gpu(*arguments):
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_gpu_script_on_a_cpu(tmp_path):
    file = tmp_path / "gpu.json"
    steps = ["right", "choice", "step", "run", "evaluator"]
    done = _gpu(*steps, "--device", "cpu", "--small", "--json", str(file))
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures["card"] == "CPU"
    assert all(figures[step] for step in steps)
    operator, training, evaluation = figures["right"]
    assert operator["cases"] > 500
    assert operator["other than on the CPU"] == 0
    assert training["to its own resumed halfway"] == 0
    assert evaluation["largest relative difference to the CPU"] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rihgt"], "no such step: rihgt; there are right, choice"),
        (["--device", "cuda"], "there is no CUDA device here"),
    ],
)
def test_the_gpu_script_refuses(arguments, says):
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = _gpu(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
