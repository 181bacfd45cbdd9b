"""The losses of one part of a mini-batch, Eq. (1), in the form that `meta_gradients` takes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dan_fast.core.batches import Split
from dan_fast.core.checks import STEP_FAULTS
from dan_fast.daml.cut import Cut
from dan_fast.daml.traced import TracedLosses, random_state
from dan_fast.distributed.collectives import gather_parts
from dan_fast.distributed.shards import Shard
from dan_fast.functional.memory.scan_types import sentence_of
from dan_fast.nn import DAN, DANOutput, ProgressiveAugmentedMemory
from dan_fast.training.config import LossConfig


class PassRecord(NamedTuple):
    """What is known of a pass beside its losses; every tensor is detached.

    Attributes:
        logits, adversary_logits: (num_labeled, c), of the labelled samples, for the competition.
        labels: (num_labeled,) int64.
        pseudo_labels, sample_ids: (B',) int64, of the unlabelled samples; pseudo_labels is (0,) without a memory.
        gates: () sigmoid of alpha and of alpha', and beta; None without a memory.
        fault: () integer on the device, 0 if all was well: what `require_sound` takes, read from the device.
        fed_back_labels, fed_back_ids: (num_fed_back,) int64, pseudo label and sample id of each fed-back sample.
        spatial_spread: () float32, the mean over all images of max - min of A_S; None without an attention.
        cleared: () int64, how many samples left M' while those of the pass were written: false samples of Eq. (14)
            and those replaced in the least-used slot, Eq. (9); None without a memory.
    """

    logits: Tensor
    adversary_logits: Tensor
    labels: Tensor
    pseudo_labels: Tensor
    sample_ids: Tensor
    gates: tuple[Tensor, Tensor, Tensor] | None
    fault: Tensor
    fed_back_labels: Tensor
    fed_back_ids: Tensor
    spatial_spread: Tensor | None
    cleared: Tensor | None


class _MemoryTerms(NamedTuple):
    """What the memory makes of a pass, as the losses and the record have it."""

    embedding: Tensor
    labeled_embedding: Tensor
    pseudo_labels: Tensor
    gates: tuple[Tensor, Tensor, Tensor] | None
    cleared: Tensor | None
    fault: Tensor


class DivergedError(ArithmeticError):
    """A feature, loss, gradient or weight is not finite any more."""


_BACKBONE = "network.backbone."
# `PassRecord.fault` where features are not finite; the memory's own faults are positive.
_NOT_FINITE = -1


def require_sound(fault: int) -> None:
    """Raise what went wrong in a pass whose `PassRecord.fault` is `fault`.

    Raises:
        DivergedError: features or their squared norms were not finite.
        ValueError: the memory was given keys or gates that are not finite, or negative labels or sample ids.
    """
    if fault == _NOT_FINITE:
        raise DivergedError("features or their squared norms are not finite")
    if fault:
        raise ValueError(sentence_of(fault))


def why_refused(error: ValueError) -> str:
    """What kept a step from being taken, in words that name a setting where PyTorch's name none."""
    if "more than 1 value per channel" in str(error):
        return "batch norm needs more than one image of S, of S~ or of a rank's share: raise data.batch_size"
    return str(error)


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether every floating tensor is finite, () bool on their device, which is not waited for."""
    # The extremes of a tensor are NaN or Inf if any of its elements is.
    floating = [each.detach() for each in tensors if each.is_floating_point() and each.numel()]
    if floating and floating[0].device.type == "cpu":
        extremes = [extreme for each in floating for extreme in torch.aminmax(_as_it_lies(each))]
    else:
        extremes = torch._foreach_norm(floating, float("inf"))  # one launch for all; on a CPU it takes 20 times as long
    return torch.stack([each.float() for each in extremes]).isfinite().all()


def _as_it_lies(tensor: Tensor) -> Tensor:
    """The tensor with its dimensions in the order of memory: what lies otherwise, as channels last, aminmax copies."""
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


class TrainingModel(nn.Module):
    """Network and memory as one module, so that one dict names all of G.

    `forward(split)` returns (losses, record) and advances the memory by the samples of `split`, unless a feature is not
    finite: `record.fault` tells this and what the memory finds on a GPU. The losses, all () float32 and already
    weighted as their groups take them:

    - "total": L_c + l1 L_aad + l2 L_lde + l3 R, Eq. (1), and "labeled_embedding";
    - "adversary": l1 L_aad, of labelled and fed-back samples;
    - "embedding": l2 (L_lde - confidence_prior log beta), of unlabelled samples;
    - "classification", "regularizer": L_c and l3 R, parts of the total shown on their own;
    - "labeled_embedding": the first term of Eq. (15) of labelled samples, by M as it was before this pass.

    L_c and R are means over the two branches, which share backbone and classifier: a competition needs both to be able
    to classify. Without an adversary there is only the attention branch, and no L_aad. Fed-back samples are not written
    to M, which holds true labels only.

    For a split that is a rank's share (`split.shares`), classification, adversary and regularizer are the rank's
    summands of the losses of the whole, while embedding and labeled_embedding are whole; the record is of the rank's
    own images. All ranks have to run the same passes, forward and backward.

    Args:
        network: the DAN.
        memory: of any dtype; None trains without unlabelled images. Its gates are frozen where l2 is 0, or with
            `lending`.
        weights: l1, l2, l3, the prior on beta and the weight of "labeled_embedding".
        temperature: of "labeled_embedding".
        lending: unlabelled samples lend their style to the others and have no part in any loss; where there are none,
            no style is mixed.
        autocast_dtype: the network's forward runs under autocast in this type; None: as its weights are.

    Raises:
        ValueError: L_aad is to reach only the attention, but the network was made for it to reach all; or the memory's
            keys have another length than the network's.
    """

    def __init__(
        self,
        network: DAN,
        memory: ProgressiveAugmentedMemory | None,
        weights: LossConfig,
        autocast_dtype: torch.dtype | None = None,
        temperature: float = 1.0,
        lending: bool = False,
    ) -> None:
        super().__init__()
        if weights.adversary_reach == "attention" and network.adversary and network.adversary_reach == "all":
            raise ValueError(
                "weights.adversary_reach is 'attention' and the network's, which decides, is 'all': make it with "
                "DAN(adversary_reach='attention')"
            )
        if memory is not None and memory.key_dim != network.key_dim:
            raise ValueError(
                f"memory.key_dim is {memory.key_dim} and the network gives keys of {network.key_dim}: make it with "
                f"ProgressiveAugmentedMemory(key_dim={network.key_dim})"
            )
        self.network = network
        self.temperature = temperature
        self.lending = lending
        self.memory = memory
        self.weights = weights
        if memory is not None and (weights.embedding == 0 or lending):
            # L_lde alone trains the gates; without it weight decay would be all that moves them.
            memory.requires_grad_(False)
        self.autocast_dtype = autocast_dtype

    def whiten_feature(self) -> None:
        """Make the network's whitening, if any, of the keys in M; collective where M is divided over ranks."""
        whitening, memory = self.network.whitening, self.memory
        if whitening is None or memory is None:
            return
        whole, of_rank = memory.parted_state_dict()
        labels, group = whole["labeled.labels"], memory.process_group
        rows = slice(None) if group is None else Shard(group, len(labels)).rows
        whitening.fit(of_rank["labeled.features"], labels, rows, group)

    def forward(self, split: Split) -> tuple[dict[str, Tensor], PassRecord]:
        return self.losses(self.maps(split), split)

    def maps(self, split: Split) -> Tensor:
        """The last map of the backbone (B, C, h, w), all that the losses take from its parameters."""
        with self._autocast(split.images.device):
            return self.network.maps(split.images, self.lenders(split))

    def lenders(self, split: Split) -> int | None:
        """How many images of the split lend their style, as `DAN.forward` takes it."""
        return len(split.labels) - split.num_labeled - split.num_fed_back or None if self.lending else 0

    def losses(self, maps: Tensor, split: Split) -> tuple[dict[str, Tensor], PassRecord]:
        """What `forward` gives, of the maps that `maps` gave for the split; the memory advances."""
        labeled, known = split.num_labeled, split.num_labeled + split.num_fed_back
        whole_labeled, whole_fed_back, whole_unlabeled = split.whole_counts
        if self.lending:
            whole_unlabeled = 0
            split = split._replace(labels=split.labels[:known], sample_ids=split.sample_ids[:known])
        with self._autocast(maps.device):
            out = self.network.branches(maps, split.labels)
        # By their squares, as the memory looks at keys: features that it refuses as too large have diverged.
        finite = all_finite([each.detach().float().square().sum(1) for each in (out.pooled, out.attended)])
        fault = torch.where(finite, 0, _NOT_FINITE)
        logits, adversary_logits = out.logits.float(), out.adversary_logits.float()
        zero = logits.new_zeros(())

        targets = split.labels[:known]
        branches = (logits, adversary_logits) if self.network.adversary else (logits,)
        # A rank's share may have none of them: 0, and as zero is its gradient, where other ranks have one.
        classification, adversary = logits[:0].sum(), out.adversary_loss[:0].float().sum()
        if known > 0:
            share = known / (whole_labeled + whole_fed_back)
            classification = torch.stack([F.cross_entropy(branch[:known], targets) for branch in branches]).mean()
            classification = share * classification
            adversary = share * self.weights.adversary * out.adversary_loss[:known].float().mean()
        regularizer = zero
        if known < len(split.labels):
            share = (len(split.labels) - known) / whole_unlabeled
            negative_entropies = torch.stack([_negative_entropy(branch[known:]) for branch in branches])
            regularizer = share * self.weights.regularizer * negative_entropies.mean()

        if self.memory is None:
            by_memory = _MemoryTerms(zero, zero, split.sample_ids.new_empty(0), None, None, fault)
        else:
            by_memory = self._through_memory(out, split, finite, fault)

        losses = {
            "total": classification + adversary + by_memory.embedding + regularizer + by_memory.labeled_embedding,
            "classification": classification,
            "adversary": adversary,
            "embedding": by_memory.embedding,
            "regularizer": regularizer,
            "labeled_embedding": by_memory.labeled_embedding,
        }
        record = PassRecord(
            logits[:labeled].detach(),
            adversary_logits[:labeled].detach(),
            split.labels[:labeled],
            by_memory.pseudo_labels,
            split.sample_ids[known:],
            by_memory.gates,
            by_memory.fault,
            split.labels[labeled:known],
            split.sample_ids[labeled:known],
            None if self.network.attention.variant == "none" else spatial_spread(out.spatial_attention),
            by_memory.cleared,
        )
        return losses, record

    def _through_memory(self, out: DANOutput, split: Split, finite: Tensor, fault: Tensor) -> _MemoryTerms:
        """Advance the memory by the samples of the split, but not where a feature is not `finite`."""
        labeled, known = split.num_labeled, split.num_labeled + split.num_fed_back
        whole_labeled, whole_unlabeled = split.whole_counts[0], 0 if self.lending else split.whole_counts[2]
        embedding = labeled_embedding = finite.new_zeros((), dtype=torch.float32)
        # A memory refuses keys that are not finite: it stays as it is if any feature is not, without a wait.
        keys = self.network.keys(out).to(self.memory.dtype) + torch.where(finite, 0.0, torch.nan)
        gate_features = self.network.gate_features(out).float() if self.memory.gates == "features" else None
        if self.weights.labeled_embedding > 0 and whole_labeled > 0:
            terms = self.memory.labeled_loss(
                keys[:labeled], split.labels[:labeled], self.temperature, [each[0] for each in split.shares]
            )
            labeled_embedding = self.weights.labeled_embedding * terms.mean().float()
        occupied_before = self.memory.occupied_slots()[1]
        try:
            step = self.memory(
                keys[:labeled],
                split.labels[:labeled],
                keys[known:],
                split.sample_ids[known:],
                gate_features=gate_features,
            )
        except ValueError as error:
            # On the CPU the memory raises at once; of keys that are not finite it is not the cause.
            require_sound(int(fault))
            own = all_finite([keys.detach(), keys.detach().square().sum(1)])
            if self.memory.process_group is not None and own and str(error).endswith(STEP_FAULTS[:2]):
                raise DivergedError("features of another rank or their squared norms are not finite") from error
            raise
        memory_fault = self.memory.take_fault()
        if memory_fault is not None:
            fault = torch.where(finite, memory_fault, fault)
        if gate_features is not None and self.memory.process_group is not None:
            sizes = [labeled + fed_back + (0 if self.lending else rest) for labeled, fed_back, rest in split.shares]
            (gate_features,) = gather_parts(self.memory.process_group, [gate_features], [sizes], 0)
        alpha, alpha_unlabeled, beta = self.memory.gate_values(gate_features)
        if whole_unlabeled > 0:
            prior = self.weights.confidence_prior * beta.log()
            embedding = self.weights.embedding * (step.loss - prior).float()
        # Each sample that is not skipped fills one slot, so what M' does not hold in addition has left it.
        cleared = occupied_before + (step.pseudo_labels >= 0).sum() - self.memory.occupied_slots()[1]
        gates = alpha.detach().sigmoid(), alpha_unlabeled.detach().sigmoid(), beta.detach()
        return _MemoryTerms(embedding, labeled_embedding, step.pseudo_labels, gates, cleared, fault)

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)


