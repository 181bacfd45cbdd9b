"""Settings that were given from Python, held to what their flags take."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from os import PathLike
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from dan_fast.core.errors import DanFastError
from dan_fast.core.home import expanded
from dan_fast.training.config import DATASETS, TrainConfig, as_list
from dan_fast.training.recipes import dotted


def require_valid(config: TrainConfig) -> None:
    """Refuse values that the flags of their settings would refuse.

    Raises:
        DanFastError: names the setting.

    Example:
        >>> require_valid(TrainConfig.of_recipe("plain", data={"labeled": "market"}))
    """
    sections = [each for each in fields(config) if each.name != "recipe"]
    for each in sections:
        if not isinstance(getattr(config, each.name), each.default_factory):
            kind = each.default_factory.__name__
            raise DanFastError(f"{each.name} must be a {kind}; TrainConfig.of_recipe takes mappings.")
    require_no_empty_setting({each.name: vars(getattr(config, each.name)) for each in sections})
    for name in DATASETS:
        for each in as_list(getattr(config.data, name)):
            if not isinstance(each, str | PathLike):
                raise DanFastError(
                    f"data.{name} holds a {type(each).__name__}: give the path of a dataset; one that has been read is "
                    "for dan_fast.data.TrainingSet and a loop of your own."
                )
    size = config.data.image_size
    if isinstance(size, str) or not isinstance(size, Iterable):
        raise DanFastError(f"data.image_size is {size!r}: give height and width as [256, 128].")
    given = config.to_dict()
    try:
        read = dotted(_parser().parse_object(given).as_dict())
    except (ArgumentError, TypeError, ValueError) as error:
        raise DanFastError(f"The settings are no training: {' '.join(str(error).split())}.") from error
    if given["run"]["seed"] >= 2**64:
        raise DanFastError(f"run.seed is {given['run']['seed']}: it must be below 2^64.")
    for name, value in dotted(given).items():
        meant = list(read[name]) if isinstance(value, list) else read[name]
        # A text, which a flag would turn into something else; repr tells 8 from 8.0, which is no number of images.
        if meant != value or (not isinstance(meant, float) and repr(meant) != repr(value)):
            raise DanFastError(f"{name} is {value!r}: give it as {meant!r}.")
    paths = {"run.out": [given["run"]["out"]]}
    paths |= {f"data.{name}": as_list(given["data"][name]) for name in DATASETS}
    for name, named in paths.items():
        if "" in named:
            raise DanFastError(f"{name} holds an empty path, as by a variable of the shell that is not set: name it.")


def own_copy(config: TrainConfig) -> TrainConfig:
    """Settings that stay as they are whatever becomes of those given; paths that were set as a text are lists.

    Raises:
        DanFastError: see `require_valid`.
    """
    require_valid(config)
    copied = copy.deepcopy(config)
    copied.run.out = str(expanded(copied.run.out))
    for name in DATASETS:
        setattr(copied.data, name, as_list(getattr(copied.data, name)))
    return copied


def require_no_empty_setting(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are None where that is no choice: the parser takes it for any of them, and trains otherwise.

    Args:
        settings: section -> name -> value, as YAML holds them; what is no setting is left to the parser.

    Raises:
        DanFastError: names the first one.
    """
    held = dotted(settings)
    for name, default in dotted(TrainConfig().to_dict()).items():
        if default is not None and held.get(name, default) is None:
            raise DanFastError(f"{name} is empty: give it a value, or leave it out.")


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    return parser
