"""The tables of a sweep, made from its evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from tqdm.auto import tqdm

from sae_afa_plugin._upstream import SAE_WEIGHTS_FILENAME
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.sweep.config import Sweep
from sae_afa_plugin.sweep.grid import Member
from sae_afa_plugin.sweep.results import (
    AT_THIS_L0,
    INTERPOLATED,
    MISSED,
    SETTING,
    SweepResults,
)
from sae_afa_plugin.sweep.statistics import (
    Difference,
    description_length,
    firing_bits,
    interpolated,
    paired_difference,
    reseed_noise,
    stability,
)
from sae_afa_plugin.training.coordinator import Trained

_OF_A_COMPARISON = [
    *(*SETTING, "against", "how", "l0", "l0_against"),
    *(f"nmse_{key}" for key in Difference._fields),
]


def tabulated(
    found: AFAResults,
    members: Sequence[Member],
    trained: Mapping[str, Trained],
    pairs: Sequence[tuple[str, str]],
    sweep: Sweep,
    about: Mapping[str, Any],
    progress: bool = True,
) -> SweepResults:
    """All that a sweep says of its SAEs.

    Args:
        found: The evaluation.
        members: The SAEs, in their order.
        trained: Those that were trained, by name.
        pairs: Names of SAEs that are compared: one that chooses its L0, and one that was told it.
        sweep: The config.
        about: What is said of the run.
        progress: Whether to show a bar while dictionaries are matched.
    """
    summary = _summary(found, {member.name: member for member in members}, trained)
    return SweepResults(
        summary,
        _frontier(summary),
        _comparisons(found, summary, pairs, sweep.measure.bootstrap),
        reseed_noise(summary, SETTING),
        _stability(summary, trained if sweep.measure.stability else {}, progress),
        found,
        dict(found.metadata["refused"]),
        dict(about),
    )


def _summary(
    found: AFAResults, by_name: Mapping[str, Member], trained: Mapping[str, Trained]
) -> pd.DataFrame:
    names = [name for name in by_name if name in found.summary.index]
    summary = found.summary.loc[names].copy()
    known = [by_name[name] for name in names]
    summary.insert(0, "family", [member.family for member in known])
    summary.insert(1, "setting", [member.setting for member in known])
    summary.insert(2, "seed", [member.seed for member in known])
    summary["control"] = [
        member.row.control or (None if member.row.is_trained else member.row.architecture)
        for member in known
    ]
    summary["chooses_l0"] = [member.chooses_l0 for member in known]
    seconds = [trained[name].seconds if name in trained else math.nan for name in names]
    steps = [max(trained[name].step, 1) if name in trained else 1 for name in names]
    summary["training_seconds"] = seconds
    summary["seconds_per_step"] = np.divide(seconds, steps)
    summary["description_length"] = [
        description_length(row["l0_mean"], int(row["d_sae"])) for _, row in summary.iterrows()
    ]
    summary["firing_bits"] = [_firing_bits(found, name) for name in names]
    return summary.copy()  # in one piece


def _firing_bits(found: AFAResults, name: str) -> float:
    features = found.features_of(name)
    if features is None:
        return math.nan
    n = int(found.summary.loc[name, "tokens"])  # pyright: ignore[reportArgumentType]
    return firing_bits(features["fired"].to_numpy(float), n)


def _comparisons(
    found: AFAResults, summary: pd.DataFrame, pairs: Sequence[tuple[str, str]], draws: int
) -> pd.DataFrame:
    """Each setting that chooses its L0 beside others at that L0, over seeds and sequences."""
    rows: list[dict[str, Any]] = []
    alike: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for one, other in pairs:
        if one in summary.index and other in summary.index:
            key = (summary.hook_name[one], summary.setting[one], summary.family[other])
            alike.setdefault(key, []).append((one, other))
    for (hook, setting, family), names in alike.items():
        tables = [
            tuple(found.tokens_of(name, ["sequence", "nmse"]) for name in pair) for pair in names
        ]
        difference = paired_difference(tables, "nmse", draws)  # pyright: ignore
        ones, others = zip(*names, strict=True)
        l0, l0_against = (summary.l0_mean[list(each)].mean() for each in (ones, others))
        rows.append(
            {
                "hook_name": hook,
                "setting": setting,
                "against": family,
                "how": _how(l0, l0_against),
                "l0": l0,
                "l0_against": l0_against,
                **{f"nmse_{key}": value for key, value in difference._asdict().items()},
            }
        )
    rows += _interpolations(summary)
    return pd.DataFrame(rows, columns=_OF_A_COMPARISON)


def _how(l0: float, l0_against: float) -> str:
    """Whether an SAE that was told an L0 came to it: a coefficient may not get it there."""
    return AT_THIS_L0 if l0 / 1.1 <= l0_against <= 1.1 * l0 else MISSED


def _stability(
    summary: pd.DataFrame, trained: Mapping[str, Trained], progress: bool
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    groups: Any = summary[[name in trained for name in summary.index]].groupby(SETTING, sort=False)
    several = [(key, group) for key, group in groups if len(group) > 1]
    for (hook, setting), group in tqdm(
        several, desc="Matching dictionaries", unit="setting", disable=not progress
    ):
        folders = [Path(trained[str(name)].folder) for name in group.index]
        W_decs = [load_file(folder / SAE_WEIGHTS_FILENAME)["W_dec"] for folder in folders]
        rows.append(
            {
                "hook_name": hook,
                "setting": setting,
                "pw_mcc": stability(W_decs),
                "seeds": len(group),
            }
        )
    return pd.DataFrame(rows, columns=[*SETTING, "pw_mcc", "seeds"])


def _frontier(summary: pd.DataFrame) -> pd.DataFrame:
    """Means and standard deviations over seeds of every number."""
    numbers = [
        column
        for column in summary.select_dtypes("number").columns
        if column not in ("seed", "d_in", "d_sae") and summary[column].notna().any()
    ]
    keys = ["hook_name", "family", "setting"]
    groups: Any = summary.groupby(keys, sort=False)[numbers]
    mean, sd = groups.mean(), groups.std(ddof=1).add_suffix("_sd")
    columns = [name for column in numbers for name in (column, f"{column}_sd")]
    table = pd.concat([mean, sd], axis=1)[columns].copy()
    table.insert(0, "seeds", groups.size())
    return table.reset_index()


def _interpolations(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Each setting that chooses its L0 beside every family that is told one, by its neighbours."""
    rows: list[dict[str, Any]] = []
    plain: Any = summary[summary["control"].isna()]
    chooses = plain["chooses_l0"].astype(bool)
    chosen: Any = plain[chooses].groupby(SETTING, sort=False)
    told: Any = plain[~chooses].groupby(["hook_name", "family"], sort=False)
    lines = {key: group.groupby("setting")[["l0_mean", "nmse_mean"]].mean() for key, group in told}
    for (hook, setting), group in chosen:
        l0, nmse = group["l0_mean"].mean(), group["nmse_mean"].mean()
        for (other_hook, family), line in lines.items():
            if other_hook != hook:
                continue
            there = interpolated(dict(zip(line["l0_mean"], line["nmse_mean"], strict=True)), l0)
            if not np.isfinite(there):  # outside of what was trained
                continue
            rows.append(
                {
                    "hook_name": hook,
                    "setting": setting,
                    "against": family,
                    "how": INTERPOLATED,
                    "l0": l0,
                    "l0_against": l0,
                    "nmse_first": nmse,
                    "nmse_second": there,
                    "nmse_ratio": nmse / there,
                    "nmse_seeds": len(group),
                }
            )
    return rows
