"""Scoring an embedding on a dataset: ranking each of its splits, and the mean of their figures."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dan_fast.core.defaults import default_cpu
from dan_fast.data.samples import ReIDDataset
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.evaluation.dataset_features import DatasetFeatures, extract_dataset
from dan_fast.evaluation.problem import check_metric, check_scoring, check_whole
from dan_fast.evaluation.ranking import AveragePrecision, Metric, NoMatchError, RankingResult, evaluate_ranking
from dan_fast.evaluation.reranking import Reranking, check_reranking, evaluate_reranked
from dan_fast.evaluation.result import Evaluation
from dan_fast.evaluation.scorable import no_match, require_defined, require_scorable
from dan_fast.evaluation.single_shot import evaluate_single_shot


@default_cpu()
def evaluate_features(
    features: DatasetFeatures,
    repeats: int = 10,
    seed: int = 0,
    metric: Metric = "cosine",
    max_rank: int = 50,
    ap: AveragePrecision = "standard",
    reranking: Reranking | None = None,
    process_group: ProcessGroup | None = None,
) -> Evaluation:
    """Score features: once on a fixed query and gallery, on all of a dataset's fixed splits, or on random ones.

    Figures are means over the splits, with their standard deviations; of random splits, drawn by ``seed``, there are
    ``repeats``. Under a single-shot protocol the gallery is drawn by ``seed``, 100 times, and there is no standard
    deviation: see :func:`dan_fast.evaluation.single_shot.evaluate_single_shot`. With ``reranking`` the lists are
    re-ranked first, and the protocol says so. ``process_group`` is the one that the features were extracted with; the
    result is the same on all ranks, and equal to that of one rank to the last bit.

    Raises:
        DanFastError: no identity can be found again in another camera, or a single-shot protocol with ``reranking``
            or an ``ap`` other than the standard one.
        ValueError: features that are not finite, or an argument that is not one of those above.
        TypeError: ``reranking`` is not a :class:`Reranking`.
    """
    _check_scoring(repeats, metric, max_rank, ap, reranking)
    if features.test is None:
        repeats = 1
    elif features.splits is not None:
        repeats = len(features.splits.splits)
    require_defined(features.name, features.single_shot, ap, reranking is not None)
    if features.single_shot:
        evaluate = partial(evaluate_single_shot, seed=seed)
    elif reranking is None:
        evaluate = partial(evaluate_ranking, ap=ap)
    else:
        evaluate = partial(evaluate_reranked, ap=ap, reranking=reranking)
    evaluate = partial(evaluate, metric=metric, max_rank=max_rank, process_group=process_group)
    results: list[RankingResult] = []
    unmatched = 0
    for repeat in range(repeats):
        query, gallery = features.split(seed, repeat, process_group)
        own = gallery.division(process_group).rows
        labels = query.pids, gallery.pids[own], query.camids, gallery.camids[own]
        try:
            if not query.paths:
                raise NoMatchError
            results.append(evaluate(query.features, gallery.features, *labels))
        except NoMatchError as error:
            raise no_match(features.name) from error
        unmatched += len(query.paths) - results[-1].num_valid
    cmc = torch.stack([result.cmc for result in results])
    precision = torch.tensor([result.mAP for result in results], dtype=torch.float64)
    penalty = torch.tensor([result.mINP for result in results], dtype=torch.float64)
    spread = len(results) > 1
    return Evaluation(
        dataset=features.name,
        protocol="; ".join(filter(None, (_describe(features, len(results), seed), str(reranking or "")))),
        cmc=tuple(cmc.mean(0).tolist()),
        mAP=float(precision.mean()),
        mINP=float(penalty.mean()),
        cmc_std=tuple(cmc.std(0).tolist()) if spread else None,
        mAP_std=float(precision.std()) if spread else None,
        mINP_std=float(penalty.std()) if spread else None,
        repeats=len(results),
        num_query=len(query.paths),
        num_gallery=len(gallery.paths),
        num_valid=results[-1].num_valid,
        skipped=features.skipped,
        variant=features.variant,
        splits="" if features.splits is None else features.splits.label,
        metric=metric,
        ap=ap,
        precision=features.precision,
        rounding=features.rounding,
        unmatched=unmatched,
        fingerprint=features.fingerprint,
    )


def evaluate_dataset(
    embed: Callable[[Tensor], Tensor],
    dataset: ReIDDataset,
    image_size: tuple[int, int],
    *,
    repeats: int = 10,
    seed: int = 0,
    metric: Metric = "cosine",
    max_rank: int = 50,
    ap: AveragePrecision = "standard",
    reranking: Reranking | None = None,
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> Evaluation:
    """Embed a dataset and score it: :func:`extract_dataset`, then :func:`evaluate_features`.

    A dataset with query and gallery images is scored once, on them. A dataset with only a test split is scored on all
    of its fixed splits or, if it has none, on ``repeats`` random ones, by :func:`random_split`. Each image is embedded
    once. A network has to be in evaluation mode.

    With ``process_group`` the images are divided over its ranks, as :class:`DatasetFeatures` says.

    Args:
        embed, image_size, process_group, options: as in :func:`dan_fast.evaluation.extract_features`.
        dataset: what to embed and score.
        repeats, seed, metric, max_rank, ap, reranking: as in :func:`evaluate_features`.

    Raises:
        DanFastError, ValueError, TypeError: as the two functions do, before an image is read where they can.
    """
    _check_scoring(repeats, metric, max_rank, ap, reranking)
    require_scorable(dataset, ap, reranking is not None)
    features = extract_dataset(embed, dataset, image_size, process_group=process_group, **options)
    return evaluate_features(features, repeats, seed, metric, max_rank, ap, reranking, process_group)


def _check_scoring(
    repeats: int, metric: Metric, max_rank: int, ap: AveragePrecision, reranking: Reranking | None
) -> None:
    check_whole("repeats", repeats)
    check_metric(metric)
    check_scoring(max_rank, ap)
    if reranking is not None:
        check_reranking(reranking)


def _describe(features: DatasetFeatures, repeats: int, seed: int) -> str:
    if features.single_shot:
        return f"single shot: one gallery image of each person, drawn 100 times, seed {seed}"
    if features.test is None:
        return "fixed query and gallery"
    if features.splits is not None:
        return f"{repeats} fixed splits, {features.splits.label}"
    return f"one query per identity and camera, {repeats} random split{'s' * (repeats > 1)}, seed {seed}"
