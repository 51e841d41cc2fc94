"""One SAE on its way: begun or taken up again, a block of tokens further, saved, finished.

The trainer is SAELens's, used by its public methods. Everything else that a step depends on (the
random numbers it draws, the batch) belongs to this SAE alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from sae_afa_plugin import limits
from sae_afa_plugin._upstream import SPARSITY_FILENAME
from sae_afa_plugin.activations.base import Site
from sae_afa_plugin.printable import printable
from sae_afa_plugin.saes.finite import check_weights, say_left_out
from sae_afa_plugin.training.checks import check_training
from sae_afa_plugin.training.folder import DIVERGED, FAILED, STATE_FILENAME, TrainingFolder
from sae_afa_plugin.training.log import LOG_FILENAME, Stopwatch, TrainingLog
from sae_afa_plugin.training.stream import PER_TOKEN_NORMALIZATIONS, Blocks, Stream
from sae_afa_plugin.training.trainer import Diverged, finiteness, why_diverged

# of an SAE's metadata, what SAELens fills in when the SAE is made
_ITS_OWN = (
    "sae_lens_version",
    "sae_lens_training_version",
    "training_architecture",
    "training_architecture_details",
)
# of the trainer's config, what does not decide what the SAE becomes
_ELSEWHERE = ("device", "logger", "n_checkpoints", "checkpoint_path", "save_final_checkpoint")


@dataclass(frozen=True)
class SAETraining:
    """How one SAE is trained.

    Args:
        sae: Its config. With ``normalize_activations="layer_norm"`` each token is standardised
            before the SAE, so that its error is the one in that space for every architecture;
            the saved SAE does it itself.
        hook_name: Where it reads.
        trainer: Steps, batch size, learning rate and its schedule, dead-feature window, device:
            see SAELens. ``logger.wandb_log_frequency`` is how often a line is written to the log.
            Where checkpoints go is not asked here.
        seed: For the initial weights, and whatever else the SAE draws.
        data_seed: For the order of tokens; None: ``seed``.
        hook_head_index: The head it reads, where it reads one of several.
        frozen_decoder: Whether the decoder stays as it was initialised: a control, which tells how
            much of a result is owed to directions that were learned.

    Raises:
        ValueError: If a number is no possible one, there is no step to train, the SAE is in
            float16, or wandb is asked for.

    Example:
        >>> from sae_lens import TopKTrainingSAEConfig
        >>> training = SAETraining(
        ...     TopKTrainingSAEConfig(d_in=192, d_sae=768, k=32, normalize_activations="layer_norm"),
        ...     "blocks.4.hook_resid_pre",
        ...     SAETrainerConfig(total_training_samples=81920, train_batch_size_samples=4096),
        ... )
        >>> training.steps
        20
    """

    sae: TrainingSAEConfig
    hook_name: str
    trainer: SAETrainerConfig
    seed: int = 42
    data_seed: int | None = None
    hook_head_index: int | None = None
    frozen_decoder: bool = False

    def __post_init__(self) -> None:
        limits.kind(self, "sae", TrainingSAEConfig)
        limits.kind(self, "trainer", SAETrainerConfig)
        check_training(self.trainer, self.sae)
        limits.text(self, "hook_name")
        limits.whole(self, "seed")
        limits.whole(self, "data_seed", "hook_head_index", none=True)
        limits.truth(self, "frozen_decoder")
        if self.steps < 1:
            raise ValueError(
                f"total_training_samples={self.trainer.total_training_samples} is no whole batch "
                f"of {self.trainer.train_batch_size_samples}: there is nothing to train"
            )
        if self.trainer.logger.log_to_wandb:
            raise ValueError(
                f"trainings write {LOG_FILENAME} and do not log to wandb: pass "
                "logger=LoggingConfig(log_to_wandb=False)"
            )

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return self.trainer.total_training_steps

    @property
    def batch_size(self) -> int:
        """Tokens in one step."""
        return self.trainer.train_batch_size_samples

    def metadata(self, others: Mapping[str, Any]) -> dict[str, Any]:
        """What the saved SAE remembers.

        Args:
            others: What is the same for several SAEs.
        """
        return {
            **{key: v for key, v in self.sae.metadata.to_dict().items() if key not in _ITS_OWN},
            **others,
            "hook_name": self.hook_name,
            "hook_head_index": self.hook_head_index,
        }

    def settings(self, others: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides what the SAE becomes, beside the activations.

        Args:
            others: As for :meth:`metadata`.
        """
        sae = {**self.sae.to_dict(), "metadata": self.metadata(others)}
        trainer = {key: v for key, v in asdict(self.trainer).items() if key not in _ELSEWHERE}
        del sae["device"]
        data_seed = self.seed if self.data_seed is None else self.data_seed
        frozen = {"frozen_decoder": True} if self.frozen_decoder else {}
        return {
            "sae": sae, "trainer": trainer, "seed": self.seed, "data_seed": data_seed, **frozen,
        }  # fmt: skip


