"""Ranks as counts against a ranking that sorts: the same CMC to the last bit, whatever path, type, block and order."""

import gc
import itertools
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dan_fast import _extension
from dan_fast.bench.machine import peak_above
from dan_fast.evaluation import counting
from dan_fast.evaluation.distances import PartDistances, distance_scale, tree_dots
from dan_fast.evaluation.pairs import Labels, pairs_in_blocks
from dan_fast.evaluation.ranking import evaluate_ranking, pairwise_distances, rank_distances
from tests.support.examples import examples
from tests.support.refusals import refusal
from tests.support.running import by_threads
from tests.support.warned import own_warnings

needs_module = pytest.mark.skipif(isinstance(counting.load(), str), reason="the compiled ranking was not built")
METRICS = ("cosine", "euclidean")


def by_sorting(distances, query_ids, gallery_ids, query_cams, gallery_cams, max_rank=50, ap="standard"):
    """CMC, mAP, mINP and valid queries by sorting every list, in NumPy."""
    cmc, precisions, penalties = np.zeros(max_rank), [], []
    for query, row in enumerate(distances):
        order = np.argsort(row, kind="stable")
        junk = (gallery_ids[order] == query_ids[query]) & (gallery_cams[order] == query_cams[query])
        good = gallery_ids[order[~junk]] == query_ids[query]
        if good.any():
            ranks = 1 + np.flatnonzero(good)
            cmc[ranks[0] - 1 :] += 1
            precision = np.cumsum(good) / np.arange(1, len(good) + 1)
            if ap == "trapezoid":
                precision = (precision + np.concatenate([[1.0], precision[:-1]])) / 2
            precisions.append(precision[good].mean())
            penalties.append(len(ranks) / ranks[-1])
    return cmc / len(precisions), np.mean(precisions), np.mean(penalties), len(precisions)


def assert_equal(result, expected):
    assert result.cmc.dtype == torch.float64 and result.cmc.tolist() == expected[0].tolist()
    assert result.mAP == pytest.approx(expected[1], abs=1e-12, rel=0)
    assert result.mINP == pytest.approx(expected[2], abs=1e-12, rel=0)
    assert result.num_valid == expected[3]


def labels_of(rng, queries, gallery, ids, cams=4):
    """Distractors (0), images of nobody (-1), and identities of queries (from `ids` on) that have no match."""
    query_ids = rng.integers(1, ids + 3, queries)
    gallery_ids = rng.integers(-1, ids, gallery)
    return query_ids, gallery_ids, rng.integers(0, cams, queries), rng.integers(0, cams, gallery)


def exact_keys(query, gallery, metric):
    """In float64, pair by pair, and near enough to what is equal to tie with it."""
    q, g = query.double().numpy(), gallery.double().numpy()
    dots = np.einsum("qd,gd->qg", q, g)
    if metric == "cosine":
        norms = np.maximum(np.linalg.norm(q, axis=1), 1e-12)[:, None] * np.maximum(np.linalg.norm(g, axis=1), 1e-12)
        keys, largest = 1 - dots / norms, np.ones((len(q), 1))
    else:
        squares = (g**2).sum(1)
        keys, largest = (q**2).sum(1)[:, None] + squares - 2 * dots, (q**2).sum(1)[:, None] + squares.max()
    step = 2.0 ** (np.ceil(np.log2(largest)) - 40)
    return np.round(keys / step) * step


