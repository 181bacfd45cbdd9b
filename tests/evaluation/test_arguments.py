"""What rankings, re-ranked or single-shot ones too, refuse: the sentence names the argument."""

import numpy as np
import pytest
import torch

from dan_fast.evaluation import (
    Reranking,
    evaluate_ranking,
    evaluate_reranked,
    evaluate_single_shot,
    pairwise_distances,
    rank_distances,
)
from dan_fast.evaluation.problem import check_features, check_shapes

FEATURES = torch.eye(3)
ARGUMENTS = {
    **{"query_features": FEATURES, "gallery_features": FEATURES, "query_ids": [1, 2, 3], "gallery_ids": [1, 2, 3]},
    **{"query_cams": [1, 1, 1], "gallery_cams": [2, 2, 2]},
}
REFUSED_BY_ALL = [
    ({"gallery_features": torch.ones(3, 4)}, "gallery_features is 4 wide and query_features 3"),
    ({"query_features": FEATURES * float("nan")}, "query_features holds NaN or Inf"),
    ({"gallery_features": FEATURES / 0}, "gallery_features holds NaN or Inf"),
    ({"query_features": FEATURES[:0]}, r"query_features has shape \(0, 3\)"),
    ({"gallery_features": FEATURES[:0]}, r"gallery_features has shape \(0, 3\)"),
    ({"gallery_features": FEATURES[0]}, r"gallery_features has shape \(3,\)"),
    ({"query_cams": None}, "query_cams is missing; ranking needs it; of unknown cameras give one number for"),
    ({"gallery_cams": None}, "gallery_cams is missing"),
    ({"gallery_cams": [1, 1]}, r"gallery_cams has shape \(2,\); it must be \(3,\)"),
    ({"query_ids": [[1, 2, 3]]}, r"query_ids has shape \(1, 3\)"),
    ({"gallery_ids": [1.0, 2.0, 3.0]}, "gallery_ids is torch.float64; it must hold integers"),
    ({"query_ids": ["ann", "bob"]}, "query_ids is no array of numbers; where it holds names, number them alike"),
    ({"gallery_cams": [[1, 2], [3], [4]]}, "gallery_cams is no array of numbers"),
    ({"gallery_features": list(FEATURES.clone().requires_grad_())}, r"gallery_features is a list .*torch.stack its"),
    ({"gallery_cams": [1, 1, 1]}, "query_ids share no identity"),
    ({"metric": "manhattan"}, "metric is 'manhattan'"),
    ({"max_rank": 0}, "max_rank is 0"),
    ({"max_rank": 2.0}, "max_rank is 2.0; it must be a whole number, at least 1"),
    ({"block_bytes": 0}, "block_bytes is 0"),
    ({"gallery_features": FEATURES.double() * 1e200}, "gallery_features holds numbers whose squares overflow"),
    # Distances add up four of them.
    ({"gallery_features": FEATURES.double() * 1.2e154, "metric": "euclidean"}, "gallery_features holds numbers whose"),
    ({"query_features": FEATURES * 1j}, "query_features is complex"),
    ({"query_features": torch.eye(2).to_sparse()}, r"query_features is sparse or has no numbers \(meta\)"),
    ({"gallery_features": torch.empty(2, 2, device="meta")}, "gallery_features is sparse or has no numbers"),
]
EVALUATIONS = (evaluate_ranking, evaluate_single_shot, evaluate_reranked)


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_what_is_changed_to_be_refused_is_right(path, evaluate):
    assert evaluate(**{"block_bytes": 1, **ARGUMENTS}).mAP == 1


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_arrays_of_other_machines_and_long_doubles(path, evaluate):
    given = {name: np.asarray(value) for name, value in ARGUMENTS.items()}
    turned = {name: value.astype(value.dtype.newbyteorder(">")) for name, value in given.items()}
    longer = {name: given[name].astype(np.longdouble) for name in ("query_features", "gallery_features")}
    for changed in (turned, given | longer):
        assert evaluate(**{"block_bytes": 1, **changed}).mAP == 1


