"""What a run writes down: means over a window of iterations, as TensorBoard scalars."""

import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dan_fast.core.errors import DanFastError
from dan_fast.data import ReIDDataset
from dan_fast.training.last_names import numbered


class Scalars:
    """Collects scalars and writes their means to `folder` every so often.

    Tensors are kept as they are until `flush`, so that a GPU is waited for once a window.

    Args:
        folder: TensorBoard's folder; None: nothing is collected, as by all ranks but one.
        steps_done: iterations done when the run continues; what it wrote of later ones before is dropped.

    Raises:
        DanFastError: `folder` cannot be written, here or in `flush`.
    """

    def __init__(self, folder: Path | None, steps_done: int = 0) -> None:
        self._folder = folder
        self._window: list[tuple[str, Tensor | float, Tensor | bool]] = []
        self._writer = None
        self._excepthook = threading.excepthook
        if folder is None:
            return
        with self._named_errors():
            if steps_done == 0:
                # Of an attempt that ended before its first checkpoint: kept, but no part of this run's curves.
                for file in folder.glob("*tfevents*"):
                    file.rename(file.with_name(file.name.replace("tfevents", "attempt")))
            part = max(map(part_of_run, folder.glob("*tfevents*")), default=0) + 1
            self._writer = SummaryWriter(
                str(folder),
                purge_step=steps_done + 1 if steps_done else None,
                # The names begin with the time, and clocks are set back.
                filename_suffix=f".part{part}",
            )
        threading.excepthook = self._leave_to_main_thread

    def add(self, name: str, value: Tensor | float, counts: Tensor | bool = True) -> None:
        """Put a value into the window.

        Args:
            value: () tensor or number.
            counts: () bool, whether the value is part of the mean; a tensor where the host does not know yet.
        """
        if self._writer is not None:
            # TensorBoard takes no other text; a name of a file may be any bytes.
            name = name.encode("utf-8", "backslashreplace").decode()
            self._window.append((name, value.detach() if isinstance(value, Tensor) else value, counts))

    def flush(self, step: int) -> dict[str, float]:
        """Write the means of the window as of `step`, forget it, and return them."""
        if self._writer is None:
            return {}
        values: dict[str, list[float]] = defaultdict(list)
        for name, value, counts in self._window:
            if counts:
                values[name].append(float(value))
        self._window.clear()
        means = {name: fmean(each) for name, each in values.items()}
        with self._named_errors():
            for name, mean in means.items():
                self._writer.add_scalar(name, mean, step)
            self._writer.flush()
        return means

    def close(self) -> None:
        """Close the event file."""
        # Flushed windows are on the disk, and a full one has had its sentence already.
        with suppress(OSError):
            if self._writer is not None:
                self._writer.close()
        if threading.excepthook == self._leave_to_main_thread:
            threading.excepthook = self._excepthook

    def _leave_to_main_thread(self, raised: threading.ExceptHookArgs) -> None:
        """What TensorBoard's thread could not write is raised by its next call too, and made a sentence of."""
        if not (isinstance(raised.exc_value, OSError) and type(raised.thread).__module__.startswith("tensorboard.")):
            self._excepthook(raised)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DanFastError(
                f"Scalars could not be written to {self._folder} ({error.strerror}): "
                "make room or choose another run.out."
            ) from error


def target_tags(targets: Sequence[ReIDDataset]) -> list[str]:
    """What scalars call the datasets that are tested on: their names, told apart where several have the same one.

    Two variants of a dataset, or two folders of one name, would else be averaged as one.

    Example:
        >>> root = Path("cuhk03")
        >>> boxes = [ReIDDataset("CUHK03", root, variant=f"{box}, new protocol") for box in ("labeled", "detected")]
        >>> target_tags([*boxes, ReIDDataset("street", Path("street"))])
        ['CUHK03-labeled_new_protocol', 'CUHK03-detected_new_protocol', 'street']
    """
    forms = [tag_forms(target.name, target.variant) for target in targets]
    names = [name for name, _ in forms]
    return numbered([full if names.count(name) > 1 else name for name, full in forms], "{}-{}")


def tag_forms(name: str, variant: str) -> tuple[str, str]:
    """What the tags of a dataset begin with, where no other has its name, and where one has."""
    name = name.replace("/", "-")  # a slash would part the tag
    # TensorBoard knows no other characters.
    return name, name + "-" * bool(variant) + re.sub(r"[^\w.-]+", "_", variant)


def part_of_run(events: Path) -> int:
    """The number of an event file of `Scalars` in its folder, from 1 on; 0 for files of others, or older ones."""
    found = re.search(r"\.part(\d+)$", events.name)
    return int(found[1]) if found else 0
