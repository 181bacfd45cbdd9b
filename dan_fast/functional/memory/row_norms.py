"""Squared row norms of a memory, n2_i = |m_i|^2: what the cosine of Eq. (7) and (11) divides by.

One read of the memory and no temporary, where `features.square().sum(1)` writes and reads one of its size.
"""

import torch
from torch import Tensor

from dan_fast.core.cosine import FLOATING
from dan_fast.functional.registration import Context, Operator


def row_sq_norms(features: Tensor) -> Tensor:
    """Squared L2 norm of every row.

    The compiled kernel serves CPU and CUDA tensors where it was built, PyTorch all others; both are
    differentiable any number of times by `torch.autograd` and may be traced by `torch.compile`.

    Args:
        features: (s, d), float64, float32, float16 or bfloat16, any strides, s or d may be 0.

    Returns:
        (s,), float64 for float64, else float32: in half precision a sum of 2045 squares loses its last terms.

    Raises:
        ValueError: `features` is not two-dimensional.
        TypeError: `features` is not a tensor of one of these types.

    Example:
        >>> row_sq_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([25.,  4.])
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a tensor, got {type(features).__name__}")
    if features.dtype not in FLOATING:
        raise TypeError(f"features must be float64, float32, float16 or bfloat16, got {features.dtype}")
    if features.dim() != 2:
        raise ValueError(f"features must be (s, d), got shape {tuple(features.shape)}")
    return RowSqNorms.run(features)


class RowSqNorms(Operator):
    name = "row_sq_norms"

    @staticmethod
    def form(features: Tensor) -> Tensor:
        return features.to(_result_dtype(features)).square().sum(1)

    @staticmethod
    def fake(features: Tensor) -> Tensor:
        return features.new_empty(features.shape[0], dtype=_result_dtype(features))

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        # PyTorch operators, not a kernel: they carry the second derivative, which a kernel would cut off.
        (features,) = ctx.saved_tensors
        return (2 * grad[:, None] * features).to(features.dtype)


def _result_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32
