"""One meta step of a DAN: gradients, competition and outer step, without a file, a folder or a display."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dan_fast.core.batches import Split
from dan_fast.daml import Competition, Stage, accuracies_tie, active_groups, attention_wins, meta_gradients
from dan_fast.daml.meta import differentiable
from dan_fast.distributed.buckets import add_up
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.functional.autocast import full_precision
from dan_fast.training.config import MetaConfig, TrainConfig
from dan_fast.training.metrics import accuracy
from dan_fast.training.objective import DivergedError, Objective, PassRecord, TrainingModel, all_finite, require_sound
from dan_fast.training.ranks import any_rank, whole_pass, with_shares
from dan_fast.training.valid_settings import require_valid

# A parametrised one, as by weight_norm or LoRA, has several.
_CAM_WEIGHTS = ("network.classifier.weight", "network.classifier.parametrizations.weight.")


@dataclass(frozen=True)
class StepResult:
    """What a step has found; every tensor is detached and on the device, which is not waited for.

    Attributes:
        grads: parameter name to gradient, what the outer step follows; frozen parameters are left out.
        stage: which groups were trained; None where no competition was held.
        train_losses: name to () float32, the losses of S at G, see `TrainingModel`.
        test_losses: the same of S~ at G'; empty where the batch is not split.
        train_record: what else is known of the pass of S.
        test_record: the same of S~; None where the batch is not split.
    """

    grads: dict[str, Tensor]
    stage: Stage | None
    train_losses: dict[str, Tensor]
    test_losses: dict[str, Tensor]
    train_record: PassRecord
    test_record: PassRecord | None

    @property
    def accuracies(self) -> dict[str, Tensor]:
        """The share of S's labelled samples that each branch, attention and adversary, classifies rightly, ()."""
        record = self.train_record
        logits = {"attention": record.logits, "adversary": record.adversary_logits}
        return {branch: accuracy(each, record.labels) for branch, each in logits.items()}


