"""`dan-fast search`: the order of its lists, how its index is kept and extended, its page, and what it refuses."""

import errno
import itertools
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import unquote

import numpy as np
import pytest
import torch

from dan_fast import DanFastError, FeatureExtractor
from dan_fast.cli import main
from dan_fast.commands import search as search_command
from dan_fast.core.files import alone
from dan_fast.data import load_dataset
from dan_fast.data.images import reading
from dan_fast.data.samples import Sample
from dan_fast.evaluation import pairwise_distances
from dan_fast.inference.sources import find_images
from dan_fast.nn import DAN
from dan_fast.reporting import search_page as page_module
from dan_fast.search import GalleryIndex, gallery_index, kinds, update_index
from dan_fast.search import exact as exact_search
from dan_fast.search import searcher as searching
from dan_fast.search.searcher import Searcher, recall
from tests.support.searches import draw, search_page, searched
from tests.support.tiny_training import IMAGE_SIZE, OneConvolution
from tests.support.untrained import untrained_checkpoint
from tests.support.written_sets import manifest

NAMES = [f"{number:02d}.png" for number in range(12)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A gallery, two of its images twice, and queries."""
    draw(tmp_path / "gallery", NAMES)
    for name, copy in (("03.png", "00-copy.png"), ("05.png", "11-copy.png")):
        shutil.copy(tmp_path / "gallery" / name, tmp_path / "gallery" / copy)
    draw(tmp_path / "queries", ["a.png", "b.png", "c.png"], seed=1)
    return tmp_path


@pytest.fixture
def run(folder, checkpoint):
    def run(*arguments: object, out: str = "out", code: int = 0) -> list[dict]:
        usual = {"--checkpoint": checkpoint, "--gallery": folder / "gallery", "--query": folder / "queries"}
        # A list that is given twice is refused.
        flags = [word for name, value in usual.items() if name not in arguments for word in (name, value)]
        return searched(folder / out, *flags, *arguments, code=code).get("queries", [])

    return run


@pytest.fixture
def embedded(monkeypatch) -> list[int]:
    """How many images each batch had that a network embedded."""
    counts, embed = [], FeatureExtractor._embed
    monkeypatch.setattr(FeatureExtractor, "_embed", lambda self, x: counts.append(len(x)) or embed(self, x))
    return counts


def paths_of(lists: list[dict]) -> list[list[str]]:
    return [[match["path"] for match in each["matches"] or ()] for each in lists]


def test_lists_are_those_of_the_evaluation(run, folder, checkpoint):
    shutil.copy(folder / "gallery" / "03.png", folder / "queries" / "d.png")
    lists = run("--top", 20)
    extract = FeatureExtractor(checkpoint, "cpu", batch_size=4)
    query, gallery = (sorted((folder / name).iterdir()) for name in ("queries", "gallery"))
    distances = pairwise_distances(extract(query), extract(gallery))
    order = distances.argsort(dim=1, stable=True)
    assert [each["path"] for each in lists] == [str(path) for path in query]
    assert paths_of(lists) == [[str(gallery[place]) for place in row] for row in order.tolist()]
    scores = [[match["score"] for match in each["matches"]] for each in lists]
    assert torch.equal(torch.tensor(scores, dtype=torch.float64), 1 - distances.sort(dim=1).values)
    assert [match["rank"] for match in lists[0]["matches"]] == list(range(1, 15))
    assert {match["pid"] for match in lists[0]["matches"]} == {None}


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


def test_the_own_file_of_a_query_is_left_out(run, folder):
    (own,) = run("--query", folder / "gallery" / "03.png", "--top", 3)
    names = [Path(path).name for path in paths_of([own])[0]]
    assert names[0] == "00-copy.png" and "03.png" not in names and len(names) == 3


def test_an_extended_index_is_a_new_one(run, folder, embedded, capsys):
    gallery, away = folder / "gallery", folder / "away"
    draw(gallery, ["04b.png", "zz.png"], seed=3)
    for name in ("04b.png", "05.png", "zz.png"):
        shutil.move(gallery / name, folder / name)
    run()
    shutil.move(gallery / "02.png", away)
    draw(gallery, ["07.png"], seed=4)
    for name in ("04b.png", "05.png", "zz.png"):
        shutil.move(folder / name, gallery / name)
    embedded.clear()
    capsys.readouterr()
    extended = run("--top", 20)
    printed = capsys.readouterr().out
    assert sum(embedded) == 3 + 4
    assert "4 images embedded, 1 of them changed, 11 were there." in printed
    assert f"1 images of the index are not in the gallery and are not found, the first is {gallery}/02.png" in printed
    assert paths_of(extended) == paths_of(run("--top", 20, out="new"))
    shutil.move(away, gallery / "02.png")
    embedded.clear()
    returned = run("--top", 20)
    assert sum(embedded) == 3, "an image that comes back is not embedded again"
    assert paths_of(returned) == paths_of(run("--top", 20, out="newer"))


@pytest.mark.parametrize("other", ["train", "gallery"])
def test_of_each_dataset_the_split_is_taken_where_it_has_one(run, folder, other):
    """Whatever another dataset beside it has."""
    names = {"gallery": (3, 4), "query": (3, 4)}, {other: (5, 6, 7)}
    whole, part = (Path(manifest(folder / place, **each)) for place, each in zip("wp", names, strict=True))
    for place in (whole, part):
        draw(place, [path.name for path in place.glob("*.jpg")])
    paths = (part, folder / "gallery" / "03.png", whole)
    lists = run("--gallery", *paths, "--query", *paths, "--top", 20)
    expected = [part / f"{other}{number}.jpg" for number in range(3)] + [folder / "gallery" / "03.png"]
    gallery, queries = (
        [*map(str, expected), *(f"{whole}/{split}{number}.jpg" for number in range(2))]
        for split in ("gallery", "query")
    )
    assert [each["path"] for each in lists] == queries
    assert {*paths_of(lists)[-1]} == {*gallery}


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_kill_at_any_moment_leaves_the_index_as_it_was(folder, tmp_path, monkeypatch, kind):
    """Copies of the folder, as a kill would leave it, before and after everything that is written."""
    network = DAN(2, OneConvolution(), IMAGE_SIZE, reduction=2).eval()
    monkeypatch.setattr("dan_fast.inference.extractor.trained_network", lambda path: (network, {}))
    extract, images = FeatureExtractor("tiny", "cpu", batch_size=4), find_images([str(folder / "gallery")])[0].samples
    query, index, copies = extract(sorted((folder / "queries").iterdir())).numpy(), tmp_path / "index", []

    def copied(call):
        def wrapped(*arguments):
            for step in (lambda: None, lambda: call(*arguments)):
                step()
                copies.append(shutil.copytree(index, tmp_path / f"copy{len(copies)}"))
                for lock in copies[-1].glob(".lock*"):
                    lock.unlink()

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(gallery_index, "_SAVED", 6)
        patch.setattr(gallery_index, "_save", copied(gallery_index._save))
        patch.setattr(kinds, "write", copied(kinds.write))
        update_index(index, extract, images[:8], kind)
        made = len(copies)
        before = GalleryIndex(index, extract, kind).search(query, 14)
        update_index(index, extract, images, kind, copied(lambda done, total: None))
    whole = GalleryIndex(index, extract, kind).search(query, 14)
    assert made >= 4 and len(copies) >= made + 6
    for number, copy in enumerate(copies):
        if not (copy / "index.json").exists():
            assert number < made
            with pytest.raises(DanFastError, match="holds no finished"):
                GalleryIndex(copy, extract, kind)
        elif number < len(copies) - 1:
            found = GalleryIndex(copy, extract, kind).search(query, 14)
            assert np.array_equal(found.rows, before.rows)
        contents = [json.loads(file.read_text()) for file in copy.glob("*.json")]
        update = update_index(copy, extract, images, kind)
        known = (content.get("finished", 0) + len(content["paths"]) for content in contents)
        assert update.added == 14 - max(known, default=0)
        found = GalleryIndex(copy, extract, kind).search(query, 14)
        np.testing.assert_allclose(found.scores, whole.scores, atol=1e-6)
        assert {path.name for path in copy.iterdir()} == {path.name for path in index.iterdir()}


def test_an_interrupt_between_any_two_lines_leaves_whole_rows(folder, tmp_path, monkeypatch):
    network = DAN(2, OneConvolution(), IMAGE_SIZE, reduction=2).eval()
    monkeypatch.setattr("dan_fast.inference.extractor.trained_network", lambda path: (network, {}))
    extract, images = FeatureExtractor("tiny", "cpu", batch_size=2), find_images([str(folder / "gallery")])[0].samples
    images = images[:5]
    expected = extract([image.path for image in images]).numpy()

    def interrupting(line: int):
        lines = itertools.count()

        def at_line(frame, event, argument):
            if event == "line" and next(lines) == line:
                raise KeyboardInterrupt
            return at_line

        return lambda frame, *_: at_line if frame.f_code is gallery_index._embed.__code__ else None

    for line in itertools.count():
        index, before = tmp_path / f"index{line}", sys.gettrace()
        sys.settrace(interrupting(line))
        try:
            update_index(index, extract, images)
        except KeyboardInterrupt:
            interrupted = True
        else:
            interrupted = False
        finally:
            sys.settrace(before)
        update_index(index, extract, images)
        assert [image.path for image in GalleryIndex(index, extract).images] == [image.path for image in images]
        features = np.fromfile(index / "features.f32", dtype=np.float32).reshape(expected.shape)
        np.testing.assert_allclose(features, expected, atol=1e-6)
        if not interrupted:
            break
    assert line > 30


def test_what_is_stopped_goes_on(run, folder, embedded, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        batches = FeatureExtractor.batches

        def until(self, images):
            for number, rows in enumerate(batches(self, images)):
                if number == 2:
                    raise KeyboardInterrupt
                yield rows

        patch.setattr(FeatureExtractor, "batches", until)
        run(code=130)
    assert "the same command goes on from there" in capsys.readouterr().out
    embedded.clear()
    assert len(run()) == 3 and sum(embedded) == 3 + 14 - 8


def test_what_is_killed_goes_on_at_what_was_written_down(run, folder, embedded, monkeypatch):
    """An update of a finished index writes down its own images alone; so does the next one that goes on."""
    run()
    finished, unfinished = (folder / "out" / "index" / name for name in ("index.json", "unfinished.json"))
    before = finished.read_bytes()
    new = [f"new-{number:02d}.png" for number in range(16)]
    draw(folder / "gallery", new, seed=6)
    monkeypatch.setattr(gallery_index, "_SAVED", 4)
    save = gallery_index._save
    for written in (8, 12):
        with monkeypatch.context() as patch:

            def killed(file: Path, stored: dict, most: int = written) -> None:
                if len(stored["paths"]) > most:
                    raise KeyboardInterrupt
                save(file, stored)

            patch.setattr(gallery_index, "_save", killed)
            run(code=130)
        assert finished.read_bytes() == before
        assert [Path(path).name for path in json.loads(unfinished.read_text())["paths"]] == new[:written]
    left = unfinished.read_bytes()
    embedded.clear()
    lists = run()
    assert sum(embedded) == 3 + 4 and not unfinished.exists()
    # A call that was killed after it had written index.json leaves the other file.
    unfinished.write_bytes(left)
    embedded.clear()
    assert run() == lists and sum(embedded) == 3
    # Without index.json the rows before those of the other file are of unknown images.
    unfinished.write_bytes(left)
    finished.unlink()
    embedded.clear()
    assert run() == lists and sum(embedded) == 3 + 30
    # Builds that did not count the finished rows wrote all of them.
    content = json.loads(finished.read_text())
    unfinished.write_text(json.dumps(content))
    for name in ("paths", "status", "pids", "camids"):
        content[name] = content[name][:14]
    finished.write_text(json.dumps(content | {"gallery": list(range(14))}))
    embedded.clear()
    assert run() == lists and sum(embedded) == 3


def test_an_index_that_is_opened_while_an_update_ends_is_the_new_one(run, folder, checkpoint, monkeypatch):
    run("--index", "hnsw")
    draw(folder / "gallery", ["new.png"], seed=6)
    read = kinds.read

    def late(path: Path, rows: int, size: int):
        with monkeypatch.context() as patch:
            patch.setattr(kinds, "read", read)
            run("--index", "hnsw")
            return read(path, rows, size)

    monkeypatch.setattr(kinds, "read", late)
    index = folder / "out" / "index"
    assert GalleryIndex(index, FeatureExtractor(checkpoint, "cpu"), "hnsw").size == 15


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_a_later_call_goes_on(run, monkeypatch, capsys, call):
    with monkeypatch.context() as patch:
        patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        run(code=1)
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"dan-fast: .*/out/index/(features.f32|unfinished.json) could not be written \(No sp.*\n", error
    )
    assert len(run()) == 3


def test_a_second_search_does_not_mix_its_page_with_anothers(run, folder, capsys):
    """And what a killed one left goes."""
    run()
    out = folder / "out"
    before = (out / "ranked.json").read_bytes()
    for remains in (out / ".ranked.json.0a.part", out / "search_images/.0b.jpg.0a.part"):
        remains.touch()
    with alone(out / ".lock"):
        run("--top", 1, code=1)
    assert f"{out} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert (out / "ranked.json").read_bytes() == before
    run("--top", 1)
    assert (out / "ranked.json").read_bytes() != before and not list(out.rglob(".*"))


def test_of_another_checkpoint_it_is_refused(run, folder, checkpoint, capsys):
    run()
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    other = untrained_checkpoint(folder / "other.pt", run={"seed": 7})
    run("--checkpoint", other, code=1)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{folder}/out/index is an index of another checkpoint (weights " in error
    assert before == {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    shutil.copy(checkpoint, folder / "moved.pt")
    assert main(["share", "--checkpoint", str(checkpoint), "--out", str(folder / "shared")]) == 0
    for same in ("moved.pt", "shared"):
        assert paths_of(run("--checkpoint", folder / same)) == paths_of(
            json.loads(before[folder / "out/ranked.json"])["queries"]
        )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gallery", "empty"], "empty holds no image"),
        (["--query", "nowhere"], "There is nothing at nowhere"),
        (["--gallery", "gallery", "broken.png"], "The image broken.png cannot be decoded"),
        (["--query", "broken.png"], "The image broken.png cannot be decoded"),
        (["--gallery", "broken.png", "--broken_images", "skip"], "No image of the gallery can be decoded"),
        (["--index", "ivfpq"], "An ivfpq index is made of 256 images at least, not of 14: use flat."),
        (["--checkpoint", "none.pt"], "none.pt does not exist"),
        (["faiss"], "pip install 'dan-fast[search]'"),
    ],
)
def test_a_mistake_is_one_sentence(run, folder, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    Path("broken.png").write_bytes(b"no image")
    if arguments == ["faiss"]:
        monkeypatch.setitem(sys.modules, "faiss", None)
        arguments = ["--index", "hnsw"]
    assert run(*arguments, code=1) == []
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    if "14" not in sentence and arguments[:2] != ["--gallery", "gallery"]:
        assert not (folder / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "nonsense", "newer", "older", "without features", "graph", "lists"])
def test_a_damaged_index_is_named(run, folder, capsys, damage):
    run("--index", "hnsw")
    index = folder / "out" / "index"
    features, described = index / "features.f32", index / "index.json"
    match damage:
        case "cut":
            features.write_bytes(features.read_bytes()[:-4])
        case "nonsense":
            described.write_bytes(described.read_bytes()[:100])
        case "newer" | "older":
            schema = 9 if damage == "newer" else 1
            described.write_text(json.dumps(json.loads(described.read_text()) | {"schema": schema}))
        case "without features":
            features.unlink()
        case "lists":
            content = json.loads(described.read_text())
            described.write_text(json.dumps(content | {"camids": content["camids"][:-1]}))
        case "graph":
            (graph,) = index.glob("*.faiss")
            graph.write_bytes(graph.read_bytes()[:200])
    capsys.readouterr()
    run("--index", "hnsw", code=1)
    error = capsys.readouterr().err
    assert str(index) in error and error.count("\n") == 1 and "remove" in error
    assert damage not in ("newer", "older") or f"is of {'a' if damage == 'newer' else 'an'} {damage} version" in error
    if damage == "graph":
        graph.unlink()
        assert len(run("--index", "hnsw")) == 3


def test_what_other_versions_decoded_is_said(run, folder, embedded, monkeypatch, capsys):
    index = folder / "out" / "index"

    def decoded_by() -> list[str]:
        return json.loads((index / "index.json").read_text())["decoded_by"]

    run()
    assert "decoded by" not in capsys.readouterr().out and decoded_by() == [reading.DECODED_BY]
    for place in (gallery_index, search_command):
        monkeypatch.setattr(place, "DECODED_BY", "Pillow 99")
    said = (
        f"Images of the index were decoded by {reading.DECODED_BY}, and this is Pillow 99, whose pixels may differ a "
        f"little: remove {index}, and all is made anew."
    )
    embedded.clear()
    run()
    assert said in capsys.readouterr().out.splitlines() and decoded_by() == [reading.DECODED_BY]
    assert sum(embedded) == 3, "what is there is kept"
    draw(folder / "gallery", ["new.png"], seed=6)
    run()
    assert said in capsys.readouterr().out.splitlines() and {*decoded_by()} == {"Pillow 99", reading.DECODED_BY}


def test_an_index_that_does_not_say_what_decoded_it_is_extended(run, folder, embedded, capsys):
    run()
    described = folder / "out" / "index" / "index.json"
    content = json.loads(described.read_text())
    del content["decoded_by"]
    for added in ([], ["new.png"]):
        described.write_text(json.dumps(content))
        draw(folder / "gallery", added, seed=6)
        embedded.clear()
        run()
        assert sum(embedded) == 3 + len(added) and "decoded by" not in capsys.readouterr().out
        assert len(json.loads(described.read_text())["decoded_by"]) == len(added)


def test_unfinished_lists_of_different_lengths_are_named_and_the_index_stays(run, folder, embedded, capsys):
    lists = run()
    unfinished = folder / "out" / "index" / "unfinished.json"
    content = json.loads(unfinished.with_name("index.json").read_text())
    unfinished.write_text(json.dumps(content | {"paths": [*content["paths"], "more.png"]}))
    capsys.readouterr()
    run(code=1)
    error = capsys.readouterr().err
    assert f"{unfinished} has lists of different lengths: remove {unfinished}, and" in error and error.count("\n") == 1
    unfinished.unlink()
    embedded.clear()
    assert run() == lists and sum(embedded) == 3


def test_images_that_cannot_be_decoded_are_skipped(run, folder, embedded, capsys):
    broken = folder / "gallery" / "04.png", folder / "queries" / "b.png"
    for path in broken:
        path.write_bytes(b"no image")
    lists = run("--broken_images", "skip", "--top", 20)
    assert [each["matches"] is None for each in lists] == [False, True, False]
    assert str(broken[0]) not in paths_of(lists)[0] and len(lists[0]["matches"]) == 13
    printed = capsys.readouterr().out
    assert f"Skipped {broken[0]}: it cannot be decoded." in printed and f"Skipped the query {broken[1]}" in printed
    assert "This image cannot be decoded." in (folder / "out" / "index.html").read_text()
    embedded.clear()
    draw(folder / "gallery", ["04.png"])
    assert str(broken[0]) in paths_of(run("--broken_images", "skip", "--top", 20))[0] and sum(embedded) == 2 + 1


def clustered(count: int, size: int = 32) -> np.ndarray:
    random = np.random.default_rng(2)
    centres = random.standard_normal((count // 10, size))
    return torch.nn.functional.normalize(
        torch.from_numpy(centres[np.arange(count) % len(centres)] + 0.4 * random.standard_normal((count, size)))
    ).to(torch.float32).numpy()  # fmt: skip


@pytest.mark.parametrize(("kind", "least"), [("hnsw", 0.99), ("ivfpq", 0.9)])
def test_an_approximate_index_is_written_extended_and_searched(tmp_path, monkeypatch, kind, least):
    features, queries = clustered(3000)[:2900], clustered(3000)[2900:]
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
    assert kinds.is_outgrown(kind, parameters, 8001) == (kind == "ivfpq") and not kinds.is_outgrown(
        kind, parameters, 8000
    )
    with pytest.raises(DanFastError, match="missing or damaged"):
        kinds.read(tmp_path / "a.faiss", 2900, 32)


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_a_small_part_of_an_index_is_compared_whole(kind):
    features, queries = clustered(3000)[:2900], clustered(3000)[2900:]
    order = np.full(2900, -1)
    order[::150] = np.arange(20)
    searcher = Searcher(features, order, kind, kinds.build(kind, features)[0])
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
    features, queries = clustered(3000, size)[:2900], clustered(3000, size)[2900:]
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


def test_a_graph_with_ranges_of_its_first_gallery_serves_until_it_is_made_anew(run, folder, checkpoint):
    lists = run("--index", "hnsw")
    described = folder / "out" / "index" / "index.json"
    content = json.loads(described.read_text())
    del content["kinds"]["hnsw"]["parameters"]["range"]
    described.write_text(json.dumps(content))
    assert GalleryIndex(described.parent, FeatureExtractor(checkpoint, "cpu"), "hnsw").size == 14
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


class Page(HTMLParser):
    """The images and the texts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images, self.texts, self.tags = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))
        assert all((path.parent / unquote(source)).is_file() for source, _ in self.images)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append((dict(attrs)["src"], dict(attrs)["alt"]))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_persons_cameras_and_odd_names(tmp_path):
    path = search_page(tmp_path)
    page, text = Page(path), path.read_text()
    dataset = load_dataset(tmp_path / "street")
    content = json.loads((path.parent / "ranked.json").read_text())
    # The splits of the dataset, and the files beside it.
    assert len(content["queries"]) == len(dataset.query) + 3 and content["index"]["images"] == len(dataset.gallery) + 2
    first, found = dataset.query[0], content["queries"][0]["matches"][0]
    assert content["queries"][0] == {**content["queries"][0], "pid": first.pid, "camid": first.camid}
    assert f"person {first.pid}, camera {first.camid}" in text
    assert ("✓" if found["pid"] == first.pid else "✗") in text
    assert "b" not in page.tags and any('<b> & "quotes" #1%20.png' in words for words in page.texts)
    assert any(alt.endswith('<b> & "quotes" #1%20.png') for _, alt in page.images)
    assert "no\ufffdutf8.png" in page.texts
    overlays = [source for source, alt in page.images if alt == "its attention"]
    assert 2 * len(overlays) == len(page.images) > 20
    assert {src for src, _ in page.images} == {
        f"search_images/{file.name}" for file in (path.parent / "search_images").iterdir()
    }
    plain, overlaid = (np.asarray(page_module.Image.open(path.parent / src)) for src, _ in page.images[:2])
    assert plain.shape == overlaid.shape == (32, 16, 3) and not np.array_equal(plain, overlaid)


