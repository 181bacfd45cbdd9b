"""The scan's kernels on the CPU against PyTorch and the literal reference: values, gradients, faults, equal bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dan_fast import MemoryState, reference
from dan_fast.functional.memory.scan_types import Slots, WrittenSlots
from tests.support.memory_problems import make_keys
from tests.support.running import by_threads, new_memory_poisoned
from tests.support.scan_problems import Problem, in_pytorch
from tests.support.toolchain import needs_extension

pytestmark = needs_extension
OPS = torch.ops.dan_fast
KINDS = ("random", "close", "repeated", "opposite", "zero", "all zero")


def scan(arguments: list) -> list[Tensor]:
    return OPS.memory_scan(*arguments[:6], list(arguments[6]), list(arguments[7]), *arguments[8:])


def gradients(arguments: list, outputs: list[Tensor], grad_loss: float = 1.0) -> tuple[Tensor, ...]:
    grad = torch.tensor(grad_loss, dtype=arguments[0].dtype)
    memories = list(arguments[6]), list(arguments[7])
    return OPS.memory_scan_backward(grad, *arguments[:6], *memories, *arguments[8:], outputs)


def agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, what: str = "") -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).abs() / (1 + expected.abs())
    assert torch.equal(actual.isfinite(), expected.isfinite()), what
    assert not (error > tolerance).any(), f"{what} off by {error.max():.3g}"


def check(problem: Problem, tolerance: float = 1e-10, slope: float = 0.0) -> list[Tensor]:
    """`slope`: where a key or slot has norm 0 its gradient is up to 1e12 times a rounding error."""
    arguments = problem.arguments()
    outputs = scan(arguments)
    expected, expected_gradients = in_pytorch(arguments, -1.7)
    agree(outputs[0], expected.loss, tolerance, "loss")
    assert torch.equal(outputs[1], expected.pseudo_labels) and torch.equal(outputs[2], expected.fault)
    for at, memory, before in ((3, expected.labeled, arguments[6]), (11, expected.unlabeled, arguments[7])):
        for name, a, b in zip(WrittenSlots._fields, outputs[at : at + 8], memory, strict=True):
            # What an empty slot holds of it is not read; a memory without a write keeps it.
            untouched = name == "evaluation" and memory.held.shape[0] == 0
            agree(a, before.evaluation if untouched else b, tolerance, name)
    names = ("scores", "unlabeled_scores", "gram", "gates")
    for name, a, b in zip(names, gradients(arguments, outputs, -1.7), expected_gradients, strict=True):
        if slope:
            assert a.isfinite().all() and b.isfinite().all()
            continue
        agree(a, b, tolerance, f"gradient of {name}")
    return outputs


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
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
    problem = Problem(slots, batch, d, classes, fill, kind, gates, seed)
    check(problem, slope=float("zero" in kind))


SPECIAL = {
    "fewer slots than samples": {"slots": (2, 3), "batch": (6, 7), "fill": (0.0, 0.0)},
    "one slot": {"slots": (1, 1), "batch": (4, 5)},
    "one class": {"slots": (9, 8), "batch": (3, 6), "classes": 1},
    "two classes, more of one than others": {"slots": (20, 30), "batch": (5, 9), "classes": 2},
    "no labelled sample": {"slots": (9, 8), "batch": (0, 5)},
    "no unlabelled sample": {"slots": (9, 8), "batch": (5, 0)},
    "no sample": {"slots": (9, 8), "batch": (0, 0)},
    "nothing to retrieve from": {"slots": (9, 8), "batch": (0, 4), "fill": (0.0, 1.0)},
    "numbers": {"slots": (30, 20), "batch": (6, 6), "d": 1},
    "several chunks": {"slots": (1300, 1111), "batch": (5, 9), "classes": 7, "fill": (1.0, 1.0), "d": 16},
    "several chunks of ties": {"slots": (1300, 1111), "batch": (3, 5), "classes": 2, "kind": "repeated"},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_cases(name: str):
    outputs = check(Problem(**SPECIAL[name]))
    events = outputs[28]
    if name in ("two classes, more of one than others", "several chunks", "several chunks of ties"):
        false_positives, false_negatives = ((events & bit).ne(0).sum(1) for bit in (1, 2))
        assert torch.equal(false_positives, false_negatives) and false_positives.sum() > 5
    if name == "nothing to retrieve from":
        assert outputs[0] == 0 and (outputs[1] == -1).all() and not any(x.any() for x in outputs[24:])


def test_the_memories_are_those_of_the_reference():
    """Finds what PyTorch's scan and the kernels could have wrong alike; over three batches."""
    problem = Problem((40, 30), (6, 7), fill=(0.5, 0.9), classes=3, seed=5)
    generator = torch.Generator().manual_seed(6)
    for _ in range(3):
        problem.keys, problem.unlabeled_keys = (make_keys("random", n, 5, generator) for n in (6, 7))
        keys, unlabeled_keys = (x.clone().requires_grad_() for x in (problem.keys, problem.unlabeled_keys))
        gates = [gate.clone().requires_grad_() for gate in problem.gates]
        step = reference.memory_step(
            *problem.states, keys, problem.labels, unlabeled_keys, problem.sample_ids, *gates, *problem.settings[:2]
        )
        arguments = problem.arguments()
        outputs = scan(arguments)
        agree(outputs[0], step.loss)
        assert torch.equal(outputs[1], step.pseudo_labels)
        states = []
        for at, old, rows in ((3, problem.states[0], problem.keys), (11, problem.states[1], problem.unlabeled_keys)):
            new = WrittenSlots(*outputs[at : at + 8])
            features = new.kept[:, None] * old.features + new.held.mT @ rows
            states.append(MemoryState(features, new.labels, new.usage, new.evaluation, new.least_used, new.sample_ids))
            agree(new.square_norms, features.square().sum(1))
        for actual, expected in zip((*states[0], *states[1]), (*step.labeled, *step.unlabeled), strict=True):
            agree(actual, expected)
        grad_scores, grad_unlabeled_scores, grad_gram, grad_gates = gradients(arguments, outputs)
        queries = torch.cat([problem.keys, problem.unlabeled_keys])
        grad_queries = grad_scores @ problem.states[0].features + (grad_gram + grad_gram.mT) @ queries
        grad_queries[6:] += grad_unlabeled_scores @ problem.states[1].features
        expected = torch.autograd.grad(step.loss, [keys, unlabeled_keys, *gates])
        agree(grad_queries, torch.cat(expected[:2]))
        agree(grad_gates, torch.stack(expected[2:]))
        problem.states = states


