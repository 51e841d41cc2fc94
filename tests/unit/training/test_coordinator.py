"""Training several SAEs: each as if it were alone, whatever happens to the others or to us."""

from __future__ import annotations

import copy
import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers.activations import SparseMixtures
from helpers.kills import kill_before_writes
from helpers.straight_line import StraightLineTraining
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
    StandardTrainingSAEConfig,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
    register_sae_training_class,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from safetensors.torch import load_file

from sae_afa_plugin import TopAFATrainingSAE, TopAFATrainingSAEConfig
from sae_afa_plugin.activations.base import Site
from sae_afa_plugin.training.coordinator import train_saes
from sae_afa_plugin.training.folder import STATE_FILENAME
from sae_afa_plugin.training.log import read_logs
from sae_afa_plugin.training.run import Run, SAETraining
from sae_afa_plugin.training.stream import Blocks, Stream

BATCH, BLOCK, STEPS = 32, 128, 26  # the last block is not filled
SIZE = {"d_in": 16, "d_sae": 48}
CONFIGS = {
    "topafa": TopAFATrainingSAEConfig(**SIZE, afa_warm_up_steps=9, top_k_aux=4),
    "topk": TopKTrainingSAEConfig(**SIZE, k=3, normalize_activations="layer_norm"),
    "batchtopk": BatchTopKTrainingSAEConfig(**SIZE, k=3, normalize_activations="layer_norm"),
    "jumprelu": JumpReLUTrainingSAEConfig(
        **SIZE,
        l0_warm_up_steps=9,
        pre_act_loss_coefficient=1e-3,
        normalize_activations="layer_norm",
    ),
    "standard": StandardTrainingSAEConfig(
        **SIZE, l1_coefficient=0.1, normalize_activations="expected_average_only_in"
    ),
    "whitened": TopKTrainingSAEConfig(**SIZE, k=3, normalize_activations="covariance_whitening"),
    "plain": TopKTrainingSAEConfig(**SIZE, k=3),
}


def trainer_config(steps=STEPS, batch=BATCH, **fields):
    defaults = {
        "lr": 1e-3,
        "lr_end": 1e-4,
        "lr_scheduler_name": "cosineannealing",
        "lr_warm_up_steps": 4,
        "lr_decay_steps": 6,
        "adam_beta2": 0.99,
        "dead_feature_window": 3,
        "feature_sampling_window": 7,
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=3),
    }
    return SAETrainerConfig(steps * batch, batch, **{**defaults, **fields})


def training(name="topk", hook="hook", seed=1, **fields):
    return SAETraining(CONFIGS[name], hook, trainer_config(**fields), seed)


def train(trainings, out, source=None, **options):
    options = {"block_tokens": BLOCK, "checkpoint_seconds": 0.0, "progress": False, **options}
    return train_saes(trainings, source or SparseMixtures(300), out, **options)


def weights(folder):
    return load_file(Path(folder) / "sae_weights.safetensors")


