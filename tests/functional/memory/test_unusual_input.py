"""Unusual arguments that are right work like any other: layouts, gradients of the memory, huge ones."""

import numpy as np
import pytest
import torch

from dan_fast import MemoryState, _extension, functional, reference
from dan_fast.functional.memory import passes
from dan_fast.functional.memory.passes import memory_combine, memory_scores
from dan_fast.functional.memory.row_norms import row_sq_norms
from tests.support.draws import draw
from tests.support.memory_arguments import BATCH, F64, TENSORS, arguments, get, module, put, tensors
from tests.support.memory_problems import agree
from tests.support.running import Called


def views(x):
    """The values of `x` in every layout that PyTorch has for them."""
    yield torch.stack([x, x], -1)[..., 0]  # every other number
    yield torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].reshape(x.shape)  # a storage offset
    if x.dim() == 2:
        yield x.T.contiguous().T
        yield torch.cat([x, x], 1)[:, : x.shape[1]]  # padded rows
    if x.is_floating_point():
        yield torch.complex(torch.zeros_like(x), -x).conj().imag  # negated when it is read


@pytest.mark.parametrize("name", TENSORS)
def test_layout_does_not_matter(impl, name):
    given = arguments()
    plain = impl.memory_step(**given)
    for view in views(get(given, name)):
        assert torch.equal(view, get(given, name))
        step = impl.memory_step(**put(given, name, view))
        agree(tensors(step), tensors(plain), 1e-13)
        assert torch.equal(view, get(given, name))


@pytest.mark.parametrize("slots", [1, 3, 7, 9])
def test_a_half_precision_memory_is_widened_in_pieces(slots, monkeypatch):
    base, keys = draw(slots, 5, dtype=torch.bfloat16), draw(4, 5, seed=1).requires_grad_()
    held, tangent = draw(4, slots, seed=2), draw(4, 5, seed=3)
    kept = (torch.arange(slots) % 2).float()
    monkeypatch.setattr(passes, "_ROWS", 3)
    with _extension.disabled():
        scores, norms = memory_scores(keys, base)
        (grad,) = torch.autograd.grad(scores, keys, held)
        features, written = passes.memory_commit(base, kept, held, keys.detach())
        _, along = torch.func.jvp(lambda k: memory_scores(k, base)[0], (keys.detach(),), (tangent,))
    torch.testing.assert_close(scores, keys @ base.float().T)
    torch.testing.assert_close(norms, base.float().square().sum(1))
    torch.testing.assert_close(grad, held @ base.float())
    torch.testing.assert_close(along, tangent @ base.float().T)
    assert torch.equal(features, torch.addmm(kept[:, None] * base.float(), held.mT, keys.detach()).bfloat16())
    torch.testing.assert_close(written, features.float().square().sum(1))


