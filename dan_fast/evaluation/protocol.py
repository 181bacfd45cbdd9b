"""Scoring an embedding on a whole dataset: which images are queries, how often, and what is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.core.float32 import float32_rounding
from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.data.images.cache import ImageCache
from dan_fast.data.samples import FixedSplits, ReIDDataset, Sample
from dan_fast.evaluation.features import Features, extract_features
from dan_fast.evaluation.ranking import (
    AveragePrecision,
    Metric,
    NoMatchError,
    RankingResult,
    evaluate_ranking,
)
from dan_fast.evaluation.reranking import Reranking, evaluate_reranked
from dan_fast.evaluation.single_shot import evaluate_single_shot

COLUMNS = ("R1", "R5", "R10", "mAP", "mINP")


@dataclass(frozen=True)
class Evaluation:
    """Figures of one embedding on one dataset; all of them fractions.

    Attributes:
        dataset: its name.
        protocol: which images were queries and how often, in words.
        cmc, mAP, mINP: means over the repeats; ``cmc[k - 1]`` is rank-k accuracy.
        cmc_std, mAP_std, mINP_std: sample standard deviations over the repeats, None where there was one.
        repeats: number of splits scored.
        num_query, num_gallery, num_valid: images searched for, searched in, and queries that have a match.
        skipped: files that could not be decoded and were left out.
        variant: of the dataset, in words, "" where it has only one.
        splits: name and hash of the fixed splits that were scored, "" for any others.
        named_protocol: name of the protocol of the literature that was trained and tested by, "" for none.
        epoch: of the weights, and whether it was chosen on the target, in words; "" where that is not known.
        recipe: of the training, and what was changed on top of it, in words; "" for none.
        metric: by which features were compared; "" where that was not recorded.
        ap: which average precision was taken; "" where that was not recorded.
        precision: in which the network ran, "float32" or "bfloat16"; "" where that is not known.
        rounding: of float32 numbers by the device all the same, in words ("TF32 in convolutions"); "" for none.
        seen: how many of the persons tested on the network was trained on, in words; "" for none, as far as known.
    """

    dataset: str
    protocol: str
    cmc: tuple[float, ...]
    mAP: float
    mINP: float
    cmc_std: tuple[float, ...] | None
    mAP_std: float | None
    mINP_std: float | None
    repeats: int
    num_query: int
    num_gallery: int
    num_valid: int
    skipped: tuple[str, ...] = ()
    variant: str = ""
    splits: str = ""
    named_protocol: str = ""
    epoch: str = ""
    recipe: str = ""
    metric: str = ""
    ap: str = ""
    precision: str = ""
    rounding: str = ""
    seen: str = ""

    @property
    def scoring(self) -> str:
        """What of metric, AP and precision is not the default, in words; "" where all is."""
        parts = (
            f"{self.metric} distance" if self.metric not in ("", "cosine") else "",
            f"{self.ap} AP" if self.ap not in ("", "standard") else "",
            self.precision if self.precision != "float32" else "",
        )
        return "; ".join(filter(None, parts))

    @property
    def conditions(self) -> str:
        """What has to be the same in figures that are compared: protocol, splits, scoring and epoch.

        Of metric, AP and precision it names those that are not the default.
        """
        parts = (self.named_protocol, self.protocol, self.scoring, self.rounding, self.epoch, self.seen)
        return "; ".join(filter(None, parts))

    @property
    def conditions_and_recipe(self) -> str:
        """The conditions and, where the training had one, the recipe that is compared under them."""
        return "; ".join(filter(None, (self.conditions, self.recipe)))

    @property
    def title(self) -> str:
        """The dataset and its variant, as they stand beside every figure."""
        return f"{self.dataset} ({self.variant})" if self.variant else self.dataset

    def percentages(self) -> dict[str, float]:
        """R1, R5, R10, mAP and mINP in percent."""
        return self._columns(self.cmc, self.mAP, self.mINP)

    def row(self) -> tuple[str, ...]:
        """The values of :data:`COLUMNS` as text in percent, ``63.2`` or ``63.2 ± 1.1``."""
        means = self.percentages()
        if self.cmc_std is None:
            return tuple(f"{means[column]:.1f}" for column in COLUMNS)
        stds = self._columns(self.cmc_std, self.mAP_std, self.mINP_std)
        return tuple(f"{means[column]:.1f} ± {stds[column]:.1f}" for column in COLUMNS)

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain numbers, strings and lists, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `to_dict` gave; what is no attribute is left out.

        Raises:
            TypeError: an attribute is missing.
        """
        known = {each.name for each in fields(cls)} & values.keys()
        return cls(**{key: tuple(values[key]) if isinstance(values[key], list) else values[key] for key in known})

    @staticmethod
    def _columns(cmc: tuple[float, ...], m_ap: float, m_inp: float) -> dict[str, float]:
        # A curve cut short of rank 5 or 10 has nothing to say about it.
        ranks = {f"R{rank}": cmc[rank - 1] if rank <= len(cmc) else float("nan") for rank in (1, 5, 10)}
        return {name: 100 * value for name, value in {**ranks, "mAP": m_ap, "mINP": m_inp}.items()}


