"""Networks as files that run without this package: ONNX, and the `.pt2` of `torch.export`.

The file takes images and gives the features that :mod:`dan_fast.evaluation` compares, `DAN.embed`, at unit length.
"""

from dan_fast.export.exporting import Difference, Format, Input, Precision, export_network

__all__ = ["Difference", "Format", "Input", "Precision", "export_network"]
