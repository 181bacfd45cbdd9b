"""Folders of trainings as a report sees them: settings, results, scalars and checkpoint."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import printable
from dan_fast.data.datasets.load import MANIFEST
from dan_fast.data.named_protocols import PROTOCOLS
from dan_fast.evaluation import Evaluation
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.reporting.curves import read_scalars
from dan_fast.training.build import trained_network
from dan_fast.training.config import TrainConfig, as_list
from dan_fast.training.recipes import dotted, recipe_words

# Settings of where a run takes place and what it is tested on: they do not change what it learns.
_BESIDE_LEARNING = {
    f"data.{name}" for name in ("workers", "targets", "broken_images", "protocol", "root", "cache", "cache_check")
}
_LEARNING_IN_RUN = {"run.seed", "run.precision"}

# Fig. 6, by attention, adversary and whether the dimension reduction ratio is 1.
_FIG6 = {
    ("none", False): "B",
    ("spatial", False): "B+SA",
    ("non_local", False): "B+NL",
    ("nl_cbam", False): "B+NL-CBAM",
    ("cbam", True): "B+CBAM+AAN",
    ("nl_cbam", True): "B+NL-CBAM+AAN",
}
FIG6_ORDER = ("B", "B+SA", "B+NL", "B+NL-CBAM", "B+CBAM+AAN", "B+NL-CBAM*+AAN", "B+NL-CBAM+AAN")
_PAPERS_REDUCTION = 12


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: what tables and legends call it, unique among the runs of a report.
        folder: where it lies.
        settings: section -> name -> value, complete; what config.yaml does not name has its default.
        labeled, unlabeled: the datasets it was trained on, by their titles, or by the names of their folders where it
            did not record them; no unlabelled ones where none of their images is used.
        results: evaluations of the trained network, one for each target and protocol.
        baselines: (features, evaluation) of the network before its training and of chance, where they were evaluated.
        complaints: whole sentences on files that are there and cannot be read.
        recipe: its recipe and what was changed on top of it, in words; "" for none.
        iterations: of an epoch; None where neither results.json nor the settings give them, as while it trains.
        ranks: that trained together; 1 where that was not recorded.
        skipped: how many training images could not be decoded.
        started_from: the trainings before it in words, the last one first, where it started from a trained network.
    """

    name: str
    folder: Path
    settings: Mapping[str, Mapping[str, Any]]
    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    results: tuple[Evaluation, ...] = ()
    baselines: tuple[tuple[str, Evaluation], ...] = ()
    complaints: tuple[str, ...] = ()
    recipe: str = ""
    iterations: int | None = None
    ranks: int = 1
    started_from: Sequence[str] = ()
    skipped: int = 0

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @cached_property
    def scalars(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What :func:`read_scalars` gives; empty where nothing was logged."""
        try:
            return read_scalars(self.folder)
        except DanFastError:
            return {}

    def from_to(self, titles: Mapping[str, str], form: str) -> str:
        """The first and the last value of each scalar that was logged, in words; `titles` by their tags."""
        curves = {title: self.scalars[tag][1] for tag, title in titles.items() if tag in self.scalars}
        return ", ".join(f"{title} from {values[0]:{form}} to {values[-1]:{form}}" for title, values in curves.items())

    @property
    def sources(self) -> str:
        """What it was trained on, in words."""
        words = list(self.labeled)
        share = self.settings["data"]["unlabeled_share"]
        part = "unlabelled" if share == 1 else f"{100 * share:g} % unlabelled"
        here = " + ".join([*words, *(f"{word} ({part})" for word in self.unlabeled)])
        broken = f" without {self.skipped} images that could not be decoded" if self.skipped else ""
        return ", after ".join([here + broken, *self.started_from])

    @property
    def model(self) -> str:
        """The network as Fig. 6 names it."""
        model = self.settings["model"]
        attention, adversary, reduction = model["attention"], model["adversary"], model["reduction"]
        name = _FIG6.get((attention, adversary), f"B+{attention}{'+AAN' * adversary}")
        if reduction == 1 and "NL-CBAM" in name:
            return name.replace("NL-CBAM", "NL-CBAM*")
        return name if reduction == _PAPERS_REDUCTION or name in ("B", "B+SA") else f"{name}, r = {reduction}"

    def learning(self) -> dict[str, Any]:
        """The settings that decide what is learnt, by their dotted names; a protocol is the datasets that it names."""
        found = {
            name: value
            for name, value in dotted(self.settings).items()
            if (not name.startswith("run.") or name in _LEARNING_IN_RUN) and name not in _BESIDE_LEARNING
        }
        if self.settings["data"]["batch_size_per_rank"]:
            found |= {"data.batch_size": self.ranks * found["data.batch_size"], "data.batch_size_per_rank": False}
        if (protocol := PROTOCOLS.get(self.settings["data"]["protocol"])) is not None:
            found |= {f"data.{role}": list(titles) for role, titles in _sources(self.settings["data"]).items()}
            found["data.images"] = protocol.images
        return found


def dataset_word(path: str) -> str:
    """What to call a dataset of which only the path is known: its folder's name, or that of a manifest of its own name.

    Example:
        >>> dataset_word("data/street/manifest.csv"), dataset_word("data/mall.csv"), dataset_word("data/VIPeR.v1.0")
        ('street', 'mall', 'VIPeR.v1.0')
    """
    place = Path(path)
    if place.suffix.lower() != ".csv":
        return place.name
    return place.parent.name if place.name == MANIFEST and place.parent.name else place.stem


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in folders of trainings, and in folders of such folders, as a sweep leaves them.

    Raises:
        DanFastError: a path is no folder or holds no training.
    """
    folders: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise DanFastError(f"{path} is no folder: name folders of trainings, which hold a config.yaml.")
        inner = (
            [path] if (path / "config.yaml").is_file() else sorted(each.parent for each in path.glob("*/config.yaml"))
        )
        if not inner:
            raise DanFastError(
                f"{path} holds no training: name folders with a config.yaml, or a folder of such folders."
            )
        folders += inner
    unique = list({folder.resolve(): folder for folder in folders}.values())
    return [_read_run(folder, name) for folder, name in zip(unique, _names(unique), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as distinguish the folders."""
    parts = [tuple(map(printable, folder.resolve().parts)) for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    # The folder of a quickstart's run is always called `run`.
    return ["/".join(each[-2:]) if name == "run" else name for name, each in zip(names, parts, strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    settings, recipe = _read_settings(folder / "config.yaml")
    data = settings["data"]
    results: list[Evaluation] = []
    baselines: list[tuple[str, Evaluation]] = []
    complaints: list[str] = []
    said: dict[str, Any] = {}
    # The trainer's own results first.
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.name != "results.json", path.name)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.name == "results.json":
                said = _said(content, data["iterations"])
                content = content["targets"]
            if not isinstance(content, list):
                continue
            if not _is_of(folder, content):
                complaints.append(f"{path} is of other weights than those of this run: evaluate it again.")
                continue
            for entry in content:
                features, evaluation = entry.get("features", "trained"), Evaluation.from_dict(entry)
                evaluation = replace(evaluation, dataset=printable(evaluation.dataset))
                if features != "trained":
                    baselines.append((features, evaluation))
                elif evaluation not in results:
                    results.append(evaluation)
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, OSError) as error:
            complaints.append(f"{path} holds no evaluations of this version ({error}): evaluate the run again.")
    said = _sources(data) | said
    if data["unlabeled_share"] == 0:
        said["unlabeled"] = ()
    return Run(name, folder, settings, recipe=recipe, results=tuple(results), baselines=tuple(baselines),
               complaints=tuple(complaints), **said)  # fmt: skip


def _said(content: Mapping[str, Any], iterations: int) -> dict[str, Any]:
    """What results.json says of a training beside the figures; older versions do not write all of it.

    Args:
        iterations: of an epoch, where the settings say so; 0: as many as results.json says.
    """
    names = ("labeled", "unlabeled", "ranks", "started_from", "skipped")
    said = {name: content[name] for name in names if content.get(name) is not None}
    said |= {role: tuple(map(printable, said[role])) for role in ("labeled", "unlabeled") if role in said}
    if iterations or content.get("iterations"):
        said["iterations"] = iterations or content["iterations"] // content["epochs"]
    return said


def _is_of(folder: Path, evaluations: Sequence[Any]) -> bool:
    """Whether evaluations are of a network that lies in the folder, as far as they name their weights.

    A run that went on, or was started anew, leaves those of `dan-fast evaluate` beside a network that they are not of.
    """
    named = {each.get("weights") for each in evaluations} - {None}
    found = set()
    for file in (folder / "checkpoint.pt", folder / "chosen.pt") if named else ():
        with suppress(DanFastError):  # absent, or damaged, which the pictures of the run say
            found.add(weights_hash(trained_network(file)[0]))
    return not found or named <= found


def _sources(data: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The datasets that the settings name, by role."""
    roles = ("labeled", "unlabeled")
    protocol = PROTOCOLS.get(data["protocol"])
    if protocol is None:
        return {role: tuple(printable(dataset_word(path)) for path in data[role]) for role in roles}
    return {role: tuple(part.title for part in getattr(protocol, role)) for role in roles}


def _read_settings(path: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """The settings, complete, and their recipe in words."""
    defaults = TrainConfig().to_dict()
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = {
            section: {**values, **given.get(section, {})} for section, values in defaults.items() if section != "recipe"
        }
        recipe = recipe_words(given, defaults)
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise DanFastError(f"{path} is no configuration of a training: restore it or leave its folder out.") from error
    for name in ("labeled", "unlabeled", "targets"):
        settings["data"][name] = as_list(settings["data"][name] or [])
    return settings, recipe
