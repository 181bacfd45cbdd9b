"""Faults on purpose: what is killed, full, gone or set back in the middle of a training loses nothing.

docs/reliability.md says what was tried how often.
"""

import errno
import io
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import dan_fast.training.trainer as training
from dan_fast.core.errors import DanFastError
from dan_fast.data import MiniBatch, training_loader
from dan_fast.reporting.curves import read_scalars
from dan_fast.training import Interrupted, TrainConfig, Trainer
from dan_fast.training.checkpoint import CheckpointWriter, load_checkpoint
from dan_fast.training.scalars import Scalars
from dan_fast.training.shared import origin_of
from tests.support.tiny_training import Trainings, has_ended, tiny_config, tiny_network, wait_until, workers_of
from tests.support.training_runs import assert_same_training, has_logged

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("DAN_FAST_KILLS", "50"))


@pytest.fixture(scope="module")
def trainings():
    with Trainings() as started:
        yield started


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def here(monkeypatch):
    """Trains the tiny network in this process; called before each iteration is `each`."""
    monkeypatch.setattr(training, "network_and_random_state", tiny_network)

    def run(setup: TrainConfig, each=lambda trainer: None) -> Trainer:
        trainer = Trainer(setup)
        step = trainer.train_iteration

        def with_fault(batch, scalars) -> None:
            each(trainer)
            step(batch, scalars)

        trainer.train_iteration = with_fault
        trainer.fit()
        return trainer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def iterations_saved(out: Path, per_epoch: int) -> int:
    state = load_checkpoint(out / "checkpoint.pt")
    return state["epoch"] * per_epoch + state["iteration"]


def test_kills_at_random_moments_change_no_bit(images, trainings, tmp_path, log):
    epochs = {"epochs": 4}
    # Once to warm up.
    for out in ("first", "whole"):
        trainings.start(tiny_config(images, tmp_path / out, optimizer=epochs), log)
        started = time.monotonic()
        assert trainings.wait() == 0, log.read_text()
    length = time.monotonic() - started
    moments, kills, folders = random.Random(0), 0, 0
    while kills < KILLS:
        folders += 1
        out, finished = tmp_path / f"killed{folders}", False
        while not finished:
            # Images are read in this process, in one worker and in two by turns.
            setup = tiny_config(images, out, optimizer=epochs, data={"workers": kills % 3}, run={"checkpoint_every": 1})
            process = trainings.start(setup, log)
            if kills < KILLS:
                time.sleep(moments.uniform(0, length / 2))
                with suppress(ProcessLookupError):  # it was faster
                    os.kill(process, signal.SIGKILL)
            code = trainings.wait()
            assert code in (0, -signal.SIGKILL), log.read_text()
            finished = code == 0
            kills += not finished
        assert_same_training(tmp_path / "whole", out)
        assert not list(out.glob(".*")), "the remains of those that were killed are gone"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_a_signal_to_the_process_group_stops_a_run_with_workers_in_order(images, trainings, tmp_path, log, number):
    out, data = tmp_path / "run", {"workers": 2, "iterations": 300}
    # No checkpoint of its own accord: all that is saved is saved by the stop.
    process = trainings.start(tiny_config(images, out, data=data, optimizer={"epochs": 1}), log, pause=0.05)
    wait_until(lambda: has_logged(out))
    workers = workers_of(process)
    os.killpg(process, number)
    assert trainings.wait() == 130, log.read_text()
    said = log.read_text()
    saved = iterations_saved(out, 300)
    assert len(workers) == 2 and 0 < saved < 300
    assert said.splitlines()[-1] == f"Saved after iteration {saved}." and "Traceback" not in said
    assert list(read_scalars(out)["train/loss/total"][0]) == list(range(1, saved + 1))


def test_a_worker_that_is_killed_ends_the_run_in_a_sentence_and_saved(images, trainings, tmp_path, log):
    for out in ("whole", "run"):
        setup = tiny_config(images, tmp_path / out, data={"workers": 2, "iterations": 60}, optimizer={"epochs": 1})
        process = trainings.start(setup, log, pause=0.05 if out == "run" else 0.0)
        if out == "run":
            wait_until(lambda: has_logged(tmp_path / "run"))
            os.kill(workers_of(process)[0], signal.SIGKILL)
        assert trainings.wait() == (1 if out == "run" else 0), log.read_text()
    said = log.read_text()
    assert said.splitlines()[-1].startswith("A process that decodes images has died (")
    assert "Traceback" not in said and 0 < iterations_saved(tmp_path / "run", 60) < 60
    trainings.start(setup, log)
    assert trainings.wait() == 0
    assert_same_training(tmp_path / "whole", tmp_path / "run")


