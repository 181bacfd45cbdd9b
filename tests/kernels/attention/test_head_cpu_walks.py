"""How the attention head walks a map on the CPU: along rows of any length, and group by group through a large one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.head_problems import LAYOUTS, Case, assert_as_close, assert_right
from tests.support.toolchain import needs_extension

pytestmark = needs_extension

# Shorter and longer than a vector of every type, and than the positions that are added up in one go.
LENGTHS = [*range(1, 38), 48, 63, 64, 65, 127, 128, 129, 132, 133, 144, 256, 258, 270]


def test_rows_of_any_length():
    for length in LENGTHS:
        case = Case((2, 18, 1, length, 3, 2), torch.float64)
        assert_right(case, *case.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_and_maxima_of_rows_of_any_length(dtype: torch.dtype):
    for length in LENGTHS:
        case = Case((2, 18, 1, length, 3, 2), dtype)
        (out, grads), exact, pytorch = case.run(), case.formulas(torch.float64), case.formulas(case.statistics)
        for name in ("pooled", "peak", "peak_position", "attended"):
            assert_as_close(f"{name} of {length}", *(getattr(x, name) for x in (out, exact[0], pytorch[0])))
        assert_as_close(f"rows of {length}", grads.cam_weight, exact[1].cam_weight, pytorch[1].cam_weight)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_map_larger_than_caches_gives_what_its_samples_give(layout: Callable[[Tensor], Tensor]):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 8

    batch, channels = 86, 2048
    features, labels = layout(random(batch, channels, 7, 7)), torch.arange(batch) % 5 - 1
    weights = (random(20, channels), random(channels, 20), random(4, 49), random(4, 49), random(49, 4), random(49, 4))
    cam_weight = random(4, channels)
    assert features.nbytes > 32 * 2**20

    def run(first: int, last: int) -> tuple[Tensor, ...]:
        return torch.ops.dan_fast.attention_head(features[first:last], *weights, cam_weight, labels[first:last])

    parts = [run(first, min(first + 9, batch)) for first in range(0, batch, 9)]
    for found, *expected in zip(run(0, batch), *parts, strict=True):
        assert torch.equal(found, torch.cat(expected))
