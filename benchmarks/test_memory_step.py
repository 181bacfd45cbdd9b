"""The memory step against the literal reference, side by side in one run.

    pytest benchmarks --benchmark-group-by=group

A pair is timed only after both sides gave the same result. The reference is timed at a share of the paper's slots,
since at full size it needs half a minute and gigabytes a step.
"""

import pytest
import torch
from torch import Tensor

from dan_fast import MemoryState, functional, reference

KEY_DIM = 2045
BATCH = 32
SHARES_OF_THE_PAPER = [1 / 64, 1 / 16]


def filled(slots: int, generator: torch.Generator) -> MemoryState:
    """A full memory of random non-negative features, as after a ReLU."""
    usage = torch.rand(slots, generator=generator)
    return MemoryState(
        features=torch.rand(slots, KEY_DIM, generator=generator),
        labels=torch.randint(50, (slots,), generator=generator),
        usage=usage,
        evaluation=torch.full((slots,), 1 / slots),
        least_used=usage.argmin(),
        sample_ids=torch.arange(slots),
    )


def problem(share: float) -> tuple:
    generator = torch.Generator().manual_seed(0)
    keys, unlabeled_keys = torch.rand(2, BATCH, KEY_DIM, generator=generator)
    return (
        filled(int(9000 * share), generator),
        filled(int(5500 * share), generator),
        keys,
        torch.randint(50, (BATCH,), generator=generator),
        unlabeled_keys,
        torch.arange(BATCH),
    )


def forward_backward(memory_step, arguments: tuple) -> tuple[Tensor, ...]:
    labeled, unlabeled, keys, labels, unlabeled_keys, sample_ids = arguments
    leaves = [keys.clone().requires_grad_(), unlabeled_keys.clone().requires_grad_()]
    gates = [torch.tensor(value, requires_grad=True) for value in (0.0, 0.0, 0.1)]
    step = memory_step(labeled, unlabeled, leaves[0], labels, leaves[1], sample_ids, *gates)
    return step.loss.detach(), step.pseudo_labels, *torch.autograd.grad(step.loss, leaves + gates)


@pytest.fixture(scope="module", params=SHARES_OF_THE_PAPER, ids=lambda share: f"slots/{1 / share:.0f}")
def agreed(request) -> tuple:
    arguments = problem(request.param)
    for fast, literal in zip(
        forward_backward(functional.memory_step, arguments),
        forward_backward(reference.memory_step, arguments),
        strict=True,
    ):
        torch.testing.assert_close(fast, literal, rtol=1e-3, atol=1e-6)
    return request.param, arguments


@pytest.mark.parametrize("side", [reference, functional], ids=["reference", "functional"])
def test_forward_backward(benchmark, agreed, side):
    share, arguments = agreed
    benchmark.group = f"memory step, forward + backward, {share:.4f} of the paper's slots"
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(forward_backward, args=(side.memory_step, arguments), rounds=5, warmup_rounds=1)
