"""A training from one seed, by the kernels and by the literal operators: it learns, and both learn the same."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dan_fast.bench.iteration.contenders import literal_operators
from dan_fast.core.types import Gates, MemoryBatch, MemoryState
from dan_fast.data import Split
from dan_fast.data.synthetic import synthesize
from dan_fast.training import Trainer
from dan_fast.training.objective import Objective
from tests.support.memory_problems import closest_calls
from tests.support.training_runs import config

pytestmark = pytest.mark.slow

EPOCHS, PASSES = 20, 320  # 8 iterations an epoch, each with S and S~
# How far a loss by the kernels may be from that by the literal operators, as a share of 1 + |loss|, where no decision
# of the memory lay between numbers that are `NEAR`; and the means over a fifth of the training. Two trainings are
# compared pass by pass in the first quarter only: a last bit that turns a ReLU on or off parts them.
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
        by_kernels: the same pass by the kernels, from the same states and parameters.
    """

    losses: dict[str, float]
    pseudo_labels: Tensor
    cleared: int
    given: tuple[tuple[MemoryState, MemoryState], MemoryBatch, tuple[Tensor, ...]] | None
    by_kernels: "Pass | None" = None


class Watched(Objective):
    """An objective that remembers its passes; a literal one takes each by the kernels too, which changes nothing."""

    def __init__(self, trainer: Trainer, literal: bool) -> None:
        super().__init__(trainer.model)
        self.passes: list[Pass] = []
        self.literal = literal

    def __call__(self, params: dict[str, Tensor], split: Split) -> dict[str, Tensor]:
        memory, given, gates = self.model.memory, [], []
        # The states of the kernels' memory are not read, so that its writes wait as they do in a training.
        states = (memory.labeled, memory.unlabeled) if self.literal else None
        by_kernels = self.by_kernels(params, split) if self.literal else None

        def remember(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            given.extend(x.detach() for x in arguments)
            gates.extend(x.detach().clone() for x in module.gate_values())

        operators = literal_operators(self.model) if self.literal else nullcontext()
        with operators, memory.register_forward_pre_hook(remember):
            losses = super().__call__(params, split)
        of_states = (states, MemoryBatch(*given), tuple(gates)) if states else None
        self.passes.append(self.seen(losses)._replace(given=of_states, by_kernels=by_kernels))
        return losses

    def by_kernels(self, params: dict[str, Tensor], split: Split) -> Pass:
        memory, network = self.model.memory, self.model.network
        states = memory.labeled, memory.unlabeled
        buffers = {name: value.clone() for name, value in network.named_buffers()}
        seen = self.seen(super().__call__(params, split))
        memory.labeled, memory.unlabeled = states
        for name, value in network.named_buffers():
            value.copy_(buffers[name])
        return seen

    def seen(self, losses: dict[str, Tensor]) -> Pass:
        values = {name: value.item() for name, value in losses.items()}
        return Pass(values, self.record.pseudo_labels, int(self.record.cleared), None)


def train(root: Path, out: Path, literal: bool) -> list[Pass]:
    settings = {
        "data": {"unlabeled": str(root / "others" / "campus"), "batch_size": 16},
        "model": {"reduction": 4, "dropout": 0.0},
        "memory": {"labeled_slots": 24, "unlabeled_slots": 16},
        "meta": {"procedure": "daml2"},
        "optimizer": {"epochs": EPOCHS, "lr_scale": 50.0},
        "run": {"log_every": 10},
    }
    trainer = Trainer(config(root, out, **settings))
    trainer.meta_step.objective = watched = Watched(trainer, literal)
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


def nearly_otherwise(each: Pass) -> bool:
    """Whether a decision of the memory lay between numbers that are `NEAR`."""
    calls = closest_calls(*each.given[:2], Gates(*each.given[2]), ties_hold=False)
    return min(calls.labeled.usage, calls.unlabeled.usage, calls.unlabeled.cosine, *calls.retrieval) < NEAR


def assert_same(found: Pass, wanted: Pass, number: int) -> None:
    assert torch.equal(found.pseudo_labels, wanted.pseudo_labels), f"pass {number}"
    assert found.cleared == wanted.cleared, f"pass {number}"
    for loss, value in wanted.losses.items():
        assert abs(found.losses[loss] - value) <= BAND * (1 + abs(value)), f"{loss} of pass {number}"


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
    decided = [number for number, each in enumerate(literal) if not nearly_otherwise(each)]
    quarter = PASSES // 4
    assert decided[:quarter] == list(range(quarter)), "two trainings may part in the first quarter: take other images"
    for number in decided:
        assert_same(literal[number].by_kernels, literal[number], number)
    for number in range(quarter):
        assert_same(fast[number], literal[number], number)
    for loss in literal[0].losses:
        for fifth in range(5):
            a, b = mean(fast, loss, fifth), mean(literal, loss, fifth)
            assert abs(a - b) <= BAND_OF_MEANS * (1 + abs(b)), f"{loss} in the {fifth + 1}th fifth"