def test_a_second_process_is_told_who_trains_and_may_go_on_once_that_is_killed(images, trainings, tmp_path, log, here):
    out = tmp_path / "run"
    setup = tiny_config(images, out, data={"workers": 2, "iterations": 300}, optimizer={"epochs": 1})
    process = trainings.start(setup, log, pause=0.1)
    wait_until(lambda: has_logged(out))
    sentence = f"{out} is in use by process {process} on {socket.gethostname()}: wait for it, stop it, or choose"
    with pytest.raises(DanFastError, match=sentence):
        here(setup)
    assert not (out / "checkpoint.pt").exists()
    # Its workers notice only seconds later; here they are stopped, however long it takes.
    workers = workers_of(process)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        os.kill(process, signal.SIGKILL)
        assert trainings.wait() == -signal.SIGKILL
        trainings.start(tiny_config(images, out, data={"iterations": 3}, optimizer={"epochs": 1}), log)
        assert trainings.wait() == 0, log.read_text()
        assert not any(map(has_ended, workers))
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def test_what_another_process_has_trained_meanwhile_is_not_overwritten(images, tmp_path, here):
    setup = tiny_config(images, tmp_path / "run")
    early = Trainer(setup)
    here(setup)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(DanFastError, match="Another process has written .*checkpoint.pt since this one began"):
        early.fit()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_checkpoint_is_due_by_time_and_does_not_wait_for_the_disk(images, tmp_path, here, monkeypatch, workers):
    """An iteration takes ten seconds of the clock; the disk is stuck from the first checkpoint to the ninth of them."""
    now, begun, real, goes_on = [0.0], [], os.fsync, threading.Event()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def stuck(descriptor: int) -> None:
        if ".checkpoint.pt." in os.readlink(f"/proc/self/fd/{descriptor}"):
            assert goes_on.wait(60)
        real(descriptor)

    def ten_seconds(trainer: Trainer) -> None:
        now[0] += 10.0
        if trainer.iterations_done == 8:
            goes_on.set()

    save = CheckpointWriter.save
    monkeypatch.setattr(CheckpointWriter, "save", lambda *arguments: begun.append(now[0]) or save(*arguments))
    monkeypatch.setattr(os, "fsync", stuck)
    setup = tiny_config(images, tmp_path / "run", data={"workers": workers, "iterations": 10},
                        optimizer={"epochs": 1}, run={"checkpoint_every_s": 30})  # fmt: skip
    trainer = here(setup, ten_seconds)
    assert begun[0] == 30.0 and all(each >= 90.0 for each in begun[1:]) and trainer.iterations_done == 10
    assert iterations_saved(tmp_path / "run", 10) == 10


class Full(io.FileIO):
    """A file on a full disk."""

    def write(self, content) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def with_all_files(images: Path, folder: Path) -> TrainConfig:
    """A training that writes every kind of file."""
    return tiny_config(
        images,
        folder / "run",
        data={"iterations": 2, "targets": str(images / "mall"), "cache": str(folder / "cache")},
        run={"evaluate_every": 1, "choose_epoch_on_target": True, "checkpoint_every": 1},
    )


