"""benchmarks/experiments/changes: each change does what its docstring says, and nothing once it is left."""

import copy
import os
import runpy
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dan_fast.nn.attention as attention_module
import dan_fast.training.step as step_module
from dan_fast.core.types import MemoryState
from dan_fast.daml import Stage
from dan_fast.data import BatchPlanner, Sample, Split
from dan_fast.data.synthetic import synthesize
from dan_fast.functional import memory_step
from dan_fast.functional.attention import variants
from dan_fast.functional.memory import scan_torch
from dan_fast.functional.memory.false_sets import FalseSampleSets
from dan_fast.functional.memory.scan import MemoryScan
from dan_fast.nn import DAN, NLCBAM, ProgressiveAugmentedMemory
from dan_fast.training import MetaStep, StepResult, Trainer, TrainingModel
from dan_fast.training.batches import TrainingBatches
from dan_fast.training.build import initial_network
from tests.support import in_checkout
from tests.support.steps import split, tiny_step, training_model
from tests.support.training_runs import command, config

FOLDER = str(in_checkout("benchmarks/experiments/changes"))
RUN = runpy.run_path(FOLDER)
CHANGES, CLUSTERED = RUN["CHANGES"], RUN["unlabelled"].clustered
CAM, LABELS = torch.linspace(-1, 1, 30).reshape(5, 6).sin(), torch.tensor([4, -1])


@pytest.fixture
def attention() -> NLCBAM:
    torch.manual_seed(0)
    return NLCBAM(channels=6, positions=4, reduction=2).double()


