"""Wrong arguments are named and change nothing; unusual ones that are right work like any other."""

import copy
import math
import re

import numpy as np
import pytest
import torch

from dan_fast import MemoryState, _extension, functional, reference
from dan_fast.functional.memory_stream import memory_combine, memory_scores
from dan_fast.functional.row_norms import row_sq_norms
from dan_fast.nn import ProgressiveAugmentedMemory
from tests.memory_problems import agree, in_dtype, make_state

F64 = torch.float64
BATCH = ("keys", "labels", "unlabeled_keys", "sample_ids")
GATES = ("alpha", "alpha_unlabeled", "beta")
STATE_FIELDS = [f"{memory}.{field}" for memory in ("labeled", "unlabeled") for field in MemoryState._fields]
INTEGERS = ["labels", "sample_ids", *(name for name in STATE_FIELDS if re.search("labels|used|ids", name))]
FLOATS = ["keys", "unlabeled_keys", *GATES, *(name for name in STATE_FIELDS if name not in INTEGERS)]


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def impl(request):
    return request.param


def arguments():
    generator = torch.Generator().manual_seed(3)
    keys, unlabeled_keys = (torch.randn(n, 3, generator=generator, dtype=F64) for n in (2, 3))
    return {
        "labeled": make_state("half", 5, 3, 3, "random", generator),
        "unlabeled": make_state("full", 4, 3, 3, "random", generator),
        "keys": keys,
        "labels": torch.tensor([2, 0]),
        "unlabeled_keys": unlabeled_keys,
        "sample_ids": torch.tensor([7, 8, 7]),
        "alpha": torch.tensor(0.4, dtype=F64),
        "alpha_unlabeled": torch.tensor(-0.2, dtype=F64),
        "beta": torch.tensor(0.3, dtype=F64),
    }


def get(given, name):
    memory, _, field = name.partition(".")
    return getattr(given[memory], field) if field else given[memory]


def put(given, name, value):
    memory, _, field = name.partition(".")
    return given | {memory: given[memory]._replace(**{field: value}) if field else value}


def tensors(given):
    found = [x for value in given.values() for x in (value if isinstance(value, MemoryState) else [value])]
    return [x for x in found if isinstance(x, torch.Tensor) and not x.is_meta]


def refuses(impl, given, error, match):
    before = [x.detach().clone() for x in tensors(given)]
    with pytest.raises(error, match=match) as raised:
        impl.memory_step(**given)
    for x, old in zip(tensors(given), before, strict=True):
        torch.testing.assert_close(x, old, rtol=0, atol=0, equal_nan=True)
    assert "\n" not in str(raised.value), "one sentence"


@pytest.mark.parametrize("name", [*BATCH, *GATES, *STATE_FIELDS])
def test_another_device_is_named(impl, name):
    """`meta` stands for any second device."""
    given = arguments()
    # Everything is held against M's features: where those are elsewhere, the first that differs is named.
    first = "labeled.labels is on cpu" if name == "labeled.features" else f"{name} is on meta"
    if name == "unlabeled.features":
        first = "unlabeled.labels is on cpu"
    refuses(impl, put(given, name, get(given, name).to("meta")), ValueError, f"^{first}.*: move one with")


@pytest.mark.parametrize("memory", ["labeled", "unlabeled"])
def test_a_memory_on_another_device_is_named(impl, memory):
    given = arguments()
    moved = given | {memory: MemoryState(*(x.to("meta") for x in given[memory]))}
    refuses(impl, moved, ValueError, "^unlabeled.features is on (meta|cpu), labeled.features on (meta|cpu)")


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128], ids=str)
def test_a_wrong_dtype_is_named(impl, name, dtype):
    given = arguments()
    if name in GATES and dtype.is_floating_point:
        impl.memory_step(**put(given, name, get(given, name).to(dtype)))  # any floating dtype will do
        return
    blamed = name
    if name == "labeled.features" and dtype.is_floating_point:
        blamed = "labeled.usage"  # which no longer fits
    if name == "unlabeled.features" and dtype.is_floating_point:
        blamed = "unlabeled.usage"
    refuses(impl, put(given, name, get(given, name).to(dtype)), TypeError, f"^{blamed} must .*got torch")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bool, torch.uint8], ids=str)
def test_integers_that_are_not_int64_are_named(impl, name, dtype):
    given = arguments()
    wrong = get(given, name).abs().to(dtype)
    refuses(impl, put(given, name, wrong), TypeError, rf"^{name} must be torch.int64, got {dtype}.*\.to\(torch.int64\)")


