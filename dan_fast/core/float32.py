"""How PyTorch multiplies float32 numbers: on some devices as TF32 or bfloat16, unless settings forbid it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# docs/limits.md says where it was seen.
BFLOAT16_ON_A_CPU = (
    "bfloat16 on a CPU: PyTorch's convolutions of small maps can read memory that was never written there, so that "
    "figures change from call to call; use float32."
)
_EXACT = ("none", "ieee")
_NAMES = {"tf32": "TF32", "bf16": "bfloat16"}
# Process-wide settings: two threads that set and restore them at the same time would undo each other's changes.
_LOCK = threading.Lock()


def float32_settings(device: torch.device) -> dict[str, str]:
    """How PyTorch multiplies float32 numbers on a device now: "ieee", "tf32" or "bf16", of each kind of product.

    Read from the settings by operator, which may be read whatever was set: `torch.backends.cuda.matmul.allow_tf32`
    and `torch.get_float32_matmul_precision` raise once old and new settings were mixed.

    Returns:
        "convolutions" and "matrix_products", by name.

    Example:
        >>> float32_settings(torch.device("cpu"))["convolutions"]
        'ieee'
    """
    convolutions = torch.backends.cudnn.conv if device.type == "cuda" else torch.backends.mkldnn.conv
    settings = {"convolutions": convolutions, "matrix_products": _matrix_products(device.type)}
    return {name: "ieee" if each.fp32_precision in _EXACT else each.fp32_precision for name, each in settings.items()}


def float32_rounding(device: torch.device) -> str:
    """The products of `float32_settings` that are rounded, in words: "TF32 in convolutions", or "" for none.

    Example:
        >>> float32_rounding(torch.device("cpu"))
        ''
    """
    products: dict[str, list[str]] = {}
    for name, precision in float32_settings(device).items():
        if precision != "ieee":
            products.setdefault(_NAMES.get(precision, precision), []).append(name.replace("_", " "))
    return ", ".join(f"{precision} in {' and '.join(each)}" for precision, each in products.items())


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Matrix products of float32 numbers that are launched inside are not rounded below float32.

    Args:
        device_type: of the tensors, "cuda" or "cpu".
    """
    with _LOCK:
        if _matrix_products(device_type).fp32_precision in _EXACT:
            yield
            return
        # By the name that was used before: where old and new settings disagree PyTorch refuses to read the old ones,
        # which TunableOp does in the middle of a product.
        old_name = _matmul_precision()
        devices = [_matrix_products(each) for each in ("cuda", "cpu")]
        found = [_own_precision(each) for each in devices]
        if old_name is None:
            _matrix_products(device_type).fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if old_name is not None:
                torch.set_float32_matmul_precision(old_name)
            for each, precision in zip(devices, found, strict=True):
                each.fp32_precision = precision


def _own_precision(setting: Any) -> str:
    """What these products are set to by their own name, "none" where what is set for more than them counts.

    Read, a setting is what counts. Were that put back as its own, a later change of `torch.backends.fp32_precision`
    would not reach it.
    """
    found = setting.fp32_precision
    setting.fp32_precision = "none"
    if setting.fp32_precision == found:
        return "none"
    setting.fp32_precision = found
    return found


def _matmul_precision() -> str | None:
    """The setting of `torch.set_float32_matmul_precision`; None where it was set by other names."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _matrix_products(device_type: str) -> Any:
    return torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul
