"""`load_dataset` finds out which dataset lies at a path, in which layout, and reads it."""

import itertools
import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from dan_fast.core.errors import DanFastError
from dan_fast.core.home import expanded
from dan_fast.data.datasets.finding import images_below
from dan_fast.data.datasets.known import KNOWN, check_counts, choose_variant
from dan_fast.data.datasets.manifest import read_manifest
from dan_fast.data.datasets.market1501 import PARTS, is_market1501, is_named_market1501, read_market1501
from dan_fast.data.samples import SPLITS, KnownDataset, ReIDDataset, Sample, real_paths

MANIFEST = "manifest.csv"
_LOG = logging.getLogger(__name__)


class NoDatasetError(DanFastError):
    """A folder that holds no dataset, nor do those up to two levels below it or the one that it is a part of."""


def load_dataset(path: str | Path, name: str | None = None, variant: str | None = None) -> ReIDDataset:
    """Read the dataset at a path: a known one in any layout it is found in, or a Market-1501 folder or manifest.

    The known ones are those of `dan_fast.data.datasets.known.KNOWN`, in the folders of torchreid, of fast-reid or of
    their archives; a folder one level above is accepted too, and so is one inside, except in the Market-1501 layout.
    Where such a dataset differs from the literature, a warning is logged. Any other dataset is a folder in the
    Market-1501 layout, a folder with a manifest.csv, or a .csv manifest.

    The order of the samples depends on the files alone: by name in a folder, by row in a manifest or list. A
    split that is absent is empty.

    Args:
        path: folder or manifest; "PATH@VARIANT" also chooses a variant, where only a path can be given.
        name: what to call the dataset; by default the known dataset's title, else the name of the folder, or of
            the manifest where it has one of its own. A folder in the Market-1501 layout always gives its name.
        variant: which variant of a dataset that has several; enough of its words to select one, such as "detected new"
            for CUHK03's "detected, new protocol". No variant is a default.

    Raises:
        DanFastError: nothing at the path, a folder above several datasets or inside one, a dataset with mistakes in it,
            or a dataset of several variants, none of which is chosen; the message names the choices. `NoDatasetError`:
            a folder without any dataset.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp(), "tiny", "bounding_box_train")
        >>> folder.mkdir(parents=True)
        >>> Image.new("RGB", (4, 8)).save(folder / "0007_c2_000001_00.jpg")
        >>> dataset = load_dataset(folder.parent)
        >>> dataset.name, dataset.train[0].pid, dataset.train[0].camid, dataset.query
        ('tiny', 7, 2, ())
    """
    if not str(path):
        raise DanFastError("The path of a dataset is empty, as by a variable of the shell that is not set: name it.")
    path = expanded(path)
    try:
        if variant is None and not path.exists() and "@" in path.name:
            stem, variant = path.name.rsplit("@", 1)
            path = path.with_name(stem) if stem else path.parent
        return _load(path, name, variant)
    except OSError as error:
        raise DanFastError(
            f"The dataset at {path} cannot be read ({error.strerror}: {error.filename}); check path and permissions."
        ) from error


def read_targets(
    paths: Sequence[str | Path], load: Callable[[str | Path], ReIDDataset] = load_dataset
) -> list[ReIDDataset]:
    """Read the datasets that are tested on by `load`.

    Raises:
        DanFastError: a dataset is named twice; and as `load_dataset`.
    """
    targets = [load(path) for path in paths]
    # One is the same by whatever path it is named.
    identities = list(map(_identity, targets))
    for path, identity in zip(paths, identities, strict=True):
        if identities.count(identity) > 1:
            raise DanFastError(f"The target {path} is named twice: leave one of them out.")
    return targets


def told_apart(datasets: Sequence[ReIDDataset]) -> list[ReIDDataset]:
    """The datasets, those of one title renamed by the folders above them, so that different ones have different titles.

    Results go by names: of "a/test.csv" and "b/test.csv" they could else not be told whose they are.

    Example:
        >>> named = [ReIDDataset("test", Path(folder)) for folder in ("/data/shop", "/data/mall", "/data/mall")]
        >>> [each.name for each in told_apart(named)]
        ['shop/test', 'mall/test', 'mall/test']
    """
    alike: dict[str, dict[Path, list[ReIDDataset]]] = {}
    for dataset in datasets:
        here = alike.setdefault(dataset.title, {}).setdefault(_place(dataset), [])
        if dataset not in here:
            here.append(dataset)

    def named(dataset: ReIDDataset) -> ReIDDataset:
        place, places = _place(dataset), alike[dataset.title]
        # Manifests in one folder can have one name: that of the folder, and the same of their own.
        number = 1 + places[place].index(dataset)
        return replace(dataset, name=_tail(place, places) + (f" ({number})" if number > 1 else ""))

    return [named(dataset) for dataset in datasets]