@pytest.mark.parametrize("ids", [2, 30, 400])
@pytest.mark.parametrize("levels", [1, 40, 10**6])
def test_distances(path, levels, ids):
    rng = np.random.default_rng(levels + ids)
    labels = labels_of(rng, 37, 1201, ids)
    labels[0][:3] = 1
    distances = rng.integers(0, levels, (37, 1201)) / 16
    distances[5, 3:9], distances[6, 100:120] = np.inf, -np.inf
    for ap in ("standard", "trapezoid"):
        expected = by_sorting(distances, *labels, ap=ap)
        for block_bytes in (60_000, 1 << 26):
            assert_equal(rank_distances(distances, *labels, ap=ap, block_bytes=block_bytes), expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        rounded = torch.from_numpy(distances).to(dtype)
        assert_equal(rank_distances(rounded, *labels), by_sorting(rounded.double().numpy(), *labels))
    whole = rng.integers(-levels, levels, (37, 1201)) + 2**60
    assert_equal(rank_distances(whole, *labels), by_sorting(whole, *labels))


@pytest.mark.parametrize("gallery", [1, 15, 64, 65, 300, 1025])
def test_any_number_of_matches_and_images(path, gallery):
    rng = np.random.default_rng(gallery)
    for matches in {1, 2, 15, 47, 48, 49, 50, 200} & set(range(gallery + 1)):
        gallery_ids = rng.permutation(np.arange(gallery) < matches).astype(int)
        cams = np.full(3, 1), np.where(rng.random(gallery) < 0.1, 1, 2)
        cams[1][np.flatnonzero(gallery_ids)[0]] = 2
        for levels in (3, 10**6):
            distances = rng.integers(0, levels, (3, gallery)).astype(np.float32)
            distances[0, 0], distances[1, -1] = np.inf, -np.inf
            labels = np.ones(3, dtype=int), gallery_ids, *cams
            assert_equal(rank_distances(distances, *labels), by_sorting(distances, *labels))
            doubles = distances.astype(np.float64)
            assert_equal(rank_distances(doubles, *labels), by_sorting(doubles, *labels))


@examples(60)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 12), st.integers(2, 4), st.integers(1, 3))
def test_small_cases(path, seed, queries, gallery, ids, cams):
    rng = np.random.default_rng(seed)
    labels = labels_of(rng, queries, gallery, ids, cams)
    distances = rng.integers(0, 4, (queries, gallery))
    pairs = itertools.product(zip(*labels[::2], strict=True), zip(*labels[1::2], strict=True))
    if any(q[0] == g[0] and q[1] != g[1] for q, g in pairs):
        assert_equal(rank_distances(distances, *labels, block_bytes=500), by_sorting(distances, *labels))
    else:
        with pytest.raises(ValueError, match="no query can be scored"):
            rank_distances(distances, *labels)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("width", "ids"), [(1, 20), (7, 3), (64, 150), (300, 40)])
def test_features(path, metric, dtype, width, ids):
    rng = np.random.default_rng(width)
    queries = 141 if path == "kernels" else 47  # PyTorch has no tiles, and takes longer
    labels = labels_of(rng, queries, 611, ids)
    query = torch.from_numpy(rng.normal(size=(queries, width))).to(dtype)
    gallery = torch.from_numpy(rng.normal(size=(611, width))).to(dtype)
    gallery[::5] = gallery[rng.integers(0, 30, 123)]  # copies, each with its own label
    gallery[7], query[9] = 0, gallery[0]
    query[11] = 0
    whole = evaluate_ranking(query, gallery, *labels, metric=metric)
    assert_equal(whole, by_sorting(exact_keys(query, gallery, metric), *labels))
    parts = evaluate_ranking(query, gallery, *labels, metric=metric, block_bytes=40_000 + 400 * width)
    assert torch.equal(parts.cmc, whole.cmc) and parts[1:] == whole[1:], "to the last bit"


@pytest.mark.parametrize("metric", METRICS)
def test_float32_ranks_as_float64(path, metric):
    """Distances further apart than float64 rounds and nearer than float32 does."""
    rng = np.random.default_rng(1)
    labels = labels_of(rng, 60, 900, 20)
    base = rng.normal(size=100)
    query = torch.from_numpy(base + 1e-3 * rng.normal(size=(60, 100))).float()
    gallery = torch.from_numpy(base + 1e-3 * rng.normal(size=(900, 100))).float()
    keys = exact_keys(query, gallery, metric)
    assert_equal(evaluate_ranking(query, gallery, *labels, metric=metric), by_sorting(keys, *labels))
    product = query @ gallery.T
    norms = query.norm(dim=1)[:, None] * gallery.norm(dim=1)
    squares = query.square().sum(1)[:, None] + gallery.square().sum(1)
    single = 1 - product / norms if metric == "cosine" else squares - 2 * product
    assert by_sorting(single.numpy(), *labels)[1] != pytest.approx(by_sorting(keys, *labels)[1], abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e15, 1e30])
