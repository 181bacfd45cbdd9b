"""The network around the attention head, and its backbones."""

import io
import urllib.error
from unittest.mock import Mock

import pytest
import torch
import torchvision
from torch import nn

import dan_fast.functional as functional
from dan_fast.core.errors import DanFastError
from dan_fast.nn import DAN, NLCBAM, build_backbone


class TinyBackbone(nn.Module):
    """(B, 3, H, W) to (B, channels, H/8, W/8), with batch norm and a dropout: a state to spoil."""

    def __init__(self, channels=9):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 8, stride=8)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.1)

    def forward(self, images):
        return self.drop(self.norm(self.conv(images)).relu())


def tiny(dropout=0.5, **settings):
    torch.manual_seed(3)
    return DAN(num_classes=6, backbone=TinyBackbone(), image_size=(32, 16), dropout=dropout, **settings)


def images(batch=4, height=32, width=16):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


LABELS = torch.tensor([0, 5, -1, 2])


def test_without_labels_there_is_no_adversary_loss_and_embed_gives_the_attended_feature():
    model = tiny().eval()
    output = model(images())
    assert output.adversary_loss.tolist() == [0] * 4
    torch.testing.assert_close(output.attended, model(images(), LABELS).attended)
    torch.testing.assert_close(model.embed(images()), output.attended)
    assert not torch.allclose(output.attended, output.pooled)


def test_keys_and_gates_part_the_pooled_feature():
    model = tiny().eval()
    output = model(images())
    assert model.key_dim == 6
    assert torch.equal(model.keys(output), output.pooled[:, :6])
    assert torch.equal(model.gate_features(output), output.pooled[:, 6:])


def test_dropout_acts_before_the_classifier_only():
    model = tiny(dropout=0.9).train()
    model.backbone.eval()
    torch.manual_seed(0)
    output, other = model(images(), LABELS), model(images(), LABELS)
    assert torch.equal(output.attended, other.attended) and torch.equal(output.pooled, other.pooled)
    assert not torch.equal(output.logits, other.logits)
    assert not torch.equal(output.adversary_logits, other.adversary_logits)


def test_building_leaves_the_backbone_and_the_random_state_alone():
    backbone = TinyBackbone()
    backbone.drop.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    torch.manual_seed(11)
    model = DAN(num_classes=6, backbone=backbone, image_size=(32, 16))
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert (backbone.training, backbone.norm.training, backbone.drop.training) == (True, True, False)
    assert (model.map_size, model.key_dim, model.attention.positions) == ((4, 2), 6, 8)

    class Dicing(TinyBackbone):
        def forward(self, images):
            return super().forward(images) * torch.rand(1)

    torch.manual_seed(11)
    DAN(num_classes=6, backbone=Dicing(), image_size=(32, 16))
    dicing = torch.rand(3)
    torch.manual_seed(11)
    DAN(num_classes=6, backbone=TinyBackbone(), image_size=(32, 16))
    assert torch.equal(dicing, torch.rand(3))


def test_parameter_groups_part_all_parameters():
    model = tiny()
    groups = model.parameter_groups()
    assert groups["attention"] == [f"attention.{name}" for name in ("wc1", "wc2", "ws1", "ws3", "ws2", "ws4")]
    assert {name.split(".")[0] for name in groups["backbone"]} == {"backbone", "classifier"}
    assert sorted(groups["backbone"] + groups["attention"]) == sorted(dict(model.named_parameters()))


@pytest.mark.parametrize("variant", ["nl_cbam", "cbam", "non_local", "spatial", "none"])
def test_every_attention_gives_the_network_all_of_its_output(variant):
    model = tiny(attention=variant, adversary=variant != "none").double().eval()
    output = model(images().double(), LABELS)
    features = model.backbone(images().double())
    refined, channel, spatial = model.attention(features)
    torch.testing.assert_close(output.attended, refined.mean((2, 3)))
    torch.testing.assert_close(output.pooled, features.mean((2, 3)))
    torch.testing.assert_close(output.channel_attention, channel)
    torch.testing.assert_close(output.spatial_attention, spatial)
    torch.testing.assert_close(output.logits, model.classifier(output.attended))
    torch.testing.assert_close(output.adversary_logits, model.classifier(output.pooled))
    expected = functional.attention_adversary(features, refined, model.classifier.weight, LABELS).loss
    torch.testing.assert_close(output.adversary_loss, expected * model.adversary)
    if variant != "none":
        assert (output.adversary_loss > 0).tolist() == [True, True, False, True]
        loss = output.logits.square().sum()
        grads = torch.autograd.grad(loss, list(model.attention.parameters()), create_graph=True)
        assert all(grad.abs().sum() > 0 for grad in grads)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), model.backbone.conv.weight)[0]
        assert second.abs().sum() > 0


