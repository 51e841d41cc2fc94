"""What is not promised by SAELens, TransformerLens, PyTorch and datasets, name by name.

When one of these libraries moves on, the test that fails says which lean has to follow.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from unittest import mock

import pytest
import sae_lens
import torch
from datasets import Dataset, load_dataset
from helpers.models import gpt2_tokenizer, tiny_gpt2, tiny_hooked_sae_transformer
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationWhitening
from transformer_lens import HookedTransformerConfig

import sae_afa_plugin
from sae_afa_plugin import _upstream

PACKAGE = Path(sae_afa_plugin.__file__).parent
# modules that SAELens documents for those who write architectures, evaluators and runners, and for
# synthetic data
DOCUMENTED = {
    "sae_lens.saes.sae", "sae_lens.config", "sae_lens.evals",
    "sae_lens.training.activations_store", "sae_lens.synthetic",
}  # fmt: skip
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) + 1


def standard(**fields):
    return StandardSAE(StandardSAEConfig(d_in=8, d_sae=16, **fields))


# --- one test for each name ---


def check_model_aliases():
    assert "gpt2-small" in _upstream.MODEL_ALIASES["gpt2"]


def check_official_model_names():
    assert "gpt2" in _upstream.OFFICIAL_MODEL_NAMES


def check_supported_activations():
    assert {"gelu_new", "relu", "silu"} <= set(_upstream.SUPPORTED_ACTIVATIONS)


def check_repo_folder_name():
    name = _upstream.repo_folder_name(repo_id="somebody/saes", repo_type="dataset")
    assert name == "datasets--somebody--saes"


def check_sae_cfg_filename(tmp_path):
    standard().save_model(tmp_path)
    assert (tmp_path / _upstream.SAE_CFG_FILENAME).is_file()


def check_sae_weights_filename(tmp_path):
    standard().save_model(tmp_path)
    assert (tmp_path / _upstream.SAE_WEIGHTS_FILENAME).is_file()


def check_sparsity_filename(tmp_path):
    assert (a_checkpoint(tmp_path) / _upstream.SPARSITY_FILENAME).is_file()


def check_trainer_state_filename(tmp_path):
    assert (a_checkpoint(tmp_path) / _upstream.TRAINER_STATE_FILENAME).is_file()


def check_activation_scaler_cfg_filename(tmp_path):
    assert (a_checkpoint(tmp_path) / _upstream.ACTIVATION_SCALER_CFG_FILENAME).is_file()


def check_activation_whitening_filename(tmp_path):
    whitening = ActivationWhitening(torch.zeros(8), torch.eye(8), torch.eye(8))
    folder = a_checkpoint(tmp_path, _upstream.ActivationScaler(whitening=whitening))
    assert (folder / _upstream.ACTIVATION_WHITENING_FILENAME).is_file()


def a_checkpoint(folder, scaler=None):
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=16, k=3))
    trainer = sae_lens.SAETrainer(SAETrainerConfig(64, 32, lr_end=3e-5), sae, iter([X]))
    trainer.activation_scaler = scaler or trainer.activation_scaler
    trainer.step(X)
    trainer.save_checkpoint("one", folder)
    return folder / "one"


def check_dtype_map():
    """What an SAE's config may have as dtype."""
    for name, dtype in _upstream.DTYPE_MAP.items():
        assert standard(dtype=name).W_dec.dtype == dtype
    with pytest.raises(ValueError, match="Invalid dtype"):
        standard(dtype="float31")


def check_sae_class_registry():
    assert _upstream.SAE_CLASS_REGISTRY["standard"] == (StandardSAE, StandardSAEConfig)


def check_sae_training_class_registry():
    found = _upstream.SAE_TRAINING_CLASS_REGISTRY["topk"]
    assert found == (TopKTrainingSAE, TopKTrainingSAEConfig)


def check_activationscaler():
    assert torch.equal(_upstream.ActivationScaler().scale(X), X)
    assert torch.equal(_upstream.ActivationScaler(scaling_factor=2.0).scale(X), 2 * X)


