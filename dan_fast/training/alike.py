"""What the ranks of a training have to agree on before the first step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dan_fast.core.errors import DanFastError
from dan_fast.data import ReIDDataset
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.launch import require_same
from dan_fast.distributed.shards import carries
from dan_fast.nn import DAN
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.training.config import DATASETS, TrainConfig
from dan_fast.training.recipes import dotted
from dan_fast.training.surroundings import versions

# Where images lie and are decoded may differ from machine to machine; which they are is compared by fingerprint.
_OF_A_MACHINE = {
    *(f"data.{name}" for name in (*DATASETS, "root", "workers", "cache", "cache_check")),
    "run.device",
}


def require_same_settings(group: ProcessGroup | None, config: TrainConfig, device: torch.device) -> None:
    """Refuse ranks of other settings, versions or kinds of device, on all of them.

    Raises:
        DanFastError: names the setting or package that differs; or the group has no backend for the host.
    """
    if group is not None and not carries(group, "cpu"):
        raise DanFastError(
            "The process group carries no tensors on the host: make it with init_process_group('cpu:gloo,cuda:nccl')."
        )
    installed = [
        ("The source of the extension" if name == "extension" else f"The version of {name}", found)
        for name, found in versions().items()
    ]
    require_same(group, installed, "install the same versions on all machines")
    require_same(group, [("The kind of run.device", device.type)], "set run.device to cpu, or see `dan-fast doctor`")
    given = [(name, value) for name, value in dotted(config.to_dict()).items() if name not in _OF_A_MACHINE]
    require_same(group, given, "start all ranks with the same settings")


def require_same_run(
    group: ProcessGroup | None, fingerprint: str, targets: Sequence[ReIDDataset], saved: Mapping[str, Any] | None
) -> None:
    """Refuse ranks that see other images or go on from another checkpoint, on all of them.

    Raises:
        DanFastError: names what differs.
    """
    of_targets = [(each.title, *(len(part) for part in (each.query, each.gallery, each.test))) for each in targets]
    images = [("The fingerprint of the training images", fingerprint), ("The size of data.targets", of_targets)]
    require_same(group, images, "give all ranks the same data.labeled, data.unlabeled and data.targets")
    state = None if saved is None else (saved["epoch"], saved["iteration"])
    place = [("The epoch and iteration to continue from", state)]
    require_same(group, place, "put run.out on a file system that all machines share")


def require_same_network(group: ProcessGroup | None, network: DAN) -> None:
    """Refuse ranks that begin with other weights, as of another file of one name, or read images otherwise.

    Raises:
        DanFastError: names what differs.
    """
    if group is None:
        return
    prepared = network.preprocessing.to_dict()
    given = [("How images are prepared", prepared), ("The checksum of the weights", weights_hash(network))]
    require_same(group, given, "give all machines the same model.weights and versions of timm and torchvision")
