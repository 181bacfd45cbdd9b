"""Where a trunk is cut in two, so that the graphs of both parts are not kept at the same time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import Node

from dan_fast.daml.dual_mode import DualMode
from dan_fast.daml.gathered import gathered

Duals = dict[str, Tensor]
_ADDED = "added at the cut"


class Cut:
    """Modules of the trunk, one after the other, whose output is all that the rest takes from what precedes it.

    A graph of numbers that carry tangents is twice as large as another. What precedes a cut runs without one first, and
    again with one when that of the rest is used up: no more than the graph of one part is kept at a time.

    Args:
        modules: each gives a tensor, in the order in which they run; where there is none, the graph is kept whole.

    Example:
        >>> trunk = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> cut, params = Cut(trunk[0]), dict(trunk.named_parameters())
        >>> with cut.watched():
        ...     features = trunk(torch.ones(1, 2))
        >>> sorted(cut.find(features, params))
        ['0.bias', '0.weight']
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._module = modules[-1] if modules else None
        self._before = Cut(*modules[:-1]) if modules else None
        self._seen: list[_Output] = []
        self._preceding: set[str] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the trunk runs for the first time and keeps its graph."""

        def see(output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else torch.zeros(())
            self._seen.append(_Output(tensor.grad_fn, tensor.detach().new_zeros(()).expand(tensor.shape)))

        with self._before.watched() if self._before else nullcontext(), self._on_output(see):
            yield

    def find(self, features: Tensor, params: Mapping[str, Tensor]) -> set[str]:
        """The parameters that precede the last cut; none where it does not part the graph of the features.

        That is where the module did not run once, or what precedes its output reaches the features past it as well.

        Args:
            features: what the trunk gave inside of `watched`; its graph may be used up.
            params: leaves of the graph, by name.
        """
        if self._before:
            self._before.find(features, params)
        seen, self._seen = self._seen, []
        if len(seen) == 1 and seen[0].node is not None:
            node, self._zero = seen[0]
            before, past = _leaves(node), _leaves(features.grad_fn, node)
            if not before & past:
                self._preceding = {name for name, value in params.items() if id(value) in before}
        return self._preceding

    def vjp(
        self, run: Callable[[Duals], Tensor], duals: Duals, names: Sequence[str]
    ) -> tuple[Tensor, Callable[[Tensor], Duals]]:
        """The trunk's features, and what takes their gradient, once, to the tangents of those of parameters.

        Args:
            run: from parameters, by name, to features, the same each time.
            duals: the parameters.
            names: of those to differentiate in.
        """
        if self._before and not self._preceding:
            return self._before.vjp(run, duals, names)
        first, rest = ([name for name in names if (name in self._preceding) is early] for early in (True, False))
        if not first:
            features, pull_rest = _vjp(run, duals, rest)
            return features, lambda seed: _tangents(pull_rest(seed))

        def from_cut(values: Duals) -> Tensor:
            # To differentiate in what is added is to differentiate in the output.
            zero = values.pop(_ADDED)
            with self._on_output(lambda output: output + zero):
                return run(values)

        def up_to_cut(values: Duals) -> Tensor:
            reached: list[Tensor] = []

            def stop(output: Tensor) -> None:
                reached.append(output)
                raise _ReachedError

            try:
                with self._on_output(stop):
                    run(values)
            except _ReachedError:
                if reached:
                    return reached[0]
                raise  # an earlier cut's
            raise RuntimeError("the module at the cut has not run again")

        features, *once = _vjp(from_cut, {_ADDED: self._zero, **duals}, [_ADDED, *rest])

        def pull(seed: Tensor) -> Duals:
            grads = once.pop()(seed)
            # What is used up is not to be held while what precedes the cut has its turn.
            del seed
            at_cut, found = [grads.pop(_ADDED)], gathered(_tangents(grads))
            del grads
            pull_first = self._before.vjp(up_to_cut, duals, first)[1]
            return found | pull_first(at_cut.pop())

        return features, pull

    @contextmanager
    def _on_output(self, hook: Callable[[Any], Any]) -> Iterator[None]:
        """Inside, what the module gives goes through `hook`, which may return something else in its place."""
        handle = self._module and self._module.register_forward_hook(lambda module, inputs, output: hook(output))
        try:
            yield
        finally:
            if handle:
                handle.remove()


class _Output(NamedTuple):
    """Of a module: where it stands in the graph, and zeros like it that take no memory."""

    node: Node | None
    zero: Tensor


class _ReachedError(Exception):
    """The module at the cut has run."""


def _leaves(root: Node | None, but: Node | None = None) -> set[int]:
    """The ids of the tensors on which `root` depends, by another way than through `but`."""
    seen, left, found = {None, but}, [root], set()
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        left += [each for each, _ in node.next_functions]
        if hasattr(node, "variable"):
            found.add(id(node.variable))
    return found


def _vjp(
    run: Callable[[Duals], Tensor], duals: Duals, names: Sequence[str]
) -> tuple[Tensor, Callable[[Tensor], Duals]]:
    others = {name: value for name, value in duals.items() if name not in names}
    # Outside of it, where gradients are computed without a graph, tangents are not to be lost.
    with DualMode():
        result, pull = torch.func.vjp(
            lambda *values: run({**others, **dict(zip(names, values, strict=True))}), *(duals[name] for name in names)
        )

    def pull_named(seed: Tensor) -> Duals:
        return dict(zip(names, pull(seed, retain_graph=False, create_graph=False), strict=True))

    return result, pull_named


def _tangents(grads: Duals) -> Duals:
    """Without the gradients themselves, which are as large and not needed."""
    return {name: forward_ad.unpack_dual(grad).tangent for name, grad in grads.items()}
