"""Checkpoints are whole or not there, and what is no checkpoint is refused in one sentence."""

import resource
import signal

import pytest
import torch

from dan_fast.errors import DanFastError
from dan_fast.training.checkpoint import load_checkpoint, save_checkpoint
from dan_fast.training.config import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    require_same_training,
)
from dan_fast.training.schedule import step_size


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.arange(5.0), "epoch": 3, "nested": {"ids": [1, 2]}})
    state = load_checkpoint(path)
    assert torch.equal(state["weights"], torch.arange(5.0))
    assert state["epoch"] == 3 and state["nested"] == {"ids": [1, 2]}
    assert [each.name for each in path.parent.iterdir()] == ["checkpoint.pt"]


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


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.randn(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(DanFastError, match="checkpoint.pt is truncated or no checkpoint"):
        load_checkpoint(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(DanFastError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(DanFastError, match="truncated or no checkpoint"):
        load_checkpoint(tmp_path / "text.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(DanFastError, match="not a checkpoint of this version"):
        load_checkpoint(tmp_path / "other.pt")


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [b"run:\n  out: x\n", b"u", b"\x80\x02."])
def test_other_files_are_no_checkpoints(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(DanFastError, match="other is truncated or no checkpoint"):
        load_checkpoint(tmp_path / "other")


def test_a_killed_save_leaves_nothing_that_the_next_does_not_take(tmp_path):
    (tmp_path / ".checkpoint.pt.part").write_bytes(b"half of it")
    save_checkpoint(tmp_path / "checkpoint.pt", {"epoch": 1})
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({"format": "dan_fast checkpoint 1", "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DanFastError, match="truncated or no checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
    assert "code ran" not in capsys.readouterr().out


def test_another_configuration_is_refused_by_the_names_that_differ(tmp_path):
    saved = TrainConfig(data=DataConfig(labeled=["a"])).to_dict()
    current = TrainConfig(data=DataConfig(labeled=["b"]), optimizer=OptimizerConfig(epochs=7)).to_dict()
    with pytest.raises(DanFastError, match=r"\(optimizer.epochs is 7 here and 500 there\)"):
        require_same_training(saved, current, tmp_path / "checkpoint.pt")


def test_where_a_run_takes_place_may_change(tmp_path):
    saved = TrainConfig(data=DataConfig(labeled=["a"])).to_dict()
    current = TrainConfig(
        data=DataConfig(labeled="a", workers=7, targets=["t"]),
        run=RunConfig(out="elsewhere", resume=True, device="cpu", log_every=3),
    ).to_dict()
    require_same_training(saved, current, tmp_path / "checkpoint.pt")


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


def test_more_epochs_than_the_paper_stay_at_the_last_step_size():
    assert step_size(900, epochs=1000) == pytest.approx(1e-5)
    assert step_size(40, epochs=1000) == pytest.approx(1.1e-3)


def test_the_step_size_is_constant_within_an_epoch_of_the_full_schedule():
    assert step_size(7.9, epochs=500) == step_size(7, epochs=500)


@pytest.mark.parametrize(("done", "epochs"), [(-1, 10), (0, 0)])
def test_impossible_epochs_are_an_error(done, epochs):
    with pytest.raises(ValueError, match="epochs must be positive"):
        step_size(done, epochs)
