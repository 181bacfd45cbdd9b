"""Tables of results: runs by target, beside the paper's figures where it has some."""

import re
from collections.abc import Sequence

from dan_fast.data.datasets.known import KNOWN
from dan_fast.data.samples import without_variant
from dan_fast.evaluation import COLUMNS, Evaluation
from dan_fast.evaluation.reranking import RERANKED
from dan_fast.reporting.groups import caveats, titles
from dan_fast.reporting.html import ABSENT, Table
from dan_fast.reporting.paper_tables import PAPER_TABLES, Contradiction, PaperTable, find_contradictions, paper_table
from dan_fast.reporting.runs import Run

_MARK = "†"
_APART = "‡"
# The names of datasets in papers, archives and other code bases; letters and digits only.
_ALIASES = {
    "VIPeR": ("viper",),
    "PRID": ("prid", "prid2011"),
    "GRID": ("grid", "qmulgrid", "undergroundreid"),
    "i-LIDS": ("ilids", "qmulilids"),
    "Market1501": ("market1501", "market", "market1501v150915"),
    "DukeMTMC-reID": ("dukemtmcreid", "dukemtmc", "duke"),
}


def paper_target(name: str) -> str | None:
    """The paper's name of a dataset, in whatever folder, None for one it does not test on.

    Example:
        >>> paper_target("Market-1501-v15.09.15"), paper_target("prid450s")
        ('Market1501', None)
    """
    return next((target for target, words in _ALIASES.items() if _letters(name) in words), None)


def cameras_of(title: str) -> str:
    """What two datasets of the same cameras have in common: the name without a variant, of a published set its own."""
    name = without_variant(title)
    return paper_target(name) or _PUBLISHED.get(_letters(name), name)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())


_PUBLISHED = {_letters(spelling): known.title for known in KNOWN.values() for spelling in (known.name, known.title)}


def result_tables(runs: Sequence[Run]) -> list[Table]:
    """A table for each target that runs were tested on, of those that no table of the paper takes."""
    tables, of_paper = [], [paper_table(number) for number in PAPER_TABLES]
    for target in titles(runs):
        tested = [
            (run, "", each)
            for run in runs
            for each in run.results
            if each.title == target and not any(_taken_by(table, run, each) for table in of_paper)
        ]
        if tested:
            before = [(run, *each) for run in runs for each in run.baselines if each[1].title == target]
            rows = [_run_row(*each, COLUMNS) for each in (*tested, *before)]
            note = f"The paper has no figures for {target} of such trainings. {_counts(tested)}"
            tables.append(Table(f"Results on {target}", _header(COLUMNS), rows, note))
    return tables


def _taken_by(table: PaperTable, run: Run, result: Evaluation) -> str | None:
    """The target under which a table of the paper takes a result, None where it does not.

    VI takes those with the target's images among the unlabelled ones, the others those without: IV and V, and IX, which
    compares procedures of training. None takes one with the target among the labelled ones, or on cameras that were
    learnt from in a training before, from whose weights the run started.
    """
    target = paper_target(result.dataset)
    labeled, unlabeled = (target in map(cameras_of, names) for names in (run.labeled, run.unlabeled))
    before = result.known_cameras and not (labeled or unlabeled)
    taken = target in table.targets and not labeled and unlabeled == (table.number == "VI") and not before
    return target if taken else None


def paper_tables(runs: Sequence[Run]) -> list[Table]:
    """Tables IV, V, VI and IX by target, the runs that belong beside them below the paper's rows.

    A table and target without a run is folded. Figures of the paper that contradict others carry a mark; the
    reasons stand below.
    """
    tables = []
    for number in PAPER_TABLES:
        table = paper_table(number)
        faults = find_contradictions(table)
        tables += [_paper_table(table, target, faults, runs) for target in table.targets]
    # Those with a run first.
    return sorted(tables, key=lambda each: each.folded)


