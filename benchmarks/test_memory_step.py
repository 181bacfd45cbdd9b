"""The memory step's contenders under pytest-benchmark, with the code of `dan-fast bench memory`.

    pytest benchmarks --benchmark-group-by=group

A contender is timed only after its result agreed with the literal reference. Sizes are shares of the paper's slots,
since at full size the reference needs half a minute and gigabytes a step; `dan-fast bench memory` goes there. A
module's time is that of several steps and the write of what they left pending.
"""

import pytest
import torch

from dan_fast import _extension
from dan_fast.bench.memory import contenders
from dan_fast.bench.memory.contenders import COMPILED, KERNELS, Contender, Outcome, compare
from dan_fast.bench.memory.problem import Problem, Size, make_problem

SHARES_OF_THE_PAPER = [1 / 64, 1 / 16]
STEPS = 4
CONTENDERS = [contender for contender in contenders.CONTENDERS if contender.name != COMPILED]


@pytest.fixture(scope="module", params=SHARES_OF_THE_PAPER, ids=lambda share: f"slots/{1 / share:.0f}")
def expected(request) -> tuple[Problem, Outcome]:
    problem = make_problem(Size().scaled(request.param), torch.float32, "cpu", batches=STEPS)
    return problem, CONTENDERS[0].start(problem).outcome()


@pytest.mark.parametrize("kind", ["forward", "forward_backward"])
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: f"{contender.name}-{contender.use}")
def test_memory_step(benchmark, expected: tuple[Problem, Outcome], contender: Contender, kind: str):
    if kind not in contender.passes:
        pytest.skip(f"{contender.name} has no {kind}")
    if contender.name == KERNELS and _extension.why_not_on("cpu"):
        pytest.skip(f"no kernels: {_extension.why_not_on('cpu')}")
    problem, literal = expected
    runner = contender.start(problem)
    agreement = compare(runner.outcome(), literal, problem.dtype)
    assert agreement.disagrees is None
    benchmark.group = f"{kind}, {problem.size.labeled_slots} + {problem.size.unlabeled_slots} slots"
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads(), steps=runner.steps)
    benchmark.pedantic(runner.run, args=(kind == "forward_backward",), rounds=5, warmup_rounds=1)
