"""The demonstration: top-AFA, TopK and BatchTopK on the same activations of a real language model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import TrainingSAEConfig

from sae_afa_plugin.activations.embedded import (
    EMBEDDED_NAME,
    SMOLLM2_NAME,
    load_embedded_model,
    load_smollm2,
)
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.activations.tokens import tokenize
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.saes.topafa import TopAFATrainingSAEConfig
from sae_afa_plugin.training.comparison import Comparison, topk_pair, train_and_evaluate


@dataclass(frozen=True)
class Demo:
    """A model that needs no hub, and the settings that suit it.

    Args:
        model_name: What the saved SAEs remember as their model.
        load: Gives the model.
        d_in: Width of its residual stream.
        d_sae: Dictionary size.
        afa_coefficient: Weight of top-AFA's loss, one of the paper's values.
        k: Active features of TopK and BatchTopK: about what top-AFA settles at under these
            settings, so that the rows of the table compare.
        setup: Everything else.
    """

    model_name: str
    load: Callable[[], Any]
    d_in: int
    d_sae: int
    afa_coefficient: float
    k: int
    setup: Comparison


DEMOS = {
    "embedded": Demo(
        model_name=EMBEDDED_NAME,
        load=load_embedded_model,
        d_in=192,
        d_sae=1536,
        afa_coefficient=1 / 128,
        k=245,
        setup=Comparison("blocks.4.hook_resid_pre", training_tokens=256 * 1024),
    ),
    "smollm2": Demo(
        model_name=SMOLLM2_NAME,
        load=load_smollm2,
        d_in=576,
        d_sae=2304,
        afa_coefficient=1 / 32,
        k=536,
        setup=Comparison("blocks.10.hook_resid_pre", training_tokens=150 * 1024),
    ),
}


def run_demo(name: str, out: Path) -> AFAResults:
    """Train and evaluate the three architectures; SAEs, logs and results are left in ``out``.

    Interrupted and called again, it goes on where it was.

    Args:
        name: A key of ``DEMOS``.
        out: Folder for the results.
    """
    demo = DEMOS[name]
    # it warns that a model and a dataset were passed in, which is what happens here
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    model = demo.load()
    context = demo.setup.context_size
    topk, batchtopk = topk_pair(demo.d_in, demo.d_sae, demo.k)
    saes: dict[str, TrainingSAEConfig] = {
        "topafa": TopAFATrainingSAEConfig(
            d_in=demo.d_in, d_sae=demo.d_sae, afa_coefficient=demo.afa_coefficient
        ),
        "topk": topk,
        "batchtopk": batchtopk,
    }
    return train_and_evaluate(
        model,
        demo.model_name,
        saes,
        tokenize(model, standard_library_texts("train"), context),
        tokenize(model, standard_library_texts("heldout"), context),
        demo.setup,
        out,
    )
