"""A network as a folder: the same features bit for bit, what is refused in one sentence, and the Hub's own path."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import alone
from dan_fast.core.preprocessing import Preprocessing
from dan_fast.nn import DAN
from dan_fast.nn.hub import FILES, WEIGHTS, read_folder
from tests.support import ROOT

SIZE = (64, 32)
OTHER = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")


def images() -> torch.Tensor:
    return torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(5))


def network(backbone: str | torch.nn.Module = "timm:test_resnet", **arguments) -> DAN:
    """Its batch norm has seen images."""
    made = DAN(5, backbone, SIZE, **arguments)
    made.train()(images())
    return made.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "net"
    network().save_pretrained(folder)
    return folder


NETWORKS = [
    ("timm:test_resnet", {"feature": "pooled", "attention": "none", "adversary": False, "style_mixing": True}),
    ("timm:test_efficientnet", {"attention": "cbam", "reduction": 3, "dropout": 0.1, "adversary_reach": "attention"}),
    ("timm:test_vit", {"gradient_checkpointing": True}),
    ("resnet18", {"instance_norm": True}),
]


@pytest.mark.parametrize(("backbone", "arguments"), NETWORKS, ids=[name for name, _ in NETWORKS])
def test_the_features_are_the_same_bit_for_bit(backbone: str, arguments: dict, tmp_path: Path, monkeypatch):
    first = network(backbone, **arguments).to(memory_format=torch.channels_last)
    first.preprocessing = OTHER
    state = torch.get_rng_state()
    first.save_pretrained(tmp_path / "a")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read by pickle"))
    again = DAN.from_pretrained(tmp_path / "a").to(memory_format=torch.channels_last)
    assert torch.equal(torch.get_rng_state(), state) and not any(module.training for module in again.modules())
    assert torch.equal(again.embed(images()), first.embed(images()))
    assert again.preprocessing == OTHER and again.feature == first.feature
    again.save_pretrained(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(FILES)
    for name in FILES[:2]:  # which hold every argument
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    written = json.loads((tmp_path / "a/config.json").read_text())["network"]
    assert written == {**written, **arguments, "backbone": backbone, "num_classes": 5, "image_size": [64, 32]}


def edited(without: str = "", backbone: object = "timm:test_resnet", **changes: object):
    """config.json with these changes, without an entry, or of another backbone."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["network"]["backbone"] = backbone
        config |= changes
        config.pop(without, None)
        path.write_text(json.dumps(config))

    return edit


