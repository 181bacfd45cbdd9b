"""The memory module: pending writes, state dict, gates."""

import copy
import io
import os
import re
import signal
from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import func, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dan_fast import MemoryState, _extension, functional, reference
from dan_fast.core.checks import STEP_FAULTS
from dan_fast.core.types import MemoryStep
from dan_fast.functional.memory import passes, pending, step
from dan_fast.nn import ProgressiveAugmentedMemory
from dan_fast.nn import memory as memories
from dan_fast.training.determinism import deterministic_algorithms
from tests.support.memory_modules import DIM, PSEUDO_SLOTS, SLOTS, assert_both_close, assert_states_close, batches, make


def stepped(count, dtype=torch.float64):
    memory = make(dtype=dtype)
    for batch in batches(count, dtype=dtype):
        memory(*batch)
    return memory


def test_starts_as_the_contract_says():
    memory = make()
    assert memory.alpha == 0 and memory.alpha_unlabeled == 0
    torch.testing.assert_close(memory.beta, torch.tensor(0.1, dtype=torch.float64))
    assert [x.features.shape for x in (memory.labeled, memory.unlabeled)] == [(SLOTS, DIM), (PSEUDO_SLOTS, DIM)]
    assert {name for name, _ in memory.named_parameters()} == {"alpha", "alpha_unlabeled", "beta_logit"}
    assert [n.item() for n in memory.occupied_slots()] == [0, 0]


@pytest.mark.parametrize("keep", ["nothing", "steps", "graphs", "snapshots"])
@pytest.mark.parametrize("limit", [4, 10, 1000])
def test_waiting_writes_equal_writes_settled_at_every_step(monkeypatch, limit, keep):
    monkeypatch.setattr(pending, "MAX_PENDING", limit)
    memory, expected = make(), make()
    gates, kept, seen = (0.0, 0.0, memory.beta.detach(), 0.9, 0.8), [], []
    for batch in batches(8):
        keys = [batch[0].clone().requires_grad_() for _ in range(2)]
        step = memory(keys[0], *batch[1:])
        expected = functional.memory_step(expected.labeled, expected.unlabeled, keys[1], *batch[1:], *gates)
        torch.testing.assert_close(step.loss, expected.loss, rtol=1e-11, atol=1e-11)
        assert torch.equal(step.pseudo_labels, expected.pseudo_labels)
        (grad,) = torch.autograd.grad(step.loss, keys[0], retain_graph=keep == "graphs")
        (expected_grad,) = torch.autograd.grad(expected.loss, keys[1])
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-11)
        if keep == "steps":
            kept.append((step, expected))
        elif keep == "graphs":
            kept.append((step.loss, keys[0], grad))
        elif keep == "snapshots":
            kept.append((memory.labeled, expected.labeled))
        seen.append(memory._labeled.pending)
    # Where nothing counts on the features, each step folds in what the step before left.
    assert seen == {"nothing": [3] * 8, "snapshots": [0] * 8}.get(keep, seen)
    if keep in ("steps", "graphs"):
        assert max(seen) > min(limit, 20) and max(seen) <= limit + 3
    assert_both_close(memory, expected, 1e-11)
    assert memory._labeled.pending == 0
    for entry in kept:
        if keep == "steps":
            assert_both_close(*entry, 1e-11)
        elif keep == "graphs":
            (again,) = torch.autograd.grad(*entry[:2])
            assert torch.equal(again, entry[2])
        else:
            assert_states_close(*entry, rtol=1e-11, atol=1e-11)


