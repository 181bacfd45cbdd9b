"""What a run writes down: means over a window of iterations, as TensorBoard scalars."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dan_fast.data import TrainingSet
from dan_fast.errors import DanFastError
from dan_fast.reference.types import MemoryState
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
        with self._named_errors():
            self._writer = SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else None)
        self._window: dict[str, list[Tensor | float]] = defaultdict(list)

    def add(self, name: str, value: Tensor | float) -> None:
        self._window[name].append(value.detach() if isinstance(value, Tensor) else value)

    def flush(self, step: int) -> dict[str, float]:
        """Write the means of the window as of `step`, forget it, and return them."""
        means = {
            name: float(torch.stack([torch.as_tensor(value, dtype=torch.float64).cpu() for value in values]).mean())
            for name, values in self._window.items()
        }
        self._window.clear()
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


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of logits (n, c) whose argmax is the label, () float."""
    return (logits.argmax(1) == labels).float().mean()


def pseudo_label_accuracy(record: PassRecord, training_set: TrainingSet) -> float | None:
    """The share of right pseudo labels among unlabelled images of labelled persons; None if there are none."""
    truth = training_set.true_labels[record.sample_ids.cpu()]
    known = (truth >= 0) & (record.pseudo_labels.cpu() >= 0)
    if not known.any():
        return None
    return float((record.pseudo_labels.cpu()[known] == truth[known]).float().mean())


def pseudo_label_purity(memory: MemoryState, training_set: TrainingSet) -> float | None:
    """How often images that share a pseudo label in M' show one person.

    The mean over the occupied slots of true identity and at least one companion under their pseudo label of the
    share of companions with the same identity. It needs no labelled image of the person, so it tells
    something of unlabelled sets with persons of their own too. None where nothing can be said.
    """
    stored = memory.occupied & (memory.sample_ids >= 0)
    labels, sample_ids = memory.labels[stored].cpu(), memory.sample_ids[stored].cpu()
    # An image can sit in several slots; it is no companion of itself.
    sample_ids, first = _unique_with_index(sample_ids)
    labels, identities = labels[first], training_set.true_ids[sample_ids]
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


def _unique_with_index(values: Tensor) -> tuple[Tensor, Tensor]:
    unique, inverse = values.unique(return_inverse=True)
    first = torch.full(unique.shape, len(values), dtype=torch.int64)
    first.scatter_reduce_(0, inverse, torch.arange(len(values)), reduce="amin")
    return unique, first
