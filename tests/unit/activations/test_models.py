"""Language models: what an SAE's metadata may say of one, and the state it is read in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import gpt2_tokenizer, tiny_gpt2, tiny_hooked_sae_transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig
from transformers import GPT2Config, GPT2LMHeadModel

from sae_afa_plugin._upstream import HookedProxyLM, TransformerBridge
from sae_afa_plugin.activations.hooks import known_state, parts_of, unusual_state
from sae_afa_plugin.activations.language_model import LanguageModelActivations
from sae_afa_plugin.activations.models import (
    load_language_model,
    model_identity,
    shared_model,
    why_not_loaded,
)
from sae_afa_plugin.activations.tokens import Protocol


def _asked(**kwargs):
    return {"model_name": "gpt2", "model_from_pretrained_kwargs": kwargs}


@pytest.mark.parametrize(
    "metadata",
    [
        {"model_name": "gpt2"},
        {"model_name": "sae-afa-demo"},
        {"model_name": "google/gemma-2-2b", "model_from_pretrained_kwargs": None},
        {"model_name": "gpt2", "model_class_name": "AutoModelForCausalLM"},
        _asked(center_writing_weights=True, fold_ln=False, dtype="bfloat16", n_ctx=64),
        _asked(revision="step1000", checkpoint_value=None),
        _asked(device="cuda", n_devices=2, device_map="auto", trust_remote_code=False),
    ],
)
def test_what_decides_numbers_may_be_said(metadata):
    assert why_not_loaded(metadata) is None


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (_asked(trust_remote_code=True), "would run Python from the repository 'gpt2'"),
        (_asked(trust_remote_code=1), "would run Python"),
        (_asked(trust_remote_code="False"), "would run Python"),
        (_asked(code_revision="x"), "code_revision='x', which is not taken from a file"),
        (_asked(use_safetensors=False), "use_safetensors=False, which is not taken"),
        (_asked(attn_implementation="someone/kernel"), "attn_implementation='someone/kernel'"),
        (_asked(cache_dir="/tmp/x"), "cache_dir"),
        (_asked(proxies={"https": "http://x"}), "proxies"),
        (_asked(token="x"), "token"),
        (_asked(hf_model="x"), "hf_model"),
        (_asked(tokenizer="x"), "tokenizer"),
        (_asked(quantization_config={"load_in_8bit": True}), "quantization_config"),
        (_asked(fold_ln="no"), "fold_ln='no', which is str and must be bool"),
        (_asked(n_ctx=True), "n_ctx=True, which is bool and must be int"),
        ({"model_name": "/etc"}, "'/etc' as the model, which is no name on the hub"),
        ({"model_name": "../models/gpt2"}, "which is no name on the hub"),
        ({"model_name": "https://x.org/gpt2"}, "which is no name on the hub"),
        ({"model_name": "tests"}, "which is a folder here"),
        ({"model_name": "gpt2", "model_class_name": "os.system"}, "it must be one of"),
    ],
)
def test_what_chooses_code_files_or_places_is_refused(metadata, says, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert says in why_not_loaded(metadata)


def test_the_user_may_trust():
    assert why_not_loaded(_asked(trust_remote_code=True), trust_remote_code=True) is None
    assert why_not_loaded(_asked(token="x"), trust_remote_code=True) is not None


_DECIDES = {"center_writing_weights", "center_unembed", "fold_ln", "fold_value_biases"}
_DECIDES |= {"refactor_factored_attn_matrices", "dtype", "torch_dtype", "revision", "n_ctx"}
_DECIDES |= {"default_padding_side", "default_prepend_bos", "first_n_layers"}
_DECIDES |= {"checkpoint_index", "checkpoint_value"}
_VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text(), max_size=2)


@settings(max_examples=500)
@given(st.dictionaries(st.text(min_size=1) | st.sampled_from(sorted(_DECIDES)), _VALUES))
def test_nothing_else_reaches_whoever_loads_the_model(kwargs):
    metadata = _asked(**kwargs)
    passed = shared_model({"a": metadata})["model_from_pretrained_kwargs"]
    assert set(passed) <= _DECIDES
    if why_not_loaded(metadata) is None:
        assert all(type(value) in (bool, int, str) for value in passed.values())


def test_where_it_was_trained_does_not_make_it_another_model():
    both = {"a": _asked(fold_ln=False, n_devices=4), "b": _asked(fold_ln=False, device="cuda")}
    assert shared_model(both)["model_from_pretrained_kwargs"] == {"fold_ln": False}


def test_python_in_a_model_folder_does_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        '{"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}'
    )
    marker = tmp_path / "ran"
    (tmp_path / "strange.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    wanted = shared_model({"": {"model_name": str(tmp_path)}})
    with pytest.raises(ValueError, match="comes with Python of its own.*--trust-remote-code"):
        load_language_model(None, wanted, [], "cpu")
    assert not marker.exists()
    with pytest.raises(AttributeError, match="Config"):  # it has been read, and has no such class
        load_language_model(None, wanted, [], "cpu", trust_remote_code=True)
    assert marker.exists()


# --- a model in whatever state somebody has left it ---


def _dropping():
    """A small GPT-2 with dropout, as SAELens runs models of transformers."""
    cfg = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return HookedProxyLM(GPT2LMHeadModel(cfg).eval(), None, ["transformer.h.0", "transformer.h.1"])


def _read(model, hooks):
    tokens = torch.arange(24).view(3, 8)
    protocol = Protocol(24, 8, prepend_bos=False, exclude_special_tokens=False)
    return LanguageModelActivations(model, tokens, protocol).read(hooks, 0, 24)


def _bridge(folder):
    """The same, as TransformerLens runs it: the modules at work are no parts of the bridge."""
    cfg = GPT2Config(vocab_size=1024, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    GPT2LMHeadModel(cfg).save_pretrained(folder)
    gpt2_tokenizer().save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["HookedTransformer", "HookedProxyLM", "TransformerBridge"])
def test_training_mode_and_hooks_do_not_change_what_is_read(kind, tmp_path):
    if kind == "HookedTransformer":
        model, hooks = tiny_hooked_sae_transformer(16), ["blocks.0.hook_resid_pre"]
        hooks += ["blocks.1.hook_resid_pre"]
    elif kind == "TransformerBridge":
        model, hooks = _bridge(tmp_path), ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    else:
        model, hooks = _dropping(), ["transformer.h.0", "transformer.h.1"]
    quiet = _read(model, hooks)
    assert unusual_state(model) == []

    seen = []
    point = model.hook_dict[hooks[0]]
    point.add_hook(lambda tensor, hook: seen.append(1) or tensor + 1)
    point.add_hook(lambda tensor, hook: tensor * 2, is_permanent=True)
    model.train()
    first = next(model.modules())
    for module in list(model.modules())[1:3]:
        module.training = False  # frozen, as some do
    flags = [module.training for module in parts_of(model)]
    loud = _read(model, hooks)
    for hook in hooks:
        assert torch.equal(loud[hook], quiet[hook])
        assert not loud[hook].requires_grad
    *training, hooked = unusual_state(model)
    has_dropout = kind != "HookedTransformer"
    said = "the model is in training mode: it is read without its dropout"
    assert training == [said] * has_dropout
    # a bridge has some hook points under several names
    aliases = "blocks.0.hook_in, " if kind == "TransformerBridge" else ""
    assert hooked == f"the model has hooks on {aliases}{hooks[0]}: it is read without them"

    # all is as it was, and the hooks still work and can still be taken off
    assert [module.training for module in parts_of(model)] == flags
    assert first.training
    assert seen == []
    model.eval()
    _, cache = model.run_with_cache(torch.arange(24).view(3, 8), names_filter=hooks)
    assert seen
    assert not torch.allclose(cache[hooks[1]].flatten(0, 1), quiet[hooks[1]])
    point.remove_hooks(including_permanent=True)
    assert unusual_state(model) == []


def test_an_error_restores_it_too():
    model = _dropping().train()
    model.hook_dict["transformer.h.0"].add_hook(lambda tensor, hook: tensor)

    def read_and_fail():
        with known_state(model):
            assert unusual_state(model) == []
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        read_and_fail()
    assert len(unusual_state(model)) == 2


def test_attached_saes_are_said():
    model = tiny_hooked_sae_transformer(16)
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=20))
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    model.add_sae(sae)
    with pytest.raises(ValueError, match=r"has SAEs attached at blocks.0.*model.reset_saes\(\)"):
        _read(model, ["blocks.1.hook_resid_post"])
    model.reset_saes()
    _read(model, ["blocks.1.hook_resid_post"])


def test_autocast_does_not_change_what_is_read():
    model, hooks = tiny_hooked_sae_transformer(16), ["blocks.1.hook_resid_post"]
    plain = _read(model, hooks)[hooks[0]]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_read(model, hooks)[hooks[0]], plain)
        assert unusual_state(model) == [
            "autocast is on: the model and the SAEs are read without it"
        ]
        assert torch.is_autocast_enabled("cpu")


IDENTITIES = """
import json, sys
import torch
from test_models import _dropping, tiny_hooked_sae_transformer
from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.activations.models import model_identity
from transformer_lens.model_bridge import TransformerBridge

