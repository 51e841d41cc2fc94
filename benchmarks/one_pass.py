"""SAEs of one sweep beside the same SAEs one after the other: python benchmarks/one_pass.py

Eight SAEs (top-AFA, TopK and BatchTopK) are trained at one layer of SmolLM2-135M on the same tokens:
first together, as a sweep does, on one pass of the language model; then each by SAELens's own
``LanguageModelSAETrainingRunner``. Times are from the model in memory to the saved SAEs, and on the
same machine in the same run. ``make bench`` installs what SmolLM2 needs.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from measuring import machine, write
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)

from sae_afa_plugin.sweep.grid import members
from sae_afa_plugin.sweep.reader import parse_sweep
from sae_afa_plugin.sweep.sources import sources_of_sweep
from sae_afa_plugin.training.coordinator import train_saes
from sae_afa_plugin.training.run import SAETraining
from sae_afa_plugin.training.stream import default_block

CONFIG = """
model: {model}
hooks: [{hook}]
training: {{dataset: embedded-train}}
heldout: {{dataset: embedded}}
d_sae: {d_sae}
steps: {steps}
trainer: {{train_batch_size_samples: {batch}, lr: 3e-4}}
saes:
  - {{architecture: topafa, normalize_activations: none, afa_coefficient: [1/128, 1/32]}}
  - {{architecture: topk, k: [16, 64, 256]}}
  - {{architecture: batchtopk, k: [16, 64, 256]}}
"""


def one_by_one(source: Any, training: SAETraining, folder: Path) -> None:
    """SAELens's runner: its own pass of the model, its own batches."""
    tokens = source.sample.tokens
    trainer = training.trainer
    cfg: LanguageModelSAERunnerConfig[Any] = LanguageModelSAERunnerConfig(
        sae=training.sae,
        model_name="the model that is passed",
        hook_name=training.hook_name,
        dataset_path="the tokens that are passed",
        is_dataset_tokenized=True,
        context_size=tokens.shape[1],
        training_tokens=trainer.total_training_samples,
        train_batch_size_tokens=trainer.train_batch_size_samples,
        store_batch_size_prompts=16,
        n_batches_in_buffer=64,
        lr=trainer.lr,
        lr_warm_up_steps=0,
        n_checkpoints=0,
        output_path=str(folder),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        seed=training.seed,
    )
    dataset: Any = Dataset.from_dict({"tokens": tokens.tolist()})
    LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=source.model).run()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="or sae-afa-demo")
    parser.add_argument("--hook", default="blocks.10.hook_resid_pre")
    parser.add_argument("--d-sae", type=int, default=2304)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("output/performance"))
    args = parser.parse_args()
    logging.getLogger("sae_lens").setLevel(logging.ERROR)

    sweep = parse_sweep(CONFIG.format(**vars(args)))
    sources = sources_of_sweep(sweep, "cpu", progress=False)
    source: Any = sources.training
    n_tokens = source.n_tokens  # loads the model and tokenizes, which both ways need
    d_in = source.shapes([args.hook])[args.hook].numel()
    trainings = {m.name: m.training(sweep, d_in, "cpu") for m in members(sweep)}
    source.read([args.hook], n_tokens - 1, n_tokens)  # the first pass is slower
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        trained = train_saes(
            trainings,
            source,
            Path(folder, "sweep"),
            block_tokens=min(default_block(args.batch), args.steps * args.batch),
            progress=False,
        )
        together = time.perf_counter() - started
        assert all(one.reason is None for one in trained.values())
        steps = sum(one.seconds for one in trained.values())
        apart = 0.0
        for name, training in trainings.items():
            started = time.perf_counter()
            one_by_one(source, training, Path(folder, "alone", name))
            alone = time.perf_counter() - started
            apart += alone
            print(f"{name}: {alone:.1f} s", flush=True)
    lines = [
        f"{len(trainings)} SAEs at {args.hook} of {args.model}, d_in {d_in}, d_sae "
        f"{args.d_sae:,}, {args.steps} steps of {args.batch:,} tokens, {machine()}",
        "",
        "| | seconds |",
        "|---|---|",
        f"| together, on one pass | {together:.0f} (training steps: {steps:.0f}) |",
        f"| one by one, SAELens's runner | {apart:.0f} |",
        f"| ratio | {apart / together:.1f} |",
    ]
    write(args.out / "one_pass.md", lines)


if __name__ == "__main__":
    main()
