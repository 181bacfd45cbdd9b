"""Gradients of the meta-optimisation objective, Eqs. (17)-(18) and Algorithm 1."""

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dan_fast.daml.gathered import gathered
from dan_fast.daml.second_order import SecondOrder, gradients_of
from dan_fast.daml.traced import TracedLosses, loss_of, traced_losses

Params = Mapping[str, Tensor]
Losses = Mapping[str, Tensor]
Groups = Mapping[str, tuple[Sequence[str], str]]


class MetaGradients(NamedTuple):
    """The gradients of the meta objective, and the losses they come from.

    Attributes:
        train_losses: name to () tensor, the losses of S at G, detached.
        test_losses: name to () tensor, the losses of S~ at G', detached.
        grads: parameter name to gradient, for the parameters of the active groups.
    """

    train_losses: dict[str, Tensor]
    test_losses: dict[str, Tensor]
    grads: dict[str, Tensor]


def meta_gradients(
    loss_fn: Callable[[Params, Any], Losses],
    params: Params,
    groups: Groups | None,
    meta_train: Any,
    meta_test: Any,
    inner_lr: float | Mapping[str, float],
    eta: float = 1.0,
    order: int = 2,
    *,
    train_losses: Losses | None = None,
    add_up: Callable[[Params], Params] = dict,
    any_failed: Callable[[bool], bool] = bool,
) -> MetaGradients:
    """Derivatives of L_g(S, G) + eta L_g(S~, G') for every group g with respect to its own parameters.

    G' is G after one plain SGD step of size `inner_lr` of every active group on its own loss of S
    (Eq. 18, left). With `order=2` the derivative is total: it includes how G' depends on G, across groups
    too (Eqs. 17-18). With `order=1` second derivatives are dropped: grad L_g(S, G) + eta grad L_g(S~, G')
    taken at G' (Algorithm 1 as printed).

    Batch-norm buffers that `loss_fn` updates are updated by both passes, first with S at G, then with S~ at
    G'; nothing here rewinds them.

    Second derivatives are taken by forward over reverse: `loss_fn` is called again with `meta_train`, on numbers that
    carry a tangent, for each pair of groups with losses of their own. Those calls draw the random numbers of the first
    call and leave the statistics of batch norm alone. A `loss_fn` that gives other losses then, because it keeps
    another state, or whose operators lack forward mode, goes by double backward. There is a warning the first time
    only, provided that the function is the same object, or a method of the same object, from call to call. If it has a
    method `traced`, only a part of it is run again, see `dan_fast.daml.TracedLosses`. Whatever else a module or a hook
    keeps from those calls, such as its last output, cannot be copied afterwards. Gradients have to be those of the
    losses: whatever changes them on their way, such as a layer that reverses them, has no right derivative.

    An autocast around the call also holds for the backward passes and rounds their products: open it in `loss_fn`
    instead.

    Args:
        loss_fn: maps (name to tensor, batch) to a dict of scalar losses; called once with `meta_train`, then
            once with `meta_test`, and with `order=2` again with `meta_train`.
        params: name to tensor, G. A parameter in no group is constant in both passes.
        groups: the groups active in this iteration, name to (parameter names, name of the group's loss). None: every
            parameter that requires grad, or every parameter if none does, takes the loss "total"; the others, such as
            frozen layers, are constant and have no gradient.
        meta_train: the batch S, handed to `loss_fn` as it is.
        meta_test: the batch S~.
        inner_lr: delta_1 of Eq. (19); or one step size for each parameter, by name, for example for pretrained layers
            that move less.
        eta: the balance of Eq. (17).
        order: 1 or 2.
        train_losses: what `loss_fn(params, meta_train)` returned, if the caller has computed it already with
            tensors of `params` that require grad; `loss_fn` is then called for S~ only. With `order=2`, what `traced`
            returned, or double backward goes through the graph of these losses.
        add_up: where `loss_fn` gives a rank's own summand of the losses, adds gradients up over all ranks: called
            with name to tensor, the same names on each, for S, for S~ and for products of second derivatives.
        any_failed: as `add_up`; it is called with whether something has failed on this rank and returns whether it has
            on any rank, so that with `order=2` either all ranks go by double backward or none does.

    Raises:
        TypeError: `params` or `groups` is no mapping, `loss_fn` returns no dict, a loss that a group names is no tensor
            of one number, or a step size or `eta` is no number.
        ValueError: `order` is not 1 or 2, a parameter stands in two groups or is unknown or of integers or has no
            `inner_lr`, a loss that a group names is missing, without `groups` the loss of S depends on other tensors
            than `params`, a step size or `eta` is not finite, or with `order=2` a hook that `loss_fn` puts on a tensor
            changes a gradient.
        RuntimeError: it is called in `torch.inference_mode`; `torch.no_grad` around it has no effect.

    Example:
        >>> w = torch.tensor(1.0, dtype=torch.float64)
        >>> def loss_fn(params, batch):
        ...     return {"total": (params["w"] * batch) ** 2}
        >>> meta_gradients(loss_fn, {"w": w}, None, 1.0, 1.0, inner_lr=0.1).grads["w"]
        tensor(3.2800, dtype=torch.float64)
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    groups = _listed(params, groups)
    _check_groups(params, groups)
    active = {name for names, _ in groups.values() for name in names}
    if isinstance(inner_lr, Mapping):
        if active - inner_lr.keys():
            raise ValueError(f"inner_lr names no step size for {min(active - inner_lr.keys())!r}")
        _check_numbers({f"inner_lr of {name!r}": inner_lr[name] for name in active})
        steps = inner_lr
    else:
        _check_numbers({"inner_lr": inner_lr})
        steps = dict.fromkeys(active, inner_lr)
    _check_numbers({"eta": eta})
    with differentiable(order):
        # Where nothing is trained there is no second derivative.
        if order == 2 and active:
            given = (meta_train, meta_test)
            reductions = (add_up, any_failed)
            return _total_derivatives(loss_fn, params, groups, given, steps, eta, train_losses, reductions)
        if train_losses is None:
            current = _current(params, active)
            train_losses = loss_fn(current, meta_train)
        else:
            current = dict(params)
        train_grads = add_up(_group_gradients(train_losses, current, groups))
        moved, test_losses = _test_pass(loss_fn, current, train_grads, steps, meta_test)
        grads = _added(train_grads, add_up(_group_gradients(test_losses, moved, groups)), eta)
    return MetaGradients(_detached(train_losses), _detached(test_losses), grads)


def _total_derivatives(
    loss_fn: Callable[[Params, Any], Losses],
    params: Params,
    groups: Groups,
    batches: tuple[Any, Any],
    steps: Mapping[str, float],
    eta: float,
    train_losses: Losses | None,
    reductions: tuple[Callable[[Params], Params], Callable[[bool], bool]],
) -> MetaGradients:
    """`meta_gradients` with second derivatives.

    `batches` are S and S~, `steps` the size of each parameter's inner step, `reductions` `add_up` and `any_failed`.
    """
    add_up, any_failed = reductions
    followers: dict[str, list[str]] = {}
    for names, loss in groups.values():
        followers.setdefault(loss, []).extend(names)
    active = [name for names in followers.values() for name in names]
    if train_losses is None:
        current = _current(params, active)
        traced = traced_losses(loss_fn, current, batches[0], active, followers)
    else:
        current = dict(params)
        traced = train_losses if isinstance(train_losses, TracedLosses) else TracedLosses.whole(train_losses)
    for loss in followers:
        loss_of(traced, loss)
    second = SecondOrder(traced, {name: current[name] for name in active}, followers, any_failed)
    train_grads = second.gradients()
    _require_dependence(traced, groups, second.depends)
    train_grads = add_up(train_grads)
    moved, test_losses = _test_pass(loss_fn, current, train_grads, steps, batches[1])
    found = [
        gradients_of(loss_of(test_losses, loss), [moved[name] for name in active], retain_graph=number < len(followers))
        for number, loss in enumerate(followers, start=1)
    ]
    by_test = [
        gathered({name: grad for name, grad in zip(active, each, strict=True) if grad is not None}) for each in found
    ]
    del found
    # The graph of S~ would keep G' while that of the tangents grows.
    test_losses = _detached(test_losses)
    del moved

    grads: dict[str, Tensor] = {}
    for names, found in zip(followers.values(), by_test, strict=True):
        lost = add_up(found)
        tangents = {
            other: {name: steps[name] * lost[name] for name in each if name in lost}
            for other, each in followers.items()
        }
        inner = add_up(second.product(loss_fn, {other: along for other, along in tangents.items() if along}, names))
        for name in names:
            at_test = [sign * part[name] for part, sign in ((lost, eta), (inner, -eta)) if name in part]
            grads[name] = sum(at_test, start=train_grads[name])
    return MetaGradients(_detached(traced), test_losses, gathered({name: grads[name] for name in active}))


def _current(params: Params, active: Collection[str]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_(name in active) for name, value in params.items()}


def _test_pass(
    loss_fn: Callable[[Params, Any], Losses],
    current: Params,
    train_grads: Params,
    steps: Mapping[str, float],
    meta_test: Any,
) -> tuple[dict[str, Tensor], Losses]:
    """G' of the parameters in `train_grads`, and the losses of S~ there."""
    constants = {name: value.detach() for name, value in current.items() if name not in train_grads}
    with torch.no_grad():
        moved: dict[str, Tensor] = {}
        # One pass over the tensors of each step size.
        for size in dict.fromkeys(steps[name] for name in train_grads):
            part = {name: grad for name, grad in train_grads.items() if steps[name] == size}
            moved |= _added(current, part, -size)
    moved = {name: value.requires_grad_() for name, value in moved.items()}
    return moved, loss_fn({**constants, **moved}, meta_test)


