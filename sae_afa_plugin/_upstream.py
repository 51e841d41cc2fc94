"""Every lean on what another library does not promise, in one place.

Read at sae-lens 6.54.12, transformer-lens 3.9.0, torch 2.13.0, datasets 5.2.0. What is here is not
exported at the top of its library, or begins with an underscore. ``tests/unit/test_upstream.py``
has a test for each name: when a library moves on, that test says which of these has to follow.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import config as datasets_config  # pyright: ignore[reportAttributeAccessIssue]

# huggingface_hub: where its cache has a repository
from huggingface_hub.file_download import repo_folder_name

# SAELens: how its command reads a configuration, how text becomes sequences
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.llm_sae_training_runner import _parse_cfg_args as parse_runner_config

# SAELens: language models, and hooks that are modules' outputs
from sae_lens.load_model import HookedProxyLM, load_model

# SAELens: its catalogue, and configs before weights
from sae_lens.loading.pretrained_sae_loaders import (
    get_conversion_loader_name,
    get_sae_lens_config_from_disk,
    handle_config_defaulting,
    load_sae_config_from_huggingface,
)
from sae_lens.loading.pretrained_saes_directory import (
    get_norm_scaling_factor,
    get_pretrained_saes_directory,
    get_releases_for_repo_id,
    get_repo_id_and_folder_name,
)

# SAELens: which classes stand for which names
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.transcoder import Transcoder
from sae_lens.tokenization_and_batching import concat_and_batch_sequences

# SAELens: training
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import (
    DTYPE_MAP,
    extract_stop_at_layer_from_tlens_hook_name,
    get_special_token_ids,
)
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS
from transformers import dynamic_module_utils

__all__ = [
    "ACTIVATION_SCALER_CFG_FILENAME",
    "ACTIVATION_WHITENING_FILENAME",
    "DTYPE_MAP",
    "MODEL_ALIASES",
    "OFFICIAL_MODEL_NAMES",
    "SAE_CFG_FILENAME",
    "SAE_CLASS_REGISTRY",
    "SAE_TRAINING_CLASS_REGISTRY",
    "SAE_WEIGHTS_FILENAME",
    "SPARSITY_FILENAME",
    "SUPPORTED_ACTIVATIONS",
    "TRAINER_STATE_FILENAME",
    "ActivationScaler",
    "HookedProxyLM",
    "MultiSAETrainer",
    "Transcoder",
    "TransformerBridge",
    "concat_and_batch_sequences",
    "convert_gpt2_weights",
    "dataset_fingerprint",
    "datasets_cache",
    "encodes_batches",
    "extract_stop_at_layer_from_tlens_hook_name",
    "get_conversion_loader_name",
    "get_norm_scaling_factor",
    "get_pretrained_saes_directory",
    "get_releases_for_repo_id",
    "get_repo_id_and_folder_name",
    "get_sae_lens_config_from_disk",
    "get_special_token_from_cfg",
    "get_special_token_ids",
    "handle_config_defaulting",
    "has_gradient_hook",
    "has_hooks",
    "is_transformed",
    "left_as_it_was",
    "load_model",
    "load_sae_config_from_huggingface",
    "never_asking_for_remote_code",
    "normalization_scale",
    "normalized_input",
    "parse_runner_config",
    "rebind_functions",
    "reconstruction_of",
    "repo_folder_name",
    "without_bound_functions",
    "without_hooks",
]


# --- torch ---


@torch.compiler.assume_constant_result  # asked while a function and its transforms are traced
def is_transformed() -> bool:
    """Whether ``torch.func`` (vmap and its like) or forward-mode differentiation is at work."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def has_gradient_hook(parameter: Tensor, hook: Any) -> bool:
    """Whether a hook is registered for when this parameter's gradient is complete."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return hook in hooks.values()


# --- TransformerLens: one hook point ---


_HOOKS_OF_A_POINT = (
    *("fwd_hooks", "bwd_hooks", "_forward_hooks", "_forward_pre_hooks"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


def has_hooks(point: Any) -> bool:
    """Whether a hook point has hooks of TransformerLens or of PyTorch itself.

    Args:
        point: A ``HookPoint``.
    """
    return any(getattr(point, name) for name in _HOOKS_OF_A_POINT)


# --- transformers ---


@contextmanager
def never_asking_for_remote_code() -> Generator[None]:
    """Let a repository with Python of its own be an error, where transformers asks at the terminal.

    Whoever has not been asked to trust it would answer a question that an SAE's file has raised.
    """
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


# --- TransformerLens: a model ---


@contextmanager
def without_hooks(model: Any) -> Generator[None]:
    """Run a language model as if nobody had put hooks on its hook points, and put them back.

    Args:
        model: A ``HookedTransformer``, ``TransformerBridge`` or SAELens ``HookedProxyLM``.
    """
    taken: list[tuple[Any, dict[str, Any]]] = []
    for point in model.hook_dict.values():
        if has_hooks(point):
            before = {name: getattr(point, name) for name in _HOOKS_OF_A_POINT}
            taken.append((point, before))
            for name, hooks in before.items():
                setattr(point, name, type(hooks)())
    try:
        yield
    finally:
        for point, before in taken:
            for name, hooks in before.items():
                setattr(point, name, hooks)


# --- SAELens ---


def encodes_batches(sae: Any) -> bool:
    """Whether an SAE of SAELens chooses its features for a whole batch at once.

    Args:
        sae: The SAE.
    """
    return isinstance(getattr(sae, "activation_fn", None), BatchTopK)


@contextmanager
def left_as_it_was(sae: Any) -> Generator[None]:
    """Let an SAE for attention heads take ``[..., d_in]`` as all others do, and leave no traces.

    Its normalisations put what they have subtracted on the SAE until it decodes; switching the
    reshaping off does not remember what it was.

    Args:
        sae: An SAE of SAELens.
    """
    attributes = vars(sae)
    before = dict(attributes)
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        attributes.clear()
        attributes.update(before)


_BOUND_FUNCTIONS = (
    *("run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out"),
    *("reshape_fn_in", "reshape_fn_out"),
    "training_forward_pass",  # where a runner has compiled it
)


def without_bound_functions(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of an SAE without functions that know the SAE itself.

    Copies would share them, and write to the SAE that they were copied from; pickle takes none.

    Args:
        state: ``vars`` of an SAE of SAELens.
    """
    return {name: value for name, value in state.items() if name not in _BOUND_FUNCTIONS}