def test_without_an_adversary_labels_change_nothing():
    model = tiny(adversary=False).eval()
    assert model(images(), LABELS).adversary_loss.tolist() == [0] * 4
    assert model.parameter_groups() == {"backbone": [name for name, _ in model.named_parameters()], "attention": []}
    with pytest.raises(ValueError, match="adversary must be False where attention is 'none'"):
        tiny(attention="none")
    with pytest.raises(ValueError, match="^reduction must be a whole number, at least 1, got 1.5$"):
        NLCBAM(24, 6, reduction=1.5)


def test_functional_call_takes_replaced_parameters_twice_differentiably():
    model = tiny().double().eval()
    replaced = {name: (value * 1.5 + 0.01).detach().requires_grad_() for name, value in model.named_parameters()}
    output = torch.func.functional_call(model, replaced, (images().double(), LABELS))
    other = tiny().double().eval()
    with torch.no_grad():
        for name, value in other.named_parameters():
            value.copy_(replaced[name])
    for got, expected in zip(output, other(images().double(), LABELS), strict=True):
        torch.testing.assert_close(got, expected)
    loss = output.adversary_loss.sum() + output.logits.square().sum() + output.adversary_logits.sum()
    leaves = list(replaced.values())
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in second)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adversary_loss_trains_the_shared_classifier_through_its_map():
    model = tiny().eval()
    model(images(), LABELS).adversary_loss.sum().backward()
    rows = model.classifier.weight.grad.abs().sum(dim=1) > 0
    assert rows.tolist() == [True, False, True, False, False, True]
    assert all(p.grad.abs().sum() > 0 for p in model.attention.parameters())


def test_autocast_keeps_features_and_logits_in_float32():
    model = tiny().eval()
    expected = model(images(), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images(), LABELS)
    assert {value.dtype for value in output} == {torch.float32}
    for logits, features in ((output.logits, output.attended), (output.adversary_logits, output.pooled)):
        torch.testing.assert_close(logits, features @ model.classifier.weight.T)
    for got, value in zip(output, expected, strict=True):
        torch.testing.assert_close(got.float(), value, rtol=0.05, atol=0.02)
    sum(value.float().sum() for value in output).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_empty_batch():
    output = tiny().eval()(images(0), LABELS[:0])
    assert output.logits.shape == (0, 6) and output.attended.shape == (0, 9)


@pytest.mark.parametrize("size", [(16, 32), (64, 16), (32, 24)])
def test_another_image_size_is_refused(size):
    with pytest.raises(ValueError, match=r"image_size \(32, 16\) gives \(4, 2\)"):
        tiny().eval()(images(2, *size))