@pytest.fixture(scope="module")
def whole(images, trainings, tmp_path_factory) -> Path:
    """The folder of such a training to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    return undisturbed(trainings, with_all_files(images, folder))


@pytest.fixture(scope="module")
def tiny(images, trainings, tmp_path_factory) -> Path:
    """That of a training of `tiny_config` as it is."""
    return undisturbed(trainings, tiny_config(images, tmp_path_factory.mktemp("tiny") / "run"))


def undisturbed(trainings: Trainings, setup: TrainConfig) -> Path:
    out = Path(setup.run.out)
    trainings.start(setup, out.with_name("log"))
    assert trainings.wait() == 0, out.with_name("log").read_text()
    return out


def without_room(trainer: Trainer, patch: pytest.MonkeyPatch, times: float = math.inf) -> list[int]:
    """Refuses so many checkpoints of a trainer; returns after which iterations one was to be put in its place."""
    replace, tried = os.replace, []

    def refuse(one: str, other: str) -> None:
        if Path(other).name == "checkpoint.pt":
            tried.append(trainer.iterations_done)
            if len(tried) <= times:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(one, other)

    patch.setattr(os, "replace", refuse)
    return tried


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        *((kind, "write") for kind in ("config.yaml", "checkpoint.pt", "chosen.pt", "results.json", ".npy", ".npz")),
        # They are all written by `write_whole`.
        *(("checkpoint.pt", "fsync"), ("checkpoint.pt", "replace"), ("results.json", "fsync"), (".npy", "replace")),
    ],
)
def test_a_full_disk_or_quota_is_a_sentence_and_the_run_goes_on_later(
    images, whole, tmp_path, here, monkeypatch, kind, stage
):
    setup = with_all_files(images, tmp_path)
    fsync, replace, open_path = os.fsync, os.replace, Path.open

    def is_meant(name: str) -> bool:
        name = Path(name).name
        return name.endswith(kind) or (name.endswith(".part") and f"{kind}." in name)

    def quota(name: str) -> None:
        if is_meant(name):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    def opened(path: Path, mode: str = "r", *more, **options):
        if is_meant(str(path)) and mode == "xb":
            return io.BufferedWriter(Full(path, "xb"))
        return open_path(path, mode, *more, **options)

    with monkeypatch.context() as patch:
        if stage == "write":
            patch.setattr(Path, "open", opened)
        elif stage == "fsync":
            patch.setattr(os, "fsync", lambda number: quota(os.readlink(f"/proc/self/fd/{number}")) or fsync(number))
        else:
            patch.setattr(os, "replace", lambda one, other: quota(other) or replace(one, other))
        reason = "No space left on device" if stage == "write" else "Disk quota exceeded"
        with pytest.raises(DanFastError, match=rf"{kind} could not be written \({reason}\)"):
            here(setup)
    assert not list(tmp_path.rglob("*.part")) and not list((tmp_path / "run").glob("*" + kind))
    here(setup)
    assert_same_training(whole, tmp_path / "run")
    assert (whole / "results.json").read_text() == (tmp_path / "run" / "results.json").read_text()


@pytest.mark.parametrize("full", ["for a moment", "for good"])
def test_a_checkpoint_that_failed_beside_the_training_is_written_before_another_error(
    images, tiny, tmp_path, here, monkeypatch, full
):
    """The disk is full when a checkpoint is written, and then the next batch cannot be read."""
    setup = tiny_config(images, tmp_path / "run", run={"checkpoint_every": 3})
    trainer = Trainer(setup)
    of_epoch = trainer.batches.of_epoch

    def broken(*arguments):
        yield from list(of_epoch(*arguments))[:3]
        raise DanFastError("an image cannot be decoded")

    trainer.batches.of_epoch = broken
    sentence = "cannot be decoded" if full == "for a moment" else "checkpoint.pt could not be written"
    with monkeypatch.context() as patch, pytest.raises(DanFastError, match=sentence):
        tried = without_room(trainer, patch, times=1 if full == "for a moment" else math.inf)
        trainer.fit()
    assert tried == [3, 3]
    if full == "for a moment":
        assert iterations_saved(tmp_path / "run", 5) == 3
    here(setup)
    assert_same_training(tiny, tmp_path / "run")


@pytest.mark.parametrize("beside", [False, True], ids=["waited for", "beside the training"])
def test_what_could_not_be_saved_is_saved_before_it_is_evaluated(images, tmp_path, here, monkeypatch, beside):
    """The same trainer goes on, as in a notebook, when room has been made."""
    target = {"targets": str(images / "mall"), "iterations": 2}
    here(tiny_config(images, tmp_path / "whole", data=target))
    # At 3 of 4 iterations, or before the evaluation of the last epoch.
    setup = tiny_config(images, tmp_path / "run", data=target, run={"checkpoint_every": 3 if beside else 0})
    trainer = Trainer(setup)
    with monkeypatch.context() as patch, pytest.raises(DanFastError, match="checkpoint.pt could not be written"):
        tried = without_room(trainer, patch)
        trainer.fit()
    assert tried and not (tmp_path / "run" / "checkpoint.pt").exists()
    evaluate, saved = trainer.targets.evaluate, []

    def after_saving(*arguments):
        saved.append(iterations_saved(tmp_path / "run", 2))
        return evaluate(*arguments)

    monkeypatch.setattr(trainer.targets, "evaluate", after_saving)
    trainer.fit()
    assert saved == [4]
    assert_same_training(tmp_path / "whole", tmp_path / "run")


def test_scalars_that_an_epoch_could_not_write_at_its_end_cost_no_iteration(images, tiny, tmp_path, here, monkeypatch):
    trainer, flush, flushed = Trainer(tiny_config(images, tmp_path / "run")), Scalars.flush, []

    def once_without_room(scalars: Scalars, step: int) -> dict[str, float]:
        flushed.append(step)
        if flushed.count(5) == 1 == flushed.count(step):
            raise DanFastError("scalars could not be written")
        return flush(scalars, step)

    monkeypatch.setattr(Scalars, "flush", once_without_room)
    with pytest.raises(DanFastError, match="scalars could not be written"):
        trainer.fit()
    assert trainer.iterations_done == 5
    trainer.fit()
    assert_same_training(tiny, tmp_path / "run")


@pytest.mark.parametrize("what", ["replaced", "deleted"])
def test_a_cache_that_is_replaced_or_deleted_is_read_on(images, tiny, tmp_path, here, what):
    def tamper(trainer: Trainer) -> None:
        for file in list((tmp_path / "cache").glob("*.np[yz]")) if trainer.iterations_done == 2 else []:
            if what == "replaced":
                other = file.with_suffix(".other")
                other.write_bytes(bytes(file.stat().st_size))
                os.replace(other, file)
            else:
                file.unlink()

    setup = tiny_config(images, tmp_path / "run", data={"cache": str(tmp_path / "cache")})
    here(setup, tamper)
    assert_same_training(tiny, tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_vanish_during_an_epoch_cost_no_iteration(images, tmp_path, here, workers):
    own = shutil.copytree(images, tmp_path / "images")
    here(tiny_config(own, tmp_path / "whole", data={"iterations": 12}))

    def vanish(trainer: Trainer) -> None:
        if trainer.iterations_done == 2:
            (own / "campus" / "images").rename(own / "gone")

    setup = tiny_config(own, tmp_path / "run", data={"workers": workers, "iterations": 12}, run={"log_every": 1000})
    with pytest.raises(DanFastError, match=r"campus/images/.* cannot be decoded \(No such file or directory\)"):
        here(setup, vanish)
    assert 2 < iterations_saved(tmp_path / "run", 12) < 12
    assert read_scalars(tmp_path / "run")["train/loss/total"][0].tolist() == [iterations_saved(tmp_path / "run", 12)]
    (own / "gone").rename(own / "campus" / "images")
    here(setup)
    assert_same_training(tmp_path / "whole", tmp_path / "run")


def test_single_images_that_vanish_during_an_epoch_are_skipped_and_named(images, tmp_path, here):
    own = shutil.copytree(images, tmp_path / "images")

    def vanish(trainer: Trainer) -> None:
        if trainer.iterations_done == 2:
            next((own / "mall" / "images").iterdir()).unlink()
            trainer.skipped.add("one that was broken before")

    trainer = here(tiny_config(own, tmp_path / "run", data={"broken_images": "skip"}), vanish)
    assert trainer.epoch == 2 and 0 < len(trainer.skipped) <= 4
    assert json.loads((tmp_path / "run" / "results.json").read_text())["skipped"] == len(trainer.skipped)
    shared, _ = origin_of(tmp_path / "run" / "checkpoint.pt", load_checkpoint(tmp_path / "run" / "checkpoint.pt"))
    assert shared["images_left_out_as_broken"] == len(trainer.skipped)


def test_a_clock_that_jumps_changes_nothing(images, tiny, tmp_path, here, monkeypatch):
    """Forwards and backwards by days during the run, and backwards between its parts."""
    jumps, base = random.Random(0), [1e9]
    monkeypatch.setattr(time, "time", lambda: base[0] + jumps.uniform(-1e6, 1e6))

    def stop(trainer: Trainer) -> None:
        if trainer.iterations_done in (2, 6) and trainer.iterations_done > begun[-1]:
            begun.append(trainer.iterations_done)
            os.kill(os.getpid(), signal.SIGTERM)

    begun, setup = [0], tiny_config(images, tmp_path / "run", run={"checkpoint_every_s": 1e-3})
    for _ in range(2):
        with pytest.raises(Interrupted):
            here(setup, stop)
        base[0] -= 1e8
    here(setup)
    assert_same_training(tiny, tmp_path / "run")
    np.testing.assert_equal(read_scalars(tmp_path / "run"), read_scalars(tiny))


def test_a_worker_leaves_a_sigterm_that_is_not_its_parents(images, here, tmp_path):
    """That of the parent, by which multiprocessing ends workers at exit, it obeys."""
    trainer = Trainer(tiny_config(images, tmp_path / "run"))

    def begun() -> tuple[Iterator[MiniBatch], int]:
        # Loaders of earlier tests may not have been collected.
        before = set(workers_of(os.getpid()))
        plans = trainer.batches.planner.plan_epoch(0)
        batches = iter(training_loader(trainer.training_set, plans, (16, 16), workers=1))
        next(batches)
        new = set(workers_of(os.getpid())) - before
        (worker,) = (pid for pid in new if "pt_data_worker" in Path(f"/proc/{pid}/comm").read_text())
        return batches, worker

    batches, worker = begun()
    subprocess.run(["kill", "-TERM", str(worker)], check=True)
    assert len(list(batches)) == trainer.batches.planner.iterations - 1
    batches, worker = begun()
    os.kill(worker, signal.SIGTERM)
    wait_until(lambda: has_ended(worker))
    batches.close()
