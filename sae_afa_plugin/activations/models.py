"""Language models: as an SAE's metadata names them, by name, or from a local folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel

from sae_afa_plugin._upstream import (
    MODEL_ALIASES,
    OFFICIAL_MODEL_NAMES,
    TransformerBridge,
    load_model,
)
from sae_afa_plugin.activations.embedded import (
    ASSETS,
    EMBEDDED_NAME,
    hooked_gpt2,
    load_embedded_model,
)
from sae_afa_plugin.files import add_file, add_tensor

# of the metadata, what decides which model an SAE belongs to
_MODEL_KEYS = ("model_name", "model_class_name", "model_from_pretrained_kwargs")


def check_model_name(name: str) -> None:
    """Make sure that TransformerLens can load a model of this name.

    Raises:
        ValueError: If it has none, with the names that come near.
    """
    if _is_known(name):
        return
    near = get_close_matches(name, _known_names(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see its model table"
    raise ValueError(f"TransformerLens has no model {name!r}: {hint}")


def _known_names() -> list[str]:
    return [*OFFICIAL_MODEL_NAMES, *chain(*MODEL_ALIASES.values())]


def _is_known(name: str) -> bool:
    return name.lower() in (known.lower() for known in _known_names())


def shared_model(metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The model that several SAEs have in common.

    Args:
        metadata: ``cfg.metadata`` of each SAE as a dictionary, by name.

    Returns:
        ``model_name``, ``model_class_name`` and ``model_from_pretrained_kwargs``.

    Raises:
        ValueError: If the SAEs belong to different models, or do not say to which.
    """
    found: dict[str, Any] = {}
    first = ""
    for name, data in metadata.items():
        wanted = {key: data.get(key) for key in _MODEL_KEYS}
        if not wanted["model_name"]:
            raise ValueError(f"the metadata of {name!r} names no model: pass the model")
        wanted["model_class_name"] = wanted["model_class_name"] or "HookedTransformer"
        wanted["model_from_pretrained_kwargs"] = wanted["model_from_pretrained_kwargs"] or {}
        if not found:
            found, first = wanted, name
        elif wanted != found:
            raise ValueError(
                f"{first!r} belongs to {_told(found)}, but {name!r} to {_told(wanted)}: evaluate "
                "them one after the other, or pass the model"
            )
    return found


def _told(model: Mapping[str, Any]) -> str:
    kwargs = model["model_from_pretrained_kwargs"]
    return f"{model['model_name']} ({kwargs})" if kwargs else str(model["model_name"])


def load_language_model(
    model: str | Path | None, wanted: Mapping[str, Any], hook_names: Sequence[str], device: str
) -> Any:
    """A language model with hooks, processed as the SAEs were trained on it.

    Args:
        model: Name of a model, a local folder in transformers' format, or None for the one that
            the SAEs want.
        wanted: What :func:`shared_model` returns.
        hook_names: The hooks that will be read.
        device: Where to put it.

    Returns:
        A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.

    Raises:
        ValueError: If there is no such model, or a folder holds a model that cannot be
            processed as the SAEs need it.
    """
    name = str(model or wanted["model_name"])
    if name == EMBEDDED_NAME:
        return load_embedded_model(device)
    kwargs = dict(wanted["model_from_pretrained_kwargs"])
    if Path(name).is_dir():
        return _from_folder(Path(name), wanted, kwargs, hook_names, device)
    if wanted["model_class_name"] != "HookedTransformer":
        return load_model(wanted["model_class_name"], name, device, kwargs, list(hook_names))
    if any(hook.endswith(".mlp.hook_in") for hook in hook_names) and not kwargs:
        return TransformerBridge.boot_transformers(name, device=device)  # the only one that has it
    own = [hook for hook in hook_names if not hook.startswith(("blocks.", "hook_"))]
    if own and not _is_known(name):  # new models come with transformers' names of their hooks
        return load_model("AutoModelForCausalLM", name, device, kwargs, own)
    check_model_name(name)
    return load_model("HookedTransformer", name, device, kwargs)


def _from_folder(
    folder: Path,
    wanted: Mapping[str, Any],
    kwargs: dict[str, Any],
    hook_names: Sequence[str],
    device: str,
) -> Any:
    if wanted["model_class_name"] == "AutoModelForCausalLM":
        return load_model("AutoModelForCausalLM", str(folder), device, kwargs, list(hook_names))
    if AutoConfig.from_pretrained(folder).model_type == "gpt2":
        hf_model = GPT2LMHeadModel.from_pretrained(folder)
        return hooked_gpt2(
            hf_model, AutoTokenizer.from_pretrained(folder), folder.name, device, **kwargs
        )
    if kwargs:
        raise ValueError(
            f"the SAEs need their model loaded with {kwargs}, which is not possible "
            f"for the folder {str(folder)!r}: load the model yourself and pass the object"
        )
    return TransformerBridge.boot_transformers(str(folder), device=device)


def model_identity(model: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one language model from another, as settings keep it.

    Args:
        model: The model object, its name, a local folder, or None for the one that SAEs want.
        wanted: What :func:`shared_model` returns.

    Returns:
        ``model``, how it is called; ``model_argument``, what has to be passed to load it again
        (None where SAEs name it, or where it was an object); and ``model_content``, a digest of
        all weights of an object and of all files of a folder, otherwise None.

    Example:
        >>> model_identity("gpt2", {"model_from_pretrained_kwargs": {}})["model_argument"]
        'gpt2'
    """
    if model is None or isinstance(model, str | Path):
        name = str(model or wanted["model_name"])
        kwargs = wanted.get("model_from_pretrained_kwargs") or {}
        folder = ASSETS if name == EMBEDDED_NAME else Path(name) if Path(name).is_dir() else None
        return {
            "model": name,
            "model_class_name": wanted.get("model_class_name"),
            "model_kwargs": kwargs,
            "model_argument": None if model is None else name,
            "model_content": None if folder is None else _digest_of_folder(folder),
        }
    name = getattr(getattr(model, "cfg", None), "model_name", None)
    return {
        "model": f"{type(model).__name__} {name or ''}".strip(),
        "model_class_name": None,
        "model_kwargs": None,  # whoever made it knows
        "model_argument": None,
        "model_content": _digest_of_weights(model),
    }


def _digest_of_weights(model: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        add_tensor(digest, parameter)
    return digest.hexdigest()[:16]


def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        add_file(digest, file)
    return digest.hexdigest()[:16]
