"""The names of the architectures in SAELens's registries."""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points

import pytest
from sae_lens import StandardSAE, StandardSAEConfig, TrainingSAEConfig
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    get_sae_class,
    get_sae_training_class,
)

import sae_afa_plugin
from sae_afa_plugin import (
    ConstantQualitySAE,
    ConstantQualityTrainingSAE,
    SparseTopAFASAE,
    SparseTopAFATrainingSAE,
    TopAFASAE,
    TopAFATrainingSAE,
)


@pytest.fixture
def registries(monkeypatch):
    """Copies that a test may change."""
    for registry in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY):
        monkeypatch.delitem(registry, "topafa")
    return SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY


def test_importing_registers():
    assert get_sae_class("topafa")[0] is TopAFASAE
    assert get_sae_training_class("topafa")[0] is TopAFATrainingSAE


def test_every_architecture_stands_for_its_classes():
    for name, inference, training in (
        ("sparse_topafa", SparseTopAFASAE, SparseTopAFATrainingSAE),
        ("constant_quality", ConstantQualitySAE, ConstantQualityTrainingSAE),
    ):
        assert get_sae_class(name)[0] is inference
        assert get_sae_training_class(name)[0] is training


def test_one_foreign_name_does_not_keep_the_others_out(registries, monkeypatch):
    inference, _ = registries
    inference["topafa"] = (StandardSAE, StandardSAEConfig)
    monkeypatch.delitem(inference, "sparse_topafa")
    with pytest.warns(UserWarning, match="did not register the architecture 'topafa'"):
        assert sae_afa_plugin.register() is False
    assert inference["sparse_topafa"][0] is SparseTopAFASAE


def test_registering_again_changes_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sae_afa_plugin.register() is True
        assert sae_afa_plugin.register() is True
    assert get_sae_class("topafa")[0] is TopAFASAE


def test_registers_what_is_missing(registries):
    inference, training = registries
    assert sae_afa_plugin.register() is True
    assert inference["topafa"][0] is TopAFASAE
    assert training["topafa"][0] is TopAFATrainingSAE


def test_a_foreign_class_of_that_name_stays_and_is_named(registries):
    inference, training = registries
    inference["topafa"] = (StandardSAE, StandardSAEConfig)
    with pytest.warns(
        UserWarning,
        match="sae_afa_plugin did not register the architecture 'topafa', because "
        r"sae_lens.saes.standard_sae.StandardSAE already has that name; "
        "sae_afa_plugin.TopAFASAE can still be used directly",
    ):
        assert sae_afa_plugin.register() is False
    assert inference["topafa"][0] is StandardSAE
    assert "topafa" not in training


def test_without_registration_saelens_names_only_the_architecture(registries):
    with pytest.raises(KeyError, match="^'topafa'$"):
        TrainingSAEConfig.from_dict({"architecture": "topafa", "d_in": 8, "d_sae": 32})
    # the cure that the README names
    sae_afa_plugin.register()
    TrainingSAEConfig.from_dict({"architecture": "topafa", "d_in": 8, "d_sae": 32})


@pytest.mark.parametrize("name", ["topafa", "sparse_topafa", "constant_quality"])
def test_the_entry_points_register(name):
    (point,) = entry_points(group="sae_lens.architectures", name=name)
    assert point.load() is sae_afa_plugin.register
