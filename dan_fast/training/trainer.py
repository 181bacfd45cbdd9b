"""The training loop: data, meta step, outer step, checkpoints, evaluation."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dan_fast.core.errors import DanFastError, Interrupted
from dan_fast.core.files import alone, remove_unfinished, write_text
from dan_fast.core.float32 import float32_rounding
from dan_fast.data import BatchPlanner, ImageCache, MiniBatch, TrainingSet, training_loader
from dan_fast.data.images.workers import is_worker_death
from dan_fast.evaluation import Evaluation, evaluate_dataset
from dan_fast.training.build import build_memory, network_and_random_state, preprocessing_of, resolve_device
from dan_fast.training.checkpoint import CheckpointWriter, load_checkpoint
from dan_fast.training.config import TrainConfig, goes_on, require_same_training
from dan_fast.training.determinism import deterministic_algorithms, prepare_cublas
from dan_fast.training.display import Display
from dan_fast.training.interrupt import StopRequest
from dan_fast.training.objective import DivergedError, TrainingModel, all_finite
from dan_fast.training.reported import EpochChoice, describe, epoch_of, say, write_results
from dan_fast.training.scalars import Scalars, target_tags
from dan_fast.training.schedule import step_size
from dan_fast.training.sources import load_datasets
from dan_fast.training.step import MetaStep
from dan_fast.training.step_scalars import StepScalars
from dan_fast.triton_kernels import float32_products

_BACKBONE = "network.backbone."
# Key of an optimizer's group: the factor on its step size.
_SCALE = "lr_scale"


class Trainer:
    """Trains a DAN as `config` says and keeps everything in the folder `config.run.out`.

    The folder holds config.yaml, checkpoint.pt (everything: weights, optimizer, memory, competition, random
    states, the feedback of the epoch; a run killed at any moment resumes from it, on the CPU bit for bit, on a GPU
    with run.deterministic), tensorboard/, chosen.pt where an epoch is chosen on the targets and, after the last epoch,
    results.json. Checkpoints within an epoch are written beside the training, which waits for the copy to host memory
    only.

    A trainer is a guest in its process: it has random numbers of its own, and `fit` puts back the process's generators
    of the CPU and of the run's GPU, and the handlers of SIGINT and SIGTERM, when it leaves. Who calls
    `train_iteration` without `fit` draws from the process's generators. What NumPy and Python draw from
    is not touched.

    Raises:
        DanFastError: data, settings, device or checkpoint do not fit; the sentence says which and what to do.

    Example:
        trainer = Trainer(TrainConfig(data=DataConfig(labeled=["market"]), run=RunConfig(out="runs/market")))
        evaluations = trainer.fit()
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.out = Path(config.run.out)
        self.checkpoint = self.out / "checkpoint.pt"
        self.device = resolve_device(config.run.device)
        if config.run.deterministic and self.device.type == "cuda":
            prepare_cublas()
        self._found = _mark(self.checkpoint)
        saved = self._saved_state()

        data = config.data
        self.datasets = load_datasets(data)
        self.training_set = TrainingSet(
            self.datasets.labeled, self.datasets.unlabeled, unlabeled_share=data.unlabeled_share, seed=config.run.seed
        )
        if saved is not None and saved["fingerprint"] != self.training_set.fingerprint:
            raise DanFastError(
                f"{self.checkpoint} was trained on other images than data.labeled and data.unlabeled hold now: "
                "restore them or choose another run.out."
            )
        titles = [target.title for target in self.datasets.targets]
        self.choice = EpochChoice.of_setting(config.run, titles) if config.run.choose_epoch_on_target else None

        lending = config.model.style_mixing == "unlabeled" and bool(self.training_set.unlabeled_samples)
        network, after_weights = network_and_random_state(
            config.to_dict(),
            self.training_set.num_classes,
            read_weights=saved is None,
            mixes_styles=lending or config.model.style_mixing == "batch",
        )
        if saved is not None:
            network.preprocessing = preprocessing_of(saved)
        self.cache = ImageCache.of_setting(
            data.cache,
            network.image_size,
            data.cache_check,
            workers=data.workers,
            say=print,
            interpolation=network.preprocessing.interpolation,
        )
        memory = None
        if (self.training_set.unlabeled_samples and not lending) or config.loss.labeled_embedding > 0:
            memory = build_memory(config.memory, network.key_dim)
        half = torch.bfloat16 if config.run.precision == "bfloat16" else None
        self.model = TrainingModel(network, memory, config.loss, half, config.memory.temperature, lending)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.planner = BatchPlanner(
            self.training_set.labels,
            len(self.training_set.unlabeled_samples),
            batch_size=config.data.batch_size,
            unlabeled_fraction=config.data.unlabeled_fraction,
            feedback_fraction=config.data.feedback_fraction,
            split=config.meta.procedure != "daml1",
            seed=config.run.seed,
            iterations=config.data.iterations,
        )
        self.optimizer = torch.optim.SGD(
            self._parameter_groups(),
            lr=1.0,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
        )
        self.meta_step = MetaStep(self.model, self.optimizer, config.meta)
        self._step_scalars = StepScalars(self.training_set, self.device, network.adversary)
        self.epoch = 0
        self.iteration = 0
        self.feedback: tuple[Tensor, Tensor] | None = None
        self.skipped: set[str] = set()
        gpus = [self.device] if self.device.type == "cuda" else []
        of_gpu = [torch.Generator(gpu).manual_seed(config.run.seed).get_state() for gpu in gpus]
        self._random_state = {"cpu": after_weights, "cuda": of_gpu}
        if saved is not None:
            self._restore(saved)
            self._random_state = saved["random"]
        self._writer = CheckpointWriter()
        self._saved_at = self.iterations_done, time.monotonic()

    @property
    def iterations_done(self) -> int:
        return self.epoch * self.planner.iterations + self.iteration

    def fit(self) -> list[Evaluation]:
        """Train to the last epoch and evaluate on the targets.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the run was saved and can be resumed.
            DanFastError: training diverged, an image cannot be read, a process that decodes images died, or a file
                cannot be written; of these all but the first and the last find the run saved. Or another process
                trains in the folder, or did since this trainer was made.
        """
        with alone(self.out / ".run.lock"):
            remove_unfinished(self.out)
            if _mark(self.checkpoint) != self._found:
                raise DanFastError(
                    f"Another process has written {self.checkpoint} since this one began: start it again."
                )
            try:
                return self._fit()
            except BaseException:
                # What is being written is whole, and its own error is not the one to tell.
                with suppress(DanFastError):
                    self._writer.wait()
                raise
            finally:
                self._found = _mark(self.checkpoint)

    def _fit(self) -> list[Evaluation]:
        if self.cache is not None:
            # Whole train splits, whatever share of them this run takes: others can use them too.
            for dataset in (*self.datasets.labeled, *self.datasets.unlabeled):
                self.cache.add([sample.path for sample in dataset.train])
        write_text(self.out / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        epochs = self.config.optimizer.epochs
        scalars = Scalars(self.out / "tensorboard", steps_done=self.iterations_done)
        display = Display(epochs * self.planner.iterations, self.iterations_done, self.config.data.batch_size)
        evaluations: list[Evaluation] = []
        stop = StopRequest()
        try:
            with (
                deterministic_algorithms(self.config.run.deterministic),
                float32_products(self.config.memory.products),
                stop,
                display,
                self._own_random_numbers(),
            ):
                if self.config.data.protocol:
                    said = describe(self.datasets, self.config.data.unlabeled_share)
                    display.say(f"Protocol {self.config.data.protocol}: {said}.")
                if self.datasets.unlabeled and self.config.data.unlabeled_share == 0:
                    display.say(
                        f"{', '.join(dataset.title for dataset in self.datasets.unlabeled)} is left aside, because "
                        "data.unlabeled_share is 0: --recipe dan and --recipe paper train with unlabelled images."
                    )
                rounding = float32_rounding(self.device)
                if rounding and self.config.run.precision == "float32":
                    display.say(f"Float32 on {self.device}: {rounding}, as torch.backends has it.")
                if self.epoch > 0 and self.iteration == 0:
                    # A run that was stopped between an epoch's checkpoint and its evaluation makes up for it.
                    evaluations = self._evaluate_if_due(scalars, display)
                while self.epoch < epochs:
                    self._train_epoch(scalars, display, stop)
                    if self._evaluation_is_due():
                        # Evaluating may take long, and need the memory that a copy of the run takes.
                        self._save()
                    evaluations = self._evaluate_if_due(scalars, display)
        except (DanFastError, RuntimeError) as error:
            # A stop that reaches the whole process group may end the workers of an evaluation.
            if not (stop.requested and is_worker_death(error)):
                raise
            raise self._interrupted() from error
        except DivergedError as error:
            raise DanFastError(
                f"Training diverged at iteration {self.iterations_done} ({error}): start again in another run.out "
                f"with a lower optimizer.lr_scale; {self.checkpoint} holds the last state saved, if any."
            ) from error
        finally:
            scalars.close()
        if self.skipped:
            display.say(f"Broken images skipped: {len(self.skipped)}.")
        return evaluations

    def _train_epoch(self, scalars: Scalars, display: Display, stop: StopRequest) -> None:
        run = self.config.run
        if self.iteration == 0 and self.model.memory is not None and self.config.data.feedback_fraction > 0:
            sample_ids, pseudo_labels = self.model.memory.reliable_samples()
            self.feedback = sample_ids.cpu(), pseudo_labels.cpu()
        loader = training_loader(
            self.training_set,
            islice(self.planner.batches(self.epoch, self.feedback), self.iteration, None),
            tuple(self.config.data.image_size),
            workers=self.config.data.workers,
            broken_images=self.config.data.broken_images,
            cache=self.cache,
            device=self.device,
            preprocessing=self.model.network.preprocessing,
        )
        self.model.train()
        for batch in self._batches(loader, stop):
            for path in batch.skipped:
                if path not in self.skipped:
                    self.skipped.add(path)
                    display.say(f"Skipped {path}: it cannot be decoded.")
            self.train_iteration(batch, scalars)
            self.iteration += 1
            last = self.iteration == self.planner.iterations
            means = None
            if last or self.iterations_done % run.log_every == 0:
                means = scalars.flush(self.iterations_done)
            display.advance(self.epoch, means)
            if last:
                self.epoch, self.iteration = self.epoch + 1, 0
            if self._checkpoint_is_due():
                self._save(wait=False)
        if stop.requested:
            self._save()
            raise self._interrupted()

    def _batches(self, loader: Iterable[MiniBatch], stop: StopRequest) -> Iterator[MiniBatch]:
        """The batches of `loader` until a stop is requested; where they end in an error the run is saved before it."""
        batches = iter(loader)
        stop.outlive_workers()
        while not stop.requested:
            try:
                batch = next(batches, None)
            except Exception as error:
                if stop.requested and is_worker_death(error):
                    return
                if self.iterations_done > self._saved_at[0]:
                    self._save()
                raise
            if batch is None:
                return
            yield batch

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"Saved after iteration {self.iterations_done}.")

    def _checkpoint_is_due(self) -> bool:
        (iterations, seconds), run = self._saved_at, self.config.run
        due = time.monotonic() - seconds >= run.checkpoint_every_s or (
            0 < run.checkpoint_every <= self.iterations_done - iterations
        )
        # In this order: what could not be written is told at once.
        return self._writer.is_free() and due

    def _evaluation_is_due(self) -> bool:
        last, every = self.epoch == self.config.optimizer.epochs, self.config.run.evaluate_every
        return last or (every > 0 and self.epoch % every == 0)

    def train_iteration(self, batch: MiniBatch, scalars: Scalars) -> None:
        """Take the meta step and the outer step of one iteration; to count it is for the caller.

        Args:
            batch: on the device, or on the host; images in pinned memory are copied without waiting.
            scalars: told of losses, accuracies, the competition and the memory.

        Raises:
            DivergedError: a feature or a gradient is not finite; no parameter has moved.
            DanFastError: batch norm or the memory refuses the batch; no parameter has moved.
        """
        progress = self.epoch + self.iteration / self.planner.iterations
        lr = step_size(progress, self.config.optimizer.epochs, self.config.optimizer.lr_scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get(_SCALE, 1.0)
        try:
            result = self.meta_step.step(batch.meta_train, batch.meta_test)
        except ValueError as error:
            raise DanFastError(f"Training cannot go on at iteration {self.iterations_done}: {error}.") from error
        self._step_scalars.add(scalars, result)
        scalars.add("train/step_size", lr)
        last_of_window = (self.iterations_done + 1) % self.config.run.log_every == 0
        if self.model.memory is not None and last_of_window:
            self._step_scalars.add_memory(scalars, self.model.memory)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The outer step's groups: one unless the backbone's steps are scaled."""
        scale = self.config.optimizer.backbone_lr_scale
        named = list(self.model.named_parameters())
        if scale == 1:
            return [{"params": [parameter for _, parameter in named]}]
        backbone = [parameter for name, parameter in named if name.startswith(_BACKBONE)]
        others = [parameter for name, parameter in named if not name.startswith(_BACKBONE)]
        return [{"params": backbone, _SCALE: scale}, {"params": others, _SCALE: 1.0}]

    def _evaluate_if_due(self, scalars: Scalars, display: Display) -> list[Evaluation]:
        if not self._evaluation_is_due():
            return []
        self.model.eval()
        evaluations, state = [], self._state_of_network()
        targets = self.datasets.targets
        for dataset, tag in zip(targets, target_tags(targets), strict=True):
            evaluation = evaluate_dataset(
                self.model.network.embed,
                dataset,
                tuple(self.config.data.image_size),
                workers=self.config.data.workers,
                device=self.device,
                broken_images=self.config.data.broken_images,
                cache=self.cache,
                preprocessing=self.model.network.preprocessing,
            )
            evaluation = replace(
                evaluation,
                named_protocol=self.config.data.protocol or "",
                epoch=epoch_of(state),
                recipe=self.config.recipe_words,
            )
            evaluations.append(evaluation)
            figures = evaluation.percentages()
            for name in ("R1", "mAP", "mINP"):
                scalars.add(f"eval/{tag}/{name}", figures[name])
            say(evaluation, display)
            for path in evaluation.skipped:
                display.say(f"Skipped {path}: it cannot be decoded.")
        scalars.flush(self.iterations_done)
        if self.choice is not None:
            self.choice.offer(evaluations, state)
        if self.epoch < self.config.optimizer.epochs:
            return evaluations
        reported = write_results(
            self.out / "results.json",
            state,
            self.datasets,
            evaluations,
            self.device,
            self.choice,
            self.iterations_done,
        )
        if reported is not evaluations:
            for evaluation in reported:
                say(evaluation, display)
        return reported

    def _saved_state(self) -> dict[str, Any] | None:
        if not goes_on(self.config.run):
            if self.checkpoint.exists():
                raise DanFastError(
                    f"{self.out} already holds a run: add --run.resume true to continue it or choose another run.out."
                )
            return None
        state = load_checkpoint(self.checkpoint)
        require_same_training(state["config"], self.config.to_dict(), self.checkpoint)
        return state

    def _save(self, wait: bool = True) -> None:
        if not all_finite(self.model.state_dict().values()):
            raise DivergedError("weights are not finite")
        sample_ids, pseudo_labels = self.feedback or (None, None)
        self._writer.save(
            self.checkpoint,
            {
                **self._state_of_network(),
                "skipped": sorted(self.skipped),
                "optimizer": self.optimizer.state_dict(),
                **self.meta_step.state_dict(),
                "feedback": {"sample_ids": sample_ids, "pseudo_labels": pseudo_labels},
                "random": self._get_random_state(),
            },
        )
        self._saved_at = self.iterations_done, time.monotonic()
        if wait:
            self._writer.wait()

    def _state_of_network(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "fingerprint": self.training_set.fingerprint,
            "num_classes": self.training_set.num_classes,
            "preprocessing": self.model.network.preprocessing.to_dict(),
            "persons": self.training_set.persons,
            "epoch": self.epoch,
            "iteration": self.iteration,
            "model": self.model.state_dict(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meta_step.load_state_dict(state)
        self.epoch, self.iteration, self.skipped = state["epoch"], state["iteration"], set(state["skipped"])
        feedback = state["feedback"]
        if feedback["sample_ids"] is not None:
            self.feedback = feedback["sample_ids"], feedback["pseudo_labels"]

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Inside, the process's generators are those of this run, from where it last left them."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self._set_random_state(self._random_state)
            try:
                yield
            finally:
                self._random_state = self._get_random_state()

    def _get_random_state(self) -> dict[str, Any]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and state["cuda"]:
            # Older checkpoints hold the states of all GPUs.
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            torch.cuda.set_rng_state(state["cuda"][index % len(state["cuda"])], self.device)


def _mark(path: Path) -> tuple[int, int, int] | None:
    """By which a file is told from another one that took its place; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
