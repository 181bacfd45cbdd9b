"""What makes a kernel an operator of PyTorch: one class an operator, registered as it is defined.

A class holds the operator's PyTorch form, its fake for `torch.compile`, its backward, and which of kernel and form
serves a device. `memory/row_norms.py` is the smallest example.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dan_fast import _extension, triton_kernels
from dan_fast.functional.autocast import full_precision
from dan_fast.functional.derivatives import carry_tangents, in_transform, through_form, without_graph

Context = torch.autograd.function.FunctionCtx
Saved = tuple[Tensor, ...]
Grads = Sequence[Tensor | None]  # of results or of inputs


class Operator:
    """`torch.ops.dan_fast.<name>`; never instantiated.

    A subclass gives `name`, `form` and `fake`; if it has a gradient `backward` too, and `setup` where its inputs are
    not what the backward needs. Nothing is registered where the extension is not loaded: there `form` serves.

    Attributes:
        name: of the operator in its namespace.
        triton: whether `triton_kernels` holds the kernel for CUDA tensors under this name. Where Triton cannot serve,
            `form` does within the same operator, which warns once.
        schema: of an operator that has no kernel but is opaque to `torch.compile`: it is defined here, and `form`
            serves all devices.
        op: the registered operator.
    """

    name: ClassVar[str]
    namespace: ClassVar[str] = "dan_fast"
    triton: ClassVar[bool] = False
    schema: ClassVar[str | None] = None
    op: ClassVar[Callable[..., Any]]

    form: ClassVar[Callable[..., Any]]
    fake: ClassVar[Callable[..., Any]]
    backward: ClassVar[Callable[..., Any] | None] = None

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__ and (cls.schema or _extension.loaded()):
            cls._register()

    @classmethod
    def _register(cls) -> None:
        name = f"{cls.namespace}::{cls.name}"
        if cls.schema:
            torch.library.define(name, cls.schema)
            torch.library.impl(name, "CompositeExplicitAutograd")(cls.form)
        if cls.triton:
            torch.library.impl(name, "CUDA")(cls._on_gpu)
        torch.library.register_fake(name)(cls.fake)
        if cls.backward is not None:
            torch.library.register_autograd(name, cls.backward, setup_context=cls.setup)
        cls.op = getattr(getattr(torch.ops, cls.namespace), cls.name).default

    @classmethod
    def _on_gpu(cls, *arguments: Tensor) -> Any:
        reason = triton_kernels.why_not(arguments[0].device.index)
        if reason is not None:
            _extension._warn_once("a GPU for the passes over a memory", reason)
            return cls.form(*arguments)
        return getattr(triton_kernels, cls.name)(*arguments)

    @staticmethod
    def setup(ctx: Context, inputs: tuple[Tensor, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def serves(tensor: Tensor) -> bool:
        """Whether kernels serve the device of `tensor`; in forward mode and in `torch.func` the PyTorch forms do."""
        return not in_transform() and _extension.serves(tensor.device.type, tensor.device.index)

    @classmethod
    def run(cls, *arguments: Any) -> Any:
        """The operator by its kernel where one serves the first argument, a tensor; else by its form."""
        return cls.op(*arguments) if cls.serves(arguments[0]) else cls.form(*arguments)


class KernelBackward(Operator):
    """An operator whose gradient is a kernel too, `<name>_backward`, which has no autograd of its own.

    A gradient that is itself to be differentiated, or carries a tangent, goes through the PyTorch form: a kernel would
    cut the second derivative off, and a loss on gradients would be wrong without an error.

    A subclass gives `fake_backward` and, where what is saved is not the arguments alone, `grad_by_kernel`. Where it
    does not begin with them as `form` takes them, `retraced` too.

    Attributes:
        differentiable: how many of the inputs, the first ones, may have a gradient.
        constants: None for each of the other inputs, a list of None for a list of tensors.
    """

    differentiable: ClassVar[int]
    constants: ClassVar[tuple] = ()
    fake_backward: ClassVar[Callable[..., Any]]
    backward_op: ClassVar[Callable[..., Any]]

    @classmethod
    def _register(cls) -> None:
        super()._register()
        name = f"{cls.name}_backward"
        torch.library.register_fake(f"dan_fast::{name}")(cls.fake_backward)
        cls.backward_op = getattr(torch.ops.dan_fast, name).default

    @classmethod
    def backward(cls, ctx: Context, *grads: Tensor | None) -> tuple:
        # Once: under activation checkpointing each look at them computes them again.
        saved = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return *(None,) * cls.differentiable, *cls.constants
        # The operator ran outside autocast; its backward pass runs where the caller asks for it.
        with full_precision(saved[0].device):
            if torch.is_grad_enabled():
                found = cls.grad_by_form(ctx, saved, grads)
            elif carry_tangents(grads):
                with torch.enable_grad():
                    found = map(without_graph, cls.grad_by_form(ctx, saved, grads))
            else:
                found = cls.grad_by_kernel(ctx, saved, grads)
            return *found, *cls.constants

    @classmethod
    def grad_by_form(cls, ctx: Context, saved: Saved, grads: Grads) -> Grads:
        """The gradients as autograd finds them through the form, differentiable in their turn."""
        form, inputs = cls.retraced(ctx, saved)
        needed = ctx.needs_input_grad[: cls.differentiable]
        return through_form(form, inputs, needed, grads)[: cls.differentiable]

    @classmethod
    def retraced(cls, ctx: Context, saved: Saved) -> tuple[Callable[..., Sequence[Tensor]], Sequence]:
        """The form of the differentiable results, and what of `saved` goes into it, the differentiable inputs first."""
        return cls.form, saved[: cls.differentiable + len(cls.constants)]

    @classmethod
    def grad_by_kernel(cls, ctx: Context, saved: Saved, grads: Grads) -> Grads:
        """The gradients by `backward_op`, here of what is saved, in its order, and of the results' gradients."""
        return cls.backward_op(*saved, *grads)


def empty_like(tensor: Tensor) -> Tensor:
    """What a kernel makes anew: contiguous whatever the layout of `tensor`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
