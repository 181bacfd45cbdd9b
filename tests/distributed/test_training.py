"""Trainings of several ranks: against one rank, stopped and continued, on other numbers of ranks, refused."""

import time
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, distributed

from dan_fast.core.errors import DanFastError, Interrupted
from dan_fast.reporting.memories import stored_slots
from dan_fast.training import TrainConfig, memory_shards
from dan_fast.training.checkpoint import load_checkpoint
from dan_fast.training.random_numbers import RunRandomNumbers
from tests.support.rank_trainings import settings, trainer_of
from tests.support.ranks import Ranks
from tests.support.training_runs import assert_same_training, stop_after

Group = distributed.ProcessGroup


def trained(group: Group | None, config: TrainConfig, dropout: float = 0.0) -> dict[str, Tensor]:
    """The state at the end; the last rank is late, at the start and later."""
    if group is not None and group.rank() == group.size() - 1:
        time.sleep(0.5)
    trainer = trainer_of(config, group, dropout)
    step = trainer.train_iteration

    def late(*arguments: Any) -> None:
        time.sleep(0.1 if group is not None and group.rank() == trainer.iteration % group.size() else 0)
        step(*arguments)

    trainer.train_iteration = late
    trainer.fit()
    return trainer.model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(("procedure", "per_rank"), [("daml1", True), ("daml3", False)])