def test_under_autocast_half_precision_keys_are_taken_to_the_memory():
    memories = [make(dtype=torch.float32) for _ in range(2)]
    for keys, labels, unlabeled_keys, ids in batches(3, dtype=torch.bfloat16):
        half = [keys.requires_grad_(), unlabeled_keys.requires_grad_()]
        with pytest.raises(TypeError, match="keys must be torch.float32"):
            memories[0](half[0], labels, half[1], ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step = memories[0](half[0], labels, half[1], ids)
        wide = [x.detach().float().requires_grad_() for x in half]
        expected = memories[1](wide[0], labels, wide[1], ids)
        assert step.loss.dtype == torch.float32 and torch.equal(step.loss, expected.loss)
        grads = torch.autograd.grad(step.loss, half), torch.autograd.grad(expected.loss, wide)
        for actual, wanted in zip(*grads, strict=True):
            assert actual.dtype == torch.bfloat16 and torch.equal(actual, wanted.bfloat16())
    assert_states_close(memories[0].labeled, memories[1].labeled, rtol=0, atol=0)


@pytest.mark.parametrize("own, given", [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)], ids=str)
def test_unlabelled_keys_may_be_left_out(own: torch.dtype, given: torch.dtype):
    left_out, empty = (ProgressiveAugmentedMemory(6, 4, 3).to(own) for _ in range(2))
    keys, labels = torch.randn(4, 3).to(given), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=own != given):
        step = left_out(keys.requires_grad_(), labels)
        empty(keys, labels, torch.empty(0, 3, dtype=given), torch.empty(0, dtype=torch.int64))
    assert step.loss == 0 and len(step.pseudo_labels) == 0
    assert_both_close(left_out, empty)
    with pytest.raises(TypeError, match="sample_ids must be a tensor, got NoneType"):
        left_out(keys.to(own), labels, keys.to(own))
    with pytest.raises(TypeError, match="keys must be a tensor, got list"):
        left_out([[1.0]], labels)


@pytest.mark.parametrize("own, given", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_the_loss_of_labelled_keys_takes_what_forward_takes(own: torch.dtype, given: torch.dtype):
    memory = make(dtype=own)
    first, (keys, labels, *_) = batches(2, dtype=torch.float32)
    memory(*(x.to(own) if x.is_floating_point() else x for x in first))
    keys = keys.to(given).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = memory.labeled_loss(keys, labels, 0.1)
    state = memory.labeled
    expected = functional.discriminative_loss(keys.to(own), labels, state.features, state.labels, 0.1)
    assert losses.dtype == torch.float32 and torch.equal(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), keys)
    assert gradient.dtype == given and gradient.any()
    for wrong, error, words in (
        (keys, TypeError, f"keys must be {own}"),
        (keys.to(own)[:, :2], ValueError, r"keys must have shape \(B, 5\)"),
        (keys.to("meta", own), ValueError, "keys is on meta, labeled.features on cpu"),
    ):
        with pytest.raises(error, match=words):
            memory.labeled_loss(wrong, labels, 0.1)


@pytest.mark.compile
def test_the_loss_of_labelled_keys_is_one_graph_once_nothing_waits(recwarn):
    memory, (batch, (keys, labels, *_)) = make(), batches(2)
    memory(*batch)
    twin = copy.deepcopy(memory)
    twin(*batch), memory(*batch)

    def loss(keys):
        return memory.labeled_loss(keys, labels, temperature=0.5)

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"keys wait to be written to the memory: call its settle"):
        torch.compile(loss, fullgraph=True, backend="eager")(keys)
    assert torch.equal(torch.compile(loss, backend="eager")(keys), twin.labeled_loss(keys, labels, temperature=0.5))
    memory(*batch), twin(*batch)
    memory.settle()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")(keys)
    assert torch.equal(compiled, twin.labeled_loss(keys, labels, temperature=0.5))
    # As PyTorch says of what it cannot trace, of which signals are a part.
    assert not [each for each in recwarn if "does not know how to trace" in str(each.message)]


def test_features_are_overwritten_in_place_when_nothing_counts_on_them():
    memory = make()
    address = memory._labeled.base.data_ptr()
    for batch in batches(4):
        memory(batch[0].requires_grad_(), *batch[1:]).loss.backward()
        assert memory._labeled.base.data_ptr() == address
    memory.settle()
    assert memory._labeled.base.data_ptr() == address and memory._labeled.pending == 0
    snapshot = memory.labeled
    copy_of_it = [x.clone() for x in snapshot]
    for batch in batches(2):
        memory(*batch)
    assert memory._labeled.base.data_ptr() != address
    assert_states_close(snapshot, copy_of_it)


