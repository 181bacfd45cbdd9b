"""Instance norm in early blocks: what is normalised how, where it stands, and which backbones have no place for it."""

import pytest
import torch
from torch import nn

from dan_fast.core.errors import DanFastError
from dan_fast.nn import DAN, HalfInstanceNorm

HALF = {"attention": "none", "adversary": False, "instance_norm": True}


def norms(network: DAN) -> dict[str, HalfInstanceNorm]:
    return {name: module for name, module in network.backbone.named_modules() if isinstance(module, HalfInstanceNorm)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_act", [True, False])
def test_half_of_the_channels_is_normalised_image_by_image(training: bool, with_act: bool) -> None:
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    batch_norm = BatchNormAct2d(6) if with_act else nn.BatchNorm2d(6)
    for parameter in batch_norm.parameters():
        nn.init.normal_(parameter)
    batch_norm.running_mean.normal_()
    norm, x = HalfInstanceNorm(batch_norm).train(training), torch.randn(4, 6, 5, 3)
    variance, mean = torch.var_mean(x[:, :3], (2, 3), correction=0, keepdim=True)
    expected = (x[:, :3] - mean) / (variance + batch_norm.eps).sqrt()
    expected = expected * batch_norm.weight[:3, None, None] + batch_norm.bias[:3, None, None]
    out = norm(x)
    torch.testing.assert_close(out[:, :3], expected.relu() if with_act else expected)
    torch.testing.assert_close(out[:, 3:], batch_norm(x)[:, 3:])


def test_an_activation_of_each_channel_is_refused() -> None:
    norm = nn.BatchNorm2d(4)
    norm.act = nn.PReLU(4)
    with pytest.raises(ValueError, match="an activation that is the same for all channels"):
        HalfInstanceNorm(norm)
    norm.act = nn.PReLU()
    assert HalfInstanceNorm(norm)(torch.randn(2, 4, 5, 3)).shape == (2, 4, 5, 3)
    for other in (nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4)):
        with pytest.raises(ValueError, match="norm must be a BatchNorm2d with affine=True"):
            HalfInstanceNorm(other)


def test_a_channels_last_map_has_a_channels_last_derivative() -> None:
    x = torch.randn(3, 6, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    out = HalfInstanceNorm(nn.BatchNorm2d(6))(x)
    (grad_x,) = torch.autograd.grad(out, x, torch.randn_like(x))
    assert all(map_.is_contiguous(memory_format=torch.channels_last) for map_ in (out, grad_x))


def test_derivatives_of_both_orders() -> None:
    torch.manual_seed(0)
    norm = HalfInstanceNorm(nn.BatchNorm2d(4).double())
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x) and torch.autograd.gradgradcheck(norm, x)


def test_moments_of_a_half_precision_network_do_not_overflow() -> None:
    torch.manual_seed(0)
    norm, x = HalfInstanceNorm(nn.BatchNorm2d(4)).eval(), (1000 * torch.randn(2, 4, 16, 8)).half()
    expected = norm(x.float())[:, :2]
    torch.testing.assert_close(norm.half()(x)[:, :2].float(), expected, rtol=0.01, atol=0.01)


def test_moments_are_float32_under_autocast() -> None:
    torch.manual_seed(0)
    norm, x = HalfInstanceNorm(nn.BatchNorm2d(4)), 100 + torch.randn(2, 4, 16, 8)
    expected = norm(x.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("backbone", "places"),
    {
        "resnet18": [f"layer{stage}.{block}.bn1" for stage in (1, 2) for block in (0, 1)],
        "timm:resnet18": [f"model.layer{stage}.{block}.bn1" for stage in (1, 2) for block in (0, 1)],
        "timm:tf_efficientnet_lite0": ["model.blocks.0.0.bn1", "model.blocks.1.0.bn1", "model.blocks.1.1.bn1"],
        "timm:regnety_002": ["model.s1.b1.conv1.bn", "model.s2.b1.conv1.bn"],
        "timm:cspresnet50": [f"model.stages.{stage}.blocks.{block}.conv1.bn" for stage in (0, 1) for block in range(3)],
    }.items(),
)
def test_it_stands_first_in_each_early_block_with_the_same_weights(backbone: str, places: list[str]) -> None:
    torch.manual_seed(0)
    without = DAN(3, backbone, (64, 64), **HALF | {"instance_norm": False})
    torch.manual_seed(0)
    network = DAN(3, backbone, (64, 64), **HALF)
    assert list(norms(network)) == places
    assert not norms(without) and network.instance_norm and not without.instance_norm
    for a, b in zip(network.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)
    # Whatever an image's contrast, those channels are the same.
    norm, taken = next(iter(norms(network).values())), []
    norm.register_forward_hook(lambda module, inputs, output: taken.append(output[:, : output.shape[1] // 2]))
    norm.register_forward_pre_hook(lambda module, inputs: (500 * inputs[0] + 1 if taken else 100 * inputs[0],))
    images = torch.randn(2, 3, 64, 64)
    network.eval().backbone(images), network.backbone(images)
    torch.testing.assert_close(*taken, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backbone", ["timm:test_vit", "timm:test_convnext", "timm:mobileone_s0"])
def test_a_backbone_whose_early_blocks_have_no_first_batch_norm_is_refused(backbone: str) -> None:
    """The last one adds the maps of branches, of which one is the block's input normalised."""
    with pytest.raises(DanFastError, match="early blocks of a convolutional network.*set model.instance_norm to false"):
        DAN(3, backbone, (64, 32), **HALF)


@pytest.mark.parametrize(("backbone", "has"), [("resnet18", True), ("timm:test_vit", False)])
def test_auto_takes_it_where_there_is_a_place(backbone: str, has: bool) -> None:
    network = DAN(3, backbone, (64, 32), **HALF | {"instance_norm": "auto"})
    assert (network.instance_norm, bool(norms(network))) == (has, has)
    assert not DAN(3, nn.Conv2d(3, 8, 3), (64, 32), **HALF | {"instance_norm": "auto"}).instance_norm


def test_a_module_is_left_to_its_owner() -> None:
    with pytest.raises(ValueError, match="instance_norm serves a backbone given by name; put HalfInstanceNorm into"):
        DAN(3, nn.Conv2d(3, 8, 3), (64, 32), **HALF)