def contradictions_table() -> Table:
    """All figures of the paper that contradict others, with the reasons."""
    found = [each for number in PAPER_TABLES for each in find_contradictions(paper_table(number))]
    rows = [[each.table, each.target, each.column, " / ".join(each.methods), each.reason] for each in found]
    return Table(
        "Where the paper contradicts itself",
        ["table", "target", "column", "rows", "why"],
        rows,
        "Found by computation: rates that fall with the rank, a mAP that the row's own matching rates rule out, "
        "differences other than those the text states. What rounding can explain is not listed.",
    )


def _paper_table(table: PaperTable, target: str, faults: Sequence[Contradiction], runs: Sequence[Run]) -> Table:
    columns = [column for column in COLUMNS if column in table.columns]
    mine = [each for each in faults if each.target == target]
    marks = {(method, each.column) for each in mine for method in each.methods}
    rows: list[list[object]] = []
    for row in table.rows_of(target):
        values = [
            f"{row.values[column]:.1f}{f' {_MARK}' if (row.method, column) in marks else ''}"
            if column in row.values
            else ABSENT
            for column in columns
        ]
        name = row.method if row.venue in ("", "This paper") else f"{row.method}, {row.venue}"
        rows.append([f"paper: {name}", row.sources, "not stated", ABSENT, *values])
    tested = [(run, "", each) for run in runs for each in run.results if _taken_by(table, run, each) == target]
    of_tested = [run for run in runs if run.name in {each.name for each, *_ in tested}]
    before = [(run, *each) for run in of_tested for each in run.baselines if paper_target(each[1].dataset) == target]
    shown = [*tested, *before]
    rows += [_run_row(*each, columns, f" {_APART}" if _is_apart(each[-1]) else "") for each in shown]
    notes = [f"No run here was tested on {target} under these conditions."]
    if tested:
        notes = [_counts(tested), "Rows compare only where sources, protocol and variant do."]
    if any(_is_apart(each) for *_, each in shown):
        notes.append(f"{_APART} Not scored as the paper's rows are, see the protocol: these do not compare.")
    notes += [f"{_MARK} {each.reason}" for each in mine]
    notes.append(f"Source of the paper's rows: {table.source}.")
    title = f"Table {table.number}, {target}: {table.title.split(' on ')[0]}"
    return Table(title, _header(columns), rows, " ".join(notes), folded=not tested)


def _header(columns: Sequence[str]) -> list[str]:
    return ["method or run", "trained on", "protocol", "splits", *(f"{column} (%)" for column in columns)]


def _run_row(run: Run, baseline: str, evaluation: Evaluation, columns: Sequence[str], mark: str = "") -> list[object]:
    """The row of a run, or of a baseline of it."""
    values = {column: ABSENT if "nan" in text else text for column, text in zip(COLUMNS, evaluation.row(), strict=True)}
    how = "; ".join(filter(None, (evaluation.variant, evaluation.conditions_and_recipe)))
    trained = f"{run.name} ({run.settings['meta']['procedure'].upper()}, {run.model})", run.sources
    before = "nothing" if baseline == "chance" else ", after ".join(run.started_from) or "nothing"
    name, sources = (f"{baseline}, for {run.name}", before) if baseline else trained
    return [name, sources, how, evaluation.repeats, *(f"{values[column]}{mark}" for column in columns)]


def _is_apart(evaluation: Evaluation) -> bool:
    """Whether the figures are no counterpart of the paper's: another metric, AP or images, re-ranked, chosen, seen."""
    words = "; ".join((evaluation.protocol, evaluation.epoch, evaluation.seen))
    rescored = evaluation.metric not in ("", "cosine") or evaluation.ap not in ("", "standard")
    return rescored or bool(evaluation.skipped) or RERANKED in words or bool(caveats(words))


def _counts(tested: Sequence[tuple[Run, str, Evaluation]]) -> str:
    spread = " ± is the standard deviation over the splits." if tested[0][-1].repeats > 1 else ""
    names: dict[str, list[str]] = {}
    for run, _, each in tested:
        names.setdefault(f"{each.num_query} queries, {each.num_gallery} gallery images", []).append(run.name)
    if len(names) == 1:
        return f"{next(iter(names))}.{spread}"
    of_runs = "; ".join(f"{images} for {', '.join(dict.fromkeys(runs))}" for images, runs in names.items())
    return f"{of_runs}: rows of other images do not compare.{spread}"
