"""The training loop on a handful of tiny images: losses, freezing, checkpoints, resuming, bad input."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dan_fast.core.errors import DanFastError
from dan_fast.daml import Stage, active_groups, attention_wins, meta_gradients
from dan_fast.data import Split
from dan_fast.data.synthetic import synthesize
from dan_fast.nn import DAN, ProgressiveAugmentedMemory
from dan_fast.reference import memory as literal
from dan_fast.reporting.curves import plot_curves, read_scalars
from dan_fast.training import (
    DataConfig,
    Interrupted,
    LossConfig,
    MemoryConfig,
    MetaConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    Trainer,
    trained_network,
)
from dan_fast.training.checkpoint import load_checkpoint, save_checkpoint
from dan_fast.training.display import Display
from dan_fast.training.metrics import Scalars, accuracy
from dan_fast.training.objective import DivergedError, Objective, TrainingModel
from tests.support.tiny_training import tensors_and_values

pytestmark = pytest.mark.slow

IMAGE_SIZE = (32, 32)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    synthesize(root, ["campus", "mall"], identities=6, cameras=2, images_per_camera=2, image_size=IMAGE_SIZE, seed=1,
               test_fraction=0.34)  # fmt: skip
    return root


def config(images: Path, out: Path, **sections) -> TrainConfig:
    base = TrainConfig(
        data=DataConfig(
            labeled=str(images / "campus"),
            unlabeled=str(images / "mall"),
            image_size=IMAGE_SIZE,
            batch_size=8,
            workers=0,
        ),
        model=ModelConfig(backbone="resnet18", weights="none"),
        memory=MemoryConfig(labeled_slots=7, unlabeled_slots=5),
        optimizer=OptimizerConfig(epochs=2, lr_scale=10.0),
        run=RunConfig(out=str(out), device="cpu", log_every=1, checkpoint_every=100),
    )
    for section, values in sections.items():
        base = replace(base, **{section: replace(getattr(base, section), **values)})
    return base


def assert_same_state(first: Path, second: Path) -> None:
    one, other = (tensors_and_values(load_checkpoint(path)) for path in (first, second))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name.startswith("/config/run"):
            continue
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


class TinyMap(nn.Module):
    """A backbone of one convolution, so that a loss can be followed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, images):
        return self.conv(images).relu()


def training_model(prior: float = 0.1, memory: bool = True) -> TrainingModel:
    torch.manual_seed(0)
    network = DAN(num_classes=3, backbone=TinyMap(), image_size=(8, 8), reduction=2, dropout=0.0)
    held = ProgressiveAugmentedMemory(4, 4, key_dim=network.key_dim) if memory else None
    return TrainingModel(network, held, LossConfig(confidence_prior=prior))


def split() -> Split:
    torch.manual_seed(5)
    return Split(
        images=torch.randn(7, 3, 8, 8),
        labels=torch.tensor([0, 1, 2, 1, -1, -1, -1]),
        sample_ids=torch.tensor([-1, -1, -1, 9, 4, 5, 6]),
        num_labeled=3,
        num_fed_back=1,
    )


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


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("stage", [Stage.ATTENTION, Stage.BOTH])
def test_gates_follow_the_same_gradient_in_the_group_of_the_backbone_with_order_1(monkeypatch, stage, order):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # all of it in float64

    def gradients(joined: bool) -> dict[str, torch.Tensor]:
        model, batch = training_model().double(), split()
        batch = batch._replace(images=batch.images.double())
        model(batch)  # so that no memory is empty
        params = dict(model.named_parameters())
        gates = [name for name in params if name.startswith("memory.")]
        attention = [name for name in params if ".attention." in name]
        backbone = [name for name in params if name not in (*gates, *attention)]
        groups = active_groups(stage, backbone, attention, gates, "network.classifier.weight")
        if joined:
            del groups["memory"]
            groups["backbone"] = ([*backbone, *gates], "total")
        objective = Objective(model)
        return meta_gradients(objective, params, groups, batch, batch, inner_lr=0.1, order=order).grads

    apart, joined = gradients(joined=False), gradients(joined=True)
    assert apart.keys() == joined.keys() and apart["memory.alpha"] != 0
    assert all(torch.equal(joined[name], value) for name, value in apart.items()) == (order == 1)


