"""k-reciprocal re-ranking against the dense form of its paper, image by image."""

import numpy as np
import pytest
import torch

from dan_fast import _extension
from dan_fast.bench.machine import peak_above
from dan_fast.evaluation import (
    Reranking,
    evaluate_ranking,
    evaluate_reranked,
    evaluate_single_shot,
    rank_distances,
    reciprocal,
)
from dan_fast.evaluation.distances import PartDistances, square_norms
from dan_fast.evaluation.divided import Division
from dan_fast.evaluation.pairs import Labels
from dan_fast.evaluation.problem import BLOCK_BYTES, RankingProblem, check_shapes
from dan_fast.evaluation.reciprocal import Images, encodings, nearest
from dan_fast.evaluation.reranking import PAPER, _reranked
from tests.support.ranks import forking_context


def dense(query, gallery, metric, k1, k2, weight):
    """With all matrices of all images by all images; equal distances by place."""
    images = np.concatenate([query, gallery]).astype(np.float64)
    if metric == "cosine":
        images = images / np.linalg.norm(images, axis=1, keepdims=True)
    original = ((images[:, None] - images[None]) ** 2).sum(2)
    original = original / original.max(axis=1, keepdims=True)
    ranking = np.argsort(original.round(12), axis=1, kind="stable")

    def reciprocal(image, count):
        forward = ranking[image, : count + 1]
        return [other for other in forward if image in ranking[other, : count + 1]]

    encodings = np.zeros_like(original)
    for image in range(len(images)):
        own = reciprocal(image, k1)
        expanded = set(own)
        for candidate in own:
            theirs = reciprocal(candidate, int(np.around(k1 / 2)))
            if len(set(theirs) & set(own)) > 2 / 3 * len(theirs):
                expanded |= set(theirs)
        expanded = sorted(expanded)
        weights = np.exp(-original[image, expanded])
        encodings[image, expanded] = weights / weights.sum()
    encodings = np.stack([encodings[ranking[image, :k2]].mean(0) for image in range(len(images))])
    common = np.minimum(encodings[: len(query), None], encodings[None, len(query) :]).sum(2)
    jaccard = 1 - common / (2 - common)
    return (1 - weight) * jaccard + weight * original[: len(query), len(query) :]


def problem(queries=31, gallery=122, ids=14, width=9, seed=0):
    rng = np.random.default_rng(seed)
    query_ids, gallery_ids = rng.integers(0, ids, queries), rng.integers(0, ids, gallery)
    centres = rng.normal(size=(ids, width))
    features = [centres[x] + 0.7 * rng.normal(size=(len(x), width)) for x in (query_ids, gallery_ids)]
    return features, (query_ids, gallery_ids, np.zeros(queries, dtype=int), np.ones(gallery, dtype=int))


def joined(query, gallery, metric="cosine", settings=PAPER, block_bytes=BLOCK_BYTES):
    """The distances by which `evaluate_reranked` ranks, of a third of the queries at a time."""
    query, gallery = check_shapes(query, gallery)
    labels = Labels(*(np.zeros(len(x), dtype=np.int64) for x in (query, gallery) * 2))
    distances, _, _ = _reranked(RankingProblem(query, gallery, labels, metric, block_bytes), settings)
    each = -(-len(query) // 3)
    blocks = [distances.of_rows(slice(at, min(at + each, len(query)))) for at in range(0, len(query), each)]
    return np.concatenate([block.near(slice(None)).cpu().numpy() for block in blocks])


SETTINGS = [
    Reranking(),
    Reranking(7, 3, 0.1),
    Reranking(5, 1, 0.0),
    Reranking(2, 5, 0.8),
    Reranking(9, 2, 1.0),
    Reranking(9, 2, 0.1),
]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_agrees_with_the_dense_form(metric, settings, monkeypatch):
    (query, gallery), labels = problem()
    gallery[5:9] = gallery[3]
    expected = dense(query, gallery, metric, *settings)
    found = joined(query, gallery, metric, settings)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(joined(query, gallery, metric, settings, 50_000), found, rtol=0, atol=1e-9)
    result = evaluate_reranked(query, gallery, *labels, metric=metric, reranking=settings)
    assert str(result) == str(rank_distances(found, *labels))
    monkeypatch.setattr(reciprocal, "_SPARSE_ROWS", 40)
    assert np.array_equal(joined(query, gallery, metric, settings), found)
    half = torch.from_numpy(query).bfloat16(), torch.from_numpy(gallery).bfloat16()
    expected = dense(*(x.double().numpy() for x in half), metric, *settings)
    np.testing.assert_allclose(joined(*half, metric, settings), expected, rtol=0, atol=1e-6)


def test_it_is_of_use():
    (query, gallery), labels = problem(ids=8, width=4)
    assert evaluate_reranked(query, gallery, *labels).mAP > 0.02 + evaluate_ranking(query, gallery, *labels).mAP


def test_fewer_images_than_neighbours():
    (query, gallery), _ = problem(2, 5, 2)
    expected = dense(query, gallery, "cosine", *Reranking())
    np.testing.assert_allclose(joined(query, gallery), expected, rtol=0, atol=1e-6)


def test_all_images_equal():
    assert np.isfinite(joined(np.ones((3, 2)), np.ones((40, 2)))).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_what_products_of_matrices_round_decides_nothing(metric, monkeypatch):
    """Their last bits depend on shapes and threads, hence on how images are divided over ranks."""
    rng = np.random.default_rng(2)
    few = rng.normal(size=(25, 1024))  # so that many distances are ties, of neighbours too
    query, gallery = (torch.from_numpy(few[rng.integers(0, 25, n)]) for n in (20, 80))
    labels = [rng.integers(0, of, n) for of in (5, 3) for n in (20, 80)]

    def found(budget=1 << 20):
        squares = square_norms(query, 1 << 20), square_norms(gallery, 1 << 20)
        images = Images(query, gallery, squares, metric, budget, Division(None, [80]))
        lists = nearest(images, 8)
        neighbours, largest = (np.concatenate([part[at] for part in lists]) for at in (1, 2))
        with _extension.disabled():
            ranked = [
                str(evaluate(query, gallery, *labels, metric=metric))
                for evaluate in (evaluate_ranking, evaluate_single_shot, evaluate_reranked)
            ]
        return neighbours.tolist(), largest.tolist(), encodings(images, neighbours, largest, 7).data.tolist(), ranked

    expected, near = found(), PartDistances.near
    assert found(1 << 17) == expected, "16 images at a time"

    def rounded_otherwise(self, columns):
        distances = near(self, columns)
        return distances + (1.8 * torch.rand(distances.shape, dtype=torch.float64) - 0.9) * self.error

    monkeypatch.setattr(PartDistances, "near", rounded_otherwise)
    assert found() == expected


@pytest.mark.slow
def test_memory_is_bounded():
    """Of 8000 images a matrix in float64 would take 512 MB."""
    # In a process of its own: how high memory rises depends on what a process has left of its heap.
    with forking_context().Pool(1) as pool:
        extra = pool.apply(extra_memory)
    assert extra is None or extra < 256e6


def extra_memory() -> int | None:
    (query, gallery), labels = problem(500, 7500, 400, 16)
    evaluate_reranked(query[:50], gallery[:500], labels[0][:50], labels[1][:500], labels[2][:50], labels[3][:500])
    return peak_above(torch.device("cpu"), lambda: evaluate_reranked(query, gallery, *labels))[1]
