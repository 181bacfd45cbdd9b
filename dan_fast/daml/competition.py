"""The competition between attention and adversary branch, Sec. III-B: the winner decides which groups are trained."""

from collections.abc import Sequence
from enum import StrEnum
from numbers import Integral

import torch.nn.functional as F
from torch import Tensor

from dan_fast.core.cosine import statistics_dtype


class Stage(StrEnum):
    """Which groups an iteration updates; the gates Gm are updated in every stage."""

    ADVERSARY = "adversary"
    """Stage 1: the adversary branch won; Gb is frozen, Ga is updated by l1 L_aad."""
    ATTENTION = "attention"
    """Stage 2: the attention branch won; Ga is frozen, Gb is updated by L_total."""
    BOTH = "both"
    """Both groups are updated: the adversary branch has won too often in a row, or both branches have won."""


class Competition:
    """Decides the stage of each iteration.

    `attention_wins` says which branch won. Nothing in L_aad makes the attention branch classify better, so a
    frozen backbone could stay frozen for good: after `stall_guard` adversary wins in a row both groups are
    updated until attention wins once.

    Args:
        stall_guard: adversary wins in a row, at least 1; 0 is the literal paper, without a guard.

    Raises:
        ValueError: `stall_guard` is negative or no whole number.

    Example:
        >>> import torch
        >>> good, bad = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> Competition().decide(bool(attention_wins(good, bad, torch.tensor([0]))))
        <Stage.ATTENTION: 'attention'>
    """

    def __init__(self, stall_guard: int = 20) -> None:
        if not isinstance(stall_guard, Integral) or stall_guard < 0:
            raise ValueError(f"stall_guard must be a whole number, 0 or more, got {stall_guard!r}")
        self.stall_guard = stall_guard
        self.adversary_streak = 0

    def decide(self, attention_won: bool, tied: bool = False) -> Stage:
        """The stage of the next iteration, by whether attention has won on its S or both branches are `tied`."""
        if attention_won or tied:
            self.adversary_streak = 0
            return Stage.BOTH if tied else Stage.ATTENTION
        # The guard takes effect in the iteration after the one that completes the row.
        stalled = self.stall_guard > 0 and self.adversary_streak >= self.stall_guard
        self.adversary_streak += 1
        return Stage.BOTH if stalled else Stage.ADVERSARY

    def state_dict(self) -> dict[str, int]:
        """The adversary's wins in a row."""
        return {"adversary_streak": self.adversary_streak}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from what `state_dict` gave."""
        self.adversary_streak = state["adversary_streak"]


def attention_wins(attention_logits: Tensor, adversary_logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the attention branch wins, () bool on the logits' device, which is not waited for.

    The branch with the higher accuracy wins; on a tie the one with the lower cross-entropy, and attention if that is
    equal too, as it is without samples.

    Args:
        attention_logits: (n, c) floating, of the labelled samples of S.
        adversary_logits: (n, c).
        labels: (n,) int64.
    """
    attention_logits, adversary_logits = attention_logits.detach(), adversary_logits.detach()
    lead = _lead(attention_logits, adversary_logits, labels)
    # Sums, as there is no mean of no samples.
    loss, of_adversary = (
        F.cross_entropy(each.to(statistics_dtype(each.dtype)), labels, reduction="sum")
        for each in (attention_logits, adversary_logits)
    )
    return (lead > 0) | ((lead == 0) & (loss <= of_adversary))


def accuracies_tie(attention_logits: Tensor, adversary_logits: Tensor, labels: Tensor) -> Tensor:
    """Whether both branches classify equally many samples correctly, () bool: the tie that `attention_wins` breaks.

    Args:
        attention_logits, adversary_logits, labels: as there.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> accuracies_tie(logits, -logits, torch.tensor([0, 1]))
        tensor(True)
    """
    return _lead(attention_logits.detach(), adversary_logits.detach(), labels) == 0


def _lead(attention_logits: Tensor, adversary_logits: Tensor, labels: Tensor) -> Tensor:
    """How many more samples the attention branch classifies rightly, () int64."""
    return (attention_logits.argmax(1) == labels).sum() - (adversary_logits.argmax(1) == labels).sum()


def active_groups(
    stage: Stage,
    backbone: Sequence[str],
    attention: Sequence[str],
    memory: Sequence[str],
    cam_weights: Sequence[str],
) -> dict[str, tuple[list[str], str]]:
    """The groups of `meta_gradients` for one iteration (Sec. III-A and III-D).

    Args:
        stage: which groups are trained.
        backbone: names of Gb, the classifier included; loss "total".
        attention: names of NL-CBAM's weights in Ga; loss "adversary", that is l1 L_aad.
        memory: names of Gm; loss "embedding", that is l2 L_lde. May be empty.
        cam_weights: names of the parameters that make the classifier's weight, which CAM uses: one, unless it is
            parametrised. They join Ga while Gb is frozen; otherwise L_total, which contains l1 L_aad, trains them.
            Without any, L_aad does not reach the classifier, which then stays frozen too.
    """
    stage = Stage(stage)
    # The backbone comes last: the last backward pass of a graph frees what the forward pass kept.
    groups: dict[str, tuple[list[str], str]] = {}
    if memory:
        groups["memory"] = (list(memory), "embedding")
    if stage is Stage.ADVERSARY:
        groups["attention"] = ([*attention, *cam_weights], "adversary")
    elif stage is Stage.BOTH:
        groups["attention"] = (list(attention), "adversary")
    if stage is not Stage.ADVERSARY:
        groups["backbone"] = (list(backbone), "total")
    return groups