@contextmanager
def differentiable(order: int) -> Iterator[None]:
    """Inside, what is computed can be differentiated `order` times, also where the caller takes no gradients.

    PyTorch's fused kernels of attention (`scaled_dot_product_attention`) have no second derivative. It is for forward
    and backward passes alike: gradient checkpointing runs the former again in the latter. Nor have modules that
    `torch.compile` has compiled: they run as they were written. A hook that is put on a tensor inside and changes its
    gradient would be differentiated as if it were symmetric, so it is refused; hooks of modules and nodes are not seen.

    Raises:
        RuntimeError: it is entered in `torch.inference_mode`, which cannot be undone inside.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode records nothing to differentiate: take meta gradients outside of it")
    with torch.enable_grad(), ExitStack() as stack:
        if order > 1:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_HooksLook())
            # Without it nothing is compiled, and to import it takes a second.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _HooksLook(TorchFunctionMode):
    """Inside, hooks on tensors may look at gradients, and raise ValueError where they give others."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not Tensor.register_hook:
            return func(*args, **(kwargs or {}))
        tensor, hook = (*args, *(kwargs or {}).values())

        def look(grad: Tensor) -> None:
            if (given := hook(grad)) is not None and given is not grad:
                raise ValueError(
                    "a hook on a tensor changes a gradient, of which order 2 would take a wrong derivative: take order "
                    "1, or make the change a part of the loss"
                )

        return func(tensor, look)


