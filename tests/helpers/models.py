"""Small language models with random weights, for tests that need a real forward pass."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_afa_plugin.activations.embedded import ASSETS


def tiny_hooked_sae_transformer(d_model: int = 16, seed: int = 0) -> HookedSAETransformer:
    """Two layers, 50 tokens, no tokenizer."""
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=d_model,
        n_ctx=32,
        d_head=4,
        n_heads=d_model // 4,
        d_vocab=50,
        act_fn="gelu_new",
        seed=seed,
    )
    return HookedSAETransformer(cfg).eval()


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """The embedded model's vocabulary, with the special tokens that GPT-2 has."""
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "tokenizer.json"), **special)


def tiny_gpt2(n_layer: int, d_model: int, **config: Any) -> GPT2LMHeadModel:
    """A GPT-2 in transformers' form, for that tokenizer and 128 positions."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(gpt2_tokenizer()),
            n_embd=d_model,
            n_layer=n_layer,
            n_head=2,
            n_positions=128,
            n_ctx=128,  # gone from transformers, but in GPT-2's file and read by TransformerLens
            **config,
        )
    )
