"""Language models: as an SAE's metadata names them, by name, or from a local folder.

Metadata are somebody else's words. They may say which model an SAE belongs to and how its weights
are processed, which decides numbers. They may not choose code, files or places on this machine:
:func:`why_not_loaded` is the only door.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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
    never_asking_for_remote_code,
)
from sae_afa_plugin.activations.embedded import (
    ASSETS,
    EMBEDDED_NAME,
    hooked_gpt2,
    load_embedded_model,
)
from sae_afa_plugin.activations.hooks import inner_model
from sae_afa_plugin.files import digest_of_files, digest_of_module
from sae_afa_plugin.hub import check_readable, commit_of

# of the metadata, what decides which model an SAE belongs to
_MODEL_KEYS = ("model_name", "model_class_name", "model_from_pretrained_kwargs")
_CLASSES = ("HookedTransformer", "HookedMamba", "AutoModelForCausalLM")
# of the keyword arguments, what decides numbers and can run nothing
_DECIDES = {
    **dict.fromkeys(("center_writing_weights", "center_unembed", "fold_ln"), bool),
    **dict.fromkeys(("fold_value_biases", "refactor_factored_attn_matrices"), bool),
    **dict.fromkeys(("dtype", "torch_dtype", "revision", "default_padding_side"), str),
    **dict.fromkeys(("checkpoint_index", "checkpoint_value", "first_n_layers", "n_ctx"), int),
    "default_prepend_bos": bool,
}
_LONGEST_CONTEXT = 1 << 15  # a mask of TransformerLens has a byte for each pair of positions: 1 GiB
# and what was about the machine where the SAE was trained
_OF_A_MACHINE = (
    "device",
    "device_map",
    "low_cpu_mem_usage",
    "max_memory",
    "move_to_device",
    "n_devices",
)
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


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


def why_not_loaded(metadata: Mapping[str, Any], trust_remote_code: bool = False) -> str | None:
    """Why a model is not loaded as an SAE's metadata say; None if it can be.

    Args:
        metadata: ``cfg.metadata`` of the SAE as a dictionary.
        trust_remote_code: Whether the user has said so.

    Example:
        >>> why_not_loaded({"model_name": "gpt2", "model_from_pretrained_kwargs": {"token": "x"}})
        "its metadata ask for the model to be loaded with token='x', which is not ..."
    """
    name = metadata.get("model_name")
    if name and name != EMBEDDED_NAME:
        if not _REPOSITORY.fullmatch(name) or ".." in name:
            return (
                f"its metadata name {name!r} as the model, which is no name on the hub: if you "
                "trust it, pass the model yourself (--model)"
            )
        if Path(name).is_dir():
            return (
                f"its metadata name {name!r} as the model, which is a folder here: if that is the "
                "model, pass it yourself (--model)"
            )
    class_name = metadata.get("model_class_name") or _CLASSES[0]
    if class_name not in _CLASSES:
        return f"its metadata name model_class_name={class_name!r}: it must be one of {_CLASSES}"
    for key, value in (metadata.get("model_from_pretrained_kwargs") or {}).items():
        if key in _OF_A_MACHINE or value is None:
            continue
        if key == "trust_remote_code":
            if value is not False and not trust_remote_code:
                return (
                    "its metadata ask for trust_remote_code, which would run Python from the "
                    f"repository {name!r}: read it first, then pass --trust-remote-code "
                    "(trust_remote_code=True) or the model itself"
                )
        elif key not in _DECIDES:
            return (
                f"its metadata ask for the model to be loaded with {key}={value!r}, which is not "
                "taken from a file: if you want it so, pass the model itself"
            )
        elif key == "n_ctx" and type(value) is int and value > _LONGEST_CONTEXT:
            return (
                f"its metadata ask for a model with n_ctx={value}, whose attention masks would not "
                "fit: if you want it so, pass the model itself"
            )
        elif type(value) is not _DECIDES[key]:
            return (
                f"its metadata ask for the model to be loaded with {key}={value!r}, which is "
                f"{type(value).__name__} and must be {_DECIDES[key].__name__}"
            )
    return None


def _loading_kwargs(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of the keyword arguments when nothing but numbers depends on them."""
    given = metadata.get("model_from_pretrained_kwargs") or {}
    return {key: value for key, value in given.items() if key in _DECIDES and value is not None}


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
        wanted["model_from_pretrained_kwargs"] = _loading_kwargs(data)
        if not found:
            found, first = wanted, name
        elif wanted != found:
            raise ValueError(
                f"{first!r} belongs to {told(found)}, but {name!r} to {told(wanted)}: evaluate "
                "them one after the other, or pass the model"
            )
    return found