class DatasetFeatures(NamedTuple):
    """Features of a dataset's evaluation images: a fixed query and gallery, or images yet to be split.

    Attributes:
        name: the dataset's name.
        query, gallery: of the fixed split, None where there is none.
        test: of the images to be split, each embedded once for all splits; None where there are none.
        variant: of the dataset, in words.
        splits: how `test` is split; None for random splits.
        single_shot: whether one image of each person is drawn from the gallery, many times.
        precision, rounding: in which the features were made, as `Evaluation` has them; "" where that is not known.
    """

    name: str
    query: Features | None
    gallery: Features | None
    test: Features | None
    variant: str = ""
    splits: FixedSplits | None = None
    single_shot: bool = False
    precision: str = ""
    rounding: str = ""

    @property
    def skipped(self) -> tuple[str, ...]:
        """The files that could not be decoded."""
        parts = (part for part in (self.query, self.gallery, self.test) if part is not None)
        return tuple(str(path) for part in parts for path in part.skipped)

    def split(self, seed: int = 0, repeat: int = 0) -> tuple[Features, Features]:
        """Query and gallery: the fixed ones, or those of the given repeat of the fixed or random splits.

        Images that could not be decoded are in neither; random splits alone depend on `seed`.
        """
        if self.test is None:
            return self.query, self.gallery
        if self.splits is not None:
            chosen = self.splits.splits[repeat]
            query, gallery = self._places(chosen.query), self._places(chosen.gallery)
        else:
            query, gallery = random_split(self.test.pids, self.test.camids, seed, repeat)
        return self.test.select(query), self.test.select(gallery)

    def _places(self, samples: tuple[Sample, ...]) -> Tensor:
        place = {path: index for index, path in enumerate(self.test.paths)}
        return torch.tensor([place[each.path] for each in samples if each.path in place], dtype=torch.int64)


def random_split(pids: Tensor, camids: Tensor, seed: int = 0, repeat: int = 0) -> tuple[Tensor, Tensor]:
    """Draw one image of each identity in each camera as a query; the rest is the gallery.

    An identity that would have all of its images drawn keeps one of them, drawn at random, in the gallery.
    With one image in each of two cameras, as in VIPeR, one is thus searched for and the other is to be found.

    Args:
        pids: (n,) int64 identities.
        camids: (n,) int64 cameras.
        seed: seed of the whole series of splits.
        repeat: which split of the series.

    Returns:
        (query, gallery): ascending int64 indices, disjoint, together all of ``range(n)``.

    Example:
        >>> import torch
        >>> query, gallery = random_split(torch.tensor([1, 1, 1, 2]), torch.tensor([1, 1, 2, 1]))
        >>> len(query), len(gallery)
        (2, 2)
    """
    order = np.random.default_rng([seed, repeat]).permutation(len(pids))
    people, cameras = pids.numpy()[order], camids.numpy()[order]
    # `unique` gives the first place of each pair, and the places are in random order.
    _, drawn = np.unique(np.stack([people, cameras], axis=1), axis=0, return_index=True)
    _, first, group, images = np.unique(people, return_index=True, return_inverse=True, return_counts=True)
    queries = np.bincount(group[drawn], minlength=len(images))
    drawn = np.setdiff1d(drawn, first[queries == images])
    is_query = np.zeros(len(pids), dtype=bool)
    is_query[order[drawn]] = True
    return torch.from_numpy(np.flatnonzero(is_query)), torch.from_numpy(np.flatnonzero(~is_query))


def require_whole_splits(dataset: ReIDDataset) -> None:
    """Refuse a dataset that lacks images that its fixed splits name; one without fixed splits is never refused.

    Raises:
        DanFastError: says what is missing.
    """
    if dataset.splits is not None and dataset.splits.missing:
        raise DanFastError(
            f"{dataset.name} ({dataset.root}) cannot be scored on its fixed splits ({dataset.splits.label}): "
            f"{dataset.splits.missing}; complete the folder, results on other splits would compare with nobody's."
        )


def extract_dataset(
    embed: Callable[[Tensor], Tensor],
    dataset: ReIDDataset,
    image_size: tuple[int, int],
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    broken_images: Literal["error", "skip"] = "error",
    progress: Callable[[int, int], None] | None = None,
    cache: ImageCache | None = None,
    preprocessing: Preprocessing = IMAGENET,
) -> DatasetFeatures:
    """Embed every evaluation image of a dataset once; arguments as in :func:`extract_features`.

    Raises:
        DanFastError: the dataset has neither a query and a gallery nor a test split, or not all the images that its
            fixed splits name.
    """

    def extract(samples: tuple) -> Features:
        return extract_features(
            embed,
            samples,
            image_size,
            batch_size,
            workers,
            device,
            precision,
            broken_images,
            progress,
            cache,
            preprocessing,
        )

    rounding = float32_rounding(torch.device(device)) if precision == "float32" else ""
    made = {"precision": precision, "rounding": rounding}
    if dataset.query and dataset.gallery:
        query = extract(dataset.query)
        gallery = query if dataset.gallery == dataset.query else extract(dataset.gallery)
        return DatasetFeatures(
            dataset.name, query, gallery, None, variant=dataset.variant, single_shot=dataset.single_shot, **made
        )
    if dataset.query or dataset.gallery:
        missing = "gallery" if dataset.query else "query"
        raise DanFastError(f"{dataset.name} has no {missing} images; add them or evaluate on another dataset.")
    if not dataset.test:
        raise DanFastError(
            f"{dataset.name} has nothing to evaluate on; give it query and gallery images, or a test split."
        )
    require_whole_splits(dataset)
    return DatasetFeatures(dataset.name, None, None, extract(dataset.test), dataset.variant, dataset.splits, **made)


