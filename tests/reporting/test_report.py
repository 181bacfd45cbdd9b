"""`dan-fast report`: which runs are compared, what stands beside the paper, and what is said of what is missing."""

import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.axes import Axes
from PIL import Image

from dan_fast.cli import main
from dan_fast.core.errors import DanFastError
from dan_fast.core.files import alone
from dan_fast.data.datasets.known import KNOWN
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.reporting import memories, side_by_side
from dan_fast.reporting.groups import Target, models, swept_settings, target_of, unlabeled_shares
from dan_fast.reporting.html import Table
from dan_fast.reporting.memories import Slots, layout, neighbours_agree, plot_memories, sample, stored_slots
from dan_fast.reporting.report import report
from dan_fast.reporting.result_tables import cameras_of, paper_tables, paper_target, result_tables
from dan_fast.reporting.runs import Run, read_runs
from dan_fast.reporting.side_by_side import describe, evaluated_epochs
from dan_fast.reporting.watched import watched_table
from dan_fast.training import Trainer
from dan_fast.training.build import trained_network
from dan_fast.training.reported import CHOSEN, SEEN
from tests.support.fake_runs import fake_run, with_results
from tests.support.figures import evaluation
from tests.support.training_runs import config
from tests.support.untrained import untrained_checkpoint

ON_STREET = "fixed query and gallery, 30 queries, 40 gallery images"


def text_of(page: Path) -> str:
    text = re.sub(r"<style>.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"</t[dh]>", " | ", re.sub(r"</tr>", "\n", text))
    return unescape(re.sub(r"<[^>]+>", "", text))


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    slots = {"labeled_slots": 12, "unlabeled_slots": 9}
    target = {"targets": str(images / "mall")}
    Trainer(config(images, out, data=target, memory=slots, run={"evaluate_every": 1})).fit()
    return out


@pytest.mark.slow
def test_a_trained_run_gives_a_full_page(trained, tmp_path, capsys):
    assert main(["report", str(trained), "--out", str(tmp_path / "page"), "--images", "3"]) == 0
    page = tmp_path / "page" / "index.html"
    assert capsys.readouterr().out.strip() == str(page)
    pictures = {path.name for path in (tmp_path / "page").glob("*.png")}
    assert pictures == {"gates.png", "01_curves.png", "01_attention.png", "01_memories.png"}
    for name in pictures:
        with Image.open(tmp_path / "page" / name) as image:
            assert image.format == "PNG" and min(image.size) > 100
    text = text_of(page)
    assert "campus + mall (unlabelled)" in text and "Results on mall" in text
    assert "of tiny at epoch 2 of 2 over 3 images of mall" in text
    assert "at epoch 2 of 2: M: 12 slots" in text
    assert "dan-fast sweep --grid fig7" in text
    assert not re.search(r"tiny \| (curves|gates|heat maps|t-SNE|results)", text)


@pytest.mark.slow
def test_pictures_of_ones_own_stay_and_those_of_another_report_do_not(trained, tmp_path):
    """Nor what a killed one left."""
    (tmp_path / ".01_curves.png.0a.part").touch()
    in_use = f"{tmp_path} is in use by process {os.getpid()} on"
    with alone(tmp_path / ".lock"), pytest.raises(DanFastError, match=in_use):
        report([trained], out=tmp_path, images=0)
    assert [path.name for path in tmp_path.iterdir()] == [".01_curves.png.0a.part"]
    own = [tmp_path / name for name in ("models1.png", "12_curves.png", "index.html")]
    for path in own:
        path.write_bytes(b"mine")
    with pytest.raises(DanFastError, match="index.html is not a page of dan_fast: choose another folder"):
        report([trained], out=tmp_path, images=0)
    assert set(tmp_path.glob("[!.]*")) == set(own)
    own.pop().unlink()
    report([trained], out=tmp_path, images=2)
    assert [path.read_bytes() for path in own] == [b"mine"] * 2
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    # Persons who are left out of a later page do not stay beside it; what is not called as the report's does.
    for name in ("02_memories.png", "over_loss.adversary.png", "mine.png"):
        (tmp_path / name).write_bytes((tmp_path / "01_attention.png").read_bytes())
    text = text_of(report([trained], out=tmp_path, images=0))
    assert "tiny | heat maps, Fig. 9 | Images of persons were left out by --images 0." in text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"gates.png", "01_curves.png", "01_memories.png", "mine.png"}


def test_names_that_are_no_utf_8_are_shown_with_signs_of_replacement(tmp_path):
    odd = os.fsdecode(b"night\xff")
    run = fake_run(tmp_path / odd, results=[(odd, 0.5, 0.4)])
    other = fake_run(tmp_path / "other", results=[(odd, 0.3, 0.2)], loss={"adversary": 0.1})
    page = report([run, other], out=tmp_path / odd / "page", images=0).read_text()
    assert "night\ufffd" in page


