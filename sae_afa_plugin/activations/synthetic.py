"""Activations with a known truth: samples of SAELens's synthetic models.

A synthetic model has a dictionary and draws sparse coefficients; activations are their product.
So of every sample it is known which features are on, and how far an SAE is from that. Paper of the
benchmark: SynthSAEBench (SAELens's ``sae_lens.synthetic``).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from sae_lens.synthetic import (
    SYNTHETIC_MODEL_CONFIG_FILENAME,
    SYNTHETIC_MODEL_HIERARCHY_FILENAME,
    SYNTHETIC_MODEL_WEIGHTS_FILENAME,
    FeatureDictionary,
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from safetensors import safe_open
from torch import Tensor
from typing_extensions import override

from sae_afa_plugin import limits
from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.activations.tensors import digest_of_tensors
from sae_afa_plugin.files import (
    aside_of,
    cache_folder,
    read_object,
    read_sealed,
    user_path,
    write_sealed,
    writing,
)
from sae_afa_plugin.printable import short

SMALL_WORLD = SyntheticModelConfig(
    num_features=192,
    hidden_dim=96,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.3, min_prob=0.01),
    mean_firing_magnitudes=1.0,
    std_firing_magnitudes=0.2,
    seed=0,
)
"""192 features in 96 dimensions, 5.8 of them active on average, independent of each other."""

HIERARCHY_WORLD = SyntheticModelConfig(
    num_features=192,
    hidden_dim=96,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=0.01),
    hierarchy=HierarchyConfig(
        total_root_nodes=12,
        branching_factor=3,
        max_depth=2,
        mutually_exclusive_portion=0.5,
        compensate_probabilities=True,
    ),
    correlation=LowRankCorrelationConfig(rank=8, correlation_scale=0.2),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=1.2, end=0.8),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.1, std=0.1),
    seed=0,
)
"""The same size with 12 trees of features, children that exclude each other, and correlations."""

SYNTH_SAE_BENCH_16K = SyntheticModelConfig(
    num_features=16_384,
    hidden_dim=768,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
    hierarchy=HierarchyConfig(
        total_root_nodes=128,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
    ),
    orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
    correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
    bias=False,
    seed=42,
)
"""A world of the kind of SynthSAEBench-16k, and not its published weights.

