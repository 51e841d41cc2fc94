"""Training with SAELens's unmodified trainers: parity, resuming, every runner, the log."""

from __future__ import annotations

import copy
import itertools
import json
import warnings

import pytest
import torch
from datasets import Dataset
from helpers.disks import small_disk
from helpers.straight_line import StraightLineTraining
from sae_lens import (
    SAE,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LanguageModelSAERunnerConfig, SAETrainerConfig
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from safetensors.torch import load_file

from sae_afa_plugin import TopAFASAE, TopAFATrainingSAE, TopAFATrainingSAEConfig
from sae_afa_plugin.activations.embedded import load_embedded_model
from sae_afa_plugin.activations.hooks import check_hook
from sae_afa_plugin.activations.text import standard_library_texts
from sae_afa_plugin.files import NotWrittenError
from sae_afa_plugin.training.log import LOG_FILENAME
from sae_afa_plugin.training.runners import LoggedMultiTrainingRunner, LoggedTrainingRunner

HOOK = "blocks.4.hook_resid_pre"


@pytest.fixture(scope="module")
def model():
    return load_embedded_model()


@pytest.fixture(scope="module")
def text():
    return Dataset.from_dict({"text": standard_library_texts("train")[:60]}).to_iterable_dataset()


@pytest.fixture(scope="module")
def activations(model):
    """Real activations ``[n, 192]`` of the embedded language model."""
    tokens = model.to_tokens("\n\n".join(standard_library_texts("train")[:40]), truncate=False)[
        0, 1:
    ]
    tokens = tokens[: 160 * 128].view(160, 128)
    _, cache = model.run_with_cache(tokens, names_filter=HOOK, stop_at_layer=5)
    return cache[HOOK].reshape(-1, 192)


def trainer_config(steps, batch, **fields):
    defaults = {
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "save_final_checkpoint": False,
        "total_training_samples": steps * batch,
        "device": "cpu",
        "autocast": False,
        "lr": 1e-3,
        "lr_end": 1e-3,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "lr_decay_steps": 0,
        "n_restart_cycles": 1,
        "train_batch_size_samples": batch,
        "dead_feature_window": 5,
        "feature_sampling_window": 1000,
        "logger": LoggingConfig(log_to_wandb=False),
        "n_batches_for_norm_estimate": 4,
    }
    return SAETrainerConfig(**{**defaults, **fields})


def new_sae(**fields):
    torch.manual_seed(0)
    return TopAFATrainingSAE(TopAFATrainingSAEConfig(**{"d_in": 192, "d_sae": 512, **fields}))


def test_parity_with_a_straight_line_implementation(activations):
    """60 steps beside SAELens's trainer on real activations, in float64.

    Tolerance 1e-10: both run in float64 and differ only in the order of sums (1e-16 per
    operation), but Adam divides by the root of the second moment, which amplifies that where a
    gradient is nearly zero, and the steps build on each other. Observed: 3e-15.
    """
    steps, batch = 60, 256
    sae = new_sae(dtype="float64", top_k_aux=4)
    with torch.no_grad():  # features that start silent, so that the auxiliary loss takes part
        sae.W_enc[:, :40] *= 0.01
    reference = StraightLineTraining(
        sae.state_dict(),
        afa_coefficient=1 / 32,
        aux_coefficient=1 / 32,
        top_k_aux=4,
        dead_window=5,
        lr=1e-3,
        beta1=0.9,
        beta2=0.99,
    )
    batches = activations.double().split(batch)[:steps]
    trainer = SAETrainer(trainer_config(steps, batch), sae, iter(batches))
    step, outputs = trainer.step, []
    trainer.step = lambda x: outputs.append(step(x)) or outputs[-1]
    trainer.fit()

    with_aux = 0
    for x, output in zip(batches, outputs, strict=True):
        losses, kept = reference.step(x)
        assert {k: v.item() for k, v in output.losses.items()} == pytest.approx(losses, rel=1e-10)
        assert torch.equal(output.feature_acts != 0, kept)
        with_aux += losses["auxiliary_reconstruction_loss"] > 0
    assert with_aux > 15
    for name, expected in reference.weights.items():
        torch.testing.assert_close(
            getattr(sae, name).detach(), expected.detach(), rtol=1e-10, atol=1e-10
        )
    assert (sae.W_dec.norm(dim=-1) - 1).abs().max() < 5e-3  # one step of Adam away


@pytest.mark.parametrize("normalize", ["layer_norm", "expected_average_only_in"])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(
    activations, tmp_path, normalize
):
    batch, fields = (
        256,
        {"normalize_activations": normalize, "afa_warm_up_steps": 15, "top_k_aux": 4},
    )
    batches = activations.split(batch)
    # 4 batches for the norm estimate come first where it is needed
    first = 4 if normalize == "expected_average_only_in" else 0

    whole = new_sae(**fields)
    SAETrainer(trainer_config(24, batch), whole, iter(batches)).fit()

    interrupted = new_sae(**fields)
    trainer = SAETrainer(
        trainer_config(24, batch, n_checkpoints=1, checkpoint_path=str(tmp_path)),
        interrupted,
        iter(batches[: first + 14]),
    )
    with pytest.raises(StopIteration):  # the data ends in the middle
        trainer.fit()
    (checkpoint,) = tmp_path.iterdir()
    done = int(checkpoint.name) // batch
    assert 10 <= done <= 14

    resumed = new_sae(**fields)
    torch.nn.init.zeros_(resumed.W_enc)  # everything must come from the checkpoint
    trainer = SAETrainer(trainer_config(24, batch), resumed, iter(batches[first + done :]))
    trainer.load_trainer_state(checkpoint)
    resumed.load_weights_from_checkpoint(checkpoint)
    # a checkpoint is written before its step is counted
    trainer.n_training_steps = done
    trainer.fit()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_the_norm_factor_is_folded_at_the_end(activations):
    sae = new_sae(normalize_activations="expected_average_only_in")
    SAETrainer(trainer_config(10, 256), sae, itertools.cycle(activations.split(256))).fit()
    assert sae.cfg.normalize_activations == "none"
    x = activations[:500]
    error = (sae(x) - x).norm() / x.norm()
    assert error < 0.7  # in the units of the model, not in the scaled ones


def runner_config(tmp_path, **fields):
    return LanguageModelSAERunnerConfig(
        **{
            "sae": TopAFATrainingSAEConfig(d_in=192, d_sae=384),
            "hook_name": HOOK,
            "model_name": "sae-afa-demo",
            "context_size": 64,
            "training_tokens": 12 * 256,
            "train_batch_size_tokens": 256,
            "store_batch_size_prompts": 8,
            "n_batches_in_buffer": 8,
            "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=5),
            "checkpoint_path": None,
            "output_path": str(tmp_path / "out"),
            "verbose": False,
            **fields,
        }
    )


def test_the_runner_trains_saves_and_logs(model, text, tmp_path):
    runner = LoggedTrainingRunner(
        runner_config(tmp_path), override_dataset=text, override_model=model
    )
    trained = runner.run()
    assert type(trained) is TopAFATrainingSAE
    sae = SAE.load_from_disk(tmp_path / "out")
    assert type(sae) is TopAFASAE
    assert sae.cfg.metadata.hook_name == HOOK
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(384))
    lines = [
        json.loads(line) for line in (tmp_path / "out" / LOG_FILENAME).read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [5, 10]
    assert 0 < lines[0]["seconds"] < lines[1]["seconds"]
    for name in (
        "mean_l0",
        "min_l0",
        "max_l0",
        "norm_ratio",
        "over_activated",
        "nmse",
        "dead_features",
    ):
        assert isinstance(lines[0][f"metrics/{name}"], float | int)
    assert lines[0]["metrics/mean_l0"] == pytest.approx(lines[0]["metrics/l0"])
    assert lines[0]["losses/overall_loss"] == pytest.approx(
        sum(
            lines[0][f"losses/{n}"]
            for n in ("mse_loss", "afa_loss", "auxiliary_reconstruction_loss")
        )
    )
    assert lines[0]["details/afa_coefficient"] == 1 / 32


def test_the_log_starts_anew_and_a_resumed_run_continues_it(model, text, tmp_path):
    fields = {
        "n_checkpoints": 1,
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "sae": TopAFATrainingSAEConfig(d_in=192, d_sae=384, afa_warm_up_steps=8),
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=2),
    }

    def run(**more):
        LoggedTrainingRunner(
            runner_config(tmp_path, **fields, **more), override_dataset=text, override_model=model
        ).run()
        log = (tmp_path / "out" / LOG_FILENAME).read_text().splitlines()
        return [json.loads(line) for line in log]

    run()
    lines = run()
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert [32 * line["details/afa_coefficient"] for line in lines] == [
        0.25, 0.5, 0.75, 1, 1, 1,
    ]  # fmt: skip
    checkpoint = max((tmp_path / "checkpoints").glob("*/*"), key=lambda p: p.stat().st_mtime)
    assert int(checkpoint.name) == 7 * 256
    with (tmp_path / "out" / LOG_FILENAME).open("a") as log:
        log.write('{"step": 4, "secon')  # what a kill leaves
    resumed = run(resume_from_checkpoint=str(checkpoint))
    assert [line["step"] for line in resumed] == [2, 4, 6, 8, 10, 12]
    assert resumed[:3] == lines[:3]


