"""The benchmark of a training iteration: it runs the trainer's own meta step, and gives no ratio without agreement."""

import runpy
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torchvision.models._api import BUILTIN_MODELS
from torchvision.models.resnet import BasicBlock, ResNet

from dan_fast.bench import timing
from dan_fast.bench.iteration import benchmark as iteration
from dan_fast.bench.iteration import contenders
from dan_fast.bench.iteration.benchmark import DAN, LITERAL, PAPER_RATIO, PLAIN, IterationBenchmark, row_of
from dan_fast.bench.iteration.contenders import (
    FROZEN,
    TOLERANCES,
    UPDATED,
    DANIteration,
    IterationSize,
    compare_iteration,
    group_errors,
    literal_operators,
)
from dan_fast.bench.iteration.profile import Profile
from dan_fast.bench.rows import WHOLE, Row, Timing
from dan_fast.bench.timing import Operators
from dan_fast.nn import NLCBAM, ProgressiveAugmentedMemory
from dan_fast.training import MetaStep
from tests.bench import measured, written
from tests.support import in_checkout

pytestmark = pytest.mark.slow

TINY = IterationSize("resnet18", 128, 64, images=8, labeled_slots=24, unlabeled_slots=12, classes=6)


@pytest.fixture(scope="module", autouse=True)
def resnet18_has_half_of_its_blocks() -> Iterator[None]:
    """Each of its many passes takes half as long."""
    with patch.dict(BUILTIN_MODELS, resnet18=lambda weights: ResNet(BasicBlock, [1, 1, 1, 1])):
        yield


@pytest.fixture(scope="module")
def dan() -> DANIteration:
    return DANIteration(TINY, torch.device("cpu"), "float32")


@pytest.fixture(scope="module")
def still() -> DANIteration:
    """One that takes no step, as where gradients are compared: how large an error is depends on the weights."""
    return DANIteration(TINY, torch.device("cpu"), "float32")


def test_the_batch_is_planned_as_in_training_and_the_memories_are_full(dan):
    memory, (meta_train, meta_test) = dan.model.memory, dan.batch
    assert memory.labeled.occupied.all() and memory.unlabeled.occupied.all()
    assert int(memory.labeled.labels.max()) < TINY.classes
    assert (meta_train.num_labeled, meta_train.num_fed_back) == (2, 0)
    assert (meta_test.num_labeled, meta_test.num_fed_back) == (1, 1)
    assert meta_train.images.shape == (4, 3, 128, 64) and (meta_test.labels[2:] == -1).all()


@pytest.mark.parametrize("order", [1, 2])
def test_the_stage_decides_what_an_iteration_moves(dan, order):
    before = {name: value.detach().clone() for name, value in dan.model.named_parameters()}
    held = dan.model.memory.labeled

    def moved() -> set[str]:
        params = dict(dan.model.named_parameters())
        found = {name.split(".")[1] for name in before if not torch.equal(before[name], params[name])}
        before.update({name: value.detach().clone() for name, value in params.items()})
        return found

    gates = {"alpha", "alpha_unlabeled", "beta_logit"}
    dan.set(order, FROZEN)
    dan.run()
    assert {"attention", "classifier"} <= moved() - gates and "backbone" not in moved()
    dan.set(order, UPDATED)
    dan.run()
    found = moved()
    assert {"backbone", "classifier"} <= found and "attention" not in found
    assert not torch.equal(held.features, dan.model.memory.labeled.features)


def test_gradients_leave_the_memories_as_they_are(still):
    still.set(1, UPDATED)
    before = still.model.memory.labeled
    objective = still.step.objective
    (first, moved), (second, _) = still.gradients(), still.gradients()
    assert torch.equal(before.features, still.model.memory.labeled.features)
    assert still.step.objective is objective
    assert set(group_errors(first, second).values()) == {0.0}
    here, moved_to = still.gradients(moved)
    assert set(group_errors(here, first).values()) == {0.0} and moved_to is moved
    elsewhere = {name: value * 1.01 for name, value in moved.items()}
    assert group_errors(still.gradients(elsewhere)[0], first)["backbone"] > 1e-3


def test_inside_the_literal_operators_none_of_the_package_runs(still):
    still.set(1, UPDATED)
    with Operators() as fast:
        still.gradients()
    with Operators() as literal, literal_operators(still.model):
        still.gradients()
    # Settling a memory that is assigned is the module's own business.
    assert literal.names <= {"memory_commit", "memory_combine", "row_sq_norms"} and fast.names - literal.names
    assert "head" not in vars(still.model.network.attention) and "forward" not in vars(still.model.memory)


