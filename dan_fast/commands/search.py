"""`dan-fast search`: the images of a gallery that are nearest to others."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console

from dan_fast.core.batches import BrokenImages
from dan_fast.core.files import alone, remove_unfinished, require_own_json, write_text
from dan_fast.core.terminal import PLAIN, progress_line
from dan_fast.data.images.reading import DECODED_BY
from dan_fast.inference import FeatureExtractor
from dan_fast.inference.sources import LISTS, PICTURES, Part, find_images, samples_of
from dan_fast.reporting.html import require_own_page
from dan_fast.reporting.search_page import write_search_page
from dan_fast.search import GalleryIndex, Update, update_index
from dan_fast.search.index_folder import IndexFolder
from dan_fast.search.kinds import IndexKind, faiss_library
from dan_fast.search.lists import measured_recall, ranked_lists

_SCHEMA = 1


def search(
    gallery: Sequence[str],
    query: Sequence[str],
    checkpoint: str,
    out: str,
    index: IndexKind = "flat",
    top: PositiveInt = 10,
    batch_size: PositiveInt = 128,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    broken_images: BrokenImages = "error",
) -> None:
    """Find the gallery images nearest to each query, with an index that is kept and extended.

    OUT/index holds the index. The same command again embeds only gallery images that are new or have changed, and does
    not find images that have left the gallery. OUT/ranked.json has the lists; OUT/index.html shows them, with what the
    network attends to. A query's own file is left out of its list.

    Args:
        gallery: Folders, files, patterns or datasets to search in; of a dataset its gallery, or all if it has none.
        query: Images to search for, given in the same way; of a dataset its queries, or all if it has none.
        checkpoint: The checkpoint.pt of a run, its chosen.pt, or a folder that `dan-fast share` wrote.
        out: Folder for the index, the lists and the page.
        index: flat compares all features; hnsw (a graph) and ivfpq (codes in cells) compare few of millions, and the
            command measures what they miss.
        top: Images in each list.
        batch_size: Images at a time.
        workers: Processes that decode images; 0 decodes in this one.
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        broken_images: Stop with an error at an image that cannot be decoded, or skip it.

    Raises:
        DanFastError: an approximate index without faiss, nothing at a path, no checkpoint, an index of another
            checkpoint, an image that cannot be decoded, too few images for an ivfpq index, or a folder that cannot be
            written.
    """
    folder, console = Path(out), Console()
    require_own_json(folder / LISTS, ["schema", "weights", "queries"])
    require_own_page(folder / "index.html")
    if index != "flat":
        faiss_library()
    searched, asked = _of_split(gallery, "gallery"), _of_split(query, "query")
    images, queries = samples_of(searched), samples_of(asked)
    extractor = FeatureExtractor(checkpoint, device, batch_size, workers=workers, broken_images=broken_images)
    known = IndexFolder(folder / "index", extractor)
    known.read_latest()  # of another checkpoint it is refused before an image is embedded
    try:
        # The queries first: one that cannot be decoded is known before the gallery is embedded.
        with progress_line(console, f"Embedding {len(queries)} queries") as show:
            features = extractor([sample.path for sample in queries], show).numpy()
        # The lists, the page and its images belong together, and to this gallery.
        with alone(folder / ".lock"):
            with progress_line(console, f"Embedding what is new of {len(images)} gallery images") as show:
                update = update_index(known, extractor, images, index, show)
            for line in _sentences(update, folder / "index"):
                console.print(line, **PLAIN)
            found = GalleryIndex(known, extractor, index)
            del known  # of a million images it holds 400 MB
            lists = ranked_lists(found, asked, searched, features, top)
            for each in lists:
                if each["matches"] is None:
                    console.print(f"Skipped the query {each['path']}: it cannot be decoded.", **PLAIN)
            content = {
                "schema": _SCHEMA,
                "weights": found.weights,
                "index": {"kind": index, "images": found.size, "parameters": found.parameters},
                "top": top,
                "recall": None,
                "queries": lists,
            }
            if index != "flat" and (measured := measured_recall(found, asked, features, top)) is not None:
                content["recall"] = measured
                recall = "recall@{at} {value:.4f} of the exact search, over {queries} queries"
                console.print(recall.format(**measured))
            for place in (folder, folder / PICTURES):
                remove_unfinished(place)
            write_text(folder / LISTS, json.dumps(content, indent=1) + "\n")
            page = write_search_page(folder, content, extractor)
    except KeyboardInterrupt:
        if (folder / "index").exists():
            console.print(f"What is done lies in {folder / 'index'}: the same command goes on from there.", **PLAIN)
        raise
    finally:
        with suppress(OSError):
            folder.rmdir()
    console.print(f"{page}: {len(lists)} queries in {found.size} images.", **PLAIN)


def _of_split(paths: Sequence[str], split: str) -> list[Part]:
    """Of each path the images of a split, where it is a dataset that has any of it; else all of that path."""
    chosen: list[Part] = []
    for path in paths:
        parts = find_images([path])
        chosen += [part for part in parts if part.split == split] or parts
    return chosen


def _sentences(update: Update, index: Path) -> list[str]:
    changed = f", {len(update.changed)} of them changed" if update.changed else ""
    lines = [f"Index: {update.added} images embedded{changed}, {update.kept} were there."]
    if update.gone:
        lines.append(f"{len(update.gone)} images of the index are not in the gallery and are not found, the first is "
                     f"{update.gone[0]}.")  # fmt: skip
    for kind in update.behind:
        lines.append(f"The {kind} index lacks what is new: the same command with --index {kind} adds it.")
    if others := [each for each in update.decoded_by if each != DECODED_BY]:
        lines.append(f"Images of the index were decoded by {' and by '.join(others)}, and this is {DECODED_BY}, whose "
                     f"pixels may differ a little: remove {index}, and all is made anew.")  # fmt: skip
    return lines + [f"Skipped {path}: it cannot be decoded." for path in update.skipped]
