"""Exported files: the network's features in a process without dan_fast, what they say of themselves, and refusals."""

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.export.passes import move_to_device_pass

from dan_fast.cli import main
from dan_fast.core.errors import DanFastError
from dan_fast.core.files import alone
from dan_fast.data.images.reading import read_image
from dan_fast.data.images.transforms import resize
from dan_fast.data.samples import Sample
from dan_fast.evaluation import extract_features
from dan_fast.export import Difference, export_network, exporting
from dan_fast.export.formats import METADATA, Run
from dan_fast.export.graph import FeatureGraph
from dan_fast.nn import DAN
from dan_fast.training.build import trained_network
from tests.support import ROOT, in_checkout
from tests.support.pages import texts
from tests.support.refusals import refusal
from tests.support.tiny_training import IMAGE_SIZE, OneConvolution
from tests.support.untrained import untrained_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.compile]

SIZE = (64, 32)
BACKBONES = {"resnet": "resnet18", "cnn": "timm:test_efficientnet", "vit": "timm:test_vit"}
FILES = {"onnx": "uint8", "pt2": "normalized"}
MADE = [("resnet", "onnx"), ("vit", "onnx"), ("vit", "pt2"), ("cnn", "pt2")]
# Runs every file of its folder that ends in the given suffix, on batches of all images, of one and of none.
ELSEWHERE = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(["dan_fast", "timm", *(["torch"] if sys.argv[1] == "onnx" else [])]))
import numpy as np
given = np.load("images.npz")
results = {}
for path in sorted(Path().glob("*." + sys.argv[1])):
    if sys.argv[1] == "onnx":
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        run = lambda images: session.run(None, {"images": images})[0]
    else:
        import torch
        module = torch.export.load(path).module()
        run = lambda images: module(torch.from_numpy(images)).detach().numpy()
    images = given[path.stem]
    results[path.stem] = run(images)
    results[path.stem + " alone"] = run(images[:1])
    results[path.stem + " none"] = run(images[:0])
np.savez("results.npz", **results)
"""


def run_elsewhere(folder: Path, *arguments: str) -> None:
    ran = subprocess.run([sys.executable, "-I", *arguments], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def one_convolution(scale: float = 1.0) -> DAN:
    torch.manual_seed(0)
    network = DAN(3, backbone=OneConvolution(), image_size=IMAGE_SIZE, reduction=2)
    with torch.no_grad():
        network.backbone.conv.weight *= scale
        network.backbone.bn.running_var.uniform_(0.5, 2)
    return network


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files of several sizes and an untrained checkpoint of each backbone."""
    folder, random = tmp_path_factory.mktemp("shelf"), np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(5):
        small = Image.fromarray(random.integers(0, 256, (6, 4, 3), dtype=np.uint8))
        small.resize((30 + 10 * number, 90), Image.BILINEAR).save(folder / f"images/{number}.png")
    for name, backbone in BACKBONES.items():
        untrained_checkpoint(folder / f"{name}.pt", "none", model={"backbone": backbone}, data={"image_size": SIZE})
    return folder


