"""The memory with its slots divided over ranks, against the one that a single rank holds."""

import copy
import gc
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from dan_fast import _extension
from dan_fast.core.types import MemoryBatch
from dan_fast.distributed.collectives import hand_out
from dan_fast.distributed.shards import Shard
from dan_fast.functional.memory import sharded
from dan_fast.nn import ProgressiveAugmentedMemory
from tests.support.ranks import Collectives, Ranks

Group = distributed.ProcessGroup
F64 = torch.float64
HELD = (3, 4, 5)  # of ten steps, those whose graph is kept

RANKS = (2, 4)
pytestmark = pytest.mark.slow


def pair(group: Group, slots: int, pseudo_slots: int, dim: int, **settings) -> tuple[ProgressiveAugmentedMemory, ...]:
    """The same memory twice: divided over the ranks, and whole on each."""
    return tuple(
        ProgressiveAugmentedMemory(slots, pseudo_slots, dim, 0.9, 0.8, process_group=of, **settings)
        for of in (group, None)
    )


def batches(count: int, dim: int, dtype: torch.dtype, ranks: int, size: int = 5) -> Iterator[tuple]:
    """`(batch, shares, pseudo_shares)`: a whole batch, and how many of its rows each rank hands in; none, at times."""
    generator = torch.Generator().manual_seed(0)

    def shares(of: int) -> list[int]:
        return torch.bincount(torch.randint(0, ranks, (of,), generator=generator), minlength=ranks).tolist()

    for at in range(count):
        # In steps whose graph a test keeps at least one: a loss of no row keeps nothing in the PyTorch form.
        least = int(at % 10 in HELD)
        rows, pseudo_rows = (int(torch.randint(least, size + 1, (), generator=generator)) for _ in range(2))
        keys, unlabeled_keys = (torch.randn(n, dim, generator=generator).to(dtype) for n in (rows, pseudo_rows))
        labels = torch.randint(0, 6, (rows,), generator=generator)
        ids = torch.arange(size * at, size * at + pseudo_rows)
        yield MemoryBatch(keys, labels, unlabeled_keys, ids), shares(rows), shares(pseudo_rows)


def labelled_refusals(group: Group) -> None:
    memory, _ = pair(group, 9, 7, 4)
    keys, labels, sizes = torch.ones(2, 4), torch.tensor([0, 1]), [2] * group.size()
    for wrong, error, words in (
        ({"keys": keys.double()}, TypeError, "keys must be torch.float32"),
        ({"keys": keys[:, :3]}, ValueError, r"keys must have shape \(B, 4\)"),
        ({"labels": labels[:1]}, ValueError, r"labels must have shape \(2,\)"),
        ({"labels": labels + 0.5}, TypeError, "labels must be torch.int64"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"sizes": None}, ValueError, f"each of the {group.size()} ranks, 2 at {group.rank()}, got None"),
        ({"sizes": [1] * group.size()}, ValueError, "sizes must hold the number of keys of each"),
        ({"sizes": sizes[1:]}, ValueError, "sizes must hold the number of keys of each"),
    ):
        with pytest.raises(error, match=words):
            memory.labeled_loss(**{"keys": keys, "labels": labels, "temperature": 0.1, "sizes": sizes, **wrong})
    assert memory.labeled_loss(keys, labels, 0.1, sizes).shape == (2 * group.size(),)


def test_the_loss_of_labelled_keys_refuses_what_one_rank_refuses(ranks: Ranks):
    ranks.run(labelled_refusals)


def own(group: Group, batch: MemoryBatch, shares: list[int], pseudo_shares: list[int]) -> MemoryBatch:
    sizes = (shares, shares, pseudo_shares, pseudo_shares)
    return MemoryBatch(*(x.split(size)[group.rank()] for x, size in zip(batch, sizes, strict=True)))


def assert_same_state(memory: ProgressiveAugmentedMemory, expected: ProgressiveAugmentedMemory) -> None:
    for name in ("labeled", "unlabeled"):
        for field, value, wanted in zip(
            ("features", "labels", "usage", "evaluation", "least_used", "sample_ids"),
            getattr(memory, name),
            getattr(expected, name),
            strict=True,
        ):
            assert torch.equal(value, wanted), f"{name}.{field}"


