"""Ctrl-C while the command ``sae-afa`` still imports: one line, as later.

The package itself is imported before any function of it runs, and imports take seconds. So this
is its first import, and looks whether the process is the command. In any other process nothing
is changed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType


def _is_command() -> bool:
    if Path(sys.argv[0] if sys.argv else "").name.split(".")[0] in ("sae-afa", "sae-afa-script"):
        return True
    given = sys.orig_argv  # python -m has not put the module's path into argv yet
    return "-m" in given and given[given.index("-m") + 1 :][:1] == ["sae_afa_plugin.cli"]


def _leave(signum: int, frame: FrameType | None) -> None:
    del signum, frame
    os.write(2, b"\nsae-afa: interrupted\n")
    os._exit(130)  # an exception may be caught by what is being imported; nothing is begun yet


def while_importing() -> None:
    """Let Ctrl-C end the command with one line, until :func:`as_usual`."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def as_usual() -> None:
    """Let Ctrl-C be a ``KeyboardInterrupt`` again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


while_importing()
