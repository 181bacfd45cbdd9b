"""Each rule of the memory step on cases computed by hand, for both implementations and the PyTorch form of one."""

import math

import pytest
import torch

from dan_fast import MemoryState, functional, reference

E = math.e


@pytest.fixture
def impl(by):
    return by


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def i64(values):
    return torch.tensor(values, dtype=torch.int64)


def empty(slots, key_dim=2):
    return MemoryState.empty(slots, key_dim, torch.float64)


def state(features, labels, usage, evaluation, least_used, sample_ids=None):
    ids = sample_ids if sample_ids is not None else [-1] * len(labels)
    return MemoryState(f64(features), i64(labels), f64(usage), f64(evaluation), torch.tensor(least_used), i64(ids))


def step(impl, labeled, unlabeled, keys=(), labels=(), unlabeled_keys=(), ids=(), alpha=0.0, **settings):
    d = labeled.features.shape[1]
    settings = {"alpha_unlabeled": 0.0, "beta": 0.25, "decay": 0.5, "decay_unlabeled": 0.5} | settings
    keys, unlabeled_keys = (f64(each).reshape(-1, d) for each in (keys, unlabeled_keys))
    return impl.memory_step(labeled, unlabeled, keys, i64(labels), unlabeled_keys, i64(ids), alpha, **settings)


def same(actual, expected):
    torch.testing.assert_close(actual, f64(expected), rtol=1e-11, atol=1e-11)


def test_a_new_state_is_empty():
    new = MemoryState.empty(3, 2)
    assert new.labels.tolist() == [-1] * 3 and new.sample_ids.tolist() == [-1] * 3
    assert not new.usage.any() and not new.evaluation.any() and not new.features.any() and new.least_used == 0


def test_first_and_second_labelled_write(impl):
    one = step(impl, empty(3), empty(1), [[2.0, 0.0]], [4]).labeled
    same(one.features, [[1.0, 0], [0, 0], [0, 0]])
    assert one.labels.tolist() == [4, -1, -1] and one.sample_ids.tolist() == [-1] * 3
    same(one.evaluation, [1.0, 0, 0])
    same(one.usage, [1.5, 0, 0])
    assert one.least_used == 1

    # sigma(log 3) = 3/4 of the write goes where the last one was read, 1/4 to the least-used slot.
    two = step(impl, one, empty(1), [[0.0, 2.0]], [7], alpha=math.log(3)).labeled
    same(two.features, [[1.0, 1.5], [0, 0.5], [0, 0]])
    assert two.labels.tolist() == [4, 7, -1]
    near = math.exp(1.5 / math.hypot(1.0, 1.5))
    read = [near / (near + E), E / (near + E), 0.0]
    same(two.evaluation, read)
    same(two.usage, [0.5 * 1.5 + read[0] + 0.75, read[1] + 0.25, 0])
    assert two.least_used == 2


def test_a_batch_is_the_same_as_its_samples_in_order(impl):
    keys, labels = [[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]], [4, 7, 4]
    together = step(impl, empty(2), empty(1), keys, labels).labeled
    apart = empty(2)
    for key, label in zip(keys, labels, strict=True):
        apart = step(impl, apart, empty(1), [key], [label]).labeled
    torch.testing.assert_close(together, apart, rtol=1e-11, atol=1e-11)


def test_the_least_used_slot_is_cleared_but_keeps_its_usage(impl):
    # Eq. (9) clears features and label; the old content must not show in the new slot.
    old = state([[2.0, 0], [0, 3.0]], [1, 2], [6.0, 4.0], [0.8, 0.2], 1)
    new = step(impl, old, empty(1), [[1.0, 0]], [9]).labeled
    same(new.features, [[2.4, 0], [0.6, 0]])
    assert new.labels.tolist() == [1, 9]
    same(new.evaluation, [0.5, 0.5])
    same(new.usage, [3 + 0.5 + 0.4, 2 + 0.5 + 0.6])
    assert new.least_used == 1


