"""`mix_styles`, and a network whose early maps take a part of their style from other images."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dan_fast import functional, reference
from dan_fast.core.errors import DanFastError
from dan_fast.nn import DAN, StyleMixing
from tests.support.attention_problems import assert_agree, two_derivatives

F64 = torch.float64
PARTNERS, SHARE = torch.tensor([1, 2, 0, 3]), torch.tensor([0.0, 1.0, 0.3, 0.6], dtype=F64)


def maps(dtype: torch.dtype = F64) -> Tensor:
    scale = torch.tensor([1.0, 5.0, 0.2, 2.0], dtype=F64)[:, None, None, None]
    return (scale * torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=F64) + scale).to(dtype)


def style(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean((2, 3)), features.std((2, 3))


def test_means_and_deviations_lie_between_those_of_the_two_images(impl):
    features = maps()
    mixed = impl.mix_styles(features, PARTNERS, SHARE)
    for own, partner, got in zip(style(features), (x[PARTNERS] for x in style(features)), style(mixed), strict=True):
        expected = SHARE[:, None] * own + (1 - SHARE[:, None]) * partner
        assert torch.allclose(got, expected, rtol=1e-4)  # EPSILON beside the variance is 1e-6
    # What is left of the image is its pattern.
    own, kept = (((x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)) for x in (features, mixed))
    assert torch.allclose(own, kept, atol=1e-4)


def test_a_share_of_one_leaves_an_image_as_it_is(impl):
    features = maps()
    mixed = impl.mix_styles(features, PARTNERS, torch.ones(4, dtype=F64))
    assert torch.allclose(mixed, features, rtol=1e-14, atol=1e-14)
    assert torch.equal(functional.mix_styles(maps(torch.float32), PARTNERS, torch.ones(4)), maps(torch.float32))


def test_values_and_derivatives_agree():
    def mixed(impl):
        return lambda features, share: [impl.mix_styles(features, PARTNERS, share)]

    found, expected = (two_derivatives(mixed(impl), [maps(), SHARE]) for impl in (functional, reference))
    assert_agree(found, expected)
    assert all(each.any() for each in expected)


def test_of_no_images_gradients_are_0(impl):
    leaves = [torch.zeros(shape, requires_grad=True) for shape in ((0, 3, 2, 2), (0,))]
    mixed = impl.mix_styles(leaves[0], torch.zeros(0, dtype=torch.int64), leaves[1])
    assert [each.shape for each in torch.autograd.grad(mixed.sum(), leaves)] == [each.shape for each in leaves]


def test_the_statistics_carry_no_gradient():
    features = maps().requires_grad_()
    functional.mix_styles(features, PARTNERS, SHARE)[0].sum().backward()
    deviations = (features.detach().var((2, 3)) + 1e-6).sqrt()
    ratio = deviations[1] / deviations[0]  # image 0 takes the whole style of image 1
    assert torch.allclose(features.grad[0], ratio[:, None, None].expand(3, 5, 2))
    assert features.grad[1:].abs().sum() == 0


def test_the_statistics_carry_no_tangents():
    features = maps()
    along = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=F64)

    def directional(impl) -> Tensor:
        return torch.func.jvp(lambda x: impl.mix_styles(x, PARTNERS, SHARE).pow(3).sum(), (features,), (along,))[1]

    leaf = maps().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.mix_styles(leaf, PARTNERS, SHARE).pow(3).sum(), leaf)
    for impl in (functional, reference):
        torch.testing.assert_close(directional(impl), (gradient * along).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("deviation", [1.0, 0.01, 0.0])
def test_precision_and_layout_are_kept(dtype: torch.dtype, deviation: float):
    features = maps(F64)
    features[0, 0] = 1 + deviation * (features[0, 0] - 1)
    features = features.to(dtype).contiguous(memory_format=torch.channels_last)
    mixed = functional.mix_styles(features, PARTNERS, SHARE)
    assert mixed.dtype == dtype and mixed.is_contiguous(memory_format=torch.channels_last)
    exact = reference.mix_styles(features.to(F64), PARTNERS, SHARE)
    # One rounding of the result, and of sums in float32; a channel without a deviation is scaled by thousands.
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    assert torch.allclose(mixed.to(F64), exact, rtol=eps / 2, atol=2e-3 if deviation == 0 else 1e-4)


@pytest.mark.parametrize(
    "change, kind, words",
    [
        ({"features": torch.zeros(4, 3, 1, 1)}, ValueError, "two positions or more"),
        ({"features": torch.zeros(4, 3, 5)}, ValueError, r"features must be \(B, C, H, W\)"),
        ({"partners": PARTNERS.int()}, TypeError, "partners must be an int64 tensor"),
        ({"partners": PARTNERS[:2]}, ValueError, r"partners must be \(4,\)"),
        ({"partners": PARTNERS + 1}, ValueError, r"partners must be images 0\.\.3, got values from 1 to 4"),
        ({"share": SHARE.long()}, TypeError, "share must be a floating tensor"),
        ({"share": SHARE[:1]}, ValueError, r"share must be \(4,\)"),
    ],
)
def test_bad_input(impl, change: dict, kind: type, words: str):
    with pytest.raises(kind, match=words):
        impl.mix_styles(**{"features": maps(), "partners": PARTNERS, "share": SHARE} | change)


def tiny(**settings) -> DAN:
    torch.manual_seed(0)
    return DAN(5, "resnet18", (64, 32), dropout=0.0, style_mixing=True, **settings)


def seen_by(network: DAN, layer: nn.Module, images: Tensor, lenders: int = 0) -> Tensor:
    """What `layer` is given while the network trains on `images`."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(images, lenders=lenders)
    handle.remove()
    return seen[0]


