"""Hooks of language models: what an SAE's metadata call them, how wide they are, how far to run."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from sae_afa_plugin._upstream import (
    HookedProxyLM,
    extract_stop_at_layer_from_tlens_hook_name,
    has_hooks,
    without_hooks,
)

# TransformerLens: hooks that a model has and does not use until it is told to
_SWITCHES = {
    "hook_result": "set_use_attn_result",
    "hook_attn_in": "set_use_attn_in",
    "hook_mlp_in": "set_use_hook_mlp_in",
    **dict.fromkeys(("hook_q_input", "hook_k_input", "hook_v_input"), "set_use_split_qkv_input"),
}


def hook_in(model: Any, metadata: Mapping[str, Any], suffix: str = "") -> str | None:
    """The name that a hook of an SAE has in this model.

    Args:
        model: The language model.
        metadata: The SAE's metadata.
        suffix: ``""`` for the hook it reads, ``"_out"`` for the one a transcoder writes.
    """
    hf_name = str(metadata.get(f"hf_hook_name{suffix}") or "")
    if isinstance(model, HookedProxyLM) and hf_name:
        return hf_name.removesuffix(".output")  # its hooks are the modules' outputs
    name = metadata.get(f"hook_name{suffix}")
    if name and name.endswith(".hook_mlp_in") and hf_name.endswith("layernorm.output"):
        # Gemma Scope 2 says hook_mlp_in, which is before the layer norm, and means behind it
        return name.removesuffix("hook_mlp_in") + "mlp.hook_in"
    return name


def wanted_hooks(metadata: Mapping[str, Any]) -> set[str]:
    """The hooks that an SAE needs, by all names that they may have.

    Args:
        metadata: The SAE's metadata.
    """
    names: set[str] = set()
    for suffix in ("", "_out"):
        if name := metadata.get(f"hook_name{suffix}"):
            hf_name = str(metadata.get(f"hf_hook_name{suffix}") or "").removesuffix(".output")
            names |= {hook_in(None, metadata, suffix) or name, *([hf_name] if hf_name else [])}
    return names


def stop_layer(hook_names: Iterable[str]) -> int | None:
    """The ``stop_at_layer`` of a pass that reaches all these hooks; None for the whole model."""
    layers = [extract_stop_at_layer_from_tlens_hook_name(name) for name in hook_names]
    known = [layer for layer in layers if layer is not None]
    return max(known) if len(known) == len(layers) else None


@contextmanager
def without_autocast() -> Generator[None]:
    """Compute in the dtypes that things have, whatever somebody has set for this process."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def known_state(model: Any) -> Generator[None]:
    """Run a language model as it was trained to run, whatever state it is in, and restore that.

    Without dropout, without hooks that somebody has left on its hook points, without gradients and
    without autocast.

    Args:
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.

    Raises:
        ValueError: If SAEs are attached to it.

    Example:
        >>> from sae_afa_plugin.activations.embedded import load_embedded_model
        >>> model = load_embedded_model().train()
        >>> with known_state(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    if attached := getattr(model, "acts_to_saes", None):
        raise ValueError(
            f"the model has SAEs attached at {', '.join(map(str, attached))}, which would change "
            "what is read: call model.reset_saes() first"
        )
    with torch.no_grad(), without_autocast(), without_hooks(model), not_training(model):
        yield


def parts_of(module: nn.Module) -> list[nn.Module]:
    """All modules at work."""
    return [part for whole in (module, *inner_model(module)) for part in whole.modules()]


def inner_model(model: Any) -> list[nn.Module]:
    """What a ``TransformerBridge`` runs, which is no part of it for PyTorch; nothing for others."""
    inner = getattr(model, "original_model", None)
    return [inner] if isinstance(inner, nn.Module) else []


@contextmanager
def not_training(module: nn.Module) -> Generator[None]:
    """Run a module without dropout and with the statistics it has, and put it back as it was."""
    # only what has to change: setting every flag of a TransformerBridge takes 13 ms
    before = [(part, part.training) for part in parts_of(module)]
    for part, training in before:
        if training:
            part.training = False
    try:
        yield
    finally:
        for part, training in before * 2:  # in some versions a part sets another's with its own
            if part.training != training:
                part.training = training


def unusual_state(model: Any) -> list[str]:
    """What :func:`known_state` changes about a model that has parts of it, in sentences."""
    said: list[str] = []
    dropouts = (m for m in parts_of(model) if isinstance(m, nn.Dropout) and m.p > 0)
    if any(dropout.training for dropout in dropouts):
        said.append("the model is in training mode: it is read without its dropout")
    said += [f"the model {line}" for line in hooks_left_on(model)]
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        said.append("autocast is on: the model and the SAEs are read without it")
    return said


def hooks_left_on(model: Any) -> list[str]:
    """That somebody has left hooks, as the end of a sentence; nothing where there are none.

    Args:
        model: A language model or an SAE.
    """
    left = [name for name, point in model.hook_dict.items() if has_hooks(point)]
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return [f"has hooks on {', '.join(left[:3])}{more}: it is read without them"] if left else []


def hook_shapes(model: Any, hook_names: Sequence[str]) -> dict[str, torch.Size]:
    """Shapes of one token's activations at these hooks, by one pass over two tokens.

    Args:
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.
        hook_names: The hooks. Those that the model does not have are left out.
    """
    shapes = _probed(model, hook_names)
    for name in hook_names:  # with some models a hook that does not exist leaves out all others
        if name not in shapes:
            shapes.update(_probed(model, [name]))
    return shapes


def _probed(model: Any, hook_names: Sequence[str]) -> dict[str, torch.Size]:
    try:
        # Looked up by running the model: a TransformerBridge answers to aliases as well.
        with known_state(model):
            cache = model.run_with_cache(
                torch.zeros(1, 2, dtype=torch.long, device=device_of(model)),
                names_filter=list(hook_names),
                stop_at_layer=stop_layer(hook_names),
                prepend_bos=False,
            )[1]
    except (KeyError, IndexError, AttributeError):
        return {}
    shapes: dict[str, torch.Size] = {}
    for name in hook_names:
        with suppress(KeyError):
            shapes[name] = cache[name].shape[2:]
    return shapes


def check_hook(model: Any, hook_name: str, d_in: int, head_index: int | None = None) -> None:
    """Make sure that a hook exists and is as wide as the SAE, before anything is trained.

    Args:
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.
        hook_name: The hook to read.
        d_in: The SAE's input width.
        head_index: The head that is read, where the hook has heads.

    Raises:
        ValueError: If there is no such hook, or its activations have another width.
    """
    shape = hook_shapes(model, [hook_name]).get(hook_name)
    reason = misfit(hook_name, shape, d_in, head_index, list(model.hook_dict))
    if reason is not None:
        raise ValueError(reason)


def misfit(
    hook_name: str,
    shape: torch.Size | None,
    d_in: int,
    head_index: int | None,
    known: Sequence[str],
) -> str | None:
    """Why an SAE cannot read a hook, or None if it can.

    Args:
        hook_name: The hook.
        shape: Of one token's activations there; None if there is no such hook.
        d_in: The SAE's width.
        head_index: The head that it reads, where it reads one of several.
        known: The hooks that there are, also those that are switched off.

    Example:
        >>> misfit("blocks.0.hook_resid_pre", torch.Size([16]), 20, None, [])
        "the activations at 'blocks.0.hook_resid_pre' have width 16, but the SAE has d_in=20..."
    """
    if shape is None and hook_name in known:
        switch = _SWITCHES.get(hook_name.split(".")[-1])
        way = f"call model.{switch}(True) and pass the model" if switch else "choose another hook"
        return f"the model has the hook {hook_name!r}, but does not use it: {way}"
    if shape is None:
        near = get_close_matches(hook_name, known, n=3)
        hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
        return f"the model has no hook {hook_name!r}{hint}"
    heads = shape[0] if len(shape) == 2 else 0
    if head_index is not None and not -heads <= head_index < heads:
        return (
            f"hook_head_index={head_index} does not fit {hook_name!r}, which has "
            f"{heads or 'no'} heads"
        )
    width = shape[-1] if len(shape) == 1 or head_index is not None else shape.numel()
    if width != d_in:
        return (
            f"the activations at {hook_name!r} have width {width}, but the SAE has d_in={d_in}: "
            f"set d_in={width} or choose another hook"
        )
    return None


def usual_device(device: str | None = None) -> str:
    """The device that is asked for, or a GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def device_of(model: Any) -> torch.device:
    """Where a language model is."""
    return next(model.parameters()).device
