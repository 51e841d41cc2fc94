"""In which space each family of SAE reconstructs, and which families can be read.

An SAE with a linear decoder says ``z_hat = f @ W_dec + b_dec`` in some space z. This module
finds z, f and the decoder for every family of SAELens, so that metrics need not know them:

- input normalisation (``layer_norm``, ``constant_norm_rescale``): z is the normalised activation;
- a norm scaling that has been folded: z is the activation, the rows of W_dec are long;
- attention heads (``hook_z``): flattened, whether the SAE does it itself or not;
- transcoders: z is the activation at the *output* hook, less the skip term where there is one;
- TopK that rescales by decoder norms: f lives on the unit-norm dictionary already;
- matching pursuit without ``apply_b_dec_to_input``: the bias takes no part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor
from typing_extensions import override

from sae_afa_plugin._upstream import (
    Transcoder,
    encodes_batches,
    left_as_it_was,
    normalization_scale,
    normalized_input,
    reconstruction_of,
    without_hooks,
)
from sae_afa_plugin.metrics import AFATokenMetrics, exact_norm, metrics_from_sums

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


class Active(NamedTuple):
    """The active features of some tokens, one entry for each.

    Args:
        token: Which token ``[n_active]``, ascending.
        feature: Which feature ``[n_active]``.
        value: As ``encode`` returns it ``[n_active]``.
    """

    token: Tensor
    feature: Tensor
    value: Tensor


class EncodedTokens:
    """Some tokens as a dictionary writes them; what several metrics need is computed once.

    Args:
        code: The dictionary.
        f: Features ``[n, d_sae]``.
        z: What they are to add up to, with the bias ``[n, d_out]``.
        rows: Which tokens of a source these are.
    """

    def __init__(self, code: LinearCode, f: Tensor, z: Tensor, rows: slice):
        self.code, self.f, self.z, self.rows = code, f, z, rows

    def __len__(self) -> int:
        return len(self.f)

    @cached_property
    def finite(self) -> Tensor:
        """Which tokens have only finite features and a finite z, bool ``[n]``."""
        if self.few:  # their sum is finite: no look at each
            return torch.ones(len(self), dtype=torch.bool)
        return self.f.isfinite().all(-1) & self.z.isfinite().all(-1)

    @cached_property
    def few(self) -> bool:
        """Whether so few features are active that they are better read alone.

        Always False on other devices than the CPU, which would have to wait for the answer.
        """
        if self.f.device.type != "cpu":
            return False
        if int(self.f.count_nonzero()) > _SPARSE_BELOW * self.f.numel():
            return False
        return bool(self.f.sum().isfinite() & self.z.sum().isfinite())

    @cached_property
    def active(self) -> Active:
        """The active features alone."""
        token, feature = self.f.nonzero(as_tuple=True)
        return Active(token, feature, self.f[token, feature])

    @cached_property
    def l0(self) -> Tensor:
        """Number of active features ``[n]``."""
        if self.few:
            return torch.bincount(self.active.token, minlength=len(self))
        return self.f.count_nonzero(-1)

    @cached_property
    def fired(self) -> Tensor:
        """On how many finite tokens each feature is active, int64 ``[d_sae]``."""
        if self.few:
            return torch.bincount(self.active.feature, minlength=self.f.shape[-1])
        return ((self.f != 0) & self.finite[:, None]).sum(0)

    @cached_property
    def recons(self) -> Tensor:
        """The reconstruction without the bias ``[n, d_out]``."""
        if not self.few:
            return self.f @ self.code.W_dec
        return torch.nn.functional.embedding_bag(
            self.active.feature,
            self.code.W_dec,
            offsets=self.l0.cumsum(0) - self.l0,
            mode="sum",
            per_sample_weights=self.active.value,
        )

    @cached_property
    def norms(self) -> tuple[Tensor, Tensor]:
        """``sum |f_i| ||d_i||`` and ``sum (f_i ||d_i||)^2``, float64 ``[n]``."""
        if self.few:
            unit = (self.active.value * self.code.norms[self.active.feature]).double()
            sums = unit.new_zeros(2, len(self))
            sums.index_add_(1, self.active.token, torch.stack([unit.abs(), unit.square()]))
            return sums[0], sums[1]
        unit = self.f * self.code.norms
        l1 = torch.linalg.vector_norm(unit, ord=1, dim=-1, dtype=torch.float64)
        return l1, exact_norm(unit).square()

    def metrics(self) -> AFATokenMetrics:
        """The AFA metric of these tokens."""
        l1, squared_f = self.norms
        return metrics_from_sums(
            self.z, self.recons, self.code.b_dec, self.l0, l1, squared_f, self.f.shape[-1]
        )


class LinearCode(ABC):
    """A dictionary that says ``z_hat = f @ W_dec + b_dec``, whatever made it.

    Attributes:
        W_dec: The rows that features are multiplied with ``[d_sae, d_out]``, float32 at least.
        norms: Their norms ``[d_sae]``.
        b_dec: The bias ``[d_out]``.
        d_in: Width of what is encoded.
        per_token: Whether a token's features depend on that token alone. Where they depend on
            the batch, so does every score.
        identity: What tells it from others that have the same tensors; None: nobody can say, so
            results of an object are not taken for those of another.
    """

    W_dec: Tensor
    norms: Tensor
    b_dec: Tensor
    d_in: int
    per_token: bool = True
    identity: str | None = None

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Activations ``[n, d_in]`` to features ``[n, d_sae]``."""

    def target(self, x: Tensor, x_out: Tensor | None) -> Tensor:
        """What features and bias add up to if the dictionary is perfect: z ``[n, d_out]``."""
        del x_out
        return x

    def scale(self, x: Tensor) -> Tensor:
        """How much a unit of z is in the activation, for each token ``[n, 1]``."""
        return torch.ones(len(x), 1, dtype=self.W_dec.dtype, device=self.W_dec.device)

    def decoded(self, x: Tensor) -> Tensor | None:
        """What the SAE itself makes of activations, in z's space; None if that is unknown."""
        del x
        return None

    @torch.no_grad()
    def check(self, x: Tensor, name: str) -> None:
        """Make sure, on a few tokens, that scores will mean what they say.

        Args:
            x: Activations; eight tokens are enough.
            name: What the dictionary is called in messages.

        Raises:
            ValueError: If the SAE does not decode as this class says, or if a token's features
                depend on the other tokens of the batch.
        """
        x = self.flat(x, self.d_in)
        x = x[x.isfinite().all(-1)]  # the others say nothing
        if len(x) == 0:
            return
        f = self.encode(x)
        if self.per_token:
            alone = torch.cat([self.encode(token[None]) for token in x])
            n_different = int(((f != 0) != (alone != 0)).sum())
            # rounding may switch a feature or two
            self.per_token = n_different <= max(2, 0.05 * int(f.count_nonzero()))
        if not self.per_token:
            raise ValueError(
                f"{name} encodes whole batches: how many features a token has depends on the "
                "tokens beside it, and so would every score. Save it for inference "
                "(save_inference_model) and evaluate that"
            )
        decoded = self.decoded(x)
        expected = f.to(self.W_dec.dtype) @ self.W_dec + self.b_dec
        finite = expected.isfinite().all(-1)
        expected = expected[finite]
        if decoded is None or len(expected) == 0:
            return
        # low precision: the SAE's own sum rounds, ours does not
        exact = torch.finfo(decoded.dtype).eps < 1e-4
        slack = (1e-3 if exact else 0.05) * expected.abs().max().item()
        if not torch.allclose(decoded.to(expected)[finite], expected, rtol=0, atol=slack):
            raise ValueError(f"{name} is not supported: its decode is not f @ W_dec + b_dec")

    @torch.no_grad()
    def read(self, x: Tensor, x_out: Tensor | None = None, rows: slice = slice(0)) -> EncodedTokens:
        """Encode tokens.

        Args:
            x: Activations ``[n, d_in]``; heads may be flattened or not.
            x_out: Activations at the output hook ``[n, d_out]``, for transcoders.
            rows: Which tokens of a source these are.

        Raises:
            ValueError: If the activations have another width, or a transcoder gets no ``x_out``.
        """
        x = self.flat(x, self.d_in)
        if x_out is not None:
            x_out = self.flat(x_out, self.W_dec.shape[1]).to(self.W_dec.dtype)
        f = self.encode(x).to(self.W_dec.dtype)
        return EncodedTokens(self, f, self.target(x, x_out).to(self.W_dec.dtype), rows)

    def flat(self, x: Tensor, width: int) -> Tensor:
        """Activations with their heads flattened, on the device of the dictionary.

        Raises:
            ValueError: If they have another width.
        """
        if x.shape[-1] != width and x.ndim > 2 and x.shape[-2] * x.shape[-1] == width:
            x = x.flatten(-2)
        if x.shape[-1] != width:
            raise ValueError(
                f"this SAE reads activations of width {width}, but they have shape "
                f"{tuple(x.shape)}: use the hook it was made for"
            )
        return x.to(self.W_dec.device)

    def _set_decoder(self, W_dec: Tensor, b_dec: Tensor, unit_rows: bool = False) -> None:
        """Keep the decoder in float32 at least; with ``unit_rows``, only its directions."""
        if W_dec.device.type == "mps":
            raise ValueError(
                "the AFA metric needs float64, which MPS does not have: move the SAE to the CPU"
            )
        if n_bad := int((~W_dec.detach().isfinite().all(-1)).sum()):
            raise ValueError(
                f"{n_bad} of the {len(W_dec)} decoder rows are NaN or infinite: the SAE has diverged "
                "or its file is damaged"
            )
        dtype = torch.promote_types(W_dec.dtype, torch.float32)
        self.W_dec, self.b_dec = W_dec.detach().to(dtype), b_dec.detach().to(dtype)
        self.norms = exact_norm(self.W_dec).to(dtype)
        if unit_rows:
            self.W_dec = self.W_dec / self.norms[:, None]
            self.norms = torch.ones_like(self.norms)


