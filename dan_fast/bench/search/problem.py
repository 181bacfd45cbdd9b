"""Features to search in, drawn as those of a trained network are distributed, and written as an index keeps them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

IMAGES_A_PERSON = 20
# The exponents by which the variances of directions fall off, among persons and among the images of one; the variance
# of an image beside that of a person, and how much it varies (log-normal); the threshold below which numbers are 0.
# Chosen so that the cosines within and between persons, and the intrinsic dimension of neighbourhoods, are those of an
# EfficientNet-Lite0 on Market-1501's test images: see docs/search.md.
_PERSONS, _IMAGES, _NOISE, _SPREAD, _THRESHOLD = 0.65, 0.58, 0.39, 0.48, 1.22
_CAMERAS = 6
# Rows drawn at a time.
_CHUNK = 65536


class SearchProblem(NamedTuple):
    """Features of length 1, identities and cameras; the gallery's features are mapped from a file."""

    gallery: np.ndarray
    query: np.ndarray
    gallery_ids: np.ndarray
    query_ids: np.ndarray
    gallery_cams: np.ndarray
    query_cams: np.ndarray


def make_search_problem(file: Path, features: int, queries: int, width: int, seed: int = 0) -> SearchProblem:
    """Draw persons of 20 images each on average, and write the gallery's features into a file, chunk by chunk.

    Example:
        >>> import tempfile
        >>> problem = make_search_problem(Path(tempfile.mkdtemp()) / "features", 100, 8, 32)
        >>> problem.gallery.shape, bool(np.allclose(np.linalg.norm(problem.query, axis=1), 1))
        ((100, 32), True)
    """
    random = np.random.default_rng(seed)
    persons = max(2, features // IMAGES_A_PERSON)
    of_persons, of_images = (_deviations(random, width, exponent) for exponent in (_PERSONS, _IMAGES))
    centres = of_persons * random.standard_normal((persons, width), dtype=np.float32) - np.float32(_THRESHOLD)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        ids = random.integers(0, persons, count)
        scale = np.sqrt(_NOISE * np.exp(_SPREAD * random.standard_normal((count, 1)))).astype(np.float32)
        drawn = random.standard_normal((count, width), dtype=np.float32) * of_images * scale + centres[ids]
        drawn = np.maximum(drawn, 0, out=drawn)
        # One that is 0 everywhere would have no length.
        drawn[:, 0] += 1e-6
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True), ids

    gallery_ids = []
    with file.open("wb") as stream:
        for first in range(0, features, _CHUNK):
            drawn, ids = draw(min(_CHUNK, features - first))
            stream.write(drawn.data)
            gallery_ids.append(ids)
    query, query_ids = draw(queries)
    # Copied where it is written to, which nothing does: PyTorch warns of arrays that cannot be.
    gallery = np.memmap(file, dtype=np.float32, mode="c", shape=(features, width))
    cams = (random.integers(0, _CAMERAS, count) for count in (features, queries))
    return SearchProblem(gallery, query, np.concatenate(gallery_ids), query_ids, *cams)


def _deviations(random: np.random.Generator, width: int, exponent: float) -> np.ndarray:
    """Standard deviations along the axes, in no order, whose squares fall off as a power and are 1 on average."""
    variances = np.arange(1, width + 1) ** -exponent
    return np.sqrt(random.permutation(variances / variances.mean())).astype(np.float32)
