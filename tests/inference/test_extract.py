"""`dan-fast extract`: what is in its files, what paths name, and how it goes on after a stop."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dan_fast import FeatureExtractor
from dan_fast.cli import main
from dan_fast.core.files import alone
from dan_fast.data import load_dataset
from dan_fast.data.samples import SPLITS
from dan_fast.data.synthetic import synthesize
from dan_fast.evaluation import evaluate_ranking, extract_dataset
from dan_fast.inference import feature_file
from dan_fast.inference.sources import find_images
from tests.support import ROOT
from tests.support.dataset_shelf import touch
from tests.support.refusals import refusal
from tests.support.searches import draw, stopped_at
from tests.support.tiny_training import wait_until
from tests.support.untrained import untrained_checkpoint

# 48 images of 3 make 16 batches, two chunks.
BATCH, IMAGES = 3, 48


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images without identities, in folders, beside what is none."""
    root, names = tmp_path / "photos", [f"{number:02d}.{'png' if number % 2 else 'BMP'}" for number in range(IMAGES)]
    for place, letter in enumerate("abc"):
        draw(root / letter, names[place::3], seed=place)
    touch(root, ["notes.txt", "a/._00.png", ".trash/1.png"])
    return root


@pytest.fixture
def run(checkpoint, tmp_path):
    """Extract and give what the file holds; other flags win."""

    def run(*arguments: object, code: int = 0, out: Path = tmp_path / "features.npz") -> dict[str, np.ndarray]:
        flags = ["--checkpoint", checkpoint, "--device", "cpu", "--workers", 0, "--batch_size", BATCH, "--out", out]
        assert main(["extract", *map(str, [*flags, *arguments])]) == code
        return dict(np.load(out)) if out.exists() else {}

    return run


def files_of(folder: Path) -> list[Path]:
    return sorted([*folder.glob("?/[0-9]*.png"), *folder.glob("?/*.BMP")])


def broken_in(folder: Path, place: int) -> Path:
    path = files_of(folder)[place]
    path.write_bytes(path.read_bytes()[:60])
    return path


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["a.jpg", "query/b.jpg"], {"": 2}),
        (["query/b.jpg"], {"": 1}),
        (["query/0001_c1_b.jpg", "query/0002_c2_b.jpg"], {"query": 2}),
        (["a.jpg", "bounding_box_test/b.jpg"], None),
    ],
)
def test_a_folder_called_query_makes_no_dataset_of_other_images(tmp_path: Path, files, splits):
    touch(tmp_path, files)
    if splits is None:
        said = refusal(find_images, [str(tmp_path)])
        assert "b.jpg is not named like a Market-1501 image " in said and "; rename it, or describe" in said
    else:
        assert {part.split: len(part.samples) for part in find_images([str(tmp_path)])} == splits


def test_a_dataset_gives_what_is_evaluated_to_the_last_bit(run, checkpoint, street, capsys):
    found = run(street)
    dataset, extract = load_dataset(street), FeatureExtractor(checkpoint, "cpu")
    network, size = extract.network, extract.image_size
    made = extract_dataset(network.embed, dataset, size, batch_size=BATCH, preprocessing=network.preprocessing)
    for split in ("query", "gallery"):
        chosen, samples, expected = found["splits"] == split, getattr(dataset, split), getattr(made, split)
        assert len(samples) == chosen.sum() > BATCH
        assert torch.equal(torch.from_numpy(found["features"][chosen]), F.normalize(expected.features))
        assert found["paths"][chosen].tolist() == [str(sample.path) for sample in samples]
        assert found["pids"][chosen].tolist() == [sample.pid for sample in samples]
        assert found["camids"][chosen].tolist() == [sample.camid for sample in samples]
    assert (found["splits"] == "train").sum() == len(dataset.train) > 0
    assert f"{len(dataset.query)} images of the query split" in capsys.readouterr().out


def test_of_several_datasets_each_is_scored_by_its_rows(run, checkpoint, street, folder, tmp_path):
    """Two of one name, whose persons have the same numbers, and images without identities."""
    synthesize(tmp_path / "other", ["street"], identities=6, cameras=2, image_size=(32, 16), seed=1, test_fraction=0.5)
    targets = [street, tmp_path / "other" / "street"]
    found = run(targets[0], folder / "a", targets[1], targets[0] / "manifest.csv")
    titles = [f"{target.parent.name}/street" for target in targets]
    again = found["datasets"].tolist()
    counts = [sum(len(getattr(load_dataset(target), split)) for split in SPLITS) for target in targets]
    # The first is named twice.
    assert again == [titles[0]] * counts[0] + [""] * 16 + [titles[1]] * counts[1] + [titles[0]] * counts[0]
    once = np.arange(len(again)) < len(again) - counts[0]
    figures = tmp_path / "figures.json"
    evaluate = f"evaluate --checkpoint {checkpoint} --workers 0 --device cpu --out {figures} --batch_size {BATCH}"
    assert main([*evaluate.split(), "--targets", f"[{targets[0]}, {targets[1]}]"]) == 0
    scored = json.loads(figures.read_text())
    assert [each["dataset"] for each in scored] == titles
    for title, expected in zip(titles, scored, strict=True):
        rows = [once & (found["datasets"] == title) & (found["splits"] == split) for split in ("query", "gallery")]
        arguments = [found[name][side] for name in ("features", "pids", "camids") for side in rows]
        assert evaluate_ranking(*arguments, metric="cosine").mAP == expected["mAP"]


