"""Exact and approximate searches, and the recall that is said of them."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from dan_fast.evaluation import pairwise_distances
from dan_fast.search import GalleryIndex, kinds
from dan_fast.search import exact as exact_search
from dan_fast.search import searcher as searching
from dan_fast.search.searcher import Searcher, recall
from tests.support.refusals import refusal
from tests.support.searches import clustered, draw, paths_of


@pytest.mark.parametrize("spread", [1e-7, 1])
def test_lists_are_exact_where_float32_is_not(monkeypatch, spread):
    """Features that float32 orders otherwise, more of them than the margin, or not; in chunks, some of them gone."""
    random = np.random.default_rng(0)
    centre, noise = random.standard_normal(48), random.standard_normal((300, 48))
    features = torch.from_numpy(centre + spread * noise).to(torch.float32)
    features = torch.nn.functional.normalize(features).numpy()
    queries = torch.nn.functional.normalize(torch.from_numpy(centre + noise[:3]).to(torch.float32)).numpy()
    monkeypatch.setattr("dan_fast.search.exact.CHUNK", 70)
    order = np.arange(300)
    order[[5, 80, 299]] = -1
    expected = pairwise_distances(torch.from_numpy(queries), torch.from_numpy(features))
    expected[:, order < 0] = torch.inf
    found = Searcher(features, order, "flat").search(queries, 10)
    assert np.array_equal(found.rows, expected.argsort(dim=1, stable=True)[:, :10].numpy())
    near = np.argsort(-(queries @ features.T), axis=1)[:, : 10 + exact_search._MARGIN]
    assert np.isin(found.rows, near).all() == (spread == 1), "whether the candidates of float32 do"
    some = Searcher(features[:6], order[:6], "flat").search(queries, 10)
    assert (some.rows[:, 5:] == -1).all() and np.isneginf(some.scores[:, 5:]).all()


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_many_queries_are_searched_for_in_blocks(monkeypatch, kind):
    """What the products take does not depend on how many queries there are, and the lists do not depend on blocks."""
    features, queries, asked = clustered(300), clustered(2110), []

    def counted(call, place):
        return lambda *arguments: asked.append(len(arguments[place])) or call(*arguments)

    monkeypatch.setattr(exact_search, "_candidates", counted(exact_search._candidates, 1))
    monkeypatch.setattr(kinds, "search", counted(kinds.search, 2))
    searcher = Searcher(features, np.arange(300), kind, None if kind == "flat" else kinds.build(kind, features)[0])
    found = searcher.search(queries, 4)
    assert max(asked) <= 1024 and sum(asked) == 2110
    assert found.rows.shape == found.scores.shape == (2110, 4)
    for share in (slice(0, 5), slice(1020, 1030), slice(2100, 2110)):
        alone_found = searcher.search(queries[share], 4)
        assert np.array_equal(found.rows[share], alone_found.rows)
        assert np.array_equal(found.scores[share], alone_found.scores)
    none = searcher.search(queries[:0], 4)
    assert none.rows.shape == none.scores.shape == (0, 4)


def test_where_all_images_are_alike_the_candidates_of_few_queries_are_held_at_a_time(monkeypatch):
    features = np.ones((3000, 64), np.float32) + 1e-6 * clustered(3000, 64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    order, asked = np.arange(3000), []
    expected = exact_search.search_exactly(features, features[:40], 10, order)
    candidates = exact_search._candidates

    def counted(features, queries, places, order):
        asked.append(len(queries) * places)
        return candidates(features, queries, places, order)

    monkeypatch.setattr(exact_search, "_candidates", counted)
    monkeypatch.setattr(exact_search, "_CANDIDATES", 6000)
    for found, wanted in zip(exact_search.search_exactly(features, features[:40], 10, order), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert max(asked) == 6000 and len(asked) > 20


@pytest.mark.parametrize(("kind", "least"), [("hnsw", 0.99), ("ivfpq", 0.9)])
def test_an_approximate_index_is_written_extended_and_searched(tmp_path, monkeypatch, kind, least):
    features, queries = np.split(clustered(3000), [2900])
    monkeypatch.setattr(kinds, "CHUNK", 700)
    index, parameters = kinds.build(kind, features[:2000])
    kinds.write(index, tmp_path / "a.faiss")
    index = kinds.read(tmp_path / "a.faiss", 2000, 32)
    kinds.extend(index, features)
    order = np.arange(2900)
    order[::3] = -1
    searcher, exactly = Searcher(features, order, kind, index), Mock(side_effect=exact_search.search_exactly)
    monkeypatch.setattr(searching, "search_exactly", exactly)
    found = searcher.search(queries, 10)
    # A third of all persons is gone, and of the images near a query seldom much more.
    assert sum(len(call.args[1]) for call in exactly.call_args_list) <= len(queries) / 5
    exact = searcher.search(queries, 10, exact=True)
    assert (found.rows % 3 != 0).all() and (found.rows >= 2000).any()
    hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.rows, exact.rows, strict=True)])
    assert hits >= least
    scores = np.einsum("qc,qkc->qk", queries, features[found.rows])
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    assert (np.diff(found.scores) <= 0).all()
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "search", lambda kind, index, queries, places: np.full((len(queries), places), -1))
        whole = Searcher(features, np.arange(2900), kind, index).search(queries, 10)
    assert (whole.rows >= 0).all(), "an index that finds too few, with no image gone"
    assert kinds.is_outgrown(kind, parameters, 8001) == (kind == "ivfpq")
    assert not kinds.is_outgrown(kind, parameters, 8000)
    assert "missing or damaged" in refusal(kinds.read, tmp_path / "a.faiss", 2900, 32)


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_a_small_part_of_an_index_is_compared_whole(kind):
    features, queries = np.split(clustered(3000), [2900])
    order = np.full(2900, -1)
    order[::150] = np.arange(20)
    searcher = Searcher(features, order, kind)  # whose index is not asked
    found, exact = searcher.search(queries, 10), searcher.search(queries, 10, exact=True)
    assert (found.rows >= 0).all() and np.array_equal(found.rows, exact.rows)


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
@pytest.mark.parametrize("places", [10, 1500])
def test_where_all_that_is_near_is_gone_what_is_left_is_found(kind, places):
    """The images of a night leave the gallery, and a night's image is searched for."""
    random, features = np.random.default_rng(0), clustered(3000, 64)
    features = np.concatenate([features, np.zeros((3000, 1), np.float32)], axis=1)
    features[:1200] = 0.1 * random.standard_normal((1200, 65)) * (np.arange(65) < 64) + 5 * (np.arange(65) == 64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    order = np.where(np.arange(3000) < 1200, -1, np.arange(3000))
    searcher = Searcher(features, order, kind, kinds.build(kind, features)[0])
    queries = np.concatenate([features[:20], features[-20:]])
    found, exact = (searcher.search(queries, places, exact=exact) for exact in (False, True))
    assert (found.rows >= 1200).all() and recall(found.rows, exact.rows) > 0.95
    assert np.isfinite(found.scores).all() and (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("first", [1, 10], ids=["one image", "one person"])
def test_a_graph_that_began_with_little_finds_what_is_added(first, size):
    features, queries = np.split(clustered(3000, size), [2900])
    # One person after the other, as the files of a folder.
    features = features[np.argsort(np.arange(2900) % 300, kind="stable")]
    index, _ = kinds.build("hnsw", features[:first])
    kinds.extend(index, features)
    searcher = Searcher(features, np.arange(2900), "hnsw", index)
    found, exact = searcher.search(queries, 10), searcher.search(queries, 10, exact=True)
    assert recall(found.rows, exact.rows) > 0.99


def test_numbers_of_the_graph_are_those_of_the_features():
    """Of any of length 1, to a step of the eight bits, whatever it was built of."""
    features = np.concatenate([np.eye(48, dtype=np.float32), -np.eye(48, dtype=np.float32), clustered(50, 48)])
    index, _ = kinds.build("hnsw", features[:1])
    kinds.extend(index, features)
    assert np.abs(index.storage.reconstruct_n(0, len(features)) - features).max() <= 2 / 255


def test_a_graph_with_ranges_of_its_first_gallery_serves_until_it_is_made_anew(run, folder, extractor):
    lists = run("--index", "hnsw")
    described = folder / "out" / "index" / "index.json"
    content = json.loads(described.read_text())
    del content["kinds"]["hnsw"]["parameters"]["range"]
    described.write_text(json.dumps(content))
    assert GalleryIndex(described.parent, extractor, "hnsw").size == 14
    assert run("--index", "hnsw") == lists
    assert json.loads(described.read_text())["kinds"]["hnsw"]["parameters"]["range"] == 1


def test_recall_tells_an_index_that_finds_others(run, folder, monkeypatch, capsys):
    run("--index", "hnsw", "--top", 3)
    assert "recall@3 1.0000 of the exact search, over 3 queries" in capsys.readouterr().out
    search = kinds.search
    monkeypatch.setattr(kinds, "search", lambda *arguments: (search(*arguments) + 1) % 14)
    monkeypatch.setattr(kinds, "fetched", lambda kind, places: places)
    run("--index", "hnsw", "--top", 3)
    value = json.loads((folder / "out" / "ranked.json").read_text())["recall"]["value"]
    assert value < 0.6
    assert f"recall@3 {value:.4f}" in capsys.readouterr().out
    assert f"recall@3 is {value:.4f}" in (folder / "out" / "index.html").read_text()
    assert [recall(np.array([[row, -1]]), np.array([[1, -1]])) for row in (1, 2)] == [1, 0], "-1 is no row"


def test_recall_is_of_the_lists_which_lack_a_querys_own_file(run, folder, monkeypatch, capsys):
    """Here each query finds itself and then a wrong image, unless that happens to be right."""
    gallery = folder / "gallery"
    searched_for = ["--index", "hnsw", "--top", 1, "--query", gallery]
    search = kinds.search
    monkeypatch.setattr(kinds, "fetched", lambda kind, places: places)
    for name in ("00-copy.png", "03.png", "05.png", "11-copy.png"):
        (gallery / name).unlink()
    monkeypatch.setattr(
        kinds, "search", lambda *of: np.where(np.arange(of[3]) == 0, search(*of), (search(*of)[:, :1] + 5) % 10)
    )
    lists = run(*searched_for)
    assert all(each["path"] not in paths for each, paths in zip(lists, paths_of(lists), strict=True))
    value = json.loads((folder / "out" / "ranked.json").read_text())["recall"]["value"]
    monkeypatch.setattr(kinds, "search", search)
    shares = [found == exact for found, exact in zip(paths_of(lists), paths_of(run(*searched_for)), strict=True)]
    assert value == sum(shares) / len(shares) < 0.5
    alone_in_it = draw(folder / "one", ["one.png"])
    capsys.readouterr()
    run("--index", "hnsw", "--query", alone_in_it, "--gallery", alone_in_it, out="alone")
    assert json.loads((folder / "alone" / "ranked.json").read_text())["recall"] is None
    assert "recall@" not in capsys.readouterr().out
