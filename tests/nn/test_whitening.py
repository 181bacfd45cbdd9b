"""The whitened feature: what its matrix is and is made of, and that networks, trainings and ranks have it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.data.synthetic import synthesize
from dan_fast.nn import DAN, WithinPersonWhitening, whitening
from dan_fast.training import Trainer, trained_network
from dan_fast.training.checkpoint import load_checkpoint
from dan_fast.training.scalars import Scalars
from tests.support.ranks import Ranks
from tests.support.training_runs import config

LABELS = torch.tensor([0, -1, 9, 0, 0, -1, 9, 30])


def keys(size: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(LABELS), size, generator=generator)


def expected_metric(numbers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A of the docstring, slot by slot."""
    roots = np.sign(numbers) * np.sqrt(np.abs(numbers))
    roots /= np.linalg.norm(roots, axis=1, keepdims=True)
    size, scatter, beyond_the_first = numbers.shape[1], 0, 0
    for person in set(labels.tolist()) - {-1}:
        own = roots[labels == person]
        scatter = scatter + sum(np.outer(each - own.mean(0), each - own.mean(0)) for each in own)
        beyond_the_first += len(own) - 1
    covariance = scatter / beyond_the_first
    mean_eigenvalue = np.trace(covariance) / size
    return (beyond_the_first * covariance / mean_eigenvalue + 8 * size * np.eye(size)) / (beyond_the_first + 8 * size)