class SAELensCode(LinearCode):
    """An SAE or training SAE of SAELens. Its weights must not change while this is used.

    Args:
        sae: The SAE; it is left as it was.
    """

    def __init__(self, sae: SAE[Any]):
        self.sae, self.d_in = sae, sae.cfg.d_in
        on_unit_rows = bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))
        b_dec = sae.b_dec
        if sae.cfg.architecture() == "matching_pursuit" and not sae.cfg.apply_b_dec_to_input:
            b_dec = torch.zeros_like(b_dec)
        self._set_decoder(sae.W_dec, b_dec, unit_rows=on_unit_rows)
        self.per_token = not encodes_batches(sae)

    @override
    def encode(self, x: Tensor) -> Tensor:
        with left_as_it_was(self.sae), without_hooks(self.sae):
            f = self.sae.encode(x)
        return f.to_dense() if f.is_sparse else f

    @override
    def target(self, x: Tensor, x_out: Tensor | None) -> Tensor:
        if not isinstance(self.sae, Transcoder):
            return normalized_input(self.sae, x)
        if x_out is None:
            raise ValueError(
                "a transcoder's features reconstruct the activation at its output hook: pass it "
                "as x_out"
            )
        W_skip = getattr(self.sae, "W_skip", None)
        return x_out if W_skip is None else x_out - x.to(x_out.dtype) @ W_skip.T.to(x_out)

    @override
    def scale(self, x: Tensor) -> Tensor:
        return normalization_scale(self.sae, x).to(self.W_dec)

    @override
    def decoded(self, x: Tensor) -> Tensor | None:
        with without_hooks(self.sae):
            seen = reconstruction_of(self.sae, x)
        # a decoder that does not say what it makes cannot be known to be right
        return x.new_full((len(x), self.W_dec.shape[1]), torch.nan) if seen is None else seen


