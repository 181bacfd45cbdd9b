"""Pictures and pages of the report: what they show, and that they are written whole."""

import re

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from dan_fast.core.errors import DanFastError
from dan_fast.core.preprocessing import IMAGENET, MEAN, Preprocessing
from dan_fast.evaluation.features import Features
from dan_fast.reporting import curves, ranked
from dan_fast.reporting.canvas import RIGHT, WRONG
from dan_fast.reporting.curves import plot_curves, read_scalars
from dan_fast.reporting.heatmaps import _prepare, attention_overlays, plot_attention
from dan_fast.reporting.html import Figure, Table, write_report
from dan_fast.reporting.ranked import plot_ranked_lists, ranked_list
from dan_fast.training.scalars import Scalars


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def count_colour(pixels, colour):
    return int((np.abs(pixels / 255 - np.array(to_rgb(colour))) < 0.01).all(axis=2).sum())


def log(run_dir, steps, offset, tags=("train/loss/total",), wall_time=0.0):
    with SummaryWriter(run_dir / "tensorboard", filename_suffix=f".{offset}") as writer:
        for step in steps:
            for tag in tags:
                writer.add_scalar(tag, step + offset, step, walltime=wall_time + step)


def test_replayed_steps_are_read_once(tmp_path):
    log(tmp_path, range(0, 12), 0.25)
    # Back to step 5 and killed at 8; then back to 7. What the first run logged beyond never happened.
    log(tmp_path, range(5, 9), 0.5, wall_time=100)
    log(tmp_path, range(7, 10), 0.75, wall_time=200)
    steps, values = read_scalars(tmp_path)["train/loss/total"]
    assert steps.tolist() == list(range(10))
    expected = [0.25, 1.25, 2.25, 3.25, 4.25, 5.5, 6.5, 7.75, 8.75, 9.75]
    assert values.tolist() == expected


def test_what_is_logged_rarely_goes_back_with_the_rest(tmp_path):
    """A run that went on after step 30 logs a tag at 60 alone, which an earlier part logged at 40 and 50."""
    for done, steps, rare in ((0, (10, 20, 30, 40, 50), (20, 40, 50)), (30, (40, 50, 60), (60,))):
        scalars = Scalars(tmp_path / "tensorboard", done)
        for step in steps:
            scalars.add("train/loss/total", float(done + step))
            if step in rare:
                scalars.add("pseudo/accuracy", 0.5)
            scalars.flush(step)
        scalars.close()
    found = {tag: dict(zip(steps, values, strict=True)) for tag, (steps, values) in read_scalars(tmp_path).items()}
    assert found == {
        "train/loss/total": {10: 10.0, 20: 20.0, 30: 30.0, 40: 70.0, 50: 80.0, 60: 90.0},
        "pseudo/accuracy": {20: 0.5, 60: 0.5},
    }


def test_long_runs_are_read_whole(tmp_path):
    log(tmp_path, range(10_100), 0.0)
    assert read_scalars(tmp_path)["train/loss/total"][0].tolist() == list(range(10_100))


@pytest.mark.slow
def test_panels_are_grouped(tmp_path, monkeypatch):
    panels = {
        "Losses on S": ["train/loss/total", "train/loss/adversary", "train/loss/labeled_embedding"],
        "Accuracy of the two branches": ["train/accuracy/attention"],
        "Logit norms on S": ["train/logit_norm/adversary", "train/logit_norm/attention"],
        "Competition: share of iterations": ["competition/backbone_frozen", "competition/ties"],
        "Spread of A_S: max - min": ["attention/spatial_spread"],
        "Memory gates": ["memory/beta", "memory/sigma_alpha"],
        "Memory slots in use": ["memory/slots_labeled", "memory/slots_unlabeled"],
        "Samples that leave M′ for each written": ["memory/cleared_a_sample"],
        "Pseudo labels: shares": ["pseudo/fed_back_right", "pseudo/purity"],
        "Evaluation: far": ["eval/far/R1", "eval/far/mAP"],
        "Evaluation: near": ["eval/near/mAP"],
    }
    log(tmp_path, range(3), 0.0, sorted((tag for tags in panels.values() for tag in tags), reverse=True))
    drawn = {}
    draw = curves._draw_panel

    def note(axes, panel, lines):
        draw(axes, panel, lines)
        drawn[axes.get_title(loc="left")] = [line[0] for line in lines]

    monkeypatch.setattr(curves, "_draw_panel", note)
    path = plot_curves(tmp_path, tmp_path / "pictures" / "curves.png")
    assert [*drawn.items()] == [*panels.items()]
    pixels = pixels_of(path)
    assert min(pixels.shape[:2]) > 400
    assert count_colour(pixels, "#0072B2") > 100
    assert list(path.parent.iterdir()) == [path]


def test_running_mean():
    values = np.arange(120.0)
    values[50] = np.nan
    smooth = curves._running_mean(values)
    assert smooth[0] == pytest.approx(1)  # of 0, 1, 2
    assert smooth[30] == pytest.approx(30)
    assert smooth[50] == pytest.approx(50)
    assert smooth[119] == pytest.approx(118)
    assert curves._running_mean(values)[51] == pytest.approx(np.mean([49, 51, 52, 53]))


