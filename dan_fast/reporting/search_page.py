"""The page of a search: queries, what was found for them, and what the network attends to in each image."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dan_fast.core.files import printable, write_whole
from dan_fast.data.images.cache_header import digest, status_of
from dan_fast.data.images.loader import image_loader
from dan_fast.data.samples import Sample
from dan_fast.inference import FeatureExtractor
from dan_fast.inference.sources import PICTURES
from dan_fast.nn.attention import VARIANTS
from dan_fast.reporting.heatmaps import attention_overlays
from dan_fast.reporting.html import write_page

# The names of the page's pictures in their folder.
_PICTURE = re.compile(r"[0-9a-f]{32}(-attention)?\.jpg")
# Of more queries the page would be slow to load; the file of the lists has all.
SHOWN = 50
# The weights by which an attention tells positions of an image apart.
_SPATIAL = {"ws1", "conv"}


def write_search_page(folder: str | Path, content: Mapping[str, Any], extractor: FeatureExtractor) -> Path:
    """Write ``index.html`` into ``folder``, and the images that it shows into the folder ``search_images``
    in it, where those that it does not show any more are removed.

    Images are shown as the network gets them, beside themselves under the spatial attention where the network has one.
    The page needs no network and no script, and can be moved together with its images. The first 50 queries are shown.

    Args:
        folder: made if missing.
        content: of the ranked.json of `dan-fast search`.
        extractor: whose network and preprocessing are shown.

    Returns:
        The path of the page.

    Raises:
        DanFastError: a file cannot be written.
    """
    folder = Path(folder)
    shown = content["queries"][:SHOWN]
    paths = dict.fromkeys(each["path"] for query in shown for each in (query, *(query["matches"] or ())))
    names = {path: _name(path, content["weights"]) for path in paths}
    attends = not _SPATIAL.isdisjoint(VARIANTS[extractor.network.attention.variant])
    images = folder / PICTURES
    kept = {f"{name}{ending}" for name in names.values() for ending in (".jpg", "-attention.jpg")}
    _draw(images, {path: name for path, name in names.items() if not (images / f"{name}.jpg").exists()},
          extractor, attends)  # fmt: skip
    drawn = {path: name for path, name in names.items() if (images / f"{name}.jpg").exists()}
    page = write_page(
        folder / "index.html",
        "search.html",
        title="Search",
        paragraphs=_paragraphs(content, len(shown), attends),
        queries=[
            {"query": _cell(query, drawn, attends), "matches": None if query["matches"] is None else
             [_cell(match, drawn, attends) for match in query["matches"]]}
            for query in shown
        ],
    )  # fmt: skip
    for file in images.glob("*.jpg"):
        if _PICTURE.fullmatch(file.name) and file.name not in kept:
            file.unlink()
    return page


def _draw(folder: Path, names: Mapping[str, str], extractor: FeatureExtractor, attends: bool) -> None:
    """Write images and, where the network attends to positions, their overlays; those that cannot be read are not."""
    samples = [Sample(Path(path), -1, -1) for path in names]
    network, wanted = extractor.network, extractor.preprocessing
    loader = image_loader(
        samples, extractor.image_size, extractor.batch_size, 0, "skip", device=extractor.device, preprocessing=wanted
    )
    for batch, places in loader:
        if not len(places):
            continue
        with torch.inference_mode():
            # Flat where there is none, so that the overlay is not used.
            attention = network(batch).spatial_attention
        plain, overlaid = attention_overlays(batch, attention, network.map_size, wanted)
        for place, *pictures in zip(places.tolist(), plain, overlaid, strict=True):
            name = names[str(samples[place].path)]
            # The overlay first: where the image is there, both are.
            for picture, ending in ((pictures[1], "-attention.jpg"), (pictures[0], ".jpg"))[not attends :]:
                write_whole(
                    folder / f"{name}{ending}",
                    lambda stream, picture=picture: Image.fromarray(picture).save(stream, "JPEG", quality=90),
                )


def _name(path: str, weights: str) -> str:
    """A name that an image keeps while neither its file nor the network changes."""
    return digest(repr((path, status_of(path), weights)).encode()).hex()


def _cell(image: Mapping[str, Any], drawn: Mapping[str, str], attends: bool) -> dict[str, Any]:
    """What the template shows of an image."""
    known = [f"{word} {image[key]}" for word, key in (("person", "pid"), ("camera", "camid")) if image[key] is not None]
    name = drawn.get(image["path"])
    return {
        # Bytes of a name that are no UTF-8 are shown as signs of replacement.
        "file": printable(Path(image["path"]).name),
        "image": name and f"{PICTURES}/{name}.jpg",
        "overlay": f"{PICTURES}/{name}-attention.jpg" if name and attends else None,
        "known": ", ".join(known),
        "right": image.get("same_person"),
        "rank": image.get("rank"),
        "score": image.get("score"),
    }


def _paragraphs(content: Mapping[str, Any], shown: int, attends: bool) -> Sequence[str]:
    index, found, total = content["index"], content["recall"], len(content["queries"])
    how = "compares all features" if index["kind"] == "flat" else f"is approximate ({index['kind']})"
    paragraphs = [
        f"The {content['top']} nearest of {index['images']} images to each of {total} queries, by the cosine of their "
        f"features, the score below each. The search {how}; a query's own file is left out."
    ]
    if found is not None:
        paragraphs.append(
            f"recall@{found['at']} is {found['value']:.4f}: the share of the nearest images by the exact search that "
            f"this one finds, over {found['queries']} queries."
        )
    if attends:
        paragraphs.append(
            "Beside each image stands what the network attends to in it, A_S, from blue, least, to red, most, each in "
            "its own range."
        )
    else:
        paragraphs.append("The network has no spatial attention, so there is none to show.")
    if shown < total:
        paragraphs.append(f"The first {shown} queries are shown; ranked.json has all {total}.")
    return paragraphs