def test_one_image_and_bytes_are_refused():
    with pytest.raises(ValueError, match=r"^images must be \(B, 3, H, W\), got \(3, 32, 16\)$"):
        tiny().eval().embed(images(1)[0])
    with pytest.raises(TypeError, match=r"^images must be floating, .* got torch.uint8$"):
        tiny().eval().embed(images(1).to(torch.uint8))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("style_mixing", "none"),
        ("instance_norm", "none"),
        ("adversary", "false"),
        ("gradient_checkpointing", 1),
    ],
)
def test_words_of_settings_are_no_flags(flag, value):
    also = ' or "auto"' if flag == "instance_norm" else ""
    with pytest.raises(TypeError, match=f"^{flag} must be True or False{also}, got {value!r}$"):
        DAN(4, "resnet18", (32, 16), **{flag: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"image_size": (0, 16)}, "image_size"),
        ({"image_size": 32}, r"image_size must be \(height, width\) in pixels, got 32"),
        ({"image_size": (4, 4)}, "image_size"),
        ({"reduction": 0}, "reduction"),
        ({"weights": "imagenet"}, "weights"),
        ({"backbone": nn.Flatten()}, "backbone"),
        ({"backbone": nn.AvgPool2d(8)}, "backbone must give at least 4 channels"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    accepted = {"num_classes": 6, "backbone": TinyBackbone(), "image_size": (32, 16)}
    with pytest.raises(ValueError, match=message):
        DAN(**(accepted | settings))


@pytest.mark.parametrize(("size", "map_size"), [((128, 64), (4, 2)), ((224, 224), (7, 7))])
def test_resnet18_at_the_usual_sizes(size, map_size):
    model = DAN(num_classes=5, backbone="resnet18", image_size=size).eval()
    assert (model.map_size, model.key_dim, model.backbone.out_channels) == (map_size, 509, 512)
    with torch.no_grad():
        output = model(images(2, *size), torch.tensor([4, -1]))
    assert output.attended.shape == (2, 512) and output.logits.shape == (2, 5)
    assert output.spatial_attention.shape == (2, map_size[0] * map_size[1])
    assert all(value.isfinite().all() for value in output)


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(1)
    model = torchvision.models.resnet18()
    for buffer in (model.bn1.running_mean, model.layer4[1].bn2.running_mean):
        buffer.normal_()
    return model.eval()


def test_weights_of_a_file_are_those_of_the_network(resnet18, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    for weights in (path, str(path)):
        backbone = build_backbone("resnet18", weights).eval()
        with torch.no_grad():
            pooled = backbone(images(1, 64, 32)).mean((2, 3))
            torch.testing.assert_close(resnet18.fc(pooled), resnet18(images(1, 64, 32)))


def test_weights_without_the_counters_of_batch_norm(resnet18, tmp_path):
    path = tmp_path / "old.pth"
    torch.save({k: v for k, v in resnet18.state_dict().items() if "num_batches" not in k}, path)
    assert torch.equal(build_backbone("resnet18", path).conv1.weight, resnet18.conv1.weight)


def damaged(write):
    def save(state, path):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(write(buffer.getvalue()))

    return save


def without(*keys):
    return lambda state, path: torch.save({k: v for k, v in state.items() if k not in keys}, path)


BAD_FILES = {
    "missing: conv1.weight, layer1.0.bn1.bias": without("conv1.weight", "layer1.0.bn1.bias"),
    "missing: conv1.weight, bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var and 95 more": (
        lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path)
    ),
    "of another shape: conv1.weight": lambda state, path: torch.save(
        state | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, path
    ),
    "holds no state dict": lambda state, path: torch.save([1, 2], path),
    "is damaged": damaged(lambda data: data[: len(data) // 2]),
    "damaged or no file of torch.save": damaged(lambda data: b"\xff\xd8 not a state dict"),
    "file of torch.save": lambda state, path: path.touch(),
    "there is no weights file": lambda state, path: path.mkdir(),
    "there is no weights file /": lambda state, path: None,
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_weights_file_that_does_not_fit(resnet18, tmp_path, message):
    path = tmp_path / "weights.pth"
    BAD_FILES[message](dict(resnet18.state_dict()), path)
    with pytest.raises(DanFastError) as raised:
        build_backbone("resnet18", path)
    assert message in str(raised.value) and str(path) in str(raised.value)


def test_weights_file_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"conv1.weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(DanFastError, match="holds other objects than tensors, which are not read"):
        build_backbone("resnet18", tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value"), TimeoutError("slow")]
)
def test_failed_download_says_what_to_do(monkeypatch, error):
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", Mock(side_effect=error))
    with pytest.raises(DanFastError, match=r"download https://\S+resnet18\S+\.pth elsewhere .* path"):
        build_backbone("resnet18", "imagenet")


def test_imagenet_weights_are_loaded(monkeypatch, resnet18):
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda url, **_: resnet18.state_dict())
    assert torch.equal(build_backbone("resnet18", "imagenet").conv1.weight, resnet18.conv1.weight)


@pytest.mark.parametrize("image_size", [(64,), (0, 32), (64, 32, 3)])
def test_an_image_size_is_a_height_and_a_width(image_size):
    with pytest.raises(ValueError, match=r"image_size must be \(height, width\) in pixels"):
        DAN(5, "resnet18", image_size)