@pytest.mark.parametrize(("order", "walks"), [(1, 2), (2, 4)])
def test_one_walk_of_a_graph_serves_backbone_and_gates_with_order_1(images, tmp_path, monkeypatch, order, walks):
    trainer = Trainer(config(images, tmp_path / "run", meta={"order": order}))
    trainer.competition.decide = lambda attention_won: Stage.ATTENTION
    outer, grad = [], torch.autograd.grad

    def counted(*arguments, **settings):
        # A backward may itself ask for gradients.
        outer.append(torch._C._current_graph_task_id() == -1)
        return grad(*arguments, **settings)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    trainer.train_iteration(next(iter_batches(trainer)), NoScalars())
    assert sum(outer) == walks


def test_the_prior_moves_beta_up_and_the_literal_loss_does_not():
    with_prior, literal = training_model(prior=0.1), training_model(prior=0.0)
    rises = torch.autograd.grad(with_prior(split())[0]["embedding"], with_prior.memory.beta_logit)[0]
    falls = torch.autograd.grad(literal(split())[0]["embedding"], literal.memory.beta_logit)[0]
    torch.testing.assert_close(falls - rises, torch.tensor(0.5 * 0.1 * 0.9))
    assert falls >= 0


def test_without_memory_nothing_of_it_is_in_the_loss():
    model = training_model(memory=False)
    losses, record = model(split())
    assert losses["embedding"] == 0 and record.pseudo_labels.numel() == 0
    assert record.cleared is None


def test_training_runs_to_its_end_and_leaves_a_usable_network(images, tmp_path):
    setup = config(images, tmp_path / "run", data={"targets": str(images / "mall")})
    trainer = Trainer(setup)
    evaluations = trainer.fit()
    assert trainer.epoch == 2 and 0 < evaluations[0].mAP <= 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["epochs"] == 2 and results["targets"][0]["dataset"] == "mall"
    network, settings = trained_network(tmp_path / "run" / "checkpoint.pt")
    probe = torch.randn(2, 3, *IMAGE_SIZE)
    torch.testing.assert_close(network.embed(probe), trainer.model.network.eval().embed(probe))
    assert settings["optimizer"]["epochs"] == 2
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_targets_of_one_name_have_curves_of_their_own(images, tmp_path):
    shutil.copytree(images / "mall", tmp_path / "mall")
    targets = [str(images / "mall"), str(tmp_path / "mall")]
    trainer = Trainer(config(images, tmp_path / "run", data={"targets": targets}, run={"evaluate_every": 1}))
    trainer.epoch, seen = 1, []

    class Seen(NoScalars):
        def add(self, name, value, counts=True):
            seen.append(name)

        def flush(self, step):
            pass

    with Display(1, 0, 1) as display:
        trainer._evaluate_if_due(Seen(), display)
    assert seen == [f"eval/{name}/{figure}" for name in ("mall", "mall-2") for figure in ("R1", "mAP", "mINP")]


def test_a_run_says_what_its_device_makes_of_float32(images, tmp_path, capsys):
    def finished(name: str, **run) -> tuple[str, dict]:
        trainer = Trainer(config(images, tmp_path / name, run=run))
        trainer.epoch = trainer.config.optimizer.epochs
        trainer.fit()
        return " ".join(capsys.readouterr().out.split()), json.loads((tmp_path / name / "results.json").read_text())

    torch.set_float32_matmul_precision("medium")
    try:
        printed, results = finished("float32")
        half, _ = finished("bfloat16", precision="bfloat16")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "Float32 on cpu: bfloat16 in matrix products, as torch.backends has it." in printed
    assert (results["precision"], results["float32"]) == ("float32", "bfloat16 in matrix products")
    assert "Float32 on" not in half


@pytest.mark.parametrize(
    "change",
    [
        {"meta": {"procedure": "daml1"}},
        {"meta": {"procedure": "daml2"}},
        {"meta": {"order": 2}},
        {"data": {"unlabeled": []}},
        {"data": {"unlabeled_share": 0.0}},
        {"memory": {"gates": "features"}},
        {"run": {"precision": "bfloat16"}},
    ],
    ids=str,
)
def test_every_procedure_trains(images, tmp_path, change):
    trainer = Trainer(config(images, tmp_path / "run", optimizer={"epochs": 1}, **change))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.fit()
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert any(name.startswith("network.") for name in moved)
    assert (trainer.model.memory is None) == (change.get("data") is not None)


