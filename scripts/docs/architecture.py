"""The picture of docs/architecture.md, drawn from the imports: python scripts/docs/architecture.py.

``LAYERS`` is the law of one direction: a module imports from layers before its own and from no
others. ``tests/unit/test_layers.py`` holds the code to it, and the picture to the code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import chain, combinations, pairwise, product
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
PACKAGE = "sae_afa_plugin"
Graph = Mapping[str, set[str]]  # who imports whom

_TOOL, _SAE, _METRIC, _RESULT = "#888888", "#0072B2", "#D55E00", "#009E73"
# Of each module or package, what it has and its colour; the files of a package share its layer.
LAYERS: tuple[dict[str, tuple[str, str]], ...] = (
    {
        "options": ("flags from dataclasses", _TOOL),
        "files": ("whole or not there", _TOOL),
        "printable": ("others' words, shown", _TOOL),
        "_interrupt": ("Ctrl-C in imports", _TOOL),
        "_upstream": ("internals of others", _TOOL),
    },
    {
        "rules": ("what is kept", _SAE),
        "metrics": ("token mathematics", _METRIC),
        "hub": ("whether, which commit", _TOOL),
        "limits": ("what a field may be", _TOOL),
    },
    {
        "saes": ("architectures", _SAE),
        "spaces": ("z, f, decoder", _METRIC),
        "activations": ("what SAEs read", _METRIC),
    },
    {
        "sources": ("where SAEs are", _METRIC),
        "groups": ("what is measured", _METRIC),
        "evals": ("for SAELens's evals", _METRIC),
    },
    {"plan": ("what is to do", _METRIC), "store": ("a folder for many", _RESULT)},
    {
        "as_trained": ("tokens that SAEs know", _METRIC),
        "work": ("one SAE at a time", _METRIC),
        "results": ("tables, read lazily", _RESULT),
    },
    {"evaluation": ("all of it in order", _METRIC)},
    {
        "training": ("several SAEs, recipes", _SAE),
        "commands": ("command lines", _TOOL),
        "tables": ("for the terminal", _RESULT),
        "pages": ("HTML in one file", _RESULT),
        "plots": ("one file per figure", _RESULT),
    },
    {
        "demo": ("a small comparison", _TOOL),
        "report": ("one HTML page", _RESULT),
        "sweep": ("many SAEs, compared", _SAE),
    },
    {PACKAGE: ("the public names", _TOOL)},
    {"cli": ("sae-afa", _TOOL)},
)


# --- imports ---


def modules(folder: Path) -> dict[str, Path]:
    """The modules of a package, by their name inside it; the package itself by its own."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts) or folder.name] = path
    return found


def imports(folder: Path) -> dict[str, set[str]]:
    """Which modules of a package each of them imports, anywhere in its code."""
    known = modules(folder)
    return {name: set(_imported(path, folder.name, known)) - {name} for name, path in known.items()}


def _imported(path: Path, package: str, known: Mapping[str, Path]) -> Iterator[str]:
    def inside(name: str) -> Iterator[str]:
        if name.split(".")[0] == package:
            yield name.removeprefix(f"{package}.")

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from inside(alias.name)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}, line {node.lineno}: import by the full name")
            for alias in node.names:
                for name in inside(str(node.module)):
                    whole = alias.name if name == package else f"{name}.{alias.name}"
                    yield whole if whole in known else name
        elif isinstance(node, ast.Call) and _called(node.func) == "import_module":
            written = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            yield from chain.from_iterable(inside(str(name)) for name in written)


