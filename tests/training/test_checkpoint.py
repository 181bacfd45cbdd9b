"""Checkpoints are whole or not there, and what is no checkpoint is refused in one sentence."""

import errno
import os
import resource
import shutil
import signal
import threading
import zipfile
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
import yaml

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import remove_unfinished, write_whole
from dan_fast.training.checkpoint import CheckpointWriter, is_checkpoint, load_checkpoint, save_checkpoint
from dan_fast.training.config import DataConfig, RunConfig, TrainConfig
from dan_fast.training.recipes import over
from dan_fast.training.run_folder import RunFolder
from dan_fast.training.same_training import require_same_training
from dan_fast.training.schedule import step_size
from tests.support.untrained import untrained_checkpoint


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(DanFastError, match=r"checkpoint.pt could not be written \(.*a previous one.*intact"):
            save_checkpoint(path, {"epoch": 2, "weights": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert load_checkpoint(path)["epoch"] == 1
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(DanFastError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")
    for content in (b"hello", b"run:\n  out: x\n", b"u", b"\x80\x02."):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(DanFastError, match="other is truncated or no checkpoint"):
            load_checkpoint(tmp_path / "other")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(DanFastError, match="not a checkpoint of this version"):
        load_checkpoint(tmp_path / "other.pt")


def test_two_that_save_at_once_leave_one_whole_checkpoint(tmp_path):
    """The second begins, and the first ends, while the other one writes."""
    path = tmp_path / "checkpoint.pt"

    def write(stream):
        stream.write(b"first")
        save_checkpoint(path, {"epoch": 2})
        assert load_checkpoint(path)["epoch"] == 2
        stream.write(b", and its end")

    write_whole(path, write)
    assert path.read_bytes() == b"first, and its end"
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_remains_of_killed_ones_are_removed_by_name(tmp_path):
    write_whole(
        tmp_path / "checkpoint.pt", lambda stream: shutil.copy(next(tmp_path.iterdir()), tmp_path / ".x.1.part")
    )
    killed = next(tmp_path.glob(".x*"))
    remove_unfinished(tmp_path, "y")
    assert killed.exists()
    others = tmp_path / ".x.onnx.0a.part"
    others.touch()
    remove_unfinished(tmp_path, "x")
    assert {each.name for each in tmp_path.iterdir()} == {"checkpoint.pt", others.name}
    remove_unfinished(tmp_path, r"x\..*")
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    path, real, synced = tmp_path / "figures.json", os.fsync, []

    def noted(descriptor):
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        synced.append((is_folder or os.fstat(descriptor).st_size, path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    write_whole(path, lambda stream: stream.write(b"[]"))
    assert synced == [(2, False), (True, True)]


@pytest.mark.parametrize("where", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch, where):
    real = getattr(os, where)

    def refuse(what, *more):
        if os.path.isdir(what if where == "open" else f"/proc/self/fd/{what}"):
            raise OSError(errno.EACCES, "Permission denied")
        return real(what, *more)

    monkeypatch.setattr(os, where, refuse)
    save_checkpoint(tmp_path / "checkpoint.pt", {"epoch": 1})
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 1
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_file_system_that_cannot_sync_is_no_error_and_a_disk_that_fails_is(tmp_path, monkeypatch):
    for number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EIO, errno.EDQUOT):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", Mock(side_effect=OSError(number, os.strerror(number))))
            if number in (errno.EIO, errno.EDQUOT):
                with pytest.raises(DanFastError, match="could not be written"):
                    save_checkpoint(tmp_path / "checkpoint.pt", {"number": number})
            else:
                save_checkpoint(tmp_path / "checkpoint.pt", {"number": number})
    assert load_checkpoint(tmp_path / "checkpoint.pt")["number"] == errno.ENOTSUP
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_flipped_byte_is_never_loaded(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"weights": torch.arange(3000.0), "epoch": 3, "random": torch.get_rng_state()}
    save_checkpoint(path, state)
    content, told = path.read_bytes(), 0
    with zipfile.ZipFile(path) as archive:
        inside = [each.header_offset + 100 for each in archive.infolist() if each.file_size > 2000]
    for place in [*inside, *(len(content) * number // 60 for number in range(60))]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            loaded = load_checkpoint(path)
        except DanFastError as error:
            told += 1
            assert "\n" not in str(error) and str(path) in str(error)
            continue
        # Between the parts of an archive there are bytes that mean nothing.
        assert all(torch.equal(torch.as_tensor(loaded[name]), torch.as_tensor(value)) for name, value in state.items())
    assert told >= 50
    path.write_bytes(content[: inside[0] + 300] + b"x" + content[inside[0] + 301 :])
    with pytest.raises(DanFastError, match="is damaged, the checksum of .*data/0 in it does not fit: use another one"):
        load_checkpoint(path)


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.randn(1000), "epoch": 1})
    content = path.read_bytes()
    for keep in (10, *(len(content) * number // 20 for number in range(20)), len(content) * 99 // 100):
        path.write_bytes(content[:keep])
        with pytest.raises(DanFastError, match="checkpoint.pt is truncated or no checkpoint"):
            load_checkpoint(path)


def test_a_damaged_archive_of_weights_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
        start = archive.infolist()[0].header_offset + len(archive.infolist()[0].FileHeader())
    with (tmp_path / "weights.pt").open("r+b") as file:
        file.seek(start)
        file.write(b"\xff")
    assert not is_checkpoint(tmp_path / "weights.pt")


def test_saving_waits_for_the_copy_and_not_for_the_disk(tmp_path, monkeypatch):
    path, slow = tmp_path / "run" / "checkpoint.pt", threading.Event()
    monkeypatch.setattr(os, "fsync", lambda descriptor: slow.wait(60))
    writer, weights = CheckpointWriter(), torch.arange(5.0)
    model = torch.nn.BatchNorm1d(2)
    writer.save(path, {"weights": weights, "nested": [{"same": weights}], "model": model.state_dict(), "epoch": 3})
    # The training goes on with the same tensors.
    weights.zero_()
    assert not writer.is_free() and not path.exists()
    slow.set()
    writer.wait()
    state = load_checkpoint(path)
    assert [each.tolist() for each in (state["weights"], state["nested"][0]["same"])] == [[0, 1, 2, 3, 4]] * 2
    assert [each.name for each in path.parent.iterdir()] == ["checkpoint.pt"]
    assert state["model"]._metadata == model.state_dict()._metadata and state["epoch"] == 3 and writer.is_free()


def test_what_could_not_be_written_beside_the_training_is_told_once(tmp_path, monkeypatch):
    writer, path = CheckpointWriter(), tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})
    for ask in (writer.wait, lambda: writer.save(path, {"epoch": 3}), lambda: [writer.is_free() for _ in range(1000)]):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
            writer.save(path, {"epoch": 2})
            writer._writing.exception()
            with pytest.raises(DanFastError, match=r"could not be written \(No space left on device\)"):
                ask()
        assert writer.is_free() and load_checkpoint(path)["epoch"] == 1


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({"format": "dan_fast checkpoint 1", "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DanFastError, match="truncated or no checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "now", "sentence"),
    [
        (
            (False, 0),
            (True, 1),
            "evaluate_every is 1 here and 0 there; .*choose_epoch_on_target is True here and False",
        ),
        ((False, 1), (True, 1), "choose_epoch_on_target is True here and False there"),
        ((True, 1), (True, 2), "evaluate_every is 2 here and 1 there"),
        ((True, 1), (False, 2), None),
        ((False, 1), (False, 2), None),
    ],
)
def test_an_epoch_is_chosen_among_all_that_were_to_be_evaluated_or_not_at_all(before, now, sentence, tmp_path):
    saved, current = (
        TrainConfig(run=RunConfig(choose_epoch_on_target=choice, evaluate_every=every)).to_dict()
        for choice, every in (before, now)
    )
    with pytest.raises(DanFastError, match=sentence) if sentence else nullcontext():
        require_same_training(saved, current, tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"run": {"log_every": 3, "evaluate_every": 2}}, True),
        ({"data": {"targets": ["other"]}}, False),
        ({"data": {"protocol": "p1"}}, False),
        ({"data": {"root": "elsewhere"}}, False),
        ({"run": {"choose_epoch_on_target": True}}, False),
    ],
)
def test_results_never_stand_beside_settings_that_they_are_not_of(changes, kept, tmp_path):
    """Wherever the run is killed after its settings have been written."""
    settings = {"data": {"targets": ["one"]}, "run": {"out": str(tmp_path)}}
    config = TrainConfig.of_recipe("none", **settings)
    results = tmp_path / "results.json"
    RunFolder(config.run).write_settings(config)
    results.write_text("{}")
    # A version that did not have a setting yet wrote results of its default.
    older = config.to_dict()
    del older["run"]["choose_epoch_on_target"], older["data"]["root"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    config = TrainConfig.of_recipe("none", **over(settings, changes))
    RunFolder(config.run).write_settings(config)
    assert results.exists() == kept
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["targets"] == config.data.targets


def test_results_beside_settings_that_cannot_be_read_are_removed(tmp_path):
    config = TrainConfig(run=RunConfig(out=str(tmp_path)))
    for name in ("config.yaml", "results.json"):
        (tmp_path / name).write_text("[}")
    RunFolder(config.run).write_settings(config)
    assert not (tmp_path / "results.json").exists()


def test_where_a_run_takes_place_may_change_and_what_it_learns_is_refused_by_its_name(tmp_path):
    saved = TrainConfig(data=DataConfig(labeled=["a"], protocol="p1", root="a")).to_dict()
    current = TrainConfig(
        data=DataConfig(labeled="b", workers=7, targets=["t"], protocol="p1", root="b"),
        run=RunConfig(out="elsewhere", resume=True, device="cpu", log_every=3),
    )
    require_same_training(saved, current.to_dict(), tmp_path / "checkpoint.pt")
    for section, name, value in (("optimizer", "epochs", 7), ("run", "precision", "bfloat16"), ("run", "seed", 3)):
        other = over(current.to_dict(), {section: {name: value}})
        said = rf"\({section}.{name} is {value!r} here and {saved[section][name]!r} there\): .* beside it\)"
        with pytest.raises(DanFastError, match=said):
            require_same_training(saved, other, tmp_path / "checkpoint.pt")


def test_what_the_settings_of_an_older_version_leave_to_the_recipe_is_named_as_flags(tmp_path):
    older, current = (TrainConfig.of_recipe(name).to_dict() for name in ("none", "dan"))
    current = {**older, "model": older["model"] | {"feature": current["model"]["feature"], "instance_norm": "auto"}}
    older = {**older, "model": {name: x for name, x in older["model"].items() if name not in ("feature", "reduction")}}
    with pytest.raises(DanFastError, match=r"\(config.yaml beside it, --model.feature attended\) or another run.out"):
        require_same_training(older, current, tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0, 1e-4), (4, 2e-4), (50, 1.35e-3), (51, 1e-3), (200, 1e-3),
        (201, 1e-4), (350, 1e-4), (351, 1e-5), (500, 1e-5),
    ],
)  # fmt: skip
def test_step_sizes_are_those_of_equation_19(t, expected):
    assert step_size(t, epochs=500) == pytest.approx(expected)
    assert step_size(t / 50, epochs=10) == pytest.approx(expected)
    assert step_size(t, epochs=500, scale=3.0) == pytest.approx(3 * expected)


def test_step_sizes_beyond_the_papers_epochs_and_within_an_epoch():
    assert step_size(900, epochs=1000) == pytest.approx(1e-5)
    assert step_size(40, epochs=1000) == pytest.approx(1.1e-3)
    assert step_size(7.9, epochs=500) == step_size(7, epochs=500)


@pytest.mark.parametrize(("done", "epochs"), [(-1, 10), (0, 0)])
def test_impossible_epochs_are_an_error(done, epochs):
    with pytest.raises(ValueError, match="epochs must be positive"):
        step_size(done, epochs)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = untrained_checkpoint(tmp_path / "checkpoint.pt")
    refuse = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr("dan_fast.training.checkpoint.zipfile.ZipFile", refuse)
    with pytest.raises(DanFastError, match=r"checkpoint.pt cannot be read \(Permission denied\); check permissions"):
        load_checkpoint(path)