def test_a_frozen_backbone_does_not_move_by_momentum_or_decay_either(images, tmp_path):
    trainer = Trainer(config(images, tmp_path / "run"))
    attention_wins = iter([True, False, True])

    real = trainer.competition.decide
    trainer.competition.decide = lambda attention_won: real(next(attention_wins))
    plans = iter_batches(trainer)
    snapshots = [snapshot(trainer)]
    for _ in range(3):
        trainer.train_iteration(next(plans), NoScalars())
        snapshots.append(snapshot(trainer))
    backbone, attention = "network.backbone.conv1.weight", "network.attention.wc1"
    cam, norm = "network.classifier.weight", "network.backbone.bn1.bias"

    def moved(step, name):
        return not torch.equal(snapshots[step][name], snapshots[step + 1][name])

    assert [moved(step, backbone) for step in range(3)] == [True, False, True]
    assert [moved(step, norm) for step in range(3)] == [True, False, True]
    assert [moved(step, attention) for step in range(3)] == [False, True, False]
    assert [moved(step, cam) for step in range(3)] == [True, True, True]
    assert all(moved(step, "memory.alpha") for step in range(1, 3))


class NoScalars:
    def add(self, name, value, counts=True):
        pass


def iter_batches(trainer: Trainer):
    from dan_fast.data import training_loader

    trainer.model.train()
    return iter(training_loader(trainer.training_set, trainer.planner.plan_epoch(0) * 3, IMAGE_SIZE))


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def stop_after(trainer: Trainer, iterations: int) -> None:
    """Send this process SIGINT, as Ctrl-C does, in the given iteration of the run."""
    step = trainer.train_iteration

    def interrupted(batch, scalars):
        step(batch, scalars)
        if trainer.iterations_done + 1 == iterations:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.train_iteration = interrupted


def test_a_run_stopped_by_ctrl_c_resumes_bit_for_bit(images, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    # Few checkpoints: the one of the interruption must not change what comes after it.
    whole = config(images, tmp_path / "whole")
    Trainer(whole).fit()
    parts = config(images, tmp_path / "parts")
    for stop in (1, 3):
        trainer = Trainer(replace(parts, run=replace(parts.run, resume=stop > 1)))
        stop_after(trainer, stop)
        torch.rand(3)
        with pytest.raises(Interrupted, match=f"iteration {stop}"):
            trainer.fit()
    last = Trainer(replace(parts, run=replace(parts.run, resume=True)))
    # What a caller draws between making the trainer and starting it must not shift the dropout.
    torch.rand(3)
    last.fit()
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", tmp_path / "parts" / "checkpoint.pt")
    assert signal.getsignal(signal.SIGINT) is handler


def command_line(setup: TrainConfig, *more: str) -> list[str]:
    path = Path(setup.run.out).with_suffix(".yaml")
    path.write_text(json.dumps(setup.to_dict()))
    return [sys.executable, "-m", "dan_fast", "train", "--config", str(path), *more]


def test_a_killed_run_resumes_bit_for_bit(images, tmp_path):
    whole = config(images, tmp_path / "whole", optimizer={"epochs": 6})
    threads = torch.get_num_threads()
    killed = config(images, tmp_path / "killed", optimizer={"epochs": 6}, run={"checkpoint_every": 1})
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command_line(killed), env=environment)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    reached = load_checkpoint(checkpoint)
    assert (reached["epoch"], reached["iteration"]) < (6, 0)
    subprocess.run(command_line(killed, "--run.resume", "true"), env=environment, check=True)
    Trainer(whole).fit()
    assert_same_state(tmp_path / "whole" / "checkpoint.pt", checkpoint)


def test_a_second_run_in_the_same_folder_is_refused(images, tmp_path):
    setup = config(images, tmp_path / "run", optimizer={"epochs": 1})
    Trainer(setup).fit()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(DanFastError, match="already holds a run"):
        Trainer(setup)
    with pytest.raises(DanFastError, match="meta.eta is 2.0 here and 1.0 there"):
        Trainer(replace(setup, meta=MetaConfig(eta=2.0), run=replace(setup.run, resume=True)))
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_dataset_may_move_between_stop_and_resume(images, tmp_path):
    setup = config(images, tmp_path / "run", optimizer={"epochs": 1})
    Trainer(setup).fit()
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    data = replace(setup.data, labeled=str(moved / "campus"), unlabeled=str(moved / "mall"), broken_images="skip")
    assert Trainer(replace(setup, data=data, run=replace(setup.run, resume=True))).epoch == 1


