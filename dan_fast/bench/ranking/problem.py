"""Features to rank, and a ranking by sorting in NumPy that what counts is compared with."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dan_fast.evaluation import RankingResult
from dan_fast.evaluation.pairs import Labels

TOLERANCE = 1e-12
# Lists that are sorted at a time: NumPy's sort of one is as long as its matrix allows.
_SORTED_ROWS = 64


class RankingSize(NamedTuple):
    """Images of an evaluation, the numbers of a feature, identities and cameras."""

    queries: int
    gallery: int
    width: int
    ids: int
    cams: int


MARKET1501 = RankingSize(3368, 15913, 2048, 751, 6)
MSMT17 = RankingSize(11659, 82161, 64, 3060, 15)


class RankingProblem(NamedTuple):
    """Features of people as an embedding leaves them: no number below 0, half of them 0."""

    query: Tensor
    gallery: Tensor
    labels: Labels


def make_ranking_problem(size: RankingSize, device: torch.device, seed: int = 0) -> RankingProblem:
    """Noisy features of `ids` people, every tenth gallery image a distractor; the same for the same seed."""
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    labels = Labels(
        random.integers(1, size.ids, size.queries),
        np.where(random.random(size.gallery) < 0.1, 0, random.integers(1, size.ids, size.gallery)),
        random.integers(0, size.cams, size.queries),
        random.integers(0, size.cams, size.gallery),
    )
    people = torch.randn(size.ids, size.width, generator=generator)
    query, gallery = (
        torch.randn(len(ids), size.width, generator=generator).mul_(4).add_(people[torch.from_numpy(ids)]).relu_()
        for ids in (labels.query_ids, labels.gallery_ids)
    )
    return RankingProblem(query.to(device), gallery.to(device), labels)


def rank_by_sorting(rows_of: Callable[[slice], np.ndarray], labels: Labels, max_rank: int = 50) -> RankingResult:
    """What each list is, sorted whole, in NumPy; `rows_of` gives the distances of some queries."""
    cmc, precision, penalty, valid = np.zeros(max_rank, dtype=np.int64), 0.0, 0.0, 0
    for first in range(0, len(labels.query_ids), _SORTED_ROWS):
        block = slice(first, min(first + _SORTED_ROWS, len(labels.query_ids)))
        for query, order in enumerate(np.argsort(rows_of(block), axis=1, kind="stable"), start=first):
            same = labels.gallery_ids[order] == labels.query_ids[query]
            kept = ~(same & (labels.gallery_cams[order] == labels.query_cams[query]))
            ranks = 1 + np.flatnonzero(same[kept])
            if len(ranks):
                cmc[ranks[0] - 1 :] += 1
                precision += float(np.mean(np.arange(1, len(ranks) + 1) / ranks))
                penalty += len(ranks) / float(ranks[-1])
                valid += 1
    return RankingResult(torch.from_numpy(cmc / valid), precision / valid, penalty / valid, valid)


def difference(found: RankingResult, expected: RankingResult) -> str | None:
    """What of a result differs: the CMC in any bit, the means by more than TOLERANCE; None if nothing does."""
    parts = []
    if not torch.equal(found.cmc, expected.cmc):
        parts.append(f"CMC by {(found.cmc - expected.cmc).abs().max():.1e}")
    for name in ("mAP", "mINP"):
        off = abs(getattr(found, name) - getattr(expected, name))
        if not off <= TOLERANCE:
            parts.append(f"{name} by {off:.1e}")
    if found.num_valid != expected.num_valid:
        parts.append(f"num_valid {found.num_valid} for {expected.num_valid}")
    return ", ".join(parts) or None
