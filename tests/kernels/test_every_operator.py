"""Each operator of the extension: schema, fake tensors, autograd and compilation, by `torch.library.opcheck`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dan_fast.functional  # noqa: F401 - registers what torch.compile and opcheck need of the operators
from dan_fast import _extension
from tests.support import head_problems, maps_problems, stream_problems
from tests.support.head_problems import LAYOUTS, saved
from tests.support.scan_problems import Problem
from tests.support.slot_problems import F64, operands, sets
from tests.support.toolchain import needs_cuda_kernels, needs_extension

pytestmark = [pytest.mark.compile, needs_extension, pytest.mark.usefixtures("poison")]
ops = torch.ops.dan_fast
Arguments = tuple[Any, ...]


def leaves(*arguments: Any) -> Arguments:
    """Arguments of which autograd is asked for the gradients."""
    return tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    )


def row_sq_norms() -> Iterator[Arguments]:
    features = torch.randn(6, 11)
    for sample in (features.clone().requires_grad_(), features.bfloat16().T, features[:0]):
        yield (sample,)


def turned(arguments: Arguments) -> Arguments:
    """Nothing promises that a memory or keys come contiguous."""
    return tuple(x.mT.contiguous().mT if x.dim() == 2 else x for x in arguments)


def passes(op: str) -> Iterator[Arguments]:
    case = stream_problems.Case(9, 11, 3, torch.float32)
    arguments = {
        "memory_scores": (case.keys, case.base),
        "memory_combine": (case.weights, case.base),
        "memory_commit": (case.base, *case.writes()),
    }[op]
    yield from (arguments, turned(arguments))


def memory_commit_scores_() -> Iterator[Arguments]:
    case = stream_problems.Case(9, 11, 3, torch.float32)
    writes_and_keys = (*case.writes(), case.keys)
    yield from ((case.base, *writes_and_keys), (case.base, *turned(writes_and_keys)))


def scans(backward: bool) -> Iterator[Arguments]:
    for batch in ((3, 2), (0, 2), (3, 0)):
        arguments = Problem((7, 5), batch, classes=2).arguments()
        if backward:
            yield (torch.ones_like(arguments[3][0]), *arguments, ops.memory_scan(*arguments))
        else:
            yield (*leaves(*arguments[:4]), *arguments[4:])


def slot_softmax() -> Iterator[Arguments]:
    *tensors, occupied = operands(F64)
    yield from ((*leaves(*tensors), mask) for mask in (occupied, None))


def slot_softmax_backward() -> Iterator[Arguments]:
    *tensors, occupied = operands(F64)
    result = ops.slot_softmax(*tensors, occupied)
    yield (torch.randn_like(result), result, *tensors)


def heads(backward: bool) -> Iterator[Arguments]:
    for layout in LAYOUTS[:2]:
        for missing in ((), ("pooled", "channel_attention")):
            case = head_problems.Case((2, 5, 2, 3, 3, 2), F64, layout)
            case.grads = case.grads._replace(**dict.fromkeys(missing))
            out, _ = case.run()
            yield (*case.arguments, *saved(out), *case.grads) if backward else leaves(*case.arguments)


def maps(op: str) -> Iterator[Arguments]:
    for layout in LAYOUTS[:2]:
        arguments = maps_problems.arguments(maps_problems.Case((2, 5, 2, 3), F64, layout))[op]
        yield tuple(arguments) if op.endswith("backward") else leaves(*arguments)


EXAMPLES: dict[str, Callable[[], Iterator[Arguments]]] = {
    "row_sq_norms": row_sq_norms,
    "memory_scores": lambda: passes("memory_scores"),
    "memory_combine": lambda: passes("memory_combine"),
    "memory_commit": lambda: passes("memory_commit"),
    "memory_commit_scores_": memory_commit_scores_,
    "memory_scan": lambda: scans(backward=False),
    "memory_scan_backward": lambda: scans(backward=True),
    "slot_softmax": slot_softmax,
    "slot_softmax_backward": slot_softmax_backward,
    "false_sample_sets": lambda: iter([sets(33, batch=4)]),
    "attention_head": lambda: heads(backward=False),
    "attention_head_backward": lambda: heads(backward=True),
    **{op: lambda op=op: maps(op) for op in maps_problems.OPERATORS},
}


def test_each_has_an_example():
    assert EXAMPLES.keys() == set(_extension._OPERATORS), "give each operator its arguments in EXAMPLES"


@pytest.mark.parametrize("op", EXAMPLES)
def test_registration(op: str):
    for arguments in EXAMPLES[op]():
        torch.library.opcheck(getattr(ops, op).default, arguments)


@needs_cuda_kernels
@pytest.mark.parametrize("op", EXAMPLES)
def test_a_gpu_has_a_kernel_of_it(op: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dan_fast::{op}", "CUDA")