def test_a_backward_that_wants_overwritten_features_fails():
    """What no graph of this package holds, a graph of the caller may."""
    memory = make()
    first, second = batches(2)
    memory(*first)
    weights = torch.ones(SLOTS, dtype=torch.float64, requires_grad=True)
    product = weights @ memory._labeled.base
    memory(*second)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_what_saved_tensor_hooks_pack_is_not_overwritten():
    """Packed as another tensor of the same numbers, as by a hook that only moves what is elsewhere."""
    grads = []
    for hooks in (nullcontext(), torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda x: x)):
        memory, (*before, batch, first, second) = make(), batches(5)
        for each in before:
            memory(*each)
        keys = batch[0].clone().requires_grad_()
        with hooks:
            loss = memory(keys, *batch[1:]).loss
        memory(*first), memory(*second)
        grads += torch.autograd.grad(loss, keys)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)
    address = memory._labeled.base.data_ptr()
    memory(*before[0]), memory.settle()
    assert memory._labeled.base.data_ptr() == address, "without hooks it is written in place again"


def test_a_checkpoint_does_not_decide_the_rounding():
    """On a CPU bit for bit: with and without a state dict taken after every other batch, by the float32 module."""
    read, fresh = make(dtype=torch.float32), make(dtype=torch.float32)
    for at, batch in enumerate(batches(8, dtype=torch.float32)):
        for memory in (read, fresh):
            memory(batch[0].clone().requires_grad_(), *batch[1:]).loss.backward()
        if at % 2:
            read.state_dict()
    assert_both_close(read, fresh)


def test_a_training_on_a_gpu_that_is_to_repeat_itself_leaves_nothing_waiting(monkeypatch):
    def settled(deterministic: bool) -> bool:
        with deterministic_algorithms(deterministic):
            memory = stepped(3)
        return memory._labeled.pending == memory._unlabeled.pending == 0

    # Asked with the device of the memories; here that is a CPU, whose passes round alike.
    settles = memories._settles_each_step
    assert not settled(True)
    monkeypatch.setattr(memories, "_settles_each_step", lambda device: settles(torch.device("cuda")))
    assert settled(True) and not settled(False)


