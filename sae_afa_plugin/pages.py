"""HTML pages in one file each: styles, scripts and pictures are in it, and no network is needed."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from sae_afa_plugin.files import check_ours, write_whole
from sae_afa_plugin.results import REPORT_FILENAME


def render(template: str, **given: Any) -> str:
    """A page from one of the package's templates, in which all text is escaped.

    Args:
        template: Its file.
        given: What stands in it; ``made`` is the time.
    """
    environment = Environment(
        loader=PackageLoader("sae_afa_plugin"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(made=made, **given)


def embedded(figure: Figure) -> str:
    """A figure as PNG in base64, as it stands in a page."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(file.getvalue()).decode()


def sortable(value: Any) -> float:
    """A value of a table as ``sort.js`` orders it: what is unknown comes last."""
    return -1e300 if pd.isna(value) else float(value)


def write_page(path: Path, make: Callable[[], str]) -> Path:
    """Make a page and write it.

    Args:
        path: The file, or a folder in which it gets the name ``report.html``.
        make: Gives its HTML; not called where the page would take somebody's place.

    Returns:
        The file.

    Raises:
        ValueError: If there is a file that this package has not written.
    """
    if path.is_dir():
        path = path / REPORT_FILENAME
    check_ours(path)
    # names of folders may hold bytes that are no UTF-8
    content = make().encode(errors="backslashreplace")
    write_whole(path, lambda partial: partial.write_bytes(content))
    return path
