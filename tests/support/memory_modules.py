"""A small memory module and batches for it."""

import torch

from dan_fast.core.types import MemoryBatch
from dan_fast.nn import ProgressiveAugmentedMemory

SLOTS, PSEUDO_SLOTS, DIM = 12, 9, 5


def make(**settings):
    settings = {"dtype": torch.float64} | settings
    return ProgressiveAugmentedMemory(SLOTS, PSEUDO_SLOTS, DIM, decay=0.9, decay_unlabeled=0.8, **settings)


def batches(count, size=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    for at in range(count):
        keys, unlabeled_keys = (torch.randn(size, DIM, generator=generator, dtype=dtype) for _ in range(2))
        labels = torch.randint(0, 3, (size,), generator=generator)
        yield MemoryBatch(keys, labels, unlabeled_keys, torch.arange(size * at, size * at + size))


def assert_states_close(actual, expected, **tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def assert_both_close(actual, expected, tolerance=0.0):
    """Both states of modules or of steps; without a tolerance bit for bit."""
    for name in ("labeled", "unlabeled"):
        assert_states_close(getattr(actual, name), getattr(expected, name), rtol=tolerance, atol=tolerance)