def is_same(one: ReIDDataset, other: ReIDDataset) -> bool:
    """Whether two are the same images of the same persons, by whatever paths and names they were read."""
    if one == other:
        return True
    if os.path.realpath(one.root) != os.path.realpath(other.root) or one.variant != other.variant:
        return False
    return all(_images(getattr(one, split)) == _images(getattr(other, split)) for split in SPLITS)


def is_manifest(path: Path) -> bool:
    """Whether `load_dataset` takes a file for a manifest."""
    return path.is_file() and path.suffix.lower() == ".csv"


def holds_dataset(folder: Path) -> bool:
    """Whether `load_dataset` would read a dataset in a folder; not whether the folder lies within one.

    Of the Market-1501 layout a folder "query" is not enough, which may be of any images.
    """
    return (
        (folder / MANIFEST).is_file()
        or is_named_market1501(folder)
        or any(place.absolute().is_relative_to(folder.absolute()) for _, place in _known_at(folder))
    )


def load_unlabeled(path: str | Path, load: Callable[[str | Path], ReIDDataset] = load_dataset) -> ReIDDataset:
    """What `load` gives; of a folder that holds no dataset all images below it, of unknown persons and cameras.

    Raises:
        DanFastError: see `load_dataset`; or a folder that holds no image either.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp(), "street")
        >>> folder.mkdir()
        >>> Image.new("RGB", (4, 8)).save(folder / "frame.jpg")
        >>> dataset = load_unlabeled(folder)
        >>> dataset.name, [(sample.path.name, sample.pid, sample.camid) for sample in dataset.train]
        ('street', [('frame.jpg', -1, -1)])
    """
    try:
        return load(path)
    except NoDatasetError:
        folder = expanded(path)
        # PATH@VARIANT; or a manifest by another name, of which more than the train split would be taken.
        if not folder.is_dir() or any(file.suffix.lower() == ".csv" for file in folder.iterdir()):
            raise
    # A link to a file beside it is no image more.
    once = {os.path.realpath(file): file for file in sorted(images_below(folder), key=Path.is_symlink, reverse=True)}
    files = sorted(once.values())
    _LOG.warning("%s holds no dataset: the %d images below it are used without labels.", folder, len(files))
    return ReIDDataset(_own_name(folder), folder, train=tuple(Sample(file, -1, -1) for file in files))


def all_images(dataset: ReIDDataset) -> ReIDDataset:
    """The dataset with every image of an identity as a train image, for protocols that train on whole datasets.

    Train, query, gallery and test images in this order, an image that is in two of them once; distractors (pid 0
    that no query has) and images of unknown identity are left out.

    Example:
        >>> market = ReIDDataset(
        ...     "market",
        ...     Path("market"),
        ...     train=(Sample(Path("market/a.jpg"), 2, 1),),
        ...     query=(Sample(Path("market/b.jpg"), 3, 1),),
        ...     gallery=(Sample(Path("market/c.jpg"), 3, 2), Sample(Path("market/d.jpg"), 0, 2)),
        ... )
        >>> whole = all_images(market)
        >>> [sample.path.name for sample in whole.train], whole.query, whole.variant
        (['a.jpg', 'b.jpg', 'c.jpg'], (), 'all images')
    """
    searched = {sample.pid for sample in dataset.query}
    others = [sample for sample in (*dataset.gallery, *dataset.test) if sample.pid != 0 or 0 in searched]
    images = {sample.path: sample for sample in (*dataset.train, *dataset.query, *others)}
    return replace(
        dataset,
        train=tuple(sample for sample in images.values() if sample.pid >= 0),
        query=(),
        gallery=(),
        test=(),
        splits=None,
        single_shot=False,
        variant=", ".join(filter(None, (dataset.variant, "all images"))),
    )


def _identity(target: ReIDDataset) -> tuple[object, ...]:
    images = _images((*target.query, *target.gallery, *target.test))
    return os.path.realpath(target.root), target.name, target.variant, images


def _images(samples: Sequence[Sample]) -> list[tuple[str, int]]:
    return [(path, sample.pid) for path, sample in zip(real_paths(samples), samples, strict=True)]


