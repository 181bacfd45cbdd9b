"""The attentions of Fig. 6: their equations, the module, and a training with each of the figure's models."""

import math

import pytest
import torch
from torch import nn

import dan_fast.functional.attention.variants as functional
import dan_fast.reference.attention_variants as reference
from dan_fast.cli import main
from dan_fast.core.errors import DanFastError
from dan_fast.core.types import CONVOLUTION, AttentionVariantWeights, NLCBAMWeights
from dan_fast.data import Split
from dan_fast.functional import attention_head, nl_cbam
from dan_fast.nn import NLCBAM
from dan_fast.nn.attention import VARIANTS
from dan_fast.reporting.curves import read_scalars
from dan_fast.reporting.heatmaps import plot_attention
from dan_fast.training import ModelConfig, TrainConfig, trained_network
from dan_fast.training.build import initial_network
from tests.support import attention_problems
from tests.support.attention_problems import assert_agree, two_derivatives
from tests.support.head_problems import assert_varies_alike
from tests.support.steps import tiny_network, training_model

F64 = torch.float64

FORMS = pytest.mark.parametrize("ops", [reference, functional], ids=["reference", "functional"])
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
# B, B+SA, B+NL, B+NL-CBAM, B+CBAM+AAN, B+NL-CBAM*+AAN and the full model.
FIGURE_6 = {
    "B": ["--model.attention", "none", "--model.adversary", "false"],
    "B+SA": ["--model.attention", "spatial", "--model.adversary", "false"],
    "B+NL": ["--model.attention", "non_local", "--model.adversary", "false"],
    "B+NL-CBAM": ["--model.adversary", "false"],
    "B+CBAM+AAN": ["--model.attention", "cbam"],
    "B+NL-CBAM*+AAN": ["--model.reduction", "1"],
    "B+NL-CBAM+AAN": [],
}


