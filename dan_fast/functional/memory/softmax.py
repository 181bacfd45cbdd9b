"""Attention of keys over memory slots for a whole batch: `cosine_softmax` and, behind it, `slot_softmax`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dan_fast.core.checks import check_cosine_softmax, check_keys_finite, may_look_at
from dan_fast.core.cosine import norm_from_square, occupied_softmax, statistics_dtype
from dan_fast.functional.autocast import full_precision, keys_in_memory_dtype
from dan_fast.functional.memory.passes import memory_scores
from dan_fast.functional.memory.row_norms import row_sq_norms
from dan_fast.functional.registration import Context, Grads, KernelBackward, Saved, empty_like


def cosine_softmax(keys: Tensor, slots: Tensor, occupied: Tensor | None = None) -> Tensor:
    """Attention of keys over memory slots by cosine similarity, Eqs. (7) and (11).

    Gives the same as `dan_fast.reference.cosine_softmax` and reads the slots once. It is differentiable any number of
    times in keys and slots, computes in the dtype of statistics even under autocast, and is traced whole by
    `torch.compile`.

    Args:
        keys: (B, d) floating; under autocast they get the dtype of the slots.
        slots: (s, d), dtype and device of `keys`.
        occupied: (s,) bool; empty slots get weight 0. None: every slot is occupied.

    Returns:
        (B, s), float32 for half-precision keys, else the dtype of `keys`. A row is 0 if no slot is occupied. On a GPU,
        in a compiled function and under `torch.vmap`, where checking a key would wait for the device, break the graph
        or be refused, a key that is not finite, or whose squared norm is not, gets weight NaN in every occupied slot.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or, on the CPU, a key is not finite.

    Example:
        >>> cosine_softmax(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        tensor([[0.5000, 0.5000]])
    """
    keys = keys_in_memory_dtype(keys, getattr(slots, "dtype", None))
    check_cosine_softmax(keys, slots, occupied)
    if may_look_at(keys):
        check_keys_finite(keys)
    with full_precision(keys.device):
        keys = keys.to(statistics_dtype(keys.dtype))
        scores, square_norms = memory_scores(keys, slots)
        return SlotSoftmax.run(scores, square_norms, row_sq_norms(keys), occupied)


class SlotSoftmax(KernelBackward):
    """(B, s) weights from `<k_b, m_i>` (B, s), `|m_i|^2` (s,) and `|k_b|^2` (B,); `occupied` as in `cosine_softmax`."""

    name = "slot_softmax"
    differentiable, constants = 3, (None,)

    @staticmethod
    def form(scores: Tensor, square_norms: Tensor, key_squares: Tensor, occupied: Tensor | None) -> Tensor:
        lengths = norm_from_square(key_squares).masked_fill(~key_squares.isfinite(), torch.nan)
        return occupied_softmax(scores / (lengths[:, None] * norm_from_square(square_norms)), occupied)

    @staticmethod
    def fake(scores: Tensor, square_norms: Tensor, key_squares: Tensor, occupied: Tensor | None) -> Tensor:
        return scores.new_empty(scores.shape)

    @staticmethod
    def fake_backward(grad: Tensor, weights: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(empty_like, arguments))

    @staticmethod
    def setup(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output)

    @classmethod
    def retraced(cls, ctx: Context, saved: Saved) -> tuple[Callable[..., Sequence[Tensor]], Sequence]:
        *arguments, occupied, _ = saved
        return lambda *tensors: (cls.form(*tensors, occupied),), arguments

    @classmethod
    def grad_by_kernel(cls, ctx: Context, saved: Saved, grads: Grads) -> Grads:
        *arguments, _, weights = saved
        return cls.backward_op(grads[0], weights, *arguments)