def same_bits(group: Group, dtype: torch.dtype, with_kernels: bool) -> None:
    # Multiples of 48 and a rest: what the PyTorch form needs where a rank's rows are few.
    slots, dim = ((97, 55) if with_kernels else (48 * 6 + 5, 48 * 4)), 19
    with nullcontext() if with_kernels else _extension.disabled():
        memory, expected = pair(group, *slots, dim, dtype=dtype)
        held, held_by_whole = [], []
        # A long sequence on two ranks; more of them show how slots are divided, in a few laps around a memory.
        steps = 200 if group.size() == 2 else 75
        for at, (batch, *shares) in enumerate(batches(steps, dim, dtype, group.size())):
            mine = own(group, batch, *shares)
            step = memory(
                mine.keys.requires_grad_(), mine.labels, mine.unlabeled_keys.requires_grad_(), mine.sample_ids
            )
            whole = expected(batch.keys.requires_grad_(), *batch[1:])
            assert torch.equal(step.loss, whole.loss) and step.loss.requires_grad == whole.loss.requires_grad
            assert torch.equal(step.pseudo_labels, whole.pseudo_labels.split(shares[1])[group.rank()])
            if at % 10 in HELD:
                # A graph that is kept on one rank makes the writes wait on all.
                held_by_whole.append(whole.loss)
                held += [step.loss] if group.rank() == 0 else []
            elif at % 20 == 6:
                # Nothing waits on a rank that settles, and so on none, whatever graph another one keeps.
                expected.settle()
                if group.rank() == 1:
                    memory.settle()
            elif at % 10 == 8 and group.rank() == 1:
                memory.settle()
                held.clear()
            if at % 10 == 8:
                held.clear(), held_by_whole.clear()
            if at % 5 == 0:
                step.loss.backward(), whole.loss.backward()
            del step, whole
            assert memory._labeled.pending == expected._labeled.pending or at % 20 == 6 or at % 10 == 8
            if at % 25 == 24:
                assert_same_state(memory, expected)
        rows = [memory._labeled.base.shape[0], memory._unlabeled.base.shape[0]]
        sizes = [Shard(group, n).sizes for n in slots]
        assert rows == [of_memory[group.rank()] for of_memory in sizes]
        assert with_kernels or all(size % 48 == 0 for of_memory in sizes for size in of_memory[:-1])


@pytest.mark.parametrize(
    ("dtype", "with_kernels"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)], ids=str
)
def test_a_sequence_leaves_the_memory_of_one_rank_bit_for_bit(ranks: Ranks, dtype: torch.dtype, with_kernels: bool):
    ranks.run(same_bits, dtype, with_kernels)


def derivatives(group: Group, gates: str) -> None:
    """A loss after an inner step, as meta learning has it: of own rows, gates and a network."""
    dim, width = 6, 7
    memory, expected = pair(group, 13, 11, dim, dtype=F64, gates=gates)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(width, dim, generator=generator, dtype=F64)
    features = torch.randn(2, 8, width, generator=generator, dtype=F64)
    sizes = [3] + [1] * (group.size() - 2) + [7 - group.size()]
    labels, ids = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3]), torch.arange(8)
    rows = torch.arange(sum(sizes)).split(sizes)[group.rank()]

    def found(memory: ProgressiveAugmentedMemory, mine: Tensor | slice, handed: Callable[[Tensor], Tensor]) -> list:
        inputs = [features[:, mine].clone().requires_grad_(), weight.clone().requires_grad_()]

        def loss(at: int, weight: Tensor) -> Tensor:
            keys = torch.tanh(inputs[0][at] @ handed(weight))
            of_gates = (inputs[0][at][:, :3],) if gates == "features" else ()
            return memory(keys, labels[mine], keys.flip(-1) * 0.5 + keys, ids[mine], *of_gates).loss

        loss(0, inputs[1])
        wanted = [*inputs, *memory.parameters()]
        first = loss(1, inputs[1])
        grads = torch.autograd.grad(first, wanted, create_graph=True)
        moved = inputs[1] - 0.3 * grads[1]
        second = loss(1, moved) + sum(g.square().sum() for g in grads[2:])
        return [first, *grads, *torch.autograd.grad(second, wanted)]

    count = 2 + len(list(memory.parameters()))
    mine = found(memory, rows, lambda x: hand_out(group, x))
    whole = found(expected, slice(8), lambda x: x)
    for at, (value, wanted) in enumerate(zip(mine, whole, strict=True)):
        # What is each rank's own is its rows of the whole; weights and gates have the whole gradient.
        wanted = wanted[:, rows] if at in (1, 1 + count) else wanted
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10, msg=lambda text, at=at: f"{at}: {text}")