def drawn_set(folder: Path, **pids: list[int]) -> str:
    """The dataset of `manifest`, with images that differ."""
    manifest(folder, **pids)
    draw(folder, [f"{split}{number}.jpg" for split in pids for number in range(len(pids[split]))], len(str(folder)))
    return str(folder)


@pytest.mark.parametrize(
    ("query", "gallery", "said"),
    [
        # One numbering: persons, another person, and a distractor, who is nobody that was searched for.
        ("market", "market", {("market", 7): True, ("market", 8): False, ("market", 0): False}),
        # The same numbers are other persons elsewhere.
        ("elsewhere", "market", {("market", 7): None, ("market", 8): None, ("market", 0): None}),
        # All of a set without queries, of which no two distractors are one person.
        ("grid", "grid", {("grid", 0): None, ("grid", 7): False}),
        # Here 0 is a person.
        ("zero", "zero", {("zero", 0): True, ("zero", 7): False}),
        # Images without identities.
        ("plain", "market", {("market", 7): None, ("market", 8): None, ("market", 0): None}),
    ],
)
def test_the_same_person_is_said_of_one_numbering_and_not_of_distractors(run, tmp_path, query, gallery, said):
    drawn_set(tmp_path / "market", query=[7], gallery=[7, 8, 0])
    drawn_set(tmp_path / "elsewhere", query=[7])
    drawn_set(tmp_path / "grid", test=[0, 0, 7])
    drawn_set(tmp_path / "zero", query=[0], gallery=[0, 7])
    draw(tmp_path / "plain", ["a.png"], seed=9)
    lists, page = run("--gallery", tmp_path / gallery, "--query", tmp_path / query), tmp_path / "out" / "index.html"
    found = {(Path(each["path"]).parent.name, each["pid"]): each["same_person"] for each in lists[0]["matches"]}
    assert found == said
    of_all = [match["same_person"] for each in lists for match in each["matches"]]
    for words, value in (("same person", True), ("another person", False)):
        assert page.read_text().count(words) == of_all.count(value)


