"""What was tried on sparse_topafa, each alone: python benchmarks/levers.py

Every row of the table is `sparse_topafa` with one thing changed, or BatchTopK with the same thing
changed, which tells whether the rule or the lever earned it. Where the truth is known (`small` and
`hierarchy`) nothing is told and recovered features are counted; on a language model all are steered
to one L0, and the error is compared with that of BatchTopK at the L0 that came out.

    python benchmarks/levers.py --on small hierarchy
    python benchmarks/levers.py --on smollm2 --seeds 2

Each is a sweep: interrupted and started again, it goes on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import machine, write
from sae_lens import register_sae_class, register_sae_training_class
from sae_lens.synthetic import SyntheticModel
from torch import Tensor
from worlds import WORLDS

from sae_afa_plugin import leave_one_out, run_sweep, top_afa
from sae_afa_plugin.metrics import norm_along_last
from sae_afa_plugin.rules.operator import keep_prefix
from sae_afa_plugin.saes.sparse_topafa import (
    SparseTopAFASAE,
    SparseTopAFASAEConfig,
    SparseTopAFATrainingSAE,
    SparseTopAFATrainingSAEConfig,
)
from sae_afa_plugin.sweep.statistics import interpolated

STEPS = 0  # of the trainings, for schedules


# --- rules: what decides about a token ---


class Base:
    """What a lever may change of both classes, and of the training class."""

    cfg: Any
    price: Tensor
    W_dec: Tensor
    W_enc: Tensor

    def weigh(
        self, acts: Tensor, sae_in: Tensor, decoder_norm: Tensor, price: Tensor | None = None
    ) -> Tensor:
        return leave_one_out(
            acts,
            sae_in.detach(),
            self.W_dec.detach(),
            self.price if price is None else price,
            decoder_norm,
            leniency=self.cfg.leniency,
        )


class NoProposal(Base):
    def choose(self, hidden_pre: Tensor, sae_in: Tensor, decoder_norm: Tensor) -> Tensor:
        return self.weigh(hidden_pre, sae_in, decoder_norm)


class WiderProposal(Base):
    def choose(self, hidden_pre: Tensor, sae_in: Tensor, decoder_norm: Tensor) -> Tensor:
        proposed = top_afa(hidden_pre, 1.25 * norm_along_last(sae_in).detach(), decoder_norm)
        return self.weigh(proposed, sae_in, decoder_norm)


class _PricePerToken(Base):
    """The buffer `price` is a multiple of what `_noise_of` says of each token."""

    def choose(self, hidden_pre: Tensor, sae_in: Tensor, decoder_norm: Tensor) -> Tensor:
        y = sae_in.detach()
        proposed = top_afa(hidden_pre, norm_along_last(y), decoder_norm)
        useful = self.weigh(proposed, y, decoder_norm, torch.zeros_like(self.price))
        price = self.price * self._noise_of(y, useful.detach())
        return self.weigh(useful, y, decoder_norm, price)

    def _noise_of(self, y: Tensor, useful: Tensor) -> Tensor:
        raise NotImplementedError

    def noise(self) -> Tensor:
        return torch.ones_like(self.price)


class TokensResidual(_PricePerToken):
    def _noise_of(self, y: Tensor, useful: Tensor) -> Tensor:
        return (y - useful @ self.W_dec.detach()).square().mean(-1)


class TokensResidualFree(TokensResidual):
    """Divided by the dimensions that are left, as an estimate of noise after m regressors is."""

    def _noise_of(self, y: Tensor, useful: Tensor) -> Tensor:
        d = y.shape[-1]
        left = (d - useful.count_nonzero(-1)).clamp(min=1)
        return super()._noise_of(y, useful) * d / left


class TokensEnergy(_PricePerToken):
    def _noise_of(self, y: Tensor, useful: Tensor) -> Tensor:
        return 0.07 * y.square().mean(-1)


class LowerTarget(Base):
    """The target norm times the root of the share that is explained, 1 - NMSE, as a number."""

    explained: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("explained", torch.ones(()))  # pyright: ignore

    def choose(self, hidden_pre: Tensor, sae_in: Tensor, decoder_norm: Tensor) -> Tensor:
        target = norm_along_last(sae_in).detach() * self.explained.sqrt()
        return self.weigh(top_afa(hidden_pre, target, decoder_norm), sae_in, decoder_norm)


class LowerTargetTrained(Base):
    def noise(self) -> Tensor:
        if self.running_energy > 0:  # pyright: ignore
            self.explained.copy_(1 - self.running_residual / self.running_energy)  # pyright: ignore
            self.explained.clamp_(min=0.05)  # pyright: ignore
        return super().noise()  # pyright: ignore


class ResidualStep(Base):
    """One step of ISTA: the features look once more, at what the first choice left over."""

    def choose(self, hidden_pre: Tensor, sae_in: Tensor, decoder_norm: Tensor) -> Tensor:
        choose = super().choose  # pyright: ignore
        first = choose(hidden_pre, sae_in, decoder_norm).detach()
        left = sae_in.detach() - first @ self.W_dec.detach()
        return choose(hidden_pre + 0.3 * left @ self.W_enc, sae_in, decoder_norm)


class _OneThreshold(Base):
    """The batch proposes: in training by a rule for all its tokens, whose threshold is learned."""

    threshold: Tensor
    training: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("threshold", torch.zeros(()))  # pyright: ignore
        self.eval()  # pyright: ignore

    def choose(self, hidden_pre: Tensor, sae_in: Tensor, decoder_norm: Tensor) -> Tensor:
        if self.training:
            n = hidden_pre.numel() // hidden_pre.shape[-1]
            flat = self._of_batch(
                hidden_pre.reshape(1, -1), sae_in.detach(), decoder_norm.repeat(n), n
            )
            proposed = flat.view_as(hidden_pre)
            least = proposed.detach()[proposed.detach() > 0].min()
            self.threshold.lerp_(least, 0.05)
        else:
            proposed = torch.where(hidden_pre > self.threshold, hidden_pre, 0)
        return self.weigh(proposed, sae_in, decoder_norm)

    def _of_batch(self, acts: Tensor, y: Tensor, decoder_norm: Tensor, n: int) -> Tensor:
        raise NotImplementedError


class BatchNorm(_OneThreshold):
    """The batch's features have the norm of the batch's inputs."""

    def _of_batch(self, acts: Tensor, y: Tensor, decoder_norm: Tensor, n: int) -> Tensor:
        return top_afa(acts, norm_along_last(y.reshape(1, -1)), decoder_norm)


class BatchTopKProposes(_OneThreshold):
    """BatchTopK, told k, with what leave-one-out says about its choice."""

    def _of_batch(self, acts: Tensor, y: Tensor, decoder_norm: Tensor, n: int) -> Tensor:
        return keep_prefix(acts, acts.new_full((1,), float(self.cfg.k * n)), decoder_norm, p=0)


# --- trainings: what decides about the price and the loss ---


class ResidualAlone(Base):
    def noise(self) -> Tensor:
        return self.running_residual  # pyright: ignore


class EnergyAlone(Base):
    def noise(self) -> Tensor:
        return 0.07 * self.running_energy  # pyright: ignore


class Free(Base):
    """Only what does harm is dropped."""

    def noise(self) -> Tensor:
        return torch.zeros_like(self.price)


class _Schedule(Base):
    """From the start to half of the steps, geometrically: 1 at its end."""

    step = -1

    def _ahead(self, at_start: float) -> float:
        self.step += 1
        return at_start ** (1 - min(1.0, self.step / (STEPS / 2)))


class SlowPrice(_Schedule):
    """The price rises from a tenth (or the target L0 falls from four times)."""

    goal = None

    def training_forward_pass(self, step_input: Any) -> Any:
        if self.cfg.target_l0 is None:
            step_input.coefficients["price"] = self.cfg.price * self._ahead(0.1)
        else:
            self.goal = self.goal or self.cfg.target_l0
            self.cfg.target_l0 = self.goal * self._ahead(4.0)
        return super().training_forward_pass(step_input)  # pyright: ignore


class SlowK(_Schedule):
    goal = None

    def training_forward_pass(self, step_input: Any) -> Any:
        self.goal = self.goal or self.cfg.k
        self.cfg.k = self.goal * self._ahead(4.0)
        return super().training_forward_pass(step_input)  # pyright: ignore


class L1(Base):
    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        step_input, feature_acts, *_ = args
        l1 = 0.003 * (feature_acts.abs().sum(-1) * norm_along_last(step_input.sae_in)).mean()
        return {**super().calculate_aux_loss(*args, **kwargs), "l1_loss": l1}  # pyright: ignore


class Matryoshka(Base):
    """The most frequent eighth, quarter and half of the features reconstruct too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frequency = torch.zeros(self.cfg.d_sae)

    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        step_input, feature_acts, *_ = args
        losses = super().calculate_aux_loss(*args, **kwargs)  # pyright: ignore
        self.frequency.lerp_((feature_acts.detach() > 0).float().mean(0), 0.01)
        order = self.frequency.argsort(descending=True)
        for share in (8, 4, 2):
            chosen = order[: self.cfg.d_sae // share]
            recons = feature_acts[:, chosen] @ self.W_dec[chosen] + self.b_dec  # pyright: ignore
            loss = (step_input.sae_in - recons).square().sum(-1).mean() / 3
            losses[f"matryoshka_{share}_loss"] = loss
        return losses


@dataclass(frozen=True)
class Lever:
    said: str
    rule: tuple[type, ...] = ()
    training: tuple[type, ...] = ()
    options: str = ""
    told: float = 0.0  # how many times the L0 that is right, as k; 0: it is told nothing


LEVERS = {
    "as-it-is": Lever("**as it is**"),
    "strict": Lever("no leniency, price .3", options="leniency: 0.0, price: 0.3"),
    "directions": Lever("leniency 1, price 1", options="leniency: 1.0, price: 1.0"),
    "wider": Lever("proposals of 1.25 times the norm", (WiderProposal,)),
    "no-proposal": Lever("no proposal by the AFA rule", (NoProposal,)),
    "batch-norm": Lever("the AFA rule for the batch: one threshold", (BatchNorm,)),
    "lower-target": Lever(
        "the AFA rule's target times √(explained share)", (LowerTarget,), (LowerTargetTrained,)
    ),
    "residual": Lever("price: mean residual alone", (), (ResidualAlone,)),
    "energy": Lever("price: mean energy alone", (), (EnergyAlone,)),
    "token-residual": Lever("price: the token's own residual", (TokensResidual,)),
    "token-residual-d-m": Lever("the same, over d − m dimensions", (TokensResidualFree,)),
    "token-energy": Lever("price: the token's own energy", (TokensEnergy,)),
    "slow": Lever("price or target approached slowly", (), (SlowPrice,)),
    "afa-loss": Lever("with the AFA loss, 1/32", options="afa_coefficient: 1/32"),
    "l1": Lever("with .003 of ‖f‖₁ ‖z‖ in the loss", (), (L1,)),
    "matryoshka": Lever("Matryoshka widths, by frequency", (), (Matryoshka,)),
    "residual-step": Lever("one residual step before the choice", (ResidualStep,)),
    "pruned": Lever(
        "BatchTopK, harmful ones dropped",
        (BatchTopKProposes,),
        (Free,),
        "leniency: 0.0",
        told=1.0,
    ),
    "priced": Lever("BatchTopK told twice, then the price", (BatchTopKProposes,), told=2.0),
    "slow-k": Lever(
        "the same, with k from four times",
        (BatchTopKProposes,),
        (SlowK, Free),
        "leniency: 0.0",
        told=1.0,
    ),
    "residual-step-k": Lever(
        "the same, with one residual step",
        (ResidualStep, BatchTopKProposes),
        (Free,),
        "leniency: 0.0",
        told=1.0,
    ),
}


def name_of(lever: str) -> str:
    return f"lever_{lever}"


def register(lever: str) -> None:
    """Make an architecture of it, for inference and for training."""
    of = LEVERS[lever]
    name = name_of(lever)
    extra: Any = [("k", float, 0.0)] if of.told else []
    space = {"architecture": classmethod(lambda cls: name)}
    configs = [
        make_dataclass(f"{base.__name__}_{lever}", extra, bases=(base,), namespace=dict(space))
        for base in (SparseTopAFASAEConfig, SparseTopAFATrainingSAEConfig)
    ]
    inference: Any = type(name, (*of.rule, SparseTopAFASAE), {})
    training: Any = type(name, (*of.training, *of.rule, SparseTopAFATrainingSAE), {})
    register_sae_class(name, inference, configs[0])
    register_sae_training_class(name, training, configs[1])


# --- where they are tried ---


@dataclass(frozen=True)
class Place:
    said: str
    data: str
    d_sae: int
    l0: float  # what the world has, or what SAEs of a language model are steered to
    steps: int
    known: bool = False


PLACES = {
    "small": Place("192 features in 96 dimensions", "synthetic: {world: small, heldout_tokens: 20000}",
                   192, 5.8, 2000, True),
    "hierarchy": Place(
        "trees of features",
        "synthetic: {world: hierarchy, heldout_tokens: 20000}",
        192,
        6.7,
        2000,
        True,
    ),
    "deep": Place(
        "deep trees of exclusive features",
        "synthetic: {world: WORLD, heldout_tokens: 20000}",
        320,
        6.9,
        2000,
        True,
    ),
    "demo": Place("the embedded model, blocks.4", """model: sae-afa-demo
hooks: [blocks.4.hook_resid_pre]
training: {dataset: embedded-train}
heldout: {dataset: embedded, n_tokens: 20000}""", 1536, 24, 500),
    "smollm2": Place("SmolLM2-135M, blocks.10", """model: smollm2
hooks: [blocks.10.hook_resid_pre]
training: {dataset: embedded-train}
heldout: {dataset: embedded, n_tokens: 20000}""", 2304, 64, 390),
}  # fmt: skip

CONFIG = """
{data}
seeds: [{seeds}]
d_sae: {d_sae}
steps: {steps}
trainer: {{train_batch_size_samples: 1024, lr: 1e-3, adam_beta2: 0.99, dead_feature_window: 100, lr_decay_steps: {decay}}}
defaults: {{decoder_init_norm: 1.0, normalize_activations: {normalize}}}
saes:
  - {{architecture: batchtopk, topk_threshold_lr: 0.05, k: [{ks}]}}
{rows}
measure: {{coherence: false, core: false, bootstrap: 10}}
"""


def of_place(place: str, levers: list[str], out: Path, seeds: int, steps: int | None) -> list[str]:
    """The table of one place."""
    global STEPS
    of = PLACES[place]
    STEPS = steps or of.steps
    rows: list[str] = []
    for lever in levers:
        tried = LEVERS[lever]
        options = [f"architecture: {name_of(lever)}", *filter(None, [tried.options])]
        if tried.told:
            options.append(f"k: {of.l0 * tried.told}")
        if not of.known and Free not in tried.training:
            options.append(f"target_l0: {of.l0}")
        rows.append("  - {" + ", ".join(options) + "}")
    ks = [of.l0] if of.known else [of.l0 * factor for factor in (0.35, 0.5, 0.75, 1, 1.5, 2.5)]
    folder = out / place
    if place == "deep" and not (folder / "world").exists():
        SyntheticModel(WORLDS["deep trees"][0]).save(folder / "world")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(
        CONFIG.format(
            data=of.data.replace("WORLD", str((folder / "world").resolve())), d_sae=of.d_sae, steps=STEPS, decay=STEPS // 5,
            normalize="none" if of.known else "layer_norm",
            seeds=", ".join(map(str, range(seeds))), ks=", ".join(f"{k:g}" for k in ks),
            rows="\n".join(rows),
        )
    )  # fmt: skip
    results = run_sweep(folder / "sweep.yaml", folder / "sweep")
    assert results is not None  # as of a dry run
    found = results.frontier
    baseline = found[found["setting"].str.startswith("batchtopk ")]
    points = dict(zip(baseline["l0_mean"], baseline["nmse_mean"], strict=True))
    head = ["L0", "F1", "MCC", "dead"] if of.known else ["L0", "NMSE", "of BatchTopK's", "dead"]
    lines = [
        f"{of.said}: {STEPS} steps of 1,024, {seeds} seeds, {time.strftime('%Y-%m-%d')}, "
        + (f"{of.l0} of the features are on" if of.known else f"steered to {of.l0:g}"),
        "",
        "| | " + " | ".join(head) + " |",
        "|---" * (1 + len(head)) + "|",
    ]
    told = {"batchtopk": f"BatchTopK told {of.l0:g}"}
    told |= {name_of(lever): LEVERS[lever].said for lever in levers}
    for architecture, said in told.items():
        row = found[found["setting"].str.split().str[0] == architecture]
        if architecture == "batchtopk":
            row = row.iloc[(row["l0_mean"] - of.l0).abs().argsort()]
        if row.empty:
            lines.append(f"| {said} | diverged |" + " |" * (len(head) - 1))
            continue
        row = row.iloc[0]
        cells = [f"{row['l0_mean']:.1f}"]
        if of.known:
            cells += [f"{row[name]:.3f} ± {row[f'{name}_sd']:.3f}" for name in ("f1", "mcc")]
        else:
            ratio = row["nmse_mean"] / interpolated(points, row["l0_mean"])
            cells += [f"{row['nmse_mean']:.4f}", f"{ratio:.3f}"]
        lines.append(f"| {said} | " + " | ".join([*cells, f"{row['dead_features']:.0f}"]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--on", nargs="+", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--only", nargs="+", choices=list(LEVERS), default=list(LEVERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=Path("output/levers"))
    args = parser.parse_args()
    for lever in LEVERS:
        register(lever)
    for place in args.on:
        lines = of_place(place, args.only, args.out, args.seeds, args.steps)
        write(args.out / f"{place}.md", [*lines, "", machine()])


if __name__ == "__main__":
    main()
