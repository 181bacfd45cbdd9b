"""A trial compile in a process of its own: it can be stopped when it takes too long, which leaves nothing behind.

Stopped inside, the compiler would go on tracing the functions that it had begun with. What a trial that ends in time
has compiled is found again in PyTorch's cache.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch

from dan_fast.bench.rows import Row, plain


def compile_trial(row: Row, prepare: Callable[..., Callable], budget_s: float, **arguments: Any) -> str | None:
    """Writes into the row how long the first calls take, forward and with backward; or returns why they fail.

    Args:
        row: of a compiled contender.
        prepare: a function of a module; returns what starts the contender's runner.
        budget_s: seconds it may take.
        arguments: of `prepare`, which gets them as JSON has them.
    """
    where = f"{prepare.__module__}:{prepare.__qualname__}"
    request = {"prepare": where, "arguments": plain(arguments), "threads": torch.get_num_threads()}
    command = [sys.executable, "-c", "from dan_fast.bench.compiled import main; main()", json.dumps(request)]
    # A session of its own: the compiler starts helpers, which have to stop too.
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, errors = child.communicate(timeout=budget_s)
    except subprocess.TimeoutExpired:
        return f"torch.compile took more than {budget_s:.0f} s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode == 0:
        row.compile_seconds = float(output.split()[-1])
        return None
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    # The exception stands first, what it is about may follow in many lines.
    named = [line for line in lines if "Error" in line.partition(":")[0] or "Exception" in line.partition(":")[0]]
    return f"torch.compile failed: {(named or lines or [f'exit code {child.returncode}'])[-1][:300]}"


def main() -> None:
    """Compiles what the first argument asks for and prints the seconds."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    begin = resolve_name(request["prepare"])(**request["arguments"])
    start = time.perf_counter()
    runner = begin()
    runner.outcome()
    runner.run(False)
    print(time.perf_counter() - start)