def contents(folder):
    """All that must be equal to the last bit: every file, without the times that steps took."""
    found = {}
    for file in sorted(Path(folder).rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or file.name == ".training.lock":
            continue
        if file.name == "training_log.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        elif file.name == "training.json":
            found[name] = {k: v for k, v in json.loads(file.read_text()).items() if k != "seconds"}
        else:
            found[name] = file.read_bytes()
    return found


def times_and_bytes(folder):
    return {
        str(file): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(Path(folder).rglob("*"))
        # what filelock does to its file differs between its versions
        if file.is_file() and not file.name.endswith(".lock")
    }


class Interrupted(BaseException):
    pass


class Interrupting(SparseMixtures):
    """Ends the training when a block is read, but not at once."""

    def __init__(self, after, *args, **shapes):
        super().__init__(*args, **shapes)
        self.after = after

    def read(self, hooks, start, stop):
        if len(self.reads) >= self.after:
            raise Interrupted
        return super().read(hooks, start, stop)


# --- what is learned ---


def test_topafa_learns_what_a_straight_line_says(tmp_path):
    """In float64, with features that fall silent so that the auxiliary loss takes part.

    Tolerance as in test_runners.py, and a hundred times below what any other order of batches or
    another seed gives. Observed: 5e-15.
    """
    cfg = TopAFATrainingSAEConfig(d_in=16, d_sae=256, dtype="float64", top_k_aux=4)
    steps, batch = 40, 4
    trainer = trainer_config(
        steps, batch, lr_scheduler_name="constant", lr_warm_up_steps=0, lr_decay_steps=0,
        dead_feature_window=0, logger=LoggingConfig(log_to_wandb=False, wandb_log_frequency=1),
    )  # fmt: skip
    source = SparseMixtures(300)
    train({"a": SAETraining(cfg, "hook", trainer, seed=5)}, tmp_path, source)

    torch.manual_seed(5)
    reference = StraightLineTraining(
        TopAFATrainingSAE(replace(cfg)).state_dict(),
        afa_coefficient=1 / 32,
        aux_coefficient=1 / 32,
        top_k_aux=4,
        dead_window=0,
        lr=1e-3,
        beta1=0.9,
        beta2=0.99,
    )
    stream = Stream(Blocks(source, BLOCK), Site("hook"), batch, seed=5, dtype=torch.float64)
    log = read_logs([tmp_path / "a"])
    with_aux = 0
    for step in range(steps):
        losses, _ = reference.step(stream.batch(step))
        for name, loss in losses.items():
            assert log[f"losses/{name}"][step] == pytest.approx(loss, rel=1e-10), (step, name)
        with_aux += losses["auxiliary_reconstruction_loss"] > 0
    assert with_aux > 15
    # the saved SAE has unit rows, and their norms in the encoder
    norms = reference.weights["W_dec"].detach().norm(dim=1)
    expected = {
        "W_enc": reference.weights["W_enc"].detach() * norms,
        "W_dec": reference.weights["W_dec"].detach() / norms[:, None],
        "b_dec": reference.weights["b_dec"].detach(),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(weights(tmp_path / "a")[name], tensor, rtol=1e-10, atol=1e-10)


def train_alone(cfg, **fields):
    """``SAETrainer.fit`` with the same batches; which features fired in each step."""
    stream = Stream(Blocks(SparseMixtures(300), BLOCK), Site("hook"), BATCH, seed=1)
    torch.manual_seed(1)
    trainer = SAETrainer(
        trainer_config(**fields),
        TrainingSAE.from_dict(cfg.to_dict()),
        map(stream.batch, range(STEPS)),
    )
    step, fired = trainer.step, []

    def watched(x):
        output = step(x)
        fired.append((output.feature_acts != 0).any(0))
        return output

    trainer.step = watched
    trainer.fit()
    return fired


@pytest.mark.parametrize("name", CONFIGS)
def test_each_learns_what_saelens_trainer_alone_does(tmp_path, name):
    """``SAETrainer.fit`` on batches made by hand, of z where each token is standardised."""
    source = SparseMixtures(300)
    train({name: training(name)}, tmp_path, source)

    cfg = CONFIGS[name]
    dtype_and_order = Stream(Blocks(source, BLOCK), Site("hook"), BATCH, seed=1)
    batches = [dtype_and_order.batch(step) for step in range(STEPS)]
    if cfg.normalize_activations == "layer_norm":
        cfg = replace(cfg, normalize_activations="none")
        batches = [
            (x - x.mean(-1, keepdim=True))
            / ((x - x.mean(-1, keepdim=True)).std(-1, keepdim=True) + 1e-5)
            for x in batches
        ]
    first = []
    if cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        first = batches[: BLOCK // BATCH]
    torch.manual_seed(1)
    alone = TrainingSAE.from_dict(cfg.to_dict())
    trainer = SAETrainer(
        trainer_config(n_batches_for_norm_estimate=len(first)), alone, iter([*first, *batches])
    )
    trainer.fit()
    alone.save_inference_model(tmp_path / "alone")

    found, expected = weights(tmp_path / name), weights(tmp_path / "alone")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    saved = json.loads((tmp_path / name / "cfg.json").read_text())
    others = json.loads((tmp_path / "alone" / "cfg.json").read_text())
    assert saved["metadata"]["l0"] == others["metadata"]["l0"] > 0
    assert saved["metadata"]["num_dead_features"] == others["metadata"]["num_dead_features"]
    assert saved["metadata"]["hook_name"] == "hook"


def test_topk_has_its_auxiliary_loss_in_standardised_space(tmp_path):
    train({"topk": training(dead_feature_window=1)}, tmp_path)
    losses = read_logs([tmp_path / "topk"])["losses/auxiliary_reconstruction_loss"]
    assert (losses > 0).any()


def test_the_saved_sae_and_its_checkpoints_standardise_by_themselves(tmp_path):
    with pytest.raises(Interrupted):
        train({"topk": training()}, tmp_path, Interrupting(4, 300))
    (checkpoint,) = (tmp_path / "topk").glob("checkpoint-*")
    saes = [TrainingSAE.load_from_disk(checkpoint)]
    train({"topk": training()}, tmp_path)
    saes.append(SAE.load_from_disk(tmp_path / "topk"))

    x = torch.stack([SparseMixtures().token("hook", i) for i in range(20)])
    z = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    for sae in saes:
        assert sae.cfg.normalize_activations == "layer_norm"
        without = type(sae)(replace(sae.cfg, normalize_activations="none"))
        without.load_state_dict(sae.state_dict())
        torch.testing.assert_close(sae.encode(x), without.encode(z))


def test_the_device_is_asked_for_dead_features_only_where_some_may_be(tmp_path, architectures):
    """At most window + 1 steps after all fired nobody can be dead; logging steps show the number."""
    masks = architectures["watched"].masks = []
    cfg = architectures["watched"](**SIZE, k=3)
    train({"a": SAETraining(cfg, "hook", trainer_config(dead_feature_window=6), 1)}, tmp_path)
    known = [mask is None for mask in masks]
    assert known[:9] == [True, True, False, True, True, False, True, False, False]
    assert any(mask.any() for mask in masks if mask is not None)
    silent = torch.zeros(48)
    alone = train_alone(replace(CONFIGS["plain"]), dead_feature_window=6)
    assert len(masks) == len(alone) == STEPS
    for mask, fired in zip(masks, alone, strict=True):
        if mask is None:
            assert not (silent > 6).any()
        else:
            assert torch.equal(mask, silent > 6)
        silent = torch.where(fired, 0, silent + 1)


# --- nobody else matters ---


def test_an_sae_is_the_same_whatever_trains_beside_it(tmp_path):
    source = {"hook": (16,), "z": (4, 4), "b": (8,)}
    names = ("topafa", "topk", "standard")
    together = {
        **{name: training(name) for name in names},
        "other hook": SAETraining(
            TopKTrainingSAEConfig(8, 20, k=2), "b", trainer_config(9, lr_decay_steps=3)
        ),
        "heads": training("plain", hook="z"),
        "one head": SAETraining(
            TopKTrainingSAEConfig(4, 20, k=2), "z", trainer_config(), hook_head_index=2
        ),
        "larger batches": training("topk", batch=64, steps=20),
    }
    train(together, tmp_path / "together", SparseMixtures(300, **source))
    for name, one in together.items():
        torch.rand(7)  # whatever anyone draws
        train({name: one}, tmp_path / "alone", SparseMixtures(300, **source))
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_seeds_decide_weights_and_order(tmp_path):
    train(
        {
            "a": training(seed=1),
            "again": training(seed=1),
            "b": training(seed=2),
            "other order": replace(training(seed=1), data_seed=2),
            "same order as b": replace(training(seed=2), data_seed=2),
            "other device": training(seed=1, device="cpu:0"),
        },
        tmp_path,
    )
    w = {folder.name: weights(folder)["W_enc"] for folder in tmp_path.iterdir() if folder.is_dir()}
    assert torch.equal(w["a"], w["again"])
    assert torch.equal(w["a"], w["other device"])
    assert torch.equal(w["b"], w["same order as b"])
    assert not torch.equal(w["a"], w["b"])
    assert not torch.equal(w["a"], w["other order"])


def test_what_the_caller_draws_is_not_disturbed(tmp_path):
    torch.manual_seed(3)
    train({"a": training("topafa"), "b": training("standard")}, tmp_path)
    found = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(3))


# --- those that fail ---


@pytest.fixture
def architectures():
    """Configs of TopK SAEs that draw random numbers, are watched, or fail in their seventh step."""

    class Noisy(TopKTrainingSAE):
        def training_forward_pass(self, step_input):
            noise = 0.1 * torch.randn_like(step_input.sae_in)
            return super().training_forward_pass(
                replace(step_input, sae_in=step_input.sae_in + noise)
            )

    class Watched(TopKTrainingSAE):
        def training_forward_pass(self, step_input):
            mask = step_input.dead_neuron_mask
            self.cfg.masks.append(None if mask is None else mask.clone())
            return super().training_forward_pass(step_input)

    class Raising(TopKTrainingSAE):
        error = ZeroDivisionError("no such thing")

        def training_forward_pass(self, step_input):
            if step_input.n_training_steps == 6:
                raise self.error
            return super().training_forward_pass(step_input)

    class Breaking(TopKTrainingSAE):
        def training_forward_pass(self, step_input):
            out = super().training_forward_pass(step_input)
            if step_input.n_training_steps == 6:
                out.loss.register_hook(lambda grad: grad * torch.inf)
            return out

    class Hungry(Raising):
        error = torch.OutOfMemoryError("tried to allocate 1.00 TiB")

    class Looking(TopKTrainingSAE):
        def initialize_weights(self):
            super().initialize_weights()
            torch.rand(1)
            assert self.W_enc.sum().item() != 0  # "meta" has no numbers

    added = {}
    for cls in (Noisy, Watched, Raising, Breaking, Hungry, Looking):
        name = cls.__name__.lower()

        @dataclass
        class Config(TopKTrainingSAEConfig):
            @classmethod
            def architecture(cls, name=name):
                return name

            def get_inference_config_class(self):
                return TopKSAEConfig

        Config.__name__ = f"{cls.__name__}Config"
        register_sae_training_class(name, cls, Config)
        added[name] = Config
    yield added
    for name in added:
        del SAE_TRAINING_CLASS_REGISTRY[name]


def test_one_that_diverges_is_left_behind_and_explained(tmp_path):
    trainings = {
        "good": training(),
        "bad": training(lr=1e30, lr_end=1e29, lr_warm_up_steps=0),
        "good too": training("topafa"),
    }
    found = train(trainings, tmp_path / "out")
    assert [one.reason is None for one in found.values()] == [True, False, True]
    assert found["bad"].reason == (
        "its loss was no longer a number in step 2 of 26: lower lr (it is 1e+30) or raise "
        "lr_warm_up_steps, and train it under another name"
    )
    assert found["bad"].step == 2
    record = json.loads((tmp_path / "out" / "bad" / "training.json").read_text())
    assert (record["state"], record["step"], record["reason"]) == (
        "diverged", 2, found["bad"].reason,
    )  # fmt: skip
    assert not (tmp_path / "out" / "bad" / "cfg.json").exists()
    del trainings["bad"]
    train(trainings, tmp_path / "without")
    for name in trainings:
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "without" / name)

    # it would diverge again
    before = times_and_bytes(tmp_path / "out")
    again = train(
        {**trainings, "bad": training(lr=1e30, lr_end=1e29, lr_warm_up_steps=0)}, tmp_path / "out"
    )
    assert again["bad"] == found["bad"]
    assert times_and_bytes(tmp_path / "out") == before


class WithHoles(SparseMixtures):
    """Some of its tokens are NaN or infinite, or are so once they are normalised."""

    def token(self, hook, number):
        token = super().token(hook, number) * (number != 201)
        if number in (7, 130):
            token[3] = torch.nan if number == 7 else torch.inf
        return token


@pytest.mark.parametrize("name", [*CONFIGS, "rescaled"])
def test_tokens_that_are_not_finite_are_left_out(tmp_path, name):
    """As ``SAETrainer.fit`` on the same batches without them, which also makes the statistics."""
    cfg = {
        **CONFIGS,
        "rescaled": replace(CONFIGS["plain"], normalize_activations="constant_norm_rescale"),
    }[name]
    source = WithHoles(300)
    with pytest.warns(UserWarning, match=f"1 token of the training of the SAE '{name}' had values"):
        (found,) = train(
            {name: SAETraining(cfg, "hook", trainer_config(), 1)}, tmp_path, source
        ).values()
    assert found.reason is None
    log = read_logs([tmp_path / name])["metrics/non_finite_tokens"]
    times = 26 * BATCH / 300  # the row of tokens is read so often
    bad = 3 if name == "rescaled" else 2  # 0 / 0
    assert bad * int(times) <= log.iloc[-1] <= bad * (int(times) + 1)
    assert log.is_monotonic_increasing
    assert all(w.isfinite().all() for w in weights(tmp_path / name).values())

    full = Stream(Blocks(source, BLOCK), Site("hook"), BATCH, seed=1)
    sizes = [len(full.batch(step)) for step in range(STEPS)]
    assert min(sizes) < BATCH == max(sizes)
    if cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        batches = [full.batch(step) for step in range(STEPS)]
        first = batches[: BLOCK // BATCH]
        torch.manual_seed(1)
        alone = TrainingSAE.from_dict(cfg.to_dict())
        trainer = SAETrainer(
            trainer_config(n_batches_for_norm_estimate=len(first)), alone, iter([*first, *batches])
        )
        trainer.cfg.total_training_samples = sum(sizes)
        trainer.fit()
        alone.save_inference_model(tmp_path / "alone")
        for key, tensor in weights(tmp_path / "alone").items():
            assert torch.equal(weights(tmp_path / name)[key], tensor), key


def test_what_was_left_out_is_counted_on_after_an_interruption(tmp_path):
    with pytest.warns(UserWarning, match="1 token"):
        train({"topk": training()}, tmp_path / "whole", WithHoles(300))

    class Stopped(WithHoles, Interrupting):
        pass

    with pytest.raises(Interrupted), pytest.warns(UserWarning, match="1 token"):
        train({"topk": training()}, tmp_path / "parts", Stopped(4, 300))
    train({"topk": training()}, tmp_path / "parts", WithHoles(300))  # it has been said
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_batch_without_a_finite_token_is_the_sources_fault(tmp_path):
    class Broken(SparseMixtures):
        def token(self, hook, number):
            return super().token(hook, number) * (float("nan") if number >= 128 else 1)

    found = train({"a": training(), "b": training(seed=2)}, tmp_path, Broken(300))
    for name, one in found.items():
        assert one.reason == (
            "step 5 of 26 raised ValueError (all activations of a batch are NaN or infinite: mend "
            "the language model, its dtype or the recording they come from): mend that and run the "
            "same again"
        )
        assert not (tmp_path / name / "cfg.json").exists()


def test_weights_that_are_no_numbers_are_noticed_before_they_are_saved(tmp_path, architectures):
    """A step after which the loss is a number and the weights are not."""
    found = train(
        {"a": SAETraining(architectures["breaking"](**SIZE, k=3), "hook", trainer_config(), 1)},
        tmp_path,
    )
    assert found["a"].step == 7
    assert found["a"].reason.startswith("its weights were no longer a number in step 7 of 26")
    (checkpoint,) = (tmp_path / "a").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-000004"
    assert all(
        t.isfinite().all() for t in load_file(checkpoint / "sae_weights.safetensors").values()
    )


def test_what_its_class_refuses_is_refused_at_once_and_nothing_else(tmp_path, architectures):
    widths = {"d_in": 16, "d_sae": 64, "matryoshka_widths": [32, 16]}
    with pytest.raises(ValueError, match="matryoshka_widths must be strictly increasing"):
        SAETraining(MatryoshkaBatchTopKTrainingSAEConfig(**widths), "hook", trainer_config(), 1)
    before = torch.get_rng_state()
    looking = SAETraining(architectures["looking"](**SIZE, k=3), "hook", trainer_config(), 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert train({"a": looking}, tmp_path)["a"].reason is None


@pytest.mark.parametrize("name", ["topafa", "plain"])
def test_a_copied_trainer_trains_the_copy(tmp_path, name, monkeypatch):
    kept = []
    finish = Run._finish
    monkeypatch.setattr(
        Run, "_finish", lambda run, trainer: kept.append(trainer) or finish(run, trainer)
    )
    train({name: training(name, lr_scheduler_name="constant", lr_decay_steps=0)}, tmp_path)
    (trainer,) = kept
    before = copy.deepcopy(trainer.sae.state_dict())
    copied = copy.deepcopy(trainer)
    for _ in range(3):
        copied.step(torch.randn(BATCH, 16))
    assert all(torch.equal(before[key], w) for key, w in trainer.sae.state_dict().items())
    assert not torch.equal(before["W_enc"], copied.sae.W_enc)


def test_one_that_raises_costs_only_itself_and_is_tried_again(tmp_path, architectures, capsys):
    trainings = {
        kind: SAETraining(architectures[kind](**SIZE, k=3), "hook", trainer_config(), 1)
        for kind in ("raising", "hungry")
    }
    trainings["good"] = training()
    found = train(trainings, tmp_path / "out", progress=True)
    assert found["raising"].reason == (
        "step 7 of 26 raised ZeroDivisionError (no such thing): mend that and run the same again"
    )
    assert found["hungry"].reason == (
        "there was no memory on cpu for step 7 of 26 (tried to allocate 1.00 TiB): train fewer "
        "SAEs at once, or with a smaller d_sae or batch, and run the same again"
    )
    assert found["good"].reason is None
    said = capsys.readouterr()
    assert "raising was left behind: step 7 of 26" in said.out + said.err
    state = json.loads((tmp_path / "out" / "hungry" / "training.json").read_text())["state"]
    assert state == "failed"

    # mended: it goes on with the last checkpoint, and becomes what a plain TopK becomes
    for kind in ("raising", "hungry"):
        del SAE_TRAINING_CLASS_REGISTRY[kind]
        register_sae_training_class(kind, TopKTrainingSAE, architectures[kind])
    before = times_and_bytes(tmp_path / "out" / "good")
    again = train(trainings, tmp_path / "out")
    assert all(one.reason is None for one in again.values())
    assert times_and_bytes(tmp_path / "out" / "good") == before
    plain = SAETraining(CONFIGS["plain"], "hook", trainer_config(), 1)
    train({"plain": plain}, tmp_path)
    for kind in ("raising", "hungry"):
        found = weights(tmp_path / "out" / kind)
        assert all(torch.equal(found[k], w) for k, w in weights(tmp_path / "plain").items())


def test_a_wrong_hook_or_width_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="have width 16, but the SAE has d_in=8"):
        train(
            {
                "a": training(),
                "b": SAETraining(TopKTrainingSAEConfig(8, 9, k=1), "hook", trainer_config()),
            },
            tmp_path,
        )
    with pytest.raises(ValueError, match="the model has no hook 'hok'"):
        train({"a": training(hook="hok")}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".training.lock"]


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="total_training_samples=31 is no whole batch of 32"):
        SAETraining(CONFIGS["topk"], "hook", SAETrainerConfig(31, 32))
    with pytest.raises(ValueError, match="do not log to wandb"):
        SAETraining(CONFIGS["topk"], "hook", trainer_config(logger=LoggingConfig()))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden"])
def test_names_that_are_no_folders(tmp_path, name):
    with pytest.raises(ValueError, match="an SAE's name becomes a folder, which"):
        train({name: training()}, tmp_path)


def test_batches_without_a_block_in_common(tmp_path):
    both = {"a": training(batch=30), "b": training(batch=32)}
    with pytest.raises(ValueError, match=r"the batch sizes \[30, 32\] have no block in common"):
        train(both, tmp_path, block_tokens=None)
    with pytest.raises(ValueError, match="holds no whole number of batches of 30"):
        train(both, tmp_path)


# --- interrupted ---


def every_kind(architectures=None):
    found = {name: training(name, seed=n) for n, name in enumerate(CONFIGS)}
    found["short"] = training("topk", steps=9, lr_warm_up_steps=2, lr_decay_steps=3)
    if architectures:
        found["noisy"] = SAETraining(
            architectures["noisy"](**SIZE, k=3), "hook", trainer_config(), 3
        )
    return found


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_resumed_from_every_checkpoint_it_is_the_same(tmp_path, architectures, seconds):
    trainings = every_kind(architectures)
    train(trainings, tmp_path / "whole", SparseMixtures(512))
    for times in range(1, 10):
        # a block at a time; without checkpoints from the start, and further each time
        source = Interrupting(1 if seconds == 0 else times, 512)
        try:
            train(trainings, tmp_path / "parts", source, checkpoint_seconds=seconds)
            break
        except Interrupted:
            checkpoints = [c.name for c in (tmp_path / "parts").glob("*/checkpoint-*")]
            assert set(checkpoints) == ({f"checkpoint-{4 * times:06d}"} if seconds == 0 else set())
    assert times == 7
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


class Runs:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("file", [STATE_FILENAME, "trainer_state.pt"])
def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path, file):
    with suppress(Interrupted):
        train({"a": training()}, tmp_path, Interrupting(1, 512), checkpoint_seconds=0)
    (place,) = tmp_path.glob(f"a/checkpoint-*/{file}")
    torch.save({"random": Runs(tmp_path / "ran")}, place)
    found = train({"a": training()}, tmp_path, SparseMixtures(512))
    assert not (tmp_path / "ran").exists()
    assert "eights only load failed" in str(found["a"].reason)


