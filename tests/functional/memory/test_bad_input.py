"""Wrong arguments are named and change nothing."""

import copy
import math

import pytest
import torch
from torch import Tensor

from dan_fast import MemoryState, functional
from tests.support.memory_arguments import (
    BATCH,
    F64,
    FLOATS,
    GATES,
    INTEGERS,
    TENSORS,
    arguments,
    get,
    module,
    put,
    refuses,
)
from tests.support.memory_problems import in_dtype


@pytest.mark.parametrize("name", TENSORS)
def test_another_device_is_named(impl, name):
    """`meta` stands for any second device."""
    given = arguments()
    # Everything is held against M's features: where those are elsewhere, the first that differs is named.
    memory, _, field = name.partition(".")
    first = f"{memory}.labels is on cpu" if field == "features" else f"{name} is on meta"
    refuses(impl, put(given, name, get(given, name).to("meta")), ValueError, f"^{first}.*: move one with")


@pytest.mark.parametrize("memory", ["labeled", "unlabeled"])
def test_a_memory_on_another_device_is_named(impl, memory):
    given = arguments()
    moved = given | {memory: MemoryState(*(x.to("meta") for x in given[memory]))}
    refuses(impl, moved, ValueError, "^unlabeled.features is on (meta|cpu), labeled.features on (meta|cpu)")


def test_memories_of_two_precisions_are_named(impl):
    given = arguments()
    single = in_dtype(given["unlabeled"], torch.float32)
    refuses(impl, given | {"unlabeled": single}, TypeError, "^unlabeled.features must be torch.float64")


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128], ids=str)
def test_a_wrong_dtype_is_named(impl, name, dtype):
    given = arguments()
    if name in GATES and dtype.is_floating_point:
        impl.memory_step(**put(given, name, get(given, name).to(dtype)))  # any floating dtype will do
        return
    blamed = name
    if name.endswith(".features") and dtype.is_floating_point:
        blamed = name.replace("features", "usage")  # which no longer fits
    refuses(impl, put(given, name, get(given, name).to(dtype)), TypeError, f"^{blamed} must .*got torch")


@pytest.mark.parametrize("name", FLOATS)
def test_eight_bits_are_refused(impl, name):
    wrong = get(arguments(), name).to(torch.float8_e4m3fn)
    refuses(impl, put(arguments(), name, wrong), TypeError, f"^{name} must .*got torch.float8")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bool, torch.uint8], ids=str)
def test_integers_that_are_not_int64_are_named(impl, name, dtype):
    given = arguments()
    wrong = get(given, name).abs().to(dtype)
    refuses(impl, put(given, name, wrong), TypeError, rf"^{name} must be torch.int64, got {dtype}.*\.to\(torch.int64\)")


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("wrong", [None, [[1.0, 2.0, 3.0]], "text", True, object()], ids=lambda x: type(x).__name__)
def test_what_is_no_tensor_is_named(impl, name, wrong):
    refuses(impl, put(arguments(), name, wrong), TypeError, f"^{name} must be a .*got {type(wrong).__name__}$")


@pytest.mark.parametrize("name", ["labeled", "unlabeled"])
def test_what_is_no_state_is_named(impl, name):
    for wrong in (None, tuple(arguments()[name]), torch.zeros(3)):
        sentence = f"^{name} must be a MemoryState, got {type(wrong).__name__}"
        refuses(impl, arguments() | {name: wrong}, TypeError, sentence)


def resized(x):
    """Everything that has another shape than `x` by a little."""
    yield x[None]
    if x.dim():
        yield x[0]
    for dim in range(x.dim()):
        yield torch.cat([x, x.narrow(dim, 0, 1)], dim)
        yield x.narrow(dim, 0, x.shape[dim] - 1)
        yield x.narrow(dim, 0, 1)
        yield x.narrow(dim, 0, 0)


@pytest.mark.parametrize("name", TENSORS)
def test_a_wrong_shape_is_named(impl, name):
    given = arguments()
    # Sizes come from the keys and the features: where one of those is wrong, what goes with it is named.
    partner = {"keys": "labels", "unlabeled_keys": "sample_ids"}
    for wrong in resized(get(given, name)):
        memory, _, field = name.partition(".")
        named = [name, partner.get(name, name)]
        if field == "features":
            named += [f"{memory}.labels", "unlabeled.features"]
        refuses(impl, put(given, name, wrong), ValueError, rf"^({'|'.join(named)}) must .*got (shape )?\(")