def check_hookedproxylm():
    model = _upstream.HookedProxyLM(tiny_gpt2(2, 8).eval(), gpt2_tokenizer())
    tokens = torch.tensor([[0, 5, 6]])
    cache = model.run_with_cache(tokens, names_filter=["transformer.h.1"], prepend_bos=False)[1]
    assert cache["transformer.h.1"].shape == (1, 3, 8)


def check_multisaetrainer():
    assert _upstream.MultiSAETrainer.__annotations__["n_training_samples"] in (int, "int")
    assert "trainers" in _upstream.MultiSAETrainer.__annotations__


def check_transcoder():
    assert issubclass(_upstream.Transcoder, sae_lens.SAE)
    assert issubclass(sae_lens.SkipTranscoder, _upstream.Transcoder)


def check_transformerbridge():
    assert callable(_upstream.TransformerBridge.boot_transformers)


def check_concat_and_batch_sequences():
    tokens = iter([torch.arange(1, 4), torch.arange(4, 9)])
    rows = _upstream.concat_and_batch_sequences(
        tokens_iterator=tokens, context_size=5, begin_batch_token_id=0,
        sequence_separator_token_id=0,
    )  # fmt: skip
    assert next(iter(rows)).tolist() == [0, 1, 2, 3, 0]


def check_convert_gpt2_weights():
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=128, d_head=4, n_heads=2, act_fn="gelu_new",
        d_vocab=len(gpt2_tokenizer()),
    )  # fmt: skip
    weights = _upstream.convert_gpt2_weights(tiny_gpt2(1, 8), cfg)
    assert weights["embed.W_E"].shape == (cfg.d_vocab, 8)


def check_dataset_fingerprint():
    one, other = Dataset.from_dict({"a": [1, 2]}), Dataset.from_dict({"a": [1, 3]})
    assert _upstream.dataset_fingerprint(one) == _upstream.dataset_fingerprint(
        Dataset.from_dict({"a": [1, 2]})
    )
    assert _upstream.dataset_fingerprint(one) != _upstream.dataset_fingerprint(other)


def check_datasets_cache(tmp_path):
    (tmp_path / "a.csv").write_text("a\n1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
        assert _upstream.datasets_cache() == tmp_path
        load_dataset("csv", data_files=str(tmp_path / "a.csv"), split="train")
    assert (tmp_path / "csv").is_dir()


def check_encodes_batches():
    cfg = {"d_in": 8, "d_sae": 16, "k": 3}
    assert _upstream.encodes_batches(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**cfg)))
    assert not _upstream.encodes_batches(TopKTrainingSAE(TopKTrainingSAEConfig(**cfg)))


def check_extract_stop_at_layer_from_tlens_hook_name():
    stop = _upstream.extract_stop_at_layer_from_tlens_hook_name
    assert stop("blocks.3.hook_resid_pre") == 4
    assert stop("hook_embed") is None


def check_get_conversion_loader_name():
    assert _upstream.get_conversion_loader_name("gpt2-small-res-jb") == "sae_lens"
    assert "gemma" in _upstream.get_conversion_loader_name("gemma-scope-2b-pt-res")


def check_get_norm_scaling_factor():
    factor = _upstream.get_norm_scaling_factor
    assert factor("gpt2-small-res-jb", "blocks.8.hook_resid_pre") is None
    ids = _upstream.get_pretrained_saes_directory()["gpt2-small-mlp-tm"].saes_map
    assert all(factor("gpt2-small-mlp-tm", sae_id) > 0 for sae_id in ids)


def check_get_pretrained_saes_directory():
    release = _upstream.get_pretrained_saes_directory()["gpt2-small-res-jb"]
    assert len(release.saes_map) == 13
    assert "blocks.8.hook_resid_pre" in release.expected_l0


