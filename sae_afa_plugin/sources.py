"""Where SAEs come from: SAELens's catalogue, the hub, a folder, or an object in memory.

A source knows the config of its SAE before any weights are loaded, so that everything that
cannot work is said before hours are spent.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args, get_type_hints
from uuid import uuid4
from zipfile import BadZipFile

import torch
from huggingface_hub import HfApi
from sae_lens import SAE
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from sae_afa_plugin._upstream import (
    SAE_CFG_FILENAME,
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    SAE_WEIGHTS_FILENAME,
    get_conversion_loader_name,
    get_norm_scaling_factor,
    get_pretrained_saes_directory,
    get_releases_for_repo_id,
    get_repo_id_and_folder_name,
    get_sae_lens_config_from_disk,
    handle_config_defaulting,
    load_sae_config_from_huggingface,
)
from sae_afa_plugin.files import add_file, add_tensor, digest_of_module, user_path
from sae_afa_plugin.hub import cached_file, check_readable, commit_of, offline
from sae_afa_plugin.printable import printable
from sae_afa_plugin.spaces import LinearCode, linear_code, why_not

_SHOWN_IDS = 8
_NEEDED = ("d_in", "d_sae", "normalize_activations", "metadata")
# of what decides where and how an SAE reads; somebody else may have written it
_KINDS: dict[str, type] = {
    **dict.fromkeys(("d_in", "d_sae", "d_out", "context_size"), int),
    **dict.fromkeys(("hook_head_index", "hook_head_index_out"), int),
    **dict.fromkeys(("architecture", "dtype", "normalize_activations", "model_name"), str),
    **dict.fromkeys(("hook_name", "hook_name_out", "hf_hook_name", "model_class_name"), str),
    **dict.fromkeys(("prepend_bos", "apply_b_dec_to_input", "disable_concat_sequences"), bool),
    "model_from_pretrained_kwargs": dict,
}
# by the file that tells it: whose it is, and which of SAELens's functions reads it
_CONVERTERS = {
    "ae.pt": ("dictionary_learning", "dictionary_learning_sae_huggingface_loader_1"),
    "sae.safetensors": ("sparsify", "sparsify_disk_loader or sparsify_huggingface_loader"),
    "params.npz": ("Gemma Scope", "gemma_2_sae_huggingface_loader"),
}
_WIDEST = 1 << 32  # beyond any dictionary: a file may say what it likes
_IN_FOLDER = f"/{SAE_CFG_FILENAME}"


@dataclass(frozen=True)
class Excluded:
    """Stands for an SAE that is not to be evaluated, so that it is listed with the reason.

    Args:
        reason: In one sentence.
    """

    reason: str


class SAESource(ABC):
    """One SAE that is to be evaluated.

    Args:
        name: Unique among the SAEs of one evaluation.

    Attributes:
        catalogue_l0: What SAELens's catalogue says of L0, or None.
    """

    catalogue_l0: float | None = None

    def __init__(self, name: str):
        self.name = name

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where it came from: a folder, ``release<tab>id``, or "in memory"."""

    @abstractmethod
    def _read_config(self) -> dict[str, Any]:
        """Read what :attr:`config` keeps."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The SAE's config in SAELens's current format, with ``metadata``.

        Raises:
            ValueError: If it cannot be read, or is no config of an SAE.
        """
        try:
            config = self._read_config()
            missing = [key for key in _NEEDED if config.get(key) is None]
            if not missing and not isinstance(config["metadata"], Mapping):
                raise TypeError(f"metadata={config['metadata']!r} is no object")
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise ValueError(
                f"the config of {self.where!r} ({SAE_CFG_FILENAME}) cannot be used ({kind}{error})"
            ) from error
        if missing:
            raise ValueError(f"the config of {self.where!r} has no {' and no '.join(missing)}")
        return config

    @property
    def metadata(self) -> dict[str, Any]:
        """Of the config: which model and hooks the SAE belongs to."""
        return self.config["metadata"]

    @property
    @abstractmethod
    def where(self) -> str:
        """Where it came from, for people."""

    @abstractmethod
    def load(self, device: str, dtype: str) -> Any:
        """The SAE itself, as :func:`sae_afa_plugin.spaces.linear_code` takes it."""

    def facts(self) -> dict[str, Any]:
        """What else is known of it, for the summary: how it was trained, for one."""
        trained_as = self.metadata.get("training_architecture")
        return {"trained_as": trained_as} if isinstance(trained_as, str) else {}

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the SAE does."""

    def why_not(self) -> str | None:
        """Why it cannot be evaluated, as far as that is known before loading; None if it can."""
        config = self.config
        if not self.metadata.get("hook_name"):
            return "its metadata has no hook_name: set sae.cfg.metadata.hook_name"
        for name, kind in _KINDS.items():
            for place in (config, self.metadata):
                reason = _wrong_kind(name, place.get(name), kind)
                if reason is not None:
                    return reason
        if config["architecture"] in SAE_CLASS_REGISTRY:
            hints = get_type_hints(SAE_CLASS_REGISTRY[config["architecture"]][1])
            for name, hint in hints.items():
                kinds = {*(get_args(hint) or (hint,))} - {type(None)}
                if len(kinds) == 1 and kinds <= {bool, int, float, str}:
                    reason = _wrong_kind(name, config.get(name), *kinds)
                    if reason is not None:
                        return reason
        for name in ("d_in", "d_sae", "d_out"):
            if not 1 <= (config.get(name) or 1) <= _WIDEST:
                return f"its config has {name}={config[name]}, which is no width"
        return why_not(
            config["architecture"],
            self._normalization_after_loading(),
            bool(self.metadata.get("hook_name_out")),
        )

    def _normalization_after_loading(self) -> str:
        """What ``normalize_activations`` will be once a known scaling has been folded."""
        return self.config["normalize_activations"]


def _wrong_kind(name: str, value: Any, kind: type) -> str | None:
    # True is an int for Python, and no width; JSON writes a float that is whole as an int
    if value is None or type(value) is kind or (kind is float and type(value) is int):
        if kind is not float or value is None or math.isfinite(value):
            return None
        return f"its config has {name}={value!r}, which must be finite"
    return (
        f"its config has {name}={value!r}, which is {type(value).__name__} and must be "
        f"{kind.__name__}"
    )


# of loaders: safetensors, NumPy's archives, PyTorch's files, and weights that do not fit
_DAMAGED = (SafetensorError, BadZipFile, UnpicklingError, EOFError, RuntimeError, KeyError)


@contextmanager
def _readable_weights(where: str) -> Generator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"there is no memory on the device for {where!r} ({error})") from error
    except _DAMAGED as error:
        raise ValueError(
            f"the weights in {where!r} cannot be read ({type(error).__name__}: {error}): the file "
            "is damaged or incomplete, or of another SAE"
        ) from error


def _known(config: dict[str, Any]) -> dict[str, Any]:
    """Make sure, before a pass of the model, that SAELens can load what it is."""
    name = config["architecture"]
    if name is None:
        raise ValueError("it names no architecture")
    if not isinstance(name, str) or name in SAE_CLASS_REGISTRY:
        return config  # of a wrong kind: said where all kinds are looked at
    if name in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"it is a training checkpoint of architecture {name!r}, which cannot be loaded for "
            "inference: save it with save_inference_model, and evaluate that"
        )
    near = get_close_matches(name, SAE_CLASS_REGISTRY, n=3)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"SAELens knows no architecture {name!r}{hint}")


class _Asked:
    """What the hub was asked for SAEs that are evaluated together: of each repository, once."""

    def __init__(self) -> None:
        self._commits: dict[str, str | None] = {}
        self._errors: dict[str, ValueError | None] = {}

    def check(self, repo: str) -> None:
        if repo not in self._errors:
            try:
                self._errors[repo] = check_readable(repo)
            except ValueError as error:
                self._errors[repo] = error
        if (known := self._errors[repo]) is not None:
            raise known

    def commit(self, repo: str, file: str) -> str | None:
        if repo not in self._commits:
            self._commits[repo] = commit_of(repo, file=file)
        return self._commits[repo]


class _FromHub(SAESource):
    def __init__(self, release: str, sae_id: str, asked: _Asked):
        super().__init__(printable(sae_id))
        self._asked = asked
        self.release, self.sae_id = release, sae_id
        lookup = get_pretrained_saes_directory().get(release)
        if lookup is not None:
            self.catalogue_l0 = lookup.expected_l0.get(sae_id) or None  # 0.0 stands for unknown

    @property
    @override
    def origin(self) -> str:
        return f"{self.release}\t{self.sae_id}"

    @property
    @override
    def where(self) -> str:
        return f"{self.release}/{self.sae_id}"

    @override
    def _read_config(self) -> dict[str, Any]:
        self._asked.check(get_repo_id_and_folder_name(self.release, self.sae_id)[0])
        return _known(load_sae_config_from_huggingface(self.release, self.sae_id))

    @override
    def why_not(self) -> str | None:
        loader = get_conversion_loader_name(self.release)
        folder = get_repo_id_and_folder_name(self.release, self.sae_id)[1]
        if loader == "mntss_clt_layer_transcoder" or (loader == "gemma_3" and "clt" in folder):
            return (
                "it is one layer of a cross-layer transcoder: its features write to many layers, "
                "so no single activation is what they add up to"
            )
        return super().why_not()

    @override
    def _normalization_after_loading(self) -> str:
        if get_norm_scaling_factor(self.release, self.sae_id) is not None:
            return "none"
        return super()._normalization_after_loading()

    @override
    def load(self, device: str, dtype: str) -> SAE[Any]:
        with _readable_weights(self.where):
            return SAE.from_pretrained(self.release, self.sae_id, device=device, dtype=dtype)

    @override
    def fingerprint(self) -> str:
        repo, folder = get_repo_id_and_folder_name(self.release, self.sae_id)
        commit = self._asked.commit(repo, f"{folder}/{SAE_CFG_FILENAME}")
        return f"{self.release}/{self.sae_id}" + ("" if commit is None else f"@{commit}")


class _FromFolder(SAESource):
    def __init__(self, name: str, folder: Path):
        super().__init__(name)
        self.folder = folder

    @property
    @override
    def origin(self) -> str:
        return printable(str(self.folder))  # a tab stands between a release and an id

    @property
    @override
    def where(self) -> str:
        return str(self.folder)

    @override
    def _read_config(self) -> dict[str, Any]:
        for file in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
            if not (self.folder / file).is_file():
                found = _another_format(str(path) for path in sorted(self.folder.glob("*")))
                raise ValueError(
                    f"the folder {str(self.folder)!r} holds no SAE: it has no {file}{found}"
                )
        return _known(handle_config_defaulting(get_sae_lens_config_from_disk(self.folder)))

    @override
    def load(self, device: str, dtype: str) -> SAE[Any]:
        with _readable_weights(str(self.folder)):
            return SAE.load_from_disk(self.folder, device=device, dtype=dtype)

    @override
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
            add_file(digest, self.folder / file)
        return digest.hexdigest()


class _InMemory(SAESource):
    def __init__(self, name: str, sae: Any):
        super().__init__(name)
        self.sae, self._once = sae, uuid4().hex

    @property
    @override
    def origin(self) -> str:
        return "in memory"

    @property
    @override
    def where(self) -> str:
        return self.name

    @override
    def _read_config(self) -> dict[str, Any]:
        if isinstance(self.sae, SAE):
            return self.sae.cfg.to_dict()
        return _config_of_stranger(self.sae)

    @override
    def load(self, device: str, dtype: str) -> Any:
        return self.sae  # as it is: it belongs to the caller

    @override
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        own = (*SAE_CLASS_REGISTRY.values(), *SAE_TRAINING_CLASS_REGISTRY.values())
        if type(self.sae) in (kind for kind, _ in own):
            return digest_of_module(self.sae) + digest.hexdigest()
        known = self.sae.identity if isinstance(self.sae, LinearCode) else None
        # its code is not known: another object may have the same tensors and encode otherwise
        digest.update((known or self._once).encode())
        for name, tensor in sorted(_tensors_of(self.sae).items()):
            digest.update(name.encode())
            add_tensor(digest, tensor)
        return digest.hexdigest()


def _tensors_of(sae: Any) -> dict[str, Tensor]:
    if isinstance(sae, torch.nn.Module):
        return sae.state_dict()
    return {name: value for name, value in vars(sae).items() if isinstance(value, Tensor)}


def _config_of_stranger(sae: Any) -> dict[str, Any]:
    """The config of an object that is no SAE of SAELens, with what SAEBench's have in ``cfg``."""
    linear_code(sae)  # says what is missing
    cfg = getattr(sae, "cfg", None)
    metadata = {
        name: getattr(cfg, name, None)
        for name in ("model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos")
    }
    inner = getattr(cfg, "metadata", None) or getattr(sae, "metadata", None)
    if inner is not None:
        inner = inner if isinstance(inner, Mapping) else inner.to_dict()
        metadata.update({name: value for name, value in inner.items() if value is not None})
    return {
        "architecture": str(getattr(cfg, "architecture", type(sae).__name__)),
        "d_in": int(sae.W_dec.shape[1]),
        "d_sae": int(sae.W_dec.shape[0]),
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "normalize_activations": "none",
        "metadata": metadata,
    }


