"""Meta gradients against finite differences of the meta objective, and the rules of the competition."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from dan_fast.daml import Competition, Stage, accuracies_tie, active_groups, attention_wins, meta_gradients

INNER_LR = 0.07
ETA = 0.6


@pytest.fixture(params=[1, 2])
def order(request):
    return request.param


def quadratic_problem() -> tuple[dict[str, Tensor], dict[str, tuple[list[str], str]], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"backbone.w": (3, 2), "backbone.b": (3,), "attention.w": (3,), "gate": (), "constant": (3,)}
    params = {name: torch.randn(each, generator=generator, dtype=torch.float64) for name, each in shapes.items()}
    groups = {
        "backbone": (["backbone.w", "backbone.b"], "total"),
        "attention": (["attention.w"], "adversary"),
        "memory": (["gate"], "embedding"),
    }
    batches = torch.randn(2, 4, 2, generator=generator, dtype=torch.float64)
    return params, groups, batches[0], batches[1]


def coupled_losses(params: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
    """Every loss depends on every group, so a derivative that ignores another group's step shows."""
    hidden = torch.tanh(batch @ params["backbone.w"].T + params["backbone.b"])
    attended = hidden * torch.sigmoid(params["attention.w"]) + params["constant"]
    adversary = ((attended - hidden) ** 2).mean()
    embedding = (torch.sigmoid(params["gate"]) * hidden.sum(1) ** 2).mean() + params["gate"] ** 2 * adversary
    total = attended.exp().mean() + adversary + embedding
    return {"adversary": adversary, "embedding": embedding, "total": total}


def numeric_total_derivative(params, groups, meta_train, meta_test, name: str, loss_name: str) -> Tensor:
    """Central differences of L_g(S, G) + eta L_g(S~, G'), G' stepped by plain autograd."""

    def objective(value: Tensor) -> float:
        current = {key: entry.clone().requires_grad_() for key, entry in {**params, name: value}.items()}
        train = coupled_losses(current, meta_train)
        moved = dict(current)
        for names, group_loss in groups.values():
            grads = torch.autograd.grad(train[group_loss], [current[key] for key in names], retain_graph=True)
            for key, grad in zip(names, grads, strict=True):
                moved[key] = current[key] - INNER_LR * grad
        test = coupled_losses(moved, meta_test)
        return float(train[loss_name] + ETA * test[loss_name])

    numeric = torch.zeros_like(params[name]).reshape(-1)
    for index in range(numeric.numel()):
        step = torch.zeros_like(numeric)
        step[index] = 1e-5
        step = step.reshape(params[name].shape)
        numeric[index] = (objective(params[name] + step) - objective(params[name] - step)) / 2e-5
    return numeric.reshape(params[name].shape)


def test_second_order_is_the_total_derivative_of_the_meta_objective():
    params, groups, *batches = quadratic_problem()
    before = {name: value.clone() for name, value in params.items()}
    result = meta_gradients(coupled_losses, params, groups, *batches, INNER_LR, ETA, order=2)
    numeric = {
        name: numeric_total_derivative(params, groups, *batches, name, loss)
        for names, loss in groups.values()
        for name in names
    }
    torch.testing.assert_close(result.grads, numeric, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(params, before, rtol=0, atol=0)
    assert not any(value.requires_grad or value.grad is not None for value in params.values())


def test_first_order_is_algorithm_1_as_printed():
    params, groups, meta_train, meta_test = quadratic_problem()
    result = meta_gradients(coupled_losses, params, groups, meta_train, meta_test, INNER_LR, ETA, order=1)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    train = coupled_losses(leaves, meta_train)
    at_g, moved = {}, {name: value.detach().clone() for name, value in params.items()}
    for names, loss_name in groups.values():
        for name in names:
            (at_g[name],) = torch.autograd.grad(train[loss_name], leaves[name], retain_graph=True)
            moved[name] = (params[name] - INNER_LR * at_g[name]).requires_grad_()
    test = coupled_losses(moved, meta_test)
    expected = {
        name: at_g[name] + ETA * torch.autograd.grad(test[loss], moved[name], retain_graph=True)[0]
        for names, loss in groups.values()
        for name in names
    }
    torch.testing.assert_close(result.grads, expected)
    torch.testing.assert_close(result.train_losses, {name: value.detach() for name, value in train.items()})
    torch.testing.assert_close(result.test_losses, {name: value.detach() for name, value in test.items()})
    assert not any(value.requires_grad for value in (*result.train_losses.values(), *result.test_losses.values()))


def test_losses_computed_before_give_the_same_gradients(order):
    params, groups, meta_train, meta_test = quadratic_problem()
    expected = meta_gradients(coupled_losses, params, groups, meta_train, meta_test, INNER_LR, ETA, order)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    counted, before = Mock(wraps=coupled_losses), coupled_losses(leaves, meta_train)
    given = meta_gradients(counted, leaves, groups, meta_train, meta_test, INNER_LR, ETA, order, train_losses=before)
    assert counted.call_count == 1 and counted.call_args.args[1] is meta_test
    # Of losses given so, forward over reverse knows no way to have them again.
    torch.testing.assert_close(given.grads, expected.grads, rtol=0 if order == 1 else 1e-12, atol=0)


def test_without_groups_every_parameter_takes_total(order):
    params, _, *batches = quadratic_problem()
    with_none, named = (
        meta_gradients(coupled_losses, params, groups, *batches, INNER_LR, ETA, order).grads
        for groups in (None, {"one": (list(params), "total")})
    )
    assert set(with_none) == set(params)
    torch.testing.assert_close(with_none, named, rtol=0, atol=0)


def test_without_groups_frozen_layers_stay_as_they_are(order):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    params = dict(model.named_parameters())
    model[0].requires_grad_(False)
    batches = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)]
    seen = []

    def loss_fn(given, images):
        seen.append(given["0.weight"])
        return {"total": torch.func.functional_call(model, given, images).square().sum()}

    found, named = (
        meta_gradients(loss_fn, params, groups, *batches, INNER_LR, order=order).grads
        for groups in (None, {"last": (["2.weight", "2.bias"], "total")})
    )
    assert set(found) == {"2.weight", "2.bias"}
    torch.testing.assert_close(found, named, rtol=0, atol=0)
    assert all(torch.equal(value, model[0].weight) for value in seen)