@pytest.mark.parametrize("settle", [False, True])
def test_one_backward_through_two_steps(monkeypatch, settle):
    """As meta learning does: neither the second step nor a reading may overwrite what the first one needs."""
    monkeypatch.setattr("dan_fast.functional.memory.pending.MAX_PENDING", 4 if settle else 128)
    warm_up, first, second = batches(3)
    key = first[0].requires_grad_()
    results = []
    for fast in (True, False):
        memory = make()
        memory(*warm_up)
        labeled, unlabeled = memory.labeled, memory.unlabeled
        alpha = memory.alpha
        if fast:
            loss = memory(*first).loss
            grads = torch.autograd.grad(loss, [key, alpha], create_graph=True)
            moved = {"alpha": alpha - 0.5 * grads[1]}
            inner = torch.func.functional_call(memory, moved, (second[0] + 0.1 * grads[0], *second[1:]))
            if settle:
                memory.state_dict()
                memory.labeled, memory.unlabeled = memory.labeled, memory.unlabeled
        else:
            gates = (memory.alpha_unlabeled, memory.beta, 0.9, 0.8)
            step = functional.memory_step(labeled, unlabeled, *first, alpha, *gates)
            loss = step.loss
            grads = torch.autograd.grad(loss, [key, alpha], create_graph=True)
            moved = second[0] + 0.1 * grads[0], *second[1:], alpha - 0.5 * grads[1]
            inner = functional.memory_step(step.labeled, step.unlabeled, *moved, *gates)
        results.append(torch.autograd.grad(loss + inner.loss, [key, alpha, memory.alpha_unlabeled, memory.beta_logit]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)
    assert all(grad.any() for grad in results[0])


def test_functional_call_replaces_gates_and_advances_the_state():
    memory, twin = make(), make()
    (batch,) = batches(1)
    alpha = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    torch.func.functional_call(memory, {"alpha": alpha}, batch)
    with torch.no_grad():
        twin.alpha.fill_(1.5)
    twin(*batch)
    assert memory.alpha == 0
    assert_states_close(memory.labeled, twin.labeled)


def test_a_step_keeps_its_states_when_the_memory_goes_on():
    memory, fresh, (first, second) = make(), make(), batches(2)
    step = memory(*first)
    memory(*second)
    expected = functional.memory_step(fresh.labeled, fresh.unlabeled, *first, 0.0, 0.0, 0.1, 0.9, 0.8)
    assert isinstance(step, MemoryStep) and isinstance(step.labeled, MemoryState)
    assert repr(step).count("MemoryState(features=tensor") == 2
    assert_states_close(step.labeled, expected.labeled)
    loss, pseudo_labels, labeled, unlabeled = step
    assert loss is step.loss and pseudo_labels is step[1]
    assert_states_close(unlabeled, expected.unlabeled)
    assert_states_close(step[2:][0], labeled)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict_round_trip_goes_on_bit_for_bit(tmp_path, dtype):
    memory, other = (nn.ModuleDict({"memory": make(dtype=dtype)}) for _ in range(2))
    for batch in batches(3, dtype=dtype):
        memory["memory"](*batch)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    other.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    for batch in batches(2, seed=1, dtype=dtype):
        assert torch.equal(memory["memory"](*batch).loss, other["memory"](*batch).loss)
    torch.testing.assert_close(memory.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert memory["memory"].unlabeled.usage.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def loadable() -> dict[str, torch.Tensor]:
    return stepped(2).state_dict() | {"alpha": torch.tensor(3.0, dtype=torch.float64)}


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_that_does_not_fit_changes_nothing(strict: bool):
    memory, state = stepped(1), loadable()
    before = copy.deepcopy(memory.state_dict())
    features, labels = state["labeled.features"], state["labeled.labels"]
    for wrong, sentence in (
        ({"labeled.features": torch.cat([features, features[:1]])}, r"labeled.labels must have shape \(13,\)"),
        ({f"labeled.{name}": x for name, x in MemoryState.empty(11, DIM)._asdict().items()}, r"shape \(12, 5\) like"),
        ({"labeled.labels": labels.half()}, "labeled.labels must be a tensor of torch.int64, got torch"),
        ({"labeled.usage": state["labeled.usage"].numpy()}, "labeled.usage must be a tensor of .*, got "),
        ({"labeled.usage": labels}, "labeled.usage must be a tensor of .*, got torch.int64"),
        ({"alpha_unlabeled": torch.zeros(2)}, "size mismatch for alpha_unlabeled"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            memory.load_state_dict(state | wrong, strict=strict)
        for name, value in memory.state_dict().items():
            # PyTorch loads one parameter after the other.
            assert torch.equal(value, before[name]) or (name == "alpha" and "alpha_unlabeled" in wrong)


def test_what_a_state_dict_lacks_or_has_too_much_is_said():
    state = loadable()
    with pytest.raises(RuntimeError, match="Missing key.*unlabeled.usage"):
        make().load_state_dict({name: state[name] for name in state if name != "unlabeled.usage"})
    with pytest.raises(RuntimeError, match="Unexpected key.*labeled.colour"):
        make().load_state_dict(state | {"labeled.colour": torch.zeros(1)})


def test_a_memory_that_is_complete_is_loaded_without_the_other():
    module, state = nn.ModuleDict({"first": nn.Linear(1, 1), "memory": make()}), loadable()
    partial = {f"memory.{name}": value for name, value in state.items() if name != "unlabeled.sample_ids"}
    found = module.load_state_dict(partial | {"second": torch.zeros(1)}, strict=False)
    missing = {f"memory.unlabeled.{field}" for field in MemoryState._fields}
    assert set(found.missing_keys) == {"first.weight", "first.bias"} | missing
    memory = module["memory"]
    assert_states_close(memory.labeled, [state[f"labeled.{field}"] for field in MemoryState._fields], rtol=0, atol=0)
    assert memory.alpha == 3 and memory.occupied_slots()[1] == 0
    memory(*next(batches(1, seed=3)))


def test_a_module_without_storage_takes_a_state_dict_as_it_is():
    trained = stepped(2)
    with torch.device("meta"):
        memory = make(dtype=torch.float32)
    memory.load_state_dict(trained.state_dict(), assign=True)
    assert memory.labeled.features.dtype == torch.float64 and memory.labeled.features.device.type == "cpu"
    state = copy.deepcopy(trained.state_dict())
    for batch in batches(2, seed=3):
        assert torch.equal(memory(*batch).loss, trained(*batch).loss)
    # Nor are the tensors of the state dict those that later steps overwrite.
    other, given = make(), copy.deepcopy(state)
    other.load_state_dict(given, assign=True)
    for batch in batches(2, seed=3):
        other(*batch)
    assert_both_close(other, memory)
    torch.testing.assert_close(given, state, rtol=0, atol=0)
    larger = ProgressiveAugmentedMemory(SLOTS + 1, PSEUDO_SLOTS, DIM)
    with pytest.raises(RuntimeError, match=r"labeled.features must have shape \(13, 5\)"):
        larger.load_state_dict(state, assign=True)


def test_a_parted_state_is_copied_or_refused():
    memory, taken, other = stepped(2), make(), make()
    nn.init.constant_(memory.alpha, 0.3)
    whole, features = memory.parted_state_dict()
    assert not any(value.requires_grad for value in (*whole.values(), *features.values()))
    kept = {name: value.clone() for name, value in features.items()}
    for each in (taken, other):
        each.load_parted_state_dict(whole, lambda name, rows: kept[name][rows])
    states = copy.deepcopy(memory.state_dict())
    for batch in batches(3, seed=5):
        taken(*batch)
    taken.settle()
    assert all(map(torch.equal, kept.values(), features.values()))
    assert all(map(torch.equal, other.state_dict().values(), states.values()))
    lacking = {name: value for name, value in whole.items() if name not in ("unlabeled.usage", "alpha")}
    fewer = whole | {"labeled.labels": whole["labeled.labels"][1:]}
    for given, read, match in (
        (lacking, lambda name, rows: kept[name][rows], "^alpha is missing in what is read"),
        (lacking | {"alpha": whole["alpha"]}, lambda name, rows: kept[name][rows], "^unlabeled.usage is missing"),
        (fewer, lambda name, rows: kept[name][rows], "^labeled has 12 slots here and 11 in what is read"),
        (whole, lambda name, rows: kept[name][rows][:, 1:], "^labeled.features of slots 0 to .* must have shape"),
        (whole, lambda name, rows: kept[name][rows][1:], "^labeled.features of slots 0 to .* must have shape"),
    ):
        with pytest.raises(ValueError, match=match):
            other.load_parted_state_dict(given, read)
    assert all(map(torch.equal, other.state_dict().values(), states.values()))


def test_faults_told_later_add_up_until_they_are_asked_for(monkeypatch):
    """As on a GPU, whose flags nothing waits for."""

    class Flag(int):
        device = torch.device("cuda")

    flags, pending_step = iter(map(Flag, (1, 0, 4))), memories.pending_memory_step

    def stepped_with_a_flag(*arguments):
        result, *after = pending_step(*arguments)
        return result._replace(fault=next(flags)), *after

    monkeypatch.setattr(memories, "pending_memory_step", stepped_with_a_flag)
    memory = make()
    memory.check_faults()
    for batch in batches(3):
        memory(*batch)
    with pytest.raises(ValueError, match=f"^{re.escape(STEP_FAULTS[0])}$"):
        memory.check_faults()
    memory.check_faults()


def test_states_are_assignable_and_checked():
    memory, other = make(), stepped(2)
    memory.labeled, memory.unlabeled = other.labeled, other.unlabeled
    (batch,) = batches(1, seed=4)
    assert torch.equal(memory(*batch).loss, other(*batch).loss)
    before = memory.labeled
    for wrong, error, match in (
        (MemoryState.empty(SLOTS + 1, DIM, torch.float64), ValueError, r"features must have shape \(12, 5\)"),
        (MemoryState.empty(SLOTS, DIM), TypeError, "labeled.features must be torch.float64"),
        (before._replace(labels=before.labels[:3]), ValueError, "labeled.labels must have shape"),
        ("state", TypeError, "labeled must be a MemoryState"),
        (MemoryState.empty(SLOTS, DIM, torch.float64, "meta"), ValueError, "labeled.features is on meta"),
        (before._replace(features=before.features * torch.nan), ValueError, "labeled.features must be finite"),
        (before._replace(features=before.features + 1e200), ValueError, "must be finite, and so must the squares"),
    ):
        with pytest.raises(error, match=match):
            memory.labeled = wrong
    assert_states_close(memory.labeled, before)


def test_no_way_to_a_memory_leads_through_the_capture_of_a_cuda_graph(monkeypatch):
    memory, (first, second) = make(), batches(2)
    memory(*first)
    before = {name: value.clone() for name, value in memory.state_dict().items()}

    ways = (
        lambda: memory(*second),
        lambda: memory.labeled_loss(*second[:2], 0.1),
        lambda: memory.labeled,
        lambda: memory.unlabeled,
        memory.settle,
        memory.state_dict,
        lambda: copy.deepcopy(memory),
    )
    with monkeypatch.context() as patch:
        for module in (pending, step):
            patch.setattr(module, "require_no_capture", Mock(side_effect=RuntimeError("captured")))
        for way in ways:
            with pytest.raises(RuntimeError, match="captured"):
                way()
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


def of_a_module(memory, keys, labels):
    class Loss(nn.Module):
        def forward(self, keys):
            return memory.labeled_loss(keys, labels, 0.1)

    return Loss()


READS = {
    "grad": lambda memory, keys, labels: func.grad(lambda x: memory.labeled_loss(x, labels, 0.1).sum())(keys),
    "jvp": lambda memory, keys, labels: func.jvp(lambda x: memory.labeled_loss(x, labels, 0.1), (keys,), (keys,)),
    "vmap": lambda memory, keys, labels: func.vmap(lambda x: x + memory.labeled.features.sum())(keys),
    "export": lambda memory, keys, labels: torch.export.export(of_a_module(memory, keys, labels), (keys,)),
    "fakes": lambda memory, keys, labels: memory.labeled_loss(keys, labels, 0.1),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("held", [False, True], ids=["", "held"])
@pytest.mark.parametrize("way", READS)
def test_a_memory_that_is_read_in_a_transform_or_an_export_stays_what_it_is(way: str, held: bool):
    """What waits is written then, by tensors that are something outside of it too."""
    memory, twin, (first, second, third) = make(), make(), batches(3)
    snapshots = []
    for each in (memory, twin):
        each(*first)
        snapshots += [each.labeled] if held else []
        each(*second)
    expected = twin.state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True) if way == "fakes" else nullcontext():
        READS[way](memory, *first[:2])
    snapshots.clear()
    state = memory.state_dict()
    torch.save(state, io.BytesIO())
    torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)
    assert memory(*third).loss.isfinite()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_step_by_fake_tensors_is_refused():
    memory, twin, (first, second) = make(), make(), batches(2)
    for each in (memory, twin):
        each(*first)
    expected = twin.state_dict()
    with pytest.raises(RuntimeError, match="a memory that advances cannot be exported .* take functional.memory_step"):
        torch.export.export(memory, second)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="cannot be exported"):
        memory(*second)
    assert all(torch.equal(value, expected[name]) for name, value in memory.state_dict().items())


def test_fake_tensors_of_a_gpu_ask_no_driver():
    with FakeTensorMode(), torch.device("cuda"):
        memory = make()
        assert memory.labeled.features.is_cuda
        memory.settle()
        assert "labeled.features" in memory.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_function_and_module_are_one_memory_in_half_precision(dtype: torch.dtype):
    """Usage is float32 in both, and so in the reference: half precision would confuse the least-used slots."""
    memory = make(dtype=dtype)
    gates = memory.alpha.item(), memory.alpha_unlabeled.item(), memory.beta.item(), 0.9, 0.8
    states = [[MemoryState.empty(n, DIM, dtype) for n in (SLOTS, PSEUDO_SLOTS)] for _ in range(2)]
    assert states[0][0].usage.dtype == states[0][0].evaluation.dtype == torch.float32
    for batch in batches(40, dtype=dtype):
        memory(*batch)
        for impl, state in zip((functional, reference), states, strict=True):
            state[:] = impl.memory_step(*state, *batch, *gates)[2:]
    for given in (state._replace(usage=state.usage.to(dtype)) for state in states[0]):
        assert given.usage.dtype == dtype
        for impl in (functional, reference):
            for keys in (batch[0], batch[0][:0]):
                new = impl.memory_step(given, given, keys, batch[1][: len(keys)], *batch[2:], *gates).labeled
                assert new.usage.dtype == new.evaluation.dtype == torch.float32
    for ours, by_function, by_reference in zip((memory.labeled, memory.unlabeled), *states, strict=True):
        assert by_function.usage.dtype == by_reference.evaluation.dtype == torch.float32
        assert torch.equal(ours.labels, by_function.labels) and torch.equal(ours.usage, by_function.usage)
        assert torch.equal(ours.labels, by_reference.labels)


def test_moves_with_its_module():
    memory = stepped(1, torch.float32)
    held = memory.labeled.features
    memory.double()
    assert torch.equal(memory.labeled.features, held.double()) and memory.alpha.dtype == torch.float64
    memory(*next(batches(1, seed=2)))
    memory.float()
    usage, evaluation = memory.labeled.usage, memory.unlabeled.evaluation
    for _ in range(2):
        memory.to(torch.bfloat16)
        assert memory.labeled.features.dtype == torch.bfloat16 and memory.labeled.labels.dtype == torch.int64
        # Not rounded.
        assert torch.equal(memory.labeled.usage, usage) and torch.equal(memory.unlabeled.evaluation, evaluation)
    assert copy.deepcopy(memory).to("meta").labeled.features.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_type_is_that_of_the_features(dtype: torch.dtype):
    """`Module.type` hands on integers too, and a label of 2049 is none of float16."""
    memory, twin = stepped(2, torch.float32), stepped(2, torch.float32)
    for one in (memory, twin):
        one.unlabeled = one.unlabeled._replace(sample_ids=one.unlabeled.sample_ids + 2049)
    memory.type(dtype)
    twin.to(dtype)
    assert_both_close(memory, twin)
    memory(*next(batches(1, seed=2, dtype=dtype)))


def test_a_move_to_where_it_is_leaves_what_was_handed_out_alone():
    memory, (first, *rest) = make(dtype=torch.float32), batches(4, dtype=torch.float32)
    step = memory(*first)
    snapshot = memory.labeled
    kept = snapshot.features.clone()
    memory.float().cpu()
    assert memory.labeled.features is snapshot.features  # nor is anything copied for it
    for batch in rest:
        memory(*batch)
    assert torch.equal(snapshot.features, kept) and torch.equal(step.labeled.features, kept)


@pytest.mark.parametrize("steps", [1, 3])
def test_training_goes_on_after_inference_mode(steps):
    memory, twin = stepped(2), stepped(2)
    for batch in batches(steps, seed=1):
        with torch.inference_mode():
            assert not memory(*batch).loss.requires_grad
            memory.to(torch.float64)
        twin(*batch)
    with torch.inference_mode():
        memory.labeled = memory.labeled
    for batch in batches(2, seed=2):
        losses = [m(batch[0].clone().requires_grad_(), *batch[1:]).loss for m in (memory, twin)]
        gradients = [torch.autograd.grad(x, m.alpha)[0] for x, m in zip(losses, (memory, twin), strict=True)]
        torch.testing.assert_close(losses[0], losses[1])
        torch.testing.assert_close(gradients[0], gradients[1])
    assert_states_close(memory.labeled, twin.labeled)
    with torch.inference_mode():
        born_there = make()
    born_there(*batch).loss.backward()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_write_is_written_once(monkeypatch, error):
    memory, twin, (_, second) = stepped(1), stepped(1), batches(2)
    commit = pending.memory_commit_scores_

    def interrupted(*arguments):
        if error is KeyboardInterrupt:  # Python raises it when the pass that it came in has ended
            commit(*arguments)
        raise error

    monkeypatch.setattr(pending, "memory_commit_scores_", interrupted)
    with pytest.raises(error):
        memory(*second)
    monkeypatch.undo()
    assert_states_close(memory.labeled, twin.labeled)
    torch.testing.assert_close(memory(*second).loss, twin(*second).loss)
    assert_states_close(memory.unlabeled, twin.unlabeled)


@pytest.mark.parametrize("place", ["before the pass", "between two pieces"])
def test_an_interrupt_in_a_write_comes_when_all_of_it_is_made(monkeypatch, place):
    """By the signal itself; PyTorch's form goes through the slots in pieces."""
    memory, twin, (_, second) = stepped(1), stepped(1), batches(2)
    first = place == "before the pass"
    owner, name = (pending, "memory_commit_scores_") if first else (torch.Tensor, "masked_fill_")
    call, calls = getattr(owner, name), []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 1 + (not first):
            os.kill(os.getpid(), signal.SIGINT)
        return call(*given)

    monkeypatch.setattr(passes, "_ROWS", 2)
    # A job in the background of a shell ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with nullcontext() if first else _extension.disabled():
            monkeypatch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                memory(*second)
    finally:
        signal.signal(signal.SIGINT, before)
        monkeypatch.undo()
    assert len(calls) > 1 or first
    assert_states_close(memory.labeled, twin.labeled)
    torch.testing.assert_close(memory(*second).loss, twin(*second).loss)
    assert_states_close(memory.unlabeled, twin.unlabeled)


def test_a_step_of_meta_tensors_has_shapes():
    memory, (batch,) = make().to("meta"), batches(1)
    for _ in range(2):
        step = memory(*(x.to("meta") for x in batch))
    assert step.pseudo_labels.shape == (3,) and step.labeled.features.shape == (SLOTS, DIM)


def test_reliable_samples_names_each_image_once():
    memory = make()
    assert [x.tolist() for x in memory.reliable_samples()] == [[], []]
    full = memory.unlabeled
    memory.unlabeled = full._replace(
        labels=torch.tensor([4, -1, 5, 6, 0, 8, -1, -1, 9]),
        sample_ids=torch.tensor([30, -1, 10, 30, 20, 10, -1, -1, 40]),
        usage=torch.tensor([1.0, 0, 2, 3, 1, 2, 0, 0, 0.5], dtype=torch.float64),
    )
    # Image 30 keeps the more used slot 3, image 10 the lower of two equal ones.
    ids, labels = memory.reliable_samples()
    assert ids.tolist() == [10, 30, 20, 40] and labels.tolist() == [5, 6, 0, 9]


def test_gates_from_features():
    memory = make(gates="features")
    assert not list(memory.parameters())
    (batch,) = batches(1)
    features = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    step = memory(*batch, gate_features=features)
    alpha, alpha_unlabeled, logit = features.mean(0)
    start = (MemoryState.empty(n, DIM, torch.float64) for n in (SLOTS, PSEUDO_SLOTS))
    expected = functional.memory_step(*start, *batch, alpha, alpha_unlabeled, logit.sigmoid(), 0.9, 0.8)
    torch.testing.assert_close(step.loss, expected.loss)
    torch.testing.assert_close(memory.gate_values(features)[2], logit.sigmoid())
    (grad,) = torch.autograd.grad(step.loss, features)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.loss, features)[0])
    assert grad.abs().sum() > 0
    for wrong in (None, features[:, :2], features[:0]):
        with pytest.raises(ValueError, match="gate_features must (be|have)"):
            memory(*batch, gate_features=wrong)
    for wrong in (features.tolist(), features.long()):
        with pytest.raises(TypeError, match="gate_features must (be a tensor|have a floating dtype)"):
            memory(*batch, gate_features=wrong)
    with pytest.raises(ValueError, match="gate_features are for"):
        make()(*batch, gate_features=features)


def test_a_decay_of_numpy_is_a_number():
    memory = ProgressiveAugmentedMemory(2, 2, DIM, decay=np.float32(0.5), decay_unlabeled=torch.tensor(0.25))
    assert (memory.decay, memory.decay_unlabeled) == (0.5, 0.25)
    (batch,) = batches(1, dtype=torch.float32)
    assert memory(*batch).loss.isfinite()


@pytest.mark.parametrize(
    "settings",
    [{"decay": 1.5}, {"gates": "both"}, {"labeled_slots": 0}, {"unlabeled_slots": 4.0}, {"key_dim": True}]
    + [{"dtype": torch.int64}, {"dtype": "float32"}, {"dtype": torch.float8_e5m2}],
)
def test_wrong_settings(settings):
    with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
        ProgressiveAugmentedMemory(**({"labeled_slots": 2, "unlabeled_slots": 2, "key_dim": 2} | settings))