def test_compiled_and_autocast_training_learn_the_same(model, text, tmp_path):
    nmse = {}
    for name, fields in {
        "plain": {},
        "compiled": {"compile_sae": True},
        "autocast": {"autocast": True},
    }.items():
        torch.manual_seed(0)
        runner = LoggedTrainingRunner(
            runner_config(tmp_path / name, **fields), override_dataset=text, override_model=model
        )
        runner.run()
        line = (tmp_path / name / "out" / LOG_FILENAME).read_text().splitlines()[-1]
        nmse[name] = json.loads(line)["metrics/nmse"]
    assert nmse["compiled"] == pytest.approx(nmse["plain"], rel=0.02)
    assert nmse["autocast"] == pytest.approx(nmse["plain"], rel=0.05)


@pytest.mark.parametrize("runner_class", [MultiSAETrainingRunner, LoggedMultiTrainingRunner])
def test_many_saes_on_one_pass(model, text, tmp_path, runner_class):
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "a": TopAFATrainingSAEConfig(d_in=192, d_sae=384),
            "b": TopAFATrainingSAEConfig(d_in=192, d_sae=256, afa_coefficient=1 / 128),
            "topk": TopKTrainingSAEConfig(d_in=192, d_sae=256, k=20),
        },
        hook_names={"a": HOOK, "b": "blocks.2.hook_resid_pre", "topk": HOOK},
        context_size=64,
        training_tokens=12 * 256,
        train_batch_size_tokens=256,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        checkpoint_path=None,
        output_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=6),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All samples in the training dataset")
        saes = runner_class(cfg, override_dataset=text, override_model=model).run()
    assert {name: type(sae).__name__ for name, sae in saes.items()} == {
        "a": "TopAFATrainingSAE",
        "b": "TopAFATrainingSAE",
        "topk": "TopKTrainingSAE",
    }
    assert (saes["a"].W_dec.norm(dim=-1) - 1).abs().max() < 1e-2
    assert type(SAE.load_from_disk(tmp_path / "b")) is TopAFASAE
    if runner_class is LoggedMultiTrainingRunner:
        lines = [json.loads(line) for line in (tmp_path / LOG_FILENAME).read_text().splitlines()]
        assert [(line["step"], line["sae"]) for line in lines] == [
            (6, "a"),
            (6, "b"),
            (6, "topk"),
            (12, "a"),
            (12, "b"),
            (12, "topk"),
        ]
        assert "metrics/norm_ratio" in lines[0]
        assert "metrics/norm_ratio" not in lines[2]


