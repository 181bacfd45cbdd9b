"""The figures of a sweep as a table that pandas and spreadsheets read."""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dan_fast.core.files import write_text
from dan_fast.evaluation.result import COLUMNS, Evaluation
from dan_fast.sweep.grid import PlannedRun
from dan_fast.training.recipes import dotted


def write_table(runs: Sequence[PlannedRun], path: Path) -> None:
    """Write a row for each target of each finished training: its settings, its figures in percent and their conditions.

    Settings are those that any of the trainings names, lists as JSON. One whose results cannot be read is left out.

    Args:
        runs: finished trainings.
        path: the .csv file to write.

    Raises:
        DanFastError: see `write_text`.
    """
    names = [*dict.fromkeys(name for run in runs for name in run.settings if name != "run.seed"), "run.seed"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["run", "arm", *names, "target", *COLUMNS, "num_query", "num_gallery", "conditions"])
    for run in runs:
        settings = {"recipe": run.config.recipe, **dotted(run.config.to_dict())}
        values = [run.name, run.arm, *(_cell(settings[name]) for name in names)]
        with suppress(OSError, ValueError, TypeError, KeyError):
            content = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
            for found in [Evaluation.from_dict(each) for each in content["targets"]]:
                figures = [round(figure, 4) for figure in found.percentages().values()]
                of_target = [found.title, *figures, found.num_query, found.num_gallery, found.conditions]
                writer.writerow([*values, *of_target])
    write_text(path, stream.getvalue())


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
