"""Pictures of several runs side by side: gates over training, models, shares of unlabelled images, swept settings."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dan_fast.evaluation import Evaluation
from dan_fast.reporting.canvas import COLOURS, legend_label, mark_of, panels, save_png, style
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
# (epochs, mAP in percent) of the tests while a run trained.
_Curve = tuple[list[float], list[float]]
_Place = TypeVar("_Place")


def plot_gates(runs: Sequence[Run], out_png: str | Path) -> Path:
    """Fig. 5(b) and its companions: sigma(alpha), sigma(alpha') and beta over the iterations, a line a run.

    The axes span what the runs do, but no less than a tenth, so that noise does not look like a trend.
    """
    return _plot(list(GATES), partial(_draw_gate, runs), out_png)


def plot_models(line: Line, out_png: str | Path) -> Path:
    """Fig. 6: mAP over the epochs for each model, or bars of R1 and mAP where a run was tested only at its end."""
    if not tested_while_training(line):
        height = 0.55 + 0.42 * len(line.points)
        return _plot(compared([line]), partial(_draw_bars, line), out_png, width=5.4, height=height)
    curves = _curves(line)
    places = dict.fromkeys(target for runs in curves.values() for run in runs for target in run)
    return _plot([*places], partial(_draw_curves, curves), out_png, width=5.4, height=3.6)


def plot_over_setting(lines: Sequence[Line], label: str, out_png: str | Path, percent: bool = False) -> Path:
    """Figs. 7 and 8: R1 and mAP over a setting, a panel a target; bars show the deviation over splits.

    Where several runs differ in their seed only, the line goes through their mean and each is a dot.

    Args:
        label: of the horizontal axis.
        percent: the setting is a share, to be shown in percent.
    """
    return _plot(compared(lines), partial(_draw_lines, lines, label, 100.0 if percent else 1.0), out_png)


def tested_while_training(line: Line) -> bool:
    """Whether a run of the line was tested more than once."""
    runs = [run for each in line.points.values() for run in each]
    return any(len(epochs) > 1 for run in runs for epochs, _ in evaluated_epochs(run).values())


def evaluated_epochs(run: Run) -> dict[str, _Curve]:
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


def describe(line: Line, target: Target, metric: str, show: Callable[[Any], str] = str) -> str:
    """The means of a line's runs in words, "12.3 at 0.2, 14.0 at 0.6", and of how many runs, where these differ."""
    tested = _tested(line, target)
    differ = len({len(results) for results in tested.values()}) > 1
    of = {value: f" (mean of {len(results)})" if differ else "" for value, results in tested.items()}
    return ", ".join(f"{mean:.1f} at {show(value)}{of[value]}" for value, mean in _means(tested, metric).items())


def _tested(line: Line, target: Target) -> dict[Any, list[Evaluation]]:
    """For each value of the setting in which a line's runs differ, their results on a target."""
    found = {
        value: [result for run in runs if (result := result_on(run, target)) is not None]
        for value, runs in line.points.items()
    }
    return {value: results for value, results in found.items() if results}


def _means(tested: Mapping[Any, Sequence[Evaluation]], metric: str) -> dict[Any, float]:
    return {value: fmean(result.percentages()[metric] for result in results) for value, results in tested.items()}


def _curves(line: Line) -> dict[str, list[dict[Target, _Curve]]]:
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


def _plot(
    places: Sequence[_Place],
    draw: Callable[[Axes, _Place], None],
    out_png: str | Path,
    width: float = 4.3,
    height: float = 2.9,
) -> Path:
    """A picture of a panel a place, with one legend for all of them."""
    with style():
        figure, grid = panels(len(places), 2 if width > 5 else 3, width, height)
        for axes, place in zip(grid, places, strict=True):
            draw(axes, place)
        _legend(figure, grid)
        return save_png(figure, out_png)


def _draw_gate(runs: Sequence[Run], axes: Axes, tag: str) -> None:
    for place, run in enumerate(runs):
        if tag in run.scalars:
            steps, values = run.scalars[tag]
            axes.plot(steps, values, label=legend_label(run.name), **_dash(place), marker=mark_of(steps), ms=3)
    axes.set(title=GATES[tag], xlabel="iteration", ylabel="value of the gate")
    low, high = axes.get_ylim()
    lacking = max(0.0, 0.1 - (high - low)) / 2
    axes.set_ylim(max(low - lacking, 0.0), min(high + lacking, 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _draw_lines(lines: Sequence[Line], label: str, factor: float, axes: Axes, target: Target) -> None:
    for place, line in enumerate(lines):
        colour, markers = COLOURS[place % len(COLOURS)], _MARKERS[place // len(COLOURS) % len(_MARKERS)]
        tested = _tested(line, target)
        for metric, dash, marker in zip(METRICS, ("--", "-"), reversed(markers), strict=True):
            means = _means(tested, metric)
            name = f"{metric}, {line.label}" if line.label else metric
            where = [factor * value for value in means]
            axes.plot(where, [*means.values()], color=colour, linestyle=dash, marker=marker, ms=4, label=name)
            for x, results in zip(where, tested.values(), strict=True):
                for result in results:
                    height = result.percentages()[metric]
                    if len(results) > 1:
                        axes.plot([x], [height], ".", color=colour, alpha=0.6)
                    spread = result.mAP_std if metric == "mAP" else (result.cmc_std[0] if result.cmc_std else None)
                    if spread is not None:
                        axes.errorbar([x], [height], yerr=100 * spread, color=colour, alpha=0.5, capsize=2)
    _name(axes, target)
    axes.set(xlabel=label, ylabel="R1 and mAP (%)")
    axes.margins(y=0.15)


def _draw_bars(line: Line, axes: Axes, target: Target) -> None:
    names = list(line.points)  # from the top down
    for place, metric in enumerate(METRICS):
        values = _means(_tested(line, target), metric)
        rows = [names.index(name) - 0.2 + 0.4 * place for name in values]
        axes.barh(rows, list(values.values()), height=0.36, color=COLOURS[place], label=metric)
        for row, value in zip(rows, values.values(), strict=True):
            axes.text(value, row, f" {value:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), _shortened(names))
    _name(axes, target)
    axes.set(xlabel="R1 and mAP (%)", ylim=(len(names) - 0.4, -0.6))
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)


def _draw_curves(curves: Mapping[str, Sequence[Mapping[Target, _Curve]]], axes: Axes, target: Target) -> None:
    for place, (name, runs) in enumerate(curves.items()):
        for number, run in enumerate(runs):
            if target in run:
                epochs, values = run[target]
                label = name if number == 0 else None
                axes.plot(epochs, values, label=label, marker=mark_of(epochs), ms=4, **_dash(place))
    _name(axes, target)
    axes.set(xlabel="epoch", ylabel="mAP (%)")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _legend(figure: Figure, grid: Sequence[Axes]) -> None:
    """Below all panels: what they share, and never over a curve."""
    shown: dict[str, object] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    labels = _shortened([*shown])
    longest = max((len(line) for label in labels for line in label.split("\n")), default=1)
    columns = max(1, int(figure.get_figwidth() * 11 / (longest + 8)))
    lines = math.ceil(len(labels) / columns) * max((label.count("\n") + 1 for label in labels), default=0)
    # The panels keep their height, however many runs there are.
    figure.set_figheight(figure.get_figheight() + 0.3 + _INCHES_A_LINE * lines)
    figure.legend(shown.values(), labels, loc="outside lower left", ncols=columns)


def _name(axes: Axes, target: Target) -> None:
    axes.set_title("\n".join(fill(words, 44) for words in target if words), fontsize=9)


def _dash(place: int) -> dict[str, object]:
    """Colours, then the same colours with other dashes."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": _DASHES[place // len(COLOURS) % len(_DASHES)]}


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
