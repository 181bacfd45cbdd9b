"""Reading datasets: both layouts, their order, and one sentence for each mistake in them."""

import os
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from dan_fast.core.errors import DanFastError
from dan_fast.data import ReIDDataset, Sample, TrainingSet, load_dataset
from dan_fast.data.datasets.finding import IMAGE_SUFFIXES
from dan_fast.data.datasets.known import counts_of, find_datasets
from dan_fast.data.datasets.load import holds_dataset, read_targets, told_apart
from dan_fast.data.samples import Counts
from dan_fast.data.synthetic import synthesize
from dan_fast.evaluation import evaluate_dataset
from dan_fast.training.config import DataConfig
from dan_fast.training.sources import load_datasets
from tests.support.dataset_shelf import tiny_image
from tests.support.refusals import refusal


@pytest.fixture
def market(tmp_path: Path) -> Path:
    root = tmp_path / "market"
    # Written in reverse order: a listing in the order of creation would be unsorted.
    train = "0010_c2s1_000002_01.jpg", "0002_c6s3_000001_00.jpg", "0002_c1s1_000001_00.jpg", "-1_c2s1_000001_00.jpg"
    for name in train:
        tiny_image(root / "bounding_box_train" / name)
    for name in ("0003_c1s1_000001_00.png", "0000_c2s1_000001_00.jpg", "-1_c3s1_000001_00.jpg"):
        tiny_image(root / "bounding_box_test" / name)
    tiny_image(root / "query" / "0003_c4s1_000001_00.jpg")
    (root / "query" / "Thumbs.db").write_bytes(b"what Windows leaves behind")
    return root


def write_manifest(folder: Path, *rows: str, header: str = "path,pid,camid,split") -> Path:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        tiny_image(folder / "images" / name)
    file = folder / "manifest.csv"
    file.write_text("\n".join((header, *rows)) + "\n")
    return file


def sentence(path: str | Path) -> str:
    return refusal(load_dataset, path)


def test_market_folder_gives_all_parts_sorted_by_name(market: Path) -> None:
    dataset = load_dataset(market)
    train, test = market / "bounding_box_train", market / "bounding_box_test"
    # To train on, images of unknown persons are kept.
    assert dataset.train == (
        Sample(train / "-1_c2s1_000001_00.jpg", -1, 2),
        Sample(train / "0002_c1s1_000001_00.jpg", 2, 1),
        Sample(train / "0002_c6s3_000001_00.jpg", 2, 6),
        Sample(train / "0010_c2s1_000002_01.jpg", 10, 2),
    )
    # The distractor 0 stays, the bad detection -1 does not.
    assert dataset.gallery == (
        Sample(test / "0000_c2s1_000001_00.jpg", 0, 2),
        Sample(test / "0003_c1s1_000001_00.png", 3, 1),
    )
    assert dataset.query == (Sample(market / "query" / "0003_c4s1_000001_00.jpg", 3, 4),)
    assert dataset.test == ()
    assert (dataset.name, dataset.root) == ("market", market)
    assert load_dataset(str(market), name="source").name == "source"


# No numbers, and numbers that no table holds.
@pytest.mark.parametrize("name", ["person.jpg", "20240101123456789012_c1.png", "0003_c20240101123456789012.png"])
def test_market_image_with_another_name(market: Path, name: str) -> None:
    tiny_image(market / "query" / name)
    assert f"{name} is not named like a Market-1501 image" in sentence(market)


def test_folders_of_general_names_are_no_datasets_of_the_literature(tmp_path: Path) -> None:
    for name in ("labeled", "detected"):
        tiny_image(tmp_path / "data" / name / "bounding_box_train" / "0002_c1_000451.jpg")
        dataset = load_dataset(tmp_path / "data" / name)
        assert (dataset.name, dataset.title, dataset.root) == (name, name, tmp_path / "data" / name)
    for name in ("cropped_images", "images_labeled"):
        tiny_image(tmp_path / "photos" / name / "holiday.jpg")
    assert find_datasets(tmp_path) == []
    assert not holds_dataset(tmp_path / "photos")