class _All(dict[str, tuple[list[str], str]]):
    """The one group of a caller who names none."""


def _listed(params: Params, groups: Groups | None) -> Groups:
    """The groups with lists of names, one of all that is trained where none are given."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params must map names to tensors, as dict(model.named_parameters()) does, got {type(params).__name__}"
        )
    if groups is None:
        # Tensors of a state dict require none; beside parameters that do, those that do not are frozen.
        trained = [name for name, value in params.items() if value.requires_grad]
        return _All({"all": (trained or list(params), "total")})
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups must map names to (names of parameters, name of a loss), got {type(groups).__name__}")
    for group, (names, _) in groups.items():
        if isinstance(names, str):
            raise TypeError(f"groups: {group!r} must list names of parameters, got the text {names!r}")
    # A generator would give its names once.
    return {group: (list(names), loss) for group, (names, loss) in groups.items()}


def _require_dependence(losses: Losses, groups: Groups, depends: bool) -> None:
    """Refuse a "total" of all parameters whose gradient is one of other tensors: it would be zero in silence."""
    if isinstance(groups, _All) and not depends and loss_of(losses, "total").requires_grad:
        raise ValueError(
            "loss_fn: 'total' depends on none of params but on other tensors that require grad: have loss_fn use the "
            "tensors it is given, as torch.func.functional_call(model, params, images) does"
        )


def _check_groups(params: Params, groups: Groups) -> None:
    owner: dict[str, str] = {}
    for group, (names, _) in groups.items():
        for name in names:
            if name not in params:
                raise ValueError(f"groups: {group!r} names parameter {name!r}, which is not in params")
            if not (params[name].is_floating_point() or params[name].is_complex()):
                raise ValueError(
                    f"{name!r} is {params[name].dtype} and has no gradient: name in groups what is trained"
                )
            if name in owner:
                raise ValueError(f"groups: {name!r} stands in {owner[name]!r} and again in {group!r}; list it once")
            owner[name] = group


def _check_numbers(numbers: Mapping[str, Any]) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Real | Tensor) or (isinstance(value, Tensor) and value.ndim > 0):
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a number, got {found}")
        if not math.isfinite(value.detach() if isinstance(value, Tensor) else value):
            raise ValueError(f"{name} must be a finite number, got {value}")


def _group_gradients(losses: Losses, params: Params, groups: Groups) -> dict[str, Tensor]:
    """The gradient of each group's loss in its own parameters; zero where it does not depend on one."""
    grads: dict[str, Tensor] = {}
    remaining, depends = len(groups), False
    for names, loss_name in groups.values():
        remaining -= 1
        loss = loss_of(losses, loss_name)
        inputs = [params[name] for name in names]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if loss.requires_grad and inputs:
            # The groups' losses share one graph: only the last may free it.
            found = torch.autograd.grad(loss, inputs, retain_graph=remaining > 0, allow_unused=True)
        depends = depends or any(grad is not None for grad in found)
        for name, value, grad in zip(names, inputs, found, strict=True):
            grads[name] = torch.zeros_like(value) if grad is None else grad
    if grads:
        _require_dependence(losses, groups, depends)
    return grads


def _added(left: Params, right: Params, scale: float) -> dict[str, Tensor]:
    """left + scale * right, of the names in `right`, in one pass over all tensors."""
    values = torch._foreach_add([left[name] for name in right], list(right.values()), alpha=scale) if right else []
    return dict(zip(right, values, strict=True))


def _detached(losses: Losses) -> dict[str, Tensor]:
    # One may be a parameter, which the outer step changes.
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in losses.items()}