def spatial_spread(spatial_attention: Tensor) -> Tensor:
    """How far A_S (B, HW) is from flat: the mean over the images of its max - min, () float32, detached."""
    lowest, highest = torch.aminmax(spatial_attention.detach().float(), dim=1)
    return (highest - lowest).mean()


def _negative_entropy(logits: Tensor) -> Tensor:
    """R = sum of y log y over the classes (Sec. III-A), the mean over the samples of logits (n, c)."""
    log_probability = F.log_softmax(logits, dim=1)
    return (log_probability.exp() * log_probability).sum(1).mean()


# The dictionary of a module's own parameters, and the name of one in it.
Place = tuple[dict[str, Tensor | None], str]


class Objective:
    """`loss_fn` of `meta_gradients` over a `TrainingModel`: runs it with other values for its parameters.

    As `torch.func.functional_call` does it, but where the parameters sit is looked up once, not in every call.

    Attributes:
        model: the training model; its buffers (batch norm, memory) advance with every call.
        record: the record of the last call.
    """

    def __init__(self, model: TrainingModel) -> None:
        self.model = model
        self.record: PassRecord | None = None
        # A tied parameter sits in several places.
        places: dict[int, list[Place]] = {}
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    places.setdefault(id(value), []).append((module._parameters, name))
        self._places = {name: places[id(value)] for name, value in model.named_parameters()}

    def __call__(self, params: Mapping[str, Tensor], split: Split) -> dict[str, Tensor]:
        with _in_place_of(self._places, params):
            losses, self.record = self.model(split)
        return losses

    def traced(self, params: Mapping[str, Tensor], split: Split) -> TracedLosses:
        """The same losses for second derivatives: the backbone is the trunk, and its last map the features."""
        random = random_state(split.images.device)
        cut = Cut(*getattr(self.model.network.backbone, "cuts", ()))
        with _in_place_of(self._places, params):
            with cut.watched():
                maps = self.model.maps(split)
            losses, self.record = self.model.losses(maps, split)
        constants = {name: value.detach() for name, value in params.items() if name.startswith(_BACKBONE)}

        def again(values: Mapping[str, Tensor]) -> Tensor:
            with _in_place_of(self._places, {**constants, **values}):
                return self.model.maps(split)

        # A backbone of one's own may keep a state, or draw from generators that are not known here.
        trusted = self.model.network.backbone_name is not None
        return TracedLosses(losses, maps, constants, again, random, trusted=trusted, cut=cut)


@contextmanager
def _in_place_of(places: Mapping[str, Sequence[Place]], params: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters named in `params` are those values."""
    replaced = []
    try:
        for name, value in params.items():
            for parameters, key in places[name]:
                if parameters[key] is not value:
                    replaced.append((parameters, key, parameters[key]))
                    parameters[key] = value
        yield
    finally:
        for parameters, key, own in replaced:
            parameters[key] = own
