"""What is measured of a pass and of the memory: accuracies, logits, pseudo labels."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dan_fast.training.objective import PassRecord

if TYPE_CHECKING:
    from dan_fast.data import TrainingSet


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
    of their own. Arguments and result as `pseudo_label_accuracy`.
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


def pseudo_label_purity(sample_ids: Tensor, labels: Tensor, training_set: "TrainingSet") -> float | None:
    """How often images that share a pseudo label in M' show one person.

    The mean over the images of true identity and at least one companion under their pseudo label of the
    share of companions with the same identity. It needs no labelled image of the person, so it is
    defined for unlabelled sets with persons of their own too. None where there is no such image.

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
