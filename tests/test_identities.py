"""`identity_loss`, `write_identities` and `IdentityMemory`: values, derivatives, bad input, waiting for nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast import functional, reference
from dan_fast.nn import IdentityMemory

F64 = torch.float64
BOTH = pytest.mark.parametrize("impl", [reference, functional], ids=["reference", "functional"])
# Two keys of person 2, a person never written (4), and keys without a person.
LABELS = torch.tensor([2, 0, -1, 4, 2, 1])
KNOWN = torch.tensor([True, True, True, True, False])


def problem(dtype: torch.dtype = F64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, slots = (torch.randn(n, 7, generator=generator, dtype=F64) for n in (len(LABELS), len(KNOWN)))
    return keys.to(dtype), slots.to(dtype)


@BOTH
def test_the_loss_is_cross_entropy_over_the_known_slots(impl):
    keys, slots = problem()
    losses = impl.identity_loss(keys, LABELS, slots, KNOWN, temperature=0.3)
    cosines = F.cosine_similarity(keys[:, None], slots[:4], dim=2)
    for row in (0, 1, 4, 5):
        expected = F.cross_entropy(cosines[row] / 0.3, LABELS[row])
        assert torch.isclose(losses[row], expected, rtol=1e-12)
    assert losses[[2, 3]].tolist() == [0.0, 0.0]


def test_values_and_two_derivatives_agree():
    def differentiated(impl) -> list[Tensor]:
        keys, slots = (x.requires_grad_() for x in problem())
        losses = impl.identity_loss(keys, LABELS, slots, KNOWN, 0.2)
        first = torch.autograd.grad(losses.square().sum(), [keys, slots], create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), [keys, slots])
        return [losses, *first, *second]

    for a, b in zip(differentiated(functional), differentiated(reference), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
        assert b.abs().sum() > 0


def test_derivatives_against_finite_differences():
    keys, slots = (x.requires_grad_() for x in problem())

    def loss(keys: Tensor, slots: Tensor) -> Tensor:
        return functional.identity_loss(keys, LABELS, slots, KNOWN, 0.5)

    assert torch.autograd.gradcheck(loss, (keys, slots))
    assert torch.autograd.gradgradcheck(loss, (keys, slots))


@BOTH
def test_who_takes_no_part_has_no_gradient(impl):
    keys, slots = (x.requires_grad_() for x in problem())
    impl.identity_loss(keys, LABELS, slots, KNOWN, 0.2).sum().backward()
    assert keys.grad[[2, 3]].abs().sum() == 0 and keys.grad[[0, 1, 4, 5]].abs().sum(1).all()
    assert slots.grad[4].abs().sum() == 0


@BOTH
def test_writing_moves_the_slots_of_the_batch_alone(impl):
    keys, slots = problem()
    slots = F.normalize(slots, dim=1)
    before, before_known = slots.clone(), KNOWN.clone()
    written, known = impl.write_identities(slots, KNOWN, keys, LABELS, momentum=0.25)
    units = F.normalize(keys, dim=1)
    expected = before.clone()
    expected[2] = F.normalize(0.25 * before[2] + 0.75 * (units[0] + units[4]) / 2, dim=0)
    expected[0] = F.normalize(0.25 * before[0] + 0.75 * units[1], dim=0)
    expected[1] = F.normalize(0.25 * before[1] + 0.75 * units[5], dim=0)
    expected[4] = units[3]  # not known before: nothing of what stood there stays
    assert torch.allclose(written, expected, rtol=1e-12)
    assert known.tolist() == [True] * 5
    assert torch.equal(slots, before) and torch.equal(KNOWN, before_known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precisions_are_close(dtype: torch.dtype):
    keys, slots = problem(dtype)
    losses = functional.identity_loss(keys, LABELS, slots, KNOWN, 0.2)
    exact = reference.identity_loss(keys.to(F64), LABELS, slots.to(F64), KNOWN, 0.2)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), exact, rtol=1e-4, atol=1e-5)
    assert functional.write_identities(slots, KNOWN, keys, LABELS, 0.2)[0].dtype == dtype


@BOTH
def test_an_empty_batch_and_an_empty_memory(impl):
    keys, slots = problem()
    none = impl.identity_loss(keys[:0], LABELS[:0], slots, KNOWN, 0.2)
    assert none.shape == (0,)
    unwritten = impl.identity_loss(keys, LABELS, slots, torch.zeros(5, dtype=torch.bool), 0.2)
    assert unwritten.tolist() == [0.0] * 6
    assert torch.equal(impl.write_identities(slots, KNOWN, keys[:0], LABELS[:0], 0.2)[0], slots)


@BOTH
def test_keys_and_slots_of_no_length(impl):
    keys, slots = problem()
    keys[0], slots[1] = 0.0, 0.0
    keys.requires_grad_()
    losses = impl.identity_loss(keys, LABELS, slots, KNOWN, 0.2)
    losses.sum().backward()
    assert losses.isfinite().all() and keys.grad.isfinite().all()
    assert impl.write_identities(slots, KNOWN, keys, LABELS, 0.2)[0].isfinite().all()


@BOTH
@pytest.mark.parametrize(
    "change, kind, words",
    [
        ({"labels": LABELS.int()}, TypeError, "labels must be torch.int64"),
        ({"labels": LABELS[:3]}, ValueError, r"labels must have shape \(6,\)"),
        ({"labels": LABELS + 1}, ValueError, "labels must lie from -1 to 4"),
        ({"labels": LABELS - 1}, ValueError, "labels must lie from -1 to 4"),
        ({"identities": torch.zeros(5, 6, dtype=F64)}, ValueError, r"identities must have shape \(n, 7\)"),
        ({"identities": torch.zeros(5, 7)}, TypeError, "identities must be torch.float64"),
        ({"identities": torch.zeros(0, 7, dtype=F64), "known": KNOWN[:0]}, ValueError, "at least one slot"),
        ({"known": KNOWN.long()}, TypeError, "known must be torch.bool"),
        ({"keys": torch.zeros(6, 7, dtype=torch.int64)}, TypeError, "keys must have a floating dtype"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": float("nan")}, ValueError, "temperature must be positive"),
    ],
)
def test_bad_input(impl, change: dict, kind: type, words: str):
    keys, slots = problem()
    arguments = {"keys": keys, "labels": LABELS, "identities": slots, "known": KNOWN, "temperature": 0.2} | change
    with pytest.raises(kind, match=words):
        impl.identity_loss(**arguments)
    del arguments["temperature"]
    if "temperature" not in change:
        with pytest.raises(kind, match=words):
            impl.write_identities(**arguments, momentum=0.2)
    with pytest.raises(ValueError, match="momentum must lie"):
        impl.write_identities(slots, KNOWN, keys, LABELS, momentum=1.0)


def test_a_label_that_is_nobody_is_nan_where_looking_would_wait():
    keys, slots = problem()
    compiled = torch.compile(functional.identity_loss, fullgraph=True, backend="aot_eager")
    losses = compiled(keys, torch.tensor([5, 0, -1, -2, 2, 1]), slots, KNOWN, 0.2)
    assert losses.isnan().tolist() == [True, False, False, True, False, False]


def test_the_memory_leaves_alone_what_a_graph_still_reads():
    memory = IdentityMemory(5, 7).double()
    keys, _ = problem()
    memory.write(keys, LABELS)
    keys.requires_grad_()
    loss = memory.loss(keys, LABELS).sum()
    memory.write(keys * -1.0, LABELS)
    loss.backward()
    again = keys.detach().clone().requires_grad_()
    fresh = IdentityMemory(5, 7).double()
    fresh.write(again, LABELS)
    fresh.loss(again, LABELS).sum().backward()
    assert torch.equal(keys.grad, again.grad) and keys.grad.abs().sum() > 0


def test_the_memory_refuses_keys_that_are_not_finite():
    memory = IdentityMemory(5, 7).double()
    keys, _ = problem()
    memory.write(keys, LABELS)
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    keys[1, 3] = torch.nan
    memory.write(keys, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict().items())


def test_the_memory_is_in_the_state_dict():
    memory, other = IdentityMemory(5, 7), IdentityMemory(5, 7)
    keys, _ = problem(torch.float32)
    memory.write(keys, LABELS)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.loss(keys, LABELS), memory.loss(keys, LABELS))
    with pytest.raises(ValueError, match="num_identities must be positive"):
        IdentityMemory(0, 7)
