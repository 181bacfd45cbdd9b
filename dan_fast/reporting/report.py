"""`dan-fast report`: runs beside the paper's tables and figures, as pictures and one page."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt

from dan_fast.core.files import alone, remove_unfinished
from dan_fast.reporting.arms import read_comparison
from dan_fast.reporting.groups import SYMBOLS, Line, compared, models, swept_settings, titles, unlabeled_shares
from dan_fast.reporting.html import Figure, Table, require_own_page, write_report
from dan_fast.reporting.result_tables import contradictions_table, paper_tables, result_tables
from dan_fast.reporting.run_figures import NO_MEMORY, Missing, no_scalars, run_figures
from dan_fast.reporting.runs import Run, read_runs
from dan_fast.reporting.side_by_side import (
    GATES,
    METRICS,
    describe,
    plot_gates,
    plot_models,
    plot_over_setting,
    tested_while_training,
)
from dan_fast.reporting.watched import watched_table

# What a report calls its pictures.
_PICTURE = re.compile(r"(\d\d+_(curves|attention|memories)|gates|models\d+|unlabeled_share|over_\w+\.\w+)\.png")
_LINES = "Line charts, one a target, with the values of the setting from left to right."


def report(
    runs: Sequence[str | Path],
    out: str | Path = "runs/report",
    images: NonNegativeInt = 8,
    seed: NonNegativeInt = 0,
) -> Path:
    """Show trainings beside the paper's Tables IV-VI and IX and Figs. 5(b) to 10, on one page with pictures.

    The page lists what a training lacks.

    Args:
        runs: Folders of trainings, or folders of such folders.
        out: Folder for the page, index.html, and its pictures.
        images: Number of images with heat maps, from the first target of each training; 0 leaves out images of persons.
        seed: Seed of t-SNE.

    Returns:
        The path of the page.

    Raises:
        DanFastError: a path is no folder of a training, the page cannot be written, or another process is writing one
            into the same folder.

    Example:
        page = report(["runs/market", "runs/fig7"], out="runs/report")
    """
    found, out = read_runs(runs), Path(out)
    # The pictures of two pages have the same names.
    with alone(out / ".lock"):
        remove_unfinished(out)
        # Before minutes of drawing.
        require_own_page(out / "index.html")
        return _written(found, out, images, seed)


def _written(found: Sequence[Run], out: Path, images: int, seed: int) -> Path:
    parts = [
        *_without_results(found),
        *_gates(found, out),
        *(_models(found, out) or [_nothing_alike("Fig. 6", "attention or adversary", "fig6")]),
        *(_shares(found, out) or [_nothing_alike("Fig. 7", "data.unlabeled_share", "fig7")]),
        *(_swept(found, out) or [_nothing_alike("Fig. 8", "one number", "fig8")]),
    ]
    for number, run in enumerate(found, 1):
        parts += run_figures(run, out, f"{number:02d}", images, seed)
    figures = [part for part in parts if isinstance(part, Figure)]
    missing = [part for part in parts if isinstance(part, Missing)]
    is_new = not (out / "index.html").is_file()
    sweeps = dict.fromkeys(run.folder.resolve().parent for run in found)
    comparisons = [comparison for folder in sweeps if (comparison := read_comparison(folder)) is not None]
    tables = [table for comparison in comparisons for table in comparison.tables()]
    tables += [_overview(found), *result_tables(found), *paper_tables(found)]
    if (watched := watched_table(found)) is not None:
        tables.append(watched)
    if missing:
        tables.append(Table("Not on this page", ["run", "what", "why, and what to do"], missing))
    tables.append(contradictions_table())
    page = write_report(out, "dan_fast: runs beside the paper", _summary(found), tables, figures)
    shown = {Path(figure.path).name for figure in figures}
    for picture in () if is_new else out.glob("*.png"):
        # Of an earlier report; among them may be persons who were left out of this one.
        if _PICTURE.fullmatch(picture.name) and picture.name not in shown:
            picture.unlink(missing_ok=True)
    return page


def _summary(runs: Sequence[Run]) -> str:
    places = titles(runs)
    tested = f"tested on {', '.join(places)}" if places else "not tested on anything yet"
    return (
        f"{len(runs)} training{'s' * (len(runs) != 1)}, {tested}, beside the figures that the paper prints "
        "(Liu, Zhang, Bhanu, Coleman, Kerr: Data Assimilation Network for Generalizable Person Re-identification, "
        "IEEE TCSVT 2022).\n\nResults are in percent and of the last epoch, unless the protocol beside them says "
        "otherwise."
    )


def _overview(runs: Sequence[Run]) -> Table:
    columns = ["run", "recipe", "trained on", "tested on", "procedure", "network", "backbone", "epochs", "seed"]
    rows = [
        [
            run.name,
            run.recipe.removeprefix("recipe ") or "none",
            run.sources,
            ", ".join(titles([run])) or "nothing yet",
            run.settings["meta"]["procedure"].upper(),
            run.model,
            run.settings["model"]["backbone"],
            run.settings["optimizer"]["epochs"],
            run.settings["run"]["seed"],
        ]
        for run in runs
    ]
    return Table("Runs", columns, rows, "Networks are named as in Fig. 6; r is the dimension reduction ratio.")


def _without_results(runs: Sequence[Run]) -> Iterator[Missing]:
    for run in runs:
        yield from (Missing(run.name, "results", complaint) for complaint in run.complaints)
    for run in runs:
        if not run.results:
            why = "let it train to its end with data.targets, or write `dan-fast evaluate --out` into its folder."
            yield Missing(run.name, "results", f"Not evaluated: {why}")


def _gates(runs: Sequence[Run], out: Path) -> Iterator[Figure | Missing]:
    shown = []
    for run in runs:
        if any(tag in run.scalars for tag in GATES):
            shown.append(run)
        else:
            yield Missing(run.name, "gates, Fig. 5(b)", NO_MEMORY if run.scalars else no_scalars(run))
    if shown:
        path = plot_gates(shown, out / "gates.png")
        symbols = {tag: title.split(",")[0] for tag, title in GATES.items()}
        ends = ". ".join(f"{run.name}: {run.from_to(symbols, '.3f')}" for run in shown)
        caption = f"Gates over the iterations, first to last value. {ends}."
        alt = "Line charts, one a gate, with a line for each run."
        yield Figure("Gates of the memories (Fig. 5(b))", path, caption, alt)


def _models(runs: Sequence[Run], out: Path) -> list[Figure]:
    figures = []
    for number, line in enumerate(models(runs), 1):
        over_epochs = tested_while_training(line)
        if over_epochs or compared([line]):
            path = plot_models(line, out / f"models{number}.png")
            how = "mAP over the epochs" if over_epochs else "R1 and mAP after the last epoch"
            caption = f"{how} for each network{_of(line)}. {_all_means(line)}"
            kind = "line" if over_epochs else "bar"
            alt = f"{kind.capitalize()} charts, one a target, with a {kind} for each network."
            figures.append(Figure("Attention and adversary (Fig. 6)", path, caption, alt))
    return figures


def _shares(runs: Sequence[Run], out: Path) -> list[Figure]:
    lines = unlabeled_shares(runs)
    if not compared(lines):
        return []
    label = "share p of the unlabelled images (%)"
    path = plot_over_setting(lines, label, out / "unlabeled_share.png", percent=True)
    caption = _over("the share of the unlabelled images", lines, lambda share: f"p = {100 * share:g} %")
    return [Figure("Share of unlabelled images (Fig. 7)", path, caption, _LINES)]


def _swept(runs: Sequence[Run], out: Path) -> list[Figure]:
    figures = []
    for name, lines in swept_settings(runs).items():
        if compared(lines):
            label = f"{SYMBOLS[name]}, {name}" if name in SYMBOLS else name
            path = plot_over_setting(lines, label, out / f"over_{name}.png")
            figures.append(Figure(f"Over {label} (Fig. 8)", path, _over(label, lines), _LINES))
    return figures


def _nothing_alike(figure: str, what: str, grid: str) -> Missing:
    why = f"No two runs that were tested alike differ in {what} alone: `dan-fast sweep --grid {grid}` trains such."
    return Missing("all", figure, why)


def _of(line: Line) -> str:
    return f" ({line.label})" if line.label else ""


def _over(what: str, lines: Sequence[Line], show: Callable[[Any], str] = str) -> str:
    """The caption of `plot_over_setting`."""
    words = " ".join(f"{_of(line)} {_all_means(line, show)}".strip() for line in lines)
    return f"R1 (dashed) and mAP (solid) over {what}. {words}"


def _all_means(line: Line, show: Callable[[Any], str] = str) -> str:
    """R1 and mAP of a line on every target in words, for readers who do not see the picture."""
    return " ".join(
        f"{metric} on {target.title} ({target.protocol}): {describe(line, target, metric, show)}."
        for target in compared([line])
        for metric in METRICS
    )
