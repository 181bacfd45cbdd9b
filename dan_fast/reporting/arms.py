"""Arms of a sweep side by side: means over seeds, and paired differences to a baseline with their intervals."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from dan_fast.evaluation import Evaluation
from dan_fast.reporting.differences import CONFIDENCE, PairedDifference, paired_difference
from dan_fast.reporting.groups import Target, caveats, target_of
from dan_fast.reporting.html import ABSENT, Table
from dan_fast.reporting.result_tables import cameras_of
from dan_fast.training.recipes import word_of
from dan_fast.training.surroundings import VERSIONS

METRICS = ("mAP", "R1")
FINISHED = "finished"
MEAN_OF_TARGETS = Target("Mean of the unseen targets", "")
_ENTRY = {"name", "arm", "seed", "baseline", "recipe", "state", "sentence", "seconds"}


class ArmRun(NamedTuple):
    """A finished training of an arm.

    Attributes:
        scores: for each target the figures in percent, by the names of :data:`METRICS`.
        iterations: of the training; None where they were not recorded.
        seconds: that it took, evaluation included; None where they were not recorded.
        trained_on: titles of the datasets it learnt from, labelled or not, in trainings before it too as far as known.
        timed_on: the devices and numbers of threads on which its seconds depend, as its processes had them; in results
            of older versions the one of run.device and of the sweep, None where it was not recorded.
        images: what it learnt from by the names of the settings, and the images themselves; None in results of older
            versions.
        tested: for each target the images themselves; none in results of older versions.
        ran_under: see `dan_fast.training.surroundings.ran_under`; empty in results of older versions.
        at_once: how many trainings of the sweep ran while it did, itself included, on average over its seconds; None
            where it was not recorded.
    """

    scores: dict[Target, dict[str, float]]
    iterations: int | None
    seconds: float | None
    trained_on: frozenset[str]
    images: tuple[str, str] | None
    tested: dict[Target, str]
    timed_on: tuple[tuple[str | None, int | None], ...]
    ran_under: tuple[Mapping[str, Any], ...]
    at_once: float | None


@dataclass(frozen=True)
class Arm:
    """Trainings that differ in their seed only.

    Attributes:
        name: as the sweep calls it.
        recipe: of its trainings, what was changed on top of it and what else this arm sets, in words; "" for none.
        runs: the finished ones, by seed.
        missing: seeds without a finished training, and why.
    """

    name: str
    recipe: str
    runs: dict[int, ArmRun]
    missing: dict[int, str]

    def scores(self, target: Target, metric: str) -> dict[int, float]:
        """A metric by seed, in percent, for the seeds that were tested on the target."""
        return {seed: run.scores[target][metric] for seed, run in self.runs.items() if target in run.scores}


@dataclass(frozen=True)
class Comparison:
    """The arms of a sweep.

    Attributes:
        name: of the sweep's folder.
        baseline: the name of the arm that the others are compared with.
        arms: in the order of the sweep.
    """

    name: str
    baseline: str
    arms: tuple[Arm, ...]

    @property
    def targets(self) -> list[Target]:
        """What was tested on, in order, and at the end the mean of those that all runs share and none learnt from."""
        found = dict.fromkeys(target for arm in self.arms for run in arm.runs.values() for target in run.scores)
        return sorted(found, key=lambda target: target.title == MEAN_OF_TARGETS.title)

    @property
    def is_timed_alike(self) -> bool:
        """Whether the seconds of all runs are of one device and one number of threads."""
        return len({run.timed_on for run in self._runs() if run.seconds is not None}) < 2

    def difference(self, arm: Arm, target: Target, metric: str) -> PairedDifference | None:
        """Of an arm to the baseline; None for the baseline itself and where no seed is in both."""
        baseline = next((each for each in self.arms if each.name == self.baseline), None)
        if baseline is None or arm.name == self.baseline:
            return None
        return paired_difference(arm.scores(target, metric), baseline.scores(target, metric))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON: all figures by target and arm, and what is missing."""
        return {
            "baseline": self.baseline,
            "confidence": CONFIDENCE,
            "targets": [
                {
                    "target": target.title,
                    "protocol": target.protocol,
                    "arms": [self._row(arm, target) for arm in self.arms],
                }
                for target in self.targets
            ],
            "arms": [
                {
                    "arm": arm.name,
                    "recipe": arm.recipe,
                    "runs": {
                        str(seed): {"iterations": run.iterations, "seconds": run.seconds}
                        for seed, run in arm.runs.items()
                    },
                    "missing": {str(seed): why for seed, why in arm.missing.items()},
                }
                for arm in self.arms
            ],
        }

    def tables(self) -> list[Table]:
        """A table a target, an arm a row; what they mean stands in the note of the last one."""
        columns = ["arm", "seeds", *(f"{metric} (%)" for metric in METRICS),
                   *(f"{metric} over {self.baseline}" for metric in METRICS), "iterations", "s a run"]  # fmt: skip
        tables = []
        for target in self.targets:
            title = f"{target.title} ({target.protocol})" if target.protocol else target.title
            rows = [self._cells(arm, target) for arm in self.arms]
            tables.append(Table(f"{self.name}: {title}", columns, rows))
        if tables:
            tables[-1] = tables[-1]._replace(note=" ".join(self.notes()))
        return tables

    def notes(self) -> list[str]:
        """How to read the tables, what the arms are, and which trainings are missing; whole sentences."""
        seeds = max((len(arm.runs) for arm in self.arms), default=0)
        notes = []
        if seeds == 1:
            notes = ["One seed: there is neither a deviation nor an interval, and a difference may be chance."]
        elif seeds:
            notes = [
                f"± is the standard deviation over the seeds; what is over {self.baseline} is the mean of the "
                "differences seed by seed, in percentage points, with its 95 % interval (Student's t)."
            ]
        if not self.is_timed_alike:
            notes.append("Seconds are left out: trainings ran on other devices or with other numbers of threads.")
        elif at_once := self._in_which_arms_differ(_at_once):
            on_average = ", ".join(f"{mean} for {name}" for name, mean in at_once.items())
            notes.append(f"Seconds depend on how many trainings ran at once, on average {on_average}.")
        if versions := self._versions():
            notes.append(f"Trainings ran under several versions: {versions}.")
        learnt = self._of_several(lambda run: [] if run.images is None else [run.images])
        if others := "; ".join(learnt.values()):
            notes.append(
                f"Trainings of datasets of the same names learnt from other images: {others}; if these were changed in "
                "between, remove the older ones' folders and train them again."
            )
        for target, others in self._of_several(lambda run: run.tested.items()).items():
            notes.append(
                f"Trainings were tested on other images or labels of {target.title}: {others}; if these were changed "
                "in between, remove the results.json of the older ones and call the sweep again, which tests them anew."
            )
        if lengths := self._in_which_arms_differ(_span):
            each = ", ".join(f"{name} {span}" for name, span in lengths.items())
            notes.append(f"Trainings differ in their iterations ({each}): data.iterations makes epochs equally long.")
        seen = _learnt_from(self._runs())
        if left := [target.title for target in self.targets if cameras_of(target.title) in seen]:
            notes.append(f"No unseen targets, because trainings learnt from sets of their name: {', '.join(left)}.")
        notes += [f"{arm.name}: {arm.recipe}." for arm in self.arms if arm.recipe]
        for arm in self.arms:
            notes += [f"Missing: {arm.name}, seed {seed}: {why}" for seed, why in arm.missing.items()]
        return notes

    def markdown(self) -> str:
        """The tables and their notes, to be pasted into a page."""
        parts = []
        for table in self.tables():
            lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (table.columns, *table.rows)]
            # Columns of equal width, so that the table can be read on a terminal too.
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            lines.insert(1, ["-" * width for width in widths])
            drawn = (" | ".join(map(str.ljust, line, widths)) for line in lines)
            parts.append(f"### {table.title}\n\n" + "".join(f"| {line} |\n" for line in drawn) + "\n")
        return "".join([*parts, *(f"- {note}\n" for note in self.notes())])

    def _runs(self) -> list[ArmRun]:
        return [run for arm in self.arms for run in arm.runs.values()]

    def _in_which_arms_differ(self, words: Callable[[Collection[ArmRun]], str]) -> dict[str, str]:
        """What is said of the runs of each arm, "" where nothing is known; nothing at all if it is the same of all."""
        found = {arm.name: said for arm in self.arms if (said := words(arm.runs.values()))}
        return found if len(set(found.values())) > 1 else {}

    def _of_several(self, images: Callable[[ArmRun], Iterable[tuple[Any, str]]]) -> dict[Any, str]:
        """For each name under which trainings have several sets of images, which ones have which, in words."""
        found: dict[Any, dict[str, list[str]]] = {}
        for arm in self.arms:
            for seed, run in arm.runs.items():
                for named, fingerprint in images(run):
                    found.setdefault(named, {}).setdefault(fingerprint, []).append(f"{arm.name}, seed {seed}")
        return {
            named: " against ".join(" and ".join(runs) for runs in each.values())
            for named, each in found.items()
            if len(each) > 1
        }

    def _versions(self) -> str:
        """The versions of whatever the trainings had several of, in words; "" where none are known."""
        found: dict[str, dict[str, None]] = {name: {} for name in VERSIONS}
        for under in (each for run in self._runs() for each in run.ran_under):
            for name in (each for each in VERSIONS if each in under):  # older versions recorded fewer
                found[name][str(under.get(name) or "none")] = None
        return "; ".join(f"{name} {', '.join(values)}" for name, values in found.items() if len(values) > 1)

    def _row(self, arm: Arm, target: Target) -> dict[str, Any]:
        row: dict[str, Any] = {"arm": arm.name}
        for metric in METRICS:
            scores = arm.scores(target, metric)
            difference = self.difference(arm, target, metric)
            row[metric] = {
                "by_seed": {str(seed): value for seed, value in scores.items()},
                "mean": fmean(scores.values()) if scores else None,
                "std": stdev(scores.values()) if len(scores) > 1 else None,
                "difference": None if difference is None else difference._asdict(),
            }
        return row

    def _cells(self, arm: Arm, target: Target) -> list[str]:
        scores = {metric: arm.scores(target, metric) for metric in METRICS}
        seeds = len(scores[METRICS[0]])
        means = [_spread([*scores[metric].values()]) for metric in METRICS]
        if arm.name == self.baseline:
            differences = ["baseline"] * len(METRICS)
        else:
            differences = [_difference(self.difference(arm, target, metric), seeds) for metric in METRICS]
        ran = [run for run in arm.runs.values() if target in run.scores]
        seconds = [run.seconds for run in ran if run.seconds is not None and self.is_timed_alike]
        mean = f"{fmean(seconds):.0f}" if seconds else ABSENT
        return [arm.name, str(seeds), *means, *differences, _span(ran) or ABSENT, mean]


