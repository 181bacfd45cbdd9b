"""Recipes: what they hold, what wins over them, and that a run and its results name them."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dan_fast import cli
from dan_fast.cli import main
from dan_fast.commands.quickstart import _config
from dan_fast.core.errors import DanFastError
from dan_fast.data import ReIDDataset
from dan_fast.reporting.report import report
from dan_fast.reporting.runs import read_runs
from dan_fast.training import DataConfig, TrainConfig, Trainer
from dan_fast.training.recipes import RECIPES, dotted, over, recipe_of, recipe_settings, recipe_words
from dan_fast.training.valid_settings import require_valid
from dan_fast.training.without_effect import without_effect
from tests.support.training_runs import command, config, evaluated

RECIPE_FILES = sorted((Path(cli.__file__).parent / "recipes").iterdir())
# Where and on what a run takes place, how long and with which step sizes is for the user to say.
BESIDE_THE_METHOD = {
    *("data.labeled", "data.unlabeled", "data.targets", "data.protocol", "data.root", "data.image_size"),
    *("data.batch_size", "data.workers", "data.broken_images", "data.cache", "data.cache_check"),
    *("model.backbone", "model.weights", "optimizer.epochs", "optimizer.lr_scale"),
    *("data.batch_size_per_rank", "data.iterations", "memory.products"),
    *("model.gradient_checkpointing", "model.sync_batch_norm"),
}


def parsed(*flags: str) -> TrainConfig:
    parser, settings = cli._parse(["train", *flags])
    arguments = vars(parser.instantiate(settings).train)
    return TrainConfig(**{name: value for name, value in arguments.items() if name != "config"})


def method(config: TrainConfig) -> dict:
    """The settings but for where the run takes place and what it was called."""
    return {name: value for name, value in config.to_dict().items() if name not in ("recipe", "run", "optimizer")}


def test_paths_are_taken_as_paths():
    data = {"labeled": Path("a"), "targets": [Path("b/c")]}
    config = TrainConfig.of_recipe("plain", data=data, model={"weights": Path("w.pth")}, run={"out": Path("d")})
    assert (config.data.labeled, config.data.targets, config.run.out) == (["a"], ["b/c"], "d")
    assert config.model.weights == "w.pth"
    require_valid(config)


def test_the_package_has_the_recipes_that_it_names():
    assert [path.name for path in RECIPE_FILES] == [f"{name}.yaml" for name in sorted(RECIPES)]
    assert {"dan", "paper", "plain"} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_what_exists_and_only_the_method(name, tmp_path):
    content = dotted(recipe_settings(name))
    assert content
    assert content.keys() <= dotted(TrainConfig().to_dict()).keys()
    assert not content.keys() & BESIDE_THE_METHOD
    assert not any(setting.startswith("run.") for setting in content)
    # As a file of settings it passes the checks of every flag.
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"recipe": "none", **recipe_settings(name)}))
    assert method(parsed("--config", str(tmp_path / "recipe.yaml"))) == method(TrainConfig.of_recipe(name))


def test_paper_is_the_paper_as_printed():
    paper, defaults = TrainConfig.of_recipe("paper"), TrainConfig()
    expected = dotted(method(defaults)) | {"loss.confidence_prior": 0.0, "meta.stall_guard": 0}
    assert dotted(method(paper)) == expected
    # Sec. IV-B, whatever the defaults become.
    of_optimizer = {"momentum": 0.9, "weight_decay": 5e-4, "backbone_lr_scale": 1.0}
    assert (
        recipe_settings("paper")["optimizer"] == of_optimizer
        and asdict(paper.optimizer).items() >= of_optimizer.items()
    )


def test_paper_names_every_setting_of_the_method():
    settings = {name for name in dotted(TrainConfig().to_dict()) if not name.startswith("run.")}
    left = settings - dotted(recipe_settings("paper")).keys() - BESIDE_THE_METHOD
    # Of a loss that the paper does not have.
    assert left == {"memory.temperature"}, "name it in recipes/paper.yaml, or in BESIDE_THE_METHOD"


def test_plain_has_no_part_of_dan():
    plain = TrainConfig.of_recipe("plain", data={"labeled": "a", "unlabeled": "b"})
    assert (plain.model.attention, plain.model.adversary, plain.meta.procedure) == ("none", False, "daml1")
    assert {weight for weight in asdict(plain.loss).values() if isinstance(weight, float)} == {0.0}
    assert plain.data.unlabeled_share == 0 and plain.data.unlabeled == ["b"]
    found, defaults = dotted(method(plain)), dotted(method(TrainConfig()))
    same = ("data.image_size", "data.batch_size", "model.backbone", "model.dropout")
    assert [found[name] for name in same] == [defaults[name] for name in same]
    # What is no part of DAN is in both.
    dan = TrainConfig.of_recipe("dan")
    assert plain.model.instance_norm == dan.model.instance_norm == "auto"
    # The root of a feature needs no memory, its whitening does.
    assert plain.model.feature == "pooled_root" and dan.model.feature == "pooled_whitened"


def test_python_gets_a_recipe_only_where_it_asks():
    assert TrainConfig().recipe == "none" and TrainConfig().recipe_words == ""
    assert TrainConfig() == TrainConfig.of_recipe("none")
    config = TrainConfig.of_recipe("plain", loss={"regularizer": 0.3}, data={"labeled": "market"})
    assert (config.recipe, config.loss.regularizer, config.loss.adversary) == ("plain", 0.3, 0.0)
    assert config.data.labeled == ["market"] and config.data.unlabeled_share == 0
    with pytest.raises(TypeError, match="optimiser is no section"):
        TrainConfig.of_recipe("plain", optimiser={})
    with pytest.raises(TypeError, match="data must be a mapping"):
        TrainConfig.of_recipe("plain", data=DataConfig())
    for wrong in (lambda: TrainConfig.of_recipe("dna"), lambda: TrainConfig(recipe="dna")):
        with pytest.raises(DanFastError, match="There is no recipe 'dna': choose dan, paper, plain"):
            wrong()


def test_defaults_recipe_file_flags_in_this_order(tmp_path):
    assert parsed().recipe == "dan"
    assert method(parsed("--recipe", "plain")) == method(TrainConfig.of_recipe("plain"))
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump({"loss": {"adversary": 0.3, "embedding": 0.4}, "meta": {"eta": 0.5}}))
    config = parsed("--recipe", "plain", "--config", str(file), "--loss.embedding", "0.7")
    assert (config.loss.adversary, config.loss.embedding, config.loss.regularizer) == (0.3, 0.7, 0.0)
    assert (config.meta.procedure, config.meta.eta) == ("daml1", 0.5)
    assert config.recipe_words == ("recipe plain, with loss.adversary=0.3, loss.embedding=0.7, meta.eta=0.5")


@pytest.mark.parametrize(
    "flags", [["--config", "FILE", "--recipe", "paper"], ["--recipe=paper", "--config=FILE"], ["--recipe", "paper"]]
)
def test_the_flag_wins_over_the_file_whatever_their_order(flags, tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("recipe: plain\noptimizer: {epochs: 7}\n")
    config = parsed(*(flag.replace("FILE", str(file)) for flag in flags))
    assert config.recipe == "paper" and method(config) == method(TrainConfig.of_recipe("paper"))
    config = parsed("--config", str(file))
    assert (config.recipe, config.optimizer.epochs) == ("plain", 7)
    assert method(config) == method(TrainConfig.of_recipe("plain"))


def test_the_complete_configuration_is_printed_with_the_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "plain", "--meta.eta", "0.5", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == TrainConfig.of_recipe("plain", meta={"eta": 0.5}).to_dict()


@pytest.mark.parametrize(
    ("words", "recipe"),
    [("train --recipe dna", "dna"), ("quickstart --recipe dna", "dna"), ("train --config FILE", "3")],
)
def test_a_recipe_that_does_not_exist_is_one_sentence(words, recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "some.yaml").write_text("recipe: 3\n")
    monkeypatch.chdir(tmp_path)
    assert main(words.replace("FILE", "some.yaml").split()) == 1
    assert capsys.readouterr().err == (
        f"dan-fast: There is no recipe '{recipe}': choose dan, paper, plain or none, the bare defaults.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["some.yaml"]


def test_words_name_what_was_changed_in_the_method_alone():
    config = TrainConfig.of_recipe(
        "dan", data={"labeled": "a", "image_size": (96, 48)}, optimizer={"epochs": 3}, model={"dropout": 0.1},
        memory={"labeled_slots": 5}, run={"seed": 4},
    )  # fmt: skip
    defaults = TrainConfig().to_dict()
    assert config.recipe_words == "recipe dan, with model.dropout=0.1, memory.labeled_slots=5"
    assert TrainConfig.of_recipe("paper").recipe_words == "recipe paper"
    config.optimizer.weight_decay = 0.0
    assert config.recipe_words.endswith("labeled_slots=5, optimizer.weight_decay=0.0")
    paper = TrainConfig.of_recipe("paper", optimizer={"momentum": 0.5, "backbone_lr_scale": 0.1, "lr_scale": 30.0})
    assert paper.recipe_words == "recipe paper, with optimizer.momentum=0.5, optimizer.backbone_lr_scale=0.1"
    # Results of before recipes named them, and of before there was such a setting.
    older = TrainConfig.of_recipe("paper").to_dict()
    del older["optimizer"]["backbone_lr_scale"]
    assert recipe_words(older, defaults) == "recipe paper"
    # A checkpoint of another version: a setting that it lacks had its default, a recipe may be gone.
    assert recipe_words({"recipe": "dan", "meta": {"order": 2}}, defaults).startswith("recipe dan, with ")
    assert recipe_words({"recipe": "bygone"}, defaults) == "recipe bygone, which this version does not have"
    assert recipe_words({"data": {}}, defaults) == ""


def test_a_whole_configuration_without_a_recipe_is_left_as_it_is(tmp_path):
    """The config.yaml of an older version decides what is learnt; a partial file does not."""
    old = {section: values for section, values in TrainConfig().to_dict().items() if section != "recipe"}
    assert recipe_of(old) == "none"
    del old["loss"]["confidence_prior"]
    assert recipe_of(old) is None and recipe_of({}) is None and recipe_of("words") is None
    assert recipe_of({**old, "recipe": "plain"}) == "plain"


def tiny_flags(images: Path, out: Path) -> list[str]:
    campus, mall = str(images / "campus"), str(images / "mall")
    return command(out, "--data.labeled", campus, "--data.unlabeled", mall, "--data.targets", mall)


@pytest.mark.slow
def test_a_run_and_its_results_name_the_recipe(images, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*tiny_flags(images, out), "--recipe", "plain", "--loss.regularizer", "0.5"]) == 0
    words = "recipe plain, with loss.regularizer=0.5"
    assert words in capsys.readouterr().out
    assert yaml.safe_load((out / "config.yaml").read_text())["recipe"] == "plain"
    state = torch.load(out / "checkpoint.pt")
    assert state["config"]["recipe"] == "plain"
    assert not any(name.startswith("memory.") for name in state["model"]), "no unlabelled image is used"
    results = json.loads((out / "results.json").read_text())
    assert (results["recipe"], results["recipe_changes"]) == ("plain", {"loss.regularizer": 0.5})
    assert results["targets"][0]["recipe"] == words
    assert results["iterations"] == state["epoch"] * len(list((images / "campus").rglob("*.jpg"))) * 2 // 3 // 8
    (row,) = evaluated(out / "checkpoint.pt", tmp_path / "figures.json", "--targets", str(images / "mall"))
    assert words in capsys.readouterr().out and row["recipe"] == words
    assert [run.recipe for run in read_runs([out])] == [words]
    page = report([out], out=tmp_path / "page", images=0)
    assert "plain, with loss.regularizer=0.5" in page.read_text()


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on_without_a_recipe(images, tmp_path, monkeypatch):
    """Its config.yaml and checkpoint name no recipe, and the default of today may hold other settings."""
    out = tmp_path / "run"
    flags = [*tiny_flags(images, out), "--data.unlabeled", "[]", "--meta.stall_guard", "3"]
    assert main([*flags, "--recipe", "none"]) == 0
    state = torch.load(out / "checkpoint.pt")
    del state["config"]["recipe"]
    torch.save(state, out / "checkpoint.pt")
    (out / "config.yaml").write_text(yaml.safe_dump(state["config"], sort_keys=False))
    changed = {**recipe_settings("dan"), "memory": {"decay": 0.5}}
    read = recipe_settings
    for module in ("dan_fast.training.config", "dan_fast.training.recipes"):
        monkeypatch.setattr(f"{module}.recipe_settings", lambda name: changed if name == "dan" else read(name))
    assert parsed().memory.decay == 0.5
    resumed = parsed("--config", str(out / "config.yaml"), "--run.resume", "true")
    assert (resumed.recipe, resumed.memory.decay, resumed.meta.stall_guard) == ("none", 0.99, 3)
    assert main([*flags, "--run.resume", "true"]) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["recipe"] == "none"


def test_resume_is_true_false_or_auto_in_flags_and_files(tmp_path):
    assert parsed().run.resume is False
    for word, value in (("true", True), ("false", False), ("auto", "auto")):
        assert parsed("--run.resume", word).run.resume == value
        (tmp_path / "config.yaml").write_text(f"run: {{resume: {word}, checkpoint_every: 200}}")
        of_file = parsed("--config", str(tmp_path / "config.yaml")).run
        assert of_file.resume == value and type(of_file.resume) is type(value) and of_file.checkpoint_every == 200
    assert main(["train", "--run.resume", "maybe"]) == 2


@pytest.mark.slow
def test_resume_auto_starts_and_goes_on(images, tmp_path, capsys):
    """A run of another recipe than today's default goes on with its own."""
    out = tmp_path / "run"
    command = [*tiny_flags(images, out), "--run.resume", "auto"]
    assert main([*command, "--recipe", "plain"]) == 0
    before = torch.load(out / "checkpoint.pt")
    assert (before["epoch"], before["config"]["run"]["resume"]) == (before["config"]["optimizer"]["epochs"], "auto")
    (out / "results.json").unlink()
    assert main(command) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["recipe"] == "plain" and (out / "results.json").exists()
    assert torch.equal(before["random"]["cpu"], torch.load(out / "checkpoint.pt")["random"]["cpu"])
    assert yaml.safe_load((out / "config.yaml").read_text())["run"]["resume"] is False, "others may start from it"
    assert "Recipe plain.\n" in capsys.readouterr().out
    # A folder without a checkpoint starts, with the recipe that is asked for.
    (out / "checkpoint.pt").unlink()
    assert main(command) == 0
    assert torch.load(out / "checkpoint.pt")["config"]["recipe"] == "dan"
    assert main([*command, "--run.resume", "false"]) == 1
    assert "already holds a run: add --run.resume true" in capsys.readouterr().err


