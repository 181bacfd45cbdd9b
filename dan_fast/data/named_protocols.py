"""The protocols of the literature by name: which datasets are trained on and which are tested on.

Decisions where the papers leave a choice:

- Table IV follows the splits of DIMN and DualNorm, whose 18,530 people and 121,765 images are all images of the five
  sources with CUHK03's detected boxes (14,097) and without Market-1501's distractors: whole datasets, then, and the
  unlabelled MSMT17 likewise, whose 126,441 images of Table III are all it has. Table III's 13,164 images
  of CUHK03 are those that its own paper counts, the number of neither box style.
- Tables V and VI follow papers that train on train splits, so the unlabelled MSMT17 is its train split too. In Table
  VI the unlabelled images are the train split of the target, whose people are others than those it is tested on.
- The paper does not say which MSMT17 it used: V1, of its time, is taken where it is found, else V2.
- P-1, P-2 and P-3 are those of META (Xu et al., ECCV 2022), which takes CUHK03's labeled boxes (14,096 images), the
  new protocol and MSMT17 V2; V1 is taken where V2 is not found. CUHK-SYSU has one set of crops, used whole by all.

The fixed splits of VIPeR, PRID, GRID and i-LIDS are those of this package: none of these papers lists its own, and the
partitions in GRID's archive are not taken (docs/fidelity.md).
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from dan_fast.core.errors import DanFastError
from dan_fast.core.home import expanded
from dan_fast.data.datasets.known import KNOWN, FoundDataset, find_datasets
from dan_fast.data.datasets.load import all_images
from dan_fast.data.overlap import require_disjoint_persons
from dan_fast.data.samples import ReIDDataset

_LOG = logging.getLogger(__name__)


class Part(NamedTuple):
    """A dataset of a protocol, a key of `KNOWN`, and its variants that will do, the first of them preferred."""

    dataset: str
    variants: tuple[str, ...] = ("",)

    @property
    def title(self) -> str:
        """As messages and tables call it: "CUHK03 (labeled, new protocol)", "MSMT17 (V1, else V2)"."""
        variants = ", else ".join(filter(None, self.variants))
        return f"{KNOWN[self.dataset].title} ({variants})" if variants else KNOWN[self.dataset].title


@dataclass(frozen=True)
class Protocol:
    """What is trained on, and what is tested on.

    Attributes:
        name: the word that selects it.
        title: what it is, in words.
        labeled, unlabeled: datasets trained on, with and without their labels.
        targets: datasets tested on.
        images: "train", the train splits of the former, or "all", all their images.
        source: the paper that defines it.
    """

    name: str
    title: str
    labeled: tuple[Part, ...]
    unlabeled: tuple[Part, ...]
    targets: tuple[Part, ...]
    images: Literal["train", "all"]
    source: str


class DatasetRoles(NamedTuple):
    """Datasets by what is done with them."""

    labeled: tuple[ReIDDataset, ...]
    unlabeled: tuple[ReIDDataset, ...]
    targets: tuple[ReIDDataset, ...]


_MARKET, _DUKE, _CUHK02, _SYSU = map(Part, ("market1501", "dukemtmc", "cuhk02", "cuhk_sysu"))
_CUHK03_DETECTED = Part("cuhk03", ("detected, new protocol",))
_CUHK03_LABELED = Part("cuhk03", ("labeled, new protocol",))
_MSMT17_OF_THE_PAPER, _MSMT17 = Part("msmt17", ("V1", "V2")), Part("msmt17", ("V2", "V1"))
_SMALL = tuple(map(Part, ("viper", "prid", "grid", "ilids")))

_PAPER = "Liu et al., TCSVT 2022"
_META = "Xu et al., ECCV 2022 (META)"


def _with_and_without_unlabeled(
    name: str, title: str, labeled: tuple[Part, ...], targets: tuple[Part, ...], images: Literal["train", "all"]
) -> list[Protocol]:
    unlabeled = (_MSMT17_OF_THE_PAPER,)
    return [
        Protocol(name, f"{title}, with MSMT17 unlabelled", labeled, unlabeled, targets, images, _PAPER),
        Protocol(f"{name}-wo-unlabeled", f"{title}, without MSMT17", labeled, (), targets, images, _PAPER),
    ]


def _from_one_to_another(table: int, source: Part, target: Part) -> list[Protocol]:
    names = {_MARKET: "market", _DUKE: "duke"}
    name = f"table{table}-{names[source]}-to-{names[target]}"
    title = f"{KNOWN[source.dataset].title} to {KNOWN[target.dataset].title}"
    if table == 6:
        title = f"Table VI: {title}, whose train split is unlabelled (UDA)"
        return [Protocol(name, title, (source,), (target,), (target,), "train", _PAPER)]
    return _with_and_without_unlabeled(name, f"Table V: {title}", (source,), (target,), "train")


def _leave_one_out(number: int, target: Part) -> Protocol:
    images: Literal["train", "all"] = "train" if number == 2 else "all"
    others = tuple(part for part in (_MARKET, _MSMT17, _CUHK03_LABELED) if part != target)
    which = "the train splits" if number == 2 else "all images"
    title = f"P-{number}: {which} of the others and CUHK-SYSU to {KNOWN[target.dataset].title}"
    return Protocol(f"p{number}-{target.dataset}", title, (*others, _SYSU), (), (target,), images, _META)


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        *_with_and_without_unlabeled(
            "table4",
            "Table IV: five sources to the small four",
            (_CUHK02, _CUHK03_DETECTED, _MARKET, _DUKE, _SYSU),
            _SMALL,
            "all",
        ),
        *_from_one_to_another(5, _MARKET, _DUKE),
        *_from_one_to_another(5, _DUKE, _MARKET),
        *_from_one_to_another(6, _MARKET, _DUKE),
        *_from_one_to_another(6, _DUKE, _MARKET),
        Protocol(
            "p1",
            "P-1: all images of four sources to the small four",
            (_MARKET, _CUHK02, _CUHK03_LABELED, _SYSU),
            (),
            _SMALL,
            "all",
            _META,
        ),
        *(_leave_one_out(number, target) for number in (2, 3) for target in (_MARKET, _MSMT17, _CUHK03_LABELED)),
    )
}


def protocol_of(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        DanFastError: there is none; those that there are are named.

    Example:
        >>> [part.title for part in protocol_of("p2-msmt17").labeled]
        ['Market-1501', 'CUHK03 (labeled, new protocol)', 'CUHK-SYSU']
    """
    if name not in PROTOCOLS:
        raise DanFastError(f"There is no protocol {name!r}; choose one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def resolve_protocol(name: str, root: str | Path, targets_only: bool = False) -> DatasetRoles:
    """The datasets of a protocol, of those that lie below a folder; nothing is downloaded.

    Args:
        name: a key of `PROTOCOLS`.
        root: the folder, up to two levels below which the datasets are looked for, as `dan-fast datasets` does.
        targets_only: whether what is tested on is enough; nothing to train on is then given.

    Raises:
        DanFastError: no such protocol or folder; datasets that are missing or cannot be read or scored, all of them
            in one sentence with where they can be requested; a person who is both trained on and tested on.

    Example:
        roles = resolve_protocol("p1", "~/datasets")
        training_set = TrainingSet(roles.labeled, roles.unlabeled)
    """
    protocol, shelf = protocol_of(name), Shelf(root)
    if targets_only:
        protocol = replace(protocol, labeled=(), unlabeled=())
    missing = shelf.missing(protocol)
    if missing:
        raise DanFastError(f"Protocol {name} lacks in {shelf.root}: {'; '.join(missing.values())}.")
    roles = shelf.roles(protocol)
    require_disjoint_persons(
        (*roles.labeled, *roles.unlabeled), roles.targets, f"Protocol {name}", "restore the dataset as published"
    )
    shelf.warn(protocol)
    return roles


class Shelf:
    """The known datasets below a folder, each read at most once.

    Raises:
        DanFastError: there is no such folder, or it cannot be read.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = expanded(root)
        self._found = find_datasets(self.root)
        self._read: dict[Part, ReIDDataset] = {}

    def missing(self, protocol: Protocol) -> dict[Part, str]:
        """The missing datasets of a protocol, each with a clause on the reason and where it can be requested."""
        clauses = {part: self._lack(part, part in protocol.targets) for part in _parts(protocol)}
        return {part: clause for part, clause in clauses.items() if clause}

    def roles(self, protocol: Protocol) -> DatasetRoles:
        """The datasets of a protocol that lacks nothing."""

        def sources(parts: tuple[Part, ...]) -> tuple[ReIDDataset, ...]:
            whole = [self._dataset(part) for part in parts]
            return tuple(map(all_images, whole) if protocol.images == "all" else whole)

        targets = tuple(map(self._dataset, protocol.targets))
        return DatasetRoles(sources(protocol.labeled), sources(protocol.unlabeled), targets)

    def warn(self, protocol: Protocol) -> None:
        """Log where the datasets of a protocol differ from the literature."""
        for part in _parts(protocol):
            for sentence in self._places(part)[0].differences:
                _LOG.warning("%s", sentence)

    def _lack(self, part: Part, is_target: bool) -> str:
        """Why a dataset cannot be used, "" where it can."""
        known, places = KNOWN[part.dataset], self._places(part)
        if not places:
            others = [each for each in self._found if each.known.name == part.dataset]
            if others:
                # Without a variant there is nothing but the reason why it cannot be read.
                has = "; ".join(each.error.rstrip(".") or f"{each.path} has {each.variant!r}" for each in others)
                return f"{part.title}: {has}"
            if known.origin:
                return f"{part.title}, which can be asked for at {known.origin}"
            return f"{part.title}, which is no longer distributed ({known.note.rstrip('.')})"
        if len({each.path.resolve() for each in places}) > 1:
            return f"one {part.title}, as it lies at {' and at '.join(str(each.path) for each in places)}"
        if places[0].error:
            return f"a readable {part.title}: {places[0].error.rstrip('.')}"
        if not is_target:
            return ""
        splits = self._dataset(part).splits
        return f"images of {part.title} at {places[0].path}: {splits.missing}" if splits and splits.missing else ""

    def _places(self, part: Part) -> list[FoundDataset]:
        """Where a dataset lies in the first of its variants that is there."""
        for variant in part.variants:
            places = [each for each in self._found if (each.known.name, each.variant) == (part.dataset, variant)]
            if places:
                return places
        return []

    def _dataset(self, part: Part) -> ReIDDataset:
        if part not in self._read:
            place = self._places(part)[0]
            self._read[part] = place.known.read(place.path, place.known.title, place.variant)
        return self._read[part]


def _parts(protocol: Protocol) -> Iterable[Part]:
    return dict.fromkeys((*protocol.labeled, *protocol.unlabeled, *protocol.targets))