def rebind_functions(sae: Any) -> None:
    """Give a copied SAE of SAELens its own in place of what :func:`without_bound_functions` left out.

    Args:
        sae: The copy.
    """
    sae._setup_activation_normalization()
    d_head = sae.d_head  # of the heads that were seen last
    if sae.hook_z_reshaping_mode:
        sae.turn_on_forward_pass_hook_z_reshaping()
    else:
        sae.turn_off_forward_pass_hook_z_reshaping()
    sae.d_head = d_head


def normalized_input(sae: Any, x: Tensor) -> Tensor:
    """The input as the SAE normalises it, before it subtracts the bias: z ``[..., d_in]``.

    Args:
        sae: An SAE of SAELens.
        x: Activations ``[..., d_in]``.
    """
    with left_as_it_was(sae):
        return sae.run_time_activation_norm_fn_in(x.to(sae.dtype))


def normalization_scale(sae: Any, x: Tensor) -> Tensor:
    """How much a unit of the SAE's normalised input is in the input ``[..., 1]``.

    Args:
        sae: An SAE of SAELens.
        x: Activations ``[..., d_in]``.
    """
    with left_as_it_was(sae):
        z = sae.run_time_activation_norm_fn_in(x.to(sae.dtype))
        # affine for each token: what the normalisation subtracted is in both
        both = sae.run_time_activation_norm_fn_out(torch.stack([torch.ones_like(z), 0 * z]))
    return (both[0] - both[1])[..., :1]


def reconstruction_of(sae: Any, x: Tensor) -> Tensor | None:
    """What ``hook_sae_recons`` sees when the SAE encodes and decodes; None if it is not called.

    Args:
        sae: An SAE of SAELens.
        x: Activations ``[..., d_in]``.
    """
    seen: list[Tensor] = []
    sae.hook_sae_recons.add_hook(lambda tensor, *, hook: seen.append(tensor))
    try:
        with left_as_it_was(sae):
            f = sae.encode(x)
            sae.decode(f.to_dense() if f.is_sparse else f)
    finally:
        sae.hook_sae_recons.fwd_hooks.pop().hook.remove()
    return seen[0] if seen else None


# --- datasets ---


def dataset_fingerprint(dataset: Dataset) -> str:
    """What datasets itself tells datasets apart by."""
    return dataset._fingerprint


def datasets_cache() -> Path:
    """Where datasets keeps what it has read."""
    return Path(datasets_config.HF_DATASETS_CACHE)
