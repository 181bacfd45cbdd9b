"""Style mixing: the early maps of a network take a part of their style from other images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dan_fast.core.errors import DanFastError
from dan_fast.functional.derivatives import in_backward_pass
from dan_fast.functional.styles import mix_styles
from dan_fast.nn.backbones.trial import trial

# Of MixStyle (Zhou et al. 2021): the share of mixed images, and Beta(0.1, 0.1), whose draws are mostly near 0 or 1.
_PROBABILITY, _CONCENTRATION = 0.5, 0.1


class StyleMixing:
    """Mixes the style of the maps after the first two stages of a backbone, inside `within`.

    Each image takes a part of the style of another image, drawn at random from the lenders if there are any, else from
    all images. Lenders are used for their style only and leave the batch after the last of these stages.

    Args:
        stages: modules of a backbone, in the order in which they run, each giving a (B, C, H, W) map. A replica of
            `nn.DataParallel` refuses to mix: all replicas have this one object, and run at the same time.

    Raises:
        ValueError: no stage; where the network runs, a stage whose output is no such map.
        TypeError: a stage that is no module; where the network runs, one whose output is no tensor.

    Example:
        >>> early, late = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        >>> mixing = StyleMixing([early])
        >>> with mixing.within(lenders=2):
        ...     late(early(torch.rand(6, 3, 9, 9))).shape
        torch.Size([4, 5, 5, 5])
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        # `children()` gives its modules once.
        self._stages = list(stages)
        if not self._stages:
            raise ValueError("stages holds no module: name those of the backbone whose maps are to be mixed")
        for stage in self._stages:
            if not isinstance(stage, nn.Module):
                raise TypeError(f"stages must hold modules of the backbone, got {type(stage).__name__}")
        self._lenders: int | None = None
        self._has_mixed = False
        for stage in self._stages:
            stage.register_forward_hook(self._mix)

    @contextmanager
    def within(self, lenders: int | None = 0) -> Iterator[None]:
        """Inside, forward passes mix styles; the last `lenders` images of a batch are used for their style only.

        With None nothing is mixed. An inner block holds until it ends. A stage that mixed must not be computed again in
        the backward pass, where this raises a RuntimeError.

        Raises:
            ValueError: lenders is not a number from 0 on, or, where the network runs, is not smaller than the number of
                images in the batch.
        """
        if lenders is not None and (not isinstance(lenders, int) or lenders < 0):
            raise ValueError(f"lenders is {lenders!r}; it must be None or a whole number from 0")
        before, self._lenders = self._lenders, lenders
        try:
            yield
        finally:
            self._lenders = before

    def _mix(self, stage: nn.Module, inputs: tuple, features: Tensor) -> Tensor:
        if self._has_mixed and in_backward_pass():
            raise RuntimeError(
                "styles are mixed by draws that would not be the same when activation checkpointing computes the maps "
                "again: checkpoint what follows these stages, or mix no styles"
            )
        self._has_mixed = self._lenders is not None
        if self._lenders is None:
            return features
        if stage not in self._stages:
            raise RuntimeError(
                "styles cannot be mixed in a replica of DataParallel, as the replicas share the lenders: train on one "
                "device or with DistributedDataParallel"
            )
        if not isinstance(features, Tensor):
            raise TypeError(
                f"stages must give (B, C, H, W) maps, but a {type(stage).__name__} gave a {type(features).__name__}: "
                "name a module inside of it"
            )
        count, device = features.shape[0], features.device
        takers = count - self._lenders
        if takers < 1:
            raise ValueError(f"lenders is {self._lenders} of a batch of {count} images; it must be less")
        if self._lenders:
            partners = takers + torch.randint(self._lenders, (count,), device=device)
        else:
            partners = torch.randperm(count, device=device)
        # What torch.distributions.Beta draws, whose own function cannot run under torch.func.
        share = torch._sample_dirichlet(torch.full((count, 2), _CONCENTRATION, device=device))[:, 0]
        left_alone = (torch.rand(count, device=device) >= _PROBABILITY) | (torch.arange(count, device=device) >= takers)
        mixed = mix_styles(features, partners, share.masked_fill(left_alone, 1.0))
        return mixed[:takers] if stage is self._stages[-1] else mixed


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
    stages = getattr(backbone, "early_stages", None)
    if not stages:
        raise _cannot_mix()
    mixing = StyleMixing(stages)
    shapes: list[torch.Size] = []
    hooks = [stage.register_forward_hook(lambda *given: shapes.append(given[2].shape)) for stage in stages]
    try:
        with trial(backbone) as like, mixing.within(lenders=1):
            rows = backbone(like.new_zeros(3, 3, *image_size)).shape[0]
    # The map of a stage may be a list, too small, or one of several branches that are added up again.
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise _cannot_mix() from error
    finally:
        for hook in hooks:
            hook.remove()
    # Channels that stand last, as between the blocks of SAM's ViT, would not be those whose styles are mixed.
    channels = getattr(backbone, "early_channels", [shape[1] for shape in shapes])
    if rows != 2 or any(n == shape[-1] != shape[1] for n, shape in zip(channels, shapes, strict=False)):
        raise _cannot_mix()
    return mixing


def _cannot_mix() -> DanFastError:
    return DanFastError(
        "Styles are mixed in the early maps of a convolutional network, which this backbone does not give: choose a "
        "ResNet or another convolutional model of timm, or set model.style_mixing to none and, where unlabelled images "
        "were only to lend their style, data.unlabeled_share to 0."
    )
