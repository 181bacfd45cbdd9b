"""GPUs: two of them, another stream, tensors that are elsewhere, and faults that are told later."""

import contextlib
import math

import pytest
import torch

from dan_fast import MemoryState, _extension, functional
from dan_fast.nn import ProgressiveAugmentedMemory
from tests.support.memory_arguments import BATCH, GATES, arguments, module, refuses, tensors
from tests.support.memory_problems import agree

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")


def on(device, given):
    return {
        name: MemoryState(*(x.to(device) for x in value)) if isinstance(value, MemoryState) else value.to(device)
        for name, value in given.items()
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*BATCH, *GATES])
def test_cpu_and_cuda_tensors_mixed_are_named(name):
    given = on("cuda", arguments())
    refuses(functional, given | {name: given[name].cpu()}, ValueError, f"^{name} is on cpu, .*cuda:0")


@pytest.mark.gpu
@needs_two_gpus
def test_two_gpus():
    """Mixed they are refused; on the second while the first is current, the result is that of the CPU."""
    given = on("cuda:1", arguments())
    refuses(functional, given | {"keys": given["keys"].to("cuda:0")}, ValueError, "^keys is on cuda:0, .*cuda:1")
    with torch.cuda.device(0):
        step = functional.memory_step(**given)
    for a, b in zip(tensors(step), tensors(functional.memory_step(**arguments())), strict=True):
        assert a.device.index == 1
        agree(a.cpu(), b)


@pytest.mark.gpu
def test_a_stream_other_than_the_current_one():
    """Keys arrive late on a side stream: kernels on the default one would read what was there before."""
    expected = functional.memory_step(**arguments())
    given = on("cuda", arguments())
    keys = given["keys"].clone()
    given["keys"] = torch.full_like(keys, 3.0)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        given["keys"].copy_(keys)
        step = functional.memory_step(**given)
    side.synchronize()
    for a, b in zip(tensors(step), tensors(expected), strict=True):
        agree(a.cpu(), b)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["keys", "unlabeled_keys"])
def test_a_key_that_is_not_finite_on_the_gpu_is_told_later_and_not_written(name):
    memory = module().cuda()
    given = {name: arguments()[name].cuda() for name in BATCH}
    memory(**given)
    before = {field: value.clone() for field, value in memory.state_dict().items()}
    wrong = given[name].clone()
    wrong[-1, 1] = math.nan
    assert memory(**(given | {name: wrong})).loss.isnan()
    with pytest.raises(ValueError, match=f"^{name} must be finite"):
        memory.check_faults()
    memory.check_faults()
    assert all(torch.equal(value, before[field]) for field, value in memory.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["forward", "labeled_loss", "labeled"])
def test_a_memory_that_would_be_replayed_from_the_same_state_is_not_captured(way: str):
    memory = module().cuda()
    given = {name: arguments()[name].cuda() for name in BATCH}
    memory(**given)
    before = {field: value.clone() for field, value in memory.state_dict().items()}
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match=r"capture functional\.memory_step"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        given["keys"].mul_(1)  # an empty graph would be warned about
        if way == "forward":
            memory(**given)
        elif way == "labeled":
            _ = memory.labeled
        else:
            memory.labeled_loss(given["keys"], given["labels"], 0.1)
    assert all(torch.equal(value, before[field]) for field, value in memory.state_dict().items())


@pytest.mark.gpu
def test_a_captured_step_follows_its_arguments():
    given = on("cuda", arguments())
    for _ in range(2):  # what is compiled and allocated at first may not be captured
        functional.memory_step(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = functional.memory_step(**given)
    for scale in (1.0, -0.5):
        given["keys"].mul_(scale)
        graph.replay()
        for a, b in zip(tensors(captured), tensors(functional.memory_step(**given)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_a_memory_is_not_rounded_to_tf32(path):
    def steps() -> list[torch.Tensor]:
        torch.manual_seed(0)
        memory = ProgressiveAugmentedMemory(64, 48, key_dim=96).cuda()
        found = []
        with _extension.disabled() if path == "torch" else contextlib.nullcontext():
            for _ in range(3):
                keys = torch.randn(16, 96, device="cuda", requires_grad=True)
                labels, ids = torch.arange(8, device="cuda"), torch.arange(8, device="cuda")
                loss = memory(keys[:8], labels, keys[8:], ids).loss
                found += [loss, *torch.autograd.grad(loss, keys, retain_graph=True)]  # so that the next step waits
        return [*found, *memory.labeled, *memory.unlabeled]

    exact = steps()
    torch.set_float32_matmul_precision("high")
    try:
        assert all(torch.equal(a, b) for a, b in zip(steps(), exact, strict=True))
    finally:
        torch.set_float32_matmul_precision("highest")
