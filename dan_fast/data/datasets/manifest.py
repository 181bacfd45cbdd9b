"""Any images, described by a CSV file with the columns path, pid, camid and split."""

import csv
import logging
import re
from pathlib import Path

from dan_fast.core.errors import DanFastError
from dan_fast.data.samples import SPLITS, ReIDDataset, Sample, real_paths

COLUMNS = ("path", "pid", "camid", "split")
_LOG = logging.getLogger(__name__)


def read_manifest(file: Path, name: str) -> ReIDDataset:
    """Read a manifest; samples keep the order of its rows, columns other than the four are ignored.

    `path` is relative to the manifest. `pid` may be empty or -1: in `train` such an image can serve as an
    unlabelled one, from the other splits it is left out, with a warning. `camid` may be empty or -1 where it is
    unknown.

    Raises:
        DanFastError: a missing column, an unknown split, an invalid number (with its line), a path listed twice but
            as query and gallery of one person and camera, image files that do not exist, a file that is not CSV text.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = _parse(csv.DictReader(stream, skipinitialspace=True, strict=True), file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DanFastError(f"The manifest {file} cannot be read as UTF-8 CSV ({error}); repair the file.") from error
    missing = [sample.path for _, sample in rows if not sample.path.is_file()]
    if missing:
        raise DanFastError(
            f"{len(missing)} of the {len(rows)} images of {file} do not exist, {missing[0]} the first; "
            "give paths relative to the manifest, or remove those rows."
        )
    unknown = sum(split != "train" and sample.pid < 0 for split, sample in rows)
    if unknown:
        _LOG.warning("%d query, gallery or test images of %s have no pid and are LEFT OUT.", unknown, file)
    splits = {
        split: tuple(s for word, s in rows if word == split and (split == "train" or s.pid >= 0)) for split in SPLITS
    }
    return ReIDDataset(name, file.parent, **splits)


def _parse(reader: csv.DictReader, file: Path) -> list[tuple[str, Sample]]:
    header = [column.strip() for column in reader.fieldnames or ()]
    absent = [column for column in COLUMNS if column not in header]
    if absent:
        raise DanFastError(
            f"The manifest {file} lacks the column {absent[0]} in its first line, {','.join(header)[:80]!r}: name "
            f"{', '.join(COLUMNS)} there, separated by commas, in any order."
        )
    doubled = [column for column in COLUMNS if header.count(column) > 1]
    if doubled:
        raise DanFastError(f"The manifest {file} has the column {doubled[0]} twice; leave out or rename one of them.")
    reader.fieldnames = header
    rows: list[tuple[str, Sample]] = []
    lines: list[tuple[int, str]] = []
    for row in reader:
        place = f"{file}, line {reader.line_num}"
        short = [column for column in COLUMNS if row[column] is None]
        if short:
            raise DanFastError(f"{place} ends before the column {short[0]}; write all columns, empty ones too.")
        values = {column: row[column].strip() for column in COLUMNS}
        if not values["path"] or "\0" in values["path"]:
            raise DanFastError(
                f"{place}: the path is empty or no path; give the image's path relative to the manifest."
            )
        if values["split"] not in SPLITS:
            raise DanFastError(f"{place}: the split {values['split']!r} is unknown; use one of {', '.join(SPLITS)}.")
        pid = _integer(values["pid"] or "-1", "pid", place)
        sample = Sample(file.parent / values["path"], pid, _integer(values["camid"] or "-1", "camid", place))
        rows.append((values["split"], sample))
        lines.append((reader.line_num, values["path"]))
    known: dict[str, dict[str, tuple[int, Sample]]] = {}
    places = real_paths(sample for _, sample in rows)
    for (line, name), path, (split, sample) in zip(lines, places, rows, strict=True):
        for other, (first, same) in known.get(path, {}).items():
            # A query may be in the gallery too, where it is no match of itself: it is of its own camera.
            if {split, other} != {"query", "gallery"} or sample[1:] != same[1:]:
                raise DanFastError(
                    f"{file}, line {line}: {name} is already listed in line {first}; keep one of the two rows."
                )
        known.setdefault(path, {})[split] = line, sample
    return rows


def _integer(text: str, column: str, place: str) -> int:
    # int reads 1_2 as 12: persons of different names would become one.
    value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,40}", text) else None
    # What a table of int64 holds.
    if value is None or not -1 <= value < 2**63:
        what = "persons, or leave it empty for a train image of an unknown one"
        raise DanFastError(
            f"{place}: the {column} {text[:40]!r} is not a whole number from 0 to 2^63 - 1; number the "
            f"{what if column == 'pid' else 'cameras, or leave it empty where that is unknown'}."
        )
    return value
