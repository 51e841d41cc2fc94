"""Docstrings as the site shows them: a Griffe extension that mkdocs.yml names.

The docstrings are written to be read in an editor and by ``help()``, with Sphinx's roles. The
site's Markdown has other marks for the same, which are put in here, when it is built.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|mod):`~?([^`]+)`")
# one example, in Google's style; Griffe knows only the plural
_EXAMPLE = re.compile(r"^(\s*)Example::?$", re.MULTILINE)
_LITERAL = re.compile(r"::$", re.MULTILINE)


def _in_markdown(text: str, obj: griffe.Object) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[1]
        try:
            path = name if name.startswith("sae_afa_plugin.") else obj.resolve(name)
        except griffe.NameResolutionError:
            path = name
        shown = name.removeprefix("sae_afa_plugin.")
        return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'

    def examples(match: re.Match[str]) -> str:
        return f"{match[1]}Examples:"

    return _LITERAL.sub(":", _EXAMPLE.sub(examples, _ROLE.sub(link, text)))


class Docstrings(griffe.Extension):
    """Turns roles into links, and ``Example`` into a section that Griffe knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute once it is read."""
        if obj.docstring is not None:
            text = _in_markdown(obj.docstring.value, obj)
            if obj.is_class and any("NamedTuple" in str(base) for base in obj.bases):
                text = text.replace(
                    "\nArgs:\n", "\nAttributes:\n", 1
                )  # its fields are not set there
            obj.docstring.value = text
