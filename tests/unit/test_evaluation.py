"""The evaluator on real, small language models: what it reads, counts, refuses and keeps."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.afa_oracle import metrics_of_dictionary
from helpers.models import tiny_hooked_sae_transformer
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TemporalSAE,
    TemporalSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.load_model import HookedProxyLM
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sae_afa_plugin import AFAResults, TopAFASAE, TopAFASAEConfig, evaluate_saes
from sae_afa_plugin.activations.embedded import _tokenizer, load_embedded_model
from sae_afa_plugin.activations.hooks import hook_in, wanted_hooks
from sae_afa_plugin.groups import base
from sae_afa_plugin.metrics import summarize
from sae_afa_plugin.sources import sources_of_release

D_MODEL, HEADS, D_HEAD = 16, 4, 4
BOS = 0


@pytest.fixture(scope="module")
def model():
    return tiny_hooked_sae_transformer(D_MODEL)


@pytest.fixture(scope="module")
def tokens():
    tokens = torch.randint(1, 50, (9, 12), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = BOS
    return tokens


def uneven(sae, hook, seed=0, **metadata):
    """Weights whose rows, biases and signs differ, and the hook that the SAE belongs to."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            scale = torch.rand(parameter.shape[0], generator=generator) + 0.1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * scale.view(-1, *[1] * (parameter.ndim - 1)) * 0.5)
    for name, value in {"hook_name": hook, "model_name": "tiny", **metadata}.items():
        sae.cfg.metadata[name] = value
    return sae


def standard(hook="blocks.1.hook_resid_pre", seed=0, d_in=D_MODEL, dtype="float32", **metadata):
    cfg = StandardSAEConfig(d_in=d_in, d_sae=40, dtype=dtype)
    return uneven(StandardSAE(cfg), hook, seed, **metadata)


def evaluate(saes, model, tokens, **options):
    options = {"exclude_special_tokens": (BOS,), "progress": False, **options}
    return evaluate_saes(saes, model, tokens, **options)


def activations(model, tokens, hook):
    return model.run_with_cache(tokens, names_filter=hook)[1][hook][tokens != BOS].detach()


def assert_rows(table, expected, rtol=1e-4):
    for name, values in expected.items():
        np.testing.assert_allclose(
            table[name].to_numpy(dtype=float), values, rtol=rtol, atol=1e-6, err_msg=name
        )


def by_definition(sae, z):
    return metrics_of_dictionary(z, sae.encode(z), sae.W_dec, sae.b_dec)


def test_every_sae_gets_the_tokens_of_its_own_hook(model, tokens):
    saes = {
        "first": standard("blocks.0.hook_resid_pre", 1),
        "second": standard("blocks.1.hook_resid_post", 2),
    }
    results = evaluate(saes, model, tokens)
    for name, sae in saes.items():
        rows = results.tokens[results.tokens["sae"] == name]
        assert_rows(
            rows, by_definition(sae, activations(model, tokens, sae.cfg.metadata.hook_name))
        )
        where = tokens.numpy()[rows["sequence"], rows["position"]]
        assert (where == rows["token_id"]).all()
        assert results.summary.loc[name, "tokens"] == 9 * 11
        assert results.summary.loc[name, "special_tokens"] == 9
        summary = summarize(rows)
        assert results.summary.loc[name, list(summary)].to_dict() == pytest.approx(summary)


@pytest.mark.parametrize(
    "options", [{"batch_size_prompts": 1}, {"memory_budget": 1}, {"memory_budget": 5000}]
)
def test_batches_and_budgets_change_nothing(model, tokens, options):
    saes = {"a": standard(), "b": standard("blocks.0.hook_mlp_out", 3)}
    before = evaluate(saes, model, tokens).tokens
    after = evaluate(saes, model, tokens, **options).tokens
    pd.testing.assert_frame_equal(before, after, rtol=1e-4, atol=1e-6)


