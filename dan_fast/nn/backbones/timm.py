"""Models of timm up to their last map; timm is imported only when such a model is built."""

import difflib
import math
import sys
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dan_fast.core.errors import DanFastError
from dan_fast.core.optional import optional
from dan_fast.core.preprocessing import INTERPOLATIONS, Preprocessing
from dan_fast.nn.backbones.recompute import with_weights_kept
from dan_fast.nn.backbones.weights import load_fitting, read_state_dict

PREFIX = "timm:"
_NEAREST = 3
_EARLY_STAGES = 2


class TimmMap(nn.Module):
    """A timm model's last map, (B, 3, H, W) to (B, out_channels, h, w); `model` has timm's names.

    Args:
        model: with `forward_features`, without a classifier.
        image_size: (height, width) of the images.
        name: of the model, for the messages.

    Raises:
        DanFastError: the model gives no map, or takes no such images.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int], name: str) -> None:
        super().__init__()
        self.model = model
        self.gradient_checkpointing = False
        self.preprocessing = _preprocessing_of(model)
        features = _features_of_zeros(model, image_size, name)
        self.grid, self.prefix = None, 0
        if features.ndim == 3:
            self.prefix = getattr(model, "num_prefix_tokens", 0)
            self.grid = _grid(model, image_size, features.shape[1] - self.prefix)
        if features.ndim not in (3, 4) or (features.ndim == 3 and self.grid is None):
            raise _no_map(name, tuple(features.shape))
        self.channels_last = features.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.out_channels: int = self._as_map(features).shape[1]
        _drop_unused(model, features)

    @property
    def early_stages(self) -> list[nn.Module]:
        """The first two stages, whose maps `StyleMixing` changes; empty where the model does not name its stages."""
        return [stage for stage, _ in self._early()]

    @property
    def early_channels(self) -> list[int | None]:
        """Of each early stage how many channels its map has, where timm says so."""
        return [channels for _, channels in self._early()]

    def _early(self) -> list[tuple[nn.Module, int | None]]:
        stages = getattr(self.model, "feature_info", None)
        if not isinstance(stages, list) or self.grid is not None or self.channels_last:
            return []
        named = dict(self.model.named_modules())
        found = [
            (named[name], stage.get("num_chs"))
            for stage in stages
            if (name := stage.get("module")) in named and not _is_stem(name, named)
        ]
        return found[:_EARLY_STAGES] if len(found) >= _EARLY_STAGES else []

    @property
    def cuts(self) -> list[nn.Module]:
        """As of `ResNetMap`: the early stages."""
        return self.early_stages

    def forward(self, images: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            features = with_weights_kept(self.model, lambda twin: twin.forward_features(images))
        else:
            features = self.model.forward_features(images)
        return self._as_map(features)

    def _as_map(self, features: Tensor) -> Tensor:
        if self.grid is not None:
            return features[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def _is_stem(name: str, named: dict[str, nn.Module]) -> bool:
    """Whether timm names as the first stage what lies before the blocks, or its last norm or activation alone."""
    parts = list(named[name].modules())[1:]
    return name.startswith("stem") or not any(isinstance(part, (nn.Conv2d, nn.Linear)) for part in parts)


def build_timm(
    name: str, weights: str | PathLike[str], image_size: tuple[int, int], gradient_checkpointing: bool
) -> TimmMap:
    """See `dan_fast.nn.build_backbone`; `name` is timm's, with or without the tag of its weights."""
    timm = optional(
        "timm", f"the backbone {PREFIX}{name} needs timm, which is not installed: pip install 'dan-fast[timm]'"
    )
    _require_known(timm, name)
    state = None
    if weights == "imagenet" and not timm.models.is_model_pretrained(name):
        raise DanFastError(
            f"timm has no pretrained weights of {name} to download; set weights to none or to the path of a file"
        )
    if weights not in ("none", "imagenet"):
        state = read_state_dict(Path(weights), f"timm's {name}")
    model, sized = _created(timm, name, image_size)
    if weights == "imagenet":
        model = _downloaded(timm, name, sized)
    # timm freezes parameters of some models; here every parameter of the backbone is trained.
    model.requires_grad_()
    whole = set(model.state_dict())
    if state is not None:
        state = _converted(model, state, name, weights)
    backbone = TimmMap(model, image_size, PREFIX + name)
    if state is not None:
        classifiers, dropped = tuple(_classifiers(model)), whole - set(model.state_dict())
        load_fitting(model, state, PREFIX + name, weights, lambda key: key in dropped or key.startswith(classifiers))
    if gradient_checkpointing:
        _checkpoint_gradients(backbone, name)
    return backbone


