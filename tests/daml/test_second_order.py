"""Second derivatives times a vector, by forward over reverse and by double backward."""

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dan_fast.core.types import MemoryState, NLCBAMWeights
from dan_fast.daml import Stage, meta_gradients, second_order
from dan_fast.daml.second_order import SecondOrder
from dan_fast.functional import attention_head, discriminative_loss, memory_step
from dan_fast.nn import DAN
from dan_fast.training.objective import TrainingModel
from tests.support.draws import draw
from tests.support.steps import decide, split, tiny_network, tiny_step, training_model
from tests.support.warned import own_warnings

METHODS = ("by_forward_over_reverse", "by_double_backward")


@pytest.fixture(autouse=True)
def no_fallback():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="order 2 goes by double backward")
        yield


@pytest.fixture
def doubles(monkeypatch):
    """What is cast to float32 stays in float64."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


def by_each_method(monkeypatch, run: Callable[[], Any]) -> list[Any]:
    """What `run` gives by forward over reverse, and by double backward."""
    found = []
    for method in METHODS:
        by = getattr(SecondOrder, method)
        monkeypatch.setattr(SecondOrder, "product", lambda self, loss_fn, *given, by=by: by(self, *given))
        found.append(run())
    return found


def gradients_of_a_step(model: TrainingModel, stage: Stage, images: Tensor, order: int = 2) -> dict[str, Tensor]:
    """By a copy of the model."""
    meta_step = tiny_step(copy.deepcopy(model).train(), order=order)
    decide(meta_step, stage)
    images = images.to(next(model.parameters()).dtype)
    halves = [split(seed)._replace(images=each) for seed, each in zip((1, 2), images, strict=True)]
    torch.manual_seed(3)
    return meta_step.gradients(*halves).grads


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= limit * max(float(value.norm()), 1e-3 * scale), name


def network(backbone: str | nn.Module, **settings) -> DAN:
    torch.manual_seed(0)
    return DAN(num_classes=3, backbone=backbone, image_size=(64, 32), reduction=2, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "settings", "stage"),
    [
        ("resnet18", {"adversary_reach": "attention", "style_mixing": True}, Stage.BOTH),
        ("timm:test_resnet", {"adversary_reach": "attention", "style_mixing": True}, Stage.ATTENTION),
        ("timm:test_resnet", {"adversary_reach": "attention", "style_mixing": True}, Stage.ADVERSARY),
        ("timm:test_resnet", {"dropout": 0.5, "instance_norm": True}, Stage.BOTH),
        ("timm:efficientnet_lite0", {"attention": "none", "adversary": False}, Stage.ATTENTION),
        ("timm:test_vit", {}, Stage.BOTH),
    ],
)
def test_both_methods_agree_on_whole_models(backbone, settings, stage, doubles, monkeypatch):
    model = training_model(network=network(backbone, **settings)).double()
    images = torch.randn(2, 7, 3, 64, 32)
    found, expected = by_each_method(monkeypatch, lambda: gradients_of_a_step(model, stage, images))
    assert_close(found, expected, 1e-9)
    if stage is not Stage.ADVERSARY:
        first = gradients_of_a_step(model, stage, images, order=1)
        assert any(not torch.allclose(first[name], value, rtol=1e-6) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.usefixtures("sound_bfloat16")
def test_both_methods_agree_under_autocast(monkeypatch):
    model = training_model(network=network("timm:test_resnet", dropout=0.0))
    model.autocast_dtype = torch.bfloat16
    images = torch.randn(2, 7, 3, 64, 32)
    found, expected = by_each_method(monkeypatch, lambda: gradients_of_a_step(model, Stage.BOTH, images))
    flat = [torch.cat([grads[name].flatten() for name in found]) for grads in (found, expected)]
    assert (flat[0] - flat[1]).norm() < 0.1 * flat[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", [True, False])
def test_a_trunk_that_is_run_again_leaves_statistics_and_random_numbers(dtype, weight, monkeypatch):
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=weight), nn.Dropout(0.3)).to(dtype)
    params = {name: value.detach() for name, value in trunk.named_parameters()}
    batches = torch.randn(2, 5, 3, 6, 6, dtype=dtype)

    def loss_fn(values: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
        return {"total": functional_call(trunk, values, batch).pow(3).mean()}

    start = copy.deepcopy(trunk.state_dict())

    def run(order: int = 2) -> tuple[dict[str, Tensor], list[Any]]:
        trunk.load_state_dict(start)
        torch.manual_seed(0)
        grads = meta_gradients(loss_fn, params, None, *batches, inner_lr=0.1, order=order).grads
        return grads, [copy.deepcopy(trunk.state_dict()), torch.rand(1)]

    (grads, left), (expected, left_too) = by_each_method(monkeypatch, run)
    for found in (left, left_too):
        torch.testing.assert_close(found, run(order=1)[1], rtol=0, atol=0)
    assert_close(grads, expected, 1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize(("stage", "passes"), [(Stage.ATTENTION, 4), (Stage.ADVERSARY, 2), (Stage.BOTH, 5)])
def test_the_trunk_runs_again_only_where_it_moves(stage, passes, monkeypatch):
    """S and S~, then once for each group whose loss of S~ depends on the backbone."""
    meta_step = tiny_step(order=2)
    decide(meta_step, stage)
    maps = Mock(wraps=meta_step.model.maps)
    monkeypatch.setattr(meta_step.model, "maps", maps)
    meta_step.step(split(1), split(2))
    assert maps.call_count == passes


def test_what_a_trunk_computes_without_gradients_carries_no_tangent():
    def loss_fn(params: dict[str, Tensor], batch: float) -> dict[str, Tensor]:
        with torch.no_grad():
            constant = params["w"].square() + 1
        return {"total": (params["w"].pow(3) * constant * batch).sum()}

    w = torch.tensor([0.5, -0.3], dtype=torch.float64)
    c = w.square() + 1
    moved = w - 0.1 * 3 * w.square() * c
    expected = 3 * w.square() * c + 2 * 3 * moved.square() * (moved.square() + 1) * (1 - 0.1 * 6 * w * c)
    found = meta_gradients(loss_fn, {"w": w}, None, 1.0, 2.0, inner_lr=0.1).grads["w"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def cubes(params: dict[str, Tensor], batch: float) -> dict[str, Tensor]:
    return {"total": (params["w"] * params["w"].square() * batch).sum()}


@pytest.mark.parametrize("trouble", ["no forward mode", "a state", "a mutation"])
def test_what_cannot_go_forward_goes_back_and_says_so_once(trouble):
    calls, counter = [], torch.zeros(())

    def loss_fn(params: dict[str, Tensor], batch: float) -> dict[str, Tensor]:
        calls.append(batch)
        scale = 1.0
        if trouble == "a state":
            scale = 1.0 + (len(calls) > 2)
        elif trouble == "a mutation":
            counter.add_(params["w"].detach().sum())
        square = NoForwardMode.apply(params["w"]) if trouble == "no forward mode" else params["w"].square()
        return {"total": scale * (params["w"] * square * batch).sum()}

    params = {"w": torch.tensor([0.5, -2.0], dtype=torch.float64)}
    expected = meta_gradients(cubes, params, None, 1.0, 2.0, inner_lr=0.1).grads["w"]
    with pytest.warns(UserWarning, match="order 2 goes by double backward, .* since .* cannot serve: .") as said:
        found = meta_gradients(loss_fn, params, None, 1.0, 2.0, inner_lr=0.1).grads["w"]
    assert len(own_warnings(said)) == 1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = meta_gradients(loss_fn, params, None, 1.0, 2.0, inner_lr=0.1).grads["w"]
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=0)
    assert len(calls) == 2


class Drifting:
    """Losses of a state that each call advances."""

    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def losses(self, params: dict[str, Tensor], batch: float) -> dict[str, Tensor]:
        self.calls += 1
        return {"total": (params["w"].square() * batch).sum() + self.calls * params["w"].sum()}

    __call__ = losses


class Weakly(Drifting):
    __slots__ = ("__weakref__",)


@pytest.mark.parametrize("form", [Drifting, Weakly])
@pytest.mark.parametrize("bound", [True, False])
def test_a_fallback_is_remembered_of_a_bound_method_and_without_weak_references(form, bound, monkeypatch):
    monkeypatch.setattr(second_order, "_by_double_backward", weakref.WeakValueDictionary())
    drifting = form()
    for iteration in range(3):
        before = drifting.calls
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loss_fn = drifting.losses if bound else drifting
            meta_gradients(loss_fn, {"w": torch.ones(2)}, None, 1.0, 2.0, inner_lr=0.1)
        # Once more where forward over reverse is tried.
        assert (len(own_warnings(said)), drifting.calls - before) == ((1, 3) if iteration == 0 else (0, 2))


@pytest.mark.parametrize("name", ["total", "logged"])
def test_a_loss_that_is_not_a_number_is_no_state(name):
    def loss_fn(params: dict[str, Tensor], batch: float) -> dict[str, Tensor]:
        losses = {"total": (params["w"].square() * batch).sum(), "logged": params["w"].sum()}
        return {**losses, name: losses[name] * torch.nan}

    found = meta_gradients(loss_fn, {"w": torch.ones(2)}, None, 1.0, 2.0, inner_lr=0.1)
    assert found.grads["w"].isnan().all() == (name == "total") and found.train_losses[name].isnan()


def test_a_result_that_no_group_follows_may_have_any_shape():
    def loss_fn(params: dict[str, Tensor], batch: float) -> dict[str, Tensor]:
        return {"logits": params["w"] * batch, **cubes(params, batch)}

    params = {"w": torch.tensor([0.5, -2.0], dtype=torch.float64)}
    found, expected = (meta_gradients(each, params, None, 1.0, 2.0, inner_lr=0.1) for each in (loss_fn, cubes))
    assert torch.equal(found.grads["w"], expected.grads["w"])
    assert list(found.train_losses) == ["logits", "total"] and found.train_losses["logits"].shape == (2,)


@pytest.mark.parametrize("lent", [True, False])
def test_running_statistics_of_instance_norm_are_counted_once(lent):
    """Whether they are the module's own or those that the caller hands in."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    params = {name: value.detach() for name, value in network.named_parameters()}
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for order in (1, 2):
        network[1].reset_running_stats()
        own = network[1].running_mean
        buffers = {name: value.clone() for name, value in network.named_buffers()} if lent else {}

        def loss_fn(params, batch, buffers=buffers):
            maps = functional_call(network, {**params, **buffers}, (batch,))
            return {"total": (maps.square() * torch.arange(4.0)[:, None, None]).sum()}

        meta_gradients(loss_fn, params, None, images, images + 3, inner_lr=0.0, order=order)
        assert network[1].running_mean is own and network[1].track_running_stats
        found.append(buffers["1.running_mean"] if lent else own.clone())
    assert found[0].abs().max() > 0 and torch.equal(*found)


