"""The law of one direction: a module imports from layers before its own, and from no others.

The layers are listed in ``scripts/docs/architecture.py``, which draws the picture from the same
imports.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _script() -> ModuleType:
    path = ROOT / "scripts" / "docs" / "architecture.py"
    spec = importlib.util.spec_from_file_location("architecture", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architecture = _script()
FOUND = architecture.imports(ROOT / architecture.PACKAGE)


def against_the_law(found):
    """Imports that go the wrong way, one line each."""
    rank, part = architecture.ranks(), architecture.part_of
    return [
        f"{name} imports {target}"
        for name, targets in sorted(found.items())
        for target in sorted(targets)
        if part(name) != part(target) and rank[part(target)] >= rank[part(name)]
    ]


def circles(found):
    """Modules that import each other, by way of others or not."""

    def reach(name, seen):
        for target in found[name] - seen:
            seen.add(target)
            reach(target, seen)
        return seen

    return sorted(name for name in found if name in reach(name, set()))


def test_every_module_has_a_layer():
    unranked = {architecture.part_of(name) for name in FOUND} - set(architecture.ranks())
    assert not unranked, (
        f"{sorted(unranked)} are in no layer: put them into LAYERS of scripts/docs/architecture.py, "
        "after everything that they import"
    )


def test_nothing_imports_from_its_own_layer_or_a_later_one():
    assert against_the_law(FOUND) == []


def test_no_modules_import_each_other():
    assert circles(FOUND) == []


def test_the_picture_shows_these_imports():
    drawn = architecture.PICTURE.read_text(encoding="utf-8")
    assert drawn == architecture.picture(), "run python scripts/docs/architecture.py"


# --- that the test itself sees something ---


@pytest.mark.parametrize(
    "code",
    [
        "import sae_afa_plugin.report",
        "from sae_afa_plugin import report",
        "from sae_afa_plugin.report import write_report",
        "def f():\n    from sae_afa_plugin.report import write_report",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sae_afa_plugin import report",
        "from importlib import import_module\nimport_module('sae_afa_plugin.report')",
    ],
)
def test_any_way_of_importing_is_seen(tmp_path, code):
    folder = tmp_path / "sae_afa_plugin"
    (folder / "rules").mkdir(parents=True)
    for name in ("__init__", "report", "rules/__init__"):
        (folder / f"{name}.py").write_text("", encoding="utf-8")
    (folder / "rules" / "new_kernel.py").write_text(code, encoding="utf-8")
    found = architecture.imports(folder)
    assert against_the_law(found) == ["rules.new_kernel imports report"]


def test_relative_imports_are_refused(tmp_path):
    folder = tmp_path / "sae_afa_plugin"
    folder.mkdir()
    (folder / "options.py").write_text("from . import files", encoding="utf-8")
    with pytest.raises(ValueError, match=r"options.py, line 1: import by the full name"):
        architecture.imports(folder)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_only_lines_that_say_something_are_drawn():
    graph = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a"}}
    assert architecture.without_detours(graph) == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"a"}}
