"""Pictures of several runs side by side: gates over training, models, shares of unlabelled images, swept settings."""

import math
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dan_fast.evaluation import Evaluation
from dan_fast.reporting.canvas import COLOURS, legend_label, save_png, style
from dan_fast.reporting.groups import Line, Target, compared, protocol_of, result_on
from dan_fast.reporting.runs import Run
from dan_fast.training.scalars import tag_forms

GATES = {"memory/sigma_alpha": "σ(α), writes to M", "memory/sigma_alpha_unlabeled": "σ(α′), writes to M′",
         "memory/beta": "β, confidence in pseudo labels"}  # fmt: skip
METRICS = ("R1", "mAP")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("so", "D^", "Pv", "X*")
_LONGEST_NAME = 46
_INCHES_A_LINE = 0.17


def plot_gates(runs: Sequence[Run], out_png: str | Path) -> Path:
    """Fig. 5(b) and its companions: sigma(alpha), sigma(alpha') and beta over the iterations, a line a run.

    The axes span what the runs do, but no less than a tenth, so that noise does not look like a trend.
    """
    with style():
        figure, grid = _panels(len(GATES))
        for axes, (tag, title) in zip(grid, GATES.items(), strict=True):
            axes.set_title(title)
            for place, run in enumerate(runs):
                if tag in run.scalars:
                    steps, values = run.scalars[tag]
                    label = legend_label(run.name)
                    axes.plot(steps, values, label=label, **_dash(place), marker=_mark(len(steps)), ms=3)
            axes.set(xlabel="iteration", ylabel="value of the gate")
            _widen(axes)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _legend(figure, grid)
        return save_png(figure, out_png)


def plot_models(line: Line, out_png: str | Path) -> Path:
    """Fig. 6: mAP over the epochs for each model, or bars of R1 and mAP where a run was tested only at its end."""
    curves = _curves(line)
    if any(len(epochs) > 1 for each in curves.values() for run in each for epochs, _ in run.values()):
        return _plot_model_curves(curves, out_png)
    places = compared([line])
    with style():
        figure, grid = _panels(len(places), height=0.55 + 0.42 * len(line.points), width=5.4)
        for axes, target in zip(grid, places, strict=True):
            _draw_bars(axes, line, target)
        _legend(figure, grid)
        return save_png(figure, out_png)


def _curves(line: Line) -> dict[str, list[dict[Target, tuple[list[float], list[float]]]]]:
    """For each model `evaluated_epochs` of its runs, by what was tested in place of the tags."""
    names: dict[str, set[Target]] = {}
    for run in (run for runs in line.points.values() for run in runs):
        for tag in evaluated_epochs(run):
            names.setdefault(tag, set()).update(_named(run, tag))

    def target(run: Run, tag: str) -> Target:
        """What its results say; of a run that has none yet what the others' do, if that is one thing."""
        found = _named(run, tag) or names[tag]
        return next(iter(found)) if len(found) == 1 else Target(tag, "")

    return {
        name: [{target(run, tag): curve for tag, curve in evaluated_epochs(run).items()} for run in runs]
        for name, runs in line.points.items()
    }


def _named(run: Run, tag: str) -> set[Target]:
    """What the tests of a tag were on, by the first of the run's results that has it, the trainer's own; or nothing.

    How the last ones were scored, and of which epoch they are, is not said of the curve.
    """
    found = (each for each in run.results if tag in tag_forms(each.dataset, each.variant))
    return {Target(each.title, protocol_of(each)) for each in islice(found, 1)}