def flipped(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def of_another_network(folder: Path) -> None:
    """The weights, and their checksum, of a network with other attention."""
    network(reduction=2).save_pretrained(folder.parent / "other")
    weights = Path(shutil.copy(folder.parent / "other/model.safetensors", folder)).read_bytes()
    edited(weights_sha256=hashlib.sha256(weights).hexdigest())(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "There is no folder .*net, and the Hugging Face Hub did not give it .HFValidationError: Repo"),
        (lambda folder: (folder / "config.json").unlink(), "net has no config.json: name a folder that"),
        (lambda folder: (folder / "model.safetensors").unlink(), "net has no model.safetensors: name a folder that"),
        (cut("config.json"), "config.json is damaged or not of a network of dan_fast"),
        (edited(format="bert"), "config.json is damaged or not of a network of dan_fast"),
        (edited(format="dan_fast network 2", dan_fast="9.9"), "'dan_fast network 2' of dan_fast 9.9, .*install that"),
        (edited(network={"backbone": "resnet18"}), "does not describe a network by .*num_classes.*: install"),
        (edited(backbone="resnet19"), "no backbone 'resnet19'"),
        (edited(backbone=18), "does not describe a network by .*num_classes.*: install"),
        (edited(without="results"), "config.json lacks results: copy the folder again"),
        (edited(preprocessing={}), "config.json does not describe a network .'mean'.: copy"),
        (edited(preprocessing=OTHER._replace(mean=(0.5,)).to_dict()), "mean .0.5. and std .* are not those of red"),
        (edited(preprocessing=OTHER._replace(mean=(124.0, 116.0, 104.0)).to_dict()), "are not those of red, green and"),
        (edited(preprocessing=OTHER._replace(std=(0.2, 0.0, 0.2)).to_dict()), "are not those of red, green and blue"),
        (edited(preprocessing=OTHER._replace(mean="abc").to_dict()), "are not those of red, green and blue"),
        (edited(preprocessing=OTHER._replace(interpolation="lanczos").to_dict()), "'lanczos' is none of bilinear, bic"),
        (cut("model.safetensors"), "model.safetensors is damaged, cut short or .* its checksum does not fit"),
        (flipped, "model.safetensors is damaged, cut short or .* its checksum does not fit"),
        (of_another_network, "do not fit DAN of timm:test_resnet .of another shape: attention.wc1"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(saved: Path, tmp_path: Path, damage, sentence: str):
    folder = Path(shutil.copytree(saved, tmp_path / "net"))
    damage(folder)
    with pytest.raises(DanFastError, match=sentence) as raised:
        DAN.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_a_file_is_no_folder(saved: Path):
    with pytest.raises(DanFastError, match="model.safetensors is a file: name the folder .*training.trained_network"):
        DAN.from_pretrained(saved / "model.safetensors")
    with pytest.raises(DanFastError, match="README.md is no folder to write to .Not a directory.: choose another one"):
        network().save_pretrained(saved / "README.md")


def test_what_is_refused_leaves_a_folder_as_it_was(saved: Path, tmp_path: Path, monkeypatch):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "config.json").write_text('{"format": "of mine"}')
    with pytest.raises(DanFastError, match="notes holds something else .* such as config.json: choose an empty or"):
        network().save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    module = torch.nn.Conv2d(3, 6, 4, stride=4)
    with pytest.raises(DanFastError, match="around a module cannot be built again .* give DAN its backbone by name"):
        network(module).save_pretrained(tmp_path / "new")
    for wrong, sentence in (
        (tmp_path, "not JSON serializable"),
        (float("nan"), "training is not plain JSON .* finite"),
    ):
        with pytest.raises(TypeError, match=sentence):
            network().save_pretrained(tmp_path / "new", training={"lr": [wrong]})
    assert not (tmp_path / "new").exists()

    kept = Path(shutil.copytree(saved, tmp_path / "kept"))
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("dan_fast.core.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(DanFastError, match="model.safetensors could not be written .No space left"):
            network("timm:test_vit").save_pretrained(kept)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    network("timm:test_vit").save_pretrained(kept)
    assert read_folder(kept)[0]["network"]["backbone"] == "timm:test_vit"


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("backbone", torch.compile),
        ("backbone", torch.nn.DataParallel),
        ("classifier", lambda before: torch.nn.Linear(before.in_features, 9)),
        ("classifier.weight", lambda before: torch.nn.Parameter(before[:3].detach())),
        ("dropout", lambda before: torch.nn.Identity()),
    ],
)
def test_a_network_that_was_changed_does_not_replace_one_that_can_be_read(
    saved: Path, tmp_path: Path, part: str, change
):
    kept, changed = Path(shutil.copytree(saved, tmp_path / "kept")), network()
    module, _, name = part.rpartition(".")
    owner = changed.get_submodule(module)
    setattr(owner, name, change(getattr(owner, name)))
    how = "(it differs in (backbone|class)|'(DataParallel|Identity)' object has no attribute)"
    with pytest.raises(DanFastError, match=f"cannot be built again from config.json, {how}.*: take parts out"):
        changed.save_pretrained(kept)
    assert DAN.from_pretrained(kept).embed(images()).equal(DAN.from_pretrained(saved).embed(images()))


def test_numbers_of_numpy_and_the_home_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    first = DAN(np.int64(5), "timm:test_resnet", SIZE, reduction=torch.tensor(3)).eval()
    first.save_pretrained("~/net")
    assert DAN.from_pretrained("~/net").embed(images()).equal(first.embed(images()))
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


