"""What the ranks of an iteration send, beside what a memory step sends: docs/scaling.md, "What an iteration sends"."""

import pytest
import torch
from torch import distributed

from dan_fast.daml import Stage
from dan_fast.data import Split
from dan_fast.nn import DAN, ProgressiveAugmentedMemory
from dan_fast.training import LossConfig, MetaConfig, MetaStep, TrainingModel
from tests.distributed.test_memory import Collectives
from tests.support.ranks import Ranks
from tests.support.steps import decide
from tests.support.tiny_training import OneConvolution

CLASSES, EACH = 40, 3  # images of each kind on each rank


def split(num_fed_back: int) -> Split:
    labels = torch.cat([torch.arange(EACH + num_fed_back), torch.full((EACH,), -1)])
    ids = torch.cat([torch.full((EACH,), -1), torch.arange(num_fed_back + EACH)])
    return Split(torch.randn(len(labels), 3, 16, 16), labels, ids, EACH, num_fed_back)


def traffic(group: distributed.ProcessGroup, procedure: str, order: int, with_memory: bool) -> None:
    torch.manual_seed(0)
    network = DAN(CLASSES, backbone=OneConvolution(), image_size=(16, 16), reduction=2)
    memory = ProgressiveAugmentedMemory(96, 48, network.key_dim, process_group=group) if with_memory else None
    model = TrainingModel(network, memory, LossConfig())
    meta_step = MetaStep(
        model, torch.optim.SGD(model.parameters(), lr=0.01), MetaConfig(procedure=procedure, order=order), group
    )
    decide(meta_step, Stage.BOTH)
    with Collectives() as sent:
        meta_step.step(split(0), split(1))
    ranks, trained = group.size(), sum(each.numel() for each in network.parameters())
    found = [8 * (CLASSES + 1) * EACH + 16 * ((EACH if with_memory else 0) + fed_back) + 20 for fed_back in (0, 1)]
    gathered, added, sums = 48 + sum(found), 4 * 12, 2 if order == 1 else 3
    if with_memory:
        own = 2 * EACH * ranks
        rows = 2 * EACH * (4 * network.key_dim + 8)
        scores = 4 * ((own + 1) * 96 + (EACH * ranks + 1) * 48) / ranks
        gathered, added = gathered + 2 * (104 + rows + scores), added + 2 * 4 * own * network.key_dim
    assert sent.calls == {"allgather_base": 9 if with_memory else 3, "allreduce": sums + 1 + 2 * with_memory}
    assert sent.bytes["allgather_base"] == pytest.approx(gathered, rel=0.1)
    assert sent.bytes["allreduce"] == pytest.approx(added + 4 * sums * trained, rel=0.1)


@pytest.mark.parametrize(("procedure", "order", "with_memory"), [("daml3", 1, True), ("daml2", 2, False)])
def test_an_iteration_sends_what_the_page_says(ranks: Ranks, procedure: str, order: int, with_memory: bool):
    ranks.run(traffic, procedure, order, with_memory)
