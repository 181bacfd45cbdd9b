"""A memory inside of what copies or averages modules by their parameters and buffers."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.queues import SimpleQueue
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.multiprocessing import get_context
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from dan_fast.nn import ProgressiveAugmentedMemory
from tests.support.memory_modules import assert_both_close, assert_states_close, batches, make


def saved_and_read(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def refused_as_an_average(call: Callable[..., object], *arguments: object, **options: object) -> None:
    sentence = "as AveragedModel does, .* assign the trained memory's labeled and unlabeled"
    with pytest.raises(RuntimeError, match=sentence):
        call(*arguments, **options)


def test_a_replica_of_data_parallel_is_refused():
    """`nn.DataParallel` makes them so where it has two devices; with one it calls the module itself."""
    for gates in ("parameters", "features"):
        memory = make(gates=gates)
        (batch,) = batches(1)
        features = () if gates == "parameters" else (torch.zeros(1, 3, dtype=torch.float64),)
        before = copy.deepcopy(memory)
        with pytest.raises(RuntimeError, match="replica of DataParallel .* wrap the backbone alone"):
            memory._replicate_for_data_parallel()(*batch, *features)
        assert_both_close(memory, before)


def test_a_gate_with_a_parametrization_is_no_replica():
    memory, plain = make(), make()
    nn.utils.parametrize.register_parametrization(memory, "alpha", nn.Hardtanh())
    for batch in batches(2):
        assert torch.equal(memory(*batch).loss, plain(*batch).loss)
    assert_both_close(memory, plain)


def test_a_deep_copy_has_memories_of_its_own():
    memory = make()
    first, second, third = batches(3)
    memory(*first)  # its writes still wait
    twin = copy.deepcopy(memory)
    assert_both_close(twin, memory)
    before = [x.clone() for x in twin.labeled]
    memory(*second)
    assert_states_close(twin.labeled, before, rtol=0, atol=0)
    twin(*second)
    for one in (memory, twin):
        one(*third)
    assert_both_close(twin, memory)
    assert_both_close(saved_and_read(copy.deepcopy(twin)), twin)


def test_what_a_copy_holds_of_itself_is_the_copy():
    memory = make()
    memory.settled_at_the_end = memory.settle
    twin = copy.deepcopy(memory)
    assert twin.settled_at_the_end.__self__ is twin


def test_a_copy_read_from_a_file_goes_on():
    memory = make()
    first, second = batches(2)
    memory(*first)
    twin = copy.deepcopy(memory)
    memory(*second)  # the one that the file's was copied from has gone on
    read = saved_and_read(twin), pickle.loads(pickle.dumps(twin))
    for one in (twin, *read):
        one(*second)
        assert_both_close(one, memory)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_step_that_a_backward_pass_would_repeat_is_refused(use_reentrant: bool):
    memory, twin = make(), make()
    (keys, *rest), second = batches(2)
    keys.requires_grad_()
    loss = checkpoint(lambda keys: memory(keys, *rest).loss, keys, use_reentrant=use_reentrant)
    assert torch.equal(loss, twin(keys, *rest).loss)
    with pytest.raises(RuntimeError, match="no step inside of a backward pass, .* call the memory outside"):
        loss.backward()
    assert keys.grad is None
    memory(*second).loss.backward()
    twin(*second)
    assert_both_close(memory, twin)


def test_what_makes_the_keys_may_be_computed_again():
    (batch,), gradients = batches(1), []
    for recomputed in (True, False):
        memory = make()
        torch.manual_seed(0)
        layer = nn.Linear(5, 5, dtype=torch.float64)
        keys = checkpoint(layer, batch[0], use_reentrant=False) if recomputed else layer(batch[0])
        memory(keys, *batch[1:]).loss.backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients) and gradients[0].any()


def averaged_over_a_training() -> tuple[ProgressiveAugmentedMemory, AveragedModel]:
    memory = make()
    averaged = AveragedModel(memory)
    train(memory, lambda: averaged.update_parameters(memory))
    return memory, averaged


def train(memory: ProgressiveAugmentedMemory, update: Callable[[], None]) -> None:
    optimizer = torch.optim.SGD(memory.parameters(), lr=0.1)
    for batch in batches(4):
        optimizer.zero_grad()
        memory(*batch).loss.backward()
        optimizer.step()
        update()


def test_an_average_of_the_gates_is_refused_until_it_has_memories():
    memory, averaged = averaged_over_a_training()
    (batch,) = batches(1, seed=9)
    assert averaged.module.alpha != 0 and averaged.module.occupied_slots()[0] == 0
    refused_as_an_average(averaged, *batch)
    refused_as_an_average(averaged.module.labeled_loss, *batch[:2], temperature=0.05)
    for other in (copy.deepcopy(averaged), saved_and_read(averaged), saved_and_read(copy.deepcopy(averaged))):
        refused_as_an_average(other, *batch)
        other.module.load_state_dict(memory.state_dict())
        other(*batch)
    averaged.module.labeled = memory.labeled
    refused_as_an_average(averaged, *batch)  # M' is as old as the copy
    for other in (copy.deepcopy(averaged), saved_and_read(averaged)):
        refused_as_an_average(other, *batch)
        other.module.unlabeled = memory.unlabeled
        other(*batch)
    averaged.module.unlabeled = memory.unlabeled
    assert_both_close(averaged.module, memory)
    averaged(*batch)

    memory, averaged = averaged_over_a_training()
    averaged.module.load_state_dict(memory.state_dict())
    assert torch.equal(averaged(*batch).loss, memory(*batch).loss)


@pytest.mark.parametrize("given", ["states", "a file", "its own states"])
def test_an_average_that_was_given_memories_falls_behind_again(given: str):
    memory, averaged = averaged_over_a_training()
    copied = averaged.module
    if given == "a file":
        copied.load_state_dict(memory.state_dict())
    else:
        source = memory if given == "states" else copied
        copied.labeled, copied.unlabeled = source.labeled, source.unlabeled
    (batch,) = batches(1, seed=9)
    for _ in range(2):
        copied.labeled_loss(*batch[:2], temperature=0.05)
        with torch.no_grad():
            copied.alpha.add_(0.1)  # no other has gone on since
    train(memory, lambda: averaged.update_parameters(memory))
    refused_as_an_average(copied.labeled_loss, *batch[:2], temperature=0.05)


def test_gates_that_are_averaged_through_data_are_seen_too():
    memory = make()
    averaged = copy.deepcopy(memory)

    def update() -> None:
        for mean, value in zip(averaged.parameters(), memory.parameters(), strict=True):
            mean.data.mul_(0.9).add_(value.data, alpha=0.1)

    moved = copy.deepcopy(memory)
    train(memory, update)
    (batch,) = batches(1, seed=9)
    refused_as_an_average(averaged, *batch)
    refused_as_an_average(averaged.double(), *batch)
    moved.float().double()(*batch)  # rounded, which is no change of what it learnt


def test_a_copy_that_is_moved_to_another_dtype_was_not_averaged():
    memory, (first, second) = make(dtype=torch.float32), batches(2, dtype=torch.float32)
    with torch.no_grad():
        memory.beta_logit.fill_(0.3)  # rounded by the copy
    copied = copy.deepcopy(memory)
    memory(*first)
    copied.bfloat16()(second[0].bfloat16(), second[1], second[2].bfloat16(), second[3])
    assert copied.occupied_slots()[0] == len(second[0])


def test_of_a_state_dict_with_one_memory_the_other_is_still_missed():
    memory, averaged = averaged_over_a_training()
    (batch,) = batches(1, seed=9)
    parts = [{k: v for k, v in memory.state_dict().items() if k.startswith(name)} for name in ("labeled", "unlabeled")]
    averaged.module.load_state_dict(parts[1], strict=False)
    refused_as_an_average(averaged, *batch)
    averaged.module.load_state_dict(parts[0], strict=False)
    averaged(*batch)


def test_what_another_process_gets_is_not_overwritten_by_this_one():
    """torch.multiprocessing shares the storage of what it hands over."""
    memory = make()
    memory(*next(batches(1)))
    received, before = pickle.loads(ForkingPickler.dumps(memory)), copy.deepcopy(memory)
    for batch in batches(3, seed=1):
        memory(*batch)
    memory.settle()
    assert_both_close(received, before)


def _step_in_a_process(memories: list[ProgressiveAugmentedMemory], answers: SimpleQueue) -> None:
    received = [copy.deepcopy(memory.state_dict()) for memory in memories]
    for memory in memories:
        for batch in batches(2, seed=2):
            memory(*batch)
    answers.put([{name: value.numpy() for name, value in state.items()} for state in received])


@pytest.mark.slow
def test_a_spawned_process_gets_memories_of_its_own():
    """One that is new, and one whose write waits."""
    memories, context = [make(), make()], get_context("spawn")
    memories[1](*next(batches(1)))
    before = [copy.deepcopy(memory.state_dict()) for memory in memories]
    answers = context.SimpleQueue()
    process = context.Process(target=_step_in_a_process, args=(memories, answers))
    process.start()
    for memory in memories:
        for batch in batches(2, seed=1):
            memory(*batch)  # the other process may not have read what it was given
    received = answers.get()
    process.join()
    assert process.exitcode == 0
    for found, wanted in zip(received, before, strict=True):
        for name, value in wanted.items():
            assert torch.equal(torch.from_numpy(found[name]), value), name


def test_a_memory_in_shared_storage_writes_elsewhere():
    """A forked process would write into the features of its parent, whose labels and usage stay."""
    memory = make()
    first, second = batches(2)
    memory(*first)
    memory.share_memory()
    forked = copy.copy(memory)
    forked._labeled, forked._unlabeled = (replace(each) for each in (memory._labeled, memory._unlabeled))
    shared, before = memory._labeled.base, memory._labeled.base.clone()
    assert shared.is_shared()
    del memory
    forked(*second)
    forked.settle()
    assert torch.equal(shared, before) and forked.occupied_slots()[0] == 6
    assert not forked._labeled.base.is_shared()


def test_a_copy_whose_gates_are_its_own_is_not_refused():
    memory = make()
    first, second = batches(2)
    twin = copy.deepcopy(memory)
    memory(*first)
    twin(*first)  # the one it was copied from has gone on, the gates have not
    assert_both_close(twin, memory)
    with torch.no_grad():
        twin.alpha.fill_(1.5)
    twin(*second)
    early = copy.deepcopy(memory)
    with torch.no_grad():
        early.alpha.fill_(1.5)
    early(*second)  # nothing to fall behind
    assert_both_close(early, twin, 1e-11)