torch.manual_seed(0)
found = [tiny_hooked_sae_transformer(16), _dropping(), load_embedded_model()]
print(json.dumps([model_identity(model, {})["model_content"] for model in found]))
"""


def test_an_objects_identity_is_what_decides_its_numbers():
    """The same in any process, after use and in any state; another for any other behaviour."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *sys.path])}
    runs = [
        subprocess.run(
            [sys.executable, "-c", IDENTITIES], env={**environment, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        )
        for seed in "12"
    ]  # fmt: skip
    assert runs[0].stdout == runs[1].stdout
    model = tiny_hooked_sae_transformer(16)

    def identity():
        return model_identity(model, {})["model_content"]

    found = [identity()]
    assert json.loads(runs[0].stdout)[0] == found[0]
    _read(model, ["blocks.1.hook_resid_post"])
    model.train()
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda tensor, hook: tensor)
    assert identity() == found[0]
    model.blocks[0].mlp.act_fn = torch.nn.functional.relu
    found.append(identity())
    model.blocks[1].attn.attn_scale *= 2
    found.append(identity())
    model.blocks[1].attn.IGNORE.fill_(0.0)  # a buffer: it looks ahead
    found.append(identity())
    model.W_E.data[0, 0] += 1
    found.append(identity())
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "config",
    [
        {"activation_function": "relu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 40},
        {"layer_norm_epsilon": 0.1},
    ],
)
def test_a_folder_of_a_gpt2_is_run_as_its_config_says(tmp_path, config):
    # other kernels of transformers 4.56 do not follow the scales
    hf_model = tiny_gpt2(3, 16, **config, attn_implementation="eager").eval()
    for parameter in hf_model.parameters():
        parameter.data.mul_(3)  # so that it matters
    hf_model.save_pretrained(tmp_path)
    gpt2_tokenizer().save_pretrained(tmp_path)
    wanted = shared_model({"": {"model_name": "x"}})
    model = load_language_model(str(tmp_path), wanted, [], "cpu")
    tokens = torch.arange(24).view(2, 12)
    hidden = hf_model(tokens, output_hidden_states=True).hidden_states[2]
    _, cache = model.run_with_cache(tokens, names_filter="blocks.2.hook_resid_pre")
    assert torch.allclose(cache["blocks.2.hook_resid_pre"], hidden, atol=1e-4)


