"""Features of images, rankings and the figures of a whole dataset."""

from dan_fast.evaluation.dataset_features import DatasetFeatures, extract_dataset, random_split
from dan_fast.evaluation.features import Features, extract_features
from dan_fast.evaluation.ranking import (
    NoMatchError,
    RankingResult,
    evaluate_ranking,
    pairwise_distances,
    rank_distances,
)
from dan_fast.evaluation.reranking import Reranking, evaluate_reranked
from dan_fast.evaluation.result import COLUMNS, Evaluation
from dan_fast.evaluation.scorable import require_scorable
from dan_fast.evaluation.scoring import evaluate_dataset, evaluate_features
from dan_fast.evaluation.single_shot import evaluate_single_shot

__all__ = [
    "COLUMNS",
    "DatasetFeatures",
    "Evaluation",
    "Features",
    "NoMatchError",
    "RankingResult",
    "Reranking",
    "evaluate_dataset",
    "evaluate_features",
    "evaluate_ranking",
    "evaluate_reranked",
    "evaluate_single_shot",
    "extract_dataset",
    "extract_features",
    "pairwise_distances",
    "random_split",
    "rank_distances",
    "require_scorable",
]