def test_synthetic_runner(tmp_path):
    runner = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(num_features=32, hidden_dim=16),
            sae=TopAFATrainingSAEConfig(d_in=16, d_sae=32, normalize_activations="none"),
            training_samples=20 * 256,
            batch_size=256,
            eval_samples=2000,
            checkpoint_path=None,
            output_path=str(tmp_path),
            logger=LoggingConfig(log_to_wandb=False),
        )
    )
    runner.run()
    assert (runner.sae.W_dec.norm(dim=-1) - 1).abs().max() < 1e-2


def test_training_reduces_the_error(activations):
    sae = new_sae()
    trainer = SAETrainer(trainer_config(60, 256), sae, itertools.cycle(activations.split(256)))
    step, nmse = trainer.step, []

    def record(x):
        output = step(x)
        nmse.append(float(output.metrics["nmse"]()))
        return output

    trainer.step = record
    trainer.fit()
    assert nmse[-1] < 0.5 * nmse[0]


def test_a_missing_hook_is_named_with_near_matches(model):
    with pytest.raises(
        ValueError,
        match="the model has no hook 'blocks.4.hook_resid_pree': did you mean "
        "'blocks.4.hook_resid_pre' or ",
    ):
        check_hook(model, "blocks.4.hook_resid_pree", 192)