# Arguments are looked at before the path is chosen.
@pytest.mark.parametrize(
    ("evaluate", "change", "sentence"),
    [
        *((evaluate, *refused) for evaluate in EVALUATIONS for refused in REFUSED_BY_ALL),
        *((evaluate, {"ap": "exact"}, "ap is 'exact'") for evaluate in (evaluate_ranking, evaluate_reranked)),
        (evaluate_single_shot, {"repeats": 0}, "repeats is 0; it must be a whole number, at least 1"),
        (evaluate_single_shot, {"repeats": 2.5}, "repeats is 2.5; it must be a whole number, at least 1"),
        (evaluate_single_shot, {"seed": -1}, "seed is -1; it must be a whole number, at least 0"),
        (evaluate_single_shot, {"seed": 0.5}, "seed is 0.5; it must be a whole number, at least 0"),
        (evaluate_reranked, {"reranking": Reranking(k1=0)}, "k1 is 0; it must be a whole number, at least 1"),
        (evaluate_reranked, {"reranking": Reranking(k1=2.0)}, "k1 is 2.0; it must be a whole number, at least 1"),
        (evaluate_reranked, {"reranking": Reranking(k2=0)}, "k2 is 0; it must be a whole number, at least 1"),
        (evaluate_reranked, {"reranking": Reranking(weight=1.5)}, "weight is 1.5; it must lie between 0 and 1"),
    ],
)
def test_errors_name_the_argument(evaluate, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(**{**ARGUMENTS, **change})


def test_distances_are_of_arrays_too_and_of_a_metric_that_there_is():
    found = pairwise_distances(np.eye(3), [[3.0, 0.0, 0.0]], "euclidean")
    assert found.tolist() == [[4.0], [10.0], [10.0]]
    for change, sentence in (
        ({"metric": "l2"}, "metric is 'l2'; it must be"),
        ({"gallery": np.ones((2, 4))}, "gallery_features is 4 wide and query_features 3"),
        ({"query": FEATURES[:0]}, r"query_features has shape \(0, 3\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            pairwise_distances(**{"query": FEATURES, "gallery": FEATURES, **change})


def test_features_of_one_dtype_are_taken_as_they_are():
    given = FEATURES.numpy(), FEATURES.bfloat16().float().numpy()
    for array, tensor in zip(given, check_shapes(*given), strict=True):
        assert tensor.dtype == torch.float32 and tensor.data_ptr() == array.ctypes.data
    assert [x.dtype for x in check_shapes([[1, 2]], np.ones((1, 2), np.int8))] == [torch.float64] * 2
    assert [x.dtype for x in check_shapes(FEATURES.half(), FEATURES.bfloat16())] == [torch.float32] * 2


def test_only_the_part_of_a_gallery_may_be_empty():
    assert check_shapes(FEATURES, FEATURES[:0], may_be_part=True)[1].shape == (0, 3)
    with pytest.raises(ValueError, match=r"gallery_features has shape \(0, 3\)"):
        check_features(FEATURES, FEATURES[:0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"distances": [0.1, 0.2]}, r"distances has shape \(2,\)"),
        ({"distances": np.zeros((0, 2))}, r"distances has shape \(0, 2\)"),
        ({"block_bytes": 0}, "block_bytes is 0"),
        ({"max_rank": 0}, "max_rank is 0"),
        ({"ap": "exact"}, "ap is 'exact'"),
        ({"query_ids": [1.0]}, "query_ids is torch.float64"),
    ],
)
def test_given_distances_are_checked_alike(change, sentence):
    labels = {"query_ids": [1], "gallery_ids": [1, 2], "query_cams": [1], "gallery_cams": [2, 2]}
    arguments = {"distances": [[0.1, 0.2]], **labels}
    assert rank_distances(**arguments).mAP == 1
    with pytest.raises(ValueError, match=sentence):
        rank_distances(**{**arguments, **change})
