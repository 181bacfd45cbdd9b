"""The training loop on a handful of tiny images: checkpoints, resuming, what is logged, bad input."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml

from dan_fast.core.errors import DanFastError
from dan_fast.data import load_dataset
from dan_fast.data.overlap import image_keys
from dan_fast.data.synthetic import synthesize
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.reporting.curves import plot_curves, read_scalars
from dan_fast.training import DataConfig, Interrupted, Trainer, trained_network
from dan_fast.training.checkpoint import load_checkpoint, save_checkpoint
from dan_fast.training.display import Display
from dan_fast.training.objective import DivergedError
from dan_fast.training.random_numbers import RunRandomNumbers
from dan_fast.training.scalars import Scalars
from dan_fast.training.sources import load_datasets
from tests.support import ROOT
from tests.support.training_runs import IMAGE_SIZE, NoScalars, assert_same_training, config, snapshot, stop_after

pytestmark = pytest.mark.slow

RESUME, ONE_EPOCH = {"resume": True}, {"epochs": 1}


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """The folder of a run of one epoch, to which no test writes."""
    out = tmp_path_factory.mktemp("runs") / "run"
    Trainer(config(images, out, optimizer=ONE_EPOCH)).fit()
    return out


def test_a_checkpoint_holds_which_images_were_trained_on(images, finished):
    trained = [sample for name in ("campus", "mall") for sample in load_dataset(images / name).train]
    assert set(load_checkpoint(finished / "checkpoint.pt")["images"].tolist()) == set(image_keys(trained))


def test_a_run_that_goes_on_under_other_versions_says_so_and_records_both(images, finished, tmp_path, capsys):
    out = tmp_path / "run"
    state = load_checkpoint(finished / "checkpoint.pt")
    (now,) = state["ran_under"]
    assert now["ranks"] == 1
    assert (now["torch"], now["threads"]) == (torch.__version__, torch.get_num_threads()) and now["device"] != "cpu"
    of_run = json.loads((finished / "results.json").read_text())
    assert of_run["ran_under"] == [now]
    assert of_run["fingerprint"] == state["fingerprint"] and of_run["unlabeled_share"] == 1.0
    assert of_run["weights"] == weights_hash(trained_network(finished / "checkpoint.pt")[0])
    older, less = now | {"torch": "2.0.0", "float32": "TF32 in convolutions"}, {"torch": now["torch"]}
    for before, found in (([older], [older, now]), ([now], [now]), ([], [now]), ([less], [less, now])):
        out.mkdir(exist_ok=True)
        save_checkpoint(out / "checkpoint.pt", {**state, "ran_under": before, "ranks": 2})
        trainer = Trainer(config(images, out, optimizer=ONE_EPOCH, run=RESUME))
        trainer.fit()
        results = json.loads((out / "results.json").read_text())
        rounded = {id(older): "TF32 in convolutions, then ", id(less): "not recorded, then "}.get(id(found[0]), "")
        assert results["ran_under"] == found and results["float32"] == f"{rounded}IEEE"
        assert results["ranks"] == 2  # one process evaluates what two have trained
        said = " ".join(capsys.readouterr().out.split())
        assert ("Not all of this run ran alike" in said) == (before == [older])
        of_both = f"torch is {torch.__version__} and was 2.0.0, float32 is IEEE and was TF32 in convolutions."
        assert (of_both in said) == (before == [older])
    trainer._past["ran_under"] = [older, now]
    trainer._save()
    assert load_checkpoint(out / "checkpoint.pt")["ran_under"] == [older, now]


def test_targets_of_one_name_have_names_and_curves_of_their_own(images, tmp_path):
    shutil.copytree(images / "mall", tmp_path / "mall")
    targets = [str(images / "mall"), str(tmp_path / "mall")]
    trainer = Trainer(config(images, tmp_path / "run", data={"targets": targets}, run={"evaluate_every": 1}))
    trainer.epoch, seen = 1, []

    class Seen(NoScalars):
        def add(self, name, value, counts=True):
            seen.append(name)

        def flush(self, step):
            pass

    with Display(1, 0, 1) as display:
        evaluations = trainer._evaluate_if_due(Seen(), display)
    parents = images.name, tmp_path.name
    assert seen == [f"eval/{parent}-mall/{figure}" for parent in parents for figure in ("R1", "mAP", "mINP")]
    assert [each.title for each in evaluations] == [f"{parent}/mall" for parent in parents]
    learnt = {"labeled": [str(images / "campus"), str(tmp_path / "mall")], "unlabeled": [], "targets": targets}
    datasets = load_datasets(DataConfig(**learnt))
    assert [each.name for each in datasets.labeled] == ["campus", f"{tmp_path.name}/mall"]
    # One that was trained on is told apart from a target of its name, which is called as in any other training.
    datasets = load_datasets(DataConfig(labeled=[str(tmp_path / "mall")], targets=[str(images / "mall")]))
    assert [each.name for each in (*datasets.labeled, *datasets.targets)] == [f"{tmp_path.name}/mall", "mall"]


def test_a_run_says_what_its_device_makes_of_float32(images, tmp_path, capsys):
    def finished(name: str, **run) -> tuple[str, dict]:
        trainer = Trainer(config(images, tmp_path / name, run=run))
        trainer.epoch = trainer.config.optimizer.epochs
        trainer.fit()
        return " ".join(capsys.readouterr().out.split()), json.loads((tmp_path / name / "results.json").read_text())

    torch.set_float32_matmul_precision("medium")
    try:
        printed, results = finished("float32")
        half, _ = finished("bfloat16", precision="bfloat16")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "Float32 on cpu: bfloat16 in matrix products, as torch.backends has it." in printed
    assert (results["precision"], results["float32"]) == ("float32", "bfloat16 in matrix products")
    assert "Float32 on" not in half


CBAM = {"model": {"attention": "cbam", "adversary": False}}


@pytest.mark.parametrize(
    "change",
    [
        {"meta": {"procedure": "daml1"}},
        {"meta": {"order": 2}},
        CBAM | {"meta": {"procedure": "daml1"}},
        CBAM | {"meta": {"procedure": "daml2"}},
        CBAM | {"meta": {"order": 2}},
        {"data": {"unlabeled": []}},
        {"data": {"unlabeled_share": 0.0}},
        {"memory": {"gates": "features"}},
        CBAM | {"run": {"precision": "bfloat16"}},
        {"run": {"precision": "bfloat16"}},
    ],
    ids=str,
)
@pytest.mark.usefixtures("sound_bfloat16")
def test_every_procedure_trains(images, tmp_path, change):
    trainer = Trainer(config(images, tmp_path / "run", optimizer=ONE_EPOCH, **change))
    before = snapshot(trainer.model)
    trainer.fit()
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert any(name.startswith("network.") for name in moved)
    assert (trainer.model.memory is None) == (change.get("data") is not None)


def test_a_run_stopped_by_ctrl_c_resumes_bit_for_bit(images, tmp_path, capfd):
    handler = signal.getsignal(signal.SIGINT)
    # Few checkpoints: the one of the interruption must not change what comes after it.
    Trainer(config(images, tmp_path / "whole")).fit()
    trainer = Trainer(config(images, tmp_path / "parts"))
    step = trainer.train_iteration
    # The same trainer goes on, then another one.
    for stop in (1, 3):
        trainer.train_iteration = step
        stop_after(trainer, stop)
        # What a caller draws between making the trainer and starting it must not shift the dropout.
        torch.rand(3)
        with pytest.raises(Interrupted, match=f"iteration {stop}"):
            trainer.fit()
        words = "Stopping when this iteration or evaluation is done; Ctrl-C again stops at once"
        assert capfd.readouterr().err.count(words) == 1
    last = Trainer(config(images, tmp_path / "parts", run=RESUME))
    torch.rand(3)
    last.fit()
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_trainer_that_was_cut_off_in_an_iteration_does_not_go_on(images, tmp_path, monkeypatch):
    trainer = Trainer(config(images, tmp_path / "run", optimizer=ONE_EPOCH))
    step = trainer.optimizer.step
    with monkeypatch.context() as cut:
        # The second Ctrl-C, when weights have moved and the iteration is not counted.
        again = Mock(side_effect=KeyboardInterrupt)
        cut.setattr(trainer.optimizer, "step", lambda: step() or signal.raise_signal(signal.SIGINT) or again())
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    with pytest.raises(DanFastError, match="in the middle of an iteration: begin anew from .*run.resume auto"):
        trainer.fit()
    Trainer(config(images, tmp_path / "run", optimizer=ONE_EPOCH, run={"resume": "auto"})).fit()
    Trainer(config(images, tmp_path / "whole", optimizer=ONE_EPOCH)).fit()
    assert_same_training(tmp_path / "whole", tmp_path / "run")


def test_what_is_no_training_to_continue_is_one_sentence(images, finished, tmp_path):
    state = load_checkpoint(finished / "checkpoint.pt")
    (weight, *_) = state["model"]
    renamed = {f"{name}.old" if name == weight else name: value for name, value in state["model"].items()}
    for wrong, sentence in (
        ({name: value for name, value in state.items() if name != "optimizer"}, "holds a network to evaluate, such as"),
        ({**state, "model": renamed}, f"does not fit this version of dan_fast .*{weight}"),
    ):
        save_checkpoint(tmp_path / "run" / "checkpoint.pt", wrong)
        with pytest.raises(DanFastError, match=f"checkpoint.pt {sentence}"):
            Trainer(config(images, tmp_path / "run", optimizer=ONE_EPOCH, run=RESUME))


def test_the_folder_and_the_seed_are_taken_as_flags_take_them(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Trainer(config(images, "~/run", optimizer=ONE_EPOCH)).folder.path == tmp_path / "run"
    with pytest.raises(DanFastError, match=f"run.seed is {2**64}: it must be below 2\\^64"):
        Trainer(config(images, tmp_path / "other", run={"seed": 2**64}))


def test_a_second_run_in_the_same_folder_is_refused(images, finished):
    before = (finished / "checkpoint.pt").read_bytes()
    may_start = "may start from its weights, --model.weights .*checkpoint.pt"
    for changes, sentence in (
        ({}, "already holds a run"),
        ({"optimizer": {"epochs": 2}, "run": RESUME}, f"optimizer.epochs is 2 here and 1 there.*{may_start}"),
        ({"meta": {"eta": 2.0}, "run": RESUME}, f"meta.eta is 2.0 here and 1.0 there.*{may_start}"),
        # Whose weights do not fit.
        ({"model": {"instance_norm": True}, "run": RESUME}, r"model.instance_norm is .* or another run\.out\.$"),
    ):
        with pytest.raises(DanFastError, match=sentence):
            Trainer(config(images, finished, **{"optimizer": ONE_EPOCH, **changes}))
    assert (finished / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["config.yaml", "results.json"])
def test_files_that_no_run_has_written_are_not_written_over(images, tmp_path, name):
    run = config(images, tmp_path / "run", optimizer=ONE_EPOCH)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine: 1  # with a comment\n")
    for resume in (False, "auto"):
        run.run.resume = resume
        with pytest.raises(DanFastError, match=f"{name} is not of a run, which would write over it: rename"):
            Trainer(run)
    assert (tmp_path / "run" / name).read_text() == "mine: 1  # with a comment\n"
    (tmp_path / "run" / name).unlink()
    # What a run leaves is no obstacle: results alone, and settings where it stopped before its first checkpoint.
    (tmp_path / "run/results.json").write_text('{"epoch": "epoch 1 of 1", "targets": []}')
    Trainer(run).folder.write_settings(run)
    (tmp_path / "run/results.json").write_text("{}")
    Trainer(run)


def test_what_no_weight_shows_is_in_the_checkpoint_too(images, tmp_path):
    trainer = Trainer(config(images, tmp_path / "run"))
    trainer.meta_step.competition.adversary_streak = 7
    trainer.feedback = torch.tensor([3, 1]), torch.tensor([0, 2])
    trainer.skipped = {"b.jpg", "a.jpg"}
    trainer.epoch, trainer.iteration = 1, 0
    trainer._save()
    resumed = Trainer(config(images, tmp_path / "run", run=RESUME))
    assert resumed.meta_step.competition.adversary_streak == 7
    assert [each.tolist() for each in resumed.feedback] == [[3, 1], [0, 2]]
    assert resumed.skipped == {"a.jpg", "b.jpg"} and (resumed.epoch, resumed.iteration) == (1, 0)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"run": RESUME}, "checkpoint.pt does not exist, so there .*: set run.resume to auto or false, or run.out"),
        ({"data": {"labeled": []}}, "data.labeled is empty"),
        ({"data": {"targets": "TRAIN ONLY/mall"}}, "mall .* has neither query and gallery nor test images"),
        *(({"run": {"device": device}}, device) for device in ("gpu", "cuda:99", "mps")),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    images, tmp_path, monkeypatch, sections, sentence
):
    monkeypatch.chdir(tmp_path)
    synthesize(Path("TRAIN ONLY"), ["mall"], identities=2, image_size=IMAGE_SIZE, test_fraction=0.0)
    with pytest.raises(DanFastError, match=sentence):
        Trainer(config(images, tmp_path / "run", **sections))
    assert not (tmp_path / "run").exists()
    # Neither are results of other targets that are there.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    settings = yaml.safe_dump(config(images, tmp_path / "run").to_dict())
    (tmp_path / "run" / "config.yaml").write_text(settings)
    with pytest.raises(DanFastError, match=sentence):
        Trainer(config(images, tmp_path / "run", **sections))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "results.json"}
    assert (tmp_path / "run" / "config.yaml").read_text() == settings


def test_a_diverged_run_says_so_and_keeps_its_checkpoint(images, tmp_path):
    run = {"checkpoint_every": 1, "log_every": 1000}
    setup = config(
        images, tmp_path / "run", optimizer={"epochs": 1, "lr_scale": 1e9}, data={"iterations": 500}, run=run
    )
    with pytest.raises(DanFastError, match=r"diverged at iteration \d+ \(.* not finite\).*lower optimizer.lr_scale"):
        Trainer(setup).fit()
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert state["epoch"] + state["iteration"] >= 1
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
    [step], _ = read_scalars(tmp_path / "run")["train/loss/total"]
    assert step == state["iteration"], "the losses that led to it are logged"


def test_a_new_run_does_not_show_the_results_of_one_whose_checkpoint_is_gone(images, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    trainer = Trainer(config(images, tmp_path / "run", optimizer=ONE_EPOCH))
    assert (tmp_path / "run" / "results.json").exists()
    trainer.train_iteration = lambda *_: pytest.fail("stop here")
    with pytest.raises(pytest.fail.Exception, match="stop here"):
        trainer.fit()
    assert not (tmp_path / "run" / "results.json").exists()


def test_weights_that_are_not_finite_never_reach_the_checkpoint(images, finished):
    trainer = Trainer(config(images, finished, optimizer=ONE_EPOCH, run=RESUME))
    before = trainer.folder.checkpoint.read_bytes()
    with torch.no_grad():
        next(trainer.model.network.backbone.buffers())[0] = float("inf")
    with pytest.raises(DivergedError, match="weights are not finite"):
        trainer._save()
    assert trainer.folder.checkpoint.read_bytes() == before


@pytest.mark.parametrize(("share", "trained"), [(0.0, False), (1.0, True)])
def test_gates_are_trained_where_batches_have_unlabelled_images(images, tmp_path, share, trained):
    """Without, weight decay would be all that moves them."""
    given = {"data": {"unlabeled_share": share}, "loss": {"labeled_embedding": 0.5}}
    trainer = Trainer(config(images, tmp_path / "run", **given))
    gates = list(trainer.model.memory.parameters())
    assert gates and {gate.requires_grad for gate in gates} == {trained}


def test_a_batch_that_cannot_be_normalised_is_told_apart_from_divergence(images, tmp_path):
    with pytest.raises(DanFastError, match="cannot go on at iteration 0: batch norm needs .*: raise data.batch_size"):
        Trainer(config(images, tmp_path / "run", data={"batch_size": 2, "unlabeled_share": 0.0})).fit()


# What to watch in training, and the range that it and the mean over a window cannot leave.
WATCHED = {
    "competition/ties": (0, 1),
    "competition/backbone_frozen": (0, 1),
    "train/logit_norm/attention": (1e-6, math.inf),
    "train/logit_norm/adversary": (1e-6, math.inf),
    "attention/spatial_spread": (0, 1),
    "memory/slots_unlabeled": (1, 5),
    "memory/cleared_a_sample": (0, 5),
    "pseudo/purity": (0, 1),
    "pseudo/fed_back_right": (0, 0),  # persons of their own
    "train/loss/labeled_embedding": (0, math.inf),
    **{name: (0, 1) for name in ("train/accuracy/attention", "train/accuracy/adversary", "competition/attention_wins")},
    **{f"memory/{gate}": (0, 1) for gate in ("sigma_alpha", "sigma_alpha_unlabeled", "beta")},
    "memory/slots_labeled": (1, 7),
    **{f"{part}/loss/{loss}": (-math.inf, math.inf) for part in ("train", "test") for loss in ("total", "adversary")},
    **{f"{part}/loss/classification": (0, math.inf) for part in ("train", "test")},
}


@pytest.mark.parametrize("gates", ["parameters", "features"])
def test_what_to_watch_is_in_the_event_file_and_in_the_picture(images, tmp_path, gates):
    trainer = Trainer(config(images, tmp_path / "run", loss={"labeled_embedding": 0.5}, memory={"gates": gates}))
    assert (trainer.training_set.true_ids >= 0).all() and (trainer.training_set.true_labels == -1).all()
    trainer.fit()
    scalars = read_scalars(tmp_path / "run")
    assert set(WATCHED) <= set(scalars)
    for tag, (lowest, highest) in WATCHED.items():
        assert ((scalars[tag][1] >= lowest) & (scalars[tag][1] <= highest)).all(), tag
    assert max(scalars["train/loss/labeled_embedding"][1]) > 0
    assert plot_curves(tmp_path / "run", tmp_path / "curves.png").is_file()


def log(out: Path, values: dict[int, dict[str, float]]) -> None:
    """What a run writes down: step -> name -> value."""
    scalars = Scalars(out / "tensorboard")
    for step, of_step in values.items():
        for name, value in of_step.items():
            scalars.add(name, value)
        scalars.flush(step)
    scalars.close()


def test_a_name_that_is_no_utf_8_is_logged_with_its_bytes_written_out(tmp_path):
    log(tmp_path, {1: {f"eval/{os.fsdecode(bytes([103, 246]))}/mAP": 0.5}})
    assert list(read_scalars(tmp_path)) == ["eval/g\\udcf6/mAP"]


def test_a_new_run_has_no_curve_of_an_attempt_that_left_no_checkpoint(tmp_path):
    log(tmp_path, {5: {"train/loss/total": 1e9, "memory/slots_labeled": 40.0}})
    log(tmp_path, {10: {"train/loss/total": 2.0}})
    (steps, values), *others = read_scalars(tmp_path).values()
    assert (list(steps), list(values), others) == ([10], [2.0], [])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # what was logged before is kept


def test_a_stopped_run_has_logged_all_that_it_did(images, tmp_path):
    parts = config(images, tmp_path / "parts", optimizer=ONE_EPOCH, data={"iterations": 5}, run={"log_every": 5})
    trainer = Trainer(parts)
    stop_after(trainer, 3)
    with pytest.raises(Interrupted):
        trainer.fit()
    Trainer(replace(parts, run=replace(parts.run, resume=True))).fit()
    whole = config(images, tmp_path / "whole", optimizer=ONE_EPOCH, data={"iterations": 5}, run={"log_every": 1})
    Trainer(whole).fit()
    (steps, means), (_, each) = (read_scalars(tmp_path / name)["train/loss/total"] for name in ("parts", "whole"))
    assert list(steps) == [3, 5]
    assert list(means) == pytest.approx([each[:3].mean(), each[3:].mean()], rel=1e-5)


def test_the_memory_is_logged_in_every_window_that_an_epoch_ends_too(images, tmp_path):
    windows = {"data": {"iterations": 3}, "optimizer": {"epochs": 2}, "run": {"log_every": 2}}
    Trainer(config(images, tmp_path / "run", **windows)).fit()
    found = read_scalars(tmp_path / "run")
    for name in ("train/loss/total", "memory/slots_labeled", "memory/slots_unlabeled"):
        assert list(found[name][0]) == [2, 3, 4, 6], name


FULL_DISK = """
import resource, sys, threading
from pathlib import Path
from dan_fast.core.errors import DanFastError
from dan_fast.training.scalars import Scalars

