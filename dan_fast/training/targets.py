"""The datasets that a run is tested on: when, and what becomes of the figures."""

from typing import Any

import torch

from dan_fast.core.errors import DanFastError
from dan_fast.data import ImageCache
from dan_fast.data.named_protocols import DatasetRoles
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.launch import rank_in
from dan_fast.evaluation import Evaluation, evaluate_dataset
from dan_fast.nn import DAN
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.training.config import TrainConfig, goes_on
from dan_fast.training.display import Display
from dan_fast.training.reported import EpochChoice, of_training, say, write_results
from dan_fast.training.run_folder import RunFolder
from dan_fast.training.scalars import Scalars, target_tags


class Targets:
    """Evaluates a network on the targets of a run; after the last epoch writes results.json.

    Ranks of a `process_group` evaluate together, and rank 0 prints and writes.

    Raises:
        DanFastError: run.choose_epoch_on_target has nothing to choose from.
    """

    def __init__(
        self,
        config: TrainConfig,
        datasets: DatasetRoles,
        folder: RunFolder,
        device: torch.device,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._group, self._writes = process_group, rank_in(process_group) == 0
        self._config, self._datasets, self._folder, self._device = config, datasets, folder, device
        self._choice = None
        if config.run.choose_epoch_on_target:
            titles = [target.title for target in datasets.targets]
            if not titles or config.run.evaluate_every == 0:
                what = "run.evaluate_every, such as 10" if titles else "data.targets or data.protocol"
                raise DanFastError(f"run.choose_epoch_on_target has nothing to choose from: add {what}.")
            self._choice = EpochChoice(folder.path / "chosen.pt", goes_on(config.run), titles, self._writes)

    def are_due(self, epochs_done: int) -> bool:
        """Whether they are evaluated after so many epochs."""
        last, every = epochs_done == self._config.optimizer.epochs, self._config.run.evaluate_every
        return last or (every > 0 and epochs_done % every == 0)

    def evaluate(
        self,
        network: DAN,
        state: dict[str, Any],
        cache: ImageCache | None,
        iterations_done: int,
        scalars: Scalars,
        display: Display,
    ) -> list[Evaluation]:
        """The figures of a network in eval mode, on the device, written and shown; `state` is its checkpoint's.

        Returns:
            The figures of this epoch; after the last one those that are reported.
        """
        evaluations = []
        targets = self._datasets.targets
        for dataset, tag in zip(targets, target_tags(targets), strict=True):
            evaluation = evaluate_dataset(
                network.embed,
                dataset,
                tuple(self._config.data.image_size),
                workers=self._config.data.workers,
                device=self._device,
                broken_images=self._config.data.broken_images,
                cache=cache,
                preprocessing=network.preprocessing,
                process_group=self._group,
            )
            evaluation = of_training(evaluation, state, dataset, self._config.data.protocol or "")
            evaluations.append(evaluation)
            figures = evaluation.percentages()
            for name in ("R1", "mAP", "mINP"):
                scalars.add(f"eval/{tag}/{name}", figures[name])
            say(evaluation, display)
            display.tell_skipped(evaluation.skipped, set())
        scalars.flush(iterations_done)
        if self._choice is not None:
            self._choice.offer(evaluations, state, weights_hash(network))
        if state["epoch"] < self._config.optimizer.epochs:
            return evaluations
        if self._writes:
            path, weights = self._folder.path / "results.json", weights_hash(network)
            write_results(path, state, self._datasets, evaluations, weights, self._choice, iterations_done)
        if self._choice is None:
            return evaluations
        for evaluation in self._choice.evaluations:
            say(evaluation, display)
        return self._choice.evaluations
