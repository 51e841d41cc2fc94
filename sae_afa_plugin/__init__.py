"""Approximate feature activation (AFA) for SAELens: the ``topafa`` architecture and the metric.

Importing this package registers the architecture, so that it can be chosen by name wherever
SAELens takes one.
"""

from sae_afa_plugin import plots
from sae_afa_plugin.activation import top_afa
from sae_afa_plugin.evals import AFAEvalConfig, AFAEvaluator, run_evals
from sae_afa_plugin.evaluation import evaluate_release, evaluate_saes
from sae_afa_plugin.families import afa_token_metrics
from sae_afa_plugin.metrics import AFATokenMetrics, dictionary_coherence, epsilon_lbo
from sae_afa_plugin.recipes import paper_runner_config
from sae_afa_plugin.registration import register
from sae_afa_plugin.report import write_report
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.sae import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)

__version__ = "0.1.0"

__all__ = [
    "AFAEvalConfig",
    "AFAEvaluator",
    "AFAResults",
    "AFATokenMetrics",
    "TopAFASAE",
    "TopAFASAEConfig",
    "TopAFATrainingSAE",
    "TopAFATrainingSAEConfig",
    "afa_token_metrics",
    "dictionary_coherence",
    "epsilon_lbo",
    "evaluate_release",
    "evaluate_saes",
    "paper_runner_config",
    "plots",
    "register",
    "run_evals",
    "top_afa",
    "write_report",
]

register()
