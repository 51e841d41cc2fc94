"""Make SAELens know the architecture ``topafa`` by its name."""

from __future__ import annotations

import warnings

from sae_lens import register_sae_class, register_sae_training_class

from sae_afa_plugin._upstream import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_afa_plugin.saes.topafa import (
    ARCHITECTURE,
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)

_INFERENCE = (TopAFASAE, TopAFASAEConfig)
_TRAINING = (TopAFATrainingSAE, TopAFATrainingSAEConfig)


def register() -> bool:
    """Register ``topafa`` with SAELens, for inference and for training.

    Importing ``sae_afa_plugin`` does this already; calling it again changes nothing. Where
    another package (or SAELens itself) owns the name, that class stays and a warning says so.

    Returns:
        Whether the name now stands for the classes of this plugin.

    Example:
        >>> register()
        True
    """
    owner = SAE_CLASS_REGISTRY.get(ARCHITECTURE, _INFERENCE)
    training_owner = SAE_TRAINING_CLASS_REGISTRY.get(ARCHITECTURE, _TRAINING)
    for cls, own in ((owner[0], TopAFASAE), (training_owner[0], TopAFATrainingSAE)):
        if cls is not own:
            warnings.warn(
                f"sae_afa_plugin did not register the architecture {ARCHITECTURE!r}, because "
                f"{cls.__module__}.{cls.__qualname__} already has that name; "
                f"sae_afa_plugin.{own.__name__} can still be used directly",
                stacklevel=2,
            )
            return False
    # The inference class comes first: building a training config looks it up.
    if ARCHITECTURE not in SAE_CLASS_REGISTRY:
        register_sae_class(ARCHITECTURE, *_INFERENCE)
    if ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(ARCHITECTURE, *_TRAINING)
    return True