class DictionaryCode(LinearCode):
    """A dictionary that is known as tensors, with any encoder.

    Args:
        W_dec: Directions ``[d_sae, d]``, of any norm.
        encode: Activations ``[n, d]`` to features ``[n, d_sae]``.
        b_dec: Bias ``[d]``; None: zero.
        decode: How it decodes, where that is to be checked.

    Example:
        >>> code = DictionaryCode(torch.eye(4), lambda x: x.relu())
        >>> code.read(torch.tensor([[1.0, -2.0, 0.0, 2.0]])).l0
        tensor([2])
    """

    def __init__(
        self,
        W_dec: Tensor,
        encode: Callable[[Tensor], Tensor],
        b_dec: Tensor | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ):
        self._set_decoder(W_dec, W_dec.new_zeros(W_dec.shape[1]) if b_dec is None else b_dec)
        self._encode, self._decode, self._dtype = encode, decode, W_dec.dtype
        self.d_in = W_dec.shape[1]

    @override
    def encode(self, x: Tensor) -> Tensor:
        f = self._encode(x.to(self._dtype))
        return f.to_dense() if f.is_sparse else f

    @override
    def decoded(self, x: Tensor) -> Tensor | None:
        return None if self._decode is None else self._decode(self.encode(x))


def linear_code(sae: Any) -> LinearCode:
    """In which space an SAE reconstructs, and with which dictionary.

    Args:
        sae: An SAE or training SAE of SAELens, a :class:`LinearCode`, or any object with
            ``encode``, ``decode``, ``W_dec`` and ``b_dec``.

    Raises:
        TypeError: If it is nothing of these.

    Example:
        >>> from sae_lens import StandardSAE, StandardSAEConfig
        >>> code = linear_code(StandardSAE(StandardSAEConfig(d_in=8, d_sae=32)))
        >>> code.read(torch.randn(5, 8)).recons.shape
        torch.Size([5, 8])
    """
    if isinstance(sae, LinearCode):
        return sae
    if isinstance(sae, SAE):
        return SAELensCode(sae)
    missing = [name for name in ("encode", "decode", "W_dec", "b_dec") if not hasattr(sae, name)]
    if missing:
        raise TypeError(f"{type(sae).__name__} is no SAE: it has no {' and no '.join(missing)}")
    return DictionaryCode(sae.W_dec, sae.encode, sae.b_dec, sae.decode)


def afa_token_metrics(sae: Any, x: Tensor, x_out: Tensor | None = None) -> AFATokenMetrics:
    """Every quantity of the AFA metric for each token, for any SAE with a linear decoder.

    Args:
        sae: An SAE or training SAE of SAELens, or what :func:`linear_code` takes besides.
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
    if isinstance(sae, SAE):
        reason = why_not(sae.cfg.architecture(), "none", has_output_hook=True)
        if reason is not None:
            raise ValueError(reason)
    code = linear_code(sae)
    x = code.flat(x, code.d_in)
    if x_out is not None:
        x_out = code.flat(x_out, code.W_dec.shape[1])
        x_out = x_out.reshape(-1, x_out.shape[-1])
    metrics = code.read(x.reshape(-1, code.d_in), x_out).metrics()
    return AFATokenMetrics(*(column.view(x.shape[:-1]) for column in metrics))
