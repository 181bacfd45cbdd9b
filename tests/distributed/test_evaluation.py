"""Images embedded by many ranks, and a gallery divided over them, against one rank."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, distributed

from dan_fast import _extension
from dan_fast.core.errors import DanFastError
from dan_fast.data import ImageCache
from dan_fast.data.samples import FixedSplit, FixedSplits, ReIDDataset, Sample
from dan_fast.evaluation import (
    Reranking,
    divided,
    evaluate_dataset,
    evaluate_features,
    evaluate_ranking,
    evaluate_reranked,
    evaluate_single_shot,
    extract_dataset,
    extract_features,
    reciprocal,
)
from tests.support.dataset_shelf import coloured_people, colours
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow

SIZE = (8, 4)


def same_figures(group: distributed.ProcessGroup, evaluate: Callable[..., Any], metric: str, kernels: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    rank, others = group.rank(), group.size() - 2
    for dtype, sizes, block_bytes in (
        (torch.float32, [1, *[2] * others, 149 - 2 * others], 1 << 14),
        (torch.float64, [0, *[3] * others, 17 - 3 * others], 1 << 26),
    ):
        images = sum(sizes)
        # Few different features: most distances are ties, within a part of the gallery and across parts.
        few = torch.randn(7, 12, generator=generator, dtype=dtype)
        query, gallery = (few[torch.randint(0, 7, (n,), generator=generator)] for n in (40, images))
        query[::3] += torch.randn(14, 12, generator=generator, dtype=dtype)
        ids, cams = ([torch.randint(0, of, (n,), generator=generator) for n in (40, images)] for of in (5, 3))
        own = [x.split(sizes)[rank] for x in (gallery, ids[1], cams[1])]
        settings = {"metric": metric, "max_rank": 10, "block_bytes": block_bytes}
        with nullcontext() if kernels else _extension.disabled():
            whole = evaluate(query, gallery, ids[0], ids[1], cams[0], cams[1], **settings)
            settings["process_group"] = group
            parts = evaluate(query, own[0], ids[0], own[1], cams[0], own[2], **settings)
            assert torch.equal(parts.cmc, whole.cmc) and parts[1:] == whole[1:] and 0 < whole.mAP < 1
            for broken, sentence in (
                ({"gallery_features": own[0] * torch.nan}, "gallery_features holds NaN"),
                ({"gallery_cams": own[2][1:]}, "gallery_cams has shape"),
            ):
                arguments = {"gallery_features": own[0], "gallery_cams": own[2], **(broken if rank == 1 else {})}
                with pytest.raises(ValueError, match=sentence if rank == 1 else "rank 1 of process_group failed to"):
                    evaluate(query, query_ids=ids[0], query_cams=cams[0], gallery_ids=own[1], **arguments, **settings)


def on_a_rank_without_images(group: distributed.ProcessGroup, path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    query, gallery = (torch.randn(count, 8, generator=generator) for count in (1, 13))
    whole = gallery, torch.arange(13) % 2, torch.ones(13, dtype=torch.int64)
    own = [each.split([0, 3, 10, 0])[group.rank()] for each in whole]
    ids = torch.tensor([0])
    # The least memory at a time: one image of each rank.
    found, expected = (
        evaluate_reranked(query, features, ids, pids, ids, cams, process_group=each, block_bytes=1)
        for (features, pids, cams), each in ((own, group), (whole, None))
    )
    assert torch.equal(found.cmc, expected.cmc) and found[1:] == expected[1:]
    torch.set_default_dtype(torch.float64)
    try:
        features = extract_features(colours, [Sample(path, 1, 1)] * 2, SIZE, process_group=group)
    finally:
        torch.set_default_dtype(torch.float32)
    found = features.select(torch.arange(2), group).features
    assert found.shape == (2, 3) and found.dtype == torch.float32
    of_gpus = distributed.new_group(backend="cuda:gloo")
    with pytest.raises(ValueError, match="no tensor on cpu, where features are: .* or name both, 'cpu:gloo,cuda:nccl'"):
        extract_features(None, [Sample(path, 1, 1)], SIZE, process_group=of_gpus)
    with pytest.raises(ValueError, match="no tensor on cpu, where the features are: .* or move the features"):
        divided.Division.of_part(of_gpus, own[0])


def test_a_rank_may_have_no_image_at_all(ranks: Ranks, tmp_path: Path):
    Image.new("RGB", SIZE[::-1], "red").save(tmp_path / "red.png")
    ranks.run(on_a_rank_without_images, tmp_path / "red.png")


@pytest.mark.parametrize(
    ("evaluate", "metric", "kernels"),
    [
        *((evaluate_ranking, metric, kernels) for metric in ("cosine", "euclidean") for kernels in (True, False)),
        (partial(evaluate_single_shot, repeats=5), "euclidean", True),
        (partial(evaluate_reranked, reranking=Reranking(9, 4, 0.2)), "euclidean", True),
        (partial(evaluate_reranked, reranking=Reranking(2, 1, 0.9)), "cosine", True),
    ],
)
def test_figures_are_those_of_one_rank_to_the_last_bit(
    ranks: Ranks, evaluate: Callable[..., Any], metric: str, kernels: bool
):
    ranks.run(same_figures, evaluate, metric, kernels)


def no_features_of_others(group: distributed.ProcessGroup) -> None:
    images, width, block_bytes = 120, 512, 1 << 16
    generator = torch.Generator().manual_seed(group.rank())
    gallery, ids = torch.randn(images, width, generator=generator), torch.arange(images) // 2
    query, ones = gallery.new_ones(2, width), torch.ones(images, dtype=torch.int64)
    largest = []

    def counted(*arguments: Any) -> list[Tensor]:
        gathered = gather_parts(*arguments)
        largest.append(max(x.nbytes for x in gathered))
        return gathered

    gather_parts = divided.gather_parts
    for evaluate in (evaluate_ranking, evaluate_single_shot, evaluate_reranked):
        largest.clear()
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(divided, "gather_parts", counted)
            monkeypatch.setattr(reciprocal, "gather_parts", counted)
            evaluate(query, gallery, [0, 1], ids, [0, 0], ones, block_bytes=block_bytes, process_group=group)
        assert 8 * images * group.size() <= max(largest) < block_bytes < gallery.nbytes / 3


def test_features_of_other_ranks_are_seen_in_blocks(ranks: Ranks):
    ranks.run(no_features_of_others)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return coloured_people(tmp_path_factory.mktemp("people"), 6, 3, 35, np.random.default_rng(0))


def of_kind(kind: str, people: list[Sample]) -> ReIDDataset:
    order, root = np.random.default_rng(3).permutation(len(people)), people[0].path.parent
    mixed = tuple(people[place] for place in order)
    if kind == "fixed query and gallery":
        return ReIDDataset("tiny", root, query=mixed[:11], gallery=mixed[11:])
    if kind == "single shot":
        return ReIDDataset("tiny", root, query=mixed, gallery=mixed, single_shot=True)
    if kind == "random splits":
        return ReIDDataset("tiny", root, test=mixed)
    # Neither query nor gallery is in the order of the test images, and four of these are in neither.
    first, second = FixedSplit((), mixed[9:2:-1], mixed[34:9:-1]), FixedSplit((), mixed[20:], mixed[:20])
    return ReIDDataset("tiny", root, test=tuple(people), splits=FixedSplits("tiny", "0" * 64, (first, second)))


def of_batch(images: Tensor) -> Tensor:
    """Features that depend on the batch."""
    return colours(images) - 0.5 * colours(images).mean(0)


def same_evaluation(
    group: distributed.ProcessGroup, dataset: ReIDDataset, cache: Path | None, options: dict[str, Any]
) -> int:
    seen = []

    def embed(images: Tensor) -> Tensor:
        seen.append(len(images))
        return of_batch(images)

    options = {"repeats": 3, "max_rank": 7, "metric": "euclidean", **options}
    whole = evaluate_dataset(of_batch, dataset, SIZE, **options)
    decoded = None if cache is None else ImageCache(cache, SIZE)
    assert evaluate_dataset(embed, dataset, SIZE, process_group=group, cache=decoded, **options) == whole
    assert whole.num_gallery > 11 and 0 < whole.mAP < 1
    return sum(seen)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("fixed query and gallery", {"batch_size": 5}),
        ("fixed query and gallery", {"batch_size": 20, "reranking": Reranking(k1=7)}),
        ("random splits", {"batch_size": 5, "reranking": Reranking(k1=4, k2=1)}),
        ("random splits", {"batch_size": 20}),
        ("fixed splits", {"batch_size": 5}),
        ("single shot", {"batch_size": 20}),
    ],
)
def test_a_dataset_is_evaluated_as_by_one_rank(
    ranks: Ranks, people: list[Sample], kind: str, options: dict[str, Any], tmp_path: Path
):
    dataset = of_kind(kind, people)
    cache = tmp_path if options["batch_size"] == 5 else None
    seen = ranks.run(same_evaluation, dataset, cache, options)
    assert sum(seen) == len(people), "each image is embedded by one rank"
    assert max(seen) < len(people) or (options["batch_size"] == 20 and kind != "random splits")
    # One file for all ranks, as for one.
    assert cache is None or len(list(cache.glob("*.npy"))) == (2 if dataset.query else 1)


def broken(group: distributed.ProcessGroup, dataset: ReIDDataset) -> tuple[str, ...]:
    options = {"batch_size": 3, "process_group": group}
    whole = evaluate_dataset(of_batch, dataset, SIZE, batch_size=3, repeats=2, broken_images="skip")
    assert evaluate_dataset(of_batch, dataset, SIZE, repeats=2, broken_images="skip", **options) == whole
    last, last_one = group.rank() == group.size() - 1, group.size() - 1
    of_others = f"rank {last_one} of process_group failed to embed its images: see that rank's error"
    one_broken = replace(dataset, test=dataset.test[-9:])
    with pytest.raises(DanFastError, match="1_broken.png" if last else of_others):
        extract_dataset(of_batch, one_broken, SIZE, **options)

    def fails(images: Tensor) -> Tensor:
        if last:
            raise RuntimeError("out of memory")
        return of_batch(images)

    with pytest.raises(RuntimeError if last else DanFastError, match="out of memory" if last else of_others):
        extract_dataset(fails, dataset, SIZE, broken_images="skip", **options)

    def diverged(images: Tensor) -> Tensor:
        return of_batch(images) * (torch.nan if last else 1)

    with pytest.raises(DanFastError, match="features are not finite numbers" if last else of_others):
        extract_dataset(diverged, dataset, SIZE, broken_images="skip", **options)
    with pytest.raises(DanFastError, match="batch_size is 3 on rank 1 and 4 on rank 0: evaluate the same"):
        extract_dataset(of_batch, dataset, SIZE, batch_size=3 + (group.rank() == 0), process_group=group)
    features = extract_dataset(of_batch, dataset, SIZE, broken_images="skip", **options)
    assert len(features.test.features) == features.test.sizes[group.rank()] < len(features.test.paths)
    with pytest.raises(ValueError, match="hand in the process_group"):
        evaluate_features(features)
    return whole.skipped


def test_what_is_broken_on_one_rank_is_known_to_all(ranks: Ranks, people: list[Sample], tmp_path: Path):
    bad = [tmp_path / "2_broken.png", tmp_path / "1_broken.png"]
    for path in bad:
        path.write_bytes(b"not an image")
    # A rank's only batches, and a part of the last one.
    test = (*people[:24], *[Sample(bad[0], 9, 1)] * 3, *people[24:], Sample(bad[1], 9, 2))
    skipped = ranks.run(broken, ReIDDataset("tiny", tmp_path, test=test))
    assert all(each == (str(bad[0]), str(bad[1])) for each in skipped)
