"""The top-AFA sparse autoencoder for SAELens: architecture ``topafa``.

Paper: Lee, Davies, Canby and Hockenmaier, "Evaluating and Designing Sparse Autoencoders by
Approximating Quasi-Orthogonality" (COLM 2025, arXiv 2503.24277). Public code of the paper:
SewoongLee/top-afa-sae (MIT). This is an independent implementation for SAELens's classes.

The activation needs the norm of the input beside the pre-activations, so the classes override
the encoders instead of ``activation_fn``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens.saes.sae import (
    SAE,
    SAEConfig,
    SAEMetadata,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

from sae_afa_plugin import limits
from sae_afa_plugin._upstream import (
    has_gradient_hook,
    has_hooks,
    rebind_functions,
    without_bound_functions,
)
from sae_afa_plugin.metrics import AFATokenMetrics, norm_along_last, token_metrics
from sae_afa_plugin.rules.operator import top_afa
from sae_afa_plugin.saes import sparse
from sae_afa_plugin.saes.dead_features import dead_reconstruction
from sae_afa_plugin.saes.finite import LEFT_OUT_METRIC, LeftOut, check_weights

ARCHITECTURE = "topafa"


# --- shared ---


def _check_config(cfg: SAEConfig) -> None:
    """Refuse values that make no SAE, or contradict the definition of ``||z - b_dec||``."""
    limits.whole(cfg, "d_in", at_least=2 if cfg.normalize_activations == "layer_norm" else 1)
    limits.whole(cfg, "d_sae", at_least=2)  # one direction is not nearly orthogonal to others
    limits.dtype_and_device(cfg)
    limits.truth(cfg, "apply_b_dec_to_input")
    limits.choice(cfg, "reshape_activations", ("none", "hook_z"))
    if isinstance(cfg.metadata, dict):  # as SAELens passes what it has read
        cfg.metadata = SAEMetadata(**cfg.metadata)
    limits.kind(cfg, "metadata", SAEMetadata)
    if not cfg.apply_b_dec_to_input:
        raise ValueError(
            f"{cfg.architecture()} needs apply_b_dec_to_input=True, because the number of features "
            "it keeps is defined by ||z - b_dec||: got apply_b_dec_to_input=False"
        )
    if cfg.normalize_activations == "covariance_whitening":
        raise ValueError(
            f"{cfg.architecture()} cannot use normalize_activations='covariance_whitening', because whitening "
            "does not preserve the norm that decides how many features are kept: use "
            "'layer_norm', 'expected_average_only_in', 'constant_norm_rescale' or 'none'"
        )


class TopAFABase(SAE[Any]):
    """What the inference and the training class share.

    Another rule is another architecture: a subclass of each that overrides :meth:`choose`, with
    its configs and a name of its own.
    """

    b_enc: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        """The paper's initialisation: half of all features start active, with the right norm.

        ``W_enc`` is Kaiming-uniform over ``d_sae``, so that E||relu(z @ W_enc)||^2 = ||z||^2.
        ``W_dec`` is its transpose with unit rows.
        """
        d_in, d_sae = self.cfg.d_in, self.cfg.d_sae
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(d_in, **kind))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **kind))
        self.W_enc = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d_in, d_sae, **kind)))
        directions = self.W_enc.detach().T
        self.W_dec = nn.Parameter((directions / directions.norm(dim=-1, keepdim=True)).contiguous())

    def __getstate__(self) -> dict[str, Any]:
        return without_bound_functions(vars(self))

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        rebind_functions(self)

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """Normalise the input and subtract ``b_dec``: ``[..., d_in]`` to z - b_dec."""
        # attention heads are two dimensions until they are flattened
        n_last = 2 if self.hook_z_reshaping_mode else 1
        if math.prod(sae_in.shape[-n_last:]) != self.cfg.d_in:
            raise ValueError(
                f"this {self.cfg.architecture()} SAE has d_in={self.cfg.d_in}, but the activations have shape "
                f"{tuple(sae_in.shape)}: use the hook it was made for, or another d_in"
            )
        return super().process_sae_in(sae_in)

    def decoder_norm(self) -> Tensor:
        """Norms of the decoder's rows ``[d_sae]``, in float32 at least, without gradient."""
        return norm_along_last(self.W_dec.detach())

    def choose(self, hidden_pre: Tensor, sae_in: Tensor, decoder_norm: Tensor) -> Tensor:
        """The rule: which features of a token are kept. This one is :func:`top_afa`.

        Whatever is not kept is zero, and its gradient has to be stopped: with few features
        the decoder's backward pass does not look at what is zero.

        Args:
            hidden_pre: Pre-activations ``[..., d_sae]``, without a ReLU.
            sae_in: z - b_dec ``[..., d_in]``. Zero for tokens that are left out of training.
            decoder_norm: Norms of the decoder's rows ``[d_sae]``, without gradient.

        Returns:
            Feature activations ``[..., d_sae]``.
        """
        # top_afa never keeps what is not positive, so no ReLU has to run before it
        return top_afa(hidden_pre, norm_along_last(sae_in).detach(), decoder_norm)

    def encode_centered(
        self, sae_in: Tensor, decoder_norm: Tensor, b_enc: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode z - b_dec ``[..., d_in]``, as :meth:`process_sae_in` returns it.

        Args:
            sae_in: z - b_dec ``[..., d_in]``.
            decoder_norm: What :meth:`decoder_norm` returns.
            b_enc: What is used in place of ``self.b_enc`` ``[d_sae]``, if anything.

        Returns:
            Feature activations and pre-activations, both ``[..., d_sae]``.
        """
        b_enc = self.b_enc if b_enc is None else b_enc
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + b_enc)
        feature_acts = self.choose(hidden_pre, sae_in, decoder_norm)
        return self.hook_sae_acts_post(feature_acts), hidden_pre

    def decode_normalized(self, feature_acts: Tensor, zeros_stay_zero: bool = False) -> Tensor:
        """Reconstruct z, the normalised input: ``[..., d_sae]`` to ``[..., d_in]``.

        ``zeros_stay_zero`` says that no gradient is wanted for features that are zero.
        """
        recons = sparse.decode(feature_acts, self.W_dec, zeros_stay_zero)
        return self.hook_sae_recons(recons + self.b_dec)

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruct the activations at the hook: ``[..., d_sae]`` to ``[..., d_in]``."""
        sae_out = self.run_time_activation_norm_fn_out(self.decode_normalized(feature_acts))
        return self.reshape_fn_out(sae_out, self.d_head)

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Fold the factor of the input into the weights.

        Raises:
            ValueError: If it is not a positive number.
        """
        if not 0 < scaling_factor < math.inf:
            raise ValueError(
                f"the scaling factor of activations is {scaling_factor}, which cannot be folded "
                "into weights: activations that it was estimated from were NaN, infinite or zero"
            )
        super().fold_activation_norm_scaling_factor(scaling_factor)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Refuse weights that are NaN or infinite with a ValueError, before a file is written."""
        super().process_state_dict_for_saving(state_dict)
        check_weights(f"this {self.cfg.architecture()} SAE", state_dict)

    @override
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        """Refused: whitening changes ``||z - b_dec||`` and so the features that are kept."""
        raise NotImplementedError(
            f"a whitening cannot be folded into a {self.cfg.architecture()} SAE, because it does "
            "not preserve the norm that decides how many features are kept"
        )


# --- inference ---


@dataclass
class TopAFASAEConfig(SAEConfig):
    """
    Configuration class for TopAFASAE inference.

    Args:
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

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        _check_config(self)


class TopAFASAE(TopAFABase, SAE[TopAFASAEConfig]):
    """
    An inference-only sparse autoencoder with the top-AFA activation function.

    Keeps for each input as many features as bring the norm of the feature vector nearest to the
    norm of the input (see :func:`sae_afa_plugin.top_afa`). Both of SAELens's foldings are exact.

    Example:
        >>> sae = TopAFASAE(TopAFASAEConfig(d_in=8, d_sae=32))
        >>> feature_acts = sae.encode(torch.randn(5, 8))
        >>> feature_acts.shape, sae.decode(feature_acts).shape
        (torch.Size([5, 32]), torch.Size([5, 8]))
    """

    cfg: TopAFASAEConfig

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Activations at the hook ``[..., d_in]`` to features ``[..., d_sae]``."""
        feature_acts, _ = self.encode_centered(self.process_sae_in(x), self.decoder_norm())
        return feature_acts


# --- training ---


@dataclass
class TopAFATrainingSAEConfig(TrainingSAEConfig):
    """
    Configuration class for training a TopAFATrainingSAE.

    Coefficients are in the paper's units (losses as means over d_in); SAELens's losses are sums
    over d_in, so the code multiplies by d_in.

    Args:
        afa_coefficient (float): Weight of the AFA loss, the squared difference between the norm
            of the features and the norm of the input. The paper uses 1/128 to 1/16; larger
            means more active features.
        afa_warm_up_steps (int): Number of steps over which afa_coefficient grows from 0.
        aux_loss_coefficient (float): Weight of the auxiliary loss, in which features that have
            not fired for the dead feature window reconstruct what the others leave over.
        top_k_aux (int): How many of the dead features take part for each token.
        train_encoder_bias (bool): Whether to train b_enc. It starts at zero and the paper does
            not use it.
        decoder_init_norm (float | None): Norm of the decoder rows. Always 1.0: the rows are kept
            at unit norm during training.
        normalize_activations (Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]):
            Normalization strategy for input activations. The paper standardises each token,
            which is "layer_norm".
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

    afa_coefficient: float = 1 / 32
    afa_warm_up_steps: int = 0
    aux_loss_coefficient: float = 1 / 32
    top_k_aux: int = 512
    train_encoder_bias: bool = False
    decoder_init_norm: float | None = 1.0
    normalize_activations: str = "layer_norm"  # pyright: ignore[reportIncompatibleVariableOverride, reportAssignmentType]

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        limits.real(self, "decoder_init_norm", none=True)
        limits.real(self, "afa_coefficient", "aux_loss_coefficient")
        limits.whole(self, "afa_warm_up_steps", "top_k_aux")
        limits.truth(self, "train_encoder_bias")
        if self.decoder_init_norm != 1.0:
            warnings.warn(
                f"topafa keeps its decoder rows at unit norm: decoder_init_norm is set to 1.0 "
                f"(got {self.decoder_init_norm})",
                stacklevel=3,
            )
            self.decoder_init_norm = 1.0
        _check_config(self)
        super().__post_init__()


def _hold_unit_rows(W_dec: Tensor) -> None:
    """Remove the gradient along each row of the decoder and set the row to unit norm.

    A hook that autograd calls once the gradient of ``W_dec`` is complete, so before the clipping
    and the step of whatever trainer or optimizer is used.
    """
    # .data: nothing in this backward pass reads W_dec any more, autograd need not know. (Each
    # backward pass belongs to the forward pass before it, as in every trainer of SAELens.)
    rows, grad = W_dec.data, W_dec.grad
    rows.div_(norm_along_last(rows).clamp(min=1e-8)[:, None])
    if grad is not None:
        along = torch.linalg.vecdot(grad, rows, dim=-1)
        grad.addcmul_(rows, along[:, None], value=-1)


class _FeatureNorm(torch.autograd.Function):
    """``||f * decoder_norm||`` of each token, which keeps no ``[..., d_sae]`` of its own."""

    @staticmethod
    def forward(ctx: Any, feature_acts: Tensor, decoder_norm: Tensor) -> Tensor:
        norm = norm_along_last(feature_acts * decoder_norm)
        ctx.save_for_backward(feature_acts, decoder_norm, norm)
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        feature_acts, decoder_norm, norm = ctx.saved_tensors
        factor = torch.where(norm > 0, grad / norm, 0)[..., None]
        return (feature_acts * decoder_norm.square()).mul_(factor).to(feature_acts.dtype), None


class TopAFATrainingSAE(TopAFABase, TrainingSAE[TopAFATrainingSAEConfig]):
    """
    A sparse autoencoder with the top-AFA activation function, for SAELens's trainers.

    The loss, with z the normalised input and f the features, is d_in times the paper's::

        ||z - z_hat||^2 + d_in * afa_coefficient * (||f|| - ||z||)^2 + auxiliary loss

    all in the space of z. The rows of the decoder are kept at unit norm by a hook on the
    parameter, so no trainer has to know about it: in the backward pass the gradient along each
    row is removed and the row set to unit norm. After an optimizer step the rows are off by the
    size of that step; ``save_inference_model`` folds the remainder into the encoder.

    Example:
        >>> cfg = TopAFATrainingSAEConfig(d_in=8, d_sae=32)
        >>> sae = TopAFATrainingSAE(cfg)
        >>> sorted(sae.get_coefficients())
        ['afa']
    """

    cfg: TopAFATrainingSAEConfig

    def __init__(self, cfg: TopAFATrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.left_out = LeftOut(f"this {cfg.architecture()} SAE", self.device)
        self.b_enc.requires_grad_(cfg.train_encoder_bias)
        self._hold_decoder_rows()

    def _hold_decoder_rows(self) -> None:
        """Put the hook on the decoder, unless it is there: copying or loading may lose it."""
        if self.W_dec.requires_grad and not has_gradient_hook(self.W_dec, _hold_unit_rows):
            self.W_dec.register_post_accumulate_grad_hook(_hold_unit_rows)

    @override
    def train(self, mode: bool = True) -> TopAFATrainingSAE:
        # SAELens's trainers call this before every step, outside of what they compile
        self._hold_decoder_rows()
        self.left_out.say()
        return super().train(mode)

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations ``[..., d_in]`` to features and pre-activations ``[..., d_sae]``."""
        return self.encode_centered(self.process_sae_in(x), self.decoder_norm())

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {
            "afa": TrainCoefficientConfig(
                value=self.cfg.afa_coefficient,
                warm_up_steps=self.cfg.afa_warm_up_steps,
            )
        }

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One forward pass with its losses, all of them in the space of z.

        Tokens with NaN or infinity are left out: they have no part in any loss or gradient, and
        are counted.
        """
        if not torch.compiler.is_compiling():
            self._hold_decoder_rows()
        sae_in = self.process_sae_in(step_input.sae_in)
        decoder_norm = self.decoder_norm()
        b_enc = self.b_enc
        if not (step_input.sae_in.requires_grad or has_hooks(self.hook_sae_input)):
            # Of the input's gradient only the part of b_dec is wanted, which is one row. The
            # matrix is not computed for it: b_dec acts through a bias of zero instead.
            b_enc = b_enc - (self.b_dec - self.b_dec.detach()) @ self.W_enc.detach()
            sae_in = sae_in.detach()
        # in place of rows that are taken out, whose number only the device knows: rows of zeros
        keep = self.left_out.keep(sae_in)
        sae_in = torch.where(keep, sae_in, 0)
        feature_acts, hidden_pre = self.encode_centered(sae_in, decoder_norm, b_enc)
        z = torch.where(keep, sae_in + self.b_dec, 0).detach()
        # the rule stops the gradient of what it leaves out, unless a hook came in between
        z_recons = self.decode_normalized(
            feature_acts, zeros_stay_zero=not has_hooks(self.hook_sae_acts_post)
        )
        sae_out = self.run_time_activation_norm_fn_out(z_recons)
        z_recons = torch.where(keep, z_recons, 0)

        mse_loss = self.mse_loss_fn(z_recons, z).sum(dim=-1).mean()
        losses = self.calculate_aux_loss(
            replace(step_input, sae_in=z), feature_acts, hidden_pre, z_recons
        )
        # from means over all tokens to means over those that are kept
        exact = torch.promote_types(mse_loss.dtype, torch.float32)
        of_all = keep.numel() / keep.sum(dtype=exact).clamp(min=1)
        losses = {name: loss * of_all for name, loss in {"mse_loss": mse_loss, **losses}.items()}
        if not torch.compiler.is_compiling():
            self.left_out.say()
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            metrics=_metrics(
                keep=keep[..., 0],
                n_left_out=self.left_out.count.clone(),
                z=z,
                z_recons=z_recons.detach(),
                feature_acts=feature_acts.detach(),
                decoder_norm=decoder_norm,
                b_dec=self.b_dec.detach().clone(),
                dead_neuron_mask=step_input.dead_neuron_mask,
            ),
        )

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The AFA loss and the auxiliary reconstruction loss, scaled like SAELens's MSE.

        Tokens that are left out come with z and its reconstruction zero, and have no loss.

        Args:
            step_input: The step, with ``sae_in`` the normalised input z ``[batch, d_in]``.
            feature_acts: Features ``[batch, d_sae]``.
            hidden_pre: Pre-activations ``[batch, d_sae]``.
            sae_out: The reconstruction of z ``[batch, d_in]``.
        """
        z = step_input.sae_in
        # The gradient through the row norms runs along the rows, where it would be removed.
        norm_f: Tensor = _FeatureNorm.apply(feature_acts, self.decoder_norm())  # pyright: ignore
        coefficient = step_input.coefficients.get("afa", self.cfg.afa_coefficient)
        norm_z, residual = norm_along_last(z), z - sae_out
        left_out = (norm_z == 0) & ~residual.detach().any(dim=-1)
        # the bias alone may have made features of theirs
        afa_loss = torch.where(left_out, 0, norm_f - norm_z).square().mean()
        return {
            "afa_loss": self.cfg.d_in * coefficient * afa_loss,
            "auxiliary_reconstruction_loss": self.cfg.aux_loss_coefficient
            * self._dead_feature_loss(residual, hidden_pre, step_input.dead_neuron_mask),
        }

    def _dead_feature_loss(
        self, residual: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        """How badly the dead features reconstruct the residual: a sum over d_in.

        Where there is none, as for tokens that are left out, there is nothing to reconstruct.
        """
        if dead_neuron_mask is None:
            return residual.new_zeros(())
        any_dead = dead_neuron_mask.any()
        # A compiled step cannot look at the mask, and multiplies by zero instead of returning.
        if not torch.compiler.is_compiling() and not any_dead:
            return residual.new_zeros(())
        recons = dead_reconstruction(
            hidden_pre.reshape(-1, self.cfg.d_sae), self.W_dec, dead_neuron_mask, self.cfg.top_k_aux
        ).view_as(residual)
        recons = torch.where(residual.detach().any(dim=-1, keepdim=True), recons, 0)
        return any_dead * self.mse_loss_fn(recons, residual).sum(dim=-1).mean()

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold the norms of the decoder rows into the encoder, so that the rows are unit."""
        super().process_state_dict_for_saving_inference(state_dict)
        norms = self.decoder_norm().clamp(min=1e-8)
        for name, factor in (("W_enc", norms), ("b_enc", norms), ("W_dec", 1 / norms[:, None])):
            state_dict[name] = (state_dict[name] * factor).to(self.dtype)
        check_weights(f"this {self.cfg.architecture()} SAE", state_dict)  # float16 may overflow


def _metrics(
    keep: Tensor,
    n_left_out: Tensor,
    z: Tensor,
    z_recons: Tensor,
    feature_acts: Tensor,
    decoder_norm: Tensor,
    b_dec: Tensor,
    dead_neuron_mask: Tensor | None,
) -> dict[str, Tensor | float | int | Callable[[], Tensor | float | int]]:
    """What a training step can tell, as callables: only logging steps pay for them.

    They are called when the weights have moved on, so nothing here may share their storage.
    """

    computed: list[AFATokenMetrics] = []  # once for all of them; functools.cache does not compile

    def tokens() -> AFATokenMetrics:
        if not computed:
            rows = [z, z_recons, feature_acts]
            if keep.any() and not keep.all():
                rows = [x[keep] for x in rows]
            z_kept, recons, acts = rows
            f_unit, l0 = acts * decoder_norm, acts.count_nonzero(-1)
            computed.append(token_metrics(z_kept, recons - b_dec, f_unit, b_dec, l0))
        return computed[0]

    metrics: dict[str, Tensor | float | int | Callable[[], Tensor | float | int]] = {
        "mean_l0": lambda: tokens().l0.float().mean(),
        "min_l0": lambda: tokens().l0.min().float(),
        "max_l0": lambda: tokens().l0.max().float(),
        "norm_ratio": lambda: (tokens().norm_f / tokens().norm_z).mean(),
        "over_activated": lambda: tokens().over_activated.float().mean(),
        "nmse": lambda: tokens().nmse.mean(),
        LEFT_OUT_METRIC: lambda: n_left_out,
    }
    if dead_neuron_mask is not None:
        metrics["dead_features"] = lambda: dead_neuron_mask.sum()
    return metrics
