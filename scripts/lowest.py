"""The lowest versions inside the bounds of pyproject.toml: python scripts/lowest.py.

Writes ``constraints-lowest.txt``, with which CI runs the fast tests (``make fast``). It holds what
this package asks for itself, extras included; what that asks for in turn is left to pip.
"""

from __future__ import annotations

from pathlib import Path

from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FILE = ROOT / "constraints-lowest.txt"


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, without the package's own extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    parsed = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in parsed if requirement.name != project["name"]]


def lowest() -> str:
    """The contents of the file."""
    lines = ["# The lowest versions inside the bounds, written by scripts/lowest.py.\n"]
    for requirement in sorted(requirements(), key=lambda requirement: requirement.name):
        (floor,) = (s.version for s in requirement.specifier if s.operator == ">=")
        marker = f"; {requirement.marker}" if requirement.marker else ""
        lines.append(f"{requirement.name}=={floor}{marker}\n")
    return "".join(lines)


if __name__ == "__main__":
    FILE.write_text(lowest(), encoding="utf-8")