def problem(variant, shape=(3, 5, 4, 2), seed=0, dtype=F64):
    """Random (features, weights, cam_weight, labels); the second label is -1."""
    features, nl_cbam, cam_weight, labels = attention_problems.problem(shape, classes=4, dtype=dtype, seed=seed)
    conv = torch.randn(CONVOLUTION, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
    given = nl_cbam._asdict() | {"conv": conv}
    return features, AttentionVariantWeights(**{name: given[name] for name in VARIANTS[variant]}), cam_weight, labels


def derivatives(op, features, weights, *rest):
    names = [name for name, weight in weights._asdict().items() if weight is not None]

    def of_tensors(features, *tensors):
        given = dict(zip(names, tensors, strict=False))
        return op(features, AttentionVariantWeights(**given), *tensors[len(names) :])

    return two_derivatives(of_tensors, [features, *(getattr(weights, name) for name in names), *rest])


@FORMS
def test_the_spatial_attention_of_cbam_by_hand(ops):
    # Means [[1, 2]], maxima [[3, 2]]. The kernel's middle row reads the left, the own and the right position.
    features = torch.tensor([[[[3.0, 2.0]], [[-1.0, 2.0]]]], dtype=F64)
    conv = torch.zeros(1, 2, 7, 7, dtype=F64)
    conv[0, 0, 3, 2:5] = torch.tensor([0.1, 0.2, 0.4])
    conv[0, 1, 3, 2:5] = torch.tensor([-0.3, 0.5, 0.05])
    conv[0, :, 2] = conv[0, :, 4] = 100.0  # above and below there is nothing but zeros
    logits = [0.2 * 1 + 0.4 * 2 + 0.5 * 3 + 0.05 * 2, 0.1 * 1 + 0.2 * 2 - 0.3 * 3 + 0.5 * 2]
    expected = torch.tensor([logits], dtype=F64).sigmoid()
    refined, channel, spatial = ops.attention_variant(features, AttentionVariantWeights(conv=conv))
    torch.testing.assert_close(spatial, expected)
    assert channel.tolist() == [[1.0, 1.0]]
    torch.testing.assert_close(refined, features * expected.view(1, 1, 1, 2))


@FORMS
def test_cbam_attends_to_positions_after_channels(ops):
    features, weights, _, _ = problem("cbam")
    both = ops.attention_variant(features, weights)
    channels = ops.attention_variant(features, AttentionVariantWeights(wc1=weights.wc1, wc2=weights.wc2))
    positions = ops.attention_variant(channels.refined, AttentionVariantWeights(conv=weights.conv))
    nothing = nl_cbam(features, NLCBAMWeights(weights.wc1, weights.wc2, *problem("non_local")[1][2:6]))
    torch.testing.assert_close(both.refined, positions.refined)
    torch.testing.assert_close(both.spatial_attention, positions.spatial_attention)
    torch.testing.assert_close(both.channel_attention, nothing.channel_attention)
    assert torch.equal(channels.spatial_attention, torch.ones(3, 8, dtype=F64))


@FORMS
def test_with_the_parts_of_nl_cbam_it_is_nl_cbam(ops):
    features, weights, cam, labels = problem("nl_cbam")
    assert_agree(ops.attention_variant(features, weights), nl_cbam(features, NLCBAMWeights(*weights[:6])))
    head = ops.attention_variant_head(features, weights, cam, labels)
    assert_agree(head, attention_head(features, NLCBAMWeights(*weights[:6]), cam, labels))


@FORMS
def test_non_local_attention_alone_reads_the_map_itself(ops):
    features, weights, _, _ = problem("non_local")
    # Zero weights make A_C one half, so twice the map gives X' = X.
    zero = torch.zeros(2, 5, dtype=F64)
    expected = nl_cbam(2 * features, NLCBAMWeights(zero, zero.T.contiguous(), *weights[2:6]))
    got = ops.attention_variant(features, weights)
    torch.testing.assert_close(got.spatial_attention, expected.spatial_attention)
    torch.testing.assert_close(got.refined, expected.refined)


@EVERY_VARIANT
@pytest.mark.parametrize("shape", [(3, 5, 4, 2), (1, 1, 1, 1), (2, 3, 1, 9), (2, 4, 8, 8)], ids=str)
def test_functional_is_the_reference(variant, shape):
    arguments = problem(variant, shape)
    for name in ("attention_variant", "attention_variant_head"):
        rest = arguments[2:] if name.endswith("head") else ()
        got, expected = (derivatives(getattr(ops, name), *arguments[:2], *rest) for ops in (functional, reference))
        assert_agree(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["cbam", "non_local", "spatial"])
def test_derivatives_are_those_of_finite_differences(variant):
    features, weights, cam, labels = problem(variant, (2, 3, 2, 2))
    names = VARIANTS[variant]
    leaves = [leaf.requires_grad_() for leaf in (features, cam, *(getattr(weights, name) for name in names))]

    def head(features, cam, *values):
        weights = AttentionVariantWeights(**dict(zip(names, values, strict=True)))
        output = functional.attention_variant_head(features, weights, cam, labels)
        return tuple(each for each in output if each.requires_grad)

    assert torch.autograd.gradcheck(head, leaves)
    assert torch.autograd.gradgradcheck(head, leaves, atol=1e-4)


def test_no_attention_is_pooling_and_no_sample_is_no_row():
    features, weights, cam, labels = problem("none")
    head = functional.attention_variant_head(features, weights, cam, labels)
    assert torch.equal(head.attended, head.pooled) and head.adversary_loss[1] == 0 and head.adversary_loss[0] > 0
    for variant in VARIANTS:
        _, weights, cam, labels = problem(variant)
        for ops in (functional, reference):
            used = [each.clone().requires_grad_() for each in weights if each is not None]
            given = dict(zip(VARIANTS[variant], used, strict=True))
            empty = ops.attention_variant_head(features[:0], AttentionVariantWeights(**given), cam, labels[:0])
            assert [tuple(each.shape) for each in empty] == [(0, 5), (0, 5), (0, 5), (0, 8), (0,)]
            for gradient in torch.autograd.grad(empty.attended.sum(), used) if used else ():
                assert not gradient.any()


@EVERY_VARIANT
def test_layout_half_precision_and_autocast(variant):
    arguments = problem(variant, dtype=torch.float32)
    expected = functional.attention_variant_head(*arguments)
    refined = functional.attention_variant(*arguments[:2]).refined
    last = arguments[0].contiguous(memory_format=torch.channels_last)
    assert_agree(functional.attention_variant_head(last, *arguments[1:]), expected, 1e-6)
    got = functional.attention_variant(last, arguments[1]).refined
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_agree([got], [refined], 1e-6)

    half = problem(variant, dtype=torch.bfloat16)
    for each, wide in zip(functional.attention_variant_head(*half), expected, strict=True):
        assert each.dtype == torch.bfloat16
        torch.testing.assert_close(each.float(), wide, rtol=0.05, atol=0.05)
    if variant != "none":
        half_attention = functional.attention_variant_head(*half).spatial_attention
        assert_varies_alike(half_attention, expected.spatial_attention)
    # As in training: the map of the backbone in half precision, weights in float32.
    rounded = arguments[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = functional.attention_variant_head(rounded, *arguments[1:])
    assert_agree(got, functional.attention_variant_head(rounded.float(), *arguments[1:]), 1e-6)


@FORMS
def test_weights_that_do_not_fit_are_named(ops):
    features, weights, cam, labels = problem("cbam")
    conv, spatial = weights.conv, problem("non_local")[1]
    with pytest.raises(TypeError, match="weights must be an AttentionVariantWeights, got NLCBAMWeights"):
        ops.attention_variant(features, NLCBAMWeights(*spatial[:6]))
    for wrong, sentence in {
        AttentionVariantWeights(wc1=weights.wc1): "all of wc1, wc2 or none, wc2 is missing",
        spatial._replace(ws3=None, ws4=None): "all of ws1, ws3, ws2, ws4 or none, ws3, ws4 is missing",
        spatial._replace(conv=conv): "conv or ws1, ws3, ws2, ws4 but not both",
        AttentionVariantWeights(conv=conv[:, :1]): r"weights.conv must have shape \(1, 2, 7, 7\)",
        weights._replace(wc2=weights.wc2[1:]): r"weights.wc2 must have shape \(5, 2\)",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            ops.attention_variant_head(features, wrong, cam, labels)
    with pytest.raises(TypeError, match="weights.conv is torch.float32 but features is torch.float64"):
        ops.attention_variant(features, AttentionVariantWeights(conv=conv.float()))
    with pytest.raises(ValueError, match="labels must be -1 or a class"):
        ops.attention_variant_head(features, weights, cam, labels + 9)


def far_apart(positions: int, few: int) -> tuple[torch.Tensor, NLCBAMWeights]:
    """A map and weights with A = 1 at the first position alone and B = C = 1 at `few` positions, else all 0."""
    # The maps g and m that enter the bottlenecks are (1, 0, ...) and (1, 1, ...), wc = 0 halves the channels.
    features = torch.zeros(1, 2, positions, 1, dtype=F64)
    features[0, :, 0], features[0, :, 1, 0] = 2, torch.tensor([2.0, -2.0])
    read = torch.eye(2, positions, dtype=F64)
    a = torch.full((positions,), -60.0, dtype=F64)
    b = a.clone()
    a[0], b[:few] = 60, 60
    zero = torch.zeros(1, 2, dtype=F64)
    ws2, ws4 = torch.stack([a, b - a], dim=1), torch.stack([b, 0 * b], dim=1)
    return features, NLCBAMWeights(zero, zero.T.contiguous(), read, read, ws2, ws4)


def test_how_far_from_flat_non_local_attention_can_be():
    def spread(values):
        return values.amax(dim=1) - values.amin(dim=1)

    # docs/fidelity.md states these.
    largest = max(float(spread(nl_cbam(*far_apart(49, few)).spatial_attention)) for few in range(1, 49))
    assert largest == pytest.approx(0.2448, abs=5e-5) and largest < math.tanh(1 / 4)
    for seed in range(20):
        features, weights, _, _ = problem("non_local", (8, 6, 7, 7), seed)
        # Of X' = X, computed once more as the bound is stated in terms of A, B and C.
        g, m = features.mean(1).flatten(1), features.amax(1).flatten(1)
        a = ((g @ weights.ws1.T).relu() @ weights.ws2.T).sigmoid()
        b = ((m @ weights.ws1.T).relu() @ weights.ws2.T).sigmoid()
        c = ((g @ weights.ws3.T).relu() @ weights.ws4.T).sigmoid()
        got = spread(functional.attention_variant(features, weights).spatial_attention)
        bound = torch.tanh(spread(a) * spread(b) / 4) * spread(c)
        assert (got <= bound + 1e-12).all() and (got > 0).any()


@EVERY_VARIANT
def test_the_module_has_the_weights_of_its_variant_alone(variant):
    torch.manual_seed(2)
    attention = NLCBAM(24, 6, reduction=4, variant=variant)
    assert tuple(dict(attention.named_parameters())) == VARIANTS[variant]
    assert f"variant={variant}" in repr(attention)
    for name, weight in attention.named_parameters():
        fan_in = weight[0].numel()
        assert 0 < weight.abs().max() <= 1 / math.sqrt(fan_in)
        if name in ("wc1", "ws1", "ws3"):
            assert (weight.sum(dim=1) > 0).all()
    features, labels = torch.rand(2, 24, 3, 2), torch.tensor([1, -1])
    output, head = attention(features), attention.head(features, torch.ones(3, 24), labels)
    torch.testing.assert_close(head.attended, output.refined.mean((2, 3)))
    torch.testing.assert_close(head.pooled, features.mean((2, 3)))
    torch.testing.assert_close(head.spatial_attention, output.spatial_attention)
    assert (head.adversary_loss > 0).tolist() == [True, False]
    same = dict(attention.named_parameters())
    doubled = torch.func.functional_call(attention, {name: 2 * value for name, value in same.items()}, (features,))
    assert (variant == "none") == torch.equal(doubled.refined, output.refined)


def test_without_a_bottleneck_the_hidden_layers_are_as_wide_as_the_input():
    starred = NLCBAM(24, 6, reduction=1)
    assert {tuple(weight.shape) for weight in starred.parameters()} == {(24, 24), (6, 6)}
    with pytest.raises(ValueError, match="variant must be one of nl_cbam, cbam, non_local, spatial, none, got 'se'"):
        NLCBAM(24, 6, variant="se")


def test_without_an_adversary_there_is_one_branch():
    network = tiny_network(attention="cbam", adversary=False)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, -1, -1])
    batch = Split(images, labels, sample_ids=torch.tensor([-1, -1, 4, 5]), num_labeled=2, num_fed_back=0)
    losses, _ = training_model(memory=False, network=network)(batch)
    out = network(images, labels)
    entropy = torch.distributions.Categorical(logits=out.logits[2:]).entropy().mean()
    torch.testing.assert_close(losses["classification"], nn.functional.cross_entropy(out.logits[:2], labels[:2]))
    torch.testing.assert_close(losses["regularizer"], -0.2 * entropy)
    assert losses["adversary"] == 0
    assert not torch.equal(out.logits, out.adversary_logits)


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def train(images, out, *flags) -> int:
    return main([
        *("train", "--data.labeled", str(images / "campus"), "--data.image_size", "[64, 32]", "--data.workers", "0"),
        *("--data.batch_size", "8", "--model.backbone", "timm:test_resnet", "--model.weights", "none"),
        *("--optimizer.epochs", "1", "--optimizer.lr_scale", "20", "--run.device", "cpu", "--run.out", str(out)),
        *("--run.log_every", "1", "--recipe", "paper", *flags),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """A run of each model of Fig. 6."""
    root = tmp_path_factory.mktemp("runs")
    for name, flags in FIGURE_6.items():
        assert train(images, root / name, *flags) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("model", FIGURE_6)
def test_each_model_of_figure_6_trains(runs, tmp_path, model):
    network, settings = trained_network(runs / model / "checkpoint.pt")
    before = initial_network(settings, network.classifier.out_features).state_dict()
    moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    scalars = read_scalars(runs / model)
    if network.adversary:
        assert max(scalars["train/loss/adversary"][1]) > 0 and "competition/attention_wins" in scalars
        assert "classifier.weight" in moved
    else:
        assert not any(scalars["train/loss/adversary"][1]) and not any(tag.startswith("competition") for tag in scalars)
        assert "train/accuracy/attention" in scalars and "train/accuracy/adversary" not in scalars
        assert ("attention/spatial_spread" in scalars) == (model != "B")
        assert {"backbone.model.conv1.0.weight", "classifier.weight"} <= moved
        # A unit may be dead on so few images, wc2 and the like are not all moved then; some weight is.
        assert any(name.startswith("attention.") for name in moved) == (network.attention.variant != "none")
    probe = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        output = network(probe)
        assert torch.equal(network.embed(probe), output.attended)
    plot_attention(probe, output.spatial_attention, network.map_size, tmp_path / "attention.png")
    assert torch.equal(output.attended, output.pooled) == (model == "B")


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_attention_only(runs, images, capsys):
    out, resume = runs / "B+CBAM+AAN", ("--run.resume", "true")
    assert train(images, out, *FIGURE_6["B+CBAM+AAN"], *resume) == 0
    assert train(images, out, *resume) == 1
    assert "model.attention is 'nl_cbam' here and 'cbam' there" in said(capsys)
    assert train(images, out, *FIGURE_6["B+CBAM+AAN"], "--model.adversary", "false", *resume) == 1
    assert "model.adversary is False here and True there" in said(capsys)


@pytest.mark.slow
def test_a_checkpoint_older_than_the_setting_is_the_full_model(runs, images, tmp_path):
    state = torch.load(runs / "B+NL-CBAM+AAN" / "checkpoint.pt")
    for name in ("attention", "adversary"):
        del state["config"]["model"][name]
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "checkpoint.pt")
    network, _ = trained_network(tmp_path / "old" / "checkpoint.pt")
    assert network.attention.variant == "nl_cbam" and network.adversary
    assert train(images, tmp_path / "old", "--run.resume", "true") == 0


def test_mistakes_on_the_command_line_name_the_setting_and_the_choices(images, tmp_path, capsys):
    assert train(images, tmp_path, "--model.attention", "se") == 2
    message = said(capsys)
    assert '"model.attention"' in message and all(repr(variant) in message for variant in VARIANTS)
    assert train(images, tmp_path, "--model.attention", "none") == 1
    assert "add --model.attention nl_cbam or --model.adversary false" in said(capsys)
    settings = TrainConfig(model=ModelConfig(backbone="resnet18", weights="none", attention="none")).to_dict()
    with pytest.raises(DanFastError, match="With model.attention none there is no attention"):
        initial_network(settings, 3)
