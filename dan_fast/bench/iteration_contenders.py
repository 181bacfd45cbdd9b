"""What a training iteration is compared with: plain ResNet, and DAN with the paper's literal operators.

DAN runs in a real `Trainer`; only the images are drawn instead of read and the winner of the competition is given.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dan_fast import reference
from dan_fast.bench.problem import Size, make_problem
from dan_fast.core.files import write_text
from dan_fast.core.types import AttentionHeadOutput, MemoryState, MemoryStep
from dan_fast.daml import Competition, Stage
from dan_fast.data import MiniBatch, Split
from dan_fast.data.sampler import PlannedItem
from dan_fast.nn import ProgressiveAugmentedMemory, build_backbone
from dan_fast.training import (
    DataConfig,
    MemoryConfig,
    MetaConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    Trainer,
)
from dan_fast.training.objective import Objective
from dan_fast.training.scalars import Scalars

UPDATED, FROZEN = "updated", "frozen"
# Large enough for S~ to see that S has moved the weights.
_INNER_STEP = 1e-2

STAGES = {UPDATED: Stage.ATTENTION, FROZEN: Stage.ADVERSARY}


class IterationSize(NamedTuple):
    """Attributes:
    backbone: a name for `build_backbone`.
    height, width: of an image in pixels.
    images: of an iteration, S and S~ together.
    labeled_slots, unlabeled_slots: of the memories, all of them filled.
    classes: persons of the classifier.
    """

    backbone: str = "resnet50"
    height: int = 224
    width: int = 224
    images: int = 64
    labeled_slots: int = 9000
    unlabeled_slots: int = 5500
    classes: int = 751


class DecidedCompetition(Competition):
    """A competition whose winner is given; the trainer still finds out who would have won."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def decide(self, attention_won: bool) -> Stage:
        return self.stage


