"""The pages of the site, before a site generator reads them: python scripts/docs/pages.py.

Writes ``build/docs``: a copy of ``docs``, and each ``tutorials/*.ipynb`` as a page, as it was
saved: nothing is executed. Text stays Markdown, formulas become MathML, code becomes a block,
output text and PNG pictures are shown. Links between the two lead to the pages.

What builds the site from this folder is one command of the Makefile, with mkdocs.yml.
"""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[2]
_LINK = re.compile(
    r"\]\((?:\.\./docs/(?P<doc>[^)]+)|(?P<notebook>[^)/:]+)\.ipynb(?P<anchor>#[^)]*)?)\)"
)
_TO_NOTEBOOK = re.compile(r"\]\((?:\.\./)+tutorials/([^)/]+)\.ipynb")
_FORMULA = re.compile(
    r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL
)
_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def _fenced(text: str, language: str) -> str:
    # a fence longer than any in the text
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _link(match: re.Match[str]) -> str:
    """Links of the repository as links of the site, where ``docs`` is the root."""
    if match["doc"]:
        return f"](../{match['doc']})"
    return f"]({match['notebook']}.md{match['anchor'] or ''})"


def _mathml(match: re.Match[str]) -> str:
    """A formula in the browser's own language, so that no script has to draw it."""
    if match["code"]:
        return match["code"]
    display = match["block"] is not None
    tex = (match["block"] or match["inline"]).replace(r"\arg", r"\mathrm{arg}")
    formula = convert(tex, display="block" if display else "inline")
    if "\\" in formula:
        raise ValueError(f"a tutorial has a formula with an unknown command: {tex}")
    formula = formula.replace("*", "&#42;").replace("_", "&#95;")  # no emphasis of Markdown's
    return f"<div>{formula}</div>" if display else formula


def _outputs(cell: dict[str, Any], name: str, pictures: dict[str, bytes]) -> list[str]:
    parts: list[str] = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            picture = f"{name}-{len(pictures) + 1}.png"
            pictures[picture] = base64.b64decode("".join(data["image/png"]))
            parts.append(f"![output of the cell above]({picture})")
        elif "text/html" in data and "<table" in (table := "".join(data["text/html"])):
            table = re.sub(r"<style.*?</style>", "", table, flags=re.DOTALL)
            parts.append(re.sub(r"\n\s*", "\n", table).strip())
        else:
            text = "".join(data.get("text/plain", output.get("text", output.get("traceback", ""))))
            if text.strip():
                text = _TERMINAL_COLOURS.sub("", text)
                parts.append(f'<pre class="output">{html.escape(text.rstrip())}</pre>')
    return parts


def page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name.

    Args:
        notebook: The notebook's JSON, format 4.
        name: The beginning of the pictures' names.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_FORMULA.sub(_mathml, _LINK.sub(_link, source)))
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(_fenced(source, "python"))
            parts += _outputs(cell, name, pictures)
    return "\n\n".join(parts) + "\n", pictures


def write(out: Path) -> None:
    """Write the folder anew.

    Args:
        out: What it holds is deleted first.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs", out)
    for copied in out.rglob("*.md"):
        text = copied.read_text(encoding="utf-8")
        up = "../" * (len(copied.relative_to(out).parts) - 1)
        copied.write_text(_TO_NOTEBOOK.sub(rf"]({up}tutorials/\1.md", text), encoding="utf-8")
    (out / "tutorials").mkdir()
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        saved = json.loads(notebook.read_text(encoding="utf-8"))
        text, pictures = page(saved, notebook.stem)
        (out / "tutorials" / f"{notebook.stem}.md").write_text(text, encoding="utf-8")
        for name, content in pictures.items():
            (out / "tutorials" / name).write_bytes(content)


if __name__ == "__main__":
    write(ROOT / "build" / "docs")
