"""Trainings that start from a trained network: what they take of it, and what they say of whom it was trained on."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from dan_fast.cli import main
from dan_fast.core.errors import DanFastError
from dan_fast.data import load_dataset
from dan_fast.nn import DAN
from dan_fast.reporting.runs import read_runs
from dan_fast.training import TrainConfig, Trainer, trained_network
from dan_fast.training.build import initial_network
from dan_fast.training.checkpoint import load_checkpoint, save_checkpoint
from dan_fast.training.reported import SEEN
from dan_fast.training.starting import take_weights, whom_it_saw
from tests.support.training_runs import command, config, evaluated

pytestmark = pytest.mark.slow

NOT_RECORDED = "persons that its first weights were trained on not recorded"


@pytest.fixture(scope="module")
def earlier(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a network with attention and instance norm that campus was trained on."""
    out = tmp_path_factory.mktemp("runs") / "earlier"
    Trainer(of_campus(images, out)).fit()
    return out / "checkpoint.pt"


def of_campus(images: Path, out: Path, **model: object) -> TrainConfig:
    return config(
        images,
        out,
        data={"unlabeled": []},
        model={"instance_norm": True, **model},
        meta={"procedure": "daml1"},
        optimizer={"epochs": 1},
    )


def of_mall(images: Path, out: Path, weights: Path | str, **model: object) -> TrainConfig:
    changed = of_campus(images, out, weights=str(weights), **model)
    changed.data.labeled, changed.data.targets = [str(images / "mall")], [str(images / "campus")]
    return changed


def shared(earlier: Path, folder: Path) -> Path:
    assert main(["share", "--checkpoint", str(earlier), "--out", str(folder)]) == 0
    return folder