@pytest.mark.parametrize(
    ("order", "backbone", "precision"),
    [(order, UPDATED, precision) for order in (1, 2) for precision in TOLERANCES]
    + [(1, FROZEN, "bfloat16"), (2, FROZEN, "float32")],
)
def test_the_gradients_are_the_literal_ones_up_to_rounding(still, monkeypatch, order, backbone, precision):
    half = torch.bfloat16 if precision == "bfloat16" else None
    monkeypatch.setattr(still.model, "autocast_dtype", half)
    still.set(order, backbone)
    disagrees, errors, rounding, allowed = compare_iteration(still, TOLERANCES[precision])
    trained = {"backbone", "classifier"} if backbone == UPDATED else {"attention", "classifier"}
    assert errors.keys() == allowed.keys() == {"memory", *trained}
    assert disagrees is None, (errors, rounding)
    # No parameter is judged so mildly that an error of a tenth would not be seen.
    assert max(allowed.values()) < 0.1 and all(rounding[group] > 0 for group in trained)


def scaled_adversary(attention, *arguments):
    result = HEAD(attention, *arguments)
    loss = result.adversary_loss
    return result._replace(adversary_loss=loss + 0.01 * (loss - loss.detach()))


def negated_memory(memory, *arguments, **settings):
    step = STEP(memory, *arguments, **settings)
    return step._replace(loss=2 * step.loss.detach() - step.loss)


def leaky_memory(memory, *arguments, **settings):
    # Its labels are right, and so is this loss: it is what is written that is seen by the next.
    step = STEP(memory, *arguments, **settings)
    memory.labeled = step.labeled._replace(features=step.labeled.features * torch.linspace(0.9, 1, TINY_KEYS))
    return step


def test_convolutions_faster_than_products_leave_no_limit_by_operations(monkeypatch):
    settings, rated = {"convolutions": "tf32", "matrix_products": "ieee"}, []
    monkeypatch.setattr(timing, "float32_settings", lambda device: settings)
    monkeypatch.setattr(iteration, "take_turns", lambda *arguments: rated.append(arguments[-1]))
    for precision in ("float32", "bfloat16"):
        measured("iteration", contenders=PLAIN, precision=precision)
    assert rated == [None, torch.bfloat16]


HEAD, STEP, TINY_KEYS = NLCBAM.head, ProgressiveAugmentedMemory.forward, 509


@pytest.mark.parametrize(
    ("wrong", "backbone", "group"),
    [
        (scaled_adversary, UPDATED, "backbone"),
        (scaled_adversary, FROZEN, "attention"),
        (negated_memory, UPDATED, "memory"),
        (negated_memory, UPDATED, "backbone"),
        (negated_memory, FROZEN, "memory"),
        (leaky_memory, UPDATED, "backbone"),
    ],
)
def test_an_operator_that_is_a_little_wrong_is_seen(still, monkeypatch, wrong, backbone, group):
    owner, method = (NLCBAM, "head") if wrong is scaled_adversary else (ProgressiveAugmentedMemory, "forward")
    monkeypatch.setattr(owner, method, wrong)
    still.set(1, backbone)
    assert f"gradient of {group} by" in (compare_iteration(still, TOLERANCES["float32"])[0] or "")


def test_a_parameter_without_a_gradient_is_a_difference(still, monkeypatch):
    still.set(1, UPDATED)
    gradients = still.gradients

    def fewer(moved=None):
        grads, weights = gradients(moved)
        return {name: grad for name, grad in grads.items() if moved is None or name != "memory.alpha"}, weights

    monkeypatch.setattr(still, "gradients", fewer)
    assert compare_iteration(still, 1.0)[0] == "the parameters that have a gradient"


def test_a_recipe_decides_how_an_iteration_is_split_and_what_it_trains():
    of_recipe = DANIteration(TINY, torch.device("cpu"), "float32", recipe="dan")
    profile = Profile(of_recipe.step)
    with profile.recording():
        of_recipe.run()
    assert len(of_recipe.batch) == 1 and of_recipe.model.lending and not of_recipe.model.network.adversary
    assert profile.seconds["forward S: memory"] > 0 and not any("S~" in part for part in profile.seconds)


def test_plain_resnet_sees_the_same_images(dan):
    plain = contenders.plain_iteration(TINY, dan)
    weight, images = plain.func.__self__.classifier.weight, plain.args[0]
    before = weight.detach().clone()
    plain()
    assert len(images) == TINY.images and not torch.equal(before, weight)
    assert torch.equal(images[:4], dan.batch[0].images)


@pytest.mark.parametrize("backbone", [UPDATED, FROZEN])
def test_the_profile_adds_up_and_leaves_no_hook(dan, backbone):
    dan.set(1, backbone)
    grad = torch.autograd.grad
    profile = Profile(dan.step)
    with profile.recording():
        dan.run()
    assert torch.autograd.grad is grad and "head" not in vars(dan.model.network.attention)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dan.model.modules())
    parts = [f"forward {part}: {name}" for part in ("S", "S~") for name in ("backbone", "head", "memory", "losses")]
    parts += [f"backward {part}: {name}" for part in ("S", "S~") for name in ("backbone", "head", "memory", "losses")]
    assert profile.seconds.keys() == {*parts, "optimizer", "rest"}
    assert all(profile.seconds[part] > 0 for part in (*parts[:8], "optimizer", "rest", "backward S: losses"))
    # A frozen backbone gets no backward pass.
    assert (profile.seconds["backward S~: backbone"] > 0) == (backbone == UPDATED)