@pytest.mark.usefixtures("path")
def test_keys_of_one_number_that_is_zero_have_gradients():
    """n2 is m^2 there, which `scan_torch` divides by the length of the key."""
    found = []
    for each in (functional, reference):
        keys, others = (torch.tensor(x, dtype=F64)[:, None].requires_grad_() for x in ([0, 1.5, 0], [0, -0.7, 0.4]))
        alpha, empty = torch.tensor(0.3, dtype=F64, requires_grad=True), MemoryState.empty(4, 1, F64)
        samples = keys, torch.tensor([0, 1, 1]), others, torch.arange(3)
        loss = each.memory_step(empty, empty, *samples, alpha, 0.1, 0.5).loss
        found.append(torch.autograd.grad(loss, (keys, others, alpha)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_expanded_tensors(impl):
    """One number in memory for many: whatever were written to in place would show."""
    given = arguments()
    labeled, unlabeled = given["labeled"], given["unlabeled"]
    expanded = given | {
        "keys": given["keys"][:1].expand(2, 3),
        "labels": torch.tensor(2).expand(2),
        "unlabeled_keys": given["unlabeled_keys"][:, :1].expand(3, 3),
        "sample_ids": torch.tensor(7).expand(3),
        "labeled": labeled._replace(
            features=labeled.features[:1].expand(5, 3),
            labels=torch.tensor(1).expand(5),
            usage=torch.ones(1, dtype=F64).expand(5),
            evaluation=torch.tensor(0.2, dtype=F64).expand(5),
            sample_ids=torch.tensor(-1).expand(5),
        ),
        "unlabeled": unlabeled._replace(
            features=unlabeled.features[:, :1].expand(4, 3), usage=torch.zeros(1, dtype=F64).expand(4)
        ),
    }
    copied = expanded
    for name in TENSORS:
        copied = put(copied, name, get(expanded, name).clone())
    results = []
    for form in (expanded, copied):
        keys, unlabeled_keys = (form[name].detach().requires_grad_() for name in ("keys", "unlabeled_keys"))
        step = impl.memory_step(**(form | {"keys": keys, "unlabeled_keys": unlabeled_keys}))
        results.append([*tensors(step), *torch.autograd.grad(step.loss, [keys, unlabeled_keys])])
    agree(*results, 1e-12)
    assert all(map(torch.equal, tensors(expanded), tensors(copied)))


@pytest.mark.parametrize("name", ["keys", "slots", "occupied", "evaluation", "labels", "pseudo_labels"])
def test_layout_does_not_matter_to_the_weights_and_the_sets(impl, name):
    generator = torch.Generator().manual_seed(0)
    weights = {"keys": draw(4, 6, dtype=F64), "slots": draw(9, 6, seed=1, dtype=F64), "occupied": draw(9, seed=2) < 0.5}
    sets = {
        "evaluation": torch.randint(0, 3, (4, 9), generator=generator).double(),
        "labels": torch.randint(-1, 2, (9,), generator=generator),
        "pseudo_labels": torch.tensor([0, 1, 0, -1]),
    }
    for function, given in ((impl.cosine_softmax, weights), (impl.false_sample_sets, sets)):
        if name in given:
            for view in views(given[name]):
                agree(function(**given | {name: view}), function(**given), 1e-14)


def test_a_memory_that_requires_grad_is_a_constant(impl):
    given = arguments()
    keys = given["keys"].requires_grad_()
    leaf = torch.ones((), dtype=F64, requires_grad=True)

    def followed(state):
        floats = ("features", "usage", "evaluation")
        return state._replace(**{field: getattr(state, field) * leaf for field in floats})

    states = {name: followed(given[name]) for name in ("labeled", "unlabeled")}
    plain, step = impl.memory_step(**given), impl.memory_step(**(given | states))
    assert not any(x.requires_grad for x in (*step.labeled, *step.unlabeled, step.pseudo_labels))
    grad_keys, grad_leaf = torch.autograd.grad(step.loss, [keys, leaf], allow_unused=True)
    assert grad_leaf is None
    assert torch.equal(grad_keys, torch.autograd.grad(plain.loss, keys)[0]) and grad_keys.abs().sum() > 0
    assert torch.equal(step.loss, plain.loss)


def test_no_product_is_left_to_autocast():
    """What PyTorch's form multiplies, in any derivative, goes by the product that turns it off.

    On a GPU autocast rounds addr and mv, which it leaves alone on a CPU.
    """
    given = arguments(torch.float32)
    with Called() as called, _extension.disabled():
        loss = functional.memory_step(**given | {"keys": given["keys"].requires_grad_()}).loss
        (grad,) = torch.autograd.grad(loss, given["keys"], create_graph=True)
        torch.autograd.grad(grad.square().sum(), given["keys"])
    names = {name.partition(".")[0] for name in called.names}
    assert "torch_dan_fast::float32_product" in names
    assert not names & {f"aten::{name}" for name in ("addr", "mv", "mm", "addmm", "bmm", "baddbmm", "addmv")}


def test_what_is_returned_may_be_changed_in_place(impl):
    """`loss += ...`, and pseudo labels of which some are struck out."""
    given = arguments()
    grads = []
    for changes in (False, True):
        keys = given["keys"].clone().requires_grad_()
        step = impl.memory_step(**given | {"keys": keys})
        loss, pseudo_labels = step.loss, step.pseudo_labels
        if changes:
            loss += 1.0
            pseudo_labels.fill_(-1)
        grads += torch.autograd.grad(loss, keys)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_a_memory_advanced_without_gradients_can_be_trained_on():
    memory, twin = module(), module()
    given = {name: arguments()[name] for name in BATCH}
    with torch.no_grad():
        assert not memory(**given).loss.requires_grad
    twin(**given)
    losses = [m(**given).loss for m in (memory, twin)]
    assert torch.equal(*losses) and losses[0].requires_grad
    grads = [torch.autograd.grad(x, m.parameters()) for x, m in zip(losses, (memory, twin), strict=True)]
    assert all(map(torch.equal, *grads))


def untouched_zeros(count, dtype):
    """(count,) zeros that the system only makes up when they are read: `torch.zeros` would write them."""
    size = torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(np.zeros(count * size, dtype=np.uint8)).view(dtype)


def far_apart(rows, dtype):
    """(3, d) with more than 2^31 elements between the first row and the last; what lies between is never touched."""
    stride = 2**30 + 5
    storage = untouched_zeros(2 * stride + rows.shape[1], dtype)
    view = storage.as_strided(rows.shape, (stride, 1))
    view.copy_(rows)
    return view


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_more_than_2_to_the_31_elements_apart(dtype):
    rows, keys = draw(3, 6, seed=1, dtype=dtype), draw(2, 6, seed=2, dtype=dtype)
    view = far_apart(rows, dtype)
    agree(row_sq_norms(view), row_sq_norms(rows), 1e-6)
    agree(functional.cosine_softmax(keys, view), functional.cosine_softmax(keys, rows), 1e-6)
    states = (MemoryState.empty(3, 6, dtype)._replace(features=x, labels=torch.arange(3)) for x in (view, rows))
    batch = (keys, torch.tensor([3, 4]), keys.flip(0), torch.tensor([5, 6]), 0.3, -0.2, 0.4)
    agree(*(tensors(functional.memory_step(state, state, *batch)) for state in states), 1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    _extension.why_not() is not None, reason="the PyTorch path makes no index of its own, and copies gigabytes"
)
def test_more_than_2_to_the_31_elements():
    """Only the last rows hold anything: an index of 32 bits would wrap round to the zeros before them.

    Zeros that were never written share one page of memory, so that this needs hardly any.
    """
    d, slots = 4099, 2**19 + 3
    base = untouched_zeros(slots * d, torch.bfloat16).reshape(slots, d)
    assert base.numel() > 2**31
    base[-2:], key = draw(2, d, seed=1), draw(1, d, seed=2)
    assert row_sq_norms(base)[-3:].tolist() == [0, *row_sq_norms(base[-2:]).tolist()]
    scores, norms = memory_scores(key, base)
    assert not scores[:, :-2].any() and not norms[:-2].any()
    torch.testing.assert_close(scores[:, -2:].double(), key.double() @ base[-2:].double().mT, rtol=1e-4, atol=1e-4)
    agree(norms[-2:], row_sq_norms(base[-2:]), 1e-6)
    weights = torch.zeros(1, slots)
    weights[0, -3:] = torch.tensor([5.0, 2.0, -3.0])
    combined = memory_combine(weights, base)
    torch.testing.assert_close(combined, weights[:, -2:] @ base[-2:].float(), rtol=1e-5, atol=1e-5)
