"""`dan-fast doctor`: what was built, which path each operator takes, and what to do about what is missing."""

import importlib.metadata
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import distributed

import dan_fast
from dan_fast import __version__, _extension, triton_kernels
from dan_fast._sources import AGAIN, source_hash
from dan_fast.core.heap import why_heap_is_left
from dan_fast.evaluation import counting


class Report(NamedTuple):
    """What `dan-fast doctor` prints.

    Attributes:
        versions: name and version of everything that decides how dan_fast runs.
        built: part of the extension and what is in it, and what becomes of freed memory.
        paths: operator, device, path it takes there.
        gpus: index, name, compute capability, memory in GiB, whether the kernels run on it.
        advice: for each thing missing, one sentence of what it is and what to do.
        broken: for each thing that is there and does not work, one such sentence.
    """

    versions: list[tuple[str, str]]
    built: list[tuple[str, str]]
    paths: list[tuple[str, str, str]]
    gpus: list[tuple[str, str, str, str, str]]
    advice: list[str]
    broken: list[str]

    @property
    def exit_code(self) -> int:
        """0, or 1 if something is broken; a machine without a GPU or a compiler is not."""
        return 1 if self.broken else 0


def report() -> Report:
    """Find out what was built and what is missing; loads the extension, and on a GPU Triton builds its launcher.

    Example:
        >>> report().versions[0][0]
        'dan_fast'
    """
    info = _extension.build_info()
    advice, broken = [], []
    if not _extension.loaded():
        (broken if _extension.LIBRARY.is_file() else advice).append(str(_extension.why_not()))
    advice += [sentence for sentence in info.get("missing", []) if sentence not in advice]
    ranking = counting.load()
    if isinstance(ranking, str) and ranking not in advice:
        (broken if counting.MODULE.is_file() else advice).append(ranking)
    if stale(info):
        broken.append(f"csrc or python_bindings changed since the extension was built; {AGAIN}")
    gpus = list(_gpus())
    if torch.version.cuda is None and torch.version.hip is None:
        advice.append("this PyTorch is a CPU build; for a GPU install a CUDA build of torch and torchvision")
    elif not gpus:
        advice.append("no GPU was found, so everything runs on the CPU; if there is one, see what `nvidia-smi` says")
    for index in range(len(gpus)):
        reason = _extension.why_not_on("cuda", index) or triton_kernels.why_not(index)
        if reason is not None and reason not in advice + broken:
            advice.append(reason)
    return Report(_versions(info), _built(info), _paths(bool(gpus)), gpus, advice, broken)


def print_report() -> int:
    """Prints `report()` as tables and returns its exit code."""
    console = Console(emoji=False)
    found = report()
    console.print(_table("Versions", ("", ""), found.versions))
    console.print(_table("Extension", ("", ""), found.built))
    console.print(_table("Operators", ("operator", "device", "path"), found.paths))
    if found.gpus:
        console.print(_table("GPUs", ("", "name", "capability", "memory", "kernels"), found.gpus))
    for sentence in found.broken:
        console.print(f"[red]broken[/red]: {escape(sentence)}")
    for sentence in found.advice:
        console.print(f"[yellow]missing[/yellow]: {escape(sentence)}")
    if not found.broken and not found.advice:
        console.print("[green]everything is there[/green]")
    return found.exit_code


def stale(info: dict) -> bool:
    """Whether this is a checkout whose native sources differ from those that were built, by `_extension.build_info`."""
    root = Path(dan_fast.__file__).resolve().parents[1]
    # Of several Pythons that share a checkout, each has a ranking of its own.
    built_from = {info.get("source_hash"), info.get("rankings", {}).get(counting.MODULE.name)} - {None}
    return (root / "csrc").is_dir() and any(each != source_hash(root) for each in built_from)


def _versions(info: dict) -> list[tuple[str, str]]:
    rows = [("dan_fast", __version__), ("Python", platform.python_version()), ("torch", torch.__version__)]
    for name in ("torchvision", "triton"):
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    rows += [
        ("CUDA of torch", torch.version.cuda or "none, a CPU build"),
        ("NVIDIA driver", _driver_version()),
        ("compiler of the build", info.get("compiler", "none")),
        ("nvcc of the build", info.get("nvcc", "none")),
        ("torch of the build", info.get("torch_headers", "none")),
        ("between processes", _backends()),
    ]
    return rows


def _backends() -> str:
    """What carries tensors between the processes that torchrun starts."""
    if not distributed.is_available():
        return "nothing, this torch lacks torch.distributed"
    found = ["gloo on CPUs"] if distributed.is_gloo_available() else []
    if distributed.is_nccl_available() and torch.cuda.is_available():
        found.append(f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))} on GPUs")
    return ", ".join(found) or "nothing"


def _driver_version() -> str:
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[0] if found else "unknown" if torch.cuda.is_available() else "none"


def _built(info: dict) -> list[tuple[str, str]]:
    left = why_heap_is_left()
    kept = "freed blocks are kept by train, evaluate, extract, search, quickstart and bench"
    heap = ("heap on a CPU", kept if left is None else left)
    if not _extension.loaded():
        return [("CPU kernels", "no"), ("CUDA kernels", "no"), heap]
    cuda = f"yes, for {', '.join(info.get('cuda_archs', []))}" if _extension.has_cuda_kernels() else "no"
    cpu = f"yes, for {torch.ops.dan_fast.instruction_set()} of {', '.join(info.get('instruction_sets', []))}"
    return [("CPU kernels", cpu), ("CUDA kernels", cuda), heap]


def _paths(with_gpu: bool) -> list[tuple[str, str, str]]:
    rows = []
    places = [("cpu", "C++", "C++"), *([("cuda", "CUDA", "Triton")] if with_gpu else [])]
    for device, kernel, of_passes in places:
        served = _extension.why_not_on(device) is None
        passes_served = served and (device == "cpu" or triton_kernels.why_not(0) is None)
        rows += [
            ("row_sq_norms", device, f"{kernel} kernel" if served else "PyTorch"),
            ("memory_step: passes over the memories", device, f"{of_passes} kernels" if passes_served else "PyTorch"),
            ("memory_step: scan", device, f"{kernel} kernel" if served else "PyTorch, in score space"),
            ("cosine_softmax, false_sample_sets", device, f"{kernel} kernels" if served else "PyTorch"),
            ("attention_head", device, f"{kernel} kernels" if served else "PyTorch"),
            ("nl_cbam, attention_adversary", device, f"{kernel} kernels" if served else "PyTorch"),
        ]
    ranks = _extension.enabled() and not isinstance(counting.load(), str)
    return [*rows, ("ranking by distances or features", "cpu", "C++ kernel" if ranks else "PyTorch")]


def _gpus() -> Iterable[tuple[str, str, str, str, str]]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        yield (
            str(index),
            properties.name,
            f"{properties.major}.{properties.minor}",
            f"{properties.total_memory / 2**30:.1f} GiB",
            "run" if _extension.why_not_on("cuda", index) is None else "do not run",
        )


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