def _called(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


def part_of(module: str) -> str:
    """What a module is in the picture: its package where it is in one."""
    return module.split(".")[0]


def ranks() -> dict[str, int]:
    """The layer of each part, by its number."""
    return {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def parts(found: Graph) -> dict[str, set[str]]:
    """Imports between parts."""
    together: dict[str, set[str]] = {}
    for name, targets in found.items():
        of_part = together.setdefault(part_of(name), set())
        of_part |= {part_of(target) for target in targets} - {part_of(name)}
    return together


def without_detours(graph: Graph) -> dict[str, set[str]]:
    """Only the imports that do not follow from others by way of a third."""

    def reach(name: str) -> set[str]:
        return set().union(*({target} | reach(target) for target in graph[name]))

    return {
        name: {t for t in targets if not any(t in reach(other) for other in targets - {t})}
        for name, targets in graph.items()
    }


# --- the picture ---

_WIDTH, _BOX, _GAP, _LANE = 860.0, (168.0, 46.0), 24.0, 26.0
_ROW, _TOP = 80.0, 16.0
Point = tuple[float, float]


def draw(graph: Graph) -> str:
    """The picture as SVG.

    Args:
        graph: Imports between parts, none from a later layer.
    """
    rank = ranks()
    names = sorted(graph, key=lambda name: (rank[name], list(LAYERS[rank[name]]).index(name)))
    lines = [(target, name) for name in names for target in sorted(without_detours(graph)[name])]
    # a line that passes a layer goes through a lane of its own there
    ways = {
        (a, b): [a, *(f"{a} {b} {between}" for between in range(rank[a] + 1, rank[b])), b]
        for a, b in lines
    }
    rows: list[list[str]] = [[] for _ in LAYERS]
    for name in names:
        rows[rank[name]].append(name)
    for (a, _), way in ways.items():
        for number, lane in enumerate(way[1:-1], rank[a] + 1):
            rows[number].append(lane)
    steps = [pair for way in ways.values() for pair in pairwise(way)]
    across = _placed(rows, steps)
    at = {
        name: (across[name], _TOP + _BOX[1] / 2 + _ROW * number)
        for number, row in enumerate(rows)
        for name in row
    }
    height = 2 * _TOP + _BOX[1] + _ROW * (len(rows) - 1)
    said = "; ".join(f"{a} to {b}" for a, b in lines)
    body = [_line([at[point] for point in way]) for way in ways.values()]
    body += [_box(name, *at[name], *LAYERS[rank[name]][name]) for name in names]
    return _SVG.format(width=_WIDTH, height=height, said=said, body="\n".join(body))


def _placed(rows: list[list[str]], steps: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Where everything stands in its row: near what it is joined to, nothing over anything else."""
    joined: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for a, b in steps:
        joined[a].append(b)
        joined[b].append(a)
    tried = [_untangled(some, steps) for some in (rows, [row[::-1] for row in rows])]
    rows = min(tried, key=lambda some: _crossings(some, steps))
    at = {name: float(number) for row in rows for number, name in enumerate(row)}
    for sweep in range(60):
        for row in rows[:: 1 if sweep % 2 else -1]:
            wishes = [sum(at[o] for o in joined[n]) / max(1, len(joined[n])) for n in row]
            at.update(_apart(row, wishes))
    return at


def _untangled(rows: list[list[str]], steps: Sequence[tuple[str, str]]) -> list[list[str]]:
    """The same rows in an order in which few lines cross."""
    rows = [list(row) for row in rows]
    fewest = _crossings(rows, steps)
    moved = True
    while moved:
        moved = False
        for row in rows:
            for i, j in product(range(len(row)), repeat=2):
                before = list(row)
                row.insert(j, row.pop(i))
                crossings = _crossings(rows, steps)
                if crossings < fewest:
                    fewest, moved = crossings, True
                else:
                    row[:] = before
    return rows


def _crossings(rows: Sequence[Sequence[str]], steps: Sequence[tuple[str, str]]) -> int:
    at = {name: (number, i) for number, row in enumerate(rows) for i, name in enumerate(row)}
    lines = [(at[a][0], at[a][1], at[b][1]) for a, b in steps]
    return sum(
        row == other and (a - c) * (b - d) < 0
        for (row, a, b), (other, c, d) in combinations(lines, 2)
    )


def _apart(row: Sequence[str], wishes: Sequence[float]) -> dict[str, float]:
    """The places nearest to the wishes that keep the order and the distances."""
    half = [(_LANE if " " in name else _BOX[0] + _GAP) / 2 for name in row]
    shift = [0.0]
    for left, right in pairwise(half):
        shift.append(shift[-1] + left + right)
    blocks: list[list[float]] = []  # sum and number of wishes that end in one place
    for wish, by in zip(wishes, shift, strict=True):
        blocks.append([wish - by, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, number = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += number
    bases = [total / number for total, number in blocks for _ in range(int(number))]
    low, high = half[0], _WIDTH - half[-1] - shift[-1]
    return {
        name: min(max(base, low), max(low, high)) + by
        for name, base, by in zip(row, bases, shift, strict=True)
    }


def _line(points: Sequence[Point]) -> str:
    half = _BOX[1] / 2
    (x, y), *between = points
    path = [f"M{x:.0f},{y + half:.0f}"]
    y += half
    for number, (to_x, to_y) in enumerate(between, 1):
        last = number == len(between)
        for end_x, end_y in ((to_x, to_y - half - 2 * last), (to_x, to_y + half))[: 2 - last]:
            middle = (y + end_y) / 2
            path.append(f"C{x:.0f},{middle:.0f} {end_x:.0f},{middle:.0f} {end_x:.0f},{end_y:.0f}")
            x, y = end_x, end_y
    return f'  <path class="a" d="{" ".join(path)}"/>'


def _box(name: str, x: float, y: float, text: str, colour: str) -> str:
    w, h = _BOX
    return (
        f'  <rect x="{x - w / 2:.0f}" y="{y - h / 2:.0f}" width="{w:.0f}" height="{h:.0f}" rx="6" '
        f'fill="{_pale(colour)}" stroke="{colour}" stroke-width="1.4"/>\n'
        f'  <text class="t" x="{x:.0f}" y="{y - 3:.0f}">{escape(name)}</text>\n'
        f'  <text class="s" x="{x:.0f}" y="{y + 15:.0f}">{escape(text)}</text>'
    )


def _pale(colour: str) -> str:
    levels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - 0.13 * (255 - level)):02x}" for level in levels)


_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" \
aria-label="Imports, as module to who imports it: {said}.">
  <defs>
    <marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" \
orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker>
    <style>
      text {{ text-anchor: middle; fill: #1a1a1a; }}
      .t {{ font: 600 16px ui-monospace, Menlo, Consolas, monospace; }}
      .s {{ font: 13px system-ui, sans-serif; fill: #444; }}
      .a {{ fill: none; stroke: #555; stroke-width: 1.4; marker-end: url(#tip); }}
    </style>
  </defs>
  <rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#ffffff"/>
{body}
</svg>
"""


def picture() -> str:
    """The picture of this package."""
    return draw(parts(imports(ROOT / PACKAGE)))


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