def test_what_is_beside_the_network_is_in_none_of_its_parts():
    share_beside = runpy.run_path(str(in_checkout("scripts/step_profile.py")))["share_beside"]
    network = {"forward S: backbone": 2.5, "forward S~: head": 1.5, "backward S: memory": 1.0}
    assert share_beside(network | {"forward S: losses": 2.0, "optimizer": 1.0, "rest": 2.0}) == 0.5


def test_the_command_writes_everything_down(tmp_path):
    printed = ("4.23 times", "plain", "literal", "backward S~: backbone", "Bar")
    content = written("iteration", tmp_path, "--threads", "1", printed=printed)
    assert content["paper_ratio"] == PAPER_RATIO == pytest.approx(4.23, abs=0.005)
    kinds = [(row["contender"], row["order"], row["backbone"]) for row in content["rows"]]
    assert kinds[:2] == [(PLAIN, None, UPDATED), (LITERAL, 1, UPDATED)]
    assert kinds[2:] == [(DAN, order, backbone) for order in (1, 2) for backbone in (UPDATED, FROZEN)]
    for row in content["rows"]:
        assert row["left_out"] is None and row["disagrees"] is None
        timing = row["seconds"]
        assert row["images_per_second"] == pytest.approx(8 / timing["median"])
        assert row["epoch_seconds"] == pytest.approx(12936 / 8 * timing["median"])
        assert row["gflop"] > 0
        assert (row["ratio"] is None) == (row["contender"] == PLAIN)
        assert bool(row["profile"]) == (row["contender"] == DAN)
    plain, literal, updated, frozen, second, _ = (row["gflop"] for row in content["rows"])
    assert plain == pytest.approx(updated, rel=0.02) and literal == pytest.approx(updated, rel=0.02)
    assert frozen < 0.4 * updated, "a frozen backbone gets no backward pass"
    assert second > 1.5 * updated


def test_what_disagrees_has_no_ratio(monkeypatch, tmp_path):
    head = NLCBAM.head
    monkeypatch.setattr(
        NLCBAM, "head", lambda *a: (r := head(*a))._replace(pooled=r.pooled * 1.01, attended=r.attended * 0.97)
    )
    words = ("dan, order 1, updated: disagrees with the literal operators: gradient of",)
    content = written("iteration", tmp_path, "--order", "1", "--contenders", "plain,dan", printed=words)
    plain, updated, frozen = content["rows"]
    assert updated["seconds"] and updated["ratio"] is None and updated["round_ratios"] == []
    assert content["bars"][0]["verdict"] == "not measured"


def test_a_literal_iteration_that_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(iteration.memory, "foresee", lambda *a: (40.0, 0.0))
    (row,) = measured("iteration", contenders=LITERAL, budget_s=79.0)
    assert row.left_out[WHOLE] == "its memory steps alone would take about 80 s, the budget is 79 s"


def row(contender: str, order: int | None, *seconds: float) -> Row:
    return row_of(contender, order, UPDATED, 64, seconds={WHOLE: Timing(list(seconds))})


def verdict(rows: list[Row], **settings: str) -> str:
    benchmark = IterationBenchmark(device="cpu", **settings)
    benchmark.set_ratios(rows)
    (bar,) = benchmark.bars(rows)
    return bar.verdict


def test_ratios_and_bars(monkeypatch):
    rows = [row(PLAIN, None, 1.0, 2.0, 3.0), row(DAN, 1, 1.1, 2.4, 3.0)]
    assert verdict(rows) == "met"
    assert rows[0].over(PLAIN) is None and rows[1].over(PLAIN) == pytest.approx(1.2)
    assert rows[1].of["round_ratios"] == pytest.approx([1.1, 1.2, 1.0])
    rows[1].whole[1] = 2.41
    assert verdict(rows) == "NOT met"
    rows[1].disagrees = "gradient of backbone"
    assert verdict(rows) == "not measured"
    rows[1].disagrees = None
    monkeypatch.setattr("dan_fast.bench.benchmark.resolve_device", lambda name: torch.device("cuda"))
    assert verdict(rows, precision="bfloat16") == "NOT met" and verdict(rows, precision="float32") == "not measured"


def test_the_iteration_is_the_trainers(dan, monkeypatch):
    called = []
    monkeypatch.setattr(MetaStep, "step", lambda self, *arguments: called.append(arguments))
    dan.run()
    assert called == [tuple(dan.batch)]
