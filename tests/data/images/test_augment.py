"""Augmentation of batches against the transform of single images, and the batch ahead."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from dan_fast.core.preprocessing import STD
from dan_fast.data import test_transform as plain_transform
from dan_fast.data import train_transform
from dan_fast.data.images.augment import Draws, augment, draw, normalize
from dan_fast.data.images.feed import one_ahead
from dan_fast.data.images.loader import Loader

CPU = torch.device("cpu")
# What is left of the transforms for an image that is resized already.
SIZES = [(64, 32), (33, 17), (8, 4), (13, 40)]


def pictures(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Smooth colours with noise, some black and some white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 2, generator=generator) * 340 - 40
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (smooth + 6 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def one_by_one(images: Tensor, seeds: list[int]) -> Tensor:
    transform = v2.Compose(train_transform(tuple(images.shape[2:])).transforms[1:])
    results = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds, strict=True):
            torch.manual_seed(seed)
            results.append(transform(image))
    return torch.stack(results)


def grey_levels(difference: Tensor) -> Tensor:
    return difference.abs().cpu() * torch.tensor(STD)[:, None, None] * 255


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_batch_is_what_its_images_are_one_by_one(size: tuple[int, int]) -> None:
    images, seeds = pictures(96, size), [1000 + 7 * number for number in range(96)]
    difference = grey_levels(augment(images, draw(seeds, size)) - one_by_one(images, seeds))
    assert difference.max() < 2.001
    assert (difference > 1e-3).double().mean() < 1e-3
    # Of each kind of draw there are enough for a mistake in one to show.
    assert difference.flatten(1).mean(1).max() < 1e-2


def test_without_draws_of_colour_the_bits_are_equal() -> None:
    images = pictures(20, (64, 32))
    drawn = draw(range(20), (64, 32))
    neutral = drawn._replace(factors=torch.ones(20, 3))
    moved = []
    for image, flip, top, left in zip(images, drawn.flip, drawn.top, drawn.left, strict=True):
        padded = torch.nn.functional.pad(image.flip(-1) if flip else image, (2,) * 4)
        moved.append(padded[:, top : top + 64, left : left + 32])
    assert torch.equal(augment(images, neutral), normalize(torch.stack(moved)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_normalised_as_in_the_evaluation_to_the_last_bit(size: tuple[int, int]) -> None:
    images = pictures(5, size)
    assert torch.equal(normalize(images), torch.stack([plain_transform(size)(image) for image in images]))
    every = torch.arange(256, dtype=torch.uint8).expand(3, 16, 256)
    assert torch.equal(normalize(every[None])[0], plain_transform((16, 256))(every))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 25])
def test_an_image_does_not_depend_on_its_batch(count: int) -> None:
    images, drawn = pictures(count, (32, 16)), draw(range(count), (32, 16))
    together = augment(images, drawn)
    assert together.shape == images.shape and together.dtype == torch.float32
    assert torch.equal(together, augment(images, drawn))
    for place in range(count):
        part = slice(place, place + 1)
        assert torch.equal(together[part], augment(images[part], Draws(*(each[part] for each in drawn))))


def test_what_comes_in_stays_as_it_is() -> None:
    images = pictures(3, (32, 16))
    before, state = images.clone(), torch.get_rng_state()
    augment(images, draw([1, 2, 3], (32, 16)))
    normalize(images)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)


def test_the_distribution_of_the_draws() -> None:
    count = 4000
    drawn = draw([2**31 - 2 - 13 * number for number in range(count)], (64, 32))
    assert abs(drawn.flip.double().mean() - 0.5) < 0.03
    for offsets in (drawn.top, drawn.left):
        assert (torch.bincount(offsets, minlength=5) / count - 0.2).abs().max() < 0.03 and offsets.max() == 4
    orders, times = drawn.order.unique(dim=0, return_counts=True)
    assert len(orders) == 6 and (times / count - 1 / 6).abs().max() < 0.03
    for factors, most in zip(drawn.factors.unbind(1), (0.2, 0.15, 0.15), strict=True):
        assert (factors - 1).abs().max() <= most and abs(factors.mean() - 1) < 0.01
        assert abs(factors.std() - 2 * most / 12**0.5) < 0.01
    # Neither of one another nor of the neighbour's.
    columns = torch.stack([drawn.flip, drawn.top, drawn.left, *drawn.factors.unbind(1)]).double()
    related = torch.corrcoef(torch.cat([columns, columns.roll(1, dims=1)]))
    assert (related - torch.eye(len(related))).abs().max() < 0.08


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    device = torch.device("cuda")
    images, drawn = pictures(64, (64, 32)), draw(range(64), (64, 32))
    there = images.to(device), Draws(*(each.to(device) for each in drawn))
    result = augment(*there)
    difference = grey_levels(result.cpu() - augment(images, drawn))
    assert difference.max() < 2.001 and (difference > 1e-3).double().mean() < 1e-3
    assert torch.equal(result, augment(*there))
    torch.testing.assert_close(normalize(there[0]).cpu(), normalize(images))
    reserved = []
    for _ in range(4):
        batches = one_ahead(iter(images.split(8)), lambda part: part.to(device) * 2.0, device)
        assert torch.equal(torch.cat([batch + 1 for batch in batches]).cpu(), images * 2.0 + 1)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[3], "each feed takes memory of its own"


def test_one_ahead_and_no_more() -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(6):
            read.append(number)
            yield number

    results = one_ahead(numbers(), lambda number: 10 * number, CPU)
    assert read == []
    for done, result in enumerate(results, start=1):
        assert result == 10 * (done - 1)
        deadline = time.monotonic() + 60
        while len(read) < min(done + 1, 6) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(read) == min(done + 1, 6)


@pytest.mark.parametrize("place", ["items", "prepare"])
def test_an_error_comes_in_its_place(place: str) -> None:
    def numbers() -> Iterator[int]:
        yield from (1, 2)
        if place == "items":
            raise OSError("third")
        yield 3

    def prepare(number: int) -> int:
        if number == 3:
            raise OSError("third")
        return number

    results = one_ahead(numbers(), prepare, CPU)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(OSError, match="third"):
        next(results)
    assert list(results) == []


@pytest.mark.parametrize(("device", "threads"), [("cpu", 0), ("meta", 1)])
def test_a_loader_has_a_thread_where_the_device_does_not_compute_on_the_same_cores(device: str, threads: int) -> None:
    # What other tests have left may end meanwhile.
    others = set(threading.enumerate())
    results = iter(Loader(range(5), lambda number: 10 * number, device))
    assert next(results) == 0 and len(set(threading.enumerate()) - others) == threads
    assert list(results) == [10, 20, 30, 40] and set(threading.enumerate()) <= others


def test_who_stops_early_leaves_no_thread() -> None:
    others = set(threading.enumerate())
    results = one_ahead(iter(range(1000)), lambda number: number, CPU)
    assert next(results) == 0 and len(set(threading.enumerate()) - others) == 1
    results.close()
    assert set(threading.enumerate()) <= others
