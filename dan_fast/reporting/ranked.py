"""Ranked lists: a query and the gallery images nearest to it, right and wrong ones marked."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torchvision.transforms.v2 import functional as transforms

from dan_fast.core.errors import DanFastError
from dan_fast.data.images.reading import read_image
from dan_fast.evaluation.features import Features
from dan_fast.evaluation.problem import check_features
from dan_fast.evaluation.ranking import Metric, pairwise_distances
from dan_fast.reporting.canvas import RIGHT, WRONG, save_png, show_image, spread_evenly, style

_THUMBNAIL = (128, 64)


def ranked_list(query: Features, gallery: Features, place: int, metric: Metric = "cosine") -> torch.Tensor:
    """Gallery indices, int64, nearest first, for the query at ``place``; its junk images are left out."""
    keys = pairwise_distances(query.features[place : place + 1], gallery.features, metric)[0]
    order = torch.argsort(keys, stable=True)
    junk = (gallery.pids == query.pids[place]) & (gallery.camids == query.camids[place])
    return order[~junk[order]]


def plot_ranked_lists(
    query: Features,
    gallery: Features,
    out_png: str | Path,
    queries: int = 8,
    top: int = 8,
    metric: Metric = "cosine",
) -> Path:
    """Draw one row a query: its image, then its nearest gallery images, right ones ticked, wrong crossed.

    The queries are spread evenly over those that have a match. Gallery images
    of the query's identity by its own camera are left out, as in the figures of merit.

    Args:
        query: features and files of the query images.
        gallery: those of the gallery images.
        out_png: file to write.
        queries: rows at most.
        top: gallery images a row at most.
        metric: as in :func:`dan_fast.evaluation.ranking.evaluate_ranking`.

    Returns:
        The path of the file.

    Raises:
        DanFastError: no query has a match, or an image file cannot be read.
        ValueError: features that do not fit each other, or ``queries`` or ``top`` below 1.
    """
    if queries < 1 or top < 1:
        raise ValueError(f"queries is {queries} and top {top}; both must be at least 1.")
    check_features(query.features, gallery.features)
    places = _spread_queries(query, gallery, queries)
    top = min(top, len(gallery.paths))
    with style():
        figure = Figure(figsize=(0.72 * (top + 1.35) + 0.2, 1.44 * len(places) + 0.75))
        margins = {"left": 0.01, "right": 0.99, "bottom": 0.45 / figure.get_figheight()}
        margins["top"] = 1 - 0.28 / figure.get_figheight()
        # The narrow second column keeps the query apart from what was found.
        grid = figure.add_gridspec(
            len(places), top + 2, width_ratios=[1, 0.3] + [1] * top, wspace=0.1, hspace=0.08, **margins
        )
        for row, place in enumerate(places):
            axes = figure.add_subplot(grid[row, 0])
            axes.set_title("" if row else "query", loc="center", fontsize=9)
            show_image(axes, _thumbnail(query.paths[place]), "black", 1.2)
            for rank, index in enumerate(ranked_list(query, gallery, place, metric)[:top].tolist(), start=1):
                axes = figure.add_subplot(grid[row, 1 + rank])
                axes.set_title("" if row else str(rank), loc="center", fontsize=9, fontweight="normal")
                _show_found(axes, gallery.paths[index], bool(gallery.pids[index] == query.pids[place]))
        _draw_key(figure)
        return save_png(figure, out_png, dpi=150)


def _spread_queries(query: Features, gallery: Features, queries: int) -> list[int]:
    cameras: dict[int, set[int]] = {}
    for pid, camid in zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True):
        cameras.setdefault(pid, set()).add(camid)
    pairs = zip(query.pids.tolist(), query.camids.tolist(), strict=True)
    valid = [place for place, (pid, camid) in enumerate(pairs) if cameras.get(pid, set()) - {camid}]
    if not valid:
        raise DanFastError(
            "No query has a match in the gallery by another camera, so there is no list worth showing; "
            "check the identities and cameras."
        )
    return spread_evenly(valid, queries)


def _thumbnail(path: Path) -> np.ndarray:
    image = transforms.resize(read_image(path), list(_THUMBNAIL), antialias=True)
    return image.permute(1, 2, 0).numpy()


def _show_found(axes: Axes, path: Path, right: bool) -> None:
    show_image(axes, _thumbnail(path), RIGHT if right else WRONG, 2.6)
    axes.text(0.5, 0.015, transform=axes.transAxes, ha="center", va="bottom", **_badge(right))


def _badge(right: bool) -> dict[str, Any]:
    """A white mark on its colour, as arguments of a text; the mark also serves colour-blind readers."""
    box = {"boxstyle": "round,pad=0.18", "facecolor": RIGHT if right else WRONG, "edgecolor": "none"}
    return {"s": "✓" if right else "✗", "color": "white", "fontsize": 8, "fontweight": "bold", "bbox": box}


def _draw_key(figure: Figure) -> None:
    height = 0.2 / figure.get_figheight()
    inch = 1 / figure.get_figwidth()
    for left, right, text in ((0.12, True, "same person"), (1.22, False, "another person")):
        figure.text(left * inch, height, va="center", **_badge(right))
        figure.text((left + 0.2) * inch, height, text, fontsize=8, va="center")
