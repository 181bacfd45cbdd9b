"""Losses on gradients of the memory step: gradient penalties, meta learning, and third derivatives.

A backward that is a kernel of its own can be right and still stop there, so that a loss on gradients trains in silence
on a wrong sum. Everything here goes through `memory_step` and the module as users call them.
"""

import pytest
import torch
import torch.utils.checkpoint

from dan_fast import MemoryState, functional, reference
from dan_fast.core.types import Gates, MemoryBatch
from tests.support.memory_arguments import arguments
from tests.support.memory_problems import agree, closest_call, in_dtype, make_keys, make_state, module_of

F64 = torch.float64
NAMES = ("keys", "unlabeled_keys", "alpha", "alpha_unlabeled", "beta")
GATES = Gates(0.4, -0.3, 0.6, 0.99, 0.99)


class Case:
    """States and a batch far from any other decision; `inputs` are the tensors that a loss depends on."""

    def __init__(self, seed, slots=(5, 6), d=3, batch=(3, 3), start="full", kind="random"):
        generator = torch.Generator().manual_seed(seed)
        self.states = [
            make_state(start, n, d, classes, kind, generator) for n, classes in zip(slots, (3, 2), strict=True)
        ]
        self.labels = torch.randint(0, 3, (batch[0],), generator=generator)
        self.ids = torch.randint(0, 9, (batch[1],), generator=generator)
        self.values = [make_keys(kind, n, d, generator) for n in batch]
        self.values += [torch.tensor(x, dtype=F64) for x in GATES[:3]]

    def inputs(self):
        return [x.clone().requires_grad_() for x in self.values]

    def step(self, impl, keys, unlabeled_keys, *gates, states=None):
        return impl.memory_step(*(states or self.states), keys, self.labels, unlabeled_keys, self.ids, *gates)

    def loss(self, impl, *inputs):
        return self.step(impl, *inputs).loss

    def closest(self):
        batch = MemoryBatch(self.values[0], self.labels, self.values[1], self.ids)
        return closest_call(self.states, batch, GATES)

    def clears(self):
        after = self.step(reference, *self.values).unlabeled
        return bool(((self.states[1].labels >= 0) & (after.labels < 0)).any())


CASES = {
    "full": Case(0),
    "half full": Case(1, start="half"),
    "from empty": Case(1, start="empty"),
    "one slot": Case(0, slots=(1, 1)),
    "fewer slots than samples": Case(1, slots=(2, 2)),
    "scalar keys": Case(1, d=1),
    "no labelled samples": Case(1, batch=(0, 3)),
    "compiled": Case(3, slots=(3, 3), d=2, batch=(1, 2)),
    "more than a vector register": Case(1, slots=(19, 21), d=5, batch=(4, 4)),
    "close keys": Case(2, kind="close"),
    "repeated keys": Case(1, kind="repeated"),
}
TIES = {"scalar keys", "repeated keys"}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request):
    return CASES[request.param]


def mixture(tensors):
    """() that weighs every entry differently, so that none can stand in for another, and is not linear in them."""
    return sum((x * (1 + torch.arange(x.numel()).reshape(x.shape)).cos()).sum() + x.square().sum() for x in tensors)


def derivatives(loss, inputs, order):
    """The loss, its gradients, those of a mixture of the gradients, and so on."""
    found, value = [loss], loss
    for at in range(order):
        # create_graph up to the last: a derivative that is cut off is then a zero or an error, both seen below.
        grads = torch.autograd.grad(
            value, inputs, create_graph=at < order - 1, allow_unused=True, materialize_grads=True
        )
        found += grads
        if at < order - 1:
            value = mixture(grads)
            if not value.requires_grad:
                break
    return found


def test_the_cases_are_what_they_are_called():
    """Far enough from other decisions for finite differences, and with false samples among them."""
    for name, case in CASES.items():
        closest = case.closest()
        assert closest.usage > 1e-4 and (closest.cosine > 1e-4 or name in TIES), (name, closest)
    assert CASES["full"].clears() and CASES["compiled"].clears() and CASES["more than a vector register"].clears()
    assert not CASES["from empty"].clears()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "half full", "from empty"])
def test_gradcheck_and_gradgradcheck(name):
    case = CASES[name]

    def loss(*inputs):
        return case.loss(functional, *inputs)

    assert torch.autograd.gradcheck(loss, case.inputs())
    assert torch.autograd.gradgradcheck(loss, case.inputs(), atol=1e-4)


def test_first_second_and_third_derivatives_are_the_literal_ones(case):
    results = {}
    for impl in (reference, functional):
        inputs = case.inputs()
        results[impl] = derivatives(case.loss(impl, *inputs), inputs, order=3)
    assert len(results[functional]) == len(results[reference])
    agree(results[functional], results[reference], 1e-9)


