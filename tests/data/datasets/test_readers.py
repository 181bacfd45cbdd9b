"""MSMT17, CUHK02, CUHK03, CUHK-SYSU and DukeMTMC-reID in the layouts people have them in, drawn tiny."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from dan_fast.core.errors import DanFastError
from dan_fast.data import ReIDDataset, TrainingSet, load_dataset, read_image
from dan_fast.data.datasets.load import all_images
from dan_fast.data.overlap import numbering_of, persons_in_both
from tests.support.dataset_shelf import Shelf, tiny_image
from tests.support.refusals import refusal
from tests.support.written_sets import cuhk03_of


def rows(samples: Sequence) -> list[tuple[str, int, int]]:
    return [(path.name, pid, camid) for path, pid, camid in samples]


def sentence(path: Path, variant: str | None = None) -> str:
    return refusal(load_dataset, path, variant=variant)


def assert_found_from(places: Sequence[Path], expected: ReIDDataset, variant: str | None = None) -> None:
    for place in places:
        assert load_dataset(place, variant=variant) == expected


# MSMT17


@pytest.mark.parametrize("layout", ["msmt17/MSMT17_V1", "MSMT17_V1", "MSMT17_V1/MSMT17_V1", "elsewhere"])
def test_msmt17_v1_as_torchreid_fast_reid_and_the_archive_have_it(tmp_path: Path, layout: str) -> None:
    home = Shelf(tmp_path).msmt17("V1", layout)
    dataset = load_dataset(home)
    assert (dataset.name, dataset.variant, dataset.root) == ("MSMT17", "V1", home)
    # The training split of the paper includes the validation list.
    assert rows(dataset.train) == [
        ("0000_000_01_0303morning_0015_0.jpg", 0, 1),
        ("0000_001_14_0303morning_0016_0.jpg", 0, 14),
        ("0001_000_01_0303morning_0015_0.jpg", 1, 1),
        ("0001_001_02_0303noon_0016_0.jpg", 1, 2),
    ]
    # Person 0 of the test half is another one than person 0 of the training half.
    assert rows(dataset.query) == [("0000_000_02_0303morning_0020_0.jpg", 1041, 2)]
    assert rows(dataset.gallery) == [(f"000{n}_003_07_0303noon_0020_1.jpg", 1041 + n, 7) for n in (0, 2)]
    assert_found_from([home / "train", home / "test"], dataset)
    if layout != "elsewhere":
        assert_found_from([tmp_path, home.parent], dataset)


def test_msmt17_of_two_versions_asks_which(tmp_path: Path) -> None:
    first, second = map(Shelf(tmp_path).msmt17, ("V1", "V2"))
    assert "several variants" in sentence(tmp_path) and "choose 'V1' or 'V2'" in sentence(tmp_path)
    dataset = load_dataset(tmp_path, variant="v2")
    assert (dataset.variant, dataset.root) == ("V2", second)
    assert dataset.train[0].path.parts[-3] == "mask_train_v2"
    assert load_dataset(first).variant == "V1"
    assert "has no variant 'V2'; choose 'V1'" in sentence(first, "V2")


def test_the_versions_of_msmt17_show_the_same_persons(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    first, second = map(load_dataset, (shelf.msmt17(), shelf.msmt17("V2", "elsewhere/MSMT17_V2")))
    everybody = [all_images(each) for each in (first, second)]
    trained = {numbering: set(pids.tolist()) for numbering, pids in TrainingSet(everybody[:1]).persons.items()}
    assert persons_in_both(trained, second) == [1041, 1043]
    assert TrainingSet(everybody).num_classes == TrainingSet(everybody[:1]).num_classes == 4


def test_msmt17_with_mistakes(tmp_path: Path) -> None:
    home = Shelf(tmp_path).msmt17()
    (home / "list_query.txt").write_text("0000/0000_000_02_0303morning_0020_0.jpg 0\n\n0000/person.jpg 0\n")
    assert "list_query.txt, line 3: '0000/person.jpg 0' is not an image and its person" in sentence(home)
    (home / "list_query.txt").write_text("0000/0000_000_02_x.jpg 0\n0000/0000_000_02_0303morning_0020_0.jpg 0\n")
    assert sentence(home).startswith("1 of the 2 images") and "0000_000_02_x.jpg the first" in sentence(home)
    (home / "list_query.txt").write_text("0000/0000_000_02_0303morning_0020_0.jpg 1_0\n")
    assert "1_0' is not an image and its person" in sentence(home)
    (home / "list_query.txt").write_bytes(b"\x1f\x8b\xff\xfe 0\n")
    assert sentence(home) == f"{home / 'list_query.txt'} is no text in UTF-8; restore the list of the original archive."
    (home / "list_query.txt").unlink()
    assert f"lacks {home / 'list_query.txt'}" in sentence(home)


# CUHK02


def test_cuhk02(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home = tmp_path / "CUHK02" / "Dataset"
    for name in ("1/cam1/001_2", "1/cam1/001_1", "1/cam2/001_1", "4/cam2/001_1", "5/cam1/007_1", "5/cam2/007_1"):
        tiny_image(home / f"P{name}.png")
    (home / "P1" / "cam1" / "Thumbs.db").write_bytes(b"")
    # An image that is none is an error when it is read, not before.
    (home / "P1" / "cam1" / "001_1.png").write_bytes(b"no image")
    dataset = load_dataset(home)
    with pytest.raises(DanFastError, match="001_1.png cannot be decoded"):
        read_image(dataset.train[0].path)
    assert (dataset.name, dataset.variant) == ("CUHK02", "")
    # Person 1 of the first pair of cameras is another one than person 1 of the fourth.
    assert rows(dataset.train) == [
        ("001_1.png", 1001, 1),
        ("001_2.png", 1001, 1),
        ("001_1.png", 1001, 2),
        ("001_1.png", 4001, 8),
    ]
    assert rows(dataset.query) == [("007_1.png", 5007, 9)]
    assert rows(dataset.gallery) == [("007_1.png", 5007, 10)]
    assert_found_from([home.parent, home.parent.parent, home / "P5"], dataset)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_dataset(home)
    assert (
        "The train split of CUHK02 differs from Li and Wang, CVPR 2013: 2 instead of 1577 identities, "
        "3 instead of 8 cameras, 4 instead of 6308 images." in caplog.messages
    )
    assert len(caplog.messages) == 3
    tiny_image(home / "P3" / "cam1" / "person.png")
    assert "person.png is not named like the images beside it" in sentence(home)


# CUHK03


@pytest.fixture
def cuhk03(tmp_path: Path) -> Path:
    """The extracted images of three people in as many pairs of cameras, with torchreid's splits."""
    names = [f"{pair}_001_{camera}_{5 * camera:02d}.png" for pair in (1, 2, 3) for camera in (1, 2)]
    train, test = names[:2], names[2:]
    new = {"train": train, "query": test[:1], "gallery": test[1:2]}
    return cuhk03_of(tmp_path / "cuhk03", new, new, {"train": test, "query": train, "gallery": train})