def test_the_model_runs_once_and_no_further_than_the_last_hook(model, tokens):
    seen = []
    # of PyTorch, on the blocks: hooks of TransformerLens are taken off
    handles = [
        model.blocks[layer].register_forward_hook(
            lambda _, __, output, layer=layer: seen.append((layer, len(output)))
        )
        for layer in (0, 1)
    ]
    try:
        evaluate(
            {"a": standard("blocks.0.hook_resid_pre"), "b": standard("blocks.0.hook_mlp_out")},
            model,
            tokens,
            batch_size_prompts=4,
            exclude_special_tokens=(BOS,),
        )
    finally:
        for handle in handles:
            handle.remove()
    probes = [n for layer, n in seen if n == 1 and layer == 0]
    batches = [n for layer, n in seen if layer == 0]
    assert [n for n in batches if n > 1] == [4, 4]
    assert len(probes) == 1 + 1  # one look at all hooks before; 9 = 4 + 4 + 1
    assert not [layer for layer, _ in seen if layer == 1]


def test_each_sae_is_loaded_once(model, tokens, tmp_path, monkeypatch):
    loaded = []
    load = SAE.load_from_disk.__func__
    monkeypatch.setattr(
        SAE,
        "load_from_disk",
        classmethod(lambda cls, path, **kwargs: loaded.append(path) or load(cls, path, **kwargs)),
    )
    for seed in (1, 2):
        standard(seed=seed).save_model(tmp_path / str(seed))
    evaluate({"1": tmp_path / "1", "2": tmp_path / "2"}, model, tokens, memory_budget=1)
    assert loaded == [tmp_path / "1", tmp_path / "2"]


def test_only_the_last_position(model, tokens):
    sae = standard()
    results = evaluate({"sae": sae}, model, tokens, positions="last")
    x = model.run_with_cache(tokens)[1]["blocks.1.hook_resid_pre"][:, -1]
    assert_rows(results.tokens, by_definition(sae, x))
    assert (results.tokens["position"] == 11).all()


def test_exactly_as_many_tokens_as_asked_for(model, tokens):
    results = evaluate({"sae": standard()}, model, tokens, n_tokens=25)
    assert list(zip(results.tokens["sequence"], results.tokens["position"], strict=True)) == [
        *((0, p) for p in range(1, 12)), *((1, p) for p in range(1, 12)), (2, 1), (2, 2), (2, 3),
    ]  # fmt: skip


def test_fewer_tokens_than_asked_for_are_said(model, tokens, capsys):
    results = evaluate({"sae": standard()}, model, tokens, progress=True)
    assert len(results.tokens) == 99
    said = capsys.readouterr().out
    assert "the dataset has 99 tokens, not 50,000" in said
    assert (
        "sae: standard, 40 features of width 16, blocks.1.hook_resid_pre, normalize_activations "
        "none, float32" in said
    )


def test_tokens_that_are_not_finite_are_counted_and_left_out(tokens):
    model = tiny_hooked_sae_transformer(D_MODEL)
    with torch.no_grad():
        model.embed.W_E[7] = torch.nan
        model.embed.W_E[8, 0] = torch.inf
    bad = int(torch.isin(tokens, torch.tensor([7, 8])).sum())
    assert bad > 2
    sae = standard("hook_embed")
    results = evaluate({"sae": sae}, model, tokens)
    assert results.summary.loc["sae", "nonfinite_tokens"] == bad
    assert results.summary.loc["sae", "tokens"] == 99 - bad == len(results.tokens)
    assert not results.tokens["token_id"].isin([7, 8]).any()
    assert np.isfinite(results.summary.loc["sae", "nmse_mean"])


def test_an_sae_that_gives_nothing_finite_is_refused(model, tokens):
    sae = standard()
    with torch.no_grad():
        sae.W_enc[3, 3] = torch.nan
    with pytest.raises(ValueError, match="'sae' cannot be evaluated: none of its tokens"):
        evaluate({"sae": sae}, model, tokens)


def test_dead_features_are_those_active_on_no_token(model, tokens):
    sae = standard()
    with torch.no_grad():
        sae.b_enc[:5] = -1e4
    x = activations(model, tokens, "blocks.1.hook_resid_pre")
    dead = int((~(sae.encode(x) != 0).any(0)).sum())
    assert dead >= 5
    summary = evaluate({"sae": sae}, model, tokens, memory_budget=5000).summary
    assert summary.loc["sae", "dead_features"] == dead


