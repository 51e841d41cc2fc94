"""SIGKILL before the n-th change of a file, for many n, with and without a second one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def kill_before_writes(code: str, folder: Path, stride: int = 5) -> int:
    """Run a job that is killed before every few changes below a folder, and go on.

    ``KILLS=1`` in the environment: before every change.

    Args:
        code: Defines ``job(folder)`` and ``contents(folder)``, all that must be equal afterwards;
            it may import the tests beside it. What is killed are copies of its process, so all is
            imported and compiled once.
        folder: Where to work.
        stride: How many.

    Returns:
        How many kills there were; each left what an undisturbed job leaves.
    """
    stride = int(os.environ.get("KILLS", stride))
    ends = f"from helpers import kills\nkills.run(job, contents, {str(folder)!r}, {stride})"
    tests = Path(__file__).parents[1]
    places = [
        *map(str, (tests, tests / "unit", *(f for f in (tests / "unit").iterdir() if f.is_dir())))
    ]
    done = subprocess.run(
        [sys.executable, "-c", f"import torch\ntorch.set_num_threads(1)\n{code}\n{ends}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
            [*places, str(Path.cwd())]
        )},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def run(
    job: Callable[[str], Any], contents: Callable[[Path], Any], folder: str, stride: int
) -> None:
    """What :func:`kill_before_writes` runs."""
    whole = str(Path(folder, "whole"))
    job(whole)
    kill_at = 1
    while (status := _copy(job, place := str(Path(folder, f"killed-{kill_at}")), kill_at)) != 0:
        assert status == -signal.SIGKILL, status
        _copy(job, place, 7)  # and again, early
        assert _copy(job, place) == 0
        assert contents(Path(place)) == contents(Path(whole)), kill_at
        left = [str(file) for file in Path(place).rglob("*") if file.name.endswith(".partial")]
        assert not left, (kill_at, left)
        kill_at += stride
    print("killed", (kill_at - 1) // stride)


def _copy(job: Callable[[str], Any], folder: str, kill_at: int | None = None) -> int:
    child = os.fork()
    if child == 0:
        count = 0

        def audit(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in _CHANGES and folder in str(args[0]):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        job(folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
