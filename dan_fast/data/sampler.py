"""Which images make up each mini-batch: planned for a whole epoch at once, without reading an image."""

import hashlib
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError

Kind = Literal["labeled", "fed_back", "unlabeled"]


class PlannedItem(NamedTuple):
    """One image of a batch.

    Attributes:
        kind: "labeled", "fed_back" (an unlabelled image with a pseudo label) or "unlabeled".
        index: position in the labelled samples for "labeled", in the unlabelled ones (the sample id)
            otherwise.
        label: class, pseudo label, or -1 for "unlabeled".
        seed: seed of this image's augmentation, so that it depends neither on workers nor on restarts.
    """

    kind: Kind
    index: int
    label: int
    seed: int


class BatchPlan(NamedTuple):
    """One mini-batch: S in `meta_train`, S~ in `meta_test` (None if not split); order as in `Kind`."""

    meta_train: tuple[PlannedItem, ...]
    meta_test: tuple[PlannedItem, ...] | None


class BatchPlanner:
    """Plans the batches of an epoch: S and S~ of Algorithm 1, with samples fed back from the memory.

    S takes half the batch and S~ the other half (of an odd batch, S takes the larger half). Each has its share of
    unlabelled places; without unlabelled images all places are labelled. Fed-back samples take labelled places of S~,
    and for each of them a random labelled image of its pseudo class takes a place of S, so that S~ tests the classes
    that S trains. The other labelled places go through all labelled images in random order, anew each epoch. The
    unlabelled places go through all unlabelled images in random order, on from one epoch to the next, so that none is
    left behind however short an epoch is.

    A plan depends only on the arguments, the epoch and the feedback: after a restart in the middle of an epoch, plan it
    again with the same feedback and leave out the iterations done.

    Args:
        labels: (n_labeled,) int64 classes of the labelled samples, every class 0..c-1 with one image or more.
        num_unlabeled: number of unlabelled samples.
        batch_size: images per iteration, S and S~ together.
        unlabeled_fraction: unlabelled share of S and of S~, in [0, 1); a labelled place remains in each.
        feedback_fraction: largest share of S~'s labelled places for fed-back samples, in [0, 1].
        iterations: batches of an epoch; 0: as many as the labelled images fill. With fewer, an epoch leaves some images
            out, drawn anew each time.
        split: False puts the items of both halves into `meta_train`, for training without meta-test (DAML1).
        seed: seed of everything random here.

    Attributes:
        iterations: batches of an epoch, one or more.
        places: how many labelled and unlabelled places each part of a batch has, S and S~ if the batch is split.

    Raises:
        DanFastError: a batch size or fraction outside its range.
        ValueError: no labels, or a negative count.

    Example:
        >>> planner = BatchPlanner(torch.tensor([0, 0, 1, 1]), num_unlabeled=9, batch_size=8)
        >>> batch = planner.plan_epoch(0, feedback=(torch.tensor([5]), torch.tensor([1])))[0]
        >>> [item.kind for item in batch.meta_test]
        ['labeled', 'fed_back', 'unlabeled', 'unlabeled']
        >>> batch.meta_test[1].index, batch.meta_test[1].label, 1 in [item.label for item in batch.meta_train]
        (5, 1, True)
    """

    def __init__(
        self,
        labels: Tensor,
        num_unlabeled: int,
        batch_size: int = 64,
        unlabeled_fraction: float = 0.5,
        feedback_fraction: float = 0.5,
        split: bool = True,
        seed: int = 0,
        iterations: int = 0,
    ) -> None:
        if batch_size < 2:
            halves = ", one image each for S and S~" if split else ""
            raise DanFastError(f"The batch size is {batch_size}; it must be 2 or more{halves}.")
        if not 0.0 <= unlabeled_fraction < 1.0:
            raise DanFastError(f"The unlabelled fraction is {unlabeled_fraction}; choose it from 0 to below 1.")
        if not 0.0 <= feedback_fraction <= 1.0:
            raise DanFastError(f"The feedback fraction is {feedback_fraction}; choose it between 0 and 1.")
        if labels.ndim != 1 or labels.numel() == 0 or num_unlabeled < 0:
            raise ValueError(
                f"labels must be (n,) with n > 0 and num_unlabeled >= 0, not {tuple(labels.shape)} and {num_unlabeled}"
            )
        if iterations < 0:
            raise ValueError(f"iterations must not be negative, got {iterations}")
        self.labels: list[int] = labels.tolist()
        self.num_unlabeled = num_unlabeled
        self.split = split
        self.seed = seed
        fraction = unlabeled_fraction if num_unlabeled else 0.0
        self._train_places = _places(batch_size - batch_size // 2, fraction)
        self._test_places = _places(batch_size // 2, fraction)
        # S~ is never the larger half, so S has a labelled place for the partner of each fed-back sample.
        self._feedback_places = int(feedback_fraction * self._test_places[0])
        self.iterations = iterations or max(1, len(self.labels) // (self._train_places[0] + self._test_places[0]))
        self._members: dict[int, list[int]] = {}
        for index, label in enumerate(self.labels):
            self._members.setdefault(label, []).append(index)

    @property
    def places(self) -> list[tuple[int, int]]:
        parts = [self._train_places, self._test_places]
        return parts if self.split else [(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])]

    def plan_epoch(self, epoch: int, feedback: tuple[Tensor, Tensor] | None = None) -> list[BatchPlan]:
        """Plans the `iterations` batches of an epoch.

        Args:
            epoch: number of the epoch, from 0 on.
            feedback: (sample_ids, pseudo_labels), both (m,) int64, as the memory's `reliable_samples` gives
                them.

        Raises:
            ValueError: feedback of unequal lengths, unknown sample ids, or classes without a labelled image.
        """
        return list(self.batches(epoch, feedback))

    def batches(self, epoch: int, feedback: tuple[Tensor, Tensor] | None = None) -> Iterator[BatchPlan]:
        """The batches of `plan_epoch` one by one, so that only one batch is kept in memory."""
        sample_ids, pseudo_labels = self._checked(feedback)
        fed_places = min(self._feedback_places, len(sample_ids))
        unlabeled_places = self._train_places[1] + self._test_places[1]
        labeled = _endless(len(self.labels), lambda turn: self._generator("labeled", epoch, turn))
        fed_back = _endless(len(sample_ids), lambda turn: self._generator("fed back", epoch, turn))
        unlabeled = _endless(
            self.num_unlabeled,
            lambda turn: self._generator("unlabeled", turn),
            start=epoch * self.iterations * unlabeled_places,
        )
        generator = self._generator("items", epoch)

        def part(places: tuple[int, int], partners: list[int], fed: list[int]) -> list[list[PlannedItem]]:
            indices = [*partners, *islice(labeled, places[0] - len(partners) - len(fed))]
            return [
                [PlannedItem("labeled", index, self.labels[index], _draw(generator)) for index in indices],
                [PlannedItem("fed_back", sample_ids[row], pseudo_labels[row], _draw(generator)) for row in fed],
                [PlannedItem("unlabeled", index, -1, _draw(generator)) for index in islice(unlabeled, places[1])],
            ]

        for _ in range(self.iterations):
            fed = list(islice(fed_back, fed_places))
            same_class = [self._members[pseudo_labels[row]] for row in fed]
            partners = [members[_draw(generator, len(members))] for members in same_class]
            train, test = part(self._train_places, partners, []), part(self._test_places, [], fed)
            if self.split:
                yield BatchPlan(tuple(sum(train, [])), tuple(sum(test, [])))
            else:
                merged = [items + others for items, others in zip(train, test, strict=True)]
                yield BatchPlan(tuple(sum(merged, [])), None)

    def _generator(self, *purpose: str | int) -> torch.Generator:
        # Hashed: neighbouring seeds, epochs and purposes must not give related or equal streams.
        digest = hashlib.sha256(repr((self.seed, *purpose)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

    def _checked(self, feedback: tuple[Tensor, Tensor] | None) -> tuple[list[int], list[int]]:
        if feedback is None:
            return [], []
        sample_ids, pseudo_labels = feedback
        if sample_ids.ndim != 1 or sample_ids.shape != pseudo_labels.shape:
            raise ValueError(
                "feedback must be sample_ids (m,) and pseudo_labels (m,), not "
                f"{tuple(sample_ids.shape)} and {tuple(pseudo_labels.shape)}"
            )
        ids, classes = sample_ids.tolist(), pseudo_labels.tolist()
        if any(not 0 <= index < self.num_unlabeled for index in ids):
            raise ValueError(f"feedback holds sample_ids outside 0..{self.num_unlabeled - 1}")
        if any(label not in self._members for label in classes):
            raise ValueError("feedback holds pseudo_labels of which there is no labelled image")
        return ids, classes


def _endless(count: int, generator: Callable[[int], torch.Generator], start: int = 0) -> Iterator[int]:
    """Numbers 0..count-1 in random order, over and over, each turn in an order of its own, from the `start`-th on."""
    turn, position = divmod(start, count)
    while True:
        yield from torch.randperm(count, generator=generator(turn)).tolist()[position:]
        turn, position = turn + 1, 0


def _places(size: int, unlabeled_fraction: float) -> tuple[int, int]:
    """(labelled, unlabelled) places of a part; one labelled place always remains: losses need it."""
    unlabeled = min(math.floor(size * unlabeled_fraction + 0.5), size - 1)
    return size - unlabeled, unlabeled


def _draw(generator: torch.Generator, below: int = 2**31 - 1) -> int:
    return int(torch.randint(below, (), generator=generator))
