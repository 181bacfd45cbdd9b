"""What is found where: the walk, the counts, the listing, and images taken out of archives."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dan_fast.cli import main
from dan_fast.core.errors import DanFastError
from dan_fast.data import ReIDDataset, Sample, all_images, load_dataset
from dan_fast.data.datasets.cuhk03_archive import extract_cuhk03
from dan_fast.data.datasets.cuhk_sysu import extract_cuhk_sysu
from dan_fast.data.datasets.extraction import whole_folder
from dan_fast.data.datasets.known import KNOWN, check_counts, choose_variant, find_datasets
from dan_fast.data.samples import SPLITS, Counts
from tests.support.dataset_shelf import Shelf, tiny_image
from tests.support.refusals import refusal


def people(*numbers: tuple[int, int], folder: str = "x") -> tuple[Sample, ...]:
    return tuple(Sample(Path(folder, f"{index}.jpg"), *number) for index, number in enumerate(numbers))


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """As fast-reid keeps its datasets: all in one folder; and one of torchreid's, a level lower."""
    root = tmp_path / "datasets"
    tiny_image(root / "Market-1501-v15.09.15" / "bounding_box_train" / "0002_c1s1_000451_03.jpg")
    tiny_image(root / "DukeMTMC-reID" / "bounding_box_train" / "0001_c2_f0046182.jpg")
    drawn = Shelf(root)
    for version in ("V1", "V2"):
        drawn.msmt17(version)
    tiny_image(root / "cuhk03" / "images_detected" / "1_001_1_01.png")
    tiny_image(root / "torchreid" / "cuhk02" / "Dataset" / "P5" / "cam1" / "007_1.png")
    tiny_image(root / "synthetic" / "street" / "query" / "0001_c2_000001.jpg")
    return root


# Finding


def test_everything_is_found_once_where_it_lies(shelf: Path) -> None:
    found = find_datasets(shelf)
    assert {(each.known.name, each.variant, str(each.path.relative_to(shelf))) for each in found} == {
        ("market1501", "", "Market-1501-v15.09.15"),
        ("dukemtmc", "", "DukeMTMC-reID"),
        ("msmt17", "V1", "MSMT17_V1"),
        ("msmt17", "V2", "MSMT17_V2"),
        ("cuhk03", "", "cuhk03"),
        ("cuhk02", "", "torchreid/cuhk02/Dataset"),
    }
    assert len(found) == 6
    by_name = {each.known.name: each for each in found}
    assert by_name["cuhk02"].counts == {"query": Counts(1, 1, 1)}
    assert "lacks splits of CUHK03" in by_name["cuhk03"].error
    assert [each.path for each in find_datasets(shelf / "DukeMTMC-reID" / "bounding_box_train")] == [
        shelf / "DukeMTMC-reID"
    ]


def test_images_of_ones_own_that_are_named_like_market_1501s(tmp_path: Path, caplog, monkeypatch) -> None:
    for name in ("shop", "supermarket", "Market-1501-dev"):
        tiny_image(tmp_path / name / "bounding_box_train" / "0002_c1s1_000451_03.jpg")
    caplog.set_level("WARNING")
    assert [each.path.name for each in find_datasets(tmp_path)] == ["Market-1501-dev"]
    assert len(load_dataset(tmp_path / "shop").train) == len(load_dataset(tmp_path / "supermarket").train) == 1
    assert caplog.text == ""
    load_dataset(tmp_path / "Market-1501-dev")
    assert "of Market-1501-dev differs from Zheng et al., ICCV 2015: 1 instead of 751 identities" in caplog.text
    # As large as published, it is that under any name.
    published = KNOWN["market1501"].counts[""]
    monkeypatch.setitem(published, "train", published["train"]._replace(images=1))
    assert len(find_datasets(tmp_path)) == 3


def test_a_dataset_is_not_searched_for_others(shelf: Path) -> None:
    inner = shelf / "Market-1501-v15.09.15" / "gt_bbox"
    tiny_image(inner / "query" / "0001_c2_f0046182.jpg")
    assert len(find_datasets(shelf)) == 6
    tiny_image(shelf / "a" / "b" / "c" / "query" / "0001_c2_f0046182.jpg")
    assert len(find_datasets(shelf)) == 6
    assert len(find_datasets(shelf / "a")) == 1


