"""Trainings of a network of one convolution, each in a process of its own that can be killed, some dozens in a minute.

A process that has imported everything once and forks for each training; see `Trainings`.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dan_fast.training.trainer as training
from dan_fast.core.errors import DanFastError
from dan_fast.nn import DAN
from dan_fast.training import Interrupted, TrainConfig, Trainer
from dan_fast.training.recipes import over
from tests.support import ROOT
from tests.support.training_runs import config

IMAGE_SIZE = (16, 16)


class OneConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(images)).relu()


def tiny_network(
    settings: dict[str, Any], num_classes: int, backbone: type[nn.Module] = OneConvolution, dropout: float = 0.5, **_
) -> tuple[DAN, torch.Tensor]:
    """In the place of `network_and_random_state`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["run"]["seed"])
        given = {"reduction": 2, "dropout": dropout, "feature": settings["model"]["feature"]}
        network = DAN(num_classes, backbone=backbone(), image_size=IMAGE_SIZE, **given)
        return network, torch.get_rng_state()


def tiny_config(images: Path, out: Path, **sections: dict[str, Any]) -> TrainConfig:
    """A training that goes on by itself; `sections` as in `TrainConfig.of_recipe`."""
    settings = {"data": {"image_size": IMAGE_SIZE, "iterations": 5}, "run": {"resume": "auto"}}
    return config(images, out, **over(settings, sections))


class Trainings:
    """Starts trainings, one at a time.

    Example:
        with Trainings() as trainings:
            pid = trainings.start(tiny_config(images, out), log=out.with_suffix(".log"))
            assert trainings.wait() == 0
    """

    def __enter__(self) -> "Trainings":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.tiny_training"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait(300)

    def start(self, config: TrainConfig, log: Path, pause: float = 0.0) -> int:
        """The training's process, which leads a process group of its own and writes what it says to `log`.

        Each iteration takes `pause` seconds longer: what is to happen in the middle of a run must not come too late on
        a busy machine.
        """
        job = {"config": config.to_dict(), "log": str(log), "pause": pause}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """The exit code of `dan-fast train`, 70 after an exception that is none of its own, or minus a signal."""
        return int(self._process.stdout.readline())


def workers_of(process: int) -> list[int]:
    """The children of a process."""
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def has_ended(process: int) -> bool:
    """Whether a process waits for its parent to ask how it ended, or has been asked, which PyTorch does of workers."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(what, seconds: float = 300.0) -> None:
    """Returns once `what()` is so; `seconds` end a wait for what never comes, they do not say how soon it comes."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.005)


def _train(settings: dict[str, Any], pause: float) -> int:
    sections = {name: values for name, values in settings.items() if isinstance(values, dict)}
    try:
        trainer = Trainer(TrainConfig.of_recipe("none", **sections))
        step = trainer.train_iteration
        trainer.train_iteration = lambda *given: time.sleep(pause) or step(*given)
        trainer.fit()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except DanFastError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _serve() -> None:
    training.network_and_random_state = tiny_network
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            code = 70
            try:
                os.setsid()
                log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                code = _train(job["config"], job["pause"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
