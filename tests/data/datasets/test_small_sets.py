"""VIPeR, PRID, GRID and i-LIDS: every layout, what the literature counts, and one sentence for each mistake."""

from pathlib import Path

import pytest

from dan_fast.data.datasets.fixed_splits import read_lists
from dan_fast.data.datasets.grid import GRID
from dan_fast.data.datasets.ilids import ILIDS
from dan_fast.data.datasets.known import KNOWN, check_counts, find_datasets
from dan_fast.data.datasets.load import all_images, load_dataset
from dan_fast.data.datasets.prid import PRID
from dan_fast.data.datasets.viper import VIPER
from dan_fast.data.samples import FixedSplit, KnownDataset, ReIDDataset
from tests.support.dataset_shelf import SMALL_SETS, VIPER_NUMBERS, tiny_image, touch
from tests.support.refusals import refusal

NAMED = read_lists("ilids")[1][3]["gallery"][7]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ReIDDataset]:
    datasets = {}
    for name, (known, make) in SMALL_SETS.items():
        folder = tmp_path_factory.mktemp(name)
        make(folder)
        assert known.find(folder) == folder
        datasets[name] = known.read(folder, known.title, "")
    return datasets


@pytest.mark.parametrize(
    ("known", "layout", "files"),
    [
        (VIPER, layout, ("cam_a/007_0.bmp", "cam_b/007_90.bmp"))
        for layout in ("viper/VIPeR", "VIPeR", "viper", "VIPeR.v1.0", "viper/VIPeR.v1.0")
    ]
    + [
        (PRID, layout, ("cam_a/person_0201.png", "cam_b/person_0201.png"))
        for layout in ("prid2011/prid_2011/single_shot", "prid_2011/single_shot", "prid/single_shot", "single_shot")
    ]
    + [
        (GRID, layout, ("probe/0001_1_25004_107_32_106_221.jpeg", "gallery/0000_2_25023_116_134_128_330.jpeg"))
        for layout in ("grid/underground_reid", "underground_reid", "GRID")
    ]
    + [
        (GRID, layout, ("images/0000_2_25023_116_134_128_330.jpeg", "images/0001_1_25004_107_32_106_221.jpeg"))
        for layout in ("underground_reid", "grid/underground_reid")
    ]
    + [
        (ILIDS, layout, ("0001001.jpg", "0119004.jpg"))
        for layout in ("ilids/i-LIDS_Pedestrian/Persons", "i-LIDS_Pedestrian/Persons", "QMUL-iLIDS/images")
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_every_layout_is_found(tmp_path: Path, known: KnownDataset, layout: str, files: tuple[str, ...]) -> None:
    own = tmp_path / layout
    parts = {tiny_image(own / file).parent for file in files}
    for place in (own, *own.parents, *parts):
        if place.is_relative_to(tmp_path):
            assert known.find(place) == own
    assert [other.name for other in KNOWN.values() if other.find(own) is not None] == [known.name]
    dataset = load_dataset(tmp_path)
    assert (dataset.name, dataset.root, len(dataset.test)) == (known.title, own, len(files))
    assert load_dataset(own / files[0].split("/")[0] if "/" in files[0] else own).test == dataset.test
    (found,) = find_datasets(tmp_path)
    assert (found.known, found.path, found.error) == (known, own, "") and len(found.differences) == 2


@pytest.mark.parametrize("name", SMALL_SETS)
def test_other_folders_are_none_of_them(tmp_path: Path, name: str) -> None:
    known = SMALL_SETS[name][0]
    assert known.find(tmp_path) is None and known.find(tmp_path / "absent") is None
    for other in ("cam_a/s1.png", "cam_b/s2.png", "probe/1.jpeg", "gallery/2.jpeg", "Persons/0000001.jpg", "x.jpg"):
        tiny_image(tmp_path / other)
    # PRID's other half: a folder a person, in the same cameras.
    tiny_image(tmp_path / "multi_shot/cam_a/person_0001/0001.png")
    tiny_image(tmp_path / "multi_shot/cam_b/person_0001/0001.png")
    assert known.find(tmp_path) is None
    assert known.find(tmp_path / "multi_shot") is None
    assert known.find(tmp_path / "x.jpg") is None


def test_one_stray_image_hides_no_set_and_frames_of_a_clip_are_none(tmp_path: Path) -> None:
    touch(tmp_path / "VIPeR", [f"cam_{camera}/{pid}_45.bmp" for camera in "ab" for pid in ("000", "001")])
    touch(tmp_path / "VIPeR", ["cam_a/(1).bmp"])
    said = refusal(load_dataset, tmp_path / "VIPeR")
    assert "(1).bmp is not named like the images beside it (000_45.bmp)" in said
    for count in (5, 20):
        touch(tmp_path / f"clip{count}", [f"{1001 + frame:07}.jpg" for frame in range(count)])
        assert ILIDS.find(tmp_path / f"clip{count}") is None
    touch(tmp_path / "images", ["0001001.jpg", "0001002.jpg", "0002001.jpg", "0002002.jpg"])
    assert ILIDS.find(tmp_path) == tmp_path / "images"


@pytest.mark.parametrize("name", SMALL_SETS)
def test_the_counts_of_the_literature(whole: dict[str, ReIDDataset], name: str) -> None:
    known, dataset = SMALL_SETS[name][0], whole[name]
    assert check_counts(dataset, known) == []
    assert dataset.splits is not None and dataset.splits.missing == ""
    assert [sample.path for sample in dataset.test] == sorted(
        (sample.path for sample in dataset.test), key=lambda path: (path.parent.name != "probe", path)
    )
    assert (dataset.train, dataset.query, dataset.gallery) == ((), (), ())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("viper", (2 * 316, 316, 316)),
        ("prid", (2 * 100, 100, 649)),
        ("grid", (2 * 125, 125, 900)),
        ("ilids", (None, 60, 60)),
    ],
)
def test_ten_splits_of_the_right_sizes(
    whole: dict[str, ReIDDataset], name: str, sizes: tuple[int | None, int, int]
) -> None:
    dataset = whole[name]
    known = set(dataset.test)
    assert len(dataset.splits.splits) == 10
    for split in dataset.splits.splits:
        for part, size in zip(split, sizes, strict=True):
            assert size is None or len(part) == size
            assert len(set(part)) == len(part) and known.issuperset(part)
        people = [{sample.pid for sample in part} for part in split]
        assert not people[0] & (people[1] | people[2]) and not set(split.query) & set(split.gallery)
        assert len(people[1]) == len(split.query)
        # Everyone searched for is there once to be found, by another camera.
        for sample in split.query:
            (match,) = [other for other in split.gallery if other.pid == sample.pid]
            assert match.camid != sample.camid
    assert len(set(dataset.splits.splits)) == 10