def test_records_are_the_states_between_the_writes():
    problem = Problem((30, 25), (5, 6), classes=2, fill=(0.7, 1.0), seed=8)
    arguments = problem.arguments()
    outputs = scan(arguments)
    for count in range(1, 6):
        shorter = list(arguments)
        shorter[0], shorter[1], shorter[2] = arguments[0][:count], arguments[1][:0], arguments[2][:count, :count]
        shorter[4], shorter[5] = arguments[4][:count], arguments[5][:0]
        after = WrittenSlots(*scan(shorter)[3:11])
        assert torch.equal(outputs[22][count - 1], after.square_norms)
        assert torch.equal(outputs[21][count - 1], after.evaluation)
        before = after.kept * arguments[0][count] if count < 5 else None
        if before is not None:
            agree(outputs[19][count], before + arguments[2][count, :count] @ after.held)
    for count in range(1, 7):
        shorter = list(arguments)
        rows = 5 + count
        shorter[0], shorter[1], shorter[2] = arguments[0][:rows], arguments[1][:count], arguments[2][:rows, :rows]
        shorter[5] = arguments[5][:count]
        after = WrittenSlots(*scan(shorter)[11:19])
        assert torch.equal(outputs[27][count - 1], after.square_norms)
        assert torch.equal(outputs[26][count - 1], after.evaluation)
        assert int((outputs[28][count - 1] & 4).ne(0).sum()) == 1