def test_what_paths_name(run, folder, street):
    everything = run(folder)
    assert everything["paths"].tolist() == [str(path) for path in files_of(folder)]
    assert everything["features"].shape == (IMAGES, 96) and everything["features"].dtype == np.float32
    assert set(everything["pids"]) == set(everything["camids"]) == {-1} and set(everything["splits"]) == {""}
    assert set(everything["datasets"]) == {""}
    assert run(f"{folder}/**/*.png")["paths"].tolist() == [str(p) for p in files_of(folder) if p.suffix == ".png"]
    a, b = folder / "a", folder / "b"
    mixed = run(b / "01.png", a, street / "manifest.csv", f"{b}/0[14].*")
    expected = [b / "01.png", *(path for path in files_of(folder) if path.parent == a)]
    images = load_dataset(street)
    expected += [sample.path for split in (images.train, images.query, images.gallery) for sample in split]
    assert mixed["paths"].tolist() == [str(path) for path in [*expected, b / "01.png", b / "04.BMP"]]


@pytest.mark.parametrize(
    ("files", "links", "found"),
    [
        (["a@2x.jpg", "b@2x.jpg", "c.jpg"], {}, {"*@2x.jpg": ["a@2x.jpg", "b@2x.jpg"]}),
        (
            ["x [1]/a.jpg", "x [1]/b.png", "x 1/c.jpg"],
            {},
            {"x [1]/*.jpg": ["x [1]/a.jpg"], "x [1-3]/*.jpg": ["x 1/c.jpg"]},
        ),
        # A pattern takes each file once, whatever links lead to it.
        (
            ["a/1.jpg", "a/2.jpg", "b/1.jpg"],
            {"a/loop": ".", "0": "b"},
            {"**/*.jpg": ["a/1.jpg", "a/2.jpg", "b/1.jpg"], "0/*.jpg": ["0/1.jpg"]},
        ),
        # Links to folders are followed, and one to a folder above ends; of a folder that is there twice the link
        # counts as nothing, whatever comes first.
        (
            ["frames/cam1/a.jpg", "elsewhere/b.jpg", "elsewhere/.hidden/c.jpg"],
            {
                "frames/cam2": "elsewhere",
                "frames/cam1/up": "frames",
                "frames/all": "frames/cam1",
                "frames/z": "frames/cam1",
            },
            dict.fromkeys(["frames", "frames/cam[12]/*.jpg"], ["frames/cam1/a.jpg", "frames/cam2/b.jpg"]),
        ),
    ],
    ids=["an at sign is no variant", "brackets in the name of a folder", "links to folders", "links in a folder"],
)
def test_the_images_of_a_folder_or_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files, links, found):
    touch(tmp_path, files)
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    monkeypatch.chdir(tmp_path)
    for given, names in found.items():
        for folder in (Path(), tmp_path):
            (part,) = find_images([str(folder / given)])
            assert [sample.path for sample in part.samples] == [folder / name for name in names]


def test_images_beside_a_dataset_below_a_folder_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    touch(tmp_path, ["VIPeR/cam_a/000_45.bmp", "VIPeR/cam_b/000_90.bmp", "holiday/1.jpg", "top.jpg"])
    (part,) = find_images([str(tmp_path)])
    assert [sample.path.parent.name for sample in part.samples] == ["cam_a", "cam_b"]
    others = f"2 other images below it, such as {tmp_path / 'holiday/1.jpg'}, are left out"
    assert f"{tmp_path} is read as VIPeR, which lies at {tmp_path / 'VIPeR'}: {others}" in caplog.text
    caplog.clear()
    find_images([str(tmp_path / "VIPeR")])
    assert "left out" not in caplog.text


def test_a_folder_below_that_cannot_be_read_is_not_left_out(tmp_path: Path):
    touch(tmp_path, ["a/1.jpg", "b/2.jpg"])
    scan = os.scandir

    def refuse(place):
        if Path(place).name == "b":
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    # Not for longer: pytest looks into the folder once more to remove it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        said = refusal(find_images, [str(tmp_path)])
    assert said.endswith("b cannot be read (Permission denied); check permissions.")