def downloaded_in_words(name: str) -> str | None:
    """Which weights `imagenet` is for a model, with their licence; None where timm or such a model is not there.

    Example:
        >>> downloaded_in_words("vit_small_patch14_dinov2")
        "timm's vit_small_patch14_dinov2.lvd142m, licence apache-2.0"
    """
    try:
        from timm.models import get_pretrained_cfg

        found = get_pretrained_cfg(name)
    # No timm, or no such weights of a model, which `build_timm` says in its own words.
    except (ImportError, RuntimeError):
        return None
    if found is None:
        return None
    plain, tag = name.partition(".")[0], getattr(found, "tag", None)
    return f"timm's {plain}{f'.{tag}' if tag else ''}, licence {getattr(found, 'license', None) or 'not stated'}"


def with_positions_of(wanted: TimmMap, trained: TimmMap) -> dict[str, Tensor]:
    """The state dict of a trained ViT, its position embeddings resampled to another one's size of image."""
    state, name = trained.state_dict(), "model.pos_embed"
    positions = state.get(name)
    if positions is not None and positions.ndim == 3 and trained.grid and wanted.grid and trained.grid != wanted.grid:
        # Of the class and registers, where they have positions of their own.
        others = positions.shape[1] - math.prod(trained.grid)
        if others in (0, trained.prefix):
            from timm.layers import resample_abs_pos_embed

            sizes = {"new_size": list(wanted.grid), "old_size": list(trained.grid)}
            state[name] = resample_abs_pos_embed(positions, **sizes, num_prefix_tokens=others)
    return state


def _require_known(timm: ModuleType, name: str) -> None:
    plain = timm.list_models()
    # A tag names one of several sets of weights; timm accepts the name without it as well.
    tagged = timm.list_models(include_tags=True)
    if name in plain or name in tagged:
        return
    near = difflib.get_close_matches(name, tagged if "." in name else plain, _NEAREST, cutoff=0.0)
    raise DanFastError(
        f"timm {timm.__version__} has no model {name!r}; the nearest are {', '.join(near)} "
        "(timm.list_models() gives all of them)"
    )


def _created(timm: ModuleType, name: str, image_size: tuple[int, int]) -> tuple[nn.Module, dict[str, Any]]:
    """The model with random weights and without a classifier, and the settings of size that it takes."""
    # A network here sees one size: made for it, a model need not resample its position embeddings in each pass.
    fixed = {"img_size": image_size}
    for sized in ({**fixed, "dynamic_img_size": False}, fixed, {"dynamic_img_size": True}, {}):
        try:
            return timm.create_model(name, num_classes=0, **sized), sized
        except TypeError as error:
            if not sized or "unexpected keyword argument" not in str(error):
                raise
        except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
            raise _wrong_size(PREFIX + name, image_size, error) from error
    raise AssertionError("the last settings are empty")


def _downloaded(timm: ModuleType, name: str, sized: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **sized)
    # timm downloads through other packages, which raise errors of their own.
    except Exception as error:
        raise DanFastError(
            f"the weights of {PREFIX}{name} could not be downloaded ({' '.join(str(error).split())}); download them "
            "elsewhere and give the path of the file as weights"
        ) from error


