"""Top-AFA that stays sparse: architecture ``sparse_topafa``.

The norm of the input proposes features, as in ``topafa``; then each has to be worth its price. The
proposal is the rule of Lee, Davies, Canby and Hockenmaier, "Evaluating and Designing Sparse
Autoencoders by Approximating Quasi-Orthogonality" (COLM 2025, arXiv 2503.24277). The price has the
form of the universal threshold of Donoho and Johnstone, "Ideal spatial adaptation by wavelet
shrinkage" (1994), and of the risk inflation criterion of Foster and George (1994): 2 ln(d_sae)
times the noise per dimension is what the best of d_sae random directions explains of noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_afa_plugin import limits
from sae_afa_plugin.rules.operator import keep_prefix
from sae_afa_plugin.rules.residual import leave_one_out
from sae_afa_plugin.saes.finite import mean_over_kept
from sae_afa_plugin.saes.topafa import (
    TopAFABase,
    TopAFASAE,
    TopAFASAEConfig,
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
)

ARCHITECTURE = "sparse_topafa"

_RATE = 0.01  # of running means: about the last 100 steps
_LEAST_NOISE = 0.07  # of the energy; less than that is left by better features, not by less noise
_GAIN = 0.05  # of the controller: how much of a deviation of log L0 goes into the log of the price


def _check_bounds(cfg: SparseTopAFASAEConfig | SparseTopAFATrainingSAEConfig) -> None:
    limits.real(cfg, "leniency")
    if cfg.leniency > 1:
        raise ValueError(f"leniency is a number between 0 and 1: got {cfg.leniency}")
    limits.whole(cfg, "min_k")
    limits.whole(cfg, "max_k", at_least=1, none=True)
    if cfg.max_k is not None and cfg.min_k > cfg.max_k:
        raise ValueError(
            f"min_k must be at most max_k: got min_k={cfg.min_k} and max_k={cfg.max_k}"
        )


class _SparseTopAFA(TopAFABase):
    """What the inference and the training class share: the rule, and the price as a buffer."""

    price: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("price", torch.zeros((), device=self.device))

    @override
    def choose(self, hidden_pre: Tensor, sae_in: Tensor, decoder_norm: Tensor) -> Tensor:
        """Propose with :func:`top_afa`, then drop what is not worth the price."""
        proposed = super().choose(hidden_pre, sae_in, decoder_norm)
        y, W_dec = sae_in.detach(), self.W_dec.detach()
        feature_acts = leave_one_out(
            proposed, y, W_dec, self.price, decoder_norm, leniency=self.cfg.leniency
        )
        if self.cfg.min_k:
            largest = self._largest(hidden_pre, self.cfg.min_k, decoder_norm)
            feature_acts = torch.where(largest != 0, largest, feature_acts)
        if self.cfg.max_k is not None:
            feature_acts = self._largest(feature_acts, self.cfg.max_k, decoder_norm)
        return feature_acts

    @staticmethod
    def _largest(acts: Tensor, k: int, decoder_norm: Tensor) -> Tensor:
        target = torch.full(acts.shape[:-1], float(k), device=acts.device)
        return keep_prefix(acts, target, decoder_norm, p=0)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.price /= scaling_factor**2  # it is in the units of a squared activation


# --- inference ---


@dataclass
class SparseTopAFASAEConfig(TopAFASAEConfig):
    """
    Configuration class for SparseTopAFASAE inference.

    Args:
        leniency (float): Between 0 and 1: how far a feature is judged by its direction alone
            (see leave_one_out).
        min_k (int): The min_k largest features are kept whatever they are worth.
        max_k (int | None): No more than the max_k largest are kept.
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

    leniency: float = 0.5
    min_k: int = 0
    max_k: int | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        _check_bounds(self)
        super().__post_init__()


class SparseTopAFASAE(_SparseTopAFA, TopAFASAE):
    """
    An inference-only sparse autoencoder that keeps features which are worth their price.

    The features that the norm of the input proposes (:func:`sae_afa_plugin.top_afa`), without those
    that can be left out for less than ``price`` (:func:`sae_afa_plugin.leave_one_out`). The price is
    a number of the file, so a token's features depend on that token alone. Both of SAELens's
    foldings are exact.

    Example:
        >>> sae = SparseTopAFASAE(SparseTopAFASAEConfig(d_in=8, d_sae=32, max_k=3))
        >>> feature_acts = sae.encode(torch.randn(5, 8))
        >>> feature_acts.shape, sae.price
        (torch.Size([5, 32]), tensor(0.))
    """

    cfg: SparseTopAFASAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]