@pytest.mark.parametrize("gates", ["parameters", "features"])
def test_gradients_of_both_orders_are_those_of_one_rank(ranks: Ranks, gates: str):
    ranks.run(derivatives, gates)


def traffic(group: Group, dtype: torch.dtype) -> None:
    slots, pseudo_slots, dim, batch, pseudo_batch = 960, 480, 96, 16, 8
    memory, _ = pair(group, slots, pseudo_slots, dim, dtype=dtype)
    ranks, size = group.size(), torch.empty(0, dtype=dtype).element_size()
    rows, pseudo_rows = batch // ranks, pseudo_batch // ranks
    for at in range(3):
        keys, unlabeled_keys = (torch.randn(n, dim, dtype=dtype, requires_grad=True) for n in (rows, pseudo_rows))
        with Collectives() as forward:
            step = memory(keys, torch.arange(rows), unlabeled_keys, torch.arange(pseudo_rows))
        with Collectives() as backward:
            step.loss.backward()
        # docs/scaling.md, "What a step of the memory sends".
        gathered = 104 + (batch + pseudo_batch) * (dim * size + 8) / ranks
        gathered += 4 * ((batch + pseudo_batch + 1) * slots + (pseudo_batch + 1) * pseudo_slots) / ranks
        added = 4 * (batch + pseudo_batch) * dim
        assert forward.calls == {"allgather_base": 3} and backward.calls == {"allreduce": 1}, at
        assert forward.bytes["allgather_base"] == pytest.approx(gathered, rel=0.1)
        assert backward.bytes["allreduce"] == pytest.approx(added, rel=0.1)
    with Collectives() as others:
        memory.reliable_samples(), memory.occupied_slots(), memory.settle(), repr(memory)
    assert not others.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_gathers_three_times_and_adds_up_once(ranks: Ranks, dtype: torch.dtype):
    ranks.run(traffic, dtype)


