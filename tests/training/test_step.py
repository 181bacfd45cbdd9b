"""A meta step on tensors alone: whose gradients it follows, what is frozen, what it keeps and what it refuses."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dan_fast.core.errors import DanFastError
from dan_fast.daml import Stage, active_groups, meta_gradients
from dan_fast.data import Split
from dan_fast.training import LossConfig, MetaConfig, MetaStep
from dan_fast.training.objective import DivergedError, Objective, TrainingModel
from tests.support.steps import decide, split, tiny_network, tiny_step, training_model
from tests.support.training_runs import snapshot

CAM_WEIGHT = "network.classifier.weight"


def groups_of(params: dict[str, Tensor], stage: Stage) -> dict[str, tuple[list[str], str]]:
    gates = [name for name in params if name.startswith("memory.")]
    attention = [name for name in params if ".attention." in name]
    backbone = [name for name in params if name not in (*gates, *attention)]
    return active_groups(stage, backbone, attention, gates, [CAM_WEIGHT])


def test_the_hooks_that_the_network_names_are_called():
    model = training_model()
    modules = {"network": model.network} | dict(model.network.named_children())
    called = []
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    tiny_step(model, order=1).step(split(1), split(2))
    branch = ["dropout", "dropout", "classifier", "classifier"]
    assert called == 2 * ["backbone", "backbone", *branch, *branch]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("stage", [None, *Stage])
def test_a_step_follows_the_meta_gradients_of_its_stage(stage, order):
    meta = {"procedure": "daml3" if stage else "daml2", "order": order, "eta": 0.5}
    first, model = training_model(), training_model()
    backbone = {f"network.backbone.{name}" for name, _ in model.network.backbone.named_parameters()}
    parts = [[value for name, value in first.named_parameters() if (name in backbone) == inside] for inside in (1, 0)]
    optimizer = torch.optim.SGD([{"params": part} for part in parts], lr=1.0)
    meta_step = MetaStep(first, optimizer, MetaConfig(**meta))
    # The inner steps are as long as those of the optimizer's groups, which loading a state replaces.
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"], state["param_groups"][1]["lr"] = 0.02, 0.1
    optimizer.load_state_dict(state)
    if stage:
        decide(meta_step, stage)
    params = snapshot(model)
    sizes = {name: 0.02 if name in backbone else 0.1 for name in params}

    def loss_fn(values: dict[str, Tensor], batch: Split) -> dict[str, Tensor]:
        return torch.func.functional_call(model, dict(values), (batch,))[0]

    groups = groups_of(params, stage) if stage else None
    expected = meta_gradients(loss_fn, params, groups, split(1), split(2), sizes, eta=0.5, order=order)
    result = meta_step.gradients(split(1), split(2))
    assert result.stage is stage
    for part in ("train_losses", "test_losses", "grads"):
        found = getattr(result, part)
        torch.testing.assert_close(found, getattr(expected, part))
        assert not any(value.requires_grad for value in found.values())
    assert all(torch.equal(value, params[name]) for name, value in meta_step.model.named_parameters())


def test_without_a_second_part_it_is_plain_sgd():
    meta_step, model = tiny_step(procedure="daml1"), training_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for seed in (1, 2):
        result = meta_step.step(split(seed))
        losses, _ = model(split(seed))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        assert result.stage is None and result.test_record is None and not result.test_losses
        torch.testing.assert_close(result.train_losses["total"], losses["total"].detach())
    torch.testing.assert_close(snapshot(meta_step.model), snapshot(model))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("stage", [Stage.ATTENTION, Stage.BOTH])
def test_gates_follow_the_same_gradient_in_the_group_of_the_backbone_with_order_1(monkeypatch, stage, order):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # all of it in float64

    def gradients(joined: bool) -> dict[str, Tensor]:
        model, batch = training_model().double(), split()
        batch = batch._replace(images=batch.images.double())
        model(batch)  # so that no memory is empty
        params = dict(model.named_parameters())
        groups = groups_of(params, stage)
        if joined:
            gates, _ = groups.pop("memory")
            groups["backbone"] = ([*groups["backbone"][0], *gates], "total")
        return meta_gradients(Objective(model), params, groups, batch, batch, inner_lr=0.1, order=order).grads

    apart, joined = gradients(joined=False), gradients(joined=True)
    assert apart.keys() == joined.keys() and apart["memory.alpha"] != 0
    assert all(torch.equal(joined[name], value) for name, value in apart.items()) == (order == 1)


def test_one_walk_of_a_graph_serves_backbone_and_gates_with_order_1(monkeypatch):
    meta_step = tiny_step(order=1)
    decide(meta_step, Stage.ATTENTION)
    outer, grad = [], torch.autograd.grad

    def counted(*arguments, **settings):
        # A backward may itself ask for gradients.
        outer.append(torch._C._current_graph_task_id() == -1)
        return grad(*arguments, **settings)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    meta_step.step(split(1), split(2))
    assert sum(outer) == 2


@pytest.mark.parametrize("reach", ["all", "attention"])
def test_what_is_frozen_does_not_move_by_momentum_or_decay_either(reach):
    meta_step = tiny_step(training_model(network=tiny_network(adversary_reach=reach)))
    decide(meta_step, Stage.ATTENTION, Stage.ADVERSARY, Stage.ATTENTION)
    snapshots = [snapshot(meta_step.model)]
    for seed in range(3):
        meta_step.step(split(seed), split(seed + 10))
        snapshots.append(snapshot(meta_step.model))

    def moved(name: str) -> list[bool]:
        return [not torch.equal(a[name], b[name]) for a, b in zip(snapshots, snapshots[1:], strict=False)]

    for name in ("network.backbone.conv.weight", "network.backbone.conv.bias"):
        assert moved(name) == [True, False, True]
    assert moved("network.attention.wc1") == [False, True, False]
    # CAM uses the classifier: the adversary's loss moves it too, where it reaches it.
    assert moved(CAM_WEIGHT) == [True, reach == "all", True]
    assert all(moved("memory.alpha")[1:])


def test_a_layer_frozen_before_stays_as_it_is():
    model = training_model()
    frozen = [model.network.backbone.conv.weight, model.network.classifier.weight]
    for value in frozen:
        value.requires_grad_(False)
    before = [value.clone() for value in frozen]
    meta_step = tiny_step(model)
    decide(meta_step, *Stage)
    for seed in range(3):
        assert not {CAM_WEIGHT, "network.backbone.conv.weight"} & meta_step.step(split(seed), split(9)).grads.keys()
    assert all(torch.equal(value, old) for value, old in zip(frozen, before, strict=True))


@pytest.mark.parametrize("order", [1, 2])
def test_a_stage_of_which_everything_is_frozen_moves_nothing(order: int):
    model = training_model(memory=False)
    model.network.backbone.requires_grad_(False)
    model.network.classifier.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    meta_step = tiny_step(model, order=order)
    decide(meta_step, Stage.ATTENTION)
    assert meta_step.step(split(1), split(2)).grads == {}
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_without_an_adversary_attention_is_trained_without_a_competition():
    network = tiny_network(adversary=False)
    meta_step = tiny_step(training_model(network=network))
    decide(meta_step)  # which would end in an error
    result = meta_step.step(split(1), split(2))
    assert result.stage is None and result.grads.keys() == dict(meta_step.model.named_parameters()).keys()


def test_the_stall_guard_goes_on_from_its_state(monkeypatch):
    monkeypatch.setattr("dan_fast.training.step.attention_wins", lambda *_: torch.tensor(False))
    first = tiny_step(stall_guard=2)
    stages = [first.step(split(1), split(2)).stage for _ in range(2)]
    second = tiny_step(stall_guard=2)
    second.load_state_dict(first.state_dict())
    assert [*stages, second.step(split(1), split(2)).stage] == [Stage.ADVERSARY, Stage.ADVERSARY, Stage.BOTH]


@pytest.mark.parametrize("tie, stage", [("cross_entropy", Stage.ADVERSARY), ("both", Stage.BOTH)])
def test_both_groups_are_updated_on_a_tie_where_that_is_asked_for(monkeypatch, tie, stage):
    for decision, found in (("attention_wins", False), ("accuracies_tie", True)):
        monkeypatch.setattr(f"dan_fast.training.step.{decision}", lambda *_, found=found: torch.tensor(found))
    result = tiny_step(tie=tie).step(split(1), split(2))
    assert result.stage is stage
    assert (CAM_WEIGHT in result.grads and "network.backbone.conv.weight" in result.grads) == (tie == "both")


def test_what_is_reported_is_of_the_batch_and_not_of_the_weights_afterwards():
    meta_step = tiny_step(lr=10.0)
    result = meta_step.step(split(1), split(2))
    alpha, alpha_unlabeled, beta = result.train_record.gates
    assert (alpha, alpha_unlabeled) == (0.5, 0.5) and beta == pytest.approx(0.1)
    of_branches = {"attention": result.train_record.logits, "adversary": result.train_record.adversary_logits}
    for branch, logits in of_branches.items():
        assert result.accuracies[branch] == (logits.argmax(1) == split(1).labels[:3]).float().mean()
    assert meta_step.model.memory.alpha != 0


def test_gradients_that_are_not_finite_do_not_move_the_weights(monkeypatch):
    meta_step = tiny_step()

    def poisoned(*arguments, **settings):
        result = meta_gradients(*arguments, **settings)
        next(iter(result.grads.values())).fill_(float("nan"))
        return result

    monkeypatch.setattr("dan_fast.training.step.meta_gradients", poisoned)
    before = snapshot(meta_step.model)
    with pytest.raises(DivergedError, match="gradients are not finite"):
        meta_step.step(split(1), split(2))
    assert all(torch.equal(value, before[name]) for name, value in snapshot(meta_step.model).items())


GOOD = split()
UNKNOWN = GOOD._replace(labels=torch.full_like(GOOD.labels, -1))


@pytest.mark.parametrize(
    ("procedure", "parts", "sentence"),
    [
        ("daml1", (GOOD, GOOD), "daml1 takes batches of one part, S"),
        ("daml2", (GOOD,), "daml2 takes batches of two parts"),
        ("daml3", (GOOD,), "daml3 takes batches of two parts"),
        ("daml3", (UNKNOWN._replace(num_labeled=0, num_fed_back=0), GOOD), "S needs a labelled image, by which the"),
    ],
)
def test_a_batch_that_does_not_fit_the_procedure_is_refused(procedure, parts, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_step(procedure=procedure).gradients(*parts)


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (Split(GOOD.images[:0], GOOD.labels[:0], GOOD.sample_ids[:0], 0, 0), ValueError,
         "^a part of the batch has no images: S and S~ need one or more each"),
        (GOOD._replace(labels=GOOD.labels.masked_fill(GOOD.labels == 2, 3)), ValueError,
         "from 0 to 2, the classes .*, got 3"),
        (UNKNOWN, ValueError, "got -1"),
        (GOOD._replace(images=GOOD.images.to(torch.uint8)), TypeError, "must be floating, of normalised pixels, got"),
        (GOOD._replace(images=GOOD.images.double()), TypeError,
         "^images are torch.float64 and the network is torch.float32: make them of one"),
    ],
    ids=["no image", "no class", "no label", "bytes", "float64"],
)  # fmt: skip
def test_a_part_that_no_network_takes_is_refused_before_anything_advances(wrong, error, sentence):
    for procedure, parts in (("daml1", (wrong,)), ("daml3", (wrong, GOOD)), ("daml3", (GOOD, wrong))):
        meta_step = tiny_step(procedure=procedure)
        before = copy.deepcopy(meta_step.model.state_dict())
        with pytest.raises(error, match=sentence):
            meta_step.step(*parts)
        assert all(torch.equal(value, before[name]) for name, value in meta_step.model.state_dict().items())


@pytest.mark.parametrize(
    ("meta", "loss", "named"),
    [
        ({"procedure": "DAML3"}, {}, "meta.procedure"),
        ({"tie": "attention"}, {}, "meta.tie"),
        ({"eta": -1.0}, {}, "meta.eta"),
        ({}, {"adversary": -1.0}, "loss.adversary"),
    ],
)
def test_settings_that_no_training_takes_are_refused(meta, loss, named):
    model = training_model()
    model.weights = replace(model.weights, **loss)
    with pytest.raises(DanFastError, match=named):
        MetaStep(model, torch.optim.SGD(model.parameters(), lr=0.1), MetaConfig(**meta))


def test_a_reach_that_the_network_does_not_have_is_refused():
    network = tiny_network()
    assert network.adversary_reach == "all"
    with pytest.raises(ValueError, match="make it with DAN.adversary_reach='attention'"):
        TrainingModel(network, None, LossConfig(adversary_reach="attention"))
    network.adversary = False
    assert TrainingModel(network, None, LossConfig(adversary_reach="attention"))


def test_at_daml1_the_attention_of_a_vit_is_fused_whatever_the_order(monkeypatch):
    orders = []
    given = "dan_fast.training.step.differentiable"
    monkeypatch.setattr(given, lambda order: orders.append(order) or nullcontext())
    tiny_step(procedure="daml1", order=2).step(split(1))
    tiny_step(procedure="daml2", order=2).step(split(1), split(2))
    assert orders == [1, 2]


@pytest.mark.parametrize("procedure, parts", [("daml1", 1), ("daml2", 2), ("daml3", 2)])
def test_modes_of_the_caller_change_no_bit_and_inference_mode_is_refused(procedure, parts):
    halves = [split(seed) for seed in (1, 2)][:parts]
    expected = tiny_step(procedure=procedure).gradients(*halves).grads
    for mode in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        meta_step = tiny_step(procedure=procedure)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode .* outside of it"):
            meta_step.gradients(*halves)
        with mode:
            found = meta_step.gradients(*halves).grads
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_parameter_that_is_frozen_too_late_is_named():
    for order in (1, 2):
        meta_step = tiny_step(training_model(), order=order)
        before = copy.deepcopy(meta_step.model.state_dict())
        meta_step.model.network.classifier.weight.requires_grad_(False)
        with pytest.raises(ValueError, match="'network.classifier.weight' was frozen after this MetaStep was made"):
            meta_step.step(split(1), split(2))
        assert all(torch.equal(value, before[name]) for name, value in meta_step.model.state_dict().items())


def test_an_optimizer_that_does_not_serve_is_refused():
    model = training_model()
    with pytest.raises(ValueError, match="the optimizer lacks 'memory.alpha': add it, or freeze it"):
        MetaStep(model, torch.optim.SGD(model.network.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="LBFGS takes several passes a step"):
        MetaStep(model, torch.optim.LBFGS(model.parameters()))


class Tied(nn.Module):
    """Two layers of one weight, in the place of a training model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight

    def forward(self, batch: Tensor) -> tuple[dict[str, Tensor], None]:
        if batch.isnan().any():
            raise ValueError("nan")
        return {"total": self.second(self.first(batch)).sum()}, None


