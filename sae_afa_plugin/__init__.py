"""Approximate feature activation (AFA) for SAELens: the ``topafa`` architecture and the metric.

Importing this package registers the architecture, so that it can be chosen by name wherever
SAELens takes one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import sae_afa_plugin._interrupt  # noqa: F401  # first  # pyright: ignore[reportUnusedImport]
from sae_afa_plugin.evals import AFAEvalConfig, AFAEvaluator, run_evals
from sae_afa_plugin.evaluation import evaluate_release, evaluate_saes
from sae_afa_plugin.metrics import AFATokenMetrics, dictionary_coherence, epsilon_lbo
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.rules.operator import keep_prefix, top_afa
from sae_afa_plugin.rules.residual import keep_until_explained, leave_one_out
from sae_afa_plugin.saes.as_jumprelu import as_jumprelu
from sae_afa_plugin.saes.constant_quality import (
    ConstantQualitySAE,
    ConstantQualitySAEConfig,
    ConstantQualityTrainingSAE,
    ConstantQualityTrainingSAEConfig,
)
from sae_afa_plugin.saes.registration import register
from sae_afa_plugin.saes.sparse_topafa import (
    SparseTopAFASAE,
    SparseTopAFASAEConfig,
    SparseTopAFATrainingSAE,
    SparseTopAFATrainingSAEConfig,
)
from sae_afa_plugin.saes.topafa import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)
from sae_afa_plugin.spaces import afa_token_metrics
from sae_afa_plugin.training.recipes import paper_runner_config

if TYPE_CHECKING:
    from sae_afa_plugin import plots
    from sae_afa_plugin.report import write_report
    from sae_afa_plugin.sweep.results import SweepResults
    from sae_afa_plugin.sweep.run import run_sweep
    from sae_afa_plugin.training.coordinator import train_saes
    from sae_afa_plugin.training.run import SAETraining

__version__ = "0.1.0"

__all__ = [
    "AFAEvalConfig",
    "AFAEvaluator",
    "AFAResults",
    "AFATokenMetrics",
    "ConstantQualitySAE",
    "ConstantQualitySAEConfig",
    "ConstantQualityTrainingSAE",
    "ConstantQualityTrainingSAEConfig",
    "SAETraining",
    "SparseTopAFASAE",
    "SparseTopAFASAEConfig",
    "SparseTopAFATrainingSAE",
    "SparseTopAFATrainingSAEConfig",
    "SweepResults",
    "TopAFASAE",
    "TopAFASAEConfig",
    "TopAFATrainingSAE",
    "TopAFATrainingSAEConfig",
    "afa_token_metrics",
    "as_jumprelu",
    "dictionary_coherence",
    "epsilon_lbo",
    "evaluate_release",
    "evaluate_saes",
    "keep_prefix",
    "keep_until_explained",
    "leave_one_out",
    "paper_runner_config",
    "plots",
    "register",
    "run_evals",
    "run_sweep",
    "top_afa",
    "train_saes",
    "write_report",
]

# matplotlib takes half a second to import, which training and evaluating need not pay
_WHEN_ASKED_FOR = {
    "SAETraining": "training.run",
    "SweepResults": "sweep.results",
    "run_sweep": "sweep.run",
    "train_saes": "training.coordinator",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name == "plots":
        return import_module("sae_afa_plugin.plots")
    if name in _WHEN_ASKED_FOR:
        return getattr(import_module(f"sae_afa_plugin.{_WHEN_ASKED_FOR[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
