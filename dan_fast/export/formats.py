"""The two kinds of file: written as bytes, and run from them as where the file is used."""

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dan_fast.core.errors import DanFastError
from dan_fast.core.optional import optional

# The extra file in a .pt2 that holds the description; an ONNX file has a place of its own for it.
METADATA = "metadata.json"

Run = Callable[[Tensor], Tensor]


def require_packages() -> None:
    """Refuse to go on without a package that ONNX files are made and run with, which is named."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        optional(name, f"--format onnx needs {name}, which is not installed: pip install 'dan-fast[export]'")


def to_pt2(program: torch.export.ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """The content of a .pt2 file."""
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={METADATA: json.dumps(metadata)})
    return stream.getvalue()


def run_pt2(content: bytes) -> Run:
    """What a .pt2 file computes."""
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda images: module(images).detach()


def to_onnx(program: torch.export.ExportedProgram, metadata: Mapping[str, str], int8: bool) -> bytes:
    """The content of an ONNX file whose input is `images` and whose output is `features`.

    Args:
        program: of one input and one output.
        metadata: its description.
        int8: weights of 8 bits, and inner values that each batch is rounded to 8 bits for.

    Raises:
        DanFastError: more than the 2 GiB that one ONNX file holds.
    """
    size = sum(value.nbytes for value in program.state_dict.values())
    if size >= 1 << 31:
        raise DanFastError(f"The network's {size >> 20} MiB are more than one ONNX file holds: use --format pt2.")
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes={"images": {0: "batch"}},
    )
    model = made.model_proto
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return _quantized(model) if int8 else model.SerializeToString()


def _quantized(model: Any) -> bytes:
    import onnx
    from onnxruntime.quantization import quant_pre_process, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        # Of the steps before, which it asks for, the shapes alone: the exporter has optimised, with standard operators.
        quant_pre_process(model, path, skip_optimization=True, skip_symbolic_shape=True)
        quantize_dynamic(path, path, nodes_to_exclude=_float_convolutions(onnx.load(path)))
        return path.read_bytes()


def _float_convolutions(model: Any) -> list[str]:
    """The names of the convolutions that stay in float32: the first, and those of groups.

    ConvInteger has one scale for a layer, and the channels of a depthwise convolution differ most; the first rounds the
    image itself. They hold few of the weights.
    """
    found = [node for node in model.graph.node if node.op_type == "Conv"]
    grouped = [node for node in found if any(each.name == "group" and each.i > 1 for each in node.attribute)]
    return [node.name for node in found[:1] + grouped]


def run_onnx(content: bytes) -> Run:
    """What an ONNX file computes, by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
