"""The losses of a pass and what is known of it beside them, on a network that can be followed by hand."""

import pytest
import torch
from torch import nn

from dan_fast.daml import attention_wins
from dan_fast.functional import discriminative_loss
from dan_fast.nn import ProgressiveAugmentedMemory
from dan_fast.reference import memory as literal
from dan_fast.training import LossConfig, OptimizerConfig, TrainingModel
from dan_fast.training.metrics import accuracy
from dan_fast.training.objective import all_finite
from dan_fast.training.optimizer import build_optimizer
from tests.support.steps import split, tiny_network, training_model


def test_losses_are_equation_1_over_the_samples_they_apply_to():
    model, batch = training_model(), split()
    losses, record = model(batch)
    out = model.network(batch.images, batch.labels)
    known, unlabeled = slice(0, 4), slice(4, 7)
    cross_entropy = nn.functional.cross_entropy
    classification = (
        cross_entropy(out.logits[known], batch.labels[known])
        + cross_entropy(out.adversary_logits[known], batch.labels[known])
    ) / 2
    entropy = sum(
        -torch.distributions.Categorical(logits=branch[unlabeled]).entropy().mean()
        for branch in (out.logits, out.adversary_logits)
    )
    torch.testing.assert_close(losses["classification"], classification)
    torch.testing.assert_close(losses["adversary"], 0.6 * out.adversary_loss[known].mean())
    torch.testing.assert_close(losses["regularizer"], 0.2 * entropy / 2)
    fresh = ProgressiveAugmentedMemory(4, 4, key_dim=model.network.key_dim)
    keys = model.network.keys(out)
    step = fresh(keys[:3], batch.labels[:3], keys[4:], batch.sample_ids[4:])
    torch.testing.assert_close(losses["embedding"], 0.5 * (step.loss - 0.1 * torch.log(torch.tensor(0.1))))
    parts = [losses[name] for name in ("classification", "adversary", "embedding", "regularizer")]
    torch.testing.assert_close(losses["total"], sum(parts))
    assert record.pseudo_labels.tolist() == step.pseudo_labels.tolist()
    assert record.labels.tolist() == [0, 1, 2] and len(record.logits) == 3
    assert record.sample_ids.tolist() == [4, 5, 6]
    assert record.fed_back_labels.tolist() == [1] and record.fed_back_ids.tolist() == [9]
    extremes = out.spatial_attention.amax(1) - out.spatial_attention.amin(1)
    torch.testing.assert_close(record.spatial_spread, extremes.mean())
    assert not any(value.requires_grad for value in record if isinstance(value, torch.Tensor))


def test_rounding_under_autocast_makes_no_ties():
    model, batch = training_model(), split()
    model.autocast_dtype = torch.bfloat16
    with torch.no_grad():
        # In bfloat16 class 2 is class 1, and of equal logits argmax takes the first.
        model.network.classifier.weight.copy_(torch.tensor([[0.0], [1.0], [1 + 2**-9]]).expand(3, 6))
    _, record = model(batch)
    labels = torch.full_like(record.labels, 2)
    assert record.logits.dtype == record.adversary_logits.dtype == torch.float32
    assert accuracy(record.logits, labels) == accuracy(record.adversary_logits, labels) == 1
    assert attention_wins(record.logits, torch.zeros_like(record.logits), labels)


def test_cleared_samples_are_those_that_the_reference_drops_or_replaces(monkeypatch):
    torch.manual_seed(0)
    model, batch = training_model(), split()
    model.memory = ProgressiveAugmentedMemory(6, 5, key_dim=3)
    left = {"dropped": 0, "replaced": 0}
    drop, write = literal._drop_false_samples, literal._write

    def counting_drop(memory, key, pseudo_label):
        after, loss = drop(memory, key, pseudo_label)
        left["dropped"] += int(memory.occupied.sum() - after.occupied.sum())
        return after, loss

    def counting_write(memory, key, label, sample_id, *rest, **settings):
        left["replaced"] += int(sample_id >= 0 and memory.occupied[memory.least_used])
        return write(memory, key, label, sample_id, *rest, **settings)

    monkeypatch.setattr(literal, "_drop_false_samples", counting_drop)
    monkeypatch.setattr(literal, "_write", counting_write)
    seen, before = [], {"dropped": 0, "replaced": 0}
    for _ in range(12):
        keys = torch.randn(7, 3)
        monkeypatch.setattr(model.network, "keys", lambda out, keys=keys: keys)
        states = model.memory.labeled, model.memory.unlabeled
        gates = [value.detach() for value in model.memory.gate_values()]
        literal.memory_step(*states, keys[:3], batch.labels[:3], keys[4:], batch.sample_ids[4:], *gates)
        _, record = model(batch)
        assert record.cleared.shape == () and int(record.cleared) == sum(left.values()) - sum(before.values())
        seen.append(int(record.cleared))
        before = dict(left)
    assert seen[0] == 0 and max(seen) > 0 and min(left.values()) > 0