def _at_once(runs: Collection[ArmRun]) -> str:
    """How many trainings ran at once on average, as far as known."""
    known = [run.at_once for run in runs if run.at_once is not None]
    return f"{fmean(known):.1f}" if known else ""


def _span(runs: Collection[ArmRun]) -> str:
    """Their iterations, as far as known: one number, unless they differ in it."""
    known = sorted({run.iterations for run in runs if run.iterations is not None})
    return " to ".join(str(each) for each in dict.fromkeys((*known[:1], *known[-1:])))


def read_comparison(folder: str | Path) -> Comparison | None:
    """The comparison of a sweep's folder; None where that holds no sweep, or one that compares nothing.

    Args:
        folder: with the sweep.json that `dan-fast sweep` writes, and a folder for each of its trainings.

    Example:
        >>> read_comparison("/nowhere")
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entries = (
        [each for each in record if isinstance(each, dict) and each.get("arm") and each.get("planned", True)]
        if isinstance(record, list)
        else []
    )
    # Older versions write no arms; whatever else lacks a field is no record of a sweep.
    if not entries or any(_ENTRY - each.keys() for each in entries):
        return None
    arms: dict[str, Arm] = {}
    for entry in entries:
        arm = arms.setdefault(entry["arm"], Arm(entry["arm"], _in_words(entry), {}, {}))
        run = _read_run(folder, entry)
        if isinstance(run, ArmRun):
            arm.runs[entry["seed"]] = run
        else:
            arm.missing[entry["seed"]] = run
    _add_mean([run for arm in arms.values() for run in arm.runs.values()])
    return Comparison(folder.resolve().name, entries[0]["baseline"], tuple(arms.values()))


def _in_words(entry: Mapping[str, Any]) -> str:
    """The recipe of an arm, what was changed on top of it, and what else is set for this arm alone."""
    recipe = entry["recipe"]
    own = [
        f"{name}={word_of(value)}"
        for name, value in entry.get("settings", {}).items()
        if name not in ("recipe", "run.seed") and f"{name}=" not in recipe
    ]
    if not own:
        return recipe
    return f"{recipe}, {', '.join(own)}" if ", with " in recipe else f"{recipe or 'no recipe'}, with {', '.join(own)}"


def _read_run(folder: Path, entry: Mapping[str, Any]) -> ArmRun | str:
    """A finished training, or why there is none."""
    if entry["state"] != FINISHED:
        return f"{entry['state']}: {entry['sentence']}" if entry["sentence"] else f"{entry['state']}."
    path = folder / entry["name"] / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        evaluations = [Evaluation.from_dict(each) for each in content["targets"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} holds no results of this version ({error})."
    if not evaluations:
        return "it was tested on nothing; name data.targets in the base."
    scores = {target_of(each): {metric: each.percentages()[metric] for metric in METRICS} for each in evaluations}
    tested = {target_of(each): each.fingerprint for each in evaluations if each.fingerprint}
    data = ("labeled", "unlabeled", "unlabeled_share")
    # Which share of the unlabelled images is taken, if not all, the seed decides.
    named = [str(content.get(name)) for name in data] + ([] if content.get(data[2]) in (0, 1) else [str(entry["seed"])])
    images = (", ".join(named), content["fingerprint"]) if "fingerprint" in content else None
    # A training before it, from whose weights it started, learnt from sets too.
    known = [each.title for each in evaluations if each.known_cameras]
    trained_on = frozenset((*content.get("labeled", ()), *content.get("unlabeled", ()), *known))
    ran_under = tuple(content.get("ran_under", ()))
    # A setting such as auto means another device on another machine, so that what the training found comes first.
    timed_on = tuple(dict.fromkeys((each.get("device"), each.get("threads")) for each in ran_under or (entry,)))
    # Seconds of two kinds are no time of a training.
    seconds = entry["seconds"] if len(timed_on) == 1 else None
    of_all = entry.get("seconds_of_all")
    at_once = of_all / seconds if of_all is not None and seconds else None
    return ArmRun(scores, content.get("iterations"), seconds, trained_on, images, tested, timed_on, ran_under, at_once)


def _learnt_from(runs: Sequence[ArmRun]) -> set[str]:
    return {cameras_of(title) for run in runs for title in run.trained_on}


def _add_mean(runs: Sequence[ArmRun]) -> None:
    """Give all runs the mean over the targets that all were tested on and none learnt from, where there are several.

    A set whose train images were learnt from is no measure of generalisation to unseen cameras.
    """
    seen = _learnt_from(runs)
    common = [
        target
        for target in (runs[0].scores if runs else ())
        if all(target in run.scores for run in runs) and cameras_of(target.title) not in seen
    ]
    if len(common) > 1:
        mean = MEAN_OF_TARGETS._replace(protocol=", ".join(caveats("; ".join(each.protocol for each in common))))
        for run in runs:
            run.scores[mean] = {metric: fmean(run.scores[target][metric] for target in common) for metric in METRICS}


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ABSENT
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _difference(difference: PairedDifference | None, seeds: int) -> str:
    if difference is None:
        return ABSENT
    words = f"{difference.mean:+.1f}"
    if difference.low is not None:
        words += f" [{difference.low:+.1f}, {difference.high:+.1f}]"
    paired = len(difference.seeds)
    return words if paired == seeds else f"{words}, {paired} seed{'s' * (paired > 1)} in both"
