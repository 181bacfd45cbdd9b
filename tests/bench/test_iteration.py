"""The benchmark of a training iteration: it runs the trainer's own, and gives no ratio without agreement."""

import json

import pytest
import torch

from dan_fast.bench import iteration
from dan_fast.bench.iteration import (
    DAN,
    LITERAL,
    PAPER_RATIO,
    PLAIN,
    IterationPlan,
    IterationRow,
    iteration_bars,
    set_ratios,
)
from dan_fast.bench.iteration_agreement import TOLERANCES, compare_iteration, differences, group_errors
from dan_fast.bench.iteration_contenders import (
    FROZEN,
    UPDATED,
    DANIteration,
    IterationSize,
    PlainIteration,
    literal_operators,
)
from dan_fast.bench.iteration_profile import Profile
from dan_fast.bench.timing import Operators, Timing
from dan_fast.cli import main
from dan_fast.nn import NLCBAM, ProgressiveAugmentedMemory
from dan_fast.training import Trainer

pytestmark = pytest.mark.slow

TINY = IterationSize("resnet18", 64, 32, images=8, labeled_slots=24, unlabeled_slots=12, classes=6)


def tiny_command(*arguments: str) -> list[str]:
    size = {"height": 64, "width": 32, "images": 8, "labeled_slots": 24, "unlabeled_slots": 12, "classes": 6}
    flags = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    return ["bench", "iteration", "--device", "cpu", "--backbone", "resnet18", "--repeat", "1", *flags, *arguments]


@pytest.fixture(scope="module")
def dan(tmp_path_factory) -> DANIteration:
    return DANIteration(TINY, "cpu", "float32", tmp_path_factory.mktemp("bench") / "run")


def test_the_batch_is_planned_as_in_training_and_the_memories_are_full(dan):
    memory, batch = dan.trainer.model.memory, dan.batch
    assert memory.labeled.occupied.all() and memory.unlabeled.occupied.all()
    assert int(memory.labeled.labels.max()) < TINY.classes
    assert (batch.meta_train.num_labeled, batch.meta_train.num_fed_back) == (2, 0)
    assert (batch.meta_test.num_labeled, batch.meta_test.num_fed_back) == (1, 1)
    assert batch.meta_train.images.shape == (4, 3, 64, 32) and (batch.meta_test.labels[2:] == -1).all()


@pytest.mark.parametrize("order", [1, 2])
def test_the_stage_decides_what_an_iteration_moves(dan, order):
    before = {name: value.detach().clone() for name, value in dan.trainer.model.named_parameters()}
    held = dan.trainer.model.memory.labeled

    def moved() -> set[str]:
        params = dict(dan.trainer.model.named_parameters())
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
    assert not torch.equal(held.features, dan.trainer.model.memory.labeled.features)


def test_gradients_leave_the_memories_as_they_are(dan):
    dan.set(1, UPDATED)
    before = dan.trainer.model.memory.labeled
    objective = dan.trainer.objective
    (first, moved), (second, _) = dan.gradients(), dan.gradients()
    assert torch.equal(before.features, dan.trainer.model.memory.labeled.features)
    assert dan.trainer.objective is objective
    assert set(group_errors(first, second).values()) == {0.0}
    here, moved_to = dan.gradients(moved)
    assert set(group_errors(here, first).values()) == {0.0} and moved_to is moved
    elsewhere = {name: value * 1.01 for name, value in moved.items()}
    assert group_errors(dan.gradients(elsewhere)[0], first)["backbone"] > 1e-3


def test_inside_the_literal_operators_none_of_the_package_runs(dan):
    dan.set(1, UPDATED)
    with Operators() as fast:
        dan.gradients()
    with Operators() as literal, literal_operators(dan.trainer):
        dan.gradients()
    # Settling a memory that is assigned is the module's own business.
    assert literal.names <= {"memory_commit", "memory_combine", "row_sq_norms"} and fast.names - literal.names
    assert "head" not in vars(dan.trainer.model.network.attention) and "forward" not in vars(dan.trainer.model.memory)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("backbone", [UPDATED, FROZEN])
@pytest.mark.parametrize("order", [1, 2])
def test_the_gradients_are_the_literal_ones_up_to_rounding(dan, monkeypatch, order, backbone, precision):
    half = torch.bfloat16 if precision == "bfloat16" else None
    monkeypatch.setattr(dan.trainer.model, "autocast_dtype", half)
    dan.set(order, backbone)
    found = compare_iteration(dan, TOLERANCES[precision])
    trained = {"backbone", "classifier"} if backbone == UPDATED else {"attention", "classifier"}
    assert found.errors.keys() == found.allowed.keys() == {"memory", *trained}
    assert found.disagrees is None, found
    # No parameter is judged so mildly that an error of a tenth would not be seen.
    assert max(found.allowed.values()) < 0.1 and all(found.rounding[group] > 0 for group in trained)


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