def test_a_folder_that_only_the_system_may_read_is_passed_over(shelf: Path, caplog, monkeypatch) -> None:
    before = find_datasets(shelf)
    (shelf / "lost+found").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "lost+found" and access(path, mode))
    assert find_datasets(shelf) == before and before
    assert f"{shelf / 'lost+found'} cannot be read and is passed over." in caplog.text


def test_a_dataset_with_a_file_that_may_not_be_read_is_listed_with_the_reason(shelf: Path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError(13, "Permission denied", "list_train.txt")))
    errors = {each.known.name: each.error for each in find_datasets(shelf)}
    assert "Permission denied" in errors["msmt17"] and errors["market1501"] == ""


def test_of_twenty_splits_the_first_is_listed(tmp_path: Path) -> None:
    tiny_image(tmp_path / "images_detected" / "1_001_1_01.png")
    part = {"train": [["1_001_1_01.png", 0, 0]], "query": [], "gallery": []}
    (tmp_path / "splits_classic_detected.json").write_text(json.dumps([part] * 20))
    assert [each.variant for each in find_datasets(tmp_path)] == ["detected, classic protocol, split 1"]
    # "split 1" is not "split 10", nor one of the further words.
    assert choose_variant(KNOWN["cuhk03"], tmp_path, "split 2").endswith("split 2")
    assert load_dataset(tmp_path, variant="SPLIT 20").variant.endswith("split 20")


def test_several_datasets_below_a_folder_are_named(shelf: Path) -> None:
    message = refusal(load_dataset, shelf)
    assert message.startswith(f"{shelf} is the folder above ") and message.endswith("; give one of these instead.")
    # MSMT17's two versions make the folder itself a place of a dataset, and no remedy.
    assert f" and {shelf} and " not in message and f" and {shelf};" not in message
    assert str(shelf / "DukeMTMC-reID") in message and str(shelf / "cuhk03") in message
    street, duke = shelf / "synthetic" / "street", shelf / "DukeMTMC-reID"
    assert f"{street}; give that one instead" in refusal(load_dataset, street.parent)
    assert "has only one variant; leave 'new' out" in refusal(load_dataset, street, variant="new")
    assert "no variant 'new'; it has only one, so name none" in refusal(load_dataset, duke, variant="new")


# Counts


def test_counts_that_differ_and_counts_that_do_not() -> None:
    market = KNOWN["market1501"]
    dataset = ReIDDataset("market", Path("x"), train=people((3, 1), (3, 2), (-1, 2)), query=people((4, 1)))
    expected = {"": {"train": Counts(1, 2, 3), "query": Counts(1, None, 2), "gallery": Counts(5, 6, 7)}}
    assert check_counts(dataset, replace(market, counts=expected)) == [
        "The query split of market differs from Zheng et al., ICCV 2015: 1 instead of 2 images.",
        "The gallery split of market differs from Zheng et al., ICCV 2015: "
        "0 instead of 5 identities, 0 instead of 6 cameras, 0 instead of 7 images.",
    ]
    assert check_counts(dataset, replace(market, counts={"": {"train": Counts(1, 2, 3)}})) == [
        "The query split of market differs from Zheng et al., ICCV 2015: "
        "1 instead of 0 identities, 1 instead of 0 cameras, 1 instead of 0 images."
    ]
    assert check_counts(dataset, replace(market, counts={"V1": {}})) == []


def test_the_published_counts_add_up() -> None:
    """Against the totals of each dataset, which the papers give too."""

    def images(name: str, variant: str = "") -> int:
        return sum(counts.images for counts in KNOWN[name].counts[variant].values())

    assert images("market1501") == 32217
    assert images("dukemtmc") == 36411
    assert images("msmt17", "V1") == images("msmt17", "V2") == 126441
    assert images("cuhk02") == 4 * 1816
    assert images("cuhk03", "detected, new protocol") == 14097
    assert images("cuhk03", "labeled, new protocol") == 14096
    assert sum(counts.ids for counts in list(KNOWN["cuhk03"].counts["labeled, new protocol"].values())[:2]) == 1467
    for name, known in KNOWN.items():
        assert name == known.name
        assert known.title and known.source and (known.origin or known.note)
        assert not re.search(r"https?:|www\.", known.origin + known.note)
        assert all(set(counts) <= set(SPLITS) for counts in known.counts.values())


# All images