def test_quickstart_keeps_what_its_short_run_needs(tmp_path):
    paper = _config(tmp_path, 3, 0, 0, "paper")
    assert paper.recipe_words == (
        "recipe paper, with data.unlabeled_fraction=0.25, data.feedback_fraction=0.25, memory.labeled_slots=600, "
        "memory.unlabeled_slots=400"
    )
    assert (paper.meta.stall_guard, paper.loss.confidence_prior) == (0, 0.0)
    dan, plain = (_config(tmp_path, 3, 0, 0, name) for name in ("dan", "plain"))
    assert (dan.optimizer.lr_scale, dan.memory.labeled_slots, dan.meta.stall_guard) == (30.0, 600, 20)
    assert plain.model.attention == "none" and plain.data.unlabeled_share == 0


@pytest.mark.slow
def test_quickstart_without_attention_draws_none(tmp_path):
    out = tmp_path / "quick"
    flags = ["quickstart", "--out", str(out), "--epochs", "1", "--identities", "6", "--recipe", "plain"]
    assert main(flags) == 0
    assert json.loads((out / "run" / "results.json").read_text())["recipe"] == "plain"
    assert "recipe plain" in (out / "index.html").read_text() and not (out / "attention.png").exists()


A_DATASET = ReIDDataset("a", Path("a"))


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("run", "precision", "float16", "run.precision.: Expected a .*'float32', 'bfloat16'"),
        ("model", "style_mixing", "unlabelled", "model.style_mixing.* Expected a .*'unlabeled'"),
        ("meta", "procedure", "daml9", "meta.procedure"),
        ("optimizer", "lr_scale", -1.0, "optimizer.lr_scale.* v>=0"),
        ("optimizer", "epochs", "3", "^optimizer.epochs is '3': give it as 3"),
        ("model", "instance_norm", "yes", "^model.instance_norm is 'yes': give it as True"),
        ("data", "image_size", (64,), "data.image_size"),
        ("data", "image_size", [64.0, 32], "^data.image_size is .64.0, 32.: give it as .64, 32."),
        ("data", "batch_size", 8.0, "^data.batch_size is 8.0: give it as 8"),
        ("data", "targets", ["a", ""], "^data.targets holds an empty path, as by a variable of the shell"),
        ("run", "out", "", "^run.out holds an empty path"),
        ("data", "image_size", 32, "^data.image_size is 32: give height and width as .256, 128.\\."),
        ("data", "image_size", "32x16", "^data.image_size is '32x16': give height"),
        ("data", "labeled", A_DATASET, "^data.labeled holds a ReIDDataset: give the path of a dataset;"),
        ("data", "labeled", [A_DATASET], "^data.labeled holds a ReIDDataset: give the path of a dataset;"),
        ("data", "targets", ["a", 3], "^data.targets holds a int: give the path"),
    ],
)
def test_settings_from_python_are_those_that_flags_take(section, name, value, words):
    base = {"data": {"labeled": "missing"}}
    changed = TrainConfig.of_recipe("plain", **base)
    require_valid(changed)
    setattr(getattr(changed, section), name, value)
    for settings in (changed, TrainConfig.of_recipe("plain", **over(base, {section: {name: value}}))):
        with pytest.raises(DanFastError, match=words):
            Trainer(settings)


