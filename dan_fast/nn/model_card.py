"""The model card of a network: what it is, how it was trained, what it scored and under which conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from dan_fast.evaluation.result import Evaluation


def model_card(name: str, numbers: int, config: Mapping[str, Any], results: Sequence[Evaluation]) -> str:
    """The README.md of a network, in Markdown.

    Args:
        name: of the folder or repository.
        numbers: of a feature.
        config: the content of its config.json, see `dan_fast.nn.hub`.
        results: the figures of these weights.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = _cell
    height, width = config["network"]["image_size"]
    return environment.from_string(files("dan_fast.nn").joinpath("model_card.md.j2").read_text("utf-8")).render(
        name=name,
        version=config["dan_fast"],
        backbone=config["network"]["backbone"],
        persons=config["network"]["num_classes"],
        numbers=numbers,
        height=height,
        width=width,
        **config["preprocessing"],
        columns=list(results[0].percentages()) if results else [],
        rows=[(each.title, each.row(), each.conditions_and_recipe) for each in results],
        not_comparable=any("not comparable" in each.conditions for each in results),
        training=config["training"],
    )


def _cell(value: object) -> str:
    """A value, or several, on one line of a list or table."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
