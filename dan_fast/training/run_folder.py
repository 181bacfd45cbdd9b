"""The folder of a run: one process at a time writes to it, and its checkpoint is what the run goes on from."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import alone, holder_of, printable, remove_unfinished, write_text
from dan_fast.core.free_memory import why_too_large
from dan_fast.core.launched import local_ranks
from dan_fast.core.yaml_files import read_mapping
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.launch import gathered, largest, rank_in, ranks_in
from dan_fast.training.checkpoint import CheckpointWriter, load_checkpoint
from dan_fast.training.config import RunConfig, TrainConfig, goes_on
from dan_fast.training.memory_shards import remove_shards, write_checkpoint_of_ranks
from dan_fast.training.recipes import dotted, over
from dan_fast.training.same_training import require_same_training

# A run that goes on may have them otherwise, and its results are then others.
_OF_RESULTS = ("data.targets", "data.protocol", "data.root", "run.choose_epoch_on_target")


class RunFolder:
    """Where a run keeps its files.

    Args:
        run: the folder, and when checkpoints are due.
        group: ranks that train together, with one folder; rank 0 writes, but for what only another one has.

    Attributes:
        path: the folder; checkpoint: the file checkpoint.pt in it.
    """

    def __init__(self, run: RunConfig, group: ProcessGroup | None = None) -> None:
        self._group = group
        self._writes = rank_in(group) == 0
        self.path = Path(run.out)
        self.checkpoint = self.path / "checkpoint.pt"
        if self.path.exists() and not self.path.is_dir():
            raise DanFastError(f"{self.path} is a file: name another run.out, the folder of a run.")
        if printable(run.out) != run.out:
            # TensorBoard encodes the names of its files as UTF-8.
            raise DanFastError(f"run.out is {ascii(run.out)}, which is no UTF-8: choose a name that is.")
        self._lock = self.path / ".run.lock"
        self._run = run
        self._found = _mark(self.checkpoint)
        self._writer = CheckpointWriter()
        self._is_torn = False
        self.note_saved(0)

    def saved_state(self, config: TrainConfig) -> dict[str, Any] | None:
        """The state to go on from; None where the run starts.

        Raises:
            DanFastError: a checkpoint is there and is not to be continued, or the other way round, or it is one of
                other settings or, with a batch for each, of another number of ranks; or where the run starts there is a
                config.yaml or results.json that no run has written; and as `load_checkpoint`.
        """
        if not goes_on(self._run):
            if self.checkpoint.exists():
                raise DanFastError(
                    f"{self.path} already holds a run: add --run.resume true to continue it or choose another run.out."
                )
            self._require_no_others_files()
            return None
        if not self.checkpoint.exists():
            raise DanFastError(
                f"{self.checkpoint} does not exist, so there is no run to continue: set run.resume to auto or false, "
                "or run.out to the folder of a run."
            )
        self._require_room()
        state = load_checkpoint(self.checkpoint)
        if "optimizer" not in state:
            raise DanFastError(
                f"{self.checkpoint} holds a network to evaluate, such as that of a chosen epoch, and no training to "
                "continue: put the run's own back, or name this one as model.weights of another run."
            )
        require_same_training(state["config"], config.to_dict(), self.checkpoint)
        before, ranks = state.get("ranks", 1), ranks_in(self._group)
        if config.data.batch_size_per_rank and before != ranks:
            raise DanFastError(
                f"{self.checkpoint} was trained on {before} ranks with a batch for each, and here are {ranks}: use as "
                "many, or another run.out."
            )
        return state

    def _require_no_others_files(self) -> None:
        """Refuse to write over a configuration and results that no run has left here."""
        is_of_run = not TrainConfig().to_dict().keys() - {"recipe"} - self._settings_there().keys()
        results = self.path / "results.json"
        others = {self.path / "config.yaml": not is_of_run, results: not (is_of_run or _are_results(results))}
        for file, is_others in others.items():
            if is_others and file.exists():
                raise DanFastError(
                    f"{file} is not of a run, which would write over it: rename it, or choose another run.out."
                )

    def _require_room(self) -> None:
        """Refuse a checkpoint that each rank of this machine would read whole, where that is too much."""
        if self._group is not None and self.checkpoint.is_file():
            needed = local_ranks() * self.checkpoint.stat().st_size
            too_large = why_too_large(torch.device("cpu"), needed, f"{self.checkpoint}, read by {local_ranks()} ranks,")
            if too_large:
                raise DanFastError(f"{too_large}: continue on fewer ranks a machine, or on more machines.")

    def require_same_images(self, saved: dict[str, Any] | None, fingerprint: str) -> None:
        """Refuse to go on from `saved` with other images than it was trained on.

        Raises:
            DanFastError: the fingerprints of the training sets differ.
        """
        if saved is not None and saved["fingerprint"] != fingerprint:
            raise DanFastError(
                f"{self.checkpoint} was trained on other images than data.labeled and data.unlabeled hold now, or "
                "their folders have other names: restore them or choose another run.out."
            )

    def write_settings(self, config: TrainConfig) -> None:
        """Write config.yaml, after results.json of other targets, or of another choice of the epoch, is removed.

        A run that is killed before it has new results must not leave the old ones beside settings that they are not of.

        Raises:
            DanFastError: see `write_text`; or a rank does not see the folder of rank 0.
        """
        if self._writes:
            if _what_is_reported(self._settings_there()) != _what_is_reported(config.to_dict()):
                (self.path / "results.json").unlink(missing_ok=True)
            # Of the training, for others to start from, not of this call, which may go on with it.
            settings = config.to_dict()
            settings["run"]["resume"] = False
            write_text(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        largest(self._group, 0)  # from here on rank 0 holds the folder
        seen = gathered(self._group, holder_of(self._lock))
        for rank, holder in enumerate(seen):
            if holder != seen[0]:
                raise DanFastError(
                    f"Rank {rank} does not see {self.path} as rank 0 has it: "
                    "put run.out on a file system that all machines share."
                )

    def _settings_there(self) -> dict[str, Any]:
        """Those of config.yaml; none where it cannot be read."""
        try:
            return read_mapping(self.path / "config.yaml", "the settings of a run")
        except DanFastError:
            return {}

    @contextmanager
    def whole_iteration(self) -> Iterator[None]:
        """Around an iteration and its count: where an error leaves it, what is in memory is no state to go on from."""
        self._is_torn = True
        yield
        self._is_torn = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process trains in the folder; what is being written is whole when it is left by an error.

        Results and the chosen epoch of an earlier run, whose checkpoint is gone, are removed: they would be taken
        for those of this one.

        Raises:
            DanFastError: another process trains in it, or has since this object was made; or see `whole_iteration`.
        """
        if self._is_torn:
            raise DanFastError(
                f"This training was stopped in the middle of an iteration: begin anew from {self.checkpoint}, by a "
                "trainer with run.resume auto."
            )
        with alone(self._lock) if self._writes else nullcontext():
            if self._writes:
                remove_unfinished(self.path)
                if _mark(self.checkpoint) != self._found:
                    raise DanFastError(
                        f"Another process has written {self.checkpoint} since this one began: start it again."
                    )
                if not self.checkpoint.exists():
                    for name in ("results.json", "chosen.pt"):
                        (self.path / name).unlink(missing_ok=True)
            try:
                yield
            except BaseException:
                # The error that led here is the one to raise.
                with suppress(DanFastError), self._unsaved_if_it_fails():
                    self._writer.wait()
                raise
            finally:
                found, self._found = self._found, _mark(self.checkpoint)
                if self._group is None and self._found != found:
                    remove_shards(self.path)  # of ranks that trained here before

    def write_checkpoint(
        self, state: dict[str, Any], features: Mapping[str, Tensor], iterations_done: int, wait: bool
    ) -> None:
        """Write `state` as checkpoint.pt; collective, and waited for, where there are several ranks.

        Args:
            state: see `save_checkpoint`.
            features: of the memory's slots that this rank holds of several, see `parted_state`.
            iterations_done: of the run.
            wait: whether to wait until it is written, and not for the copy to host memory only.

        Raises:
            DanFastError: this checkpoint or an earlier one could not be written.
        """
        with self._unsaved_if_it_fails():
            if self._group is None:
                self._writer.save(self.checkpoint, state)
            else:
                write_checkpoint_of_ranks(self._group, self.checkpoint, state, features, iterations_done)
            self.note_saved(iterations_done)
            if wait:
                self._writer.wait()

    def note_saved(self, iterations_done: int) -> None:
        """The run is saved up to here: the next checkpoint is due so much later."""
        self._saved_at = iterations_done, time.monotonic()

    @contextmanager
    def _unsaved_if_it_fails(self) -> Iterator[None]:
        """Around what raises that a checkpoint could not be written: a later `is_behind` knows."""
        try:
            yield
        except DanFastError:
            self.note_saved(-1)
            raise

    def is_behind(self, iterations_done: int) -> bool:
        """Whether iterations were done that no checkpoint holds; what is being written is waited for."""
        # The checkpoint that is due now says so, if there still is no room.
        with suppress(DanFastError), self._unsaved_if_it_fails():
            self._writer.wait()
        return iterations_done > self._saved_at[0]

    def checkpoint_is_due(self, iterations_done: int) -> bool:
        """Whether a checkpoint within an epoch is to be written; by rank 0's clock, and collective.

        Raises:
            DanFastError: an earlier one could not be written; raised once.
        """
        (iterations, seconds), run = self._saved_at, self._run
        due = time.monotonic() - seconds >= run.checkpoint_every_s or (
            0 < run.checkpoint_every <= iterations_done - iterations
        )
        with self._unsaved_if_it_fails():
            # In this order: what could not be written is raised at once.
            return bool(largest(self._group, self._writes and self._writer.is_free() and due)[0])


def _what_is_reported(settings: dict[str, Any]) -> list[Any]:
    """The values of the settings that decide which figures results.json holds; None where there is no such section."""
    defaults = {section: values for section, values in TrainConfig().to_dict().items() if section in settings}
    found = dotted(over(defaults, settings))
    return [found.get(name) for name in _OF_RESULTS]


def _are_results(file: Path) -> bool:
    """Whether a run has written this file."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"epoch", "targets"} <= content.keys()


def _mark(path: Path) -> tuple[int, int, int] | None:
    """By which a file is distinguished from another one that took its place; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