def told(model: Mapping[str, Any]) -> str:
    """What :func:`shared_model` returns, for people."""
    kwargs = model["model_from_pretrained_kwargs"]
    return f"{model['model_name']} ({kwargs})" if kwargs else str(model["model_name"])


def load_language_model(
    model: str | Path | None,
    wanted: Mapping[str, Any],
    hook_names: Sequence[str],
    device: str,
    trust_remote_code: bool = False,
) -> Any:
    """A language model with hooks, processed as the SAEs were trained on it.

    Args:
        model: Name of a model, a local folder in transformers' format, or None for the one that
            the SAEs want.
        wanted: What :func:`shared_model` returns.
        hook_names: The hooks that will be read.
        device: Where to put it.
        trust_remote_code: Whether Python from the model's repository may run.

    Returns:
        A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.

    Raises:
        ValueError: If there is no such model, a folder holds a model that cannot be processed as
            the SAEs need it, or a repository comes with Python that is not trusted.
    """
    name = str(model or wanted["model_name"])
    kwargs = wanted["model_from_pretrained_kwargs"]
    for key, value in kwargs.items():
        if key in _DECIDES and type(value) is not _DECIDES[key]:
            raise ValueError(f"{key} must be {_DECIDES[key].__name__}: got {value!r}")
    if name == EMBEDDED_NAME:
        return load_embedded_model(device, **_that_count(kwargs))
    if not Path(name).is_dir() and (_is_known(name) or "/" in name):
        check_readable(_official(name))
    with nullcontext() if trust_remote_code else never_asking_for_remote_code():
        try:
            return _load(name, wanted, hook_names, device, trust_remote_code)
        except TypeError as error:  # a keyword that nobody takes
            if not kwargs:
                raise
            raise ValueError(
                f"the model {name!r} cannot be loaded with {kwargs} ({error})"
            ) from error
        except ValueError as error:
            if "custom code" not in str(error):
                raise
            raise ValueError(
                f"the model {name!r} comes with Python of its own, which does not run unasked: if "
                "you trust its authors, pass --trust-remote-code (trust_remote_code=True)"
            ) from error


def _load(
    name: str,
    wanted: Mapping[str, Any],
    hook_names: Sequence[str],
    device: str,
    trust_remote_code: bool,
) -> Any:
    kwargs = dict(wanted["model_from_pretrained_kwargs"])
    trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if Path(name).is_dir():
        return _from_folder(Path(name), wanted, kwargs, trust, hook_names, device)
    if wanted["model_class_name"] != "HookedTransformer":
        class_name = wanted["model_class_name"]
        return load_model(class_name, name, device, kwargs | trust, list(hook_names))
    if any(hook.endswith(".mlp.hook_in") for hook in hook_names) and not kwargs:
        # the only one that has it
        return TransformerBridge.boot_transformers(name, device=device, **trust)
    own = [hook for hook in hook_names if not hook.startswith(("blocks.", "hook_"))]
    if own and not _is_known(name):  # new models come with transformers' names of their hooks
        return load_model("AutoModelForCausalLM", name, device, kwargs | trust, own)
    check_model_name(name)
    return load_model("HookedTransformer", name, device, kwargs | trust)


