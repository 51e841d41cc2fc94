"""Every family of SAELens: what the reader sees against each family's published definition.

The SAEs are SAELens's own, written to disk and loaded. The definitions are written out here in
float64, token by token where that is plainer; they give z, the features and the decoder that go
into the oracle of the metric.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import sae_lens.saes as families
import torch
from helpers.afa_oracle import metrics_of_dictionary
from helpers.oracle import keep_brute_force
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

from sae_afa_plugin import (
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)
from sae_afa_plugin.spaces import afa_token_metrics, linear_code, why_not


@pytest.fixture(params=[-1.0, 1.0], ids=["dense", "sparse"], autouse=True)
def both_paths(request, monkeypatch):
    """Every test reads the metric from the whole matrix, and from its active features alone."""
    monkeypatch.setattr("sae_afa_plugin.spaces._SPARSE_BELOW", request.param)


class Reader:
    """The metric of an SAE on batches of any shape, and which features have fired in them."""

    def __init__(self, sae):
        self.sae, self.code = sae, linear_code(sae)
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)

    def __call__(self, x, x_out=None):
        metrics = afa_token_metrics(self.sae, x, x_out)
        n_last = 2 if x.ndim > 2 and x.shape[-1] != self.code.d_in else 1
        flat = [
            None if t is None else t.reshape(-1, *t.shape[x.ndim - n_last :]) for t in (x, x_out)
        ]
        self.fired |= self.code.read(*flat).fired > 0
        return metrics

    def check_decoder(self, x):
        self.code.check(x, f"architecture {self.sae.cfg.architecture()!r}")


D_IN, D_OUT, D_SAE, HEADS = 12, 9, 40, 3
TOLERANCES = {"float32": {"rtol": 3e-4, "atol": 1e-4}, "float64": {"rtol": 1e-9, "atol": 1e-10}}
NORMS = ("norm_z", "norm_f", "norm_z_centered", "norm_f_centered")


# --- the definitions: weights p, config, centered input c -> features and decoder ---


def relu(p, cfg, c):
    return (c @ p["W_enc"] + p["b_enc"]).clamp(min=0), p["W_dec"]


def jumprelu(p, cfg, c):
    pre = c @ p["W_enc"] + p["b_enc"]
    return torch.where(pre > p["threshold"], pre.clamp(min=0), 0), p["W_dec"]


def gated(p, cfg, c):
    open_gates = c @ p["W_enc"] + p["b_gate"] > 0
    magnitudes = c @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]
    return torch.where(open_gates, magnitudes.clamp(min=0), 0), p["W_dec"]


def scaled(p, cfg, c):
    """Pre-activations, and the rows that they belong to."""
    pre, rows = c @ p["W_enc"] + p["b_enc"], p["W_dec"]
    if cfg.rescale_acts_by_decoder_norm:
        norms = rows.norm(dim=-1)
        return pre * norms, rows / norms[:, None]
    return pre, rows


def topk(p, cfg, c):
    pre, rows = scaled(p, cfg, c)
    f = torch.zeros_like(pre)
    for f_t, pre_t in zip(f, pre, strict=True):
        best = pre_t.argsort(descending=True)[: cfg.k]
        f_t[best] = pre_t[best].clamp(min=0)
    return f, rows


def abstopk(p, cfg, c):
    pre, rows = scaled(p, cfg, c)
    f = torch.zeros_like(pre)
    for f_t, pre_t in zip(f, pre, strict=True):
        best = pre_t.abs().argsort(descending=True)[: cfg.k]
        f_t[best] = pre_t[best]
    return f, rows


def batchtopk(p, cfg, c):
    """In training: the best of the whole batch."""
    pre, rows = scaled(p, cfg, c)
    acts = pre.clamp(min=0).flatten()
    best = acts.argsort(descending=True)[: int(cfg.k * len(c))]
    f = torch.zeros_like(acts)
    f[best] = acts[best]
    return f.view_as(pre), rows


def batchtopk_exported(p, cfg, c):
    pre, rows = scaled(p, cfg, c)
    return torch.where(pre > p["topk_threshold"], pre, 0), rows


def matching_pursuit(p, cfg, c):
    W_dec = p["W_dec"]
    f = torch.zeros(len(c), len(W_dec), dtype=c.dtype)
    for f_t, residual in zip(f, c, strict=True):
        support: set[int] = set()
        for _ in range(cfg.max_iterations or c.shape[1]):
            projections = (W_dec @ residual).clamp(min=0)
            best = int(projections.argmax())
            f_t[best] += projections[best]
            residual = residual - projections[best] * W_dec[best]
            now = set(f_t.nonzero().flatten().tolist())
            if now == support or residual.norm() < cfg.residual_threshold:
                break
            support = now
    return f, W_dec


def topafa(p, cfg, c):
    acts = (c @ p["W_enc"] + p["b_enc"]).clamp(min=0)
    scores = acts * p["W_dec"].norm(dim=-1)
    kept = keep_brute_force(scores.numpy(), c.norm(dim=-1).numpy())
    return torch.where(torch.from_numpy(kept), acts, 0), p["W_dec"]


def normalized(x, how):
    if how == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
        return x / (x.std(-1, keepdim=True) + 1e-5)
    if how == "constant_norm_rescale":
        return x * x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
    return x


def expected_metrics(p, cfg, features, x, x_out=None):
    """What the definition says of activations ``[tokens, d_in]``."""
    x, b = x.double(), p["b_dec"]
    z = c = normalized(x, cfg.normalize_activations)
    if cfg.apply_b_dec_to_input:
        c = c - b
    if features is matching_pursuit and not cfg.apply_b_dec_to_input:
        b = torch.zeros_like(b)
    if x_out is not None:
        z = x_out.double() - (x @ p["W_skip"].T if "W_skip" in p else 0)
    f, W_dec = features(p, cfg, c)
    expected = metrics_of_dictionary(z, f, W_dec, b)
    assert expected["l0"].max() > 1
    return expected


# --- SAEs ---


@dataclass
class ForeignSAEConfig(families.StandardSAEConfig):
    how: str = "squared"

    @classmethod
    def architecture(cls):
        return "foreign"


class ForeignSAE(families.StandardSAE):
    def decode(self, feature_acts):
        recons = {
            "squared": feature_acts.square() @ self.W_dec + self.b_dec,
            "bias forgotten": feature_acts @ self.W_dec,
            "longer rows": 1.1 * feature_acts @ self.W_dec + self.b_dec,
            "broken": None,
        }[self.cfg.how]
        if recons is None:
            raise RuntimeError("decode is broken")
        return self.reshape_fn_out(self.hook_sae_recons(recons), self.d_head)


CLASSES = {
    **vars(families),
    "TopAFASAE": TopAFASAE,
    "TopAFASAEConfig": TopAFASAEConfig,
    "TopAFATrainingSAE": TopAFATrainingSAE,
    "TopAFATrainingSAEConfig": TopAFATrainingSAEConfig,
    "ForeignSAE": ForeignSAE,
    "ForeignSAEConfig": ForeignSAEConfig,
}


@dataclass
class Family:
    name: str  # of the class
    features: Callable[..., Any]
    fields: dict[str, Any] = field(default_factory=dict)

    def make(self, dtype="float32", seed=0, **fields):
        """An SAE in which no weight is at its initial value."""
        if self.transcodes:
            fields = {"d_out": D_OUT, "apply_b_dec_to_input": False, **fields}
        fields = {"d_in": D_IN, "d_sae": D_SAE, "dtype": dtype, **self.fields, **fields}
        sae = CLASSES[self.name](CLASSES[f"{self.name}Config"](**fields))
        rng = torch.Generator().manual_seed(seed)
        # matching pursuit diverges on rows above sqrt(2)
        longest = 1.2 if "MatchingPursuit" in self.name else 3.0
        for name, weight in sae.state_dict().items():
            noise = torch.randn(weight.shape, generator=rng, dtype=torch.float64)
            uniform = torch.rand(weight.shape[:1], generator=rng, dtype=torch.float64)
            if name == "W_dec":
                noise *= (0.3 + (longest - 0.3) * uniform)[:, None] / noise.norm(
                    dim=-1, keepdim=True
                )
            elif name == "topk_threshold":
                noise = torch.tensor(0.7)
            elif name == "threshold":
                noise = 0.2 + 0.8 * uniform
            else:
                noise *= D_IN**-0.5 if noise.ndim == 2 else 0.4
            weight.copy_(noise)
        return sae

    @property
    def encodes_batches(self):
        return "BatchTopKTraining" in self.name

    @property
    def transcodes(self):
        return "Transcoder" in self.name


def weights_of(sae):
    return {name: weight.double().clone() for name, weight in sae.state_dict().items()}


def through_disk(sae, path):
    save = sae.save_inference_model if hasattr(sae, "save_inference_model") else sae.save_model
    save(path)
    return SAE.load_from_disk(path)


def tokens(dtype="float32", n=30, seed=1):
    """Activations at the input and the output hook; away from zero, and of uneven size."""
    rng = torch.Generator().manual_seed(seed)
    size = 0.5 + 2 * torch.rand(n, 1, generator=rng)
    x = size * torch.randn(n, D_IN, generator=rng) + 0.4
    x_out = size * torch.randn(n, D_OUT, generator=rng) - 0.3
    return x.to(getattr(torch, dtype)), x_out.to(getattr(torch, dtype))


def assert_agrees(got, expected, rtol, atol):
    for name, tensor in got._asdict().items():
        reference = torch.as_tensor(expected[name]).reshape(tensor.shape)
        if name in ("over_activated", "l0"):
            assert tensor.tolist() == reference.tolist(), name
        else:
            torch.testing.assert_close(
                tensor.double(),
                reference.double(),
                rtol=rtol,
                atol=atol,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


NO_BIAS_IN = {"apply_b_dec_to_input": False}
LAYER_NORM = {"normalize_activations": "layer_norm"}
RESCALED = {"normalize_activations": "constant_norm_rescale"}
ON_UNIT_ROWS = {"rescale_acts_by_decoder_norm": True}

ON_DISK = {
    "standard": Family("StandardSAE", relu),
    "standard, bias not in the input": Family("StandardSAE", relu, NO_BIAS_IN),
    "standard, layer norm": Family("StandardSAE", relu, LAYER_NORM),
    "standard, norm rescaled": Family("StandardSAE", relu, RESCALED),
    "topk": Family("TopKSAE", topk, {"k": 5}),
    "topk on unit rows": Family("TopKSAE", topk, {"k": 5, **ON_UNIT_ROWS}),
    "topk on unit rows, layer norm": Family(
        "TopKSAE", topk, {"k": 5, **ON_UNIT_ROWS, **LAYER_NORM}
    ),
    "topk on unit rows, bias not in the input": Family(
        "TopKSAE", topk, {"k": 5, **ON_UNIT_ROWS, **NO_BIAS_IN}
    ),
    "abstopk": Family("AbsTopKSAE", abstopk, {"k": 5}),
    "abstopk on unit rows": Family("AbsTopKSAE", abstopk, {"k": 5, **ON_UNIT_ROWS}),
    "jumprelu": Family("JumpReLUSAE", jumprelu),
    "jumprelu, bias not in the input": Family("JumpReLUSAE", jumprelu, NO_BIAS_IN),
    "jumprelu, layer norm": Family("JumpReLUSAE", jumprelu, LAYER_NORM),
    "gated": Family("GatedSAE", gated),
    "gated, norm rescaled": Family("GatedSAE", gated, RESCALED),
    "matching pursuit": Family("MatchingPursuitSAE", matching_pursuit, {"max_iterations": 6}),
    "matching pursuit until it repeats itself": Family(
        "MatchingPursuitSAE", matching_pursuit, {"residual_threshold": 1.0}
    ),
    "matching pursuit without bias": Family("MatchingPursuitSAE", matching_pursuit, NO_BIAS_IN),
    "matching pursuit, norm rescaled": Family("MatchingPursuitSAE", matching_pursuit, RESCALED),
    "topafa": Family("TopAFASAE", topafa),
    "topafa, layer norm": Family("TopAFASAE", topafa, LAYER_NORM),
    "transcoder": Family("Transcoder", relu),
    "transcoder, input layer norm": Family("Transcoder", relu, LAYER_NORM),
    "skip transcoder": Family("SkipTranscoder", relu),
    "skip transcoder, input layer norm": Family("SkipTranscoder", relu, LAYER_NORM),
    "jumprelu transcoder": Family("JumpReLUTranscoder", jumprelu),
    "jumprelu skip transcoder": Family("JumpReLUSkipTranscoder", jumprelu),
    # written by SAELens as what they become for inference
    "batchtopk, exported": Family("BatchTopKTrainingSAE", batchtopk_exported, {"k": 5}),
    "batchtopk off unit rows, exported": Family(
        "BatchTopKTrainingSAE",
        batchtopk_exported,
        {"k": 5, "rescale_acts_by_decoder_norm": False},
    ),
    "matryoshka batchtopk, exported": Family(
        "MatryoshkaBatchTopKTrainingSAE",
        batchtopk_exported,
        {"k": 5, "matryoshka_widths": [10, D_SAE]},
    ),
    "topk, exported": Family("TopKTrainingSAE", topk, {"k": 5}),
    "jumprelu, exported": Family("JumpReLUTrainingSAE", jumprelu),
    "topafa, exported": Family("TopAFATrainingSAE", topafa, LAYER_NORM),
}
IN_TRAINING = {
    "standard": Family("StandardTrainingSAE", relu),
    "topk": Family("TopKTrainingSAE", topk, {"k": 5}),
    "topk, sparse": Family("TopKTrainingSAE", topk, {"k": 5, "use_sparse_activations": True}),
    "topk off unit rows, sparse": Family(
        "TopKTrainingSAE",
        topk,
        {"k": 5, "use_sparse_activations": True, "rescale_acts_by_decoder_norm": False},
    ),
    "abstopk": Family("AbsTopKTrainingSAE", abstopk, {"k": 5}),
    "batchtopk": Family("BatchTopKTrainingSAE", batchtopk, {"k": 5.5}),
    "matryoshka batchtopk": Family(
        "MatryoshkaBatchTopKTrainingSAE", batchtopk, {"k": 5.5, "matryoshka_widths": [10, D_SAE]}
    ),
    "jumprelu": Family("JumpReLUTrainingSAE", jumprelu),
    "gated": Family("GatedTrainingSAE", gated),
    "matching pursuit": Family(
        "MatchingPursuitTrainingSAE",
        matching_pursuit,
        {"max_iterations": 6, "decoder_init_norm": 1.0},
    ),
    "topafa": Family("TopAFATrainingSAE", topafa, LAYER_NORM),
}


# --- one for each family ---


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", ON_DISK.values(), ids=ON_DISK)
def test_a_family_on_disk_is_read_as_it_is_defined(family, dtype, tmp_path):
    original = family.make(dtype)
    x, x_out = tokens(dtype)
    if not family.transcodes:
        x_out = None
    expected = expected_metrics(weights_of(original), original.cfg, family.features, x, x_out)
    got = Reader(through_disk(original, tmp_path))(x, x_out)
    assert got.norm_f.dtype == getattr(torch, dtype)
    assert_agrees(got, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", IN_TRAINING.values(), ids=IN_TRAINING)
def test_a_family_in_training_is_read_as_it_is_defined(family, dtype):
    sae = family.make(dtype)
    x, _ = tokens(dtype)
    expected = expected_metrics(weights_of(sae), sae.cfg, family.features, x)
    got = Reader(sae)(x)
    assert_agrees(got, expected, **TOLERANCES[dtype])
    assert not any(tensor.requires_grad for tensor in got)


@pytest.mark.parametrize(
    "family",
    [*ON_DISK.values(), *IN_TRAINING.values()],
    ids=[*ON_DISK, *(f"{name}, in training" for name in IN_TRAINING)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_decoder_of_every_family_is_linear(family, dtype):
    reader = Reader(family.make(dtype))
    if family.encodes_batches:
        assert not reader.code.per_token
        reader.code.per_token = True  # so that it is found out, as of a class that is not known
        with pytest.raises(ValueError, match=r"'.*batchtopk' encodes whole batches: how many"):
            reader.check_decoder(tokens(n=8)[0])
    else:
        assert reader.code.per_token
        reader.check_decoder(tokens(n=8)[0])


def test_no_family_is_left_out():
    linear = {name for name in families.__all__ if not name.startswith("Temporal")}
    classes = {name for name in linear if not name.endswith("Config")} - {"SAE", "TrainingSAE"}
    assert classes <= {family.name for family in [*ON_DISK.values(), *IN_TRAINING.values()]}


@pytest.mark.parametrize("sparse", [False, True])
def test_any_leading_shape(sparse):
    fields = {"k": 5, "use_sparse_activations": sparse}
    sae = Family("TopKTrainingSAE", topk, fields).make()
    x, _ = tokens()
    flat = Reader(sae)(x)
    nested = Reader(sae)(x.view(2, 5, 3, D_IN))
    assert nested.l0.shape == (2, 5, 3)
    assert_agrees(nested, flat._asdict(), **TOLERANCES["float32"])


def test_a_single_token_has_no_leading_shape():
    reader = Reader(ON_DISK["standard"].make())
    x, _ = tokens()
    one = reader(x[3])
    assert one.norm_z.shape == ()
    fired = reader.fired.clone()
    expected = Reader(reader.sae)
    assert_agrees(one, expected(x[3:4])._asdict(), **TOLERANCES["float32"])
    assert torch.equal(fired, expected.fired)


# --- folds ---


@pytest.mark.parametrize(
    "name",
    [
        "standard",
        "standard, bias not in the input",
        "topk",
        "topk on unit rows",
        "jumprelu",
        "gated",
        "matching pursuit",
        "topafa",
    ],
)
def test_a_folded_norm_scaling_compares_norms_at_the_hook(name, tmp_path):
    family, factor = ON_DISK[name], 0.07
    original = family.make("float64", normalize_activations="expected_average_only_in")
    x, _ = tokens("float64")
    before = Reader(original)(factor * (x / factor))._asdict()
    sae = through_disk(original, tmp_path)
    sae.fold_activation_norm_scaling_factor(factor)
    # tied weights cannot grow: there the features do
    assert (sae.W_dec.norm(dim=-1).min() > 3) == (name != "matching pursuit")
    after = Reader(sae)(x / factor)
    for norm in NORMS:
        before[norm] = before[norm] / factor
    assert_agrees(after, before, **TOLERANCES["float64"])
    assert after.l0.max() > 1


@pytest.mark.parametrize(
    "name",
    [
        "standard",
        "topk on unit rows",
        "abstopk on unit rows",
        "jumprelu",
        "gated",
        "topafa",
        "transcoder",
        "skip transcoder",
        "jumprelu skip transcoder",
    ],
)
def test_folding_decoder_norms_changes_nothing(name, tmp_path):
    family = ON_DISK[name]
    x, x_out = tokens("float64")
    sae = through_disk(family.make("float64"), tmp_path)
    x_out = x_out if family.transcodes else None
    before = Reader(sae)(x, x_out)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE, dtype=torch.float64))
    assert_agrees(Reader(sae)(x, x_out), before._asdict(), **TOLERANCES["float64"])
    assert before.l0.max() > 1


# --- attention heads ---


def attention_sae(family, reshape, path):
    metadata = SAEMetadata(hook_name="blocks.5.attn.hook_z")
    sae = family.make(reshape_activations=reshape, metadata=metadata)
    return weights_of(sae), through_disk(sae, path)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("reshape", ["hook_z", "none"])
@pytest.mark.parametrize("name", ["standard", "topk on unit rows", "matching pursuit", "topafa"])
def test_heads_are_read_whether_flattened_or_not(name, reshape, heads, tmp_path):
    family = ON_DISK[name]
    weights, sae = attention_sae(family, reshape, tmp_path)
    x, _ = tokens()
    given = x.view(-1, HEADS, D_IN // HEADS) if heads else x
    got = Reader(sae)(given)
    assert got.norm_z.shape == (30,)
    expected = expected_metrics(weights, sae.cfg, family.features, x)
    assert_agrees(got, expected, **TOLERANCES["float32"])
    sequences = Reader(sae)(given.unflatten(0, (5, 6)))
    assert sequences.norm_z.shape == (5, 6)
    assert_agrees(sequences, expected, **TOLERANCES["float32"])


@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("name", ["standard", "topafa"])
def test_the_decoder_of_an_attention_sae_is_linear(name, used_before, tmp_path):
    _, sae = attention_sae(ON_DISK[name], "hook_z", tmp_path)
    x = tokens()[0].view(-1, HEADS, D_IN // HEADS)
    if used_before:
        sae(x)
    Reader(sae).check_decoder(x)


class Bogus(torch.nn.Module):
    def forward(self, acts):
        return acts.bogus


@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("reshape", ["hook_z", "none"])
@pytest.mark.parametrize("read", ["metric", "check_decoder", "error"])
def test_the_sae_reshapes_as_before_when_it_has_been_read(reshape, used_before, read, tmp_path):
    _, sae = attention_sae(ON_DISK["standard"], reshape, tmp_path)
    x, _ = tokens()
    for_sae = x.view(-1, HEADS, D_IN // HEADS) if reshape == "hook_z" else x
    expected = SAE.load_from_disk(tmp_path)(for_sae)
    if used_before:
        sae(for_sae)
    before = (sae.reshape_fn_in, sae.reshape_fn_out, sae.hook_z_reshaping_mode)
    reader = Reader(sae)
    if read == "metric":
        reader(x)
    elif read == "check_decoder":
        reader.check_decoder(x)
    else:
        # the SAE's own error, from inside encode
        point, sae.hook_sae_acts_pre = sae.hook_sae_acts_pre, Bogus()
        with pytest.raises(AttributeError, match="bogus"):
            reader(x)
        sae.hook_sae_acts_pre = point
    assert (sae.reshape_fn_in, sae.reshape_fn_out, sae.hook_z_reshaping_mode) == before
    assert torch.equal(sae(for_sae), expected)


# --- other files and dtypes ---


OLD_CONFIG = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "hook_point_layer": 8,
    "hook_point_head_index": None,
    "dataset_path": "Skylion007/openwebtext",
    "is_dataset_tokenized": False,
    "context_size": 128,
    "l1_coefficient": 8e-05,
    "lr": 0.0004,
    "expansion_factor": 32,
    "d_in": D_IN,
    "d_sae": D_SAE,
    "seed": 42,
    "dtype": "torch.float32",
    "device": "cuda",
}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("standard", {}),
        ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}),
        ("standard", {"hook_point": "blocks.5.attn.hook_z"}),
        ("standard, bias not in the input", {"apply_b_dec_to_input": False}),
        ("standard", {"normalize_activations": False}),
    ],
)
def test_a_config_from_before_saelens_6(name, fields, tmp_path):
    family = ON_DISK[name]
    original = family.make()
    save_file(original.state_dict(), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({**OLD_CONFIG, **fields}))
    sae = SAE.load_from_disk(tmp_path)
    x, _ = tokens()
    expected = expected_metrics(weights_of(original), original.cfg, family.features, x)
    if "hook_z" in sae.cfg.metadata.hook_name:
        assert sae.cfg.reshape_activations == "hook_z"
        x = x.view(-1, HEADS, D_IN // HEADS)
    assert_agrees(Reader(sae)(x), expected, **TOLERANCES["float32"])


@pytest.mark.parametrize("on_unit_rows", [False, True])
def test_a_bf16_sae_is_summed_in_float32(on_unit_rows, tmp_path):
    # every k would do, but bf16 has ties
    fields = {"k": D_SAE, "rescale_acts_by_decoder_norm": on_unit_rows}
    original = Family("TopKSAE", topk, fields).make("bfloat16")
    sae = through_disk(original, tmp_path)
    x, _ = tokens()
    # the features are the SAE's, with bf16 rounding; everything after them is not
    pre = (x.bfloat16() - original.b_dec) @ original.W_enc + original.b_enc
    W_dec = original.W_dec.double()
    if on_unit_rows:
        pre = pre * original.W_dec.norm(dim=-1)
        W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
    f = pre.relu()
    expected = metrics_of_dictionary(x.bfloat16(), f, W_dec, original.b_dec)
    got = Reader(sae)(x)
    assert got.norm_f.dtype == got.interference.dtype == torch.float32
    assert_agrees(got, expected, **TOLERANCES["float32"])


@pytest.mark.parametrize("name", ["standard", "skip transcoder"])
def test_bf16_activations_of_the_model_meet_a_float32_sae(name):
    family = ON_DISK[name]
    sae = family.make()
    x, x_out = tokens("bfloat16")
    x_out = x_out if family.transcodes else None
    expected = expected_metrics(weights_of(sae), sae.cfg, family.features, x, x_out)
    assert_agrees(Reader(sae)(x, x_out), expected, **TOLERANCES["float32"])


# --- what the reader keeps and leaves ---


def test_fired_are_the_features_of_any_batch():
    sae = ON_DISK["abstopk"].make()
    reader = Reader(sae)
    assert reader.fired.tolist() == [False] * D_SAE
    active = torch.zeros(D_SAE, dtype=torch.bool)
    for x in (tokens(n=2)[0], tokens(n=3, seed=2)[0].view(3, 1, D_IN), tokens(n=1, seed=3)[0]):
        p = weights_of(sae)
        f, _ = abstopk(p, sae.cfg, x.view(-1, D_IN).double() - p["b_dec"])
        active |= (f != 0).any(0)
        reader(x)
        assert torch.equal(reader.fired, active)
    assert 5 < active.sum() < D_SAE
    assert not Reader(sae).fired.any()


def test_features_without_a_direction_count_and_do_not_interfere():
    family = ON_DISK["standard"]
    sae = family.make()
    with torch.no_grad():
        sae.W_dec[2:] = 0
        sae.b_enc[2:] += 1
    x, _ = tokens(n=200)
    got = Reader(sae)(x)
    expected = expected_metrics(weights_of(sae), sae.cfg, relu, x)
    assert (got.l0 > 2).all()
    assert_agrees(got, expected, **TOLERANCES["float32"])


def test_reading_changes_neither_weights_nor_config():
    for family in ON_DISK.values():
        sae = family.make()
        x, x_out = tokens()
        weights, cfg, attributes = weights_of(sae), sae.cfg.to_dict(), dict(vars(sae))
        reader = Reader(sae)
        reader(x, x_out if family.transcodes else None)
        if not family.encodes_batches:
            reader.check_decoder(x)
        assert sae.cfg.to_dict() == cfg
        # normalisations put what they subtract on the SAE
        assert vars(sae).keys() == attributes.keys()
        assert all(vars(sae)[name] is value for name, value in attributes.items())
        assert all(torch.equal(w, weights[name]) for name, w in weights_of(sae).items())


def hook_points(sae):
    return {
        name: ([h.hook.id for h in hook.fwd_hooks], list(hook._forward_hooks))
        for name, hook in sae.hook_dict.items()
    }


@pytest.mark.parametrize("with_another", [False, True])
def test_no_hook_is_left_after_check_decoder(with_another):
    sae = ON_DISK["jumprelu"].make()
    seen = []
    if with_another:
        sae.hook_sae_recons.add_hook(lambda recons, hook: seen.append(recons))
    before = hook_points(sae)
    Reader(sae).check_decoder(tokens()[0])
    assert hook_points(sae) == before
    seen.clear()
    sae(tokens()[0])
    assert len(seen) == with_another


# --- what is refused ---


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("squared", ValueError, "architecture 'foreign' is not supported: its decode is not f @"),
        ("bias forgotten", ValueError, "architecture 'foreign' is not supported"),
        ("longer rows", ValueError, "architecture 'foreign' is not supported"),
        ("broken", RuntimeError, "decode is broken"),
    ],
)
def test_a_foreign_decoder_is_refused_and_the_sae_left_clean(how, error, message):
    sae = Family("ForeignSAE", relu, {"how": how}).make()
    before = (hook_points(sae), sae.reshape_fn_in, sae.reshape_fn_out)
    with pytest.raises(error, match=message):
        Reader(sae).check_decoder(tokens(n=8)[0])
    assert (hook_points(sae), sae.reshape_fn_in, sae.reshape_fn_out) == before


def test_a_token_that_is_not_finite_says_nothing_of_the_decoder():
    x = tokens(n=8)[0]
    x[2, 3] = torch.nan
    Reader(ON_DISK["standard"].make()).check_decoder(x)
    with pytest.raises(ValueError, match="architecture 'foreign' is not supported"):
        Reader(Family("ForeignSAE", relu).make()).check_decoder(x)


def test_temporal_is_refused_by_name():
    sae = families.TemporalSAE(
        families.TemporalSAEConfig(d_in=8, d_sae=64, n_heads=4, bottleneck_factor=4)
    )
    with pytest.raises(ValueError, match="architecture 'temporal' is not supported: its encode"):
        afa_token_metrics(sae, torch.randn(2, 5, 8))


@pytest.mark.parametrize("name", ["standard", "jumprelu skip transcoder"])
def test_one_call_reads_what_the_reader_reads(name):
    family = ON_DISK[name]
    sae = family.make()
    x, x_out = tokens()
    x_out = x_out if family.transcodes else None
    got = afa_token_metrics(sae, x, x_out)
    assert_agrees(got, Reader(sae)(x, x_out)._asdict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("temporal", "none", True), "architecture 'temporal' is not supported"),
        (
            ("standard", "expected_average_only_in", False),
            "normalize_activations is 'expected_average_only_in' and no norm_scaling_factor is "
            "known",
        ),
        (
            ("jumprelu", "covariance_whitening", False),
            "normalize_activations is 'covariance_whitening' and the whitening has not been folded",
        ),
        *(
            ((name, "none", False), "the metadata of this transcoder has no hook_name_out")
            for name in (
                "transcoder",
                "skip_transcoder",
                "jumprelu_transcoder",
                "jumprelu_skip_transcoder",
            )
        ),
    ],
)
def test_why_not_names_the_reason(arguments, message):
    assert why_not(*arguments).startswith(message)


@pytest.mark.parametrize("name", ON_DISK)
def test_nothing_speaks_against_the_other_families(name):
    cfg = ON_DISK[name].make().cfg
    assert why_not(cfg.architecture(), cfg.normalize_activations, ON_DISK[name].transcodes) is None


@pytest.mark.parametrize("shape", [(5, D_IN + 1), (5, HEADS, 5), (D_IN, 5), (HEADS, 4)])
def test_another_width_is_refused(shape):
    reader = Reader(ON_DISK["standard"].make())
    message = (
        rf"this SAE reads activations of width {D_IN}, but they have shape \({shape[0]}, .*: use "
        "the hook it was made for"
    )
    with pytest.raises(ValueError, match=message):
        reader(torch.randn(shape))
    with pytest.raises(ValueError, match=message):
        reader.check_decoder(torch.randn(shape))
    assert not reader.fired.any()


def test_a_transcoder_needs_both_hooks():
    reader = Reader(ON_DISK["transcoder"].make())
    x, x_out = tokens()
    with pytest.raises(ValueError, match="reconstruct the activation at its output hook: pass it"):
        reader(x)
    with pytest.raises(ValueError, match=f"of width {D_OUT}, but they have shape"):
        reader(x, x)
    with pytest.raises(ValueError, match=f"of width {D_IN}, but they have shape"):
        reader(x_out, x_out)