class _NotEvaluated(SAESource):
    def __init__(self, name: str, excluded: Excluded):
        super().__init__(name)
        self._reason = excluded.reason

    @property
    @override
    def origin(self) -> str:
        return "excluded"

    @property
    @override
    def where(self) -> str:
        return self.name

    @override
    def _read_config(self) -> dict[str, Any]:
        raise ValueError(self._reason)

    @override
    def why_not(self) -> str | None:
        return self._reason

    @override
    def load(self, device: str, dtype: str) -> Any:
        raise ValueError(self._reason)

    @override
    def fingerprint(self) -> str:
        return ""


def shown_origin(origin: str) -> str:
    """An :attr:`SAESource.origin` as people write it."""
    return origin.replace("\t", "/")


def sources_of(saes: Mapping[str, Any] | Any) -> list[SAESource]:
    """Sources from objects, folders and pairs of release and id, by name.

    Args:
        saes: By name: an SAE (or another object that
            :func:`sae_afa_plugin.spaces.linear_code` takes), the folder of a saved one,
            ``(release, sae_id)``, or :class:`Excluded`.

    Raises:
        ValueError: If a name is no printable text, a folder holds no SAE, or a release or id is
            not known.
    """
    if not isinstance(saes, Mapping):
        raise ValueError(
            f"SAEs are given by name, as {{'mine': sae}}: got {type(saes).__name__} without a name"
        )
    names: list[Any] = list(saes)
    for name in names:
        if not isinstance(name, str) or not name or printable(name) != name:
            raise ValueError(f"an SAE's name must be printable text: got {name!r}")
    found: list[SAESource] = []
    for name, sae in saes.items():
        if isinstance(sae, Excluded):
            found.append(_NotEvaluated(name, sae))
        elif isinstance(sae, tuple):
            (source,) = sources_of_release(sae[0], [sae[1]])
            source.name = name
            found.append(source)
        elif isinstance(sae, str | Path):
            found.append(_FromFolder(name, user_path(sae)))
        else:
            found.append(_InMemory(name, sae))
    return found