def test_features_of_any_size(path, metric, factor):
    rng = np.random.default_rng(2)
    labels = labels_of(rng, 20, 300, 10)
    query, gallery = torch.from_numpy(rng.normal(size=(20, 33))), torch.from_numpy(rng.normal(size=(300, 33)))
    if metric == "cosine" and factor < 1e-12:
        gallery, labels[1][:5] = gallery * 1e6, 1
    query, gallery = (query * factor).float(), (gallery * factor).float()
    expected = by_sorting(exact_keys(query, gallery, metric), *labels)
    assert_equal(evaluate_ranking(query, gallery, *labels, metric=metric), expected)
    query[0] *= 1e-3
    gallery[3:30] *= 1e-5
    expected = by_sorting(exact_keys(query, gallery, metric), *labels)
    assert_equal(evaluate_ranking(query, gallery, *labels, metric=metric, block_bytes=20_000), expected)


def test_copies_tie_in_whatever_block_they_stand(path):
    """All images equal: ranks are places in the gallery."""
    row = torch.randn(1, 517, generator=torch.Generator().manual_seed(0))
    gallery_ids, cams = np.full(1701, 2), np.zeros(1701, dtype=int)
    gallery_ids[[900, 1700]] = 1
    for metric in METRICS:
        result = evaluate_ranking(row * 1.7, row.expand(1701, -1), [1], gallery_ids, [1], cams, metric, max_rank=2000)
        assert result.cmc.tolist() == [0.0] * 900 + [1.0] * 1100
        assert result.mINP == 2 / 1701
        keys = pairwise_distances(torch.cat([row, row * 0.3 + 1]), row.expand(203, -1), metric)
        assert (keys == keys[:, :1]).all() and keys[0, 0] == 0 and keys[1, 0] > 0.01


@needs_module
def test_the_kernels_rank_where_no_group_divides_the_gallery(monkeypatch):
    monkeypatch.setattr(counting, "counting_torch", None)
    assert evaluate_ranking(torch.eye(2), torch.eye(2), [1, 2], [1, 2], [1, 1], [2, 2]).mAP == 1
    assert rank_distances([[0.0, 1.0]], [1], [1, 2], [1], [2, 2]).mAP == 1


def test_the_grid_is_of_the_largest_distance_or_up_to_twice_as_fine():
    squares = np.array([0.5, 1.0, 1.1, 3.0])
    assert distance_scale(squares, np.ones(1), "euclidean").steps.tolist() == [2.0**e for e in (-39, -39, -38, -38)]
    assert distance_scale(squares, np.ones(1), "cosine").steps.tolist() == [2.0**-40] * 4


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_the_error_of_a_product_is_neither_below_its_bound_nor_far_above(length):
    """Too small a one gives wrong ranks in rare cases, too large a one has all distances formed exactly."""
    width, unit = 4096, 2.0**-53
    query, gallery = torch.full((1, width), length / 64), torch.full((1, width), length / 8)
    squares = np.array([length**2]), np.array([64 * length**2])
    for metric, terms, largest in (("cosine", 1, 1), ("euclidean", 2 * 8 * length**2, 65 * length**2)):
        part = PartDistances(query, gallery, distance_scale(*squares, metric), 1 << 20)
        bound = terms * width * unit + 2.0**-46 * largest
        assert bound <= float(part.error) < 1.1 * bound
        assert torch.equal(part.uncertainty, part.error + part.steps)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_keys_are_fine_enough_to_tell_near_images_apart(scale, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    query, gallery = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64) * scale
    exact = (query[:, None] - gallery[None]).square().sum(2)
    torch.testing.assert_close(pairwise_distances(query, gallery, "euclidean"), exact, rtol=0, atol=1e-9 * scale**2)
    exact = 1 - torch.nn.functional.cosine_similarity(query[:, None], gallery[None], dim=2)
    whole = pairwise_distances(query, gallery)
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-12)
    # Of more images than go into one product of matrices.
    monkeypatch.setattr("dan_fast.evaluation.ranking.BLOCK_BYTES", 2**10)
    torch.testing.assert_close(pairwise_distances(query, gallery), whole, rtol=0, atol=1e-12)