@pytest.mark.parametrize("seed", range(4))
def test_float32_is_as_exact_as_pytorch_in_float32(seed: int):
    problem = Problem((200, 150), (6, 6), d=64, classes=4, kind="close", seed=seed, dtype=torch.float32)
    for state in problem.states:  # no two slots of nearly the same usage
        order = torch.randperm(state.usage.numel(), generator=torch.Generator().manual_seed(seed))
        state.usage.copy_(order / 10.0)
    arguments = problem.arguments()
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    for at in (6, 7):
        wide[at] = Slots(*(x.double() if x.is_floating_point() else x for x in arguments[at]))
    exact, exact_gradients = in_pytorch(wide)
    single, single_gradients = in_pytorch(arguments)
    outputs = scan(arguments)
    assert torch.equal(outputs[1], exact.pseudo_labels) and torch.equal(single.pseudo_labels, exact.pseudo_labels)

    def error(actual: Tensor, expected: Tensor) -> float:
        return ((actual.detach().double() - expected).norm() / (expected.norm() + 1e-30)).item()

    values = [
        (outputs[0], single.loss, exact.loss),
        *zip(outputs[3:8], single.labeled[:5], exact.labeled[:5], strict=True),
        *zip(outputs[11:16], single.unlabeled[:5], exact.unlabeled[:5], strict=True),
        *zip(gradients(arguments, outputs), single_gradients, exact_gradients, strict=True),
    ]
    for k, (ours, theirs, truth) in enumerate(values):
        assert error(ours, truth) <= 2 * error(theirs, truth) + 3e-7, (k, error(ours, truth), error(theirs, truth))


def spoil(arguments: list, at: int, index: tuple[int, ...], value: float) -> list:
    spoiled = list(arguments)
    spoiled[at] = arguments[at].clone()
    spoiled[at][index] = value
    return spoiled


def with_least_used(arguments: list, at: int, value: int) -> list:
    spoiled = list(arguments)
    spoiled[at] = arguments[at]._replace(least_used=torch.tensor(value))
    return spoiled


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_faults_change_nothing(dtype: torch.dtype):
    arguments = Problem((7, 8), (2, 3), dtype=dtype).arguments()
    inf, nan = float("inf"), float("nan")
    faulty = {
        1: [spoil(arguments, 2, (0, 0), nan), spoil(arguments, 2, (1, 1), inf)],
        2: [spoil(arguments, 2, (2, 2), inf), spoil(arguments, 2, (4, 4), -nan)],
        4: [spoil(arguments, 4, (1,), -1)],
        8: [spoil(arguments, 5, (2,), -5)],
        16: [spoil(arguments, 3, (0,), nan)],
        32: [spoil(arguments, 3, (1,), -inf)],
        64: [spoil(arguments, 3, (2,), inf)],
        128: [with_least_used(arguments, 6, -1), with_least_used(arguments, 6, 7)],
        256: [with_least_used(arguments, 7, -1), with_least_used(arguments, 7, 8)],
        80: [spoil(spoil(arguments, 3, (0,), nan), 3, (2,), nan)],
    }
    for bits, cases in faulty.items():
        for case in cases:
            outputs = scan(case)
            assert outputs[2] == bits and outputs[2].dtype == torch.int32
            assert outputs[0].isnan() and (outputs[1] == -1).all()
            for at, before in ((3, case[6]), (11, case[7])):
                after = WrittenSlots(*outputs[at : at + 8])
                assert (after.kept == 1).all() and (after.held == 0).all()
                assert all(torch.equal(getattr(after, name), x) for name, x in zip(Slots._fields, before, strict=True))
            assert not any(x.any() for x in outputs[19:])
            assert not any(g.any() for g in gradients(case, outputs))


