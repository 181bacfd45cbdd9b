"""A checkpoint of a network as it was before training, in a moment."""

from pathlib import Path
from typing import Any

from dan_fast.training import TrainConfig
from dan_fast.training.build import initial_network
from dan_fast.training.checkpoint import save_checkpoint
from dan_fast.training.recipes import over


def untrained_checkpoint(path: Path, recipe: str = "dan", **sections: dict[str, Any]) -> Path:
    """Write one of a tiny ResNet of 32 x 16 images; `recipe` and `sections` as in `TrainConfig.of_recipe`."""
    tiny = {"data": {"image_size": (32, 16)}, "model": {"backbone": "timm:test_resnet"}}
    settings = TrainConfig.of_recipe(recipe, **over(tiny, sections)).to_dict()
    network = initial_network(settings, num_classes=2, read_weights=False)
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    state = {"config": settings, "num_classes": 2, "preprocessing": network.preprocessing.to_dict(), "model": weights}
    save_checkpoint(path, state | {"epoch": 0, "iteration": 0})
    return path
