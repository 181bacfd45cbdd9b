"""Synthetic pedestrians: repeatable, true to their style parameters, and not told apart by colour alone."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dan_fast.core.errors import DanFastError
from dan_fast.data.synthetic import DOMAINS, synthesize, writer
from dan_fast.data.synthetic.person import Pose, draw_person, sample_identity
from dan_fast.data.synthetic.scene import render, sample_camera, sample_view, scenery


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def manifest(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("synthetic") / "new" / "folder"
    return root, synthesize(root, identities=5, cameras=3, images_per_camera=2, seed=3)


def test_writes_images_and_manifests_only(small):
    root, manifests = small
    assert manifests == [root / name / "manifest.csv" for name in DOMAINS]
    for path in manifests:
        rows = manifest(path)
        listed = {row["path"] for row in rows} | {"manifest.csv"}
        assert len(listed) == 5 * 3 * 2 + 1
        assert listed == {str(p.relative_to(path.parent)) for p in path.parent.rglob("*") if p.is_file()}
        for row in rows[:4]:
            with Image.open(path.parent / row["path"]) as image:
                assert (image.size, image.mode) == ((64, 128), "RGB")
    assert {p.name for p in root.iterdir()} == set(DOMAINS)


def test_manifest_splits(small):
    _, manifests = small
    owners: dict[str, str] = {}
    for path in manifests:
        rows = manifest(path)
        assert list(rows[0]) == ["path", "pid", "camid", "split"]
        pids = {split: {r["pid"] for r in rows if r["split"] == split} for split in ("train", "query", "gallery")}
        assert sum(r["split"] in pids for r in rows) == len(rows)
        assert (len(pids["train"]), len(pids["query"])) == (3, 2)
        assert pids["query"] == pids["gallery"] and not pids["train"] & pids["query"]
        assert {r["camid"] for r in rows} == {"1", "2", "3"}
        gallery = {(r["pid"], r["camid"]) for r in rows if r["split"] == "gallery"}
        queries = [(r["pid"], r["camid"]) for r in rows if r["split"] == "query"]
        assert len(queries) == len(set(queries)) == 2 * 3
        for pid, camid in queries:
            assert any(p == pid and c != camid for p, c in gallery)
        for pid in pids["train"] | pids["query"]:
            assert int(pid) > 0 and owners.setdefault(pid, path.parent.name) == path.parent.name


def test_same_seed_same_bytes(small, tmp_path):
    root, _ = small
    synthesize(tmp_path / "again", identities=5, cameras=3, images_per_camera=2, seed=3)
    assert contents(tmp_path / "again") == contents(root)
    synthesize(tmp_path / "other", ["campus"], identities=5, cameras=3, images_per_camera=2, seed=4)
    other, same = contents(tmp_path / "other" / "campus"), contents(root / "campus")
    assert other["manifest.csv"] == same["manifest.csv"]
    assert not any(other[name] == same[name] for name in same if name != "manifest.csv")


def test_the_home_folder_is_where_it_is_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (made,) = synthesize("~/x", ["campus"], identities=2, cameras=2)
    assert made.is_relative_to(tmp_path / "x") and [each.name for each in tmp_path.iterdir()] == ["x"]


def test_images_do_not_depend_on_what_else_is_made(small, tmp_path):
    root, _ = small
    synthesize(tmp_path, ["street", "campus"], identities=7, cameras=4, images_per_camera=3, seed=3)
    more, fewer = contents(tmp_path / "campus" / "images"), contents(root / "campus" / "images")
    assert len(fewer) == 30 and len(more) == 84
    assert fewer == {name: more[name] for name in fewer}


def colour_histograms(images: list[Image.Image]) -> np.ndarray:
    bins = np.array([[1], [8], [64]])
    codes = [(np.asarray(image).reshape(-1, 3) // 32 @ bins).ravel() for image in images]
    return np.array([np.bincount(code, minlength=512) / len(code) for code in codes])


def rank1(images: list[Image.Image], pids: np.ndarray, camids: np.ndarray, others_only: bool) -> float:
    """Rank-1 by chi-square distance, each image against the rest without its own person and camera.

    ``others_only`` also leaves out other people by the same camera, whose background misleads most.
    """
    h = colour_histograms(images)
    a, b = h[:, None], h[None]
    distance = ((a - b) ** 2 / np.maximum(a + b, 1e-12)).sum(-1)
    same_camera, same_person = camids[:, None] == camids[None], pids[:, None] == pids[None]
    distance[same_camera & (same_person | others_only)] = np.inf
    return float((pids[distance.argmin(1)] == pids).mean())


@pytest.mark.parametrize("name", DOMAINS)
def test_colour_histograms_fail(name):
    domain = DOMAINS[name]
    plain = replace(
        domain, brightness=1.0, contrast=1.0, warmth=0.0, haze=0.0, variation=0.0, blur=0.0, noise=0.0,
        resolution=1.0, misaligned=0.0, occluded=0.0,
    )  # fmt: skip
    people, cameras = 20, 3
    ids, cams = np.repeat(np.arange(people), cameras), np.tile(np.arange(cameras), people)
    found = {}
    for style in (domain, plain):
        images = []
        lenses = [sample_camera(style, np.random.default_rng((7, c))) for c in range(cameras)]
        if style is plain:
            lenses = [replace(lenses[0], slope=0.0)] * cameras
        backgrounds = [scenery(style, camera, (128, 64)) for camera in lenses]
        for pid, cam in zip(ids, cams, strict=True):
            who = sample_identity(np.random.default_rng((8, pid)))
            view = sample_view(style, lenses[cam], np.random.default_rng((9, pid, cam)))
            if style is plain:
                view = replace(view, place=0.0, exposure=1.0)
            images.append(render(style, who, lenses[cam], view, (128, 64), backgrounds[cam]))
        found[style is plain] = [rank1(images, ids, cams, others_only) for others_only in (False, True)]
    assert found[False][0] <= 0.1 and found[False][1] <= 0.45
    # With one light and one background for all, colours do tell people apart: the style is what is hard.
    assert min(found[True]) >= 0.8


def test_domains_differ_in_light_tone_and_sharpness(small):
    root, _ = small
    light, warmth, detail = {}, {}, {}
    for name in DOMAINS:
        images = [pixels(Image.open(p)) for p in sorted((root / name / "images").iterdir())]
        light[name] = np.mean(images)
        red, _, blue = np.mean(images, axis=(0, 1, 2))
        warmth[name] = np.log(red / blue)
        detail[name] = np.mean([np.abs(np.diff(i, axis=0)).mean() / i.std() for i in images])
    assert light["night"] < 0.6 * light["station"] < 0.6 * light["mall"]
    assert warmth["station"] < warmth["mall"] and warmth["harbour"] < warmth["night"]
    assert detail["harbour"] < 0.7 * detail["campus"]


@pytest.mark.parametrize("name", DOMAINS)
def test_mishaps_follow_the_domain(name):
    domain = DOMAINS[name]
    rng = np.random.default_rng(0)
    camera = sample_camera(domain, rng)
    views = [sample_view(domain, camera, rng) for _ in range(1500)]
    for share, seen in (
        (domain.misaligned, [v.misalignment != "none" for v in views]),
        (domain.misaligned / 2, [v.misalignment == "position" for v in views]),
        (domain.occluded, [v.occluder is not None for v in views]),
    ):
        assert abs(np.mean(seen) - share) < 4 * np.sqrt(share * (1 - share) / len(views))
    assert {v.occluder for v in views} == {None, *domain.occluders}
    for view in views:
        dx, dy = np.abs(view.shift)
        usual = max(dx, dy) <= 0.04 and abs(view.fill / camera.fill - 1) <= 0.04 + 1e-9
        assert usual == (view.misalignment == "none")


def scene(name: str = "campus", **changes):
    domain = replace(DOMAINS[name], noise=0.0, blur=0.0)
    camera = sample_camera(domain, np.random.default_rng(1))
    view = sample_view(domain, camera, np.random.default_rng(2))
    aligned = {"misalignment": "none", "occluder": None, "shift": (0.0, 0.0), "fill": 0.85}
    view = replace(view, **(aligned | {"occluder_side": 1, "occluder_size": 0.5} | changes))
    return pixels(render(domain, sample_identity(np.random.default_rng(3)), camera, view))


@pytest.mark.parametrize(
    ("occluder", "rows", "columns"),
    [("pole", slice(None), slice(20, 50)), ("car", slice(64, None), slice(None)),
     ("person", slice(None), slice(20, None))],
)  # fmt: skip
def test_occluders_cover_their_part(occluder, rows, columns):
    changed = np.abs(scene() - scene(occluder=occluder)).max(-1) > 0
    assert changed.mean() > 0.08
    outside = changed.copy()
    outside[rows, columns] = False
    assert not outside.any()
    mirrored = np.abs(scene() - scene(occluder=occluder, occluder_side=-1)).max(-1) > 0
    assert np.nonzero(mirrored)[1].mean() < np.nonzero(changed)[1].mean()


def test_occluders_vary_with_the_view():
    assert not np.array_equal(scene(occluder="person", seed=1), scene(occluder="person", seed=2))


def test_domains_hold_different_people(tmp_path, monkeypatch):
    people = []
    monkeypatch.setattr(writer, "sample_identity", lambda rng: people.append(sample_identity(rng)) or people[-1])
    synthesize(tmp_path, ["campus", "mall"], identities=3, cameras=1, images_per_camera=1, test_fraction=0.0)
    assert len(people) == len(set(people)) == 6


def test_body_lies_where_the_view_says():
    def centre(shift):
        body = np.abs(scene(shift=shift) - scene(shift=(5.0, 0.0))).max(-1) > 8
        y, x = np.nonzero(body)
        return np.array([x.mean(), y.mean()])

    right, down = centre((0.2, 0.0)) - centre((0.0, 0.0)), centre((0.0, 0.0)) - centre((0.0, -0.1))
    np.testing.assert_allclose(right, (0.2 * 64, 0), atol=2.0)
    np.testing.assert_allclose(down, (0, 0.1 * 128), atol=2.0)


PLAIN = {
    "width": 1.0, "leg": 0.48, "skin": (236, 196, 168), "hair": (28, 24, 24), "long_hair": False, "hat": None,
    "upper": (176, 44, 44), "accent": (228, 228, 224), "pattern": "plain", "long_sleeves": True, "coat": 0.0,
    "lower": (52, 66, 104), "lower_kind": "trousers", "lower_pattern": "plain", "bag": "none",
    "bag_color": (160, 200, 48), "shoes": (34, 32, 32),
}  # fmt: skip


def drawn(facing="front", **traits) -> np.ndarray:
    who = replace(sample_identity(np.random.default_rng(0)), **PLAIN)
    canvas = Image.new("RGB", (64, 128), (90, 140, 90))
    draw_person(canvas, replace(who, **traits), Pose(facing, 0.7), x=32, top=8, height=112)
    return pixels(canvas)


@pytest.mark.parametrize(
    "traits",
    [{"pattern": p} for p in ("hoops", "stripes", "checks", "logo", "yoke")]
    + [{"lower_pattern": p} for p in ("seam", "bands")]
    + [{"lower_kind": k} for k in ("shorts", "skirt")]
    + [{"bag": b} for b in ("backpack", "handbag", "satchel")]
    + [{"long_sleeves": False}, {"coat": 0.13}, {"hat": (36, 34, 34)}, {"long_hair": True}, {"width": 1.3},
       {"leg": 0.54}, {"skin": (96, 66, 52)}, {"hair": (196, 160, 98)}, {"shoes": (222, 222, 220)}],
    ids=str,
)  # fmt: skip
def test_every_trait_can_be_seen(traits):
    assert (np.abs(drawn() - drawn(**traits)).max(-1) > 8).sum() >= 20


def test_facing_hides_and_shows():
    assert np.array_equal(drawn("back", pattern="logo"), drawn("back"))
    bag = (160, 200, 48)
    seen = {f: (drawn(f, bag="backpack") == bag).all(-1).sum() for f in ("front", "back", "left", "right")}
    assert seen["back"] > seen["left"] > seen["front"] > 0
    hand = {f: np.nonzero((drawn(f, bag="handbag") == bag).all(-1))[1].mean() for f in ("front", "back")}
    assert hand["front"] < 32 < hand["back"]


def test_pattern_periods_show_on_the_cloth():
    hoops, stripes = drawn(pattern="hoops", period=0.08), drawn(pattern="stripes", period=0.08)
    column, row = hoops[30:58, 32, 1], stripes[42, 24:40, 1]
    assert np.ptp(column) > 150 and np.ptp(hoops[42, 26:38, 1]) < 20
    assert np.ptp(row) > 150 and np.ptp(stripes[30:58, 32, 1]) < 20
    # 0.08 of 112 pixels: from one light edge to the next.
    edges = np.flatnonzero(np.diff((column > 136).astype(int)) == 1)
    assert np.all(np.abs(np.diff(edges) - 0.08 * 112) <= 1) and len(edges) >= 2


def test_people_share_colours():
    people = [sample_identity(np.random.default_rng((5, k))) for k in range(200)]
    for garment in ("upper", "lower"):
        kinds: list[np.ndarray] = []
        for colour in (np.array(getattr(who, garment)) for who in people):
            if not any(np.abs(colour - kind).max() <= 20 for kind in kinds):
                kinds.append(colour)
        assert 3 <= len(kinds) <= 8
    assert len(set(people)) == 200


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"domains": ["campus", "moon"]}, "moon.*campus, station"),
        ({"domains": []}, "domains"),
        ({"domains": "campus"}, "domains"),
        ({"domains": ["campus", "campus"]}, "once"),
        ({"identities": 0}, "identities is 0"),
        ({"cameras": 1}, "cameras is 1"),
        ({"images_per_camera": 1}, "images_per_camera is 1"),
        ({"image_size": (16, 16)}, "image_size"),
        ({"seed": -1}, "seed is -1"),
        ({"test_fraction": 1.5}, "test_fraction is 1.5"),
    ],
)
def test_bad_arguments_write_nothing(changes, words, tmp_path):
    with pytest.raises(DanFastError, match=words):
        synthesize(tmp_path / "out", **({"domains": ["campus"], "identities": 4} | changes))
    assert not (tmp_path / "out").exists()


def test_one_camera_will_do_without_test_identities_and_images_of_any_size(tmp_path):
    [path] = synthesize(tmp_path, ["mall"], 2, cameras=1, images_per_camera=1, test_fraction=0.0, image_size=(96, 40))
    assert [row["split"] for row in manifest(path)] == ["train", "train"]
    with Image.open(path.parent / manifest(path)[0]["path"]) as image:
        assert image.size == (40, 96)


@pytest.mark.parametrize("foreign", ["notes.txt", "campus/photo.png", "night/images/me.jpg"])
def test_refuses_a_folder_of_something_else(foreign, tmp_path):
    file = tmp_path / foreign
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"mine")
    with pytest.raises(DanFastError, match=foreign.split("/")[0]):
        synthesize(tmp_path, ["campus"], identities=2)
    assert contents(tmp_path) == {foreign: b"mine"}


def test_refuses_a_file_as_root(tmp_path):
    (tmp_path / "file").write_text("mine")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DanFastError, match="file"):
            synthesize(root, ["campus"], identities=2)
    assert (tmp_path / "file").read_text() == "mine"


def stop_halfway(done: int, total: int) -> None:
    if done == total // 2:
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_trace(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "a" / "b", ["campus"], identities=2, progress=stop_halfway)
    assert list(tmp_path.iterdir()) == []
    synthesize(tmp_path, ["campus"], identities=2)
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path, ["campus"], identities=2, seed=1, progress=stop_halfway)
    assert contents(tmp_path) == before


def test_a_later_run_replaces_its_own_domains_and_keeps_the_others(tmp_path):
    synthesize(tmp_path, ["campus", "night"], identities=3)
    night = contents(tmp_path / "night")
    # As a killed run leaves them.
    (tmp_path / ".partial" / "campus").mkdir(parents=True)
    for name in (".lock", ".lock.holder", "..lock.holder.0a.part"):
        (tmp_path / name).touch()
    steps = []
    synthesize(tmp_path, ["campus"], identities=2, seed=1, progress=lambda *step: steps.append(step))
    assert steps == [(k, 16) for k in range(1, 17)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["campus", "night"]
    assert len(contents(tmp_path / "campus")) == 17 and contents(tmp_path / "night") == night


def test_a_second_process_is_told_who_is_at_work(tmp_path):
    synthesize(tmp_path, ["campus"], identities=2)
    before = contents(tmp_path)

    def start_another(done: int, total: int) -> None:
        with pytest.raises(DanFastError, match=f"{tmp_path} is in use by process {os.getpid()} on .*: wait for it"):
            synthesize(tmp_path, ["campus"], identities=1)

    synthesize(tmp_path, ["campus"], identities=2, progress=start_another)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("owner", "name", "call"), [(Path, "rename", 2), (Image.Image, "save", 10)])
def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_domain(tmp_path, monkeypatch, owner, name, call):
    """When the new domain takes the earlier one's place, or while its images are written."""
    synthesize(tmp_path, ["campus"], identities=2)
    before, right, calls = contents(tmp_path), getattr(owner, name), []

    def until_full(self, *arguments, **options):
        calls.append(self)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return right(self, *arguments, **options)

    monkeypatch.setattr(owner, name, until_full)
    with pytest.raises(DanFastError, match=f"cannot write synthetic images to {tmp_path} .No space left on device"):
        synthesize(tmp_path, ["campus"], identities=2, seed=1)
    assert contents(tmp_path) == before
