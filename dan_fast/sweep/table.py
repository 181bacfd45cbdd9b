"""The figures of a sweep as a table that pandas and spreadsheets read."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from dan_fast.core.files import write_text
from dan_fast.evaluation.result import COLUMNS, Evaluation
from dan_fast.sweep.grid import PlannedRun


def write_table(runs: Sequence[PlannedRun], results: str, path: Path) -> None:
    """Write a row for each target of each finished training: what it was trained with, and its figures in percent.

    Args:
        runs: finished trainings.
        results: name of the file of results in their folders.
        path: the .csv file to write.

    Raises:
        DanFastError: see `write_text`.
    """
    settings = dict.fromkeys(name for run in runs for name in run.settings) | {"run.seed": None}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["run", "arm", *settings, "target", *COLUMNS, "num_query", "num_gallery"])
    for run in runs:
        given = {"run.seed": run.config.run.seed, **run.settings}
        values = [given.get(name, "") for name in settings]
        for each in json.loads((run.folder / results).read_text(encoding="utf-8"))["targets"]:
            found = Evaluation.from_dict(each)
            figures = [round(figure, 4) for figure in found.percentages().values()]
            writer.writerow([run.name, run.arm, *values, found.title, *figures, found.num_query, found.num_gallery])
    write_text(path, stream.getvalue())
