"""SAEs as a training might leave them, without one."""

from __future__ import annotations

from typing import Any

import torch

PRICE = 0.8


@torch.no_grad()
def unlike_new(sae: Any) -> Any:
    """The same inference SAE with nothing at its initial value, and rows far from unit."""
    sae.b_dec += 0.1 * torch.randn_like(sae.b_dec)
    sae.b_enc += 0.1 * torch.randn_like(sae.b_enc)
    factor = torch.rand(sae.cfg.d_sae) * 3 + 0.2
    sae.W_dec *= factor[:, None]
    sae.W_enc /= factor
    if sae.cfg.architecture() == "sparse_topafa":
        sae.price += PRICE
    return sae