def sources_of_release(release: str, patterns: Sequence[str] | None = None) -> list[SAESource]:
    """The SAEs of a release in SAELens's catalogue, or of a repository on the hub.

    Args:
        release: Name of the release, or ``user/repository``.
        patterns: Ids, or patterns like ``blocks.*.hook_resid_pre``. None: all of them.

    Raises:
        ValueError: If there is no such release, or a pattern fits no id.
    """
    if patterns and "/" in release and release not in get_pretrained_saes_directory():
        files = [f"{sae_id}{_IN_FOLDER}" for sae_id in patterns]
        if all(cached_file(release, file) for file in files):  # what is named needs no list
            return _of_hub(release, patterns)
    ids = _ids_of(release)
    chosen: dict[str, None] = {}  # a set that keeps the order
    for pattern in patterns or ["*"]:
        # an id may hold brackets, which as a pattern would not fit itself
        matching = [i for i in ids if i == pattern or fnmatchcase(i, pattern)]
        if not matching:
            near = get_close_matches(pattern, ids, n=3) or ids[:_SHOWN_IDS]
            more = f" and {len(ids) - len(near)} more" if len(ids) > len(near) else ""
            raise ValueError(
                f"release {release!r} has no SAE {pattern!r}: there is "
                f"{', '.join(map(repr, near))}{more}"
            )
        chosen.update(dict.fromkeys(matching))
    return _of_hub(release, chosen)