def test_missing_pieces_are_said_in_the_page(trained, images, tmp_path):
    bare = fake_run(tmp_path / "bare", results=(), data={"unlabeled": []})
    (bare / "results.json").write_text("{]")
    fake_run(tmp_path / "plain", scalars={"train/loss/total": (2.0, 1.0)})
    no_attention = fake_run(tmp_path / "none", model={"attention": "none", "adversary": False})
    (no_attention / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes())
    older = fake_run(tmp_path / "older", data={"targets": [str(images / "mall")]})
    state = torch.load(trained / "checkpoint.pt")
    del state["config"]["data"]["image_size"]
    torch.save(state, older / "checkpoint.pt")
    odd = ({"iterations": 3, "epochs": 0}, {"labeled": None}, {"labeled": [5]}, {"targets": [None]})
    for number, wrong in enumerate(odd):
        with_results(fake_run(tmp_path / f"odd{number}", data={"labeled": None}), {"mAP": None}, **wrong)
    with_results(fake_run(tmp_path / "nulls"), **dict.fromkeys(("ranks", "started_from", "skipped")))
    damaged = fake_run(tmp_path / "damaged")
    (damaged / "checkpoint.pt").write_bytes(b"PK")
    text = text_of(report([tmp_path], tmp_path / "page", images=2))
    assert "bare | results | " in text and "results.json holds no evaluations" in text
    assert "bare | results | Not evaluated: let it train to its end" in text
    assert re.search(r"bare \| gates, Fig. 5\(b\) \| .*tensorboard holds no such scalars", text)
    assert re.search(r"plain \| gates, Fig. 5\(b\) \| It was trained without the memory", text)
    assert re.search(r"bare \| heat maps and t-SNE, Figs. 9 and 10 \| .*checkpoint.pt does not exist", text)
    assert "none | heat maps, Fig. 9 | Its network has no attention." in text
    assert re.search(r"older \| heat maps, Fig. 9 \| .*checkpoint.pt does not fit this version of dan_fast", text)
    assert re.search(r"damaged \| heat maps and t-SNE.*truncated or no checkpoint", text)
    assert "damaged | curves | " in text
    assert text.count("holds no evaluations of this version") == 5


