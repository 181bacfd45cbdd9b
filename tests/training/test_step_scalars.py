"""Which number of a step goes under which name."""

import re
from types import SimpleNamespace

import pytest
import torch

from dan_fast.daml import Stage
from dan_fast.training.objective import PassRecord
from dan_fast.training.step import StepResult
from dan_fast.training.step_scalars import StepScalars
from tests.support import in_checkout

# The classes of four unlabelled images.
TRUTH = SimpleNamespace(true_labels=torch.tensor([0, 1, 1, -1]), true_ids=torch.tensor([0, 1, 1, 2]))


class Kept(dict):
    """Takes what `Scalars` would write: a value, and whether there is one."""

    def add(self, name: str, value: float, known: bool = True) -> None:
        if known:
            self[name] = pytest.approx(float(value))


def record(**changes: object) -> PassRecord:
    """The attention is right about two of three labelled images, the adversary about one."""
    whole = PassRecord(
        logits=torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]]),
        adversary_logits=torch.tensor([[0.0, 4.0], [0.0, 4.0], [0.0, 4.0]]),
        labels=torch.tensor([0, 0, 1]),
        pseudo_labels=torch.tensor([0, 0]),
        sample_ids=torch.tensor([0, 1]),
        gates=(torch.tensor(0.2), torch.tensor(0.4), torch.tensor(0.6)),
        fault=torch.tensor(0),
        fed_back_labels=torch.zeros(0, dtype=torch.int64),
        fed_back_ids=torch.zeros(0, dtype=torch.int64),
        spatial_spread=torch.tensor(0.7),
        cleared=torch.tensor(1),
    )
    return whole._replace(**changes)


def scalars_of(stage: Stage | None = Stage.ATTENTION, adversary: bool = True, **changes: object) -> Kept:
    losses = [{"total": torch.tensor(value)} for value in (1.5, 2.5)]
    found = Kept()
    # What S~ has too, and which its own pass says last.
    of_test = dict(logits=torch.ones(3, 2), gates=None, spatial_spread=None, sample_ids=torch.tensor([3, 3]))
    result = StepResult({}, stage, *losses, record(**changes), record(**{**changes, **of_test}))
    StepScalars(TRUTH, torch.device("cpu"), adversary).add(found, result)
    return found


def test_each_number_has_its_name():
    assert scalars_of() == {
        "train/loss/total": 1.5,
        "test/loss/total": 2.5,
        "train/accuracy/attention": 2 / 3,
        "train/accuracy/adversary": 1 / 3,
        "train/logit_norm/attention": 3.0,
        "train/logit_norm/adversary": 4.0,
        "competition/attention_wins": 1.0,
        "competition/backbone_frozen": 0.0,
        "competition/both_updated": 0.0,
        "competition/ties": 0.0,
        "memory/sigma_alpha": 0.2,
        "memory/sigma_alpha_unlabeled": 0.4,
        "memory/beta": 0.6,
        "memory/cleared_a_sample": 0.5,
        "attention/spatial_spread": 0.7,
        "pseudo/accuracy": 0.5,
    }


def test_the_guide_explains_each():
    """In the table of training.md, where `.../X` has the beginning of the name before it."""
    rows = re.findall(r"^\| (`.*?) \|", in_checkout("docs/training.md").read_text(), re.MULTILINE)
    cells = [re.findall(r"`([^`]+)`", row) for row in rows]
    explained = {name.replace("...", names[0].rpartition("/")[0]) for names in cells for name in names}
    left = {name for name in scalars_of() if not name.startswith("test/")} - explained
    assert not left, "docs/training.md has no row on these"


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(Stage.ATTENTION, (1, 0, 0)), (Stage.ADVERSARY, (0, 1, 0)), (Stage.BOTH, (0, 0, 1))],
)
def test_the_stage_says_who_was_updated(stage, expected):
    found = scalars_of(stage)
    names = ("attention_wins", "backbone_frozen", "both_updated")
    assert tuple(found[f"competition/{name}"] for name in names) == expected


def test_what_a_step_does_not_have_is_not_there():
    alone = scalars_of(None, adversary=False, gates=None, spatial_spread=None, sample_ids=torch.tensor([3, 3]))
    assert set(alone) == {
        "train/loss/total",
        "test/loss/total",
        "train/accuracy/attention",
        "train/logit_norm/attention",
    }
