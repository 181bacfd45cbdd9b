"""Grids of settings and named arms: the trainings that a sweep consists of."""

import itertools
import json
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from dan_fast.core.errors import DanFastError
from dan_fast.core.home import expanded, with_home
from dan_fast.core.nearest import nearest
from dan_fast.core.yaml_files import read_mapping
from dan_fast.training import TrainConfig
from dan_fast.training.recipes import DEFAULT_RECIPE, dotted, over, recipe_of, recipe_settings, word_of
from dan_fast.training.valid_settings import require_no_empty_setting

GRIDS = ("fig6", "fig7", "fig8", "table9", "recipes")
_KEYS = ("base", "recipe", "grids", "arms", "seeds", "baseline")
_LONGEST_NAME = 120
_BYTES_OF_A_NAME = 255  # that file systems take
_SECTIONS = TrainConfig().to_dict().keys() - {"recipe"}
# Also a folder's name, followed by ",run.seed=0".
_ARM_NAME = re.compile(r"[A-Za-z0-9][\w.+=,-]{0,79}")
# What stands beside the folders of the trainings.
_OF_THE_SWEEP = ("report", "sweep.json", "results.csv", "comparison.json", "comparison.md")


@dataclass(frozen=True)
class PlannedRun:
    """One training of a sweep.

    Attributes:
        name: its settings, also the name of its folder: "loss.adversary=0.6,model.reduction=4".
        settings: dotted names and values that make it differ from the base.
        config: all of its settings.
        arm: what it is called in a comparison, whatever its seed; "" where nothing is compared.
        baseline: the arm that all others are compared with; "" where nothing is compared.
    """

    name: str
    settings: Mapping[str, Any]
    config: TrainConfig
    arm: str = ""
    baseline: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out)


def plan_sweep(
    grid: str | Path, base: str | Path | None, out: str | Path, recipe: str | None = None
) -> list[PlannedRun]:
    """The trainings of a grid, in its order; of several with the same settings, only the first.

    A grid is a YAML file with a list `grids`, each of which maps dotted settings to lists of values: a training is run
    for every combination of the values of one of them. In place of it, `arms` maps names to dotted settings, one
    training each. The grid's `base`, if any, is the configuration that all of them start from, as `dan-fast train
    --config` reads it: the settings themselves or a path, relative to that of the grid.

    With `seeds`, a list, each training is run once per seed, all of the first seed before those of the next. `baseline`
    names the arm, or the combination, that all others are compared with; by default it is the first one. `recipe` is
    that of the trainings whose own settings and base name none.

    Args:
        grid: path of a grid, or the name of one of those shipped: fig6, fig7, fig8, table9 or recipes.
        base: path of a configuration, in place of the grid's own.
        out: folder of the sweep; each training has a folder in it.
        recipe: of all trainings but those whose own settings name one; None for the base's, or else the grid's, or else
            the default one.

    Raises:
        DanFastError: a file is missing or of another form, a setting or recipe does not exist, a setting does not take
            a value, or two arms, or recipes of a grid, have the same settings, or two combinations the same name.

    Example:
        >>> import tempfile
        >>> base = Path(tempfile.mkdtemp()) / "base.yaml"
        >>> _ = base.write_text("data: {labeled: market}")
        >>> [run.name for run in plan_sweep("table9", base, "runs/table9")]
        ['meta.procedure=daml1', 'meta.procedure=daml2', 'meta.procedure=daml3']
    """
    content, place = _read_grid(grid)
    out = expanded(out)
    start = content.get("base", {}) if base is None else str(base)
    folder = place.parent
    if isinstance(start, str):
        given = expanded(start)
        path = given if base is not None else folder / given
        start, folder = read_mapping(path, "a configuration of a training"), path.parent
    start = _with_sections_read(start, folder)
    start = {**start, "recipe": recipe or recipe_of(start) or content.get("recipe", DEFAULT_RECIPE)}
    named = "arms" in content
    arms = _arms(content, place) if named else _arms_of_grids(content.get("grids"), place)
    seeds = _seeds(content, arms, place)
    baseline = _baseline(content, arms, place) if named or seeds or "baseline" in content else ""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    planned: dict[str, PlannedRun] = {}
    # Seed by seed, so that a sweep that is stopped halfway has complete pairs to compare.
    for seed, (arm, of_arm) in itertools.product(seeds or [None], arms.items()):
        settings = of_arm if seed is None else {**of_arm, "run.seed": seed}
        name = run_name(settings) if not named else arm if seed is None else f"{arm},run.seed={seed}"
        config = _configured(parser, start, settings, name)
        config.run.out, config.run.resume = "", False
        # Two trainings are the same where their settings are, whatever the recipe.
        key = json.dumps({**config.to_dict(), "recipe": ""}, sort_keys=True)
        config.run.out = str(out / name)
        same = planned.setdefault(key, PlannedRun(name, settings, config, arm if baseline else "", baseline))
        # Several grids may share a combination, but two recipes that come to the same are a mistake.
        if same.name != name and (named or same.config.recipe != config.recipe):
            raise DanFastError(
                f"{same.name} and {name} of {place} have the same settings: change one, or leave from the base what "
                "they are to differ in, because the base wins over a recipe."
            )
    if baseline and not any(run.arm == baseline for run in planned.values()):
        raise DanFastError(
            f"The baseline {baseline} of {place} has the settings of an earlier combination: name that one."
        )
    first = next(iter(planned.values()))
    if not (first.config.data.labeled or first.config.data.protocol):
        raise DanFastError(
            "The sweep's base names no labelled images: give --base a configuration with data.labeled or data.protocol."
        )
    return list(planned.values())