def test_manifest_keeps_the_order_of_rows_and_ignores_further_columns(tmp_path: Path) -> None:
    file = write_manifest(
        tmp_path / "shop",
        "night,images/c.jpg,7,2,train",
        'day,"images/a.jpg", ,,train',  # of an unknown person and camera
        "",
        "day,./images/b.jpg,-1,3,gallery",
        "day,images/d.jpg,0,3,test",
        header="\ufefflight, path ,pid,camid,split",
    )
    dataset = load_dataset(file.parent)
    images = file.parent / "images"
    assert dataset.train == (Sample(images / "c.jpg", 7, 2), Sample(images / "a.jpg", -1, -1))
    assert dataset.gallery == ()  # -1 has no place where images are searched for
    assert dataset.test == (Sample(images / "d.jpg", 0, 3),)
    assert dataset == load_dataset(file)
    assert dataset.name == "shop"
    other = file.rename(file.with_name("winter.csv"))
    assert load_dataset(other).name == "winter"
    assert load_dataset(other).root == dataset.root


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("images/b.jpg,1,1,val", "the split 'val' is unknown; use one of train, query, gallery, test"),
        ("images/b.jpg,1,1,", "the split '' is unknown"),
        ("images/b.jpg,one,1,train", "the pid 'one' is not a whole number"),
        (f"images/b.jpg,{'1' * 5000},1,train", f"the pid '{'1' * 40}' is"),
        (f"images/b.jpg,{'0' * 5000}1,1,train", f"the pid '{'0' * 40}' is"),
        (f"images/b.jpg,{2**63},1,train", f"the pid '{2**63}' is not a whole number from 0 to 2^63 - 1"),
        ("images/b.jpg,-7,1,train", "the pid '-7'"),
        ("images/b.jpg,1_2,1,train", "the pid '1_2' is not a whole number"),
        ("images/b.jpg,1,\u0661,train", "the camid '\u0661' is not a whole number"),
        ("images\0/b.jpg,1,1,train", "the path is empty or no path"),
        ("images/b.jpg,1,c2,train", "the camid 'c2' is not a whole number"),
        ("images/b.jpg,1,-2,train", "the camid '-2' is not a whole number"),
        (",1,1,train", "the path is empty"),
        ("./images/a.jpg,2,1,query", "./images/a.jpg is already listed in line 2"),
        ("images/../images/a.jpg,2,1,query", "images/../images/a.jpg is already listed in line 2"),
        ("images/link.jpg,2,1,query", "images/link.jpg is already listed in line 2"),
        ("linked/a.jpg,2,1,query", "linked/a.jpg is already listed in line 2"),
    ],
)
def test_manifest_with_a_wrong_row(tmp_path: Path, row: str, expected: str) -> None:
    file = write_manifest(tmp_path, "images/a.jpg,1,1,train", row)
    (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "images" / "a.jpg")
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    message = sentence(file)
    assert f"line 3: {expected}" in message and "manifest.csv" in message


def test_a_query_may_be_in_the_gallery_as_the_same_person_by_the_same_camera(tmp_path: Path) -> None:
    rows = ["images/a.jpg,1,1,query", "images/b.jpg,1,2,gallery", "images/a.jpg,1,1,gallery"]
    dataset = load_dataset(write_manifest(tmp_path, *rows))
    assert dataset.query[0] == dataset.gallery[1]
    result = evaluate_dataset(lambda x: x.flatten(1), dataset, image_size=(8, 4), workers=0)
    assert (result.mAP, result.num_gallery) == (1.0, 2)
    for again in ("1,1,query", "1,2,query", "2,1,query", "1,1,test"):
        file = write_manifest(tmp_path, *rows, f"images/a.jpg,{again}")
        assert "line 5: images/a.jpg is already listed in line 2" in sentence(file)
    for other in ("images/a.jpg,1,2,gallery", "images/a.jpg,2,1,gallery"):
        assert "line 3: images/a.jpg is already listed in line 2" in sentence(write_manifest(tmp_path, rows[0], other))


