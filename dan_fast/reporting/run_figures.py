"""What a report shows of each run by itself: its curves, its attention, its memories."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.data import image_loader, load_dataset
from dan_fast.data.named_protocols import resolve_protocol
from dan_fast.data.samples import ReIDDataset, Sample
from dan_fast.nn import DAN
from dan_fast.reporting.canvas import spread_evenly
from dan_fast.reporting.curves import plot_curves
from dan_fast.reporting.heatmaps import plot_attention
from dan_fast.reporting.html import Figure
from dan_fast.reporting.memories import MEMORIES, MOST_SLOTS, Slots, neighbours_agree, plot_memories, stored_slots
from dan_fast.reporting.runs import Run
from dan_fast.training.build import network_of
from dan_fast.training.checkpoint import load_checkpoint
from dan_fast.training.reported import epoch_of

_FLAT = 1e-6
# What the pictures show, for readers who cannot see them.
CURVES = "Line charts over the iterations, one a kind of value."
HEAT_MAPS = "Rows of images of persons, each beside itself under a heat map."
NO_MEMORY = "It was trained without the memory."
_CAPTIONED = {
    "train/loss/total": "L_total on S",
    "test/loss/total": "L_total on S~",
    "train/accuracy/attention": "accuracy of the attention branch",
    "train/accuracy/adversary": "accuracy of the adversary",
    "competition/backbone_frozen": "share of iterations with a frozen backbone",
    "memory/slots_labeled": "slots of M in use",
    "memory/slots_unlabeled": "slots of M′ in use",
    "pseudo/accuracy": "accuracy of the pseudo labels",
}


class Missing(NamedTuple):
    """Something that a page lacks: of which run, what, and the reason with the remedy."""

    run: str
    what: str
    why: str


def run_figures(run: Run, out: Path, stem: str, images: int, seed: int) -> Iterator[Figure | Missing]:
    """Curves, heat maps and t-SNE of a run, and what it lacks of them.

    Args:
        out: folder of the pictures.
        stem: with which their names start.
        images: images under heat maps; none of them for 0.
        seed: of t-SNE.
    """
    if run.scalars:
        path = plot_curves(run.folder, out / f"{stem}_curves.png")
        titles = {
            tag: _CAPTIONED[tag] for tag in _CAPTIONED if run.settings["model"]["adversary"] or "adversary" not in tag
        }
        ends = run.from_to(titles, ".3g") or "none"
        caption = f"All that the run logged, over its iterations; first to last value: {ends}."
        yield Figure(f"Training of {run.name}", path, caption, CURVES)
    else:
        yield Missing(run.name, "curves", no_scalars(run))
    try:
        state = load_checkpoint(run.checkpoint)
    except DanFastError as error:
        yield Missing(run.name, "heat maps and t-SNE, Figs. 9 and 10", str(error))
        return
    for what, draw in (
        ("heat maps, Fig. 9", partial(_heat_maps, run, state, out / f"{stem}_attention.png", images)),
        ("t-SNE, Fig. 10", partial(_memories, run, state, out / f"{stem}_memories.png", seed)),
    ):
        try:
            yield draw()
        except (DanFastError, ValueError, RuntimeError) as error:
            yield Missing(run.name, what, str(error))


def _heat_maps(run: Run, state: dict[str, Any], path: Path, images: int) -> Figure:
    if images == 0:
        raise DanFastError("Images of persons were left out by --images 0.")
    if run.settings["model"]["attention"] == "none":
        raise DanFastError("Its network has no attention.")
    name, samples = _images_of(run, images)
    network = network_of(state, run.checkpoint)
    attention = plot_attention_over(network, samples, path)
    spread = (attention.amax(1) - attention.amin(1)).tolist()
    caption = (
        f"Spatial attention A_S of {run.name} at {epoch_of(state)} over {len(samples)} images of {name}, each beside "
        "its original. Colours span each image's own range, written above it: from "
        f"{min(spread):.1e} to {max(spread):.1e} wide."
        f"{' That is flat: colours show little but rounding.' if max(spread) < _FLAT else ''}"
    )
    return Figure(f"Attention of {run.name} (Fig. 9)", path, caption, HEAT_MAPS)


def plot_attention_over(network: DAN, samples: Sequence[Sample], path: Path) -> Tensor:
    """`plot_attention` of a network over images in files; returns the attention, (n, h*w) on the CPU."""
    loader = image_loader(samples, network.image_size, len(samples), preprocessing=network.preprocessing)
    images, _ = next(iter(loader))
    with torch.inference_mode():
        attention: Tensor = network(images.to(next(network.parameters()).device)).spatial_attention.cpu()
    plot_attention(images, attention, network.map_size, path, network.preprocessing)
    return attention


def _memories(run: Run, state: dict[str, Any], path: Path, seed: int) -> Figure:
    slots = stored_slots(state, run.checkpoint.parent)
    if slots is None:
        raise DanFastError(NO_MEMORY)
    plot_memories(slots, path, seed)
    contents = "; ".join(
        f"{title.split(',')[0]}: {slots[memory].describe()}{_agreement(slots[memory])}"
        for memory, title in MEMORIES.items()
    )
    drawn = f" Of a memory with more than {MOST_SLOTS} slots in use that many are drawn, at random."
    caption = (
        f"t-SNE (seed {seed}, of features of unit length) of what the memories hold at {epoch_of(state)}: {contents}."
        f"{drawn if any(len(each.labels) > MOST_SLOTS for each in slots.values()) else ''} Slots of one colour and "
        "shape have the same label, in M′ the same pseudo label; distances between groups mean nothing."
    )
    alt = "Two clouds of points, the slots of M and those of M′, coloured by their labels."
    return Figure(f"Memories of {run.name} (Fig. 10)", path, caption, alt)


def _agreement(slots: Slots) -> str:
    share = neighbours_agree(slots)
    return "" if share is None else f", {100 * share:.0f} % of them nearest to one of the same label"


def _images_of(run: Run, count: int) -> tuple[str, list[Sample]]:
    """Images spread evenly over the run's first dataset that is still there: the same for runs with the same one."""
    data = run.settings["data"]
    readers: list[Callable[[], ReIDDataset]]
    if data["protocol"]:
        readers = [lambda: resolve_protocol(data["protocol"], data["root"], targets_only=True).targets[0]]
    else:
        readers = [partial(load_dataset, path) for path in (*data["targets"], *data["labeled"])]
    reasons = []
    for read in readers:
        try:
            dataset = read()
        except DanFastError as error:
            reasons.append(str(error))
            continue
        samples = dataset.query or dataset.test or dataset.train
        if samples:
            return dataset.name, spread_evenly(samples, count)
    raise DanFastError(f"None of its datasets can be read: {reasons[0] if reasons else 'it names none.'}")


def no_scalars(run: Run) -> str:
    """The sentence for a run that has logged no scalars of a kind."""
    return f"{run.folder / 'tensorboard'} holds no such scalars: the run has logged nothing of the kind."
