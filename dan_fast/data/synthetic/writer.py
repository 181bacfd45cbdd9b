"""Write synthetic domains to disk: images and a manifest each."""

import csv
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import alone, remove_unfinished
from dan_fast.core.home import expanded
from dan_fast.data.synthetic.domains import DOMAINS, Domain
from dan_fast.data.synthetic.person import sample_identity
from dan_fast.data.synthetic.scene import render, sample_camera, sample_view, scenery

# What a killed run leaves behind: its work until that was whole, and the lock that keeps others out.
_PARTIAL, _LOCK = ".partial", ".lock"
_REMAINS = re.compile(r"\.(partial|lock|lock\.holder|\.lock\.holder\..*\.part)")
_IMAGE_NAME = re.compile(r"\d+_c\d+_\d+\.jpg")
_IDENTITIES_PER_DOMAIN = 100_000
_IDENTITY, _CAMERA, _VIEW = range(3)


def synthesize(
    root: Path | str,
    domains: Sequence[str] = tuple(DOMAINS),
    identities: int = 40,
    cameras: int = 4,
    images_per_camera: int = 2,
    image_size: tuple[int, int] = (128, 64),
    seed: int = 0,
    test_fraction: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Make images of drawn pedestrians in several domains, each a folder with a CSV manifest.

    Writes ``<root>/<domain>/images/*.jpg`` and ``<root>/<domain>/manifest.csv`` with the columns
    ``path,pid,camid,split``: path relative to the manifest, person ids that no two domains share, cameras from 1, split
    ``train``, ``query`` or ``gallery``. The first image of each test identity from each camera is a query and the
    others are gallery, so every query has a match from another camera. An image depends only on the seed, its domain,
    identity, camera, index and size: asking for more of anything keeps the images that are already there.

    Args:
        root: Folder to write to. It must be new, empty or an earlier synthesis, whose domains of the same name are
            replaced once the new ones are complete.
        domains: Names of the domains to make.
        identities: Number of persons in each domain.
        cameras: Number of cameras in each domain, at least 2 where there are test identities.
        images_per_camera: Images of each person by each camera, at least 2 where there are test identities.
        image_size: Height and width of the images in pixels, at least 32 and 16.
        seed: Seed of everything drawn; 0 or larger.
        test_fraction: Share of each domain's identities, the last ones, that is kept for query and gallery.
        progress: Called with (images done, images in all) after each image.

    Returns:
        The manifests, in the order of ``domains``.

    Raises:
        DanFastError: An argument is out of range, ``root`` holds something else, or another process is at work in it,
            or it cannot be written.

    Example:
        >>> import tempfile
        >>> [m] = synthesize(tempfile.mkdtemp(), ["campus"], identities=2, cameras=2)
        >>> m.read_text().splitlines()[1]
        'images/100000_c1_00.jpg,100000,1,train'
    """
    root = expanded(root)
    chosen = _checked(domains, identities, cameras, images_per_camera, image_size, seed, test_fraction)
    created: list[Path] = []
    partial = root / _PARTIAL
    shape = identities, cameras, images_per_camera
    first_test = identities - round(identities * test_fraction)
    try:
        _require_own(root)
        created = [folder for folder in (root, *root.parents) if not folder.exists()]
        with alone(root / _LOCK):
            remove_unfinished(root)
            if partial.exists():
                shutil.rmtree(partial)
            try:
                partial.mkdir()
                written = (
                    _write_domain(partial / domain.name, domain, shape, image_size, seed, first_test)
                    for domain in chosen
                )
                for done, _ in enumerate(chain.from_iterable(written), start=1):
                    if progress is not None:
                        progress(done, len(chosen) * math.prod(shape))
                for domain in chosen:
                    _swap(partial / domain.name, root / domain.name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except BaseException as error:
        for folder in created:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise DanFastError(
                f"cannot write synthetic images to {root} ({error.strerror or error}): "
                "choose a folder that can be written to and has room"
            ) from error
        raise
    return [root / domain.name / "manifest.csv" for domain in chosen]


def _swap(new: Path, final: Path) -> None:
    """Put a finished domain in the place of an earlier one, which stays if that fails."""
    old = new.with_name(f"{new.name}.old")
    if final.exists():
        final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise


def _write_domain(
    folder: Path,
    domain: Domain,
    shape: tuple[int, int, int],
    image_size: tuple[int, int],
    seed: int,
    first_test: int,
) -> Iterator[None]:
    """Write a domain, image by image."""
    identities, cameras, images_per_camera = shape

    def rng(*key: int) -> np.random.Generator:
        return np.random.default_rng((seed, domain.number, *key))

    (folder / "images").mkdir(parents=True)
    lenses = [sample_camera(domain, rng(_CAMERA, camid)) for camid in range(1, cameras + 1)]
    backgrounds = [scenery(domain, camera, image_size) for camera in lenses]
    rows = []
    for number in range(identities):
        identity = sample_identity(rng(_IDENTITY, number))
        pid = domain.number * _IDENTITIES_PER_DOMAIN + number
        for camid, (camera, background) in enumerate(zip(lenses, backgrounds, strict=True), start=1):
            for index in range(images_per_camera):
                view = sample_view(domain, camera, rng(_VIEW, number, camid, index))
                path = f"images/{pid}_c{camid}_{index:02d}.jpg"
                image = render(domain, identity, camera, view, image_size, background)
                image.save(folder / path, quality=domain.jpeg_quality)
                split = "train" if number < first_test else "query" if index == 0 else "gallery"
                rows.append((path, pid, camid, split))
                yield
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "pid", "camid", "split"))
        writer.writerows(rows)


def _checked(
    domains: Sequence[str],
    identities: int,
    cameras: int,
    images_per_camera: int,
    image_size: tuple[int, int],
    seed: int,
    test_fraction: float,
) -> list[Domain]:
    unknown = [name for name in domains if name not in DOMAINS]
    if isinstance(domains, str) or unknown or not domains or len(set(domains)) < len(domains):
        raise DanFastError(f"domains is {domains!r}: give each name once, as a list, of {', '.join(DOMAINS)}")
    if not 1 <= identities <= _IDENTITIES_PER_DOMAIN:
        raise DanFastError(f"identities is {identities}: use 1 to {_IDENTITIES_PER_DOMAIN}")
    if not 0.0 <= test_fraction <= 1.0:
        raise DanFastError(f"test_fraction is {test_fraction}: use a share from 0 to 1")
    fewest = 2 if round(identities * test_fraction) else 1
    for name, value in (("cameras", cameras), ("images_per_camera", images_per_camera)):
        if value < fewest:
            raise DanFastError(
                f"{name} is {value}: use at least {fewest}"
                + (", or a test_fraction of 0, as each query needs a match from another camera" if fewest > 1 else "")
            )
    if len(image_size) != 2 or image_size[0] < 32 or image_size[1] < 16:
        raise DanFastError(f"image_size is {tuple(image_size)}: use a height and width of at least 32 and 16 pixels")
    if seed < 0:
        raise DanFastError(f"seed is {seed}: use 0 or a larger integer")
    return [DOMAINS[name] for name in domains]


def _require_own(root: Path) -> None:
    """Refuse a folder that holds anything ``synthesize`` has not made."""
    if not root.exists():
        return
    if not root.is_dir():
        raise DanFastError(f"{root} is not a folder: choose another for the synthetic images")
    for entry in root.iterdir():
        if not _REMAINS.fullmatch(entry.name) and not (entry.name in DOMAINS and _is_synthesis(entry)):
            raise DanFastError(
                f"{root} holds {entry.name}, which is no domain of an earlier synthesis: choose an empty or new folder"
            )


def _is_synthesis(folder: Path) -> bool:
    images = folder / "images"
    if not images.is_dir() or {entry.name for entry in folder.iterdir()} != {"images", "manifest.csv"}:
        return False
    return all(_IMAGE_NAME.fullmatch(entry.name) for entry in images.iterdir())
