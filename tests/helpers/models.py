"""Small language models with random weights, for tests that need a real forward pass."""

from __future__ import annotations

from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig


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