@pytest.mark.slow
def test_heat_maps_need_images_that_are_there(trained, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "moved", ignore=shutil.ignore_patterns("tensorboard"))
    settings = yaml.safe_load((moved / "config.yaml").read_text())
    settings["data"].update(targets=["gone/street"], labeled=["gone/campus"])
    (moved / "config.yaml").write_text(yaml.safe_dump(settings))
    text = text_of(report([moved], tmp_path / "page"))
    assert re.search(r"moved \| heat maps, Fig. 9 \| None of its datasets can be read: .*gone", text)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path / "nowhere", "is no folder: name folders of trainings"),
        (lambda path: path, "holds no training: name folders with a config.yaml"),
        (lambda path: fake_yaml(path, "[1, 2]"), "is no configuration of a training"),
        (lambda path: fake_yaml(path, "a: [}"), "is no configuration of a training"),
    ],
)
def test_a_wrong_path_is_one_sentence(make, sentence, tmp_path, capsys):
    assert main(["report", str(make(tmp_path)), "--out", str(tmp_path / "page")]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def fake_yaml(path: Path, text: str) -> Path:
    (path / "config.yaml").write_text(text)
    return path


def test_runs_have_names_of_their_own(tmp_path):
    folders = [fake_run(tmp_path / "a" / "run"), fake_run(tmp_path / "b" / "run")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]
    assert [run.name for run in read_runs([folders[0]])] == ["a/run"]
    assert [run.name for run in read_runs([tmp_path / "a", folders[0]])] == ["a/run"]


def test_baselines_and_later_evaluations_are_read(tmp_path):
    folder = fake_run(tmp_path / "r")
    more = [{"features": name, **evaluation("night", 0.3, 0.2, 10)} for name in ("trained", "untrained", "chance")]
    (folder / "night.json").write_text(json.dumps(more))
    (folder / "again.json").write_text(json.dumps([{"features": "trained", **evaluation("street", 0.5, 0.4)}]))
    (folder / "other.json").write_text('{"something": "else"}')
    [run] = read_runs([folder])
    assert [each.dataset for each in run.results] == ["street", "night"]
    assert [name for name, _ in run.baselines] == ["untrained", "chance"]
    assert run.complaints == ()
    night = result_tables([run])[1]
    assert [row[0] for row in night.rows] == ["r (DAML3, B+NL-CBAM+AAN)", "untrained, for r", "chance, for r"]
    assert [row[1] for row in night.rows[1:]] == ["nothing", "nothing"]
    [first] = read_runs([with_results(folder, started_from=["of day.pt, trained on mall"])])
    assert [row[1] for row in result_tables([first])[1].rows[1:]] == ["of day.pt, trained on mall", "nothing"]
    assert night.rows[0][2:] == ["10 random splits", 10, "30.0 ± 1.0", "35.0 ± 1.0", "35.0 ± 1.0", "20.0 ± 1.0",
                                 "5.0 ± 1.0"]  # fmt: skip


def test_evaluations_of_weights_that_are_gone_are_left_out_and_named(tmp_path):
    folder = fake_run(tmp_path / "r")
    untrained_checkpoint(folder / "chosen.pt", run={"seed": 3})
    untrained_checkpoint(folder / "checkpoint.pt", run={"seed": 4})
    weights = [weights_hash(trained_network(folder / name)[0]) for name in ("chosen.pt", "checkpoint.pt")]
    for number, of in enumerate([*weights, "0" * 32]):
        content = [{"features": "trained", "weights": of, **evaluation(f"night{number}", 0.3, 0.2)}]
        (folder / f"night{number}.json").write_text(json.dumps(content))
    [run] = read_runs([folder])
    assert [each.dataset for each in run.results] == ["street", "night0", "night1"]
    assert run.complaints == (f"{folder}/night2.json is of other weights than those of this run: evaluate it again.",)
    for name in ("chosen.pt", "checkpoint.pt"):
        (folder / name).write_bytes(b"cut short")  # whose they are cannot be told then
    assert len(read_runs([folder])[0].results) == 4


def test_a_run_stands_beside_the_table_it_belongs_to(tmp_path):
    data = {"labeled": ["Market-1501"], "unlabeled": ["MSMT17"]}
    folders = [
        fake_run(tmp_path / "dg", [("DukeMTMC-reID", 0.5, 0.4)], data=data),
        fake_run(tmp_path / "uda", [("dukemtmcreid", 0.6, 0.5)], data={**data, "unlabeled": ["dukemtmc-reid"]}),
        fake_run(tmp_path / "supervised", [("DukeMTMC-reID", 0.8, 0.7)], data={"labeled": ["dukemtmc-reid"]}),
        fake_run(tmp_path / "small", [("VIPeR", 0.4, 0.45, 10)], meta={"procedure": "daml1"}),
    ]
    tables = {table.title.split(":")[0]: table for table in paper_tables(read_runs(folders))}
    own = {title: [row for row in table.rows if not row[0].startswith("paper")] for title, table in tables.items()}
    assert {title: [row[0].split()[0] for row in rows] for title, rows in own.items() if rows} == {
        "Table IV, VIPeR": ["small"],
        "Table IX, VIPeR": ["small"],
        "Table V, DukeMTMC-reID": ["dg"],
        "Table VI, DukeMTMC-reID": ["uda"],
    }
    assert all(table.folded == (not own[title]) for title, table in tables.items())
    assert len(tables) == 12
    viper = tables["Table IV, VIPeR"]
    assert own["Table IV, VIPeR"][0][1:] == ["campus + mall (unlabelled)", "10 random splits", 10, "40.0 ± 1.0",
                                             "45.0 ± 1.0", "45.0 ± 1.0", "45.0 ± 1.0"]  # fmt: skip
    marked = [row for row in viper.rows if any("†" in str(value) for value in row)]
    assert [(row[0], row[-1]) for row in marked] == [
        ("paper: Ours (w/o MSMT17)", "60.4 †"),
        ("paper: Ours (with MSMT17)", "61.6 †"),
    ]
    assert "61.6 is below 65.4" in viper.note and "MSMT17 (unlabelled)" in marked[1][1]


def beside_viper(runs: list[Run]) -> Table:
    """The runs beside the paper's figures of VIPeR in Table IV."""
    return next(each for each in paper_tables(runs) if each.title.startswith("Table IV, VIPeR"))


@pytest.mark.parametrize(
    "change",
    [
        {"metric": "euclidean"},
        {"ap": "trapezoid"},
        {"protocol": "10 random splits; k-reciprocal re-ranking (k1 20, k2 6, lambda 0.3)"},
        {"epoch": f"epoch 3 of 9, {CHOSEN}"},
        {"seen": f"4 {SEEN}"},
        {"skipped": ["a.jpg"], "num_query": 99},
    ],
    ids=lambda change: next(iter(change)),
)
def test_figures_that_are_scored_otherwise_are_not_laid_beside_the_papers_as_equal(tmp_path, change):
    usual = evaluation("VIPeR", 0.4, 0.45, 10) | {"metric": "cosine", "ap": "standard", "precision": "float32"}
    folder = with_results(fake_run(tmp_path / "small", [("VIPeR", 0.4, 0.45, 10)]), usual)
    (folder / "figures.json").write_text(json.dumps([{"features": "trained", **usual, "mAP": 0.3, **change}]))
    [run] = read_runs([folder])
    table = beside_viper([run])
    plain, marked = [row for row in table.rows if not row[0].startswith("paper")]
    assert plain[-1] == "45.0 ± 1.0" and all(cell.endswith("± 1.0 ‡") for cell in marked[4:])
    assert "‡ Not scored as the paper's rows are" in table.note
    assert marked[2] != plain[2], "and the row says what is otherwise"
    usually, otherwise = target_of(run.results[0]), target_of(run.results[1])
    assert otherwise != usually, "nor are the two drawn together"
    assert run.results[1].scoring in otherwise.protocol
    rounded = replace(run.results[0], rounding="TF32 in convolutions")
    assert target_of(rounded) != target_of(run.results[0])
    table = beside_viper(read_runs([fake_run(tmp_path / "old", [("VIPeR", 0.4, 0.45, 10)])]))
    assert "‡" not in table.note and "‡" not in str(table.rows)


def test_the_papers_targets_are_known_by_any_spelling():
    of_the_paper = {
        "VIPeR": ["viper", KNOWN["viper"].title],
        "PRID": ["prid_2011", KNOWN["prid"].title],
        "GRID": ["GRID", KNOWN["grid"].title],
        "i-LIDS": ["i-LIDS", "ilids", KNOWN["ilids"].title],
        "Market1501": ["x/Market-1501-v15.09.15", KNOWN["market1501"].title],
        "DukeMTMC-reID": ["duke", KNOWN["dukemtmc"].title],
    }
    for target, names in of_the_paper.items():
        assert {paper_target(name) for name in names} == {target}
    other = {known.title for known in KNOWN.values()} - {name for names in of_the_paper.values() for name in names}
    for name in ("ilids-vid", "prid450s", "street", "msmt17", "market1501-500k", *other):
        assert paper_target(name) is None


@pytest.mark.parametrize("learnt", ["market1501", "data (1)/market1501", "market1501 (V7)"])
def test_figures_on_cameras_that_were_learnt_from_stand_in_a_table_of_their_own(tmp_path, learnt):
    run = fake_run(tmp_path / "run", [("data (2)/market1501", 0.5, 0.4)])
    runs = read_runs([with_results(run, labeled=[learnt], unlabeled=[])])
    assert all(table.folded for table in paper_tables(runs))
    [table] = result_tables(runs)
    assert table.title == "Results on data (2)/market1501" and len(table.rows) == 1
    assert cameras_of("old (2020)/mall") != cameras_of("old (2020)/campus")


def test_figures_on_cameras_that_first_weights_learnt_from_stand_in_no_table_of_the_paper(tmp_path):
    run = fake_run(tmp_path / "run", [("market1501", 0.5, 0.4), ("viper", 0.5, 0.4, 10)], data={"unlabeled": []})
    before = {"started_from": ["day.pt, trained on market1501"]}
    assert not result_tables(read_runs([with_results(run, **before)]))
    runs = read_runs([with_results(run, {"known_cameras": True}, **before)])
    assert [table.title for table in result_tables(runs)] == ["Results on market1501"]
    assert {table.title.split(", ")[1].split(":")[0] for table in paper_tables(runs) if not table.folded} == {"VIPeR"}


def test_tables_of_the_paper_show_what_the_network_was_before(tmp_path):
    folder = fake_run(tmp_path / "r", [("viper", 0.5, 0.4, 10)], data={"unlabeled": []})
    (folder / "before.json").write_text(json.dumps([{"features": "chance", **evaluation("viper", 0.01, 0.02, 10)}]))
    fake_run(tmp_path / "other", data={"unlabeled": []})
    table = beside_viper(read_runs([tmp_path]))
    assert [row[0] for row in table.rows[-2:]] == ["r (DAML3, B+NL-CBAM+AAN)", "chance, for r"]
    assert table.rows[-1][1] == "nothing" and table.rows[-1][4].startswith("1.0")


def test_a_protocol_names_what_was_trained_on(tmp_path):
    data = {"labeled": [], "unlabeled": [], "protocol": "table6-market-to-duke", "root": "somewhere"}
    folder = fake_run(tmp_path / "uda", [("DukeMTMC-reID", 0.5, 0.4)], data=data)
    [run] = read_runs([folder])
    assert run.sources == "Market-1501 + DukeMTMC-reID (unlabelled)"
    assert [table.title.split(":")[0] for table in paper_tables([run]) if not table.folded] == [
        "Table VI, DukeMTMC-reID"
    ]
    # What the trainer found to be there says more than the protocol's name.
    of_target = {"named_protocol": "table6-market-to-duke", "epoch": "epoch 3 of 9, CHOSEN"}
    [run] = read_runs([with_results(folder, of_target, labeled=["Market (V7)"], unlabeled=[])])
    assert run.sources == "Market (V7)"
    [run] = read_runs([with_results(folder, skipped=7, started_from=["MSMT17"])])
    assert run.sources == "Market (V7) without 7 images that could not be decoded, after MSMT17"
    row = [table for table in paper_tables([run]) if not table.folded][0].rows[-1]
    assert row[2] == "table6-market-to-duke; fixed query and gallery; epoch 3 of 9, CHOSEN"


def test_trainings_with_and_without_unlabelled_images_are_shares(tmp_path):
    shares = {0.0: {"unlabeled": []}, 0.5: {"unlabeled_share": 0.5}, 1.0: {}}
    for share, data in shares.items():
        fake_run(tmp_path / "sets" / str(share), data=data)
    [line] = unlabeled_shares(read_runs([tmp_path / "sets"]))
    assert {share: [run.name for run in runs] for share, runs in line.points.items()} == {
        share: [str(share)] for share in shares
    }
    for number, name in enumerate(("table5-market-to-duke", "table5-market-to-duke-wo-unlabeled")):
        data = {"labeled": [], "unlabeled": [], "protocol": name, "root": str(number)}
        fake_run(tmp_path / "protocols" / name, data=data)
    [line] = unlabeled_shares(read_runs([tmp_path / "protocols"]))
    assert list(line.points) == [0.0, 1.0]


def test_runs_that_differ_in_one_thing_are_compared(tmp_path):
    weights = {0.2: "a", 0.6: "b"}
    for adversary, name in weights.items():
        for embedding in (0.25, 0.5):
            fake_run(tmp_path / f"{name}{embedding}", loss={"adversary": adversary, "embedding": embedding})
    fake_run(tmp_path / "seed", loss={"adversary": 0.2, "embedding": 0.25}, run={"seed": 3})
    fake_run(tmp_path / "long", optimizer={"epochs": 9}, loss={"adversary": 0.7}, memory={"labeled_slots": 3})
    swept = swept_settings(read_runs([tmp_path]))
    assert list(swept) == ["loss.adversary", "loss.embedding"]
    shape = {
        name: [
            (line.label, {value: [run.name for run in runs] for value, runs in line.points.items()}) for line in lines
        ]
        for name, lines in swept.items()
    }
    assert shape["loss.adversary"] == [
        ("loss.embedding 0.25", {0.2: ["a0.25", "seed"], 0.6: ["b0.25"]}),
        ("loss.embedding 0.5", {0.2: ["a0.5"], 0.6: ["b0.5"]}),
    ]
    assert [label for label, _ in shape["loss.embedding"]] == ["loss.adversary 0.2", "loss.adversary 0.6"]


def test_networks_are_named_as_in_fig_6(tmp_path):
    variants = {
        "B": {"attention": "none", "adversary": False},
        "B+SA": {"attention": "spatial", "adversary": False},
        "B+NL": {"attention": "non_local", "adversary": False},
        "B+NL-CBAM": {"adversary": False},
        "B+CBAM+AAN": {"attention": "cbam"},
        "B+NL-CBAM*+AAN": {"reduction": 1},
        "B+NL-CBAM+AAN": {},
        **{f"B+NL-CBAM+AAN, r = {reduction}": {"reduction": reduction} for reduction in (2, 4, 16, 20)},
    }
    for number, model in enumerate(variants.values()):
        fake_run(tmp_path / f"{99 - number}", model=model)
    [line] = models(read_runs([tmp_path]))
    assert list(line.points) == list(variants)


@pytest.fixture
def drawn(monkeypatch):
    """The curves of each panel that is drawn, label -> (x, y); under "legends" the labels of each legend."""
    panels: dict[str, dict[str, tuple[list, list]] | list[list[str]]] = {"legends": []}
    save = side_by_side.save_png

    def note(figure, path):
        for each in figure.legends:
            panels["legends"].append([text.get_text().lstrip("\u200b") for text in each.get_texts()])
        for axes in filter(Axes.get_visible, figure.axes):
            lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
            title = axes.get_title(loc="left").replace("\n", ", ", 1).replace("\n", " ")
            panels[f"{Path(path).stem}: {title}"] = lines
            assert axes.get_xlabel()
        return save(figure, path)

    monkeypatch.setattr(side_by_side, "save_png", note)
    return panels


def test_pictures_show_the_figures_and_captions_say_them(tmp_path, drawn):
    for share, precision in ((0.0, 0.1), (0.5, 0.2), (1.0, 0.4)):
        fake_run(tmp_path / "runs" / f"p{share}", [("street", 0.3, precision)], data={"unlabeled_share": share},
                 scalars={"memory/beta": [0.1, 0.125, 0.5]})  # fmt: skip
    fake_run(tmp_path / "runs" / "cbam", [("street", 0.2, 0.35)], model={"attention": "cbam"})
    fake_run(tmp_path / "runs" / "r1", [("street", 0.6, 0.45)], memory={"labeled_slots": 4000})
    text = text_of(report([tmp_path / "runs"], tmp_path / "page"))
    share = drawn[f"unlabeled_share: street, {ON_STREET}"]
    assert share["mAP"][0] == [0, 50, 100] and share["mAP"][1] == pytest.approx([10, 20, 40])
    assert share["R1"][1] == pytest.approx([30, 30, 30])
    slots = drawn[f"over_memory.labeled_slots: street, {ON_STREET}"]
    assert slots["mAP"][0] == [4000, 9000] and slots["mAP"][1] == pytest.approx([45, 40])
    assert drawn["gates: β, confidence in pseudo labels"]["p0.5"] == ([0, 1, 2], pytest.approx([0.1, 0.125, 0.5]))
    assert f"mAP on street ({ON_STREET}): 10.0 at p = 0 %, 20.0 at p = 50 %, 40.0 at p = 100 %." in text
    assert f"R1 on street ({ON_STREET}): 60.0 at 4000, 30.0 at 9000." in text
    assert f"mAP on street ({ON_STREET}): 35.0 at B+CBAM+AAN, 40.0 at B+NL-CBAM+AAN." in text
    assert "p0.5: β from 0.100 to 0.500" in text


def test_names_are_no_formulas_and_none_is_left_out_of_a_legend(tmp_path, drawn):
    for name, share in (("_a", 0.0), ("a$^$b", 1.0)):
        fake_run(tmp_path / "runs" / name, [("_$^$", 0.3, 0.2)], data={"unlabeled_share": share},
                 scalars={"memory/beta": [0.1, 0.5], "eval/_$^$/mAP": [20.0, 30.0]})  # fmt: skip
    report([tmp_path / "runs"], tmp_path / "page")
    assert ["_a", "a$^$b"] in drawn["legends"]


def test_what_to_watch_is_a_table_of_what_was_logged(tmp_path):
    old = {"competition/backbone_frozen": [0.0, 0.25], "train/loss/total": [3.0, 2.0]}
    new = {"competition/ties": [1.0, 0.5, 0.125], "competition/backbone_frozen": [0.5, 0.75],
           "attention/spatial_spread": [1e-6, 0.0123456], "train/loss/labeled_embedding": [2.0, 1.0],
           # Of a network without an adversary and a memory that is not written to.
           "train/logit_norm/attention": [1.0, 2.0], "memory/slots_unlabeled": [0.0, 0.0]}  # fmt: skip
    fake_run(tmp_path / "silent", scalars={"train/loss/total": [1.0]})
    runs = [fake_run(tmp_path / name, scalars=each) for name, each in {"old": old, "new": new}.items()]
    table = watched_table(read_runs([*runs, tmp_path / "silent"]))
    assert table.columns == ["what", "old", "new", "what to look for", "scalar"]
    assert {row[-1]: tuple(row[1:3]) for row in table.rows} == {
        "competition/ties": ("–", "1 → 0.125"),
        "competition/backbone_frozen": ("0 → 0.25", "0.5 → 0.75"),
        "attention/spatial_spread": ("–", "1e-06 → 0.0123"),
        "train/loss/labeled_embedding": ("–", "2 → 1"),
    }
    assert all(row[0] and row[-2] for row in table.rows)
    text = text_of(report(runs, tmp_path / "page"))
    assert "What to watch in training" in text and "near 0 the spatial attention is flat and does nothing" in text
    assert watched_table(read_runs([tmp_path / "silent"])) is None
    assert "What to watch" not in text_of(report([tmp_path / "silent"], tmp_path / "silent_page"))


def test_runs_are_of_one_kind_where_they_learn_alike(tmp_path):
    """From batches of one size, of one rank or of several; by one precision; from the same images, cached or not."""
    of_protocol = {"labeled": [], "unlabeled": [], "root": "r"}
    kinds = {
        "one": {},
        "two": {"data": {"batch_size": 16, "batch_size_per_rank": True}},
        "cached": {"data": {"cache": "user", "cache_check": "full", "workers": 3}},
        "smaller": {"data": {"batch_size": 16}},
        "bfloat16": {"run": {"precision": "bfloat16"}},
        **{name: {"data": {**of_protocol, "protocol": name}} for name in ("p1", "p2-msmt17", "p3-msmt17")},
    }
    for name, settings in kinds.items():
        fake_run(tmp_path / name, data={"batch_size": 32} | settings.pop("data", {}), **settings)
    with_results(tmp_path / "two", ranks=2)
    learning = {run.name: run.learning() for run in read_runs([tmp_path])}
    assert learning.pop("two") == learning.pop("cached") == learning["one"]
    assert all(one != other for one, other in itertools.combinations(learning.values(), 2))


def test_a_table_says_of_which_runs_the_target_had_which_images(tmp_path):
    for name, images in (("a", 30), ("b", 30), ("c", 31)):
        with_results(fake_run(tmp_path / name), {"num_query": images})
    [table] = result_tables(read_runs([tmp_path]))
    assert table.note.endswith(
        "30 queries, 40 gallery images for a, b; 31 queries, 40 gallery images for c: "
        "rows of other images do not compare."
    )


def test_results_of_other_protocols_are_not_drawn_together(tmp_path, drawn):
    for share, repeats in ((0.0, 10), (0.25, 1), (0.5, 1), (1.0, 1)):
        fake_run(tmp_path / f"p{share}", [("street", 0.3, share / 2, repeats)], data={"unlabeled_share": share})
    with_results(tmp_path / "p1.0", {"epoch": f"epoch 3 of 9, {CHOSEN}"})
    for share, change in ((0.6, {"num_query": 31}), (0.7, {"num_gallery": 41}), (0.8, {"epoch": "epoch 3 of 9"})):
        with_results(fake_run(tmp_path / f"p{share}", data={"unlabeled_share": share}), change)
    report([tmp_path], tmp_path / "page")
    shown = {title: lines["mAP"][0] for title, lines in drawn.items() if title.startswith("unlabeled_share")}
    assert shown == {f"unlabeled_share: street, {ON_STREET}": [25, 50]}


def test_models_are_drawn_over_the_epochs_they_were_tested_at(tmp_path, drawn):
    every = {"evaluate_every": 2}
    for name, values in (("none", [10.0, 20.0, 25.0]), ("spatial", [15.0, 25.0, 35.0])):
        fake_run(tmp_path / name, model={"attention": name, "adversary": False}, run=every,
                 optimizer={"epochs": 5}, scalars={"eval/street/mAP": values})  # fmt: skip
    report([tmp_path], tmp_path / "page")
    curves = drawn[f"models1: street, {ON_STREET}"]
    assert curves["B+SA"] == ([2, 4, 5], pytest.approx([15, 25, 35]))
    assert curves["B"][1] == pytest.approx([10, 20, 25])


def test_curves_of_other_images_of_one_name_are_in_panels_of_their_own(tmp_path, drawn):
    for name, tag, variant in (("none", "street", "night"), ("spatial", "street-day_light", "day light")):
        scalars = {f"eval/{tag}/mAP": [10.0, 20.0], "eval/mall/mAP": [1.0, 2.0]}
        folder = fake_run(tmp_path / name, model={"attention": name, "adversary": False}, run={"evaluate_every": 1},
                          scalars=scalars)  # fmt: skip
        with_results(folder, {"variant": variant})
    # One that is still training, one whose epoch was chosen and that was evaluated otherwise too.
    cbam = fake_run(tmp_path / "cbam", [], model={"attention": "cbam"}, run={"evaluate_every": 1}, scalars=scalars)
    (cbam / "results.json").unlink()
    chosen = fake_run(tmp_path / "nl", model={"attention": "nl_cbam"}, run={"evaluate_every": 1}, scalars=scalars)
    with_results(chosen, {"variant": "day light", "epoch": f"epoch 1 of 500, {CHOSEN}"})
    again = {**evaluation("street", 0.5, 0.4), "variant": "day light", "metric": "euclidean"}
    (chosen / "again.json").write_text(json.dumps([again]))
    report([tmp_path], tmp_path / "page")
    shown = {title.removeprefix("models1: "): sorted(lines) for title, lines in drawn.items() if "models1" in title}
    night, day = (f"street ({variant}), {ON_STREET}" for variant in ("night", "day light"))
    of_day = ["B+CBAM+AAN", "B+NL-CBAM+AAN", "B+SA"]
    assert shown == {night: ["B"], day: of_day, "mall": sorted([*of_day, "B"])}, "mall is in no results"


def test_long_names_are_shortened_only_as_far_as_they_stay_apart(tmp_path, drawn):
    ends = "first_of_all_the_names_of_", "_with_an_end_that_is_the_same_in_all_of_them"
    for names in (("x", "y"), (f"{ends[0]}a{ends[1]}", f"{ends[0]}b{ends[1]}"), (f"a{'_' * 60}", f"b{'_' * 60}")):
        for name in names:
            fake_run(tmp_path / names[0] / name, scalars={"memory/beta": [0.1, 0.5]})
        report([tmp_path / names[0]], tmp_path / "page")
    plain, whole, short = drawn["legends"]
    assert plain == ["x", "y"] and short == [f"{letter}{'_' * 21}…{'_' * 23}" for letter in "ab"]
    assert [each.replace("\n", "") for each in whole] == [f"{ends[0]}{letter}{ends[1]}" for letter in "ab"]


@pytest.mark.parametrize("told", ["results", "settings", "nowhere"])
def test_tests_stand_at_the_epochs_of_their_steps(tmp_path, told):
    """A target that was added after the training, and one that was tested from its middle on."""
    scalars = {"eval/street/mAP": {280: 20.0, 350: 30.0, 420: 40.0}, "eval/late/mAP": {420: 10.0}}
    place = {"results": {"iterations": 420}, "settings": {"data": {"iterations": 7}}, "nowhere": {}}[told]
    fake_run(tmp_path / "run", run={"evaluate_every": 10}, optimizer={"epochs": 60}, scalars=scalars, **place)
    [run] = read_runs([tmp_path])
    found = evaluated_epochs(run)
    # Where the iterations of an epoch are not known the tests are counted, those of all targets.
    street = [10, 20, 30] if told == "nowhere" else [40, 50, 60]
    assert found == {"street": (street, [20.0, 30.0, 40.0]), "late": (street[-1:], [10.0])}


def slots(count: int = 30) -> Slots:
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 3
    return Slots(
        np.eye(3)[labels] * generator.uniform(1, 9, (count, 1)) + generator.normal(0, 0.01, (count, 3)), labels
    )


def test_tsne_is_seeded_and_puts_like_with_like():
    here = slots()
    places = layout(here, seed=1)
    assert np.array_equal(places, layout(here, seed=1)) and not np.array_equal(places, layout(here, seed=2))
    centres = np.stack([places[here.labels == label].mean(0) for label in range(3)])
    nearest = np.linalg.norm(places[:, None] - centres, axis=2).argmin(1)
    assert (nearest == here.labels).all()
    assert neighbours_agree(here) == 1.0
    mixed = Slots(here.features, np.random.default_rng(0).permutation(here.labels))
    assert neighbours_agree(mixed) < 1.0
    # By the angle: a long feature is no nearer to another label than a short one.
    assert (
        neighbours_agree(Slots(np.array([[1.0, 0.0], [90.0, 1.0], [1.0, 5.0], [1.0, 4.0]]), np.array([0, 0, 1, 1])))
        == 1
    )


@pytest.mark.slow
def test_slots_come_from_the_checkpoint_and_empty_ones_do_not(trained):
    state = torch.load(trained / "checkpoint.pt")
    stored = stored_slots(state, trained)
    model = state["model"]
    for memory in ("labeled", "unlabeled"):
        used = model[f"memory.{memory}.labels"] >= 0
        assert len(stored[memory].labels) == int(used.sum())
        assert np.allclose(stored[memory].features, model[f"memory.{memory}.features"][used])
    assert stored_slots({"model": {"network.x": torch.zeros(1)}}, trained) is None


def test_few_slots(tmp_path):
    assert plot_memories({"labeled": slots(3), "unlabeled": slots(0)}, tmp_path / "few.png").is_file()


def test_a_picture_of_some_slots_names_all_of_them(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(memories, "MOST_SLOTS", 9)
    monkeypatch.setattr(
        memories, "save_png", lambda figure, path: titles.extend(each.get_title(loc="left") for each in figure.axes)
    )
    plot_memories({"labeled": slots(30), "unlabeled": slots(6)}, tmp_path / "some.png")
    assert titles == ["M, labels: 30 slots of 3 labels, 9 of them drawn", "M′, pseudo labels: 6 slots of 3 labels"]


def test_a_sample_of_slots_is_seeded(monkeypatch):
    monkeypatch.setattr(memories, "MOST_SLOTS", 7)
    numbered = Slots(slots().features, np.arange(30))
    some = sample(numbered, seed=3).labels
    assert len(some) == 7 and (np.diff(some) > 0).all(), "in their order"
    assert np.array_equal(some, sample(numbered, seed=3).labels)
    assert not np.array_equal(some, sample(numbered, seed=4).labels)
    assert len(sample(slots(7)).labels) == 7


def test_means_over_fewer_seeds_say_so(tmp_path):
    for seed, share, precision in ((0, 0.25, 0.1), (0, 0.5, 0.14), (1, 0.25, 0.15), (1, 0.5, 0.18)):
        results = [("street", 0.3, precision)]
        fake_run(tmp_path / f"{share}-{seed}", results, data={"unlabeled_share": share}, run={"seed": seed})
    target = Target("street", ON_STREET)
    [line] = unlabeled_shares(read_runs([tmp_path]))
    assert describe(line, target, "mAP", lambda share: f"p = {share}") == "12.5 at p = 0.25, 16.0 at p = 0.5"
    with_results(tmp_path / "0.5-1", {"num_query": 31})
    [line] = unlabeled_shares(read_runs([tmp_path]))
    assert describe(line, target, "mAP") == "12.5 at 0.25 (mean of 2), 14.0 at 0.5 (mean of 1)"
