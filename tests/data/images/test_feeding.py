"""The examples of docs/feeding.md run, and what other stores give is what the files give."""

import shutil
from pathlib import Path

import pytest
import torch

from dan_fast import DanFastError
from dan_fast.core.preprocessing import IMAGENET
from dan_fast.data import BatchPlanner, ImageCache, TrainingSet, load_dataset, read_image, training_loader
from dan_fast.data.images.transforms import resize
from dan_fast.data.synthetic import synthesize
from tests.support import in_checkout
from tests.support.pages import texts
from tests.support.tiny_training import OneConvolution

SIZE = (16, 16)


def example(number: int, **names: object) -> dict:
    namespace = {"__name__": "feeding", **names}
    code = texts(in_checkout("docs/feeding.md"), "python")[number]
    exec(compile(code, f"feeding.md, example {number}", "exec"), namespace)
    return namespace


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    synthesize(tmp_path / "images", ["campus", "mall"], identities=4, cameras=2, image_size=(32, 32), seed=1)
    return [tmp_path / "images/campus", tmp_path / "images/mall"]


def training_set(folders: list[Path]) -> TrainingSet:
    labeled, unlabeled = map(load_dataset, folders)
    return TrainingSet([labeled], [unlabeled])


def test_what_a_node_has_decoded_before_a_training_is_not_decoded_again(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    folders[0].rename("data/market")
    example(0)
    said: list[str] = []
    cache = ImageCache("cache", (256, 128), say=said.append)
    cache.add([sample.path for sample in load_dataset("data/market").train])
    assert said == []


@pytest.mark.slow
def test_a_training_from_litdata_is_that_from_files(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(in_checkout("scripts"))
    from litdata_images import SAMPLES, LitDataImages, write

    def trained(source: TrainingSet, images: LitDataImages | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return example(1)["train"](source, SIZE, images, backbone=OneConvolution(), epochs=2).state_dict()

    from_files = trained(training_set(folders))
    write(list(map(load_dataset, folders)), tmp_path / "chunks", SIZE)
    write([load_dataset(folders[1])], tmp_path / "others", SIZE)
    for folder in folders:
        shutil.rmtree(folder)
    # As from a bucket: by way of a folder that LitData keeps.
    for where, options in ((None, {}), (f"local:{tmp_path}/chunks", {"cache_dir": str(tmp_path / "kept")})):
        images = LitDataImages(tmp_path / "chunks" / SAMPLES, where, **options)
        labeled, unlabeled = images.datasets
        found = trained(TrainingSet([labeled], [unlabeled]), images)
        assert found.keys() == from_files.keys()
        for name, value in from_files.items():
            assert torch.equal(found[name], value), name
    assert any((tmp_path / "kept").rglob("*.bin"))

    # As the page shows it, with the network that it takes.
    monkeypatch.chdir(tmp_path)
    shown = example(2, train=example(1)["train"])
    assert shown["images"].image_size == SIZE and shown["model"].network.classifier.out_features == 2

    others = LitDataImages(tmp_path / "others" / SAMPLES, str(tmp_path / "chunks"))
    with pytest.raises(DanFastError, match="samples.json is of other chunks"):
        others.read(unlabeled.train[0].path)
    with pytest.raises(DanFastError, match=f"The chunks lack {len(labeled.train)} images, .* write them anew"):
        training_loader(TrainingSet([labeled], [unlabeled]), [], SIZE, cache=others)


def test_mini_batches_of_whole_batches_are_those_of_the_loader(folders: list[Path]) -> None:
    source = training_set(folders)
    planner = BatchPlanner(source.labels, len(source.unlabeled_samples), batch_size=8)
    plans = planner.plan_epoch(1, (torch.tensor([2]), torch.tensor([1])))
    assert any(item.kind == "fed_back" for item in plans[0].meta_test)

    def read_batch(paths: list[Path]) -> torch.Tensor:
        return torch.stack([resize(SIZE)(read_image(path)) for path in paths])

    found = example(3)["mini_batches"](source, plans, read_batch, SIZE, IMAGENET)
    for batch, expected in zip(found, training_loader(source, plans, SIZE), strict=True):
        for split, wanted in zip(batch[:2], expected[:2], strict=True):
            assert all(map(torch.equal, split[:3], wanted[:3])) and split[3:] == wanted[3:]