def _place(target: ReIDDataset) -> Path:
    """Its folder, and in it its name, which a folder in the Market-1501 layout has already."""
    root = target.root.absolute()
    return root if root.name == target.name else root / target.name


def _tail(path: Path, alike: Collection[Path]) -> str:
    """The last parts of a path, as many as no other of different paths has."""
    length = next(n for n in itertools.count(1) if len({other.parts[-n:] for other in alike}) == len(alike))
    return str(Path(*path.parts[-length:]))


def _load(path: Path, name: str | None, variant: str | None) -> ReIDDataset:
    if not path.exists():
        several = ""
        if re.fullmatch(r"\[.*\]", str(path)):  # a list that the parser took for a text
            several = "; in a list, names that are numbers or hold #, : or brackets stand in quotes, '[\"A #1\", B]'"
        elif "," in str(path) and not str(path).startswith("["):
            several = f"; several are written '[{', '.join(str(path).split(','))}]'"
        place = path if path.is_absolute() else f"{path} in {Path.cwd()}"
        raise DanFastError(f"There is no dataset at {place}; give the path of its folder{several}.")
    own_name = _own_name(path)
    if path.is_file():
        if not is_manifest(path):
            raise DanFastError(f"{path} is a file but no .csv manifest; give a dataset's folder or its manifest.")
        _expect_no_variant(path, variant)
        own_name = path.parent.absolute().name if path.name == MANIFEST else path.stem
        return read_manifest(path, name or own_name)
    if (path / MANIFEST).is_file():
        _expect_no_variant(path, variant)
        return read_manifest(path / MANIFEST, name or own_name)
    found = _known_at(path)
    if len({place for _, place in found}) > 1:
        raise DanFastError(_above([place for _, place in found if place != path], path))
    # That would read the other parts, too: of a folder "query" more than is asked for, or none of it.
    if found and not (_is_part(path) and found[0][1] == path.absolute().parent):
        return _load_known(*found[0], name, variant)
    if is_market1501(path):
        _expect_no_variant(path, variant)
        return read_market1501(path, name or own_name)
    if where := _where_it_is(path):
        raise DanFastError(where)
    raise NoDatasetError(
        f"{path} holds no dataset: neither {', '.join(PARTS.values())} (the Market-1501 layout) nor a "
        f"{MANIFEST} (columns path,pid,camid,split), nor a dataset that `dan-fast datasets` knows; give a folder "
        "that has one of them."
    )


def _own_name(path: Path) -> str:
    return (path.resolve() if path.name == ".." else path.absolute()).name


def _is_part(path: Path) -> bool:
    return path.absolute().name in PARTS.values() and is_market1501(path.absolute().parent)


def _known_at(path: Path) -> list[tuple[KnownDataset, Path]]:
    found = [(known, known.find(path)) for known in KNOWN.values()]
    return [(known, place) for known, place in found if place is not None]


def _load_known(known: KnownDataset, place: Path, name: str | None, variant: str | None) -> ReIDDataset:
    # Often only the folder distinguishes a subset in this layout from the whole dataset.
    own_name = place.absolute().name if is_market1501(place) else known.title
    dataset = known.read(place, name or own_name, choose_variant(known, place, variant))
    for sentence in check_counts(dataset, known):
        _LOG.warning("%s", sentence)
    return dataset


def _expect_no_variant(path: Path, variant: str | None) -> None:
    if variant:
        raise DanFastError(f"The dataset at {path} has only one variant; leave {variant!r} out.")


def _above(inside: list[Path], path: Path) -> str:
    which = "one of these" if len(inside) > 1 else "that one"
    return f"{path} is the folder above {' and '.join(map(str, inside))}; give {which} instead."


def _where_it_is(path: Path) -> str:
    """In a sentence, where the dataset is that a folder is a part of or lies above; "" where none is found."""
    parent = path.absolute().parent
    if _is_part(path):
        return f"{path} is only one part of the Market-1501 folder {parent}; give that folder instead."
    if (parent / MANIFEST).is_file():
        return f"{path} seems to hold the images of the manifest {parent / MANIFEST}; give {parent} instead."
    folders = [path]
    for _ in range(2):
        folders = [below for folder in folders for below in sorted(folder.iterdir()) if below.is_dir()]
        inside = [each for each in folders if (each / MANIFEST).is_file() or is_market1501(each) or _known_at(each)]
        if inside:
            return _above(inside, path)
    return ""