def _with_sections_read(base: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A base whose sections may be files in its folder, as `dan-fast train --config` takes them."""
    return {
        name: read_mapping(folder / expanded(section), f"the section {name}")
        if isinstance(section, str) and name in _SECTIONS
        else section
        for name, section in base.items()
    }


def run_name(settings: Mapping[str, Any]) -> str:
    """The folder of a training: its settings, cut with a hash where they are too long for a file's name.

    Example:
        >>> run_name({"model.reduction": 4, "data.unlabeled": []})
        'model.reduction=4,data.unlabeled=none'
    """
    name = ",".join(f"{setting}={_word(value)}" for setting, value in settings.items()) or "base"
    # A date, as YAML reads 2024-05-01, is no value of JSON; whether a setting takes it is checked later.
    exact = json.dumps(settings, sort_keys=True, default=str)
    readable = "".join(letter if letter.isalnum() or letter in "=,.-_+" else "-" for letter in name)
    hashed = sha256(exact.encode()).hexdigest()[:8]
    short = name if readable == name and len(name) <= _LONGEST_NAME else f"{readable[:_LONGEST_NAME]}-{hashed}"
    if len(short.encode()) <= _BYTES_OF_A_NAME:
        return short
    # A letter that is cut through goes.
    return f"{readable.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{hashed}"


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_word, value)) or "none"
    return word_of(value)


def _read_grid(grid: str | Path) -> tuple[dict[str, Any], Path]:
    place = expanded(grid)
    if str(grid) in GRIDS and not place.is_file():
        place = Path(str(files("dan_fast.sweep").joinpath("grids", f"{grid}.yaml")))
    if not place.is_file():
        raise DanFastError(f"{grid} is no file and none of the shipped grids: {', '.join(GRIDS)}.")
    content = read_mapping(place, "a grid of settings")
    unknown = sorted(map(str, content.keys() - set(_KEYS)))
    if unknown:
        raise DanFastError(
            f"{place} has {unknown[0]!r}; a grid has a list `grids` or a mapping `arms` and, optionally, `base`, "
            "`recipe`, `seeds` and `baseline`."
        )
    if "grids" in content and "arms" in content:
        raise DanFastError(
            f"{place} has both `grids` and `arms`: write two files, or combine the settings in the arms."
        )
    if not isinstance(content.get("base", {}), (dict, str)):
        raise DanFastError(f"The base of {place} is neither settings nor a path: write one of them.")
    return content, place


def _arms(content: Mapping[str, Any], place: Path) -> dict[str, dict[str, Any]]:
    """The settings of each arm by dotted names."""
    arms = content["arms"]
    if not isinstance(arms, dict) or not arms:
        raise DanFastError(f"arms in {place} must map names to dotted settings, such as `plain: {{recipe: plain}}`.")
    named: dict[str, dict[str, Any]] = {}
    for name, settings in arms.items():
        if not isinstance(name, str) or _ARM_NAME.fullmatch(name) is None:
            raise DanFastError(
                f"The arm {name!r} in {place} cannot be a folder's name: use letters, digits and _ . + = , - only."
            )
        if name in _OF_THE_SWEEP:
            raise DanFastError(f"The arm {name} in {place} is called as a file of the sweep itself: rename it.")
        if not isinstance(settings, dict | None):
            raise DanFastError(f"The arm {name} in {place} has {settings!r}: give it a mapping of dotted settings.")
        named[name] = {}
        for setting, value in _dotted(settings or {}):
            _require_setting(setting, place)
            if setting in named[name]:
                raise DanFastError(f"The arm {name} in {place} gives {setting} twice: leave out one of them.")
            named[name][setting] = value
    return named


def _dotted(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings by dotted names, those of a section written as a mapping too."""
    for setting, value in settings.items():
        if isinstance(value, dict):
            yield from ((f"{setting}.{name}", each) for name, each in value.items())
        else:
            yield str(setting), value


def _arms_of_grids(grids: Any, place: Path) -> dict[str, dict[str, Any]]:
    """The settings of each combination by its name."""
    if not isinstance(grids, list) or not grids or not all(isinstance(each, dict) for each in grids):
        raise DanFastError(
            f"{place} needs a list `grids`, each a mapping of dotted settings to lists of values, or a mapping `arms`."
        )
    arms: dict[str, dict[str, Any]] = {}
    for grid in grids:
        for setting, values in grid.items():
            if not isinstance(values, list) or not values:
                raise DanFastError(f"{setting} in {place} has {values!r}: give it a list of one value or more.")
            _require_setting(str(setting), place)
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            name = run_name(settings)
            if arms.setdefault(name, settings) != settings:
                raise DanFastError(
                    f"Two combinations of {place} are called {name}: leave out one, or write its values otherwise."
                )
    return arms


def _seeds(content: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]], place: Path) -> list[int]:
    seeds = content.get("seeds", [])
    sound = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not sound or ("seeds" in content and not seeds) or len(set(seeds)) < len(seeds):
        raise DanFastError(f"seeds in {place} has {seeds!r}: give it a list of different whole numbers from 0.")
    if seeds and any("run.seed" in settings for settings in arms.values()):
        raise DanFastError(f"{place} has both `seeds` and run.seed: leave out one of them.")
    return seeds


