"""What the benchmarks share: medians, peak memory, what it was measured on."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


def median_seconds(function: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    times: list[float] = []
    for repeat in range(warm_up + repeats):
        started = time.perf_counter()
        function()
        if repeat >= warm_up:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _memory(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def peak_bytes(function: Callable[[], object]) -> int:
    """Memory that a call adds at its peak to what the process holds. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be used again, uncounted
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = _memory("VmRSS")
    function()
    return _memory("VmHWM") - before


def peak_so_far() -> int:
    return _memory("VmHWM")


def machine() -> str:
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
            break
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numba", "sae-lens"))
    return f"{len(os.sched_getaffinity(0))} cores of {model}; {packages}"


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
