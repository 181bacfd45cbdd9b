"""`dan-fast bench data` on few and small images: what it compares, what it writes, and what it refuses."""

import pytest

from dan_fast.bench.data import CACHED, CONTENDERS, DECODED, PLAIN, TRAINING, USES, DataBenchmark, Feeds
from dan_fast.bench.rows import WHOLE, Row, Timing
from dan_fast.data.images import loader
from tests.bench import tiny, written


def small(**changes) -> DataBenchmark:
    return tiny("data", **{"image_size": (40, 20), "workers": 0, "repeat": 1} | changes)


@pytest.mark.slow
def test_figures_bars_and_file(tmp_path):
    printed = (
        "12 JPEG files of 32 x 16 to 40 x 20",
        "cached, evaluation: agrees with plain: equal pixels",
        "training from the cache, 32x16 files, over plain",
    )
    content = written("data", tmp_path, printed=printed)
    assert content["settings"]["files"] == [[32, 16]] and content["settings"]["image_size"] == [40, 20]
    assert [(row["use"], row["contender"]) for row in content["rows"]] == [(u, c) for u in USES for c in CONTENDERS]
    plain = {row["use"]: row for row in content["rows"] if row["contender"] == PLAIN}
    for row in content["rows"]:
        assert row["disagrees"] is None and row["images"] == 12
        assert row["images_per_second"]["median"] == pytest.approx(12 / row["seconds"]["median"])
        if row["contender"] != PLAIN:
            of_plain = plain[row["use"]]["seconds"]["median"]
            assert row["speedup"] == pytest.approx(of_plain / row["seconds"]["median"])
            assert row["apart"][0] == 0 or row["use"] == TRAINING
    cached = [row for row in content["rows"] if row["contender"] == CACHED]
    assert all(row["cache_bytes"] == 128 + 12 * 3 * 40 * 20 and row["build_seconds"] > 0 for row in cached)
    assert [bar["value"] for bar in content["bars"]] == [row["speedup"] for row in cached]
    assert [bar["met"] for bar in content["bars"]] == [row["speedup"] >= 5 for row in cached]


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_a_loader_with_other_pixels_has_no_ratio(monkeypatch, use):
    name = "augment" if use == TRAINING else "normalize"
    right = getattr(loader, name)
    wrong = {
        "augment": lambda images, draws, *wanted: right(images, draws._replace(flip=~draws.flip), *wanted),
        # Half a grey level.
        "normalize": lambda images, *wanted: right(images, *wanted) + 0.01,
    }[name]
    monkeypatch.setattr(f"dan_fast.data.images.loader.{name}", wrong)
    ((_, rows),) = small().measure()
    for row in rows:
        if row.of["use"] == use and row.contender != PLAIN:
            assert "grey levels" in row.disagrees and row.ratio(PLAIN) is None
        else:
            assert row.disagrees is None
    assert [bar.verdict == "not measured" for bar in small().bars(rows)] == [each == use for each in USES]


@pytest.mark.slow
def test_a_loader_that_leaves_images_out_is_found(monkeypatch):
    own = Feeds.loader

    def fewer(feeds, contender, use):
        whole = own(feeds, contender, use)
        if contender != DECODED or use == TRAINING:
            return whole
        return [(images[1:], indices) for images, indices in whole]

    monkeypatch.setattr(Feeds, "loader", fewer)
    ((_, rows),) = small().measure()
    wrong = {row.name: row.disagrees for row in rows if row.disagrees}
    assert wrong == {"decoded, evaluation": "a batch is (3, 3, 40, 20) and not (4, 3, 40, 20)"}


def test_ratios_are_within_a_use_and_a_size():
    benchmark, rows = small(files="32x16,64x32"), []
    for size, factor in (((32, 16), 1.0), ((64, 32), 3.0)):
        group = [
            Row(contender, {"use": use, "file_size": size, "images": 10}, seconds={WHOLE: Timing([seconds * factor])})
            for use, seconds in (("training", 8.0), ("evaluation", 2.0))
            for contender, seconds in ((PLAIN, seconds), (CACHED, 1.0))
        ]
        benchmark.set_ratios(group)
        rows += group
    assert [row.ratio(PLAIN) for row in rows] == [None, 8.0, None, 2.0] * 2
    assert [bar.met for bar in benchmark.bars(rows)] == [True, False, True, False]
    assert set(benchmark.figures(rows[4])["images_per_second"].values()) == {10 / 24}
