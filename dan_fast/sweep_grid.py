"""Grids of settings: which trainings a sweep consists of."""

from __future__ import annotations

import itertools
import json
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from dan_fast.errors import DanFastError
from dan_fast.training import TrainConfig

GRIDS = ("fig6", "fig7", "fig8", "table9")
_LONGEST_NAME = 120


@dataclass(frozen=True)
class PlannedRun:
    """One training of a sweep.

    Attributes:
        name: its settings, also the name of its folder: "loss.adversary=0.6,model.reduction=4".
        settings: dotted names and values that make it differ from the base.
        config: all of its settings.
    """

    name: str
    settings: Mapping[str, Any]
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out)


def plan_sweep(grid: str | Path, base: str | Path | None, out: str | Path) -> list[PlannedRun]:
    """The trainings of a grid, in its order; of several with the same settings the first.

    A grid is a YAML file with a list `grids`, each of which maps dotted settings to lists of values: a training
    is run for every combination of the values of one of them. Its `base`, if any, is the configuration that all
    of them start from, as `dan-fast train --config` reads it: the settings themselves or a path, relative to
    the grid's.

    Args:
        grid: path of a grid, or the name of one of those shipped: fig6, fig7, fig8 or table9.
        base: path of a configuration, in place of the grid's own.
        out: folder of the sweep; each training has a folder in it.

    Raises:
        DanFastError: a file is missing or of another form, or a setting does not exist or does not take a value.

    Example:
        >>> import tempfile
        >>> base = Path(tempfile.mkdtemp()) / "base.yaml"
        >>> _ = base.write_text("data: {labeled: market}")
        >>> [run.name for run in plan_sweep("table9", base, "runs/table9")]
        ['meta.procedure=daml1', 'meta.procedure=daml2', 'meta.procedure=daml3']
    """
    content, place = _read_grid(grid)
    start = content.get("base", {}) if base is None else str(base)
    if isinstance(start, str):
        path = Path(start) if base is not None else place.parent / start
        start = _read_mapping(path, "a configuration of a training")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    planned: dict[str, PlannedRun] = {}
    for settings in _combinations(content.get("grids"), place):
        name = run_name(settings)
        config = _configured(parser, start, settings, name)
        config.run.out, config.run.resume = "", False
        key = json.dumps(config.to_dict(), sort_keys=True)
        config.run.out = str(Path(out) / name)
        planned.setdefault(key, PlannedRun(name, settings, config))
    first = next(iter(planned.values()))
    if not (first.config.data.labeled or first.config.data.protocol):
        raise DanFastError(
            "The sweep's base names no labelled images: give --base a configuration with data.labeled or data.protocol."
        )
    return list(planned.values())


def run_name(settings: Mapping[str, Any]) -> str:
    """The folder of a training: its settings, cut with a hash where they are too long for a file's name.

    Example:
        >>> run_name({"model.reduction": 4, "data.unlabeled": []})
        'model.reduction=4,data.unlabeled=none'
    """
    name = ",".join(f"{setting}={_word(value)}" for setting, value in settings.items()) or "base"
    exact = json.dumps(settings, sort_keys=True)
    readable = "".join(letter if letter.isalnum() or letter in "=,.-_+" else "-" for letter in name)
    if readable == name and len(name) <= _LONGEST_NAME:
        return name
    return f"{readable[:_LONGEST_NAME]}-{sha256(exact.encode()).hexdigest()[:8]}"


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_word, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_grid(grid: str | Path) -> tuple[dict[str, Any], Path]:
    place = Path(grid)
    if str(grid) in GRIDS and not place.is_file():
        place = Path(str(files("dan_fast").joinpath("sweep_grids", f"{grid}.yaml")))
    if not place.is_file():
        raise DanFastError(f"{grid} is no file and none of the shipped grids: {', '.join(GRIDS)}.")
    content = _read_mapping(place, "a grid of settings")
    unknown = sorted(content.keys() - {"base", "grids"})
    if unknown:
        raise DanFastError(f"{place} has {unknown[0]!r}; a grid has a list `grids` and, if it wants, a `base`.")
    if not isinstance(content.get("base", {}), (dict, str)):
        raise DanFastError(f"The base of {place} is neither settings nor a path: write one of them.")
    return content, place


def _read_mapping(path: Path, what: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DanFastError(f"{path} cannot be read as {what} ({reason}): name a YAML file.") from error
    if not isinstance(content, dict):
        raise DanFastError(f"{path} is not {what}: it must be a YAML mapping.")
    return content


def _combinations(grids: Any, place: Path) -> Iterator[dict[str, Any]]:
    if not isinstance(grids, list) or not grids or not all(isinstance(each, dict) for each in grids):
        raise DanFastError(f"{place} needs a list `grids`, each a mapping of dotted settings to lists of values.")
    for grid in grids:
        for setting, values in grid.items():
            if not isinstance(values, list) or not values:
                raise DanFastError(f"{setting} in {place} has {values!r}: give it a list of one value or more.")
            if str(setting) in ("run.out", "run.resume"):
                raise DanFastError(f"{setting} in {place} is for the sweep to choose: leave it out.")
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


def _configured(parser: ArgumentParser, base: Mapping[str, Any], settings: Mapping[str, Any], name: str) -> TrainConfig:
    nested: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for setting, value in settings.items():
        section, _, key = str(setting).partition(".")
        if not isinstance(nested.setdefault(section, {}), dict):
            raise DanFastError(f"{section} of the sweep's base is no mapping of settings: correct it.")
        nested[section][key] = value
    try:
        return TrainConfig(**vars(parser.instantiate(parser.parse_object(nested))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise DanFastError(f"The settings of {name} are no training: {' '.join(str(error).split())}.") from error