def test_a_manifest_row_with_too_few_columns(tmp_path: Path) -> None:
    file = write_manifest(tmp_path, "train,images/a.jpg,1", header="split,path,pid,camid")
    assert sentence(file).endswith("line 2 ends before the column camid; write all columns, empty ones too.")


@pytest.mark.parametrize("column", ["path", "pid", "camid", "split"])
def test_manifest_without_a_column(tmp_path: Path, column: str) -> None:
    header = "path,pid,camid,split".replace(column, "other")
    file = write_manifest(tmp_path, "x,1,1,train", header=header)
    assert f"lacks the column {column} in its first line, {header!r}:" in sentence(file)
    twice = write_manifest(tmp_path, "x,1,1,train,9", header=f"path,pid,camid,split, {column}")
    assert sentence(twice).endswith(f"manifest.csv has the column {column} twice; leave out or rename one of them.")


def test_manifest_that_is_empty_or_no_text(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_bytes(b"")
    assert "lacks the column path" in sentence(file)
    file.write_bytes(b"path,pid,camid,split\n\xff\xfe\xfa,1,1,train\n")
    assert "cannot be read as UTF-8 CSV" in sentence(file)


@pytest.mark.parametrize("rows", [['images/a.jpg,1,1,train,"tall man', "images/b.jpg,1,2,query,"],
                                  ['images/a.jpg,1,1,train,"tall', 'images/b.jpg,1,2,query,man"x']])  # fmt: skip
def test_a_quote_that_takes_other_rows_in_is_refused(tmp_path: Path, rows: list[str]) -> None:
    message = sentence(write_manifest(tmp_path, *rows, header="path,pid,camid,split,note"))
    assert "cannot be read as UTF-8 CSV" in message
    inside = write_manifest(tmp_path, 'images/a.jpg,1,1,train,15" bag', header="path,pid,camid,split,note")
    assert len(load_dataset(inside).train) == 1


def test_manifest_with_missing_images_names_the_first_and_counts(tmp_path: Path) -> None:
    rows = ("images/a.jpg,1,1,train", "images/x.jpg,1,1,train", "images,1,1,train", "images/y.jpg,2,1,query")
    message = sentence(write_manifest(tmp_path, *rows))
    assert message.startswith("3 of the 4 images") and str(tmp_path / "images" / "x.jpg") in message


def test_paths_that_are_no_dataset(tmp_path: Path) -> None:
    assert "There is no dataset at" in sentence(tmp_path / "absent")
    said = f"There is no dataset at a,b in {Path.cwd()}; give the path of its folder; several are written '[a, b]'."
    assert sentence(Path("a,b")) == said
    assert "holds no dataset: neither bounding_box_train" in sentence(tmp_path)
    assert "is a file but no .csv manifest" in sentence(tiny_image(tmp_path / "photo.jpg"))


def test_a_folder_one_level_too_low(market: Path, tmp_path: Path) -> None:
    other = tiny_image(tmp_path / "other" / "query" / "0003_c4_000001.jpg").parent
    duke = tiny_image(tmp_path / "DukeMTMC-reID" / "query" / "0001_c2_f0046182.jpg").parent
    for part in (market / "query", market / "bounding_box_train", other, duke):
        assert f"one part of the Market-1501 folder {part.parent}; give that folder" in sentence(part)
    file = write_manifest(tmp_path / "shop", "images/a.jpg,1,1,train")
    assert f"seems to hold the images of the manifest {file}; give {file.parent}" in sentence(file.parent / "images")


def test_a_folder_one_level_too_high(market: Path, tmp_path: Path) -> None:
    assert sentence(tmp_path) == f"{tmp_path} is the folder above {market}; give that one instead."
    shop = write_manifest(tmp_path / "shop", "images/a.jpg,1,1,train").parent
    assert f"above {market} and {shop}; give one of these" in sentence(tmp_path)


def test_a_folder_that_may_not_be_read(market: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(13, "Permission denied", str(market))
    monkeypatch.setattr(Path, "iterdir", Mock(side_effect=error))
    message = sentence(market)
    assert "Permission denied" in message and str(market) in message


def test_a_path_at_which_the_system_does_not_look_is_a_sentence(tmp_path: Path) -> None:
    for refused in (load_dataset, find_datasets, synthesize):
        with pytest.raises(DanFastError, match="File name too long"):
            refused(tmp_path / ("x" * 300))


def test_targets_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    rows = ("images/a.jpg,1,1,query", "images/b.jpg,1,2,gallery")
    paths = [write_manifest(tmp_path / site, *rows).rename(tmp_path / site / "test.csv") for site in ("shop", "mall")]
    others = [write_manifest(tmp_path / site / "night", *rows) for site in ("shop", "mall")]
    targets = told_apart(read_targets([*paths, *others, write_manifest(tmp_path / "street", *rows)]))
    assert [each.name for each in targets] == ["shop/test", "mall/test", "shop/night", "mall/night", "street"]
    # One named like its folder, beside the manifest there.
    (tmp_path / "street" / "street.csv").write_text("path,pid,camid,split\nimages/a.jpg,2,1,query\n")
    targets = told_apart(read_targets([*paths, tmp_path / "street", tmp_path / "street" / "street.csv"]))
    assert [each.name for each in targets] == ["shop/test", "mall/test", "street", "street (2)"]
    # Where they lie at other depths, one of them above all that tells the others apart.
    deep = [write_manifest(tmp_path / place / "test", *rows) for place in ("", "l1/a/b/c/d/e/f", "l2/a/b/c/d/e/f")]
    names = [each.name for each in told_apart(read_targets(deep))]
    assert [name[-len("l1/a/b/c/d/e/f/test") :] for name in names[1:]] == [f"l{n}/a/b/c/d/e/f/test" for n in (1, 2)]
    assert names[0].endswith("test") and len(set(names)) == 3 and not any(name.startswith("//") for name in names)


def test_a_target_named_twice_is_one_by_whatever_path(market: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / market.name).symlink_to(market)
    monkeypatch.chdir(market.parent)
    file = write_manifest(tmp_path / "night", "images/a.jpg,1,1,query")
    for one, again in ((market, market.name), (market, tmp_path / "link" / market.name), (file, file.parent)):
        assert refusal(read_targets, [one, again]) == f"The target {one} is named twice: leave one of them out."


def test_a_set_is_called_alike_by_whatever_path_it_is_trained_and_tested_on(tmp_path: Path, monkeypatch) -> None:
    rows = [f"images/{name}.jpg,{pid},{cam},{split}" for name, pid, cam, split in (
        ("a", 1, 1, "train"), ("b", 2, 1, "query"), ("c", 2, 2, "gallery"))]  # fmt: skip
    night = write_manifest(tmp_path / "data" / "night", *rows).parent
    write_manifest(tmp_path / "other" / "night", *rows)
    (tmp_path / "lnk").symlink_to(tmp_path / "data")
    (tmp_path / "evening").symlink_to(night)
    monkeypatch.chdir(tmp_path)
    for path, name in (
        ("data/night", "night"),
        ("lnk/night", "night"),
        ("./data/../data/night", "night"),
        (str(night), "night"),
        ("data/night/manifest.csv", "night"),
        ("evening", "evening"),
    ):
        for labeled, target in (("data/night", path), (path, "data/night")):
            roles = load_datasets(DataConfig(labeled=[labeled], targets=[target, "other/night"]))
            (learnt,), (same, other) = roles.labeled, roles.targets
            assert learnt.name == same.name, path
            assert other.name != same.name and other.name.endswith("night")
            assert same.name.split("/")[-1] == (name if target == path else "night")


def test_a_set_named_by_dots_has_the_name_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_manifest(tmp_path / "night", "images/a.jpg,1,1,train").parent
    monkeypatch.chdir(folder / "images")
    assert load_dataset("..").name == "night"
    monkeypatch.chdir(folder)
    assert load_dataset(".").name == "night"


def test_names_that_a_list_cannot_hold_and_none_at_all_are_said(tmp_path: Path) -> None:
    for path in ("[2024, 2025]", "[data/my #1, data/mall]"):
        hint = '; in a list, names that are numbers or hold #, .* stand in quotes, .*"A #1", B'
        with pytest.raises(DanFastError, match=rf"no dataset at {re.escape(path)}.*{hint}"):
            load_dataset(path)
    for path in ("[my set]/x", "[/data/a, /data/b"):
        assert sentence(path).endswith("give the path of its folder.")
    assert sentence("/data/a,/data/b").endswith("several are written '[/data/a, /data/b]'.")
    assert "The path of a dataset is empty, as by a variable of the shell" in sentence("")


def test_images_of_every_suffix_that_is_read_count(market: Path) -> None:
    before = len(load_dataset(market).train)
    assert {".jpg", ".jfif", ".png"} < IMAGE_SUFFIXES
    for number, suffix in enumerate(sorted(IMAGE_SUFFIXES)):
        (market / "bounding_box_train" / f"{900 + number:04d}_c1s1_000151_01{suffix.upper()}").touch()
    assert len(load_dataset(market).train) == before + len(IMAGE_SUFFIXES)


def test_hidden_files_are_no_images(market: Path) -> None:
    before = load_dataset(market)
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (market / part / "._0001_c1s1_000151_01.jpg").write_bytes(b"of macOS")
    assert load_dataset(market) == before


def test_what_looks_like_more_images_and_is_not_read_is_said(market: Path, caplog, monkeypatch) -> None:
    # A thumbnail's folder, masks, poses, and a folder that may not be read.
    own = next((market / "query").glob("*.jpg")).name
    for name in ("@eaDir/a.jpg", f"masks/{own}", "closed/0009_c1s1_000151_02.jpg"):
        tiny_image(market / "query" / name)
    (market / "query" / "0009_c1s1_000151_02.json").touch()
    listed = os.listdir

    def refuse(path: os.PathLike) -> list[str]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    before = load_dataset(market)
    assert "NOT READ" not in caplog.text
    tiny_image(market / "query" / "more" / "0001_c1s1_000151_02.jpg")
    (market / "bounding_box_test" / "0001_c1s1_000151_02.AVIF").touch()
    roles = load_datasets(DataConfig(labeled=[str(market)], unlabeled=[str(market)], targets=[str(market)]))
    assert roles.targets[0].query == before.query
    said = [line for line in caplog.messages if "NOT READ" in line]
    assert said == [
        f"Images in folders below {market / 'query'} are NOT READ (1): move them up, or write a manifest.",
        f"Images of type .avif in {market / 'bounding_box_test'} are NOT READ: convert them to JPEG or PNG.",
    ]


def test_a_part_by_another_name_is_said_where_one_is_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    shop = tmp_path / "shop"
    for name in ("query/0001_c1_0.jpg", "gallery/0001_c2_0.jpg", "gt_bbox/0001_c1_1.jpg", "masks/0001_c1_0.jpg"):
        tiny_image(shop / name)
    assert not load_dataset(shop).gallery
    assert caplog.messages == [
        f"{shop} has no bounding_box_train and no bounding_box_test, and the images in its gallery are NOT READ: "
        "rename the folders, or write a manifest."
    ]
    caplog.clear()
    for part in ("bounding_box_train", "bounding_box_test"):
        tiny_image(shop / part / "0001_c2_1.jpg")
    assert len(load_dataset(shop).gallery) == 1 and not caplog.messages


def test_images_of_nobody_in_a_manifest_are_left_out_of_a_test_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = ("images/a.jpg,,1,train", "images/b.jpg,,1,query", "images/c.jpg,-1,2,gallery")
    dataset = load_dataset(write_manifest(tmp_path, *rows))
    assert len(dataset.train) == 1 and not dataset.query and not dataset.gallery
    assert (
        f"2 query, gallery or test images of {tmp_path / 'manifest.csv'} have no pid and are LEFT OUT." in caplog.text
    )


@pytest.mark.parametrize(
    ("pid", "camid", "said"), [("anna", 1, "pid of a.jpg is 'anna'"), (1, 2.0, "camid of a.jpg is 2.0")]
)
def test_persons_and_cameras_are_numbers(pid: object, camid: object, said: str) -> None:
    with pytest.raises(TypeError, match=f"The {said}: number persons and cameras from 0."):
        ReIDDataset("shop", Path("shop"), query=(Sample(Path("a.jpg"), pid, camid),))
    ReIDDataset("shop", Path("shop"), query=(Sample(Path("a.jpg"), np.int64(3), np.uint8(1)),))


def test_the_contents_in_words(market: Path, tmp_path: Path) -> None:
    rows = ["images/a.jpg,,,train", "images/b.jpg,0,1,query", "images/c.jpg,0,2,gallery", "images/d.jpg,7,2,gallery"]
    said = load_dataset(write_manifest(tmp_path / "shop", *rows)).contents
    assert said == (
        "shop: train 1 image, 0 persons, 0 cameras; query 1 image, 1 person, 1 camera; gallery 2 images, 2 persons, "
        "1 camera"
    )
    rows[1] = "images/b.jpg,7,1,query"
    said = load_dataset(write_manifest(tmp_path / "shop", *rows)).contents
    assert said.endswith("gallery 2 images, 2 persons, 1 camera, 1 of pid 0 as distractors")
    assert counts_of(load_dataset(tmp_path / "shop"))["train"] == Counts(ids=0, cameras=0, images=1)


def test_unlabelled_images_need_no_dataset(market: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    frames = tmp_path / "frames"
    for name in ("b.jpg", "day/a.png", ".hidden/c.jpg", "day/.d.jpg"):
        tiny_image(frames / name)
    (frames / "notes.txt").touch()
    source = {"labeled": [str(market)], "unlabeled": [str(frames)]}
    (unlabeled,) = load_datasets(DataConfig(**source)).unlabeled
    assert unlabeled.name == "frames" and f"{frames} holds no dataset: the 2 images below it" in caplog.text
    assert unlabeled.train == (Sample(frames / "b.jpg", -1, -1), Sample(frames / "day" / "a.png", -1, -1))
    training_set = TrainingSet([load_dataset(market)], [unlabeled])
    assert training_set.true_ids.tolist() == training_set.true_labels.tolist() == [-1, -1]
    assert [*training_set.persons] == [str(market)]

    (frames / "day" / "street").symlink_to(market / "query")
    said = refusal(load_datasets, DataConfig(**source, targets=[str(market)]))
    assert "would train on people of its target market: 1 of them, person 3" in said
    (frames / "day" / "street").unlink()
    (frames / "latest.jpg").symlink_to(frames / "b.jpg")
    (unlabeled,) = load_datasets(DataConfig(**source)).unlabeled
    assert [sample.path.name for sample in unlabeled.train] == ["b.jpg", "a.png"]
    write_manifest(tmp_path / "misspelt").rename(tmp_path / "misspelt" / "Manifest.csv")
    (tmp_path / "empty").mkdir()
    (tmp_path / "all" / "reid").mkdir(parents=True)
    (tmp_path / "all" / "reid" / "market").symlink_to(market)
    for path, mistake in (
        (tmp_path / "misspelt", "holds no dataset"),
        (f"{frames}@labeled", "holds no dataset"),
        (tmp_path / "all", f"is the folder above {tmp_path}/all/reid/market"),
        (tmp_path / "empty", "holds no image"),
        (market / "query", "is only one part of the Market-1501 folder"),
        (tmp_path, "is the folder above"),
        (tmp_path / "none", "There is no dataset at"),
    ):
        assert mistake in refusal(load_datasets, DataConfig(labeled=[str(market)], unlabeled=[str(path)]))
