"""The cache of decoded images: right pixels, or made anew, whatever other processes write, damage or leave."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from dan_fast.commands.evaluate import evaluate
from dan_fast.data import BatchPlanner, ImageCache, TrainingSet, image_loader, load_dataset, read_image
from dan_fast.data.images import cache
from dan_fast.data.images.cache import cache_folder
from dan_fast.data.images.loader import training_loader
from dan_fast.data.images.transforms import resize
from dan_fast.evaluation import evaluate_dataset
from dan_fast.training import Interrupted, Trainer
from tests.support.dataset_shelf import colours
from tests.support.refusals import refusal
from tests.support.sameness import same
from tests.support.tiny_training import wait_until
from tests.support.training_runs import assert_same_training, config, stop_after

SIZE = (16, 8)
FORK = multiprocessing.get_context("fork")


def draw_image(path: Path, seed: int) -> Path:
    """All of them take as many bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat() if path.exists() else None
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 11, 3), dtype=np.uint8)).save(path)
    if before is not None:
        make_later(path, before)
    return path


def make_later(path: Path, before: os.stat_result) -> None:
    """Gives a file a later time than it had: a file system's clock may not have ticked since, for tens of ms."""
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [draw_image(tmp_path / "images" / f"{number}.png", number) for number in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def made(folder: Path, paths: list[Path]) -> Path:
    """The folder with the set of `paths` in it."""
    Opened(folder, paths)
    return folder


class Opened:
    """A cache with one set, and what it said."""

    def __init__(
        self,
        folder: Path,
        paths: list[Path],
        size: tuple[int, int] = SIZE,
        heard: Callable[[str], object] = lambda line: None,
        **options,
    ) -> None:
        self.said: list[str] = []
        self.cache = ImageCache(folder, size, say=lambda line: heard(line) or self.said.append(line), **options)
        self.cache.add(paths)

    def holds(self, paths: list[Path], size: tuple[int, int] = SIZE) -> bool:
        return all(torch.equal(self.cache.read(path), resize(size)(read_image(path))) for path in paths)


def files(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.glob(f"*.{ending}"))


def keep_time(path: Path, change: Callable[[], object]) -> None:
    """Changes a file without its modification time telling."""
    status = path.stat()
    change()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip_byte(path: Path, place: int) -> None:
    content, before = bytearray(path.read_bytes()), path.stat()
    content[place] ^= 1
    path.write_bytes(content)
    make_later(path, before)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_pixels_are_those_of_the_transform(tmp_path: Path, folder: Path, paths: list[Path], workers: int) -> None:
    opened = Opened(folder, paths, workers=workers)
    assert opened.holds(paths)
    assert opened.cache.read(str(paths[2])).dtype == torch.uint8
    (file,) = files(folder, "npy")
    assert opened.said == [f"Decoding 5 images into {file}, 1920 bytes."]
    stored = np.load(file)
    assert stored.shape == (5, 3, *SIZE) and stored.dtype == np.uint8
    assert all(each in opened.cache for each in paths) and tmp_path / "other.png" not in opened.cache
    with pytest.raises(KeyError):
        opened.cache.read(tmp_path / "other.png")


def test_behind_a_link_and_back_the_system_finds_the_same_file(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "real/store").mkdir(parents=True)
    (tmp_path / "set").symlink_to(tmp_path / "real/store")
    own = draw_image(tmp_path / "real/images/a.png", 1)
    draw_image(tmp_path / "images/a.png", 2)
    path = tmp_path / "set/../images/a.png"
    opened = Opened(folder, [path])
    assert opened.holds([path]) and torch.equal(opened.cache.read(path), resize(SIZE)(read_image(own)))


def test_images_are_decoded_once(made: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Before it is decoded an image is read, as it is to be compared.
    monkeypatch.setattr(cache, "read_source", lambda name: pytest.fail("a content was compared"))
    again = Opened(made, paths)
    assert again.said == [] and again.holds(paths)
    again.cache.add(paths)
    again.cache.add(paths[1:3])
    assert again.said == []


def test_another_set_and_another_size_are_files_of_their_own(made: Path, paths: list[Path]) -> None:
    assert Opened(made, paths, (32, 8)).holds(paths, (32, 8))
    assert Opened(made, paths[::-1]).holds(paths)
    assert len(files(made, "npy")) == len(files(made, "npz")) == 3
    assert Opened(made, paths).said == []
    both = Opened(made, paths[:2])
    both.cache.add(paths[2:])
    assert both.holds(paths)
    assert "not a height and a width" in refusal(ImageCache, made, (16,))
    assert "check of the cache is 'deep'; set it to quick or full" in refusal(ImageCache, made, SIZE, check="deep")


def test_a_changed_image_has_the_set_made_anew(folder: Path, paths: list[Path]) -> None:
    before = Opened(folder, paths)
    old = before.cache.read(paths[3]).clone()
    draw_image(paths[3], 99)
    opened = Opened(folder, paths)
    assert opened.said[0] == f"The cached images are made anew: {paths[3]} has changed since it was decoded."
    assert opened.holds(paths) and not torch.equal(opened.cache.read(paths[3]), old)
    assert torch.equal(before.cache.read(paths[3]), old), "who reads the old file keeps it"
    assert Opened(folder, paths).said == []


def test_a_change_that_no_time_tells_of_is_found_by_the_full_check(
    tmp_path: Path, folder: Path, paths: list[Path]
) -> None:
    bitmap = draw_image(tmp_path / "images/5.bmp", 5)
    Opened(folder, [*paths, bitmap])
    keep_time(bitmap, lambda: flip_byte(bitmap, 60))
    assert not Opened(folder, [*paths, bitmap]).holds([bitmap])
    opened = Opened(folder, [*paths, bitmap], check="full")
    assert f"{bitmap} has changed" in opened.said[0] and opened.holds([bitmap])


def test_touched_images_keep_their_pixels(made: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for path in paths:
        os.utime(path, ns=(1, 10**18))
    monkeypatch.setattr(cache, "decode_image", lambda *_: pytest.fail("an image was decoded"))
    assert Opened(made, paths).said == []
    monkeypatch.setattr(cache, "read_source", lambda name: pytest.fail("the times were not kept"))
    assert Opened(made, paths).holds([])


def test_another_version_of_the_decoder_has_the_set_made_anew(made: Path, paths: list[Path], monkeypatch) -> None:
    monkeypatch.setattr(cache, "DECODED_BY", "Pillow 99")
    assert Opened(made, paths).said[0].endswith("and this is Pillow 99.")
    assert Opened(made, paths).said == []


def narrow(header: Path, part: str) -> None:
    """One of its tables, such as sources without their modification time."""
    content = dict(np.load(header))
    np.savez(header, **{**content, part: content[part][:, :1]})


DAMAGES = {
    # name: what is done to pixels and header, the check that finds it, the sentence
    "truncate": (lambda data, _: os.truncate(data, data.stat().st_size - 1), "quick", "is corrupt"),
    "lengthen": (
        lambda data, _: data.write_bytes(data.read_bytes() + b"\0"),
        "quick",
        "is corrupt: it has 2049 bytes and not 2048",
    ),
    "flip pixel": (lambda data, _: flip_byte(data, -700), "quick", "is corrupt: 1 image of 5 differ"),
    "unseen": (lambda data, _: keep_time(data, lambda: flip_byte(data, -700)), "full", "is corrupt: 1 image of 5"),
    "flip shape": (lambda data, _: flip_byte(data, data.read_bytes().index(b"(5,") + 1), "quick", "is corrupt"),
    "flip header": (lambda _, header: flip_byte(header, header.stat().st_size // 2), "quick", "is corrupt"),
    "empty header": (lambda _, header: header.write_bytes(b""), "quick", "is corrupt"),
    **{
        f"narrow {part}": (lambda _, header, part=part: narrow(header, part), "quick", ".npz is corrupt: its tables")
        for part in ("sources", "digests", "rows")
    },
    "lose header": (lambda _, header: header.unlink(), "quick", "is missing"),
    "lose data": (lambda data, _: data.unlink(), "quick", "is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_corrupt_cache_is_made_anew(made: Path, paths: list[Path], name: str) -> None:
    damage, check, sentence = DAMAGES[name]
    damage(*files(made, "npy"), *files(made, "npz"))
    opened = Opened(made, paths, check=check)
    assert sentence in opened.said[0] and "\n" not in opened.said[0] and len(opened.said) == 2
    assert opened.holds(paths)
    assert Opened(made, paths, check="full").said == []


def test_an_old_header_does_not_fit_new_pixels(made: Path, paths: list[Path]) -> None:
    (header,), (data,) = files(made, "npz"), files(made, "npy")
    old, before, original = header.read_bytes(), data.stat(), paths[0].read_bytes()
    # As after a kill between the two files, and an image put back with its time.
    keep_time(paths[0], lambda: draw_image(paths[0], 77))
    Opened(made, paths, check="full")
    make_later(data, before)
    header.write_bytes(old)
    keep_time(paths[0], lambda: paths[0].write_bytes(original))
    opened = Opened(made, paths)
    assert "differ from what was written" in opened.said[0] and opened.holds(paths)


def test_a_broken_image_is_an_error_where_it_is_read(tmp_path: Path, folder: Path, paths: list[Path]) -> None:
    absent = tmp_path / "images" / "absent.png"
    paths[1].write_text("no image")
    for _ in range(2):
        opened = Opened(folder, [*paths, absent])
        assert opened.holds([paths[0], *paths[2:]])
        for path in (paths[1], absent):
            assert refusal(opened.cache.read, path) == refusal(read_image, path)
    assert opened.said == []
    draw_image(absent, 8)
    draw_image(paths[1], 9)
    # The newest set of an image counts.
    opened.cache.add([absent, tmp_path / "images" / "never.png"])
    assert opened.holds([absent])
    assert Opened(folder, [*paths, absent]).holds([*paths, absent])


def test_what_could_not_be_decoded_is_tried_again(folder: Path, paths: list[Path], monkeypatch) -> None:
    os.truncate(paths[1], paths[1].stat().st_size // 2)
    assert Opened(folder, paths).holds([paths[0], *paths[2:]])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    opened = Opened(folder, paths)
    assert opened.holds(paths) and f"{paths[1]} can be decoded by now" in opened.said[0]


@pytest.mark.slow
def test_workers_decode_as_the_process_that_asks(folder: Path, paths: list[Path], monkeypatch) -> None:
    os.truncate(paths[1], paths[1].stat().st_size // 2)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    start = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        opened = Opened(folder, paths, workers=1)
    finally:
        multiprocessing.set_start_method(start, force=True)
    opened.cache.read(paths[1])


def test_an_image_for_which_there_is_no_memory_is_not_broken(paths: list[Path], monkeypatch) -> None:
    monkeypatch.setattr("dan_fast.data.images.reading._pixels", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        read_image(paths[0])


def slowly(monkeypatch: pytest.MonkeyPatch, log: Path, wait: Callable[[int], object]) -> None:
    """Has each decoding leave a line and wait, as is said of the number of lines."""
    decode = cache.decode_image

    def slow(content: bytes, path: Path):
        with log.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        wait(len(log.read_text().splitlines()))
        return decode(content, path)

    monkeypatch.setattr(cache, "decode_image", slow)


def test_two_processes_at_once_decode_once(tmp_path: Path, folder: Path, paths: list[Path], monkeypatch) -> None:
    log = tmp_path / "log"
    waits, results = FORK.Event(), FORK.Queue()

    def until_the_other_waits(number: int) -> None:
        assert waits.wait(60)

    slowly(monkeypatch, log, until_the_other_waits)

    def work() -> None:
        opened = Opened(folder, paths, heard=lambda line: waits.set() if line.startswith("Waiting") else None)
        results.put((opened.holds(paths), opened.said))

    processes = [FORK.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [right for right, _ in found] == [True, True]
    assert len(log.read_text().splitlines()) == len(paths)
    assert sorted(said[0].split()[0] for _, said in found) == ["Decoding", "Waiting"]


def test_a_process_killed_while_it_decodes(tmp_path: Path, folder: Path, paths: list[Path], monkeypatch) -> None:
    log = tmp_path / "log"
    # Batches of one image: some are in the file when the process is killed.
    monkeypatch.setattr(cache, "_BATCH", 1)
    with monkeypatch.context() as patch:
        slowly(patch, log, lambda number: time.sleep(300 if number == 3 else 0))
        process = FORK.Process(target=Opened, args=(folder, paths))
        process.start()
        wait_until(lambda: not process.is_alive() or (log.exists() and len(log.read_text().splitlines()) >= 3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in folder.iterdir() if "part" in path.name] == [".part"]
    assert files(folder, "npy") == files(folder, "npz") == []
    opened = Opened(folder, paths)
    assert opened.holds(paths) and opened.said[0].startswith("Decoding 5 images")
    assert not [path for path in folder.iterdir() if "part" in path.name]


def unprivileged(run: Callable[[], str]) -> str:
    """What `run` returns in a process to which the permissions of folders apply."""
    results = FORK.SimpleQueue()

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        results.put(run())

    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return results.get()


def test_a_folder_that_may_only_be_read() -> None:
    # Not in pytest's own folder, which other users may not read.
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    try:
        paths = [draw_image(root / "images" / f"{number}.png", number) for number in range(3)]
        folder = root / "cache"
        Opened(folder, paths)
        folder.chmod(0o555)
        assert unprivileged(lambda: refusal(Opened, folder, paths[:2])) == (
            f"The cache folder {folder} cannot be written (Permission denied); "
            "choose another folder for the cache, or none."
        )
        # What is there can be used, touched images too.
        for _ in range(2):
            assert unprivileged(lambda: str(Opened(folder, paths).holds(paths))) == "True"
            os.utime(paths[0], ns=(1, 10**18))
    finally:
        shutil.rmtree(root)


def test_a_folder_that_cannot_be(paths: list[Path]) -> None:
    said = f"The cache folder {paths[0]}/cache cannot be written (Not a directory);"
    assert said in refusal(Opened, paths[0] / "cache", paths)


def test_a_full_disk_leaves_what_was_there(made: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = files(made, "npy")
    before = file.read_bytes()
    draw_image(paths[0], 50)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 0))
        said = f"The cache of 5 images needs 1920 bytes and {made} has 0 bytes left: make room"
        assert said in refusal(Opened, made, paths)
    with monkeypatch.context() as patch:

        def full(content) -> bytes:
            raise OSError(28, "No space left on device")

        patch.setattr(cache, "digest", lambda content: full(content) if isinstance(content, np.ndarray) else b"x" * 16)
        assert "could not be written (No space left on device)" in refusal(Opened, made, paths)
    assert file.read_bytes() == before and not list(made.glob(".*"))
    assert Opened(made, paths).holds(paths)


def test_the_folder_of_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("none") is None and ImageCache.of_setting("none", SIZE) is None
    assert "The folder of the cache is empty: name one, user or none" in refusal(cache_folder, "")
    assert cache_folder("user") == Path("/home/me/.cache/dan-fast")
    assert cache_folder("~/images") == Path("/home/me/images")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert cache_folder("user") == Path("/scratch/dan-fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder("user") == Path("/home/me/.cache/dan-fast")
    assert ImageCache.of_setting("/scratch/x", SIZE, "full").folder == Path("/scratch/x")
    # A container's user may be in no list of users.
    monkeypatch.setattr("os.path.expanduser", str)
    assert "no home folder to keep a cache in: set XDG_CACHE_HOME, or name the folder" in refusal(cache_folder, "user")


def test_loaders_give_the_same_with_a_cache_and_without(tmp_path: Path, folder: Path, source: TrainingSet) -> None:
    planner = BatchPlanner(source.labels, 6, batch_size=8, seed=1)
    plans = [plan for epoch in range(2) for plan in planner.plan_epoch(epoch, (torch.tensor([4]), torch.tensor([3])))]
    (tmp_path / "labeled" / "5.png").write_text("broken")
    paths, options = [sample.path for sample in source.labeled_samples], {"broken_images": "skip"}
    opened = Opened(folder, paths)
    plain = list(training_loader(source, plans, SIZE, **options))
    assert any(batch.skipped for batch in plain)
    assert same(list(training_loader(source, plans, SIZE, cache=opened.cache, **options)), plain)
    # Resuming, with the file of another process.
    again = Opened(folder, paths)
    assert same(list(training_loader(source, plans[1:], SIZE, cache=again.cache, **options)), plain[1:])
    plain = list(image_loader(source.labeled_samples, SIZE, 3, **options))
    assert same(list(image_loader(source.labeled_samples, SIZE, 3, cache=opened.cache, **options)), plain)
    assert "5.png cannot be decoded" in refusal(list, image_loader(source.labeled_samples, SIZE, 3, cache=opened.cache))
    with pytest.raises(ValueError, match=r"the cache is of images of \(16, 8\) and not of \(8, 8\)"):
        image_loader(source.labeled_samples, (8, 8), cache=opened.cache)


@pytest.mark.slow
def test_a_run_with_a_cache_resumes_one_without_bit_for_bit(images: Path, tmp_path: Path) -> None:
    def trainer(out: str, cache: str, resume: bool = False) -> Trainer:
        data = {"targets": str(images / "mall"), "batch_size": 4, "cache": cache}
        return Trainer(config(images, tmp_path / out, data=data, run={"resume": resume}))

    expected = trainer("whole", "none").fit()
    parts = trainer("parts", str(tmp_path / "cache"))
    stop_after(parts, 1)
    with pytest.raises(Interrupted):
        parts.fit()
    made = len(files(tmp_path / "cache", "npy"))
    assert trainer("parts", str(tmp_path / "cache"), resume=True).fit() == expected
    assert made == 2 and len(files(tmp_path / "cache", "npy")) == 4, "train splits first, then query and gallery"
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    checkpoint, evaluated = str(tmp_path / "parts/checkpoint.pt"), str(tmp_path / "evaluated")
    evaluate(checkpoint, str(images / "mall"), workers=0, device="cpu", cache=evaluated)
    assert len(files(tmp_path / "evaluated", "npy")) == 2


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_run_decodes_no_set_of_which_it_takes_nothing(images: Path, tmp_path: Path, share: float) -> None:
    data = {"unlabeled": str(images / "mall"), "unlabeled_share": share, "cache": str(tmp_path / "cache")}
    trainer = Trainer(config(images, tmp_path / "run", data=data))
    trainer.batches.fill_cache([*trainer.datasets.labeled, *trainer.datasets.unlabeled])
    held = [all(each.path in trainer.batches.cache for each in load_dataset(images / name).train)
            for name in ("campus", "mall")]  # fmt: skip
    assert held == [True, share > 0]


def test_the_evaluation_from_a_cache_is_the_same(images: Path, tmp_path: Path, capsys) -> None:
    people = load_dataset(images / "mall")
    expected = evaluate_dataset(colours, people, SIZE)
    for said in ("Decoding 4 images", ""):
        opened = ImageCache(tmp_path / "cache", SIZE, say=print)
        assert evaluate_dataset(colours, people, SIZE, cache=opened) == expected
        assert said in capsys.readouterr().out
    assert len(files(tmp_path / "cache", "npy")) == 2
