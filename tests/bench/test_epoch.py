"""`dan-fast bench epoch` on few and small images: what it compares, what it extrapolates, and what is left out."""

import math
import multiprocessing
import pickle
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dan_fast.bench import timing
from dan_fast.bench.data import PlainImages
from dan_fast.bench.epoch import benchmark as epoch
from dan_fast.bench.epoch import contenders
from dan_fast.bench.epoch.contenders import CACHED, PLAIN, Epoch, Feed, compare_losses, draw_files, drawn_images
from dan_fast.bench.machine import yardstick
from dan_fast.bench.process import in_own_process
from dan_fast.bench.rows import WHOLE, LeftOut, Row, Timing
from tests.bench import tiny, written


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Epoch:
    root = tmp_path_factory.mktemp("epoch")
    folder = draw_files(root, (64, 32), 48)
    return Epoch(str(folder), str(root / "cache"), "resnet18", 64, 32, batch=8, iterations=3, workers=0, device="cpu")


@pytest.mark.slow
def test_the_command_writes_everything_down(tmp_path, monkeypatch):
    def mostly_here(function, **arguments):
        """Processes take nearly all of the time: the plain loop alone has its own."""
        if arguments.get("contender") == PLAIN:
            return in_own_process(function, **arguments)
        return pickle.loads(pickle.dumps(function(**pickle.loads(pickle.dumps(arguments)))))

    monkeypatch.setattr(epoch, "in_own_process", mostly_here)
    printed = ("measured: 2 of 6 mini-batches, EXTRAPOLATED", "16 images equal bit for bit as decoded",
               "losses of the first 2 steps", "ANOTHER MACHINE", "recipe paper, dan", "over plain")  # fmt: skip
    flags = ("--recipe", "paper,dan", "--folder", str(tmp_path / "kept"))
    content = written("epoch", tmp_path, *flags, printed=printed)
    plain, cached, paper, dan = content["rows"]
    assert [row["contender"] for row in content["rows"]] == [PLAIN, CACHED, "paper", "dan"]
    assert (paper["order"], dan["order"]) == (1, None) and content["paper_seconds"] == {"plain": 32.609, "dan": 137.908}
    for row in content["rows"]:
        (found,) = row["passes"]
        assert row["disagrees"] is None and row["left_out"] is None
        assert row["extrapolated"] and (row["measured_iterations"], row["epoch_iterations"]) == (2, 6)
        assert row["seconds"]["median"] == pytest.approx(3 * found["seconds"])
        assert row["images_per_second"] == pytest.approx(48 / row["seconds"]["median"])
        assert row["cpu_seconds"] == pytest.approx({each: 3 * found[each] for each in ("user", "system")})
        assert 0 < row["waiting_share"] == found["waiting"] / found["seconds"] < 1
        assert row["peak_bytes"] > 1e8 and row["cpu_seconds"]["user"] > 0
        # The limit is of a rate measured at another moment, beside other tests: 1 is no bound here.
        larger = max(row["limit_seconds"][WHOLE].values())
        assert row["over_limit"][WHOLE] == pytest.approx(row["seconds"]["median"] / larger)
    assert paper["ratio"][PLAIN] == pytest.approx(paper["seconds"]["median"] / plain["seconds"]["median"])
    # A DAN's products are of as many images; the plain loops' are the same.
    assert plain["flop"] == cached["flop"] == pytest.approx(paper["flop"], rel=0.02)
    (manifest, _) = sorted((tmp_path / "kept").glob("64x32-2-persons/*/manifest.csv"))
    assert len(manifest.read_text().splitlines()) == 1 + 24


def test_both_feeds_have_the_same_images_and_a_wrong_one_is_seen(drawn, monkeypatch):
    for recipe in ("plain", "paper"):
        feed = Feed(drawn, recipe)
        feed.batches.fill_cache([*feed.datasets.labeled, *feed.datasets.unlabeled])
        disagrees, words = feed.compare()
        assert disagrees is None and words.startswith("16 images equal bit for bit as decoded, augmented up to")
        (batch, *others), plain = feed.cached(0), next(iter(feed.plain(0)))
        labels = torch.cat([part.labels for part in batch[:2] if part is not None])
        assert torch.equal(plain[1], labels) and len(others) == 2 and ((labels < 0).any() == (recipe == "paper"))
    brighter = PlainImages.__getitem__

    def changed(pixels, classes):
        def read(*at):
            image, label = brighter(*at)
            return pixels(image), classes(label)

        monkeypatch.setattr(PlainImages, "__getitem__", read)
        return feed.compare()[0]

    assert "of the pixels differ" in changed(lambda image: image + 0.1, int)
    assert changed(torch.clone, lambda label: label + 1) == "classes of a batch are others"
    assert changed(lambda image: image * math.nan, int) == "a batch holds numbers that are not finite"
    monkeypatch.setattr(contenders, "read_image", lambda path: torch.zeros(3, 64, 32, dtype=torch.uint8))
    assert feed.compare()[0] == "16 of 16 decoded images are not equal"


