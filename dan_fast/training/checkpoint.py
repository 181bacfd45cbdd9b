"""Checkpoints: one file with everything, read back without running code."""

import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_whole
from dan_fast.core.home import expanded
from dan_fast.nn.hub import read_folder

FORMAT = "dan_fast checkpoint 1"
# The format's name without its version: a checkpoint of another version is one too.
_MARK = FORMAT.rpartition(" ")[0].encode()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain containers) to `path` by `write_whole`."""
    write_whole(path, lambda stream: torch.save({"format": FORMAT, **state}, stream))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU; loaded with `weights_only=True`.

    Of a folder that `dan-fast share` wrote it is what there is in it: enough for the network and its evaluation, not to
    go on with the training.

    Raises:
        DanFastError: no such file, a truncated or damaged one, or not a checkpoint of this package; or a folder that
            cannot be read or does not say how the network was trained.
    """
    path = expanded(path)
    if path.is_dir():
        return _state_of_folder(path)
    if not path.is_file():
        raise DanFastError(
            f"{path} does not exist: name the checkpoint.pt of a run, or a folder of a shared network (`hf download` "
            "fetches one of the Hub)."
        )
    try:
        # PyTorch writes the checksums of the archive's parts and does not read them.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise DanFastError(f"{path} cannot be read ({error.strerror}); check permissions.") from error
    # Bytes that are no checkpoint make the readers fail in any way they can.
    except Exception as error:
        raise DanFastError(f"{path} is truncated or no checkpoint: use another one or train again.") from error
    if damaged:
        raise DanFastError(
            f"{path} is damaged, the checksum of {damaged} in it does not fit: use another one or train again."
        )
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DanFastError(
            f"{path} is not a checkpoint of this version of dan_fast ({FORMAT!r}); a network of another program is "
            "evaluated in Python, by dan_fast.evaluation.evaluate_dataset, or trained on from, by --model.weights."
        )
    return state


def is_checkpoint(path: Path) -> bool:
    """Whether the file is one of `save_checkpoint`, by this version or another."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(_MARK in archive.read(name) for name in pickles)
    # No such file, no permission, another format, as safetensors, or a damaged one, which raises many kinds.
    except Exception:
        return False


@contextmanager
def fitting_this_version(path: str | Path) -> Iterator[None]:
    """Inside, a checkpoint is read; one of another version, whose settings or tensors do not fit, is a DanFastError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise DanFastError(
            f"{path} does not fit this version of dan_fast ({reason}): use the version that wrote it, or train again."
        ) from error


def _state_of_folder(folder: Path) -> dict[str, Any]:
    if (folder / "checkpoint.pt").is_file():
        raise DanFastError(f"{folder} is the folder of a run: name the checkpoint.pt in it.")
    config, weights = read_folder(folder)
    training = config["training"]
    if not _is_of_this_package(training):
        raise DanFastError(
            f"{folder} does not say how its network was trained: read it with DAN.from_pretrained, or have "
            "`dan-fast share` write it from the checkpoint."
        )
    with fitting_this_version(folder):
        _require_one_network(folder, config["network"], training["settings"])
        num_classes = config["network"]["num_classes"]
    return {
        "config": training["settings"],
        **training["checkpoint"],
        "num_classes": num_classes,
        "preprocessing": config["preprocessing"],
        "model": {f"network.{name}": value for name, value in weights.items()},
        "evaluations": config["results"],
        "shared": training,
    }


def _is_of_this_package(training: Any) -> bool:
    """Whether what `DAN.save_pretrained` was given is of `dan_fast.training.shared.origin_of`, not one's own."""
    if not isinstance(training, dict):
        return False
    settings, checkpoint = training.get("settings"), training.get("checkpoint")
    if not isinstance(settings, dict) or not isinstance(checkpoint, dict):
        return False
    sections = [settings.get(name) for name in ("data", "model", "loss", "optimizer", "run")]
    return all(isinstance(each, dict) for each in sections) and {"epoch", "iteration"} <= checkpoint.keys()


def _require_one_network(folder: Path, network: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse one that was changed after its training: its settings would build another network."""
    of_settings = settings["model"] | {"image_size": list(settings["data"]["image_size"])}
    for name in ("backbone", "image_size", "attention", "reduction", "feature", "instance_norm"):
        if name in network and of_settings.get(name, network[name]) not in (network[name], "auto"):
            raise DanFastError(
                f"{folder} holds a network of {name} {network[name]!r} that was trained with {of_settings[name]!r}: "
                "read it with DAN.from_pretrained, or save it without `training`."
            )


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time: to save waits for the copy to host memory only.

    Where one could not be written, the next call of any method raises DanFastError, once.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dan-fast checkpoint")
        self._writing: Future[None] | None = None

    def is_free(self) -> bool:
        """Whether nothing is being written."""
        if self._writing is not None and self._writing.done():
            self.wait()
        return self._writing is None

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """`save_checkpoint` of what `state` is now, after what is being written."""
        self.wait()
        self._writing = self._pool.submit(save_checkpoint, path, _copied(state))

    def wait(self) -> None:
        """Wait for what is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _copied(state: Any) -> Any:
    """`state` on the host, in tensors of its own."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy(state)  # with the versions of its modules, which a module's state has as an attribute
        copied.update((name, _copied(value)) for name, value in state.items())
        return copied
    if isinstance(state, (list, tuple)):
        return type(state)(map(_copied, state))
    return state
