"""The file of a sweep: YAML, checked as a whole before anything starts.

Every key is a field of :class:`sae_afa_plugin.sweep.config.Sweep` or of what it holds, and
explained there. Numbers may be fractions (``1/32``); a list in a row of ``saes`` is a grid over its
values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from fractions import Fraction
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

from sae_lens import LoggingConfig, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from sae_afa_plugin import limits
from sae_afa_plugin._upstream import SAE_TRAINING_CLASS_REGISTRY
from sae_afa_plugin.activations.tokens import Protocol
from sae_afa_plugin.files import user_path
from sae_afa_plugin.sweep.config import (
    PCA,
    TRUTH,
    Measured,
    Row,
    Sweep,
    Synthetic,
    Text,
    fields_of,
    l0_option,
    row_options,
    sae_config,
)
from sae_afa_plugin.sweep.source_lines import Lines
from sae_afa_plugin.training.checks import check_sae, check_training

# of SAELens's trainer, what a sweep decides itself
_NOT_A_CHOICE = (
    *("total_training_samples", "device", "logger", "n_checkpoints", "checkpoint_path"),
    "save_final_checkpoint",
)
TRAINER_FIELDS = {f.name for f in fields(SAETrainerConfig)} - set(_NOT_A_CHOICE)
CONTROLS = ("untrained", "frozen_decoder")
_OF_A_ROW = ("architecture", "control", "hooks", "seeds", "trainer", "match_l0")

SHIPPED = ("demo", "paper", "smollm2", "truth")


def load_sweep(config: str | Path) -> Sweep:
    """Read and check a config.

    Args:
        config: A file, or the name of one that comes with the package: ``demo.yaml``,
            ``paper.yaml``, ``smollm2.yaml``, ``truth.yaml``. A file goes before such a name.

    Raises:
        Mistakes: With everything that is wrong with it.
        ValueError: If there is no such file, or it is no YAML.

    Example:
        >>> sweep = load_sweep("demo.yaml")
        >>> sweep.model, len(sweep.hooks), len(sweep.seeds)
        ('sae-afa-demo', 3, 3)
    """
    path = user_path(config)
    if not path.exists() and path.name == str(config) and path.stem in SHIPPED:
        with resources.as_file(
            resources.files("sae_afa_plugin.sweep") / "configs" / f"{path.stem}.yaml"
        ) as own:
            return parse_sweep(own.read_text(encoding="utf-8"), path.name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(f"{name}.yaml" for name in SHIPPED)
        raise ValueError(
            f"the config {str(path)!r} cannot be read ({error}): name a file, or one of {shipped}"
        ) from error
    return parse_sweep(text, path.name)


def parse_sweep(text: str, name: str = "the config") -> Sweep:
    """The same from text.

    Args:
        text: YAML.
        name: What it is called in messages.

    Raises:
        Mistakes: With everything that is wrong with it.
        ValueError: If it is no YAML.
    """
    lines = Lines(text, name)
    content: dict[str, Any] = lines.content
    known = {f.name for f in fields(Sweep)} - {"text"}
    for key in content:
        if key not in known:
            lines.unknown((key,), key, [*known])
    given: dict[str, Any] = {}
    for key in ("hooks", "seeds", "d_sae"):
        if key in content:
            kind = str if key == "hooks" else int
            given[key] = _several(lines, (key,), content[key], kind)
    for key in ("model", "device", "block_tokens", "steps", "memory", "checkpoint_seconds"):
        if key in content:
            hint = get_type_hints(Sweep)[key]
            given[key] = _value(lines, (key,), content[key], hint)
    for key, cls in (("synthetic", Synthetic), ("measure", Measured)):
        if key in content:
            given[key] = _object(lines, (key,), content[key], cls)
    for key in ("training", "heldout"):
        if key in content:
            given[key] = _text(lines, (key,), content[key])
    if "model_kwargs" in content:
        given["model_kwargs"] = _mapping(lines, ("model_kwargs",), content["model_kwargs"])
    if "trainer" in content:
        given["trainer"] = _trainer(lines, ("trainer",), content["trainer"])
    given["defaults"] = _defaults(lines, content.get("defaults", {}))
    for key in ("saes", "match_l0"):
        rows = content.get(key, [])
        if not isinstance(rows, list) or (key == "saes" and not rows):
            lines.say((key,), f"must be a list of rows: got {_told(rows)}")
            continue
        found = [_row(lines, (key, number), row) for number, row in enumerate(rows)]
        given[key] = tuple(row for row in found if row is not None)
    lines.check()
    sweep = Sweep(**given, text=text)
    _check(lines, sweep)
    lines.check()
    return sweep


# --- values ---


def _told(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


def _mapping(lines: Lines, path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    lines.say(path, f"must be a mapping, like 'key: value': got {_told(value)}")
    return {}


def _value(lines: Lines, path: tuple[Any, ...], value: Any, hint: Any) -> Any:
    """A value of the kind that a field asks for; fractions and 1e-4 are numbers."""
    kinds = set(get_args(hint) or (hint,))
    if value is None and type(None) in kinds:
        return None
    if float in kinds and isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            pass
    if float in kinds and type(value) is int:
        return float(value)
    if kinds & {bool, int, float, str} and type(value) not in kinds:
        names = " or ".join(sorted(k.__name__ for k in kinds if k in (bool, int, float, str)))
        lines.say(path, f"must be {names}: got {_told(value)}")
    return value


def _several(lines: Lines, path: tuple[Any, ...], value: Any, kind: type) -> tuple[Any, ...]:
    """One value or a list of them, each once."""
    values = value if isinstance(value, list) else [value]
    found: list[Any] = []
    for number, one in enumerate(values):
        place = (*path, number) if isinstance(value, list) else path
        if type(one) is not kind or (kind is int and one < 0):
            what = "a whole number, not below 0" if kind is int else "a word"
            lines.say(place, f"must be {what}: got {_told(one)}")
        elif one in found:
            lines.say(place, f"{one!r} is there twice")
        else:
            found.append(one)
    if not values:
        lines.say(path, "must not be empty")
    return tuple(found)


def _object(lines: Lines, path: tuple[Any, ...], value: Any, cls: type[Any]) -> Any:
    hints = get_type_hints(cls)
    given: dict[str, Any] = {}
    before = len(lines.problems)
    for key, one in _mapping(lines, path, value).items():
        if key in hints:
            given[key] = _value(lines, (*path, key), one, hints[key])
        else:
            lines.unknown((*path, key), key, [*hints])
    if len(lines.problems) > before:
        return cls()
    return _built(lines, path, lambda: cls(**given)) or cls()


def _built(lines: Lines, path: tuple[Any, ...], build: Callable[[], Any]) -> Any:
    """What is built, or None: its own sentence says in which field it is wrong."""
    try:
        return build()
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split()).removeprefix("cfg.")  # as SAELens calls it
        word = text.split(" ", 1)[0].split("=", 1)[0]
        lines.say((*path, word) if lines.of((*path, word)) != lines.of(path) else path, text)
        return None


def _text(lines: Lines, path: tuple[Any, ...], value: Any) -> Text:
    given = _mapping(lines, path, value)
    of_text = {f.name for f in fields(Text)} - {"tokens"}
    of_protocol = {f.name for f in fields(Protocol)}
    for key in given:
        if key not in of_text | of_protocol:
            lines.unknown((*path, key), key, [*of_text, *of_protocol])
    hints = get_type_hints(Text)
    own = {k: _value(lines, (*path, k), given[k], hints[k]) for k in given if k in of_text}
    if own.get("recording") is not None and len(given) > 1:
        others = ", ".join(key for key in given if key != "recording")
        lines.say((*path, "recording"), f"a recording has its tokens already: leave out {others}")
    found = Text(**own, tokens={key: given[key] for key in given if key in of_protocol})
    return found if _built(lines, path, lambda: found.protocol(1)) else Text()


def _trainer(lines: Lines, path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    hints, found = get_type_hints(SAETrainerConfig), dict[str, Any]()
    for key, one in _mapping(lines, path, value).items():
        if key in _NOT_A_CHOICE:
            lines.say(
                (*path, key), "is decided by the sweep (steps, device, checkpoints): leave it out"
            )
        elif key not in TRAINER_FIELDS:
            lines.unknown((*path, key), key, [*TRAINER_FIELDS])
        else:
            found[key] = _value(lines, (*path, key), one, hints[key])
    return found


# --- rows ---


def _architectures() -> list[str]:
    return [*SAE_TRAINING_CLASS_REGISTRY, PCA, TRUTH]


def _defaults(lines: Lines, value: Any) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for architecture in _architectures():
        known.update(fields_of(architecture))
    found: dict[str, Any] = {}
    for key, one in _mapping(lines, ("defaults",), value).items():
        if key in known:
            found[key] = _value(lines, ("defaults", key), one, known[key])
        else:
            lines.unknown(("defaults", key), key, [*known])
    return found


def _row(lines: Lines, path: tuple[Any, ...], value: Any) -> Row | None:
    if isinstance(value, str):
        value = {"architecture": value}
    given = _mapping(lines, path, value)
    architecture = given.get("architecture")
    if architecture not in _architectures():
        if architecture is None:
            lines.say(path, "names no architecture, like 'architecture: topk'")
        else:
            lines.unknown((*path, "architecture"), architecture, _architectures())
        return None
    known = fields_of(architecture)
    options: dict[str, tuple[Any, ...]] = {}
    for key, one in given.items():
        if key in _OF_A_ROW:
            continue
        if key not in known:
            lines.unknown((*path, key), key, [*known, *_OF_A_ROW])
            continue
        options[key] = _grid(lines, (*path, key), one, known[key])
    control = given.get("control")
    if control not in (None, *CONTROLS):
        lines.unknown((*path, "control"), control, [*CONTROLS])
    elif control is not None and architecture in (PCA, TRUTH):
        lines.say((*path, "control"), f"{architecture} is a control itself: leave it out")
    several: dict[str, Any] = {
        key: _several(lines, (*path, key), given[key], str if key == "hooks" else int)
        for key in ("hooks", "seeds")
        if key in given
    }
    if "match_l0" in given:
        several["match_l0"] = _value(lines, (*path, "match_l0"), given["match_l0"], bool)
    trainer = _trainer(lines, (*path, "trainer"), given.get("trainer", {}))
    return Row(architecture, options, control, trainer=trainer, line=lines.of(path), **several)


def _grid(lines: Lines, path: tuple[Any, ...], value: Any, hint: Any) -> tuple[Any, ...]:
    """All values of an option; one that is a list itself is in a list of lists."""
    is_list = get_origin(hint) is list
    values = value if isinstance(value, list) and (not is_list or _of_lists(value)) else [value]
    if not values:
        lines.say(path, "must not be empty")
    found: list[Any] = []
    for number, one in enumerate(values):
        place = (*path, number) if values is value else path
        one = one if is_list else _value(lines, place, one, hint)
        if one in found:
            lines.say(place, f"{one!r} is there twice")
        else:
            found.append(one)
    return tuple(found)


def _of_lists(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(one, list) for one in value)


# --- what fits together ---


def _check(lines: Lines, sweep: Sweep) -> None:
    content = lines.content
    numbers = SimpleNamespace(**vars(sweep))
    for check in (
        lambda: limits.whole(numbers, "steps", at_least=1),
        lambda: limits.whole(numbers, "block_tokens", at_least=1, none=True),
        lambda: limits.real(numbers, "memory", more_than=0),
        lambda: limits.real(numbers, "checkpoint_seconds"),
        lambda: limits.text(numbers, "model", "device", none=True),
    ):
        _built(lines, (), check)
    if (sweep.synthetic is None) == (sweep.model is None and sweep.training.recording is None):
        lines.say((), "name a model, or a synthetic world, or recordings to read: one of them")
    if sweep.synthetic is None:
        if not sweep.hooks:
            lines.say((), "hooks must name at least one hook")
        if (sweep.training.recording is None) != (sweep.heldout.recording is None):
            lines.say(("training",), "training and heldout must both be recordings, or neither")
        if sweep.training == sweep.heldout or (
            (sweep.training.dataset, sweep.training.dataset_config, sweep.training.split)
            == (sweep.heldout.dataset, sweep.heldout.dataset_config, sweep.heldout.split)
            and sweep.training.recording is None
        ):
            lines.say(
                ("heldout",),
                "must be other text than that of training: name another dataset or split",
            )
    else:
        for key in ("hooks", "training", "heldout", "model_kwargs"):
            if key in content:
                lines.say((key,), "belongs to a language model, not to a synthetic world")
    _check_trainer(lines, ("trainer",), sweep, {})
    for key, rows in (("saes", sweep.saes), ("match_l0", sweep.match_l0)):
        for number, row in enumerate(rows):
            _check_row(lines, (key, number), sweep, row)


def _check_trainer(
    lines: Lines, path: tuple[Any, ...], sweep: Sweep, trainer: Mapping[str, Any]
) -> None:
    batch = int({**sweep.trainer, **trainer}.get("train_batch_size_samples", sweep.batch_size))
    given: dict[str, Any] = {
        "train_batch_size_samples": batch,
        **sweep.trainer,
        **trainer,
        "total_training_samples": sweep.steps * batch,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    _built(lines, path, lambda: check_training(SAETrainerConfig(**given)))


def _check_row(lines: Lines, path: tuple[Any, ...], sweep: Sweep, row: Row) -> None:
    for hook in row.hooks or ():
        if hook not in sweep.hooks:
            lines.unknown((*path, "hooks"), hook, [*sweep.hooks])
    if row.architecture == TRUTH and sweep.synthetic is None:
        lines.say((*path, "architecture"), "the truth is known of a synthetic world alone")
    if row.trainer:
        _check_trainer(lines, (*path, "trainer"), sweep, row.trainer)
    told = l0_option(row.architecture)
    if path[0] == "match_l0":
        if told is None:
            lines.say(path, f"{row.architecture} cannot be told an L0")
        elif told in row.options:
            lines.say((*path, told), "is what is matched: leave it out")
        if row.seeds is not None or row.control is not None or not row.match_l0:
            lines.say(
                path,
                "seeds, control and match_l0 are those of the SAE that is matched: leave them out",
            )
        row = replace(row, options={**row.options, **({told: (1,)} if told else {})})
    elif row.architecture == PCA and "k" not in row.options:
        lines.say(path, "pca needs k, the number of directions")
    for number, value in enumerate(row.options.get(told or "", ())):
        if value is not None and value <= 0:
            lines.say((*path, str(told), number), f"must be more than 0: got {value}")
    if row.architecture in (PCA, TRUTH):
        return
    if not row.options.get("d_sae") and not sweep.d_sae:
        lines.say(path, "d_sae is said neither here nor for all: how many features?")
        return
    for options in row_options(sweep, row):
        if _built(lines, path, lambda o=options: _checked(row.architecture, o)) is None:
            return


def _checked(architecture: str, options: Mapping[str, Any]) -> TrainingSAEConfig:
    """The config of an SAE of some width, which is not known here."""
    cfg = sae_config(architecture, 16, options)
    check_sae(cfg)
    return cfg
