"""MSMT17: V1, and V2, in which faces are blurred."""

from pathlib import Path

from dan_fast.core.errors import DanFastError
from dan_fast.data.datasets.finding import locate, missing_files
from dan_fast.data.samples import Counts, KnownDataset, ReIDDataset, Sample

# Folders of the training and of the test images.
_IMAGES = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}
_LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
# Both halves number their people from 0.
_TRAIN_IDS = 1041


def _homes(folder: Path) -> dict[str, Path]:
    """The folder of each version at, or right below, a folder."""
    homes = {}
    for version, (train, _) in _IMAGES.items():
        below = folder / f"MSMT17_{version}"
        for home in (folder, below, below / below.name):
            # The name "train" is not enough: any dataset might use it.
            if (home / train).is_dir() and any((home / name).is_file() for name in _LISTS):
                homes[version] = home
                break
    return homes


def _find(folder: Path) -> Path | None:
    parts = tuple(name for pair in _IMAGES.values() for name in pair)
    place = locate(folder, lambda each: bool(_homes(each)), ("msmt17",), parts)
    homes = set(_homes(place).values()) if place is not None else set()
    return homes.pop() if len(homes) == 1 else place


def _variants(folder: Path) -> tuple[str, ...]:
    return tuple(_homes(folder))


def read_msmt17(folder: Path, name: str, variant: str) -> ReIDDataset:
    """Reads MSMT17 by its four lists.

    The training split is list_train.txt and list_val.txt together, the 32,621 images of the paper; some code
    bases train on the 30,248 of list_train.txt. People of the test half are numbered from 1041 on, after those
    of the training half, so that a number is one person.

    Raises:
        DanFastError: an absent list, a line that is none, images that do not exist.
    """
    home = _homes(folder)[variant]
    train, test = (home / part for part in _IMAGES[variant])
    return ReIDDataset(
        name,
        home,
        train=_read_list(home / "list_train.txt", train) + _read_list(home / "list_val.txt", train),
        query=_read_list(home / "list_query.txt", test, _TRAIN_IDS),
        gallery=_read_list(home / "list_gallery.txt", test, _TRAIN_IDS),
        variant=variant,
        # The versions show the same people, by the same numbers, and lie in folders of their own.
        identities=MSMT17.title,
    )


def _read_list(file: Path, images: Path, first_pid: int = 0) -> tuple[Sample, ...]:
    if not file.is_file():
        raise DanFastError(f"MSMT17 lacks {file}; put the list of the original archive there.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DanFastError(f"{file} is no text in UTF-8; restore the list of the original archive.") from error
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            relative, pid = line.rsplit(maxsplit=1)
            # 0000/0000_000_01_0303morning_0015_0.jpg: the third number is the camera.
            camid = int(relative.rpartition("/")[2].split("_")[2])
            if not pid.isdecimal():
                raise ValueError(pid)
            samples.append(Sample(images / relative, first_pid + int(pid), camid))
        except (ValueError, IndexError) as error:
            raise DanFastError(
                f"{file}, line {number}: {line!r} is not an image and its person "
                "(0000/0000_000_01_0303morning_0015_0.jpg 0); restore the list of the original archive."
            ) from error
    missing = missing_files(sample.path for sample in samples)
    if missing:
        raise DanFastError(
            f"{len(missing)} of the {len(samples)} images in {file} do not exist, {missing[0]} the first; "
            "unpack the archive anew."
        )
    return tuple(samples)


_COUNTS = {"train": Counts(1041, 15, 32621), "query": Counts(3060, 15, 11659), "gallery": Counts(3060, 15, 82161)}

MSMT17 = KnownDataset(
    name="msmt17",
    title="MSMT17",
    find=_find,
    read=read_msmt17,
    counts={"V1": _COUNTS, "V2": _COUNTS},
    source="Wei et al., CVPR 2018",
    origin="the MSMT17 page of the PKU-VMC lab, which asks for a signed release agreement",
    variants=_variants,
)
