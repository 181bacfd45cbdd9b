"""Other readings of NL-CBAM and of the adversary's loss, Eqs. (3) and (4)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from registry import HAD, change
from torch import Tensor

import dan_fast.nn.attention as attention_module
from dan_fast.core.types import AttentionHeadOutput, AttentionVariantWeights, NLCBAMWeights
from dan_fast.functional.attention import attention_variant_head, variants


def _head_of_parts(features: Tensor, weights: NLCBAMWeights, cam_weight: Tensor, labels: Tensor) -> AttentionHeadOutput:
    """`attention_head` in PyTorch, from the functions of `variants`, which can be replaced."""
    return attention_variant_head(features, AttentionVariantWeights(**weights._asdict()), cam_weight, labels)


@contextmanager
def _with_part(name: str, part: Callable[..., Tensor]) -> Iterator[None]:
    """Another function in the place of a part of NL-CBAM's head."""
    with patch.object(attention_module, "attention_head", _head_of_parts), patch.object(variants, name, part):
        yield


def _units(g: Tensor, m: Tensor, weights: AttentionVariantWeights) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and C (B, P) of Eq. (3)."""
    of = ((g, weights.ws1, weights.ws2), (m, weights.ws1, weights.ws2), (g, weights.ws3, weights.ws4))
    a, b, c = (torch.sigmoid(F.linear(F.relu(F.linear(x, reduce)), expand)) for x, reduce, expand in of)
    return a, b, c


@change
def softmax_over_p() -> Iterator[None]:
    """Eq. (3) with the softmax of A_p B_q over p, so that the columns of S sum to 1 in the place of its rows.

    For NL-CBAM.
    """

    def spatial_attention(g: Tensor, m: Tensor, weights: AttentionVariantWeights) -> Tensor:
        HAD.add("softmax_over_p")
        a, b, c = _units(g, m, weights)
        return (torch.softmax(a.unsqueeze(2) * b.unsqueeze(1), dim=1) @ c.unsqueeze(2)).squeeze(2)

    with _with_part("spatial_attention_of", spatial_attention):
        yield


@change
def spatial_attention_is_c() -> Iterator[None]:
    """Eq. (3) with A_S = C, free at each position. For NL-CBAM."""

    def spatial_attention(g: Tensor, m: Tensor, weights: AttentionVariantWeights) -> Tensor:
        HAD.add("spatial_attention_is_c")
        return _units(g, m, weights)[2]

    with _with_part("spatial_attention_of", spatial_attention):
        yield


@change
def attention_as_residual() -> Iterator[None]:
    """The attention branch classifies attended + pooled. For NL-CBAM; recipe dan tests the pooled feature alone."""

    def head(*arguments: Tensor) -> AttentionHeadOutput:
        HAD.add("attention_as_residual")
        out = _head_of_parts(*arguments)
        return out._replace(attended=out.attended + out.pooled)

    with patch.object(attention_module, "attention_head", head):
        yield


@change
def adversary_factor_constant() -> Iterator[None]:
    """Eq. (4) with sigma(A_at + A_ad) as a weight without a gradient. For an adversary."""

    def loss(refined_map: Tensor, adversary_map: Tensor, labels: Tensor) -> Tensor:
        if (labels >= 0).any():
            HAD.add("adversary_factor_constant")
        factor = torch.sigmoid(refined_map + adversary_map).detach()
        return torch.where(labels >= 0, (factor * torch.sigmoid((refined_map - adversary_map).abs())).sum(1), 0)

    with _with_part("adversary_loss", loss):
        yield


@change
def adversary_maps_from_0_to_1() -> Iterator[None]:
    """Eq. (4) of both maps of an image scaled to [0, 1], as class activation maps usually are. For an adversary."""

    def scaled(maps: Tensor) -> Tensor:
        lowest, highest = torch.aminmax(maps, dim=1, keepdim=True)
        return (maps - lowest) / (highest - lowest).clamp(min=1e-12)

    def loss(refined_map: Tensor, adversary_map: Tensor, labels: Tensor) -> Tensor:
        if (labels >= 0).any():
            HAD.add("adversary_maps_from_0_to_1")
        refined, adversary = scaled(refined_map), scaled(adversary_map)
        summands = torch.sigmoid(refined + adversary) * torch.sigmoid((refined - adversary).abs())
        return torch.where(labels >= 0, summands.sum(1), 0)

    with _with_part("adversary_loss", loss):
        yield