def refusals(group: Group) -> None:
    rank, last = group.rank(), group.size() - 1
    memory, expected = pair(group, 9, 7, 4, dtype=F64)
    steps = list(batches(3, 4, F64, group.size()))
    batch, *shares = steps[0]
    mine = own(group, batch, *shares)
    memory(*mine), expected(*batch)

    def refused(match: str, its: ProgressiveAugmentedMemory = memory, given: MemoryBatch = mine) -> None:
        with pytest.raises((ValueError, TypeError), match=match) as raised:
            its(*given)
        assert "\n" not in str(raised.value)

    wrong = mine._replace(keys=mine.keys[:, :2]) if rank == last else mine
    refused("keys must have shape" if rank == last else f"rank {last} of process_group refused its rows", given=wrong)
    refused(
        "unlabeled_keys must be finite",
        given=mine._replace(
            unlabeled_keys=mine.unlabeled_keys.new_full((1, 4), math.inf), sample_ids=torch.zeros(1, dtype=torch.int64)
        ),
    )
    for name in ("keys", "unlabeled_keys"):
        gradient = mine._replace(**{name: getattr(mine, name).clone().requires_grad_()}) if rank == last else mine
        refused(f"keys on rank {last} of process_group differ .* require a gradient", given=gradient)
    for name, gate in (("alpha", "alpha"), ("alpha_unlabeled", "alpha_unlabeled"), ("beta", "beta_logit")):
        before = getattr(memory, gate).data
        getattr(memory, gate).data = before + 0.1 * (rank == last)
        refused(f"{name} on rank {last} of process_group is not that of rank 0")
        getattr(memory, gate).data = before
    for slots, decay in ((7, 0.7 + 0.1 * (rank == last)), (7 + (rank == last), 0.8)):
        other = ProgressiveAugmentedMemory(9, slots, 4, 0.9, decay, dtype=F64, process_group=group)
        refused(f"rank {last} of process_group differs from rank 0", other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "__version__", f"0.{rank}")
        refused("rank 1 of process_group differs from rank 0: .*, the versions of dan_fast")
    moved = copy.deepcopy(memory).to("meta")
    refused(
        "process_group has the backends cpu:gloo,.* which carry no tensor on meta",
        moved,
        MemoryBatch(*(x.to("meta") for x in mine)),
    )
    with pytest.raises(RuntimeError, match="inside of DistributedDataParallel .* call the memory outside"):
        DistributedDataParallel(ProgressiveAugmentedMemory(9, 7, 4, dtype=F64))(*batch)
    with pytest.raises(ValueError, match="labeled_slots must be at least the ranks of process_group, got 1"):
        ProgressiveAugmentedMemory(1, 7, 4, process_group=group)
    with pytest.raises(TypeError, match="process_group must be a torch.distributed.ProcessGroup"):
        ProgressiveAugmentedMemory(9, 7, 4, process_group=distributed.GroupMember.NON_GROUP_MEMBER)

    # Tracebacks hold the memory of before the next step, whose writes would then wait and be rounded otherwise.
    gc.collect()
    assert_same_state(memory, expected)
    for batch, *shares in steps[1:]:
        memory(*own(group, batch, *shares)), expected(*batch)
    assert_same_state(memory, expected)


def test_what_is_refused_is_refused_on_all_ranks_and_changes_nothing(ranks: Ranks):
    ranks.run(refusals)


def waits_after_a_refusal(group: Group) -> bool:
    memory = ProgressiveAugmentedMemory(9, 7, 4, dtype=F64, process_group=group)
    batch, *shares = next(batches(1, 4, F64, group.size()))
    mine = own(group, batch, *shares)
    gc.disable()
    try:
        memory(*mine)
        with suppress(TypeError, ValueError):
            memory(*mine._replace(keys=mine.keys[:, :2]) if group.rank() == 1 else mine)
        memory(*mine)
        return memory._labeled.has_to_wait()
    finally:
        gc.enable()


def test_an_error_does_not_keep_the_memory_as_it_was(ranks: Ranks):
    assert not any(ranks.run(waits_after_a_refusal))


def copies(group: Group) -> None:
    memory, expected = pair(group, 9, 7, 4)
    first, second = batches(2, 4, torch.float32, group.size())
    memory(*own(group, *first)), expected(*first[0])
    twin, read = copy.deepcopy(memory), pair(group, 9, 7, 4)
    assert twin.process_group is group
    with pytest.raises(TypeError, match="cannot pickle .*ProcessGroup"):
        pickle.dumps(memory)
    if group.rank() == 0:  # the others would be waited for if they were asked
        with pytest.raises(TypeError, match="divided over ranks cannot be pickled: save its state_dict"):
            pickle.dumps(memory._labeled)
    state = memory.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name
    for its in read:
        its.load_state_dict(state)
    assigned, _ = pair(group, 9, 7, 4)
    assigned.labeled, assigned.unlabeled = expected.labeled, expected.unlabeled
    expected(*second[0])
    for its in (memory, twin, read[0], assigned):
        step = its(*own(group, *second))
        assert_same_state(its, expected)
        assert torch.equal(step.labeled.features, expected.labeled.features)
        if group.rank() == 0:  # no collective: the others are not asked
            assert all(map(torch.equal, its.reliable_samples(), expected.reliable_samples()))
            assert its.occupied_slots() == expected.occupied_slots()
    with pytest.raises(ValueError, match=r"labeled.labels must have shape \(8,\)"):
        memory.labeled = memory._labeled.unsettled()._replace(features=torch.zeros(8, 4))


def test_states_are_read_assigned_and_copied_whole(ranks: Ranks):
    ranks.run(copies)