class MetaStep:
    """The training step of data assimilation meta-learning, Sec. III-D and Algorithm 1.

    `step` takes one: the losses of S, the competition, the losses of S~ after the inner step, and the outer step
    along both gradients. `gradients` and `apply` are its two halves, for a caller that changes the gradients between
    them.

    The inner step of a parameter is as long as the step of the optimizer, the "lr" of its group: delta_1 = delta_2 in
    Eq. (19).

    Args:
        model: network, memory and weights of the losses. It is used in the mode it is in, so call `train()` first.
        optimizer: of every parameter of `model` that requires a gradient. Parameters that are frozen in a step have the
            gradient None there, so that neither momentum nor weight decay moves them.
        meta: procedure, order, eta, stall guard and ties; the paper's settings by default. "daml3" holds the
            competition; without an adversary attention always wins.
        process_group: ranks that each hand in a share of S and of S~ and take the step that one rank would take with
            all of them. Each share has at least one image, which is labelled or fed back where unlabelled ones only
            lend their styles; a memory has to be made with the same group. Gradients are added up; running statistics,
            that is, buffers whose names begin with running_, are averaged; batch norm itself and style mixing use a
            rank's own images. The result is the same on every rank. None: one process.

    Names and places of the parameters are looked up once, here: freeze, replace and add modules before that.

    Attributes:
        model, optimizer, meta, process_group: as given.
        competition: decides which groups are trained; its state is the state of the step.
        competes: whether it is held.
        objective: runs the model with other values for its parameters.

    Raises:
        ValueError: the optimizer lacks a parameter that requires a gradient or takes more than one pass a step, or the
            memory has another process group.
        DanFastError: a setting of `meta` or a weight of the losses that is not valid, such as an unknown procedure.

    Example:
        >>> from dan_fast.nn import DAN, ProgressiveAugmentedMemory
        >>> from dan_fast.training import LossConfig
        >>> network = DAN(num_classes=2, backbone="resnet18", image_size=(64, 32))
        >>> memory = ProgressiveAugmentedMemory(labeled_slots=4, unlabeled_slots=4, key_dim=network.key_dim)
        >>> model = TrainingModel(network, memory, LossConfig())
        >>> meta_step = MetaStep(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
        >>> labels, sample_ids = torch.tensor([0, 1, -1, -1]), torch.tensor([-1, -1, 0, 1])
        >>> def split():
        ...     return Split(torch.randn(4, 3, 64, 32), labels, sample_ids, num_labeled=2, num_fed_back=0)
        >>> result = meta_step.step(split(), split())
        >>> result.train_losses["total"].shape, sorted(result.accuracies)
        (torch.Size([]), ['adversary', 'attention'])
    """

    def __init__(
        self,
        model: TrainingModel,
        optimizer: torch.optim.Optimizer,
        meta: MetaConfig | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if model.memory is not None and model.memory.process_group is not process_group:
            raise ValueError("process_group must be that of the model's memory: make both with the same group")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS takes several passes a step, and a memory advances in each: take SGD or Adam")
        self.model = model
        self.process_group = process_group
        self.optimizer = optimizer
        self.meta = MetaConfig() if meta is None else meta
        # A procedure that is none would train as another one.
        require_valid(TrainConfig(meta=self.meta, loss=model.weights))
        self.competition = Competition(self.meta.stall_guard)
        self.objective = Objective(model)
        self._params = {name: value for name, value in model.named_parameters() if value.requires_grad}
        group_of = {id(each): index for index, group in enumerate(optimizer.param_groups) for each in group["params"]}
        for name, value in self._params.items():
            if id(value) not in group_of:
                raise ValueError(f"the optimizer lacks {name!r}: add it, or freeze it with requires_grad_(False)")
        # By index, because the optimizer makes new groups when it loads a state.
        self._group_of = {name: group_of[id(value)] for name, value in self._params.items()}
        names = model.network.parameter_groups()
        self._backbone, self._attention = (
            [f"network.{name}" for name in names[group] if f"network.{name}" in self._params]
            for group in ("backbone", "attention")
        )
        self._gates = [name for name in self._params if name.startswith("memory.")]
        # A loss that does not reach the classifier would move it by momentum and weight decay alone.
        reached = model.network.adversary_reach == "all"
        self._cam_weights = [name for name in self._backbone if reached and name.startswith(_CAM_WEIGHTS)]
        self.competes = self.meta.procedure == "daml3" and model.network.adversary

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def step(self, meta_train: Split, meta_test: Split | None = None) -> StepResult:
        """Take the meta step and the outer step.

        Args, Raises: as `gradients`; no parameter has moved where an error is raised.
        """
        result = self.gradients(meta_train, meta_test)
        self.apply(result.grads)
        return result

    def gradients(self, meta_train: Split, meta_test: Split | None = None) -> StepResult:
        """What the outer step follows, without taking it.

        Memory, competition and batch norm's buffers advance by the batch. The host waits for a GPU once after S, where
        it has to know who won the competition, and once at the end.

        Args:
            meta_train: S, on the model's device or on the host; images in pinned memory are copied without waiting.
            meta_test: S~; None for "daml1", which does not split its batches.

        Raises:
            DivergedError: a feature or a gradient is not finite; batch norm's running statistics may have taken it in,
                so continue from a state that was saved before.
            ValueError: batch norm or the memory refuses the batch, labels are not classes of the network, S has no
                labelled image where a competition is held, a part or a rank's share of it has no image, the procedure
                needs the batch split otherwise, or a parameter was frozen since this was made.
            TypeError: images that are not floating, or of another dtype than the network. What a rank refuses of its
                share the others raise as a ValueError, before anything has advanced.
            RuntimeError: it is called in `torch.inference_mode`.
        """
        refused = None
        try:
            self._require_sound_batch(meta_train, meta_test)
        except (ValueError, TypeError) as error:
            if self.process_group is None:
                raise
            refused = error
        # The model opens an autocast of its own; one around the backward passes would round their products.
        order = self.meta.order if meta_test is not None else 1
        with differentiable(order), full_precision(self.device):
            if self.process_group is not None:
                parts = 1 if self.meta.procedure == "daml1" else 2
                splits = meta_train, meta_test
                meta_train, meta_test = with_shares(
                    self.process_group, splits, parts, self.model.lending, self.device, refused
                )
            meta_train = self._to_device(meta_train)
            if self.competes and meta_train.whole_counts[0] == 0:
                raise ValueError("S needs a labelled image, by which the competition is decided")
            result = self._gradients(meta_train, meta_test)
            self._average_statistics()
            return result

    def _require_sound_batch(self, meta_train: Split, meta_test: Split | None) -> None:
        if (meta_test is None) != (self.meta.procedure == "daml1"):
            split = "one part, S" if self.meta.procedure == "daml1" else "two parts, S and S~"
            raise ValueError(f"the procedure {self.meta.procedure} takes batches of {split}")
        frozen = [name for name, value in self._params.items() if not value.requires_grad]
        if frozen:
            raise ValueError(f"{frozen[0]!r} was frozen after this MetaStep was made: make another one")
        for part in (each for each in (meta_train, meta_test) if each is not None):
            if self.process_group is None and len(part.labels) == 0:
                raise ValueError("a part of the batch has no images: S and S~ need one or more each")
            part.require_sound(self.model.network.classifier.out_features)
            kinds = {each.dtype: None for each in self.model.network.parameters()}
            if self.model.autocast_dtype is None and part.images.dtype not in kinds:
                network = " and ".join(map(str, kinds))
                raise TypeError(f"images are {part.images.dtype} and the network is {network}: make them of one dtype")

    def apply(self, grads: Mapping[str, Tensor]) -> None:
        """Take the outer step along `grads`, as `StepResult` holds them."""
        for name, parameter in self._params.items():
            # None, not zero: a frozen parameter must not move by momentum or weight decay either.
            parameter.grad = grads.get(name)
        self.optimizer.step()

    def state_dict(self) -> dict[str, dict[str, int]]:
        """What model and optimizer do not hold of a training's state."""
        return {"competition": self.competition.state_dict()}

    def load_state_dict(self, state: Mapping[str, dict[str, int]]) -> None:
        """Go on from what `state_dict` gave."""
        self.competition.load_state_dict(state["competition"])

    def _gradients(self, meta_train: Split, meta_test: Split | None) -> StepResult:
        """Algorithm 1 up to the outer step, of splits that are sound and whose shares are known."""
        second = self.meta.order == 2 and meta_test is not None
        train_losses = (self.objective.traced if second else self.objective)(self._params, meta_train)
        losses, record = self._whole(train_losses, meta_train)
        if meta_test is None:
            values = torch.autograd.grad(train_losses["total"], [*self._params.values()], materialize_grads=True)
            grads = self._added_up(dict(zip(self._params, values, strict=True)))
            _require_sound([record], grads.values())
            return StepResult(grads, None, losses, {}, record, None)

        stage, groups, unread = None, None, [record]
        if self.meta.procedure == "daml3":
            if self.competes:
                stage, unread = self._compete(record), []
            groups = self._groups(stage or Stage.ATTENTION)
        meta_test = self._to_device(meta_test)
        found = meta_gradients(
            self.objective,
            self._params,
            groups,
            meta_train,
            meta_test,
            self._inner_steps(),
            self.meta.eta,
            self.meta.order,
            train_losses=train_losses,
            add_up=self._added_up,
            any_failed=self._any_failed,
        )
        test_losses, test_record = self._whole(found.test_losses, meta_test)
        _require_sound([*unread, test_record], found.grads.values())
        return StepResult(found.grads, stage, losses, test_losses, record, test_record)

    def _whole(self, losses: Mapping[str, Tensor], split: Split) -> tuple[dict[str, Tensor], PassRecord]:
        """The last pass of all ranks."""
        record = self.objective.record
        if self.process_group is None:
            return {name: value.detach() for name, value in losses.items()}, record
        return whole_pass(self.process_group, losses, record, split, self.model.lending)

    def _added_up(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the whole batch from each rank's own; the gates' are whole on every rank."""
        if self.process_group is None:
            return dict(grads)
        own = [name for name in grads if name not in self._gates]
        sums = add_up(self.process_group, [grads[name] for name in own], [self._params[name] for name in own])
        return {**grads, **dict(zip(own, sums, strict=True))}

    def _any_failed(self, failed: bool) -> bool:
        return failed if self.process_group is None else any_rank(self.process_group, failed, self.device)

    def _average_statistics(self) -> None:
        """Make batch norm's running statistics the mean of the ranks', so that all go on with the same."""
        if self.process_group is None:
            return
        # No other buffers: a sum of constants may overflow, and what rests is the same everywhere.
        running = (module._buffers.items() for module in self.model.network.modules() if module.training)
        statistics = [
            each
            for buffers in running
            for name, each in buffers
            if name.startswith("running_") and each is not None and each.is_floating_point()
        ]
        with torch.no_grad():
            for each, total in zip(statistics, add_up(self.process_group, statistics, statistics), strict=True):
                each.copy_(total / self.process_group.size())

    def _compete(self, record: PassRecord) -> Stage:
        """The stage that the samples of S decide; the pass is known to be sound afterwards."""
        branches = record.logits, record.adversary_logits, record.labels
        decisions = [attention_wins, accuracies_tie] if self.meta.tie == "both" else [attention_wins]
        fault, *decided = _read([record.fault, *(decision(*branches) for decision in decisions)])
        require_sound(fault)
        return self.competition.decide(*map(bool, decided))

    def _groups(self, stage: Stage) -> dict[str, tuple[list[str], str]]:
        backbone, gates = self._backbone, self._gates
        if stage is not Stage.ADVERSARY and self.meta.order == 1:
            # Of L_total the gates move l2 L_lde alone, so their gradient is the same, and one walk of the memory's part
            # of the graph serves both. With second derivatives they also move what S~ loses at the new backbone.
            backbone, gates = [*backbone, *gates], []
        return active_groups(stage, backbone, self._attention, gates, self._cam_weights)

    def _inner_steps(self) -> float | dict[str, float]:
        sizes = [group["lr"] for group in self.optimizer.param_groups]
        return sizes[0] if len(set(sizes)) == 1 else {name: sizes[group] for name, group in self._group_of.items()}

    def _to_device(self, split: Split) -> Split:
        device = self.device
        return split._replace(
            images=split.images.to(device, memory_format=torch.channels_last, non_blocking=True),
            labels=split.labels.to(device, non_blocking=True),
            sample_ids=split.sample_ids.to(device, non_blocking=True),
        )


def _read(flags: Sequence[Tensor]) -> list[int]:
    """() integer or bool tensors of one device as numbers; the device is waited for once."""
    return torch.stack([flag.to(torch.int32) for flag in flags]).tolist()


def _require_sound(records: Sequence[PassRecord], grads: Iterable[Tensor]) -> None:
    grads, found = list(grads), [record.fault for record in records]
    # Of a stage in which everything is frozen there are none.
    *faults, finite = _read([*found, all_finite(grads) if grads else torch.ones_like(found[0])])
    # In the order in which it happened: what is wrong with S makes S~ and the gradients wrong too.
    for fault in faults:
        require_sound(fault)
    if not finite:
        raise DivergedError("gradients are not finite")
