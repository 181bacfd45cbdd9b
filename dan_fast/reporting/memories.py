"""What the two memories of a run hold, laid out in the plane by t-SNE, in the manner of Fig. 10."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dan_fast.reporting.canvas import COLOURS, NEUTRAL, save_png, style
from dan_fast.training.memory_shards import stored_features

_MARKERS = ("o", "s", "^")
_LABELS_SHOWN = len(COLOURS) * 2
_FEWEST = 4  # t-SNE needs a neighbour and more points than its perplexity
MOST_SLOTS = 2000  # t-SNE of more takes minutes
MEMORIES = {"labeled": "M, labels", "unlabeled": "M′, pseudo labels"}


@dataclass(frozen=True)
class Slots:
    """The slots of a memory that hold a sample.

    Attributes:
        features: (n, d) float64.
        labels: (n,) int64, label or pseudo label.
    """

    features: np.ndarray
    labels: np.ndarray

    def describe(self) -> str:
        """How many slots of how many labels, in words."""
        _, counts = np.unique(self.labels, return_counts=True)
        return f"{len(self.labels)} slots of {len(counts)} labels" if len(counts) else "no slot in use"


def stored_slots(state: dict[str, Any], folder: Path) -> dict[str, Slots] | None:
    """The occupied slots of M ("labeled") and M' ("unlabeled") in a checkpoint; None if it has no memory.

    Args:
        state: what `dan_fast.training.checkpoint.load_checkpoint` gives.
        folder: in which the checkpoint is, and what ranks have written of its memory.

    Raises:
        DanFastError: what a rank has written is missing or damaged.
    """
    slots = {}
    for memory in MEMORIES:
        features = stored_features(state, folder, memory)
        if features is None:
            return None
        labels = state["model"][f"memory.{memory}.labels"]
        used = labels >= 0
        slots[memory] = Slots(features[used].double().numpy(), labels[used].numpy())
    return slots


def neighbours_agree(slots: Slots) -> float | None:
    """The share of slots whose nearest other slot, by cosine, has the same label; None with fewer than two.

    Example:
        >>> neighbours_agree(Slots(np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), np.array([5, 5, 6])))
        0.6666666666666666
    """
    if len(slots.labels) < 2:
        return None
    # Imported here, as below.
    from sklearn.neighbors import NearestNeighbors

    found = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(_unit(slots.features))
    nearest = found.kneighbors(return_distance=False)[:, 0]
    return float((slots.labels[nearest] == slots.labels).mean())


def layout(slots: Slots, seed: int = 0) -> np.ndarray:
    """(n, 2) float32 places of 4 or more slots by t-SNE; the same for the same slots and seed.

    Features, finite in any checkpoint, are scaled to unit length first: the memory compares them by their cosine.
    """
    # Imported here: it takes as long to import as all of this package, and most commands do not need it.
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(slots.labels) - 1) / 3)
    # Not by principal components: those of a memory of parallel keys are not defined.
    tsne = TSNE(perplexity=perplexity, init="random", random_state=seed, n_jobs=1)
    return tsne.fit_transform(_unit(slots.features).astype(np.float32))


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def sample(slots: Slots, seed: int = 0) -> Slots:
    """At most :data:`MOST_SLOTS` of the slots, drawn at random by the seed, in their order."""
    if len(slots.labels) <= MOST_SLOTS:
        return slots
    chosen = np.sort(np.random.default_rng(seed).permutation(len(slots.labels))[:MOST_SLOTS])
    return Slots(slots.features[chosen], slots.labels[chosen])


def plot_memories(slots: dict[str, Slots], out_png: str | Path, seed: int = 0) -> Path:
    """Fig. 10: the slots of M by label and of M' by pseudo label, in two panels.

    The most frequent labels of both have a colour and a marker, the same in both panels; the others are grey.
    Distances in the plane show which slots are neighbours, but not how far apart groups are: there are no units. Of
    more than :data:`MOST_SLOTS` slots of a memory so many are drawn, at random by the seed.

    Example:
        >>> import tempfile
        >>> some = Slots(np.random.default_rng(0).normal(size=(12, 5)), np.arange(12) % 3)
        >>> plot_memories({"labeled": some, "unlabeled": some}, Path(tempfile.mkdtemp()) / "tsne.png").name
        'tsne.png'
    """
    labels, counts = np.unique(np.concatenate([each.labels for each in slots.values()]), return_counts=True)
    shown = labels[np.argsort(-counts, kind="stable")][:_LABELS_SHOWN]
    with style():
        figure = Figure(figsize=(10.4, 4.9), layout="constrained")
        for axes, (memory, title) in zip(figure.subplots(1, 2), MEMORIES.items(), strict=True):
            drawn = sample(slots[memory], seed)
            part = f", {MOST_SLOTS} of them drawn" if drawn is not slots[memory] else ""
            axes.set_title(f"{title}: {slots[memory].describe()}{part}")
            axes.set(xticks=[], yticks=[], xlabel="t-SNE, first axis (no unit)", ylabel="t-SNE, second axis (no unit)")
            _draw(axes, drawn, shown, len(labels) - len(shown), seed)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
        return save_png(figure, out_png)


def _draw(axes: Axes, slots: Slots, shown: np.ndarray, others: int, seed: int) -> None:
    if len(slots.labels) < _FEWEST:
        axes.text(0.5, 0.5, f"{slots.describe()}:\ntoo few to lay out", ha="center", transform=axes.transAxes)
        places = np.full((len(slots.labels), 2), np.nan)
    else:
        places = layout(slots, seed)
    for number, label in enumerate(shown):
        marker, colour = _MARKERS[number // len(COLOURS)], COLOURS[number % len(COLOURS)]
        here = places[slots.labels == label]
        axes.plot(*here.T, marker, color=colour, ms=4, mec="white", mew=0.3, label=f"label {label}")
    if others:
        rest = places[~np.isin(slots.labels, shown)]
        axes.plot(*rest.T, ".", color=NEUTRAL, alpha=0.4, ms=3, zorder=1.9, label=f"{others} other labels")
