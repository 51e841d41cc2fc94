"""How far an SAE is from the truth, where activations come with one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from sae_lens.synthetic import (
    ClassificationMetricsCalculator,
    feature_uniqueness,
    mean_correlation_coefficient,
)
from torch import Tensor
from typing_extensions import override

from sae_afa_plugin.activations.base import Activations
from sae_afa_plugin.activations.synthetic import SyntheticActivations
from sae_afa_plugin.groups.afa import AFA, SHARES
from sae_afa_plugin.groups.base import Accumulator, Column, GroupResult, MetricGroup
from sae_afa_plugin.spaces import EncodedTokens, LinearCode

_COUNTS = ("tp", "fp", "fn", "tn")
_ROWS_AT_ONCE = 64  # tokens: SAELens compares in a dozen matrices [tokens, d_sae]
_OF_THE_TRUTH = (
    *("norm_ratio_median", "epsilon_lbo_median", "interference_median"),
    *(f"{share}_mean" for share in SHARES),
)


class TrueCode(LinearCode):
    """The truth of synthetic activations as a dictionary, to be evaluated like an SAE.

    Its features are those that the samples were made of, so it knows nothing of other activations.

    Args:
        source: Where the samples come from.

    Example:
        >>> from sae_afa_plugin import evaluate_saes
        >>> from sae_afa_plugin.activations.synthetic import SMALL_WORLD
        >>> source = SyntheticActivations(SMALL_WORLD, n_tokens=1000)
        >>> results = evaluate_saes(
        ...     {"truth": TrueCode(source)}, activations=source, groups=[KnownTruth()], progress=False
        ... )
        >>> row = results.summary.loc["truth"]
        >>> print(f"{row['f1']:.4f} {row['mcc']:.4f} {row['nmse_mean']:.4f}")
        1.0000 1.0000 0.0000
    """

    def __init__(self, source: SyntheticActivations):
        self._source = source
        self._set_decoder(source.dictionary.feature_vectors, source.dictionary.bias)
        self.d_in, self.identity = self.W_dec.shape[1], f"the truth of {source.identity}"
        self.metadata = {"hook_name": source.hook_name}

    @override
    def encode(self, x: Tensor) -> Tensor:
        raise ValueError("the true features belong to samples, not to activations: use read")

    @override
    def check(self, x: Tensor, name: str) -> None:
        """Nothing is encoded or decoded; :meth:`read` looks whether the samples are its own."""

    @override
    def read(self, x: Tensor, x_out: Tensor | None = None, rows: slice = slice(0)) -> EncodedTokens:
        own = self.samples(rows) if rows.stop > (rows.start or 0) else None
        if own is None or not torch.equal(x.to(own.z), own.z):
            raise ValueError(
                "these are not the samples whose truth is known: evaluate it on the activations "
                "that it was made from"
            )
        return own

    def samples(self, rows: slice) -> EncodedTokens:
        """The samples with their true features.

        Args:
            rows: Which, from ``start`` to ``stop``.
        """
        hook = self._source.hook_name
        z = self._source.read([hook], rows.start, rows.stop)[hook]
        return EncodedTokens(self, self._source.features(rows.start, rows.stop), z, rows)


class _Compared(Accumulator):
    def __init__(self, code: LinearCode, source: SyntheticActivations):
        self._W_dec, self._truth = code.W_dec, TrueCode(source)
        self._calculator = ClassificationMetricsCalculator(self._W_dec, self._directions)
        self._afa = AFA().start(self._truth, source)
        # of 1, L0 and the true L0: sums of their products, exact in whatever order
        self._moments = torch.zeros(3, 3, dtype=torch.long)

    @property
    def _directions(self) -> Tensor:
        return self._truth.W_dec.to(self._W_dec)

    @override
    def add(self, tokens: EncodedTokens) -> None:
        finite, first = tokens.finite.cpu(), tokens.rows.start
        for start in range(0, len(tokens), _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, len(tokens))
            true = self._truth.samples(slice(first + start, first + stop))
            kept = finite[start:stop]
            f, f_true = tokens.f[start:stop][kept.to(tokens.f.device)], true.f[kept]
            self._calculator.add_batch(f, f_true.to(f.device))
            self._afa.add(EncodedTokens(self._truth, f_true, true.z[kept], true.rows))
            l0 = f.count_nonzero(-1).cpu()
            columns = torch.stack([torch.ones_like(l0), l0, f_true.count_nonzero(-1)])
            self._moments += columns @ columns.T

    @override
    def merge(self, other: _Compared) -> None:
        for name in _COUNTS:
            getattr(self._calculator, name).add_(getattr(other._calculator, name))
        self._moments += other._moments
        self._afa.merge(other._afa)

    @override
    def finish(self) -> GroupResult:
        truth = self._afa.finish().summary
        found = self._calculator.compute()
        n, _, total = self._moments[0].tolist()
        return GroupResult(
            {
                "mcc": mean_correlation_coefficient(self._W_dec, self._directions),
                "precision": found.precision,
                "recall": found.recall,
                "f1": found.f1_score,
                "accuracy": found.accuracy,
                "uniqueness": feature_uniqueness(self._W_dec, self._directions),
                "true_l0_mean": total / n,
                "l0_correlation": _correlation(self._moments),
                **{f"truth_{name}": truth[name] for name in _OF_THE_TRUTH},
            }
        )


def _correlation(moments: Tensor) -> float:
    """Pearson's, of a and b whose sums of products with 1, a and b are known; NaN if one is constant."""
    (n, a, b), (_, aa, ab), (_, _, bb) = moments.tolist()
    squared = (n * aa - a * a) * (n * bb - b * b)
    return (n * ab - a * b) / math.sqrt(squared) if squared else math.nan