def test_a_transcoder_is_read_at_both_hooks(model, tokens):
    cfg = TranscoderConfig(d_in=16, d_sae=40, d_out=16, apply_b_dec_to_input=False)
    out = "blocks.0.hook_mlp_out"
    sae = uneven(Transcoder(cfg), "blocks.0.ln2.hook_normalized", hook_name_out=out)
    results = evaluate({"sae": sae}, model, tokens)
    x, z = (activations(model, tokens, hook) for hook in (sae.cfg.metadata.hook_name, out))
    expected = metrics_of_dictionary(z, sae.encode(x), sae.W_dec, sae.b_dec)
    assert_rows(results.tokens, expected)
    assert results.summary.loc["sae", "hook_name_out"] == out


@pytest.mark.parametrize("style", ["hook_z", "none", "head"])
def test_attention_heads(model, tokens, style):
    hook = "blocks.1.attn.hook_z"
    x = activations(model, tokens, hook)
    if style == "head":
        sae = standard(hook, d_in=D_HEAD, hook_head_index=2)
        x = x[:, 2]
    else:
        cfg = StandardSAEConfig(d_in=HEADS * D_HEAD, d_sae=40, reshape_activations=style)
        sae = uneven(StandardSAE(cfg), hook)
        x = x.flatten(-2)
    results = evaluate({"sae": sae}, model, tokens)
    f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    assert_rows(results.tokens, metrics_of_dictionary(x, f, sae.W_dec, sae.b_dec))


def test_a_bfloat16_model(tokens):
    model = tiny_hooked_sae_transformer(D_MODEL).to(torch.bfloat16)
    sae = standard()
    for budget in (1 << 30, 1):  # in memory and in a file
        results = evaluate({"sae": sae}, model, tokens, memory_budget=budget)
        x = activations(model, tokens, "blocks.1.hook_resid_pre")
        assert x.dtype == torch.bfloat16
        assert_rows(results.tokens, by_definition(sae, x.float()), rtol=1e-3)


