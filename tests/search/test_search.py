"""`dan-fast search`: the order of its lists, which images it takes, and what it refuses."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from dan_fast import FeatureExtractor
from dan_fast.commands import search as search_command
from dan_fast.evaluation import pairwise_distances
from tests.support.searches import draw, paths_of
from tests.support.written_sets import manifest


def test_lists_are_those_of_the_evaluation(run, folder, checkpoint):
    shutil.copy(folder / "gallery" / "03.png", folder / "queries" / "d.png")
    # Of more than 16 a sort that is not stable may change the order.
    draw(folder / "gallery", [f"more-{number}.png" for number in range(10)], seed=6)
    lists = run("--top", 10**12)
    extract = FeatureExtractor(checkpoint, "cpu", batch_size=4)
    query, gallery = (sorted((folder / name).iterdir()) for name in ("queries", "gallery"))
    distances = pairwise_distances(extract(query), extract(gallery))
    order = distances.argsort(dim=1, stable=True)
    assert [each["path"] for each in lists] == [str(path) for path in query]
    assert paths_of(lists) == [[str(gallery[place]) for place in row] for row in order.tolist()]
    scores = [[match["score"] for match in each["matches"]] for each in lists]
    # Products of whole matrices may round a number near a border of the grid to the other side.
    expected = 1 - distances.sort(dim=1).values
    torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), expected, rtol=0, atol=2**-40)
    assert [match["rank"] for match in lists[0]["matches"]] == list(range(1, 25))
    assert {(match["pid"], match["same_person"]) for match in lists[0]["matches"]} == {(None, None)}


def test_the_own_file_of_a_query_is_left_out(run, folder):
    for top, found in ((3, 3), (100, 13)):
        (own,) = run("--query", folder / "gallery" / "03.png", "--top", top)
        names = [Path(path).name for path in paths_of([own])[0]]
        assert names[0] == "00-copy.png" and "03.png" not in names and len(names) == found


def test_a_link_is_no_other_file(run, folder):
    """Neither of a query nor of an image of the gallery."""
    (folder / "street").symlink_to(folder / "gallery")
    (own,) = run("--query", folder / "street" / "03.png", "--top", 100)
    assert len(own["matches"]) == 13 and str(folder / "gallery" / "03.png") not in paths_of([own])[0]
    both = run("--gallery", folder / "gallery", folder / "street", "--top", 100, out="both")
    assert paths_of(both) == paths_of(run("--top", 100))


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
    draw(folder / "gallery", ["04.png"], seed=7)
    extended = paths_of(run("--broken_images", "skip", "--top", 20))
    assert str(broken[0]) in extended[0] and sum(embedded) == 2 + 1
    assert extended == paths_of(run("--broken_images", "skip", "--top", 20, out="new"))


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
