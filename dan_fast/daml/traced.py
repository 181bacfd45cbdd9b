"""Losses of which a part can be computed again, for second derivatives: with the same draws, and without effect."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dan_fast.daml.cut import Cut

Params = Mapping[str, Tensor]
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class TracedLosses(dict[str, Tensor]):
    """Losses that depend on the parameters of a trunk through one tensor, and how to compute that tensor again.

    A `loss_fn` with a method `traced(params, batch)` that returns them works with second derivatives even if it keeps a
    state, as a memory does: only its trunk runs again.

    Args:
        losses: name to () tensor.
        features: floating, in the graph of the losses.
        trunk: names of the parameters that `features` is a function of. No loss depends on them in another way.
        again: maps parameters of the trunk, by name, to `features`. It may update running statistics, which are kept as
            they were, and draw random numbers, which are those of the first time.
        random: the state of the random numbers before the first time, see `random_state`.
        trusted: whether `again` is known to give the same features for the same parameters. If not, the graph of the
            losses is kept, and double backward goes through it where they differ.
        cut: the cut of the trunk, which was watched when the trunk ran the first time; it saves memory.

    Example:
        >>> from dan_fast.daml import meta_gradients, random_state
        >>> seen = []  # a state: what a loss_fn without `traced` would change once more
        >>> def features(params, batch):
        ...     return params["w"] * batch
        >>> def loss_fn(params, batch):
        ...     return loss_fn.traced(params, batch)
        >>> def traced(params, batch):
        ...     random, found = random_state(batch.device), features(params, batch)
        ...     seen.append(len(seen))
        ...     losses = {"total": found.square().sum()}
        ...     return TracedLosses(losses, found, ["w"], lambda values: features(values, batch), random)
        >>> loss_fn.traced, batch = traced, torch.ones(1, dtype=torch.float64)
        >>> meta_gradients(loss_fn, {"w": torch.ones_like(batch)}, None, batch, batch, inner_lr=0.1).grads["w"], seen
        (tensor([3.2800], dtype=torch.float64), [0, 1])
    """

    def __init__(
        self,
        losses: Mapping[str, Tensor],
        features: Tensor,
        trunk: Collection[str],
        again: Callable[[Params], Tensor],
        random: Mapping[str, Tensor],
        trusted: bool = True,
        cut: Cut | None = None,
    ) -> None:
        super().__init__(losses)
        self.features = features
        self.trunk = frozenset(trunk)
        self.trusted = trusted
        self.cut = cut or Cut()
        self._again = again
        self._random = random

    @classmethod
    def whole(cls, losses: Mapping[str, Tensor]) -> Self:
        """Losses of which nothing can be had again: there is no trunk, and double backward goes through their graph."""
        return cls(losses, torch.zeros(()), (), lambda params: torch.zeros(()), {})

    def again(self, params: Params) -> Tensor:
        """The features for other values of the trunk's parameters; nothing else changes."""
        with _random_numbers(self._random), _statistics_kept():
            return self._again(params)


def traced_losses(
    loss_fn: Callable[[Params, Any], Mapping[str, Tensor]],
    params: Params,
    batch: Any,
    active: Collection[str],
    followed: Collection[str],
) -> TracedLosses:
    """The losses of a batch as second derivatives need them.

    Args:
        loss_fn: see `meta_gradients`. Of one without a method `traced` everything is trunk, and the losses that are
            followed are its features: it is called again as a whole.
        params: name to tensor.
        batch: for `loss_fn`.
        active: the parameters that require a gradient.
        followed: the losses that are differentiated, by name.

    Raises:
        ValueError: one of them is missing.
    """
    if hasattr(loss_fn, "traced"):
        return loss_fn.traced(params, batch)
    random = random_state(next(iter(params.values())).device)
    losses = loss_fn(params, batch)
    features = torch.stack([loss_of(losses, name) for name in followed])
    constants = {name: value.detach() for name, value in params.items()}

    def again(values: Params) -> Tensor:
        found = loss_fn({**constants, **values}, batch)
        return torch.stack([loss_of(found, name) for name in followed])

    found = {**losses, **dict(zip(followed, features.unbind(), strict=True))}
    return TracedLosses(found, features, active, again, random, trusted=False)


def loss_of(losses: Mapping[str, Tensor], name: str) -> Tensor:
    """The loss of a group, ().

    Raises:
        TypeError: it is no tensor of one number, or there is no dict of losses.
        ValueError: it is missing.
    """
    if not isinstance(losses, Mapping):
        raise TypeError(f"loss_fn must return a dict of losses, got {type(losses).__name__}")
    if name not in losses:
        raise ValueError(f"groups: loss {name!r} is not among those loss_fn returned: {', '.join(losses)}")
    loss = losses[name]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss_fn: {name!r} must be a tensor of one number, got {what}")
    return loss.reshape(())


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that a pass on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, str(device): torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


@contextmanager
def _random_numbers(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the process's generators go on from `state`; outside they are as they were."""
    devices = [device for device in state if device != "cpu"]
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(state["cpu"])
        for device in devices:
            torch.cuda.set_rng_state(state[device], device)
        yield


@contextmanager
def _statistics_kept() -> Iterator[None]:
    """Inside, layers in training mode normalise by the batch and leave their running statistics alone."""
    frozen: set[nn.Module] = set()
    taken: dict[nn.Module, dict[str, Tensor | None]] = {}
    before: dict[nn.Module, dict[str, Tensor | None]] = {}
    after: dict[nn.Module, dict[str, Tensor | None]] = {}

    def take(module: nn.Module, _: Any) -> None:
        if module.training and getattr(module, "track_running_stats", False):
            # Until the end, by which a pass that is computed again knows that this one left the statistics alone.
            module.track_running_stats = False
            frozen.add(module)
        if module.training and module._buffers:
            before.setdefault(module, dict(module._buffers))
        if module in frozen and isinstance(module, _INSTANCE_NORMS):
            # It updates what it has, whatever that says.
            taken[module] = {name: module._buffers[name] for name in ("running_mean", "running_var")}
            module._buffers.update(dict.fromkeys(taken[module]))

    def give_back(module: nn.Module, *_: Any) -> None:
        # At once: `torch.func.functional_call` may have lent a buffer, which it takes back when the call is over.
        if module in taken:
            module._buffers.update(taken.pop(module))
        if module in before:
            after[module] = dict(module._buffers)

    handles = register_module_forward_pre_hook(take), register_module_forward_hook(give_back, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(taken):
            give_back(module)
        for module in frozen:
            module.track_running_stats = True
        for module, buffers in after.items():
            # What a layer of one's own has put in the place of its buffers; what was lent has been taken back by now.
            for name, value in before[module].items():
                if module._buffers.get(name) is buffers[name]:
                    module._buffers[name] = value
