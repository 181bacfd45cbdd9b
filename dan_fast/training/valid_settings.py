"""Settings that were given from Python, held to what their flags take."""

from dataclasses import fields
from functools import cache

from jsonargparse import ArgumentError, ArgumentParser

from dan_fast.core.errors import DanFastError
from dan_fast.training.config import TrainConfig


def require_valid(config: TrainConfig) -> None:
    """Refuse values that the flags of their settings would refuse.

    Raises:
        DanFastError: names the setting.

    Example:
        >>> require_valid(TrainConfig.of_recipe("plain", data={"labeled": "market"}))
    """
    for each in fields(config):
        if each.name != "recipe" and not isinstance(getattr(config, each.name), each.default_factory):
            kind = each.default_factory.__name__
            raise DanFastError(f"{each.name} must be a {kind}; TrainConfig.of_recipe takes mappings.")
    given = config.to_dict()
    try:
        read = _parser().parse_object(given).as_dict()
    except (ArgumentError, TypeError, ValueError) as error:
        raise DanFastError(f"The settings are no training: {' '.join(str(error).split())}.") from error
    for section, settings in ((name, each) for name, each in given.items() if name != "recipe"):
        for name, value in settings.items():
            meant = list(read[section][name]) if isinstance(value, list) else read[section][name]
            # A text, which a flag would turn into something else.
            if meant != value:
                raise DanFastError(f"{section}.{name} is {value!r}: give it as {meant!r}.")


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    return parser
