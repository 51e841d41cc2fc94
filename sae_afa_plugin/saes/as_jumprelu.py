"""An SAE of this package as one of SAELens's JumpReLU SAEs, for inference alone.

A rule that looks at the norm of the input or at the residual needs all features of a token at once.
JumpReLU needs a number for each feature. What that costs has to be measured: the features of a
token are then no longer chosen together.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from sae_afa_plugin.saes.finite import finite_rows, nothing_finite
from sae_afa_plugin.saes.topafa import TopAFABase

_ENTRIES = 2**24  # of pre-activations that are sorted at once


@torch.no_grad()
def as_jumprelu(sae: SAE[Any], activations: Tensor, *, batch_size: int = 4096) -> JumpReLUSAE:
    """A JumpReLU SAE with the same weights whose features are on as often.

    The threshold of a feature is put where it lets through as many of the given tokens as the rule
    chooses it for. On these tokens every feature has its frequency and the SAE its mean L0; which
    tokens a feature is on for may differ. A feature that no token has is on for none of them.

    Args:
        sae: An inference SAE of this package: ``topafa``, ``sparse_topafa``, ``constant_quality``.
        activations: Activations at its hook ``[n, d_in]`` (heads: ``[n, n_heads, d_head]``), of
            which rows with NaN or infinity are left out. Rare features need many: tens of
            thousands.
        batch_size: How many are encoded at once.

    Returns:
        A new SAE on the device and in the dtype of the other, with its metadata.

    Raises:
        ValueError: If the SAE is not one of these, or no activation is finite.

    Example:
        >>> from sae_afa_plugin import TopAFASAE, TopAFASAEConfig
        >>> sae, x = TopAFASAE(TopAFASAEConfig(d_in=8, d_sae=32)), torch.randn(100, 8)
        >>> fast = as_jumprelu(sae, x)
        >>> torch.equal((fast.encode(x) > 0).sum(0), (sae.encode(x) > 0).sum(0))
        True
    """
    if not isinstance(sae, TopAFABase) or isinstance(sae, TrainingSAE):
        raise ValueError(
            "as_jumprelu takes an inference SAE with a rule of this package: got "
            f"{type(sae).__name__}; save_inference_model makes one of a training SAE"
        )
    decoder_norm = sae.decoder_norm()
    centered: list[Tensor] = []
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=sae.device)
    for batch in activations.split(batch_size):
        sae_in = sae.process_sae_in(batch.to(sae.device))
        sae_in = sae_in[finite_rows(sae_in)]
        feature_acts, _ = sae.encode_centered(sae_in, decoder_norm)
        counts += feature_acts.count_nonzero(dim=0)
        centered.append(sae_in)
    sae_in = torch.cat(centered) if centered else activations
    if not len(sae_in):
        raise nothing_finite()
    out = JumpReLUSAE(
        JumpReLUSAEConfig(
            **{
                name: copy.deepcopy(getattr(sae.cfg, name))
                for name in JumpReLUSAEConfig.__dataclass_fields__
            }
        ),
        use_error_term=sae.use_error_term,
    )
    weights = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    at_once = max(1, _ENTRIES // len(sae_in))
    threshold = torch.cat(
        [
            _between(sae_in @ W_enc + b_enc, count)
            for W_enc, b_enc, count in zip(
                sae.W_enc.split(at_once, dim=1),
                sae.b_enc.split(at_once),
                counts.split(at_once),
                strict=True,
            )
        ]
    )
    out.load_state_dict({**weights, "threshold": threshold.to(sae.dtype)})
    return out


def _between(hidden_pre: Tensor, counts: Tensor) -> Tensor:
    """Numbers above which each column ``[n, features]`` has so many entries: midpoints."""
    n = len(hidden_pre)
    exact = torch.promote_types(hidden_pre.dtype, torch.float32)
    ordered = hidden_pre.to(exact).sort(dim=0, descending=True).values.clamp(min=0)
    # the last that is let through, and the first that is not
    last = ordered.gather(0, (counts - 1).clamp(min=0)[None])[0]
    first = ordered.gather(0, counts.clamp(max=n - 1)[None])[0]
    first = torch.where(counts < n, first, 0)
    return torch.where(counts > 0, (last + first) / 2, 1.01 * last)  # more than rounding