def test_a_model_with_the_hooks_of_transformers(tokens):
    torch.manual_seed(0)
    cfg = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2)
    model = HookedProxyLM(GPT2LMHeadModel(cfg).eval(), tokenizer=None)
    sae = standard("blocks.1.hook_resid_post", hf_hook_name="transformer.h.1")
    results = evaluate({"sae": sae}, model, tokens)
    hidden = model.model(tokens, output_hidden_states=True).hidden_states[2]
    assert_rows(results.tokens, by_definition(sae, hidden[tokens != BOS].detach()))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_from_a_local_folder(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        cfg = GPT2Config(vocab_size=1024, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        hf_model = GPT2LMHeadModel(cfg)
        kwargs = {"center_writing_weights": True}
    else:
        cfg = LlamaConfig(
            vocab_size=1024, max_position_embeddings=64, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        hf_model = LlamaForCausalLM(cfg)
        kwargs = {}
    hf_model.save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    sae = standard(model_from_pretrained_kwargs=kwargs)
    results = evaluate_saes(
        {"sae": sae}, tmp_path, "embedded", n_tokens=200, context_size=32, progress=False
    )
    tokens = torch.tensor(results.sequences["token_id"].to_numpy()).view(-1, 32)
    x = hf_model.eval()(tokens, output_hidden_states=True).hidden_states[1]
    if kind == "gpt2":  # what center_writing_weights does to the residual stream
        x = x - x.mean(-1, keepdim=True)
    x = x.detach().numpy()[results.tokens["sequence"], results.tokens["position"]]
    assert_rows(results.tokens, by_definition(sae, torch.tensor(x)), rtol=2e-3)


def test_a_folder_that_cannot_be_processed_as_needed(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2)
    ).save_pretrained(tmp_path)  # fmt: skip
    sae = standard(model_from_pretrained_kwargs={"center_writing_weights": True})
    with pytest.raises(
        ValueError, match=r"need their model loaded with \{'center_writing_weights': True"
    ):
        evaluate_saes({"sae": sae}, tmp_path, "embedded", progress=False)


# --- what is refused ---


def test_one_refused_sae_does_not_stop_the_others(model, tokens):
    temporal = TemporalSAE(
        TemporalSAEConfig(d_in=16, d_sae=32, n_heads=2, bottleneck_factor=4, kval_topk=4)
    )
    temporal.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    unscaled = standard()
    unscaled.cfg.normalize_activations = "expected_average_only_in"
    homeless = standard()
    homeless.cfg.metadata.hook_name = None
    saes = {
        "temporal": temporal,
        "unscaled": unscaled,
        "homeless": homeless,
        "wide": standard(d_in=20),
        "elsewhere": standard("blocks.1.hook_resid_prae"),
        "good": standard(),
    }
    results = evaluate(saes, model, tokens)
    assert list(results.summary.index) == ["good"]
    refused = results.metadata["refused"]
    assert "its encode returns only the novel part" in refused.pop("temporal")
    assert "no norm_scaling_factor is known" in refused.pop("unscaled")
    assert "its metadata has no hook_name" in refused.pop("homeless")
    assert "have width 16, but the SAE has d_in=20" in refused.pop("wide")
    assert "did you mean 'blocks.1.hook_resid_pre'" in refused.pop("elsewhere")
    assert refused == {}


def test_nothing_that_can_be_evaluated_is_an_error(model, tokens):
    with pytest.raises(
        ValueError, match=r"'a' cannot be evaluated \(1 others neither\): .*d_in=20"
    ):
        evaluate({"a": standard(d_in=20), "b": standard(d_in=21)}, model, tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_token": 5}, "there is no option 'n_token': did you mean n_tokens"),
        ({"protocol": "papers"}, r"protocol must be one of \['default', 'paper'\]: got 'papers'"),
        (
            {"positions": "first"},
            "positions must be 'all', 'last' or a slice like '32:-4': got 'first'",
        ),
        ({"n_tokens": 0}, "n_tokens must be at least 1: got 0"),
        ({"batch_size_prompts": 0}, "batch_size_prompts must be at least 1: got 0"),
        ({"device": "gpu"}, "device must be a name like cpu, cuda or cuda:1: got 'gpu'"),
        ({"context_size": 20}, r"shape \[n, 20 or more\]: got \(9, 12\)"),
        ({"exclude_special_tokens": True}, "the model has no tokenizer, so its special tokens"),
        ({"exclude_special_tokens": tuple(range(50))}, "no token is left to evaluate"),
    ],
)
def test_options_that_cannot_be(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate({"sae": standard()}, model, tokens, **options)


def test_contexts_longer_than_the_model(model):
    with pytest.raises(ValueError, match="context_size is 40, but the model takes 32 tokens"):
        evaluate({"sae": standard()}, model, torch.ones(3, 40, dtype=torch.long))


def test_without_a_model_nothing_is_evaluated(tokens):
    with pytest.raises(ValueError, match="the metadata of 'a' names no model"):
        evaluate({"a": standard(model_name=None)}, None, tokens)


def test_contexts_are_no_longer_than_those_an_sae_knows():
    sae = uneven(
        StandardSAE(StandardSAEConfig(d_in=192, d_sae=40)),
        "blocks.1.hook_resid_pre",
        context_size=24,
        prepend_bos=False,
    )
    results = evaluate_saes({"sae": sae}, "sae-afa-demo", "embedded", n_tokens=100, progress=False)
    assert results.metadata["settings"]["context_size"] == 24
    assert results.metadata["settings"]["prepend_bos"] is False
    assert results.sequences["position"].max() == 23
    assert results.sequences["token"][1].strip()


# --- keeping and continuing ---


def test_results_are_saved_and_loaded(model, tokens, tmp_path):
    results = evaluate({"a": standard(), "b": standard(seed=2)}, model, tokens, out=tmp_path)
    loaded = AFAResults.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.tokens, results.tokens)
    pd.testing.assert_frame_equal(loaded.sequences, results.sequences)
    pd.testing.assert_frame_equal(
        loaded.summary, results.summary, check_names=False, check_dtype=False
    )
    assert loaded.metadata == json.loads(json.dumps(results.metadata))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".claims", "results", "results.json", "sae-afa.json", "sequences.parquet", "summary.csv",
    ]  # fmt: skip
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["schema_version"] == 4
    assert written["settings"]["seed"] == 42
    assert written["saes"]["a"]["l0_mean"] == pytest.approx(results.summary.loc["a", "l0_mean"])
    assert "L0" not in str(results)
    assert "l0_mean" in str(results)


