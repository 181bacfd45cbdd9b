"""A function in a process of its own: its memory is its own, and it can be stopped where it takes too long."""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from dan_fast.bench.rows import LeftOut, Row
from dan_fast.core.heap import heap_in_force, keep_heap

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def in_own_process(function: Callable[..., Any], budget_s: float | None = None, **arguments: Any) -> Any:
    """What a function of a module returns; it gets its arguments and gives its result by pickle.

    It has as many CPU threads as this process, and its heap is kept where this one's is.

    Raises:
        TimeoutError: it took longer than `budget_s` seconds and was stopped.
        LeftOut: it raised, what it is says in a line, or its process was killed.
    """
    request = pickle.dumps((torch.get_num_threads(), heap_in_force() == "kept", function, arguments))
    command = [sys.executable, "-c", "from dan_fast.bench.process import main; main()", str(os.getpid())]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A session of its own: what it has started has to stop too.
    child = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        output, errors = child.communicate(request, budget_s)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode == 0:
        return pickle.loads(output)
    lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
    # The exception stands first, what it is about may follow in many lines.
    named = [line for line in lines if "Error" in line.partition(":")[0] or "Exception" in line.partition(":")[0]]
    raise LeftOut((named or lines or [f"exit code {child.returncode}"])[-1][:300])


def main() -> None:
    """Runs what standard input asks for and writes the result to standard output; the argument is the parent.

    On Linux it is killed when its parent ends in whatever way; it leads a session of its own.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(sys.argv[1]):  # it had ended before
            os.kill(os.getpid(), signal.SIGKILL)
    results = os.fdopen(os.dup(1), "wb")
    # What is printed meanwhile is no part of the result.
    os.dup2(2, 1)
    threads, kept, function, arguments = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    if kept:
        keep_heap()
    with results:
        pickle.dump(function(**arguments), results)


def compile_trial(row: Row, make: Callable[[], Any], start: Callable[[Any], Any], budget_s: float) -> str | None:
    """Writes into the row how long the first calls take, forward and with backward; or returns why they fail.

    They run in a process of their own: stopped inside this one, the compiler would go on tracing the functions that it
    had begun with. What a trial that ends in time has compiled is found again in PyTorch's cache. `make` gives the
    problem and `start` the contender's runner on it; both are pickled.
    """
    try:
        row.compile_seconds = in_own_process(first_calls, budget_s, make=make, start=start)
    except TimeoutError:
        return f"torch.compile took more than {budget_s:.0f} s"
    except LeftOut as error:
        return f"torch.compile failed: {error}"
    return None


def first_calls(make: Callable[[], Any], start: Callable[[Any], Any]) -> float:
    """The seconds of the calls in which a contender is compiled."""
    problem, begin = make(), time.perf_counter()
    runner = start(problem)
    runner.run(True)
    runner.run(False)
    return time.perf_counter() - begin
