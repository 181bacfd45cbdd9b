"""A trunk that is cut: the same second derivatives, with less memory."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dan_fast.bench.machine import peak_above
from dan_fast.daml import TracedLosses, meta_gradients, random_state
from dan_fast.daml.cut import Cut
from dan_fast.nn import DAN
from dan_fast.training.objective import Objective
from tests.support import ROOT
from tests.support.steps import split, training_model


class Bypassed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        first = self[0](x)
        return self[2](self[1](first)) + first


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self[1](self[0](x)))


class Losses:
    """A loss of all that a trunk gives, with cuts after some of its modules."""

    def __init__(self, trunk: nn.Sequential, cuts: int) -> None:
        self.trunk, self.cuts = trunk, cuts

    def __call__(self, params: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
        return {"total": functional_call(self.trunk, params, batch).pow(3).mean()}

    def traced(self, params: dict[str, Tensor], batch: Tensor) -> TracedLosses:
        random, cut = random_state(batch.device), Cut(*self.trunk[: self.cuts])
        with cut.watched():
            features = functional_call(self.trunk, params, batch)
        self.preceding = cut.find(features, params)
        constants = {name: value.detach() for name, value in params.items()}

        def again(values: dict[str, Tensor]) -> Tensor:
            return functional_call(self.trunk, {**constants, **values}, batch)

        return TracedLosses({"total": features.pow(3).mean()}, features, params, again, random, cut=cut)


def trunk_of(kind: type[nn.Sequential], channels: int, blocks: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        (nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Dropout(0.3), nn.ReLU(inplace=True))
        for _ in range(blocks)
    ]
    return kind(*(nn.Sequential(*each) for each in layers)).to(dtype)


@pytest.mark.filterwarnings("error:order 2 goes by double backward")
@pytest.mark.parametrize(
    "kind, cuts, frozen, preceding",
    [
        (nn.Sequential, 2, "-", "01"),
        (nn.Sequential, 1, "-", "0"),
        (nn.Sequential, 2, "0", "1"),
        (nn.Sequential, 3, "2", "01"),
        (nn.Sequential, 1, "0", ""),
        (Bypassed, 1, "-", "0"),
        (Bypassed, 2, "-", ""),
        (Twice, 2, "-", ""),
    ],
)
def test_a_cut_changes_no_derivative(kind, cuts, frozen, preceding):
    trunk = trunk_of(kind, 3, 3, torch.float64)
    params = {name: value.detach() for name, value in trunk.named_parameters()}
    batches = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    groups = {"all": ([name for name in params if name[0] != frozen], "total")}
    found = []
    for each in (cuts, 0):
        torch.manual_seed(1)
        losses = Losses(trunk, each)
        found.append(meta_gradients(losses, params, groups, *batches, inner_lr=0.5).grads)
        assert {name[0] for name in losses.preceding} == (set(preceding) if each else set())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "backbone, first",
    [
        ("resnet18", {"conv1", "bn1", "layer1"}),
        ("timm:efficientnet_lite0", {"model"}),
        ("timm:test_vit", set()),
    ],
)
def test_a_backbone_with_stages_is_cut_early(backbone, first):
    network = DAN(num_classes=3, backbone=backbone, image_size=(64, 32), reduction=2)
    model = training_model(network=network)
    params = dict(model.named_parameters())
    half = split()._replace(images=torch.randn(7, 3, 64, 32))
    losses = Objective(model).traced(params, half)
    found = losses.cut.find(losses.features, params)
    assert {name.split(".")[2] for name in found} == first


def peaks(runs: int) -> None:
    """Print the memory of an iteration of each order, and of order 2 without cuts: the median of so many runs."""
    torch.set_num_threads(1)
    trunk = trunk_of(nn.Sequential, 16, 6, torch.float32)
    params = {name: value.detach() for name, value in trunk.named_parameters()}
    batches = torch.randn(2, 4, 16, 32, 32)
    for order, cuts in ((1, 0), (2, 4), (2, 0)):

        def run(order: int = order, cuts: int = cuts) -> None:
            meta_gradients(Losses(trunk, cuts), params, None, *batches, inner_lr=0.1, order=order)

        run()
        print(sorted(peak_above(torch.device("cpu"), run)[1] for _ in range(runs))[runs // 2])


GIVEN_BACK = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
KEPT = {"MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_MMAP_MAX_": "0"}


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system tells no peak of memory")
# What a run finds in a kept heap depends on those before it.
@pytest.mark.parametrize(("heap", "runs"), [(GIVEN_BACK, 1), (KEPT, 5)], ids=["given back", "kept"])
def test_a_cut_trunk_takes_little_more_memory_than_order_1(heap, runs):
    command = [sys.executable, "-c", f"from tests.daml.test_cut import peaks; peaks({runs})"]
    # How a kept heap falls into pieces differs from process to process: 1.00 to 1.23 times in nineteen of them, one of
    # which may be an outlier. What takes more takes it in the second one too.
    for _ in range(2):
        ran = subprocess.run(command, cwd=ROOT, env=os.environ | heap, capture_output=True, text=True, check=True)
        first, cut, whole = map(int, ran.stdout.split())
        if cut < 1.3 * first < 1.35 * first < whole:
            break
    # Under a kept heap order 2 takes 1.5 times as much where each gradient lies alone.
    assert cut < 1.3 * first < 1.35 * first < whole