def test_the_memory_holds_labelled_and_unlabelled_but_no_fed_back_samples():
    model = training_model()
    model(split())
    assert sorted(model.memory.labeled.labels.tolist()) == [-1, 0, 1, 2]
    stored = set(model.memory.unlabeled.sample_ids.tolist()) - {-1}
    assert stored and stored <= {4, 5, 6}


def test_each_group_feels_its_own_losses_only():
    model = training_model()
    losses, _ = model(split())
    gates = [model.memory.alpha, model.memory.alpha_unlabeled, model.memory.beta_logit]
    attention = list(model.network.attention.parameters())
    assert all(g is None for g in torch.autograd.grad(losses["adversary"], gates, retain_graph=True, allow_unused=True))
    by_attention = torch.autograd.grad(losses["embedding"], attention, retain_graph=True, allow_unused=True)
    assert all(g is None or not g.any() for g in by_attention)
    beta = torch.autograd.grad(losses["embedding"], model.memory.beta_logit)[0]
    assert beta != 0


def test_the_prior_moves_beta_up_and_the_literal_loss_does_not():
    with_prior, literal = training_model(confidence_prior=0.1), training_model(confidence_prior=0.0)
    rises = torch.autograd.grad(with_prior(split())[0]["embedding"], with_prior.memory.beta_logit)[0]
    falls = torch.autograd.grad(literal(split())[0]["embedding"], literal.memory.beta_logit)[0]
    torch.testing.assert_close(falls - rises, torch.tensor(0.5 * 0.1 * 0.9))
    assert falls >= 0


def test_weight_decay_moves_beta_up_where_the_literal_loss_leaves_it():
    model = training_model(confidence_prior=0.0)
    optimizer = build_optimizer(model, OptimizerConfig())
    beta = model.memory.beta.item()
    # As for a batch without a second term of Eq. (15).
    model.memory.beta_logit.grad = torch.zeros_like(model.memory.beta_logit)
    optimizer.step()
    assert beta < model.memory.beta.item() < 0.5


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_momentum_and_weight_decay_are_those_of_the_settings(scale):
    settings = OptimizerConfig(momentum=0.3, weight_decay=0.01, backbone_lr_scale=scale)
    for group in build_optimizer(training_model(), settings).param_groups:
        assert (group["momentum"], group["weight_decay"]) == (0.3, 0.01)


def test_without_memory_nothing_of_it_is_in_the_loss():
    model = training_model(memory=False)
    losses, record = model(split())
    assert losses["embedding"] == 0 and record.pseudo_labels.numel() == 0
    assert record.cleared is None


def test_images_that_lend_their_style_have_no_part_in_the_losses_of_a_ranks_share():
    network = tiny_network()
    memory = ProgressiveAugmentedMemory(4, 4, key_dim=network.key_dim)
    model, batch = TrainingModel(network, memory, LossConfig(), lending=True), split()
    # The lenders leave before the last map.
    share = batch._replace(shares=((3, 1, 3), (2, 0, 2)))
    losses, record = model.losses(network.maps(batch.images[:4]), share)
    assert losses["embedding"] == losses["regularizer"] == 0
    torch.testing.assert_close(losses["total"], losses["classification"] + losses["adversary"])
    assert record.sample_ids.numel() == record.pseudo_labels.numel() == record.cleared == 0
    assert set(memory.unlabeled.sample_ids.tolist()) == {-1}
    assert sorted(memory.labeled.labels.tolist()) == [-1, 0, 1, 2]


