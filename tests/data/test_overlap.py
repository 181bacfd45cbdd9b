"""No person is both trained on and tested on, by whatever path, link or variant the two datasets are named."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dan_fast.data import ReIDDataset, Sample, TrainingSet, load_dataset
from dan_fast.data.named_protocols import DatasetRoles
from dan_fast.data.overlap import image_keys, persons_in_both, persons_tested, taken_for_one
from dan_fast.training.config import DataConfig, TrainConfig
from dan_fast.training.reported import SEEN, of_its_own_cameras, opening_lines, seen_of
from dan_fast.training.sources import load_datasets
from tests.support.dataset_shelf import touch
from tests.support.refusals import refusal
from tests.support.written_sets import cuhk03_of, manifest


@pytest.fixture
def cuhk03(tmp_path: Path) -> Path:
    """Three people; the new protocol trains on two of them and tests on the third, the classic one turns that round."""
    one, two, three = ([f"1_{pid:03}_{camera}_{5 * camera:02}.png" for camera in (1, 2)] for pid in (1, 2, 3))
    new = {"train": [*one, *two], "query": three[:1], "gallery": three[1:]}
    return cuhk03_of(tmp_path / "data" / "cuhk03", new, {"train": three, "query": one, "gallery": one})


def refused(**data: object) -> str:
    return refusal(load_datasets, DataConfig(**data))


def test_another_variant_of_a_dataset_trained_on_is_refused(cuhk03: Path) -> None:
    message = refused(labeled=f"{cuhk03}@labeled new", targets=f"{cuhk03}@labeled classic split 1")
    assert message.startswith(
        "This training would train on people of its target CUHK03 (labeled, classic protocol, split 1): 1 of them, "
        f"person 1001 the first, are among the train images of CUHK03 (labeled, new protocol) ({cuhk03}); "
    )
    assert "name other datasets or variants in data.labeled, data.unlabeled or data.targets" in message
    # The other boxes show the same people.
    assert "1 of them" in refused(labeled=f"{cuhk03}@detected new", targets=f"{cuhk03}@labeled classic split 1")
    own = DataConfig(labeled=f"{cuhk03}@labeled new", targets=[f"{cuhk03}@labeled new", f"{cuhk03}@detected new"])
    variants = [target.variant for target in load_datasets(own).targets]
    assert variants == ["labeled, new protocol", "detected, new protocol"]


def test_links_do_not_hide_a_dataset(cuhk03: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cuhk03)
    (tmp_path / "above").symlink_to(cuhk03.parent)
    for path in (tmp_path / "link", tmp_path / "above" / "cuhk03"):
        assert "person 1001" in refused(labeled=f"{cuhk03}@labeled new", targets=f"{path}@labeled classic split 1")


def test_unlabelled_images_are_trained_on_unless_no_share_is_taken(cuhk03: Path, tmp_path: Path) -> None:
    data = {"labeled": manifest(tmp_path / "campus", train=[1, 1001]), "unlabeled": f"{cuhk03}@labeled new",
            "targets": f"{cuhk03}@labeled classic split 1"}  # fmt: skip
    assert "person 1001" in refused(**data)
    assert load_datasets(DataConfig(**data, unlabeled_share=0.0)).unlabeled


def test_persons_of_a_manifest(tmp_path: Path) -> None:
    apart = manifest(tmp_path / "apart", train=[1, 1, 2, 2], query=[3], gallery=[0, 3])
    assert load_datasets(DataConfig(labeled=apart, targets=apart))
    # The same numbers elsewhere are other persons.
    other = manifest(tmp_path / "other", test=[1, 1, 2, 2])
    assert load_datasets(DataConfig(labeled=apart, targets=[apart, other]))
    for split in ("query", "gallery"):
        splits = {"train": [1, 2, 4], "query": [3], "gallery": [0, 3], split: [4, 3]}
        assert "1 of them, person 4 the first" in refused(
            labeled=manifest(tmp_path / split, **splits), targets=str(tmp_path / split)
        )
    both = manifest(tmp_path / "both", train=[1, 1, 2, 2], test=[2, 2, 5, 5])
    assert "1 of them, person 2 the first" in refused(labeled=both, targets=both)


def listed(manifest: Path, of: Path, rows: list[tuple[str, int | str, str]]) -> str:
    """A manifest that names images of the folder `of` from elsewhere: file name, pid and split."""
    manifest.parent.mkdir(parents=True, exist_ok=True)
    there = os.path.relpath(of, manifest.parent)
    lines = [f"{there}/{name},{pid},1,{split}" for name, pid, split in rows]
    manifest.write_text("\n".join(["path,pid,camid,split", *lines]) + "\n")
    return str(manifest)


def test_the_same_files_under_another_root_and_number_are_the_same_persons(tmp_path: Path) -> None:
    folder = tmp_path / "market"
    target = manifest(folder, test=[1, 1, 2, 2])
    apart = manifest(tmp_path / "campus", train=[1, 2])
    # Other numbers, and none at all, from a manifest beside it, above it, and through a link to each file.
    again = [("test0.jpg", 7, "train"), ("test1.jpg", 7, "train")]
    unknown = [(name, "", "train") for name, *_ in again]
    (tmp_path / "links").mkdir()
    for name, *_ in again:
        (tmp_path / "links" / name).symlink_to(folder / name)
    for place, of in (("beside/m.csv", folder), ("above.csv", folder), ("linked/m.csv", tmp_path / "links")):
        message = refused(labeled=[apart, listed(tmp_path / place, of, again)], targets=target)
        assert "would train on people of its target market: 1 of them, person 1 the first" in message
        unlabeled = listed(tmp_path / place, of, unknown)
        assert "1 of them, person 1 the first" in refused(labeled=apart, unlabeled=unlabeled, targets=target)
    distractors = listed(tmp_path / "distractors.csv", folder, [("test0.jpg", 0, "train"), ("test2.jpg", 3, "train")])
    other = manifest(folder, query=[5, 5, 6], gallery=[5, 6], train=[1])
    assert load_datasets(DataConfig(labeled=apart, unlabeled=distractors, targets=other)).unlabeled


def test_a_checkpoint_knows_the_files_it_was_trained_on(tmp_path: Path) -> None:
    target = load_dataset(manifest(tmp_path / "market", test=[1, 1, 2, 2]))
    rows = [("test0.jpg", 7, "train"), ("test1.jpg", 8, "train")]
    trained = TrainingSet([load_dataset(listed(tmp_path / "again.csv", tmp_path / "market", rows))])
    assert seen_of({"persons": trained.persons, "images": trained.images}, target) == f"1 {SEEN}"
    assert seen_of({"persons": trained.persons}, target) == "", "older checkpoints do not know"


def test_a_relative_path_is_of_the_folder_that_one_works_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in (tmp_path / "a", tmp_path / "b"):
        manifest(home / "data", test=[1, 1, 2, 2])
        rows = [("test0.jpg", 7, "train"), ("test1.jpg", 8, "train")]
        again = listed(home / "again" / "m.csv", home / "data", rows)
        monkeypatch.chdir(home)
        assert "person 1 the first" in refused(labeled=again, targets="data")


def test_manifests_of_one_folder_with_the_same_pids_are_named(tmp_path: Path, cuhk03: Path) -> None:
    pids = {"shop": (1, 2), "street": (2, 3, 4), "square": (5, -1), "mall": (6, -1)}
    paths = [
        listed(tmp_path / f"{name}.csv", tmp_path, [(f"{name}{pid}.jpg", pid, "train") for pid in of])
        for name, of in pids.items()
    ]
    touch(tmp_path, [f"{name}{pid}.jpg" for name, of in pids.items() for pid in of])
    datasets = [load_dataset(path) for path in paths]
    (said,) = taken_for_one(datasets)
    assert said.startswith("1 persons, 2 the first, are taken for the same ones in shop and in street, which lie")
    (tmp_path / "apart").mkdir()
    apart = load_dataset(manifest(tmp_path / "apart", train=[1, 2]))
    boxes = [load_dataset(f"{cuhk03}@{box} new") for box in ("detected", "labeled")]
    assert list(taken_for_one([datasets[0], apart, *boxes])) == []
    roles = DatasetRoles(tuple(datasets[:1]), tuple(datasets[1:]), ())
    config = TrainConfig.of_recipe("plain", data={"labeled": paths[0]})
    assert said in list(opening_lines(config, roles, torch.device("cpu"), {"ran_under": []}))


def test_manifests_of_one_folder_that_one_is_named_by_a_link_number_alike(tmp_path: Path) -> None:
    home = tmp_path / "market"
    target = manifest(home, test=[1, 1, 2, 2])
    touch(home, ["train0.jpg"])
    (tmp_path / "link").symlink_to(home)
    labeled = listed(tmp_path / "link" / "labeled.csv", tmp_path / "link", [("train0.jpg", 2, "train")])
    assert "person 2 the first" in refused(labeled=labeled, targets=target)


def test_an_image_of_two_datasets_is_trained_on_once(tmp_path: Path) -> None:
    market = load_dataset(manifest(tmp_path / "market", train=[1, 1, 2, 2]))
    again = load_dataset(listed(tmp_path / "again.csv", tmp_path / "market", [("train0.jpg", 7, "train")]))
    assert "train0.jpg of again is labelled twice" in refusal(TrainingSet, [market, again])


def test_two_names_of_one_file_in_a_dataset_are_both_named(tmp_path: Path) -> None:
    images = tmp_path / "market" / "bounding_box_train"
    touch(images, ["0001_c1s1_0.jpg", "0002_c1s1_0.jpg"])
    (images / "0001_c2s1_0.jpg").symlink_to(images / "0001_c1s1_0.jpg")
    said = refusal(TrainingSet, [load_dataset(tmp_path / "market")])
    assert "0001_c1s1_0.jpg and " in said and "0001_c2s1_0.jpg of market are one file; remove one" in said


def test_distractors_and_unknown_persons_are_nobody() -> None:
    root = Path("/data/market")
    samples = {pid: Sample(root / f"{pid}.jpg", pid, 1) for pid in (-1, 0, 5, 6)}
    target = ReIDDataset("market", root, query=(samples[5],), gallery=tuple(samples.values()))
    assert persons_tested(target) == {5, 6}
    trained = {"/data/market": {-1, 0, 6, 7}, "/data/duke": {5}}
    assert persons_in_both(trained, target) == [6]
    images = set(image_keys((samples[-1], samples[0], samples[5])))
    assert persons_in_both({}, target, images) == [5]
    # Who is searched for is somebody, by whatever number.
    searched = replace(target, query=(samples[0],))
    assert persons_in_both(trained, searched) == [0, 6] and persons_in_both({}, searched, images) == [0, 5]


def test_a_checkpoint_tells_how_many_of_a_targets_persons_were_trained_on() -> None:
    root = Path("/data/market")
    train = tuple(Sample(root / f"{n}.jpg", pid, 1) for n, pid in enumerate((1, 2, 2, -1)))
    unlabeled = ReIDDataset("duke", Path("/data/duke"), train=(Sample(Path("/data/duke/0.jpg"), 9, 1),))
    persons = TrainingSet([ReIDDataset("market", root, train=train)], [unlabeled]).persons
    assert {root: pids.tolist() for root, pids in persons.items()} == {"/data/market": [1, 2], "/data/duke": [9]}
    tested = tuple(Sample(root / f"{n}.jpg", pid, 1) for n, pid in enumerate((2, 2, 3, 3)))
    target = ReIDDataset("market", root, test=tested)
    assert seen_of({"persons": persons}, target) == f"1 {SEEN}"
    assert seen_of({}, target) == "", "older checkpoints do not know"
    assert seen_of({"persons": {"/data/duke": persons["/data/market"]}}, target) == ""
    assert of_its_own_cameras({"persons": persons}, target) and not of_its_own_cameras({}, target)
    # Without pids, by where the set lies.
    nobody = ReIDDataset("street", Path("/data/street"), train=(Sample(Path("/data/street/0.jpg"), -1, -1),))
    roots = TrainingSet([ReIDDataset("market", root, train=train)], [nobody]).roots
    assert roots == ("/data/market", "/data/street")
    street = ReIDDataset("street", Path("/data/street"), test=tested)
    assert of_its_own_cameras({"persons": {}, "roots": roots}, street)
    assert TrainingSet([ReIDDataset("market", root, train=train)], [nobody], 0.0).roots == ("/data/market",)
    assert not of_its_own_cameras({"persons": {"/data/duke": persons["/data/market"]}}, target)
