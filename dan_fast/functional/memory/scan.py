"""The scan of a batch through both memories: the kernels where they serve, PyTorch elsewhere."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dan_fast.functional.memory import scan_torch
from dan_fast.functional.memory.scan_types import (
    RetrievalRecord,
    ScanInput,
    ScanResult,
    Slots,
    WriteRecord,
    WrittenSlots,
)
from dan_fast.functional.registration import Context, Grads, KernelBackward, Saved, empty_like

_TENSORS, _SLOTS, _WRITTEN = ScanInput._fields.index("labeled"), len(Slots._fields), len(WrittenSlots._fields)


def scan(given: ScanInput) -> ScanResult:
    """`scan_torch.scan`, by a kernel where one serves."""
    if not MemoryScan.serves(given.scores):
        return scan_torch.scan(given)
    loss, *rest = MemoryScan.op(*given._replace(labeled=list(given.labeled), unlabeled=list(given.unlabeled)))
    pseudo_labels, fault, *written = (x.detach() for x in rest[: 2 + 2 * _WRITTEN])
    memories = WrittenSlots(*written[:_WRITTEN]), WrittenSlots(*written[_WRITTEN:])
    # The backward holds the operator's own: a caller may change what he gets, as in `loss += ...`.
    return ScanResult(loss.clone(), pseudo_labels.clone(), fault, *memories)


class MemoryScan(KernelBackward):
    """It gives the fields of `ScanResult`, then what the backward reads: two `WriteRecord` and a `RetrievalRecord`."""

    name = "memory_scan"
    differentiable = 4
    constants = (None, None, [None] * _SLOTS, [None] * _SLOTS, None, None, None)

    @staticmethod
    def fake(*arguments: Tensor | list[Tensor] | float) -> list[Tensor]:
        given = ScanInput(*arguments)
        scores, labels, unlabeled_batch = given.scores, given.labels, given.sample_ids.shape[0]
        written, records = [], []
        for memory, count in ((given.labeled, labels.shape[0]), (given.unlabeled, unlabeled_batch)):
            slots = Slots(*memory).labels.shape[0]
            values, ids = [scores.new_empty(slots) for _ in range(4)], [labels.new_empty(slots) for _ in range(2)]
            square_norms, usage, evaluation, kept = values
            held = scores.new_empty(count, slots)
            written += WrittenSlots(square_norms, usage, evaluation, kept, held, *ids, labels.new_empty(()))
            events = held.new_empty(held.shape, dtype=torch.uint8)
            records += WriteRecord(*(torch.empty_like(held) for _ in range(4)), events)
        retrieval = RetrievalRecord(*(scores.new_empty(unlabeled_batch, width) for width in (scores.shape[1], 4, 2)))
        fault = labels.new_empty((), dtype=torch.int32)
        return [scores.new_empty(()), torch.empty_like(given.sample_ids), fault, *written, *records, *retrieval]

    @staticmethod
    def fake_backward(grad_loss: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(empty_like, arguments[: MemoryScan.differentiable]))

    @staticmethod
    def setup(ctx: Context, inputs: tuple, output: list[Tensor]) -> None:
        given = ScanInput(*inputs)
        ctx.save_for_backward(*given[:_TENSORS], *given.labeled, *given.unlabeled, *output)
        ctx.settings = given[_TENSORS + 2 :]
        ctx.set_materialize_grads(False)

    @classmethod
    def backward(cls, ctx: Context, grads: list[Tensor | None]) -> tuple:
        return super().backward(ctx, grads[0])

    @classmethod
    def retraced(cls, ctx: Context, saved: Saved) -> tuple[Callable[..., Sequence[Tensor]], Sequence]:
        given, _ = _unpacked(ctx, saved)
        slots_and_settings = given[_TENSORS:]
        return lambda *tensors: (scan_torch.scan(ScanInput(*tensors, *slots_and_settings)).loss,), given[:_TENSORS]

    @classmethod
    def grad_by_kernel(cls, ctx: Context, saved: Saved, grads: Grads) -> Grads:
        given, output = _unpacked(ctx, saved)
        return cls.backward_op(
            grads[0], *given._replace(labeled=list(given.labeled), unlabeled=list(given.unlabeled)), output
        )


def _unpacked(ctx: Context, saved: tuple[Tensor, ...]) -> tuple[ScanInput, list[Tensor]]:
    """What `MemoryScan.setup` kept: the arguments and the results."""
    tensors, rest = saved[:_TENSORS], saved[_TENSORS:]
    memories = Slots(*rest[:_SLOTS]), Slots(*rest[_SLOTS : 2 * _SLOTS])
    return ScanInput(*tensors, *memories, *ctx.settings), list(rest[2 * _SLOTS :])
