"""`dan-fast bench data` on few and small images: what it compares, what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from dan_fast import cli
from dan_fast.bench import bench_data
from dan_fast.bench import data as bench
from dan_fast.bench.data import CACHED, CONTENDERS, DECODED, PLAIN, TRAINING, USES, FeedPlan, FeedRow, feed_group
from dan_fast.bench.timing import Timing
from dan_fast.core.errors import DanFastError
from dan_fast.data.images import loader

SMALL = {"device": "cpu", "files": "32x16", "image_size": (40, 20), "images": 12, "batch": 4, "repeat": 2}


def small_plan(**changes) -> FeedPlan:
    settings = {"file_sizes": [(32, 16)], "image_size": (40, 20), "images": 12, "batch_size": 4, "workers": 0}
    return FeedPlan(**settings | {"repeat": 1} | changes)


@pytest.mark.slow
def test_figures_bars_and_file(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    met = bench_data(json=str(tmp_path / "data.json"), workers=1, console=console, **SMALL)
    content = json.loads((tmp_path / "data.json").read_text())
    assert content["benchmark"] == "data" and content["complete"]
    assert content["settings"]["files"] == [[32, 16]] and content["settings"]["image_size"] == [40, 20]
    assert [(row["use"], row["contender"]) for row in content["rows"]] == [(u, c) for u in USES for c in CONTENDERS]
    plain = {row["use"]: row for row in content["rows"] if row["contender"] == PLAIN}
    for row in content["rows"]:
        assert row["disagrees"] is None and row["images"] == 12
        assert len(row["seconds"]["all"]) == 2
        assert row["images_per_second"]["median"] == pytest.approx(12 / row["seconds"]["median"])
        if row["contender"] != PLAIN:
            of_plain = plain[row["use"]]["seconds"]["median"]
            assert row["speedup"] == pytest.approx(of_plain / row["seconds"]["median"])
            assert row["apart"][0] == 0 or row["use"] == TRAINING
    cached = [row for row in content["rows"] if row["contender"] == CACHED]
    assert all(row["cache_bytes"] == 128 + 12 * 3 * 40 * 20 and row["build_seconds"] > 0 for row in cached)
    assert [bar["value"] for bar in content["bars"]] == [row["speedup"] for row in cached]
    assert [bar["met"] for bar in content["bars"]] == [row["speedup"] >= 5 for row in cached]
    assert met == all(bar["met"] for bar in content["bars"])
    text = console.export_text()
    assert (
        "12 JPEG files of 32 x 16 to 40 x 20" in text and "cached, evaluation: agrees with plain: equal pixels" in text
    )


@pytest.mark.parametrize("use", USES)
def test_a_loader_with_other_pixels_has_no_ratio(monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    name = "augment" if use == TRAINING else "normalize"
    right = getattr(loader, name)
    wrong = {
        "augment": lambda images, draws, *wanted: right(images, draws._replace(flip=~draws.flip), *wanted),
        # Half a grey level.
        "normalize": lambda images, *wanted: right(images, *wanted) + 0.01,
    }[name]
    monkeypatch.setattr(f"dan_fast.data.images.loader.{name}", wrong)
    with feed_group(small_plan(), (32, 16)) as group:
        rows = group.measure()
    for row in rows:
        if row.use == use and row.contender != PLAIN:
            assert "grey levels" in row.disagrees and row.speedup is None
        else:
            assert row.disagrees is None
    bars = bench.feed_bars(rows, [(32, 16)])
    assert [bar.verdict == "not measured" for bar in bars] == [each == use for each in USES]


def test_a_loader_that_leaves_images_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = bench.FeedGroup._own

    def fewer(group, row):
        return (
            [(images[1:], indices) for images, indices in own(group, row)] if row.use != TRAINING else own(group, row)
        )

    monkeypatch.setattr(bench.FeedGroup, "_own", fewer)
    with feed_group(small_plan(), (32, 16)) as group:
        row = next(row for row in group.rows if row.use != TRAINING and row.contender == DECODED)
        group._compare(row)
    assert row.disagrees == "a batch is (3, 3, 40, 20) and not (4, 3, 40, 20)"


def test_ratios_are_within_a_use_and_a_size() -> None:
    rows = [
        FeedRow(contender, use, size, (40, 20), 10, Timing([seconds * factor]))
        for size, factor in (((32, 16), 1.0), ((64, 32), 3.0))
        for use, seconds in (("training", 8.0), ("evaluation", 2.0))
        for contender, seconds in ((PLAIN, seconds), (CACHED, 1.0))
    ]
    bench.set_feed_speedups(rows)
    assert [row.speedup for row in rows] == [None, 8.0, None, 2.0] * 2
    bars = bench.feed_bars(rows, [(32, 16), (64, 32)])
    assert [bar.met for bar in bars] == [True, False, True, False]
    assert rows[4].rate == pytest.approx((10 / 24,) * 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": "128"}, "files: '128' is not a height and a width of at least 32x16, such as 128x64"),
        ({"files": "32x16,16x16"}, "files: '16x16' is not"),
        ({"batch": 13}, "batch is 13; it must be from 2 to images, 12"),
        ({"device": "tpu"}, "tpu"),
        ({"json": "/proc/nowhere/data.json"}, "could not be written"),
    ],
)
def test_settings_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(DanFastError, match=message):
        bench_data(**SMALL | changes)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--files", "32x16", "--image_size", "[40,20]", "--images", "8", "--batch", "4", "--repeat", "1"]
    assert cli.main(["bench", "data", "--device", "cpu", "--workers", "0", *flags]) == 0
    assert "training from the cache, 32x16 files, over plain" in capsys.readouterr().out
