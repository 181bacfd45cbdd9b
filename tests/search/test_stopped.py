"""An index whose update was killed or stopped, or that is damaged."""

import errno
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dan_fast import FeatureExtractor
from dan_fast.nn import DAN
from dan_fast.search import GalleryIndex, gallery_index, index_folder, kinds, update_index
from tests.support.refusals import refusal
from tests.support.searches import draw, stopped_at
from tests.support.tiny_training import IMAGE_SIZE, OneConvolution


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_kill_at_any_moment_leaves_the_index_as_it_was(folder, images, tmp_path, monkeypatch, kind):
    """Copies of the folder, as a kill would leave it, before and after everything that is written."""
    extract = FeatureExtractor(DAN(2, OneConvolution(), IMAGE_SIZE, reduction=2), "cpu", batch_size=4)
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
        patch.setattr(index_folder, "write_index", copied(index_folder.write_index))
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
            assert "holds no finished" in refusal(GalleryIndex, copy, extract, kind)
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


def test_an_interrupt_between_any_two_lines_leaves_whole_rows(images, tmp_path):
    extract = FeatureExtractor(DAN(2, OneConvolution(), IMAGE_SIZE, reduction=2), "cpu", batch_size=2)
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
        patch.setattr(gallery_index, "DECODED_BY", "Pillow 99")
        stopped_at(2, patch)
        run(code=130)
    assert "the same command goes on from there" in capsys.readouterr().out
    embedded.clear()
    assert len(run()) == 3 and sum(embedded) == 3 + 14 - 8
    assert "Pillow 99" in json.loads((folder / "out" / "index" / "index.json").read_text())["decoded_by"]


def test_what_is_killed_goes_on_at_what_was_written_down(run, folder, embedded, monkeypatch):
    """An update of a finished index writes down its own images alone; so does the next one that goes on."""
    run()
    finished, unfinished = (folder / "out" / "index" / name for name in ("index.json", "unfinished.json"))
    before = finished.read_bytes()
    new = [f"new-{number:02d}.png" for number in range(16)]
    draw(folder / "gallery", new, seed=6)
    monkeypatch.setattr(gallery_index, "_SAVED", 4)
    save = index_folder.write_index
    for written in (8, 12):
        with monkeypatch.context() as patch:

            def killed(file: Path, stored: dict, most: int = written) -> None:
                if len(stored["paths"]) > most:
                    raise KeyboardInterrupt
                save(file, stored)

            patch.setattr(index_folder, "write_index", killed)
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


def test_an_index_that_is_opened_while_an_update_ends_is_the_new_one(run, folder, extractor, monkeypatch):
    run("--index", "hnsw")
    draw(folder / "gallery", ["new.png"], seed=6)
    read = kinds.read

    def late(path: Path, rows: int, size: int):
        with monkeypatch.context() as patch:
            patch.setattr(kinds, "read", read)
            run("--index", "hnsw")
            return read(path, rows, size)

    monkeypatch.setattr(kinds, "read", late)
    assert GalleryIndex(folder / "out" / "index", extractor, "hnsw").size == 15


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


def described(**changes: object) -> Callable[[Path], object]:
    """Another content of index.json."""
    return lambda index: (index / "index.json").write_text(
        json.dumps(json.loads((index / "index.json").read_text()) | changes)
    )


def shortened(name: str, size: int) -> Callable[[Path], object]:
    return lambda index: os.truncate(index / name, size)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shortened("features.f32", 100), "is cut short: remove"),
        (shortened("index.json", 100), "is no index .*: remove"),
        (shortened("hnsw-14.faiss", 200), "is missing or damaged: remove"),
        (lambda index: (index / "features.f32").unlink(), "lacks features.f32: remove"),
        (described(schema=9), "is of a newer version .*, or remove"),
        (described(schema=1), "is of an older version .*: remove"),
        (described(schema="x"), "is no index .*: remove"),
        (described(camids=[1]), "has lists of different lengths: remove"),
        (described(gallery=[14]), "is no index .it names rows that are not there.: remove"),
        (described(gallery=[-1]), "is no index .it names rows that are not there.: remove"),
        (described(gallery=None), "is no index .*: remove"),
        (described(kinds={"hnsw": {}}), "is no index .'file'.: remove"),
        (described(kinds=[]), "is no index .*: remove"),
    ],
)
def test_a_damaged_index_is_one_sentence(run, folder, extractor, capsys, damage, sentence):
    run("--index", "hnsw")
    index = folder / "out" / "index"
    damage(index)
    said = refusal(GalleryIndex, index, extractor, "hnsw")
    assert re.search(f"{index}.* {sentence}", said)
    capsys.readouterr()
    run("--index", "hnsw", code=1)
    assert capsys.readouterr().err == f"dan-fast: {said}\n"
    if "missing" in sentence:
        (index / "hnsw-14.faiss").unlink()
        assert len(run("--index", "hnsw")) == 3


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