def test_what_no_weight_shows_is_in_the_checkpoint_too(images, tmp_path):
    setup = config(images, tmp_path / "run")
    trainer = Trainer(setup)
    trainer.competition.adversary_streak = 7
    trainer.feedback = torch.tensor([3, 1]), torch.tensor([0, 2])
    trainer.skipped = {"b.jpg", "a.jpg"}
    trainer.epoch, trainer.iteration = 1, 0
    trainer._save()
    resumed = Trainer(replace(setup, run=replace(setup.run, resume=True)))
    assert resumed.competition.adversary_streak == 7
    assert [each.tolist() for each in resumed.feedback] == [[3, 1], [0, 2]]
    assert resumed.skipped == {"a.jpg", "b.jpg"} and (resumed.epoch, resumed.iteration) == (1, 0)


def test_a_run_on_other_images_is_refused(images, tmp_path):
    setup = config(images, tmp_path / "run", optimizer={"epochs": 1})
    Trainer(setup).fit()
    path = tmp_path / "run" / "checkpoint.pt"
    state = load_checkpoint(path)
    save_checkpoint(path, {**state, "fingerprint": "of other images"})
    with pytest.raises(DanFastError, match="was trained on other images"):
        Trainer(replace(setup, run=replace(setup.run, resume=True)))


def test_resuming_without_a_checkpoint_is_an_error(images, tmp_path):
    with pytest.raises(DanFastError, match="checkpoint.pt does not exist"):
        Trainer(config(images, tmp_path / "run", run={"resume": True}))


def test_no_labelled_images_and_targets_without_test_images_are_errors(images, tmp_path):
    with pytest.raises(DanFastError, match="data.labeled is empty"):
        Trainer(config(images, tmp_path / "run", data={"labeled": []}))
    train_only = tmp_path / "train_only"
    synthesize(train_only, ["mall"], identities=2, image_size=IMAGE_SIZE, test_fraction=0.0)
    with pytest.raises(DanFastError, match="mall .* has neither query and gallery nor test images"):
        Trainer(config(images, tmp_path / "run", data={"targets": str(train_only / "mall")}))
    assert not (tmp_path / "run").exists()


def test_an_unknown_device_is_an_error(images, tmp_path):
    for device in ("gpu", "cuda:99", "mps"):
        with pytest.raises(DanFastError, match=f"{device}"):
            Trainer(config(images, tmp_path / "run", run={"device": device}))


def test_a_diverged_run_says_so_and_keeps_its_checkpoint(images, tmp_path):
    setup = config(images, tmp_path / "run", optimizer={"epochs": 50, "lr_scale": 1e9}, run={"checkpoint_every": 1})
    with pytest.raises(DanFastError, match=r"diverged at iteration \d+ \(.* not finite\).*lower optimizer.lr_scale"):
        Trainer(setup).fit()
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert state["epoch"] + state["iteration"] >= 1
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())


def test_weights_that_are_not_finite_never_reach_the_checkpoint(images, tmp_path):
    setup = config(images, tmp_path / "run", optimizer={"epochs": 1})
    trainer = Trainer(setup)
    trainer.fit()
    before = trainer.checkpoint.read_bytes()
    with torch.no_grad():
        trainer.model.network.backbone.bn1.running_var[0] = float("inf")
    with pytest.raises(DivergedError, match="weights are not finite"):
        trainer._save()
    assert trainer.checkpoint.read_bytes() == before


def test_gradients_that_are_not_finite_do_not_move_the_weights(images, tmp_path, monkeypatch):
    trainer = Trainer(config(images, tmp_path / "run"))

    def poisoned(*arguments, **settings):
        result = meta_gradients(*arguments, **settings)
        next(iter(result.grads.values())).fill_(float("nan"))
        return result

    monkeypatch.setattr("dan_fast.training.trainer.meta_gradients", poisoned)
    before = snapshot(trainer)
    with pytest.raises(DivergedError, match="gradients are not finite"):
        trainer.train_iteration(next(iter_batches(trainer)), NoScalars())
    assert all(torch.equal(value, before[name]) for name, value in snapshot(trainer).items())


