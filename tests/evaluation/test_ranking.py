"""Ranking against a plain loop that takes one query at a time, by the compiled module and in PyTorch operations."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dan_fast import _extension
from dan_fast.evaluation.ranking import evaluate_ranking, pairwise_distances, rank_distances


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def path(request):
    with _extension.disabled() if request.param == "torch" else contextlib.nullcontext():
        yield request.param


def oracle(distances, query_ids, gallery_ids, query_cams, gallery_cams, max_rank=50, ap="standard"):
    cmc, precisions, penalties = np.zeros(max_rank), [], []
    for q, row in enumerate(np.asarray(distances, dtype=np.float64)):
        kept = [
            g
            for g in sorted(range(len(row)), key=lambda g: (row[g], g))
            if not (gallery_ids[g] == query_ids[q] and gallery_cams[g] == query_cams[q])
        ]
        good = [gallery_ids[g] == query_ids[q] for g in kept]
        if not any(good):
            continue
        ranks = [place + 1 for place, is_good in enumerate(good) if is_good]
        cmc[ranks[0] - 1 :] += 1
        if ap == "standard":
            precisions.append(np.mean([(k + 1) / r for k, r in enumerate(ranks)]))
        else:  # the loop of the MATLAB code, place by place
            area, hits, old_recall, old_precision = 0.0, 0, 0.0, 1.0
            for place, is_good in enumerate(good):
                hits += is_good
                recall, precision = hits / len(ranks), hits / (place + 1)
                area += (recall - old_recall) * (old_precision + precision) / 2
                old_recall, old_precision = recall, precision
            precisions.append(area)
        penalties.append(len(ranks) / ranks[-1])
    return cmc / len(precisions), np.mean(precisions), np.mean(penalties), len(precisions)


def assert_agrees(result, expected):
    np.testing.assert_allclose(result.cmc.numpy(), expected[0], rtol=0, atol=1e-12)
    assert result.cmc.dtype == torch.float64
    assert result.mAP == pytest.approx(expected[1], abs=1e-12)
    assert result.mINP == pytest.approx(expected[2], abs=1e-12)
    assert result.num_valid == expected[3]


def random_case(seed, queries=23, gallery=41, ids=6, cams=3, levels=7):
    """Few levels of distance (many ties); identity 0 only in the gallery, 99 only among the queries."""
    rng = np.random.default_rng(seed)
    query_ids = rng.integers(1, ids, queries)
    query_ids[0] = 99
    labels = (
        query_ids,
        rng.integers(0, ids, gallery),
        rng.integers(0, cams, queries),
        rng.integers(0, cams, gallery),
    )
    return rng.integers(0, levels, (queries, gallery)).astype(np.float64), labels


@pytest.mark.parametrize("ap", ["standard", "trapezoid"])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_distances_agree_with_the_loop(levels, ap):
    for seed in range(10):
        distances, labels = random_case(seed, levels=levels)
        expected = oracle(distances, *labels, max_rank=10, ap=ap)
        assert expected[3] < len(distances)
        assert_agrees(rank_distances(distances, *labels, max_rank=10, ap=ap), expected)
        tensors = [torch.from_numpy(value) for value in labels]
        half = torch.from_numpy(distances).to(torch.float16)
        assert_agrees(rank_distances(half, *tensors, max_rank=10, ap=ap), expected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 12), st.integers(2, 4), st.integers(1, 3))
def test_small_cases_agree_with_the_loop(seed, queries, gallery, ids, cams):
    distances, labels = random_case(seed, queries, gallery, ids, cams, levels=4)
    labels[0][0] = 1
    with np.errstate(invalid="ignore"):
        pairs = itertools.product(zip(labels[0], labels[2], strict=True), zip(labels[1], labels[3], strict=True))
        if any(q[0] == g[0] and q[1] != g[1] for q, g in pairs):
            assert_agrees(
                rank_distances(distances, *labels, max_rank=5, block_bytes=500), oracle(distances, *labels, max_rank=5)
            )
        else:
            with pytest.raises(ValueError, match="no query can be scored"):
                rank_distances(distances, *labels, max_rank=5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_features_agree_with_the_loop(metric, dtype):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(23, 8, generator=generator).to(dtype)
    gallery = torch.randn(41, 8, generator=generator).to(dtype)
    gallery[::3] = gallery[1]  # copies of one image, each with its own label
    query[4], gallery[7] = gallery[1], 0
    q, g = query.double(), gallery.double()
    if metric == "cosine":
        distances = 1 - torch.nn.functional.cosine_similarity(q[:, None], g[None], dim=2, eps=1e-12)
    else:
        distances = (q[:, None] - g[None]).norm(dim=2)
    _, labels = random_case(11)
    result = evaluate_ranking(query, gallery, *labels, metric=metric, max_rank=20)
    assert_agrees(result, oracle(distances.numpy().round(11), *labels, max_rank=20))
    if dtype == torch.float32:
        assert_agrees(
            evaluate_ranking(query.numpy(), gallery.numpy(), *labels, metric=metric, max_rank=20),
            (result.cmc.numpy(), *result[1:]),
        )


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_copies_tie_wherever_they_stand(metric):
    features = torch.randn(1, 517, generator=torch.Generator().manual_seed(0))
    gallery = features.repeat(203, 1)
    keys = pairwise_distances(torch.cat([features, features * 0.3 + 1]), gallery, metric)
    assert (keys == keys[:, :1]).all()
    assert keys[0, 0] == 0
    assert keys[1, 0] > 0.01


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_keys_are_fine_enough_to_tell_near_images_apart(scale):
    generator = torch.Generator().manual_seed(1)
    query, gallery = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64) * scale
    exact = (query[:, None] - gallery[None]).square().sum(2)
    torch.testing.assert_close(pairwise_distances(query, gallery, "euclidean"), exact, rtol=0, atol=1e-9 * scale**2)
    exact = 1 - torch.nn.functional.cosine_similarity(query[:, None], gallery[None], dim=2)
    torch.testing.assert_close(pairwise_distances(query, gallery), exact, rtol=0, atol=1e-12)


def test_blocks_and_order_of_queries_do_not_matter():
    generator = torch.Generator().manual_seed(5)
    query, gallery = torch.randn(23, 6, generator=generator), torch.randn(41, 6, generator=generator)
    _, (query_ids, gallery_ids, query_cams, gallery_cams) = random_case(2)
    whole = evaluate_ranking(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams)
    expected = (whole.cmc.numpy(), *whole[1:])
    labels = query_ids, gallery_ids, query_cams, gallery_cams
    for block_bytes in (1, 3000, 20_000):
        assert_agrees(evaluate_ranking(query, gallery, *labels, block_bytes=block_bytes), expected)
    order = np.random.default_rng(0).permutation(23)
    assert_agrees(
        evaluate_ranking(query[order], gallery, query_ids[order], gallery_ids, query_cams[order], gallery_cams),
        expected,
    )


def test_hand_computed():
    # Identity 1 by camera 1: junk, wrong, match, distractor, match; without the junk matches are 2nd and 4th.
    distances, ids, cams = [[0.5, 0.3, 0.1, 0.4, 0.2]], [1, 1, 1, 0, 2], [2, 3, 1, 1, 1]
    result = rank_distances(distances, [1], ids, [1], cams, max_rank=5)
    assert result.cmc.tolist() == [0, 1, 1, 1, 1]
    assert result.mAP == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert result.mINP == pytest.approx(2 / 4)
    # Trapezoid: precision 0 before the first match, 1/3 before the second.
    trapezoid = rank_distances(distances, [1], ids, [1], cams, ap="trapezoid")
    assert trapezoid.mAP == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2)


def test_trapezoid_of_a_perfect_list_is_one():
    assert rank_distances([[0.1, 0.2, 0.3]], [1], [1, 1, 2], [1], [2, 2, 2], ap="trapezoid").mAP == 1


def test_small_gallery_repeats_the_last_value():
    result = rank_distances([[0.1, 0.2], [0.1, 0.2]], [1, 2], [1, 2], [1, 1], [2, 2], max_rank=6)
    assert result.cmc.tolist() == [0.5, 1, 1, 1, 1, 1]
    assert rank_distances([[0.1, 0.2]], [2], [1, 2], [1], [2, 2], max_rank=1).cmc.tolist() == [0]


def test_infinite_distance_ranks_last():
    assert rank_distances([[np.inf, 3.0]], [1], [1, 2], [1], [2, 2]).mAP == 0.5


FEATURES = torch.eye(3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gallery_features": torch.ones(3, 4)}, "gallery_features is 4 wide and query_features 3"),
        ({"query_features": FEATURES * float("nan")}, "query_features holds NaN or Inf"),
        ({"gallery_features": FEATURES / 0}, "gallery_features holds NaN or Inf"),
        ({"query_features": FEATURES[:0]}, r"query_features has shape \(0, 3\)"),
        ({"gallery_features": FEATURES[:0]}, r"gallery_features has shape \(0, 3\)"),
        ({"gallery_features": FEATURES[0]}, r"gallery_features has shape \(3,\)"),
        ({"query_cams": None}, "query_cams is missing"),
        ({"gallery_cams": [1, 1]}, r"gallery_cams has shape \(2,\); it must be \(3,\)"),
        ({"query_ids": [[1, 2, 3]]}, r"query_ids has shape \(1, 3\)"),
        ({"gallery_ids": [1.0, 2.0, 3.0]}, "gallery_ids is torch.float64; it must hold integers"),
        ({"gallery_cams": [1, 1, 1]}, "query_ids share no identity"),
        ({"metric": "manhattan"}, "metric is 'manhattan'"),
        ({"ap": "exact"}, "ap is 'exact'"),
        ({"max_rank": 0}, "max_rank is 0"),
        ({"block_bytes": 0}, "block_bytes is 0"),
        ({"gallery_features": FEATURES.double() * 1e200}, "gallery_features holds numbers whose squares overflow"),
        ({"query_features": FEATURES * 1j}, "query_features is complex"),
    ],
)
def test_errors_name_the_argument(change, sentence):
    arguments = {
        "query_features": FEATURES,
        "gallery_features": FEATURES,
        "query_ids": [1, 2, 3],
        "gallery_ids": [1, 2, 3],
        "query_cams": [1, 1, 1],
        "gallery_cams": [2, 2, 2],
    }
    assert evaluate_ranking(**arguments).mAP == 1
    with pytest.raises(ValueError, match=sentence):
        evaluate_ranking(**{**arguments, **change})


def test_distances_must_be_a_matrix_of_numbers():
    with pytest.raises(ValueError, match=r"distances has shape \(2,\)"):
        rank_distances([0.1, 0.2], [1], [1, 2], [1], [2, 2])
    with pytest.raises(ValueError, match="distances holds NaN"):
        rank_distances([[0.1, float("nan")]], [1], [1, 2], [1], [2, 2])
