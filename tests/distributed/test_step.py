"""A meta step of several ranks, against the one that a single rank takes with all images."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import pytest
import torch
from torch import Tensor, distributed

from dan_fast.daml import Stage
from dan_fast.data import Split
from dan_fast.distributed.buckets import add_up
from dan_fast.nn import DAN, ProgressiveAugmentedMemory
from dan_fast.training import LossConfig, MetaConfig, MetaStep, StepResult, TrainingModel
from tests.support.ranks import Collectives, Ranks
from tests.support.steps import decide, tiny_network
from tests.support.tiny_training import OneConvolution

pytestmark = pytest.mark.slow

Group = distributed.ProcessGroup


def whole_split(seed: int, counts: tuple[int, int, int]) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labeled, fed_back, unlabeled = counts
    known = labeled + fed_back
    labels = torch.cat([torch.randint(0, 3, (known,), generator=generator), torch.full((unlabeled,), -1)])
    ids = torch.cat([torch.full((labeled,), -1), torch.arange(fed_back + unlabeled) + 100 * seed])
    images = torch.randn(len(labels), 3, 8, 8, generator=generator, dtype=torch.float64)
    return Split(images, labels, ids, labeled, fed_back)


def share(split: Split, rank: int, sizes: tuple[list[int], ...]) -> Split:
    """The rank's images, `sizes` of each kind on each rank."""
    places, start = [], 0
    for of_kind, count in zip(sizes, split.counts, strict=True):
        first = start + sum(of_kind[:rank])
        places += range(first, first + of_kind[rank])
        start += count
    at = torch.tensor(places, dtype=torch.int64)
    return Split(split.images[at], split.labels[at], split.sample_ids[at], sizes[0][rank], sizes[1][rank])


def uneven(count: int, ranks: int, turn: int) -> list[int]:
    """Shares of which some are empty if there are fewer than `ranks`."""
    sizes = torch.bincount(torch.arange(count) ** 2 % ranks, minlength=ranks).tolist()
    return sizes[turn:] + sizes[:turn]


def step_of(group: Group | None, meta: MetaConfig, gates: str, attention: str, **network) -> MetaStep:
    dan = tiny_network(attention=attention, adversary=attention != "none", **network).double()
    memory = ProgressiveAugmentedMemory(7, 6, dan.key_dim, dtype=torch.float64, gates=gates, process_group=group)
    model = TrainingModel(dan, memory, LossConfig(labeled_embedding=0.7, embedding=2.0), temperature=0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=5e-4)
    return MetaStep(model, optimizer, meta, process_group=group)


def assert_close(found: object, expected: object, name: str) -> None:
    for place, value in enumerate(expected) if isinstance(expected, tuple) else ():
        assert_close(found[place], value, f"{name}[{place}]")
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}")


def assert_same(found: StepResult, expected: StepResult) -> None:
    assert found.grads.keys() == expected.grads.keys() and found.stage == expected.stage
    for which in ("grads", "train_losses", "test_losses", "accuracies"):
        for name, value in getattr(expected, which).items():
            assert_close(getattr(found, which)[name], value, f"{which}[{name}]")
    for which in ("train_record", "test_record"):
        record = getattr(expected, which)
        for field in record._fields if record else ():
            assert_close(getattr(getattr(found, which), field), getattr(record, field), f"{which}.{field}")


