"""Training: settings, the meta step, the loop, checkpoints."""

from dan_fast.core.errors import Interrupted
from dan_fast.training.build import trained_network
from dan_fast.training.config import (
    DataConfig,
    LossConfig,
    MemoryConfig,
    MetaConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from dan_fast.training.objective import TrainingModel
from dan_fast.training.recipes import RECIPES, recipe_settings
from dan_fast.training.step import MetaStep, StepResult
from dan_fast.training.trainer import Trainer

__all__ = [
    "RECIPES",
    "DataConfig",
    "Interrupted",
    "LossConfig",
    "MemoryConfig",
    "MetaConfig",
    "MetaStep",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "StepResult",
    "TrainConfig",
    "Trainer",
    "TrainingModel",
    "recipe_settings",
    "trained_network",
]