def test_a_memory_without_slots_or_numbers_is_refused(impl):
    for shape in ((0, 3), (4, 0)):
        nothing = MemoryState.empty(4, 3, F64)._replace(features=torch.zeros(shape, dtype=F64))
        for name in ("labeled", "unlabeled"):
            refuses(impl, arguments() | {name: nothing}, ValueError, f"^{name}.features must hold at least one slot")


# 1e160 is finite, its square is not; nor is that of 1e20 in float32.
NOT_FINITE = [(F64, value) for value in (math.nan, math.inf, -math.inf, 1e160, -1e200)]
NOT_FINITE += [(torch.float32, 1e20), (torch.bfloat16, 1e20)]
BAD_VALUES = [(name, *bad) for name in ("keys", "unlabeled_keys") for bad in NOT_FINITE]
BAD_VALUES += [(name, F64, value) for name in ("labels", "sample_ids") for value in (-1, -(2**63))]


@pytest.mark.parametrize(("name", "dtype", "value"), BAD_VALUES)
def test_a_bad_value_anywhere_is_named(impl, name, dtype, value):
    sentence = "must be finite and so must their squared norms" if name.endswith("keys") else "must not be negative"
    given = arguments(dtype)
    for at in range(given[name].numel()):
        wrong = given[name].clone()
        wrong.view(-1)[at] = value
        refuses(impl, given | {name: wrong}, ValueError, f"^{name} {sentence}")


def test_huge_but_usable_keys_are_written(impl):
    given = arguments()
    step = impl.memory_step(**(given | {"keys": 1e150 * given["keys"]}))
    assert step.loss.isfinite() and step.labeled.evaluation.isfinite().all()


def test_the_largest_labels_are_kept(impl):
    largest = torch.full((2,), 2**63 - 1)
    given = arguments()
    step = impl.memory_step(**(given | {"labels": largest, "labeled": MemoryState.empty(5, 3, F64)}))
    assert step.labeled.labels.tolist() == [2**63 - 1] * 2 + [-1] * 3
    assert step.pseudo_labels.tolist() == [2**63 - 1] * 3
    given |= {"sample_ids": torch.tensor([2**63 - 1, 2**33, 0]), "unlabeled": MemoryState.empty(4, 3, F64)}
    step = impl.memory_step(**(given | {"labels": torch.tensor([1, 1]), "labeled": MemoryState.empty(5, 3, F64)}))
    assert step.unlabeled.sample_ids.tolist() == [2**63 - 1, 2**33, 0, -1]


@pytest.mark.parametrize("name", ["labeled", "unlabeled"])
@pytest.mark.parametrize("slot", [-1, "slots", 2**40, -(2**62)])
def test_a_least_used_slot_that_does_not_exist_is_named(impl, name, slot):
    given = arguments()
    slot = len(given[name].labels) if slot == "slots" else slot
    given = put(given, f"{name}.least_used", torch.tensor(slot))
    refuses(impl, given, ValueError, f"^{name}.least_used must be a slot")


@pytest.mark.parametrize("name", ["decay", "decay_unlabeled"])
def test_a_wrong_decay_is_named(impl, name):
    for wrong in (-1e-9, 1 + 1e-9, 2, -1, math.nan, math.inf):
        refuses(impl, arguments() | {name: wrong}, ValueError, rf"^{name} must lie in \[0, 1\], got")
    for wrong in (None, "0.9", True, torch.tensor(0.9), [0.9]):
        refuses(impl, arguments() | {name: wrong}, TypeError, f"^{name} must be a number, got {type(wrong).__name__}")
    for right in (0, 1, 0.0, 1.0):
        assert impl.memory_step(**(arguments() | {name: right})).loss.isfinite()


@pytest.mark.parametrize("name", GATES)
def test_a_wrong_gate_is_named(impl, name):
    for wrong in (math.nan, math.inf, -math.inf):
        for form in (wrong, torch.tensor(wrong, dtype=F64), torch.tensor(wrong)):
            refuses(impl, arguments() | {name: form}, ValueError, f"^{name} must be finite")
    for wrong in (1j, {}, (0.1,)):
        refuses(impl, arguments() | {name: wrong}, TypeError, f"^{name} must be a .. tensor or a number, got")
    number = arguments()[name].item()
    found = [impl.memory_step(**given).loss for given in (arguments(), arguments() | {name: number})]
    assert torch.equal(*found)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name, wrong", [("unlabeled_keys", math.nan), ("labels", -1), ("alpha", math.inf)])
