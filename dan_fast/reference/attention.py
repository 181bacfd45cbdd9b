"""NL-CBAM and the attention adversary of Sec. III-B, one sample at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from dan_fast.core.attention_checks import (
    check_cam,
    check_features,
    check_label_values,
    check_refined,
    check_weights,
)
from dan_fast.core.types import (
    AdversaryOutput,
    AttentionHeadOutput,
    AttentionVariantWeights,
    NLCBAMOutput,
    NLCBAMWeights,
)
from dan_fast.reference.memory import zero_of

Weights = NLCBAMWeights | AttentionVariantWeights


def nl_cbam(features: Tensor, weights: NLCBAMWeights) -> NLCBAMOutput:
    """Channel attention, then non-local spatial attention, Eqs. (2)-(3).

    Args:
        features: (B, C, H, W) floating, the last map X of the backbone.
        weights: the six matrices, of the dtype and device of `features`.

    Returns:
        `NLCBAMOutput(refined (B, C, H, W), channel_attention (B, C), spatial_attention (B, HW))`,
        differentiable any number of times; the gradient of a max goes to its first maximum.

    Raises:
        TypeError: an argument that is not floating or whose dtype differs from that of `features`.
        ValueError: a shape or device that does not fit.

    Example:
        >>> shapes = [(1, 3), (3, 1), (1, 4), (1, 4), (4, 1), (4, 1)]
        >>> weights = NLCBAMWeights(*(torch.zeros(shape) for shape in shapes))
        >>> nl_cbam(torch.ones(1, 3, 2, 2), weights).spatial_attention
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    check_features("features", features)
    check_weights(weights, features)
    return each_sample(_nl_cbam_sample, features, weights)


def attention_adversary(features: Tensor, refined: Tensor, cam_weight: Tensor, labels: Tensor) -> AdversaryOutput:
    """The attention adversary difference loss L_aad between A_at and the class activation map A_ad, Eq. (4).

    Args:
        features: (B, C, H, W) floating, X.
        refined: (B, C, H, W), X'' = X * A_C * A_S.
        cam_weight: (c, C), the weights of the classifier.
        labels: (B,) int64, the class of each sample, -1 where it is unknown.

    Returns:
        `AdversaryOutput(loss (B,), refined_map (B, HW), adversary_map (B, HW))`. Where the label is -1 the
        loss and the adversary's map are 0 and carry no gradient. The gradient of |A_at - A_ad| at 0 is 0.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, a device or a label that does not fit.

    Example:
        >>> x = torch.zeros(1, 3, 2, 2)
        >>> attention_adversary(x, x, torch.ones(5, 3), torch.tensor([4])).loss
        tensor([1.])
    """
    check_features("features", features)
    check_refined(refined, features)
    check_cam(cam_weight, labels, features)
    check_label_values(cam_weight, labels)
    positions = features.shape[2] * features.shape[3]
    losses, refined_maps, adversary_maps = [], [], []
    for x, refined_x, label in zip(features.flatten(2), refined.flatten(2), labels.tolist(), strict=True):
        refined_map = refined_x.mean(dim=0)  # Eq. (4), A_at
        if label == -1:
            adversary_map, loss = x.new_zeros(positions), x.new_zeros(())
        else:
            adversary_map = (cam_weight[label].unsqueeze(1) * x).sum(dim=0)  # Eq. (4), A_ad = CAM(X)
            total, difference = refined_map + adversary_map, refined_map - adversary_map
            loss = (torch.sigmoid(total) * torch.sigmoid(difference.abs())).sum()  # Eq. (4), L_aad
        losses.append(loss)
        refined_maps.append(refined_map)
        adversary_maps.append(adversary_map)
    nothing = zero_of(features, refined, cam_weight)
    return AdversaryOutput(
        loss=stack(losses, nothing) + nothing,
        refined_map=stack(refined_maps, zero_of(refined), positions),
        adversary_map=stack(adversary_maps, nothing, positions) + nothing,
    )