def test_a_batch_that_cannot_be_normalised_is_told_apart_from_divergence(images, tmp_path):
    with pytest.raises(DanFastError, match="cannot go on at iteration 0: Expected more than 1 value per channel"):
        Trainer(config(images, tmp_path / "run", data={"batch_size": 2})).fit()


@pytest.mark.parametrize("gates", ["parameters", "features"])
def test_gates_memory_and_competition_are_logged(images, tmp_path, gates):
    setup = config(images, tmp_path / "run", optimizer={"epochs": 1}, memory={"gates": gates})
    Trainer(setup).fit()
    names = set(read_scalars(tmp_path / "run"))
    assert {
        *(f"{part}/loss/{loss}" for part in ("train", "test") for loss in ("total", "classification", "adversary")),
        *("train/accuracy/attention", "train/accuracy/adversary", "competition/attention_wins"),
        *("memory/sigma_alpha", "memory/sigma_alpha_unlabeled", "memory/beta", "memory/slots_labeled"),
    } <= names


# What to watch in training, and the range that it and the mean over a window cannot leave.
WATCHED = {
    "competition/ties": (0, 1),
    "competition/backbone_frozen": (0, 1),
    "train/logit_norm/attention": (1e-6, math.inf),
    "train/logit_norm/adversary": (1e-6, math.inf),
    "attention/spatial_spread": (0, 1),
    "memory/slots_unlabeled": (1, 5),
    "memory/cleared_a_sample": (0, 5),
    "pseudo/purity": (0, 1),
    "pseudo/fed_back_right": (0, 0),  # persons of their own
    "train/loss/labeled_embedding": (0, math.inf),
}


def test_what_to_watch_is_in_the_event_file_and_in_the_picture(images, tmp_path):
    trainer = Trainer(config(images, tmp_path / "run", loss={"labeled_embedding": 0.5}))
    assert (trainer.training_set.true_ids >= 0).all() and (trainer.training_set.true_labels == -1).all()
    trainer.fit()
    scalars = read_scalars(tmp_path / "run")
    assert set(WATCHED) <= set(scalars)
    for tag, (lowest, highest) in WATCHED.items():
        assert ((scalars[tag][1] >= lowest) & (scalars[tag][1] <= highest)).all(), tag
    assert max(scalars["train/loss/labeled_embedding"][1]) > 0
    assert plot_curves(tmp_path / "run", tmp_path / "curves.png").is_file()


def test_one_branch_has_one_logit_norm_and_no_ties_and_no_attention_no_spread(images, tmp_path):
    model = {"attention": "none", "adversary": False}
    Trainer(config(images, tmp_path / "run", optimizer={"epochs": 1}, model=model)).fit()
    names = set(read_scalars(tmp_path / "run"))
    assert "train/logit_norm/attention" in names
    assert not names & {"train/logit_norm/adversary", "competition/ties", "attention/spatial_spread"}


def test_resuming_keeps_the_scalars_of_iterations_that_are_done(tmp_path):
    first = Scalars(tmp_path / "tensorboard")
    for step in (10, 20, 30):
        first.add("eval/mall/R1", float(step))
        first.flush(step)
    first.close()
    second = Scalars(tmp_path / "tensorboard", steps_done=20)
    second.add("eval/mall/R1", 31.0)
    second.flush(30)
    second.close()
    steps, values = read_scalars(tmp_path)["eval/mall/R1"]
    assert list(steps) == [10, 20, 30] and list(values) == [10.0, 20.0, 31.0]


def test_a_full_disk_while_logging_is_one_sentence(tmp_path, monkeypatch):
    scalars = Scalars(tmp_path / "tensorboard")
    scalars.add("train/loss/total", 1.0)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scalars._writer, "flush", full)
    monkeypatch.setattr(scalars._writer, "close", full)
    with pytest.raises(DanFastError, match="tensorboard .No space left on device.: make room"):
        scalars.flush(1)
    scalars.close()


def test_fit_works_outside_the_main_thread(images, tmp_path):
    trainer = Trainer(config(images, tmp_path / "run", optimizer={"epochs": 1}))
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert trainer.epoch == 1
