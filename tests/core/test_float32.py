"""Where PyTorch rounds float32 numbers: what is said of it, and that the memory's products are left out."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dan_fast import _extension, functional
from dan_fast.bench.machine import environment
from dan_fast.core.float32 import exact_float32, float32_rounding, float32_settings
from dan_fast.functional.products import Float32Product, product
from dan_fast.nn import ProgressiveAugmentedMemory
from dan_fast.reference import MemoryState
from tests.support.draws import draw

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROUNDED = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul"}


@pytest.fixture(autouse=True)
def settings_as_they_were() -> Iterator[None]:
    found = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    of_all = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = of_all
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = found
    torch.backends.cudnn.allow_tf32 = True


class Products(TorchDispatchMode):
    """The setting under which each matrix product of float32 numbers is made, in this process's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: list[str] = []

    def __torch_dispatch__(self, func, types, arguments=(), named=None):
        if func.namespace == "torch_dan_fast":
            with self:
                return Float32Product.form(*arguments)
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        if func._schema.name.removeprefix("aten::") in ROUNDED and tensors[0].dtype == torch.float32:
            self.settings.append(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*arguments, **(named or {}))


# What is said


def test_the_settings_are_read_whatever_api_set_them() -> None:
    assert float32_settings(CUDA) == {"convolutions": "tf32", "matrix_products": "ieee"}
    assert (float32_rounding(CUDA), float32_rounding(CPU)) == ("TF32 in convolutions", "")
    torch.set_float32_matmul_precision("high")
    assert float32_rounding(CUDA) == "TF32 in convolutions and matrix products"
    torch.backends.cudnn.allow_tf32 = False
    assert float32_rounding(CUDA) == "TF32 in matrix products"
    torch.set_float32_matmul_precision("medium")
    assert float32_rounding(CPU) == "bfloat16 in matrix products"
    # From here on the old names raise.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    with pytest.raises(RuntimeError):
        _ = torch.backends.cuda.matmul.allow_tf32
    assert float32_settings(CUDA) == {"convolutions": "ieee", "matrix_products": "ieee"}


def test_a_benchmark_records_them() -> None:
    torch.set_float32_matmul_precision("medium")
    assert environment(CPU)["float32"] == "bfloat16 in matrix products"
    torch.set_float32_matmul_precision("highest")
    assert environment(CPU)["float32"] == "IEEE"


# What is left out


def round_products(way: str) -> None:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    match way:
        case "high" | "medium":
            torch.set_float32_matmul_precision(way)
        case "allow_tf32":
            cuda.allow_tf32 = True
        case "by operator":
            cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
        case "for all":
            cuda.fp32_precision = cpu.fp32_precision = "none"
            torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("way", ["high", "medium", "allow_tf32", "by operator", "for all"])
def test_exact_products_leave_the_settings_as_they_were(device: str, way: str) -> None:
    def read() -> list[str | None]:
        try:
            old = torch.get_float32_matmul_precision()
        except RuntimeError:
            old = None
        return [old, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]

    round_products(way)
    before = read()
    with pytest.raises(KeyError), exact_float32(device):
        assert float32_settings(torch.device(device))["matrix_products"] == "ieee"
        if device == "cuda":
            assert not torch.backends.cuda.matmul.allow_tf32, "the old name can be read inside, as TunableOp does"
        raise KeyError
    assert read() == before
    if way == "for all":
        torch.backends.fp32_precision = "ieee"
        assert read()[1:] == ["ieee", "ieee"], "what is inherited must not become the operator's own"


def test_a_second_thread_waits_with_its_product() -> None:
    settings, seen = torch.backends.mkldnn.matmul, []
    torch.set_float32_matmul_precision("medium")

    def other() -> None:
        with exact_float32("cpu"):
            seen.append(settings.fp32_precision)

    thread = threading.Thread(target=other)
    with exact_float32("cpu"):
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and not seen
    thread.join()
    assert seen == ["ieee"] and settings.fp32_precision == "bf16"


@pytest.mark.parametrize("addend", [False, True])
def test_a_product_and_its_derivatives_are_those_of_matmul(addend: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 7, generator=generator, requires_grad=True)
    extra = torch.randn(5, 5, generator=generator, requires_grad=True) if addend else None
    inputs = [rows] if extra is None else [rows, extra]
    both = []
    for form in (lambda: product(rows, rows.mT, extra), lambda: rows @ rows.mT + (0.0 if extra is None else extra)):
        first = torch.autograd.grad(form().sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), inputs)
        both.append([form(), *first, *second])
    torch.testing.assert_close(*both)


@pytest.mark.slow
def test_the_operator() -> None:
    rows, extra = torch.randn(3, 4, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    for arguments in ((rows, rows.mT, None), (rows, rows.mT.contiguous(), extra)):
        torch.library.opcheck(torch.ops.torch_dan_fast.float32_product.default, arguments)


@pytest.mark.parametrize("path", ["kernels", "torch"])
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.bfloat16])
def test_no_product_of_a_memory_step_is_rounded(path: str, memory_dtype: torch.dtype) -> None:
    memory = ProgressiveAugmentedMemory(12, 10, key_dim=6, dtype=memory_dtype)
    labels, ids = torch.tensor([0, 1, 2]), torch.arange(3)
    losses = []
    torch.set_float32_matmul_precision("medium")
    with Products() as made, _extension.disabled() if path == "torch" else torch.enable_grad():
        for seed in range(3):
            # A graph counts on the memory, so the next step adds what waits to its scores.
            keys = draw(6, 6, seed=seed, dtype=memory_dtype).requires_grad_()
            losses.append(memory(keys[:3], labels, keys[3:], ids).loss)
        gradients = torch.autograd.grad(losses[-1], keys, create_graph=True)
        torch.autograd.grad(gradients[0].float().square().sum(), keys)
        state = MemoryState.empty(12, 6)
        functional.memory_step(state, state, keys.float()[:3], labels, keys.float()[3:], ids, 0.0, 0.0, 0.1)
    assert len(made.settings) > 40 and set(made.settings) == {"ieee"}
    assert torch.get_float32_matmul_precision() == "medium"


def test_no_product_of_a_transform_is_rounded() -> None:
    keys, along, slots = draw(6, 6), draw(6, 6, seed=1), draw(12, 6, seed=2)
    torch.set_float32_matmul_precision("medium")
    gradient = torch.func.grad(lambda x: functional.cosine_softmax(x, slots)[0, 0])
    with Products() as made:
        gradient(keys)
        assert len(made.settings) >= 2
        torch.func.jvp(gradient, (keys,), (along,))
        # Of the slots too, which are a constant in a step.
        both = keys.requires_grad_(), slots.requires_grad_()
        first = torch.autograd.grad(functional.cosine_softmax(*both)[0, 0], both, create_graph=True)
        torch.autograd.grad(first[0].square().sum(), both)
    assert len(made.settings) >= 6 and set(made.settings) == {"ieee"}
