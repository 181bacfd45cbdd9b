"""The feature that is tested, whitened by how the keys of one person in the memory differ."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.functional.products import product

# Slots whose keys are copied at a time: a memory may take most of a machine.
_ROWS = 4096
# Of roots of length 1; below it they differ by rounding.
_LEAST_VARIANCE = 1e-9
# The weight of the prior, in samples for each number of a feature.
_PRIOR = 8


class WithinPersonWhitening(nn.Module):
    """The signed square roots of features, times W: directions in which images of one person differ count less.

    W W^T is the inverse of A = (n S / s + 8 C I) / (n + 8 C), where S is the covariance of the roots of keys, of length
    1, about the mean of each person, taken from n keys beyond the first of each person; C is the length of a key and s
    the mean eigenvalue of S. Cosines of whitened features are cosines in the metric A^-1, as in a linear discriminant
    analysis. A has the mean eigenvalue 1 and is near I where there are few keys; Ledoit and Wolf, "A well-conditioned
    estimator for large-dimensional covariance matrices", Journal of Multivariate Analysis 88, 2004, shrink in the same
    way.

    W is the buffer `matrix`. It is I until `fit`, and stays I for the numbers of a feature beyond those of a key.

    Args:
        size: of a feature.

    Example:
        >>> whitening = WithinPersonWhitening(4)
        >>> whitening(torch.tensor([[4.0, -9.0, 0.0, 1.0]]))
        tensor([[ 2., -3.,  0.,  1.]])
    """

    matrix: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(size))

    def forward(self, features: Tensor) -> Tensor:
        """(B, size) features to (B, size)."""
        return signed_root(features) @ self.matrix.to(features.dtype)

    @torch.no_grad()
    def fit(
        self, keys: Tensor, labels: Tensor, rows: slice = slice(None), process_group: ProcessGroup | None = None
    ) -> None:
        """Make W from the keys of a memory; it stays as it is if no person has two keys that differ.

        Args:
            keys: (k, C) floating, features or their first numbers, of the slots in `rows`.
            labels: (s,) int64, the person in each slot, -1 for none.
            rows: the slots that `keys` come from.
            process_group: ranks that each have the keys of some rows, and all of them the same labels; the call is then
                collective.

        Raises:
            TypeError: keys are not floating, or labels not int64.
            ValueError: shapes do not fit, or keys of a person are not finite; the latter on all ranks.
        """
        _check(keys, labels, rows, self.matrix.shape[0])
        occupied, size = labels >= 0, keys.shape[1]
        persons = torch.full_like(labels, -1)
        _, persons[occupied], counts = labels[occupied].unique(return_inverse=True, return_counts=True)
        samples = int(occupied.sum()) - len(counts)
        if samples == 0:
            return
        persons = persons[rows]
        sums = keys.new_zeros(len(counts), size, dtype=torch.float32)
        for roots, own in _roots(keys, persons):
            sums.index_add_(0, own, roots)
        _add_up(sums, process_group)
        # By their sums: a look at the keys would copy them, and a rank that raises alone leaves the others waiting.
        if not sums.isfinite().all():
            raise ValueError("keys must be finite: a memory holds no others")
        means, scatter = sums.div_(counts[:, None]), keys.new_zeros(size, size, dtype=torch.float32)
        for roots, own in _roots(keys, persons):
            residuals = roots - means[own]
            scatter = product(residuals.T, residuals, scatter)
        _add_up(scatter, process_group)
        scatter, identity, prior = scatter.double(), torch.eye(size).to(scatter.device, torch.double), _PRIOR * size
        variance = scatter.trace() / samples
        if not variance > _LEAST_VARIANCE:
            return
        covariance = (scatter * (size / variance) + prior * identity) / (samples + prior)
        root = torch.linalg.cholesky(covariance)
        self.matrix[:size, :size] = torch.linalg.solve_triangular(root, identity, upper=False).T


def _check(keys: Tensor, labels: Tensor, rows: slice, size: int) -> None:
    if not keys.is_floating_point() or labels.dtype != torch.int64:
        raise TypeError(f"keys must be floating and labels int64, got {keys.dtype} and {labels.dtype}")
    if keys.ndim != 2 or labels.ndim != 1 or keys.shape[1] > size or len(keys) != len(labels[rows]):
        raise ValueError(
            f"keys must be (k, C) with C at most {size} and labels (s,), k of them in rows, "
            f"got {tuple(keys.shape)} and {tuple(labels.shape)}"
        )


def signed_root(x: Tensor) -> Tensor:
    """sign(x) |x|^(1/2), whose derivative at 0 is not finite."""
    return x.sign() * x.abs().sqrt()


def _roots(keys: Tensor, persons: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Roots of length 1 of keys that are some person's, and these persons, some thousand at a time."""
    for some, of in zip(keys.split(_ROWS), persons.split(_ROWS), strict=True):
        held = of >= 0
        yield F.normalize(signed_root(some[held].float()), dim=1), of[held]


def _add_up(own: Tensor, process_group: ProcessGroup | None) -> None:
    if process_group is not None:
        distributed.all_reduce(own, group=process_group)
