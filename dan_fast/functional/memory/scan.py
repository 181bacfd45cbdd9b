"""The scan of a batch through both memories: the kernels where they serve, PyTorch elsewhere.

A kernel and its backward are one operator each, `torch.ops.dan_fast.memory_scan` and `memory_scan_backward`.
Where a gradient is itself to be differentiated, the backward is the PyTorch form's, which autograd can follow.
"""

import torch
from torch import Tensor

from dan_fast import _extension
from dan_fast.functional.derivatives import through_form
from dan_fast.functional.memory import scan_torch
from dan_fast.functional.memory.scan_types import ScanResult, Slots, WrittenSlots

_SLOTS, _WRITTEN = len(Slots._fields), len(WrittenSlots._fields)


def scan(
    scores: Tensor,
    unlabeled_scores: Tensor,
    gram: Tensor,
    gates: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    labeled: Slots,
    unlabeled: Slots,
    decay: float,
    decay_unlabeled: float,
    scalar_keys: bool,
) -> ScanResult:
    """`scan_torch.scan`, by a kernel where one serves; the same arguments and result."""
    arguments = (scores, unlabeled_scores, gram, gates, labels, sample_ids)
    settings = (decay, decay_unlabeled, scalar_keys)
    if not _extension.serves(scores.device.type, scores.device.index):
        return scan_torch.scan(*arguments, labeled, unlabeled, *settings)
    loss, *rest = torch.ops.dan_fast.memory_scan.default(*arguments, list(labeled), list(unlabeled), *settings)
    pseudo_labels, fault, *rest = (x.detach() for x in rest)
    written = WrittenSlots(*rest[:_WRITTEN]), WrittenSlots(*rest[_WRITTEN : 2 * _WRITTEN])
    return ScanResult(loss, pseudo_labels, fault, *written)


def _fake(
    scores: Tensor,
    unlabeled_scores: Tensor,
    gram: Tensor,
    gates: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    labeled: list[Tensor],
    unlabeled: list[Tensor],
    decay: float,
    decay_unlabeled: float,
    scalar_keys: bool,
) -> list[Tensor]:
    steps = labels.shape[0], sample_ids.shape[0]
    written, records = [], []
    for memory, count in ((Slots(*labeled), steps[0]), (Slots(*unlabeled), steps[1])):
        slots = memory.labels.shape[0]
        per_slot, held = scores.new_empty(slots), scores.new_empty(count, slots)
        ids = labels.new_empty(slots)
        written += [*(torch.empty_like(per_slot) for _ in range(4)), held]
        written += [ids, torch.empty_like(ids), labels.new_empty(())]
        records += [*(torch.empty_like(held) for _ in range(4)), held.new_empty(held.shape, dtype=torch.uint8)]
    retrieval = [scores.new_empty(steps[1], width) for width in (scores.shape[1], 4, 2)]
    fault = labels.new_empty((), dtype=torch.int32)
    return [scores.new_empty(()), torch.empty_like(sample_ids), fault, *written, *records, *retrieval]


def _fake_backward(grad_loss: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments[:4])


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: list[Tensor]) -> None:
    *tensors, labeled, unlabeled, decay, decay_unlabeled, scalar_keys = inputs
    ctx.save_for_backward(*tensors, *labeled, *unlabeled, *output)
    ctx.settings = decay, decay_unlabeled, scalar_keys
    ctx.set_materialize_grads(False)


def _backward(ctx: torch.autograd.function.FunctionCtx, grads: list[Tensor | None]) -> tuple:
    saved = ctx.saved_tensors  # once: checkpointing makes them anew for whoever asks, and refuses a second time
    arguments, rest = saved[:6], saved[6:]
    labeled, unlabeled, output = rest[:_SLOTS], rest[_SLOTS : 2 * _SLOTS], rest[2 * _SLOTS :]
    none = (None, None, [None] * _SLOTS, [None] * _SLOTS, None, None, None)
    if grads[0] is None:
        return (None,) * 4 + none
    if torch.is_grad_enabled():

        def form(*tensors: Tensor) -> tuple[Tensor]:
            slots = Slots(*labeled), Slots(*unlabeled)
            return (scan_torch.scan(*tensors, *slots, *ctx.settings).loss,)

        return (*through_form(form, arguments, ctx.needs_input_grad[:4], grads[:1])[:4], *none)
    gradients = torch.ops.dan_fast.memory_scan_backward.default(
        grads[0], *arguments, list(labeled), list(unlabeled), *ctx.settings, list(output)
    )
    return (*gradients, *none)


if _extension.loaded():
    torch.library.register_fake("dan_fast::memory_scan")(_fake)
    torch.library.register_fake("dan_fast::memory_scan_backward")(_fake_backward)
    torch.library.register_autograd("dan_fast::memory_scan", _backward, setup_context=_keep)