def test_other_values_stand_in_for_parameters_wherever_these_sit_and_only_during_the_call():
    model, batch = Tied(), torch.ones(1, 2)
    own, other = model.first.weight, torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    objective = Objective(model)
    loss = objective({"first.weight": other}, batch)["total"]
    assert loss == (other @ other @ batch.T).sum()
    assert torch.autograd.grad(loss, other)[0].any()
    with pytest.raises(ValueError, match="nan"):
        objective({"first.weight": other}, batch * torch.nan)
    assert model.first.weight is own and model.second.weight is own


def updated_by_the_adversary(model: TrainingModel) -> set[str]:
    meta_step = tiny_step(model)
    decide(meta_step, Stage.ADVERSARY)
    return set(meta_step.gradients(split(1), split(2)).grads)


def test_parameters_of_a_parametrised_classifier_join_the_adversary():
    model = training_model()
    nn.utils.parametrizations.weight_norm(model.network.classifier)
    names = {f"network.classifier.parametrizations.weight.original{part}" for part in (0, 1)}
    assert names <= updated_by_the_adversary(model)


def test_a_bias_of_the_classifier_rests_with_the_backbone():
    model = training_model()
    model.network.classifier = nn.Linear(6, 3)
    names = updated_by_the_adversary(model)
    assert CAM_WEIGHT in names and "network.classifier.bias" not in names


def test_a_backbone_that_casts_by_itself_takes_images_of_another_dtype():
    meta_step = tiny_step(training_model().double())
    meta_step.model.network.backbone.float()
    meta_step.model.network.backbone.register_forward_hook(lambda module, images, output: output.double())
    meta_step.gradients(split(1), split(2))