@pytest.mark.parametrize("name", [*BATCH, *GATES, *STATE_FIELDS])
@pytest.mark.parametrize("wrong", [None, [[1.0, 2.0, 3.0]], "text", True, object()], ids=lambda x: type(x).__name__)
def test_what_is_no_tensor_is_named(impl, name, wrong):
    refuses(impl, put(arguments(), name, wrong), TypeError, f"^{name} must be a .*got {type(wrong).__name__}$")


@pytest.mark.parametrize("name", ["labeled", "unlabeled"])
def test_what_is_no_state_is_named(impl, name):
    for wrong in (None, tuple(arguments()[name]), torch.zeros(3)):
        refuses(
            impl, arguments() | {name: wrong}, TypeError, f"^{name} must be a MemoryState, got {type(wrong).__name__}"
        )


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


@pytest.mark.parametrize("name", [*BATCH, *GATES, *STATE_FIELDS])
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


@pytest.mark.parametrize("name", ["keys", "unlabeled_keys"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e160, -1e200])
def test_a_key_that_is_not_finite_anywhere_is_named(impl, name, value):
    """1e160 is finite, its square is not."""
    given = arguments()
    for row in range(given[name].shape[0]):
        for column in range(3):
            wrong = given[name].clone()
            wrong[row, column] = value
            refuses(impl, given | {name: wrong}, ValueError, f"^{name} must be finite")


def test_huge_but_usable_keys_are_written(impl):
    given = arguments()
    step = impl.memory_step(**(given | {"keys": 1e150 * given["keys"]}))
    assert step.loss.isfinite() and step.labeled.evaluation.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_whose_squares_overflow_float32_are_named(impl, dtype):
    given = arguments()
    given |= {name: in_dtype(given[name], dtype) for name in ("labeled", "unlabeled")}
    given |= {name: given[name].to(dtype) for name in ("keys", "unlabeled_keys")}
    for name in ("keys", "unlabeled_keys"):
        wrong = given[name].clone()
        wrong[-1, 1] = 1e20
        refuses(impl, given | {name: wrong}, ValueError, f"^{name} must be finite and so must their squared norms")


@pytest.mark.parametrize("name", ["labels", "sample_ids"])
@pytest.mark.parametrize("value", [-1, -7, -(2**63)])
def test_a_negative_number_anywhere_is_named(impl, name, value):
    given = arguments()
    for at in range(len(given[name])):
        wrong = given[name].clone()
        wrong[at] = value
        refuses(impl, given | {name: wrong}, ValueError, f"^{name} must not be negative")


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
        refuses(impl, arguments() | {name: wrong}, ValueError, f"^{name} must be finite")
        refuses(impl, arguments() | {name: torch.tensor(wrong, dtype=F64)}, ValueError, f"^{name} must be finite")
        refuses(impl, arguments() | {name: torch.tensor(wrong)}, ValueError, f"^{name} must be finite")
    for wrong in (1j, {}, (0.1,)):
        refuses(impl, arguments() | {name: wrong}, TypeError, f"^{name} must be a .. tensor or a number, got")
    as_tensor, as_number = (
        impl.memory_step(**arguments()),
        impl.memory_step(**(arguments() | {name: arguments()[name].item()})),
    )
    assert torch.equal(as_tensor.loss, as_number.loss)


def test_the_first_of_several_faults_is_named(impl):
    given = arguments()
    given |= {"keys": given["keys"] * math.nan, "labels": -given["labels"] - 1, "beta": math.nan}
    refuses(impl, given, ValueError, "^(keys|beta) must be finite")


def module():
    memory = ProgressiveAugmentedMemory(5, 4, 3, 0.9, 0.8, dtype=F64)
    given = arguments()
    memory.labeled, memory.unlabeled = given["labeled"], given["unlabeled"]
    return memory


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
        steps = [m(**given) for m in (memory, twin)]
        grads = [torch.autograd.grad(s.loss, m.parameters()) for s, m in zip(steps, (memory, twin), strict=True)]
        assert torch.equal(steps[0].loss, steps[1].loss)
        assert all(map(torch.equal, *grads))
    assert all(map(torch.equal, memory.state_dict().values(), twin.state_dict().values()))


