"""Processes of torchrun: one that is killed, and what a rank says of a port, of the others and of its own GPU."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from torch import distributed, nn

from dan_fast.core.devices import resolve_device
from dan_fast.core.errors import DanFastError
from dan_fast.core.launched import own_rank
from dan_fast.data.synthetic import synthesize
from dan_fast.distributed import launch
from dan_fast.nn import DAN
from dan_fast.training import TrainConfig, Trainer, trained_network
from dan_fast.training.build import with_synchronised_norm
from dan_fast.training.checkpoint import load_checkpoint
from tests.support import ROOT
from tests.support.ranks import Ranks
from tests.support.tiny_training import wait_until
from tests.support.training_runs import assert_same_training


def settings(images: Path, out: Path, workers: int) -> TrainConfig:
    labeled, unlabeled, target = (str(images / name) for name in ("campus", "mall", "harbour"))
    return TrainConfig.of_recipe(
        "paper",
        data={"labeled": labeled, "unlabeled": unlabeled, "targets": target, "image_size": (32, 16), "batch_size": 12,
              "iterations": 6, "workers": workers},
        model={"backbone": "timm:test_resnet", "weights": "none"},
        memory={"labeled_slots": 60, "unlabeled_slots": 40},
        optimizer={"epochs": 2},
        run={"out": str(out), "device": "cpu", "resume": "auto", "checkpoint_every": 1},
    )  # fmt: skip


def started_ranks(config: TrainConfig, *flags: str) -> subprocess.Popen:
    """Two ranks under torchrun, in a process group of their own; what they say is in the log beside the run.

    Rank 1 of the first start waits in the tenth iteration.
    """
    out = Path(config.run.out)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.to_dict()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags]
    with open(out.with_suffix(".log"), "w") as log:
        return subprocess.Popen(
            [*launcher, "-m", "tests.support.held_ranks", "train", "--config", str(file)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def trained(group: distributed.ProcessGroup, config: TrainConfig) -> None:
    Trainer(config, group).fit()


def rank_of(agent: int, rank: int) -> int | None:
    """The process of a rank, by its environment."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{child}/environ").read_text():
            return int(child)
    return None