@pytest.fixture(scope="module")
def exported(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind of file, and what a process without dan_fast got of them."""
    folders = {}
    files = sorted((shelf / "images").iterdir())
    for kind, takes in FILES.items():
        folder, given = tmp_path_factory.mktemp(kind), {}
        for name in (name for name, made in MADE if made == kind):
            out, checkpoint = folder / f"{name}.{kind}", shelf / f"{name}.pt"
            command = ["export", "--checkpoint", str(checkpoint), "--out", str(out), "--format", kind, "--input", takes]
            assert main([*command, "--images", str(shelf / "images")]) == 0
            mean, std, interpolation = trained_network(checkpoint)[0].preprocessing
            images = np.stack([resize(SIZE, interpolation)(read_image(file)).numpy() for file in files])
            if takes == "normalized":
                moments = (np.array(value, np.float32).reshape(3, 1, 1) for value in (mean, std))
                images = (images / np.float32(255) - next(moments)) / next(moments)
            given[name] = images
        np.savez(folder / "images.npz", **given)
        run_elsewhere(folder, "-c", ELSEWHERE, kind)
        folders[kind] = folder
    return folders


@pytest.fixture(scope="module")
def wanted(shelf: Path) -> dict[str, torch.Tensor]:
    """The features that evaluation compares, at unit length."""
    samples = [Sample(file, 1, 1) for file in sorted((shelf / "images").iterdir())]
    found = {}
    for name in BACKBONES:
        network, _ = trained_network(shelf / f"{name}.pt")
        features = extract_features(network.embed, samples, SIZE, preprocessing=network.preprocessing).features
        found[name] = F.normalize(features, dim=1)
    return found


@pytest.mark.parametrize(("name", "kind"), MADE)
def test_a_file_gives_the_features_of_evaluation_without_dan_fast(exported, wanted, name: str, kind: str):
    results = np.load(exported[kind] / "results.npz")
    assert np.abs(results[name] - wanted[name].numpy()).max() < 1e-5
    assert np.abs(results[f"{name} alone"] - wanted[name][:1].numpy()).max() < 1e-5
    assert results[f"{name} none"].shape == (0, wanted[name].shape[1])
    # Images that all had the same features would show nothing.
    assert (wanted[name] - wanted[name][0]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "kind"), MADE)
def test_a_file_says_what_it_takes_and_holds_no_operator_or_path_of_ours(exported, shelf, name: str, kind: str):
    file = exported[kind] / f"{name}.{kind}"
    if kind == "onnx":
        model = onnx.load(file)
        says = {each.key: each.value for each in model.metadata_props}
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        assert [each.type.tensor_type.shape.dim[0].dim_param for each in model.graph.input] == ["batch"]
    else:
        extra = {METADATA: ""}
        program = torch.export.load(file, extra_files=extra)
        says = json.loads(extra[METADATA])
        operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert all(operator.startswith(("aten.", "<built-in")) for operator in operators)
    network, _ = trained_network(shelf / f"{name}.pt")
    assert (says["input"], says["height"], says["width"], says["order"]) == (FILES[kind], "64", "32", "RGB")
    assert says["interpolation"] == network.preprocessing.interpolation
    assert tuple(json.loads(says["mean"])) == network.preprocessing.mean
    content = file.read_bytes()
    assert str(ROOT).encode() not in content and sys.prefix.encode() not in content


def test_what_is_no_exported_network_is_not_written_over(tmp_path, capsys):
    checkpoint, other = untrained_checkpoint(tmp_path / "network.pt"), tmp_path / "results.json"
    other.write_text("{}")
    before = checkpoint.read_bytes()
    renamed = Path(shutil.copy(checkpoint, tmp_path / "network.pt2"))
    for file, kind in ((checkpoint, "onnx"), (checkpoint, "pt2"), (other, "pt2"), (renamed, "pt2")):
        said = f"{file} is a file already, and no exported network: name another .{kind} file."
        assert main(["export", "--checkpoint", str(checkpoint), "--out", str(file), "--format", kind]) == 1
        assert capsys.readouterr().err == f"dan-fast: {said}\n"
        assert refusal(export_network, one_convolution(), file, kind) == said
    assert checkpoint.read_bytes() == before and other.read_text() == "{}"


def test_a_program_moves_to_another_device_as_the_page_says(exported):
    program = move_to_device_pass(torch.export.load(exported["pt2"] / "vit.pt2"), "meta")
    images = torch.zeros(3, 3, 64, 32, device="meta")
    assert program.module()(images).shape[0] == 3


def test_an_input_of_another_size_is_refused_with_the_size_wanted(exported):
    session = onnxruntime.InferenceSession(exported["onnx"] / "vit.onnx", providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="images for the following indices\n index: 2 Got: 48 Expected: 64"):
        session.run(None, {"images": np.zeros((1, 3, 48, 32), np.uint8)})
    module = torch.export.load(exported["pt2"] / "vit.pt2").module()
    with pytest.raises(AssertionError, match=r"images.size\(\)\[2\] == 64"):
        module(torch.zeros(1, 3, 48, 32))


def test_the_blocks_of_the_page_run_without_dan_fast(exported, shelf, wanted, tmp_path):
    (tmp_path / "features.onnx").write_bytes((exported["onnx"] / "resnet.onnx").read_bytes())
    blocks = texts(in_checkout("docs/export.md"), "python")
    files = [str(file) for file in sorted((shelf / "images").iterdir())]
    blocked = "import sys\nsys.modules.update(dict.fromkeys(['dan_fast', 'torch', 'timm']))\n"
    check = f"""
images = [np.asarray(Image.open(file)) for file in {files}]
np.save("found.npy", features([resized(image) for image in images]))
"""
    (tmp_path / "page.py").write_text("\n".join([blocked, *blocks, check]))
    run_elsewhere(tmp_path, "page.py")
    cosines = (np.load(tmp_path / "found.npy") * wanted["resnet"].numpy()).sum(axis=1)
    assert cosines.min() > 0.9999


@pytest.mark.parametrize(("precision", "kind"), [("float16", "FLOAT16"), ("int8", "INT8")])
def test_a_smaller_precision_is_near(tmp_path, precision: str, kind: str):
    found = export_network(one_convolution(), tmp_path / "small.onnx", precision=precision)
    assert found.cosine > 0.99 and 1e-5 < found.largest < 0.1 and found.images == 9
    types = {each.data_type for each in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert getattr(onnx.TensorProto, kind) in types


def test_int8_leaves_the_first_convolution_and_those_of_groups_in_float32(tmp_path):
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Conv2d(8, 4, 1)
    network = DAN(2, backbone=torch.nn.Sequential(*layers), image_size=IMAGE_SIZE, attention="none", adversary=False)
    export_network(network, tmp_path / "network.onnx", precision="int8")
    kinds = [node.op_type for node in onnx.load(tmp_path / "network.onnx").graph.node if "Conv" in node.op_type]
    assert kinds == ["Conv", "Conv", "ConvInteger"]


def test_the_remains_of_a_killed_export_go_and_a_second_one_is_told_who_is_at_work(tmp_path):
    out = tmp_path / "network.pt2"
    for name in (out.name, "another.pt2"):
        (tmp_path / f".{name}.0a.part").touch()
    with alone(tmp_path / ".network.pt2.lock"), pytest.raises(DanFastError, match="is in use by process"):
        export_network(one_convolution(), out, "pt2")
    assert not out.exists()
    export_network(one_convolution(), out, "pt2")
    assert {path.name for path in tmp_path.iterdir()} == {out.name, ".another.pt2.0a.part"}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"format": "torchscript"}, "format must be one of onnx, pt2, got 'torchscript'"),
        ({"input": "float"}, "input must be one of uint8, normalized, got 'float'"),
        ({"precision": "fp16"}, "precision must be one of float32, float16, int8, got 'fp16'"),
    ],
)
def test_what_no_file_can_be_is_refused_and_nothing_is_written(tmp_path, setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        export_network(one_convolution(), tmp_path / "network", **{"format": "pt2", **setting})
    with pytest.raises(TypeError, match=r"network must be a dan_fast.nn.DAN, got Linear: hand the part of it"):
        export_network(torch.nn.Linear(2, 3), tmp_path / "network", "pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_network_of_another_floating_type_is_written_in_float32(tmp_path, dtype: torch.dtype):
    assert export_network(one_convolution().to(dtype), tmp_path / "network.pt2", "pt2").largest < 1e-4


def test_the_home_folder_is_where_it_is_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    untraced(monkeypatch)
    export_network(one_convolution(), "~/n.pt2", "pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["n.pt2"]


def test_the_network_stays_as_it_is(tmp_path):
    network = one_convolution()
    network.backbone.bn.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = export_network(network, tmp_path / "network.pt2", "pt2", precision="float16")
    assert found.cosine > 0.999 and found.largest > 1e-5
    assert network.training and not network.backbone.bn.training
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def not_normalised(graph: FeatureGraph, images: torch.Tensor) -> torch.Tensor:
    return F.normalize(graph.network.embed(images / 255), dim=1)


def not_of_unit_length(graph: FeatureGraph, images: torch.Tensor) -> torch.Tensor:
    return graph.network.embed((images / 255 - graph.mean) / graph.std)


def looks_at_values(graph: FeatureGraph, images: torch.Tensor) -> torch.Tensor:
    return images[:, 0, 0, :4].float() if images.sum() > 0 else images[:, 1, 0, :4].float()


@pytest.mark.parametrize(
    ("forward", "precision", "scale", "sentence"),
    [
        (not_normalised, "float32", 1, r"differ from the network's by \d.*more than 1e-04, so .* was not written"),
        (not_of_unit_length, "float32", 1, "differ from the network's by"),
        (looks_at_values, "float32", 1, "cannot be written as pt2 in float32"),
        (None, "float16", 1e7, "gives features that are not finite, so .* was not written"),
    ],
)
def test_a_file_that_is_not_the_network_is_not_written(tmp_path, monkeypatch, forward, precision, scale, sentence):
    out = tmp_path / "network.pt2"
    out.write_bytes(b"of an earlier export")
    if forward is not None:
        monkeypatch.setattr(FeatureGraph, "forward", forward)
    with pytest.raises(DanFastError, match=sentence):
        export_network(one_convolution(scale), out, "pt2", precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt2"]
    assert out.read_bytes() == b"of an earlier export"


def untraced(monkeypatch, change=lambda done, features: features) -> list[int]:
    """Files have no content and are run as their graph, for what is compared; how many images at a time.

    `change` gets the number of images before, and the features.
    """
    counts = []

    def made(network: DAN, format: str, takes: str, precision: str) -> tuple[bytes, Run]:
        graph = FeatureGraph(network, normalises=takes == "uint8")

        def counted(images: torch.Tensor) -> torch.Tensor:
            counts.append(len(images))
            return change(sum(counts[:-1]), graph(images))

        return b"", counted

    monkeypatch.setattr(exporting, "_made", made)
    return counts


def noise(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *IMAGE_SIZE), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [(1, [1]), (8, [7, 1]), (9, [8, 1]), (20, [8, 8, 3, 1]), ([1, 0, 3, 1], [1, 3, 1]), ([2, 12, 0], [2, 11, 1])],
)
def test_each_image_is_compared_once_and_the_last_by_itself(tmp_path, monkeypatch, batches, expected):
    counts = untraced(monkeypatch)
    images = noise(batches) if isinstance(batches, int) else map(noise, batches)
    found = export_network(one_convolution(), tmp_path / "network.pt2", "pt2", images=images)
    assert counts == expected and found.images == sum(expected)


OF_ANOTHER_KIND = r"images must be \(n, 3, \d+, \d+\) of torch.uint8, got \("


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        *((images, OF_ANOTHER_KIND) for images in (noise(2).float(), noise(2)[..., :-1], noise(2)[0])),
        *((images, "images holds no image to compare on") for images in (noise(0), ())),
    ],
)
def test_images_that_do_not_fit_are_named_and_there_is_no_file(tmp_path, monkeypatch, images, sentence):
    untraced(monkeypatch)
    with pytest.raises(ValueError, match=sentence):
        export_network(one_convolution(), tmp_path / "network.pt2", "pt2", input="normalized", images=images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [0, 8, 16])
def test_the_worst_batch_counts_wherever_it_is(tmp_path, monkeypatch, place):
    out, images = tmp_path / "network.pt2", noise(17)

    def found_where(change) -> Difference:
        with monkeypatch.context() as patch:
            untraced(patch, lambda done, features: change(features) if done == place else features)
            return export_network(one_convolution(), out, "pt2", precision="float16", images=images)

    wrong = {0: torch.nan, 8: torch.inf, 16: torch.nan}[place]
    assert "gives features that are not finite" in refusal(found_where, lambda features: features + wrong)
    assert not list(tmp_path.iterdir())
    found = found_where(torch.neg)
    assert found.cosine == pytest.approx(-1, abs=1e-3) and found.largest > 0.5


def test_of_many_batches_few_are_held_at_a_time(tmp_path, monkeypatch):
    untraced(monkeypatch)
    held, most = [], []

    def batch() -> torch.Tensor:
        images = noise(4)
        held.append(weakref.ref(images))
        most.append(sum(each() is not None for each in held))
        return images

    export_network(one_convolution(), tmp_path / "network.pt2", "pt2", images=(batch() for _ in range(12)))
    assert len(held) == 12 and max(most) <= 3


def test_the_command_reads_images_as_they_are_compared(shelf, tmp_path, monkeypatch):
    folder, ahead, read = tmp_path / "images", [], []
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", SIZE[::-1], (12 * number, 0, 0)).save(folder / f"{number}.png")
    monkeypatch.setattr("dan_fast.commands.export.read_image", lambda file: read.append(file) or read_image(file))
    counts = untraced(monkeypatch, lambda done, features: ahead.append(len(read) - done) or features)
    flags = ["--checkpoint", str(shelf / "cnn.pt"), "--format", "pt2", "--out", str(tmp_path / "network.pt2")]
    assert main(["export", *flags, "--images", str(folder)]) == 0
    assert counts == [8, 8, 3, 1] and sorted(read) == sorted(folder.iterdir()) and max(ahead) == 16
    # As a dataset, whose images lie in a folder below and are not all of those there.
    (tmp_path / "manifest.csv").write_text("path,pid,camid,split\nimages/7.png,1,1,query\nimages/5.png,1,2,gallery\n")
    read.clear()
    assert main(["export", *flags, "--images", str(tmp_path)]) == 0
    assert read == [folder / "7.png", folder / "5.png"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--checkpoint", "none.pt"], "none.pt does not exist"),
        (["--images", "no.png"], "There is nothing at no.png, and no file fits it as a pattern;"),
        (["--images", "checkpoint.pt"], "checkpoint.pt cannot be decoded"),
        (["--images", "."], ". holds no image (a file named"),
        (["--format", "pt2", "--precision", "int8"], "use --format onnx"),
        (["--out", "."], ". is a folder: name a file in it."),
        (["--out", "out.onnx"], "out.onnx is to be written as pt2: name it .pt2, or choose format onnx."),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_file(shelf, tmp_path, monkeypatch, capsys, flags, sentence):
    shutil.copy(shelf / "cnn.pt", tmp_path / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--checkpoint", "checkpoint.pt", "--format", "pt2", "--out", "out.pt2", *flags]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_a_package_of_onnx_the_extra_is_named(shelf, tmp_path, monkeypatch, capsys, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "cnn.onnx"
    assert main(["export", "--checkpoint", str(shelf / "cnn.pt"), "--out", str(out)]) == 1
    wanted = f"dan-fast: --format onnx needs {package}, which is not installed: pip install 'dan-fast[export]'\n"
    assert capsys.readouterr().err == wanted and not out.exists()