def features() -> torch.Tensor:
    return torch.rand(2, 6, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def head(attention: NLCBAM, x: torch.Tensor, cam_weight: torch.Tensor = CAM) -> SimpleNamespace:
    """The head's output, with A, B and C of Eq. (3) and both maps of Eq. (4) worked out beside it."""
    out = attention.head(x, cam_weight.double(), LABELS)
    scaled = x.flatten(2) * out.channel_attention[:, :, None]
    g, m = scaled.mean(1), scaled.amax(1)
    w = attention.weights
    a, b, c = (
        torch.sigmoid((v @ reduce.T).relu() @ expand.T)
        for v, reduce, expand in ((g, w.ws1, w.ws2), (m, w.ws1, w.ws2), (g, w.ws3, w.ws4))
    )
    maps = g * out.spatial_attention, torch.einsum("c,bcp->bp", cam_weight[4].double(), x.flatten(2))
    return SimpleNamespace(**out._asdict(), a=a, b=b, c=c, maps=maps)


def test_readings_of_spatial_attention(attention: NLCBAM) -> None:
    with CHANGES["softmax_over_p"]():
        over_p = head(attention, features())
    with CHANGES["spatial_attention_is_c"]():
        out = head(attention, features())
    torch.testing.assert_close(out.spatial_attention, out.c)
    for out, dim in ((over_p, 1), (head(attention, features()), 2)):
        weights = torch.softmax(out.a[:, :, None] * out.b[:, None, :], dim=dim)
        torch.testing.assert_close(out.spatial_attention, torch.einsum("bpq,bq->bp", weights, out.c))


def test_attention_as_residual(attention: NLCBAM) -> None:
    before = head(attention, features())
    with CHANGES["attention_as_residual"]():
        out = head(attention, features())
    torch.testing.assert_close(out.attended, before.attended + before.pooled)
    torch.testing.assert_close(out.adversary_loss, before.adversary_loss)


def test_adversary_factor_constant(attention: NLCBAM) -> None:
    x = features()
    with CHANGES["adversary_factor_constant"]():
        out = head(attention, x)
    torch.testing.assert_close(out.adversary_loss, head(attention, x).adversary_loss)
    refined, adversary = out.maps
    by_hand = (torch.sigmoid(refined + adversary).detach() * torch.sigmoid((refined - adversary).abs())).sum(1)
    grad, expected = (
        torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (out.adversary_loss.sum(), by_hand[0])
    )
    torch.testing.assert_close(grad, expected)


def test_adversary_maps_from_0_to_1(attention: NLCBAM) -> None:
    with CHANGES["adversary_maps_from_0_to_1"]():
        out, of_larger_weights = (head(attention, features(), cam) for cam in (CAM, 3 * CAM))
    refined, adversary = ((each - each.min()) / (each.max() - each.min()) for each in (maps[0] for maps in out.maps))
    expected = (torch.sigmoid(refined + adversary) * torch.sigmoid((refined - adversary).abs())).sum()
    torch.testing.assert_close(out.adversary_loss, torch.stack([expected, torch.zeros_like(expected)]))
    torch.testing.assert_close(of_larger_weights.adversary_loss, out.adversary_loss)


def record(attention: torch.Tensor, adversary: torch.Tensor) -> SimpleNamespace:
    """Of a pass with an image of person 0 and one of person 1, by both branches' logits."""
    labels, fault = torch.tensor([0, 1]), torch.tensor(0)
    return SimpleNamespace(logits=attention, adversary_logits=adversary, labels=labels, fault=fault)


def test_running_accuracies() -> None:
    right, wrong, half = torch.eye(2), torch.eye(2).flip(0), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    meta_step = tiny_step(procedure="daml3", stall_guard=0)
    with CHANGES["running_accuracies"]():
        decided = [meta_step._compete(record(*each)) for each in [(right, half), *[(wrong, half)] * 14]]
    # 1 falls to 0.95^n beside 0.5, which it is below from n = 14 on.
    assert decided == [Stage.ATTENTION] * 14 + [Stage.ADVERSARY]


@pytest.mark.parametrize("name", ["parted_by_camera", "parted_by_source"])
def test_parted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = BatchPlanner(torch.arange(120) % 5, num_unlabeled=0, batch_size=16)
    expected = planner.plan_epoch(0)
    # Of three cameras, which are not known here for sources, and of three sources, one of which is reached by a link.
    for source in range(3):
        (tmp_path / f"set{source}").mkdir()
    (tmp_path / "link").symlink_to("set1")
    folders = ["set0", "link", "set2"]
    by_source = name == "parted_by_source"
    samples = [
        Sample(tmp_path / folders[index % 3] / f"{index}.jpg", 0, -1 if by_source else index % 3)
        for index in range(120)
    ]
    training_set = SimpleNamespace(
        labeled_samples=samples, roots=tuple(os.path.realpath(tmp_path / f"set{source}") for source in range(3))
    )
    monkeypatch.setattr(
        TrainingBatches, "__init__", lambda self, config, training_set: setattr(self, "planner", planner)
    )
    with CHANGES[name]():
        TrainingBatches(None, training_set)
        plans = planner.plan_epoch(0)
    for plan, before in zip(plans, expected, strict=True):
        assert sorted(sum(plan, ())) == sorted(sum(before, ()))
        train, test = ({item.index % 3 for item in part} for part in plan)
        assert train and test and not train & test
    assert len({frozenset(item.index % 3 for item in plan.meta_train) for plan in plans}) > 1


def test_keys_of_a_momentum_encoder() -> None:
    labeled = Split(*(part[:3] for part in split()[:3]), num_labeled=3, num_fed_back=0)
    meta_step = tiny_step(training_model(labeled_embedding=1.0), lr=5.0, procedure="daml1")
    backbone, memory = meta_step.model.network.backbone, meta_step.model.memory
    torch.nn.init.constant_(memory.alpha, -40.0)
    teacher = copy.deepcopy(backbone)
    with CHANGES["keys_of_a_momentum_encoder"]():
        for _ in range(2):
            with torch.no_grad():
                for of_teacher, trained in zip(teacher.parameters(), backbone.parameters(), strict=True):
                    of_teacher.lerp_(trained, 0.01)
            memory.labeled = MemoryState.empty(4, memory.labeled.features.shape[1])
            meta_step.step(labeled)
    written = memory.labeled.features[memory.labeled.labels >= 0]
    expected = teacher(labeled.images).mean((2, 3))[:, : written.shape[1]]
    torch.testing.assert_close(written, expected)


def test_projected_keys() -> None:
    labeled = Split(*(part[:3] for part in split()[:3]), num_labeled=3, num_fed_back=0)
    with CHANGES["projected_keys"]():
        meta_step = tiny_step(training_model(labeled_embedding=1.0), procedure="daml1")
        network, memory, projector = meta_step.model.network, meta_step.model.memory, meta_step.model.projector
        torch.nn.init.constant_(memory.alpha, -40.0)
        same, twin = copy.deepcopy(network), copy.deepcopy(projector)
        meta_step.step(labeled)
        written = memory.labeled.features[memory.labeled.labels >= 0].clone()
        meta_step.step(labeled)  # M had no slot of a person before
    torch.testing.assert_close(written, twin(same(labeled.images).pooled[:, : written.shape[1]]))
    assert all(not torch.equal(*pair) for pair in zip(projector.parameters(), twin.parameters(), strict=True))
    assert network.embed(labeled.images).shape == (3, network.classifier.in_features)


def test_uniform_slots() -> None:
    torch.manual_seed(0)
    memory = ProgressiveAugmentedMemory(4, 4, key_dim=3)
    keys, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 2])
    memory(keys, labels, keys[:0], labels[:0])
    state, queries = memory.labeled, torch.randn(2, 3)
    before = memory.labeled_loss(queries, labels[1:3], 0.1)
    with CHANGES["uniform_slots"]():
        added = memory.labeled_loss(queries, labels[1:3], 0.1) - before
    for row, query in enumerate(queries):
        others = F.normalize(state.features[state.labels != labels[1 + row]], dim=1)
        energies = torch.exp(-2 * (F.normalize(query, dim=0) - others).square().sum(1))
        torch.testing.assert_close(added[row], energies.mean().log())


