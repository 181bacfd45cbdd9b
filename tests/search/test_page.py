"""The page of a search, and its pictures."""

import json
import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from dan_fast.core.files import alone
from dan_fast.data import load_dataset
from dan_fast.inference.sources import find_images
from dan_fast.reporting import search_page as page_module
from tests.support.searches import draw, paths_of, search_page
from tests.support.written_sets import manifest


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


def test_a_page_of_ones_own_is_not_written_over(run, folder, embedded, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "index.html").write_text("<h1>My holidays</h1>")
    run(code=1)
    assert "index.html is not a page of dan_fast: choose another folder, or move it away." in capsys.readouterr().err
    assert not embedded and [path.name for path in (folder / "out").iterdir()] == ["index.html"]
    (folder / "out" / "index.html").unlink()
    (folder / "out" / "ranked.json").write_text('{"mine": 1}')
    run(code=1)
    assert "ranked.json" in capsys.readouterr().err
    assert not embedded and (folder / "out" / "ranked.json").read_text() == '{"mine": 1}'


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


def test_pictures_of_another_search_are_not_found(run, folder):
    """The page of a search that lies in the gallery shows queries, which would be found first."""
    run("--out", folder / "gallery" / "first")
    lists = run("--out", folder / "gallery" / "second")
    assert not any("search_images" in path for path in sum(paths_of(lists), []))
    assert len(find_images([str(folder / "gallery" / "first" / "search_images")])) == 1, "asked for by its own name"
