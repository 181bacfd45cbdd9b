"""Recipes: settings of the method that come with the package under a name, as YAML in `dan_fast/recipes`."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml

from dan_fast.core.errors import DanFastError

RECIPES = ("dan", "paper", "plain")
DEFAULT_RECIPE = "dan"
# A training that was started without one: by an older version, or from Python.
NO_RECIPE = "none"

# In these every setting belongs to the method; of the other sections only what a recipe names.
_METHOD_SECTIONS = ("memory", "loss", "meta")
# What recipes decide and the first versions had: a file that names all of it, as a config.yaml does, decides by itself.
_METHOD_BEFORE_RECIPES = {
    "model": ("attention", "adversary", "reduction", "dropout"),
    "loss": ("adversary", "embedding", "regularizer", "confidence_prior"),
    "meta": ("procedure", "order", "eta", "stall_guard"),
}


def require_recipe(name: Any) -> None:
    """Refuse what is no recipe's name.

    Raises:
        DanFastError: names the recipes there are.
    """
    if name not in (*RECIPES, NO_RECIPE):
        raise DanFastError(
            f"There is no recipe {name!r}: choose {', '.join(RECIPES)} or {NO_RECIPE}, the bare defaults."
        )


def recipe_settings(name: str) -> dict[str, dict[str, Any]]:
    """The settings of a recipe, section -> name -> value; what it leaves out keeps its default.

    Args:
        name: dan, paper or plain; none for no settings at all.

    Raises:
        DanFastError: there is no such recipe.

    Example:
        >>> recipe_settings("plain")["meta"]
        {'procedure': 'daml1'}
    """
    require_recipe(name)
    if name == NO_RECIPE:
        return {}
    return yaml.safe_load(files("dan_fast").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8"))


def over(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with other ones on top, name by name.

    Example:
        >>> over({"meta": {"order": 1, "eta": 1.0}}, {"meta": {"order": 2}})
        {'meta': {'order': 2, 'eta': 1.0}}
    """
    merged = dict(settings)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = over(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all sections by dotted names.

    Example:
        >>> dotted({"recipe": "dan", "meta": {"order": 1, "eta": 1.0}})
        {'meta.order': 1, 'meta.eta': 1.0}
    """
    sections = ((section, values) for section, values in settings.items() if isinstance(values, Mapping))
    return {f"{section}.{name}": value for section, values in sections for name, value in values.items()}


def recipe_of(content: Any) -> str | None:
    """The recipe that a configuration asks for: the one it names, none if it decides the method itself, else None.

    Example:
        >>> recipe_of({"recipe": "plain"}), recipe_of({"data": {"labeled": "market"}})
        ('plain', None)
    """
    if not isinstance(content, Mapping):
        return None
    if content.get("recipe") is not None:
        return str(content["recipe"])
    sections = {section: content.get(section) for section in _METHOD_BEFORE_RECIPES}
    whole = all(
        isinstance(sections[section], Mapping) and set(names) <= sections[section].keys()
        for section, names in _METHOD_BEFORE_RECIPES.items()
    )
    return NO_RECIPE if whole else None


def recipe_changes(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the method that a training has otherwise than its recipe, by dotted names.

    Args:
        settings: `TrainConfig.to_dict()`, or the "config" of a checkpoint; what it lacks had its default.
        defaults: `TrainConfig().to_dict()`.

    Raises:
        DanFastError: its recipe does not come with this version.
    """
    wanted = dotted(over(defaults, recipe_settings(settings.get("recipe", NO_RECIPE))))
    of_method = {name for recipe in RECIPES for name in dotted(recipe_settings(recipe))}
    of_method |= {name for name in wanted if name.partition(".")[0] in _METHOD_SECTIONS}
    found = dotted(defaults) | dotted(settings)
    # In the order in which the settings are declared.
    return {name: found[name] for name in wanted if name in of_method and found[name] != wanted[name]}


def recipe_words(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The recipe of a training, and what was changed on top of it, in words; "" for a training without a recipe.

    Args:
        settings, defaults: as for `recipe_changes`.

    Example:
        >>> from dan_fast.training import TrainConfig
        >>> config = TrainConfig.of_recipe("dan", meta={"order": 2})
        >>> recipe_words(config.to_dict(), TrainConfig().to_dict())
        'recipe dan, with meta.order=2'
    """
    name = settings.get("recipe", NO_RECIPE)
    if name == NO_RECIPE:
        return ""
    if name not in RECIPES:
        return f"recipe {name}, which this version does not have"
    changes = [f"{setting}={word_of(value)}" for setting, value in recipe_changes(settings, defaults).items()]
    return f"recipe {name}" + (f", with {', '.join(changes)}" if changes else "")


def word_of(value: object) -> str:
    """A setting's value as a flag has it.

    Example:
        >>> word_of(True), word_of(0.5)
        ('true', '0.5')
    """
    return str(value).lower() if isinstance(value, bool) else str(value)
