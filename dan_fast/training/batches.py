"""The mini-batches of a run's epochs, from its datasets through the cache of decoded images to the device."""

import os
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from dan_fast.core.batches import MiniBatch
from dan_fast.core.errors import DanFastError
from dan_fast.data import BatchPlanner, ImageCache, ReIDDataset, TrainingSet, training_loader
from dan_fast.data.shares import share_of
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.launch import rank_in, ranks_in
from dan_fast.nn import DAN
from dan_fast.training.config import TrainConfig


class TrainingBatches:
    """Plans and loads the batches that a run trains with.

    Args:
        config: of the run.
        training_set: what the batches are drawn from.
        network: for which images are read: its size and its preprocessing.
        device: where the batches are wanted.
        group: ranks that each take a share of every batch; a plan does not depend on how many there are.

    Attributes:
        planner: which images are in which batch; cache: of decoded images, None without one.
        batch_size: images of a whole batch.

    Raises:
        DanFastError: the cache or the sizes of the batches do not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        training_set: TrainingSet,
        network: DAN,
        device: torch.device,
        group: ProcessGroup | None = None,
    ) -> None:
        data = config.data
        self._rank, self._ranks = rank_in(group), ranks_in(group)
        self.batch_size = data.batch_size * (self._ranks if data.batch_size_per_rank else 1)
        self._data, self._training_set, self._device = data, training_set, device
        self._preprocessing = network.preprocessing
        self.cache = ImageCache.of_setting(
            data.cache,
            network.image_size,
            data.cache_check,
            workers=data.workers,
            say=print if self._rank == 0 else lambda line: None,
            interpolation=network.preprocessing.interpolation,
        )
        self.planner = BatchPlanner(
            training_set.labels,
            len(training_set.unlabeled_samples),
            batch_size=self.batch_size,
            unlabeled_fraction=data.unlabeled_fraction,
            feedback_fraction=data.feedback_fraction,
            split=config.meta.procedure != "daml1",
            seed=config.run.seed,
            iterations=data.iterations,
        )
        self._lending = config.model.style_mixing == "unlabeled"
        if training_set.unlabeled_samples and not any(unlabeled for _, unlabeled in self.planner.places):
            raise DanFastError(
                f"No batch has a place for unlabelled images: data.unlabeled_fraction {data.unlabeled_fraction} of "
                f"data.batch_size {data.batch_size} is none; raise one of them, or set data.unlabeled_share to 0."
            )
        labeled, unlabeled = map(min, zip(*self.planner.places, strict=True))
        fewest = min(labeled, unlabeled) if self._lending and unlabeled else labeled
        if self._ranks > 1 and fewest < self._ranks:
            raise DanFastError(
                f"A batch of {self.batch_size} images cannot be divided over {self._ranks} ranks, S or S~ has {fewest} "
                "labelled or unlabelled places: raise data.batch_size or use fewer ranks."
            )

    def fill_cache(self, datasets: Iterable[ReIDDataset]) -> None:
        """Decode into the cache what it lacks of the train splits of the datasets that the run takes images of.

        Whole splits, whatever share of them that is: other runs can use them too.
        """
        if self.cache is not None:
            for dataset in datasets:
                if os.path.realpath(dataset.root) not in self._training_set.roots:
                    continue
                self.cache.add([sample.path for sample in dataset.train])

    def of_epoch(self, epoch: int, feedback: tuple[Tensor, Tensor] | None, first: int = 0) -> Iterable[MiniBatch]:
        """The batches of an epoch from iteration `first` on.

        Args:
            epoch: from 0 on.
            feedback: sample ids and pseudo labels that M' gives back, (n,) int64 on the host, or None.
            first: iterations of the epoch that are done already.
        """
        plans = islice(self.planner.batches(epoch, feedback), first, None)
        return training_loader(
            self._training_set,
            (share_of(plan, self._rank, self._ranks) for plan in plans) if self._ranks > 1 else plans,
            tuple(self._data.image_size),
            workers=self._data.workers,
            broken_images=self._data.broken_images,
            cache=self.cache,
            device=self._device,
            preprocessing=self._preprocessing,
            shares=self._ranks > 1 and not self._lending,
        )
