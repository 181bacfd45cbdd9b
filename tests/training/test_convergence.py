"""A training from one seed, by the kernels and by the literal operators: it learns, and both learn the same."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dan_fast.bench.iteration_contenders import literal_operators
from dan_fast.core.types import Gates, MemoryBatch, MemoryState
from dan_fast.data import Split
from dan_fast.data.synthetic import synthesize
from dan_fast.training import TrainConfig, Trainer
from dan_fast.training.objective import Objective
from tests.support.memory_problems import closest_calls

pytestmark = pytest.mark.slow

EPOCHS, PASSES = 20, 320  # 8 iterations an epoch, each with S and S~
# How far a loss by the kernels may be from that by the literal operators, as a share of 1 + |loss|, before a decision
# of the memory lay between numbers that are `NEAR`; after it, of the means over a fifth of the training.
BAND, BAND_OF_MEANS, NEAR = 1e-5, 0.1, 1e-6


class TinyMap(nn.Sequential):
    """32 channels at 4 x 4 positions of an image of 32 x 32."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 16, 4, stride=4), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        )


class Pass(NamedTuple):
    """A call of the objective.

    Attributes:
        losses: by name; pseudo_labels: (B',).
        cleared: how many samples left M'.
        given: the states before it, keys, labels, ids and gates, from which its closest decision can be told.
    """

    losses: dict[str, float]
    pseudo_labels: Tensor
    cleared: int
    given: tuple[tuple[MemoryState, MemoryState], MemoryBatch, tuple[Tensor, ...]] | None


class Watched(Objective):
    """An objective that remembers its passes."""

    def __init__(self, trainer: Trainer, remember_states: bool) -> None:
        super().__init__(trainer.model)
        self.passes: list[Pass] = []
        self.remember_states = remember_states

    def __call__(self, params: dict[str, Tensor], split: Split) -> dict[str, Tensor]:
        memory, given = self.model.memory, []
        # Of the kernels' memory nobody reads the states, so that its writes wait as they do in a training.
        states = (memory.labeled, memory.unlabeled) if self.remember_states else None
        with memory.register_forward_pre_hook(lambda module, arguments: given.extend(arguments)):
            losses = super().__call__(params, split)
        record = self.record
        of_states = (states, MemoryBatch(*(x.detach() for x in given)), record.gates) if states else None
        values = {name: value.item() for name, value in losses.items()}
        self.passes.append(Pass(values, record.pseudo_labels, int(record.cleared), of_states))
        return losses


def train(root: Path, out: Path, literal: bool) -> list[Pass]:
    config = TrainConfig.of_recipe(
        "paper",
        data={
            "labeled": str(root / "campus"),
            "unlabeled": str(root / "others" / "campus"),
            "image_size": (32, 32),
            "batch_size": 16,
            "workers": 0,
        },
        model={"weights": "none", "reduction": 4, "dropout": 0.0},
        memory={"labeled_slots": 24, "unlabeled_slots": 16},
        loss={"confidence_prior": 0.1},
        meta={"procedure": "daml2"},
        optimizer={"epochs": EPOCHS, "lr_scale": 50.0},
        run={"out": str(out), "device": "cpu"},
    )
    trainer = Trainer(config)
    trainer.objective = watched = Watched(trainer, remember_states=literal)
    with literal_operators(trainer) if literal else nullcontext():
        trainer.fit()
    return watched.passes


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Pass], list[Pass]]]:
    """By the kernels, where there are any, and by `dan_fast.reference`."""
    root, threads = tmp_path_factory.mktemp("images"), torch.get_num_threads()
    for folder, seed in ((root, 1), (root / "others", 2)):
        synthesize(folder, ["campus"], identities=8, cameras=2, images_per_camera=4, image_size=(32, 32), seed=seed,
                   test_fraction=0.0)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dan_fast.nn.network.build_backbone", lambda *arguments: TinyMap())
        torch.set_num_threads(1)
        yield tuple(
            train(root, tmp_path_factory.mktemp("runs") / name, name == "literal") for name in ("fast", "literal")
        )
    torch.set_num_threads(threads)


def mean(passes: list[Pass], loss: str, fifth: int) -> float:
    part = passes[fifth * PASSES // 5 : (fifth + 1) * PASSES // 5]
    return sum(each.losses[loss] for each in part) / len(part)


def first_near_call(passes: list[Pass]) -> int:
    """The first pass in which a decision was nearly taken otherwise; the number of passes if there is none."""
    for number, each in enumerate(passes):
        calls = closest_calls(*each.given[:2], Gates(*each.given[2]), ties_hold=False)
        nearest = [calls.labeled.usage, calls.unlabeled.usage, calls.unlabeled.cosine, *calls.retrieval]
        if min(nearest) < NEAR:
            return number
    return len(passes)


def test_a_training_learns(trainings: tuple[list[Pass], list[Pass]]):
    for passes in trainings:
        assert len(passes) == PASSES
        first, last = ({loss: mean(passes, loss, fifth) for loss in passes[0].losses} for fifth in (0, 4))
        assert last["classification"] < 0.7 * first["classification"]  # from ln 8, that of a guess
        assert last["adversary"] < 0.1 * first["adversary"]
        assert last["embedding"] < 0.9 * first["embedding"]
        # The memory has its share in it: most passes clear false samples.
        assert sum(each.cleared > 0 for each in passes) > PASSES / 2


def test_the_kernels_learn_what_the_literal_operators_learn(trainings: tuple[list[Pass], list[Pass]]):
    fast, literal = trainings
    near = first_near_call(literal)
    assert near > PASSES / 4, "so soon after the start nothing is compared: take other images"
    for number, (a, b) in enumerate(zip(fast[:near], literal[:near], strict=True)):
        assert torch.equal(a.pseudo_labels, b.pseudo_labels), f"pass {number}"
        assert a.cleared == b.cleared, f"pass {number}"
        for loss, value in b.losses.items():
            assert abs(a.losses[loss] - value) <= BAND * (1 + abs(value)), f"{loss} of pass {number}"
    for loss in literal[0].losses:
        for fifth in range(5):
            a, b = mean(fast, loss, fifth), mean(literal, loss, fifth)
            assert abs(a - b) <= BAND_OF_MEANS * (1 + abs(b)), f"{loss} in the {fifth + 1}th fifth"
