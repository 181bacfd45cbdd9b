"""CUHK03's classic protocol against a loop over repeats and queries, and against what can be said beforehand."""

import numpy as np
import pytest

from dan_fast.evaluation import evaluate_ranking, evaluate_single_shot
from dan_fast.evaluation.pairs import Labels
from dan_fast.evaluation.single_shot import _draw


def problem(seed=0, queries=40, gallery=90, ids=12, cams=3):
    rng = np.random.default_rng(seed)
    labels = Labels(
        rng.integers(0, ids + 2, queries),
        rng.integers(0, ids, gallery),
        rng.integers(0, cams, queries),
        rng.integers(0, cams, gallery),
    )
    features = rng.integers(-2, 3, (queries, 3)), rng.integers(-2, 3, (gallery, 3))  # many ties
    return [x.astype(np.float32) for x in features], labels


def by_loop(features, labels, draws, max_rank):
    """`draws[cam]` are the places drawn for the queries of that camera."""
    cmc, inverse = np.zeros(max_rank), []
    for q, (person, cam) in enumerate(zip(labels.query_ids, labels.query_cams, strict=True)):
        distance = {g: float(((features[0][q] - features[1][g]) ** 2).sum()) for g in draws[cam]}
        ordered = [labels.gallery_ids[g] for g in sorted(distance, key=lambda g: (distance[g], g))]
        if person in ordered:
            rank = 1 + ordered.index(person)
            cmc[rank - 1 :] += 1
            inverse.append(1 / rank)
    return cmc / len(inverse), np.array(inverse)


def test_agrees_with_the_loop():
    for seed in range(5):
        features, labels = problem(seed)
        draws = [[_draw(labels, cam, seed, repeat) for cam in range(3)] for repeat in range(7)]
        single = [by_loop(features, labels, drawn, 20) for drawn in draws]
        for block_bytes in (1, 10**6):
            result = evaluate_single_shot(*features, *labels, "euclidean", 20, 7, seed, block_bytes)
            np.testing.assert_allclose(result.cmc, np.mean([cmc for cmc, _ in single], axis=0), rtol=0, atol=1e-14)
            assert result.mAP == result.mINP == pytest.approx(np.mean([x for _, x in single]), abs=1e-12)
            assert result.num_valid == len(single[0][1]) < 40


def test_a_draw_takes_one_image_of_each_identity_of_another_camera():
    _, labels = problem()
    for cam in range(3):
        seen = set()
        possible = np.flatnonzero(labels.gallery_cams != cam)
        for repeat in range(300):
            drawn = _draw(labels, cam, 0, repeat)
            assert labels.gallery_ids[drawn].tolist() == sorted(set(labels.gallery_ids[possible]))
            seen |= set(drawn.tolist())
        assert seen == set(possible.tolist()), "every image that may be drawn is drawn at times"
        others = [_draw(labels, cam, *each).tolist() for each in ((0, 0), (1, 0), (0, 1))]
        assert len(set(map(tuple, others))) == 3, "the seed decides, and no repeat is one of another seed"


def test_one_image_an_identity_is_the_usual_ranking():
    (query, gallery), _ = problem(queries=30, gallery=30)
    labels = np.arange(30), np.arange(30), np.zeros(30, dtype=int), np.ones(30, dtype=int)
    usual = evaluate_ranking(query, gallery, *labels)
    for repeats in (1, 3):
        result = evaluate_single_shot(query, gallery, *labels, repeats=repeats)
        assert result.cmc.tolist() == usual.cmc.tolist()
        assert result.mAP == pytest.approx(usual.mAP, abs=1e-12)
