"""The datasets of a training, by their paths or by the name of a protocol."""

from functools import cache

from dan_fast.core.errors import DanFastError
from dan_fast.data import load_dataset
from dan_fast.data.datasets.load import is_same, load_unlabeled, read_targets, told_apart
from dan_fast.data.named_protocols import DatasetRoles, resolve_protocol
from dan_fast.data.overlap import require_disjoint_persons
from dan_fast.evaluation import require_scorable
from dan_fast.training.config import DATASETS, DataConfig


def load_datasets(data: DataConfig) -> DatasetRoles:
    """What a training learns from with and without labels, and what it is tested on.

    Raises:
        DanFastError: no labelled dataset, a protocol beside datasets or without a root, a target that cannot be tested
            on, a person who is both trained on and tested on; and as `load_dataset` and `resolve_protocol`.
    """
    roles = _by_protocol(data) if data.protocol else _by_path(data)
    for target in roles.targets:
        # Else it would be noticed after the last epoch only.
        require_scorable(target)
    return roles


def _by_protocol(data: DataConfig) -> DatasetRoles:
    given = [f"data.{name}" for name in DATASETS if getattr(data, name)]
    if given:
        raise DanFastError(
            f"data.protocol {data.protocol} and {', '.join(given)} are both given: a protocol names all its datasets, "
            "so leave out one or the other."
        )
    if not data.root:
        raise DanFastError(f"data.protocol {data.protocol} needs data.root: name the folder in which its datasets lie.")
    return resolve_protocol(data.protocol, data.root)


def _by_path(data: DataConfig) -> DatasetRoles:
    if data.root:
        raise DanFastError(
            f"data.root {data.root} is of no use without data.protocol: name a protocol (`dan-fast protocols` lists "
            "them) or leave it out."
        )
    if not data.labeled:
        raise DanFastError(
            "data.labeled is empty: name at least one folder or manifest with labelled images, or a data.protocol."
        )
    # One that is tested on too is read, and what is odd about it said, once.
    load = cache(load_dataset)
    trained_on = [*map(load, data.labeled), *(load_unlabeled(path, load) for path in data.unlabeled)]
    # Such a one has one name in results, by which it is no unseen target; two of one name have different
    # ones, by which a target is not taken for a set that was trained on. A target's name does not depend on what is
    # trained on, so that trainings can be compared.
    targets = read_targets(data.targets, load)
    tested = told_apart(targets)
    named = [
        next((called for target, called in zip(targets, tested, strict=True) if is_same(dataset, target)), long)
        for dataset, long in zip(trained_on, told_apart([*trained_on, *targets]), strict=False)
    ]
    end = len(data.labeled)
    roles = DatasetRoles(tuple(named[:end]), tuple(named[end:]), tuple(tested))
    # Unlabelled images of which no share is taken are left aside.
    unlabeled = roles.unlabeled if data.unlabeled_share > 0 else ()
    remedy = "name other datasets or variants in data.labeled, data.unlabeled or data.targets"
    require_disjoint_persons((*roles.labeled, *unlabeled), roles.targets, "This training", remedy)
    return roles
