"""Features of a target set, their ranking and the protocols around it."""

from dan_fast.evaluation.features import Features, extract_features
from dan_fast.evaluation.protocol import (
    DatasetFeatures,
    Evaluation,
    evaluate_dataset,
    evaluate_features,
    extract_dataset,
)
from dan_fast.evaluation.ranking import RankingResult, evaluate_ranking, rank_distances

__all__ = [
    "DatasetFeatures",
    "Evaluation",
    "Features",
    "RankingResult",
    "evaluate_dataset",
    "evaluate_features",
    "evaluate_ranking",
    "extract_dataset",
    "extract_features",
    "rank_distances",
]