def test_cuhk03_has_no_default_variant(cuhk03: Path) -> None:
    message = sentence(cuhk03)
    for choice in ("detected, new protocol", "labeled, new protocol", "labeled, classic protocol, split 1 to 20"):
        assert repr(choice) in message
    assert f"as in '{cuhk03}@detected, new protocol'" in message
    message = sentence(cuhk03, "new")
    assert "choose 'detected, new protocol' or 'labeled, new protocol'," in message
    assert "'detected, classic protocol, split 1 to 20'," in sentence(cuhk03, "classic detected")
    assert "has no variant 'cropped'" in sentence(cuhk03, "cropped")


def test_cuhk03_new_protocol_from_torchreids_splits(cuhk03: Path) -> None:
    dataset = load_dataset(cuhk03, variant="detected new")
    assert (dataset.name, dataset.variant) == ("CUHK03", "detected, new protocol")
    assert rows(dataset.train) == [("1_001_1_05.png", 1001, 1), ("1_001_2_10.png", 1001, 2)]
    assert rows(dataset.query) == [("2_001_1_05.png", 2001, 1)]
    assert rows(dataset.gallery) == [("2_001_2_10.png", 2001, 2)]
    assert dataset.train[0].path == cuhk03 / "images_detected" / "1_001_1_05.png"
    assert load_dataset(cuhk03, variant="labeled, new protocol").query[0].path.parent.name == "images_labeled"
    assert_found_from([cuhk03.parent, cuhk03 / "images_labeled", cuhk03 / "."], dataset, "detected new")
    assert load_dataset(f"{cuhk03}@detected, new protocol") == dataset
    assert load_dataset(f"{cuhk03}/@detected new") == dataset


def test_cuhk03_classic_protocol(cuhk03: Path) -> None:
    first = load_dataset(cuhk03, variant="classic labeled split 1")
    second = load_dataset(cuhk03, variant="labeled, classic protocol, split 2")
    assert first.single_shot and not load_dataset(cuhk03, variant="labeled, new protocol").single_shot
    assert [each.variant for each in (first, second)] == [f"labeled, classic protocol, split {n}" for n in (1, 2)]
    assert rows(second.query) == rows(second.gallery) == rows(first.train)
    assert "does not list train, query and gallery of split 3" in sentence(cuhk03, "labeled classic split 3")


