"""The score-space memory step against the literal one: values, gradients, gradients of gradients."""

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from dan_fast import functional, reference
from tests.support.memory_problems import agree, in_dtype, make_keys, make_state


def derivatives(step, inputs):
    """Loss, its gradients, and the gradients of a mixture of those."""
    first = torch.autograd.grad(step.loss, inputs, create_graph=True)
    if not any(x.requires_grad for x in first):
        return [step.loss, *first, *map(torch.zeros_like, inputs)]
    mixture = sum((x * (1 + torch.arange(x.numel()).reshape(x.shape)).cos()).sum() + x.square().sum() for x in first)
    second = torch.autograd.grad(mixture, inputs, allow_unused=True, materialize_grads=True)
    return [step.loss, *first, *second]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    slots=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    d=st.integers(1, 6),
    batch=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    classes=st.integers(1, 4),
    fill=st.sampled_from(["empty", "half", "full"]),
    kind=st.sampled_from(["random", "repeated", "zero", "close"]),
    alpha=st.sampled_from([-3.0, 0.0, 2.0]),
    decay=st.sampled_from([0.0, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_sequences_agree_in_float64(slots, d, batch, classes, fill, kind, alpha, decay, seed):
    generator = torch.Generator().manual_seed(seed)
    start = [make_state(fill, s, d, classes, "random", generator) for s in slots]
    states = {reference: start, functional: start}
    for _ in range(2):
        keys, unlabeled_keys = (make_keys(kind, count, d, generator) for count in batch)
        labels = torch.randint(0, classes, (batch[0],), generator=generator)
        ids = torch.randint(0, 30, (batch[1],), generator=generator)
        gates = [torch.tensor(x, dtype=torch.float64) for x in (alpha, -alpha, 0.3)]
        results = {}
        for impl, (labeled, unlabeled) in states.items():
            inputs = [x.clone().requires_grad_() for x in (keys, unlabeled_keys, *gates)]
            step = impl.memory_step(
                labeled, unlabeled, inputs[0], labels, inputs[1], ids, *inputs[2:], decay=decay, decay_unlabeled=0.9
            )
            results[impl] = step, derivatives(step, inputs)
            states[impl] = [step.labeled, step.unlabeled]
        (literal, expected), (fast, actual) = results[reference], results[functional]
        assert torch.equal(fast.pseudo_labels, literal.pseudo_labels)
        for a, b in zip((*fast.labeled, *fast.unlabeled), (*literal.labeled, *literal.unlabeled), strict=True):
            assert a.dtype == b.dtype and not a.requires_grad and not b.requires_grad
            agree(a, b)
        if kind == "zero":
            # At a key of norm 0 the cosine has slope 1e12, whose rounding errors hide what cancels beside it.
            assert all(x.isfinite().all() for x in (*actual, *expected))
            for a, b in zip(actual[:6], expected[:6], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-2)
            continue
        for a, b in zip(actual, expected, strict=True):
            agree(a, b)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(slots=st.integers(1, 12), rows=st.integers(0, 4), classes=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_sets_and_weights_agree(slots, rows, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes, (slots,), generator=generator)
    evaluation = torch.randint(0, 4, (rows, slots), generator=generator).double()
    pseudo_labels = torch.randint(-1, classes, (rows,), generator=generator)
    expected = reference.false_sample_sets(evaluation, labels, pseudo_labels)
    actual = functional.false_sample_sets(evaluation, labels, pseudo_labels)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(expected[0].sum(1), expected[1].sum(1))
    keys, features = make_keys("zero", rows, 3, generator), make_keys("zero", slots, 3, generator)
    agree(
        functional.cosine_softmax(keys, features, labels >= 0),
        reference.cosine_softmax(keys, features, labels >= 0),
    )


def example(impl, seed=11, slots=(5, 5), d=3, batch=(2, 3), classes=2):
    generator = torch.Generator().manual_seed(seed)
    labeled, unlabeled = (make_state("full", s, d, classes, "random", generator) for s in slots)
    keys, unlabeled_keys = (make_keys("random", count, d, generator) for count in batch)
    labels = torch.arange(batch[0]) % classes
    gates = [torch.tensor(x, dtype=torch.float64) for x in (0.4, -0.3, 0.6)]
    inputs = [x.requires_grad_() for x in (keys, unlabeled_keys, *gates)]

    def loss(keys, unlabeled_keys, *gates):
        ids = torch.arange(batch[1])
        return impl.memory_step(labeled, unlabeled, keys, labels, unlabeled_keys, ids, *gates).loss

    return loss, inputs


@pytest.mark.slow
def test_gradcheck_and_gradgradcheck(impl):
    loss, inputs = example(impl)
    # Every input matters in this example: a path that was cut off would show.
    assert all(x.abs().sum() > 1e-4 for x in torch.autograd.grad(loss(*inputs), inputs))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs, atol=1e-4)


def repeat_in(dtype, impl, states, keys, unlabeled_keys, labels, ids):
    inputs = [keys.to(dtype).requires_grad_(), unlabeled_keys.to(dtype).requires_grad_()]
    states = [in_dtype(state, dtype) for state in states]
    step = impl.memory_step(*states, inputs[0], labels, inputs[1], ids, 0.3, 0.2, 0.5)
    return step, torch.autograd.grad(step.loss, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision_step_by_step_from_a_common_state(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    states = [make_state("half", s, 24, 4, "random", generator) for s in (40, 30)]
    for _ in range(5):
        keys, unlabeled_keys = (make_keys("close", 4, 24, generator).to(dtype) for _ in range(2))
        # The common state is one that the lower precision can hold: only the step itself is compared.
        states = [state._replace(features=state.features.to(dtype).double()) for state in states]
        labels, ids = torch.randint(0, 4, (4,), generator=generator), torch.arange(4)
        arguments = (states, keys, unlabeled_keys, labels, ids)
        exact, exact_gradients = repeat_in(torch.float64, reference, *arguments)
        for impl in (reference, functional):
            step, gradients = repeat_in(dtype, impl, *arguments)
            assert torch.equal(step.pseudo_labels, exact.pseudo_labels)
            assert step.loss.dtype == torch.float32 and step.labeled.features.dtype == dtype
            assert step.labeled.usage.dtype == torch.float32
            agree(step.loss, exact.loss, 3e-6)
            for memory, wanted in zip(step[2:], exact[2:], strict=True):
                assert torch.equal(memory.labels, wanted.labels)
                assert memory.least_used == wanted.least_used
                agree(memory.features, wanted.features, tolerance)
                agree(memory.usage, wanted.usage, 1e-5)
                agree(memory.evaluation, wanted.evaluation, 3e-6)
            for a, b in zip(gradients, exact_gradients, strict=True):
                assert a.dtype == dtype
                agree(a, b, tolerance)
        states = [exact.labeled, exact.unlabeled]


def test_half_precision_memory_larger_than_one_piece_has_second_derivatives():
    generator = torch.Generator().manual_seed(1)
    states = [in_dtype(make_state("full", 1100, 5, 3, "random", generator), torch.bfloat16) for _ in range(2)]
    keys, unlabeled_keys = (make_keys("random", 2, 5, generator).bfloat16() for _ in range(2))
    labels, ids = torch.tensor([0, 1]), torch.arange(2)
    results = []
    for impl in (reference, functional):
        inputs = [x.clone().requires_grad_() for x in (keys, unlabeled_keys)]
        step = impl.memory_step(*states, inputs[0], labels, inputs[1], ids, 0.0, 0.0, 0.5)
        first = torch.autograd.grad(step.loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.float().square().sum() for x in first), inputs)
        results.append([step.loss, *first, *second])
    for a, b in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=1e-5)


def test_mixed_precision_around_it_changes_nothing():
    _, inputs = example(functional)
    single = [x.detach().float() for x in inputs]
    generator = torch.Generator().manual_seed(5)
    states = [in_dtype(make_state("full", 6, 3, 2, "random", generator), torch.float32) for _ in range(2)]
    arguments = (*states, single[0], torch.tensor([0, 1]), single[1], torch.arange(3), *single[2:])
    plain = functional.memory_step(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = functional.memory_step(*arguments)
    assert torch.equal(plain.loss, mixed.loss)
    for a, b in zip((*plain.labeled, *plain.unlabeled), (*mixed.labeled, *mixed.unlabeled), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory", ["empty", "full"])
def test_a_step_can_be_computed_again_for_its_backward(memory):
    generator = torch.Generator().manual_seed(1)
    states = [make_state(memory, 6, 3, 2, "random", generator) for _ in range(2)]
    keys, unlabeled_keys = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))

    def loss(keys, unlabeled_keys):
        labels = torch.tensor([0, 1])
        step = functional.memory_step(*states, keys, labels, unlabeled_keys, labels, 0.3, -0.2, 0.4)
        return step.loss + functional.cosine_softmax(keys, unlabeled_keys).square().sum()

    leaves = [x.requires_grad_() for x in (keys, unlabeled_keys)]
    again = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (again, loss(*leaves))), strict=True):
        assert torch.equal(a, b) and a.any()


def test_runs_are_bitwise_equal():
    loss, inputs = example(functional)
    runs = [torch.autograd.grad(loss(*inputs), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
