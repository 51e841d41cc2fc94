"""SAEs that nobody trained: what a number means is seen beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import StandardSAE, StandardSAEConfig, TrainingSAE

from sae_afa_plugin._upstream import SAE_CFG_FILENAME
from sae_afa_plugin.activations.base import Activations, Site
from sae_afa_plugin.files import aside_of
from sae_afa_plugin.training.run import SAETraining
from sae_afa_plugin.training.stream import Blocks, Stream

_MOST_TOKENS = 1 << 17  # for directions: some hundred for each entry of a covariance row


def write_untrained(training: SAETraining, folder: Path, metadata: dict[str, Any]) -> None:
    """Save an SAE as it is initialised, with the weights that its training would begin with.

    Args:
        training: How it would be trained.
        folder: Where; nothing is done if it is there.
        metadata: What it remembers beside its hook.
    """
    if (folder / SAE_CFG_FILENAME).is_file():
        return
    config = {**training.sae.to_dict(), "device": "cpu", "metadata": training.metadata(metadata)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(training.seed)
        sae: TrainingSAE[Any] = TrainingSAE.from_dict(config)
    _save(sae, folder)


def write_pca(
    source: Activations, hook: str, k: int, normalize: str, folder: Path, metadata: dict[str, Any]
) -> None:
    """Save the first ``k`` principal directions as an SAE: each has two features, one for each sign.

    So each token has ``k`` active features, and the reconstruction is the projection onto the
    directions: the best that ``k`` directions in a row can do for all tokens alike.

    Args:
        source: The activations that the directions are of.
        hook: Which of them.
        k: How many directions, at most the width.
        normalize: ``normalize_activations`` of the SAE: the directions are of what it makes.
        folder: Where; nothing is done if it is there.
        metadata: What it remembers beside its hook.

    Raises:
        ValueError: If there are more directions than dimensions.
    """
    if (folder / SAE_CFG_FILENAME).is_file():
        return
    d_in = source.shapes([hook])[hook].numel()
    if k > d_in:
        raise ValueError(f"pca with k={k} has more directions than {hook!r} has dimensions: {d_in}")
    mean, directions = _principal(source, hook, normalize, d_in)
    W_dec = torch.cat([directions[:k], -directions[:k]])
    given: Any = normalize
    cfg = StandardSAEConfig(d_in, 2 * k, normalize_activations=given)
    for name, value in {**metadata, "hook_name": hook}.items():
        cfg.metadata[name] = value
    with torch.random.fork_rng(devices=[]):
        sae = StandardSAE(cfg)
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
        sae.W_enc.copy_(W_dec.T)
        sae.b_enc.zero_()
        sae.b_dec.copy_(mean)
    _save(sae, folder)


def _principal(
    source: Activations, hook: str, normalize: str, d_in: int
) -> tuple[torch.Tensor, torch.Tensor]:
    n = min(source.n_tokens, _MOST_TOKENS)
    size = min(n, 4096)
    blocks = Blocks(source, size)
    stream = Stream(blocks, Site(hook), size, seed=0, normalize=normalize)
    total, products = torch.zeros(d_in, dtype=torch.float64), torch.zeros(d_in, d_in).double()
    count = 0
    for step in range(n // size):
        x = stream.batch(step).double()
        total += x.sum(0)
        products += x.T @ x
        count += len(x)
    mean = total / count
    _, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
    return mean.float(), vectors.T.flip(0).float()  # the largest first


def _save(sae: Any, folder: Path) -> None:
    with aside_of(folder) as aside:
        aside.mkdir(parents=True)
        if isinstance(sae, TrainingSAE):
            sae.save_inference_model(aside)
        else:
            sae.save_model(aside)
        aside.rename(folder)