BENDS = {
    "keys": {"keys", "unlabeled_keys", "alpha"},
    "unlabeled_keys": {*NAMES},
    "alpha": {"keys", "unlabeled_keys", "alpha"},
    "alpha_unlabeled": {"unlabeled_keys", "alpha_unlabeled", "beta"},
    "beta": {"unlabeled_keys", "alpha_unlabeled"},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_block_of_the_hessian_that_can_be_there_is(name):
    """So the tests above do not compare zero with zero: L = L1(k, k', alpha) + beta L2(k', alpha')."""
    case = CASES["full"]
    inputs = case.inputs()
    loss = case.loss(functional, *inputs)
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    value = first[NAMES.index(name)].sum()
    second = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    assert {other for other, x in zip(NAMES, second, strict=True) if x.abs().max() > 1e-6} == BENDS[name]


def meta_gradients(impl, case, order):
    """MLDG: a step on one batch by its own gradient, tested on the memories as that batch left them."""
    weight = torch.eye(case.values[0].shape[1], dtype=F64)
    parameters = [x.clone().requires_grad_() for x in (weight, *case.values[2:])]

    def step(states, weight, *gates):
        return case.step(impl, *(x @ weight for x in case.values[:2]), *gates, states=states)

    train = step(case.states, *parameters)
    grads = torch.autograd.grad(train.loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    moved = [x - 0.5 * (g if order == 2 else g.detach()) for x, g in zip(parameters, grads, strict=True)]
    test = step((train.labeled, train.unlabeled), *moved)
    total = train.loss + test.loss
    return [total, *torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)]


def test_a_meta_learning_loss_has_the_literal_gradients(case):
    found = {order: [meta_gradients(impl, case, order) for impl in (functional, reference)] for order in (1, 2)}
    for both in found.values():
        agree(*both, 1e-9)
    if case is CASES["full"]:
        pairs = zip(found[1][0][1:], found[2][0][1:], strict=True)
        assert all((a - b).abs().max() > 1e-6 for a, b in pairs), "second derivatives make no difference here"


def penalised(loss, inputs, at):
    """The loss, |dL/dx|^2 for one x, and the gradients of their sum."""
    (grad,) = torch.autograd.grad(loss, inputs[at], create_graph=True)
    penalty = grad.square().sum()
    total = loss + penalty
    grads = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    return [loss, penalty, *grads]


@pytest.mark.parametrize("look", [False, True], ids=["waiting", "settled"])
def test_a_gradient_penalty_through_the_module(case, look):
    """Over two batches, whose writes wait or have been folded in before the first backward pass."""
    memory, inputs = module_of(case.states, GATES), case.inputs()
    parameters = [memory.alpha, memory.alpha_unlabeled]
    arguments = (inputs[0], case.labels, inputs[1], case.ids)
    loss = memory(*arguments).loss
    loss = loss + memory(*arguments).loss
    if look:
        memory.settle()
    memory(*arguments)
    literal_inputs = case.inputs()
    first = case.step(reference, *literal_inputs)
    second = case.step(reference, *literal_inputs, states=(first.labeled, first.unlabeled))
    for at in range(2):
        # The second round goes through the same graphs again: nothing was freed or overwritten.
        actual = penalised(loss, [*inputs[:2], *parameters], at)
        expected = penalised(first.loss + second.loss, literal_inputs[:4], at)
        agree(actual, expected, 1e-9)


def test_half_precision_memory_larger_than_one_piece_has_second_derivatives():
    generator = torch.Generator().manual_seed(1)
    states = [in_dtype(make_state("full", 1100, 5, 3, "random", generator), torch.bfloat16) for _ in range(2)]
    keys = [make_keys("random", 2, 5, generator).bfloat16() for _ in range(2)]
    labels, results = torch.tensor([0, 1]), []
    for impl in (reference, functional):
        inputs = [x.clone().requires_grad_() for x in keys]
        loss = impl.memory_step(*states, inputs[0], labels, inputs[1], labels, 0.0, 0.0, 0.5).loss
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.float().square().sum() for x in first), inputs)
        results.append([loss, *first, *second])
    torch.testing.assert_close(*results, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("memory", ["empty", "full"])
def test_a_step_can_be_computed_again_for_its_backward(memory):
    given = arguments()
    if memory == "empty":
        given |= {name: MemoryState.empty(5, 3, F64) for name in ("labeled", "unlabeled")}

    def loss(keys, unlabeled_keys):
        step = functional.memory_step(**given | {"keys": keys, "unlabeled_keys": unlabeled_keys})
        return step.loss + functional.cosine_softmax(keys, unlabeled_keys).square().sum()

    leaves = [given[name].requires_grad_() for name in ("keys", "unlabeled_keys")]
    again = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (again, loss(*leaves))), strict=True):
        assert torch.equal(a, b) and a.any()


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break(backend):
    """`fullgraph=True` refuses whatever reads a value back on the host. Inductor compiles one small case."""
    case = CASES["full"] if backend == "aot_eager" else CASES["compiled"]

    def loss_and_states(*inputs):
        step = functional.memory_step(*case.states, inputs[0], case.labels, inputs[1], case.ids, *inputs[2:])
        return step.loss, step.pseudo_labels, *step.labeled, *step.unlabeled

    torch._dynamo.reset()
    compiled = torch.compile(loss_and_states, fullgraph=True, backend=backend)
    results = []
    for function in (compiled, loss_and_states):
        inputs = case.inputs()
        outputs = function(*inputs)
        results.append([*outputs, *torch.autograd.grad(outputs[0], inputs)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        agree(a.detach(), b.detach())