def test_a_usage_that_is_nan_is_the_least_one(impl):
    """As argmin has it, the first of several, wherever vectors and chunks of slots begin."""
    for slots, nans in [(40, [3]), (40, [20]), (40, [39]), (40, [7, 9]), (1100, [600]), (1100, [0, 1099])]:
        for low in (1, 11, 19, slots - 2):
            usage = torch.arange(5.0, slots + 5, dtype=torch.float64)
            usage[low], usage[nans] = 1.0, math.nan
            features, evaluation = f64([[1.0, 0.0]]).expand(slots, 2), torch.full_like(usage, 1 / slots)
            none = torch.full((slots,), -1)
            old = MemoryState(features, torch.arange(slots) % 3, usage, evaluation, torch.tensor(30), none)
            assert step(impl, old, empty(1), [[1.0, 1.0]], [1]).labeled.least_used == nans[0]


def test_one_slot(impl):
    old = state([[2.0, 0]], [1], [3.0], [1.0], 0)
    new = step(impl, old, empty(1), [[0.0, 5.0]], [2]).labeled
    same(new.features, [[0, 5.0]])
    same(new.usage, [1.5 + 1 + 1])
    assert new.labels.tolist() == [2] and new.least_used == 0


def test_an_empty_slot_takes_no_share_of_a_write_but_as_the_least_used(impl):
    old = state([[1.0, 0], [0, 0], [0, 0]], [1, -1, -1], [1.0, 0, 0], [0.4, 0.3, 0.3], 1)
    new = step(impl, old, empty(1), [[0.0, 1.0]], [2]).labeled
    same(new.features, [[1.0, 0.2], [0, 0.5], [0, 0]])


@pytest.mark.usefixtures("path")
def test_an_open_gate_leaves_ties_between_slots_of_one_key():
    """The least-used slot too takes what the last evaluation gives it, to the last bit, and no more."""
    keys = dict(unlabeled_keys=[[1.0, 1.0]] * 11, ids=range(11), alpha_unlabeled=50.0, decay_unlabeled=0.0)
    for slots in range(2, 20):
        steps = (step(impl, empty(1), empty(slots), [[1.0, 1.0]], [3], **keys) for impl in (functional, reference))
        found, expected = (each.unlabeled.sample_ids.tolist() for each in steps)
        assert found == expected


def test_retrieval_takes_the_lowest_slot_of_equal_ones_and_no_empty_one(impl):
    # Slots 1 and 3 are parallel to the key; slot 0 is empty and 4 opposite.
    features = [[0, 0], [0.3, 0.4], [1, 0], [6, 8], [-3, -4]]
    labeled = state(features, [-1, 5, 6, 7, 8], [0] * 5, [0, 0.25, 0.25, 0.25, 0.25], 0)
    out = step(impl, labeled, empty(2), unlabeled_keys=[[3.0, 4.0]], ids=[11])
    assert out.pseudo_labels.tolist() == [5]
    # P is slot 1; N the mean of slots 2, 3, 4.
    positive, negative = E, (math.exp(0.6) + E + 1 / E) / 3
    same(out.loss, -math.log(positive / (positive + negative)))
    assert out.unlabeled.labels.tolist() == [5, -1] and out.unlabeled.sample_ids.tolist() == [11, -1]


def test_the_labelled_samples_of_the_batch_come_first(impl):
    out = step(impl, empty(2), empty(2), [[1.0, 0]], [3], [[0.0, 1.0]], [5])
    assert out.pseudo_labels.tolist() == [3]
    same(out.loss, 0.0)


def test_a_wholly_empty_memory_skips_the_sample(impl):
    pseudo = state([[1.0, 0], [0, 0]], [2, -1], [1.0, 0], [1.0, 0], 1, [4, -1])
    out = step(impl, empty(2), pseudo, unlabeled_keys=[[0.0, 1.0], [1.0, 0]], ids=[5, 6])
    assert out.pseudo_labels.tolist() == [-1, -1] and out.loss == 0
    assert all(map(torch.equal, out.unlabeled, pseudo))


