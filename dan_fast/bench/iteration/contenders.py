"""An iteration of DAN, and what it is compared with: plain ResNet's, and one with the paper's literal operators."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dan_fast import reference
from dan_fast.bench.agreement import relative_error, too_large
from dan_fast.bench.memory.problem import Size, make_problem
from dan_fast.core.types import AttentionHeadOutput, MemoryStep
from dan_fast.daml import Stage
from dan_fast.data import BatchPlanner, Split
from dan_fast.data.images.loader import split_of
from dan_fast.nn import ProgressiveAugmentedMemory, build_backbone
from dan_fast.training import MetaStep, TrainConfig, TrainingModel
from dan_fast.training.build import build_model, network_and_random_state
from dan_fast.training.objective import Objective

UPDATED, FROZEN = "updated", "frozen"
_STAGES = {UPDATED: Stage.ATTENTION, FROZEN: Stage.ADVERSARY}
# Large enough for S~ to see that S has moved the weights.
_INNER_STEP = 1e-2
_STEP = 1e-4
# Of the norm of a group's gradient; half precision rounds in every layer.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
# Or so many times what rounding alone does, where that is more.
_ROUNDINGS = 4

Errors = dict[str, float]


class IterationSize(NamedTuple):
    """What the cost of an iteration depends on; `images` are those of S and S~ together, all slots are filled."""

    backbone: str = "resnet50"
    height: int = 224
    width: int = 224
    images: int = 64
    labeled_slots: int = 9000
    unlabeled_slots: int = 5500
    classes: int = 751


class DANIteration:
    """A meta step of a DAN whose memories are full, and one mini-batch for it; images are drawn instead of read.

    The batch lies on the host, in pinned memory for a GPU. `recipe`, one that has a memory, names all other settings.
    """

    def __init__(self, size: IterationSize, device: torch.device, precision: str, recipe: str = "none") -> None:
        settings = TrainConfig.of_recipe(
            recipe,
            data={"image_size": (size.height, size.width)},
            # The plain network of these comparisons has no instance norm.
            model={"backbone": size.backbone, "weights": "none", "instance_norm": False},
            memory={"labeled_slots": size.labeled_slots, "unlabeled_slots": size.unlabeled_slots},
            run={"precision": precision},
        )
        lending = settings.model.style_mixing == "unlabeled"
        network, _ = network_and_random_state(settings.to_dict(), size.classes, mixes_styles=lending)
        self.model = build_model(settings, network, unlabeled_places=True, lending=lending)
        self.model.to(device, memory_format=torch.channels_last).train()
        memory = self.model.memory
        fill_memory(memory, size.classes)
        self.step = MetaStep(self.model, _sgd(self.model), settings.meta)
        labels = torch.arange(max(size.classes, size.images)) % size.classes
        planner = BatchPlanner(
            labels,
            size.unlabeled_slots + size.images,
            size.images,
            settings.data.unlabeled_fraction,
            settings.data.feedback_fraction,
            split=settings.meta.procedure != "daml1",
        )
        (plan, *_) = planner.plan_epoch(0, tuple(x.cpu() for x in memory.reliable_samples()))
        generator = torch.Generator().manual_seed(0)
        self.batch = []
        for items in filter(None, plan):
            images = torch.randn(len(items), 3, size.height, size.width, generator=generator)
            self.batch.append(split_of(items, images.pin_memory() if device.type == "cuda" else images))

    def set(self, order: int, backbone: str) -> None:
        """Which kind of iteration comes next; the step still finds out who would have won the competition."""
        self.step.meta.order = order
        self.step.competition.decide = lambda attention_won: _STAGES[backbone]

    def run(self) -> None:
        """One iteration, from the batch on the host to the optimizer's step."""
        self.step.step(*self.batch)

    def gradients(self, moved: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What an iteration would follow, and G', the weights at which it saw S~.

        Dropout draws the same in every call, and the memories stay as they are.

        Args:
            moved: see S~ at these values, whatever S has moved the weights to; G' is differentiated as ever.
        """
        step, memory, objective = self.step, self.model.memory, self.step.objective
        before = memory.labeled, memory.unlabeled
        torch.manual_seed(0)
        step.objective = given = _ObjectiveAt(self.model, moved=moved)
        step.optimizer.param_groups[0]["lr"] = _INNER_STEP
        try:
            return step.gradients(*self.batch).grads, given.moved
        finally:
            step.objective, step.optimizer.param_groups[0]["lr"] = objective, _STEP
            memory.labeled, memory.unlabeled = before


def fill_memory(memory: ProgressiveAugmentedMemory, classes: int, images: int = 0) -> None:
    """Fills every slot, as after some epochs, with keys of persons whose labels are below `classes`.

    Where `images` is not 0 the sample ids of M' are below it.
    """
    labeled, key_dim = memory.labeled.features.shape
    slots = Size(labeled, len(memory.unlabeled.features), key_dim, batch=1)
    problem = make_problem(slots, torch.float32, memory.labeled.features.device, batches=0)
    memory.labeled, memory.unlabeled = (
        state._replace(labels=state.labels % classes) for state in (problem.labeled, problem.unlabeled)
    )
    if images:
        memory.unlabeled = memory.unlabeled._replace(sample_ids=memory.unlabeled.sample_ids % images)


class _ObjectiveAt(Objective):
    """The objective of one iteration, whose second pass, that of S~, takes its parameters' values from `moved`."""

    def __init__(self, model: TrainingModel, moved: dict[str, Tensor] | None) -> None:
        super().__init__(model)
        self.moved = moved

    def __call__(self, params: Mapping[str, Tensor], split: Split) -> dict[str, Tensor]:
        if self.record is not None:
            self.moved = self.moved or {name: value.detach() for name, value in params.items()}
            # The values of one, the graph of the other.
            params = {name: self.moved[name] + (value - value.detach()) for name, value in params.items()}
        return super().__call__(params, split)


@contextmanager
def literal_operators(model: TrainingModel, last_bit: torch.Generator | None = None) -> Iterator[None]:
    """Inside, the model uses `reference.attention_head` and `reference.memory_step`.

    With `last_bit` every number of the last feature map is made larger or smaller by the rounding of its type.
    """
    attention, memory = model.network.attention, model.memory

    def head(features: Tensor, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(cam_weight.dtype)
            if last_bit is not None:
                sign = torch.randint(0, 2, features.shape, generator=last_bit).to(features) * 2 - 1
                features = features * (1 + torch.finfo(features.dtype).eps * sign)
            return reference.attention_head(features, attention.weights, cam_weight, labels)

    def step(*batch: Tensor, **gate_features: Tensor) -> MemoryStep:
        gates = (*memory.gate_values(**gate_features), memory.decay, memory.decay_unlabeled)
        step = reference.memory_step(memory.labeled, memory.unlabeled, *batch, *gates)
        memory.labeled, memory.unlabeled = step.labeled, step.unlabeled
        return step

    with patch.object(attention, "head", head), patch.object(memory, "forward", step):
        yield


class PlainNetwork:
    """A backbone with a linear classifier, as one trains it in a plain PyTorch loop; `half` is the type of autocast."""

    def __init__(
        self, backbone: str, size: tuple[int, int], classes: int, device: torch.device, half: torch.dtype | None = None
    ) -> None:
        self.device, self.half = device, half
        self.backbone = build_backbone(backbone, image_size=size)
        self.classifier = nn.Linear(self.backbone.out_channels, classes)
        model = nn.ModuleList([self.backbone, self.classifier])
        model.to(device, memory_format=torch.channels_last).train()
        self.optimizer = _sgd(model)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward, cross-entropy, backward, SGD step; returns the loss, (), detached."""
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            logits = self.classifier(self.backbone(images).mean((2, 3)))
        self.optimizer.zero_grad()
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def plain_iteration(size: IterationSize, dan: DANIteration) -> partial[Tensor]:
    """The step of the plain network with the images of a DAN's iteration."""
    image_size, half = (size.height, size.width), dan.model.autocast_dtype
    network = PlainNetwork(size.backbone, image_size, size.classes, dan.step.device, half)
    images = torch.cat([split.images for split in dan.batch])
    if network.device.type == "cuda":
        images = images.pin_memory()
    return partial(network.step, images, torch.arange(len(images)) % size.classes)


def _sgd(model: nn.Module) -> torch.optim.SGD:
    settings = TrainConfig().optimizer
    return torch.optim.SGD(model.parameters(), _STEP, settings.momentum, weight_decay=settings.weight_decay)


def compare_iteration(dan: DANIteration, limit: float) -> tuple[str | None, Errors, Errors, Errors]:
    """Whether an iteration follows the same gradients with the package's operators as with the paper's literal ones.

    Rounding alone can change these gradients much: S moves the weights by what it gives, weights that differ in a last
    bit turn a ReLU on or off in the pass of S~, and batch norm over few images makes more of it. So the passes that are
    compared see S~ at the same weights, and what rounding does to the rest is measured beside them. The kind of
    iteration is that which `dan` is set to; its memories stay as they are.

    Returns:
        What differs, None if nothing does; the errors; those between literal gradients with and without the last bit
        of the last feature map changed; and how large an error may be.
    """
    with literal_operators(dan.model):
        expected, moved = dan.gradients()
    # The operators begin at the last feature map: that is where their rounding differs, in either precision.
    with literal_operators(dan.model, torch.Generator().manual_seed(0)):
        rounded, _ = dan.gradients(moved)
    found, _ = dan.gradients(moved)
    if found.keys() != expected.keys():
        return "the parameters that have a gradient", {}, {}, {}
    errors, rounding = group_errors(found, expected), group_errors(rounded, expected)
    allowed = {group: max(limit, _ROUNDINGS * floor) for group, floor in rounding.items()}
    return "; ".join(too_large(errors, allowed, "gradient of ")) or None, errors, rounding, allowed


def group_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Errors:
    """The distance of the gradients of each group of parameters as a share of the norm of what is expected."""
    groups: dict[str, list[str]] = {}
    for name in found:
        groups.setdefault("memory" if name.startswith("memory.") else name.split(".")[1], []).append(name)
    return {
        group: relative_error(*(torch.cat([grads[name].flatten() for name in names]) for grads in (found, expected)), 2)
        for group, names in groups.items()
    }
