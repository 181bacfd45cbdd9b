"""What a run writes down: means over a window of iterations, as TensorBoard scalars."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dan_fast.core.errors import DanFastError
from dan_fast.data import ReIDDataset, TrainingSet
from dan_fast.training.objective import PassRecord


class Scalars:
    """Collects scalars and writes their means to `folder` every so often.

    Tensors are kept as they are until `flush`, so that a GPU is waited for once a window and not once a value.

    Args:
        folder: TensorBoard's folder.
        steps_done: iterations done when the run continues; what it wrote of later ones before is dropped.

    Raises:
        DanFastError: `folder` cannot be written, here or in `flush`.
    """

    def __init__(self, folder: Path, steps_done: int = 0) -> None:
        self._folder = folder
        part = max(map(part_of_run, folder.glob("*tfevents*")), default=0) + 1
        with self._named_errors():
            self._writer = SummaryWriter(
                str(folder),
                purge_step=steps_done + 1 if steps_done else None,
                # The names begin with the time, and clocks are set back.
                filename_suffix=f".part{part}",
            )
        self._window: list[tuple[str, Tensor | float, Tensor | bool]] = []

    def add(self, name: str, value: Tensor | float, counts: Tensor | bool = True) -> None:
        """Put a value into the window.

        Args:
            value: () tensor or number.
            counts: () bool, whether the value is part of the mean; a tensor where the host does not know yet.
        """
        self._window.append((name, value.detach() if isinstance(value, Tensor) else value, counts))

    def flush(self, step: int) -> dict[str, float]:
        """Write the means of the window as of `step`, forget it, and return them."""
        names = [name for name, _, _ in self._window]
        numbers = _on_host([each for _, *pair in self._window for each in pair])
        self._window.clear()
        values: dict[str, list[float]] = defaultdict(list)
        for name, value, counts in zip(names, numbers[::2], numbers[1::2], strict=True):
            if counts:
                values[name].append(value)
        means = {name: fmean(each) for name, each in values.items()}
        with self._named_errors():
            for name, mean in means.items():
                self._writer.add_scalar(name, mean, step)
            self._writer.flush()
        return means

    def close(self) -> None:
        # Every window was flushed: nothing is lost, and a full disk has had its sentence already.
        with suppress(OSError):
            self._writer.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DanFastError(
                f"Scalars could not be written to {self._folder} ({error.strerror}): "
                "make room or choose another run.out."
            ) from error


def target_tags(targets: Sequence[ReIDDataset]) -> list[str]:
    """What scalars call the datasets that are tested on: their names, told apart where several have the same one.

    Two variants of a dataset, or two folders of one name, would else be averaged as one.

    Example:
        >>> root = Path("cuhk03")
        >>> boxes = [ReIDDataset("CUHK03", root, variant=f"{box}, new protocol") for box in ("labeled", "detected")]
        >>> target_tags([*boxes, ReIDDataset("street", Path("street"))])
        ['CUHK03-labeled_new_protocol', 'CUHK03-detected_new_protocol', 'street']
    """
    names = [target.name for target in targets]
    tags: list[str] = []
    for target in targets:
        tag = target.name
        if names.count(tag) > 1 and target.variant:
            tag += "-" + re.sub(r"[^\w.-]+", "_", target.variant)  # TensorBoard knows no other characters
        alike = sum(each == tag or re.fullmatch(rf"{re.escape(tag)}-\d+", each) is not None for each in tags)
        tags.append(f"{tag}-{alike + 1}" if alike else tag)
    return tags


def part_of_run(events: Path) -> int:
    """The number of an event file of `Scalars` in its folder, from 1 on; 0 for files of others, or older ones."""
    found = re.search(r"\.part(\d+)$", events.name)
    return int(found[1]) if found else 0


def _on_host(values: Sequence[Tensor | float]) -> list[float]:
    """The values as numbers; waits for the device once, not once a value."""
    tensors = [value.to(torch.float64) for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of logits (n, c) whose argmax is the label, () float."""
    return (logits.argmax(1) == labels).float().mean()


def logit_norm(logits: Tensor) -> Tensor:
    """The mean Euclidean norm of logits (n, c) over the n samples, () float."""
    return torch.linalg.vector_norm(logits, dim=1).mean()


def pseudo_label_accuracy(record: PassRecord, true_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The share of right pseudo labels among unlabelled images of labelled persons.

    Args:
        record: of a pass; its device is not waited for.
        true_labels: `TrainingSet.true_labels`, on that device.

    Returns:
        () float32, the share, and () bool, whether there are such images; without them the share is 0.
    """
    truth = true_labels[record.sample_ids]
    known = (truth >= 0) & (record.pseudo_labels >= 0)
    right = known & (record.pseudo_labels == truth)
    return right.sum() / known.sum().clamp(min=1), known.any()


def fed_back_right(record: PassRecord, true_labels: Tensor, true_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The share of right pseudo labels among fed-back images whose true identity is known.

    The pseudo label of a person without labelled images is always wrong: all of them in unlabelled sets with persons
    of their own.

    Args:
        record: of a pass; its device is not waited for.
        true_labels, true_ids: as in `TrainingSet`, on that device.

    Returns:
        () float32, the share, and () bool, whether there are such images; without them the share is 0.
    """
    known = true_ids[record.fed_back_ids] >= 0
    right = known & (true_labels[record.fed_back_ids] == record.fed_back_labels)
    return right.sum() / known.sum().clamp(min=1), known.any()


def cleared_a_sample(record: PassRecord) -> tuple[Tensor, Tensor]:
    """How many samples left M' for each unlabelled one that was written to it.

    Exact: what M' held before the pass and what was written, less what it holds after. A sample leaves as a false one,
    Eq. (14), or because its slot was the least used, Eq. (9); it counts also if the pass itself had written it. As
    every write fills one slot, 1 means that the slots in use stay as many, more that they get fewer.

    Args:
        record: of a pass with a memory; its device is not waited for.

    Returns:
        () float32 and () bool, whether any sample was written; without one the number is 0.
    """
    written = (record.pseudo_labels >= 0).sum()
    return record.cleared / written.clamp(min=1), written > 0


def pseudo_label_purity(sample_ids: Tensor, labels: Tensor, training_set: TrainingSet) -> float | None:
    """How often images that share a pseudo label in M' show one person.

    The mean over the images of true identity and at least one companion under their pseudo label of the
    share of companions with the same identity. It needs no labelled image of the person, so it tells
    something of unlabelled sets with persons of their own too. None where nothing can be said.

    Args:
        sample_ids, labels: (n,) int64, what `ProgressiveAugmentedMemory.reliable_samples` gives: each image once, for
            an image is no companion of itself.
    """
    labels, identities = labels.cpu(), training_set.true_ids[sample_ids.cpu()]
    labels, identities = labels[identities >= 0], identities[identities >= 0]
    if labels.numel() == 0:
        return None
    _, label_index = labels.unique(return_inverse=True)
    pairs = label_index * (int(identities.max()) + 1) + identities
    _, pair_index, pair_sizes = pairs.unique(return_inverse=True, return_counts=True)
    companions = label_index.bincount()[label_index] - 1
    same = pair_sizes[pair_index] - 1
    if not (companions > 0).any():
        return None
    return float((same[companions > 0] / companions[companions > 0]).mean())
