"""The curves of a training run, drawn from its TensorBoard scalars."""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import uniform_filter1d
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog

from dan_fast.core.errors import DanFastError
from dan_fast.reporting.canvas import COLOURS, mark_of, panels, save_png, style
from dan_fast.training.scalars import part_of_run

# Tags that belong on one panel although their first two parts differ.
_TOGETHER = {
    **dict.fromkeys(("memory/sigma_alpha", "memory/sigma_alpha_unlabeled", "memory/beta"), "memory/gates"),
    **dict.fromkeys(("memory/slots_labeled", "memory/slots_unlabeled"), "memory/slots"),
}
_TITLES = {
    "train/loss": "Losses on S",
    "test/loss": "Losses on S~",
    "train/accuracy": "Accuracy of the two branches",
    "train/logit_norm": "Logit norms on S",
    "competition": "Competition: share of iterations",
    "attention/spatial_spread": "Spread of A_S: max - min",
    "memory/gates": "Memory gates",
    "memory/slots": "Memory slots in use",
    "memory/cleared_a_sample": "Samples that leave M′ for each written",
    "pseudo": "Pseudo labels: shares",
    "train/step_size": "Step size",
}
_MOST_LINES = len(COLOURS)
_SMOOTH_FROM = 60


def read_scalars(run_dir: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every scalar of a run as (steps, values), int64 and float64, without what a resumed run did again.

    After a crash a run goes on from its last checkpoint and logs some steps a second time. At each point that
    steps back all that was logged for this step and later ones is forgotten: of each tag, and of all where a file says
    from which step on the run went on. The order is that of writing, and of the numbers of the files; timestamps are
    not used.

    Args:
        run_dir: a run's folder, with event files in its ``tensorboard`` folder.

    Raises:
        DanFastError: the folder is missing or holds no scalar.
    """
    folder = Path(run_dir) / "tensorboard"
    if not folder.is_dir():
        raise DanFastError(f"{folder} does not exist; name the folder of a run that has been trained.")
    logged: dict[str, list[ScalarEvent]] = defaultdict(list)
    for file in sorted(folder.glob("*tfevents*"), key=_order_of_writing):
        # 0: all of them, not a sample.
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if (start := _goes_on_from(file)) is not None:
            for tag, earlier in logged.items():
                logged[tag] = [event for event in earlier if event.step < start]
        for tag in events.Tags()["scalars"]:
            logged[tag] += events.Scalars(tag)
    if not logged:
        raise DanFastError(f"{folder} holds no scalar yet; let the run log at least one step.")
    return {tag: _without_replays(events) for tag, events in logged.items() if events}


def plot_curves(run_dir: str | Path, out_png: str | Path) -> Path:
    """Draw a run's scalars as small multiples, one panel for each first two parts of a tag.

    Panels are drawn for what was logged, nothing more. A long curve is drawn faintly under its running mean.

    Args:
        run_dir: a run's folder, with event files in its ``tensorboard`` folder.
        out_png: file to write.

    Returns:
        The path of the file.

    Raises:
        DanFastError: the folder is missing or holds no scalar.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> run = Path(tempfile.mkdtemp())
        >>> with SummaryWriter(run / "tensorboard") as writer:
        ...     writer.add_scalar("train/loss/total", 1.5, 0)
        >>> plot_curves(run, run / "curves.png").name
        'curves.png'
    """
    scalars = read_scalars(run_dir)
    grouped: dict[str, list[str]] = {}
    for tag in sorted(scalars, key=_order):
        grouped.setdefault(_panel(tag), []).append(tag)
    with style():
        figure, grid = panels(len(grouped), 3, width=4.3, height=2.7)
        for axes, (panel, tags) in zip(grid, grouped.items(), strict=True):
            _draw_panel(axes, panel, [(tag, *scalars[tag]) for tag in tags])
        return save_png(figure, out_png)


def _order_of_writing(file: Path) -> tuple[int, list[int], str]:
    # TensorBoard's names end in a number without leading zeros: as text 10 would come before 9.
    return part_of_run(file), [int(digits) for digits in re.findall(r"\d+", file.name)], file.name


def _goes_on_from(file: Path) -> int | None:
    """The step from which on a run went on with an event file, `purge_step` of its writer; None where it began."""
    first = islice(EventFileLoader(str(file)).Load(), 3)
    return next((event.step for event in first if event.session_log.status == SessionLog.START), None)


def _without_replays(events: Sequence[ScalarEvent]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([event.step for event in events], dtype=np.int64)
    values = np.array([event.value for event in events], dtype=np.float64)
    # What comes after is of later steps alone.
    earliest_after = np.minimum.accumulate(np.append(steps[1:], np.iinfo(np.int64).max)[::-1])[::-1]
    kept = steps < earliest_after
    return steps[kept], values[kept]


def _panel(tag: str) -> str:
    first = tag.partition("/")[0]
    return first if first in ("competition", "pseudo") else _TOGETHER.get(tag, "/".join(tag.split("/")[:2]))


def _order(tag: str) -> tuple[int, str, bool, str]:
    known = list(_TITLES)
    panel = _panel(tag)
    place = known.index(panel) if panel in known else len(known)
    # The total first, as the line the others add up to.
    return place, panel, not tag.endswith("/total"), tag


def _draw_panel(axes: Axes, panel: str, curves: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    axes.set_title(fill(_TITLES.get(panel, panel.replace("eval/", "Evaluation: ").replace("_", " ")), 44))
    for place, (tag, steps, values) in enumerate(curves[:_MOST_LINES]):
        colour, label = COLOURS[place], tag.rsplit("/", 1)[-1].replace("_", " ")
        if len(steps) < _SMOOTH_FROM:
            axes.plot(steps, values, color=colour, label=label, marker=mark_of(steps), ms=3)
            continue
        if not np.isin(values, (0, 1)).all():  # of yes and no only the share can be read
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
        axes.plot(steps, _running_mean(values), color=colour, linewidth=1.6, label=label)
    if len(curves) > _MOST_LINES:
        axes.plot([], [], " ", label=f"and {len(curves) - _MOST_LINES} more")
    axes.set_xlabel("iteration")
    if panel.startswith("eval/"):
        axes.set_ylabel("%")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)
    if len(curves) > 1 or curves[0][0] != panel:
        # Beside the curves, never over them.
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0, handlelength=1.2)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a thirtieth of the curve, smaller at its ends; NaN is left out."""
    size, known = 2 * max(1, len(values) // 60) + 1, np.isfinite(values)
    sums, shares = (
        uniform_filter1d(each, size, mode="constant") for each in (np.where(known, values, 0.0), known.astype(float))
    )
    return np.divide(sums, shares, out=np.full(len(values), np.nan), where=shares > 0)
