"""What all pictures have in common: colours, text sizes and how they are written."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names

from dan_fast.core.files import write_whole

# Okabe and Ito's colours, which colour-blind readers can distinguish too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RIGHT, WRONG, NEUTRAL = "#009E73", "#D55E00", "#5B6470"

# For names of runs and datasets in scripts that the first one lacks, where they are installed.
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC")
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A929C",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E6EA",
    "legend.frameon": False,
    "legend.fontsize": 8,
    # Names of runs and datasets are no formulas, whatever signs they have.
    "text.parse_math": False,
    "xtick.color": "#3B424B",
    "ytick.color": "#3B424B",
}


def style() -> matplotlib.RcParams:
    """Context in which pictures are drawn: ``with style(): figure = Figure(...)``."""
    there = set(get_font_names())
    return matplotlib.rc_context(_STYLE | {"font.family": [font for font in _FONTS if font in there]})


def panels(count: int, most_columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes, in rows; `width` and `height` of each in inches."""
    columns = min(most_columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def mark_of(values: Sequence[Any]) -> str | None:
    """The marker of a curve: its points are shown where they are few."""
    return "o" if len(values) < 20 else None


def legend_label(name: str) -> str:
    """The name as a legend shows it: Matplotlib leaves out what begins with an underscore, so a space of no width does.

    Example:
        >>> legend_label("_a") == "_a", legend_label("_a").endswith("_a"), legend_label("a_b")
        (False, True, 'a_b')
    """
    return f"\u200b{name}" if name.startswith("_") else name


def spread_evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most so many of the items that a picture shows, from the first to the last at equal distances.

    Example:
        >>> spread_evenly("abcdefg", 3), spread_evenly("ab", 3)
        (['a', 'd', 'g'], ['a', 'b'])
    """
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def show_image(axes: Axes, pixels: object, colour: str | None = None, width: float = 0.8) -> None:
    """An image without ticks, in a frame of the given colour and width in points."""
    axes.imshow(pixels, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour or NEUTRAL, linewidth=width)


def save_png(figure: Figure, path: str | Path, dpi: int = 130) -> Path:
    """Write a figure as PNG; the file appears whole or not at all, missing folders are made."""
    path = Path(path)
    write_whole(path, lambda stream: figure.savefig(stream, format="png", dpi=dpi, facecolor="white"))
    return path
