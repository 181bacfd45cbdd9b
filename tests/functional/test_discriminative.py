"""`discriminative_loss`: values, two derivatives, precisions, degenerate and bad input, the compiler."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast import functional, reference
from tests.support.attention_problems import assert_agree, two_derivatives
from tests.support.warned import own_warnings

F64 = torch.float64
# A label with two slots, one with one, no label, a label without a slot.
LABELS = torch.tensor([2, 0, -1, 4, 2])
SLOT_LABELS = torch.tensor([2, 0, -1, 1, 2, 1, -1])


def problem(dtype: torch.dtype = F64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, slots = (torch.randn(n, 5, generator=generator, dtype=F64) for n in (len(LABELS), len(SLOT_LABELS)))
    return keys.to(dtype), slots.to(dtype)


@pytest.mark.parametrize("temperature", [0.3, 0.01])
def test_the_loss_is_eq_15_with_the_mean_of_its_own_slots_and_the_sum_of_the_others(impl, temperature):
    keys, slots = problem()
    losses = impl.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, temperature)
    weights = torch.exp(F.cosine_similarity(keys[:, None], slots, dim=2) / temperature)
    for row, own, others in ((0, [0, 4], [1, 3, 5]), (1, [1], [0, 3, 4, 5]), (4, [0, 4], [1, 3, 5])):
        positive, negative = weights[row, own].mean(), weights[row, others].sum()
        assert torch.isclose(losses[row], -torch.log(positive / (positive + negative)), rtol=1e-12)
    assert losses[[2, 3]].tolist() == [0.0, 0.0]


# At 0.02 some losses are above 20, from where softplus is linear by default.
@pytest.mark.parametrize("temperature", [0.2, 0.02])
def test_values_and_two_derivatives_agree(temperature):
    def losses(impl):
        return lambda keys, slots: [impl.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, temperature)]

    found, expected = (two_derivatives(losses(impl), problem()) for impl in (functional, reference))
    assert_agree(found, expected)
    assert all(each.any() for each in expected)


def test_a_small_temperature_is_no_overflow(impl):
    keys, slots = problem()
    losses = impl.discriminative_loss(keys.float(), LABELS, slots.float(), SLOT_LABELS, 0.005)
    expected = functional.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, 0.005)
    assert torch.allclose(losses.double(), expected, rtol=1e-4) and losses.max() > 20


def test_the_gradient_of_the_smallest_temperature_is_finite(impl):
    keys, slots = (x.requires_grad_() for x in problem(torch.float32))
    losses = impl.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, 1e-30)
    assert losses.isfinite().all() and losses.max() > 1e29
    for gradient in torch.autograd.grad(losses.sum(), [keys, slots]):
        assert gradient.isfinite().all() and gradient.abs().max() > 1e29


def test_derivatives_against_finite_differences():
    def loss(keys: Tensor, slots: Tensor) -> Tensor:
        return functional.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, 0.5)

    inputs = [x.requires_grad_() for x in problem()]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_who_takes_no_part_has_no_gradient(impl):
    keys, slots = (x.requires_grad_() for x in problem())
    impl.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, 0.2).sum().backward()
    assert keys.grad[[2, 3]].abs().sum() == 0 and keys.grad[[0, 1, 4]].abs().sum(1).all()
    assert slots.grad[[2, 6]].abs().sum() == 0 and slots.grad[[0, 1, 3, 4, 5]].abs().sum(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precisions_are_close(dtype: torch.dtype):
    keys, slots = problem(dtype)
    losses = functional.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, 0.05)
    exact = reference.discriminative_loss(keys.to(F64), LABELS, slots.to(F64), SLOT_LABELS, 0.05)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("content", [math.nan, math.inf, 1e200])  # the square of the last one overflows
def test_whatever_an_empty_slot_holds_changes_nothing(impl, content: float):
    (keys, slots), unknown = problem(), SLOT_LABELS < 0
    expected = impl.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, 0.2)
    slots[unknown] = content
    keys.requires_grad_()
    losses = impl.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, 0.2)
    assert torch.equal(losses, expected)
    losses.sum().backward()
    assert keys.grad.isfinite().all() or not math.isfinite(content)


def test_a_batch_of_unknown_labels_has_gradients_of_zero(impl):
    for rows in (5, 0):
        keys, slots = (x.requires_grad_() for x in (problem()[0][:rows], problem()[1]))
        losses = impl.discriminative_loss(keys, torch.full((rows,), -1), slots, SLOT_LABELS, 0.2)
        losses.sum().backward()
        assert not keys.grad.any() and not slots.grad.any()


def test_degenerate_memories_and_keys(impl):
    keys, slots = problem()
    assert impl.discriminative_loss(keys[:0], LABELS[:0], slots, SLOT_LABELS, 0.2).shape == (0,)
    empty = impl.discriminative_loss(keys, LABELS, slots, torch.full((7,), -1), 0.2)
    assert empty.tolist() == [0.0] * 5
    # No other label: N is 0, and the loss with it.
    alone = impl.discriminative_loss(keys[:1], LABELS[:1], slots, torch.full((7,), 2), 0.2)
    assert alone.tolist() == [0.0]
    keys[0], slots[1] = 0.0, 0.0
    keys.requires_grad_()
    losses = impl.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, 0.2)
    losses.sum().backward()
    assert math.isclose(losses[0].item(), math.log(4), rel_tol=1e-12)  # all cosines are 0: one own, three others
    assert keys.grad.isfinite().all()


def test_a_temperature_may_be_learnt(impl, recwarn):
    keys, slots = problem()

    def loss(temperature):
        return impl.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, temperature).sum()

    temperature = torch.tensor(0.2, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(temperature), temperature)
    assert math.isclose(gradient.item(), (loss(0.2 + 1e-6) - loss(0.2 - 1e-6)).item() / 2e-6, rel_tol=1e-6)
    assert not own_warnings(recwarn)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e200])
def test_a_key_without_a_label_has_no_derivative_whatever_it_holds(impl, broken):
    keys, slots = problem()
    labels = LABELS.clone()
    labels[1], keys[1, 0] = -1, broken
    keys.requires_grad_()
    slots.requires_grad_()
    losses = impl.discriminative_loss(keys, labels, slots, SLOT_LABELS, 0.2)
    grad_keys, grad_slots = torch.autograd.grad(losses.sum(), (keys, slots))
    assert losses[1] == 0 and not grad_keys[1].any()
    kept = [0, 2, 3, 4]
    others = impl.discriminative_loss(keys[kept], labels[kept], slots, SLOT_LABELS, 0.2)
    torch.testing.assert_close(grad_slots, torch.autograd.grad(others.sum(), slots)[0])


@pytest.mark.compile
def test_the_compiler_traces_it_whole():
    keys, slots = problem()
    compiled = torch.compile(functional.discriminative_loss, fullgraph=True, backend="aot_eager")
    expected = functional.discriminative_loss(keys, LABELS, slots, SLOT_LABELS, 0.2)
    assert torch.allclose(compiled(keys, LABELS, slots, SLOT_LABELS, 0.2), expected, rtol=1e-12)
    # A last batch, for which sizes become free.
    assert torch.allclose(compiled(keys[:3], LABELS[:3], slots, SLOT_LABELS, 0.2), expected[:3], rtol=1e-12)


@pytest.mark.parametrize(
    "change, kind, words",
    [
        ({"keys": torch.zeros(5, 5, dtype=torch.int64)}, TypeError, "keys must have a floating dtype"),
        ({"labels": LABELS.int()}, TypeError, "labels must be torch.int64"),
        ({"labels": LABELS[:3]}, ValueError, r"labels must have shape \(5,\)"),
        ({"slots": torch.zeros(7, 6, dtype=F64)}, ValueError, r"slots must have shape \(s, 5\)"),
        ({"slots": torch.zeros(7, 5)}, TypeError, "slots must be torch.float64"),
        ({"slots": torch.zeros(0, 5, dtype=F64), "slot_labels": SLOT_LABELS[:0]}, ValueError, "at least one slot"),
        ({"slot_labels": SLOT_LABELS[1:]}, ValueError, r"slot_labels must have shape \(7,\)"),
        ({"slot_labels": SLOT_LABELS.double()}, TypeError, "slot_labels must be torch.int64"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta, keys on cpu"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": float("nan")}, ValueError, "temperature must be positive"),
    ],
)
def test_bad_input(impl, change: dict, kind: type, words: str):
    keys, slots = problem()
    arguments = {"keys": keys, "labels": LABELS, "slots": slots, "slot_labels": SLOT_LABELS, "temperature": 0.2}
    with pytest.raises(kind, match=words):
        impl.discriminative_loss(**arguments | change)