HEAD, STEP, TINY_KEYS = NLCBAM.head, ProgressiveAugmentedMemory.forward, 509


@pytest.mark.parametrize(
    ("wrong", "backbone", "group"),
    [
        (scaled_adversary, UPDATED, "backbone"),
        (scaled_adversary, FROZEN, "attention"),
        (negated_memory, UPDATED, "memory"),
        (negated_memory, UPDATED, "backbone"),
        (negated_memory, FROZEN, "memory"),
        (leaky_memory, UPDATED, "memory"),
    ],
)
def test_an_operator_that_is_a_little_wrong_is_seen(dan, monkeypatch, wrong, backbone, group):
    owner, method = (NLCBAM, "head") if wrong is scaled_adversary else (ProgressiveAugmentedMemory, "forward")
    monkeypatch.setattr(owner, method, wrong)
    dan.set(1, backbone)
    assert f"gradient of {group} by" in (compare_iteration(dan, TOLERANCES["float32"]).disagrees or "")


def test_a_parameter_without_a_gradient_is_a_difference(dan, monkeypatch):
    dan.set(1, UPDATED)
    gradients = dan.gradients

    def fewer(moved=None):
        grads, weights = gradients(moved)
        return {name: grad for name, grad in grads.items() if moved is None or name != "memory.alpha"}, weights

    monkeypatch.setattr(dan, "gradients", fewer)
    assert compare_iteration(dan, 1.0).disagrees == "the parameters that have a gradient"


def test_plain_resnet_sees_the_same_images(dan):
    plain = PlainIteration(TINY, dan)
    before = plain.classifier.weight.detach().clone()
    plain.run()
    assert len(plain.images) == TINY.images and not torch.equal(before, plain.classifier.weight)
    assert torch.equal(plain.images[:4], dan.batch.meta_train.images)


@pytest.mark.parametrize("backbone", [UPDATED, FROZEN])
def test_the_profile_adds_up_and_leaves_no_hook(dan, backbone):
    dan.set(1, backbone)
    grad = torch.autograd.grad
    profile = Profile(dan.trainer)
    with profile.recording():
        dan.run()
    assert torch.autograd.grad is grad and "head" not in vars(dan.trainer.model.network.attention)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dan.trainer.model.modules())
    parts = [f"forward {part}: {name}" for part in ("S", "S~") for name in ("backbone", "head", "memory", "losses")]
    parts += [f"backward {part}: {name}" for part in ("S", "S~") for name in ("heads", "backbone")]
    assert profile.seconds.keys() == {*parts, "optimizer", "rest"}
    assert all(profile.seconds[part] > 0 for part in (*parts[:8], "optimizer", "rest", "backward S: heads"))
    # A frozen backbone gets no backward pass.
    assert (profile.seconds["backward S~: backbone"] > 0) == (backbone == UPDATED)


