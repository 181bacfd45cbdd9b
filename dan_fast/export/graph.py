"""What of a network goes into an exported file: a module of plain operators, and its description in words."""

import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dan_fast
from dan_fast import _extension
from dan_fast.nn import DAN
from dan_fast.nn.weights_hash import weights_hash


class FeatureGraph(nn.Module):
    """Images at the network's size to their features, (B, C) float32 of unit length.

    Args:
        network: on the CPU; it is changed for the file.
        normalises: takes uint8 RGB (B, 3, H, W) and normalises it; else float32 that has been normalised.
        half: the network in float16. Normalisation, the attention's statistics and the length stay in float32.

    Example:
        >>> graph = FeatureGraph(DAN(2, backbone=nn.Conv2d(3, 4, 3), image_size=(8, 4), reduction=2))
        >>> graph(torch.zeros(2, 3, 8, 4, dtype=torch.uint8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, network: DAN, normalises: bool = True, half: bool = False) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        # Features do not depend on it, and it holds a row for each person trained on.
        network.classifier = nn.Linear(network.classifier.in_features, 1, bias=False).requires_grad_(False)
        self.normalises = normalises
        self.dtype = torch.float16 if half else torch.float32
        self.network.to(self.dtype)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in network.preprocessing[:2])
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if self.normalises:
            images = (images.float() / 255 - self.mean) / self.std
        return F.normalize(self.network.embed(images.to(self.dtype)).float(), dim=1)


def traced(graph: FeatureGraph) -> torch.export.ExportedProgram:
    """`torch.export` of the graph for batches of any size, in PyTorch's own operators."""
    dtype = torch.uint8 if graph.normalises else torch.float32
    # Of a batch of one the size would be taken for a constant.
    example = torch.zeros(2, 3, *graph.network.image_size, dtype=dtype)
    with torch.no_grad(), _extension.disabled():
        program = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    # Lines of source with the paths of this machine: of no use where the file is run.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def description(network: DAN, takes: str, precision: str) -> dict[str, str]:
    """The metadata of a file: what it takes, how images are resized for it, and what it gives."""
    height, width = network.image_size
    mean, std, interpolation = network.preprocessing
    return {
        "input": takes,
        "height": str(height),
        "width": str(width),
        "order": "RGB",
        "interpolation": interpolation,
        "antialias": "true",
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "feature": network.feature,
        "feature_size": str(network.classifier.in_features),
        "length": "unit",
        "precision": precision,
        "weights": weights_hash(network),
        "dan_fast": dan_fast.__version__,
    }
