"""The training loop: batches, meta steps, checkpoints, evaluations."""

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dan_fast.core.batches import MiniBatch
from dan_fast.core.defaults import plain_defaults
from dan_fast.core.devices import resolve_device
from dan_fast.core.errors import DanFastError, Interrupted
from dan_fast.data import TrainingSet
from dan_fast.data.images.workers import is_worker_death
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.launch import gathered, largest, rank_in, ranks_in
from dan_fast.evaluation import Evaluation
from dan_fast.training.alike import require_same_network, require_same_run, require_same_settings
from dan_fast.training.batches import TrainingBatches
from dan_fast.training.build import build_model, network_and_random_state, preprocessing_of
from dan_fast.training.compiling import CompiledWhereFaster, require_compilable
from dan_fast.training.config import TrainConfig
from dan_fast.training.determinism import deterministic_algorithms, prepare_cublas
from dan_fast.training.display import Display
from dan_fast.training.interrupt import TrainingStop
from dan_fast.training.memory_shards import load_state, parted_state, require_room
from dan_fast.training.objective import DivergedError, all_finite, why_refused
from dan_fast.training.optimizer import build_optimizer, set_step_size
from dan_fast.training.random_numbers import RunRandomNumbers
from dan_fast.training.ranks import saved_if_all_are_broken
from dan_fast.training.reported import opening_lines
from dan_fast.training.run_folder import RunFolder
from dan_fast.training.scalars import Scalars
from dan_fast.training.schedule import step_size
from dan_fast.training.sources import load_datasets
from dan_fast.training.starting import whom_it_saw
from dan_fast.training.step import MetaStep
from dan_fast.training.step_scalars import StepScalars
from dan_fast.training.surroundings import ran_under
from dan_fast.training.targets import Targets
from dan_fast.training.valid_settings import own_copy
from dan_fast.triton_kernels import float32_products

_STOPPING = (
    "Stopping when this iteration or evaluation is done; Ctrl-C again stops at once, and what is not saved is lost."
)