@pytest.mark.parametrize("name", ["sae-afa-demo", "folder"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fold_ln": "no"}, "fold_ln must be bool: got 'no'"),
        ({"n_ctx": 64}, "cannot be loaded with n_ctx: only with"),
        ({"nonsense": 1}, "cannot be loaded with nonsense: only with"),
        ({"dtype": "bfloat16"}, "cannot be loaded with dtype: only with"),
    ],
)
def test_keywords_that_cannot_be_followed_are_refused(tmp_path, name, kwargs, message):
    if name == "folder":
        tiny_gpt2(1, 16).save_pretrained(tmp_path)
        gpt2_tokenizer().save_pretrained(tmp_path)
        name = str(tmp_path)
    wanted = {"model_name": name, "model_class_name": None, "model_from_pretrained_kwargs": kwargs}
    with pytest.raises(ValueError, match=message):
        load_language_model(name, wanted, [], "cpu")


def test_the_embedded_model_is_processed_as_asked():
    plain, centred = (
        load_language_model(
            "sae-afa-demo",
            {"model_from_pretrained_kwargs": kwargs, "model_class_name": None},
            [],
            "cpu",
        )
        for kwargs in ({"dtype": "float32"}, {"center_writing_weights": True})
    )
    assert not torch.allclose(plain.W_E, centred.W_E)
    assert torch.allclose(centred.W_E.mean(-1), torch.zeros(len(plain.W_E)), atol=1e-6)
