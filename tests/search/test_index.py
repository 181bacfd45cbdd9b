"""An index of a gallery: how it is extended, of which network and decoder it is."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from dan_fast import DanFastError, FeatureExtractor
from dan_fast.cli import main
from dan_fast.commands import search as search_command
from dan_fast.data.images import reading
from dan_fast.inference.sources import find_images
from dan_fast.nn import DAN
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.search import GalleryIndex, gallery_index, update_index
from dan_fast.search.index_folder import IndexFolder
from tests.support.refusals import refusal
from tests.support.searches import draw, paths_of
from tests.support.untrained import untrained_checkpoint


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


def test_persons_and_cameras_may_be_numbers_of_numpy(folder, extractor, images):
    samples = [image._replace(pid=np.int64(1), camid=np.int32(2)) for image in images]
    assert update_index(folder / "index", extractor, samples).added == len(samples)
    others = [sample._replace(pid=np.int64(3)) for sample in samples]
    assert update_index(folder / "index", extractor, others).kept == len(samples)
    assert {image.pid for image in GalleryIndex(folder / "index", extractor).images} == {3}


def test_an_image_behind_a_link_and_back_is_known_by_the_file_that_it_is(folder, extractor):
    real, index = folder / "real", folder / "index"
    (real / "store").mkdir(parents=True)
    (folder / "set").symlink_to(real / "store")
    draw(real / "images", ["a.png"])
    (sample,) = find_images([str(folder / "set/../images/a.png")])[0].samples
    update_index(index, extractor, [sample])
    assert [each.path for each in GalleryIndex(index, extractor).images] == [real / "images/a.png"]
    draw(real / "images", ["a.png"], seed=9)
    assert update_index(index, extractor, [sample]).changed == [real / "images/a.png"]


def test_a_second_index_leaves_the_first_as_it_is(folder, extractor, images, monkeypatch):
    """It comes before the first one's first batch, when that has no features yet."""
    batches = FeatureExtractor.batches

    def another_comes(self, paths):
        with monkeypatch.context() as patch, pytest.raises(DanFastError, match="is in use by process"):
            patch.setattr(FeatureExtractor, "batches", batches)
            update_index(folder / "index", extractor, images)
        yield from batches(self, paths)

    monkeypatch.setattr(FeatureExtractor, "batches", another_comes)
    assert update_index(folder / "index", extractor, images).added == len(images)
    assert GalleryIndex(folder / "index", extractor).size == len(images)


def test_files_that_are_not_of_the_index_stay(folder, extractor, images):
    index = folder / "index"
    index.mkdir()
    for name in ("gallery.faiss", "hnsw-7.faiss", ".index.json.0a.part"):
        (index / name).touch()
    update_index(index, extractor, images)
    assert sorted(path.name for path in index.iterdir()) == ["features.f32", "gallery.faiss", "index.json"]


def test_what_does_not_fit_an_index_is_said(run, folder, extractor):
    run()
    index = GalleryIndex(folder / "out" / "index", extractor)
    for shape in ((4,), (1, 3)):
        with pytest.raises(ValueError, match=r"features must be \(Q, \d+\), as the network gives them, got"):
            index.search(np.zeros(shape, np.float32), places=1)
    with pytest.raises(ValueError, match="places is 0: at least 1 is needed"):
        index.search(np.zeros((1, index.size), np.float32), places=0)
    with pytest.raises(ValueError, match="features holds NaN or Inf: leave the images out"):
        index.search(np.full((1, extractor.size), np.nan, np.float32), places=1)
    with pytest.raises(ValueError, match="kind must be one of flat, hnsw, ivfpq, got 'tree'"):
        update_index(folder / "new", extractor, [], "tree")
    assert "The gallery is empty: name images to search in" in refusal(update_index, folder / "new", extractor, [])
    with pytest.raises(TypeError, match=r"gallery must hold dan_fast.data.Sample, got PosixPath: of a path whose"):
        update_index(folder / "new", extractor, [folder])
    assert not (folder / "new").exists()


