"""The network and its parts as modules."""

from dan_fast.nn.attention import NLCBAM
from dan_fast.nn.backbones.build import BACKBONES, build_backbone
from dan_fast.nn.instance_norm import HalfInstanceNorm
from dan_fast.nn.memory import ProgressiveAugmentedMemory
from dan_fast.nn.network import DAN, DANOutput
from dan_fast.nn.styles import StyleMixing
from dan_fast.nn.whitening import WithinPersonWhitening

__all__ = [
    "BACKBONES",
    "DAN",
    "DANOutput",
    "HalfInstanceNorm",
    "NLCBAM",
    "ProgressiveAugmentedMemory",
    "StyleMixing",
    "WithinPersonWhitening",
    "build_backbone",
]
