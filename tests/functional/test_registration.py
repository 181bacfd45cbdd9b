"""Every operator that is built has its class, and no gradient that is a kernel is without its second derivative."""

import warnings

import pytest
import torch

from dan_fast import _extension, triton_kernels
from dan_fast.functional.memory.passes import MemoryScores
from dan_fast.functional.registration import KernelBackward, Operator
from tests.support.warned import own_warnings

pytestmark = pytest.mark.skipif(not _extension.loaded(), reason=f"no extension: {_extension.why_not()}")


def operators(base: type[Operator]) -> set[str]:
    """Those with a kernel."""
    names = {base.name} if "name" in vars(base) and base.schema is None else set()
    return names.union(*map(operators, base.__subclasses__()))


def test_each_operator_has_a_class():
    gradients = {name for name in _extension._OPERATORS if name.endswith("_backward")}
    assert {f"{name}_backward" for name in operators(KernelBackward)} == gradients
    named = set(_extension._OPERATORS) - gradients
    assert operators(Operator) == named, "_OPERATORS in dan_fast/_extension.py names what has a class and a kernel"


def test_a_gpu_without_triton_takes_the_form_and_one_warning_says_why(forget: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_kernels, "why_not", lambda device: "Triton is not installed; run `pip install triton`")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # What is registered for CUDA tensors.
        results = [MemoryScores._on_gpu(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 4.0]])) for _ in range(2)]
    assert [[x.tolist() for x in result] for result in results] == [[[[10.0]], [25.0]]] * 2
    (warning,) = own_warnings(caught)
    assert str(warning.message) == (
        "dan_fast takes its PyTorch path on a GPU for the passes over a memory: Triton is not installed; "
        "run `pip install triton`"
    )
    assert warning.filename == __file__ and warning.category is RuntimeWarning


def test_a_gradient_that_is_differentiated_is_not_a_kernels():
    class Doubled(KernelBackward):
        differentiable = 1

        @staticmethod
        def form(x):
            return (x.square() * 2,)

        @classmethod
        def grad_by_kernel(cls, ctx, saved, grads):
            return (4 * saved[0] * grads[0]).detach(), None

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return Doubled.form(x)[0]

        @staticmethod
        def backward(ctx, grad):
            return Doubled.backward(ctx, grad)[0]

    x = torch.tensor([3.0], requires_grad=True)
    (first,) = torch.autograd.grad(Squared.apply(x), x, create_graph=True)
    assert first == 12 and torch.autograd.grad(first, x)[0] == 4
    assert torch.autograd.grad(Squared.apply(x), x)[0] == 12