def in_float64(function: Callable[..., None]) -> Callable[..., None]:
    """What is cast to float32 stays in float64."""

    @wraps(function)
    def patched(*arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            float_ = Tensor.float
            patch.setattr(Tensor, "float", lambda tensor: tensor if tensor.is_floating_point() else float_(tensor))
            function(*arguments)

    return patched


@in_float64
def same_steps(group: Group, procedure: str, order: int, gates: str, attention: str) -> None:
    meta = MetaConfig(procedure=procedure, order=order, eta=0.7)
    mine, alone = (step_of(each, meta, gates, attention) for each in (group, None))
    for each in (mine, alone):
        decide(each, *([Stage.ATTENTION, Stage.ADVERSARY, Stage.BOTH] * 2))
    ranks = group.size()
    for seed in range(4):
        parts = []
        for half in range(1 if procedure == "daml1" else 2):
            # With fewer unlabelled and fed-back images than ranks, at times, and none of them on any or on one.
            counts = (ranks + 3, half * (seed % 3), (0, 1, 2 * ranks + 1, 2)[seed])
            split = whole_split(10 * seed + half, counts)
            labeled = [1 + extra for extra in uneven(3, ranks, 0)]
            if seed == 2:
                # As where the labelled images of a rank are broken; it has unlabelled ones.
                labeled[(1 - seed) % ranks] += labeled[-seed % ranks]
                labeled[-seed % ranks] = 0
            sizes = (labeled, uneven(counts[1], ranks, 1), uneven(counts[2], ranks, seed % ranks))
            parts.append((share(split, group.rank(), sizes), split))
        found = mine.step(*(part for part, _ in parts))
        assert_same(found, alone.step(*(split for _, split in parts)))
    for one, other in zip(mine.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    nothing = share(whole_split(5, (0, 0, ranks)), group.rank(), ([0] * ranks, [0] * ranks, [1] * ranks))
    with pytest.raises(ValueError, match="no rank has a labelled or fed-back image of it, as where all of them are"):
        mine.step(*[nothing] * len(parts))
    before = {name: value.clone() for name, value in mine.model.state_dict().items()}
    sizes = ([2] + [1] * (ranks - 2) + [0], [0] * ranks, [0] * ranks)
    none_of_last = share(whole_split(6, (ranks, 0, 0)), group.rank(), sizes)
    for place, name in zip(range(len(parts)), ("S", "S~"), strict=False):
        splits = [part for part, _ in parts]
        splits[place] = none_of_last
        with pytest.raises(ValueError, match=f"rank {ranks - 1} has no image of {name}: give each rank one or more"):
            mine.step(*splits)
    assert all(map(torch.equal, mine.model.state_dict().values(), before.values()))


@pytest.mark.parametrize(
    ("procedure", "order", "gates", "attention"),
    [
        ("daml1", 1, "parameters", "nl_cbam"),
        ("daml2", 1, "features", "nl_cbam"),
        ("daml2", 2, "parameters", "none"),
        ("daml3", 1, "parameters", "nl_cbam"),
        ("daml3", 2, "parameters", "nl_cbam"),
        ("daml3", 2, "features", "nl_cbam"),
    ],
)
def test_steps_are_those_of_one_rank(ranks: Ranks, procedure: str, order: int, gates: str, attention: str):
    ranks.run(same_steps, procedure, order, gates, attention)


@in_float64
def same_steps_with_lenders(group: Group, gates: str) -> None:
    """Of style mixing, whose draws are each rank's own, is left that lenders are in no loss and in no memory."""
    ranks = group.size()
    mine, alone = (lending_step(each, gates) for each in (group, None))
    for seed in range(3):
        split = whole_split(seed, (ranks + 3, 0, 2 * ranks + 1))
        labeled = [1 + extra for extra in uneven(3, ranks, seed % ranks)]
        sizes = (labeled, [0] * ranks, uneven(2 * ranks + 1, ranks, seed))
        found = mine.step(share(split, group.rank(), sizes))
        assert_same(found, alone.step(split))
        assert seed == 0 or found.train_losses["labeled_embedding"] > 0
    assert set(mine.model.memory.unlabeled.labels.tolist()) == {-1}
    without = ([0] + [1] * (ranks - 1), [0] * ranks, [1] * ranks)
    with pytest.raises(ValueError, match="rank 0 has no labelled or fed-back image of S"):
        mine.step(share(whole_split(4, (ranks - 1, 0, ranks)), group.rank(), without))


def lending_step(group: Group | None, gates: str) -> MetaStep:
    step = step_of(group, MetaConfig(procedure="daml1"), gates, "none")
    step.model.lending = True
    maps = step.model.network.maps
    step.model.network.maps = lambda images, lenders: maps(images[: len(images) - (lenders or 0)])
    return step


@pytest.mark.parametrize("gates", ["parameters", "features"])
def test_images_that_lend_styles_are_in_no_loss_of_any_rank(ranks: Ranks, gates: str):
    ranks.run(same_steps_with_lenders, gates)


def refuses_alone(group: Group, wrong: str) -> None:
    """The batch of the last rank is none; the others do not wait for it, and the next step is taken."""
    step = step_of(group, MetaConfig(procedure="daml2"), "parameters", "none")
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    parts = [whole_split(seed, (3, 0, 3)) for seed in range(2)]
    if group.rank() < group.size() - 1:
        with pytest.raises(ValueError, match=f"^rank {group.size() - 1} refused its share of the batch: see its error"):
            step.step(*parts)
    elif wrong == "no second part":
        with pytest.raises(ValueError, match="takes batches of two parts"):
            step.step(parts[0])
    elif wrong == "dtype":
        with pytest.raises(TypeError, match="images are torch.float32 and the network is torch.float64"):
            step.step(parts[0], parts[1]._replace(images=parts[1].images.float()))
    else:
        with pytest.raises(ValueError, match="labels"):
            step.step(parts[0], parts[1]._replace(labels=parts[1].labels + 100))
    assert all(map(torch.equal, step.model.state_dict().values(), before.values()))
    step.step(*parts)


@pytest.mark.parametrize("wrong", ["no second part", "dtype", "labels"])
def test_what_one_rank_refuses_all_raise(ranks: Ranks, wrong: str):
    ranks.run(refuses_alone, wrong)


class Normalised(torch.nn.Module):
    """A batch norm that learns, one that is frozen, a constant that no sum can hold, and a weight with gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 4, stride=4)
        self.conv.weight = torch.nn.Parameter(torch.randn(12, 3, 4, 4)[::2])
        self.conv.bias = torch.nn.Parameter(torch.randn(12)[::2])
        self.learns, self.frozen = torch.nn.BatchNorm2d(6), torch.nn.BatchNorm2d(6)
        self.register_buffer("mask", torch.full((2,), torch.finfo(torch.float32).min))

    def forward(self, images: Tensor) -> Tensor:
        return self.frozen(self.learns(self.conv(images))).clamp(min=self.mask[0])


def buffers_and_gaps(group: Group) -> None:
    ones = [torch.ones(4, 3), torch.full((30,), 5.0)]
    like = [torch.zeros(4, 6)[:, :3], torch.zeros(30)]
    for found, own in zip(add_up(group, ones, like), ones, strict=True):
        assert torch.equal(found, own * group.size())
    torch.manual_seed(0)
    network = DAN(CLASSES, backbone=Normalised(), image_size=(16, 16), reduction=2, attention="none", adversary=False)
    step = MetaStep(model := TrainingModel(network.train(), None, LossConfig()), torch.optim.SGD(model.parameters()),
                    MetaConfig(procedure="daml1"), group)  # fmt: skip
    norms = network.backbone.frozen.eval(), network.backbone.learns
    torch.manual_seed(group.rank())
    batch = even_split(0)
    with torch.no_grad():
        own = network.backbone.conv(batch.images).mean((0, 2, 3))
    distributed.all_reduce(own, group=group)
    frozen = norms[0].running_mean.normal_(generator=torch.Generator().manual_seed(group.rank())).clone()
    step.step(batch)
    assert torch.equal(network.backbone.mask, torch.full((2,), torch.finfo(torch.float32).min))
    assert torch.equal(norms[0].running_mean, frozen), "of no rank's images"
    torch.testing.assert_close(norms[1].running_mean, 0.1 * own / group.size())


def test_running_statistics_alone_are_averaged_and_weights_may_have_gaps(ranks: Ranks):
    ranks.run(buffers_and_gaps)


class NoRule(torch.autograd.Function):
    """The identity, without a forward mode where `pass_` is "forward"; else its gradient has none."""

    @staticmethod
    def forward(x: Tensor, pass_: str) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.pass_ = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad if ctx.pass_ == "forward" else NoRule.apply(grad, "forward"), None

    @staticmethod
    def jvp(ctx, tangent: Tensor, _: None) -> Tensor:
        if ctx.pass_ == "forward":
            raise RuntimeError("there is no rule")
        return tangent.clone()


@in_float64
def falls_back(group: Group, pass_: str) -> None:
    """The backbone of one rank alone cannot go forward over reverse."""
    meta = MetaConfig(procedure="daml3", order=2)
    mine, alone = (step_of(each, meta, "parameters", "nl_cbam") for each in (group, None))
    convolution, rank = mine.model.network.backbone.conv, group.rank()
    if rank == group.size() - 1:
        convolution.register_forward_hook(lambda module, given, found: NoRule.apply(found, pass_))
    for each in (mine, alone):
        decide(each, *[Stage.BOTH] * 2)
    sizes = ([2] * group.size(), [0] * group.size(), [1] * group.size())
    for seed in range(2):
        splits = [whole_split(10 * seed + half, tuple(map(sum, sizes))) for half in range(2)]
        reason = "there is no rule" if rank == group.size() - 1 else "it has failed on another rank"
        with nullcontext() if seed else pytest.warns(UserWarning, match=f"order 2 goes by double .*: {reason}"):
            found = mine.step(*(share(each, rank, sizes) for each in splits))
        assert_same(found, alone.step(*splits))


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_a_rank_without_forward_mode_takes_all_by_double_backward(ranks: Ranks, pass_: str):
    ranks.run(falls_back, pass_)


CLASSES, EACH = 40, 3  # images of each kind on each rank, where traffic is counted


def even_split(num_fed_back: int) -> Split:
    labels = torch.cat([torch.arange(EACH + num_fed_back), torch.full((EACH,), -1)])
    ids = torch.cat([torch.full((EACH,), -1), torch.arange(num_fed_back + EACH)])
    return Split(torch.randn(len(labels), 3, 16, 16), labels, ids, EACH, num_fed_back)


def traffic(group: Group, procedure: str, order: int, with_memory: bool) -> None:
    torch.manual_seed(0)
    network = DAN(CLASSES, backbone=OneConvolution(), image_size=(16, 16), reduction=2)
    memory = ProgressiveAugmentedMemory(96, 48, network.key_dim, process_group=group) if with_memory else None
    model = TrainingModel(network, memory, LossConfig())
    meta_step = MetaStep(
        model, torch.optim.SGD(model.parameters(), lr=0.01), MetaConfig(procedure=procedure, order=order), group
    )
    decide(meta_step, Stage.BOTH)
    with Collectives() as sent:
        meta_step.step(even_split(0), even_split(1))
    ranks, trained = group.size(), sum(each.numel() for each in network.parameters())
    found = [8 * (CLASSES + 1) * EACH + 16 * ((EACH if with_memory else 0) + fed_back) + 20 for fed_back in (0, 1)]
    gathered, added, (sums, votes) = 48 + sum(found), 4 * 12, (2, 0) if order == 1 else (3, 2)
    if with_memory:
        own = 2 * EACH * ranks
        rows = 2 * EACH * (4 * network.key_dim + 8)
        scores = 4 * ((own + 1) * 96 + (EACH * ranks + 1) * 48) / ranks
        gathered, added = gathered + 2 * (104 + rows + scores), added + 2 * 4 * own * network.key_dim
    assert sent.calls == {"allgather_base": 9 if with_memory else 3, "allreduce": sums + 1 + 2 * with_memory + votes}
    assert sent.bytes["allgather_base"] == pytest.approx(gathered, rel=0.1)
    assert sent.bytes["allreduce"] == pytest.approx(added + 4 * sums * trained, rel=0.1)


@pytest.mark.parametrize(("procedure", "order", "with_memory"), [("daml3", 1, True), ("daml2", 2, False)])
def test_an_iteration_sends_what_the_page_says(ranks: Ranks, procedure: str, order: int, with_memory: bool):
    ranks.run(traffic, procedure, order, with_memory)
