"""What the transforms do to pixels."""

import pytest
import torch

from dan_fast.core.errors import DanFastError
from dan_fast.data import test_transform as plain_transform
from dan_fast.data import train_transform


def gradient(height: int = 40, width: int = 20) -> torch.Tensor:
    """Brightness rises from left to right, more red at the top and more blue at the bottom."""
    columns = torch.linspace(40, 200, width).expand(height, width)
    rows = torch.linspace(0, 40, height)[:, None]
    return torch.stack((columns + 40 - rows, columns, columns + rows)).to(torch.uint8)


@pytest.mark.parametrize("make", [train_transform, plain_transform])
def test_shape_and_dtype(make) -> None:
    image = make((32, 16))(gradient())
    assert image.shape == (3, 32, 16) and image.dtype == torch.float32


def test_normalised_by_the_statistics_of_imagenet() -> None:
    image = torch.tensor([255, 0, 51], dtype=torch.uint8)[:, None, None].expand(3, 10, 5)
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(plain_transform((8, 4))(image), expected[:, None, None].expand(3, 8, 4))


def test_resizing_alone_keeps_top_and_left() -> None:
    image = plain_transform((8, 4))(gradient())
    assert (image[1, :, 1:] > image[1, :, :-1]).all()
    assert image[0, 0, 0] > image[0, -1, 0] and image[2, 0, 0] < image[2, -1, 0]
    assert torch.equal(image, plain_transform((8, 4))(gradient()))


@pytest.mark.parametrize("size", [(0, 8), (16,), (16, 8, 3), (16.0, 8), 16])
def test_wrong_size(size: object) -> None:
    for make in (train_transform, plain_transform):
        with pytest.raises(DanFastError, match="not a height and a width"):
            make(size)