def evaluated_epochs(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """For each target's tag (epochs, mAP in percent) of the tests that took place while a run trained.

    The epochs are those of the logged steps. Where it is not known how many iterations an epoch has, the steps at which
    any target was tested are taken for the epochs that run.evaluate_every names.
    """
    tested = {
        tag.removeprefix("eval/").removesuffix("/mAP"): (steps.tolist(), values.tolist())
        for tag, (steps, values) in run.scalars.items()
        if tag.startswith("eval/") and tag.endswith("/mAP")
    }
    every, last = run.settings["run"]["evaluate_every"], run.settings["optimizer"]["epochs"]
    all_steps = sorted({step for steps, _ in tested.values() for step in steps})
    if run.iterations:
        epoch_of = {step: step / run.iterations for step in all_steps}
    else:
        epoch_of = {step: min(place * every, last) if every else last for place, step in enumerate(all_steps, 1)}
    return {target: ([epoch_of[step] for step in steps], values) for target, (steps, values) in tested.items()}


def plot_over_setting(lines: Sequence[Line], label: str, out_png: str | Path, percent: bool = False) -> Path:
    """Figs. 7 and 8: R1 and mAP over a setting, a panel a target; bars show the deviation over splits.

    Where several runs differ in their seed only, the line goes through their mean and each is a dot.

    Args:
        label: of the horizontal axis.
        percent: the setting is a share, to be shown in percent.
    """
    places = compared(lines)
    with style():
        figure, grid = _panels(len(places))
        for axes, target in zip(grid, places, strict=True):
            for place, line in enumerate(lines):
                for metric in METRICS:
                    _draw_line(axes, line, target, metric, place, 100.0 if percent else 1.0)
            _name(axes, target)
            axes.set(xlabel=label, ylabel="R1 and mAP (%)")
            axes.margins(y=0.15)
        _legend(figure, grid)
        return save_png(figure, out_png)


def means(line: Line, target: Target, metric: str) -> dict[object, float]:
    """The mean of R1 or mAP in percent for each value of the setting in which a line's runs differ."""
    return {
        value: fmean(result.percentages()[metric] for result in results)
        for value, results in _tested(line, target).items()
    }


def counts(line: Line, target: Target) -> dict[object, int]:
    """How many runs each of the `means` is of."""
    return {value: len(results) for value, results in _tested(line, target).items()}


def _tested(line: Line, target: Target) -> dict[object, list[Evaluation]]:
    found = {
        value: [result for run in runs if (result := result_on(run, target)) is not None]
        for value, runs in line.points.items()
    }
    return {value: results for value, results in found.items() if results}


def _draw_line(axes: Axes, line: Line, target: Target, metric: str, place: int, factor: float) -> None:
    values = means(line, target, metric)
    colour, markers = COLOURS[place % len(COLOURS)], _MARKERS[place // len(COLOURS) % len(_MARKERS)]
    solid = metric == "mAP"
    look = {"color": colour, "linestyle": "-" if solid else "--", "marker": markers[0 if solid else 1]}
    label = f"{metric}, {line.label}" if line.label else metric
    axes.plot([factor * value for value in values], list(values.values()), ms=4, label=label, **look)
    for value, runs in line.points.items():
        for run in runs:
            result = result_on(run, target)
            if result is None:
                continue
            height = result.percentages()[metric]
            if len(runs) > 1:
                axes.plot([factor * value], [height], ".", color=colour, alpha=0.6)
            spread = result.mAP_std if metric == "mAP" else (result.cmc_std[0] if result.cmc_std else None)
            if spread is not None:
                axes.errorbar([factor * value], [height], yerr=100 * spread, color=colour, alpha=0.5, capsize=2)


def _draw_bars(axes: Axes, line: Line, target: Target) -> None:
    names = list(line.points)  # from the top down
    for place, metric in enumerate(METRICS):
        values = means(line, target, metric)
        rows = [names.index(name) - 0.2 + 0.4 * place for name in values]
        axes.barh(rows, list(values.values()), height=0.36, color=COLOURS[place], label=metric)
        for row, value in zip(rows, values.values(), strict=True):
            axes.text(value, row, f" {value:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), _shortened(names))
    _name(axes, target)
    axes.set(xlabel="R1 and mAP (%)", ylim=(len(names) - 0.4, -0.6))
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)


def _plot_model_curves(
    curves: dict[str, list[dict[Target, tuple[list[float], list[float]]]]], out_png: str | Path
) -> Path:
    places = list(dict.fromkeys(target for runs in curves.values() for run in runs for target in run))
    with style():
        figure, grid = _panels(len(places), width=5.4, height=3.6)
        for axes, target in zip(grid, places, strict=True):
            for place, (name, runs) in enumerate(curves.items()):
                for number, run in enumerate(runs):
                    if target in run:
                        label = name if number == 0 else None
                        axes.plot(*run[target], label=label, marker=_mark(len(run[target][0])), ms=4, **_dash(place))
            _name(axes, target)
            axes.set(xlabel="epoch", ylabel="mAP (%)")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _legend(figure, grid)
        return save_png(figure, out_png)


def _panels(count: int, width: float = 4.3, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    columns = min(2 if width > 5 else 3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.3), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Below all panels: what they share, and never over a curve."""
    shown: dict[str, object] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    labels = _shortened([*shown])
    longest = max((len(line) for label in labels for line in label.split("\n")), default=1)
    columns = max(1, int(figure.get_figwidth() * 11 / (longest + 8)))
    lines = math.ceil(len(labels) / columns) * max((label.count("\n") + 1 for label in labels), default=0)
    # The panels keep their height, however many runs there are.
    figure.set_figheight(figure.get_figheight() + _INCHES_A_LINE * lines)
    figure.legend(shown.values(), labels, loc="outside lower left", ncols=columns)


def _widen(axes: Axes, least: float = 0.1) -> None:
    low, high = axes.get_ylim()
    lacking = max(0.0, least - (high - low)) / 2
    axes.set_ylim(max(low - lacking, 0.0), min(high + lacking, 1.0))


def _name(axes: Axes, target: Target) -> None:
    axes.set_title("\n".join(fill(words, 44) for words in target if words), fontsize=9)


def _dash(place: int) -> dict[str, object]:
    """Colours, then the same colours with other dashes."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": _DASHES[place // len(COLOURS) % len(_DASHES)]}


def _mark(count: int) -> str | None:
    return "o" if count < 20 else None


def _shortened(names: Sequence[str]) -> list[str]:
    """The names of a picture without their middle where they are long; whole, on several lines, if two became equal."""
    short = [
        name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME // 2 - 1]}…{name[-_LONGEST_NAME // 2 :]}"
        for name in names
    ]
    if len(set(short)) == len(set(names)):
        return short
    # A sweep's names have commas between settings, where lines may end.
    return [fill(name.replace(",", ", "), _LONGEST_NAME) for name in names]


def describe(
    values: dict[object, float], show: Callable[[object], str] = str, runs: dict[object, int] | None = None
) -> str:
    """Values in words, for readers who do not see the picture: "12.3 at 0.2, 14.0 at 0.6".

    With `runs`, how many each value is the mean of, these are named where they differ.
    """
    differ = runs is not None and len(set(runs.values())) > 1
    of = {key: f" (mean of {runs[key]})" if differ else "" for key in values}
    return ", ".join(f"{value:.1f} at {show(key)}{of[key]}" for key, value in values.items())