def assert_equal(some: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(some.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["checkpoint", "shared folder"])
def test_backbone_attention_and_preprocessing_are_those_of_the_trained_network(earlier, images, tmp_path, form):
    weights = earlier if form == "checkpoint" else shared(earlier, tmp_path / "shared")
    trained, _ = trained_network(earlier)
    settings = of_mall(images, tmp_path / "run", weights)
    trainer = Trainer(settings)
    for part in ("backbone", "attention"):
        assert_equal(getattr(trainer.model.network, part), getattr(trained, part))
        with pytest.raises(AssertionError):  # not what a network is without it
            assert_equal(
                getattr(trained, part), getattr(Trainer(of_mall(images, tmp_path, "none")).model.network, part)
            )
    assert trainer.model.network.preprocessing == trained.preprocessing
    # Other persons: the classifier is drawn as without a trained network, and so is all that is drawn after it.
    fresh = Trainer(of_mall(images, tmp_path / "fresh", "none"))
    assert_equal(trainer.model.network.classifier, fresh.model.network.classifier)
    assert torch.equal(trainer.random.state_dict()["cpu"], fresh.random.state_dict()["cpu"])


def test_how_images_are_read_comes_with_the_weights(earlier, images, tmp_path):
    state = load_checkpoint(earlier)
    state["preprocessing"] = state["preprocessing"] | {"mean": [0.1, 0.2, 0.3]}
    save_checkpoint(tmp_path / "other.pt", state)
    network = initial_network(of_mall(images, tmp_path, tmp_path / "other.pt").to_dict(), 4)
    assert tuple(network.preprocessing.mean) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("kind", [{"attention": "cbam"}, {"reduction": 4}], ids=str)
def test_an_attention_of_another_kind_is_drawn(earlier, images, tmp_path, kind):
    network, fresh = (
        initial_network(of_mall(images, tmp_path, weights, **kind).to_dict(), 4) for weights in (earlier, "none")
    )
    assert_equal(network.attention, fresh.attention)
    assert_equal(network.backbone, trained_network(earlier)[0].backbone)


def test_persons_of_the_earlier_training_count_as_seen(earlier, images, tmp_path):
    trainer = Trainer(of_mall(images, tmp_path / "run", earlier))
    persons = {Path(root).name: pids.numel() for root, pids in trainer._past["persons"].items()}
    assert persons == {"campus": 4, "mall": 4}
    samples = [sample for name in ("campus", "mall") for sample in load_dataset(images / name).train]
    assert trainer._past["images"].numel() == len(samples)
    # Others of a set that is trained on now, and a set without persons, are added to what there is.
    (own,) = trainer.training_set.persons.items()
    before = {"persons": {own[0]: own[1][:1] + 100}, "roots": ["/street"], "first_weights": None}
    both = whom_it_saw(trainer.training_set, "timm:test_resnet", "none", before)
    assert both["persons"][own[0]].tolist() == [*own[1].tolist(), int(own[1][0]) + 100]
    assert both["roots"] == sorted(["/street", *trainer.training_set.roots])
    # Test persons of campus were not trained on, so there is nothing to say; its cameras were learnt from.
    (evaluation,) = trainer.fit()
    assert evaluation.seen == "" and evaluation.known_cameras


def test_a_target_that_the_earlier_training_learnt_says_so(earlier, images, tmp_path, capsys):
    # Its train images under another name, those of the first camera as queries.
    rows = ["path,pid,camid,split"]
    for sample in load_dataset(images / "campus").train:
        split = "query" if sample.camid == 1 else "gallery"
        rows.append(f"{sample.path.relative_to(images / 'campus')},{sample.pid},{sample.camid},{split}")
    again = images / "campus" / "again.csv"
    again.write_text("\n".join(rows) + "\n")
    try:
        settings = of_mall(images, tmp_path / "run", earlier)
        settings.data.targets = [str(again)]
        (evaluation,) = Trainer(settings).fit()
        assert evaluation.seen == f"4 {SEEN}"
        assert SEEN in " ".join(capsys.readouterr().out.split())
        flags = "--targets", str(again), "--baselines", "true"
        rows = evaluated(tmp_path / "run/checkpoint.pt", tmp_path / "figures.json", *flags)
        assert [row["features"] for row in rows] == ["trained", "initial", "chance"]
        assert [row["seen"] for row in rows] == [f"4 {SEEN}", f"4 {SEEN}", ""]
    finally:
        again.unlink()


def test_the_network_before_training_is_that_of_the_file_it_started_from(earlier, images, tmp_path, capsys):
    weights, run = tmp_path / "weights.pt", tmp_path / "run"
    shutil.copy(earlier, weights)
    settings = of_mall(images, run, weights)
    settings.data.targets = []
    Trainer(settings).fit()
    evaluate = ["evaluate", "--checkpoint", str(run / "checkpoint.pt"), "--targets", str(images / "campus")]
    evaluate += ["--baselines", "true", "--workers", "0", "--device", "cpu"]
    state = load_checkpoint(earlier)
    save_checkpoint(weights, state | {"epoch": state["epoch"] + 1})
    settings.run.resume = True
    assert Trainer(settings)._past["first_weights"] == load_checkpoint(run / "checkpoint.pt")["first_weights"]
    capsys.readouterr()
    assert main(evaluate) == 1
    assert capsys.readouterr().err == (
        f"dan-fast: {weights} is another file than the one that this training started from: put that one back, or "
        "evaluate without --baselines.\n"
    )
    shutil.copy(earlier, weights)
    assert main(evaluate) == 0


def test_where_it_started_is_said_kept_and_shared(earlier, images, tmp_path, capsys):
    first = "earlier/checkpoint.pt, epoch 1 of 1, trained on campus"
    out = tmp_path / "second"
    Trainer(of_mall(images, out, earlier)).fit()
    assert f"Starts from {first}." in " ".join(capsys.readouterr().out.split())
    assert json.loads((out / "results.json").read_text())["started_from"] == [first]
    (run,) = read_runs([out])
    assert run.sources == f"mall, after {first}"
    card = (shared(out / "checkpoint.pt", tmp_path / "shared") / "README.md").read_text()
    assert f"- started from: {first}" in card

    third = tmp_path / "third"
    second = "shared, epoch 1 of 1, trained on mall"
    settings = of_mall(images, third, tmp_path / "shared")
    Trainer(settings).fit()
    assert load_checkpoint(third / "checkpoint.pt")["started_from"] == [second, first]
    (evaluation,) = json.loads((third / "results.json").read_text())["targets"]
    assert evaluation["seen"] == NOT_RECORDED
    fourth = of_mall(images, tmp_path / "fourth", third / "checkpoint.pt")
    (evaluation,) = Trainer(fourth).fit()
    assert evaluation.seen == NOT_RECORDED


@pytest.mark.parametrize("gone", [True, False])
def test_a_run_goes_on_without_the_network_it_started_from(earlier, images, tmp_path, gone):
    copy = tmp_path / "base.pt"
    copy.write_bytes(earlier.read_bytes())
    settings = of_mall(images, tmp_path / "run", copy)
    settings.run.checkpoint_every = 1
    trainer = Trainer(settings)
    trainer._save()
    if gone:
        copy.unlink()
    else:  # another training's checkpoint by now
        copy.write_bytes((tmp_path / "run/checkpoint.pt").read_bytes())
    settings.run.resume = True
    again = Trainer(settings)
    assert again._past.keys() == trainer._past.keys()
    assert torch.equal(again._past["images"], trainer._past["images"])
    assert again._past["started_from"] == trainer._past["started_from"]
    assert {name: pids.tolist() for name, pids in again._past["persons"].items()} == {
        name: pids.tolist() for name, pids in trainer._past["persons"].items()
    }


def test_sets_of_one_name_that_it_was_trained_on_are_numbered(earlier, images, tmp_path):
    state = load_checkpoint(earlier)
    state["config"]["data"]["labeled"] = ["/home/a/campus", "/home/b/campus/manifest.csv"]
    save_checkpoint(tmp_path / "old.pt", state)
    trainer = Trainer(of_mall(images, tmp_path / "run", tmp_path / "old.pt"))
    assert trainer._past["started_from"] == [f"{tmp_path.name}/old.pt, epoch 1 of 1, trained on campus, campus (2)"]


def test_a_checkpoint_of_before_does_not_say_whom_it_was_trained_on(earlier, images, tmp_path):
    state = load_checkpoint(earlier)
    del state["persons"], state["images"]
    save_checkpoint(tmp_path / "old.pt", state)
    (evaluation,) = Trainer(of_mall(images, tmp_path / "run", tmp_path / "old.pt")).fit()
    assert evaluation.seen == NOT_RECORDED


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"instance_norm": False}, "model.instance_norm true, and here it is false: set model.instance_norm to true"),
        ({"backbone": "resnet18"}, "model.backbone timm:test_resnet, and here it is resnet18: set model.backbone to"),
    ],
)
def test_a_network_of_another_kind_is_refused(earlier, images, tmp_path, changes, sentence):
    with pytest.raises(DanFastError, match=sentence):
        Trainer(of_mall(images, tmp_path / "run", earlier, **changes))
    assert not (tmp_path / "run").exists()