def test_a_training_is_that_of_one_rank(ranks: Ranks, images: Path, tmp_path: Path, procedure: str, per_rank: bool):
    meta = {"procedure": procedure}
    given = {"meta": meta, "data": {"batch_size": 20 // ranks.world, "batch_size_per_rank": True} if per_rank else {}}
    states = ranks.run(trained, settings(images, tmp_path / "ranks", **given))
    if per_rank:
        with pytest.raises(DanFastError, match=f"was trained on {ranks.world} ranks with a batch for each, and here"):
            trainer_of(settings(images, tmp_path / "ranks", **given, run={"resume": True}), None)
    expected = trained(None, settings(images, tmp_path / "one", meta=meta))
    for state in states:
        for name, value in expected.items():
            torch.testing.assert_close(
                state[name], value, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert (expected["memory.unlabeled.labels"] >= 0).any()
    whitening = expected["network.whitening.matrix"]
    assert not torch.allclose(whitening, torch.eye(len(whitening)), atol=0.02)


def test_ranks_draw_numbers_of_their_own_that_repeat_by_seed():
    def drawn(*given: int) -> list[float]:
        seed, rank, done = given
        numbers = RunRandomNumbers(torch.device("cpu"), seed, torch.get_rng_state(), rank)
        if done:
            numbers.load_state_dicts([{}], ranks=rank + 1, iterations_done=done)
        with numbers.in_process():
            return torch.rand(3).tolist()

    given = [(5, 0, 0), (5, 1, 0), (5, 2, 0), (6, 1, 0), (5, 1, 9)]
    streams = [drawn(*each) for each in given]
    assert all(streams.count(each) == 1 for each in streams)
    assert streams == [drawn(*each) for each in given]


def test_a_run_of_cpus_goes_on_with_numbers_of_its_own_on_gpus(monkeypatch: pytest.MonkeyPatch):
    """Not with those that the process's GPU generator has, which are the same in each new process."""
    numbers = RunRandomNumbers(torch.device("cpu"), 5, torch.get_rng_state(), 0)
    monkeypatch.setattr(numbers, "_gpus", [torch.device("cuda")])
    monkeypatch.setattr(numbers, "_of_rank", lambda done: {"cpu": None, "cuda": [f"seeded at {done}"]})
    numbers.load_state_dicts([{"cpu": "saved", "cuda": []}], 1, iterations_done=9)
    assert numbers._state == {"cpu": "saved", "cuda": ["seeded at 9"]}
    numbers.load_state_dicts([{"cpu": "saved", "cuda": ["saved too"]}], 1, iterations_done=9)
    assert numbers._state == {"cpu": "saved", "cuda": ["saved too"]}


def interrupted(group: Group, config: TrainConfig, iterations: int) -> None:
    trainer = trainer_of(config, group, dropout=0.5)
    if group.rank() == group.size() - 1:
        stop_after(trainer, iterations)
    with pytest.raises(Interrupted, match=f"Saved after iteration {iterations}"):
        trainer.fit()


def same_memory(group: Group | None, config: TrainConfig, whole: dict[str, Tensor]) -> None:
    """What a training starts from is what another number of ranks has written; and it goes on."""
    trainer = trainer_of(config, group, dropout=0.5)
    state = trainer.model.state_dict()
    assert trainer.iterations_done == 3 and all(torch.equal(state[name], value) for name, value in whole.items())
    trainer.fit()
    assert trainer.epoch == 2


def state_at(group: Group | None, config: TrainConfig) -> dict[str, Tensor]:
    return trainer_of(config, group, dropout=0.5).model.state_dict()


@pytest.mark.slow
def test_a_stop_on_one_rank_stops_all_and_they_go_on_bit_for_bit(ranks: Ranks, images: Path, tmp_path: Path):
    straight, stopped = (settings(images, tmp_path / name) for name in ("straight", "stopped"))
    ranks.run(trained, straight, 0.5)
    ranks.run(interrupted, stopped, 3)
    again = settings(images, tmp_path / "stopped", run={"resume": True})
    whole = ranks.run(state_at, again)[0]
    other = tmp_path / "other"
    other.mkdir()
    for file in (tmp_path / "stopped").glob("*.*"):
        (other / file.name).write_bytes(file.read_bytes())
    ranks.run(trained, again, 0.5)
    assert_same_training(tmp_path / "straight", tmp_path / "stopped")
    shards = [load_checkpoint(tmp_path / name / "checkpoint.pt")["memory_shards"] for name in ("straight", "stopped")]
    for one, two in zip(*shards, strict=True):
        assert (tmp_path / "straight" / one["file"]).read_bytes() == (tmp_path / "stopped" / two["file"]).read_bytes()
    files = {file.name for file in (tmp_path / "stopped").glob("memory-*")}
    assert files == {shard["file"] for shard in shards[1]}  # those of earlier checkpoints are gone
    # One process goes on with what the ranks have written, and leaves a whole checkpoint.
    slots = stored_slots(load_checkpoint(other / "checkpoint.pt"), other)["unlabeled"]
    used = whole["memory.unlabeled.labels"] >= 0
    assert used.any() and np.array_equal(slots.features, whole["memory.unlabeled.features"][used].double().numpy())
    alone = settings(images, other, run={"resume": True})
    same_memory(None, alone, whole)
    assert not list(other.glob("memory-*"))
    # And the ranks with what one process has written.
    one = load_checkpoint(other / "checkpoint.pt")["model"]
    for state in ranks.run(state_at, alone):
        assert all(torch.equal(state[name], value) for name, value in one.items())


def kept_and_gone_on(group: Group, config: TrainConfig, whole: dict[str, Tensor]) -> None:
    same_memory(group, config, whole)
    shards = load_checkpoint(Path(config.run.out) / "checkpoint.pt")["memory_shards"]
    files = {file.name for file in Path(config.run.out).glob("memory-*")}
    assert len(shards) == group.size() and files == {shard["file"] for shard in shards}


@pytest.mark.slow
def test_two_ranks_go_on_with_the_memory_of_four_and_four_with_that_of_two(images: Path, tmp_path: Path):
    with Ranks(2, tmp_path / "store2") as two, Ranks(4, tmp_path / "store4") as four:
        for writing, reading in ((two, four), (four, two)):
            out = tmp_path / f"by{writing.world}"
            writing.run(interrupted, settings(images, out), 3)
            again = settings(images, out, run={"resume": True})
            whole = writing.run(state_at, again)[0]
            assert (whole["memory.unlabeled.labels"] >= 0).any()
            assert len(load_checkpoint(out / "checkpoint.pt")["memory_shards"]) == writing.world
            reading.run(kept_and_gone_on, again, whole)


def test_rows_are_read_from_the_middle_of_what_ranks_have_written(tmp_path: Path):
    """As another number of ranks reads them, whose shares begin and end elsewhere."""
    features, sizes, name = torch.arange(22.0).view(11, 2), [4, 1, 6], "labeled.features"
    shards = []
    for number, part in enumerate(features.split(sizes)):
        content = save({name: part.contiguous()})
        (tmp_path / f"{number}.safetensors").write_bytes(content)
        shards.append({"file": f"{number}.safetensors", "rows": {name: len(part)}, "crc32": crc32(content)})
    for first in range(11):
        for last in range(first + 1, 12):
            read = memory_shards._rows_of_shards(tmp_path, shards, name, slice(first, last))
            assert torch.equal(read, features[first:last])
    with pytest.raises(DanFastError, match="the checkpoint holds 11 slots of labeled.features and not 12"):
        memory_shards._rows_of_shards(tmp_path, shards, name, slice(3, 12))