hook = threading.excepthook
scalars = Scalars(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    for step in range(10_000):
        scalars.add("train/loss/total", 1.0)
        scalars.flush(step)
except DanFastError as error:
    print(error)
scalars.close()
assert threading.excepthook is hook
"""


def test_a_disk_that_is_full_for_tensorboards_thread_leaves_no_traceback(tmp_path):
    ran = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"Scalars could not be written to {tmp_path} (File too large): make room")


def test_a_full_disk_while_logging_is_one_sentence(tmp_path, monkeypatch):
    scalars = Scalars(tmp_path / "tensorboard")
    scalars.add("train/loss/total", 1.0)
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(scalars._writer, "flush", full)
    monkeypatch.setattr(scalars._writer, "close", full)
    with pytest.raises(DanFastError, match="tensorboard .No space left on device.: make room"):
        scalars.flush(1)
    scalars.close()
    monkeypatch.undo()
    scalars.close()  # before its folder goes


def test_fit_works_outside_the_main_thread(images, tmp_path):
    trainer = Trainer(config(images, tmp_path / "run", optimizer=ONE_EPOCH))
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert trainer.epoch == 1


def test_a_second_thread_that_would_draw_from_the_same_generators_is_refused(images, tmp_path):
    first, second = (Trainer(config(images, tmp_path / name, optimizer=ONE_EPOCH)) for name in ("one", "two"))
    step, refused = first.train_iteration, []

    def while_the_first_trains(*given):
        with pytest.raises(DanFastError, match="^Another thread of this process trains, .* in a process of its own.$"):
            second.fit()
        refused.append(second.epoch)
        step(*given)

    first.train_iteration = while_the_first_trains
    first.fit()
    assert refused and set(refused) == {0}
    second.fit()
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_a_process_that_was_forked_while_another_trains_has_generators_of_its_own():
    numbers = RunRandomNumbers(torch.device("cpu"), 5, torch.get_rng_state(), 0)
    with numbers.in_process():
        child = os.fork()
        if child == 0:
            try:
                with numbers.in_process():
                    os._exit(0)
            finally:
                os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