def test_finished_saes_are_not_evaluated_again(model, tokens, tmp_path, monkeypatch):
    saes = {"a": standard(), "b": standard(seed=2)}
    whole = evaluate(saes, model, tokens, out=tmp_path / "whole")
    evaluate({"a": saes["a"]}, model, tokens, out=tmp_path / "parts")
    encoded = []
    encode = StandardSAE.encode
    monkeypatch.setattr(
        StandardSAE, "encode", lambda self, x: encoded.append(self) or encode(self, x)
    )
    parts = evaluate(saes, model, tokens, out=tmp_path / "parts")
    assert set(map(id, encoded)) == {id(saes["b"])}
    pd.testing.assert_frame_equal(parts.tokens, whole.tokens)
    pd.testing.assert_frame_equal(
        parts.summary, whole.summary, check_dtype=False, check_names=False
    )
    encoded.clear()
    again = evaluate(saes, model, tokens, out=tmp_path / "parts")
    assert encoded == []
    pd.testing.assert_frame_equal(again.tokens, whole.tokens)


def test_an_sae_that_has_changed_is_evaluated_again(model, tokens, tmp_path):
    sae = standard()
    before = evaluate({"a": sae}, model, tokens, out=tmp_path).summary.loc["a", "nmse_mean"]
    with torch.no_grad():
        sae.W_dec *= 0.5
    after = evaluate({"a": sae}, model, tokens, out=tmp_path).summary.loc["a", "nmse_mean"]
    assert after != before
    assert AFAResults.load(tmp_path).summary.loc["a", "nmse_mean"] == pytest.approx(after)


def test_a_changed_hook_is_a_changed_sae(model, tokens, tmp_path):
    sae = standard("blocks.0.hook_resid_pre")
    evaluate({"a": sae}, model, tokens, out=tmp_path)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    results = evaluate({"a": sae}, model, tokens, out=tmp_path)
    assert results.summary.loc["a", "hook_name"] == "blocks.1.hook_resid_post"
    x = activations(model, tokens, "blocks.1.hook_resid_post")
    assert_rows(results.tokens, by_definition(sae, x))


def test_another_sae_of_the_same_name_is_refused(model, tokens, tmp_path):
    for seed, folder in enumerate(("one/sae", "two/sae")):
        standard(seed=seed).save_model(tmp_path / folder)
    out = tmp_path / "out"
    evaluate({"sae": tmp_path / "one/sae"}, model, tokens, out=out)
    with pytest.raises(ValueError, match=r"'sae' in .*out' is another SAE \(.*one/sae\): use"):
        evaluate({"sae": tmp_path / "two/sae"}, model, tokens, out=out)


def test_a_batchtopk_sae_is_read_as_saved_for_inference_and_not_in_training(
    model, tokens, tmp_path
):
    cfg = BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=40, k=4)
    sae = uneven(BatchTopKTrainingSAE(cfg), "blocks.1.hook_resid_pre")
    results = evaluate({"sae": sae, "good": standard()}, model, tokens)
    assert "'batchtopk' encodes whole batches" in results.metadata["refused"]["sae"]
    sae.save_inference_model(tmp_path / "sae")
    saved = evaluate({"sae": tmp_path / "sae"}, model, tokens).summary.loc["sae"]
    assert (saved["architecture"], saved["trained_as"]) == ("jumprelu", "batchtopk")


def test_tiny_values_are_kept_to_the_last_digit(model, tokens, tmp_path):
    results = evaluate({"a": standard()}, model, tokens, out=tmp_path)
    results.summary["epsilon_lbo_median"] = 2.3912345678901e-9
    results.save(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())["saes"]["a"]
    assert written["epsilon_lbo_median"] == 2.3912345678901e-9
    assert written["tokens"] == 99
    assert written["catalogue_l0"] is None


def test_a_token_that_is_not_finite_makes_no_feature_alive(tokens):
    model = tiny_hooked_sae_transformer(D_MODEL)
    with torch.no_grad():
        model.embed.W_E[7] = torch.nan
    sae = standard("hook_embed")
    with torch.no_grad():
        sae.b_enc[:5] = -1e4
    for sparse in (-1.0, 1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sae_afa_plugin.spaces._SPARSE_BELOW", sparse)
            assert evaluate({"a": sae}, model, tokens).summary.loc["a", "dead_features"] >= 5


def test_another_model_or_dataset_in_the_same_folder_is_refused(model, tokens, tmp_path):
    saes = {"a": standard()}
    evaluate(saes, model, tokens, out=tmp_path / "tensor")
    with pytest.raises(ValueError, match="dataset_content was"):
        evaluate(saes, model, tokens.flip(0), out=tmp_path / "tensor")
    other = tiny_hooked_sae_transformer(D_MODEL, seed=5)
    with pytest.raises(ValueError, match="model_content was"):
        evaluate(saes, other, tokens, out=tmp_path / "tensor")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"tokens": tokens[0].tolist()}))
    evaluate(saes, model, text, out=tmp_path / "file", context_size=12)
    text.write_text(json.dumps({"tokens": tokens[1].tolist()}) + "\n")
    with pytest.raises(ValueError, match="dataset_content was"):
        evaluate(saes, model, text, out=tmp_path / "file", context_size=12)


