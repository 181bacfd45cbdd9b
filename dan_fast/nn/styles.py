"""Style-variant images in a network: its early maps take a part of their style from other images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dan_fast.core.errors import DanFastError
from dan_fast.functional.styles import mix_styles
from dan_fast.nn.backbones.resnet import ResNetMap
from dan_fast.nn.backbones.timm import TimmMap

_STAGES = 2
# Of MixStyle (Zhou et al. 2021): how often an image is mixed, and Beta(0.1, 0.1), mostly nearly all or nothing.
_PROBABILITY, _CONCENTRATION = 0.5, 0.1


class StyleMixing:
    """Mixes the style of the maps after the first two stages of a backbone, where `within` says so.

    Each image takes a part of the style of another one drawn at random: of those that lend theirs, where there are
    such, else of any. Those that lend go no further than the last of these stages.

    Args:
        stages: modules of a backbone, in the order in which they run, each giving a (B, C, H, W) map.

    Example:
        >>> early, late = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        >>> mixing = StyleMixing([early])
        >>> with mixing.within(lenders=2):
        ...     late(early(torch.rand(6, 3, 9, 9))).shape
        torch.Size([4, 5, 5, 5])
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        self._last = stages[-1]
        self._lenders: int | None = None
        for stage in stages:
            stage.register_forward_hook(self._mix)

    @contextmanager
    def within(self, lenders: int = 0) -> Iterator[None]:
        """Inside, forward passes mix styles; the last `lenders` images of a batch lend theirs alone."""
        self._lenders = lenders
        try:
            yield
        finally:
            self._lenders = None

    def _mix(self, stage: nn.Module, inputs: tuple, features: Tensor) -> Tensor:
        if self._lenders is None:
            return features
        count, device = features.shape[0], features.device
        takers = count - self._lenders
        if self._lenders:
            partners = takers + torch.randint(self._lenders, (count,), device=device)
        else:
            partners = torch.randperm(count, device=device)
        concentration = torch.full((count,), _CONCENTRATION, device=device)
        share = torch.distributions.Beta(concentration, concentration, validate_args=False).sample()
        left_alone = (torch.rand(count, device=device) >= _PROBABILITY) | (torch.arange(count, device=device) >= takers)
        mixed = mix_styles(features, partners, share.masked_fill(left_alone, 1.0))
        return mixed[:takers] if stage is self._last else mixed


def style_mixing_of(backbone: nn.Module, image_size: tuple[int, int]) -> StyleMixing:
    """Style mixing after the first two stages of a convolutional backbone, tried on images of zeros.

    Raises:
        DanFastError: a backbone that recomputes its maps, whose draws would not be the same twice, or one that is no
            ResNet and no convolutional model of timm, or whose stages are no maps of whole batches.
    """
    if getattr(backbone, "gradient_checkpointing", False):
        raise DanFastError(
            "Styles cannot be mixed where maps are computed again: set model.gradient_checkpointing to false or "
            "model.style_mixing to none."
        )
    stages = _early_stages(backbone)
    if not stages:
        raise _cannot_mix()
    mixing = StyleMixing(stages)
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), mixing.within(lenders=1):
            rows = backbone(torch.zeros(3, 3, *image_size)).shape[0]
    # The map of a stage may be a list, too small, or one of several branches that are added up again.
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise _cannot_mix() from error
    finally:
        for module, training in modes.items():
            module.training = training
    if rows != 2:
        raise _cannot_mix()
    return mixing


def _early_stages(backbone: nn.Module) -> list[nn.Module]:
    """The first two stages, as far as the backbone says which they are."""
    if isinstance(backbone, ResNetMap):
        return [backbone.layer1, backbone.layer2]
    stages = getattr(backbone.model, "feature_info", None) if isinstance(backbone, TimmMap) else None
    if not isinstance(stages, list) or backbone.grid is not None or backbone.channels_last or len(stages) < _STAGES:
        return []
    named = dict(backbone.model.named_modules())
    return [named[stage["module"]] for stage in stages[:_STAGES] if stage.get("module") in named]


def _cannot_mix() -> DanFastError:
    return DanFastError(
        "Styles are mixed in the early maps of a convolutional network, which this backbone does not give: choose a "
        "ResNet or another convolutional model of timm, or set model.style_mixing to none and, where unlabelled images "
        "were only to lend their style, data.unlabeled_share to 0."
    )
