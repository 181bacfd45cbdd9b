"""The strides that kernels read, of maps in any; there is no need of a GPU, whose launches refuse others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.toolchain import build_on_host, needs_compiler, position_step

pytestmark = [pytest.mark.compile, needs_compiler]


@pytest.fixture(scope="module")
def readable_map(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor], Tensor]:
    torch_folder = Path(torch.__file__).parent
    build = build_on_host(
        "attention/readable_map.cpp",
        tmp_path_factory.mktemp("operator") / "readable_map.so",
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(torch_folder / "include"), "-shared", "-fPIC"),
        *("-fvisibility=hidden", f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch"),
    )
    torch.ops.load_library(build)
    return torch.ops.dan_fast_feature_maps.readable_map


VIEWS = {
    "transposed": lambda x: x.mT,
    "columns left out": lambda x: x[..., ::2],
    "rows left out": lambda x: x[:, :, ::2],
    "channels between positions": lambda x: x.permute(0, 3, 1, 2)[:, ::2],
}


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("view", VIEWS)
def test_strides_that_kernels_do_not_read_are_replaced(readable_map: Callable[[Tensor], Tensor], view: str, batch: int):
    features = VIEWS[view](torch.randn(batch, 6, 4, 8))
    found = readable_map(features)
    assert torch.equal(found, features)
    assert position_step(found) == 1 and found.stride(2) == found.shape[3]


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_map_that_kernels_read_is_no_copy(
    readable_map: Callable[[Tensor], Tensor], layout: torch.memory_format, batch: int
):
    features = torch.randn(batch, 6, 4, 8).contiguous(memory_format=layout)[:, 1:]
    found = readable_map(features)
    assert found.stride() == features.stride() and found.data_ptr() == features.data_ptr()