def test_hand_computed(path):
    # Identity 1 by camera 1: junk, wrong, match, distractor, match; without the junk matches are 2nd and 4th.
    distances, ids, cams = [[0.5, 0.3, 0.1, 0.4, 0.2]], [1, 1, 1, 0, 2], [2, 3, 1, 1, 1]
    result = rank_distances(distances, [1], ids, [1], cams, max_rank=5)
    assert result.cmc.tolist() == [0, 1, 1, 1, 1]
    assert result.mAP == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert result.mINP == pytest.approx(2 / 4)
    # Trapezoid: precision 0 before the first match, 1/3 before the second.
    trapezoid = rank_distances(distances, [1], ids, [1], cams, ap="trapezoid")
    assert trapezoid.mAP == pytest.approx(((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2)


@pytest.mark.parametrize("metric", METRICS)
def test_layouts_types_and_threads_do_not_matter(metric):
    rng = np.random.default_rng(3)
    labels = labels_of(rng, 50, 1000, 30)
    query, gallery = rng.normal(size=(50, 40)).astype(np.float32), rng.normal(size=(1000, 40)).astype(np.float32)
    expected = evaluate_ranking(query, gallery, *labels, metric=metric)
    wide = np.zeros((1000, 57), np.float32)
    wide[:, 3:43] = gallery
    turned = torch.from_numpy(gallery).T.contiguous().T
    tensors = [torch.from_numpy(x) for x in labels]
    for q, g in (
        (torch.from_numpy(query), wide[:, 3:43]),
        (torch.from_numpy(query).requires_grad_(), turned),
        (np.asfortranarray(query), gallery[::-1][::-1]),
        (query.astype(np.float64), gallery),
        (query, gallery.astype(np.float64)),
    ):
        assert str(evaluate_ranking(q, g, *tensors, metric=metric)) == str(expected)
    for result in by_threads(lambda: evaluate_ranking(query, gallery, *labels, metric=metric), (1, 5)):
        assert str(result) == str(expected)
    distances = rng.integers(0, 9, (50, 1000)).astype(np.float32)
    expected = by_sorting(distances, *labels)
    assert_equal(rank_distances(np.asfortranarray(distances), *labels), expected)
    assert_equal(rank_distances(torch.from_numpy(distances).T.contiguous().T, *labels), expected)
    assert_equal(rank_distances(np.repeat(distances, 2, axis=1)[:, ::2], *labels), expected)
    # A reversed axis of length 1 counts as contiguous, and PyTorch refuses its stride.
    column, one = distances[:, :1], (labels[0], labels[1][:1], labels[2], labels[3][:1])
    assert_equal(rank_distances(column[:, ::-1], *one), by_sorting(column, *one))


@needs_module
def test_the_module_forms_the_same_norms():
    module = counting.load()
    for width in (1, 5, 64, 129, 1000):
        # Of 53 bits: sums of products of few bits are the same in any order.
        features = torch.randn(3, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            rows = features.to(dtype)
            assert module.square_norms(*counting._array(rows), 1).tolist() == tree_dots(rows, rows).tolist()


RANKS = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_ranking", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
rng = np.random.default_rng(4)
places = np.concatenate([np.sort(rng.permutation(1500)[:20]) for _ in range(70)])
offsets, junk = np.arange(71) * 20, rng.random(1400) < 0.2
pairs = offsets, places, junk.view(np.uint8), np.concatenate([[0], np.cumsum(~junk)])[offsets]
query, gallery = rng.normal(size=(70, 130)), rng.normal(size=(1500, 130))
for name in ("float16", "float32", "float64"):
    q, g = query.astype(name), gallery.astype(name)
    squares = module.square_norms(q, name, 1), module.square_norms(g, name, 1)
    print([x.tolist() for x in squares])
    for cosine in (True, False):
        norms = [np.sqrt(x) if cosine else x for x in squares]
        steps = np.full(70, 2.0 ** (-40 if cosine else -30))
        scale = norms[1].max(), 2.0**-4
        print(module.features_ranks(q, g, name, cosine, *norms, steps, *scale, *pairs, 1).tolist())
    distances = np.round(q[:, :1] @ g[:, 1:2].T, 1)
    print(module.distances_ranks(distances, name, *pairs, 1).tolist())
print(module.isa())
"""


@needs_module
def test_instruction_sets_agree(monkeypatch):
    results = {}
    for name in _extension.build_info()["instruction_sets"]:
        monkeypatch.setenv("DAN_FAST_ISA", name)
        command = [sys.executable, "-c", RANKS, counting.load().__file__]
        *lines, isa = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        results[isa] = lines
    assert len(results["baseline"]) == 12
    assert all(lines == results["baseline"] for lines in results.values())


def test_unsigned_distances_of_64_bits_are_in_order(path):
    distances = np.array([[2**63 + 5, 3, 2**63 + 9], [2**64 - 1, 2**63, 2**63 - 1]], np.uint64)
    labels = [1, 2], [1, 2, 3], [0, 0], [1, 1, 1]
    assert rank_distances(distances, *labels).mAP == 0.5


def test_a_tensor_with_the_negative_bit_is_ranked():
    query, gallery = torch.randn(5, 7), torch.randn(20, 7)
    labels = torch.arange(5), torch.arange(20) % 5, torch.zeros(5).long(), torch.ones(20).long()
    minus, expected = torch._neg_view(-query), evaluate_ranking(query, gallery, *labels)
    assert minus.is_neg() and evaluate_ranking(minus, gallery, *labels).mAP == expected.mAP


class _Alarm(Exception):
    pass


@needs_module
def test_a_signal_is_heard_while_queries_are_compared():
    """Ctrl-C in an evaluation: one call compares thousands of queries with the whole gallery."""
    query, gallery = torch.randn(700, 1024), torch.randn(20_000, 1024)
    labels = torch.arange(700), torch.arange(20_000) % 700, torch.zeros(700).long(), torch.ones(20_000).long()

    def ring(number, frame):
        raise _Alarm

    # In time of the processor, which does not count what others have of it, but is longer where they share its core or
    # caches: the second call may be four times as fast as the first. A twentieth of each comes before the comparing.
    previous = signal.signal(signal.SIGPROF, ring)
    started = time.process_time()
    try:
        evaluate_ranking(query, gallery, *labels)
        whole = time.process_time() - started
        signal.setitimer(signal.ITIMER_PROF, 0.2 * whole)
        with pytest.raises(_Alarm):
            evaluate_ranking(query, gallery, *labels)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    assert time.process_time() - started < 1.7 * whole


@needs_module
def test_an_instruction_set_that_is_none_is_one_sentence(monkeypatch):
    monkeypatch.setattr(counting.load(), "isa", MagicMock(side_effect=RuntimeError("DAN_FAST_ISA is 'sse9'")))
    assert refusal(counting.load.__wrapped__) == "DAN_FAST_ISA is 'sse9'."


@pytest.mark.parametrize(
    ("budget", "stops"), [(0, [1, 2, 3, 4]), (34, [1, 3, 4]), (35, [2, 4]), (69, [3, 4]), (70, [4])]
)
def test_a_block_has_as_many_queries_as_fit_the_budget(budget, stops):
    ids = np.array([1, 2, 3, 4]), np.array([4, 2, 4, 1, 2, 4])
    labels = Labels(*ids, *map(np.zeros_like, ids))
    # 10 bytes each and 5 for every image of the query's identity: 15, 20, 10 and 25.
    blocks = [pairs.rows for pairs in pairs_in_blocks(labels, 10, 5, budget)]
    assert blocks == [slice(start, stop) for start, stop in itertools.pairwise([0, *stops])]


def test_memory_is_bounded():
    """At MSMT17's number of images, where a matrix of all pairs would take 3.8 GB; few queries have matches."""
    rng = np.random.default_rng(5)
    query, gallery = torch.randn(1200, 16), torch.randn(82161, 16)
    labels = labels_of(rng, 1200, 82161, 3061, 15)
    small = [each[:count] for each, count in zip(labels, (50, 5000, 50, 5000), strict=True)]
    evaluate_ranking(query[:50], gallery[:5000], *small)
    _, extra = peak_above(torch.device("cpu"), lambda: evaluate_ranking(query, gallery, *labels))
    assert extra is None or extra < 100e6


def test_without_the_module_there_is_one_warning(monkeypatch):
    rng = np.random.default_rng(6)
    labels = labels_of(rng, 20, 200, 10)
    distances = rng.normal(size=(20, 200))
    expected = rank_distances(distances, *labels)
    monkeypatch.setitem(sys.modules, "dan_fast._ranking", None)
    monkeypatch.delattr("dan_fast._ranking", raising=False)
    counting.load.cache_clear()
    # Where the module was not built another test may have had the warning.
    counting._warn_once.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="dan_fast ranks in PyTorch operations: .*pip install -e") as warned:
            for _ in range(2):
                assert str(rank_distances(distances, *labels)) == str(expected)
        (warning,) = own_warnings(warned)
        assert warning.filename == __file__, "it names the caller"
    finally:
        counting.load.cache_clear()
        counting._warn_once.cache_clear()


def test_nan_is_found_anywhere(path):
    labels = [1, 2], [1, 5, 1], [1, 1], [1, 2, 2]
    for place in np.ndindex(2, 3):
        distances = np.zeros((2, 3), np.float32)
        distances[place] = np.nan
        for block_bytes in (1, 1 << 26):
            with pytest.raises(ValueError, match="distances holds NaN"):
                rank_distances(distances, *labels, block_bytes=block_bytes)


def test_an_error_does_not_keep_the_distances(path):
    distances = torch.full((1, 3), torch.nan)
    known = weakref.ref(distances)
    gc.disable()
    try:
        with suppress(ValueError):
            rank_distances(distances, [1], [1, 5, 1], [1], [2, 2, 2])
        del distances
        assert known() is None
    finally:
        gc.enable()


@needs_module
def test_the_module_refuses_what_it_would_read_wrongly():
    module = counting.load()
    distances = np.zeros((1, 3), np.float32)
    good = np.array([0, 1]), np.array([2]), np.zeros(1, np.uint8), np.array([0, 1])
    assert module.distances_ranks(distances, "float32", *good, 1).tolist() == [3]
    for index, value, sentence in (
        (0, np.array([0, 2]), "places is not 2 long"),
        (0, np.array([1, 1]), "offsets do not ascend"),
        (1, np.array([3]), "a place is not in the gallery"),
        (3, np.array([0, 0]), "match_offsets do not count"),
    ):
        arguments = [*good]
        arguments[index] = value
        with pytest.raises(ValueError, match=sentence):
            module.distances_ranks(distances, "float32", *arguments, 1)
    for matrix, dtype, sentence in (
        (distances.astype(np.float64), "float32", "no matrix of its type"),
        (np.zeros((1, 6), np.float32)[:, ::2], "float32", "columns of distances are not adjacent"),
        (distances, "int8", "no kernels for int8"),
    ):
        with pytest.raises(ValueError, match=sentence):
            module.distances_ranks(matrix, dtype, *good, 1)


def test_python_threads_may_rank_at_once():
    rng = np.random.default_rng(7)
    labels = labels_of(rng, 30, 800, 20)
    query, gallery = rng.normal(size=(30, 64)), rng.normal(size=(800, 64))
    expected = str(evaluate_ranking(query, gallery, *labels))
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda _: str(evaluate_ranking(query, gallery, *labels)), range(4))
        assert list(found) == [expected] * 4
