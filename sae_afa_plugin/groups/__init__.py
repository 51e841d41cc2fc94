"""Groups of metrics, one file each: what is measured of an SAE on given activations."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module

from sae_afa_plugin.groups.base import Column, MetricGroup


def known_groups() -> dict[str, type[MetricGroup]]:
    """Every group by its name: those in this package, found by their files.

    Example:
        >>> {"afa", "coherence", "core", "frequencies"} <= set(known_groups())
        True
    """
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    found: dict[str, type[MetricGroup]] = {}
    for group in sorted(
        _below(MetricGroup), key=lambda group: not group.__module__.startswith(__name__)
    ):
        found.setdefault(group.name, group)  # nobody else's takes the name of one of ours
    return found


def _below(cls: type[MetricGroup]) -> Iterator[type[MetricGroup]]:
    for group in cls.__subclasses__():
        yield group
        yield from _below(group)


def shown_columns() -> Iterator[Column]:
    """The columns of all groups, as people are shown them."""
    for group in known_groups().values():
        yield from group.columns