def test_a_loss_of_other_tensors_than_the_parameters_is_refused(order):
    model, images = torch.nn.Linear(3, 2), torch.randn(5, 3)
    with pytest.raises(ValueError, match="'total' depends on none of params but on other tensors that require grad"):
        meta_gradients(
            lambda params, images: {"total": model(images).square().sum()}, dict(model.named_parameters()), None,
            images, images, INNER_LR, order=order,
        )  # fmt: skip


def test_a_parameter_in_no_group_reaches_both_passes_as_a_constant():
    params, groups, meta_train, meta_test = quadratic_problem()
    del groups["backbone"]
    watched = Mock(wraps=coupled_losses)
    result = meta_gradients(watched, params, groups, meta_train, meta_test, INNER_LR)
    assert set(result.grads) == {"attention.w", "gate"} and watched.call_count >= 2
    for value in (call.args[0]["backbone.w"] for call in watched.call_args_list):
        assert not value.requires_grad
        torch.testing.assert_close(value, params["backbone.w"], rtol=0, atol=0)


def test_a_loss_that_does_not_depend_on_its_group_gives_zero(order):
    params = {"used": torch.ones(2, dtype=torch.float64), "unused": torch.ones(3, dtype=torch.float64)}
    groups = {"a": (["used"], "total"), "b": (["unused"], "constant")}

    def loss_fn(current, batch):
        return {"total": (current["used"] ** 2).sum(), "constant": torch.zeros((), dtype=torch.float64)}

    grads = meta_gradients(loss_fn, params, groups, None, None, 0.1, order=order).grads
    assert grads["unused"].tolist() == [0, 0, 0]
    assert (grads["used"] > 0).all()


def logits(*predictions: int, confidence: float = 1.0) -> Tensor:
    return confidence * torch.nn.functional.one_hot(torch.tensor(predictions), 3).float()


LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("attention", "adversary", "wins", "tie"),
    [
        # Equally many right, though not the same ones: the lower cross-entropy wins.
        ((0, 1, 1, 1), (1, 1, 2, 1), False, True),
        ((1, 2, 0, 1), (2, 0, 1, 2), False, True),
        ((0, 1, 2, 0), (0, 1, 2, 0), True, True),
        ((0, 1, 2, 1), (0, 1, 1, 1), True, False),
        ((0, 1, 1, 1), (0, 1, 2, 1), False, False),
    ],
)
def test_the_more_accurate_branch_wins_and_of_two_the_one_of_lower_cross_entropy(attention, adversary, wins, tie):
    # Sure of what is right, the attention branch has the lower cross-entropy; of what is wrong, the higher one.
    sure, unsure = logits(*attention, confidence=5.0), logits(*adversary)
    assert bool(accuracies_tie(sure, unsure, LABELS)) == tie
    assert bool(attention_wins(sure, unsure, LABELS)) == wins
    assert bool(attention_wins(unsure, sure, LABELS)) != wins
    assert attention_wins(sure, sure, LABELS)


def test_attention_wins_where_there_is_no_sample():
    none = torch.zeros(0, 3)
    assert attention_wins(none, none, LABELS[:0]) and accuracies_tie(none, none, LABELS[:0])


