"""Run the tutorials, and renew the outputs that are stored in them: python tutorials/notebooks.py.

Stored outputs hold results only: no progress bars, warnings, timings or paths. With them goes a
digest of the code that made them, so that a test can tell when they are out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("[0-9]_*.ipynb"))
_DIGEST = "source_sha256"
# bars would be stored, and the hub must not be asked for anything
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


class Kernel:
    """A notebook that has been executed, in a kernel that still answers.

    Args:
        client: The client that executed it.
    """

    def __init__(self, client: NotebookClient):
        self._client = client
        self.notebook: NotebookNode = client.nb

    def value(self, expression: str) -> Any:
        """What an expression gives in the notebook's kernel; it must be fit for JSON."""
        cell = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({expression}))")
        self._client.nb.cells.append(cell)
        try:
            done = self._client.execute_cell(cell, len(self._client.nb.cells) - 1)
        finally:
            self._client.nb.cells.pop()
        return json.loads("".join(o.text for o in done.outputs if o.get("name") == "stdout"))


@contextmanager
def executed(
    path: Path,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    replacements: Mapping[str, str] | None = None,
    seconds: int = 240,
) -> Generator[Kernel]:
    """Execute a notebook from its first cell to its last.

    Args:
        path: The notebook, which stays as it is.
        folder: Where the kernel works.
        environment: Of the kernel, instead of this process's.
        replacements: Code that is replaced before; each must occur once.
        seconds: How long one cell may take.

    Raises:
        ValueError: If code that is to be replaced does not occur once.
        nbclient.exceptions.CellExecutionError: If a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    for old, new in (replacements or {}).items():
        found = [cell for cell in code_cells(notebook) if old in cell.source]
        if len(found) != 1 or found[0].source.count(old) != 1:
            raise ValueError(f"{path.name} does not have {old!r} once")
        found[0].source = found[0].source.replace(old, new)
    client = NotebookClient(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    variables = dict(os.environ if environment is None else environment)
    quiet = _QUIET if environment is None else {"TQDM_DISABLE": "1"}
    with client.setup_kernel(env=variables | quiet):
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
        yield Kernel(client)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that are executed."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: NotebookNode) -> str:
    """Changes when the code does."""
    source = json.dumps([cell.source for cell in code_cells(notebook)])
    return hashlib.sha256(source.encode()).hexdigest()


def is_up_to_date(notebook: NotebookNode) -> bool:
    """Whether the stored outputs come from the code as it is."""
    return notebook.metadata.get(_DIGEST) == digest(notebook)


def stored(notebook: NotebookNode) -> NotebookNode:
    """The notebook as it is to be stored: results, and nothing that changes from run to run."""
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.metadata = {}
        for output in cell.outputs:
            output.pop("metadata", None)
            if output.output_type in ("display_data", "execute_result"):
                output["metadata"] = {}
                if "image/png" in output.data:
                    output.data["text/plain"] = "<Figure>"  # its size depends on the screen
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        _DIGEST: digest(notebook),
    }
    return notebook


def main() -> None:
    """Execute notebooks in place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS)
    for path in parser.parse_args().notebooks:
        started = time.perf_counter()
        with TemporaryDirectory() as folder, executed(path, Path(folder)) as kernel:
            nbformat.write(stored(kernel.notebook), path)
        seconds, size = time.perf_counter() - started, path.stat().st_size
        print(f"{path.name}: {seconds:.0f} s, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
