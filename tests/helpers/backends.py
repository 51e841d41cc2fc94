"""Every way in which the prefix operator is computed, called on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from sae_afa_plugin.rules import torch_kernel
from sae_afa_plugin.rules.operator import Backend, backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets itself on the CPU

Way = Callable[..., Tensor]


def _device_of(backend: Backend) -> str:
    return "cpu" if backend.supports(torch.ones(1, 1), 2, "row") else DEVICE


def _call(
    backend: Backend,
    acts: Tensor,
    target: Tensor,
    decoder_norm: Tensor | None = None,
    p: int = 2,
    per: str = "row",
) -> Tensor:
    device = _device_of(backend)
    norms = None if decoder_norm is None else decoder_norm.to(device)
    return backend.keep_prefix(acts.to(device), target.to(device), norms, p, per).cpu()


def _takes_float64(backend: Backend) -> bool:
    acts = torch.ones(1, 1, dtype=torch.float64, device=_device_of(backend))
    return backend.supports(acts, 2, "row")


def _stable_sort(acts, target, decoder_norm=None, p=2, per="row"):
    keep = torch_kernel.KeepByStableSort(p)
    return torch_kernel._apply(acts, target, decoder_norm, keep, per)


# a new backend is among them as soon as its file is there
BACKENDS: dict[str, Way] = {each.name: partial(_call, each) for each in backends()}
EVERY_DTYPE = ["stable sort", *(each.name for each in backends() if _takes_float64(each))]
BACKENDS["stable sort"] = _stable_sort  # what PyTorch does on other devices

if "triton" in BACKENDS:
    from sae_afa_plugin.rules import triton_kernel

    def _wide(*args, **kwargs):
        small = {"_RESIDENT": 0, "_TILE": 64, "_WIDE_TILE": 64, "_SAMPLE": 64, "_CANDIDATES": 128}
        with mock.patch.multiple(triton_kernel, **small):
            return BACKENDS["triton"](*args, **kwargs)

    BACKENDS["triton wide"] = _wide  # rows of any width as if they did not fit the registers


def is_slow(name: str) -> bool:
    """Whether this is Triton's interpreter, a thousand times slower than the rest."""
    return "triton" in name and DEVICE == "cpu"