def test_curves_need_a_run(tmp_path):
    with pytest.raises(DanFastError, match="tensorboard does not exist"):
        plot_curves(tmp_path, tmp_path / "curves.png")
    SummaryWriter(tmp_path / "tensorboard").close()
    with pytest.raises(DanFastError, match="holds no scalar yet"):
        plot_curves(tmp_path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def make_features(folder, rows):
    """Images of one grey each, at an angle each: rows of (angle, pid, camid)."""
    paths = []
    for place, _ in enumerate(rows):
        paths.append(folder / f"{len(rows)}_{place}.png")
        Image.new("RGB", (12, 20), (10 * place,) * 3).save(paths[-1])
    angles = torch.tensor([row[0] for row in rows])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    pids, camids = torch.tensor([row[1:] for row in rows]).unbind(1)
    return Features(features, pids, camids, tuple(paths))


@pytest.fixture
def query_and_gallery(tmp_path):
    query = make_features(tmp_path, [(0.0, 1, 1), (0.0, 5, 1), (1.0, 2, 1)])
    gallery = make_features(tmp_path, [(0.3, 2, 2), (0.1, 1, 1), (0.2, 1, 2), (0.4, 0, 1), (0.2, 3, 1), (0.9, 5, 1)])
    return query, gallery


def test_ranked_list_leaves_junk_out_and_keeps_ties_in_order(query_and_gallery):
    query, gallery = query_and_gallery
    assert ranked_list(query, gallery, 0).tolist() == [2, 4, 0, 3, 5]
    assert ranked_list(query, gallery, 2).tolist() == [5, 3, 0, 2, 4, 1]


def test_ranked_lists_mark_right_and_wrong(query_and_gallery, tmp_path, monkeypatch):
    query, gallery = query_and_gallery
    shown = []
    show = ranked._show_found

    def note(axes, path, right):
        shown.append((gallery.paths.index(path), right))
        show(axes, path, right)

    monkeypatch.setattr(ranked, "_show_found", note)
    pixels = pixels_of(plot_ranked_lists(query, gallery, tmp_path / "ranked.png", top=6))
    # The query of person 5 has no match by another camera and is not shown.
    first = [(2, True), (4, False), (0, False), (3, False), (5, False)]
    assert shown == [*first, (5, False), (3, False), (0, True), (2, False), (4, False), (1, False)]
    right, wrong = count_colour(pixels, RIGHT), count_colour(pixels, WRONG)
    assert right > 500
    assert 3 < wrong / right < 6
    shown.clear()
    plot_ranked_lists(query, gallery, tmp_path / "ranked.png", queries=1, top=2)
    assert shown == first[:2]


def test_ranked_lists_name_what_does_not_fit(query_and_gallery, tmp_path):
    query, gallery = query_and_gallery
    out = tmp_path / "ranked.png"
    with pytest.raises(DanFastError, match="No query has a match"):
        plot_ranked_lists(query.select(torch.tensor([1])), gallery, out)
    with pytest.raises(ValueError, match="top 0"):
        plot_ranked_lists(query, gallery, out, top=0)
    with pytest.raises(ValueError, match="gallery_features is 1 wide"):
        plot_ranked_lists(query, gallery._replace(features=gallery.features[:, :1]), out)
    gallery.paths[2].unlink()
    with pytest.raises(DanFastError, match=gallery.paths[2].name):
        plot_ranked_lists(query, gallery, out)
    assert not out.exists()


@pytest.mark.parametrize("wanted", [IMAGENET, Preprocessing((0.1, 0.5, 0.7), (0.3, 0.5, 0.9))], ids=["usual", "other"])
def test_images_are_shown_as_they_were(wanted):
    colour = torch.tensor([0.2, 0.5, 0.8])
    normalised = (colour - torch.tensor(wanted.mean)) / torch.tensor(wanted.std)
    pixels, _ = _prepare(normalised.view(1, 3, 1, 1).expand(1, 3, 32, 16), torch.rand(1, 8), (4, 2), wanted)
    np.testing.assert_allclose(pixels[0, 5, 5], colour, atol=1e-6)


def test_attention_is_scaled_and_lies_the_right_way_up():
    attention = torch.zeros(2, 4, 2)
    attention[0, 0, 1] = 0.01
    attention[1, 3, 0] = 7.0
    images = torch.zeros(2, 3, 32, 16)
    _, heat = _prepare(images, attention.flatten(1), (4, 2), IMAGENET)
    assert heat.shape == (2, 32, 16)
    np.testing.assert_allclose([heat.min((1, 2)), heat.max((1, 2))], [[0, 0], [1, 1]], atol=1e-6)
    assert heat[0, 2, 13] > 0.9 > 0.3 > heat[0, 2, 2]
    assert heat[1, 29, 2] > 0.9 > 0.3 > heat[1, 2, 2]
    overlay = attention_overlays(images, attention.flatten(1), (4, 2))[1][0]
    assert 255 > overlay[2, 15, 0] > overlay[30, 0, 0]  # red where it looks


@pytest.mark.parametrize("count", [1, 6])
def test_attention_picture(tmp_path, count):
    generator = torch.Generator().manual_seed(0)
    images, attention = torch.zeros(count, 3, 32, 16), torch.rand(count, 8, generator=generator)
    path = plot_attention(images, attention, (4, 2), tmp_path / "attention.png")
    pixels = pixels_of(path)
    assert pixels.reshape(-1, 3).std(axis=0).min() > 10
    # The image of zeros is the mean colour; each of the images is shown plain once.
    mean_colour = np.abs(pixels / 255.0 - np.array(MEAN)).max(axis=2) < 0.01
    assert mean_colour.sum() > count * 100 * 200


def test_attention_shapes(tmp_path):
    images, out = torch.zeros(2, 3, 32, 16), tmp_path / "attention.png"
    with pytest.raises(ValueError, match=r"spatial_attention has shape \(2, 8\).*must be \(2, 6\)"):
        plot_attention(images, torch.rand(2, 8), (3, 2), out)
    with pytest.raises(ValueError, match=r"images has shape \(0, 3, 32, 16\)"):
        plot_attention(images[:0], torch.rand(0, 8), (4, 2), out)
    with pytest.raises(ValueError, match="spatial_attention holds NaN"):
        plot_attention(images, torch.full((2, 8), np.nan), (4, 2), out)
    assert not out.exists()


def test_report_holds_everything_escaped(tmp_path):
    picture = tmp_path / "pictures" / "a curve #1.png"
    picture.parent.mkdir()
    Image.new("RGB", (4, 4)).save(picture)
    table = Table("Unseen <domain>", ["network", "mAP %"], [["<script>", 61.5], ["a & b", "3.0 ± 0.1"]], "n < 5")
    figure = Figure("Curves", picture, 'Loss "total"', 'A "b"')
    page = write_report(tmp_path / "report", "Run <1>", "First & foremost.\n\nThen.", [table], [figure])
    assert page == tmp_path / "report" / "index.html"
    text = page.read_text(encoding="utf-8")
    assert "<title>Run &lt;1&gt;</title>" in text
    assert "<p>First &amp; foremost.</p>\n<p>Then.</p>" in text
    # Words stand to the left, numbers to the right.
    assert '<th scope="col" class="words">network</th><th scope="col">mAP %</th>' in text
    assert '<tr><th scope="row" class="words">&lt;script&gt;</th><td>61.5</td></tr>' in text
    assert '<tr><th scope="row" class="words">a &amp; b</th><td>3.0 ± 0.1</td></tr>' in text
    assert "n &lt; 5" in text
    assert "<script" not in text
    assert re.search(
        r'<img src="\.\./pictures/a%20curve%20%231\.png" alt="A &#34;b&#34;"></a>\n<figcaption>Loss &#34;total&#34;<',
        text,
    )
    assert "http" not in text
    write_report(tmp_path / "report", "Again", "Shorter.")
    assert "<table>" not in page.read_text(encoding="utf-8")
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]


