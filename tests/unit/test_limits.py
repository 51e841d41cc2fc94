"""A config is one that works, or one sentence when it is built that names the field."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import LoggingConfig, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput

from sae_afa_plugin import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
    keep_prefix,
    limits,
    paper_runner_config,
)
from sae_afa_plugin.activations.tensors import TensorActivations
from sae_afa_plugin.activations.tokens import Protocol
from sae_afa_plugin.evals import AFAEvalConfig, AFAEvaluator
from sae_afa_plugin.groups.core import Core
from sae_afa_plugin.plan import Evaluation
from sae_afa_plugin.training.comparison import Comparison
from sae_afa_plugin.training.coordinator import train_saes
from sae_afa_plugin.training.run import SAETraining

SAE = TopAFATrainingSAEConfig(8, 16)
TRAINER = SAETrainerConfig(64, 16)
# small, so that whatever is accepted can be built and run
NUMBERS = [-1, 0, 1, 2, 3, 17, 2**63, 10**400, -0.5, 0.0, 0.03, 1.0, 2.5, 1e30, 1e308]
NUMBERS += [math.nan, math.inf, -math.inf]
OTHERS = [None, True, False, "", "1", "float16", "bfloat16", "float32", "cpu", "gpu", "none", "all"]
OTHERS += ["layer_norm", "hook_z", "last", [], (), (1, 2), (-1,), (True,), {}, object(), b"1"]
OTHERS += [np.int64(3), np.float32(0.5), np.bool_(True), np.float64("nan"), torch.tensor(1)]
ANYTHING = st.sampled_from([*NUMBERS, *OTHERS])

BUILT = {
    "inference": (TopAFASAEConfig, {"d_in": 8, "d_sae": 16}),
    "training": (TopAFATrainingSAEConfig, {"d_in": 8, "d_sae": 16}),
    "SAETraining": (SAETraining, {"sae": SAE, "hook_name": "hook", "trainer": TRAINER}),
    "Comparison": (Comparison, {"hook_name": "hook", "training_tokens": 64}),
    "Protocol": (Protocol, {}),
    "Evaluation": (Evaluation, {"device": "cpu"}),
    "Core": (Core, {}),
    "AFAEvalConfig": (AFAEvalConfig, {}),
    "AFAEvaluator": (AFAEvaluator, {}),
}
# SAELens's own fields, which it reads as truth values or in its own units
NOT_OURS = {"AFAEvalConfig": set(asdict(AFAEvalConfig())) - {"compute_afa", "n_eval_afa_batches"}}


def one_sentence(error, given):
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    assert any(name in text for name in given), text


def build(name, given):
    cls, base = BUILT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of decoder_init_norm
        return cls(**{**base, **given})


def some_fields(name):
    names = [f.name for f in fields(BUILT[name][0]) if f.init]
    names = [field for field in names if field not in NOT_OURS.get(name, ())]
    return st.dictionaries(st.sampled_from(names), ANYTHING, min_size=1, max_size=2)


@pytest.mark.parametrize("name", BUILT)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_config_is_built_or_refused_with_a_sentence(name, data):
    given = data.draw(some_fields(name))
    try:
        cfg = build(name, given)
    except ValueError as error:
        one_sentence(error, given)
        return
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        assert not (isinstance(value, float) and not math.isfinite(value)), field.name
        assert not isinstance(value, np.generic), field.name


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_built_can_be_saved_and_takes_a_step(data):
    given = data.draw(some_fields("training"))
    try:
        cfg = build("training", given)
    except ValueError:
        return
    if cfg.reshape_activations == "hook_z":  # only at hooks of that name
        cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    sae = TopAFATrainingSAE(cfg)
    assert json.loads(json.dumps({**cfg.to_dict(), "metadata": None}))["d_in"] == cfg.d_in
    (schedule,) = sae.get_coefficients().values()
    out = sae.training_forward_pass(
        TrainStepInput(
            torch.randn(5, cfg.d_in), {"afa": schedule.value}, torch.ones(cfg.d_sae) > 0, 0, False
        )
    )
    out.loss.backward()
    assert all(float(metric()) is not None for metric in out.metrics.values())


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_an_inference_config_that_is_built_encodes(data):
    try:
        cfg = build("inference", data.draw(some_fields("inference")))
    except ValueError:
        return
    cfg.reshape_activations = "none"
    x = torch.randn(5, cfg.d_in)
    assert TopAFASAE(cfg)(x).isfinite().all()


TRAINER_FIELDS = [f.name for f in fields(SAETrainerConfig)]


@given(
    st.dictionaries(
        st.sampled_from(
            [
                name
                for name in TRAINER_FIELDS
                if name not in ("device", "checkpoint_path", "save_final_checkpoint")
            ]
        ),
        ANYTHING,
        min_size=1,
        max_size=2,
    )
)
@settings(max_examples=200, deadline=None)
def test_a_trainers_config_is_taken_or_refused_with_a_sentence(given):
    try:
        SAETraining(SAE, "hook", replace(TRAINER, **given))
    except ValueError as error:
        one_sentence(error, [*given, "total_training_samples"])


RUNNER = ["lr", "lr_end", "adam_beta1", "adam_beta2", "training_tokens", "train_batch_size_tokens"]
RUNNER += ["context_size", "n_batches_in_buffer", "dead_feature_window", "lr_warm_up_steps"]
RUNNER += ["afa_coefficient", "aux_loss_coefficient", "d_sae", "top_k_aux", "layer", "dtype"]


@given(st.sampled_from(RUNNER), ANYTHING)
@settings(max_examples=150, deadline=None)
def test_the_papers_config_is_built_or_refused_with_a_sentence(name, value):
    try:
        cfg = paper_runner_config(**{"verbose": False, "device": "cpu", name: value})
    except ValueError as error:
        one_sentence(error, [name])
        return
    assert math.isfinite(cfg.lr)
    assert math.isfinite(cfg.sae.afa_coefficient)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("d_sae", 1, "d_sae must be at least 2: got 1"),
        ("d_in", 1, "d_in must be at least 2: got 1"),
        ("afa_coefficient", math.nan, "afa_coefficient must be a finite number: got nan"),
        ("aux_loss_coefficient", math.inf, "aux_loss_coefficient must be a finite number: got inf"),
        ("afa_coefficient", "1", "afa_coefficient must be a number: got '1'"),
        ("afa_coefficient", True, "afa_coefficient must be a number: got True"),
        ("afa_coefficient", -0.5, "afa_coefficient must not be negative: got -0.5"),
        ("top_k_aux", 2.0, "top_k_aux must be a whole number: got 2.0"),
        ("train_encoder_bias", 1, "train_encoder_bias must be True or False: got 1"),
        ("dtype", "float31", "dtype must be one of .*float32.*: got 'float31'"),
        ("device", "gpu", "device must be a name like cpu, cuda or cuda:1: got 'gpu'"),
    ],
)
def test_the_sentence_names_field_value_and_what_is_allowed(field, value, told):
    with pytest.raises(ValueError, match=f"^{told}$"):
        TopAFATrainingSAEConfig(**{"d_in": 8, "d_sae": 32, field: value})


def test_numbers_of_numpy_are_taken_as_pythons():
    cfg = TopAFATrainingSAEConfig(np.int64(8), 16, afa_coefficient=np.float32(0.5))
    assert (type(cfg.d_in), type(cfg.afa_coefficient)) == (int, float)
    details = cfg.metadata.training_architecture_details
    assert type(details["afa_coefficient"]) is float


def test_an_sae_in_float16_is_not_trained():
    """It cannot be: SAELens's Adam divides by zero there in its first step."""
    for sae in (
        replace(SAE, dtype="float16"),
        TopKTrainingSAEConfig(8, 16, k=2, dtype="torch.float16"),
    ):
        with pytest.raises(ValueError, match="an SAE cannot be trained in float16"):
            SAETraining(sae, "hook", TRAINER)
    with pytest.raises(ValueError, match="an SAE cannot be trained in float16"):
        paper_runner_config(dtype="float16", verbose=False)
    SAETraining(replace(SAE, dtype="bfloat16"), "hook", TRAINER)