@pytest.mark.parametrize(
    ("stall_guard", "results", "stages"),
    [
        (3, "lllllwl", "GGGBBAG"),
        (2, "ltlllw", "GBGGBA"),  # a tie that both win ends a row of the adversary
        (0, "l" * 50, "G" * 50),  # without a guard the backbone stays frozen
    ],
)
def test_the_stall_guard_frees_both_groups_until_attention_wins(stall_guard: int, results: str, stages: str):
    """Attention loses, wins or ties; the adversary is trained alone (G), attention alone (A), or both (B)."""
    competition, stage_of = Competition(stall_guard), {"G": Stage.ADVERSARY, "A": Stage.ATTENTION, "B": Stage.BOTH}
    assert [competition.decide(each == "w", each == "t") for each in results] == [stage_of[each] for each in stages]


def test_groups_of_each_stage_list_every_parameter_at_most_once():
    names = {"backbone": ["b", "cam"], "attention": ["a1", "a2"], "memory": ["alpha"], "cam_weights": ["cam"]}
    memory, backbone = {"memory": (["alpha"], "embedding")}, {"backbone": (["b", "cam"], "total")}
    assert active_groups(Stage.ADVERSARY, **names) == {"attention": (["a1", "a2", "cam"], "adversary")} | memory
    assert active_groups(Stage.ATTENTION, **names) == backbone | memory
    assert active_groups(Stage.BOTH, **names) == backbone | {"attention": (["a1", "a2"], "adversary")} | memory
    assert "memory" not in active_groups(Stage.ATTENTION, **{**names, "memory": []})


def test_gradients_are_those_outside_of_no_grad(order):
    params, groups, train, test = quadratic_problem()
    expected = meta_gradients(coupled_losses, params, groups, train, test, INNER_LR, ETA, order).grads
    with torch.no_grad():
        found = meta_gradients(coupled_losses, params, groups, train, test, INNER_LR, ETA, order).grads
        assert not torch.is_grad_enabled()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_inference_mode_is_refused_before_a_loss_is_computed(order):
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode .* outside of it"):
        meta_gradients(lambda *_: pytest.fail("called"), {"w": torch.ones(2)}, None, 1.0, 1.0, INNER_LR, order=order)


@pytest.mark.parametrize("groups", [None, {}, {"memory": ([], "total")}])
def test_without_parameters_there_are_losses_alone(groups, order):
    train, test = torch.ones(()), torch.zeros(())
    found = meta_gradients(lambda params, batch: {"total": batch}, {}, groups, train, test, 0.1, 1.0, order)
    assert found == ({"total": 1.0}, {"total": 0.0}, {})


@pytest.mark.parametrize(("order", "at_test"), [(1, 0.8), (2, 0.8**2)])
def test_complex_parameters_have_gradients(order, at_test):
    def loss_fn(params, batch):
        return {"total": (params["w"].abs() * batch) ** 2}

    # d|w|^2 is 2w as PyTorch has it, and the inner step leaves 0.8 of w.
    w = torch.tensor(1 + 2j, dtype=torch.complex128)
    found = meta_gradients(loss_fn, {"w": w}, None, 1, 1, 0.1, order=order)
    torch.testing.assert_close(found.grads["w"], (1 + at_test) * 2 * w)


def test_buffers_that_have_no_gradient_are_named():
    params = {"w": torch.ones((), dtype=torch.float64), "num_batches_tracked": torch.tensor(3)}
    sentence = "'num_batches_tracked' is torch.int64 and has no gradient: name in groups"
    for groups in (None, {"all": (["num_batches_tracked"], "total")}):
        with pytest.raises(ValueError, match=sentence):
            meta_gradients(lambda params, batch: {"total": params["w"] * batch}, params, groups, 1.0, 1.0, 0.1)


def test_each_parameter_may_have_an_inner_step_of_its_own(order):
    """L(S) = (v + w)^2 at v = 1, w = 2 moves v by 0.1 x 6 and w by 0.01 x 6; L(S~) = 3 v w."""

    def loss_fn(params, batch):
        v, w = params["v"], params["w"]
        return {"total": (v + w) ** 2 if batch == "S" else 3 * v * w}

    params = {"v": torch.tensor(1.0, dtype=torch.float64), "w": torch.tensor(2.0, dtype=torch.float64)}
    result = meta_gradients(loss_fn, params, None, "S", "S~", {"v": 0.1, "w": 0.01}, order=order)
    v, w = 1 - 0.1 * 6, 2 - 0.01 * 6
    # d v'/dv = 1 - 0.2 and d v'/dw = -0.2; d w'/dw = 1 - 0.02 and d w'/dv = -0.02.
    first = {"v": 6 + 3 * w, "w": 6 + 3 * v}
    second = {"v": 6 + 3 * (0.8 * w - 0.02 * v), "w": 6 + 3 * (0.98 * v - 0.2 * w)}
    for name, expected in (first if order == 1 else second).items():
        assert result.grads[name].item() == pytest.approx(expected, rel=1e-12)
    even = meta_gradients(loss_fn, params, None, "S", "S~", {"v": 0.1, "w": 0.1}, order=order)
    plain = meta_gradients(loss_fn, params, None, "S", "S~", 0.1, order=order)
    assert even.grads == plain.grads
    with pytest.raises(ValueError, match="inner_lr names no step size for 'w'"):
        meta_gradients(loss_fn, params, None, "S", "S~", {"v": 0.1}, order=order)