def test_labelled_images_are_told_apart_by_the_memory_as_it_was_before_them():
    network = tiny_network()
    memory = ProgressiveAugmentedMemory(4, 4, key_dim=network.key_dim)
    model = TrainingModel(network, memory, LossConfig(labeled_embedding=2.0), temperature=0.5)
    batch = split()
    first, _ = model(batch)
    assert first["labeled_embedding"] == 0.0  # M was empty
    before = memory.labeled
    losses, _ = model(batch)
    keys = network.keys(network(batch.images))[:3]  # not the fed-back one: its label is not the truth
    terms = discriminative_loss(keys, batch.labels[:3], before.features, before.labels, temperature=0.5)
    torch.testing.assert_close(losses["labeled_embedding"], 2.0 * terms.mean())
    parts = [losses[name] for name in ("classification", "adversary", "embedding", "regularizer", "labeled_embedding")]
    torch.testing.assert_close(losses["total"], sum(parts))
    gradient = torch.autograd.grad(losses["labeled_embedding"], network.backbone.conv.weight)[0]
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("gates", ["parameters", "features"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float64, 1e-5)])
def test_a_memory_of_another_dtype_takes_the_networks_keys(dtype, tolerance, gates):
    network, found = tiny_network(), {}
    for each in (torch.float32, dtype):
        memory = ProgressiveAugmentedMemory(4, 4, network.key_dim, dtype=each, gates=gates)
        model = TrainingModel(network, memory, LossConfig(labeled_embedding=2.0, embedding=1.0))
        model(split())
        losses, _ = model(split(seed=6))
        losses["total"].backward()
        found[each] = [losses[name] for name in ("total", "embedding", "labeled_embedding")]
        found[each].append(network.backbone.conv.weight.grad.norm())
        network.zero_grad()
        assert memory.dtype == memory.labeled.features.dtype == each
    assert all(loss.dtype == torch.float32 and loss.isfinite() and loss > 0 for loss in found[dtype])
    torch.testing.assert_close(found[dtype], found[torch.float32], rtol=tolerance, atol=0)


def test_a_memory_for_keys_of_another_length_is_refused():
    network = tiny_network()
    with pytest.raises(ValueError, match=r"key_dim is 5 .*keys of 3: .*key_dim=3\)"):
        TrainingModel(network, ProgressiveAugmentedMemory(4, 4, key_dim=5), LossConfig())


@pytest.mark.parametrize("reach, touched", [("all", True), ("attention", False)])
def test_what_the_adversary_loss_reaches(reach, touched):
    network = tiny_network(adversary_reach=reach)
    batch = split()
    output = network(batch.images, batch.labels)
    names, parameters = zip(*network.named_parameters(), strict=True)
    grads = torch.autograd.grad(output.adversary_loss.sum(), parameters, allow_unused=True, retain_graph=True)
    reached = {name for name, grad in zip(names, grads, strict=True) if grad is not None and grad.abs().sum() > 0}
    outside = {"backbone.conv.weight", "backbone.conv.bias", "classifier.weight"}
    assert reached & outside == (outside if touched else set())
    assert any(name.startswith("attention.") for name in reached)
    # The loss itself and both branches are the same whatever it reaches.
    paper = tiny_network()(batch.images, batch.labels)
    for name in ("adversary_loss", "attended", "pooled", "logits"):
        torch.testing.assert_close(getattr(output, name), getattr(paper, name))
    assert torch.autograd.grad(output.logits.sum(), network.backbone.conv.weight)[0].abs().sum() > 0


@pytest.mark.parametrize("copies", [0, 1])
def test_what_is_not_finite_is_found_however_a_tensor_lies_and_dense_ones_are_not_copied(monkeypatch, copies):
    lying = {
        0: [torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.zeros(3, 4).mT, torch.zeros(())],
        1: [torch.zeros(6, 8)[::2, 1::3], torch.zeros(3, 1).expand(3, 4)],
    }[copies]
    seen, aminmax = [], torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda given: seen.append(given.is_contiguous()) or aminmax(given))
    assert all_finite([*lying, torch.tensor([7]), torch.empty(0)])
    assert seen == [not copies] * len(lying)
    for tensor in lying:
        for value in (torch.nan, torch.inf, -torch.inf):
            tensor[(-1,) * tensor.dim()] = value
            assert not all_finite(lying)
            tensor[(-1,) * tensor.dim()] = 0.0


def test_keys_that_a_half_memory_cannot_hold_are_no_other_ranks() -> None:
    """Features are finite in float32, and the keys are not in float16; there is no other rank to lay it on."""
    network = tiny_network()
    memory = ProgressiveAugmentedMemory(4, 4, key_dim=network.key_dim, dtype=torch.float16)
    given = split()
    with torch.no_grad():
        network.backbone.conv.weight.mul_(1e7)
    with pytest.raises(ValueError, match="keys must be finite"):
        TrainingModel(network, memory, LossConfig())(given)