def test_cuhk03_new_protocol_from_the_published_mat(cuhk03: Path) -> None:
    names = sorted(path.name for path in (cuhk03 / "images_labeled").iterdir())
    (cuhk03 / "splits_new_labeled.json").unlink()
    cells = np.empty((len(names), 1), dtype=object)
    cells[:, 0] = names
    config = {"filelist": cells, "labels": np.ones((6, 1)), "train_idx": [[2, 1]], "query_idx": 4, "gallery_idx": 3}
    release = cuhk03 / "cuhk03_release"
    release.mkdir()
    savemat(release / "cuhk03_new_protocol_config_labeled.mat", config)
    dataset = load_dataset(cuhk03, variant="labeled new")
    assert rows(dataset.train) == [("1_001_2_10.png", 1001, 2), ("1_001_1_05.png", 1001, 1)]
    assert rows(dataset.query) == [("2_001_2_10.png", 2001, 2)]
    assert rows(dataset.gallery) == [("2_001_1_05.png", 2001, 1)]
    (release / "cuhk03_new_protocol_config_labeled.mat").write_bytes(b"no MATLAB file at all")
    assert "cannot be read as CUHK03's new protocol" in sentence(cuhk03, "labeled new")


def test_cuhk03_np_and_its_levels(tmp_path: Path) -> None:
    home = tmp_path / "CUHK03-NP"
    tiny_image(home / "detected" / "bounding_box_train" / "0003_c1_21.png")
    dataset = load_dataset(home)  # only one variant is there
    assert dataset.variant == "detected, new protocol" and rows(dataset.train) == [("0003_c1_21.png", 3, 1)]
    assert_found_from([tmp_path, home / "detected"], dataset)
    tiny_image(home / "labeled" / "bounding_box_train" / "0003_c1_21.png")
    assert "choose 'detected, new protocol' or 'labeled, new protocol'" in sentence(home)


def test_the_two_numberings_of_cuhk03_are_kept_apart(tmp_path: Path) -> None:
    images = [f"1_001_{camera}_{5 * camera:02}.png" for camera in (1, 2)]
    home = cuhk03_of(tmp_path / "cuhk03", {}, {"train": [], "query": images[:1], "gallery": images[1:]})
    for box in ("labeled", "detected"):
        tiny_image(home / box / "bounding_box_train" / f"1001_c1_{len(box)}.png")
    labeled, detected = (load_dataset(home, variant=f"{box} new") for box in ("labeled", "detected"))
    classic = load_dataset(home, variant="labeled classic split 1")
    assert rows(classic.query) == [(images[0], 1001, 1)]
    trained = {numbering_of(labeled): {1001}}
    assert persons_in_both(trained, classic) == [] and numbering_of(detected) == numbering_of(labeled)


def test_cuhk03_with_mistakes(cuhk03: Path) -> None:
    (cuhk03 / "images_detected" / "1_001_1_05.png").unlink()
    message = sentence(cuhk03, "detected new")
    assert message.startswith("1 of the 2 images") and "1_001_1_05.png the first" in message
    for file in cuhk03.glob("splits_*.json"):
        file.unlink()
    message = sentence(cuhk03)
    assert "lacks splits of CUHK03" in message and "cuhk03_new_protocol_config_detected.mat" in message
    (cuhk03 / "splits_new_labeled.json").write_text("[{]")
    assert "splits_new_labeled.json does not list" in sentence(cuhk03)


# CUHK-SYSU


@pytest.mark.parametrize("layout", ["cuhksysu", "cuhk_sysu", "CUHK-SYSU"])
def test_cuhk_sysu_crops(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    crops = tmp_path / layout / "cropped_images"
    tiny_image(crops / "p11422_s16929_1.jpg")
    tiny_image(crops / "p2_s16929_2.jpg")
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(crops.parent)
    assert dataset.name == "CUHK-SYSU"
    assert rows(dataset.train) == [("p11422_s16929_1.jpg", 11422, 1), ("p2_s16929_2.jpg", 2, 1)]
    assert (dataset.query, dataset.gallery, dataset.test) == ((), (), ())
    # The literature names no cameras.
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "2 instead of 11934 identities, 2 instead of 34574 images."
    ]
    assert_found_from([tmp_path, crops], dataset)
    tiny_image(crops / "somebody.jpg")
    assert "somebody.jpg is not named like the images beside it" in sentence(crops)


# DukeMTMC-reID and Market-1501


@pytest.mark.parametrize(
    ("layout", "image", "expected", "warning"),
    [
        ("dukemtmc-reid/DukeMTMC-reID", "0001_c2_f0046182.jpg", (1, 2), "gallery split of DukeMTMC-reID differs from "
         "Zheng et al., ICCV 2017: 0 instead of 1110 identities"),
        ("market1501/Market-1501-v15.09.15", "0002_c1s1_000451_03.jpg", (2, 1), "1 instead of 751 identities, "
         "1 instead of 6 cameras, 1 instead of 12936 images."),
    ],
)  # fmt: skip
def test_dukemtmc_and_market1501_as_torchreid_has_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str, image: str, expected: tuple, warning: str
) -> None:
    home = tmp_path / layout
    tiny_image(home / "bounding_box_train" / image)
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(home)
    assert (dataset.name, rows(dataset.train)) == (home.name, [(image, *expected)])
    assert warning in caplog.text
    assert_found_from([tmp_path, home.parent], dataset)