def test_an_image_of_two_galleries_is_of_the_numbering_of_the_first(run, tmp_path):
    market = drawn_set(tmp_path / "market", query=[7], gallery=[7])
    rows = ["path,pid,camid,split", "../market/gallery0.jpg,7,2,gallery"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.csv").write_text("\n".join(rows) + "\n")
    for gallery, said in (([market, other], True), ([other, market], None)):
        (query,) = run("--gallery", *gallery, "--query", market)
        assert [each["same_person"] for each in query["matches"]] == [said]


def test_without_attention_there_is_no_overlay_and_what_is_not_shown_goes(run, folder, monkeypatch):
    run("--query", folder / "queries" / "a.png", "--top", 2)
    before = {file.name for file in (folder / "out" / "search_images").iterdir()}
    monkeypatch.setattr(page_module, "SHOWN", 1)
    run("--query", folder / "gallery" / "08.png", folder / "queries" / "b.png", "--top", 2)
    after = {file.name for file in (folder / "out" / "search_images").iterdir()}
    assert len(before) == len(after) == 3 and before != after
    page = folder / "out" / "index.html"
    assert "The first 1 queries are shown; ranked.json has all 2." in page.read_text()
    assert "The network has no spatial attention" in page.read_text()
    assert len(Page(page).images) == 3 and "its attention" not in page.read_text()


@pytest.mark.parametrize("gallery", [".", "**/*.[jp][pn]g"])
def test_among_the_gallery_it_takes_nothing_and_finds_no_picture_of_its_page(
    run, folder, monkeypatch, embedded, gallery
):
    """OUT is the folder that is searched in, and some of its images lie where a page had its own."""
    monkeypatch.chdir(folder / "gallery")
    draw(Path("images"), ["own.png"], seed=5)
    for name in ("images/mine.jpg", "search_images/mine.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        page_module.Image.open("images/own.png").save(name)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    flags = ("--gallery", gallery, "--out", ".", "--top", 3)
    lists = run(*flags)
    for query in ("a.png", "b.png"):
        embedded.clear()
        run(*flags, "--query", folder / "queries" / query)
        assert sum(embedded) == 1, "the query alone"
    assert run(*flags) == lists
    assert {path: path.read_bytes() for path in before} == before
    assert not any("search_images" in path for path in sum(paths_of(lists), []))


def test_what_is_listed_is_of_the_gallery_that_was_asked_for(run, folder, monkeypatch, capsys):
    """A second search with the same OUT, which comes when the first has brought the index up to date."""
    draw(folder / "others", ["x.png", "y.png"], seed=9)
    update = search_command.update_index

    def another_comes(*arguments):
        done = update(*arguments)
        monkeypatch.setattr(search_command, "update_index", update)
        run("--gallery", folder / "others", code=1)
        return done

    monkeypatch.setattr(search_command, "update_index", another_comes)
    lists = run()
    assert f"{folder / 'out'} is in use by process" in capsys.readouterr().err
    assert {str(Path(path).parent) for path in sum(paths_of(lists), [])} == {str(folder / "gallery")}


def test_pictures_of_another_search_are_not_found(run, folder):
    """The page of a search that lies in the gallery shows queries, which would be found first."""
    run("--out", folder / "gallery" / "first")
    lists = run("--out", folder / "gallery" / "second")
    assert not any("search_images" in path for path in sum(paths_of(lists), []))
    assert len(find_images([str(folder / "gallery" / "first" / "search_images")])) == 1, "asked for by its own name"


def test_what_does_not_fit_an_index_is_said(run, folder, checkpoint):
    run()
    extractor = FeatureExtractor(checkpoint, "cpu")
    index = GalleryIndex(folder / "out" / "index", extractor)
    for shape in ((4,), (1, 3)):
        with pytest.raises(ValueError, match=r"features must be \(Q, \d+\), as the network gives them, got"):
            index.search(np.zeros(shape, np.float32), places=1)
    with pytest.raises(ValueError, match="places is 0: at least 1 is needed"):
        index.search(np.zeros((1, index.size), np.float32), places=0)
    with pytest.raises(ValueError, match="kind must be one of flat, hnsw, ivfpq, got 'tree'"):
        update_index(folder / "new", extractor, [], "tree")
    assert not (folder / "new").exists()


def test_a_page_of_ones_own_is_not_written_over(run, folder, embedded, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "index.html").write_text("<h1>My holidays</h1>")
    run(code=1)
    assert "index.html is not a page of dan_fast: choose another folder, or move it away." in capsys.readouterr().err
    assert not embedded and [path.name for path in (folder / "out").iterdir()] == ["index.html"]


def test_persons_and_cameras_may_be_numbers_of_numpy(folder, checkpoint):
    samples = [Sample(path, np.int64(1), np.int32(2)) for path in sorted((folder / "gallery").iterdir())]
    extractor = FeatureExtractor(checkpoint, "cpu", workers=0)
    assert update_index(folder / "index", extractor, samples).added == len(samples)
    assert update_index(folder / "index", extractor, samples).kept == len(samples)


def test_a_second_index_leaves_the_first_as_it_is(folder, checkpoint, monkeypatch):
    """It comes before the first one's first batch, when that has no features yet."""
    extractor, images = FeatureExtractor(checkpoint, "cpu"), find_images([str(folder / "gallery")])[0].samples
    batches = FeatureExtractor.batches

    def another_comes(self, paths):
        with monkeypatch.context() as patch, pytest.raises(DanFastError, match="is in use by process"):
            patch.setattr(FeatureExtractor, "batches", batches)
            update_index(folder / "index", extractor, images)
        yield from batches(self, paths)

    monkeypatch.setattr(FeatureExtractor, "batches", another_comes)
    assert update_index(folder / "index", extractor, images).added == len(images)
    assert GalleryIndex(folder / "index", extractor).size == len(images)


def test_an_image_behind_a_link_and_back_is_known_by_the_file_that_it_is(folder, checkpoint):
    real = folder / "real"
    (real / "store").mkdir(parents=True)
    (folder / "set").symlink_to(real / "store")
    draw(real / "images", ["a.png"])
    extractor, index = FeatureExtractor(checkpoint, "cpu"), folder / "index"
    (sample,) = find_images([str(folder / "set/../images/a.png")])[0].samples
    update_index(index, extractor, [sample])
    assert [each.path for each in GalleryIndex(index, extractor).images] == [real / "images/a.png"]
    draw(real / "images", ["a.png"], seed=9)
    assert update_index(index, extractor, [sample]).changed == [real / "images/a.png"]


def test_the_hash_is_of_all_that_features_depend_on():
    def network(**settings) -> str:
        torch.manual_seed(0)
        return gallery_index.weights_hash(DAN(2, "resnet18", (32, 16), **settings))

    assert network() == network() != network(feature="pooled")