@pytest.mark.slow
def test_a_first_save_that_is_killed_is_made_good_by_the_next(tmp_path: Path):
    """Killed before each of the renames, of the lock's holder, config.json, model.safetensors and README.md."""
    code = f"""
import os, torch, dan_fast.nn
torch.set_num_threads(1)  # a pool of threads does not outlive a fork
network, replace, done = dan_fast.nn.DAN(5, "timm:test_resnet", {SIZE}), os.replace, []
def killed(source, target):
    if len(done) == last:
        os.kill(os.getpid(), 9)
    done.append(target)
    replace(source, target)
os.replace = killed
for last in range(4):
    process = os.fork()
    if process == 0:
        network.save_pretrained(os.path.join({str(tmp_path)!r}, str(last)))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["-9"] * 4
    for last, folder in enumerate(sorted(tmp_path.iterdir())):
        assert len(set(FILES) & {path.name for path in folder.iterdir()}) == max(0, last - 1)
        ours = network()
        ours.save_pretrained(folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
        assert torch.equal(DAN.from_pretrained(folder).embed(images()), ours.embed(images()))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_save_without_room_leaves_what_was_there(saved: Path, tmp_path: Path, monkeypatch, file: str, earlier: bool):
    folder = tmp_path / "net"
    if earlier:
        shutil.copytree(saved, folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*")}

    def full(descriptor: int) -> None:
        if f".{file}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left")

    monkeypatch.setattr("dan_fast.core.files._sync", full)
    with pytest.raises(DanFastError, match=f"{file} could not be written .No space left"):
        network().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # Of a new folder nothing stays where a file cannot be put in its place, and an earlier network where its weights
    # cannot be replaced.
    replace = os.replace

    def in_use(source: Path, target: Path) -> None:
        if Path(target).name == (file if not earlier else WEIGHTS):
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.undo()
    monkeypatch.setattr("dan_fast.core.files.os.replace", in_use)
    with pytest.raises(DanFastError, match="could not be written .Permission denied"):
        network().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_weights_of_something_else_are_not_overwritten(tmp_path: Path):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(DanFastError, match="holds something else .* such as model.safetensors"):
        network().save_pretrained(tmp_path)


def test_a_second_process_that_saves_into_a_folder_is_told_who_does(tmp_path: Path):
    with alone(tmp_path / ".lock"), pytest.raises(DanFastError, match=f"is in use by process {os.getpid()} on"):
        network().save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_without_huggingface_hub_a_folder_is_written_and_read_and_an_id_says_what_to_install(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    ours = network()
    ours.save_pretrained(tmp_path)
    DAN.from_pretrained(tmp_path)
    remedy = r"the Hugging Face Hub needs huggingface_hub: pip install 'dan-fast\[hub\]'$"
    with pytest.raises(DanFastError, match=f"^There is no folder me/net, and fetching it from {remedy}"):
        DAN.from_pretrained("me/net")
    with pytest.raises(DanFastError, match=f"^Pushing to {remedy}"):
        ours.push_to_hub("me/net")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    """A cache as huggingface_hub keeps it, into which a stand-in for HfApi uploads."""
    cache = tmp_path / "cache"

    class Api:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            if not repo_id.startswith("me/"):
                raise PermissionError("403 Forbidden. You may not.\nRequest 7")
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id: str, folder_path: Path, **_: object) -> str:
            repository, commit = cache / f"models--{repo_id.replace('/', '--')}", "c" * 40
            shutil.copytree(folder_path, repository / "snapshots" / commit)
            (repository / "refs").mkdir()
            (repository / "refs/main").write_text(commit)
            return f"https://hub/{repo_id}/commit/{commit}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    return cache


def test_what_is_pushed_is_fetched_by_its_id(hub: Path):
    first = network()
    assert first.push_to_hub("me/net", training={"method": "mine |\nyours"}, private=True).startswith(
        "https://hub/me/net/"
    )
    options = {"cache_dir": hub, "local_files_only": True}
    again = DAN.from_pretrained("me/net", **options)
    assert torch.equal(again.embed(images()), first.embed(images()))
    (folder,) = hub.glob("models--me--net/snapshots/*")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "dan_fast" and 'from_pretrained("me/net")' in card.text
    assert "\n- method: mine \\| yours\n" in card.text
    with pytest.raises(DanFastError, match="There is no folder me/other, and the .* give it .LocalEntryNotFoundError"):
        DAN.from_pretrained("me/other", **options)
    with pytest.raises(DanFastError, match="you/net could not be pushed .*.PermissionError: 403 Forbidden.: check"):
        first.push_to_hub("you/net")
    with pytest.raises(DanFastError, match="around a module cannot be built again"):
        network(torch.nn.Conv2d(3, 6, 4, stride=4)).push_to_hub("me/module")
    with pytest.raises(TypeError, match="colour"):
        DAN.from_pretrained("me/net", colour="red", **options)