def test_coefficients_of_other_architectures_are_finite():
    with pytest.raises(ValueError, match="aux_loss_coefficient must be a finite number: got nan"):
        SAETraining(
            TopKTrainingSAEConfig(8, 16, k=2, aux_loss_coefficient=math.nan), "hook", TRAINER
        )


def test_a_schedule_has_to_fit():
    trainer = replace(TRAINER, lr_scheduler_name="cosineannealing", lr_warm_up_steps=4)
    with pytest.raises(ValueError, match="4 steps leave 0 between lr_warm_up_steps=4"):
        SAETraining(SAE, "hook", trainer)
    SAETraining(SAE, "hook", replace(trainer, lr_scheduler_name="constant"))


@pytest.mark.parametrize("p", [True, math.nan, -1, 3, 0.5, "2", None])
def test_other_powers_are_refused(p):
    with pytest.raises(ValueError, match="p must be 0, 1 or 2: got"):
        keep_prefix(torch.ones(2, 3), torch.ones(2), p=p)


@pytest.mark.parametrize(
    ("option", "value"),
    [("block_tokens", 0), ("block_tokens", True), ("checkpoint_seconds", math.nan)],
)
def test_options_of_train_saes(tmp_path, option, value):
    source = TensorActivations({"hook": torch.randn(64, 8)})
    training = SAETraining(SAE, "hook", replace(TRAINER, logger=LoggingConfig(log_to_wandb=False)))
    with pytest.raises(ValueError, match=f"{option} must be"):
        train_saes({"a": training}, source, tmp_path / "out", **{option: value})
    assert not (tmp_path / "out").exists()


def test_metadata_stay_what_they_are():
    metadata = SAEMetadata(hook_name="x")
    assert TopAFASAEConfig(8, 16, metadata=metadata).metadata is metadata


@pytest.mark.parametrize("value", [2**63, 2**62, -(2**63) - 1, 2**200, np.int64(2**62)])
def test_a_whole_number_that_pytorch_cannot_multiply_becomes_a_float(value):
    cfg = SimpleNamespace(x=value)
    limits.real(cfg, "x", at_least=-math.inf)
    assert type(cfg.x) is float
    assert cfg.x == float(value)
    assert torch.isfinite(16 * cfg.x * torch.ones(1, dtype=torch.float64)).all()
