"""CUHK03: people in boxes drawn by hand (labeled) or by a detector (detected), under a classic or a new protocol.

The four combinations give figures that lie far apart, and papers often do not state which one they used: none of them
is a default here, and the variant goes with every result.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from dan_fast.core.errors import DanFastError
from dan_fast.data.datasets.cuhk03_archive import ARCHIVE, RELEASE, archive_of, extract_cuhk03
from dan_fast.data.datasets.file_names import are_named
from dan_fast.data.datasets.finding import image_files, locate, missing_files
from dan_fast.data.datasets.market1501 import PARTS, is_market1501, read_market1501
from dan_fast.data.samples import Counts, KnownDataset, ReIDDataset, Sample

BOXES = ("detected", "labeled")
_CLASSIC_SPLITS = 20
# 1_001_2_06.png: pair of cameras, person, camera of the pair, image.
_NAME = re.compile(r"(\d+)_(\d+)_(\d+)_(\d+)\.")
# Every pair numbers its people anew, from 1 to at most 843.
_PIDS_OF_A_PAIR = 1000
_CONFIG = "cuhk03_new_protocol_config_{}.mat"
_VARIANT = re.compile(r"(detected|labeled), (?:(new) protocol|classic protocol, split (\d+))")


def _images(folder: Path, box: str) -> Path:
    return folder / f"images_{box}"


def _holds(folder: Path) -> bool:
    return (
        any(are_named(_images(folder, box), _NAME) or _is_new_protocol(folder, box) for box in BOXES)
        or archive_of(folder) is not None
    )


def _is_new_protocol(folder: Path, box: str) -> bool:
    """Whether it is CUHK03-NP by a name above or its size: people have folders "labeled" of their own."""
    place = folder.absolute()
    train = CUHK03.counts[f"{box}, new protocol"]["train"].images
    return is_market1501(folder / box) and (
        any("cuhk03" in name.lower() for name in (place.name, place.parent.name))
        or len(image_files(folder / box / PARTS["train"])) == train
    )


def _find(folder: Path) -> Path | None:
    parts = (*(f"images_{box}" for box in BOXES), *BOXES, RELEASE)
    # The archive's folder can be read by itself, but the folder above it also has the extracted images.
    above = folder.absolute().parent
    if folder.absolute().name == RELEASE and any(_images(above, box).is_dir() for box in BOXES):
        return above
    return locate(folder, _holds, ("cuhk03", "CUHK03-NP", "cuhk03-np", RELEASE), parts)


def _new_split(folder: Path, box: str) -> Path:
    """The file with the split of the new protocol; where there is none, the path that it should have."""
    config = _CONFIG.format(box)
    files = (folder / f"splits_new_{box}.json", folder / config, folder / RELEASE / config)
    return next((file for file in files if file.is_file()), files[1])


def _classic_splits(folder: Path, box: str) -> Path:
    return folder / f"splits_classic_{box}.json"


def _variants(folder: Path) -> tuple[str, ...]:
    variants = []
    for box in BOXES:
        images = _images(folder, box).is_dir()
        if is_market1501(folder / box) or (images and _new_split(folder, box).is_file()):
            variants.append(f"{box}, new protocol")
        if images and _classic_splits(folder, box).is_file():
            variants += [f"{box}, classic protocol, split {split}" for split in range(1, _CLASSIC_SPLITS + 1)]
    return tuple(variants)


def read_cuhk03(folder: Path, name: str, variant: str) -> ReIDDataset:
    """Reads CUHK03 from its extracted images and the files of its splits, or from CUHK03-NP's folders.

    A pid is 1000 times the pair of cameras plus the person's number in it, or CUHK03-NP's own number; a camid is 1 or
    2, the camera in its pair. Under the classic protocol (Li et al., CVPR 2014) all images of the 100 test people are
    query and gallery at once: it is single-shot, a gallery is one image of each person, drawn anew many times. Under
    the new one (Zhong et al., CVPR 2017), and in CUHK03-NP, all matches in the gallery count.

    Variants are such as "detected, new protocol" or "labeled, classic protocol, split 1", up to split 20.

    Raises:
        DanFastError: images or splits that are still in the archive or absent, or do not fit each other.
    """
    match = _VARIANT.fullmatch(variant)
    if match is None or variant not in _variants(folder):
        raise DanFastError(_what_is_missing(folder))
    box, new, split = match.groups()
    if new and is_market1501(folder / box):
        parts = read_market1501(folder / box, name)
        # Its numbers from 1 on are those of other persons than the same numbers in the archive.
        numbering = f"CUHK03-NP in {os.path.realpath(folder)}"
        return ReIDDataset(name, folder, parts.train, parts.query, parts.gallery, variant=variant, identities=numbering)
    file = _new_split(folder, box) if new else _classic_splits(folder, box)
    if file.suffix == ".mat":
        named = _read_config(file)
    else:
        named = _read_json(file, 0 if new else int(split) - 1)
    splits = {part: _samples(_images(folder, box), names) for part, names in named.items()}
    return ReIDDataset(name, folder, **splits, variant=variant, single_shot=not new)


def _samples(folder: Path, names: Iterable[str]) -> tuple[Sample, ...]:
    """The images of a folder that a part of a split names."""
    samples = []
    for name in names:
        match = _NAME.match(name)
        if match is None:
            raise DanFastError(
                f"CUHK03's splits name {name}, which is not named like one of its images (1_001_2_06.png: "
                "pair of cameras, person, camera, image); get the splits anew."
            )
        pair, person, camera, _ = map(int, match.groups())
        samples.append(Sample(folder / name, _PIDS_OF_A_PAIR * pair + person, camera))
    missing = missing_files(sample.path for sample in samples)
    if missing:
        raise DanFastError(
            f"{len(missing)} of the {len(samples)} images that CUHK03's splits name are not in {folder}, "
            f"{missing[0].name} the first; extract them anew."
        )
    return tuple(samples)


def _read_json(file: Path, split: int) -> dict[str, list[str]]:
    # The file gives paths on the machine that wrote it, and pids that restart from 0 in every split.
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))
        chosen = splits[split]
        return {
            part: [re.split(r"[\\/]", entry[0])[-1] for entry in chosen[part]] for part in ("train", "query", "gallery")
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DanFastError(
            f"{file} does not list train, query and gallery of split {split + 1} ({type(error).__name__}: {error}); "
            "remove it and extract the splits anew."
        ) from error


def _read_config(file: Path) -> dict[str, list[str]]:
    from scipy.io import loadmat

    try:
        config = loadmat(file)
        names = [str(cell[0]) for cell in config["filelist"].ravel()]
        # MATLAB counts from 1.
        return {
            part: [names[index - 1] for index in config[f"{part}_idx"].ravel().tolist()]
            for part in ("train", "query", "gallery")
        }
    # SciPy raises many kinds of exception on files that are no MATLAB files, or damaged ones.
    except Exception as error:
        raise DanFastError(f"{file} cannot be read as CUHK03's new protocol ({error}); get it anew.") from error


def _what_is_missing(folder: Path) -> str:
    if not any(_images(folder, box).is_dir() for box in BOXES):
        return (
            f"{folder} holds CUHK03 in its MATLAB file {ARCHIVE} only; "
            f"`dan-fast datasets {folder} --extract` writes images and classic splits beside it (it needs h5py)."
        )
    return (
        f"{folder} lacks splits of CUHK03: for the new protocol put {_CONFIG.format('detected')} and "
        f"{_CONFIG.format('labeled')} of Zhong et al.'s person-re-ranking there; for the classic one put "
        f"{RELEASE}/{ARCHIVE} there and run `dan-fast datasets {folder} --extract`."
    )


def _counts() -> dict[str, dict[str, Counts]]:
    counts = {
        f"{box}, new protocol": {
            "train": Counts(767, 2, train),
            "query": Counts(700, 2, 1400),
            "gallery": Counts(700, 2, gallery),
        }
        for box, train, gallery in (("detected", 7365, 5332), ("labeled", 7368, 5328))
    }
    # How many images the 100 people have differs from split to split.
    classic = {"train": Counts(1367, 2, None), "query": Counts(100, 2, None), "gallery": Counts(100, 2, None)}
    for box in BOXES:
        counts |= {f"{box}, classic protocol, split {split}": classic for split in range(1, _CLASSIC_SPLITS + 1)}
    return counts


CUHK03 = KnownDataset(
    name="cuhk03",
    title="CUHK03",
    find=_find,
    read=read_cuhk03,
    counts=_counts(),
    source="Li et al., CVPR 2014 and Zhong et al., CVPR 2017",
    origin="the CUHK person re-identification page of Xiaogang Wang, on request; the new protocol's splits are part "
    "of Zhong et al.'s person-re-ranking",
    variants=_variants,
    extract=extract_cuhk03,
)
