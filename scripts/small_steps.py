#!/usr/bin/env python
"""Every operator of the extension once or twice, forward and backward, on a problem small enough for compute-sanitizer.

    python scripts/small_steps.py cuda

`cpu` runs the same by the kernels for the CPU. Sizes are odd, so that no row and no block ends with the last number.
"""

import sys

import torch

from dan_fast import _extension
from dan_fast.bench.machine import why_no_triton
from dan_fast.bench.memory.contenders import CONTENDERS, KERNELS, MODULE
from dan_fast.bench.memory.problem import Size, make_problem
from dan_fast.functional import attention_adversary, cosine_softmax, false_sample_sets, nl_cbam
from dan_fast.nn import NLCBAM


def memory_steps(device: torch.device) -> None:
    """In float32 pure and as a module, which writes a step behind; in bfloat16 as a module."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem(Size(301, 199, key_dim=61, batch=4), dtype, device, batches=2)
        for contender in CONTENDERS:
            if contender.name == KERNELS and (dtype == torch.float32 or contender.use == MODULE):
                runner = contender.start(problem)
                runner.outcome()
                runner.run(True)


def memory_operators(device: torch.device) -> None:
    keys, slots = (torch.randn(rows, 61, device=device, requires_grad=True) for rows in (5, 131))
    labels = torch.arange(131, device=device) % 7 - 1
    weights = cosine_softmax(keys, slots, labels >= 0)
    weights.square().sum().backward()
    false_sample_sets(weights, labels, torch.tensor([0, 3, -1, 5, 9], device=device))


def attention(device: torch.device) -> None:
    """The head, which never forms X'', and then X'' and the adversary of both maps, in both layouts."""
    module = NLCBAM(23, 15, reduction=3).to(device)
    cam_weight = torch.randn(5, 23, device=device, requires_grad=True)
    labels = torch.tensor([1, -1, 4], device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        features = torch.randn(3, 23, 5, 3, device=device).to(memory_format=layout).requires_grad_()
        head = module.head(features, cam_weight, labels)
        (head.attended.sum() + head.pooled.sum() + head.adversary_loss.sum()).backward()
        refined = nl_cbam(features, module.weights).refined
        adversary = attention_adversary(features, refined, cam_weight, labels)
        (adversary.loss.sum() + refined.square().sum()).backward()


def run(device: torch.device) -> None:
    """All of it on `device`.

    Raises:
        RuntimeError: something of it would take a PyTorch path there.
    """
    reason = _extension.why_not_on(device.type) or why_no_triton(device)
    if reason is not None:
        raise RuntimeError(reason)
    torch.manual_seed(0)
    memory_steps(device)
    memory_operators(device)
    attention(device)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run(torch.device(sys.argv[1]))
