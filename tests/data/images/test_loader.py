"""Loaders: what arrives, in which order, with broken files, workers and random numbers."""

import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dan_fast.core.errors import DanFastError
from dan_fast.data import (
    BatchPlan,
    BatchPlanner,
    ImageSamples,
    MiniBatch,
    ReIDDataset,
    Sample,
    TrainingSet,
    image_loader,
    read_image,
    training_loader,
)
from dan_fast.data.images.cache import _Decoding
from dan_fast.data.images.reading import decode_image
from dan_fast.data.images.workers import WorkerDied, _start_worker
from tests.support.refusals import refusal
from tests.support.sameness import same
from tests.support.tiny_training import wait_until

SIZE = (16, 8)


def planner(source: TrainingSet, **options) -> BatchPlanner:
    return BatchPlanner(source.labels, len(source.unlabeled_samples), batch_size=8, seed=1, **options)


FEEDBACK = (torch.tensor([4, 2]), torch.tensor([3, 0]))


def load(source: TrainingSet, plans: list, **options) -> list[MiniBatch]:
    return list(training_loader(source, plans, SIZE, **options))


def both_loaders(source: TrainingSet, **options) -> tuple:
    """Of batches to train on, and of the labelled images in their order."""
    batches = training_loader(source, planner(source).plan_epoch(0), SIZE, **options)
    return batches, image_loader(source.labeled_samples, SIZE, 4, **options)