def test_a_name_that_parquet_cannot_hold_is_refused_before_images_are_read(run, folder, tmp_path, embedded, capsys):
    pytest.importorskip("pyarrow")
    shutil.copy(files_of(folder)[0], folder / os.fsdecode(b"caf\xe9.jpg"))
    run(folder, "--out", tmp_path / "features.parquet", code=1)
    sentence = "is not UTF-8, of which Parquet's texts are: rename it, or write a .npz file."
    assert sentence in capsys.readouterr().err
    assert not embedded and [path.name for path in tmp_path.iterdir()] == ["photos"]
    # The name of a dataset, too.
    named = folder / os.fsdecode(b"caf\xe9.csv")
    named.write_text("path,pid,camid,split\na/00.BMP,1,1,query\n")
    run(named, "--out", tmp_path / "features.parquet", code=1)
    assert sentence in capsys.readouterr().err and not embedded


def test_a_parquet_file_holds_the_same(run, folder, street, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    found, out = run(folder, street), tmp_path / "features.parquet"
    out.touch()  # as mktemp makes it
    run(folder, street, "--out", out)
    table = parquet.read_table(out)
    assert table.column_names == list(found)
    features = table.column("features").combine_chunks()
    assert np.array_equal(features.flatten().to_numpy().reshape(-1, features.type.list_size), found["features"])
    for name in ("paths", "pids", "camids", "splits", "datasets", "weights"):
        assert table.column(name).to_pylist() == found[name].tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npz", "features.parquet", "photos"]


def test_without_pyarrow_it_says_what_to_install(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    run(folder, "--out", tmp_path / "features.parquet", code=1)
    assert "pip install 'dan-fast[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["photos/empty"], "photos/empty holds no image"),
        (["nowhere"], "There is nothing at nowhere"),
        (["~nobody-of-this-name/x"], "There is nothing at ~nobody-of-this-name/x"),
        (["photos/*.gif"], "There is nothing at photos/*.gif"),
        (["nowhere@new"], "There is no dataset at nowhere"),
        ([""], "The path of images is empty, as by a variable of the shell that is not set"),
        (["photos/notes.txt"], "The image photos/notes.txt cannot be decoded (it is no image that Pillow knows)"),
        (["photos/a", "photos/wrong.csv"], "photos/wrong.csv lacks the column pid"),
        (["photos/a", "--checkpoint", "none.pt"], "none.pt does not exist"),
        (["photos/a", "--out", "features.csv"], "features.csv ends in neither .npz nor .parquet"),
        (["photos/a", "--out", "photos"], "photos is a folder"),
        (["photos/a", "--out", "/proc/none/features.npz"], "cannot be written"),
        (["photos/a", "--out", "photos/own.npz"], "photos/own.npz holds no features of this command"),
        (["photos/a", "--out", "photos/own.parquet"], "photos/own.parquet holds no features of this command"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(run, folder, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (folder / "empty").mkdir()
    (folder / "wrong.csv").write_text("path\n")
    np.savez("photos/own.npz", paths=np.arange(3))
    Path("photos/own.parquet").write_text("mine")
    run(*arguments, code=1)
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert np.load("photos/own.npz")["paths"].size == 3 and Path("photos/own.parquet").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_an_image_that_cannot_be_decoded_stops_or_is_marked(run, folder, tmp_path, embedded, capsys):
    whole, broken = run(folder), broken_in(folder, 30)
    out = tmp_path / "again.npz"
    embedded.clear()
    run(folder, "--out", out, code=1)
    assert str(broken) in capsys.readouterr().err and not out.exists()
    assert sum(embedded) == 30
    skipping = run(folder, "--broken_images", "skip", out=out)
    assert sum(embedded) == 30 + 6 + 17, "the first chunk of 24 is taken from the call that failed"
    assert np.array_equal(np.isnan(skipping["features"]).all(axis=1), np.arange(IMAGES) == 30)
    kept = np.arange(IMAGES) // BATCH != 30 // BATCH
    assert np.array_equal(skipping["features"][kept], whole["features"][kept])
    assert skipping["paths"].tolist() == whole["paths"].tolist()
    assert f"Skipped {broken}" in capsys.readouterr().out


def test_a_part_that_is_cut_short_is_made_anew_and_what_lies_beside_stays(run, folder, tmp_path, embedded):
    whole, out = run(folder), tmp_path / "again.npz"
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(10, patch)
        run(folder, "--out", out, code=130)
    (part,) = Path(f"{out}.part").iterdir()
    part.write_bytes(part.read_bytes()[:50])
    (part.parent / "notes.txt").write_text("of somebody else")
    (part.parent / f".{part.name}.0a.part").touch()  # of a process that was killed while it wrote
    embedded.clear()
    again = run(folder, out=out)
    assert sum(embedded) == IMAGES
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert [path.name for path in part.parent.iterdir()] == ["notes.txt"]


def test_an_interrupted_one_goes_on_where_it_was(run, folder, tmp_path, embedded, capsys):
    whole, out = run(folder), tmp_path / "again.npz"
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(10, patch)
        run(folder, "--out", out, code=130)
    printed = capsys.readouterr()
    assert f"What is done lies in {out}.part: the same command goes on" in printed.out and "interrupted" in printed.err
    assert not out.exists() and len(list(Path(f"{out}.part").iterdir())) == 1
    embedded.clear()
    again = run(folder, out=out)
    assert sum(embedded) == 24
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "features.npz", "photos"]


def test_of_a_shared_folder_the_features_are_those_of_its_checkpoint(run, folder, checkpoint, tmp_path):
    assert main(["share", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "shared")]) == 0
    given = run(folder)
    shared = run(folder, "--checkpoint", tmp_path / "shared", out=tmp_path / "of_shared.npz")
    assert np.array_equal(shared["features"], given["features"])


@pytest.mark.parametrize("change", ["image", "checkpoint", "batch size", "rounding", "torch", "decoder", "skipped"])
def test_what_has_changed_since_is_made_anew(run, folder, checkpoint, tmp_path, embedded, monkeypatch, change):
    more, images, place = [], [folder], 3
    if change == "skipped":
        broken_in(folder, place)
    with monkeypatch.context() as patch:
        stopped_at(10, patch)
        run(folder, "--broken_images", "skip", code=130)
    embedded.clear()
    if change == "image":
        Image.new("RGB", (9, 9), "red").save(files_of(folder)[place])
    if change == "checkpoint":
        more = ["--checkpoint", untrained_checkpoint(tmp_path / "other.pt", run={"seed": 7})]
    if change == "batch size":
        # Those of the first chunk, so that only the batches differ.
        more, images = ["--batch_size", 2 * BATCH], files_of(folder)[:24]
    if change == "rounding":
        monkeypatch.setattr(feature_file, "float32_rounding", lambda device: "TF32 in convolutions")
    if change == "torch":
        monkeypatch.setattr(feature_file, "torch", SimpleNamespace(cat=torch.cat, __version__="99"))
    if change == "decoder":
        monkeypatch.setattr(feature_file, "DECODED_BY", "Pillow 99")
    found = run(*images, *more, code=1 if change == "skipped" else 0)
    if change == "skipped":
        assert not found, "an image that was skipped is an error where none is to be"
        return
    assert sum(embedded) == (24 if change == "batch size" else IMAGES)
    changed = FeatureExtractor(more[1] if change == "checkpoint" else checkpoint, "cpu", BATCH)
    expected = changed(files_of(folder)).numpy()[: len(found["features"])]
    np.testing.assert_allclose(found["features"], expected, atol=1e-6)


def test_a_file_is_whole_where_a_lock_that_is_open_cannot_be_removed(run, folder, monkeypatch):
    """As on NFS, which keeps an open file under another name until it is closed, so that its folder is not empty."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", Mock(side_effect=OSError(errno.ENOTEMPTY, "Directory not empty")))
        assert len(run(folder)["paths"]) == IMAGES


def test_one_process_at_a_time_writes_a_file(run, folder, tmp_path, capsys):
    with alone(feature_file.chunk_folder(tmp_path / "features.npz") / ".lock"):
        run(folder, code=1)
    assert "is in use by process" in capsys.readouterr().err


# It embeds the batches of a chunk, and then waits to be killed.
HELD = """
import sys, time
from dan_fast.cli import main
from dan_fast.inference import FeatureExtractor
embed, done = FeatureExtractor._embed, []
def held(extractor, images):
    if len(done) > 8:
        time.sleep(600)
    done.append(len(images))
    return embed(extractor, images)
FeatureExtractor._embed = held
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_one_goes_on_and_leaves_nothing_else(run, folder, checkpoint, tmp_path, embedded):
    for copy in "defgh":
        shutil.copytree(folder / "a", folder / copy)
    out = tmp_path / "again.npz"
    flags = ["--checkpoint", checkpoint, "--device", "cpu", "--workers", 1, "--batch_size", BATCH, "--out", out]
    process = subprocess.Popen([sys.executable, "-c", HELD, "extract", folder, *map(str, flags)], cwd=ROOT)
    wait_until(lambda: process.poll() is not None or list(Path(f"{out}.part").glob("[!.]*.npy")))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    again = run(folder, out=out)
    assert sum(embedded) < len(again["paths"]) == IMAGES + 5 * 16
    whole = run(folder)
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "features.npz", "photos"]