def _baseline(content: Mapping[str, Any], arms: Mapping[str, Any], place: Path) -> str:
    baseline = content.get("baseline", next(iter(arms)))
    if not isinstance(baseline, str) or baseline not in arms:
        raise DanFastError(f"The baseline {baseline!r} of {place} is none of its arms: name one of {', '.join(arms)}.")
    return baseline


def _require_setting(setting: str, place: Path) -> None:
    """Refuse what is no setting of a training, or one of the sweep's own."""
    if setting in ("run.out", "run.resume"):
        raise DanFastError(f"{setting} in {place} is for the sweep to choose: leave it out.")
    names = [*dotted(TrainConfig().to_dict())]
    if setting not in ("recipe", *names):
        meant = f"; is {' or '.join(near)} meant?" if (near := nearest(setting, names)) else "."
        raise DanFastError(f"{setting} in {place} is no setting of a training{meant}")


def _configured(parser: ArgumentParser, base: Mapping[str, Any], settings: Mapping[str, Any], name: str) -> TrainConfig:
    recipe = settings.get("recipe", base["recipe"])
    merged = {**over(recipe_settings(recipe), base), "recipe": recipe}
    nested: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in merged.items()}
    for setting, value in settings.items():
        if setting == "recipe":
            continue
        section, _, key = setting.partition(".")
        if not isinstance(nested.setdefault(section, {}), dict):
            raise DanFastError(f"{section} of the sweep's base is no mapping of settings: correct it.")
        nested[section][key] = value
    try:
        require_no_empty_setting(nested)
    except DanFastError as error:
        raise DanFastError(f"Of {name}, {error}") from error
    try:
        return TrainConfig(**vars(parser.instantiate(with_home(parser.parse_object(nested)))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise DanFastError(f"The settings of {name} are no training: {' '.join(str(error).split())}.") from error