@pytest.mark.parametrize(
    ("name", "query", "gallery"),
    [("viper", "cam_a", "cam_b"), ("prid", "cam_a", "cam_b"), ("grid", "probe", "gallery")],
)
def test_which_camera_is_searched_in_which(whole: dict[str, ReIDDataset], name: str, query: str, gallery: str) -> None:
    for split in whole[name].splits.splits:
        of_parts = [{sample.path.parent.name for sample in part} for part in (split.train, split.query, split.gallery)]
        assert of_parts == [{query, gallery}, {query}, {gallery}]


def test_viper_counts_people_where_numbers_have_gaps(whole: dict[str, ReIDDataset]) -> None:
    lists = read_lists("viper")[1]
    for named, split in zip(lists, whole["viper"].splits.splits, strict=True):
        assert [sample.pid for sample in split.query] == [VIPER_NUMBERS[place] + 1 for place in named["test"]]
        assert [sample.pid for sample in split.gallery] == [VIPER_NUMBERS[place] + 1 for place in named["test"]]
        assert {sample.camid for sample in split.query} == {1}
    assert 0 not in {sample.pid for sample in whole["viper"].test}


def test_prid_knows_who_is_in_one_camera_only(whole: dict[str, ReIDDataset]) -> None:
    dataset = whole["prid"]
    seen = [{sample.pid for sample in dataset.test if sample.camid == camid} for camid in (1, 2)]
    assert [len(each) for each in seen] == [385, 749] and seen[0] & seen[1] == set(range(1, 201))
    for named, split in zip(read_lists("prid")[1], dataset.splits.splits, strict=True):
        assert [sample.pid for sample in split.query] == named["test"]
        strangers = [sample for sample in split.gallery if sample.pid > 200]
        assert [sample.path.name for sample in strangers] == [f"person_{n:04}.png" for n in range(201, 750)]


def test_grid_searches_among_all_distractors(whole: dict[str, ReIDDataset]) -> None:
    dataset = whole["grid"]
    assert {sample.camid for sample in dataset.test} == set(range(1, 7))
    for named, split in zip(read_lists("grid")[1], dataset.splits.splits, strict=True):
        assert [sample.pid for sample in split.query] == named["test"]
        assert sum(sample.pid == 0 for sample in split.gallery) == 775
        assert all(sample.pid for sample in split.train)
    whole_set = all_images(dataset)
    assert len(whole_set.train) == 500 and whole_set.splits is None