def test_logits_of_equal_scale() -> None:
    attention = torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.0]])

    def stage(adversary: torch.Tensor) -> Stage:
        return tiny_step(procedure="daml3", stall_guard=0)._compete(record(attention, adversary))

    # A larger scale alone wins as printed; with scales made equal the direction decides.
    worse = torch.tensor([[4.0, 0.0, 3.0], [0.0, 4.0, 3.0]])
    better = torch.tensor([[0.5, -0.2, -0.2], [-0.2, 0.5, -0.2]])
    assert [stage(worse), stage(better)] == [Stage.ADVERSARY, Stage.ATTENTION]
    with CHANGES["logits_of_equal_scale"]():
        assert [stage(worse), stage(better)] == [Stage.ATTENTION, Stage.ADVERSARY]


def test_lenders_are_normalised_apart() -> None:
    given = {"image_size": (32, 32), "attention": "none", "adversary": False, "style_mixing": True}
    network = DAN(3, backbone="timm:tf_efficientnet_lite0", **given)
    images = torch.randn(6, 3, 32, 32)
    images[4:] *= 7
    norm = network.backbone.model.bn1
    norm.momentum, outputs = 1.0, []
    norm.register_forward_hook(lambda module, inputs, output: outputs.append((inputs[0], output)))
    with CHANGES["lenders_normalised_apart"]():
        assert network.maps(images, lenders=2).shape[0] == 4
    ((x, out),) = outputs
    torch.testing.assert_close(norm.running_mean, x[:4].mean((0, 2, 3)))
    for part in (slice(4), slice(4, 6)):
        mean, variance = x[part].mean((0, 2, 3), keepdim=True), x[part].var((0, 2, 3), correction=0, keepdim=True)
        torch.testing.assert_close(out[part], norm.act((x[part] - mean) / (variance + norm.eps).sqrt()))


def of_angles(slots: list[tuple[float, int]]) -> MemoryState:
    """Slots in the plane, each at an angle in degrees and with a label, and an empty one, the least used.

    Their images are 0, 10, 20, ...
    """
    at = torch.tensor([angle for angle, _ in slots]).deg2rad()
    ids = [10 * place for place in range(len(slots))]
    return MemoryState(
        features=torch.stack([F.pad(at.cos(), (0, 1)), F.pad(at.sin(), (0, 1))], 1),
        labels=torch.tensor([*(label for _, label in slots), -1]),
        usage=torch.tensor([*(1.0 for _ in slots), 0.0]),
        evaluation=torch.zeros(len(slots) + 1),
        least_used=torch.tensor(len(slots)),
        sample_ids=torch.tensor([*ids, -1]),
    )


