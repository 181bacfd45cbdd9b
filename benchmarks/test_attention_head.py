"""The attention head's contenders under pytest-benchmark, with the code of `dan-fast bench attention`.

    pytest benchmarks/test_attention_head.py --benchmark-group-by=group

A contender is timed only after its result agreed with the reference in float64. The map is ResNet-50's at a quarter of
the paper's batch; `dan-fast bench attention` has the whole of it, torch.compile and the memory.
"""

import pytest
import torch

from dan_fast.bench import attention as heads
from dan_fast.bench.attention import EAGER, KERNELS, HeadOutcome, HeadProblem

SIZE = heads.MapSize(batch=16)


@pytest.fixture(scope="module", params=heads.LAYOUTS)
def expected(request) -> tuple[HeadProblem, HeadOutcome]:
    problem = heads.make_head_problem(SIZE, torch.float32, request.param, "cpu")
    return problem, heads.reference_outcome(problem)


@pytest.mark.parametrize("kind", ["forward", "forward_backward"])
@pytest.mark.parametrize("contender", [EAGER, KERNELS])
def test_attention_head(benchmark, expected: tuple[HeadProblem, HeadOutcome], contender: str, kind: str):
    problem, reference = expected
    runner = heads.start(contender, problem)
    assert heads.compare_heads(runner.run(True), reference, problem.features.dtype).disagrees is None
    layout = next(
        name for name, layout in heads.LAYOUTS.items() if problem.features.is_contiguous(memory_format=layout)
    )
    benchmark.group = f"{kind}, {layout}"
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads(), size=SIZE)
    benchmark.pedantic(runner.run, args=(kind == "forward_backward",), rounds=5, warmup_rounds=1)