def test_lenders_go_no_further_than_the_early_stages():
    network, images = tiny(), torch.rand(6, 3, 64, 32)
    output = network(images, torch.tensor([0, 1, 2, 3]), lenders=2)
    assert output.logits.shape == (4, 5) and output.adversary_loss.shape == (4,)
    assert seen_by(network, network.backbone.layer2, images, lenders=2).shape[0] == 6
    assert seen_by(network, network.backbone.layer3, images, lenders=2).shape[0] == 4


@pytest.mark.parametrize("lenders", [7, -1])
def test_lenders_are_images_of_the_batch(lenders: int):
    network = tiny()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=f"lenders must be from 0 to 6, the number of images, got {lenders}"):
        network(torch.rand(6, 3, 64, 32), lenders=lenders)
    assert all(map(torch.equal, network.state_dict().values(), before.values()))


def replica_of(module: nn.Module) -> nn.Module:
    """As `nn.DataParallel` makes it for a further device, with the parameters themselves."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        replica._modules[name] = replica_of(child)
    replica._parameters = dict(module._parameters)
    return replica


def test_a_replica_of_data_parallel_mixes_no_styles():
    network, images = tiny(), torch.rand(6, 3, 64, 32)
    for lenders in (2, 0):
        with pytest.raises(RuntimeError, match="in a replica of DataParallel.* or with DistributedDataParallel"):
            replica_of(network)(images, lenders=lenders)
    assert replica_of(network)(images, lenders=None).pooled.shape[0] == 6
    assert network(images, lenders=2).pooled.shape[0] == 4


def test_styles_come_from_the_lenders_and_from_them_alone():
    network = tiny()
    # Frozen statistics: the images of a batch meet in the style mixing and nowhere else.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.track_running_stats = 0.0, True
            module.eval()
    images = torch.rand(40, 3, 64, 32)

    def given(lent: Tensor) -> Tensor:
        torch.manual_seed(3)
        return seen_by(network, network.backbone.layer2, torch.cat([images, lent]), lenders=8)[:40]

    dark, bright = given(torch.zeros(8, 3, 64, 32)), given(torch.full((8, 3, 64, 32), 9.0))
    changed = (dark - bright).abs().flatten(1).sum(1) > 1e-3
    assert 8 <= int(changed.sum()) <= 32  # one half on average
    torch.manual_seed(3)
    alone = network.backbone.layer1(
        network.backbone.maxpool(network.backbone.relu(network.backbone.bn1(network.backbone.conv1(images))))
    )
    assert torch.allclose(dark[~changed], alone[~changed], atol=1e-5)


def test_without_lenders_the_batch_lends_to_itself():
    network, images = tiny(), torch.rand(6, 3, 64, 32)
    torch.manual_seed(1)
    one = network(images).pooled
    torch.manual_seed(1)
    same = network(images).pooled
    assert torch.equal(one, same) and one.shape[0] == 6
    torch.manual_seed(2)
    assert not torch.equal(network(images).pooled, one)


def test_nothing_is_mixed_in_evaluation():
    network, images = tiny().eval(), torch.rand(6, 3, 64, 32)
    plain = DAN(5, "resnet18", (64, 32)).eval()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.embed(images), plain.embed(images))
    with pytest.raises(ValueError, match="lenders lend their style in training mode"):
        network(images, lenders=2)


def test_a_copy_mixes_by_itself():
    network = tiny()
    twin, images = copy.deepcopy(network), torch.rand(6, 3, 64, 32)
    assert twin(images, lenders=2).pooled.shape[0] == 4
    assert network(images, lenders=1).pooled.shape[0] == 5


@pytest.mark.parametrize("name", ["timm:test_efficientnet", "timm:test_resnet"])
def test_models_of_timm(name: str):
    network = DAN(5, name, (64, 32), style_mixing=True)
    assert network(torch.rand(6, 3, 64, 32), lenders=2).pooled.shape[0] == 4


def test_more_lenders_than_a_batch_has_images_to_spare():
    mixing = StyleMixing([early := nn.Conv2d(3, 4, 3)])
    for lenders in (-1, 1.5):
        with pytest.raises(ValueError, match=f"lenders is {lenders}; it must be None"), mixing.within(lenders):
            pass
    for lenders in (3, 4):
        with pytest.raises(ValueError, match=f"lenders is {lenders} of a batch of 3 images"), mixing.within(lenders):
            early(torch.rand(3, 3, 5, 5))
    with mixing.within(lenders=2):
        assert early(torch.rand(3, 3, 5, 5)).shape[0] == 1
    assert early(torch.rand(3, 3, 5, 5)).shape[0] == 3  # nothing is mixed any more


def test_stages_may_be_given_once_and_are_modules_that_give_maps():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    mixing = StyleMixing(network.children())
    with mixing.within(lenders=2):
        assert network(torch.rand(5, 3, 9, 9)).shape[0] == 3
    with pytest.raises(ValueError, match="stages holds no module: name those of the backbone"):
        StyleMixing([])
    with pytest.raises(TypeError, match="stages must hold modules of the backbone, got str"):
        StyleMixing(["layer1"])
    mixing = StyleMixing([pairs := nn.LSTM(4, 5)])
    with mixing.within(), pytest.raises(TypeError, match="but a LSTM gave a tuple: name a module inside of it"):
        pairs(torch.rand(2, 3, 4))


def test_half_of_the_images_keep_their_style_and_the_others_a_share_of_beta(monkeypatch: pytest.MonkeyPatch):
    shares: list[Tensor] = []
    monkeypatch.setattr("dan_fast.nn.styles.mix_styles", lambda maps, partners, share: shares.append(share) or maps)
    mixing = StyleMixing([early := nn.Identity()])
    torch.manual_seed(0)
    with mixing.within(lenders=1000):
        early(torch.zeros(5000, 1, 1, 2))
    (share,) = shares
    assert (share[4000:] == 1).all(), "lenders stay as they are"
    # Of s from Beta(0.1, 0.1) the mean is 1/2, and that of s (1 - s) is 1/24.
    assert share[:4000].mean() == pytest.approx(0.75, abs=0.03)
    assert (share - share.square())[:4000].mean() == pytest.approx(1 / 48, abs=0.004)


def test_a_block_inside_of_another_one_ends_with_it():
    mixing = StyleMixing([early := nn.Conv2d(3, 4, 3)])
    images = torch.rand(5, 3, 5, 5)
    with mixing.within(lenders=2):
        with mixing.within(None):
            assert early(images).shape[0] == 5
        assert early(images).shape[0] == 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_maps_that_were_mixed_are_not_computed_again(use_reentrant: bool):
    mixing = StyleMixing([early := nn.Conv2d(3, 4, 3)])
    images = torch.rand(5, 3, 5, 5, requires_grad=True)
    with mixing.within():
        mixed = checkpoint(early, images, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="not be the same when activation checkpointing computes the maps again"):
        mixed.sum().backward()
    checkpoint(early, images, use_reentrant=use_reentrant).sum().backward()  # without a style there is no draw
    assert images.grad is not None


def test_who_cannot_mix_says_so():
    # A ViT; stages that timm names and the model has not; a stage whose map is added to that of a whole batch; blocks
    # whose maps have their channels last, where the last map has them first.
    for name in ("timm:test_vit", "timm:hrnet_w18_small", "timm:legacy_xception", "timm:samvit_base_patch16"):
        with pytest.raises(DanFastError, match="Styles are mixed in the early maps of a convolutional network"):
            DAN(5, name, (64, 32), style_mixing=True)
    with pytest.raises(DanFastError, match="set model.gradient_checkpointing to false"):
        tiny(gradient_checkpointing=True)
    with pytest.raises(ValueError, match="style_mixing serves a backbone given by name"):
        DAN(5, nn.Conv2d(3, 8, 3), (64, 32), style_mixing=True)
