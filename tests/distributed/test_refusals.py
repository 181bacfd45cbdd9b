"""What ranks do not do together: each of them says so, nothing is half-written, and none is left waiting."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import dan_fast.training.memory_shards as memory_shards
import dan_fast.training.surroundings as surroundings
from dan_fast.core.batches import MiniBatch, Split
from dan_fast.core.errors import DanFastError
from dan_fast.distributed.launch import is_loss_of_a_rank
from dan_fast.nn import ProgressiveAugmentedMemory
from dan_fast.training import TrainConfig
from dan_fast.training.checkpoint import load_checkpoint
from tests.support import rank_trainings
from tests.support.rank_trainings import settings, trainer_of
from tests.support.ranks import Ranks
from tests.support.steps import TinyMap

pytestmark = pytest.mark.slow

Group = distributed.ProcessGroup


def refused(group: Group, config: TrainConfig, match: str, of_last: dict[str, dict[str, Any]]) -> None:
    """A trainer whose last rank has other settings than the rest."""
    if group.rank() == group.size() - 1:
        for section, values in of_last.items():
            for name, value in values.items():
                setattr(getattr(config, section), name, value)
    with pytest.raises(DanFastError, match=match.format(last=group.size() - 1)):
        trainer_of(config, group)
    assert not Path(config.run.out).exists()


@pytest.mark.parametrize(
    ("match", "of_last"),
    [
        ("^meta.eta is 0.5 on rank {last} and 1.0 on rank 0: start all ranks with the same", {"meta": {"eta": 0.5}}),
        ("^run.out is 'x' on rank {last} and '.*' on rank 0", {"run": {"out": "x"}}),
        ("^The fingerprint of the training images is .* on rank {last} and .* give all ranks the same data.labeled",
         {"data": {"unlabeled": []}}),
    ],
    ids=["settings", "folder", "images"],
)  # fmt: skip
def test_ranks_that_differ_are_refused_on_all(ranks: Ranks, images: Path, tmp_path: Path, match: str, of_last: dict):
    ranks.run(refused, settings(images, tmp_path / "run", loss={"labeled_embedding": 0.0}), match, of_last)


def other_version(group: Group, config: TrainConfig) -> None:
    before, surroundings.__version__ = surroundings.__version__, f"0.0.{group.rank()}"
    try:
        refused(group, config, "^The version of dan_fast is '0.0.1' on rank 1 and '0.0.0' on rank 0: install", {})
    finally:
        surroundings.__version__ = before


class OtherMap(TinyMap):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            next(self.parameters())[0] += 1e-6


def other_weights(group: Group, config: TrainConfig) -> None:
    last = group.size() - 1
    rank_trainings.TinyMap = OtherMap if group.rank() == last else TinyMap
    try:
        refused(group, config, r"^The checksum of the weights is '\w+' on rank {last} and '\w+' on rank 0: give", {})
    finally:
        rank_trainings.TinyMap = TinyMap


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"data": {"batch_size": 4, "feedback_fraction": 0.0, "unlabeled_fraction": 0.6}},
         "^A batch of 4 images cannot be divided over . ranks, S or S~ has 1 labelled"),
        ({"memory": {"unlabeled_slots": 1}}, "^memory.unlabeled_slots 1 cannot be divided over . ranks: use more"),
        ({"run": {"compile": True}}, "^A backbone is compiled for one process alone: set run.compile to false"),
        ({"model": {"sync_batch_norm": True}}, "^PyTorch's SyncBatchNorm is for GPUs alone: set model.sync_batch_norm"),
    ],
    ids=["batch", "slots", "compile", "sync"],
)  # fmt: skip
def test_what_several_ranks_cannot_do_is_refused(
    ranks: Ranks, images: Path, tmp_path: Path, sections: dict, match: str
):
    ranks.run(refused, settings(images, tmp_path / "run", **sections), match, {})


def full_disk(group: Group, config: TrainConfig, full: int) -> None:
    """The second checkpoint cannot be written by one rank: its features, or checkpoint.pt by rank 0."""
    trainer = trainer_of(config, group)
    name = "save_checkpoint" if full == 0 else "write_whole"
    write, written = getattr(memory_shards, name), []

    def fails(path: Path, content: Any) -> None:
        written.append(path)
        if group.rank() == full and len(written) > 1:
            raise DanFastError(f"{path} could not be written (No space left on device); a previous one is intact.")
        write(path, content)

    setattr(memory_shards, name, fails)
    try:
        own = "could not be written" if group.rank() == full else f"^Rank {full} could not write its part of the check"
        with pytest.raises(DanFastError, match=own):
            trainer.fit()
    finally:
        setattr(memory_shards, name, write)
    again = trainer_of(config, group)
    assert again.iterations_done == 1
    if group.rank() == 0:
        shards = {shard["file"] for shard in load_checkpoint(trainer.folder.checkpoint)["memory_shards"]}
        assert shards <= {file.name for file in trainer.folder.path.iterdir()}


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_of_one_rank_leaves_the_checkpoint_before(ranks: Ranks, images: Path, tmp_path: Path, full: int):
    config = settings(images, tmp_path / "run", run={"checkpoint_every": 1, "resume": "auto"})
    ranks.run(full_disk, config, full)


def broken_image(group: Group, config: TrainConfig) -> None:
    trainer = trainer_of(config, group)
    of_epoch = trainer.batches.of_epoch

    def breaks(*arguments: Any):
        for number, batch in enumerate(of_epoch(*arguments)):
            if number == 2 and group.rank() == 1:
                raise DanFastError("it.jpg cannot be decoded")
            yield batch

    trainer.batches.of_epoch = breaks
    own = "^it.jpg cannot" if group.rank() == 1 else "^Rank 1 could not read a batch: see that rank's error"
    with pytest.raises(DanFastError, match=own):
        trainer.fit()
    assert load_checkpoint(trainer.folder.checkpoint)["iteration"] == 2


def out_of_memory(group: Group, config: TrainConfig) -> None:
    trainer = trainer_of(config, group)
    step = trainer.train_iteration

    def fails(*arguments: Any) -> None:
        if trainer.iteration == 1:
            if group.rank() == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            # From here on it waits in vain; before, the other rank may be as late as the machine has it.
            distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
        step(*arguments)

    trainer.train_iteration = fails
    expected = torch.OutOfMemoryError if group.rank() == 1 else RuntimeError
    with pytest.raises(expected) as raised:
        trainer.fit()
    assert group.rank() == 1 or is_loss_of_a_rank(raised.value)


def test_a_rank_out_of_memory_does_not_leave_the_others_waiting(images: Path, tmp_path: Path):
    with Ranks(2, tmp_path / "store") as ranks:
        ranks.run(out_of_memory, settings(images, tmp_path / "run"))


def not_finite(group: Group, config: TrainConfig) -> None:
    trainer = trainer_of(config, group)
    step = trainer.train_iteration

    def poisoned(batch: Any, scalars: Any) -> None:
        if group.rank() == 1 and trainer.iteration == 1:
            batch = batch._replace(meta_train=batch.meta_train._replace(images=batch.meta_train.images * torch.nan))
        step(batch, scalars)

    trainer.train_iteration = poisoned
    with pytest.raises(DanFastError, match="^Training diverged at iteration 1 .*norms are not finite.*lower optimizer"):
        trainer.fit()


def two_ranks_wrote(group: Group, config: TrainConfig) -> None:
    trainer_of(config, group).fit()


def test_a_checkpoint_of_ranks_that_cannot_be_read_is_refused(tmp_path: Path, images: Path, monkeypatch):
    config = settings(images, tmp_path / "run", optimizer={"epochs": 1}, run={"resume": "auto"})
    with Ranks(2, tmp_path / "store") as ranks:
        ranks.run(two_ranks_wrote, config)
    config.optimizer.epochs = 1
    with monkeypatch.context() as little:
        little.setattr("dan_fast.core.free_memory.free_memory", lambda device: 4 * 150 * 3)
        with pytest.raises(DanFastError, match="100% of 147 slots, while read, would need about .* over more"):
            trainer_of(config, None)
    second = next(tmp_path.glob("run/memory-*-2of2.safetensors"))
    content = second.read_bytes()
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DanFastError, match=f"{second.name} is damaged, its checksum does not fit"):
        trainer_of(config, None)
    second.write_bytes(content[:-100])
    with pytest.raises(DanFastError, match=rf"{second.name} is damaged \(.*\): continue from another checkpoint"):
        trainer_of(config, None)
    second.unlink()
    with pytest.raises(DanFastError, match=f"{second.name} does not exist: keep the files of all ranks"):
        trainer_of(config, None)
    second.write_bytes(content)
    assert trainer_of(config, None).epoch == 1


def without_known(split: Split) -> Split:
    """The split with its unlabelled images alone."""
    known = split.num_labeled + split.num_fed_back
    left = {name: getattr(split, name)[known:] for name in ("images", "labels", "sample_ids")}
    return split._replace(**left, num_labeled=0, num_fed_back=0)


def all_broken(group: Group, config: TrainConfig) -> None:
    trainer = trainer_of(config, group)
    of_epoch, path = trainer.batches.of_epoch, str(trainer.training_set.labeled_samples[3].path)

    def broken(*arguments: Any) -> Iterator[MiniBatch]:
        for number, batch in enumerate(of_epoch(*arguments)):
            skipped = (path,) if group.rank() else ()
            yield batch._replace(meta_test=without_known(batch.meta_test), skipped=skipped) if number == 2 else batch

    trainer.batches.of_epoch = broken
    with pytest.raises(
        DanFastError, match=f"^All labelled images of a batch are broken, and of all .* {path} is the first: repair"
    ):
        trainer.fit()
    assert load_checkpoint(trainer.folder.checkpoint)["iteration"] == 2


WITHOUT_MEMORY = {"loss": {"embedding": 0.0, "labeled_embedding": 0.0}, "data": {"unlabeled": []}}


@pytest.mark.parametrize(
    ("trouble", "sections"),
    [
        *((trouble, {}) for trouble in (other_version, other_weights, broken_image, not_finite)),
        (not_finite, WITHOUT_MEMORY),
        (all_broken, {"data": {"broken_images": "skip"}}),
    ],
)
def test_the_trouble_of_one_rank_is_told_by_all(ranks: Ranks, images: Path, tmp_path: Path, trouble, sections: dict):
    """What they do not train with, and what ends a training that is then saved."""
    ranks.run(trouble, settings(images, tmp_path / "run", **sections))


def wrong_gate_features(group: Group) -> None:
    memory = ProgressiveAugmentedMemory(5, 4, 3, gates="features", process_group=group)
    batch = torch.ones(1, 3), torch.zeros(1, dtype=torch.int64), torch.ones(1, 3), torch.zeros(1, dtype=torch.int64)
    last = group.size() - 1
    for wrong in ([[0.0] * 3], torch.zeros(1, 3, dtype=torch.int64)):
        is_wrong = group.rank() == last
        sentence = "gate_features must" if is_wrong else f"rank {last} of process_group refused its rows"
        with pytest.raises(TypeError if is_wrong else ValueError, match=sentence):
            memory(*batch, gate_features=wrong if is_wrong else torch.zeros(1, 3))
    memory(*batch, gate_features=torch.zeros(1, 3))


def test_gate_features_that_are_none_are_named_and_leave_no_rank_waiting(ranks: Ranks):
    ranks.run(wrong_gate_features)