def views(x):
    """The values of `x` in every layout that PyTorch has for them."""
    yield torch.stack([x, x], -1)[..., 0]  # every other number
    yield torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].reshape(x.shape)  # a storage offset
    if x.dim() == 2:
        yield x.T.contiguous().T
        yield torch.cat([x, x], 1)[:, : x.shape[1]]  # padded rows
    if x.is_floating_point():
        yield torch.complex(torch.zeros_like(x), -x).conj().imag  # negated when it is read


@pytest.mark.parametrize("name", [*BATCH, *GATES, *STATE_FIELDS])
def test_layout_does_not_matter(impl, name):
    given = arguments()
    plain = impl.memory_step(**given)
    for view in views(get(given, name)):
        assert torch.equal(view, get(given, name))
        step = impl.memory_step(**put(given, name, view))
        for a, b in zip(tensors(step._asdict()), tensors(plain._asdict()), strict=True):
            agree(a, b, 1e-13)
        assert torch.equal(view, get(given, name))


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
    copied = {
        name: MemoryState(*(x.clone() for x in value)) if isinstance(value, MemoryState) else value.clone()
        for name, value in expanded.items()
    }
    results = []
    for form in (expanded, copied):
        keys, unlabeled_keys = (form[name].detach().requires_grad_() for name in ("keys", "unlabeled_keys"))
        step = impl.memory_step(**(form | {"keys": keys, "unlabeled_keys": unlabeled_keys}))
        results.append([*tensors(step._asdict()), *torch.autograd.grad(step.loss, [keys, unlabeled_keys])])
    for a, b in zip(*results, strict=True):
        agree(a.detach(), b.detach(), 1e-12)
    for a, b in zip(tensors(expanded), tensors(copied), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["keys", "slots", "occupied", "evaluation", "labels", "pseudo_labels"])
def test_layout_does_not_matter_to_the_weights_and_the_sets(impl, name):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "keys": torch.randn(4, 6, generator=generator, dtype=F64),
        "slots": torch.randn(9, 6, generator=generator, dtype=F64),
        "occupied": torch.rand(9, generator=generator) < 0.7,
    }
    sets = {
        "evaluation": torch.randint(0, 3, (4, 9), generator=generator).double(),
        "labels": torch.randint(-1, 2, (9,), generator=generator),
        "pseudo_labels": torch.tensor([0, 1, 0, -1]),
    }
    for function, given in ((impl.cosine_softmax, weights), (impl.false_sample_sets, sets)):
        if name in given:
            for view in views(given[name]):
                for a, b in zip(tuple(function(**(given | {name: view}))), tuple(function(**given)), strict=True):
                    agree(a, b, 1e-14)


