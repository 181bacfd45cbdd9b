"""Second derivatives times a vector: what the inner step adds to the gradients of the meta objective, Eq. (18).

The inner step of group h is minus its gradient of S, so what S~ loses in it, v_h, moves the parameters of every
group by the derivative of <v_h, dL_h/dG_h>: a product of a matrix with a vector, never the matrix. Forward over reverse
takes it as the forward-mode derivative of a backward pass: first derivatives of convolutions are all it needs, and it
keeps no graph of a gradient. Double backward differentiates the backward pass in reverse.

Both see the network in two parts. The trunk makes features of images; what follows, the head, is small, has forms that
are differentiable twice, and keeps its graph from the first pass.
"""

import importlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dan_fast.daml.dual_mode import DualMode
from dan_fast.daml.gathered import gathered
from dan_fast.daml.traced import Params, TracedLosses
from dan_fast.distributed.launch import is_loss_of_a_rank

_by_double_backward: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()


class _NotServed(RuntimeError):
    """Forward over reverse has failed, on this rank or on another: all of them raise it, at one place."""


class Head:
    """The gradient of one loss of S in the features and in the parameters behind them, differentiable in its turn.

    Args:
        losses: of S.
        name: of the loss.
        params: the parameters that follow this loss, by name.
        features: whether the gradient in the features is wanted.
    """

    def __init__(self, losses: TracedLosses, name: str, params: Params, features: bool) -> None:
        behind = {each: value for each, value in params.items() if each not in losses.trunk}
        inputs = [*([losses.features] if features else []), *behind.values()]
        found = gradients_of(losses[name], inputs, create_graph=True)
        self.by_features = found[0] if features else None
        self.by_params = dict(zip(behind, found[len(found) - len(behind) :], strict=True))

    def product(self, features_tangent: Tensor | None, tangents: Params) -> list[Tensor]:
        """Terms, each () and differentiable, whose sum is this gradient times the tangents."""
        pairs = [(self.by_features, features_tangent)]
        pairs += [(grad, tangents.get(name)) for name, grad in self.by_params.items()]
        terms = [(grad * tangent).sum() for grad, tangent in pairs if grad is not None and tangent is not None]
        return [term for term in terms if term.requires_grad]