# --- training ---


@dataclass
class SparseTopAFATrainingSAEConfig(TopAFATrainingSAEConfig):
    """
    Configuration class for training a SparseTopAFATrainingSAE.

    Nothing has to be set: neither a number of features nor a coefficient of sparsity.

    Args:
        price (float): What a feature has to be worth, in units of 2 ln(d_sae) times the noise per
            dimension (see SparseTopAFATrainingSAE). Larger means fewer features.
        price_warm_up_steps (int): Number of steps over which price grows from 0.
        target_l0 (float | None): The mean number of active features to steer to, by raising or
            lowering the price during training. None: price says it.
        leniency (float): Between 0 and 1: how far a feature is judged by its direction alone
            (see leave_one_out).
        min_k (int): The min_k largest features are kept whatever they are worth.
        max_k (int | None): No more than the max_k largest are kept.
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

    price: float = 0.5
    price_warm_up_steps: int = 0
    target_l0: float | None = None
    leniency: float = 0.5
    min_k: int = 0
    max_k: int | None = None
    afa_coefficient: float = 0.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        limits.real(self, "price")
        limits.whole(self, "price_warm_up_steps")
        limits.real(self, "target_l0", more_than=0, none=True)
        _check_bounds(self)
        super().__post_init__()


class SparseTopAFATrainingSAE(_SparseTopAFA, TopAFATrainingSAE):
    """
    A sparse autoencoder whose features have to be worth their price, for SAELens's trainers.

    It is told no number of features. The loss is the reconstruction error alone (and the auxiliary
    loss for dead features); what keeps it sparse is the rule. Each feature has to save ::

        price * 2 ln(d_sae) * noise,  noise = max(||r||^2, 0.07 ||z - b_dec||^2) / d_in

    of ``||r||^2``, with r what the kept features leave over. Both squares are means over tokens and
    recent steps, so the price is the same for all tokens of a step. Where features become better
    and better, the noise is a share of the energy, or L0 would grow for as long as they do. The
    rest, the unit rows of the decoder among them, is as in TopAFATrainingSAE.

    Example:
        >>> cfg = SparseTopAFATrainingSAEConfig(d_in=8, d_sae=32)
        >>> sae = SparseTopAFATrainingSAE(cfg)
        >>> sorted(sae.get_coefficients())
        ['afa', 'price']
    """

    cfg: SparseTopAFATrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    running_residual: Tensor
    running_energy: Tensor
    price_factor: Tensor

    def __init__(self, cfg: SparseTopAFATrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        for name, start in (("running_residual", 0), ("running_energy", 0), ("price_factor", 1)):
            self.register_buffer(name, torch.tensor(float(start), device=self.device))

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        price = TrainCoefficientConfig(self.cfg.price, self.cfg.price_warm_up_steps)
        return {**super().get_coefficients(), "price": price}

    def noise(self) -> Tensor:
        """What no feature explains, per dimension, as the price sees it."""
        return self.running_residual.maximum(_LEAST_NOISE * self.running_energy)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One forward pass with its losses, at the price that the last steps have made."""
        price = step_input.coefficients.get("price", self.cfg.price)
        with torch.no_grad():
            unit = 2 * math.log(self.cfg.d_sae) * self.noise()
            self.price.copy_(price * self.price_factor * unit)
        output = super().training_forward_pass(step_input)
        output.metrics["price"] = self.price.clone()
        return output

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """As for topafa. What the next price is made of is measured here, where z is at hand."""
        with torch.no_grad():
            z = step_input.sae_in
            for running, what in (
                (self.running_residual, z - sae_out),
                (self.running_energy, z - self.b_dec),
            ):
                now = mean_over_kept(what.square().mean(dim=-1), z)
                running.lerp_(now.to(running.dtype), _RATE)
            if self.cfg.target_l0 is not None:
                l0 = mean_over_kept(feature_acts.count_nonzero(dim=-1), z)
                off = (l0 / self.cfg.target_l0).log().clamp(-1, 1)
                self.price_factor.mul_((_GAIN * off).exp())
        return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """As for topafa; of the price, the number alone is kept."""
        super().process_state_dict_for_saving_inference(state_dict)
        for name in ("running_residual", "running_energy", "price_factor"):
            del state_dict[name]
