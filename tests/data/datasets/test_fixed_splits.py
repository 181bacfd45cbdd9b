"""The shipped splits: drawn again bit for bit, refused when changed, and all ten of them scored."""

import hashlib
import json
import runpy
import tomllib
from dataclasses import replace
from importlib import resources
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from dan_fast.core.errors import DanFastError
from dan_fast.data.datasets import fixed_splits as module
from dan_fast.data.datasets.fixed_splits import DIGESTS, fixed_splits, read_lists
from dan_fast.data.samples import FixedSplit, FixedSplits, ReIDDataset, Sample
from dan_fast.evaluation import DatasetFeatures, evaluate_dataset, evaluate_features, require_scorable
from dan_fast.evaluation.features import Features
from dan_fast.evaluation.ranking import evaluate_ranking
from dan_fast.training.config import DataConfig
from dan_fast.training.sources import load_datasets
from tests.support import PACKAGE, in_checkout
from tests.support.dataset_shelf import coloured_people, colours, touch
from tests.support.figures import assert_means
from tests.support.refusals import refusal

SIZE = (8, 4)


def test_the_script_draws_the_shipped_files_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(in_checkout("scripts/make_splits.py")))["main"](tmp_path)
    shipped = resources.files("dan_fast.data.datasets") / "splits"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.json" for name in DIGESTS)
    for name, digest in DIGESTS.items():
        content = (tmp_path / f"{name}.json").read_bytes()
        assert content == (shipped / f"{name}.json").read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest == read_lists(name)[0]
    assert dict(line.split() for line in capsys.readouterr().out.splitlines()) == DIGESTS


@pytest.mark.parametrize(
    ("name", "people", "train"),
    [("viper", range(632), 316), ("prid", range(1, 201), 100), ("grid", range(1, 251), 125), ("ilids", None, 59)],
)
def test_what_is_drawn(name: str, people: range | None, train: int) -> None:
    _, lists = read_lists(name)
    assert len(lists) == 10
    tested = []
    for each in lists:
        test = each["test"] if people else [int(image[:4]) for image in each["query"]]
        assert len(each["train"]) == train
        assert sorted(each["train"] + test) == list(people or range(1, 120))
        tested += test
        if people is None:
            assert [int(image[:4]) for image in each["gallery"]] == test
            assert not set(each["query"]) & set(each["gallery"])
    # A person is tested five times of ten; half of them always or never would be no random draw.
    times = np.bincount(tested)
    assert np.sqrt(np.square(times[times > 0] - 5.0).mean()) == pytest.approx(np.sqrt(2.5), rel=0.15)


def test_every_ilids_image_can_be_drawn() -> None:
    counts = runpy.run_path(str(in_checkout("scripts/make_splits.py")))["ILIDS_IMAGES"]
    assert len(counts) == 119 and sum(counts) == 476
    drawn = [image for each in read_lists("ilids")[1] for image in each["query"] + each["gallery"]]
    assert all(1 <= int(image[4:]) <= counts[int(image[:4]) - 1] for image in drawn)
    # The last image of those with many is drawn as others are: an ordinal cut short would show here.
    last = sum(int(image[4:]) == counts[int(image[:4]) - 1] for image in drawn)
    assert last == pytest.approx(sum(1 / counts[int(image[:4]) - 1] for image in drawn), rel=0.15)


def test_a_list_that_was_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "splits").mkdir()
    file = tmp_path / "splits/prid.json"
    monkeypatch.setattr(module.resources, "files", lambda package: tmp_path)
    assert refusal(read_lists, "prid").endswith("prid.json cannot be read (No such file or directory); install again.")
    content = (PACKAGE / "data/datasets/splits/prid.json").read_bytes()
    file.write_bytes(content)
    assert read_lists("prid")[0] == DIGESTS["prid"]
    file.write_bytes(content.replace(b"17,", b"18,", 1))
    said = refusal(read_lists, "prid")
    assert "prid.json was changed: " in said and f" instead of {DIGESTS['prid'][:8]}" in said


def test_images_take_the_place_of_what_is_named(tmp_path: Path) -> None:
    samples = {str(pid): Sample(tmp_path / f"{pid}.png", pid, 1) for pid in range(1, 201)}
    found = fixed_splits("prid", samples, lambda each: (map(str, each["train"]), map(str, each["test"][:3]), ()))
    named = read_lists("prid")[1]
    for split, each in zip(found.splits, named, strict=True):
        assert [sample.pid for sample in split.query] == each["test"][:3]
        assert [sample.pid for sample in split.train] == each["train"]
    assert (found.label, found.missing) == (f"prid {DIGESTS['prid'][:8]}", "")