def test_cosines_are_those_of_the_metric_within_persons(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(whitening, "_ROWS", 3)  # keys in three parts, the last of them not whole
    module = WithinPersonWhitening(7)
    module.fit(100 * keys().requires_grad_(), LABELS)
    assert not module.matrix.requires_grad and not list(module.parameters())
    metric = np.eye(7)
    metric[:5, :5] = np.linalg.inv(expected_metric(keys().double().numpy(), LABELS.numpy()))
    features = torch.randn(3, 7)
    roots = (features.sign() * features.abs().sqrt()).double().numpy()
    expected = torch.from_numpy(roots @ metric @ roots.T)
    given = module(features).double()
    torch.testing.assert_close(given @ given.T, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(metric[:5, :5] - np.eye(5)).max() > 0.05
    assert math.isclose(np.trace(np.linalg.inv(metric)), 7, rel_tol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_takes_keys_and_features_of_any_floating_type(dtype: torch.dtype):
    module, other = WithinPersonWhitening(5), WithinPersonWhitening(5)
    module.fit(keys().to(dtype), LABELS)
    other.fit(keys().to(dtype).float(), LABELS)
    assert torch.equal(module.matrix, other.matrix) and module.matrix.dtype == torch.float32
    assert module(keys().to(dtype)).dtype == dtype


def test_it_is_the_root_alone_before_fit_and_without_two_different_keys_of_a_person():
    module = WithinPersonWhitening(5)
    features = torch.tensor([[4.0, -9.0, 0.0, 1.0, 0.25]])
    for given, labels in (
        (keys(), torch.full_like(LABELS, -1)),
        (keys(), torch.arange(len(LABELS)) - 1),
        (torch.ones(len(LABELS), 5), LABELS),
        (torch.zeros(len(LABELS), 5), LABELS),
    ):
        module.fit(given, labels)
        assert module(features).tolist() == [[2.0, -3.0, 0.0, 1.0, 0.5]]
    module.fit(keys(), LABELS)
    fitted = module.matrix.clone()
    module.fit(keys(), torch.full_like(LABELS, -1))
    assert torch.equal(module.matrix, fitted) and not torch.equal(fitted, torch.eye(5))


def test_how_much_keys_differ_does_not_matter():
    near, nearer = (WithinPersonWhitening(5), WithinPersonWhitening(5))
    for module, distance in ((near, 1e-3), (nearer, 1e-4)):
        module.fit(1 + distance * keys(), LABELS)
    torch.testing.assert_close(near.matrix, nearer.matrix, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(near.matrix, torch.eye(5), atol=0.02)


@pytest.mark.parametrize(
    ("given", "labels", "error", "says"),
    [
        (torch.ones(8, 6), LABELS, ValueError, r"C at most 5 .* got \(8, 6\)"),
        (torch.ones(7, 5), LABELS, ValueError, r"k of them in rows, got \(7, 5\) and \(8,\)"),
        (torch.ones(8), LABELS, ValueError, r"must be \(k, C\)"),
        (torch.ones(8, 5), LABELS[:, None], ValueError, r"labels \(s,\)"),
        (torch.full((8, 5), torch.nan), LABELS, ValueError, "keys must be finite"),
        (torch.full((8, 5), torch.inf), LABELS, ValueError, "keys must be finite"),
        (torch.ones(8, 5).long(), LABELS, TypeError, "keys must be floating"),
        (torch.ones(8, 5), LABELS.float(), TypeError, "labels int64, got torch.float32 and torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(given: Tensor, labels: Tensor, error: type, says: str):
    module = WithinPersonWhitening(5)
    with pytest.raises(error, match=says):
        module.fit(given, labels)
    assert torch.equal(module.matrix, torch.eye(5))


def fitted_on_ranks(group, labels: Tensor) -> Tensor:
    module = WithinPersonWhitening(5)
    rows = (slice(0, 3), slice(3, 8))[group.rank()]
    module.fit(keys()[rows], labels, rows, group)
    return module.matrix


def test_ranks_that_hold_a_part_of_the_keys_each_have_the_matrix_of_all(tmp_path: Path):
    of_one_rank = LABELS.index_fill(0, torch.arange(3), -1)
    with Ranks(2, tmp_path / "store") as ranks:
        for labels in (LABELS, of_one_rank, torch.full_like(LABELS, -1)):
            module = WithinPersonWhitening(5)
            module.fit(keys(), labels)
            first, second = ranks.run(fitted_on_ranks, labels)
            torch.testing.assert_close(first, module.matrix)
            assert torch.equal(first, second)


def refused_on_ranks(group) -> str:
    """What is raised where one rank alone has keys that are not finite, and the other no key of a person."""
    module, labels = WithinPersonWhitening(5), torch.tensor([-1, -1, 4, 4])
    own = torch.full((2, 5), torch.inf) if group.rank() else torch.ones(2, 5)
    with pytest.raises(ValueError, match="keys must be finite") as error:
        module.fit(own, labels, slice(2 * group.rank(), 2 * group.rank() + 2), group)
    return str(error.value)


def test_all_ranks_refuse_keys_of_one_that_are_not_finite(tmp_path: Path):
    with Ranks(2, tmp_path / "store") as ranks:
        first, second = ranks.run(refused_on_ranks)
    assert first == second


def test_a_network_with_it_tests_the_whitened_pooled_feature():
    network = DAN(3, "timm:test_resnet", (32, 16), feature="pooled_whitened").eval()
    images = torch.rand(2, 3, 32, 16)
    pooled = network(images).pooled.detach()
    torch.testing.assert_close(network.embed(images), pooled.sqrt())
    network.whitening.matrix.copy_(torch.randn(network.whitening.matrix.shape))
    torch.testing.assert_close(network.embed(images), pooled.sqrt() @ network.whitening.matrix)
    assert DAN(3, "timm:test_resnet", (32, 16), feature="pooled_root").whitening is None


def test_a_training_tests_and_keeps_what_its_memory_whitens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synthesize(tmp_path, ("campus",), identities=5, image_size=(32, 16))
    settings = {
        "data": {"unlabeled": [], "targets": str(tmp_path / "campus"), "iterations": 2},
        "loss": {"labeled_embedding": 1.0},
        "memory": {"labeled_slots": 30},
        "model": {"feature": "pooled_whitened"},
    }
    tested = []
    embed = DAN.embed
    monkeypatch.setattr(DAN, "embed", lambda self, x: tested.append(self.whitening.matrix.clone()) or embed(self, x))
    trainer = Trainer(config(tmp_path, tmp_path / "run", **settings, run={"evaluate_every": 1}))
    trainer.fit()
    state = load_checkpoint(tmp_path / "run/checkpoint.pt")["model"]
    again = WithinPersonWhitening(len(state["network.whitening.matrix"]))
    again.fit(state["memory.labeled.features"], state["memory.labeled.labels"])
    assert torch.equal(again.matrix, state["network.whitening.matrix"]) and (again.matrix != 0).sum() > len(state)
    network, _ = trained_network(tmp_path / "run/checkpoint.pt")
    assert torch.equal(network.whitening.matrix, again.matrix) and torch.equal(tested[-1], again.matrix)
    assert not torch.equal(tested[0], again.matrix)  # made anew after each epoch

    alone = {**settings, "loss": {"labeled_embedding": 0.0}}
    trainer = Trainer(config(tmp_path, tmp_path / "alone", **alone))
    trainer.fit()
    assert trainer.model.memory is None and torch.equal(tested[-1], torch.eye(len(again.matrix)))


def test_a_training_that_an_error_ends_after_an_epoch_goes_on_with_what_that_whitened(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"data": {"unlabeled": [], "iterations": 2}, "loss": {"labeled_embedding": 1.0},
                "memory": {"labeled_slots": 30}, "optimizer": {"epochs": 1},
                "model": {"feature": "pooled_whitened"}}  # fmt: skip
    trainer = Trainer(config(images, tmp_path / "run", **settings))
    flush = Scalars.flush

    def fails_after_the_epoch(self: Scalars, iteration: int) -> object:
        if iteration == 2:
            raise DanFastError("no space left")
        return flush(self, iteration)

    with monkeypatch.context() as patched, pytest.raises(DanFastError, match="no space left"):
        patched.setattr(Scalars, "flush", fails_after_the_epoch)
        trainer.fit()
    trainer.fit()
    state = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert (state["epoch"], state["iteration"]) == (1, 0)
    again = WithinPersonWhitening(len(state["model"]["network.whitening.matrix"]))
    again.fit(state["model"]["memory.labeled.features"], state["model"]["memory.labeled.labels"])
    assert torch.equal(state["model"]["network.whitening.matrix"], again.matrix)
    assert not torch.equal(again.matrix, torch.eye(len(again.matrix)))