def _of_hub(release: str, sae_ids: Iterable[str]) -> list[SAESource]:
    asked = _Asked()
    return [_FromHub(release, sae_id, asked) for sae_id in sae_ids]


def _ids_of(release: str) -> list[str]:
    catalogue = get_pretrained_saes_directory()
    if release in catalogue:
        return list(catalogue[release].saes_map)
    if "/" not in release:
        near = get_close_matches(release, list(catalogue), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see its table"
        raise ValueError(f"SAELens's catalogue has no release {release!r}: {hint}")
    if offline():
        raise ValueError(
            f"the SAEs of {release!r} cannot be listed, because HF_HUB_OFFLINE forbids to ask the "
            "hub, and not all that are named are in its cache: name those that are (--sae-id)"
        )
    check_readable(release)
    try:
        # list_repo_files would try again for 23 seconds where there is no network
        files = [file.rfilename for file in HfApi().model_info(release).siblings or ()]
    except Exception as error:  # without a network those of requests or httpx, by its version
        raise ValueError(
            f"{release!r} is neither a release of SAELens's catalogue nor a repository that the "
            f"hub shows ({type(error).__name__})"
        ) from error
    # SAELens needs a folder: one that lies at the top of a repository has no id
    ids = [file[: -len(_IN_FOLDER)] for file in files if file.endswith(_IN_FOLDER)]
    ids = [sae_id for sae_id in ids if f"{sae_id}/{SAE_WEIGHTS_FILENAME}" in files]
    if not ids:
        if releases := get_releases_for_repo_id(release):
            shown = " or ".join(map(repr, releases[:_SHOWN_IDS]))
            raise ValueError(f"SAELens's catalogue has {release!r} as {shown}: name it so")
        raise ValueError(
            f"the repository {release!r} holds no SAE of SAELens: no folder has both "
            f"{SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME}{_another_format(files)}"
        )
    return ids


def _another_format(files: Iterable[str]) -> str:
    """What to do with files that SAELens has a converter for."""
    for name in (file.rsplit("/", 1)[-1] for file in files):
        if name in _CONVERTERS:
            library, converter = _CONVERTERS[name]
            return (
                f". {name} is how {library} saves SAEs: load it with converter={converter} of "
                "sae_lens.loading.pretrained_sae_loaders, and pass the object"
            )
    return ""