def test_a_wrong_width_is_named_before_training(model, text, tmp_path):
    cfg = runner_config(tmp_path, sae=TopAFATrainingSAEConfig(d_in=512, d_sae=1024))
    runner = LoggedTrainingRunner(cfg, override_dataset=text, override_model=model)
    with pytest.raises(
        ValueError,
        match="the activations at 'blocks.4.hook_resid_pre' have width 192, but the SAE has "
        "d_in=512: set d_in=192 or choose another hook",
    ):
        runner.run()
    assert not (tmp_path / "out").exists()
    # heads count together, unless one is chosen
    check_hook(model, "blocks.4.attn.hook_z", 192)
    check_hook(model, "blocks.4.attn.hook_z", 32, head_index=1)
    with pytest.raises(ValueError, match="hook_head_index=6 does not fit .* which has 6 heads"):
        check_hook(model, "blocks.4.attn.hook_z", 32, head_index=6)
    with pytest.raises(ValueError, match="hook_head_index=1 does not fit .* which has no heads"):
        check_hook(model, HOOK, 192, head_index=1)


# --- what is not finite ---


class Holes:
    """A language model some of whose activations are NaN: those of these tokens' places."""

    def __init__(self, model, position=5):
        self.model, self.position = model, position

    def __enter__(self):
        def hole(acts, hook):
            acts = acts.clone()
            acts[0, self.position, 3] = torch.nan
            return acts

        self.model.hook_dict[HOOK].add_hook(hole, is_permanent=True)

    def __exit__(self, *_):
        self.model.reset_hooks(including_permanent=True)


def logged(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / LOG_FILENAME).read_text().splitlines()]


@pytest.mark.parametrize(
    "sae",
    [
        TopAFATrainingSAEConfig(d_in=192, d_sae=384),
        TopAFATrainingSAEConfig(
            d_in=192, d_sae=384, normalize_activations="expected_average_only_in"
        ),
        TopKTrainingSAEConfig(d_in=192, d_sae=384, k=20),
        TopKTrainingSAEConfig(
            d_in=192, d_sae=384, k=20, normalize_activations="covariance_whitening"
        ),
    ],
    ids=["topafa", "topafa scaled", "topk", "topk whitened"],
)
def test_tokens_that_are_not_finite_are_left_out(model, text, tmp_path, sae):
    runner = LoggedTrainingRunner(
        runner_config(tmp_path, sae=sae, n_batches_for_norm_estimate=4),
        override_dataset=text,
        override_model=model,
    )
    with Holes(model), pytest.warns(UserWarning, match="of the training of this SAE had values"):
        runner.run()
    lines = logged(tmp_path)
    assert 0 < lines[0]["metrics/non_finite_tokens"] < lines[1]["metrics/non_finite_tokens"] < 60
    assert all(isinstance(line["losses/overall_loss"], float) for line in lines)
    assert [line["step"] for line in lines] == [5, 10]
    assert lines[-1]["details/n_training_samples"] == 10 * 256
    saved = SAE.load_from_disk(tmp_path / "out")
    assert all(w.isfinite().all() for w in saved.state_dict().values())


def test_a_training_that_diverges_ends_in_that_step_and_saves_nothing(model, text, tmp_path):
    cfg = runner_config(
        tmp_path,
        sae=TopKTrainingSAEConfig(d_in=192, d_sae=384, k=20),
        lr=1e30,
        n_checkpoints=3,
        checkpoint_path=str(tmp_path / "checkpoints"),
    )
    runner = LoggedTrainingRunner(cfg, override_dataset=text, override_model=model)
    with pytest.raises(
        ValueError,
        match=r"its loss was no longer a number in step 2 of 12: lower lr \(it is 1e\+30\)",
    ):
        runner.run()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_of_several_the_one_that_diverges_is_left_behind(model, text, tmp_path):
    size = {"d_in": 192, "d_sae": 256}
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "bad": StandardTrainingSAEConfig(**size, l1_coefficient=1e38),
            "good": TopAFATrainingSAEConfig(**size),
        },
        hook_names=HOOK,
        context_size=64,
        training_tokens=12 * 256,
        train_batch_size_tokens=256,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        feature_sampling_window=4,
        n_checkpoints=2,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "out"),
        logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=6),
    )
    runner = LoggedMultiTrainingRunner(cfg, override_dataset=text, override_model=model)
    with pytest.warns(UserWarning, match="the SAE 'bad' was left behind: .* no longer a number"):
        saes = runner.run()
    assert list(saes) == ["good"]
    assert [file.parent.name for file in tmp_path.glob("out/*/cfg.json")] == ["good"]
    for file in tmp_path.rglob("sae_weights.safetensors"):
        assert all(w.isfinite().all() for w in load_file(file).values())
    assert [(line["step"], line["sae"]) for line in logged(tmp_path)] == [(6, "good"), (12, "good")]