def test_layers_of_a_cross_layer_transcoder_are_refused():
    release = "mntss-gemma-2-2b-2.5m-clt-as-per-layer"
    sources = sources_of_release(release)
    assert "one layer of a cross-layer transcoder" in sources[0].why_not()


def test_gemma_scope_2_means_the_input_of_the_mlp_behind_its_layer_norm():
    gemma = {
        "hook_name": "blocks.3.hook_mlp_in",
        "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
    }
    assert hook_in(None, gemma) == "blocks.3.mlp.hook_in"
    assert wanted_hooks(gemma) == {
        "blocks.3.mlp.hook_in", "model.layers.3.pre_feedforward_layernorm",
    }  # fmt: skip
    assert hook_in(None, {"hook_name": "blocks.3.hook_mlp_in"}) == "blocks.3.hook_mlp_in"


def test_other_settings_or_other_tokens_in_the_same_folder_are_refused(model, tokens, tmp_path):
    saes = {"a": standard()}
    evaluate(saes, model, tokens, out=tmp_path)
    with pytest.raises(ValueError, match="n_tokens was 50000 and is 20"):
        evaluate(saes, model, tokens, out=tmp_path, n_tokens=20)
    saes["b"] = standard(seed=2)
    stream = Dataset.from_dict({"tokens": tokens.tolist()}).to_iterable_dataset()
    other = Dataset.from_dict({"tokens": tokens.flip(0).tolist()}).to_iterable_dataset()
    evaluate({"a": saes["a"]}, model, stream, out=tmp_path / "stream", context_size=12)
    with pytest.raises(ValueError, match="the dataset gives other tokens"):
        evaluate(saes, model, other, out=tmp_path / "stream", context_size=12)
    assert list(AFAResults.load(tmp_path).summary.index) == ["a"]


def test_a_mistake_leaves_nothing_that_stands_in_the_way(model, tokens, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="cannot be evaluated"):
        evaluate({"a": standard(d_in=20)}, model, tokens, out=out, n_tokens=30)
    with pytest.raises(ValueError, match="no token is left"):
        evaluate({"a": standard()}, model, tokens, out=out, exclude_special_tokens=tuple(range(50)))
    assert not out.exists()
    assert len(evaluate({"a": standard()}, model, tokens, out=out, n_tokens=20).tokens) == 20
    evaluate({"a": standard(), "b": standard(d_in=20)}, model, tokens, out=out, n_tokens=20)
    assert not (out / "unfinished").exists()
    assert list(AFAResults.load(out).summary.index) == ["a"]


def test_a_model_by_name_stands_in_for_the_one_in_the_metadata():
    saes = {}
    for name in ("gpt2", None):
        sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=40))
        saes[str(name)] = uneven(sae, "blocks.1.hook_resid_pre", model_name=name)
    results = evaluate_saes(saes, "sae-afa-demo", "embedded", n_tokens=50, progress=False)
    assert len(results.summary) == 2


