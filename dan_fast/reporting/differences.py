"""How much one training is above another, over the seeds that both have."""

import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import NamedTuple

# Not from scipy.stats, whose import takes longer than everything that is done here.
from scipy.special import stdtrit

CONFIDENCE = 0.95


class PairedDifference(NamedTuple):
    """How much an arm is above the baseline, on average over the seeds that both have.

    Attributes:
        mean: of the differences.
        low, high: the ends of its 95 % interval; None for one seed, from which no spread can be estimated.
        seeds: that both have, in order.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[int, ...]


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> PairedDifference | None:
    """The mean of the differences seed by seed, with Student's interval; None where no seed is in both.

    Runs of one seed share their batches and, for equal networks, their first weights: an effect of the seed on both is
    not part of the difference, so the interval is narrower than one from the two spreads.

    Args:
        values, baseline: figures by seed.

    Example:
        >>> found = paired_difference({0: 42.0, 1: 51.0, 2: 45.0, 7: 99.0}, {0: 40.0, 1: 48.0, 2: 44.0})
        >>> found.mean, found.seeds, f"{found.low:.2f} to {found.high:.2f}"
        (2.0, (0, 1, 2), '-0.48 to 4.48')
    """
    seeds = tuple(sorted(values.keys() & baseline.keys()))
    if not seeds:
        return None
    differences = [values[seed] - baseline[seed] for seed in seeds]
    mean, count = fmean(differences), len(seeds)
    if count == 1:
        return PairedDifference(mean, None, None, seeds)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * stdev(differences) / math.sqrt(count)
    return PairedDifference(mean, mean - half, mean + half, seeds)