def test_what_goes_neither_way_is_a_sentence():
    def loss_fn(params: dict[str, Tensor], batch: float) -> dict[str, Tensor]:
        return {"total": torch.nn.functional.hardsigmoid(batch * params["w"].square()).sum()}

    with (
        pytest.warns(UserWarning, match="order 2 goes by double backward"),
        pytest.raises(ValueError, match=r"second derivatives cannot be had \(.*hardsigmoid_backward.*\): take order 1"),
    ):
        meta_gradients(loss_fn, {"w": torch.ones(2)}, None, 1.0, 2.0, inner_lr=0.1)


def test_running_out_of_memory_is_not_taken_for_a_missing_rule(monkeypatch):
    monkeypatch.setattr(SecondOrder, "by_forward_over_reverse", Mock(side_effect=torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        meta_gradients(cubes, {"w": torch.ones(2)}, None, 1.0, 2.0, inner_lr=0.1)


def operator_losses(dtype: torch.dtype):
    """A loss through memory step, attention head and the loss of labelled keys, of one tensor of parameters."""
    shapes = [(2, 4), (4, 2), (2, 6), (2, 6), (6, 2), (6, 2), (5, 4), (5, 4), (3, 4), (4, 4), (), (2, 3, 4, 2, 3)]
    tensors = [draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    weights, features, (classes, w, gate, batches) = tensors[:6], tensors[6:8], tensors[8:]
    memories = [MemoryState.empty(5, 4, dtype=dtype)._replace(features=x, labels=torch.arange(5)) for x in features]
    labels = torch.tensor([0, 1, -1])

    def loss_fn(params: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
        maps = torch.einsum("oc,bchw->bohw", params["w"], batch)
        head = attention_head(maps, NLCBAMWeights(*weights), classes, labels)
        keys = head.attended + head.pooled
        step = memory_step(*memories, keys[:1], labels[:1], keys[1:], torch.tensor([3, 4]), params["gate"], 0.1, 0.3)
        labeled = discriminative_loss(keys, torch.tensor([0, 1, 2]), memories[0].features, memories[0].labels, 1.0)
        return {"total": step.loss + head.adversary_loss.sum() + labeled.sum()}

    return loss_fn, {"w": w, "gate": gate}, batches


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_operators_go_forward_by_their_forms(monkeypatch, dtype, tolerance):
    loss_fn, params, batches = operator_losses(dtype)
    ran, dual_pass = set(), SecondOrder._dual_pass

    def watched(self, *arguments):
        with torch.profiler.profile() as profile:
            result = dual_pass(self, *arguments)
        ran.update(event.key for event in profile.key_averages())
        return result

    monkeypatch.setattr(SecondOrder, "_dual_pass", watched)
    found = by_each_method(monkeypatch, lambda: meta_gradients(loss_fn, params, None, *batches, inner_lr=0.01).grads)
    assert_close(*found, tolerance)
    kernels = {name for name in ran if name.startswith("dan_fast::") and not name.endswith("_form")}
    assert ran and not kernels, f"kernels without a rule for tangents ran: {kernels}"


def test_a_memory_that_advances_is_not_run_again():
    model = training_model(network=tiny_network())
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="advances .* no forward mode"),
    ):
        model(split(1))


@pytest.mark.parametrize("change", ["scaled", "cut", "scaled data", "returned", "scaled through a view"])
def test_what_is_changed_without_gradients_keeps_its_tangent(change, monkeypatch):
    """As it keeps its gradient: reverse mode does not see the change."""

    def losses(params, batch):
        hidden = batch @ params["w"]
        with torch.set_grad_enabled(change == "scaled data"):
            match change:
                case "scaled":
                    hidden.mul_(2.0)
                case "cut":
                    hidden[hidden < 0] = 0
                case "scaled data":
                    hidden.data.mul_(2.0)
                case "returned":
                    assert hidden.requires_grad
                    hidden = F.relu(hidden.mul_(2.0), inplace=True)
                case "scaled through a view":
                    hidden.T.mul_(2.0)
        return {"total": (torch.tanh(hidden) @ params["v"]).square().mean()}

    assert_equal_both_ways(losses, monkeypatch)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_inside_of_a_loss_is_a_constant(monkeypatch, create_graph: bool):
    """Unless it is taken with create_graph; loss balancing by the norms of gradients."""

    def losses(params, batch):
        hidden = torch.tanh(batch @ params["w"])
        first, second = (hidden @ params["v"]).square().mean(), (hidden * params["v"][:, 0]).exp().mean()
        kept = {"retain_graph": True, "create_graph": create_graph}
        one, other = (torch.autograd.grad(each, params["v"], **kept)[0] for each in (first, second))
        return {"total": first + one.norm() / other.norm() * second}

    assert_equal_both_ways(losses, monkeypatch)


def assert_equal_both_ways(losses, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (4, 5), "v": (5, 1)}
    params = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    batches = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    found = by_each_method(monkeypatch, lambda: meta_gradients(losses, params, None, *batches, inner_lr=0.3).grads)
    assert_close(*found, 1e-12)


class Capricious(nn.Module):
    """A backbone of one's own that draws from a generator nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.random = tiny_network().backbone, np.random.default_rng(0)

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images) * self.random.uniform(0.5, 2.0)


def test_a_backbone_of_ones_own_that_gives_other_features_goes_by_double_backward():
    network = DAN(num_classes=3, backbone=Capricious(), image_size=(8, 8), reduction=2, dropout=0.0)
    meta_step = tiny_step(training_model(network=network), order=2)
    with pytest.warns(UserWarning, match="loss_fn gave other losses when it was called again"):
        meta_step.gradients(split(1), split(2))


def test_a_hook_that_changes_a_gradient_is_refused_and_one_that_looks_is_not():
    params = {"a": torch.tensor(1.0), "c": torch.tensor(2.0)}
    seen: list[Tensor] = []

    def gradients(hook, order: int) -> dict[str, Tensor]:
        def loss_fn(params, factor):
            product = params["a"] * factor
            if hook is not None:
                product.register_hook(hook=hook)
            return {"total": product.exp() * params["c"]}

        return meta_gradients(loss_fn, params, None, 1.0, 1.0, torch.tensor(0.1, requires_grad=True), order=order).grads

    plain = gradients(None, 2)
    assert gradients(seen.append, 2) == plain and seen
    assert gradients(lambda grad: grad, 2) == plain
    with pytest.raises(ValueError, match="a hook on a tensor changes a gradient, .* take order 1"):
        gradients(lambda grad: grad.clamp(-1, 1), 2)
    assert gradients(lambda grad: grad.clamp(-1, 1), 1)["a"] == 2


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:Using `torch.compile\\(module\\)` when there are global hooks")
def test_a_compiled_module_runs_as_it_was_written():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    params, batches = dict(net.named_parameters()), torch.randn(2, 5, 4, dtype=torch.float64)
    found = []
    for module, prefix in ((net, ""), (torch.compile(net, backend="aot_eager"), "_orig_mod.")):

        def loss_fn(given, batch, module=module, prefix=prefix):
            named = {f"{prefix}{name}": value for name, value in given.items()}
            return {"total": functional_call(module, named, (batch,)).square().mean()}

        # What is compiled by a training of order 1 is there for the next pass.
        meta_gradients(loss_fn, params, None, *batches, inner_lr=0.1, order=1)
        found.append(meta_gradients(loss_fn, params, None, *batches, inner_lr=0.1).grads)
    assert_close(found[1], found[0], 1e-12)


class OwnNorm(nn.Module):
    """A norm whose running mean is a new tensor after each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean = 0.5 * self.running_mean + 0.5 * x.detach().mean(0)
        return x - x.mean(0)


def test_running_statistics_that_are_replaced_advance_once_a_batch():
    x, y = torch.randn(2, 5, 3)
    means = []
    for order in (1, 2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), OwnNorm(), nn.Tanh())
        params = dict(net.named_parameters())
        meta_gradients(
            lambda given, batch, net=net: {"total": functional_call(net, given, (batch,)).square().mean()},
            params, None, x, y, inner_lr=0.0, order=order,
        )  # fmt: skip
        means.append(copy.deepcopy(net)[1].running_mean)
    assert torch.equal(*means)


class Stash(nn.Module):
    """A product that keeps its matrix, which depends on its parameter, as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(0.5 * torch.randn(4, 4))
        self.register_buffer("w", torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.w = self.v.tanh()
        return x @ self.w


def test_a_loss_may_read_a_buffer_that_its_pass_has_set():
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(4, 4), Stash()), *torch.randn(2, 5, 4)
    params = dict(net.named_parameters())

    def loss_fn(given, batch):
        return {"total": functional_call(net, given, (batch,)).square().mean() + (net[1].w @ net[1].w).square().sum()}

    # So small a step that another buffer would not be noticed by the loss.
    found = meta_gradients(loss_fn, params, None, x, y, inner_lr=1e-5).grads
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    train = loss_fn(leaves, x)["total"]
    steps = torch.autograd.grad(train, [*leaves.values()], create_graph=True)
    moved = {name: value - 1e-5 * step for (name, value), step in zip(leaves.items(), steps, strict=True)}
    exact = torch.autograd.grad(train + loss_fn(moved, y)["total"], [*leaves.values()])
    first = meta_gradients(loss_fn, params, None, x, y, inner_lr=1e-5, order=1).grads
    parts = [found["1.v"] - first["1.v"], dict(zip(leaves, exact, strict=True))["1.v"] - first["1.v"]]
    assert float((parts[0] - parts[1]).norm()) < 0.05 * float(parts[1].norm())