def test_wrong_weights_and_sets_are_named(impl):
    keys, slots, occupied = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, dtype=torch.bool)
    for name, wrong, error in (
        ("keys", keys.int(), TypeError),
        ("keys", keys[0], ValueError),
        ("keys", keys * math.nan, ValueError),
        ("keys", keys * 1e30, ValueError),
        ("keys", None, TypeError),
        ("slots", slots.double(), TypeError),
        ("slots", slots[:, :2], ValueError),
        ("slots", slots.to("meta"), ValueError),
        ("occupied", occupied[:3], ValueError),
        ("occupied", occupied.long(), TypeError),
        ("occupied", occupied.to("meta"), ValueError),
    ):
        with pytest.raises(error, match=f"^{name} "):
            impl.cosine_softmax(**({"keys": keys, "slots": slots, "occupied": occupied} | {name: wrong}))
    evaluation, labels, pseudo_labels = torch.ones(2, 4), torch.tensor([0, 1, -1, 0]), torch.tensor([0, 1])
    for name, wrong, error in (
        ("evaluation", evaluation.long(), TypeError),
        ("evaluation", evaluation[0], ValueError),
        ("labels", labels[:3], ValueError),
        ("labels", labels.int(), TypeError),
        ("labels", labels.to("meta"), ValueError),
        ("pseudo_labels", pseudo_labels[:1], ValueError),
        ("pseudo_labels", pseudo_labels.float(), TypeError),
        ("pseudo_labels", pseudo_labels.to("meta"), ValueError),
    ):
        given = {"evaluation": evaluation, "labels": labels, "pseudo_labels": pseudo_labels}
        with pytest.raises(error, match=f"^{name} "):
            impl.false_sample_sets(**(given | {name: wrong}))


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
    by_keys, by_leaf = torch.autograd.grad(step.loss, [keys, leaf], allow_unused=True)
    assert by_leaf is None
    assert torch.equal(by_keys, torch.autograd.grad(plain.loss, keys)[0]) and by_keys.abs().sum() > 0
    assert torch.equal(step.loss, plain.loss)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_more_than_2_to_the_31_elements_apart(dtype):
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    view = far_apart(rows, dtype)
    agree(row_sq_norms(view), row_sq_norms(rows), 1e-6)
    keys = torch.randn(2, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
    agree(functional.cosine_softmax(keys, view), functional.cosine_softmax(keys, rows), 1e-6)
    state = MemoryState.empty(3, 6, dtype)._replace(labels=torch.tensor([0, 1, 2]))
    state = in_dtype(state, dtype)
    batch = (keys, torch.tensor([3, 4]), keys.flip(0), torch.tensor([5, 6]), 0.3, -0.2, 0.4)
    found = [
        functional.memory_step(state._replace(features=x), state._replace(features=x), *batch) for x in (view, rows)
    ]
    for a, b in zip(*(tensors(step._asdict()) for step in found), strict=True):
        agree(a, b, 1e-6)


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
    base[-2:] = torch.randn(2, d, generator=torch.Generator().manual_seed(1))
    key = torch.randn(1, d, generator=torch.Generator().manual_seed(2))
    assert row_sq_norms(base)[-3:].tolist() == [0, *row_sq_norms(base[-2:]).tolist()]
    scores, norms = memory_scores(key, base)
    assert not scores[:, :-2].any() and not norms[:-2].any()
    torch.testing.assert_close(scores[:, -2:].double(), key.double() @ base[-2:].double().mT, rtol=1e-4, atol=1e-4)
    agree(norms[-2:], row_sq_norms(base[-2:]), 1e-6)
    weights = torch.zeros(1, slots)
    weights[0, -3:] = torch.tensor([5.0, 2.0, -3.0])
    combined = memory_combine(weights, base)
    torch.testing.assert_close(combined, weights[:, -2:] @ base[-2:].float(), rtol=1e-5, atol=1e-5)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")


def on(device, given):
    return {
        name: MemoryState(*(x.to(device) for x in value)) if isinstance(value, MemoryState) else value.to(device)
        for name, value in given.items()
    }


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", [*BATCH, *GATES])
def test_cpu_and_cuda_tensors_mixed_are_named(name):
    given = on("cuda", arguments())
    refuses(functional, given | {name: given[name].cpu()}, ValueError, f"^{name} is on cpu, .*cuda:0")


@pytest.mark.gpu
@needs_two_gpus
def test_two_gpus():
    """Mixed they are refused; on the second while the first is current, the result is that of the CPU."""
    given = on("cuda:1", arguments())
    refuses(functional, given | {"keys": given["keys"].to("cuda:0")}, ValueError, "^keys is on cuda:0, .*cuda:1")
    with torch.cuda.device(0):
        step = functional.memory_step(**given)
    for a, b in zip(tensors(step._asdict()), tensors(functional.memory_step(**arguments())._asdict()), strict=True):
        assert a.device.index == 1
        agree(a.cpu(), b)


@pytest.mark.gpu
@needs_gpu
def test_a_stream_other_than_the_current_one():
    """Keys arrive late on a side stream: kernels on the default one would read what was there before."""
    expected = functional.memory_step(**arguments())
    given = on("cuda", arguments())
    keys = given["keys"].clone()
    given["keys"] = torch.full_like(keys, 3.0)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        given["keys"].copy_(keys)
        step = functional.memory_step(**given)
    side.synchronize()
    for a, b in zip(tensors(step._asdict()), tensors(expected._asdict()), strict=True):
        agree(a.cpu(), b)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["keys", "unlabeled_keys"])
def test_a_key_that_is_not_finite_on_the_gpu_is_told_later_and_not_written(name):
    memory = module().cuda()
    given = {name: arguments()[name].cuda() for name in BATCH}
    memory(**given)
    before = {field: value.clone() for field, value in memory.state_dict().items()}
    wrong = given[name].clone()
    wrong[-1, 1] = math.nan
    assert memory(**(given | {name: wrong})).loss.isnan()
    with pytest.raises(ValueError, match=f"^{name} must be finite"):
        memory.check_faults()
    memory.check_faults()
    assert all(torch.equal(value, before[field]) for field, value in memory.state_dict().items())
