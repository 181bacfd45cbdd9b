"""L_lde for samples of known identity, a whole batch at once, by one product of keys and slots."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dan_fast.core.checks import check_discriminative_loss
from dan_fast.core.cosine import norm_from_square, statistics_dtype
from dan_fast.distributed.collectives import gather_parts, hand_out
from dan_fast.functional.autocast import full_precision, keys_in_memory_dtype
from dan_fast.functional.memory.passes import memory_scores
from dan_fast.functional.memory.sharded import ShardedMemory

# So far below the largest logit that is summed lies what is left out: exp(-80) is lost beside 1 in every type and not
# denormal in float32, of which exp takes ten times as long; a row without members stays free of NaN in all derivatives.
_FAR = 80.0


def discriminative_loss(keys: Tensor, labels: Tensor, slots: Tensor, slot_labels: Tensor, temperature: float) -> Tensor:
    """-log(P / (P + N)) of Eq. (15) for keys whose label is known, at a temperature.

    P is the mean of exp(cos(k, m) / temperature) over the slots of the key's label, and N its sum over all other
    occupied slots. Unlike in a softmax over the slots, a person does not gain from having more slots.

    Gives the same as `dan_fast.reference.discriminative_loss` for the whole batch and reads the slots once. It is
    differentiable any number of times in keys and slots and, even under autocast, computes in the dtype of statistics.

    Args:
        keys: (B, d) floating; under autocast they get the dtype of the slots.
        labels: (B,) int64, the label of each key; -1 where it is unknown.
        slots: (s, d), features of the memory, dtype and device of `keys`.
        slot_labels: (s,) int64, the labels of the slots; -1 is an empty slot, which takes no part whatever finite
            numbers it holds.
        temperature: positive; divides the cosines. A () tensor that requires grad gets a gradient.

    Returns:
        (B,), float32 for half-precision keys, else their dtype. Where the label is unknown or the memory holds no slot
        of it, the loss and its gradient are 0.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or the temperature is not positive.

    Example:
        >>> slots, slot_labels = torch.eye(2), torch.tensor([4, 7])
        >>> discriminative_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([4]), slots, slot_labels, temperature=1.0)
        tensor([0.3133])
    """
    keys = keys_in_memory_dtype(keys, getattr(slots, "dtype", None))
    check_discriminative_loss(keys, labels, slots, slot_labels, temperature)
    with full_precision(keys.device):
        keys = _of_known(keys.to(statistics_dtype(keys.dtype)), labels)
        return losses_of_scores(*memory_scores(keys, slots), keys, labels, slot_labels, temperature)


def losses_of_scores(
    scores: Tensor, square_norms: Tensor, keys: Tensor, labels: Tensor, slot_labels: Tensor, temperature: float
) -> Tensor:
    """`discriminative_loss` (B,) of keys (B, d) whose products with the slots (B, s), and these' norms (s,), are known.

    All floating ones are in the dtype of statistics.
    """
    empty = slot_labels < 0
    own = (labels[:, None] == slot_labels) & (labels >= 0)[:, None]
    others = ~(empty | own)
    # Whatever an empty slot holds; a logit that overflows would be left out of the sums, but not of their derivatives.
    scores, square_norms = scores.masked_fill(empty, 0.0), square_norms.masked_fill(empty, 1.0)
    lengths = norm_from_square(keys.square().sum(1))[:, None] * norm_from_square(square_norms)
    # Apart: the derivative divides by the square of what a tensor is divided by, and that of a small temperature is 0.
    logits = scores / lengths / temperature
    positive = _log_sum(logits, own) - own.sum(1).clamp(min=1).to(keys.dtype).log()
    # Linear from 50 on, where the rest is below the last bit of float64 in the derivatives too; by default from 20.
    losses = F.softplus(_log_sum(logits, others) - positive, threshold=50)
    # Without others P / (P + N) is 1.
    return torch.where(own.any(1) & others.any(1), losses, 0.0)


def sharded_discriminative_loss(
    memory: ShardedMemory, keys: Tensor, labels: Tensor, sizes: Sequence[int] | None, temperature: float
) -> Tensor:
    """`discriminative_loss` of the rows of all ranks, by the slots of all of them; two collectives.

    Args:
        memory: M, as it is.
        keys: (b, d), this rank's rows; on all ranks with a gradient, or on none.
        labels: (b,) int64.
        sizes: b of each rank.
        temperature: positive.

    Returns:
        (B,), whole; the gradient in this rank's keys is that of what is made of the whole.

    Raises:
        TypeError, ValueError: an argument of this rank does not fit. The other ranks are not told.
    """
    group, shard = memory.shard.group, memory.shard
    state = memory.outlined()
    check_discriminative_loss(keys, labels, state.features, state.labels, temperature)
    if sizes is None or len(sizes) != group.size() or sizes[group.rank()] != len(keys):
        raise ValueError(
            f"sizes must hold the number of keys of each of the {group.size()} ranks, {len(keys)} at {group.rank()}, "
            f"got {sizes}"
        )
    memory.settle()
    keys, labels = gather_parts(group, [keys.to(memory.dtype), labels], [sizes, sizes], 0)
    keys = _of_known(keys, labels)
    own = memory.read_base(hand_out(group, keys), waits=False)
    found = memory.completed(keys, *gather_parts(group, own, [shard.sizes] * 2, -1))
    return losses_of_scores(*found, keys, labels, memory.labels, temperature)


def _of_known(keys: Tensor, labels: Tensor) -> Tensor:
    """Keys with ones in the rows that count nowhere: what is not finite in them would reach the derivative by slots."""
    return keys.masked_fill((labels < 0)[:, None], 1.0)


def _log_sum(logits: Tensor, members: Tensor) -> Tensor:
    """(B,) logarithms of the sum of exp over each row's members of logits (B, s)."""
    constants = logits.detach()
    largest = torch.where(members, constants, constants.amin(1, keepdim=True)).amax(1, keepdim=True)
    return torch.where(members, logits, largest - _FAR).logsumexp(1)