def test_folded_tables_stand_below_the_figures(tmp_path):
    picture = tmp_path / "curve.png"
    Image.new("RGB", (4, 4)).save(picture)
    tables = [Table("Later", ["n"], [[1]], folded=True), Table("Now", ["n"], [["2.0 †"]])]
    page = write_report(tmp_path, "Run", "", tables, [Figure("Curves", picture)])
    text = page.read_text(encoding="utf-8")
    assert text.index("<h2>Now</h2>") < text.index("<h2>Curves</h2>") < text.index("<summary>Later</summary>")
    assert '<th scope="row">2.0 †</th>' in text


def test_attention_states_the_range_that_its_colours_span(tmp_path, monkeypatch):
    titles = []
    real = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **more: titles.append(text) or real(self, text, **more))
    attention = torch.tensor([[0.25, 0.75, 0.5, 0.5], [0.49, 0.49 + 2e-5, 0.49, 0.49]], dtype=torch.float64)
    plot_attention(torch.zeros(2, 3, 8, 8), attention, (2, 2), tmp_path / "attention.png")
    assert titles == ["0.5000 ± 2e-01", "0.4900 ± 1e-05"]


def test_nearly_flat_attention_is_enlarged_without_stripes():
    attention = 0.49 + 1e-6 * torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    _, heat = _prepare(torch.zeros(1, 3, 96, 48), attention, (3, 2), IMAGENET)
    # A smooth map changes little from pixel to pixel and the change keeps its sign almost everywhere.
    steps = np.diff(heat[0], axis=1)
    assert (np.sign(steps[:, 1:]) != np.sign(steps[:, :-1])).mean() < 0.1


def test_report_names_what_does_not_fit(tmp_path):
    with pytest.raises(DanFastError, match="missing.png does not exist"):
        write_report(tmp_path, "Run", "", figures=[Figure("Curves", tmp_path / "missing.png")])
    with pytest.raises(ValueError, match="a row of 'Scores' has 1 values, not 2"):
        write_report(tmp_path, "Run", "", [Table("Scores", ["a", "b"], [["x"]])])
    assert not (tmp_path / "index.html").exists()