def test_the_command_writes_everything_down(tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(tiny_command("--json", str(out), "--threads", "1")) == 0
    content = json.loads(out.read_text())
    assert (content["schema"], content["benchmark"], content["complete"]) == (1, "iteration", True)
    assert content["paper_ratio"] == PAPER_RATIO == pytest.approx(4.23, abs=0.005)
    assert {"torch", "commit", "cpu", "threads", "date", "gpu", "driver"} <= content["environment"].keys()
    kinds = [(row["contender"], row["order"], row["backbone"]) for row in content["rows"]]
    assert kinds[:2] == [(PLAIN, None, UPDATED), (LITERAL, 1, UPDATED)]
    assert kinds[2:] == [(DAN, order, backbone) for order in (1, 2) for backbone in (UPDATED, FROZEN)]
    for row in content["rows"]:
        assert row["left_out"] is None and row["disagrees"] is None
        timing = row["seconds"]
        assert timing["repeats"] == len(timing["all"]) == 1 and 0 < timing["q1"] <= timing["median"] <= timing["q3"]
        assert row["images_per_second"] == pytest.approx(8 / timing["median"])
        assert row["epoch_seconds"] == pytest.approx(12936 / 8 * timing["median"])
        assert row["gflop"] > 0 and (row["peak_bytes"] is None or row["peak_bytes"] >= 0)
        assert (row["ratio"] is None) == (row["contender"] == PLAIN)
        assert bool(row["profile"]) == (row["contender"] == DAN)
    plain, literal, updated, frozen, second, _ = (row["gflop"] for row in content["rows"])
    assert plain == pytest.approx(updated, rel=0.02) and literal == pytest.approx(updated, rel=0.02)
    assert frozen < 0.4 * updated, "a frozen backbone gets no backward pass"
    assert second > 1.5 * updated
    printed = capsys.readouterr().out
    for part in ("4.23 times", "plain", "literal, order 1, updated", "backward S~: backbone", "Bar"):
        assert part in printed


def test_what_disagrees_has_no_ratio(monkeypatch, capsys, tmp_path):
    head = NLCBAM.head
    monkeypatch.setattr(
        NLCBAM, "head", lambda *a: (r := head(*a))._replace(pooled=r.pooled * 1.01, attended=r.attended * 0.97)
    )
    out = tmp_path / "figures.json"
    assert main(tiny_command("--order", "1", "--contenders", "plain,dan", "--json", str(out))) == 0
    assert "dan, order 1, updated: disagrees with the literal operators: gradient of" in capsys.readouterr().out
    plain, updated, frozen = json.loads(out.read_text())["rows"]
    assert updated["seconds"] and updated["ratio"] is None and updated["round_ratios"] == []
    assert json.loads(out.read_text())["bars"][0]["verdict"] == "not measured"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--order", "1,3"], 1, "order: '3' is not one of 1, 2"),
        (["--contenders", "fastest"], 1, "contenders: 'fastest'"),
        (["--images", "7"], 1, "images: 7 are too few"),
        (["--classes", "1"], 1, "classes: 1 is too few"),
        (["--backbone", "vgg"], 2, '"backbone"'),
        (["--precision", "int8"], 2, '"precision"'),
        (["--repeat", "0"], 2, '"repeat"'),
        (["--device", "mps"], 1, "mps"),
        (["--json", "/proc/none/x.json"], 1, "/proc/none/x.json"),
        (["--contenders", "plain", "--check", "true"], 1, "1 of 1 bars are missed"),
    ],
)
def test_a_mistake_names_the_option(arguments, code, sentence, capsys):
    assert main(tiny_command(*arguments)) == code
    errors = capsys.readouterr().err
    assert sentence in errors and "Traceback" not in errors


def test_a_literal_iteration_that_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(iteration, "foresee", lambda *a: (40.0, 0.0))
    monkeypatch.setattr(iteration.IterationGroup, "_time", lambda self: None)
    plan = IterationPlan([LITERAL], [1], "cpu", "float32", TINY, repeat=1, budget_s=79.0)
    (row,) = iteration.IterationGroup(plan).measure()
    assert row.left_out == "its memory steps alone would take about 80 s, the budget is 79 s"


def row(contender: str, order: int | None, backbone: str, *seconds: float, **fields) -> IterationRow:
    return IterationRow(contender, order, backbone, 64, seconds=Timing(list(seconds)), **fields)


def test_ratios_and_bars():
    rows = [row(PLAIN, None, UPDATED, 1.0, 2.0, 3.0), row(DAN, 1, UPDATED, 1.1, 2.4, 3.0)]
    set_ratios(rows)
    assert rows[0].ratio is None and rows[1].ratio == pytest.approx(1.2)
    assert rows[1].round_ratios == pytest.approx([1.1, 1.2, 1.0])
    cpu = IterationPlan()
    assert [bar.verdict for bar in iteration_bars(rows, cpu)] == ["met"]
    rows[1].seconds.seconds[1] = 2.41
    set_ratios(rows)
    assert [bar.verdict for bar in iteration_bars(rows, cpu)] == ["NOT met"]
    half, full = (IterationPlan(device="cuda", precision=name) for name in ("bfloat16", "float32"))
    assert iteration_bars(rows, half)[0].verdict == "NOT met" and iteration_bars(rows, full)[0].value is None
    rows[1].disagrees = "gradient of backbone"
    set_ratios(rows)
    assert iteration_bars(rows, cpu)[0].verdict == "not measured"


def test_a_gradient_that_is_not_finite_is_a_difference():
    grads = {"network.backbone.w": torch.ones(3), "memory.alpha": torch.ones(())}
    allowed = {"backbone": 0.5, "memory": 1.0}
    assert group_errors(grads, grads) == {"backbone": 0.0, "memory": 0.0}
    assert differences(group_errors(grads, grads), allowed) is None
    wrong = grads | {"memory.alpha": torch.tensor(torch.nan)}
    assert differences(group_errors(wrong, grads), allowed) == "gradient of memory by nan (allowed 1.0e+00)"
    assert differences({"backbone": 0.6, "memory": 0.9}, allowed) == "gradient of backbone by 6.0e-01 (allowed 5.0e-01)"


def test_the_iteration_is_the_trainers(dan, monkeypatch):
    called = []
    monkeypatch.setattr(Trainer, "train_iteration", lambda self, *arguments: called.append(arguments))
    dan.run()
    assert called == [(dan.batch, dan.scalars)]
