"""What a field of a config may be: anything else is one sentence when the config is built.

Each function looks at one field, and puts back what it was given as Python's own type: numbers of
NumPy pass, which JSON would not take when the config is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any

import torch

from sae_afa_plugin._upstream import DTYPE_MAP

_LARGEST = 2**63 - 1  # what a tensor's size or a seed can be


def whole(config: Any, *names: str, at_least: int = 0, none: bool = False) -> None:
    """Whole numbers.

    Args:
        config: A dataclass.
        *names: Its fields.
        at_least: The smallest that is allowed.
        none: Whether None is allowed.

    Raises:
        ValueError: If a field is another kind of value (a truth value, say) or too small.
    """
    for name in names:
        value: Any = getattr(config, name)
        if value is None and none:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} must be a whole number: got {value!r}")
        number = int(value)
        _within(name, number, at_least)
        if number > _LARGEST:
            raise ValueError(f"{name} must be at most {_LARGEST}: got a larger number")
        _put(config, name, number)


def real(
    config: Any,
    *names: str,
    at_least: float = 0.0,
    more_than: float = -math.inf,
    below: float = math.inf,
    none: bool = False,
) -> None:
    """Finite numbers.

    Args:
        config: A dataclass.
        *names: Its fields.
        at_least: The smallest that is allowed.
        more_than: They have to be larger than this.
        below: They have to be smaller than this.
        none: Whether None is allowed.

    Raises:
        ValueError: If a field is another kind of value (a truth value, say), NaN, infinite or
            outside of these limits.

    Example:
        >>> from types import SimpleNamespace
        >>> real(SimpleNamespace(lr=float("nan")), "lr")
        Traceback (most recent call last):
        ValueError: lr must be a finite number: got nan
    """
    for name in names:
        value = getattr(config, name)
        if value is None and none:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name} must be a number: got {value!r}")
        try:
            number = float(value)
        except OverflowError:  # a whole number with hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number: got {_short(value)}")
        _within(name, value, at_least)
        if number <= more_than:
            raise ValueError(f"{name} must be more than {more_than:g}: got {value!r}")
        if number >= below:
            raise ValueError(f"{name} must be below {below:g}: got {value!r}")
        # PyTorch takes no larger whole numbers, and a product with a width is one as well
        is_small = abs(number) < 1 << 31
        _put(config, name, int(value) if isinstance(value, Integral) and is_small else number)


def truth(config: Any, *names: str, none: bool = False) -> None:
    """True or False.

    Args:
        config: A dataclass.
        *names: Its fields.
        none: Whether None is allowed.

    Raises:
        ValueError: If a field is anything else, also 0 or 1.
    """
    for name in names:
        _must_be("True or False", config, name, lambda value: isinstance(value, bool), none)


def text(config: Any, *names: str, none: bool = False) -> None:
    """Text that is not empty.

    Args:
        config: A dataclass.
        *names: Its fields.
        none: Whether None is allowed.

    Raises:
        ValueError: If a field is empty or no text.
    """
    for name in names:
        _must_be("text", config, name, lambda value: isinstance(value, str) and bool(value), none)


def choice(config: Any, name: str, allowed: Collection[str]) -> None:
    """One of some words.

    Args:
        config: A dataclass.
        name: Its field.
        allowed: The words.

    Raises:
        ValueError: If it is none of them.
    """
    what = f"one of {', '.join(sorted(allowed))}"
    _must_be(what, config, name, lambda value: isinstance(value, str) and value in allowed)


def kind(config: Any, name: str, cls: type[Any]) -> None:
    """An object of a class.

    Args:
        config: A dataclass.
        name: Its field.
        cls: The class.

    Raises:
        ValueError: If it is none.
    """
    _must_be(f"a {cls.__name__}", config, name, lambda value: isinstance(value, cls))


def dtype_and_device(config: Any, none: bool = False) -> None:
    """The fields ``dtype`` and ``device``, as SAELens names them; whether it exists is not asked.

    Args:
        config: A dataclass.
        none: Whether the device may be None.

    Raises:
        ValueError: If no dtype or device has that name.
    """
    if hasattr(config, "dtype") and not isinstance(config.dtype, torch.dtype):
        choice(config, "dtype", DTYPE_MAP)
    if isinstance(config.device, torch.device):
        return
    text(config, "device", none=none)
    try:
        torch.device("cpu" if config.device is None else config.device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be a name like cpu, cuda or cuda:1: got {config.device!r}"
        ) from error


def _must_be(
    what: str, config: Any, name: str, fits: Callable[[Any], bool], none: bool = False
) -> None:
    value = getattr(config, name)
    if not (fits(value) or (value is None and none)):
        raise ValueError(f"{name} must be {what}: got {value!r}")


def _within(name: str, value: Any, at_least: float) -> None:
    if value < at_least:
        what = "must not be negative" if at_least == 0 else f"must be at least {at_least:g}"
        raise ValueError(f"{name} {what}: got {value!r}")


def _short(value: Any) -> str:
    return "a number beyond 1e308" if isinstance(value, Integral) else repr(value)


def _put(config: Any, name: str, value: Any) -> None:
    if type(getattr(config, name)) is not type(value):
        object.__setattr__(config, name, value)  # also where the dataclass is frozen