def test_false_samples_are_cleared_before_the_write(impl):
    labeled = state([[1.0, 0], [0, 1.0]], [1, 3], [0.0, 0], [0.5, 0.5], 0)
    pseudo = state([[1.0, 0], [-1, 0], [1, 0]], [1, 1, 2], [5.0, 6, 7], [0.2, 0.3, 0.5], 0, sample_ids=[10, 11, 12])
    out = step(impl, labeled, pseudo, unlabeled_keys=[[1.0, 0]], ids=[13], decay_unlabeled=0.5, beta=0.25)
    # n = 2 slots are labelled 1 and the 2 nearest are {0, 2}: FP = {1}, FN = {2}.
    new = out.unlabeled
    assert new.labels.tolist() == [1, 1, -1] and new.sample_ids.tolist() == [10, 13, -1]
    # Slot 1, emptied, is the least used now (slot 0 was); W^e gives its share to slot 0 alone.
    same(new.features, [[1.1, 0], [0.5, 0], [0, 0]])
    same(new.evaluation, [0.5, 0.5, 0])
    same(new.usage, [2.5 + 0.125 + 0.1, 0.125 + 0.5, 0])
    assert new.least_used == 2
    first = -math.log(E / (E + 1))
    second = -math.log((1 / E) / (1 / E + E))
    same(out.loss, first + 0.25 * second)
    assert torch.equal(out.labeled.features, labeled.features)
    same(pseudo.features, [[1.0, 0], [-1, 0], [1, 0]])
    same(pseudo.usage, [5.0, 6, 7])  # what came in is as it was


def test_loss_is_the_mean_over_samples(impl):
    labeled = state([[1.0, 0], [0, 1.0]], [1, 3], [0.0, 0], [0.5, 0.5], 0)
    out = step(impl, labeled, empty(3), unlabeled_keys=[[1.0, 0], [0, 2.0]], ids=[1, 2])
    assert out.pseudo_labels.tolist() == [1, 3]
    # The second sample finds no slot of its own label in M', so its sets are empty.
    same(out.loss, -math.log(E / (E + 1)))


def test_cosine_softmax(impl):
    slots = f64([[2.0, 0], [0, 3.0], [0, 0], [5, 5]])
    occupied = torch.tensor([True, True, True, False])
    keys = f64([[7.0, 0], [0, 0]])
    first = [E / (E + 2), 1 / (E + 2), 1 / (E + 2), 0]
    same(impl.cosine_softmax(keys, slots, occupied), [first, [1 / 3] * 3 + [0]])
    same(impl.cosine_softmax(keys, slots, torch.zeros(4, dtype=torch.bool)), [[0.0] * 4] * 2)
    same(impl.cosine_softmax(keys, slots)[1], [0.25] * 4)
    tiny = impl.cosine_softmax(f64([[1e-13, 0]]), slots[:2])
    same(tiny, [[math.exp(0.1) / (math.exp(0.1) + 1), 1 / (math.exp(0.1) + 1)]])


def test_nothing_written_shares_no_storage(impl):
    labeled, pseudo = empty(2), empty(2)
    out = step(impl, labeled, pseudo)
    assert out.loss == 0 and out.pseudo_labels.shape == (0,) and out.pseudo_labels.dtype == torch.int64
    for new, old in zip((*out.labeled, *out.unlabeled), (*labeled, *pseudo), strict=True):
        assert torch.equal(new, old) and new.data_ptr() != old.data_ptr()


def test_gradients_exist_when_nothing_was_to_do(impl):
    keys = torch.zeros(0, 2, dtype=torch.float64, requires_grad=True)
    alpha = f64(0.3).requires_grad_()
    out = impl.memory_step(empty(2), empty(2), keys, i64([]), keys, i64([]), alpha, 0.0, 0.1)
    out.loss.backward()
    assert alpha.grad == 0 and keys.grad.shape == (0, 2)
