"""The scan's kernels on the CPU against PyTorch and the literal reference: values, gradients, faults, equal bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dan_fast.functional.memory.scan_types import Slots, WriteRecord
from tests.support.examples import examples
from tests.support.memory_problems import agree
from tests.support.running import by_threads
from tests.support.scan_problems import (
    PROBLEMS,
    Problem,
    assert_faults_change_nothing,
    assert_right,
    by_operators,
    in_dtype,
    in_pytorch,
)
from tests.support.toolchain import needs_extension

pytestmark = [needs_extension, pytest.mark.usefixtures("poison")]
KINDS = ("random", "close", "repeated", "opposite", "zero", "all zero")


@pytest.mark.slow
@examples(150)
@given(
    slots=st.tuples(*[st.one_of(st.integers(1, 9), st.sampled_from([17, 33, 70]))] * 2),
    batch=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    d=st.sampled_from([1, 2, 5]),
    classes=st.integers(1, 4),
    fill=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2),
    kind=st.sampled_from(KINDS),
    gates=st.sampled_from([(0.4, -0.3, 0.6), (-30.0, 30.0, 0.0), (2.0, -3.0, 1.0)]),
    seed=st.integers(0, 2**20),
)
def test_values_and_gradients_are_those_of_pytorch(slots, batch, d, classes, fill, kind, gates, seed):
    assert_right(by_operators, Problem(slots, batch, d, classes, fill, kind, gates, seed).arguments())


# What takes long on host threads.
SPECIAL = PROBLEMS | {
    "several chunks": {"slots": (1300, 1111), "batch": (5, 9), "classes": 7, "fill": (1.0, 1.0), "d": 16},
    "several chunks of ties": {"slots": (1300, 1111), "batch": (3, 5), "classes": 2, "kind": "repeated"},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_cases(name: str):
    found = assert_right(by_operators, Problem(**SPECIAL[name]).arguments(), name)
    events = found.unlabeled_record.events
    assert torch.equal(*((events & bit).ne(0).sum(1) for bit in (1, 2))), "not as many are false negatives as positives"
    if name == "nothing to retrieve from":
        assert found.loss == 0 and (found.pseudo_labels == -1).all()
        assert not any(x.any() for x in (*found.unlabeled_record, *found.retrieval))


def test_records_are_the_states_between_the_writes():
    arguments = Problem((30, 25), (5, 6), classes=2, fill=(0.7, 1.0), seed=8).arguments()
    scores, unlabeled_scores, gram, gates, labels, ids, *rest = arguments
    found = by_operators(arguments)

    def after(labeled: int, unlabeled: int):
        """Of a part of the batch, all labelled samples or no unlabelled one."""
        count = labeled + unlabeled
        part = (scores[:count], unlabeled_scores[:unlabeled], gram[:count, :count], gates)
        return by_operators([*part, labels[:labeled], ids[:unlabeled], *rest])[3 + (unlabeled > 0)]

    def assert_recorded(record: WriteRecord, at: int, memory) -> None:
        assert torch.equal(record.square_norms[at], memory.square_norms)
        assert torch.equal(record.evaluation[at], memory.evaluation)

    for count in range(1, 6):
        memory = after(count, 0)
        assert_recorded(found.labeled_record, count - 1, memory)
        if count < 5:
            expected = memory.kept * scores[count] + gram[count, :count] @ memory.held
            agree(found.labeled_record.before[count], expected)
    for count in range(1, 7):
        assert_recorded(found.unlabeled_record, count - 1, after(5, count))
        assert int((found.unlabeled_record.events[count - 1] & 4).ne(0).sum()) == 1


@pytest.mark.parametrize("seed", range(4))
def test_float32_is_as_exact_as_pytorch_in_float32(seed: int):
    problem = Problem((200, 150), (6, 6), d=64, classes=4, kind="close", seed=seed, dtype=torch.float32)
    for state in problem.states:  # no two slots of nearly the same usage
        order = torch.randperm(state.usage.numel(), generator=torch.Generator().manual_seed(seed))
        state.usage.copy_(order / 10.0)
    arguments = problem.arguments()
    wide = in_dtype(arguments, torch.float64)
    exact, exact_gradients = in_pytorch(wide)
    single, single_gradients = in_pytorch(arguments)
    found = by_operators(arguments)
    assert torch.equal(found.pseudo_labels, exact.pseudo_labels)
    assert torch.equal(single.pseudo_labels, exact.pseudo_labels)

    def error(actual: Tensor, expected: Tensor) -> float:
        return ((actual.detach().double() - expected).norm() / (expected.norm() + 1e-30)).item()

    values = [
        (found.loss, single.loss, exact.loss),
        *zip(found.labeled[:5], single.labeled[:5], exact.labeled[:5], strict=True),
        *zip(found.unlabeled[:5], single.unlabeled[:5], exact.unlabeled[:5], strict=True),
        *zip(found.gradients, single_gradients, exact_gradients, strict=True),
    ]
    for k, (ours, theirs, truth) in enumerate(values):
        assert error(ours, truth) <= 2 * error(theirs, truth) + 3e-7, (k, error(ours, truth), error(theirs, truth))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_faults_change_nothing(dtype: torch.dtype):
    assert_faults_change_nothing(by_operators, dtype)


def test_only_the_lower_triangle_is_read_and_differentiated():
    arguments = Problem((20, 20), (4, 5), classes=2, seed=3).arguments()
    upper = torch.ones_like(arguments[2]).triu(1).bool()
    lower = [*arguments[:2], arguments[2].masked_fill(upper, float("nan")), *arguments[3:]]
    found, again = by_operators(arguments), by_operators(lower)
    assert all(map(torch.equal, again.flat, found.flat))
    grad_gram = found.gradients[2]
    assert not grad_gram[upper].any() and grad_gram[~upper].ne(0).sum() >= 40


def test_any_strides_and_an_expanded_tensor():
    arguments = Problem((20, 15), (4, 5), classes=2).arguments()
    loose = [x.mT.contiguous().mT if isinstance(x, Tensor) and x.dim() == 2 else x for x in arguments]
    loose[3], arguments[3] = (torch.tensor([0.3], dtype=torch.float64).expand(3) for _ in range(2))
    loose[6] = Slots(*(torch.stack([x, x], -1)[..., 0] for x in arguments[6]))
    assert all(map(torch.equal, by_operators(loose).flat, by_operators(arguments).flat))


@pytest.mark.parametrize(
    ("at", "change", "name"),
    [
        (0, lambda x: x[:-1], "scores"),
        (0, lambda x: x.half(), "scores"),
        (1, lambda x: x[0], "unlabeled_scores"),
        (1, lambda x: x.float(), "unlabeled_scores"),
        (2, lambda x: x[:, 1:], "gram"),
        (3, lambda x: x[:2], "gates"),
        (4, lambda x: x.int(), "labels"),
        (5, lambda x: x[None], "sample_ids"),
        (6, lambda x: x._replace(usage=x.usage[1:]), "usage"),
        (7, lambda x: x._replace(least_used=x.least_used[None]), "least_used"),
        (7, lambda x: x[:5], "unlabeled"),
        (12, lambda x: x[:31], "outputs"),
        (12, lambda x: [*x[:7], x[7][:-1], *x[8:]], "outputs"),
        (12, lambda x: [*x[:23], x[23].int(), *x[24:]], "outputs"),
        (12, lambda x: [*x[:29], x[29].mT.contiguous().mT, *x[30:]], "outputs"),
    ],
)
def test_what_does_not_fit_is_named(at, change, name):
    ops, arguments = torch.ops.dan_fast, Problem((20, 15), (4, 5)).arguments()
    everything = [*arguments, None, ops.memory_scan(*arguments)]
    everything[at] = change(everything[at])
    if name != "outputs":
        with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
            ops.memory_scan(*everything[:11])
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        ops.memory_scan_backward(torch.ones((), dtype=torch.float64), *everything[:11], everything[12])


def test_the_same_bits_whatever_the_number_of_threads():
    arguments = Problem((40000, 35000), (2, 3), classes=50, fill=(1.0, 1.0), dtype=torch.float32).arguments()

    first, *others = by_threads(lambda: by_operators(arguments))
    assert (first.unlabeled_record.events & 1).any()
    assert all(all(map(torch.equal, first.flat, other.flat)) for other in others)