def check_get_repo_id_and_folder_name():
    found = _upstream.get_repo_id_and_folder_name("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert found == ("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre")


def check_get_sae_lens_config_from_disk(tmp_path):
    standard().save_model(tmp_path)
    assert _upstream.get_sae_lens_config_from_disk(tmp_path)["d_sae"] == 16


def check_get_special_token_ids():
    assert _upstream.get_special_token_ids(gpt2_tokenizer()) == [gpt2_tokenizer().bos_token_id]


def check_get_releases_for_repo_id():
    found = _upstream.get_releases_for_repo_id("jbloom/GPT2-Small-SAEs-Reformatted")
    assert "gpt2-small-res-jb" in found


def check_get_special_token_from_cfg():
    tokenizer = gpt2_tokenizer()
    found = [
        _upstream.get_special_token_from_cfg(of, tokenizer) for of in ("bos", "eos", "sep", None, 3)
    ]
    assert found == [tokenizer.bos_token_id, tokenizer.eos_token_id, None, None, 3]


def check_handle_config_defaulting():
    old = {"d_in": 8, "d_sae": 16, "hook_name": "here", "normalize_activations": False}
    new = _upstream.handle_config_defaulting({"model_name": "gpt2", "dtype": "float32", **old})
    assert (new["architecture"], new["normalize_activations"]) == ("standard", "none")
    assert new["metadata"]["hook_name"] == "here"


def check_has_gradient_hook():
    def hook(tensor):
        """Nothing."""

    parameter = torch.nn.Parameter(torch.ones(2))
    assert not _upstream.has_gradient_hook(parameter, hook)
    parameter.register_post_accumulate_grad_hook(hook)
    assert _upstream.has_gradient_hook(parameter, hook)


def check_has_hooks():
    sae = standard()
    assert not _upstream.has_hooks(sae.hook_sae_input)
    for register in (
        lambda point: point.add_hook(lambda tensor, hook: None),
        lambda point: point.add_hook(lambda tensor, hook: None, dir="bwd"),
        lambda point: point.register_forward_hook(lambda *args: None),
        lambda point: point.register_forward_pre_hook(lambda *args: None),
        lambda point: point.register_full_backward_hook(lambda *args: None),
        lambda point: point.register_full_backward_pre_hook(lambda *args: None),
    ):
        point = standard().hook_sae_input
        register(point)
        assert _upstream.has_hooks(point)


def check_is_transformed():
    seen = []

    def f(x):
        seen.append(_upstream.is_transformed())
        return x * 2

    f(X)
    torch.func.vmap(f)(X)
    torch.func.grad(lambda x: f(x).sum())(X)
    with torch.autograd.forward_ad.dual_level():
        f(X)
    f(X)
    assert seen == [False, True, True, True, False]


def check_left_as_it_was():
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=16, reshape_activations="hook_z"))
    before = dict(vars(sae))

    def fail_inside():
        with _upstream.left_as_it_was(sae):
            assert sae.encode(X).shape == (5, 16)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert vars(sae).keys() == before.keys()
    assert all(vars(sae)[name] is value for name, value in before.items())


def check_without_bound_functions():
    """They are all that a copied SAE of SAELens shares with the one it was copied from."""
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=16, normalize_activations="layer_norm"))
    state = vars(sae)
    functions = {name for name, value in state.items() if isinstance(value, FunctionType)}
    left = _upstream.without_bound_functions(state)
    assert functions
    assert state.keys() - left.keys() == functions


def check_rebind_functions():
    sae = StandardSAE(
        StandardSAEConfig(8, 16, normalize_activations="layer_norm", reshape_activations="hook_z")
    )
    expected, other = sae(X.view(5, 2, 4)), copy.deepcopy(sae)
    _upstream.rebind_functions(other)
    other.encode(X.view(5, 4, 2))
    assert not hasattr(sae, "ln_mu")
    assert torch.equal(sae(X.view(5, 2, 4)), expected)


def check_load_model(tmp_path):
    tiny_gpt2(1, 8).save_pretrained(tmp_path)
    gpt2_tokenizer().save_pretrained(tmp_path)
    model = _upstream.load_model("AutoModelForCausalLM", str(tmp_path), "cpu", {}, [])
    assert isinstance(model, _upstream.HookedProxyLM)


