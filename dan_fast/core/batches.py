"""Mini-batches as the meta step takes them, wherever their images come from."""

from typing import Literal, NamedTuple

from torch import Tensor

# What is done at an image that cannot be decoded.
BrokenImages = Literal["error", "skip"]


class Split(NamedTuple):
    """One part of a mini-batch; its n images are the labelled, then the fed-back, then the unlabelled ones.

    Attributes:
        images: (n,3,H,W) float32, on the device of the loader like all tensors here.
        labels: (n,) int64: class, pseudo label of a fed-back image, -1 for an unlabelled one.
        sample_ids: (n,) int64: place in `TrainingSet.unlabeled_samples`, -1 for a labelled image.
        num_labeled: number of labelled images.
        num_fed_back: number of fed-back images.
        shares: where the split is one rank's share, how many labelled, fed-back and unlabelled images each rank has;
            () where it is the whole.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    num_labeled: int
    num_fed_back: int
    shares: tuple[tuple[int, int, int], ...] = ()

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many labelled, fed-back and unlabelled images it holds itself."""
        return self.num_labeled, self.num_fed_back, len(self.labels) - self.num_labeled - self.num_fed_back

    @property
    def whole_counts(self) -> tuple[int, int, int]:
        """The same counts for the whole that it is a share of."""
        labeled, fed_back, unlabeled = map(sum, zip(*(self.shares or (self.counts,)), strict=True))
        return labeled, fed_back, unlabeled

    def require_sound(self, num_classes: int) -> None:
        """Refuse what no training step can take; labels on a GPU are not checked, as that would wait for it.

        Raises:
            TypeError: images that are not floating.
            ValueError: labels of labelled or fed-back images that are none of `num_classes` classes.

        Example:
            >>> import torch
            >>> images, unknown = torch.zeros(2, 3, 64, 32), torch.full((2,), -1)
            >>> Split(images, torch.tensor([0, 1]), unknown, num_labeled=2, num_fed_back=0).require_sound(num_classes=2)
        """
        if not self.images.is_floating_point():
            raise TypeError(f"images must be floating, of normalised pixels, got {self.images.dtype}")
        known = self.labels[: self.num_labeled + self.num_fed_back]
        if known.device.type == "cpu" and len(known) > 0:
            lowest, highest = known.numpy().min(), known.numpy().max()
            if lowest < 0 or highest >= num_classes:
                raise ValueError(
                    f"labels of labelled and fed-back images must be from 0 to {num_classes - 1}, the classes of the "
                    f"network, got {lowest if lowest < 0 else highest}"
                )


class MiniBatch(NamedTuple):
    """S in `meta_train`, S~ in `meta_test` (None if not split), and the paths of broken images left out."""

    meta_train: Split
    meta_test: Split | None
    skipped: tuple[str, ...]
