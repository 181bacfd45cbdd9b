"""Features of images in any form: those that the evaluation makes, to the last bit, in the order of the images."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dan_fast import FeatureExtractor
from dan_fast.core.preprocessing import Preprocessing
from dan_fast.data import Sample, test_transform
from dan_fast.evaluation import extract_features
from dan_fast.training import trained_network
from dan_fast.training.checkpoint import load_checkpoint, save_checkpoint
from tests.support.refusals import refusal
from tests.support.untrained import untrained_checkpoint

BATCH = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of a network whose images are resized and normalised otherwise than by default."""
    path = untrained_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint.pt")
    other = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic")
    state = {name: value for name, value in load_checkpoint(path).items() if name != "format"}
    save_checkpoint(path, state | {"preprocessing": other.to_dict()})
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    """Ten images of different sizes; one is grey, one has a palette."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    files = [folder / f"{number}.png" for number in range(10)]
    for number, file in enumerate(files):
        pixels = random.integers(0, 256, (20 + 7 * number, 11 + 5 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert({3: "L", 5: "P"}.get(number, "RGB")).save(file)
    return files


@pytest.fixture(scope="module")
def extract(checkpoint) -> FeatureExtractor:
    return FeatureExtractor(checkpoint, device="cpu", batch_size=BATCH)


@pytest.fixture(scope="module")
def expected(extract, paths) -> torch.Tensor:
    samples = [Sample(path, 1, 1) for path in paths]
    raw = extract_features(
        extract.network.embed, samples, extract.image_size, BATCH, preprocessing=extract.preprocessing
    ).features
    assert not torch.allclose(raw.norm(dim=1), torch.ones(len(raw)), atol=0.1)
    return F.normalize(raw)


def arrays_of(paths: list[Path]) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


FORMS = {
    "paths": lambda paths: paths,
    "strings": lambda paths: tuple(map(str, paths)),
    "a generator": lambda paths: (path for path in paths),
    "PIL images": lambda paths: [Image.open(path) for path in paths],
    "arrays": arrays_of,
    "arrays of OpenCV": lambda paths: [np.ascontiguousarray(each[..., ::-1])[..., ::-1] for each in arrays_of(paths)],
    "tensors": lambda paths: [torch.tensor(each).permute(2, 0, 1).contiguous() for each in arrays_of(paths)],
    "all kinds": lambda paths: [*paths[:3], Image.open(paths[3]), *arrays_of(paths[4:])],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_features_are_those_of_the_evaluation_to_the_last_bit(extract, paths, expected, form):
    features = extract(FORMS[form](paths))
    assert torch.equal(features, expected)
    assert features.dtype == torch.float32 and not features.is_inference() and features.shape == (10, extract.size)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(10))


def test_workers_give_the_same(checkpoint, paths, expected):
    assert torch.equal(FeatureExtractor(checkpoint, "cpu", BATCH, workers=2)(paths), expected)


def test_the_features_come_batch_by_batch(extract, paths, expected):
    batches = list(extract.batches(paths))
    assert [len(rows) for rows in batches] == [4, 4, 2] and torch.equal(torch.cat(batches), expected)


def test_a_stream_is_taken_batch_by_batch_and_may_reuse_its_buffer(extract, paths, expected):
    taken, buffer = 0, np.zeros((200, 100, 3), np.uint8)

    def frames(count: int):
        nonlocal taken
        for image in arrays_of(paths)[:count]:
            taken += 1
            frame = buffer[: image.shape[0], : image.shape[1]]
            frame[:] = image
            yield frame
        yield np.zeros((4, 4))

    assert torch.equal(next(extract.batches(frames(10))), expected[:BATCH]) and taken == BATCH
    with pytest.raises(TypeError, match=r"images\[7\] must be .* got float64"):
        list(extract.batches(frames(7)))
    whole = extract(frame for frame in frames(10) if frame.dtype == np.uint8)
    assert torch.equal(whole, expected)


def test_a_network_serves_as_its_checkpoint_does(extract, checkpoint, paths, expected):
    network = trained_network(checkpoint)[0].train()
    of_network = FeatureExtractor(network, "cpu", BATCH)
    assert torch.equal(of_network(paths), expected) and of_network.weights == extract.weights
    assert network.training and of_network.network is not network


def test_defaults_of_the_process_change_nothing(checkpoint, paths, expected):
    torch.set_default_dtype(torch.float64)
    try:
        extract = FeatureExtractor(checkpoint, "cpu", BATCH)
        found = [extract(paths), extract([])]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")  # as a GPU would be
    try:
        found += [FeatureExtractor(checkpoint, "cpu", BATCH, workers=workers)(paths) for workers in (0, 1)]
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(found[number], expected) for number in (0, 2, 3)) and all(
        each.dtype == torch.float32 for each in found
    )


def test_a_floating_batch_is_taken_as_it_is(extract, paths, expected):
    transform = test_transform(extract.image_size, extract.preprocessing)
    batch = torch.stack([transform(torch.tensor(each).permute(2, 0, 1)) for each in arrays_of(paths)])
    torch.testing.assert_close(extract(batch), expected)
    torch.testing.assert_close(extract(batch.double()), expected)
    assert extract(batch[:0]).shape == (0, extract.size)
    with pytest.raises(ValueError, match=r"a floating batch must be \(B, 3, 32, 16\), got \(10, 3, 16, 32\).* uint8"):
        extract(batch.mT)


def test_one_image_makes_one_row_and_none_an_empty_matrix(extract, paths):
    array = arrays_of(paths)[0]
    one = extract(paths[0])
    assert one.shape == (1, extract.size)
    for image in (str(paths[0]), Image.open(paths[0]), array, torch.tensor(array).permute(2, 0, 1), array[None]):
        assert torch.equal(extract(image), one)
    assert extract([]).shape == (0, extract.size)


def test_a_folder_is_no_image(extract, tmp_path):
    assert refusal(extract, tmp_path) == f"{tmp_path} is a folder and no image: give the files in it."


def test_an_image_that_cannot_be_decoded_is_named_or_its_place_marked(extract, checkpoint, paths, tmp_path):
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("no image")
    cut.write_bytes(paths[9].read_bytes()[:-600])
    skipping, marked = FeatureExtractor(checkpoint, "cpu", BATCH, broken_images="skip"), torch.arange(11) == 5
    for name, broken in (
        (str(text), text),
        ("absent.png", tmp_path / "absent.png"),
        ("images[5]", Image.open(cut)),
        ("images[5]", np.zeros((0, 7, 3), np.uint8)),
    ):
        images = [*paths[:5], broken, *paths[5:]]
        said, features = refusal(extract, images), skipping(images)
        assert name in said and "cannot be decoded" in said
        assert torch.equal(features.isnan(), marked[:, None].expand_as(features))
        torch.testing.assert_close(features[~marked], skipping(paths))
        assert skipping([broken] * 5).isnan().all()


@pytest.mark.parametrize(
    ("images", "kind", "sentence"),
    [
        ([np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9, 3))], TypeError, r"images\[1\] must be .* got float64"),
        ([torch.zeros(3, 9, 9)], TypeError, r"images\[0\] must be .* got torch.float32"),
        ([None], TypeError, r"images\[0\] must be .* got NoneType"),
        (np.zeros((3, 9, 9), np.uint8), ValueError, r"a uint8 array must be \(H, W, 3\) in RGB, got \(3, "),
        ([torch.zeros(9, 9, 3, dtype=torch.uint8)], ValueError, r"tensor must be \(3, H, W\) in RGB, got \(9, 9, 3\)"),
        ([np.zeros((9, 9), np.uint8)], ValueError, r"images\[0\]: a uint8 array must be"),
        (np.zeros((9, 8), np.uint8), ValueError, r"images\[0\]: a uint8 array must be .* got \(9, 8\)"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_computed(extract, images, kind, sentence):
    with pytest.raises(kind, match=sentence):
        extract(images, progress=lambda done, total: pytest.fail("computed"))


def test_arguments_are_checked(checkpoint):
    for wrong in ({"batch_size": 0}, {"broken_images": "keep"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FeatureExtractor(checkpoint, "cpu", **wrong)
    assert "mps" in refusal(FeatureExtractor, checkpoint, "mps")
    with pytest.raises(TypeError, match="checkpoint must be a path or a dan_fast.nn.DAN, got Linear: hand the part"):
        FeatureExtractor(torch.nn.Linear(2, 3), "cpu")


def test_what_is_no_checkpoint_of_this_version_is_one_sentence(checkpoint, tmp_path):
    state = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "newer.pt", {**state, "config": {**state["config"], "model": {"wings": 2}}})
    (weight, *_) = state["model"]
    less = {name: value for name, value in state["model"].items() if name != weight}
    save_checkpoint(tmp_path / "other.pt", {**state, "model": less})
    for name, sentence in {
        "none.pt": "does not exist",
        "newer.pt": "does not fit this version of dan_fast .*wings",
        "other.pt": f"does not fit this version of dan_fast .*{weight.removeprefix('network.')}",
    }.items():
        assert re.search(f"{name} {sentence}", refusal(FeatureExtractor, tmp_path / name))


def test_a_network_that_has_diverged_is_named(checkpoint, paths):
    extract = FeatureExtractor(checkpoint, "cpu")
    torch.nn.init.constant_(next(extract.network.backbone.parameters()), torch.inf)
    assert "not finite" in refusal(extract, paths)


def test_long_lists_show_a_bar_and_others_tell_who_asks(extract, paths, monkeypatch, capsys):
    told = []
    extract(paths, progress=lambda *done: told.append(done))
    assert told == [(4, 10), (8, 10), (10, 10)]
    extract(paths * 5)
    assert capsys.readouterr() == ("", ""), "no terminal"
    monkeypatch.setenv("FORCE_COLOR", "1")
    extract(paths)
    assert "Features" not in capsys.readouterr().err
    extract(paths * 5)
    assert "Features" in capsys.readouterr().err
