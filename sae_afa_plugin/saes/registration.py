"""Make SAELens know the architectures of this package by their names."""

from __future__ import annotations

import warnings
from typing import Any

from sae_lens import register_sae_class, register_sae_training_class

from sae_afa_plugin._upstream import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_afa_plugin.saes import constant_quality, sparse_topafa, topafa

_Pair = tuple[type[Any], type[Any]]  # a class and its config
_ARCHITECTURES: dict[str, tuple[_Pair, _Pair]] = {
    topafa.ARCHITECTURE: (
        (topafa.TopAFASAE, topafa.TopAFASAEConfig),
        (topafa.TopAFATrainingSAE, topafa.TopAFATrainingSAEConfig),
    ),
    sparse_topafa.ARCHITECTURE: (
        (sparse_topafa.SparseTopAFASAE, sparse_topafa.SparseTopAFASAEConfig),
        (sparse_topafa.SparseTopAFATrainingSAE, sparse_topafa.SparseTopAFATrainingSAEConfig),
    ),
    constant_quality.ARCHITECTURE: (
        (constant_quality.ConstantQualitySAE, constant_quality.ConstantQualitySAEConfig),
        (
            constant_quality.ConstantQualityTrainingSAE,
            constant_quality.ConstantQualityTrainingSAEConfig,
        ),
    ),
}


def register() -> bool:
    """Register this package's architectures with SAELens, for inference and for training.

    Importing ``sae_afa_plugin`` does this already; calling it again changes nothing. Where
    another package (or SAELens itself) owns a name, that class stays and a warning says so.

    Returns:
        Whether all names now stand for the classes of this plugin.

    Example:
        >>> register()
        True
    """
    done = [_register(name, *pairs) for name, pairs in _ARCHITECTURES.items()]
    return all(done)


def _register(name: str, inference: _Pair, training: _Pair) -> bool:
    owner = SAE_CLASS_REGISTRY.get(name, inference)
    training_owner = SAE_TRAINING_CLASS_REGISTRY.get(name, training)
    for cls, own in ((owner[0], inference[0]), (training_owner[0], training[0])):
        if cls is not own:
            warnings.warn(
                f"sae_afa_plugin did not register the architecture {name!r}, because "
                f"{cls.__module__}.{cls.__qualname__} already has that name; "
                f"sae_afa_plugin.{own.__name__} can still be used directly",
                stacklevel=3,
            )
            return False
    # The inference class comes first: building a training config looks it up.
    if name not in SAE_CLASS_REGISTRY:
        register_sae_class(name, *inference)
    if name not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(name, *training)
    return True
