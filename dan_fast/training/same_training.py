"""Which settings a run that goes on has to share with the one that it continues."""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from dan_fast.core.errors import DanFastError
from dan_fast.training.config import RunConfig, TrainConfig
from dan_fast.training.recipes import dotted, word_of

# A resumed run may differ in these: they say where it runs, not what it learns.
_FREE_TO_CHANGE = {
    *(f"data.{name}" for name in ("workers", "targets", "broken_images", "cache", "cache_check")),
    "model.gradient_checkpointing",
    # Which images these hold is compared by fingerprint, wherever folders of these names lie.
    *(f"data.{name}" for name in ("labeled", "unlabeled", "protocol", "root")),
    *(f"run.{each.name}" for each in fields(RunConfig) if each.name not in ("seed", "precision")),
}
# These decide what is reported where an epoch is chosen: the highest of the figures there were.
_OF_A_CHOICE = {"run.choose_epoch_on_target", "run.evaluate_every"}


def training_differences(saved: dict[str, Any], current: dict[str, Any], also: Collection[str] = ()) -> list[str]:
    """What `current` has otherwise than `saved` of what decides what is learnt or chosen, or of `also`, in clauses."""
    free = _FREE_TO_CHANGE - (_OF_A_CHOICE if current["run"]["choose_epoch_on_target"] else set()) - set(also)
    # A setting that did not exist yet when the saved ones were written had its default.
    before = dotted(TrainConfig().to_dict()) | dotted(saved)
    # What a recipe stands for is among the settings; by which name they came does not matter.
    return [
        f"{name} is {value!r} here and {before[name]!r} there"
        for name, value in dotted(current).items()
        if before[name] != value and name not in free
    ]


def require_same_training(saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a run under other settings than those it was started with.

    Raises:
        DanFastError: names the settings that differ.
    """
    differences = training_differences(saved, current)
    if differences:
        fits = not any(each.startswith(("model.backbone ", "model.instance_norm ")) for each in differences)
        anew = f", which may start from its weights, --model.weights {checkpoint}" if fits else ""
        # A config.yaml of an older version leaves these to the recipe of today.
        unnamed = [name for each in differences if (name := each.partition(" ")[0]) not in dotted(saved)]
        before = dotted(TrainConfig().to_dict())
        named = "".join(f", --{name} {word_of(before[name])}" for name in unnamed)
        raise DanFastError(
            f"{checkpoint} was trained with another configuration ({'; '.join(differences)}): "
            f"use its settings (config.yaml beside it{named}) or another run.out{anew}."
        )
