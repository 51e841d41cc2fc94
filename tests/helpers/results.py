"""Results made up by hand: what an evaluation would leave, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sae_afa_plugin.metrics import AFATokenMetrics, summarize
from sae_afa_plugin.results import AFAResults

D_IN, D_SAE = 64, 512
# text that must stay text, wherever it is shown
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script>",
    "&amp;",
    '"double"',
    "'single'",
    "<img src=x onerror='window.hacked = 1'>",
    "\n",
    "🦎",
    "",  # a part of a character
)
WORDS = (" the", " norm", " of", " a", " feature", " is", " about", " its", " length", ",", ".")


def made_up_results(
    names: Sequence[str],
    n_tokens: int,
    seed: int = 0,
    constant_norm: bool = False,
    texts: Sequence[str] | None = None,
    context_size: int = 16,
    last_only: bool = False,
    coherence: bool = True,
) -> AFAResults:
    """Results of SAEs of these names on the same ``n_tokens`` tokens.

    Args:
        names: Of the SAEs; each weighs its features differently.
        n_tokens: For each SAE.
        seed: For everything random.
        constant_norm: Whether ``||z||`` is the same for every token, as after layer norm.
        texts: What the tokens say; each is used if there are tokens enough.
        context_size: Tokens in a sequence.
        last_only: Evaluate only the last token of each sequence.
        coherence: Whether the dictionaries' coherence is known.
    """
    random = np.random.default_rng(seed)
    texts = [*WORDS, *HOSTILE] if texts is None else list(texts)
    n_sequences = n_tokens if last_only else -(-n_tokens // context_size)
    ids = np.arange(n_sequences * context_size) % len(texts)
    random.shuffle(ids)
    sequences = pd.DataFrame(
        {
            "sequence": np.repeat(np.arange(n_sequences, dtype=np.int32), context_size),
            "position": np.tile(np.arange(context_size, dtype=np.int32), n_sequences),
            "token_id": ids.astype(np.int32),
            "token": np.array(texts, dtype=object)[ids],
        }
    )
    read = sequences.iloc[context_size - 1 :: context_size] if last_only else sequences
    places = read[["sequence", "position", "token_id"]].iloc[:n_tokens].reset_index(drop=True)
    norm_z = 20 * np.exp(0.4 * random.standard_normal(n_tokens))
    if constant_norm:
        norm_z = np.full(n_tokens, 8.0)

    tables: dict[str, pd.DataFrame] = {}
    for number, name in enumerate(names):
        middle = np.exp(0.25 * (number - (len(names) - 1) / 2))
        norm_f = norm_z * middle * np.exp(0.12 * random.standard_normal(n_tokens))
        excess = np.abs(norm_z**2 - norm_f**2) / norm_f**2
        nmse = 0.02 * (number + 1) * np.exp(0.5 * random.standard_normal(n_tokens))
        metrics = AFATokenMetrics(
            norm_z=norm_z,
            norm_f=norm_f,
            norm_z_centered=0.9 * norm_z,
            norm_f_centered=0.9 * norm_f,
            over_activated=norm_f > norm_z,
            epsilon_lbo=excess / (D_SAE - 1),
            epsilon_lbo_recon=0.8 * excess / (D_SAE - 1),
            interference=0.02 * random.standard_normal(n_tokens).clip(-3, 3),
            nmse=nmse,
            cosine=np.sqrt(1 - nmse.clip(0, 1)),
            l2_ratio=0.95 + 0.02 * random.standard_normal(n_tokens),
            share_features=(norm_f / norm_z) ** 2,
            share_interference=0.9 - (norm_f / norm_z) ** 2,
            share_unexplained=nmse,
            share_shrinkage=0.1 - nmse,
            l0=random.poisson(20 + 5 * number, n_tokens) + 1,
        )._asdict()
        kinds: dict[str, Any] = {"over_activated": bool, "l0": np.int32}
        columns = {key: v.astype(kinds.get(key, np.float32)) for key, v in metrics.items()}
        tables[name] = pd.concat([places, pd.DataFrame(columns)], axis=1)
    return results_of(tables, sequences, coherence)


def results_of(
    tables: dict[str, pd.DataFrame], sequences: pd.DataFrame, coherence: bool = True
) -> AFAResults:
    """Results from one table of tokens for each SAE, summed up as an evaluation does."""
    names = list(tables)
    rows: dict[str, dict[str, Any]] = {}
    for number, (name, table) in enumerate(tables.items()):
        rows[name] = {
            "source": "in memory",
            "architecture": ("topk", "topafa", "batchtopk")[number % 3],
            "d_in": D_IN,
            "d_sae": D_SAE,
            "hook_name": "blocks.1.hook_resid_pre",
            "hook_name_out": np.nan,
            "normalize_activations": "none",
            "dtype": "float32",
            "tokens": len(table),
            "nonfinite_tokens": 0,
            "special_tokens": 0,
            "catalogue_l0": np.nan,
            "dead_features": 3 * number,
            "share_alive": 1 - 3 * number / D_SAE,
            **summarize(table),
        }
        if coherence:
            welch = ((D_SAE - D_IN) / (D_IN * (D_SAE - 1))) ** 0.5
            rows[name] |= {"max_abs_cos": 0.6, "mean_abs_cos": 0.1, "welch_bound": welch}
    tokens = pd.concat(
        [table.assign(sae=pd.Categorical([n] * len(table), names)) for n, table in tables.items()],
        ignore_index=True,
    )
    settings = {
        "model": "a made-up model",
        "model_argument": None,
        "dataset": "in memory",
        "dataset_config": None,
        "split": "train",
        "n_tokens": len(tables[names[0]]),
        "context_size": int(sequences["position"].max()) + 1,
        "prepend_bos": None,
        "positions": "all",
        "exclude_special_tokens": True,
        "seed": 42,
        "core_tokens": 0,
    }
    return AFAResults(
        pd.DataFrame.from_dict(rows, orient="index"),
        tokens[["sae", *(c for c in tokens if c != "sae")]],
        sequences,
        {"settings": settings, "versions": {}, "refused": {}, "fingerprints": {}},
    )
