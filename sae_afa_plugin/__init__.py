"""Approximate feature activation (AFA) for SAELens: the ``topafa`` architecture.

Importing this package registers the architecture, so that it can be chosen by name wherever
SAELens takes one.
"""

from sae_afa_plugin.activation import top_afa
from sae_afa_plugin.recipes import paper_runner_config
from sae_afa_plugin.registration import register
from sae_afa_plugin.sae import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)

__version__ = "0.1.0"

__all__ = [
    "TopAFASAE",
    "TopAFASAEConfig",
    "TopAFATrainingSAE",
    "TopAFATrainingSAEConfig",
    "paper_runner_config",
    "register",
    "top_afa",
]

register()
