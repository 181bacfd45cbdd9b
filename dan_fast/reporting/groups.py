"""Which runs can be compared: those that differ in one thing, as in Figs. 6, 7 and 8."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dan_fast.evaluation import Evaluation
from dan_fast.reporting.runs import FIG6_ORDER, Run
from dan_fast.training.reported import CHOSEN, SEEN

# In the order of Fig. 8, with the paper's symbols.
SYMBOLS = {
    "loss.adversary": "λ1",
    "loss.embedding": "λ2",
    "loss.regularizer": "λ3",
    "model.reduction": "r",
    "memory.labeled_slots": "s1",
    "memory.unlabeled_slots": "s2",
    "memory.decay": "κ1",
    "memory.decay_unlabeled": "κ2",
    "meta.eta": "η",
}
_MODEL = ("model.attention", "model.adversary", "model.reduction")
_SHARE = "data.unlabeled_share"


class Target(NamedTuple):
    """A dataset, with its variant, and how it was tested on: results of other targets are not drawn together."""

    title: str
    protocol: str


@dataclass(frozen=True)
class Line:
    """Runs that differ in one thing only, and in their seed.

    Attributes:
        label: how they differ from the runs of the other lines; "" where there is one line.
        points: for each value of what they differ in, the runs; in order.
    """

    label: str
    points: Mapping[Any, tuple[Run, ...]]


def models(runs: Sequence[Run]) -> list[Line]:
    """Fig. 6: runs of several models, a line for each choice of all other settings."""

    def place(name: str) -> tuple[int, list[str | int]]:
        # r = 4 comes before r = 16.
        words = [int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", name)]
        return (FIG6_ORDER.index(name) if name in FIG6_ORDER else len(FIG6_ORDER)), words

    lines = _lines(_grouped(runs, _MODEL).values(), lambda run: run.model, _MODEL)
    return [
        replace(line, points={name: line.points[name] for name in sorted(line.points, key=place)}) for line in lines
    ]


def unlabeled_shares(runs: Sequence[Run]) -> list[Line]:
    """Fig. 7: runs with several shares of the unlabelled images; none of them is a share of 0."""

    def share(run: Run) -> float:
        return float(run.settings["data"]["unlabeled_share"]) if run.unlabeled else 0.0

    of_none = (_SHARE, "data.unlabeled")
    companions = _grouped([run for run in runs if not run.unlabeled], of_none)
    groups = [
        group + companions.get(_key(_rest(group[0], of_none)), [])
        for group in _grouped([run for run in runs if run.unlabeled], [_SHARE]).values()
    ]
    return _lines(groups, share, [_SHARE])


def swept_settings(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """Fig. 8: for each numeric setting that is the only difference of some runs, the lines; without that of Fig. 7."""
    learning = [run.learning() for run in runs]
    names = [
        name
        for name in dict.fromkeys([*SYMBOLS, *(learning[0] if learning else ())])
        if name not in (_SHARE, "run.seed") and all(_is_number(each.get(name)) for each in learning)
    ]
    swept = {}
    for name in names:
        lines = _lines(_grouped(runs, [name]).values(), lambda run, name=name: run.learning()[name], [name])
        if lines:
            swept[name] = lines
    return swept


def targets(runs: Sequence[Run]) -> list[Target]:
    """All that runs were tested on, in order."""
    return list(dict.fromkeys(target_of(evaluation) for run in runs for evaluation in run.results))


def titles(runs: Sequence[Run]) -> list[str]:
    """The datasets that runs were tested on, with their variants, in order."""
    return list(dict.fromkeys(target.title for target in targets(runs)))


def compared(lines: Sequence[Line]) -> list[Target]:
    """The targets on which runs of one line were tested that differ in more than their seed."""
    runs = [run for line in lines for each in line.points.values() for run in each]

    def differ(line: Line, target: Target) -> bool:
        return sum(any(result_on(run, target) for run in each) for each in line.points.values()) > 1

    return [target for target in targets(runs) if any(differ(line, target) for line in lines)]


def result_on(run: Run, target: Target) -> Evaluation | None:
    """The first evaluation of a run on a target."""
    return next((evaluation for evaluation in run.results if target_of(evaluation) == target), None)


def target_of(evaluation: Evaluation) -> Target:
    """What an evaluation tested on, and how.

    Datasets of one name may hold other images, and a network that was tested before its last epoch is no finished one:
    both are other targets.
    """
    is_last = re.fullmatch(r"epoch (\d+) of \1", evaluation.epoch) is not None
    epoch = caveats(evaluation.epoch) or ([] if is_last else [evaluation.epoch])
    words = [protocol_of(evaluation), evaluation.scoring, evaluation.rounding, *epoch, *caveats(evaluation.seen)]
    return Target(evaluation.title, ", ".join(filter(None, words)))


def caveats(words: str) -> list[str]:
    """Which of the reasons for which figures do not compare with others stand in what is said of them."""
    return [mark for mark in (CHOSEN, SEEN) if mark in words]


def protocol_of(evaluation: Evaluation) -> str:
    """The protocol and how many images it was, in words."""
    return f"{evaluation.protocol}, {evaluation.num_query} queries, {evaluation.num_gallery} gallery images"


def _grouped(runs: Iterable[Run], beside: Collection[str]) -> dict[str, list[Run]]:
    """The runs by all of their settings but those `beside`."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(_rest(run, beside)), []).append(run)
    return groups


def _lines(groups: Iterable[Sequence[Run]], value: Callable[[Run], Any], beside: Collection[str]) -> list[Line]:
    """The groups in which `value` differs, each named by the settings that distinguish it from the others."""
    kept = [group for group in groups if len({value(run) for run in group}) > 1]
    rests = [_rest(group[0], beside) for group in kept]
    differing = [name for name in (rests[0] if rests else ()) if len({_key(each.get(name)) for each in rests}) > 1]
    lines = []
    for group, others in zip(kept, rests, strict=True):
        points: dict[Any, list[Run]] = {}
        for run in group:
            points.setdefault(value(run), []).append(run)
        label = ", ".join(f"{name} {others[name]}" for name in differing)
        lines.append(Line(label, {each: tuple(points[each]) for each in sorted(points)}))
    return lines


def _rest(run: Run, beside: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in run.learning().items() if name not in beside and name != "run.seed"}


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
