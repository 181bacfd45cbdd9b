"""Commands at which something breaks: one sentence, and nothing lost or half-written."""

import multiprocessing
import time

import pytest

from dan_fast.cli import main
from dan_fast.nn import DAN
from dan_fast.training.checkpoint import load_checkpoint, save_checkpoint

COMMANDS = {
    "evaluate": lambda data, out: ["--targets", data, "--out", str(out / "results.json")],
    "extract": lambda data, out: [data, "--out", str(out / "features.npz")],
    "search": lambda data, out: ["--gallery", data, "--query", data, "--out", str(out)],
}


# Those that read no images by themselves, too.
OF_A_CHECKPOINT = COMMANDS | {
    "export": lambda data, out: ["--out", str(out / "network.onnx")],
    "share": lambda data, out: ["--out", str(out)],
}


@pytest.mark.parametrize("change", ["a setting more", "a setting less", "a tensor more", "another shape"])
@pytest.mark.parametrize("command", OF_A_CHECKPOINT)
def test_a_checkpoint_of_another_version_is_one_sentence(command, change, street, checkpoint, tmp_path, capsys):
    state, other = load_checkpoint(checkpoint), tmp_path / "checkpoint.pt"
    match change:
        case "a setting more":
            state["config"]["model"]["heads"] = 3
        case "a setting less":
            del state["config"]["data"]["image_size"]
        case "a tensor more":
            state["model"]["network.more"] = state["model"]["network.classifier.weight"]
        case "another shape":
            state["model"]["network.classifier.weight"] = state["model"]["network.classifier.weight"][:, :3]
    save_checkpoint(other, {name: value for name, value in state.items() if name != "format"})
    arguments = OF_A_CHECKPOINT[command](str(street), tmp_path / "out")
    assert main([command, *arguments, "--checkpoint", str(other)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"dan-fast: {other} does not fit this version of dan_fast (") and said.count("\n") == 1
    assert said.endswith("): use the version that wrote it, or train again.\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_worker_that_is_killed_is_one_sentence(command, street, checkpoint, tmp_path, capsys, monkeypatch):
    """While the network runs, where PyTorch's signal handler raises."""

    def embed(network: DAN, images: object) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
        # In pieces: one is not cut short where another thread is given the signal.
        for _ in range(600):
            time.sleep(0.1)

    monkeypatch.setattr(DAN, "embed", embed)
    arguments = [*COMMANDS[command](str(street), tmp_path / "out"), "--workers", "2", "--batch_size", "2"]
    assert main([command, *arguments, "--checkpoint", str(checkpoint), "--device", "cpu"]) == 1
    *before, said = capsys.readouterr().err.splitlines()
    assert said.startswith("dan-fast: A process that decodes images has died (DataLoader worker (pid ")
    assert said.endswith("Killed): often memory ran out; free some or have fewer workers.")
    assert before == (["Testing trained features on street ..."] if command == "evaluate" else [])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