def test_all_images_are_train_images_once() -> None:
    train, query = people((0, 1), (-1, 1), folder="train"), people((5, 1), folder="query")
    gallery = (*people((5, 2), (0, 2), folder="gallery"), *query)
    dataset = ReIDDataset(
        "x", Path("x"), train, query, gallery, people((6, 1), folder="test"), variant="labeled, new protocol",
        single_shot=True,
    )  # fmt: skip
    whole = all_images(dataset)
    # Without the unknown person and the distractor; a query that is in the gallery too comes once.
    assert [(str(path.parent), pid) for path, pid, _ in whole.train] == [
        ("train", 0),
        ("query", 5),
        ("gallery", 5),
        ("test", 6),
    ]
    assert (whole.query, whole.gallery, whole.test, whole.variant) == ((), (), (), "labeled, new protocol, all images")
    assert not whole.single_shot
    # Where a person of number 0 is searched for, those of the gallery are this person.
    zero = ReIDDataset("x", Path("x"), (), people((0, 1), folder="query"), people((0, 2), folder="gallery"))
    assert len(all_images(zero).train) == 2


# The command


def test_the_listing(shelf: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["datasets", str(shelf)]) == 0
    shown = capsys.readouterr().out
    duke = shelf / "DukeMTMC-reID"
    assert f"{duke}: The train split of DukeMTMC-reID differs from Zheng et al., ICCV 2017: 1 instead of 702" in shown
    assert f"{duke}: It was withdrawn in 2019 because the people in it had not consented" in shown
    assert "Not found: CUHK-SYSU. It can be asked for at the person search page of" in shown
    assert "unreadable" in shown and "lacks splits of CUHK03" in shown
    assert re.search(r"MSMT17 .*train.* 4 ", shown) and "V2" in shown