class _Trainer(SAETrainer[Any, Any]):
    """SAELens's trainer, which need not ask the device whether features are dead.

    Asking means to wait for it. Where it is known that none can be dead, SAEs are given None,
    which their losses take for just that.
    """

    may_be_dead = True

    @property
    @override
    def dead_neurons(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().dead_neurons if self.may_be_dead else None


class Run:
    """One SAE on its way.

    Args:
        name: For messages.
        training: How it is trained.
        folder: Where it is written.
        blocks: The activations.
        site: Where among them it reads.
        metadata: What the saved SAE remembers beside its hook.
        progress: Whether to say when it is left behind.
    """

    def __init__(
        self,
        name: str,
        training: SAETraining,
        folder: TrainingFolder,
        blocks: Blocks,
        site: Site,
        metadata: Mapping[str, Any],
        progress: bool,
    ):
        self.name, self.training, self.folder, self.site = name, training, folder, site
        self.step = 0  # steps behind it
        self._left_out = 0  # tokens so far that were not finite
        self._progress = progress
        self._device = torch.device(training.trainer.device)
        self._normalize = training.sae.normalize_activations
        self._config = {
            **training.sae.to_dict(),
            "device": "cpu",
            "metadata": training.metadata(metadata),
        }
        if self._normalize in PER_TOKEN_NORMALIZATIONS:
            self._config["normalize_activations"] = "none"
        self._stream = Stream(
            blocks,
            site,
            training.batch_size,
            training.seed if training.data_seed is None else training.data_seed,
            self._normalize,
            device=self._device,
        )
        self._watch = Stopwatch(self._device)
        self._trainer: _Trainer | None = None

    @property
    def block(self) -> int:
        """The block that its next step is in."""
        return self.step // self._stream.steps_per_block

    # --- what the coordinator asks for ---

    def begin(self) -> bool:
        """Build the SAE and its trainer, from the last checkpoint if there is one."""
        self.folder.begin()
        return self._unless_it_fails(self._build)

    def train_block(self) -> bool:
        """Train on the rest of the block that it is in, and finish if that was the end."""
        return self._unless_it_fails(self._train_block)

    def checkpoint(self) -> None:
        """Save everything that the next step depends on."""
        self._log.keep()
        self.folder.checkpoint(self.step, self._write_checkpoint)

    def _unless_it_fails(self, action: Callable[[], None]) -> bool:
        """Do something, or leave this SAE behind and say why; a full disk stops all of them."""
        try:
            action()
            return True
        except OSError:
            raise
        except Diverged as error:
            state, step, reason = DIVERGED, error.step, str(error)
        except Exception as error:
            state, step, reason = FAILED, self.step, self._why(error)
        self._trainer = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.folder.say(state, step, self._watch.seconds, reason)
        if self._progress:
            tqdm.write(printable(f"{self.name} was left behind: {reason}"))
        return False

    def _why(self, error: Exception) -> str:
        told = " ".join(str(error).split()) or "no message"
        where = f"step {self.step + 1} of {self.training.steps}"
        # on the CPU it is a RuntimeError
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "CPUAllocator" in told:
            return (
                f"there was no memory on {self._device} for {where} ({told}): train fewer SAEs at "
                "once, or with a smaller d_sae or batch, and run the same again"
            )
        return f"{where} raised {type(error).__name__} ({told}): mend that and run the same again"

    # --- the start ---

    def _build(self) -> None:
        cfg = self.training.trainer
        cfg = replace(
            cfg,
            lr_end=cfg.lr / 10 if cfg.lr_end is None else cfg.lr_end,  # as SAELens's runners do
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
        )
        seed = self.training.seed
        with torch.random.fork_rng(devices=[]):
            # on the CPU, so that it is the same SAE wherever it is trained
            torch.default_generator.manual_seed(seed)
            sae = TrainingSAE.from_dict(self._config)
            sae.W_dec.requires_grad_(not self.training.frozen_decoder)
            self._random = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            self._random["cuda"] = torch.Generator(self._device).manual_seed(seed).get_state()
        sae.to(cfg.device)
        self._stream.dtype = sae.dtype
        self._trainer = trainer = _Trainer(cfg, sae, data_provider=iter(()))
        latest = self.folder.latest()
        if latest is None:
            self._estimate_scaling(trainer)
        else:
            self._load(trainer, latest)
        self.step = trainer.n_training_steps
        self._log = TrainingLog(
            self.folder.path / LOG_FILENAME, cfg.logger.wandb_log_frequency, self.step
        )

    def _load(self, trainer: _Trainer, checkpoint: Path) -> None:
        trainer.load_trainer_state(checkpoint)
        trainer.sae.load_weights_from_checkpoint(checkpoint)
        for moments in trainer.optimizer.state.values():
            moments["step"] = moments["step"].cpu()  # where Adam has it; or it would be asked for
        state = torch.load(checkpoint / STATE_FILENAME, map_location="cpu")
        self._random.update(state["random"])
        self._watch.seconds = state["seconds"]
        self._left_out = state.get("left_out", 0)

    def _estimate_scaling(self, trainer: _Trainer) -> None:
        """What ``SAETrainer.fit`` does first, on this SAE's batches in the first block."""
        cfg = trainer.sae.cfg
        n_batches = min(trainer.cfg.n_batches_for_norm_estimate, self._stream.steps_per_block)
        estimate = {
            "expected_average_only_in": trainer.activation_scaler.estimate_scaling_factor,
            "covariance_whitening": trainer.activation_scaler.estimate_whitening,
        }.get(cfg.normalize_activations)
        if estimate is not None:
            batches = map(self._stream.batch, range(n_batches))
            estimate(cfg.d_in, batches, n_batches_for_norm_estimate=n_batches)

    # --- the steps ---

    def _train_block(self) -> None:
        trainer, watch, log = self._trainer, self._watch, self._log
        assert trainer is not None
        start = self.step
        stop = min((self.block + 1) * self._stream.steps_per_block, self.training.steps)
        # asked once: none can be dead before this step
        window = trainer.cfg.dead_feature_window
        sure_until = start + window - int(trainer.n_forward_passes_since_fired.max()) + 1
        finite: list[Tensor] = []
        with self._own_random_numbers():
            watch.start()
            for number in range(start + 1, stop + 1):
                due = log.is_due(number)
                trainer.may_be_dead = due or number > sure_until
                trainer.maybe_reset_sparsity()
                output = trainer.step(self._batch())
                trainer.n_training_samples = number * self.training.batch_size
                finite.append(finiteness(trainer.sae, output.loss))
                if due:
                    log.write(trainer, output, number, watch.stop(), self.name, self._left_out)
                    watch.start()
                del output  # or two of them would be there in the next step
                trainer.n_training_steps = self.step = number
                if self._device.type == "cpu" and not finite[-1].all():
                    break
            watch.stop()
        trainer.may_be_dead = True
        self._check(trainer, start, finite)
        if self.step == self.training.steps:
            self._finish(trainer)

    @contextmanager
    def _own_random_numbers(self) -> Generator[None]:
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.set_rng_state(self._random["cpu"])
            for device in cuda:
                torch.cuda.set_rng_state(self._random["cuda"], device)
            yield
            self._random = {"cpu": torch.get_rng_state()}
            for device in cuda:
                self._random["cuda"] = torch.cuda.get_rng_state(device)

    def _batch(self) -> Tensor:
        batch = self._stream.batch(self.step)
        n = self.training.batch_size - len(batch)
        if n and not self._left_out:
            say_left_out(n, f"the SAE {self.name!r}")
        self._left_out += n
        return batch

    def _check(self, trainer: _Trainer, start: int, finite: list[Tensor]) -> None:
        """Notice that the training has diverged, where no step may wait for it once for a block."""
        for step, (loss, weights) in enumerate(torch.stack(finite).tolist(), start + 1):
            if not (loss and weights):
                raise why_diverged(trainer, step, self.training.steps, not loss)
        if not all(p.isfinite().all() for p in trainer.sae.parameters()):
            raise why_diverged(trainer, self.step, self.training.steps, False)

    # --- saving ---

    def _write_checkpoint(self, folder: Path) -> None:
        assert self._trainer is not None
        with self._as_saved(self._trainer):
            self._trainer.save_checkpoint(folder.name, folder.parent)
        state = {
            "random": self._random,
            "seconds": self._watch.seconds,
            "left_out": self._left_out,
        }
        torch.save(state, folder / STATE_FILENAME)

    def _finish(self, trainer: _Trainer) -> None:
        sae, scaler = trainer.sae, trainer.activation_scaler
        # as SAETrainer.fit does
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if scaler.whitening is not None:
            of = scaler.whitening
            sae.fold_activation_whitening(of.mean, of.matrix, of.inverse_matrix)
        check_weights("this SAE", sae.state_dict())  # folding may overflow
        trainer.set_final_sae_metadata()

        def write(folder: Path) -> None:
            with self._as_saved(trainer):
                sae.save_inference_model(folder)
            save_file({"sparsity": trainer.log_feature_sparsity}, folder / SPARSITY_FILENAME)

        self._log.keep()
        self.folder.finish(self.step, self._watch.seconds, write)
        self._trainer = None

    @contextmanager
    def _as_saved(self, trainer: _Trainer) -> Generator[None]:
        """What is done before the SAE in training, a saved SAE does itself."""
        cfg = trainer.sae.cfg
        trained_with = cfg.normalize_activations
        if self._normalize in PER_TOKEN_NORMALIZATIONS:
            cfg.normalize_activations = self._normalize
        try:
            yield
        finally:
            cfg.normalize_activations = trained_with