def test_numbers_of_numpy_are_numbers(images, tmp_path):
    numpy = {
        "data": {"labeled": str(images / "campus"), "batch_size": np.int64(8), "image_size": np.array([32, 16])},
        "optimizer": {"epochs": np.int64(1), "lr_scale": np.float32(30)},
        "model": {"backbone": "resnet18", "weights": "none", "instance_norm": np.bool_(False)},
        "run": {"out": str(tmp_path / "run"), "seed": np.int64(3), "device": "cpu"},
    }
    given = TrainConfig.of_recipe("plain", **numpy)
    assert type(given.run.seed) is type(given.optimizer.epochs) is int and type(given.optimizer.lr_scale) is float
    given.run.checkpoint_every_s, given.loss.adversary = 30, 1  # whole ones serve where any number does
    require_valid(given)
    Trainer(given).folder.write_settings(given)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["image_size"] == [32, 16]


def test_no_setting_is_left_empty(tmp_path, capsys):
    """The parser takes None for a value of any of them, and a procedure that is none trains as another one."""
    settings = [name for name, value in dotted(TrainConfig().to_dict()).items() if value is not None]
    assert len(settings) > 50 and "meta.procedure" in settings
    in_files = {}
    for setting in settings:
        section, _, name = setting.partition(".")
        said = f"{setting} is empty: give it a value, or leave it out."
        in_files[section] = f"{section}:\n  {name}:\n", said
        config = TrainConfig.of_recipe("plain", data={"labeled": "missing"})
        setattr(getattr(config, section), name, None)
        with pytest.raises(DanFastError, match=f"^{said}"):
            require_valid(config)
    for content, said in in_files.values():
        (tmp_path / "empty.yaml").write_text(content)
        assert main(["train", "--config", str(tmp_path / "empty.yaml")]) == 1
        assert capsys.readouterr().err == f"dan-fast: {said}\n"
    (tmp_path / "empty.yaml").write_text("targets: x\nrepeats:\n")
    assert main(["evaluate", "--checkpoint", "x", "--config", str(tmp_path / "empty.yaml")]) == 1
    assert capsys.readouterr().err.startswith("dan-fast: repeats is empty")


def test_a_trainer_has_settings_of_its_own(images, tmp_path):
    given = config(images, tmp_path / "run", data={"iterations": 1}, optimizer={"epochs": 1})
    given.data.targets = str(images / "mall")
    trainer = Trainer(given)
    given.run.seed, given.run.out, given.data.batch_size = 9, str(tmp_path / "other"), 12
    trainer.fit()
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (kept["run"]["seed"], kept["data"]["batch_size"], kept["data"]["targets"]) == (0, 8, [str(images / "mall")])
    assert not (tmp_path / "other").exists()


def test_a_section_is_no_mapping():
    with pytest.raises(DanFastError, match="^data must be a DataConfig; TrainConfig.of_recipe takes mappings"):
        Trainer(TrainConfig(data={"labeled": "x"}))


@pytest.mark.parametrize("recipe", ["dan", "paper", "plain"])
def test_quickstart_chooses_nothing_that_has_no_effect(recipe, tmp_path):
    config = _config(tmp_path, 1, 0, 0, recipe)
    assert list(without_effect(config, unlabeled=config.data.unlabeled_share > 0)) == []