def test_operations_of_grouped_convolutions_are_not_counted_as_dense():
    images, layer = torch.ones(2, 8, 6, 6, requires_grad=True), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    with FlopCounterMode(display=False) as counter:
        layer(images).sum().backward()
    assert contenders.operations(counter) == 3 * 2 * (2 * 8 * 36) * 9 < counter.get_total_flops()


def test_what_is_decoded_ahead_before_the_clock_starts_is_decoded_before_it_stops():
    given = Epoch("", "", "resnet18", 64, 32, batch=8, iterations=3, workers=2, device="cpu", untimed=2)
    assert given.planned == 2 + 3 + 4
    trained, handed_out = [], iter(range(given.planned))
    contenders.go_through(lambda number: handed_out, trained.append, given)
    assert trained == [0, 1, 2, 3, 4] and len(list(handed_out)) == 4
    # A whole epoch decodes all of it while the clock runs.
    whole = given._replace(untimed=0)
    contenders.go_through(lambda number: iter(range(whole.planned)), trained.append, whole)
    assert trained[5:] == [0, 1, 2]


def test_losses_that_differ_are_a_difference():
    assert compare_losses([2.0, 3.0], [2.0, 3.001]) == (None, "losses of the first 2 steps by 3.3e-04")
    for wrong in ([2.0, 3.01], [float("nan"), 3.0]):
        assert "(allowed 1.0e-03)" in compare_losses(wrong, [2.0, 3.0])[0]


def measured(monkeypatch, **changes: float) -> list:
    """The rows of a benchmark whose processes take no time."""

    def answer(function, contender="", order=None, **arguments):
        if function is contenders.compare_feeds:
            return None, "equal", 0.5
        if (contender, order) == ("paper", 2):
            raise LeftOut("exit code -9")
        found = {"seconds": 2.0, "waiting": 0.5, "user": 3.0, "system": 0.25, "flop": 1e9, "peak_bytes": 7}
        return found | {"losses": [changes.get("loss", 1.0) if contender == CACHED else 1.0]}

    monkeypatch.setattr(epoch, "in_own_process", answer)
    monkeypatch.setattr(contenders, "draw_files", lambda *arguments: "files")
    benchmark = tiny("epoch", order="1,2", iterations=3)
    monkeypatch.setattr(benchmark, "_measure_machine", lambda rows: None)
    ((_, rows),) = benchmark.measure()
    return [benchmark, *rows]


def test_what_fails_is_left_out_and_what_disagrees_has_no_ratio(monkeypatch):
    benchmark, plain, cached, first, second = measured(monkeypatch)
    assert second.left_out[WHOLE] == "exit code -9" and not second.seconds and second.speedup == {}
    found = benchmark.figures(first)
    assert first.whole == [4.0] and found["waiting_share"] == 0.25 and first.flop == {WHOLE: 6e9}
    assert found["cpu_seconds"] == {"user": 6.0, "system": 0.5} and found["ratio"] == {PLAIN: 1.0, CACHED: 1.0}
    assert [bar.verdict for bar in benchmark.bars([plain, cached, first, second])] == ["met"]
    first.seconds[WHOLE] = Timing([4.3])
    benchmark.set_ratios([plain, first])
    assert [bar.verdict for bar in benchmark.bars([plain, first])] == ["NOT met"]
    benchmark, plain, cached, first, second = measured(monkeypatch, loss=1.1)
    assert cached.disagrees.startswith("losses") and benchmark.figures(cached)["ratio"] == {}
    assert benchmark.figures(first)["ratio"] == {PLAIN: 1.0}


def test_convolutions_faster_than_products_leave_no_limit_by_operations(monkeypatch):
    settings = {"convolutions": "tf32", "matrix_products": "ieee"}
    monkeypatch.setattr(timing, "float32_settings", lambda device: settings)
    monkeypatch.setattr(epoch, "yardstick", lambda device, size: yardstick(device, 2**20))
    row = Row(PLAIN, model_bytes={WHOLE: 1}, flop={WHOLE: 1.0})
    tiny("epoch")._measure_machine([row])
    assert row.limits(WHOLE).keys() == {"bytes"}


def test_images_are_drawn_once_and_are_whole_persons(drawn, monkeypatch):
    assert [drawn_images(count) for count in (1, 48, 49, 12_936)] == [48, 48, 72, 12_936]
    monkeypatch.setattr(contenders, "synthesize", lambda *arguments, **options: pytest.fail("drawn again"))
    root = Path(drawn.folder).parent
    assert str(draw_files(root, (64, 32), 48)) == drawn.folder


def test_the_time_of_workers_counts_while_they_run():
    """What an epoch's first batches cost them is no part of what is extrapolated."""
    spun, go_on = multiprocessing.Event(), multiprocessing.Event()

    def work():
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        spun.set()
        go_on.wait()

    before = contenders.cpu_seconds()
    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    assert spun.wait(60)
    meanwhile = contenders.cpu_seconds()
    go_on.set()
    worker.join()
    after = contenders.cpu_seconds()
    # The system counts ticks of 10 ms, user's and its own apart, and of a process that runs the last one later.
    assert sum(meanwhile) - sum(before) > 0.25 and sum(after) - sum(meanwhile) < 0.2