def attention_head(features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    """All that the training loss needs from the last map: both pooled features and L_aad, Eqs. (2)-(4).

    Args:
        features: (B, C, H, W) floating, X.
        weights: the six matrices of NL-CBAM.
        cam_weight: (c, C), the weights of the classifier.
        labels: (B,) int64, the class of each sample, -1 where it is unknown.

    Returns:
        `AttentionHeadOutput(attended (B, C), pooled (B, C), channel_attention (B, C),
        spatial_attention (B, HW), adversary_loss (B,))`; attended and pooled are the spatial means of X'' and
        of X.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: a shape, a device or a label that does not fit.

    Example:
        >>> shapes = [(1, 3), (3, 1), (1, 4), (1, 4), (4, 1), (4, 1)]
        >>> weights = NLCBAMWeights(*(torch.zeros(shape) for shape in shapes))
        >>> attention_head(torch.ones(1, 3, 2, 2), weights, torch.ones(5, 3), torch.tensor([-1])).attended
        tensor([[0.2500, 0.2500, 0.2500]])
    """
    return pool_and_correct(features, nl_cbam(features, weights), cam_weight, labels)


def pool_and_correct(
    features: Tensor, attention: NLCBAMOutput, cam_weight: Tensor, labels: Tensor
) -> AttentionHeadOutput:
    """The head's output from what an attention makes of X: the pooled features, and L_aad of X''."""
    refined, channel_attention, spatial_attention = attention
    adversary = attention_adversary(features, refined, cam_weight, labels)
    return AttentionHeadOutput(
        attended=refined.mean(dim=(2, 3)),
        pooled=features.mean(dim=(2, 3)),
        channel_attention=channel_attention,
        spatial_attention=spatial_attention,
        adversary_loss=adversary.loss,
    )


def each_sample(
    attend: Callable[[Tensor, Weights], tuple[Tensor, Tensor, Tensor]], features: Tensor, weights: Weights
) -> NLCBAMOutput:
    """What `attend` makes of each X (C, H, W): X'' (C, H, W), A_C (C,) and A_S (HW,)."""
    samples = [attend(x, weights) for x in features.unbind()]
    refined, channel_attention, spatial_attention = zip(*samples, strict=True) if samples else ((), (), ())
    nothing = zero_of(features, *(weight for weight in weights if weight is not None))
    return NLCBAMOutput(
        refined=stack(refined, nothing, *features.shape[1:]),
        channel_attention=stack(channel_attention, nothing, features.shape[1]),
        spatial_attention=stack(spatial_attention, nothing, features.shape[2] * features.shape[3]),
    )


def _nl_cbam_sample(x: Tensor, weights: NLCBAMWeights) -> tuple[Tensor, Tensor, Tensor]:
    columns = x.flatten(1)
    channel_attention = channel_attention_of(columns, weights)
    scaled = columns * channel_attention.unsqueeze(1)  # X' = X A_C
    spatial_attention = non_local_attention_of(scaled, weights)
    return (scaled * spatial_attention).reshape(x.shape), channel_attention, spatial_attention  # X'' = X' A_S


def channel_attention_of(x: Tensor, weights: Weights) -> Tensor:
    """A_C (C,) of X (C, HW), Eq. (2)."""
    x_gap = x.mean(dim=1)
    x_gmp = x.max(dim=1).values  # its gradient goes to the first maximum, as torch.max documents
    return torch.sigmoid(
        weights.wc2 @ torch.relu(weights.wc1 @ x_gap) + weights.wc2 @ torch.relu(weights.wc1 @ x_gmp)
    )  # Eq. (2)


def non_local_attention_of(scaled: Tensor, weights: Weights) -> Tensor:
    """A_S (HW,) of X' (C, HW), Eq. (3)."""
    g = scaled.mean(dim=0)
    m = scaled.max(dim=0).values
    a = torch.sigmoid(weights.ws2 @ torch.relu(weights.ws1 @ g))  # Eq. (3), A
    b = torch.sigmoid(weights.ws2 @ torch.relu(weights.ws1 @ m))  # Eq. (3), B
    c = torch.sigmoid(weights.ws4 @ torch.relu(weights.ws3 @ g))  # Eq. (3), C
    s = torch.softmax(torch.outer(a, b), dim=1)  # Eq. (3), S_pq over q of A_p B_q
    return s @ c  # Eq. (3), A_S = S C


def stack(rows: list[Tensor] | tuple[Tensor, ...], nothing: Tensor, *shape: int) -> Tensor:
    """The rows as a batch; torch.stack takes no empty list. `nothing` is `zero_of` what they depend on."""
    return torch.stack(list(rows)) if rows else nothing.new_zeros(0, *shape) + nothing
