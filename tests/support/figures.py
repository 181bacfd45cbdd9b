"""Figures on a target as results.json has them, and that they are means over splits."""

from collections.abc import Sequence

import numpy as np
import pytest

from dan_fast.evaluation import Evaluation
from dan_fast.evaluation.ranking import RankingResult


def evaluation(dataset: str, rank1: float, mean_precision: float, repeats: int = 1) -> dict:
    """Of `Evaluation`; fractions, with a spread where there are several `repeats`."""
    spread = 0.01 if repeats > 1 else None
    cmc = [rank1, *[rank1 + 0.05] * 9]
    return {
        "dataset": dataset,
        "protocol": "fixed query and gallery" if repeats == 1 else f"{repeats} random splits",
        "cmc": cmc,
        "mAP": mean_precision,
        "mINP": 0.05,
        "cmc_std": None if spread is None else [spread] * 10,
        "mAP_std": spread,
        "mINP_std": spread,
        "repeats": repeats,
        "num_query": 30,
        "num_gallery": 40,
        "num_valid": 30,
        "skipped": [],
    }


def assert_means(result: Evaluation, each: Sequence[RankingResult]) -> None:
    """Means and sample deviations over what the splits gave, which is not all the same."""
    assert len({one.mAP for one in each}) > 1
    for figure in ("mAP", "mINP"):
        values = [getattr(one, figure) for one in each]
        assert getattr(result, figure) == pytest.approx(np.mean(values))
        assert getattr(result, f"{figure}_std") == pytest.approx(np.std(values, ddof=1))
    np.testing.assert_allclose(result.cmc, np.mean([one.cmc.numpy() for one in each], axis=0))
    np.testing.assert_allclose(result.cmc_std, np.std([one.cmc.numpy() for one in each], axis=0, ddof=1))
