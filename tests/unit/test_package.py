"""What ``import sae_afa_plugin`` gives, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sae_afa_plugin


@pytest.mark.parametrize("name", sae_afa_plugin.__all__)
def test_every_name_is_there(name):
    assert getattr(sae_afa_plugin, name) is not None


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'run_swep'"):
        _ = sae_afa_plugin.run_swep


def test_importing_it_loads_neither_figures_nor_sweeps():
    code = "import sys, sae_afa_plugin; print([m for m in sys.modules if 'sae_afa' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'sae_afa_plugin.saes.topafa'" in done.stdout
    for late in ("plots", "report", "sweep"):
        assert f"'sae_afa_plugin.{late}" not in done.stdout
