"""In which space each family of SAE reconstructs, and which families the AFA metric can read.

An SAE with a linear decoder says ``z_hat = f @ W_dec + b_dec`` in some space z. This module
finds z, f and the decoder for every family of SAELens, so that ``metrics`` need not know them:

- input normalisation (``layer_norm``, ``constant_norm_rescale``): z is the normalised activation;
- a norm scaling that has been folded: z is the activation, the rows of W_dec are long;
- attention heads (``hook_z``): flattened, whether the SAE does it itself or not;
- transcoders: z is the activation at the *output* hook, less the skip term where there is one;
- TopK that rescales by decoder norms: f lives on the unit-norm dictionary already;
- matching pursuit without ``apply_b_dec_to_input``: the bias takes no part.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_afa_plugin.metrics import (
    AFATokenMetrics,
    metrics_from_sums,
    norm_along_last,
    token_metrics,
)

# Share of active features up to which summing decoder rows is faster than the whole product:
# 6 % on a CPU at 1,024 tokens, 24,576 features, width 768 (benchmarks/evaluator.py).
_SPARSE_BELOW = 0.06


def why_not(architecture: str, normalize_activations: str, has_output_hook: bool) -> str | None:
    """Why the AFA metric cannot be read from an SAE, or None if it can.

    Args:
        architecture: SAELens's name of the architecture.
        normalize_activations: What the SAE's config says *after* loading: a scaling that was
            folded is "none".
        has_output_hook: Whether the metadata names ``hook_name_out``.

    Example:
        >>> why_not("jumprelu", "none", False) is None
        True
        >>> why_not("transcoder", "none", False)
        'the metadata of this transcoder has no hook_name_out...'
    """
    if architecture == "temporal":
        return (
            "architecture 'temporal' is not supported: its encode returns only the novel part of "
            "the code, so the norm of the features cannot be compared with the input's"
        )
    if normalize_activations == "expected_average_only_in":
        return (
            "normalize_activations is 'expected_average_only_in' and no norm_scaling_factor is "
            "known, so the input cannot be brought to the scale of the features: load the SAE, "
            "call fold_activation_norm_scaling_factor(factor) and pass the object"
        )
    if normalize_activations == "covariance_whitening":
        return (
            "normalize_activations is 'covariance_whitening' and the whitening has not been "
            "folded: call fold_activation_whitening on the SAE and pass the object"
        )
    if "transcoder" in architecture and not has_output_hook:
        return (
            "the metadata of this transcoder has no hook_name_out, so it is unknown which "
            "activation its features reconstruct: set sae.cfg.metadata.hook_name_out"
        )
    return None


_RESHAPING = ("reshape_fn_in", "reshape_fn_out", "hook_z_reshaping_mode", "d_head")


@contextmanager
def _heads_already_flat(sae: SAE[Any]) -> Generator[None]:
    """Let an SAE for attention heads take and give ``[..., d_in]``, as all others do."""
    attributes = vars(sae)
    before = {name: attributes[name] for name in _RESHAPING if name in attributes}
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        for name in _RESHAPING:
            attributes.pop(name, None)
        attributes.update(before)


class AFAReader:
    """Reads the AFA metric from one SAE, batch by batch.

    Args:
        sae: Any SAE or training SAE of SAELens with a linear decoder. Its weights must not
            change while the reader is used.

    Attributes:
        fired: Which features have been active so far, bool ``[d_sae]``.

    Example:
        >>> from sae_lens import StandardSAE, StandardSAEConfig
        >>> reader = AFAReader(StandardSAE(StandardSAEConfig(d_in=8, d_sae=32)))
        >>> reader(torch.randn(5, 8)).norm_f.shape
        torch.Size([5])
    """

    @torch.no_grad()
    def __init__(self, sae: SAE[Any]):
        self.sae = sae
        if sae.W_dec.device.type == "mps":
            raise ValueError(
                "the AFA metric needs float64, which MPS does not have: move the SAE to the CPU"
            )
        dtype = torch.promote_types(sae.W_dec.dtype, torch.float32)
        self._W_dec = sae.W_dec.detach().to(dtype)
        self._norms = norm_along_last(self._W_dec)
        self._on_unit_rows = bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))
        if self._on_unit_rows:
            self._W_dec = self._W_dec / self._norms[:, None]
        self._b_dec = sae.b_dec.detach().to(dtype)
        if sae.cfg.architecture() == "matching_pursuit" and not sae.cfg.apply_b_dec_to_input:
            self._b_dec = torch.zeros_like(self._b_dec)
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.W_dec.device)

    def _flat(self, x: Tensor, width: int) -> Tensor:
        if x.shape[-1] != width and x.ndim > 2 and x.shape[-2] * x.shape[-1] == width:
            x = x.flatten(-2)
        if x.shape[-1] != width:
            raise ValueError(
                f"this SAE reads activations of width {width}, but they have shape "
                f"{tuple(x.shape)}: use the hook it was made for"
            )
        return x.to(self._W_dec.device)

    def _encode(self, x: Tensor) -> Tensor:
        with _heads_already_flat(self.sae):
            f = self.sae.encode(x)
        return f.to_dense() if f.is_sparse else f

    def _target(self, x: Tensor, x_out: Tensor | None) -> Tensor:
        """z: what the features and the bias add up to, if the SAE is perfect."""
        if not isinstance(self.sae, Transcoder):
            return self.sae.run_time_activation_norm_fn_in(x.to(self.sae.dtype))
        if x_out is None:
            raise ValueError(
                "a transcoder's features reconstruct the activation at its output hook: pass it "
                "as x_out"
            )
        x_out = self._flat(x_out, self.sae.cfg.d_out).to(self._W_dec.dtype)
        W_skip = getattr(self.sae, "W_skip", None)
        return x_out if W_skip is None else x_out - x.to(self._W_dec.dtype) @ W_skip.T.to(x_out)

    @torch.no_grad()
    def __call__(self, x: Tensor, x_out: Tensor | None = None) -> AFATokenMetrics:
        """The metric of a batch of tokens.

        Args:
            x: Activations as the SAE's ``encode`` takes them ``[..., d_in]``; heads may be
                flattened or not.
            x_out: Activations at the output hook ``[..., d_out]``, for transcoders.

        Returns:
            Tensors of the leading shape ``[...]``, on the SAE's device.

        Raises:
            ValueError: If the activations have another width, or a transcoder gets no ``x_out``.
        """
        x = self._flat(x, self.sae.cfg.d_in)
        f = self._encode(x).to(self._W_dec.dtype)
        z = self._target(x, x_out)
        n_active = int(f.count_nonzero())
        if n_active > _SPARSE_BELOW * f.numel() or not bool(f.sum().isfinite()):
            return self._read_dense(z, f)
        return self._read_sparse(z, f)

    def _read_dense(self, z: Tensor, f: Tensor) -> AFATokenMetrics:
        active = f != 0
        known = active & f.isfinite().all(-1, keepdim=True)  # NaN is no activity
        self.fired |= known.reshape(-1, known.shape[-1]).any(0)
        f_unit = f if self._on_unit_rows else f * self._norms
        return token_metrics(z, f @ self._W_dec, f_unit, self._b_dec, l0=active.sum(-1))

    def _read_sparse(self, z: Tensor, f: Tensor) -> AFATokenMetrics:
        """The same from the active features alone: one pass over f instead of six."""
        d_sae = f.shape[-1]
        flat = f.reshape(-1, d_sae)
        token, feature = flat.nonzero(as_tuple=True)
        values = flat[token, feature]
        self.fired[feature] = True
        unit = (values if self._on_unit_rows else values * self._norms[feature]).double()
        l0 = torch.bincount(token, minlength=len(flat))
        sums = unit.new_zeros(2, len(flat))
        l1, squared_f = sums.index_add_(1, token, torch.stack([unit.abs(), unit.square()]))
        recons = torch.nn.functional.embedding_bag(
            feature,
            self._W_dec,
            offsets=l0.cumsum(0) - l0,
            mode="sum",
            per_sample_weights=values,
        )
        shape = f.shape[:-1]
        return metrics_from_sums(
            z,
            recons.view(*shape, -1),
            self._b_dec,
            l0.view(shape),
            l1.view(shape),
            squared_f.view(shape),
            d_sae,
        )

    @torch.no_grad()
    def check_decoder(self, x: Tensor) -> None:
        """Make sure that the SAE's own ``decode`` is ``f @ W_dec + b_dec``, on a few tokens.

        All families of SAELens 6.54 pass (tests check it); an architecture registered by
        someone else may decode differently, and its metric would be wrong without a sign.

        Args:
            x: Activations ``[tokens, d_in]``; eight are enough.

        Raises:
            ValueError: If it is something else.
        """
        x = self._flat(x, self.sae.cfg.d_in)
        f = self._encode(x)
        seen: list[Tensor] = []
        self.sae.hook_sae_recons.add_hook(lambda tensor, *, hook: seen.append(tensor))
        try:
            with _heads_already_flat(self.sae):
                self.sae.decode(f)
        finally:
            self.sae.hook_sae_recons.fwd_hooks.pop().hook.remove()
        expected = f.to(self._W_dec.dtype) @ self._W_dec + self._b_dec
        # low precision: the SAE's own sum rounds, ours does not
        tolerance = 1e-3 if self.sae.dtype in (torch.float32, torch.float64) else 0.05
        finite = expected.isfinite().all(-1)  # the others say nothing about the decoder
        expected = expected[finite]
        slack = tolerance * expected.abs().max().item() if len(expected) else 0.0
        if not seen or not torch.allclose(
            seen[0].to(expected)[finite], expected, rtol=0, atol=slack
        ):
            raise ValueError(
                f"architecture {self.sae.cfg.architecture()!r} is not supported: its decode is "
                "not f @ W_dec + b_dec"
            )


def afa_token_metrics(sae: SAE[Any], x: Tensor, x_out: Tensor | None = None) -> AFATokenMetrics:
    """Every quantity of the AFA metric for each token, for any SAE with a linear decoder.

    Args:
        sae: An SAE or training SAE of SAELens.
        x: Activations as the SAE's ``encode`` takes them ``[..., d_in]``. An SAE whose
            ``normalize_activations`` is still ``"expected_average_only_in"`` wants them scaled.
        x_out: Activations at the output hook ``[..., d_out]``, for transcoders.

    Returns:
        Tensors of the leading shape.

    Raises:
        ValueError: If the SAE is of a family that cannot be read, or the widths do not fit.

    Example:
        >>> from sae_afa_plugin import TopAFASAE, TopAFASAEConfig
        >>> sae = TopAFASAE(TopAFASAEConfig(d_in=64, d_sae=512))
        >>> metrics = afa_token_metrics(sae, torch.randn(4, 64))
        >>> (metrics.norm_f_centered / metrics.norm_z_centered - 1).abs().max() < 0.1
        tensor(True)
    """
    reason = why_not(sae.cfg.architecture(), "none", has_output_hook=True)
    if reason is not None:
        raise ValueError(reason)
    return AFAReader(sae)(x, x_out)
