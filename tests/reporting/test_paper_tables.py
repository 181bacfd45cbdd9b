"""The paper's figures as shipped, and the search for what contradicts itself in them."""

import pytest
import yaml

from dan_fast.reporting.paper_tables import (
    PAPER_TABLES,
    Contradiction,
    find_contradictions,
    mean_precision_bounds,
    paper_table,
    table_of,
)


def made_up(rows: str, claims: str = "[]", one_match: bool = True):
    text = f"""
table: X
title: made up
source: nowhere
sources: nothing
columns: [R1, R5, R10, mAP]
targets: {{T: {{one_match: {str(one_match).lower()}}}}}
rows: {rows}
claims: {claims}
"""
    return table_of(yaml.safe_load(text))


def found(rows: str, **options) -> list[tuple[str, tuple[str, ...]]]:
    return [(each.column, each.methods) for each in find_contradictions(made_up(rows, **options))]


def test_every_table_is_shipped_with_its_source():
    for number in PAPER_TABLES:
        table = paper_table(number)
        assert f"Table {number}, p." in table.source and "doi:10.1109/TCSVT.2022.3153348" in table.source
        assert len(table.rows) == len(table.targets) * len({row.method for row in table.rows})
    with pytest.raises(ValueError, match="IV, V, VI, IX"):
        paper_table("VII")


@pytest.mark.parametrize(
    ("number", "methods", "target", "method", "values"),
    [
        ("IV", 5, "GRID", "Ours (with MSMT17)", {"R1": 50.8, "R5": 65.4, "R10": 74.0, "mAP": 57.7}),
        ("IV", 5, "i-LIDS", "MMFA-AAE", {"R1": 84.8}),
        ("V", 6, "Market1501", "MuDeep", {}),
        ("V", 6, "DukeMTMC-reID", "Ours (w/o MSMT17)", {"R1": 59.2, "mAP": 39.1}),
        ("VI", 10, "Market1501", "DCML", {"R1": 88.2, "mAP": 72.3}),
        ("IX", 3, "PRID", "DAML1", {"R1": 46.9, "mAP": 50.3}),
    ],
)
def test_figures_stand_where_the_paper_has_them(number, methods, target, method, values):
    rows = paper_table(number).rows_of(target)
    assert len(rows) == methods
    assert {row.method: dict(row.values) for row in rows}[method] == values


def test_sources_name_what_was_added():
    with_msmt = {row.method: row.sources for row in paper_table("V").rows_of("Market1501")}
    assert with_msmt["Ours (w/o MSMT17)"] == "DukeMTMC-reID"
    assert with_msmt["Ours (with MSMT17)"] == "DukeMTMC-reID + MSMT17 (unlabelled)"


def test_the_papers_contradictions_are_these():
    marked = {
        (each.table, each.target, each.column, method)
        for number in PAPER_TABLES
        for each in find_contradictions(paper_table(number))
        for method in each.methods
    }
    assert marked == {
        ("IV", "VIPeR", "mAP", "Ours (w/o MSMT17)"),
        ("IV", "VIPeR", "mAP", "Ours (with MSMT17)"),
        ("IV", "i-LIDS", "mAP", "Ours (with MSMT17)"),
        ("V", "Market1501", "mAP", "Ours (w/o MSMT17)"),
        ("V", "Market1501", "mAP", "CBN"),
        ("IX", "VIPeR", "mAP", "DAML2"),
        ("IX", "VIPeR", "mAP", "DAML3"),
    }


def test_bounds_are_those_of_the_best_and_the_worst_ranks():
    # Of 100 queries 60 are found first, 20 at rank 5 and 10 at rank 10 at worst, 10 nowhere; 2, 6 and 11 at best.
    assert mean_precision_bounds({1: 60.0, 5: 80.0, 10: 90.0}) == pytest.approx(
        (60 + 20 / 5 + 10 / 10, 60 + 20 / 2 + 10 / 6 + 10 / 11)
    )
    assert mean_precision_bounds({1: 60.0}) == pytest.approx((60, 60 + 40 / 2))
    assert mean_precision_bounds({1: 100.0}) == (100, 100)


def test_map_is_held_to_its_bounds():
    cmc = "60.0, 80.0, 90.0"  # allows 65.0 to 72.6
    assert found(f"[{{method: A, T: [{cmc}, 65.0]}}, {{method: B, T: [{cmc}, 72.5]}}]") == []
    assert found(f"[{{method: A, T: [{cmc}, 64.8]}}, {{method: B, T: [{cmc}, 72.8]}}]") == [
        ("mAP", ("A",)),
        ("mAP", ("B",)),
    ]
    # Printed figures are rounded, and with several matches a query the bounds do not hold.
    assert found(f"[{{method: A, T: [{cmc}, 64.9]}}]") == []
    assert found(f"[{{method: A, T: [{cmc}, 40.0]}}]", one_match=False) == []
    assert found("[{method: A, T: [60.0, null, null, 59.0]}]") == [("mAP", ("A",))]
    assert found("[{method: A, T: [null, null, null, 59.0]}]") == []


def test_rates_that_fall_or_leave_the_percents_are_found():
    assert found("[{method: A, T: [60.0, 59.0, 90.0, null]}]") == [("R5", ("A",))]
    assert found("[{method: A, T: [60.0, null, 59.9, null]}]") == [("R10", ("A",))]
    assert found("[{method: A, T: [60.0, 60.0, 60.0, null]}]") == []
    assert found("[{method: A, T: [60.0, 70.0, 100.2, -1.0]}]") == [("R10", ("A",)), ("mAP", ("A",))]


def test_differences_the_text_states_are_checked_both_ways():
    rows = "[{method: A, T: [60.0, null, null, null]}, {method: B, T: [57.0, null, null, null]}]"

    def claim(of: str, over: str, value: float) -> str:
        return f"[{{of: {of}, over: {over}, target: T, column: R1, value: {value}}}]"

    assert found(rows, claims=claim("A", "B", 3.0)) == []
    assert found(rows, claims=claim("A", "B", 3.1)) == []
    assert found(rows, claims=claim("A", "B", 3.3)) == [("R1", ("A", "B"))]
    assert found(rows, claims=claim("B", "A", 3.0)) == [("R1", ("B", "A"))]


def test_a_reason_is_a_sentence_with_the_figures():
    [each] = find_contradictions(made_up("[{method: A, T: [60.0, 80.0, 90.0, 61.0]}]"))
    given = "R1 60.0, R5 80.0, R10 90.0"
    reason = f"A on T: mAP 61.0 is below 65.0, the least possible with one match for each query at {given}."
    assert each == Contradiction("X", "T", "mAP", ("A",), reason)
