"""A kill before any change of a file costs nothing, and leaves nothing, once the job has run again.

Training has the same test beside its others.
"""

from __future__ import annotations

import os

import pytest
from helpers.kills import kill_before_writes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="it kills copies of a process"),
]

RECORD = """
from test_store import X
from sae_afa_plugin.activations import recording
from sae_afa_plugin.activations.tensors import TensorActivations

recording._SHARD_BYTES = 320

def job(folder):
    recording.record(TensorActivations({"here": X}), ["here"], folder)

def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
"""

EVALUATE = """
from test_store import evaluate, small_sae

saes = {"a": small_sae(), "b": small_sae(1)}

def job(folder):
    evaluate(saes, out=folder)

def contents(folder):
    return {  # sealed JSON says when it was finished
        str(f.relative_to(folder)): f.suffix != ".json" and f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and f.suffix != ".lock"
    }
"""


@pytest.mark.parametrize("code", [RECORD, EVALUATE], ids=["record", "evaluate"])
def test_killed_before_any_change_it_is_the_same(tmp_path, code):
    assert kill_before_writes(code, tmp_path) > 10