def _from_folder(
    folder: Path,
    wanted: Mapping[str, Any],
    kwargs: dict[str, Any],
    trust: dict[str, Any],
    hook_names: Sequence[str],
    device: str,
) -> Any:
    if wanted["model_class_name"] == "AutoModelForCausalLM":
        return load_model(
            "AutoModelForCausalLM", str(folder), device, kwargs | trust, list(hook_names)
        )
    if AutoConfig.from_pretrained(folder, **trust).model_type == "gpt2":
        hf_model = GPT2LMHeadModel.from_pretrained(folder)
        return hooked_gpt2(
            hf_model,
            AutoTokenizer.from_pretrained(folder),
            folder.name,
            device,
            **_that_count(kwargs),
        )
    if kwargs:
        raise ValueError(
            f"the SAEs need their model loaded with {kwargs}, which is not possible "
            f"for the folder {str(folder)!r}: load the model yourself and pass the object"
        )
    return TransformerBridge.boot_transformers(str(folder), device=device, **trust)


def _that_count(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what changes no activation of a model that is at hand, in float32 and whole."""
    beside = {"default_prepend_bos", "default_padding_side", "revision", "device"}
    as_it_is = {"dtype": ("float32", "torch.float32"), "torch_dtype": ("float32", "torch.float32")}
    return {
        key: value
        for key, value in kwargs.items()
        if key not in beside and value not in as_it_is.get(key, ())
    }


def model_identity(model: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one language model from another, as settings keep it.

    Args:
        model: The model object, its name, a local folder, or None for the one that SAEs want.
        wanted: What :func:`shared_model` returns.

    Returns:
        ``model``, how it is called; ``model_argument``, what has to be passed to load it again
        (None where SAEs name it, or where it was an object); and ``model_content``, a digest of
        an object (:func:`sae_afa_plugin.files.digest_of_module`) and of all files of a folder, otherwise None.

    Example:
        >>> model_identity("gpt2", {"model_from_pretrained_kwargs": {}})["model_argument"]
        'gpt2'
    """
    if model is None or isinstance(model, str | Path):
        name = str(model or wanted["model_name"])
        kwargs = wanted.get("model_from_pretrained_kwargs") or {}
        folder = ASSETS if name == EMBEDDED_NAME else Path(name) if Path(name).is_dir() else None
        return {
            "model": name if folder is not None else _official(name),
            "model_class_name": wanted.get("model_class_name"),
            "model_kwargs": kwargs,
            "model_argument": None if model is None else name,
            "model_content": None if folder is None else digest_of_files(folder),
        }
    name = getattr(getattr(model, "cfg", None), "model_name", None)
    return {
        "model": f"{type(model).__name__} {name or ''}".strip(),
        "model_class_name": None,
        "model_kwargs": None,  # whoever made it knows
        "model_argument": None,
        "model_content": "-".join(digest_of_module(part) for part in (model, *inner_model(model))),
    }


def model_revision(model: Any, wanted: Mapping[str, Any]) -> str | None:
    """The commit on the hub that a model is loaded from; None for others, or where it is not known.

    Args:
        model: As for :func:`model_identity`.
        wanted: What :func:`shared_model` returns.
    """
    if model is not None and not isinstance(model, str | Path):
        return None
    name, kwargs = str(model or wanted["model_name"]), wanted["model_from_pretrained_kwargs"] or {}
    if name == EMBEDDED_NAME or Path(name).is_dir() or any("checkpoint" in key for key in kwargs):
        return None  # known by its content, or one of many revisions that TransformerLens chooses
    return commit_of(_official(name), revision=kwargs.get("revision"))


def _official(name: str) -> str:
    """What TransformerLens calls a model, the repository on the hub that it reads it from."""
    aliases = {alias.lower(): full for full, short in MODEL_ALIASES.items() for alias in short}
    return aliases.get(name.lower(), name)
