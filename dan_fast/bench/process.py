"""A function in a process of its own: its memory is its own, and it can be stopped where it takes too long."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch

from dan_fast.bench.rows import plain
from dan_fast.core.heap import heap_in_force, keep_heap


class ProcessFailed(Exception):
    """What the function raised, as a line."""


def in_own_process(function: Callable[..., Any], budget_s: float | None = None, **arguments: Any) -> Any:
    """What a function of a module returns; it gets its arguments and gives its result as JSON has them.

    It has as many CPU threads as this process, and its heap is kept where this one's is.

    Raises:
        TimeoutError: it took longer than `budget_s` seconds and was stopped.
        ProcessFailed: it raised, or its process was killed.
    """
    request = {
        "function": f"{function.__module__}:{function.__qualname__}",
        "arguments": plain(arguments),
        "threads": torch.get_num_threads(),
        "keep_heap": heap_in_force() == "kept",
    }
    command = [sys.executable, "-c", "from dan_fast.bench.process import main; main()", json.dumps(request)]
    # A session of its own: what it has started has to stop too.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, errors = child.communicate(timeout=budget_s)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode == 0:
        return json.loads(output.splitlines()[-1])
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    # The exception stands first, what it is about may follow in many lines.
    named = [line for line in lines if "Error" in line.partition(":")[0] or "Exception" in line.partition(":")[0]]
    raise ProcessFailed((named or lines or [f"exit code {child.returncode}"])[-1][:300])


def main() -> None:
    """Runs what the first argument asks for and prints its result as the last line."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    if request["keep_heap"]:
        keep_heap()
    print(json.dumps(resolve_name(request["function"])(**request["arguments"])))