def test_only_the_lower_triangle_is_read_and_differentiated():
    arguments = Problem((20, 20), (4, 5), classes=2, seed=3).arguments()
    outputs = scan(arguments)
    upper = torch.ones_like(arguments[2]).triu(1).bool()
    lower = [*arguments[:2], arguments[2].masked_fill(upper, float("nan")), *arguments[3:]]
    again = scan(lower)
    assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))
    for a, b in zip(gradients(lower, again), gradients(arguments, outputs), strict=True):
        assert torch.equal(a, b)
    grad_gram = gradients(arguments, outputs)[2]
    assert not grad_gram[upper].any() and grad_gram[~upper].ne(0).sum() >= 40


@pytest.mark.parametrize("fill", [(0.8, 0.9), (0.0, 0.9)])
@pytest.mark.parametrize("batch", [(3, 4), (0, 3), (2, 0)])
def test_every_result_is_written(batch: tuple[int, int], fill: tuple[float, float]):
    arguments = Problem((37, 41), batch, fill=fill).arguments()
    plain = scan(arguments)
    plain_gradients = gradients(arguments, plain)
    with new_memory_poisoned():
        poisoned = scan(arguments)
        poisoned_gradients = gradients(arguments, poisoned)
    for a, b in zip((*plain, *plain_gradients), (*poisoned, *poisoned_gradients), strict=True):
        assert torch.equal(a, b) and a.double().isfinite().all()


def test_any_strides_and_an_expanded_tensor():
    arguments = Problem((20, 15), (4, 5), classes=2).arguments()
    loose = [x.mT.contiguous().mT if isinstance(x, Tensor) and x.dim() == 2 else x for x in arguments]
    loose[3], arguments[3] = (torch.tensor([0.3], dtype=torch.float64).expand(3) for _ in range(2))
    loose[6] = Slots(*(torch.stack([x, x], -1)[..., 0] for x in arguments[6]))
    outputs, expected = scan(loose), scan(arguments)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    for a, b in zip(gradients(loose, outputs), gradients(arguments, expected), strict=True):
        assert torch.equal(a, b)


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
    arguments = Problem((20, 15), (4, 5)).arguments()
    everything = [*arguments, None, scan(arguments)]
    everything[at] = change(everything[at])
    if name != "outputs":
        with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
            scan(everything[:11])
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        gradients(everything[:11], everything[12])


def results() -> list[Tensor]:
    """Of problems with several chunks, odd sizes, cleared slots and ties, in both dtypes."""
    found = []
    for dtype in (torch.float32, torch.float64):
        for slots, kind in (((1300, 1111), "random"), ((600, 531), "repeated"), ((13, 7), "close")):
            arguments = Problem(slots, (5, 6), d=7, kind=kind, classes=3, dtype=dtype).arguments()
            # The BLAS may round by the number of threads: that is not what is compared.
            arguments[:3] = [(x * 64).round() / 64 for x in arguments[:3]]
            outputs = scan(arguments)
            found += [*outputs, *gradients(arguments, outputs)]
    return found


def test_the_same_bits_whatever_the_number_of_threads():
    arguments = Problem((40000, 35000), (2, 3), classes=50, fill=(1.0, 1.0), dtype=torch.float32).arguments()

    def run() -> tuple[Tensor, ...]:
        outputs = scan(arguments)
        return *outputs, *gradients(arguments, outputs)

    runs = by_threads(run)
    assert (runs[0][28] & 1).any()
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.compile
@pytest.mark.parametrize("batch", [(3, 2), (0, 2), (3, 0)])
def test_opcheck(batch):
    scores, unlabeled_scores, gram, gates, *rest = Problem((7, 5), batch, classes=2).arguments()
    leaves = [x.detach().requires_grad_() for x in (scores, unlabeled_scores, gram, gates)]
    torch.library.opcheck(torch.ops.dan_fast.memory_scan.default, (*leaves, *rest))
    plain = (scores, unlabeled_scores, gram, gates, *rest)
    arguments = (torch.ones_like(gates[0]), *plain, torch.ops.dan_fast.memory_scan(*plain))
    torch.library.opcheck(torch.ops.dan_fast.memory_scan_backward.default, arguments)