def the_part(folder, name):
    (part,) = (folder / "results").glob(f"a-*.afa.*/{name}")
    return part


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "results.json").write_text("{"), "cannot be read: results.json: Expecting"),
        (lambda f: (f / "results.json").write_text("[]"), "cannot be read: results.json"),
        (
            lambda f: (f / "sae-afa.json").write_text('{"schema_version": 9, "settings": {}}'),
            "schema_version is 9, this version of sae-afa-plugin reads 4",
        ),
        (lambda f: (f / "sae-afa.json").write_text("{"), "sae-afa.json' is damaged"),
        (lambda f: (f / "sae-afa.json").unlink(), "holds no results: it has no sae-afa.json"),
        (
            lambda f: the_part(f, "tokens.parquet").write_bytes(b"PAR1"),
            "tokens.parquet: it is not the file that was written. Delete that folder",
        ),
        (lambda f: the_part(f, "tokens.parquet").unlink(), "tokens.parquet is missing"),
        (lambda f: the_part(f, "result.json").write_text("{}"), "results.json: a-.* is damaged"),
        (lambda f: (f / "sequences.parquet").write_bytes(b"PAR1"), "sequences.parquet: "),
        (lambda f: (f / "results.json").unlink(), "was not finished, run it again to continue"),
    ],
)
def test_damaged_results_are_one_sentence(model, tokens, tmp_path, damage, message):
    evaluate({"a": standard()}, model, tokens, out=tmp_path)
    damage(tmp_path)

    def read():
        results = AFAResults.load(tmp_path)
        return results.sequences, results.tokens

    with pytest.raises(ValueError, match=message) as error:
        read()
    assert str(tmp_path) in str(error.value)


def test_results_of_version_0_1_are_refused(model, tokens, tmp_path):
    (tmp_path / "results.json").write_text('{"schema_version": 1}')
    (tmp_path / "tokens.parquet").write_bytes(b"PAR1")
    for act in (
        lambda: AFAResults.load(tmp_path),
        lambda: evaluate({"a": standard()}, model, tokens, out=tmp_path),
    ):
        with pytest.raises(ValueError, match=r"holds results of version 0\.1, which this version"):
            act()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_top_afa_sae_is_neither_over_nor_under_activated():
    torch.manual_seed(0)
    sae = TopAFASAE(TopAFASAEConfig(d_in=192, d_sae=1536))
    sae.cfg.metadata.hook_name = "blocks.4.hook_resid_pre"
    results = evaluate_saes(
        {"fresh": sae}, "sae-afa-demo", "embedded", n_tokens=1000, core=True, core_tokens=256,
        progress=False,
    )  # fmt: skip
    row = results.summary.loc["fresh"]
    assert row["norm_ratio_median"] == pytest.approx(1, abs=0.01)
    assert abs(row["interference_median"]) < row["max_abs_cos"] < 1
    assert row["welch_bound"] < row["max_abs_cos"]
    assert row["core_ce_loss_score"] < 1
    assert row["core_l0"] == pytest.approx(row["l0_mean"], rel=0.2)


@pytest.mark.parametrize("how", ["positions", "mask"])
def test_saelens_metrics_are_of_whole_sequences(how, capsys):
    sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=300))
    sae.cfg.metadata.hook_name = "blocks.4.hook_resid_pre"
    masks = [[1] * 32, [1] * 20 + [0] * 12 * (how == "mask") + [1] * 12 * (how != "mask")] * 4
    tokens = Dataset.from_dict({"tokens": [list(range(5, 37))] * 8, "attention_mask": masks})
    results = evaluate_saes(
        {"a": sae}, "sae-afa-demo", tokens, context_size=32, n_tokens=150, core=True,
        positions="4:" if how == "positions" else None, coherence=False,
    )  # fmt: skip
    assert "a: no core: SAELens's metrics read whole sequences" in capsys.readouterr().out
    assert "core_ce_loss_score" not in results.summary


def test_logits_are_no_larger_than_a_block_whatever_the_batch_size(monkeypatch):
    """Fewer sequences in a pass of the model, and the same sequences."""
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=192, d_sae=300))
    sae.cfg.metadata.hook_name = "blocks.4.hook_resid_pre"
    model, passes, found = load_embedded_model(), [], []
    model.unembed.register_forward_hook(lambda module, args, logits: passes.append(logits.shape))
    for elements in (1 << 25, 130 * 1024):
        monkeypatch.setitem(base._BLOCK_ELEMENTS, "cpu", elements)
        passes.clear()
        results = evaluate_saes(
            {"a": sae}, model, "embedded", n_tokens=1500, core=True, core_tokens=512,
            batch_size_prompts=4, progress=False, coherence=False,
        )  # fmt: skip
        found.append(results.summary.loc["a"].filter(like="core_").astype(float))
        assert max(math.prod(shape) for shape in passes) == (4 if elements == 1 << 25 else 1) * (
            128 * 1024
        )
    of_batches = "core_explained_variance_legacy"  # a mean over batches of a ratio
    pd.testing.assert_series_equal(*(each.drop(of_batches) for each in found), rtol=1e-5)