# --- copies ---


@pytest.mark.parametrize("sae", [TopAFATrainingSAEConfig, TopKTrainingSAEConfig])
def test_a_copied_trainer_trains_the_copy(model, text, activations, tmp_path, sae):
    class Keeping(LoggedTrainingRunner):
        def run_trainer_with_interruption_handling(self, trainer):
            self.trainer = trainer
            return super().run_trainer_with_interruption_handling(trainer)

    k = {} if sae is TopAFATrainingSAEConfig else {"k": 20}
    runner = Keeping(
        runner_config(tmp_path, sae=sae(d_in=192, d_sae=384, **k)),
        override_dataset=text,
        override_model=model,
    )
    runner.run()
    trainer = runner.trainer
    # these are the runner's and hold its generators, which nothing can copy
    trainer.data_provider, trainer.evaluator, trainer.save_checkpoint_fn = iter(()), None, None
    copied = copy.deepcopy(trainer)
    weights, log = copy.deepcopy(trainer.sae.state_dict()), logged(tmp_path)
    moments = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    for x in activations.split(256)[:6]:
        copied.step(x)
    for name, tensor in trainer.sae.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
        assert not torch.equal(copied.sae.state_dict()[name], tensor) or name == "b_enc", name
    assert all(
        torch.equal(moments[i]["exp_avg"], state["exp_avg"])
        for i, state in trainer.optimizer.state_dict()["state"].items()
    )
    assert trainer.n_training_samples == 12 * 256
    assert logged(tmp_path) == log
    # and the original goes on by itself
    after = copy.deepcopy(copied.sae.state_dict())
    trainer.step(activations[:256])
    assert all(torch.equal(after[name], w) for name, w in copied.sae.state_dict().items())


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_a_full_disk_under_saelens_runner_is_said(model, text, tmp_path, checkpoints):
    cfg = runner_config(
        tmp_path,
        output_path=str(tmp_path / "disk" / "sae"),
        checkpoint_path=str(tmp_path / "disk" / "checkpoints"),
        n_checkpoints=checkpoints,
    )
    what = "checkpoints" if checkpoints else "disk"
    with small_disk(tmp_path / "disk", 1 << 18) as enlarge:
        runner = LoggedTrainingRunner(cfg, override_dataset=text, override_model=model)
        with pytest.raises(
            NotWrittenError, match=rf"{what}.*\(No space left on device\).*make room"
        ):
            runner.run()
        enlarge(1 << 26)
        LoggedTrainingRunner(cfg, override_dataset=text, override_model=model).run()
        assert (tmp_path / "disk" / "sae" / "sae_weights.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:All samples in the training dataset")
def test_a_full_disk_under_saelens_runner_of_many_is_said(model, text, tmp_path):
    cfg = MultiSAETrainingRunnerConfig(
        saes={"a": TopKTrainingSAEConfig(d_in=192, d_sae=256, k=20)},
        hook_names={"a": HOOK},
        context_size=64,
        training_tokens=2 * 256,
        train_batch_size_tokens=256,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        checkpoint_path=None,
        output_path=str(tmp_path / "disk" / "saes"),
        logger=LoggingConfig(log_to_wandb=False),
    )
    with small_disk(tmp_path / "disk", 1 << 16):
        runner = LoggedMultiTrainingRunner(cfg, override_dataset=text, override_model=model)
        with pytest.raises(NotWrittenError, match=r"saes .*disk' \(No space left on device\)"):
            runner.run()
