"""As few features as explain a share of the input: architecture ``constant_quality``.

TopK holds the number of features of every token and BatchTopK their mean, whatever error that
leaves. This one holds the error, and a token that is harder to write gets more features: what
constant quality is to a constant rate in video coding, and error-constrained sparse coding to
sparsity-constrained.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from typing_extensions import override

from sae_afa_plugin import limits
from sae_afa_plugin.rules.residual import keep_until_explained
from sae_afa_plugin.saes.finite import mean_over_kept
from sae_afa_plugin.saes.topafa import (
    TopAFABase,
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)

ARCHITECTURE = "constant_quality"

_RATE = 0.01  # of the running mean of L0: about the last 100 steps
_SETTLED = 500  # steps, after which it says something


def _check(cfg: ConstantQualitySAEConfig | ConstantQualityTrainingSAEConfig) -> None:
    limits.real(cfg, "explained", more_than=0, below=1)
    limits.whole(cfg, "max_k", at_least=1, none=True)


class _ConstantQuality(TopAFABase):
    """What the inference and the training class share: the rule."""

    @override
    def choose(self, hidden_pre: Tensor, sae_in: Tensor, decoder_norm: Tensor) -> Tensor:
        """Keep the largest features until they explain the share (:func:`keep_until_explained`)."""
        y, W_dec = sae_in.detach(), self.W_dec.detach()
        max_k = self.cfg.max_k or self.cfg.d_in  # that many directions can say anything
        return keep_until_explained(
            hidden_pre, y, W_dec, self.cfg.explained, decoder_norm, max_k=max_k
        )


# --- inference ---


@dataclass
class ConstantQualitySAEConfig(TopAFASAEConfig):
    """
    Configuration class for ConstantQualitySAE inference.

    Args:
        explained (float): The share of ``||z - b_dec||^2`` that the kept features explain.
        max_k (int | None): No more features than that are kept. None: d_in.
        d_in (int): Input dimension (dimensionality of the activations being encoded).
            Inherited from SAEConfig.
        d_sae (int): SAE latent dimension (number of features in the SAE).
            Inherited from SAEConfig.
        dtype (str): Data type for the SAE parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Must be True. Inherited from SAEConfig.
        normalize_activations (Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]):
            Normalization strategy for input activations. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations
            (useful for attention head outputs). Inherited from SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE (model name, hook name, etc.).
            Inherited from SAEConfig.
    """

    explained: float = 0.9
    max_k: int | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()


class ConstantQualitySAE(_ConstantQuality, TopAFASAE):
    """
    An inference-only sparse autoencoder with as few features as explain a share of the input.

    Both of SAELens's foldings are exact.

    Example:
        >>> sae = ConstantQualitySAE(ConstantQualitySAEConfig(d_in=8, d_sae=32, explained=0.5))
        >>> sae.encode(torch.randn(5, 8)).shape
        torch.Size([5, 32])
    """

    cfg: ConstantQualitySAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]


# --- training ---


@dataclass
class ConstantQualityTrainingSAEConfig(TopAFATrainingSAEConfig):
    """
    Configuration class for training a ConstantQualityTrainingSAE.

    Args:
        explained (float): The share of ``||z - b_dec||^2`` that the kept features explain. It means
            the same in every layer and model; with too large a share all features are needed.
        max_k (int | None): No more features than that are kept. None: d_in.
        afa_coefficient (float): Weight of the AFA loss of topafa, which this architecture does
            without.
        afa_warm_up_steps (int): Number of steps over which afa_coefficient grows from 0.
        aux_loss_coefficient (float): Weight of the auxiliary loss, in which features that have
            not fired for the dead feature window reconstruct what the others leave over.
        top_k_aux (int): How many of the dead features take part for each token.
        train_encoder_bias (bool): Whether to train b_enc. It starts at zero.
        decoder_init_norm (float | None): Norm of the decoder rows. Always 1.0: the rows are kept
            at unit norm during training.
        normalize_activations (Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]):
            Normalization strategy for input activations. "layer_norm" standardises each token.
        d_in (int): Input dimension (dimensionality of the activations being encoded).
            Inherited from SAEConfig.
        d_sae (int): SAE latent dimension (number of features in the SAE).
            Inherited from SAEConfig.
        dtype (str): Data type for the SAE parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Must be True. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations
            (useful for attention head outputs). Inherited from SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE training (model name, hook name, etc.).
            Inherited from SAEConfig.
    """

    explained: float = 0.9
    max_k: int | None = None
    afa_coefficient: float = 0.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        _check(self)
        super().__post_init__()


class ConstantQualityTrainingSAE(_ConstantQuality, TopAFATrainingSAE):
    """
    A sparse autoencoder that holds the share of its input that is explained, for SAELens's trainers.

    The loss is the reconstruction error alone (and the auxiliary loss for dead features): as
    features become better, fewer of them explain the share, and L0 falls by itself. Where the share
    is too large for that, the SAE stays dense, and a warning says so. The rest, the unit rows of
    the decoder among them, is as in TopAFATrainingSAE.

    Example:
        >>> sae = ConstantQualityTrainingSAE(ConstantQualityTrainingSAEConfig(d_in=8, d_sae=32))
        >>> sae.cfg.explained
        0.9
    """

    cfg: ConstantQualityTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    running_l0: Tensor

    def __init__(self, cfg: ConstantQualityTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        # weights that are yet to be loaded are on "meta", where nothing can be counted
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        self.register_buffer("running_l0", torch.zeros((), device=device), persistent=False)
        self._steps_to_look = _SETTLED

    @override
    def train(self, mode: bool = True) -> ConstantQualityTrainingSAE:
        # SAELens's trainers call this before every step, outside of what they compile
        super().train(mode)
        self._steps_to_look -= mode
        if self._steps_to_look == 0:  # seldom, since the device has to answer
            self._steps_to_look = 0 if self._say_if_dense() else _SETTLED
        return self

    def _say_if_dense(self) -> bool:
        """Warn if a token takes more features than sparse coding is about."""
        l0 = float(self.running_l0)
        if l0 <= self.cfg.d_in / 2:
            return False
        warnings.warn(
            f"this {ARCHITECTURE} SAE keeps {l0:.0f} features of a token to explain "
            f"{self.cfg.explained:g} of its input, more than half of its {self.cfg.d_in} "
            "dimensions, so it is not sparse: lower explained, or set max_k",
            stacklevel=3,
        )
        return True

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """As for topafa. L0 is watched here, where it is known which tokens take part."""
        with torch.no_grad():
            l0 = mean_over_kept(feature_acts.count_nonzero(dim=-1), step_input.sae_in)
            self.running_l0.lerp_(l0.to(self.running_l0.dtype), _RATE)
        return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