class SecondOrder:
    """The graph of S as products of its second derivatives need it.

    Args:
        losses: of S, computed with `params`.
        params: the parameters that are trained, by name.
        names: of each loss, the parameters that follow it.
        any_failed: whether something has failed on any rank, by whether it has on this one.

    Attributes:
        heads: loss name to `Head`.
        depends: whether any loss depends on a parameter that follows it, once `gradients` has been called.
    """

    def __init__(
        self,
        losses: TracedLosses,
        params: Params,
        names: Mapping[str, Sequence[str]],
        any_failed: Callable[[bool], bool] = bool,
    ) -> None:
        self.losses = losses
        self._any_failed = any_failed
        self.params = params
        self._followers = names
        self.depends = False
        losses.cut.find(losses.features, params)
        trunk = losses.features.requires_grad and any(name in losses.trunk for name in params)
        self.heads = {
            loss: Head(losses, loss, {name: params[name] for name in each}, trunk) for loss, each in names.items()
        }

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each loss in the parameters that follow it, zero where it depends on none of them.

        What the trunk kept for its backward pass is freed if its features can surely be had again.
        """
        found: dict[str, Tensor] = {}
        through = [loss for loss, head in self.heads.items() if head.by_features is not None]
        for loss, names in self._followers.items():
            head = self.heads[loss]
            trunk, _ = self._parted(names)
            _accumulate(found, head.by_params)
            if trunk and loss in through:
                features = self.losses.features
                inputs = [self.params[name] for name in trunk]
                seed = head.by_features.detach()
                keeps = not self.losses.trusted or loss != through[-1]
                grads = gradients_of(features, inputs, seed, retain_graph=keeps)
                _accumulate(found, dict(zip(trunk, grads, strict=True)))
        self.depends = bool(found)
        return gathered({name: found.get(name, torch.zeros_like(value)) for name, value in self.params.items()})

    def product(self, loss_fn: Any, tangents: Mapping[str, Params], wanted: Sequence[str]) -> dict[str, Tensor]:
        """`by_forward_over_reverse`, or `by_double_backward` where that cannot be.

        It is found by trying, by all ranks together; it is said once of a `loss_fn`, and not tried again.

        Raises:
            ValueError: an operator has neither forward mode nor second derivatives.
        """
        key, owner = _identity(loss_fn)
        if _by_double_backward.get(key) is not owner:
            try:
                return self.by_forward_over_reverse(tangents, wanted)
            except _NotServed as error:
                _by_double_backward[key] = owner
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(
                    "order 2 goes by double backward, which takes more time and memory, since forward over reverse "
                    f"cannot serve: {reason}",
                    stacklevel=4,
                )
        whole = self
        if not self.losses.trusted:
            whole = SecondOrder(TracedLosses.whole(self.losses), self.params, self._followers)
        try:
            return whole.by_double_backward(tangents, wanted)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise ValueError(f"second derivatives cannot be had ({str(error).strip()}): take order 1") from error

    def by_forward_over_reverse(self, tangents: Mapping[str, Params], wanted: Sequence[str]) -> dict[str, Tensor]:
        """The sum over the losses of the derivative, along the tangents of a loss, of its gradient in `wanted`.

        Args:
            tangents: loss name to (parameter name to tangent, of the parameter's shape).
            wanted: names of parameters.

        Returns:
            Name to a tensor of the parameter's shape; what does not depend on the tangents is left out.

        Raises:
            RuntimeError: an operator of the trunk has no forward mode, on this rank or on another.
        """
        trunk, behind = self._parted(wanted)
        found: dict[str, Tensor] = {}
        carried: list[Tensor] = []
        # What moves the trunk comes last, with the derivatives of the other losses in its output carried along.
        for loss in sorted(tangents, key=lambda name: self._moves_trunk(tangents[name])):
            if self._moves_trunk(tangents[loss]) and self.heads[loss].by_features is not None:
                carried = self._dual_pass(loss, tangents[loss], trunk, behind, carried, found)
            else:
                carried += self._through_head(self.heads[loss].product(None, tangents[loss]), behind, found)
        if carried and trunk:
            self._dual_pass(None, {}, trunk, behind, carried, found)
        return found

    def by_double_backward(self, tangents: Mapping[str, Params], wanted: Sequence[str]) -> dict[str, Tensor]:
        """The same by a second graph: the trunk's gradient is differentiated in reverse.

        Args, Returns: as `by_forward_over_reverse`.
        """
        trunk, behind = self._parted(wanted)
        moved = {name for each in tangents.values() for name in each if name in self.losses.trunk}
        leaves = {name: self.params[name].detach().requires_grad_() for name in dict.fromkeys([*trunk, *moved])}
        features = self.losses.again(leaves) if leaves else None
        terms: list[Tensor] = []
        for loss, along in tangents.items():
            head = self.heads[loss]
            terms += head.product(None, along)
            names = [name for name in along if name in leaves]
            if names and head.by_features is not None:
                grads = gradients_of(features, [leaves[name] for name in names], head.by_features, create_graph=True)
                products = [
                    (grad * along[name]).sum() for name, grad in zip(names, grads, strict=True) if grad is not None
                ]
                terms += [product for product in products if product.requires_grad]
        found: dict[str, Tensor] = {}
        carried = self._through_head(terms, behind, found, {name: leaves[name] for name in trunk})
        for cotangent in carried if trunk else ():
            grads = gradients_of(features, [leaves[name] for name in trunk], cotangent)
            _accumulate(found, dict(zip(trunk, grads, strict=True)))
        return found

    def _parted(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Those of the trunk and those behind it."""
        trunk = self.losses.trunk
        return [name for name in names if name in trunk], [name for name in names if name not in trunk]

    def _moves_trunk(self, tangents: Params) -> bool:
        return any(name in self.losses.trunk for name in tangents)

    def _through_head(
        self, terms: Sequence[Tensor], behind: Sequence[str], found: dict[str, Tensor], leaves: Params | None = None
    ) -> list[Tensor]:
        """Add the gradient of the terms' sum to `found`; what it is in the features, none or one tensor.

        Args:
            leaves: more tensors to differentiate in, by name.
        """
        if not terms:
            return []
        inputs = {name: self.params[name] for name in behind} | dict(leaves or {})
        by_features, *grads = gradients_of(torch.stack(terms).sum(), [self.losses.features, *inputs.values()])
        _accumulate(found, dict(zip(inputs, grads, strict=True)))
        return [] if by_features is None else [by_features.detach()]

    def _dual_pass(
        self,
        loss: str | None,
        tangents: Params,
        trunk: Sequence[str],
        behind: Sequence[str],
        carried: Sequence[Tensor],
        found: dict[str, Tensor],
    ) -> list[Tensor]:
        """Forward and backward through the trunk with numbers that carry their derivative along `tangents`.

        Returns:
            What of `carried` is left to do: all of it where nothing of the trunk is wanted.
        """
        names = [name for name in dict.fromkeys([*trunk, *tangents]) if name in self.losses.trunk]
        _load_rules()
        with forward_ad.dual_level():
            duals = {name: _dual(self.params[name], tangents.get(name)) for name in names}
            with self._tried():
                if trunk:
                    features, pull = self.losses.cut.vjp(self.losses.again, duals, trunk)
                else:
                    with DualMode():
                        features = self.losses.again(duals)
                primal, tangent = forward_ad.unpack_dual(features)
                self._require_same(primal)
            cotangents = list(carried)
            seed = None
            if loss is not None:
                terms = self.heads[loss].product(tangent, tangents)
                cotangents += self._through_head(terms, behind, found)
                seed = self.heads[loss].by_features.detach()
            if not trunk:
                return cotangents
            if seed is None:
                seed = torch.zeros_like(cotangents[0])
            if cotangents:
                seed = forward_ad.make_dual(seed, torch.stack(cotangents).sum(0))
            with self._tried():
                grads = pull(seed)
            _accumulate(found, grads)
        return []

    @contextmanager
    def _tried(self) -> Iterator[None]:
        """Inside, nothing is collective; where it fails on one rank all of them leave it by `_NotServed`."""
        fault = None
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            if is_loss_of_a_rank(error):
                raise
            fault = error
        if self._any_failed(fault is not None):
            raise _NotServed(fault or "it has failed on another rank") from fault

    def _require_same(self, features: Tensor) -> None:
        if self.losses.trusted:
            return
        rounding = 1e3 * torch.finfo(features.dtype).eps
        if not torch.allclose(features, self.losses.features.detach(), rounding, rounding, equal_nan=True):
            raise RuntimeError(
                "loss_fn gave other losses when it was called again with the same parameters and batch, so it keeps a "
                "state, which may have advanced by this batch twice; give loss_fn a method traced, see TracedLosses"
            )


def _identity(loss_fn: Any) -> tuple[tuple[int, int], Any]:
    """What a loss_fn is remembered by, which need not be hashable, and what has to live for as long.

    A bound method is another object each time it is looked up, and what has no weak references stands for its class.
    """
    owner, function = loss_fn, type(loss_fn)
    if isinstance(loss_fn, MethodType):
        owner, function = loss_fn.__self__, loss_fn.__func__
    try:
        weakref.ref(owner)
    except TypeError:
        owner = type(owner)
    return (id(owner), id(function)), owner


@cache
def _load_rules() -> None:
    """Import PyTorch's rules of forward mode, which it would do by itself, but with a warning about its own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def gradients_of(
    value: Tensor,
    inputs: Sequence[Tensor],
    seed: Tensor | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool = True,
) -> list[Tensor | None]:
    """The gradients of a value in the inputs, None where there is none.

    Args:
        value: whose `seed`, its own gradient, may be left out where it is ().
        inputs: floating.
        create_graph, retain_graph: see `torch.autograd.grad`.
    """
    wanted = [index for index, each in enumerate(inputs) if each.requires_grad]
    grads: list[Tensor | None] = [None] * len(inputs)
    if value.requires_grad and wanted:
        found = torch.autograd.grad(
            value,
            [inputs[index] for index in wanted],
            seed,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
        for index, each in zip(wanted, found, strict=True):
            grads[index] = each
    return grads


def _accumulate(total: dict[str, Tensor], more: Mapping[str, Tensor | None]) -> None:
    for name, value in more.items():
        if value is not None:
            total[name] = total[name] + value.detach() if name in total else value.detach()


def _dual(value: Tensor, tangent: Tensor | None) -> Tensor:
    value = value.detach()
    return value if tangent is None else forward_ad.make_dual(value, tangent)
