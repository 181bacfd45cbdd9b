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
from typing import Any

import torch

from dan_fast.bench.contenders import Contender, select
from dan_fast.bench.problem import Size, make_problem


def compile_seconds(
    contender: Contender, size: Size, dtype: torch.dtype, device: torch.device, budget_s: float
) -> float | str:
    """Seconds that the first calls of a compiled contender take, forward and with backward; or why they fail."""
    request = {
        "contender": contender.name,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    return trial("from dan_fast.bench.compiled import main; main()", request, budget_s)


def trial(statement: str, request: dict[str, Any], budget_s: float) -> float | str:
    """Seconds that `statement` prints in a process whose first argument is `request` as JSON; or why it fails."""
    command = [sys.executable, "-c", statement, json.dumps(request)]
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
        return float(output.split()[-1])
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    # The exception stands first, what it is about may follow in many lines.
    named = [line for line in lines if "Error" in line.partition(":")[0] or "Exception" in line.partition(":")[0]]
    return f"torch.compile failed: {(named or lines or [f'exit code {child.returncode}'])[-1][:300]}"


def main() -> None:
    """Compiles what the first argument asks for and prints the seconds."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    problem = make_problem(Size(*request["size"]), getattr(torch, request["dtype"]), request["device"], batches=1)
    (contender,) = select([request["contender"]])
    start = time.perf_counter()
    runner = contender.start(problem, 1)
    runner.outcome()
    runner.run(False)
    print(time.perf_counter() - start)