@dataclass(frozen=True)
class KnownTruth(MetricGroup):
    """An SAE against the features that the activations were made of.

    SAELens's own measures (``eval_sae_on_synthetic_data``). Each latent is taken as a detector of
    the true feature whose direction is nearest by ``|cos|``; precision, recall, F1 and accuracy are
    means over latents, 0 for those that never fire or whose feature never does. So samples that
    are too few for rare features lower them. ``mcc`` is the mean ``|cos|`` of the best one-to-one
    matching of directions, ``uniqueness`` how many different features the latents have as nearest,
    over the number of latents. Neither looks at samples.

    ``l0_correlation`` is Pearson's correlation of a sample's active latents with its active
    features; NaN where one is constant, as for TopK. ``truth_...`` are the AFA metric of the true
    features on the true dictionary, on the same samples: what the theory's premise is worth there.

    What is compared are directions and which features are on, so an SAE that normalises its input
    may be compared as well. ``layer_norm`` takes the mean over the d coordinates away, and with it
    the part of every direction along (1, ..., 1); a perfect SAE there has ``mcc`` a little below 1,
    for random directions about ``1 - 1/(2 d)``. The truth's own numbers stay in the space of the
    activations.

    Matching directions takes 16 bytes for each pair of a latent and a feature.
    """

    name: ClassVar[str] = "known_truth"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "f1",
            "F1",
            "Harmonic mean of precision and recall of a latent as a detector of its true feature, "
            "mean over latents.",
            place=41,
            need=96,
        ),
        Column(
            "mcc",
            "MCC",
            "The |cos| of matched directions of the SAE and the truth, mean.",
            place=42,
            need=95,
        ),
        Column(
            "precision",
            "preci-\nsion",
            "Of the samples on which a latent fires, the share on which its true feature does. Mean "
            "over latents.",
            place=43,
            need=45,
        ),
        Column(
            "recall",
            "recall",
            "Of the samples on which its true feature fires, the share on which a latent does. Mean "
            "over latents.",
            place=44,
            need=44,
        ),
        Column("accuracy", "accu-\nracy", "Share of samples on which both agree. Mean.", place=45),
        Column(
            "uniqueness",
            "unique-\nness",
            "Different true features that latents are nearest to, over the number of latents.",
            place=46,
            need=43,
        ),
        Column(
            "true_l0_mean",
            "true\nL0",
            "Features that a sample was made of, mean.",
            "{:.1f}".format,
            47,
            94,
        ),
        Column(
            "l0_correlation",
            "L0\ncorr.",
            "Correlation of a sample's active latents with its active features.",
            place=48,
            need=42,
        ),
        Column(
            "truth_norm_ratio_median",
            "true\n‖f‖/‖z‖",
            "‖f‖/‖z‖ of the true features on the true dictionary, median.",
            place=49,
            need=41,
        ),
    )

    @override
    def why_not(self, code: LinearCode, activations: Activations) -> str | None:
        if not isinstance(activations, SyntheticActivations):
            return "these activations come without a truth"
        return None

    @override
    def start(self, code: LinearCode, activations: Activations) -> Accumulator:
        assert isinstance(activations, SyntheticActivations)
        return _Compared(code, activations)
