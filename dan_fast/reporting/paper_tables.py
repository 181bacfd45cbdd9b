"""The figures that the paper prints, and those of them that contradict others."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

import yaml

# By their numbers the files that have their figures.
PAPER_TABLES = {"IV": "table4.yaml", "V": "table5.yaml", "VI": "table6.yaml", "IX": "table9.yaml"}
# What is printed may be off by half of its last digit.
_ROUNDING = 0.05


@dataclass(frozen=True)
class PaperRow:
    """The values of one row of a table for one target.

    Attributes:
        method: as printed.
        venue: as printed, "" where there is none.
        target: the dataset tested on.
        sources: what was trained on.
        values: in percent, of the columns that are given.
    """

    method: str
    venue: str
    target: str
    sources: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Claim:
    """A difference that the text states: `of` is above `over` by `value` percent points."""

    of: str
    over: str
    target: str
    column: str
    value: float


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables.

    Attributes:
        number: as printed, "IV".
        title: what it compares.
        source: the publication, table and page.
        columns: of each target, in order.
        targets: the datasets tested on.
        one_match: the targets with one gallery image of each person, where a query has one match.
        rows: for each method and target.
        claims: the differences that the text states.
    """

    number: str
    title: str
    source: str
    columns: tuple[str, ...]
    targets: tuple[str, ...]
    one_match: frozenset[str]
    rows: tuple[PaperRow, ...]
    claims: tuple[Claim, ...] = ()

    def rows_of(self, target: str) -> tuple[PaperRow, ...]:
        return tuple(row for row in self.rows if row.target == target)


@dataclass(frozen=True)
class Contradiction:
    """A printed figure that cannot be right beside others.

    Attributes:
        table, target, column: where it stands.
        methods: the rows that it concerns.
        reason: a whole sentence.
    """

    table: str
    target: str
    column: str
    methods: tuple[str, ...]
    reason: str


@cache
def paper_table(number: str) -> PaperTable:
    """Table IV, V, VI or IX of the paper.

    Raises:
        ValueError: another number.

    Example:
        >>> paper_table("V").rows_of("Market1501")[-1].values
        {'R1': 77.0, 'mAP': 47.2}
    """
    if number not in PAPER_TABLES:
        raise ValueError(f"number is {number!r}; the tables are {', '.join(PAPER_TABLES)}.")
    text = files("dan_fast.reporting").joinpath("paper", PAPER_TABLES[number]).read_text(encoding="utf-8")
    return table_of(yaml.safe_load(text))


def table_of(content: Mapping[str, Any]) -> PaperTable:
    """The table that a file of ``dan_fast/reporting/paper`` describes."""
    columns, targets = tuple(content["columns"]), content["targets"]
    rows = []
    for row in content["rows"]:
        for target in targets:
            given = zip(columns, row[target], strict=True)
            values = {column: float(value) for column, value in given if value is not None}
            sources = targets[target].get("sources") or content["sources"]
            sources = " + ".join([sources, *([row["adds"]] if "adds" in row else [])])
            rows.append(PaperRow(row["method"], row.get("venue", ""), target, sources, values))
    return PaperTable(
        number=content["table"],
        title=content["title"],
        source=content["source"],
        columns=columns,
        targets=tuple(targets),
        one_match=frozenset(target for target, about in targets.items() if about.get("one_match", False)),
        rows=tuple(rows),
        claims=tuple(Claim(**claim) for claim in content.get("claims", ())),
    )


def mean_precision_bounds(cmc: Mapping[int, float]) -> tuple[float, float]:
    """The least and the largest mAP that a CMC curve allows where each query has one match.

    The average precision of a query is then 1 over the rank of its match, so a share of queries found between
    two known ranks adds at least its size over the later and at most over the rank after the earlier:
    R1 + (R5 - R1) / 5 + (R10 - R5) / 10 <= mAP <= R1 + (R5 - R1) / 2 + (R10 - R5) / 6 + (100 - R10) / 11.

    Args:
        cmc: rank to matching rate in percent, the rates not falling with the rank.

    Returns:
        (least, largest) in percent.

    Example:
        >>> least, largest = mean_precision_bounds({1: 62.4, 5: 74.3, 10: 80.7})
        >>> f"{least:.1f} {largest:.1f}"
        '65.4 71.2'
    """
    least = largest = reached = 0.0
    earlier = 0
    for rank, rate in sorted(cmc.items()):
        least += (rate - reached) / rank
        largest += (rate - reached) / (earlier + 1)
        earlier, reached = rank, rate
    return least, largest + (100 - reached) / (earlier + 1)


def find_contradictions(table: PaperTable) -> list[Contradiction]:
    """The figures of a table that cannot be right beside others, each with the reason in a sentence.

    Looked for are rates outside [0, 100], matching rates that fall with the rank, a mAP that the matching rates
    of its row do not allow where a query has one match (:func:`mean_precision_bounds`), and differences that
    are not those the text states. What rounding to the printed digit can explain is no contradiction.

    Example:
        >>> [each.column for each in find_contradictions(paper_table("VI"))]
        []
    """
    found = []
    for row in table.rows:
        faults = _row_faults(row, row.target in table.one_match)
        found += [Contradiction(table.number, row.target, column, (row.method,), reason) for column, reason in faults]
    values = {(row.method, row.target): row.values for row in table.rows}
    for claim in table.claims:
        upper, lower = (values[name, claim.target][claim.column] for name in (claim.of, claim.over))
        if abs(upper - lower - claim.value) > 3 * _ROUNDING + 1e-9:
            reason = (
                f"The text says that {claim.of} is {claim.value:.1f} above {claim.over} in {claim.column} on "
                f"{claim.target}; the table has {upper:.1f} and {lower:.1f}, {upper - lower:.1f} apart."
            )
            found.append(Contradiction(table.number, claim.target, claim.column, (claim.of, claim.over), reason))
    return found


def _row_faults(row: PaperRow, one_match: bool) -> list[tuple[str, str]]:
    """Columns of a row that cannot be right, each with the reason."""
    name = f"{row.method} on {row.target}"
    faults = [
        (column, f"{name}: {column} is {value:.1f}, no share in percent.")
        for column, value in row.values.items()
        if not 0 <= value <= 100
    ]
    cmc = dict(sorted((int(column[1:]), rate) for column, rate in row.values.items() if column[1:].isdigit()))
    for (low, rate), (high, later) in pairwise(cmc.items()):
        if rate > later:
            within = f"a match within the first {low} is one within the first {high}"
            faults.append((f"R{high}", f"{name}: R{low} is {rate:.1f} and R{high} {later:.1f}, though {within}."))
    if faults or not one_match or not cmc or "mAP" not in row.values:
        return faults
    least, largest = mean_precision_bounds(cmc)
    printed = row.values["mAP"]
    # Both bounds are means of the rates, so these move them by no more than one rounding; mAP has its own.
    if least - 2 * _ROUNDING - 1e-9 <= printed <= largest + 2 * _ROUNDING + 1e-9:
        return []
    given = ", ".join(f"R{rank} {rate:.1f}" for rank, rate in cmc.items())
    side = f"below {least:.1f}, the least" if printed < least else f"above {largest:.1f}, the most"
    return [("mAP", f"{name}: mAP {printed:.1f} is {side} possible with one match for each query at {given}.")]