def test_where_values_are_not_looked_at_bad_ones_give_nan_and_leave_the_states(name, wrong, monkeypatch):
    """As on a GPU and in a compiled function."""
    given = arguments()
    value = given[name].clone()
    value.view(-1)[-1] = wrong
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    step = functional.memory_step(**given | {name: value})
    assert step.loss.isnan() and set(step.pseudo_labels.tolist()) == {-1}
    for memory in ("labeled", "unlabeled"):
        assert all(map(torch.equal, getattr(step, memory), given[memory]))


def test_the_first_of_several_faults_is_named(impl):
    given = arguments()
    given |= {"keys": given["keys"] * math.nan, "labels": -given["labels"] - 1, "beta": math.nan}
    refuses(impl, given, ValueError, "^(keys|beta) must be finite")


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("keys", lambda x: x * math.nan, ValueError),
        ("keys", lambda x: x * 1e200, ValueError),
        ("keys", lambda x: x.float(), TypeError),
        ("keys", lambda x: x[:, :2], ValueError),
        ("keys", lambda x: x.to("meta"), ValueError),
        ("labels", lambda x: -1 - x, ValueError),
        ("labels", lambda x: x[:1], ValueError),
        ("labels", lambda x: x.int(), TypeError),
        ("unlabeled_keys", lambda x: x * math.inf, ValueError),
        ("unlabeled_keys", lambda x: None, TypeError),
        ("sample_ids", lambda x: -1 - x, ValueError),
        ("sample_ids", lambda x: x[None], ValueError),
    ],
)
@pytest.mark.parametrize("pending", [False, True], ids=["settled", "waiting"])
def test_a_refused_batch_leaves_no_trace_in_the_module(name, wrong, error, pending):
    """Bit for bit: a twin that never saw it goes on to the same loss, gradients and states."""
    memory = module()
    given = {name: arguments()[name] for name in BATCH}
    if pending:
        memory(**given)
    twin = copy.deepcopy(memory)
    for _ in range(2):
        with pytest.raises(error, match=f"^{name} "):
            memory(**(given | {name: wrong(given[name])}))
    for _ in range(2):
        losses = [m(**given).loss for m in (memory, twin)]
        grads = [torch.autograd.grad(x, m.parameters()) for x, m in zip(losses, (memory, twin), strict=True)]
        assert torch.equal(*losses) and all(map(torch.equal, *grads))
    assert all(map(torch.equal, memory.state_dict().values(), twin.state_dict().values()))


WEIGHTS = {"keys": torch.ones(2, 3), "slots": torch.ones(4, 3), "occupied": torch.ones(4, dtype=torch.bool)}
SETS = {"evaluation": torch.ones(2, 4), "labels": torch.tensor([0, 1, -1, 0]), "pseudo_labels": torch.tensor([0, 1])}


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("keys", Tensor.int, TypeError),
        ("keys", lambda x: x[0], ValueError),
        ("keys", lambda x: x * math.nan, ValueError),
        ("keys", lambda x: x * 1e30, ValueError),
        ("keys", lambda x: None, TypeError),
        ("slots", Tensor.double, TypeError),
        ("slots", lambda x: x[:, :2], ValueError),
        ("slots", lambda x: x.to("meta"), ValueError),
        ("occupied", lambda x: x[:3], ValueError),
        ("occupied", Tensor.long, TypeError),
        ("occupied", lambda x: x.to("meta"), ValueError),
        ("evaluation", Tensor.long, TypeError),
        ("evaluation", lambda x: x[0], ValueError),
        ("labels", lambda x: x[:3], ValueError),
        ("labels", Tensor.int, TypeError),
        ("labels", lambda x: x.to("meta"), ValueError),
        ("pseudo_labels", lambda x: x[:1], ValueError),
        ("pseudo_labels", Tensor.float, TypeError),
        ("pseudo_labels", lambda x: x.to("meta"), ValueError),
    ],
)
def test_wrong_weights_and_sets_are_named(impl, name, change, error):
    function, given = (impl.cosine_softmax, WEIGHTS) if name in WEIGHTS else (impl.false_sample_sets, SETS)
    with pytest.raises(error, match=f"^{name} "):
        function(**given | {name: change(given[name])})