def evaluate_features(
    features: DatasetFeatures,
    repeats: int = 10,
    seed: int = 0,
    metric: Metric = "cosine",
    max_rank: int = 50,
    ap: AveragePrecision = "standard",
    reranking: Reranking | None = None,
) -> Evaluation:
    """Score features: once on a fixed query and gallery, on all of a dataset's fixed splits, or on random ones.

    Figures are means over the splits, with their standard deviations; of random splits, drawn by ``seed``, there are
    ``repeats``. Under a single-shot protocol the gallery is drawn by ``seed``, 100 times: see
    :func:`dan_fast.evaluation.single_shot.evaluate_single_shot`, over which there is no standard deviation.
    With ``reranking`` the lists are re-ranked first, and the protocol says so.

    Raises:
        DanFastError: no identity can be found again in another camera, or a single-shot protocol with ``reranking``
            or an ``ap`` other than the standard one.
        ValueError: features that are not finite, or ``repeats`` below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1.")
    if features.test is None:
        repeats = 1
    elif features.splits is not None:
        repeats = len(features.splits.splits)
    options = {"metric": metric, "max_rank": max_rank, "ap": ap}
    if features.single_shot and reranking is not None:
        raise DanFastError(
            f"{features.name} is scored single-shot, with a gallery drawn anew many times, which is not re-ranked; "
            "leave out rerank."
        )
    if features.single_shot and ap != "standard":
        raise DanFastError(f"{features.name} is scored single-shot, for which ap {ap} is not defined; leave it out.")
    rank = evaluate_ranking if reranking is None else partial(evaluate_reranked, reranking=reranking)
    results: list[RankingResult] = []
    for repeat in range(repeats):
        query, gallery = features.split(seed, repeat)
        if features.single_shot:
            results.append(
                _rank(evaluate_single_shot, features.name, query, gallery, seed=seed, metric=metric, max_rank=max_rank)
            )
        else:
            results.append(_rank(rank, features.name, query, gallery, **options))
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
    )


def evaluate_dataset(
    embed: Callable[[Tensor], Tensor],
    dataset: ReIDDataset,
    image_size: tuple[int, int],
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    broken_images: Literal["error", "skip"] = "error",
    progress: Callable[[int, int], None] | None = None,
    repeats: int = 10,
    seed: int = 0,
    metric: Metric = "cosine",
    max_rank: int = 50,
    ap: AveragePrecision = "standard",
    cache: ImageCache | None = None,
    reranking: Reranking | None = None,
    preprocessing: Preprocessing = IMAGENET,
) -> Evaluation:
    """Embed a dataset and score it: :func:`extract_dataset`, then :func:`evaluate_features`.

    A dataset with query and gallery images is scored once, on them. One with a test split only is split as its fixed
    splits say, all of them, and where it has none at random, ``repeats`` times, by :func:`random_split`. Each image is
    embedded once. The caller puts the model into evaluation mode.

    Raises:
        DanFastError, ValueError: as the two functions do.
    """
    features = extract_dataset(
        embed,
        dataset,
        image_size,
        batch_size,
        workers,
        device,
        precision,
        broken_images,
        progress,
        cache,
        preprocessing,
    )
    return evaluate_features(features, repeats, seed, metric, max_rank, ap, reranking)


def _rank(
    evaluate: Callable[..., RankingResult], name: str, query: Features, gallery: Features, **options: Any
) -> RankingResult:
    try:
        if not query.paths:
            raise NoMatchError
        return evaluate(
            query.features,
            gallery.features,
            query.pids,
            gallery.pids,
            query.camids,
            gallery.camids,
            **options,
        )
    except NoMatchError as error:
        raise DanFastError(
            f"{name} has no person seen by two cameras in its evaluation images, so none can be found again; "
            "check the identities and cameras."
        ) from error


def _describe(features: DatasetFeatures, repeats: int, seed: int) -> str:
    if features.single_shot:
        return f"single shot: one gallery image of each person, drawn 100 times, seed {seed}"
    if features.test is None:
        return "fixed query and gallery"
    if features.splits is not None:
        return f"{repeats} fixed splits, {features.splits.label}"
    return f"one query per identity and camera, {repeats} random split{'s' * (repeats > 1)}, seed {seed}"