def break_image(path: Path, kind: str) -> None:
    if kind == "truncated":
        pixels = np.random.default_rng(0).integers(0, 255, (40, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "text":
        path.write_text("this is no image")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


def test_batches_are_what_was_planned(source: TrainingSet) -> None:
    plans = planner(source).plan_epoch(0, FEEDBACK)
    batches = load(source, plans)
    assert len(training_loader(source, plans, SIZE)) == len(batches) == len(plans) == 2
    for plan, batch in zip(plans, batches, strict=True):
        assert batch.skipped == ()
        for items, part in zip(plan, batch[:2], strict=True):
            assert part.images.shape == (4, 3, *SIZE) and part.images.dtype == torch.float32
            assert part.labels.tolist() == [item.label for item in items]
            assert part.sample_ids.tolist() == [-1 if item.kind == "labeled" else item.index for item in items]
            assert part.labels.dtype == part.sample_ids.dtype == torch.int64
        assert batch.meta_train[3:5] == (2, 0) and batch.meta_test[3:5] == (1, 1)
        assert set(batch.meta_test.sample_ids[1:2].tolist()) <= {4, 2}


@pytest.mark.parametrize("kind", ["labeled", "fed_back", "unlabeled"])
def test_the_pixels_belong_to_the_sample(source: TrainingSet, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dan_fast.data.images.loader.augment", lambda images, draws, preprocessing: images.float())
    for plan, batch in zip(plans := planner(source).plan_epoch(0, FEEDBACK), load(source, plans), strict=True):
        for items, part in zip(plan, batch[:2], strict=True):
            for item, image in zip(items, part.images, strict=True):
                if item.kind == kind:
                    level = (10 if kind == "labeled" else 140) + 15 * item.index
                    assert level <= image.min() and image.max() < level + 6


def test_an_unsplit_plan_gives_no_meta_test(source: TrainingSet) -> None:
    batch = load(source, planner(source, split=False).plan_epoch(0, FEEDBACK))[0]
    assert batch.meta_test is None and batch.meta_train.images.shape[0] == 8
    assert batch.meta_train[3:5] == (3, 1)


def test_augmentation_depends_on_the_plan_alone(source: TrainingSet) -> None:
    plans = planner(source).plan_epoch(0, FEEDBACK)
    torch.manual_seed(1)
    first = load(source, plans)
    torch.manual_seed(2)
    assert same(load(source, plans), first)
    assert same(load(source, plans, workers=1), first)
    # Resuming after the first iteration.
    assert same(load(source, plans[1:]), first[1:])
    other = [plan._replace(meta_train=tuple(i._replace(seed=i.seed + 1) for i in plan.meta_train)) for plan in plans]
    changed = load(source, other)
    assert not torch.equal(changed[0].meta_train.images, first[0].meta_train.images)
    assert torch.equal(changed[0].meta_test.images, first[0].meta_test.images)


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_numbers_stay_as_they_are(source: TrainingSet, workers: int) -> None:
    plans = planner(source).plan_epoch(0, FEEDBACK)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader = training_loader(source, plans, SIZE, workers=workers)
    for _ in loader:
        assert torch.equal(torch.get_rng_state(), torch_state)
    list(image_loader(source.labeled_samples, SIZE, workers=workers))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["truncated", "text"])
def test_a_broken_image_is_an_error_of_one_sentence(source: TrainingSet, workers: int, kind: str) -> None:
    path = source.labeled_samples[5].path
    break_image(path, kind)
    for loader in both_loaders(source, workers=workers):
        with pytest.raises(DanFastError) as caught:
            list(loader)
        message = str(caught.value)
        del caught  # it holds this frame, and so the loader's workers
        assert message.startswith(f"The image {path} cannot be decoded (")
        assert message.endswith("or where broken_images can be set, set it to skip.") and "\n" not in message


def test_an_error_ends_the_workers_and_is_no_garbage(source: TrainingSet) -> None:
    """Collected as garbage, an iterator waits five seconds for each worker, and until then they stay."""
    break_image(source.labeled_samples[5].path, "text")
    others = set(multiprocessing.active_children())
    for loader in both_loaders(source, workers=2):
        gc.disable()
        try:
            with suppress(DanFastError):
                list(loader)
            assert set(multiprocessing.active_children()) <= others
        finally:
            gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_skipped_and_named(source: TrainingSet, workers: int) -> None:
    plans = planner(source).plan_epoch(0, FEEDBACK)
    whole = load(source, plans)
    broken = {"labeled": source.labeled_samples[plans[0].meta_train[1].index].path}
    for kind in ("fed_back", "unlabeled"):
        item = next(item for item in plans[0].meta_test if item.kind == kind)
        broken[kind] = source.unlabeled_samples[item.index].path
    for path, kind in zip(broken.values(), ("truncated", "empty", "absent"), strict=True):
        break_image(path, kind)

    def path_of(item) -> Path:
        return (source.labeled_samples if item.kind == "labeled" else source.unlabeled_samples)[item.index].path

    skipping = load(source, plans, workers=workers, broken_images="skip")
    for plan, before, after in zip(plans, whole, skipping, strict=True):
        items = [item for part in plan for item in part]
        assert after.skipped == tuple(str(path_of(item)) for item in items if path_of(item) in broken.values())
        for part, left, full in zip(plan, after[:2], before[:2], strict=True):
            kept = [place for place, item in enumerate(part) if path_of(item) not in broken.values()]
            # The others look as if nothing had been left out before them.
            assert torch.equal(left.images, full.images[kept])
            assert torch.equal(left.labels, full.labels[kept])
            assert torch.equal(left.sample_ids, full.sample_ids[kept])
            kinds = [part[place].kind for place in kept]
            assert left[3:5] == (kinds.count("labeled"), kinds.count("fed_back"))


def test_a_share_without_a_labelled_image_or_without_any_says_what_it_needs(source: TrainingSet) -> None:
    (part, other), *_ = planner(source).plan_epoch(0)
    share = tuple(item for item in part if item.kind == "unlabeled")
    assert share
    plans = [BatchPlan(share, other)]
    assert "no labelled image, as a rank's share may: pass shares=True" in refusal(load, source, plans)
    (batch,) = load(source, plans, shares=True)
    assert batch.meta_train.num_labeled == 0 and len(batch.meta_train.images) == len(share)
    said = "share of a batch holds no image: take fewer ranks or larger batches"
    assert said in refusal(load, source, [BatchPlan((), ())], shares=True)


def test_a_part_without_any_labelled_image_left_is_an_error(source: TrainingSet) -> None:
    for sample in source.labeled_samples:
        break_image(sample.path, "text")
    plan = planner(source).plan_epoch(0)
    with pytest.raises(
        DanFastError, match="All labelled images of a batch, or of a rank's share of it, are broken, .*/labeled/"
    ):
        load(source, plan, broken_images="skip")
    # But not of a rank's share, in which any image is enough.
    assert all(batch.meta_train.counts[0] == 0 for batch in load(source, plan, broken_images="skip", shares=True))
    for sample in source.unlabeled_samples:
        break_image(sample.path, "text")
    with pytest.raises(DanFastError, match="All images of a rank's share of a batch are broken, .*/labeled/"):
        load(source, plan, broken_images="skip", shares=True)


def test_image_loader_keeps_the_order_and_leaves_broken_images_out(source: TrainingSet) -> None:
    samples = source.labeled_samples
    batches = list(image_loader(samples, SIZE, batch_size=3))
    assert [indices.tolist() for _, indices in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (8, 3, *SIZE) and images.dtype == torch.float32
    assert (images.mean(dim=(1, 2, 3)).diff() > 0).all()
    for place in (1, 3, 4, 5):
        break_image(samples[place].path, "truncated")
    batches = list(image_loader(samples, SIZE, batch_size=3, workers=1, broken_images="skip"))
    assert [indices.tolist() for _, indices in batches] == [[0, 2], [], [6, 7]]
    assert batches[1][0].shape == (0, 3, *SIZE) and batches[1][1].dtype == torch.int64
    assert torch.equal(torch.cat([images for images, _ in batches]), images[[0, 2, 6, 7]])
    assert list(image_loader([], SIZE)) == []


def test_image_samples(source: TrainingSet) -> None:
    samples = [sample._replace(camid=index + 3) for index, sample in enumerate(source.labeled_samples)]
    dataset = ImageSamples(samples)
    image, pid, camid, index = dataset[5]
    assert len(dataset) == 8 and (pid, camid, index) == (2, 8, 5)
    assert torch.equal(image, read_image(samples[5].path))
    break_image(samples[5].path, "text")
    assert ImageSamples(samples, broken_images="skip")[5] is None
    assert "cannot be decoded" in refusal(lambda: dataset[5])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tif"
    Image.new("RGB", (5, 7), (204, 204, 204)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (3, 7, 5) and image.dtype == torch.uint8
    assert (image.int() - 204).abs().max() <= 2


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_of_16_bits_the_upper_8_are_taken(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.array([[0, 255, 256], [0x7FFF, 0x80FF, 0xFFFF]], dtype=np.uint16)).save(path)
    assert read_image(path).tolist() == [[[0, 0, 1], [127, 128, 255]]] * 3
    # As Pillow opens the file where its version has no mode of 16 bits for it.
    with Image.open(path) as image:
        older = Image.fromarray(np.asarray(image).astype(np.int32))
        older.format = image.format
    if suffix == "png":
        assert torch.equal(decode_image(older, path), read_image(path))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_no_known_range_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tif"
    Image.new(mode, (5, 7), 1).save(path)
    assert f"cannot be decoded (its mode {mode} has numbers of no known range" in refusal(read_image, path)


def test_channels_are_red_green_blue_and_rows_come_first(tmp_path: Path) -> None:
    path = tmp_path / "image.bmp"
    image = Image.new("RGB", (5, 7))
    image.putpixel((1, 4), (200, 100, 50))
    image.save(path)
    pixels = read_image(path)
    assert pixels[:, 4, 1].tolist() == [200, 100, 50] and pixels.sum() == 350


@pytest.mark.parametrize(
    "orientation, rows",
    {
        1: [[1, 2, 3], [4, 5, 6]],
        2: [[3, 2, 1], [6, 5, 4]],
        3: [[6, 5, 4], [3, 2, 1]],
        4: [[4, 5, 6], [1, 2, 3]],
        5: [[1, 4], [2, 5], [3, 6]],
        6: [[4, 1], [5, 2], [6, 3]],
        7: [[6, 3], [5, 2], [4, 1]],
        8: [[3, 6], [2, 5], [1, 4]],
        9: [[1, 2, 3], [4, 5, 6]],
    }.items(),
)
def test_images_are_upright_as_the_camera_wrote_down(tmp_path: Path, orientation: int, rows: list) -> None:
    path, exif = tmp_path / "image.png", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)).save(path, exif=exif)
    assert read_image(path).tolist() == [rows] * 3
    with Image.open(path) as image:
        assert decode_image(image, path).tolist() == [rows] * 3
        assert image.size == (3, 2)  # the caller's is left


@pytest.mark.parametrize("damage", ["header", "another field"])
def test_damaged_exif_is_no_broken_image(tmp_path: Path, damage: str) -> None:
    path, exif = tmp_path / "image.png", Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    written = exif.tobytes()
    if damage == "header":
        written = written.replace(b"MM\0*", b"MM\0k")
    else:  # text where a number belongs, which shows when EXIF without the orientation is written
        written = written.replace(b"\x01\x0f\0\x02", b"\x01\x52\0\x02")
    Image.new("RGB", (5, 7), (200, 100, 50)).save(path, exif=written)
    with Image.open(path) as image, pytest.raises(Exception, match="."):
        ImageOps.exif_transpose(image)
    assert read_image(path).shape == (3, 7, 5)


def test_ctrl_c_is_left_to_the_main_process(source: TrainingSet) -> None:
    plans = [plan for epoch in range(5) for plan in planner(source).plan_epoch(epoch)]
    batches = iter(training_loader(source, plans, SIZE, workers=1))
    got = [next(batches)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    got += batches
    assert same(got, load(source, plans))


def test_a_worker_whose_parent_was_killed_before_it_looked_ends(monkeypatch, capfd) -> None:
    """PyTorch's watch would take whoever adopted it for its parent, and it would wait for ever."""
    monkeypatch.setattr("dan_fast.data.images.workers._WATCH_S", 0.1)
    if (worker := os.fork()) == 0:
        try:
            _start_worker(2**22 + 1, 0)
            time.sleep(300)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0 and capfd.readouterr().err == ""


def test_loaders_reach_workers_that_are_not_forked(source: TrainingSet) -> None:
    for loader in both_loaders(source):
        source = loader.source
        pickle.loads(pickle.dumps((source.dataset, source.collate_fn, source.worker_init_fn)))


def test_an_unknown_choice_for_broken_images(source: TrainingSet) -> None:
    said, wrong = "broken_images is 'ignore'; set it to error or skip.", {"broken_images": "ignore"}
    assert refusal(image_loader, source.labeled_samples, SIZE, **wrong) == said
    assert refusal(training_loader, source, [], SIZE, **wrong) == said


def objects_behind(start: object) -> int:
    """How many objects can be reached from one, code left aside."""
    seen, found = set(), [start]
    while found:
        one = found.pop()
        if id(one) not in seen and not isinstance(one, (type, ModuleType, FunctionType)):
            seen.add(id(one))
            found += gc.get_referents(one)
    return len(seen)


def test_workers_share_what_they_read_of_however_many_images() -> None:
    """A worker copies the page of each Python object that it looks at (PyTorch #13246); scripts/worker_memory.py."""
    counts = []
    for entries in (500, 5000):
        root = Path("/data/market")
        samples = tuple(Sample(root / f"{number}.jpg", number // 2, 1) for number in range(entries))
        source = TrainingSet([ReIDDataset("market", root, train=samples)])
        plans = BatchPlanner(source.labels, 0, batch_size=4).batches(0)
        loaders = training_loader(source, plans, SIZE, workers=1), image_loader(samples, SIZE, workers=1)
        assert len(loaders[0]) == entries // 4 and len(loaders[1].source.dataset) == entries
        decoding = _Decoding([str(sample.path) for sample in samples], None)
        assert decoding.names[7] == "/data/market/7.jpg"
        counts.append([objects_behind(each) for each in (loaders[0].source, loaders[1].source, decoding)])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        # What PyTorch says, at once and not after five seconds; or what the socket on which it fetches tensors does.
        (RuntimeError("DataLoader worker (pid 7) is killed: 9. "), WorkerDied, "DataLoader worker .pid 7. is killed.*"),
        (ConnectionResetError(104, "Connection reset by peer"), WorkerDied, ".Errno 104. Connection reset by peer"),
        (EOFError(), WorkerDied, "EOFError"),
        (FileNotFoundError("Caught in a worker process."), FileNotFoundError, None),
    ],
    ids=["told", "reset", "ended", "of an item"],
)
def test_a_death_of_a_worker_is_a_sentence_and_what_an_item_raises_is_no_death(
    source: TrainingSet, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type, words: str | None
) -> None:
    def batches(loader):
        yield "first"
        raise error

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", batches)
    got = iter(image_loader(source.labeled_samples, SIZE, workers=1).source)
    assert next(got) == "first"
    with pytest.raises(raised, match="^Caught" if words is None else rf"has died \({words}\): often"):
        next(got)


def test_a_death_where_workers_are_not_forked_names_the_guard_that_a_script_needs(monkeypatch: pytest.MonkeyPatch):
    assert "__main__" not in str(WorkerDied(EOFError()))
    monkeypatch.setattr("torch.multiprocessing.get_start_method", lambda: "spawn")
    guard = '`if __name__ == "__main__":`'
    assert str(WorkerDied(EOFError())).endswith(f"fewer workers, or put what the script does under {guard}.")


def looks_for_ever(event: object, began: object) -> None:
    began.value = 1
    while True:
        event.is_set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_worker_killed_while_it_looks_whether_to_end_keeps_nobody_waiting(source: TrainingSet) -> None:
    event = iter(image_loader(source.labeled_samples, SIZE, workers=1).source).batches._workers_done_event
    for _ in range(8):
        began = multiprocessing.RawValue("b", 0)
        worker = multiprocessing.get_context("fork").Process(target=looks_for_ever, args=(event, began))
        worker.start()
        wait_until(lambda began=began: began.value)
        time.sleep(0.01)
        worker.kill()
        worker.join()
    ended = threading.Thread(target=event.set, daemon=True)
    ended.start()
    ended.join(60)
    assert not ended.is_alive() and event.is_set()