def test_the_listing_of_ones_own(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tiny_image(tmp_path / "mine" / "shop" / "a.jpg")
    manifest = image.with_name("manifest.csv")
    manifest.write_text("path,pid,camid,split\na.jpg,1,2,train\n")
    other = tmp_path / "mine" / "wrong.csv"
    other.write_text("path,pid\n")
    assert main(["datasets", str(tmp_path), str(shelf), str(other)]) == 0
    own = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) in line and "differs" not in line]
    street = shelf / "synthetic" / "street"
    assert f"{image.parent}: shop: train 1 image, 1 person, 1 camera." in own
    assert f"{street}: street: query 1 image, 1 person, 1 camera." in own
    assert own[-1].startswith(f"{other}: The manifest {other} lacks the column camid")
    again = str(other.parent / ".." / "mine")
    assert main(["datasets", str(other.parent), str(other), str(manifest), again, "--json"]) == 0
    (shop, wrong) = json.loads(capsys.readouterr().out)["own"]
    assert shop["splits"] == {"train": {"ids": 1, "cameras": 1, "images": 1}} and shop["name"] == "shop"
    assert main(["datasets", str(manifest)]) == 0 and "Not found" not in capsys.readouterr().out
    # From inside a known one nothing is listed but that one, though the place may be in the Market-1501 layout.
    boxes = [tmp_path / "cuhk03-np" / kind for kind in ("detected", "labeled")]
    for folder in boxes:
        tiny_image(folder / "bounding_box_train" / "0001_c1_1.png")
    assert main(["datasets", str(boxes[0]), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in content["found"]} == {"cuhk03"} and content["own"] == []
    assert wrong["path"] == str(other) and "lacks the column camid" in wrong["error"] and wrong["splits"] == {}


def test_the_listing_as_json(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The same folder twice, once from inside, is listed once.
    assert main(["datasets", str(shelf), str(shelf / "MSMT17_V1" / "train"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["found"]) == 6
    (first,) = [each for each in content["found"] if each["variant"] == "V1"]
    assert first["splits"]["train"] == {"ids": 2, "cameras": 3, "images": 4}
    assert [*first["splits"]] == ["train", "query", "gallery"]
    assert first["path"] == str(shelf / "MSMT17_V1") and len(first["differences"]) == 3
    missing = {each["name"] for each in content["missing"]}
    assert "cuhk_sysu" in missing and missing.isdisjoint(each["name"] for each in content["found"])


def test_the_listing_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["datasets", str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err == (
        f"dan-fast: There is no folder {tmp_path / 'absent'}; check the path for a typing mistake.\n"
    )
    assert main(["datasets", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(f"Not found: {known.title}." in shown for known in KNOWN.values())
    assert "Not found: DukeMTMC-reID. It was withdrawn in 2019" in shown


# Archives


def write_cuhk03(file: Path) -> dict[str, np.ndarray]:
    """The nesting of cuhk-03.mat: pair of cameras, then person and image, each a reference; pixels by name."""
    rng = np.random.default_rng(0)
    drawn = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as content:

        def reference(name: str, values: np.ndarray) -> h5py.Reference:
            return content.create_dataset(f"#refs#/{name}", data=values).ref

        for box in ("detected", "labeled"):
            pairs = np.empty((1, 2), dtype=h5py.ref_dtype)
            for pair, persons in enumerate((2, 1)):
                cells = np.empty((10, persons), dtype=h5py.ref_dtype)
                for number, person in np.ndindex(cells.shape):
                    name = f"{pair + 1}_{person + 1:03d}_{1 if number < 5 else 2}_{number + 1:02d}.png"
                    values = np.zeros(2, dtype=np.uint64)  # no image
                    if number in (0, 4, 5):
                        drawn[f"images_{box}/{name}"] = pixels = rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)
                        values = pixels.T
                    cells[number, person] = reference(f"{box}{name}", values)
                pairs[0, pair] = reference(f"{box}{pair}", cells)
            content.create_dataset(box, data=pairs)
        testsets = np.empty((1, 20), dtype=h5py.ref_dtype)
        for split in range(20):
            chosen = [[1.0, 1.0]] if split == 0 else [[1.0, 2.0], [2.0, 1.0]]
            testsets[0, split] = reference(f"testset{split}", np.array(chosen).T)
        content.create_dataset("testsets", data=testsets)
    return drawn


def test_cuhk03_comes_out_of_its_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "cuhk03"
    drawn = write_cuhk03(home / "cuhk03_release" / "cuhk-03.mat")
    assert f"cuhk-03.mat only; `dan-fast datasets {home} --extract`" in refusal(load_dataset, home)
    assert main(["datasets", str(tmp_path), "--extract"]) == 0
    assert "split 1" in capsys.readouterr().out.replace("\n", " ")
    written = {f"{path.parent.name}/{path.name}": np.array(Image.open(path)) for path in home.glob("images_*/*")}
    assert written.keys() == drawn.keys()
    assert all(np.array_equal(written[name], drawn[name]) for name in drawn)
    first = load_dataset(home, variant="detected classic split 1")
    assert [path.name for path, _, _ in first.query] == ["1_001_1_01.png", "1_001_1_05.png", "1_001_2_06.png"]
    assert [pid for _, pid, _ in first.train] == [1002] * 3 + [2001] * 3
    assert {sample.pid for sample in load_dataset(home, variant="detected classic split 20").query} == {1002, 2001}
    # Torchreid reads its labels from here: they restart in each part.
    splits = json.loads((home / "splits_classic_labeled.json").read_text())
    assert [entry[1:] for entry in splits[0]["train"]] == [[0, 0], [0, 0], [0, 1], [1, 0], [1, 0], [1, 1]]
    # What is there is left alone.
    assert extract_cuhk03(home) == []


def test_a_cuhk03_archive_that_is_none_or_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "cuhk-03.mat"
    said = "cuhk-03.mat cannot be read"
    archive.write_bytes(b"half a download")
    assert said in refusal(extract_cuhk03, tmp_path)
    with h5py.File(archive, "w") as content:
        content.create_group("detected")  # of another structure
    assert said in refusal(extract_cuhk03, tmp_path)
    write_cuhk03(archive)
    with h5py.File(archive, "a") as content:
        del content["labeled"]
    assert said in refusal(extract_cuhk03, tmp_path)
    # The part that was whole stays; nothing half-written does.
    assert {path.name for path in tmp_path.iterdir()} == {
        "cuhk-03.mat",
        "images_detected",
        "splits_classic_detected.json",
    }
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "which h5py reads: pip install h5py" in refusal(extract_cuhk03, tmp_path)


def test_a_full_disk_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cuhk03(tmp_path / "cuhk-03.mat")
    write_cuhk_sysu(tmp_path)
    monkeypatch.setattr(Image.Image, "save", Mock(side_effect=OSError(28, "No space left on device")))
    for extract, kind in ((extract_cuhk03, "png"), (extract_cuhk_sysu, "jpg")):
        assert f".{kind} could not be written (No space left on device)" in refusal(extract, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cuhk-03.mat", "Image", "annotation"}


def write_cuhk_sysu(home: Path, box: tuple[int, int, int, int] = (2, 3, 4, 5)) -> np.ndarray:
    """One person in two scenes and one in one; returns the pixels of the first scene."""
    frame = np.zeros((20, 30, 3), dtype=np.uint8)
    frame[3:8, 2:6] = 255
    for name in ("s1.jpg", "s2.jpg"):
        path = home / "Image" / "SSM" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(path, quality=100)
    scene = np.dtype([("imname", object), ("idlocate", object), ("ishard", object)])
    person = np.dtype([("idname", object), ("nAppear", object), ("scene", object)])

    def scenes(*entries: tuple) -> np.ndarray:
        return np.array([(name, np.array([list(place)]), 0) for name, place in entries], dtype=scene)[None]

    everybody = np.array(
        [
            ("p7", 2, scenes(("s1.jpg", box), ("s2.jpg", (25, 15, 99, 99)))),
            ("p11934", 1, scenes(("s1.jpg", (-2, -1, 32, 21)))),
        ],
        dtype=person,
    )
    (home / "annotation").mkdir(exist_ok=True)
    savemat(home / "annotation" / "Person.mat", {"Person": everybody[None]})
    return frame


@pytest.mark.parametrize("layout", ["CUHK-SYSU", "CUHK-SYSU/dataset"])
def test_cuhk_sysu_is_cropped(tmp_path: Path, layout: str) -> None:
    home = tmp_path / layout
    write_cuhk_sysu(home)
    said = f"whole frames; `dan-fast datasets {home} --extract` writes the crops"
    assert said in refusal(load_dataset, home / "annotation")
    assert main(["datasets", str(tmp_path), "--extract"]) == 0
    dataset = load_dataset(tmp_path)
    assert [(path.name, pid) for path, pid, _ in dataset.train] == [
        ("p11934_s1_1.jpg", 11934),
        ("p7_s1_1.jpg", 7),
        ("p7_s2_2.jpg", 7),
    ]
    sizes = [Image.open(path).size for path, _, _ in dataset.train]
    # A box is left, top, width, height; one that reaches beyond its frame ends there.
    assert sizes == [(30, 20), (4, 5), (5, 5)]
    crop = Image.open(dataset.train[1].path)
    assert np.array(crop).min() > 200 and crop.quantization[0][0] == 2  # of quality 95
    assert extract_cuhk_sysu(home) == []


def test_cuhk_sysu_that_cannot_be_cropped_leaves_nothing(tmp_path: Path) -> None:
    write_cuhk_sysu(tmp_path, box=(40, 3, 4, 5))
    assert "box (40, 3, 4, 5) of p7_s1_1.jpg lies outside" in refusal(extract_cuhk_sysu, tmp_path)
    write_cuhk_sysu(tmp_path)
    frame, annotations = tmp_path / "Image" / "SSM" / "s2.jpg", tmp_path / "annotation" / "Person.mat"
    frame.write_bytes(b"no image")
    assert f"The frame {frame} cannot be decoded" in refusal(extract_cuhk_sysu, tmp_path)
    said = f"{annotations} cannot be read as CUHK-SYSU's annotations"
    for scene in ({"imname": "s1.jpg"}, {"imname": "s1.jpg", "idlocate": [1, 2, 3]}):
        savemat(annotations, {"Person": {"idname": "p7", "scene": scene}})
        assert said in refusal(extract_cuhk_sysu, tmp_path)
    annotations.write_bytes(b"no MATLAB file")
    assert said in refusal(extract_cuhk_sysu, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"Image", "annotation"}


def test_two_processes_do_not_write_into_the_same_unfinished_folder(tmp_path: Path) -> None:
    target = tmp_path / "images"
    (tmp_path / ".images.part" / "of a killed one").mkdir(parents=True)
    with whole_folder(target) as folder:
        assert not list(folder.iterdir())
        with pytest.raises(DanFastError, match=rf"is in use by process {os.getpid()} on .*: wait for it, stop it, or"):
            with whole_folder(target):
                pass
        (folder / "1.png").touch()
    with pytest.raises(DanFastError, match="images/1.png could not be written"), whole_folder(target / "1.png"):
        pass
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["images", "images/1.png"]
