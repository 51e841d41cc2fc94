"""The command lines of ``sae-afa evaluate`` and ``sae-afa record``, in both directions."""

from __future__ import annotations

import argparse
import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sae_afa_plugin.activations.language_model import Reading
from sae_afa_plugin.activations.recording import DTYPES
from sae_afa_plugin.activations.tokens import PROTOCOLS, Protocol
from sae_afa_plugin.evaluation import Evaluation
from sae_afa_plugin.files import user_path
from sae_afa_plugin.options import add_options, arguments_for, given_options
from sae_afa_plugin.results import AFAResults

Commands = Any  # what argparse's add_subparsers returns has no public name


def _parser(commands: Commands, name: str, **texts: str) -> argparse.ArgumentParser:
    texts["description"] = textwrap.fill(texts["description"], 79)
    return commands.add_parser(
        name,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **texts,
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add_options(parser.add_argument_group("what is read"), Reading)
    tokens = parser.add_argument_group("which tokens")
    tokens.add_argument(
        "--protocol",
        choices=sorted(PROTOCOLS),
        default="default",
        help="'default': every token of sequences cut from the text; 'paper': the last token of "
        f"{PROTOCOLS['paper'].n_tokens:,} documents of 128 tokens with BOS",
    )
    add_options(tokens, Protocol)


def reading_given(args: argparse.Namespace) -> dict[str, Any]:
    """Model, dataset and choice of tokens, as keywords of ``evaluate_saes``.

    Args:
        args: What was parsed.
    """
    given = {**given_options(args, Reading), **given_options(args, Protocol)}
    if args.protocol != "default":
        given["protocol"] = args.protocol
    return given


# --- evaluate ---


def add_evaluate(commands: Commands) -> None:
    """Add the parser of ``sae-afa evaluate``."""
    parser = _parser(
        commands,
        "evaluate",
        help="say of any SAEs whether their features are over- or under-activated, and why",
        description="The AFA metric of SAEs on one pass of their language model: on a nearly "
        "orthogonal dictionary the norm of the features ||f|| is about the norm of the input "
        "||z||. Prints a table and leaves summary.csv, results.json and tables of tokens in the "
        "output folder. Interrupted and started again with the same settings, it goes on with "
        "the SAEs that are missing; several processes may share one folder.",
        epilog="examples:\n"
        "  sae-afa evaluate gpt2-small-res-jb --protocol paper\n"
        "  sae-afa evaluate gemma-scope-2b-pt-res --sae-id '*width_16k/average_l0_7?' --tokens 20000\n"
        "  sae-afa evaluate --path output/demo/topafa --path output/demo/topk --dataset embedded\n"
        "\nexit status: 0 all SAEs evaluated, 1 some could not be, 2 none (a mistake in the "
        "arguments, say), 130 interrupted",
    )
    parser.add_argument(
        "release", nargs="?", help="a release of SAELens's catalogue, or user/repository on the hub"
    )
    parser.add_argument(
        "--sae-id",
        action="append",
        metavar="GLOB",
        help="only the SAEs of the release whose id is this or fits this pattern (repeatable)",
    )
    parser.add_argument(
        "--path",
        action="append",
        type=user_path,
        default=[],
        metavar="FOLDER",
        help="an SAE that SAELens has saved (repeatable)",
    )
    parser.add_argument(
        "--activations",
        type=user_path,
        metavar="FOLDER",
        help="a recording of sae-afa record, in place of a model and a dataset",
    )
    parser.add_argument(
        "--out",
        type=user_path,
        default=Path("output/evaluation"),
        help="folder for the results (default: %(default)s)",
    )
    _add_reading(parser)
    add_options(parser.add_argument_group("how they are evaluated"), Evaluation)


def evaluation_given(args: argparse.Namespace) -> dict[str, Any]:
    """All options of ``sae-afa evaluate`` beside the SAEs, as keywords of ``evaluate_saes``.

    Args:
        args: What was parsed.
    """
    given = {**reading_given(args), **given_options(args, Evaluation)}
    return given if args.activations is None else {**given, "activations": args.activations}


def evaluate_commands(results: AFAResults) -> list[list[str]]:
    """The command lines that make these results again, one for each release.

    What was an object in Python is called YOUR_MODEL or YOUR_DATASET. Empty where all SAEs were.

    Args:
        results: With ``options`` in their metadata.
    """
    sources = [str(row.get("source", "in memory")) for _, row in results.summary.iterrows()]
    of_releases = [source.split("\t", 1) for source in sources if "\t" in source]
    # one release for each command: the next goes on in the same folder
    wanted = {release: [release] for release, _ in of_releases} or {"": []}
    for release, sae_id in of_releases:
        wanted[release] += ["--sae-id", sae_id]
    for source in sources:
        if "\t" not in source and source != "in memory":
            next(iter(wanted.values())).extend(["--path", source])
    same = option_arguments(results.metadata)
    return [["sae-afa", "evaluate", *of, *same] for of in wanted.values() if of]


def option_arguments(metadata: Mapping[str, Any]) -> list[str]:
    """The arguments that give the options of an evaluation again.

    Args:
        metadata: Of results.
    """
    options, settings = metadata.get("options", {}), metadata.get("settings", {})
    found = arguments_for(Evaluation, options)
    if options.get("activations") is not None:
        return [f"--activations={options['activations']}", *found]
    reading = arguments_for(Reading, options)
    if options.get("model") is None and settings.get("model_content") is not None:
        reading.append("--model=YOUR_MODEL")
    if options.get("dataset") is None and options:
        reading.append("--dataset=YOUR_DATASET")
    return [*reading, *_protocol_arguments(options), *found]


def _protocol_arguments(options: Mapping[str, Any]) -> list[str]:
    """From the protocol that is nearest, with what differs from it."""
    known = {f: options[f] for f in asdict(PROTOCOLS["default"]) if f in options}
    values = asdict(replace(PROTOCOLS["default"], **known))  # lists become tuples again
    candidates: list[list[str]] = []
    for name, protocol in PROTOCOLS.items():
        base = asdict(protocol)
        if any(values[f] is None and base[f] is not None for f in values):
            continue  # no flag takes back what a protocol says
        named = [] if name == "default" else [f"--protocol={name}"]
        candidates.append([*named, *arguments_for(Protocol, values, base)])
    return min(candidates, key=len)


def shell_lines(commands: Sequence[Sequence[str]]) -> str:
    """Command lines as a shell takes them, one on each line."""
    return "\n".join(shlex.join(command) for command in commands)


# --- record ---


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be an object like {{}}: got {text}")
    return found


def add_record(commands: Commands) -> None:
    """Add the parser of ``sae-afa record``."""
    parser = _parser(
        commands,
        "record",
        help="write the activations of a language model to disk, once for many evaluations",
        description="Run a language model over text and keep its activations at some hooks, in "
        "shards that any number of evaluations and machines can read instead of the model. Says "
        "the size before it starts. Interrupted and started again, it goes on.",
        epilog="examples:\n"
        "  sae-afa record --model gpt2 --hook blocks.8.hook_resid_pre --tokens 200000 --out gpt2-l8\n"
        "  sae-afa evaluate --path output/gpt2-l8 --activations gpt2-l8",
    )
    parser.add_argument(
        "--hook",
        action="append",
        required=True,
        metavar="NAME",
        help="a hook, as blocks.8.hook_resid_pre (repeatable)",
    )
    parser.add_argument("--out", type=user_path, required=True, help="folder for the recording")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="precision on disk (default: as the model computes)",
    )
    parser.add_argument(
        "--model-kwargs",
        type=_json_object,
        metavar="JSON",
        help="how the model is loaded and processed, as '{\"center_writing_weights\": true}' for "
        "gpt2-small-res-jb",
    )
    parser.add_argument("--device", help="for the model (default: a GPU if there is one)")
    parser.add_argument(
        "--batch-size-prompts", type=int, default=16, help="sequences in one forward pass (16)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let Python from the model's repository run (transformers' option of this name)",
    )
    _add_reading(parser)


# --- sweep ---


def add_sweep(commands: Commands) -> None:
    """Add the parser of ``sae-afa sweep``."""
    parser = _parser(
        commands,
        "sweep",
        help="train and compare many SAEs from one config, at equal L0, over seeds",
        description="Train every SAE of a grid (hooks, architectures, options, seeds) on the same "
        "activations, evaluate them on held-out tokens, and compare those that choose their L0 "
        "with others at that L0. Says what it will do and about how long it takes. Interrupted "
        "and started again, it goes on; with rows added to the config, only those are trained.",
        epilog="configs that come with the package: demo.yaml, smollm2.yaml, truth.yaml, "
        "paper.yaml\n\nexamples:\n"
        "  sae-afa sweep demo.yaml --out output/sweep --dry-run\n"
        "  sae-afa sweep my.yaml --out output/mine",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or one of those below")
    parser.add_argument(
        "--out", type=user_path, required=True, help="folder for SAEs, evaluation and tables"
    )
    parser.add_argument("--dry-run", action="store_true", help="stop after the plan")