@pytest.mark.slow
def test_a_job_goes_on_by_itself_after_a_rank_is_killed(tmp_path: Path):
    images, killed, straight = (tmp_path / name for name in ("images", "killed", "straight"))
    synthesize(images, ("campus", "mall", "harbour"), identities=5, image_size=(32, 16))
    job = started_ranks(settings(images, killed, workers=1), "--max-restarts", "1")
    try:
        wait_until(lambda: job.poll() is not None or list(killed.glob("memory-[89]-*")), seconds=600)
        assert job.poll() is None, killed.with_suffix(".log").read_text()
        os.kill(rank_of(job.pid, 1), signal.SIGKILL)
        assert job.wait(600) == 0, killed.with_suffix(".log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    said = killed.with_suffix(".log").read_text()
    assert "dan-fast, rank 0: The other ranks were lost (" in said and "run.resume auto" in said
    assert said.count("mAP") == 1  # rank 0 alone prints
    with Ranks(2, tmp_path / "store") as ranks:
        ranks.run(trained, settings(images, straight, workers=0))
    assert_same_training(killed, straight)
    for file in straight.glob("memory-*"):
        assert (killed / file.name).read_bytes() == file.read_bytes()
    network, _ = trained_network(straight / "checkpoint.pt")
    assert torch.isfinite(network.embed(torch.zeros(1, 3, 32, 16))).all()
    assert len(load_checkpoint(straight / "checkpoint.pt")["random_of_other_ranks"]) == 1


def as_rank(monkeypatch: pytest.MonkeyPatch, port: int, rank: int = 0) -> None:
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        as_rank(monkeypatch, port)
        with (
            pytest.raises(
                DanFastError, match=rf"^The 2 ranks do not find each other at 127.0.0.1:{port} \(.*\): choose"
            ),
            launch.joined(torch.device("cpu")),
        ):
            pass


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as other programs set it
    with launch.joined(torch.device("cpu")) as group:
        assert group is None and launch.number_of_ranks() == 1
    for name, value in (("WORLD_SIZE", ""), ("MASTER_PORT", ""), ("LOCAL_RANK", "first")):
        as_rank(monkeypatch, 1, rank=1)
        monkeypatch.setenv(name, value)
        assert launch.number_of_ranks() == 1 and own_rank() == 0
    assert launch.gathered(None, "x") == ["x"] and launch.largest(None, 3, 1) == [3, 1]


def test_processes_that_are_started_again_do_not_meet_those_that_are_gone():
    """Whatever is left in the store, which outlives them; ranks may come again one by one."""
    store, found = distributed.HashStore(), []

    def start(rank: int) -> None:
        part = launch._store_of_this_start(store, rank, 3)
        found.append(part)
        part.set(f"address of {rank}", "")

    for number in range(1, 4):
        threads = [
            threading.Thread(target=start, args=(rank,)) for rank in ((0, 1, 2), (2, 1, 0), (1, 0, 2))[number - 1]
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(60)
        assert len(found) == 3 * number
        assert all(part.check([f"address of {rank}" for rank in range(3)]) for part in found[-3:])
    found[-1].set("of the last start", "")
    assert [part.check(["of the last start"]) for part in found] == [False] * 6 + [True] * 3


def test_a_rank_that_does_not_come_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_TIMEOUT_S", 0.1)
    with pytest.raises(TimeoutError, match="not all 2 ranks registered within 0 s"):
        launch._store_of_this_start(distributed.HashStore(), 0, 2)


@pytest.mark.parametrize("instance_norm", [False, True])
@pytest.mark.parametrize("backbone", ["resnet18", "timm:efficientnet_lite0"])
def test_synchronised_batch_norm_leaves_everything_else(backbone: str, instance_norm: bool, tmp_path: Path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = DAN(3, backbone, image_size=(64, 32), instance_norm=instance_norm).eval()
        images = torch.randn(2, 3, 64, 32)
        expected = network.embed(images)
        network = with_synchronised_norm(network, distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()
    kinds = {type(each).__name__ for each in network.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)}
    assert kinds <= {"SyncBatchNorm", "SyncBatchNormAct"} and kinds
    torch.testing.assert_close(network.embed(images), expected)


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    as_rank(monkeypatch, 1, rank=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(resolve_device(name)) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(DanFastError, match="The device cuda:0 cannot serve 2 ranks: set it to cuda"):
        resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert str(resolve_device("auto")) == "cuda:0", "its launcher shows each rank its own GPU"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(DanFastError, match="3 ranks on this machine cannot share 2 GPUs: start as many ranks as GPUs"):
        resolve_device("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DanFastError, match="There is no device cuda:1, 0 GPUs are visible: use auto or cpu"):
        resolve_device("cuda")


def test_an_index_of_a_device_is_not_cut_to_eight_bits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda:1", "cuda"):
        assert resolve_device(device) == resolve_device(torch.device(device)) == torch.device(device)
    for name in ("cuda:2", "cuda:200", "cuda:255", "cuda:256", "cuda:257"):
        with pytest.raises(DanFastError, match=f"There is no device {name}, 2 GPUs are visible"):
            resolve_device(name)


def test_ranks_that_share_a_gpu_are_refused_before_nccl_does(monkeypatch: pytest.MonkeyPatch):
    own = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: own)
    one, two, none = ("cuda", "GPU-1"), ("cuda", "GPU-2"), ("cpu", None)
    shared, mixed = (
        "3 ranks cannot share 2 GPUs: start as many",
        "Rank 1 runs on (cpu|cuda) and rank 0 on (cuda|cpu): set",
    )
    for device, ranks, refused in (
        ("cuda:0", [one, two], None),
        ("cuda:0", [one, two, one], shared),
        ("cuda:0", [one, none], mixed),
        ("cpu", [one, none], mixed),
        ("cpu", [none, one], mixed),
        ("cpu", [none, none], None),
    ):

        def gathered(group, value, ranks=ranks):
            assert value in ranks
            return ranks

        monkeypatch.setattr(launch, "gathered", gathered)
        with pytest.raises(DanFastError, match=refused) if refused else nullcontext():
            launch._require_own_devices(distributed.group.WORLD, torch.device(device))


def test_joining_asks_for_a_device_of_its_own_on_all_ranks(monkeypatch: pytest.MonkeyPatch):
    as_rank(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda where: iter([("store", 0, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", MagicMock())
    monkeypatch.setattr(distributed, "destroy_process_group", MagicMock())
    monkeypatch.setattr(launch, "_store_of_this_start", MagicMock())
    monkeypatch.setattr(launch, "_require_own_devices", MagicMock(side_effect=DanFastError("cannot share")))
    for device in ("cpu", "cuda:0"):
        with pytest.raises(DanFastError, match="cannot share"), launch.joined(torch.device(device)):
            pass