def test_the_lists_are_package_data() -> None:
    patterns = tomllib.loads(in_checkout("pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = PACKAGE / "data/datasets"
    shipped = {path for pattern in patterns["dan_fast.data.datasets"] for path in folder.glob(pattern)}
    assert shipped >= {folder / f"splits/{name}.json" for name in DIGESTS}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ReIDDataset:
    """Twelve people in two cameras, a colour a person, and ten splits: six of them and two strangers."""
    folder, rng, splits = tmp_path_factory.mktemp("people"), np.random.default_rng(0), []
    samples = coloured_people(folder, 14, 1, 30, rng)
    pairs = [samples[place : place + 2] for place in range(0, len(samples), 2)]
    for _ in range(10):
        chosen = sorted(rng.permutation(12)[:6].tolist())
        query = tuple(pairs[person][0] for person in chosen)
        gallery = tuple(pairs[person][1] for person in [*chosen, 12, 13])
        rest = tuple(sample for person in range(12) if person not in chosen for sample in pairs[person])
        splits.append(FixedSplit(rest, query, gallery))
    fixed = FixedSplits("tiny", "0123456789abcdef" * 4, tuple(splits))
    return ReIDDataset("people", folder, test=tuple(samples), variant="detected, new protocol", splits=fixed)


def test_all_ten_are_scored_on_images_embedded_once(dataset: ReIDDataset) -> None:
    counted = Mock(side_effect=colours)
    result = evaluate_dataset(counted, dataset, SIZE, repeats=3, seed=5)
    assert sum(len(call.args[0]) for call in counted.call_args_list) == len(dataset.test)

    def features(samples: tuple[Sample, ...]) -> torch.Tensor:
        pixels = np.stack([np.asarray(Image.open(sample.path)) for sample in samples]).mean(axis=(1, 2)) / 255
        return torch.from_numpy((pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225))

    each = [
        evaluate_ranking(
            features(split.query),
            features(split.gallery),
            *(np.array([sample.pid for sample in part]) for part in (split.query, split.gallery)),
            *(np.array([sample.camid for sample in part]) for part in (split.query, split.gallery)),
        )
        for split in dataset.splits.splits
    ]
    assert_means(result, each)
    assert (result.repeats, result.num_query, result.num_gallery, result.num_valid) == (10, 6, 8, 6)
    assert evaluate_dataset(colours, dataset, SIZE, repeats=1, seed=9) == result, "repeats and seed are for random ones"


def test_a_result_says_which_splits_and_which_variant(dataset: ReIDDataset) -> None:
    result = evaluate_dataset(colours, dataset, SIZE)
    assert result.protocol == "10 fixed splits, tiny 01234567"
    assert result.splits == "tiny 01234567"
    assert (result.variant, result.title) == ("detected, new protocol", "people (detected, new protocol)")
    written = json.loads(json.dumps(result.to_dict()))
    assert (written["splits"], written["variant"]) == ("tiny 01234567", "detected, new protocol")
    fixed = ReIDDataset("people", dataset.root, query=dataset.test[:6], gallery=dataset.test[6:] + dataset.test[1:2])
    plain = evaluate_dataset(colours, fixed, SIZE)
    assert (plain.splits, plain.variant, plain.title) == ("", "", "people")
    labeled = ReIDDataset("people", dataset.root, query=fixed.query, gallery=fixed.gallery, variant="labeled")
    assert evaluate_dataset(colours, labeled, SIZE).variant == "labeled"


def test_broken_images_are_in_no_split(dataset: ReIDDataset, tmp_path: Path) -> None:
    split = dataset.splits.splits[0]
    lost = split.query[2]
    kept = [sample for sample in dataset.test if sample != lost]
    order = torch.arange(len(kept)).flip(0)
    features = Features(
        torch.eye(len(kept)),
        torch.tensor([sample.pid for sample in kept]),
        torch.tensor([sample.camid for sample in kept]),
        tuple(sample.path for sample in kept),
    ).select(order)
    features = features._replace(skipped=(lost.path,))
    whole = DatasetFeatures("people", None, None, features, splits=dataset.splits)
    query, gallery = whole.split(repeat=0)
    assert query.paths == tuple(sample.path for sample in split.query if sample != lost)
    assert gallery.paths == tuple(sample.path for sample in split.gallery)
    assert gallery.pids.tolist() == [sample.pid for sample in split.gallery]
    result = evaluate_features(whole)
    assert result.repeats == 10 and result.conditions == "10 fixed splits, tiny 01234567; 1 broken images left out"
    unsaid = whole._replace(test=features._replace(skipped=()))
    said = refusal(evaluate_features, unsaid)
    assert said.startswith("The features of people lack 1 images ") and f", {lost.path} the first: embed all" in said


def test_missing_images_are_said_before_any_is_embedded(dataset: ReIDDataset) -> None:
    splits = FixedSplits("tiny", "0123456789", (), "cam_a of person 3")
    incomplete = ReIDDataset("people", dataset.root, test=dataset.test, splits=splits)
    with pytest.raises(DanFastError, match=r"people .* its fixed splits \(tiny 01234567\): cam_a of person 3; comp"):
        evaluate_dataset(Mock(side_effect=AssertionError), incomplete, SIZE)
    require_scorable(dataset)
    require_scorable(ReIDDataset("people", dataset.root, test=dataset.test))
    # Splits that have a match of nobody too.
    lone = tuple(sample for sample in dataset.test if sample.camid == dataset.test[0].camid)
    unseen = replace(dataset, test=lone, splits=replace(dataset.splits, splits=()))
    with pytest.raises(DanFastError, match="people has no person seen by two cameras in its evaluation images"):
        evaluate_dataset(Mock(side_effect=AssertionError), unseen, SIZE)


def test_missing_images_are_said_before_training(tmp_path: Path) -> None:
    names = "market/bounding_box_train/0001_c1s1_000001_00.jpg", "viper/cam_a/000_45.bmp", "viper/cam_b/000_90.bmp"
    touch(tmp_path, names)
    data = DataConfig(labeled=str(tmp_path / "market"), targets=str(tmp_path / "viper"))
    with pytest.raises(DanFastError, match="VIPeR .* there are 1 people in both cameras, not 632; complete the folder"):
        load_datasets(data)