def test_position_embeddings_are_those_of_the_trained_network_resampled(images, tmp_path):
    vit = {"backbone": "timm:test_vit", "instance_norm": False}
    first = of_campus(images, tmp_path / "vit", **vit)
    first.data.image_size = [64, 32]
    Trainer(first)._save()
    settings = of_mall(images, tmp_path / "run", tmp_path / "vit/checkpoint.pt", **vit)
    settings.data.image_size = [64, 48]
    found = Trainer(settings).model.network.backbone
    trained = trained_network(tmp_path / "vit/checkpoint.pt")[0].backbone
    assert (trained.grid, found.grid) == ((4, 2), (4, 3))
    sizes = {"new_size": [4, 3], "old_size": list(trained.grid), "num_prefix_tokens": 1}
    assert torch.equal(found.model.pos_embed, resample_abs_pos_embed(trained.model.pos_embed, **sizes))
    assert torch.equal(found.model.blocks[0].attn.qkv.weight, trained.model.blocks[0].attn.qkv.weight)


def test_positions_that_are_no_row_of_tokens_are_refused_for_other_images():
    trained, network = (DAN(3, "timm:visformer_tiny", size) for size in ((64, 32), (64, 64)))
    sentence = "weights a.pt do not fit timm:visformer_tiny for images of 64 x 64 .of another shape: model.pos_embed"
    with pytest.raises(DanFastError, match=sentence):
        take_weights(network, trained, "a.pt")


def test_which_weights_timm_downloads_is_said_and_recorded(images, tmp_path, capsys, monkeypatch):
    state = timm.create_model("test_resnet").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **options: dict(state))
    first = of_campus(images, tmp_path / "first", backbone="timm:test_resnet", weights="imagenet", instance_norm=False)
    Trainer(first).fit()
    words = "timm's test_resnet.r160_in1k, licence apache-2.0"
    assert f"Starts from {words}." in capsys.readouterr().out
    assert json.loads((tmp_path / "first/results.json").read_text())["started_from"] == [words]
    unlike = {"backbone": "timm:test_resnet", "instance_norm": False}
    after = Trainer(of_mall(images, tmp_path / "second", tmp_path / "first/checkpoint.pt", **unlike))
    assert after._past["started_from"][1:] == [words] and not after._past["unrecorded"]


@pytest.mark.parametrize("name", ["timm:test_resnet.none_such", "timm:none_such"])
def test_weights_that_timm_does_not_have_are_named(images, tmp_path, name):
    named = of_campus(images, tmp_path / "run", backbone=name, weights="imagenet", instance_norm=False)
    with pytest.raises(DanFastError, match=f"has no model '{name.removeprefix('timm:')}'; the nearest are"):
        Trainer(named)


def test_the_folder_of_a_run_and_a_damaged_checkpoint_are_named(earlier, images, tmp_path):
    with pytest.raises(DanFastError, match=r"is the folder of a run: name the checkpoint\.pt in it"):
        Trainer(of_mall(images, tmp_path / "run", earlier.parent))
    damaged = tmp_path / "cut.pt"
    damaged.write_bytes(earlier.read_bytes()[:-100])
    with pytest.raises(DanFastError, match="is damaged or no file of torch.save"):
        Trainer(of_mall(images, tmp_path / "run", damaged))


def test_by_the_command(earlier, images, tmp_path):
    flags = ["--recipe", "dan", "--data.labeled", str(images / "mall"), "--model.weights", str(earlier)]
    assert main([*command(tmp_path / "run", *flags), "--memory.labeled_slots", "7"]) == 0
    assert "earlier/checkpoint.pt" in json.loads((tmp_path / "run/results.json").read_text())["started_from"][0]