class DANIteration:
    """A trainer whose memories are full, and one mini-batch for it.

    Args:
        size: of everything.
        device: as in `TrainConfig`.
        precision: as in `TrainConfig`.
        folder: an empty folder for the files of a run.
        seed: of weights, memories and images.
    """

    def __init__(self, size: IterationSize, device: str, precision: str, folder: Path, seed: int = 0) -> None:
        image_size = (size.height, size.width)
        config = TrainConfig(
            data=DataConfig(
                labeled=[str(_write_set(folder / "labeled", max(size.classes, size.images), size.classes))],
                unlabeled=[str(_write_set(folder / "unlabeled", size.unlabeled_slots + size.images, size.classes))],
                image_size=image_size,
                batch_size=size.images,
            ),
            model=ModelConfig(backbone=size.backbone, weights="none"),
            memory=MemoryConfig(labeled_slots=size.labeled_slots, unlabeled_slots=size.unlabeled_slots),
            meta=MetaConfig(),
            optimizer=OptimizerConfig(),
            run=RunConfig(out=str(folder / "run"), seed=seed, device=device, precision=precision),
        )
        self.trainer = Trainer(config)
        self.trainer.model.train()
        self.scalars = Scalars(folder / "tensorboard")
        self._fill_memories(size, seed)
        generator = torch.Generator().manual_seed(seed)
        feedback = tuple(x.cpu() for x in self.trainer.model.memory.reliable_samples())
        (plan, *_) = self.trainer.planner.plan_epoch(0, feedback)
        parts = [_split(items, image_size, generator) for items in (plan.meta_train, plan.meta_test)]
        if self.trainer.device.type == "cuda":
            parts = [part._replace(images=part.images.pin_memory()) for part in parts]  # as the trainer's loader does
        self.batch = MiniBatch(*parts, skipped=())

    def _fill_memories(self, size: IterationSize, seed: int) -> None:
        memory = self.trainer.model.memory
        key_dim = self.trainer.model.network.key_dim
        slots = Size(size.labeled_slots, size.unlabeled_slots, key_dim, batch=1)
        problem = make_problem(slots, torch.float32, self.trainer.device, batches=0, seed=seed)

        def known(state: MemoryState) -> MemoryState:
            return state._replace(labels=state.labels % size.classes)

        memory.labeled, memory.unlabeled = known(problem.labeled), known(problem.unlabeled)

    def set(self, order: int, stage: str) -> None:
        """Which kind of iteration comes next."""
        self.trainer.config.meta.order = order
        self.trainer.meta_step.competition = DecidedCompetition(STAGES[stage])

    def run(self) -> None:
        """One iteration: `Trainer`'s own, from the batch on the host to the optimizer's step."""
        self.trainer.train_iteration(self.batch, self.scalars)

    def gradients(self, moved: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What an iteration would follow, and G', the weights at which it saw S~.

        Dropout draws the same in every call, and the memories stay as they are.

        Args:
            moved: see S~ at these values, whatever S has moved the weights to; G' is differentiated as ever.
        """
        memory, meta_step = self.trainer.model.memory, self.trainer.meta_step
        objective = meta_step.objective
        before = memory.labeled, memory.unlabeled
        torch.manual_seed(0)
        meta_step.objective = given = _ObjectiveAt(objective.model, moved=moved)
        meta_step.optimizer.param_groups[0]["lr"] = _INNER_STEP
        try:
            return meta_step.gradients(self.batch.meta_train, self.batch.meta_test).grads, given.moved
        finally:
            meta_step.objective = objective
            memory.labeled, memory.unlabeled = before


@dataclass
class _ObjectiveAt(Objective):
    """The objective of one iteration, whose second pass, that of S~, takes its parameters' values from `moved`."""

    moved: dict[str, Tensor] | None = None

    def __call__(self, params: Mapping[str, Tensor], split: Split) -> dict[str, Tensor]:
        if self.record is not None:
            self.moved = self.moved or {name: value.detach() for name, value in params.items()}
            # The values of one, the graph of the other.
            params = {name: self.moved[name] + (value - value.detach()) for name, value in params.items()}
        return super().__call__(params, split)


@contextmanager
def literal_operators(trainer: Trainer, last_bit: torch.Generator | None = None) -> Iterator[None]:
    """Inside, the trainer's model uses `reference.attention_head` and `reference.memory_step`.

    With `last_bit` every number of the last feature map is made larger or smaller by the rounding of its type.
    """

    def head(features: Tensor, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(cam_weight.dtype)
            if last_bit is not None:
                sign = torch.randint(0, 2, features.shape, generator=last_bit).to(features) * 2 - 1
                features = features * (1 + torch.finfo(features.dtype).eps * sign)
            return reference.attention_head(features, attention.weights, cam_weight, labels)

    attention, memory = trainer.model.network.attention, trainer.model.memory
    attention.head, memory.forward = head, MethodType(_literal_memory, memory)
    try:
        yield
    finally:
        del attention.head, memory.forward


def _literal_memory(
    memory: ProgressiveAugmentedMemory,
    keys: Tensor,
    labels: Tensor,
    unlabeled_keys: Tensor,
    sample_ids: Tensor,
    gate_features: Tensor | None = None,
) -> MemoryStep:
    gates, decays = memory.gate_values(gate_features), (memory.decay, memory.decay_unlabeled)
    states = memory.labeled, memory.unlabeled
    step = reference.memory_step(*states, keys, labels, unlabeled_keys, sample_ids, *gates, *decays)
    memory.labeled, memory.unlabeled = step.labeled, step.unlabeled
    return step


class PlainIteration:
    """The backbone with a linear classifier: forward, cross-entropy, backward, SGD step on the same images."""

    def __init__(self, size: IterationSize, dan: DANIteration) -> None:
        trainer, config = dan.trainer, dan.trainer.config
        self.device = trainer.device
        self.half = trainer.model.autocast_dtype
        self.backbone = build_backbone(size.backbone)
        self.classifier = nn.Linear(self.backbone.out_channels, size.classes)
        model = nn.ModuleList([self.backbone, self.classifier])
        model.to(self.device, memory_format=torch.channels_last).train()
        self.images = torch.cat([dan.batch.meta_train.images, dan.batch.meta_test.images])
        if self.device.type == "cuda":
            self.images = self.images.pin_memory()
        self.labels = torch.arange(len(self.images)) % size.classes
        settings = config.optimizer
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-4, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def run(self) -> None:
        images = self.images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        labels = self.labels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            logits = self.classifier(self.backbone(images).mean((2, 3)))
        self.optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()


def _write_set(folder: Path, images: int, persons: int) -> Path:
    """A manifest of empty files: the trainer wants to know its images, but nobody reads them."""
    folder.mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(images)]
    for name in names:
        (folder / name).touch()
    rows = [f"{name},{number % persons},0,train" for number, name in enumerate(names)]
    write_text(folder / "set.csv", "\n".join(["path,pid,camid,split", *rows]) + "\n")
    return folder / "set.csv"


def _split(items: tuple[PlannedItem, ...], image_size: tuple[int, int], generator: torch.Generator) -> Split:
    kinds = [item.kind for item in items]
    return Split(
        images=torch.randn(len(items), 3, *image_size, generator=generator),
        labels=torch.tensor([item.label for item in items]),
        sample_ids=torch.tensor([-1 if item.kind == "labeled" else item.index for item in items]),
        num_labeled=kinds.count("labeled"),
        num_fed_back=kinds.count("fed_back"),
    )