def check_never_asking_for_remote_code():
    from transformers import dynamic_module_utils

    def refused_after_asking():
        with (
            mock.patch("builtins.input", return_value="no") as asked,
            pytest.raises(ValueError, match="custom code"),
        ):
            dynamic_module_utils.resolve_trust_remote_code(None, "x/y", False, True)
        return asked.called

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    assert refused_after_asking()
    with _upstream.never_asking_for_remote_code():
        assert not refused_after_asking()
    assert before == dynamic_module_utils.TIME_OUT_REMOTE_CODE


def check_without_hooks():
    model = tiny_hooked_sae_transformer(8)
    point = model.hook_dict["blocks.0.hook_resid_pre"]
    point.add_hook(lambda tensor, hook: tensor * 0)
    tokens = torch.arange(4)[None]
    hooked = model(tokens)
    with _upstream.without_hooks(model):
        assert not _upstream.has_hooks(point)
        plain = model(tokens)
    assert not torch.equal(plain, hooked)
    assert torch.equal(model(tokens), hooked)
    model.reset_hooks()
    assert torch.equal(model(tokens), plain)


def check_load_sae_config_from_huggingface():
    # what it does is seen in tests/e2e, against a hub on the loopback
    signature = inspect.signature(_upstream.load_sae_config_from_huggingface)
    assert list(signature.parameters)[:2] == ["release", "sae_id"]


def check_normalization_scale():
    for how in ("layer_norm", "constant_norm_rescale", "none"):
        sae = standard(normalize_activations=how)
        scale = _upstream.normalization_scale(sae, X)
        assert scale.shape == (len(X), 1)
        recons = X + scale * (
            _upstream.reconstruction_of(sae, X) - sae.run_time_activation_norm_fn_in(X)
        )
        torch.testing.assert_close(recons, sae(X), atol=1e-4, rtol=1e-4)


def check_normalized_input():
    z = _upstream.normalized_input(standard(normalize_activations="layer_norm"), X)
    centred = X - X.mean(-1, keepdim=True)
    torch.testing.assert_close(z, centred / (centred.std(-1, keepdim=True) + 1e-5))
    assert torch.equal(_upstream.normalized_input(standard(), X), X)


def check_parse_runner_config():
    arguments = ["--architecture", "topafa", "--d_in", "8", "--d_sae", "16"]
    cfg = _upstream.parse_runner_config(arguments)
    assert (cfg.sae.architecture(), cfg.sae.d_sae) == ("topafa", 16)


def check_reconstruction_of():
    sae = standard(normalize_activations="layer_norm")
    seen = _upstream.reconstruction_of(sae, X)
    torch.testing.assert_close(seen, sae.encode(X) @ sae.W_dec + sae.b_dec)
    assert not _upstream.has_hooks(sae.hook_sae_recons)


@pytest.mark.parametrize("name", _upstream.__all__)
def test_this_lean_holds(name, request):
    check = globals()[f"check_{name.lower()}"]
    if check.__code__.co_argcount:
        check(request.getfixturevalue("tmp_path"))
    else:
        check()


# --- the law ---


def test_nothing_else_leans_on_internals():
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name == "_upstream.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.ImportFrom)
                and re.match(r"(sae_lens|transformer_lens)\.", node.module or "")
                and node.module not in DOCUMENTED
            ):
                found.append(f"{file.relative_to(PACKAGE)}:{node.lineno} {node.module}")
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]|_C$", node.attr):
                owner = ast.unparse(node.value)
                if re.match(r"(torch|datasets|sae_lens|transformer_lens|point|hook)\b", owner):
                    found.append(f"{file.relative_to(PACKAGE)}:{node.lineno} {owner}.{node.attr}")
    assert found == []


def test_the_versions_that_were_read_are_those_that_are_tested():
    said = dict(re.findall(r"([a-z-]+) (\d+\.\d+\.\d+)", _upstream.__doc__))
    assert set(said) == {"sae-lens", "transformer-lens", "torch", "datasets"}
    pinned = (PACKAGE.parent / "constraints.txt").read_text()
    for package, read_at in said.items():
        assert re.search(rf"^{package}=={read_at}$", pinned, re.MULTILINE), package
    assert version("sae-lens")