SAELens's package does not hold the parameters of ``decoderesearch/synth-sae-bench-16k-v1``, so
these could not be compared with it. The number of features, the width and the true mean L0 (34)
agree with what is known of it; the rest is from memory, and another seed has other directions.
Where the hub can be reached, ``SyntheticModel.from_pretrained`` gives the published model.
"""

_ELEMENTS = 1 << 22  # of a block's features [samples, num_features]: 16 MiB in float32
_LARGEST_BLOCK = 1024  # samples
# Samples: a batch of an evaluation on a CPU, which its groups read again. Not those of a GPU, since
# small tensors that stay, between large ones that go, make a heap full of holes (400 MiB).
_KEPT = 1024
_CONTENT = "content.json"


class SyntheticActivations(Activations):
    """Samples of a synthetic model, of which the true features are known.

    Samples are drawn in blocks, each from a random state of its own that is made of the seed and
    the block's number. So any range gives the same bits whatever was read before, and the random
    state of the process is left alone. They are drawn on the CPU and not stored: a source of any
    length takes the model, at most a dozen matrices of 16 MiB while a block is drawn, and the last
    1,024 samples, of whose features only those that are on are kept.

    Args:
        model: A config, a built model, or the folder of a saved one. A config is built by
            :func:`built_model`. A saved model holds no magnitudes, so SAELens draws them again
            from the config's seed; where that is None, they are the same every time, but not those
            of the model that was saved.
        n_tokens: Samples.
        seed: Of the samples. Those for training and those held out are two seeds.
        hook_name: What the one hook is called.
        noise: Standard deviation of Gaussian noise in each dimension, which no feature explains.

    Raises:
        ValueError: If an argument is out of range, a folder holds no model that can be read, or
            a model is not of float32, not on the CPU, or changes its samples by a function.

    Example:
        >>> source = SyntheticActivations(SMALL_WORLD, n_tokens=2000, seed=1)
        >>> x = source.read(["synthetic"], 500, 503)["synthetic"]
        >>> features, truth = source.features(500, 503), source.dictionary
        >>> x.shape, features.shape
        (torch.Size([3, 96]), torch.Size([3, 192]))
        >>> torch.allclose(x, features @ truth.feature_vectors + truth.bias, atol=1e-5)
        True
    """

    def __init__(
        self,
        model: SyntheticModelConfig | SyntheticModel | str | Path,
        n_tokens: int,
        seed: int = 0,
        hook_name: str = "synthetic",
        noise: float = 0.0,
    ):
        asked = SimpleNamespace(n_tokens=n_tokens, seed=seed, hook_name=hook_name, noise=noise)
        limits.real(asked, "noise")
        limits.whole(asked, "n_tokens", at_least=1)
        limits.whole(asked, "seed")
        limits.text(asked, "hook_name")
        self.hook_name, self._n_tokens, self._seed = asked.hook_name, asked.n_tokens, asked.seed
        self._noise = asked.noise
        if isinstance(model, SyntheticModelConfig):
            model = built_model(model)
        elif isinstance(model, str | Path):
            model = _saved_model(user_path(model))
        _check(model)
        self._model, self._width = model, model.cfg.hidden_dim
        h = model.cfg.num_features
        self._block_samples = max(1, min(_LARGEST_BLOCK, _ELEMENTS // h))
        self._block = lru_cache(maxsize=_KEPT // self._block_samples + 1)(self._drawn)
        self._settings = {
            "source": "synthetic",
            "n_tokens": self._n_tokens,
            "seed": self._seed,
            "hook_name": self.hook_name,
            "block_samples": self._block_samples,
            "synthetic_model": model.cfg.to_dict(),
            "synthetic_content": _content(model),
            # nothing is stored: another version may draw other samples from the same seed
            "drawn_by": _drawn_by(),
            **({"noise": self._noise} if self._noise else {}),
        }

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return self._settings

    @property
    @override
    def places(self) -> pd.DataFrame:
        return pd.DataFrame({"sequence": np.arange(self._n_tokens, dtype=np.int32)})

    @property
    @override
    def n_tokens(self) -> int:
        return self._n_tokens

    @property
    def dictionary(self) -> FeatureDictionary:
        """The truth: ``feature_vectors [num_features, d]`` and ``bias [d]``."""
        return self._model.feature_dict

    @override
    def hook_names(self) -> list[str]:
        return [self.hook_name]

    @override
    def shapes(self, hooks: Sequence[str]) -> dict[str, torch.Size]:
        shape = torch.Size([self._width])
        return {hook: shape for hook in hooks if hook == self.hook_name}

    @override
    def read(self, hooks: Sequence[str], start: int, stop: int) -> dict[str, Tensor]:
        x = torch.cat([self._block(number)[0][rows] for number, rows in self._parts(start, stop)])
        return dict.fromkeys(hooks, x)

    def features(self, start: int, stop: int) -> Tensor:
        """The true feature activations of the same samples ``[stop - start, num_features]``.

        Args:
            start: The first sample.
            stop: The sample after the last.
        """
        return torch.cat(
            [
                self._block(number)[1].narrow_copy(0, rows.start, rows.stop - rows.start).to_dense()
                for number, rows in self._parts(start, stop)
            ]
        )

    def _parts(self, start: int, stop: int) -> list[tuple[int, slice]]:
        """The blocks that a range lies in, and which of their rows."""
        if not 0 <= start < stop <= self._n_tokens:
            raise ValueError(f"there are samples 0 to {self._n_tokens}: got {start} to {stop}")
        size = self._block_samples
        return [
            (number, slice(max(start - number * size, 0), min(stop - number * size, size)))
            for number in range(start // size, (stop - 1) // size + 1)
        ]

    @torch.no_grad()
    def _drawn(self, number: int) -> tuple[Tensor, Tensor]:
        """Activations and true features (sparse) of one block, always a whole one."""
        with _random_state(self._seed, number):
            features = self._model.activation_generator.sample(self._block_samples)
            noise = self._noise and self._noise * torch.randn(len(features), self._width)
        features = features.to_sparse().coalesce()
        return self._model.feature_dict(features) + noise, features


@contextmanager
def _random_state(*entropy: int) -> Generator[None]:
    """PyTorch's random state on the CPU made of some numbers, and afterwards as it was."""
    (seed,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        yield


def _drawn_by() -> dict[str, str]:
    return {"sae-lens": version("sae-lens"), "torch": torch.__version__.split("+")[0]}


# --- what a model is ---


def _tensors(model: SyntheticModel) -> dict[str, Tensor]:
    """All that decides the samples of a model, but for its hierarchy."""
    generator = model.activation_generator
    factor, diag_sqrt = generator.low_rank_correlation or (None, None)
    found = {
        "feature_vectors": model.feature_dict.feature_vectors,
        "bias": model.feature_dict.bias,
        "firing_probabilities": generator.firing_probabilities,
        "mean_firing_magnitudes": generator.mean_firing_magnitudes,
        "std_firing_magnitudes": generator.std_firing_magnitudes,
        "correlation_matrix": generator.correlation_matrix,
        "correlation_factor": factor,
        "correlation_diag_sqrt": diag_sqrt,
        "correlation_thresholds": generator.correlation_thresholds,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _content(model: SyntheticModel) -> str:
    """A digest of what decides the samples: models that were built alike may differ by rounding."""
    hierarchy = None if model.hierarchy is None else model.hierarchy.to_dict()
    parts = [digest_of_tensors(_tensors(model)), hierarchy, model.use_sparse_tensors]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _check(model: SyntheticModel) -> None:
    tensors = _tensors(model)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(
                f"a synthetic model must be in float32 and on the CPU, where samples are drawn: "
                f"its {name} is in {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
            )
        # thresholds are infinite where a feature is always on or never
        if name != "correlation_thresholds" and not tensor.isfinite().all():
            raise ValueError(f"{name} of the synthetic model has numbers that are not finite")
    p = tensors["firing_probabilities"]
    if p.min() < 0 or p.max() > 1:
        raise ValueError("firing_probabilities of the synthetic model must be between 0 and 1")
    if model.hierarchy is None and model.activation_generator.modify_activations is not None:
        raise ValueError(
            "the synthetic model changes its samples by a function (modify_activations), so what "
            "they are cannot be known: use a hierarchy, which can be saved"
        )


# --- models on disk ---


def built_model(cfg: SyntheticModelConfig, cache: str | Path | None = None) -> SyntheticModel:
    """The model of a config, made once and kept where that takes long.

    Directions at random are made in a moment; making them nearly orthogonal (``orthogonalization``)
    takes over an hour on two cores for :data:`SYNTH_SAE_BENCH_16K`. A model that is kept has a
    digest of what decides its samples; if it does not fit, the model is made again. Where several
    processes ask, one makes it and the others wait.

    Args:
        cfg: The config.
        cache: Folder for models; None: ``sae-afa-plugin/synthetic`` in the user's cache.

    Raises:
        ValueError: If the config has no seed.
        NotWrittenError: If the folder cannot be written.

    Example:
        >>> built_model(SMALL_WORLD).feature_dict.feature_vectors.shape
        torch.Size([192, 96])
    """
    if cfg.seed is None:
        raise ValueError("the config has seed=None, so its model cannot be made again: set a seed")
    if cfg.orthogonalization is None:
        return SyntheticModel(cfg)
    key = json.dumps([cfg.to_dict(), _drawn_by()], sort_keys=True)
    folder = cache_folder() / "synthetic" if cache is None else user_path(cache)
    folder /= hashlib.sha256(key.encode()).hexdigest()[:16]
    with writing(folder):  # before an hour of work
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock").acquire()
    with lock:
        model = _kept_model(folder)
        if model is None:
            model = SyntheticModel(cfg)
            with aside_of(folder) as aside:
                model.save(aside)
                write_sealed(aside / _CONTENT, {"content": _content(model)})
                shutil.rmtree(folder, ignore_errors=True)
                aside.rename(folder)
    return model


def _kept_model(folder: Path) -> SyntheticModel | None:
    try:
        model = _saved_model(folder)
        kept = read_sealed(folder / _CONTENT)
    except (OSError, ValueError):
        return None
    return model if kept == {"content": _content(model)} else None


def _saved_model(folder: Path) -> SyntheticModel:
    """A model that was saved; what its files say of sizes is compared before memory is taken."""
    try:
        cfg = SyntheticModelConfig.from_dict(read_object(folder / SYNTHETIC_MODEL_CONFIG_FILENAME))
        _check_shapes(folder / SYNTHETIC_MODEL_WEIGHTS_FILENAME, cfg)
        hierarchy = folder / SYNTHETIC_MODEL_HIERARCHY_FILENAME
        if hierarchy.exists():
            _check_hierarchy(read_object(hierarchy), cfg.num_features)
        with _random_state(0):  # what is not saved and has no seed is the same every time
            model = SyntheticModel.load_from_disk(folder)
        _check(model)
    except Exception as error:  # of any kind: files may hold what they like
        reason = short(str(error))
        if not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"the folder {str(folder)!r} holds no synthetic model that can be read ({reason}): "
            "write it with SyntheticModel.save"
        ) from error
    return model


def _check_shapes(weights: Path, cfg: SyntheticModelConfig) -> None:
    h, d = cfg.num_features, cfg.hidden_dim
    expected = {"feature_vectors": [h, d], "bias": [d], "firing_probabilities": [h]}
    if cfg.correlation is not None:
        expected["correlation_factor"] = [h, cfg.correlation.rank]
    with safe_open(weights, framework="pt") as file:
        for name, shape in expected.items():
            found = file.get_slice(name).get_shape()
            if found != shape:
                raise ValueError(f"{name} has shape {found}, and its config asks for {shape}")


def _check_hierarchy(hierarchy: dict[str, Any], num_features: int) -> None:
    nodes = list(hierarchy["roots"])
    while nodes:
        node = nodes.pop()
        index = node.get("feature_index")
        if index is not None and (type(index) is not int or not 0 <= index < num_features):
            raise ValueError(f"its hierarchy has a feature {index!r} of {num_features}")
        nodes.extend(node.get("children", []))