def test_what_cannot_be_read_is_not_to_be_removed(run, folder, checkpoint, extractor):
    run()
    for file in (checkpoint, folder / "out" / "index" / "index.json"):
        said = f"{file}/index.json cannot be read (Not a directory): name the folder"
        assert said in refusal(GalleryIndex, file, extractor)


def test_who_has_an_index_open_keeps_it_when_it_is_made_anew(run, folder, extractor, images):
    run()
    index = folder / "out" / "index"
    opened, query = GalleryIndex(index, extractor), extractor(images[3].path).numpy()
    before = opened.search(query, 5)
    (index / "index.json").unlink()
    # In a truncated file the rows that are mapped would not be there any more, which ends the process.
    assert update_index(index, extractor, images[:1]).added == 1
    assert np.array_equal(opened.search(query, 5).rows, before.rows)


def test_the_home_folder_is_written_out(folder, extractor, images, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    update_index("~/of_mine", extractor, images)
    assert (folder / "of_mine" / "index.json").exists() and GalleryIndex("~/of_mine", extractor).size == 14


def test_a_kind_that_lacks_what_is_new_is_named(run, folder, extractor, capsys):
    run("--index", "hnsw")
    assert "lacks what is new" not in capsys.readouterr().out
    draw(folder / "gallery", ["new.png"], seed=3)
    run()
    assert "The hnsw index lacks what is new: the same command with --index hnsw adds it." in capsys.readouterr().out
    assert "holds no finished hnsw index" in refusal(GalleryIndex, folder / "out" / "index", extractor, "hnsw")
    run("--index", "hnsw")
    assert "lacks what is new" not in capsys.readouterr().out


def test_of_another_checkpoint_it_is_refused(run, folder, checkpoint, embedded, capsys):
    run()
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    other = untrained_checkpoint(folder / "other.pt", run={"seed": 7})
    embedded.clear()
    run("--checkpoint", other, code=1)
    assert not embedded, "not even the queries"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{folder}/out/index is an index of another checkpoint (weights " in error
    assert before == {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    shutil.copy(checkpoint, folder / "moved.pt")
    assert main(["share", "--checkpoint", str(checkpoint), "--out", str(folder / "shared")]) == 0
    for same in ("moved.pt", "shared"):
        assert paths_of(run("--checkpoint", folder / same)) == paths_of(
            json.loads(before[folder / "out/ranked.json"])["queries"]
        )


def test_the_hash_is_of_all_that_features_depend_on():
    def network(size=(32, 16), interpolation="bilinear", **settings) -> str:
        torch.manual_seed(0)
        made = DAN(2, "resnet18", size, **settings)
        made.preprocessing = made.preprocessing._replace(interpolation=interpolation)
        return weights_hash(made)

    first = network()
    others = network((32, 32)), network(interpolation="bicubic"), network(feature="pooled")
    assert network() == first and len({first, *others}) == 4


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


def test_a_search_reads_the_list_of_images_once_unless_it_changes(run, folder, monkeypatch, capsys):
    run()
    read, update, names = IndexFolder._read, search_command.update_index, []
    monkeypatch.setattr(IndexFolder, "_read", lambda self, name: names.append(name) or read(self, name))
    lists = run("--top", 20)
    assert names.count("index.json") == 1

    def another_came(known, *arguments):
        draw(folder / "gallery", ["new.png"], seed=6)
        update(folder / "out" / "index", *arguments)
        return update(known, *arguments)

    monkeypatch.setattr(search_command, "update_index", another_came)
    assert run("--top", 20) == lists and names.count("index.json") == 4

    def another_cut_it(known, *arguments):
        os.truncate(folder / "out" / "index" / "features.f32", 4)
        return update(known, *arguments)

    monkeypatch.setattr(search_command, "update_index", another_cut_it)
    run("--top", 20, code=1)
    assert "features.f32 is cut short" in capsys.readouterr().err


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