def _features_of_zeros(model: nn.Module, image_size: tuple[int, int], name: str) -> Tensor:
    """The features of one image of zeros, with their graph; the model's mode and the random state do not change."""
    training = model.training
    model.eval()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            features = model.forward_features(torch.zeros(1, 3, *image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _wrong_size(name, image_size, error) from error
    finally:
        model.train(training)
    if not isinstance(features, Tensor):
        raise _no_map(name, type(features).__name__)
    return features


def _grid(model: nn.Module, image_size: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """(h, w) of the tokens; None where they make no map."""
    embedding = getattr(model, "patch_embed", None)
    sides = [getattr(embedding, "grid_size", None)]
    stages = getattr(model, "feature_info", None) or [{}]
    last = stages[-1] if isinstance(stages, list) else {}
    if last.get("reduction"):
        sides.append(tuple(side // last["reduction"] for side in image_size))
    for grid in sides:
        if grid is not None and grid[0] * grid[1] == tokens:
            return tuple(grid)
    return None


def _drop_unused(model: nn.Module, features: Tensor) -> None:
    """Take out what the features do not depend on: pooling, norms and layers after the last map.

    Training needs the gradient of every parameter, and weight decay would move those that have none.
    """
    parameters = list(model.parameters())
    grads = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    _drop(model, {id(parameter) for parameter, grad in zip(parameters, grads, strict=True) if grad is None})


def _drop(module: nn.Module, unused: set[int]) -> None:
    for name, child in list(module.named_children()):
        owned = [id(parameter) for parameter in child.parameters()]
        if owned and unused.issuperset(owned):
            setattr(module, name, nn.Identity())
        else:
            _drop(child, unused)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if id(parameter) in unused:
            setattr(module, name, None)


def _preprocessing_of(model: nn.Module) -> Preprocessing:
    import timm.data

    settings = timm.data.resolve_model_data_config(model)
    interpolation = settings["interpolation"]
    # Some of timm's models use a filter that only Pillow has, or a random one: bicubic is nearest to all of them.
    interpolation = interpolation if interpolation in INTERPOLATIONS else "bicubic"
    return Preprocessing(tuple(map(float, settings["mean"])), tuple(map(float, settings["std"])), interpolation)


def _classifiers(model: nn.Module) -> list[str]:
    """The prefixes of the names of the classifier's tensors."""
    named = model.pretrained_cfg.get("classifier") or ()
    return [f"{name}." for name in ((named,) if isinstance(named, str) else named)]


def _converted(
    model: nn.Module, state: dict[str, Tensor], name: str, weights: str | PathLike[str]
) -> dict[str, Tensor]:
    """`state` as timm would load it: position embeddings of another grid resampled, older names brought up to date."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return dict(convert(state, model))
    # Written for files of its own model, it raises many kinds of exception on others.
    except Exception as error:
        raise DanFastError(
            f"the weights {weights} do not fit {PREFIX}{name} ({' '.join(str(error).split())}); "
            f"give a file of a {PREFIX}{name}"
        ) from error


def _checkpoint_gradients(backbone: TimmMap, name: str) -> None:
    try:
        backbone.model.set_grad_checkpointing(True)
    # timm asserts in models that cannot do it.
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise DanFastError(
            f"{PREFIX}{name} has no gradient checkpointing; set model.gradient_checkpointing to false"
        ) from error
    backbone.gradient_checkpointing = True


def _wrong_size(name: str, image_size: tuple[int, int], error: Exception) -> DanFastError:
    height, width = image_size
    reason = " ".join(str(error).split()) or type(error).__name__
    return DanFastError(f"{name} takes no images of {height} x {width} ({reason}); choose another data.image_size")


def _no_map(name: str, got: object) -> DanFastError:
    return DanFastError(
        f"{name} gives no map ({got}) before its head; choose a convolutional network or a plain ViT, such as "
        "timm:resnet50 or timm:vit_small_patch16_224"
    )