@pytest.mark.parametrize(
    ("same", "others", "left", "false"),
    [
        # Cosines of 0.5 outside of the n largest and 0.545 inside: not false any more, for want of a margin.
        ([60.0, 20.0], [57.0], [60.0, 20.0, 57.0], None),
        ([75.0, 20.0], [57.0], [20.0], ([75.0], [57.0])),
        ([60.0, 75.0, 80.0], [57.0, 58.0, 20.0], [60.0, 57.0, 58.0], ([75.0, 80.0], [20.0])),
        # One set is empty, so there is nothing to compare: 0.57 is 0.07 above 0.5, but 0.17 is 0.4 below 0.57.
        ([60.0, 80.0], [55.0, 56.0], [60.0, 55.0, 56.0], None),
    ],
)
def test_margin_in_eq_14(same: list[float], others: list[float], left: list[float], false) -> None:
    slots = [*((angle, 7) for angle in same), *((angle, 8) for angle in others)]
    key, none, gate = torch.tensor([[1.0, 0.0]]), torch.empty(0).long(), torch.tensor(-40.0)

    def stepped() -> tuple[set[float], float]:
        memories = of_angles([(0.0, 7)]), of_angles(slots)
        step = memory_step(*memories, key[:0], none, key, torch.tensor([99]), gate, gate, torch.tensor(0.5))
        kept = (step.unlabeled.sample_ids[: len(slots)] == 10 * torch.arange(len(slots))).tolist()
        return {angle for (angle, _), each in zip(slots, kept, strict=True) if each}, float(step.loss)

    def mean(angles: list[float]) -> torch.Tensor:
        return torch.tensor(angles).deg2rad().cos().exp().mean()

    with CHANGES["margin_in_eq_14"]():
        kept, loss = stepped()
    assert kept == set(left)
    expected = 0.0 if false is None else -torch.log(mean(false[0]) / (mean(false[0]) + mean(false[1]))) / 2
    assert loss == pytest.approx(float(expected), abs=1e-6)
    assert stepped()[0] == {20.0} & set(same)


def test_confident_feedback() -> None:
    memory = ProgressiveAugmentedMemory(5, 7, key_dim=2)
    memory.labeled = of_angles([(0, 1), (90, 2), (180, 3), (181, 4)])
    # Sure; not the nearest of the nearest; another person by now; between two persons; sure.
    memory.unlabeled = of_angles([(2, 1), (10, 1), (92, 3), (179.5, 3), (-84, 2), (97, 2)])._replace(
        sample_ids=torch.tensor([0, 10, 20, 30, 40, 50, -1])
    )
    planner = BatchPlanner(torch.arange(60) % 5, num_unlabeled=60, batch_size=16, iterations=4)
    feedback = torch.tensor([3, 1, 4, 15, 9]), torch.tensor([0, 1, 2, 3, 4])
    places = planner._feedback_places
    with CHANGES["confident_feedback"]():
        ids, labels = memory.reliable_samples()
        plans = {epoch: planner.plan_epoch(epoch, feedback) for epoch in (1, 2)}
        few = planner.plan_epoch(2, tuple(each[:1] for each in feedback))
    assert (ids.tolist(), labels.tolist()) == ([0], [1])
    fed = {
        epoch: [item.index for plan in of for item in plan.meta_test if item.kind == "fed_back"]
        for epoch, of in plans.items()
    }
    assert places == 2 and fed[1] == [] and len(fed[2]) == 4 == len({*fed[2]}) and {*fed[2]} <= {3, 1, 4, 15, 9}
    assert [sum(item.kind == "fed_back" for item in plan.meta_test) for plan in few] == [1, 0, 0, 0]
    assert all(len(plan.meta_test) == len(plan.meta_train) == 8 for plan in (*plans[1], *plans[2], *few))


def test_clusters_are_of_reciprocal_neighbours_and_random_features_have_none() -> None:
    torch.manual_seed(0)
    of_persons = torch.nn.functional.one_hot(torch.arange(4), 20).float().repeat_interleave(12, 0)
    features = torch.cat([of_persons + 0.02 * torch.randn(48, 20), torch.eye(20)[10:13], -torch.eye(20)[:9]])
    clusters = CLUSTERED(features, k1=8)
    own = clusters[:48].reshape(4, 12)
    assert (own == own[:, :1]).all() and sorted(own[:, 0]) == [0, 1, 2, 3] and (clusters[48:51] == -1).all()
    for nowhere in (CLUSTERED(features, k1=8, least=len(features)), CLUSTERED(torch.randn(300, 400))):
        assert (nowhere == -1).all()


