"""What the tests of the benchmarks share: each as a command on a tiny problem, and what every file holds."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from torch import Tensor

from dan_fast.bench import BENCHMARKS
from dan_fast.bench.benchmark import Benchmark
from dan_fast.bench.rows import Row
from dan_fast.cli import main
from tests.support import ROOT

TINY = {
    "memory": {"labeled_slots": 60, "unlabeled_slots": 44, "key_dim": 24, "batch": 4, "repeat": 2, "steps": 2,
               "slots_scale": "1", "dtype": "float32"},
    "attention": {"batch": 3, "channels": 24, "height": 3, "width": 2, "reduction": 2, "classes": 5, "repeat": 2,
                  "contenders": "eager,kernels"},
    "iteration": {"backbone": "resnet18", "height": 64, "width": 32, "images": 8, "labeled_slots": 24,
                  "unlabeled_slots": 12, "classes": 6, "repeat": 1},
    "data": {"files": "32x16", "image_size": "[40,20]", "images": 12, "batch": 4, "workers": 1, "repeat": 2},
    "epoch": {"files": "64x32", "backbone": "resnet18", "images": 48, "batch": 8, "iterations": 2, "workers": 1,
              "order": "1", "repeat": 1, "threads": 1},
    "ranking": {"queries": 70, "gallery": 300, "width": 16, "ids": 20, "cams": 3, "repeat": 2, "threads": 1,
                "memory_queries": 200, "memory_gallery": 4000, "memory_width": 8},
    "search": {"features": 2000, "width": 32, "queries": 50, "repeat": 2, "threads": 1},
}  # fmt: skip
ENVIRONMENT = {"torch", "commit", "cpu", "threads", "date", "gpu", "driver"}


def command(name: str, *arguments: str) -> list[str]:
    flags = [word for flag, value in TINY[name].items() for word in (f"--{flag}", str(value))]
    return ["bench", name, "--device", "cpu", *flags, *arguments]


def tiny(name: str, **settings: Any) -> Benchmark:
    return BENCHMARKS[name][0](**{"device": "cpu"} | TINY[name] | settings)


def measured(name: str, **settings: Any) -> list[Row]:
    return [row for _, rows in tiny(name, **settings).measure() for row in rows]


def written(name: str, folder: Path, *arguments: str, printed: tuple[str, ...]) -> dict[str, Any]:
    """The file of a command that succeeds and prints these parts; what is true of every one is checked."""
    out = folder / "figures.json"
    with redirect_stdout(io.StringIO()) as output:
        assert main(command(name, *arguments, "--json", str(out))) == 0
    words = " ".join(output.getvalue().split())
    assert not [part for part in printed if part not in words], words
    content = json.loads(out.read_text())
    assert (content["schema"], content["benchmark"], content["complete"]) == (1, name, True)
    assert content["environment"].keys() >= ENVIRONMENT and content["meaning"].keys() >= {"seconds"}
    for row in content["rows"]:
        timings = row["seconds"]
        for timing in [timings] if timings and "median" in timings else (timings or {}).values():
            assert timing["repeats"] == len(timing["all"]) == content["settings"]["repeat"]
            assert 0 < timing["q1"] <= timing["median"] <= timing["q3"]
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
        assert row["extra_bytes"] is None or row["extra_bytes"] >= 0
    for path in ROOT.glob("benchmarks/results/[ch]*/*.json"):
        # What reads a new file also reads those that are committed.
        before = json.loads(path.read_text())
        if before["benchmark"] == name:
            assert before.keys() <= content.keys() and before["settings"].keys() <= content["settings"].keys()
            assert before["rows"][0].keys() <= content["rows"][0].keys()
    return content


def changed(outcome: Any, path: str, change: Callable[[Tensor], Tensor]) -> Any:
    """The same outcome but for the tensor at a path of fields and places, such as "labeled.usage" or "gradients.0"."""
    first, _, rest = path.partition(".")
    names = getattr(outcome, "_fields", [str(place) for place in range(len(outcome))])
    parts = {name: part for name, part in zip(names, outcome, strict=True)}
    parts[first] = changed(parts[first], rest, change) if rest else change(parts[first])
    return outcome._replace(**parts) if hasattr(outcome, "_fields") else tuple(parts.values())
