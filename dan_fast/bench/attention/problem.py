"""What the attention head is timed on: the last map of a backbone, weights, and labels for half of the samples."""

from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.types import NLCBAMWeights
from dan_fast.nn import NLCBAM

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class MapSize(NamedTuple):
    """The last map (B, C, H, W), the ratio r of NL-CBAM's bottlenecks, and the classifier's persons."""

    batch: int = 64
    channels: int = 2048
    height: int = 7
    width: int = 7
    reduction: int = 12
    classes: int = 751

    @property
    def numel(self) -> int:
        return self.batch * self.channels * self.height * self.width


class HeadProblem(NamedTuple):
    """Everything an attention head takes, and the gradient that reaches it.

    Attributes:
        features: (B, C, H, W), the map as a ReLU leaves it.
        weights, cam_weight: in the dtype of statistics.
        labels: (B,) int64, every other one -1, as half a batch is unlabelled.
        slopes: of the loss in `attended`, `pooled` and `adversary_loss`.
    """

    features: Tensor
    weights: NLCBAMWeights
    cam_weight: Tensor
    labels: Tensor
    slopes: tuple[Tensor, Tensor, Tensor]

    def double(self) -> "HeadProblem":
        """The same numbers in float64."""
        weights = NLCBAMWeights(*(_leaf(weight.double()) for weight in self.weights))
        slopes = tuple(slope.double() for slope in self.slopes)
        return HeadProblem(self.features.double(), weights, _leaf(self.cam_weight.double()), self.labels, slopes)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def make_head_problem(
    size: MapSize, dtype: torch.dtype, layout: str, device: torch.device | str, seed: int = 0
) -> HeadProblem:
    """The same map, weights and slopes for the same seed on the same device.

    Example:
        >>> make_head_problem(MapSize(2, 8, 3, 2, classes=5), torch.float32, "channels_last", "cpu").labels.shape
        torch.Size([2])
    """
    device, wide = torch.device(device), statistics_dtype(dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=wide)

    features = draw(*size[:4]).relu_().to(dtype).contiguous(memory_format=LAYOUTS[layout])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        attention = NLCBAM(size.channels, size.height * size.width, size.reduction)
    weights = NLCBAMWeights(*(_leaf(weight.to(device, wide)) for weight in attention.weights))
    cam_weight = _leaf(draw(size.classes, size.channels) / size.channels**0.5)
    labels = torch.randint(size.classes, (size.batch,), generator=generator, device=device)
    labels[1::2] = -1
    attended, pooled = draw(2, size.batch, size.channels)
    slopes = (attended, pooled, torch.full((size.batch,), 1 / size.batch, dtype=wide, device=device))
    return HeadProblem(features, weights, cam_weight, labels, slopes)
