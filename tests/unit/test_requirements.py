"""The sets of versions that are tested agree with the bounds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("lowest", ROOT / "scripts" / "lowest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {}
    for requirement in parsed:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        versions[canonicalize_name(requirement.name)] = specifier.version
    assert len(versions) == len(parsed), "a package is pinned twice"
    return versions


def test_the_file_of_lowest_versions_is_what_its_script_writes():
    assert script().FILE.read_text(encoding="utf-8") == script().lowest()


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt"])
def test_what_is_tested_lies_inside_the_bounds(name: str):
    pinned = pins(name)
    for requirement in script().requirements():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_the_lowest_versions_are_lower():
    lowest, tested = pins("constraints-lowest.txt"), pins("constraints.txt")
    assert set(lowest) <= set(tested)
    assert lowest["torch"] != tested["torch"]