class Trainer:
    """Trains a DAN as `config` says and keeps everything in the folder `config.run.out`.

    The folder holds config.yaml, checkpoint.pt, tensorboard/, chosen.pt of an epoch chosen on the targets and, at the
    end, results.json. The checkpoint has everything: weights, optimizer, memory, competition, random states, feedback.
    A run killed at any moment resumes from it, on the CPU bit for bit, on a GPU with run.deterministic, which no run
    has shown. Checkpoints within an epoch are written beside the training, which waits for the copy to host memory.

    A trainer has random numbers of its own: `fit` restores the process's generators and signal handlers when it ends,
    and leaves the generators of NumPy and Python alone. Meanwhile the generators are the run's, the default dtype is
    float32 for all threads, and `fit` in another thread is refused. `train_iteration` without `fit` uses the process's
    own random numbers. The step itself, without files, is `MetaStep`; here it is `meta_step`.

    With a `process_group` its ranks train one network, each with a trainer of its own and the same settings: each takes
    a share of every batch and of the memory's slots, and rank 0 prints, logs and writes. `dan-fast train` makes the
    group where torchrun has started several processes. All of this class is then collective, the training waits for
    checkpoints, and each rank keeps the features of its slots in a file beside checkpoint.pt.

    Args:
        config: what to train and how.
        process_group: the ranks, of backends for tensors on the host and on the device; None: this process alone.

    Raises:
        DanFastError: data, settings, device or checkpoint do not fit; the message says which and what to do.

    Example:
        trainer = Trainer(TrainConfig(data=DataConfig(labeled=["market"]), run=RunConfig(out="runs/market")))
        evaluations = trainer.fit()
    """

    @plain_defaults()
    def __init__(self, config: TrainConfig, process_group: ProcessGroup | None = None) -> None:
        self.config = config = own_copy(config)
        self.device = resolve_device(config.run.device)
        require_same_settings(process_group, config, self.device)
        require_compilable(config, process_group)
        self.process_group = process_group
        self._is_first = rank_in(process_group) == 0
        if config.run.deterministic and self.device.type == "cuda":
            prepare_cublas()
        self.folder = RunFolder(config.run, process_group)
        saved = self.folder.saved_state(config)

        self.datasets = load_datasets(config.data)
        share, seed = config.data.unlabeled_share, config.run.seed
        self.training_set = TrainingSet(self.datasets.labeled, self.datasets.unlabeled, share, seed)
        require_same_run(process_group, self.training_set.fingerprint, self.datasets.targets, saved)
        self.folder.require_same_images(saved, self.training_set.fingerprint)
        now = ran_under(self.device, ranks_in(process_group), saved, config.optimizer.epochs)
        self._past = whom_it_saw(self.training_set, config.model.backbone, config.model.weights, saved) | now
        self.targets = Targets(config, self.datasets, self.folder, self.device, process_group)

        unlabeled = len(self.training_set.unlabeled_samples) > 0
        lending = config.model.style_mixing == "unlabeled" and unlabeled
        network, after_weights = network_and_random_state(
            config.to_dict(),
            self.training_set.num_classes,
            read_weights=saved is None,
            mixes_styles=lending or config.model.style_mixing == "batch",
        )
        if saved is not None:
            network.preprocessing = preprocessing_of(saved)
            require_room(saved, self.folder.path, ranks_in(process_group), self.device)
        self.batches = TrainingBatches(config, self.training_set, network, self.device, process_group)
        self.model = build_model(config, network, unlabeled, lending, process_group)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.meta_step = MetaStep(self.model, self.optimizer, config.meta, process_group)
        self._compiled = CompiledWhereFaster(self.meta_step, config.run.compile)
        self.random = RunRandomNumbers(self.device, config.run.seed, after_weights, rank_in(process_group))
        self.epoch, self.iteration = 0, 0
        self.feedback: tuple[Tensor, Tensor] | None = None
        self.skipped: set[str] = set()
        if saved is not None:
            self._restore(saved)
        require_same_network(process_group, network)
        self._step_scalars = StepScalars(self.training_set, self.device, network.adversary)
        self.folder.note_saved(self.iterations_done)

    @property
    def iterations_done(self) -> int:
        return self.epoch * self.batches.planner.iterations + self.iteration

    @plain_defaults()
    def fit(self) -> list[Evaluation]:
        """Train to the last epoch and evaluate on the targets.

        Raises:
            Interrupted: SIGINT, SIGTERM or SIGHUP came; the run was saved and can be resumed.
            DanFastError: training diverged, an image cannot be read, a process that decodes images died, or a file
                cannot be written; the run is saved except in the first and last case. Or another process trains in the
                folder, or did since this trainer was made, or another thread of this process trains.
        """
        with self.folder.held():
            return self._fit()

    def _fit(self) -> list[Evaluation]:
        self.batches.fill_cache([*self.datasets.labeled, *self.datasets.unlabeled])
        self.folder.write_settings(self.config)
        epochs = self.config.optimizer.epochs
        scalars = Scalars(self.folder.path / "tensorboard" if self._is_first else None, self.iterations_done)
        total = epochs * self.batches.planner.iterations
        display = Display(total, self.iterations_done, self.batches.batch_size, shown=self._is_first)
        evaluations: list[Evaluation] = []
        stop = TrainingStop(_STOPPING if self._is_first else "")
        try:
            with (
                deterministic_algorithms(self.config.run.deterministic),
                float32_products(self.config.memory.products),
                stop,
                display,
                self.random.in_process(),
            ):
                self._compiled.say = display.say
                for line in opening_lines(self.config, self.datasets, self.device, self._past):
                    display.say(line)
                self._save_what_is_done(scalars)  # by an earlier call, whose checkpoint may not have been written
                if self.epoch > 0 and self.iteration == 0:
                    # The run was stopped between an epoch's checkpoint and its evaluation.
                    evaluations = self._evaluate_if_due(scalars, display)
                while self.epoch < epochs:
                    self._train_epoch(scalars, display, stop)
                    if self.targets.are_due(self.epoch):
                        # Evaluating may take long, and need the memory that a copy of the run takes.
                        self._save()
                    evaluations = self._evaluate_if_due(scalars, display)
        except (DanFastError, RuntimeError) as error:
            # A stop that reaches the whole process group may end the workers of an evaluation.
            if not (stop.requested and is_worker_death(error)):
                raise
            raise Interrupted(f"Saved after iteration {self.iterations_done}.") from error
        except DivergedError as error:
            with suppress(DanFastError):
                scalars.flush(self.iterations_done)  # what led to it; that it diverged is the error to raise
            raise DanFastError(
                f"Training diverged at iteration {self.iterations_done} ({error}): start again in another run.out "
                f"with a lower optimizer.lr_scale; {self.folder.checkpoint} holds the last state saved, if any."
            ) from error
        finally:
            scalars.close()
        if self.skipped:
            display.say(f"Broken images skipped: {len(self.skipped)}.")
        return evaluations

    def _train_epoch(self, scalars: Scalars, display: Display, stop: TrainingStop) -> None:
        if self.iteration == 0 and self.model.memory is not None and self.config.data.feedback_fraction > 0:
            sample_ids, pseudo_labels = self.model.memory.reliable_samples()
            self.feedback = sample_ids.cpu(), pseudo_labels.cpu()
        batches = self.batches.of_epoch(self.epoch, self.feedback, self.iteration)
        self.model.train()
        save = partial(self._save_what_is_done, scalars)
        for batch in stop.until_requested(batches, save, self.process_group):
            display.tell_skipped(batch.skipped, self.skipped)
            with self.folder.whole_iteration(), saved_if_all_are_broken(self.process_group, batch.skipped, save):
                self.train_iteration(batch, scalars)
                epoch, last = self.epoch, self.iteration + 1 == self.batches.planner.iterations
                if last:
                    self.model.whiten_feature()
                self.epoch, self.iteration = (epoch + 1, 0) if last else (epoch, self.iteration + 1)
            log = last or self.iterations_done % self.config.run.log_every == 0
            if log and self._is_first and self.model.memory is not None:
                self._step_scalars.add_memory(scalars, self.model.memory)
            display.advance(epoch, scalars.flush(self.iterations_done) if log else None)
            if last:
                display.tell_skipped(sorted(set().union(*gathered(self.process_group, self.skipped))), self.skipped)
            if self.folder.checkpoint_is_due(self.iterations_done):
                self._save(wait=False)
        if stop.agreed:
            # The next part of the run begins a window of its own.
            scalars.flush(self.iterations_done)
            self._save()
            raise Interrupted(f"Saved after iteration {self.iterations_done}.")

    def train_iteration(self, batch: MiniBatch, scalars: Scalars) -> None:
        """Take the meta step and the outer step of one iteration; the caller counts the iterations.

        Args:
            batch: on the device, or on the host; images in pinned memory are copied without waiting.
            scalars: takes losses, accuracies, the competition and the memory.

        Raises:
            DivergedError: a feature or a gradient is not finite; no parameter has moved.
            DanFastError: batch norm or the memory refuses the batch; no parameter has moved.
        """
        progress = self.epoch + self.iteration / self.batches.planner.iterations
        lr = step_size(progress, self.config.optimizer.epochs, self.config.optimizer.lr_scale)
        set_step_size(self.optimizer, lr)
        try:
            result = self._compiled.step(batch.meta_train, batch.meta_test)
        except ValueError as error:
            at = self.iterations_done
            raise DanFastError(f"Training cannot go on at iteration {at}: {why_refused(error)}.") from error
        if self._is_first:
            self._step_scalars.add(scalars, result)
            scalars.add("train/step_size", lr)

    def _evaluate_if_due(self, scalars: Scalars, display: Display) -> list[Evaluation]:
        if not self.targets.are_due(self.epoch):
            return []
        network, state = self.model.eval().network, self._state_of_network(parted_state(self.model)[0])
        return self.targets.evaluate(network, state, self.batches.cache, self.iterations_done, scalars, display)

    def _save_what_is_done(self, scalars: Scalars) -> None:
        """Before an error ends the run: what goes on from here begins a window of its own."""
        if self.folder.is_behind(self.iterations_done):
            self._save()
        scalars.flush(self.iterations_done)

    def _save(self, wait: bool = True) -> None:
        of_model, features = parted_state(self.model)
        if any(largest(self.process_group, not all_finite([*of_model.values(), *features.values()]))):
            raise DivergedError("weights are not finite")
        sample_ids, pseudo_labels = self.feedback or (None, None)
        random, skipped = zip(*gathered(self.process_group, (self.random.state_dict(), self.skipped)), strict=True)
        state = {
            **self._state_of_network(of_model),
            "skipped": sorted(set().union(*skipped)),
            "optimizer": self.optimizer.state_dict(),
            **self.meta_step.state_dict(),
            "feedback": {"sample_ids": sample_ids, "pseudo_labels": pseudo_labels},
            "random": random[0],
            "random_of_other_ranks": list(random[1:]),
        }
        self.folder.write_checkpoint(state, features, self.iterations_done, wait)

    def _state_of_network(self, of_model: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            **{name: getattr(self.training_set, name) for name in ("fingerprint", "num_classes")},
            **self._past,
            "preprocessing": self.model.network.preprocessing.to_dict(),
            "epoch": self.epoch,
            "iteration": self.iteration,
            "skipped": sorted(self.skipped),
            "model": of_model,
            # For what is reported; nothing goes on from it.
            **({"compiled": self._compiled.outcome} if self.config.run.compile else {}),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        load_state(self.model, state, self.folder.path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.meta_step.load_state_dict(state)
        self._compiled.outcome = state.get("compiled") or ""
        self.epoch, self.iteration, self.skipped = state["epoch"], state["iteration"], set(state["skipped"])
        of_ranks = [state["random"], *state.get("random_of_other_ranks", [])]
        self.random.load_state_dicts(of_ranks, ranks_in(self.process_group), self.iterations_done)
        feedback = state["feedback"]
        if feedback["sample_ids"] is not None:
            self.feedback = feedback["sample_ids"], feedback["pseudo_labels"]