def test_grid_with_all_images_in_one_folder(whole: dict[str, ReIDDataset], tmp_path: Path) -> None:
    touch(tmp_path / "images", [sample.path.name for sample in whole["grid"].test])
    dataset = GRID.read(tmp_path, "GRID", "")

    def people(splits: tuple[FixedSplit, ...]) -> list[list[tuple[int, int]]]:
        return [[(sample.pid, sample.camid) for sample in part] for split in splits for part in split]

    assert check_counts(dataset, GRID) == []
    assert people(dataset.splits.splits) == people(whole["grid"].splits.splits)


def test_ilids_names_the_images(whole: dict[str, ReIDDataset]) -> None:
    dataset = whole["ilids"]
    for named, split in zip(read_lists("ilids")[1], dataset.splits.splits, strict=True):
        assert [sample.path.stem for sample in split.query] == named["query"]
        assert [sample.path.stem for sample in split.gallery] == named["gallery"]
        assert [sample.pid for sample in split.query] == [sample.pid for sample in split.gallery]
        assert sorted({sample.pid for sample in split.train}) == named["train"] and len(named["train"]) == 59
        assert len(split.train) == sum(sample.pid in named["train"] for sample in dataset.test)
    # Images of one person differ in what stands in for the camera: none is junk for another one.
    for pid in range(1, 120):
        numbers = [sample.camid for sample in dataset.test if sample.pid == pid]
        assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize(
    ("name", "file", "missing"),
    [
        ("viper", "cam_b/541_*.bmp", "there are 631 people in both cameras, not 632"),
        ("viper", "+cam_?/999_0.bmp", "there are 633 people in both cameras, not 632"),
        ("prid", "cam_b/person_0700.png", "an image that the splits name, cam_b/person_0700 the first"),
        ("grid", "gallery/0000_3_*.jpeg", "129 images that the splits name, distractor 647 of 775 the first"),
        ("grid", "probe/0017_*.jpeg", "an image that the splits name, probe/0017 the first"),
        ("ilids", f"{NAMED}.jpg", f"an image that the splits name, {NAMED} the first"),
    ],
)
def test_a_folder_that_lacks_images_or_has_too_many_can_be_read_but_has_no_splits(
    tmp_path: Path, name: str, file: str, missing: str
) -> None:
    known, make = SMALL_SETS[name]
    make(tmp_path)
    if file.startswith("+"):
        touch(tmp_path, [file[1:].replace("?", camera) for camera in "ab"])
    else:
        removed = list(tmp_path.glob(file.replace("541", str(VIPER_NUMBERS[299]))))
        assert removed
        for path in removed:
            path.unlink()
    dataset = known.read(tmp_path, known.title, "")
    assert dataset.splits.missing == missing and dataset.splits.splits == ()
    counts, splits = check_counts(dataset, known)
    assert counts.startswith(f"The test split of {known.title} ")
    assert splits == f"{known.title} cannot be scored on its fixed splits: {missing}."


@pytest.mark.parametrize(
    ("known", "good", "bad", "again"),
    [
        (VIPER, ("cam_a/000_45.bmp", "cam_b/000_90.bmp"), "cam_b/person.bmp", "cam_b/000_135.bmp"),
        (PRID, ("cam_a/person_0001.png", "cam_b/person_0001.png"), "cam_a/somebody.png", "cam_a/person_0001.jpg"),
        (GRID, ("probe/0001_1_1_1_1_1_1.jpeg", "gallery/0001_2_1_1_1_1_1.jpeg"), "gallery/x.jpeg",
         "probe/0001_2_1_1_1_1_1.jpeg"),
        (ILIDS, ("0001001.jpg", "0001002.jpg"), "01190005.jpg", "0001001.png"),
    ],
    ids=lambda value: value.name if isinstance(value, KnownDataset) else "",
)  # fmt: skip
def test_images_of_another_name_and_two_where_there_can_be_one(
    tmp_path: Path, known: KnownDataset, good: tuple[str, ...], bad: str, again: str
) -> None:
    touch(tmp_path, [*good, *(str(Path(file).with_name("Thumbs.db")) for file in good)])
    assert len(known.read(tmp_path, "tiny", "").test) == len(good)
    (tmp_path / again).touch()
    message = refusal(known.read, tmp_path, "tiny", "")
    assert message.endswith("show the same person and there can be one image only; remove one.")
    (tmp_path / again).rename(tmp_path / bad)
    message = refusal(known.read, tmp_path, "tiny", "")
    assert f"{tmp_path / bad} is not named like the images beside it" in message and message.endswith("remove it.")