KILLED = """
import test_coordinator as tests

trainings = {name: tests.training(name, steps=10, lr_decay_steps=2) for name in ("topk", "standard")}
contents = tests.contents

def job(folder):
    tests.train(trainings, folder)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it kills copies of a process")
def test_killed_before_any_write_it_is_the_same(tmp_path):
    assert kill_before_writes(KILLED, tmp_path) > 20


# --- the folder ---


def test_finished_ones_are_not_touched_and_new_ones_are_added(tmp_path):
    first = {"a": training(), "b": training("topafa")}
    train(first, tmp_path)
    before = times_and_bytes(tmp_path)

    class Unread(SparseMixtures):
        def read(self, hooks, start, stop):
            raise AssertionError

    again = train(first, tmp_path, Unread(300))
    assert times_and_bytes(tmp_path) == before
    assert {name: one.step for name, one in again.items()} == {"a": STEPS, "b": STEPS}
    assert all(one.seconds > 0 for one in again.values())

    more = train({**first, "c": training(seed=9)}, tmp_path)
    after = times_and_bytes(tmp_path)
    assert {name: after[name] for name in before} == before
    assert list(more) == ["a", "b", "c"]
    train({"c": training(seed=9)}, tmp_path / "alone")
    assert contents(tmp_path / "alone" / "c") == contents(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sae": replace(CONFIGS["topk"], k=4)}, "sae.k was 3 and is 4"),
        ({"seed": 2}, "seed was 1 and is 2; data_seed was 1 and is 2"),
        ({"trainer": trainer_config(lr=2e-3)}, "trainer.lr was 0.001 and is 0.002"),
        ({"hook_head_index": 0, "hook_name": "z"}, "sae.metadata.hook_name was 'hook' and is 'z'"),
    ],
)
def test_a_folder_keeps_to_its_settings(tmp_path, change, told):
    source = SparseMixtures(300, hook=(16,), z=(1, 16))
    train({"a": training()}, tmp_path, source)
    before = times_and_bytes(tmp_path)
    with pytest.raises(ValueError, match="holds a training with other settings") as error:
        train({"new": training(), "a": replace(training(), **change)}, tmp_path, source)
    assert told in str(error.value)
    assert "use another name or folder" in str(error.value)
    assert times_and_bytes(tmp_path) == before


def test_a_folder_keeps_to_its_activations(tmp_path):
    train({"a": training()}, tmp_path)
    with pytest.raises(ValueError, match="activations.seed was 0 and is 1"):
        train({"a": training()}, tmp_path, SparseMixtures(300, seed=1))
    with pytest.raises(ValueError, match="block_tokens was 128 and is 64"):
        train({"a": training()}, tmp_path, block_tokens=64)
    # where it is trained and how often it is logged does not matter
    train({"a": training(device="cpu:0", logger=LoggingConfig(log_to_wandb=False))}, tmp_path)


def test_files_of_others_stay(tmp_path):
    mine = {
        tmp_path / "notes.txt": "1",
        tmp_path / "a" / "notes.txt": "2",
        tmp_path / "a" / "checkpoint-of-mine" / "file": "3",
        tmp_path / "a" / "more" / "sae_weights.safetensors": "4",
    }
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "cfg.json").write_text("{}")
    with pytest.raises(ValueError, match=r"/b' holds cfg.json, but no training.json"):
        train({"a": training(), "b": training()}, tmp_path)
    for file, text in mine.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    train({"a": training()}, tmp_path)
    assert {file: file.read_text() for file in mine} == mine
    assert (tmp_path / "b" / "cfg.json").read_text() == "{}"


def test_a_damaged_or_emptied_folder_is_named(tmp_path):
    train({"a": training()}, tmp_path)
    (tmp_path / "a" / "sae_weights.safetensors").unlink()
    with pytest.raises(ValueError, match="is finished, but has no sae_weights.safetensors"):
        train({"a": training()}, tmp_path)
    (tmp_path / "a" / "training.json").write_text("{")
    with pytest.raises(ValueError, match="training.json' is damaged"):
        train({"a": training()}, tmp_path)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with (
        FileLock(tmp_path / ".training.lock"),
        pytest.raises(ValueError, match="another process is training in"),
    ):
        train({"a": training()}, tmp_path)
    train({"a": training()}, tmp_path)


def test_a_full_disk_stops_all_and_nothing_is_lost(tmp_path, monkeypatch):
    """A weights file that cannot be written, as safetensors says it."""
    train({"a": training()}, tmp_path / "whole")
    before = TopKTrainingSAE.save_model

    def full(self, path):
        if len(list((tmp_path / "a").glob("checkpoint-*"))) == 1:
            raise OSError(28, "No space left on device")
        return before(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(TopKTrainingSAE, "save_model", full)
        with pytest.raises(
            OSError, match="checkpoint could not be written in .*No space left on device"
        ):
            train({"a": training()}, tmp_path)
    train({"a": training()}, tmp_path)
    assert contents(tmp_path / "a") == contents(tmp_path / "whole" / "a")
