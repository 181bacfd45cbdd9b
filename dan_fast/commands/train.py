"""`dan-fast train`: a training, with the settings of its recipe as the defaults of the flags."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dan_fast.core.devices import resolve_device
from dan_fast.core.errors import DanFastError
from dan_fast.core.yaml_files import read_mapping
from dan_fast.distributed.launch import joined
from dan_fast.training import TrainConfig, Trainer, recipes
from dan_fast.training.config import RunConfig, goes_on
from dan_fast.training.determinism import prepare_cublas


def train(config: TrainConfig) -> None:
    """Train to the last epoch, evaluate on the targets and write the results into the folder of the run.

    Where torchrun has started several ranks, they train together.
    """
    device = resolve_device(config.run.device)
    if config.run.deterministic and device.type == "cuda":
        # A rank takes its GPU into use when it joins the others.
        prepare_cublas()
    with joined(device) as process_group:
        Trainer(config, process_group).fit()


def recipe_asked_for(named: Sequence[str], files: Sequence[Mapping[str, Any]]) -> str | None:
    """The recipe that flags or YAML files name; None where they name none.

    It must be known before the other flags are parsed, because its settings are their defaults.

    Args:
        named: the values of --recipe, of which the last one wins.
        files: what the files of --config hold.
    """
    of_files = [recipe for content in files if (recipe := recipes.recipe_of(content)) is not None]
    return next((each[-1] for each in (named, of_files) if each), None)


def require_sections(file: Path, content: Mapping[str, Any]) -> None:
    """Refuse what a file of settings holds if a section of a training's is none, which the parser would not name.

    Raises:
        DanFastError: names the section.
    """
    for section in (each.name for each in fields(TrainConfig) if each.name in content and each.name != "recipe"):
        settings = content[section]
        # A section may stand in a file of its own.
        own = file.parent / settings if isinstance(settings, str) else None
        if own is not None and own.is_file():
            read_mapping(own, f"the settings of {section}")
        elif not isinstance(settings, dict):
            held = "empty" if settings is None else repr(settings)
            raise DanFastError(
                f"{section} in {file} is {held} and should be a mapping of settings: write some, or leave it out."
            )


def recipe_of_run(run: RunConfig | Any) -> str | None:
    """The recipe of the run that these settings continue; None for a new run, and where it is the default one.

    A continued run keeps its recipe, or the lack of one: today's default may differ from the one it was started with.
    """
    if not goes_on(run):
        return None
    try:
        recipe = recipes.recipe_of(read_mapping(Path(run.out) / "config.yaml", "the settings of a run"))
    except DanFastError:
        return None
    return None if recipe == recipes.DEFAULT_RECIPE else recipe


def flag_defaults(recipe: str | None) -> dict[str, Any]:
    """The defaults of the flags that a recipe sets, by dotted names, and the recipe's own; None: the default recipe."""
    recipe = recipe or recipes.DEFAULT_RECIPE
    return {"recipe": recipe, **recipes.dotted(recipes.recipe_settings(recipe))}
