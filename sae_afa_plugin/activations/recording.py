"""Activations on disk: recorded once, read by any number of evaluations, trainings and machines.

In the folder of a recording::

    manifest.json      what decides the numbers, hooks, shapes, shards; written first
    places.parquet     where each token stands
    sequences.parquet  every token that the model has read, with its text
    00000.safetensors  a shard: some tokens in a row, one tensor for each hook

A shard is complete or not there, so an interrupted recording goes on with those that are missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override
from xxhash import xxh3_128

from sae_afa_plugin import limits
from sae_afa_plugin.activations.base import Activations, Site, different_settings
from sae_afa_plugin.activations.hooks import (
    device_of,
    known_state,
    stop_layer,
    usual_device,
    wanted_hooks,
)
from sae_afa_plugin.activations.models import (
    load_language_model,
    shared_model,
    why_not_loaded,
)
from sae_afa_plugin.files import (
    LOCK,
    PARTIAL,
    add_tensor,
    claimed,
    clear_aside,
    digest_of_table,
    read_object,
    read_sealed,
    user_given,
    user_path,
    write_sealed,
    write_whole,
)

FORMAT_VERSION = 2
MANIFEST_FILENAME = "manifest.json"
_PLACES, _SEQUENCES = "places.parquet", "sequences.parquet"
_SHARD_BYTES = 1 << 28
_OTHER_MODEL = 0.02  # of the norm; another device or a recording in bfloat16 is less
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class _Manifest:
    """What ``manifest.json`` holds, beside the format's name and version."""

    settings: dict[str, Any]
    hooks: dict[str, dict[str, Any]]
    n_tokens: int
    n_special: int
    shard_tokens: int
    tables: dict[str, str]

    def __post_init__(self) -> None:
        limits.whole(self, "n_tokens", "shard_tokens", at_least=1)
        limits.whole(self, "n_special")
        limits.kind(self, "settings", dict)
        limits.kind(self, "tables", dict)
        for hook, about in self.hooks.items():
            shape, dtype = about["shape"], about["dtype"]
            if dtype not in (*DTYPES, "float64") or not all(0 < int(n) == n for n in shape):
                raise ValueError(f"{hook!r} has shape {shape} and dtype {dtype!r}")

    @property
    def n_shards(self) -> int:
        return -(-self.n_tokens // self.shard_tokens)

    @property
    def bytes_per_token(self) -> int:
        return sum(
            torch.Size(hook["shape"]).numel() * getattr(torch, hook["dtype"]).itemsize
            for hook in self.hooks.values()
        )

    def range_of(self, shard: int) -> tuple[int, int]:
        start = shard * self.shard_tokens
        return start, min(start + self.shard_tokens, self.n_tokens)


@contextmanager
def _whole(folder: Path) -> Generator[None]:
    """Let whatever is wrong with files, which Arrow says in many ways, be said as damage."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"the recording in {str(folder)!r} is damaged ({type(error).__name__}: {error}): "
            "record it again"
        ) from error


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def record(
    source: Activations,
    hooks: Sequence[str],
    folder: str | Path,
    dtype: str | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> RecordedActivations:
    """Write the activations of a source into a folder, or what is missing there.

    Args:
        source: Where to read.
        hooks: The hooks that are wanted.
        folder: Made if it does not exist. One that holds an unfinished recording of the same
            activations is finished.
        dtype: float32, float16 or bfloat16; None: what the source gives. A lower precision is a
            setting of its own: results from it do not mix with others.
        progress: Whether to show a bar.
        say: Gets one line with the size before anything is written.

    Raises:
        ValueError: If a hook does not exist, the folder holds something else, or values leave the
            range of ``dtype``.
        OSError: If the disk has no room.
    """
    folder = user_path(folder)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}: got {dtype!r}")
    manifest = _plan(source, list(dict.fromkeys(hooks)), dtype)
    content = {"format": "sae-afa activations", "version": FORMAT_VERSION, **vars(manifest)}
    content = json.loads(json.dumps(content))  # tuples become lists, as in the file
    if (folder / MANIFEST_FILENAME).is_file():
        _check_same(folder, content)
    elif folder.is_dir() and any(
        not file.name.startswith(".") or not file.name.endswith((PARTIAL, LOCK))
        for file in folder.iterdir()
    ):
        raise ValueError(
            f"the folder {str(folder)!r} is not empty and holds no recording: use another folder"
        )
    shards = [_shard(folder, number) for number in range(manifest.n_shards)]
    if all(shard.is_file() for shard in shards):
        say(_sizes(manifest, 0))
    else:
        with claimed(folder, "recording"):
            _write_missing(source, manifest, content, shards, dtype, progress, say)
    for path in (*shards, *(folder / name for name in (MANIFEST_FILENAME, _PLACES, _SEQUENCES))):
        clear_aside(path)  # of a kill just after it was complete
    return RecordedActivations(folder)


def _write_missing(
    source: Activations,
    manifest: _Manifest,
    content: dict[str, Any],
    shards: list[Path],
    dtype: str | None,
    progress: bool,
    say: Callable[[str], None],
) -> None:
    folder = shards[0].parent
    missing = [number for number, shard in enumerate(shards) if not shard.is_file()]
    tokens = sum(stop - start for start, stop in map(manifest.range_of, missing))
    say(_sizes(manifest, tokens))
    needed, free = tokens * manifest.bytes_per_token, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the recording needs {_size(needed)} in {str(folder)!r}, where {_size(free)} are free: "
            "record fewer tokens or hooks, or in float16"
        )
    # first, so that whatever is there is known to be of a recording
    if not (folder / MANIFEST_FILENAME).is_file():
        write_sealed(folder / MANIFEST_FILENAME, content)
    for name, table in ((_PLACES, source.places), (_SEQUENCES, source.sequences)):
        if not (folder / name).is_file():
            write_whole(folder / name, table.to_parquet)
    with tqdm(
        total=manifest.n_tokens,
        initial=manifest.n_tokens - tokens,
        desc="Recording",
        unit="tok",
        disable=not progress,
    ) as bar:
        for number in missing:
            start, stop = manifest.range_of(number)
            found = source.read(list(manifest.hooks), start, stop)
            tensors = {hook: _stored(hook, acts, dtype) for hook, acts in found.items()}
            about = {"digest": _digest_of_tensors(tensors)}
            write_whole(shards[number], lambda path, t=tensors, a=about: save_file(t, path, a))
            bar.update(stop - start)


def _sizes(manifest: _Manifest, missing: int) -> str:
    """How much there is to record, and how many tokens of it are missing."""
    whole = _size(manifest.n_tokens * manifest.bytes_per_token)
    return (
        f"{manifest.n_tokens:,} tokens at {len(manifest.hooks)} hooks, "
        f"{manifest.bytes_per_token:,} bytes each: {whole}"
        + (
            ""
            if missing == manifest.n_tokens
            else f", of which {_size(missing * manifest.bytes_per_token)} are missing"
        )
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 1 << 30 else f"{n_bytes / 2**20:.1f} MiB"


def _plan(source: Activations, hooks: list[str], dtype: str | None) -> _Manifest:
    if not hooks:
        raise ValueError("name at least one hook")
    shapes = source.shapes(hooks)
    for hook in hooks:
        reason = source.why_not(Site(hook), shapes[hook].numel() if hook in shapes else 0)
        if reason is not None:
            raise ValueError(reason)
    first = source.read(hooks, 0, 1)
    stored = {hook: dtype or str(first[hook].dtype).removeprefix("torch.") for hook in hooks}
    settings = source.settings
    if dtype is not None:
        settings = {**settings, "recorded_dtype": dtype}
    about = {hook: {"shape": list(shapes[hook]), "dtype": stored[hook]} for hook in hooks}
    tables = {
        name: digest_of_table(table)
        for name, table in ((_PLACES, source.places), (_SEQUENCES, source.sequences))
    }
    manifest = _Manifest(settings, about, source.n_tokens, source.n_special, 1, tables)
    return replace(manifest, shard_tokens=max(1, _SHARD_BYTES // max(1, manifest.bytes_per_token)))


def _check_same(folder: Path, content: dict[str, Any]) -> None:
    found = _read_manifest(folder)
    different = [key for key in content if key != "settings" and found.get(key) != content[key]]
    before = found.get("settings")
    if not isinstance(before, dict) or different_settings(before, content["settings"]):
        different.append("settings")
    if different:
        raise ValueError(
            f"{str(folder)!r} holds a recording of something else ({', '.join(different)} differ): "
            "use another folder, or delete this one"
        )


def _stored(hook: str, acts: Tensor, dtype: str | None) -> Tensor:
    acts = acts.cpu()
    if dtype is None:
        return acts.contiguous()
    stored = acts.to(getattr(torch, dtype))
    if bool((acts.isfinite() & ~stored.isfinite()).any()):
        raise ValueError(
            f"activations at {hook!r} leave the range of {dtype} (the largest is "
            f"{acts[acts.isfinite()].abs().max().item():.3g}): record in bfloat16 or float32"
        )
    return stored.contiguous()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        found = read_object(folder / MANIFEST_FILENAME)
        if found.get("format") != "sae-afa activations":
            raise ValueError("it is no manifest of sae-afa")
        if found.get("version") == FORMAT_VERSION:
            return read_sealed(folder / MANIFEST_FILENAME)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the folder {str(folder)!r} holds no recording of activations "
            f"({MANIFEST_FILENAME}: {error})"
        ) from error
    raise ValueError(
        f"the recording in {str(folder)!r} has version {found.get('version')}, this version of "
        f"sae-afa-plugin reads {FORMAT_VERSION}: record it again"
    )


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = xxh3_128()  # a shard in hundredths of a second
    for hook, acts in sorted(tensors.items()):
        digest.update(f"{hook} {tuple(acts.shape)} {acts.dtype}\n".encode())
        add_tensor(digest, acts)
    return digest.hexdigest()


class RecordedActivations(Activations):
    """Activations that :func:`record` has written.

    Args:
        folder: The recording.
        model: The language model it was made with, for metrics that run it again: an object, a
            name or a local folder, which is loaded when it is first needed.
        device: Where it is loaded; None: a GPU if there is one.

    Raises:
        ValueError: If the folder holds no finished recording.
    """

    def __init__(self, folder: str | Path, model: Any | None = None, device: str | None = None):
        self.folder, self._given, self._device = user_path(folder), user_given(model), device
        found = _read_manifest(self.folder)
        with _whole(self.folder):
            self._manifest = _Manifest(
                **{name: found[name] for name in _Manifest.__dataclass_fields__}
            )
            n_shards = self._manifest.n_shards
        # by what is there: the manifest may name more than there could ever be
        shards = [file for file in self.folder.glob("*.safetensors") if file.stem.isdigit()]
        if missing := max(0, n_shards - sum(int(file.stem) < n_shards for file in shards)):
            raise ValueError(
                f"the recording in {str(folder)!r} is not finished, {missing} of {n_shards} "
                "shards are missing: run the same sae-afa record again"
            )
        with _whole(self.folder):
            rows = pq.read_metadata(self.folder / _PLACES).num_rows
            if rows != self._manifest.n_tokens:
                raise ValueError(f"{_PLACES} has {rows} rows")
            self._places, self._sequences = self._table(_PLACES), self._table(_SEQUENCES)
        self._intact: set[int] = set()  # shards that are as they were written

    def _table(self, name: str) -> pd.DataFrame:
        table = pd.read_parquet(self.folder / name)
        if digest_of_table(table) != self._manifest.tables.get(name):
            raise ValueError(f"{name} is not as it was written")
        return table

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return self._manifest.settings

    @property
    @override
    def places(self) -> pd.DataFrame:
        return self._places

    @property
    @override
    def n_tokens(self) -> int:
        return self._manifest.n_tokens

    @property
    @override
    def sequences(self) -> pd.DataFrame:
        return self._sequences

    @property
    @override
    def n_special(self) -> int:
        return self._manifest.n_special

    @property
    @override
    def has_model(self) -> bool:
        return self._given is not None

    @cached_property
    def model(self) -> Any | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The language model, loaded when it is first asked for.

        Raises:
            ValueError: If it does not give what was recorded.
        """
        model = self._loaded()
        if model is not None:
            self._check_model(model)
        return model

    def _check_model(self, model: Any) -> None:
        """Run the model on the first sequence, and compare."""
        of_first = (self._places["sequence"] == 0) if "position" in self._places else None
        hook = next((hook for hook in self.hook_names() if hook in model.hook_dict), None)
        if of_first is None or not of_first.any() or hook is None:
            return
        tokens = self._sequences.loc[self._sequences["sequence"] == 0, "token_id"].tolist()
        recorded = self.read([hook], 0, int(of_first.sum()))[hook].flatten(1).float()
        with known_state(model):
            cache = model.run_with_cache(
                torch.tensor(tokens, dtype=torch.long, device=device_of(model))[None],
                names_filter=[hook],
                stop_at_layer=stop_layer([hook]),
                prepend_bos=False,
            )[1]
        rows = self._places.loc[of_first, "position"].tolist()
        found = cache[hook][0, rows].flatten(1).cpu().float()
        off = (found - recorded).norm() / recorded.norm() if found.shape == recorded.shape else 1.0
        if not off < _OTHER_MODEL:
            raise ValueError(
                f"the model does not give what the recording in {str(self.folder)!r} holds (at "
                f"{hook} it is {100 * float(off):.0f} % off): pass the one that was recorded, "
                f"{self.settings.get('model')!r}, processed as it was then"
            )

    def _loaded(self) -> Any | None:
        if not isinstance(self._given, str | Path):
            return self._given
        said = {  # by whoever made the recording
            "model_class_name": self.settings.get("model_class_name"),
            "model_from_pretrained_kwargs": self.settings.get("model_kwargs"),
        }
        reason = why_not_loaded(said)
        if reason is not None:
            raise ValueError(f"the model of the recording is not loaded: {reason}")
        wanted = shared_model({"": {**said, "model_name": str(self._given)}})
        return load_language_model(
            self._given, wanted, self.hook_names(), usual_device(self._device)
        )

    @override
    def hook_names(self) -> list[str]:
        return list(self._manifest.hooks)

    @override
    def site(self, metadata: Mapping[str, Any]) -> Site:
        site = super().site(metadata)
        # the recording may know a hook by the name that transformers gives it
        names = {hook: self._known(hook, metadata) for hook in site.hooks}
        return site._replace(
            hook=names[site.hook],
            hook_out=None if site.hook_out is None else names[site.hook_out],
        )

    def _known(self, hook: str, metadata: Mapping[str, Any]) -> str:
        if hook in self._manifest.hooks:
            return hook
        suffix = "_out" if hook == metadata.get("hook_name_out") else ""
        ends = {
            f"hook_name{suffix}": hook,
            f"hf_hook_name{suffix}": metadata.get(f"hf_hook_name{suffix}"),
        }
        other = {name.removesuffix("_out"): value for name, value in ends.items()}
        return next((h for h in sorted(wanted_hooks(other)) if h in self._manifest.hooks), hook)

    @override
    def shapes(self, hooks: Sequence[str]) -> dict[str, torch.Size]:
        known = self._manifest.hooks
        return {hook: torch.Size(known[hook]["shape"]) for hook in hooks if hook in known}

    def _check_whole(self, number: int, shard: Any) -> None:
        tensors = {hook: shard.get_tensor(hook) for hook in shard.keys()}  # noqa: SIM118
        if (shard.metadata() or {}).get("digest") != _digest_of_tensors(tensors):
            raise ValueError("it is not as it was written: its digest does not fit")
        self._intact.add(number)

    @override
    def read(self, hooks: Sequence[str], start: int, stop: int) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
        size = self._manifest.shard_tokens
        for number in range(start // size, -(-stop // size)):
            first, last = self._manifest.range_of(number)
            within = slice(max(start, first) - first, min(stop, last) - first)
            path = _shard(self.folder, number)
            try:
                with safe_open(path, framework="pt") as shard:
                    if number not in self._intact:
                        self._check_whole(number, shard)
                    for hook in parts:
                        found = shard.get_slice(hook)
                        wanted = [last - first, *self._manifest.hooks[hook]["shape"]]
                        if found.get_shape() != wanted:
                            raise ValueError(f"{hook!r} has shape {found.get_shape()} there")
                        parts[hook].append(found[within])
            except (SafetensorError, OSError, ValueError) as error:
                raise ValueError(
                    f"the shard {path.name} of {str(self.folder)!r} cannot be read ({error}): "
                    "delete it and run the same sae-afa record again"
                ) from error
        return {
            hook: found[0] if len(found) == 1 else torch.cat(found) for hook, found in parts.items()
        }
