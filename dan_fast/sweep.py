"""`dan-fast sweep`: the trainings of a grid one after the other, each a process and a folder of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dan_fast.errors import DanFastError
from dan_fast.files import write_text
from dan_fast.reporting.report import report as write_page
from dan_fast.sweep_grid import PlannedRun, plan_sweep
from dan_fast.training.config import TrainConfig, training_differences
from dan_fast.training.interrupt import StopRequest

FINISHED, BEGUN, WAITING, FAILED = "finished", "begun", "waiting", "failed"
_LOG = "train.log"
_CHOICE = ("run", "choose_epoch_on_target")


def sweep(
    grid: str,
    base: str | None = None,
    out: str = "runs/sweep",
    report: bool = True,
    list: bool = False,
) -> None:
    """Train once for each combination of a grid's settings; the same command again goes on where it stopped.

    Each training is a process of its own with a folder named by its settings. Finished ones are skipped, one
    that was interrupted goes on from its checkpoint, and one that fails is recorded in sweep.json while the
    others go on; it is tried again the next time.

    Args:
        grid: YAML file with `grids`, a list of mappings of dotted settings to lists of values; or fig6, fig7,
            fig8 or table9 for those of the paper.
        base: YAML file with the settings that all trainings share, as for `dan-fast train --config`; without it the
            grid's own base.
        out: Folder of the trainings, of sweep.json and of the report.
        report: Write a report on the trainings at the end.
        list: Only show what would run, and what is finished.

    Raises:
        DanFastError: the grid cannot be read; a folder holds a training with other settings; another sweep is at
            work in the folder; or trainings failed, after all others were run.
        KeyboardInterrupt: it was asked to stop; the training that was under way has been saved.
    """
    runs = plan_sweep(grid, base, out)
    for run in runs:
        _require_same_settings(run)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if list:
        table = Table("run", "state")
        for run in runs:
            table.add_row(run.name, state_of(run))
        console.print(table)
        return
    with _alone(Path(out)) as lock:
        record = [_entry(run, state_of(run)) for run in runs]
        failed = _run_all(runs, record, Path(out), lock, console)
    if report:
        finished = [run.folder for run in runs if state_of(run) == FINISHED]
        if finished:
            console.print(f"Report: {write_page(finished, Path(out) / 'report')}")
    if failed:
        raise DanFastError(
            f"{len(failed)} of {len(runs)} trainings failed, the first being {failed[0]['name']}: "
            f"{failed[0]['sentence']} See {_LOG} in its folder; the same command tries again."
        )


def state_of(run: PlannedRun) -> str:
    """Whether a training is "finished", "begun" (has a checkpoint to go on from) or "waiting"."""
    try:
        json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
        done = True
    except (OSError, ValueError):
        done = False
    # With other targets the trainer only evaluates again.
    if done and (_saved_settings(run) or {}).get("data", {}).get("targets") == run.config.data.targets:
        return FINISHED
    return BEGUN if (run.folder / "checkpoint.pt").exists() else WAITING


def _run_all(
    runs: Sequence[PlannedRun], record: list[dict[str, Any]], out: Path, lock: int, console: Console
) -> list[dict[str, Any]]:
    with StopRequest() as stop:
        for number, (run, entry) in enumerate(zip(runs, record, strict=True), 1):
            where = f"[{number}/{len(runs)}] {run.name}"
            if entry["state"] == FINISHED:
                console.print(f"{where}: finished before.")
                continue
            console.print(f"{where}: {'goes on' if entry['state'] == BEGUN else 'starts'} ...")
            _write_record(out, record)
            started = time.monotonic()
            code = _train(run, lock, stop) if not stop.requested else None
            entry["seconds"] = round(time.monotonic() - started, 1)
            entry["state"] = state_of(run)
            if entry["state"] != FINISHED and not stop.requested:
                entry["state"], entry["sentence"] = FAILED, _sentence(run, code)
            _write_record(out, record)
            if stop.requested and entry["state"] != FINISHED:
                console.print(f"{where}: stopped. The same command goes on from here.")
                raise KeyboardInterrupt
            told = _results(run) if entry["state"] == FINISHED else f"failed: {entry['sentence']}"
            console.print(f"{where}: {told} ({entry['seconds']:.0f} s)")
            if stop.requested:
                raise KeyboardInterrupt
    _write_record(out, record)
    return [entry for entry in record if entry["state"] == FAILED]


def _train(run: PlannedRun, lock: int, stop: StopRequest) -> int:
    """The exit code of a training in its own process, which is told to save itself when `stop` is requested."""
    begun = (run.folder / "checkpoint.pt").exists()
    # Those of other targets: beside the new settings they would pass for theirs.
    (run.folder / "results.json").unlink(missing_ok=True)
    write_text(run.folder / "config.yaml", yaml.safe_dump(run.config.to_dict(), sort_keys=False))
    command = _command(run.folder, begun)
    with (run.folder / _LOG).open("ab") as log:
        # The lock is the child's too: should this process be killed, no other sweep starts beside it.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,))
        told = False
        while True:
            try:
                return process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                if stop.requested and not told:
                    process.send_signal(signal.SIGTERM)
                    told = True
            except BaseException:
                process.kill()
                process.wait()
                raise


def _command(folder: Path, begun: bool) -> Sequence[str]:
    command = [sys.executable, "-m", "dan_fast", "train", "--config", str(folder / "config.yaml")]
    return [*command, "--run.resume", "true" if begun else "false"]


def _sentence(run: PlannedRun, code: int | None) -> str:
    """Why a training failed: the last line it wrote, or the signal that ended it."""
    if code is not None and code < 0:
        return f"It was ended by {signal.Signals(-code).name}; SIGKILL often means that memory ran out."
    lines = (run.folder / _LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1].removeprefix("dan-fast: ") if said else f"It ended with exit code {code}."


def _results(run: PlannedRun) -> str:
    content = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    parts = [
        f"{each['dataset']} R1 {100 * each['cmc'][0]:.1f}, mAP {100 * each['mAP']:.1f}" for each in content["targets"]
    ]
    return "; ".join(parts) or "finished, no target to evaluate on"


def _require_same_settings(run: PlannedRun) -> None:
    """A folder with a training of other settings is neither taken for this one nor overwritten."""
    if not any((run.folder / name).exists() for name in ("checkpoint.pt", "results.json")):
        return
    saved, wanted, defaults = _saved_settings(run), run.config.to_dict(), TrainConfig().to_dict()
    if saved is None:
        raise DanFastError(f"{run.folder} holds a training without a readable config.yaml: choose another --out.")
    differences = training_differences(saved, wanted)
    # Of these a trainer that goes on sees to itself; a finished training has to be told from another one here.
    for section, name in (*(("data", role) for role in ("labeled", "unlabeled", "protocol")), _CHOICE):
        now, before = wanted[section][name], saved.get(section, {}).get(name, defaults[section][name])
        if before != now:
            differences.append(f"{section}.{name} is {now!r} here and {before!r} there")
    if differences:
        raise DanFastError(
            f"{run.folder} holds a training with other settings ({'; '.join(differences)}): choose another --out."
        )


def _saved_settings(run: PlannedRun) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _entry(run: PlannedRun, state: str) -> dict[str, Any]:
    return {"name": run.name, "settings": dict(run.settings), "state": state, "seconds": None, "sentence": ""}


def _write_record(out: Path, record: list[dict[str, Any]]) -> None:
    write_text(out / "sweep.json", json.dumps(record, indent=2) + "\n")


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """Holds the folder's lock, which the trainings that are started inherit; gives its descriptor."""
    # Here and not above: all other commands do without, and so does Windows.
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    with (out / ".sweep.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DanFastError(
                f"Another sweep, or a training that it started, is still at work in {out}: wait for it or stop it."
            ) from error
        yield file.fileno()