@pytest.mark.parametrize("stall_guard", [-1, float("nan"), "20"])
def test_a_wrong_guard_is_named(stall_guard):
    with pytest.raises(ValueError, match=f"^stall_guard must be a whole number, 0 or more, got {stall_guard!r}$"):
        Competition(stall_guard)


def test_a_stage_may_be_its_name_and_no_other():
    names = (["b"], ["a"], ["m"], ["b"])
    for stage in Stage:
        assert active_groups(str(stage.value), *names) == active_groups(stage, *names)
    with pytest.raises(ValueError, match="'frozen' is not a valid Stage"):
        active_groups("frozen", *names)


def test_a_tie_is_broken_in_the_precision_of_the_logits():
    attention = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    assert not attention_wins(attention, attention + torch.tensor([1e-9, 0.0]), torch.tensor([0]))


def test_names_of_a_group_may_be_given_once_and_losses_are_copies(order):
    params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}

    def losses(params, batch):
        return {"total": (params["w"].square().sum() * batch).reshape(1), "gate": params["w"][0], "images": 3}

    expected = meta_gradients(losses, params, None, 1.0, 2.0, inner_lr=0.1, order=order)
    found = meta_gradients(losses, params, {"all": (iter(params), "total")}, 1.0, 2.0, inner_lr=0.1, order=order)
    assert torch.equal(found.grads["w"], expected.grads["w"]) and found.grads["w"].any()
    params["w"].mul_(7)
    assert found.train_losses["gate"] == 1.0 and found.train_losses["images"] == 3


@pytest.mark.parametrize(
    ("settings", "kind", "sentence"),
    [
        ({"loss": None}, TypeError, "loss_fn must return a dict of losses, got NoneType"),
        ({"loss": {"total": 0.5}}, TypeError, "loss_fn: 'total' must be a tensor of one number, got float"),
        ({"loss": {"total": torch.ones(2)}}, TypeError, r"tensor of one number, got a tensor of shape \(2,\)"),
        ({"inner_lr": float("nan")}, ValueError, "inner_lr must be a finite number, got"),
        ({"inner_lr": {"w": "1", "c": 0.1}}, TypeError, "inner_lr of 'w' must be a number, got str"),
        ({"inner_lr": torch.ones(2)}, TypeError, r"number, got a tensor of shape \(2,\)"),
        ({"eta": None}, TypeError, "eta must be a number, got NoneType"),
        ({"groups": {"a": (["w"], "total"), "b": (["w"], "total")}}, ValueError, "'w' stands in 'a' and again in 'b'"),
        ({"groups": {"a": (["w", "w"], "total")}}, ValueError, "'w' stands in 'a' and again in 'a'"),
        ({"groups": {"a": (["v"], "total")}}, ValueError, "'v', which is not in params"),
        ({"groups": {"a": ("w", "total")}}, TypeError, "'a' must list names of parameters, got the text 'w'"),
        ({"groups": [["w"]]}, TypeError, r"groups must map names to \(names of parameters, name of a loss\), got list"),
        ({"params": []}, TypeError, r"params must map names to tensors, as dict\(model.named_parameters\(\)\) does"),
        ({"groups": {"a": (["w"], "sum")}}, ValueError, "'sum' is not among those loss_fn returned: total, half"),
        ({"order": 3}, ValueError, "order must be 1 or 2, got 3"),
    ],
)
def test_a_wrong_loss_step_or_group_is_named(order, settings, kind, sentence):
    def loss_fn(params, batch):
        total = params["w"].sum() * params["c"]
        return settings.get("loss", {"total": total, "half": total / 2})

    params = {"w": torch.tensor([1.0, 2.0]), "c": torch.ones(())}
    given = {"params": params, "groups": None, "inner_lr": 0.1, "order": order, **settings}
    given.pop("loss", None)
    with pytest.raises(kind, match=sentence):
        meta_gradients(loss_fn, meta_train=1, meta_test=2, **given)
