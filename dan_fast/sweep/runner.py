"""`dan-fast sweep`: the trainings of a grid, some at a time, each a process and a folder of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import NO_LOCKS, write_text
from dan_fast.core.home import expanded
from dan_fast.core.launched import number_of_ranks
from dan_fast.core.signals import StopRequest
from dan_fast.core.terminal import PLAIN
from dan_fast.core.yaml_files import read_mapping
from dan_fast.evaluation import Evaluation
from dan_fast.reporting.arms import FINISHED, Comparison, read_comparison
from dan_fast.reporting.groups import caveats
from dan_fast.reporting.report import report as write_page
from dan_fast.sweep.grid import PlannedRun, plan_sweep
from dan_fast.sweep.table import write_table
from dan_fast.training.same_training import training_differences

BEGUN, WAITING, FAILED = "begun", "waiting", "failed"
RESULTS, SETTINGS, CHECKPOINT = "results.json", "config.yaml", "checkpoint.pt"
# What a training is started with. It writes config.yaml itself, and removes results of other targets first.
_GIVEN = "sweep.yaml"
_LOG = "train.log"
_COMPARED = "comparison.json"
_STOPPING = "Stopping when the trainings under way are saved; Ctrl-C again kills them, and what is not saved is lost."
# A continued training checks these itself; a finished one is not started again.
_CHECKED_HERE = ("data.labeled", "data.unlabeled", "data.protocol", "run.choose_epoch_on_target")
# What PyTorch and the libraries below it take as the number of their threads when they are loaded.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SECONDS_BETWEEN_LOOKS = 0.05


def sweep(
    grid: str,
    base: str | None = None,
    out: str = "runs/sweep",
    report: bool = True,
    list: bool = False,
    recipe: str | None = None,
    parallel: PositiveInt = 1,
) -> None:
    """Train once for each combination of a grid's settings; the same command again continues where it stopped.

    Each training is a process of its own with a folder named by its settings. Finished trainings are skipped, an
    interrupted one continues from its checkpoint, and one that fails is recorded in sweep.json while the others
    continue; it is tried again the next time. results.csv has a row for each target of each training. A grid with seeds
    or arms ends in a comparison: comparison.md, comparison.json and tables on the terminal and in the report.

    Args:
        grid: YAML file with `grids`, a list of mappings from dotted settings to lists of values, or with `arms`, a
            mapping from names to dotted settings. `seeds`, a list, trains each once per seed, and `baseline` names what
            the others are compared with. Or the name of a grid: fig6, fig7, fig8 or table9 for those of the paper, or
            recipes for plain, paper and dan with three seeds each.
        base: YAML file with the settings that all trainings share, as for `dan-fast train --config`; by default the
            grid's own base.
        out: Folder of the trainings, of sweep.json and of the report.
        report: Write a report on the trainings at the end.
        list: Only show what would run, and what is finished.
        recipe: Recipe of all trainings whose own settings name none, as for `dan-fast train`; without it that of the
            base, or else the grid's, or else dan.
        parallel: Number of trainings that run at a time. They share the cores: each gets an equal number of threads.

    Raises:
        DanFastError: the grid cannot be read; a folder holds a training with other settings; another sweep is at
            work in the folder; or trainings failed, after all others were run.
        KeyboardInterrupt: it was interrupted; the trainings that were running have been saved.
    """
    if number_of_ranks() > 1:
        raise DanFastError("A sweep starts a process for each training itself: call it without torchrun, once.")
    folder = expanded(out)
    runs = plan_sweep(grid, base, folder, recipe)
    for run in runs:
        _require_same_settings(run)
    console = Console(**PLAIN)
    if list:
        table = Table("run", "state")
        for run in runs:
            table.add_row(run.name, state_of(run))
        console.print(table)
        return
    with _alone(folder) as lock:
        before = _read_record(folder)
        record = [_entry(run, state_of(run), before.get(run.name, {})) for run in runs]
        failed = _run_all(runs, record, folder, lock, console, parallel)
        _write_comparison(read_comparison(folder), folder, console)
        finished = [run for run in runs if state_of(run) == FINISHED]
        write_table(finished, folder / "results.csv")
    if report and finished:
        console.print(f"Report: {write_page([run.folder for run in finished], folder / 'report')}")
    if failed:
        raise DanFastError(
            f"{len(failed)} of {len(runs)} trainings failed, the first being {failed[0]['name']}: "
            f"{failed[0]['sentence']} See {_LOG} in its folder; the same command tries again."
        )


def state_of(run: PlannedRun) -> str:
    """Whether a training is "finished", "begun" (has a checkpoint to go on from) or "waiting"."""
    with suppress(OSError, ValueError):
        json.loads((run.folder / RESULTS).read_text(encoding="utf-8"))
        data, wanted = (_settings_there(run.folder) or {}).get("data", {}), run.config.data
        # With other targets the trainer only evaluates again; in another root it looks for the images it learnt from.
        if (data.get("targets"), data.get("root")) == (wanted.targets, wanted.root):
            return FINISHED
    return BEGUN if (run.folder / CHECKPOINT).exists() else WAITING


@dataclass(frozen=True)
class _Training:
    """A training that is running."""

    where: str
    run: PlannedRun
    entry: dict[str, Any]
    process: subprocess.Popen[bytes]
    started: float


def _run_all(
    runs: Sequence[PlannedRun],
    record: list[dict[str, Any]],
    out: Path,
    lock: int,
    console: Console,
    parallel: int,
) -> list[dict[str, Any]]:
    waiting = deque(
        (f"[{number}/{len(runs)}] {run.name}", run, entry)
        for number, (run, entry) in enumerate(zip(runs, record, strict=True), 1)
    )
    active: list[_Training] = []
    threads = _threads_of_each(parallel)
    signalled, looked = False, time.monotonic()
    _write_record(out, record)
    with StopRequest(_STOPPING) as stop:
        try:
            while active or (waiting and not stop.requested):
                looked = _add_seconds(active, looked)
                while waiting and len(active) < parallel and not stop.requested:
                    where, run, entry = waiting.popleft()
                    if entry["state"] == FINISHED:
                        console.print(f"{where}: finished before.")
                        continue
                    console.print(f"{where}: {'goes on' if entry['state'] == BEGUN else 'starts'} ...")
                    _note_start(entry, threads, run.config.run.device)
                    _write_record(out, record)
                    try:
                        process = _start(run, lock, threads)
                        active.append(_Training(where, run, entry, process, time.monotonic()))
                    except (DanFastError, OSError) as error:
                        del entry["running"]
                        entry |= {"state": FAILED, "sentence": str(error)}
                        _write_record(out, record)
                        console.print(f"{where}: failed: {error}")
                if stop.requested and not signalled:
                    for training in active:
                        training.process.send_signal(signal.SIGTERM)
                    signalled = True
                for training in [each for each in active if each.process.poll() is not None]:
                    active.remove(training)
                    _note_end(training, stop.requested, console)
                    _write_record(out, record)
                if active:
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
        except BaseException as error:
            # At an error they save themselves; who presses Ctrl-C again does not want to wait for that.
            ending = signal.SIGKILL if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
            for training in active:
                training.process.send_signal(ending)
            for training in active:
                training.process.wait()
            raise
        if stop.requested:
            raise KeyboardInterrupt
    return [entry for entry in record if entry["state"] == FAILED]


def _add_seconds(active: Sequence[_Training], since: float) -> float:
    """Add up, for each training under way, the seconds of all of them from the time `since` on; returns the time now.

    Those that share a machine are slower: over its own seconds this is how many ran at once on average.
    """
    now = time.monotonic()
    for training in active:
        if training.entry["seconds_of_all"] is not None:
            training.entry["seconds_of_all"] += (now - since) * len(active)
    return now


def _start(run: PlannedRun, lock: int, threads: int | None) -> subprocess.Popen[bytes]:
    """Start a training in a process of its own, which saves itself when it is sent SIGTERM."""
    write_text(run.folder / _GIVEN, yaml.safe_dump(run.config.to_dict(), sort_keys=False))
    limits = {} if threads is None else dict.fromkeys(_THREADS, str(threads))
    with (run.folder / _LOG).open("ab") as log:
        # The child inherits the lock: if this process is killed, no other sweep starts while the child runs.
        return subprocess.Popen(
            _command(run.folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lock,),
            env={**os.environ, **limits},
        )


def _note_start(entry: dict[str, Any], threads: int | None, device: str) -> None:
    timed_on = {"threads": threads, "device": device}
    if entry["seconds"] is not None and any(entry[name] != value for name, value in timed_on.items()):
        # Seconds of two kinds are no time of a training.
        entry |= {"seconds": None, "timed": False}
    entry |= timed_on | {"running": True}


def _note_end(training: _Training, stopped: bool, console: Console) -> None:
    """Record how a training ended, and print it."""
    run, entry = training.run, training.entry
    del entry["running"]
    seconds = time.monotonic() - training.started
    if entry["timed"]:
        # The time of earlier calls is included.
        entry["seconds"] = round((entry["seconds"] or 0.0) + seconds, 2)
    entry["state"] = state_of(run)
    if entry["state"] != FINISHED and stopped:
        console.print(f"{training.where}: stopped. The same command goes on from here.")
        return
    if entry["state"] != FINISHED:
        entry["state"], entry["sentence"] = FAILED, _sentence(run, training.process.returncode)
    said = _results(run) if entry["state"] == FINISHED else f"failed: {entry['sentence']}"
    console.print(f"{training.where}: {said} ({entry['seconds'] or seconds:.0f} s)")


def _threads_of_each(parallel: int) -> int | None:
    """An equal share of the cores that this process may use; None for a single training, which takes its default."""
    if parallel == 1:
        return None
    # Not every system has this call.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // parallel)


def _write_comparison(comparison: Comparison | None, out: Path, console: Console) -> None:
    """Write a comparison beside its trainings, and print it; without one, remove that of an earlier grid."""
    if comparison is None:
        # A file of somebody's own is no JSON, or has other keys.
        with suppress(OSError, ValueError, AttributeError):
            if json.loads((out / _COMPARED).read_text(encoding="utf-8")).keys() >= {"baseline", "targets", "arms"}:
                (out / _COMPARED).unlink()
                (out / "comparison.md").unlink(missing_ok=True)
        return
    write_text(out / _COMPARED, json.dumps(comparison.to_dict(), indent=2) + "\n")
    write_text(out / "comparison.md", comparison.markdown())
    console.print(comparison.markdown(), end="")
    console.print(f"Comparison: {out / 'comparison.md'}")


def _command(folder: Path) -> Sequence[str]:
    return [sys.executable, "-m", "dan_fast", "train", "--config", str(folder / _GIVEN), "--run.resume", "auto"]


def _sentence(run: PlannedRun, code: int | None) -> str:
    """Why a training failed: the last line it wrote, or the signal that ended it."""
    if code is not None and code < 0:
        return f"It was ended by {signal.Signals(-code).name}; SIGKILL often means that memory ran out."
    lines = (run.folder / _LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    written = [line.strip() for line in lines if line.strip()]
    return written[-1].removeprefix("dan-fast: ") if written else f"It ended with exit code {code}."


def _results(run: PlannedRun) -> str:
    content = json.loads((run.folder / RESULTS).read_text(encoding="utf-8"))
    found = [Evaluation.from_dict(each) for each in content["targets"]]
    parts = [f"{each.title} R1 {100 * each.cmc[0]:.1f}, mAP {100 * each.mAP:.1f}{_marks(each)}" for each in found]
    return "; ".join(parts) or "finished, no target to evaluate on"


def _marks(evaluation: Evaluation) -> str:
    """Why figures do not compare with others, in parentheses; "" for most."""
    marks = caveats(f"{evaluation.epoch}; {evaluation.seen}")
    return f" ({'; '.join(marks)})" if marks else ""


def _settings_there(folder: Path) -> dict[str, Any] | None:
    """What config.yaml in the folder holds, the settings of results.json beside it; None where it cannot be read."""
    with suppress(DanFastError):
        settings = read_mapping(folder / SETTINGS, "the settings of a run")
        if all(isinstance(values, Mapping) for section, values in settings.items() if section != "recipe"):
            return settings
    return None


def _require_same_settings(run: PlannedRun) -> None:
    """Refuse a folder with a training of other settings, which is neither continued nor overwritten."""
    if not any((run.folder / name).exists() for name in (CHECKPOINT, RESULTS)):
        return
    saved = _settings_there(run.folder)
    if saved is None:
        raise DanFastError(f"{run.folder} holds a training without a readable config.yaml: choose another --out.")
    if differences := training_differences(saved, run.config.to_dict(), also=_CHECKED_HERE):
        raise DanFastError(
            f"{run.folder} holds a training with other settings ({'; '.join(differences)}): choose another --out."
        )


def _entry(run: PlannedRun, state: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a training in sweep.json; its time so far is kept, unless it starts anew.

    It has no time where a part is not known: of a call that was killed, or that this record does not have.
    """
    if state == WAITING:
        before = {"timed": True, "seconds_of_all": 0.0}
    timed = before.get("timed", bool(before)) and not before.get("running", False)
    entry = {"name": run.name, "settings": dict(run.settings), "state": state, "sentence": ""}
    entry |= {name: before.get(name) for name in ("seconds", "seconds_of_all", "threads", "device")} | {"timed": timed}
    if not timed:
        entry["seconds"] = None
    if run.arm:
        config = run.config
        entry |= {"arm": run.arm, "baseline": run.baseline, "seed": config.run.seed, "recipe": config.recipe_words}
    return entry


def _read_record(out: Path) -> dict[str, dict[str, Any]]:
    """What an earlier call wrote, by the names of the trainings; nothing where it cannot be read."""
    try:
        record = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
        return {entry["name"]: entry for entry in record}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _write_record(out: Path, record: list[dict[str, Any]]) -> None:
    """Write the entries; those of trainings that another grid planned stay, for when they are planned again."""
    names = {entry["name"] for entry in record}
    others = [entry | {"planned": False} for name, entry in _read_record(out).items() if name not in names]
    write_text(out / "sweep.json", json.dumps(record + others, indent=2) + "\n")


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """As `dan_fast.core.files.alone`, by a lock that trainings hold too, until the last one ends; Unix only.

    Yields the descriptor of the lock, for them to inherit. Its file stays, as they may still hold it.
    """
    # Imported here: Windows does not have it.
    import fcntl

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".sweep.lock").open("w")
    except OSError as error:
        raise DanFastError(f"{out} cannot be written ({error.strerror}): choose another --out.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DanFastError(
                f"Another sweep, or a training that it started, is still at work in {out}: wait for it or stop it."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise DanFastError(f"{out} cannot be locked ({error.strerror}): choose another --out.") from error
        yield lock.fileno()