@pytest.mark.slow
def test_clusters_as_persons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize(tmp_path, ("campus", "mall"), identities=5, image_size=(32, 16), test_fraction=0.0)
    both = [str(tmp_path / name) for name in ("campus", "mall")]
    settings = {"loss": {"labeled_embedding": 1.0}, "meta": {"procedure": "daml1"}, "memory": {"labeled_slots": 200},
                "model": {"attention": "none", "adversary": False}, "optimizer": {"epochs": 3}}  # fmt: skip
    trainer = Trainer(
        config(tmp_path, tmp_path / "run", **settings, data={"labeled": both, "unlabeled": [], "iterations": 3})
    )
    known = int(trainer.training_set.labels.max() + 1) // 2
    strange = torch.tensor(["mall" in str(sample.path) for sample in trainer.training_set.labeled_samples])
    found = [np.arange(int(strange.sum())) % 3 - 1, np.arange(int(strange.sum())) % 2 * 5 - 1]
    seen: list[tuple[int, Split]] = []
    step = MetaStep.gradients

    def noted(self: MetaStep, split: Split, none: None) -> StepResult:
        seen.append((trainer.epoch, split))
        return step(self, split, none)

    monkeypatch.setattr(MetaStep, "gradients", noted)
    with (
        CHANGES["clusters_as_persons"](),
        patch.object(RUN["unlabelled"], "clustered", lambda features: found.pop(0)),
    ):
        trainer.fit()
    labels = [torch.cat([split.labels for of, split in seen if of == epoch]) for epoch in range(3)]
    assert labels[0].max() < known and labels[1].min() < known
    assert set(labels[1].tolist()) <= {*range(known + 2)} and labels[1].max() >= known
    assert set(labels[2].tolist()) <= {*range(known), known + 4} and labels[2].max() == known + 4
    # Those of the epoch before are gone.
    assert set(trainer.model.memory.labeled.labels.tolist()) <= {-1, *range(known), known + 4}
    persons = trainer.training_set.labels.clone()
    persons[strange] = torch.arange(int(strange.sum())) % 2 * (known + 5) - 1
    for plan in trainer.batches.planner.batches(2):
        assert all(item.label == persons[item.index] for item in plan.meta_train)
    # Nothing has trained the classifier's rows of persons that are not known, but weight decay.
    rows = trainer.model.network.classifier.weight[known:]
    network = initial_network(trainer.config.to_dict(), trainer.training_set.num_classes)
    first = network.classifier.weight[known:]
    torch.testing.assert_close(rows, first * (rows[0, 0] / first[0, 0]))


PATCHED = [
    (attention_module, "attention_head"), (variants, "spatial_attention_of"), (variants, "adversary_loss"),
    (MetaStep, "_compete"), (TrainingBatches, "__init__"), (BatchPlanner, "batches"), (TrainingModel, "maps"),
    (ProgressiveAugmentedMemory, "forward"), (ProgressiveAugmentedMemory, "labeled_loss"),
    (F, "cross_entropy"), (Trainer, "_train_epoch"), (step_module, "attention_wins"), (MemoryScan, "serves"),
    (FalseSampleSets, "form"), (scan_torch, "_false_loss"), (ProgressiveAugmentedMemory, "reliable_samples"),
    (F, "batch_norm"), (DAN, "maps"), (DAN, "__init__"), (TrainingModel, "__init__"),
]  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_ends_with_its_context(name: str) -> None:
    before = [getattr(*place) for place in PATCHED]
    with CHANGES[name]():
        assert [getattr(*place) for place in PATCHED] != before
    assert [getattr(*place) for place in PATCHED] == before


@pytest.mark.slow
def test_a_change_without_effect_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize(tmp_path, ("campus",), identities=4, image_size=(32, 16), test_fraction=0.0)
    flags = ["--recipe", "plain", "--data.labeled", str(tmp_path / "campus"), "--data.iterations", "1"]
    monkeypatch.setattr("sys.argv", ["changes", "softmax_over_p", *command(tmp_path / "run", *flags)[1:]])
    with pytest.raises(SystemExit, match="^softmax_over_p had no effect with these settings"):
        runpy.run_path(FOLDER, run_name="__main__")


def test_a_name_that_does_not_exist_lists_those_that_do(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["changes", "softmax"])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(FOLDER, run_name="__main__")
    assert all(name in str(refused.value) for name in CHANGES)
