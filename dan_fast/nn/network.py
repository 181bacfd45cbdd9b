"""The Data Assimilation Network without its memory: backbone, attention head and classifier (Fig. 2)."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Sized
from contextlib import nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.core.types import AttentionHeadOutput
from dan_fast.functional.autocast import full_precision
from dan_fast.nn.attention import NLCBAM
from dan_fast.nn.backbones.build import build_backbone
from dan_fast.nn.backbones.trial import trial
from dan_fast.nn.hub import fetched_folder, network_of_folder, push_network, save_network
from dan_fast.nn.instance_norm import normalise_early_maps
from dan_fast.nn.styles import style_mixing_of
from dan_fast.nn.whitening import WithinPersonWhitening, signed_root

if TYPE_CHECKING:
    from dan_fast.evaluation.result import Evaluation

GATES = 3
_FEATURES = ("attended", "pooled", "pooled_root", "pooled_whitened")


class DANOutput(NamedTuple):
    """What both branches make of a batch of B images.

    Attributes:
        attended: (B, C), the spatial mean of X'': the feature of the attention branch, the one used in tests.
        pooled: (B, C), the spatial mean of X: the feature of the adversary branch; it contains the key.
        channel_attention: (B, C), A_C.
        spatial_attention: (B, HW), A_S.
        adversary_loss: (B,), L_aad; 0 where the label is -1, there are no labels or there is no adversary.
        logits: (B, c), the classifier on `attended`.
        adversary_logits: (B, c), the classifier on `pooled`.
    """

    attended: Tensor
    pooled: Tensor
    channel_attention: Tensor
    spatial_attention: Tensor
    adversary_loss: Tensor
    logits: Tensor
    adversary_logits: Tensor


class DAN(nn.Module):
    """Backbone, NL-CBAM with the attention adversary, and a classifier that both branches share (Sec. III).

    `attention`, `reduction` and `adversary` turn it into the models of Fig. 6.

    Training and `embed` call the parts of `forward`, neither the module itself nor its `attention`, so forward hooks on
    these two are not called. Hooks on `backbone` are called, with second derivatives several times in a pass. In
    training, hooks on `dropout` and `classifier` are called for the attention branch and then for the adversary's.

    Args:
        num_classes: c, the number of training persons.
        backbone: a name for `build_backbone`, or any module that maps (B, 3, H, W) images to a (B, C, h, w)
            map with C at least 4.
        image_size: (H, W) of the images; NL-CBAM is made for the map they give.
        reduction: r of NL-CBAM.
        dropout: share of the features dropped before the classifier, drawn anew for each branch.
        weights: for a backbone given by name, see `build_backbone`.
        attention: the variant of `NLCBAM`; "none" leaves only the backbone, and its two branches are one.
        adversary: False leaves out the attention adversary network, AAN: there is no L_aad, and the attention is
            trained together with the backbone.
        adversary_reach: what the gradient of L_aad reaches: "all" of the network, as Eq. (4) is printed, or only the
            "attention", with the map and the classifier's weight as constants.
        feature: what `embed` returns: "attended"; "pooled"; "pooled_root", sign(x) |x|^(1/2) of each number x of the
            pooled one (the signed square root of Perronnin, Sanchez and Mensink, "Improving the Fisher Kernel for
            Large-Scale Image Classification", ECCV 2010, whose derivative at 0 is not finite); or "pooled_whitened",
            what `whitening` makes of the pooled one.
        style_mixing: in training mode early maps take a part of their style from other images, see `StyleMixing`; for
            a backbone given by name. True where the setting `model.style_mixing` is "batch" or "unlabeled".
        gradient_checkpointing: for a backbone given by name, see `build_backbone`.
        instance_norm: the first norm of each early block is half an instance norm, see `HalfInstanceNorm`; for a
            backbone given by name. "auto" is True where the backbone has such blocks.

    Attributes:
        backbone: the backbone; backbone_name: its name, None for a module; instance_norm: whether it has any;
        attention: the `NLCBAM`; classifier: `nn.Linear(C, num_classes, bias=False)`.
        image_size: (H, W); map_size: (h, w); key_dim: C - 3, the size of the memory's keys.
        adversary: whether there is an attention adversary.
        whitening: a `WithinPersonWhitening` for the feature "pooled_whitened", else None; until its `fit` it gives
            "pooled_root".
        preprocessing: how images are to be resized and normalised: the backbone's, or torchvision's for a module
            without that attribute.

    Raises:
        DanFastError: the backbone's name or weights are wrong, see `build_backbone`; or it lacks what a setting
            changes.
        ValueError: an argument out of range, or a module whose output is not such a map.
        TypeError: a number that is not whole, or text such as "none" in place of True or False.

    Example:
        >>> model = DAN(num_classes=10, backbone="resnet18", image_size=(128, 64)).eval()
        >>> model.embed(torch.zeros(2, 3, 128, 64)).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | nn.Module = "resnet50",
        image_size: tuple[int, int] = (224, 224),
        reduction: int = 12,
        dropout: float = 0.5,
        weights: str | PathLike[str] = "none",
        attention: str = "nl_cbam",
        adversary: bool = True,
        adversary_reach: str = "all",
        feature: str = "attended",
        style_mixing: bool = False,
        gradient_checkpointing: bool = False,
        instance_norm: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__()
        # As plain numbers: NumPy's would train, and fail when the network is saved.
        num_classes, reduction = operator.index(num_classes), operator.index(reduction)
        _require_flags(
            adversary=adversary,
            style_mixing=style_mixing,
            gradient_checkpointing=gradient_checkpointing,
            instance_norm=instance_norm is True if instance_norm == "auto" else instance_norm,
        )
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not isinstance(image_size, Sized) or len(image_size) != 2 or min(image_size) < 1:
            raise ValueError(f"image_size must be (height, width) in pixels, got {image_size}")
        if adversary and attention == "none":
            raise ValueError("adversary must be False where attention is 'none': it corrects an attention")
        if adversary_reach not in ("all", "attention"):
            raise ValueError(f"adversary_reach must be 'all' or 'attention', got {adversary_reach!r}")
        if feature not in _FEATURES:
            raise ValueError(f"feature must be one of {', '.join(_FEATURES)}, got {feature!r}")
        self.backbone_name = None if isinstance(backbone, nn.Module) else backbone
        if isinstance(backbone, nn.Module):
            if weights != "none":
                raise ValueError("weights serves a backbone given by name; load the module's own weights first")
            if gradient_checkpointing:
                raise ValueError("gradient_checkpointing serves a backbone given by name; let the module do it itself")
            if style_mixing:
                raise ValueError("style_mixing serves a backbone given by name; let the module use StyleMixing itself")
            if instance_norm is True:
                raise ValueError("instance_norm serves a backbone given by name; put HalfInstanceNorm into the module")
            self.backbone, self.instance_norm = backbone, False
        else:
            self.backbone = build_backbone(backbone, weights, image_size, gradient_checkpointing)
            self.instance_norm = bool(instance_norm) and normalise_early_maps(self.backbone, instance_norm is True)
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.preprocessing: Preprocessing = getattr(self.backbone, "preprocessing", IMAGENET)
        channels, height, width = _map_shape(self.backbone, self.image_size)
        if channels <= GATES:
            raise ValueError(f"backbone must give at least {GATES + 1} channels, got {channels}")
        self.map_size = (height, width)
        self.key_dim = channels - GATES
        self.attention = NLCBAM(channels, height * width, reduction, attention)
        self.styles = style_mixing_of(self.backbone, self.image_size) if style_mixing else None
        self.adversary = adversary
        self.adversary_reach = adversary_reach
        self.feature = feature
        self.whitening = WithinPersonWhitening(channels) if feature == "pooled_whitened" else None
        self.dropout = nn.Dropout(dropout)
        # Without a bias, as a class activation map reads it. A_C and A_S scale the attention branch's features
        # down; beside a bias the smaller features would lose the competition whatever they have learnt.
        self.classifier = nn.Linear(channels, num_classes, bias=False)

    def forward(self, images: Tensor, labels: Tensor | None = None, lenders: int | None = 0) -> DANOutput:
        """Run both branches; the classifier is excluded from autocast, and logits are in the dtype of its weight.

        Args:
            images: (B + lenders, 3, H, W) floating.
            labels: (B,) int64, the class of each image, -1 where it is unknown; None if all are.
            lenders: with `style_mixing`, how many images at the end are used for their style only; they are not among
                the B of the output. 0: the B images lend theirs to one another; None: no style is mixed.

        Raises:
            ValueError: images of another shape than `image_size` asks for, labels that do not fit, or lenders where no
                style is mixed or more of them than images.
            TypeError: images that are not floating, labels that are not int64.
            RuntimeError: a replica of `nn.DataParallel` that would mix styles.
        """
        return self.branches(self.maps(images, lenders), labels)

    def maps(self, images: Tensor, lenders: int | None = 0) -> Tensor:
        """The backbone's last map (B, C, h, w) of (B + lenders, 3, H, W) images.

        Args, Raises: as `forward`.
        """
        if images.ndim != 4:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating, normalised as `preprocessing` says, got {images.dtype}")
        mixing = self.styles is not None and self.training
        if lenders and not mixing:
            raise ValueError("lenders lend their style in training mode, to a network with style_mixing")
        if lenders is not None and not 0 <= lenders <= images.shape[0]:
            raise ValueError(f"lenders must be from 0 to {images.shape[0]}, the number of images, got {lenders}")
        with self.styles.within(lenders) if mixing else nullcontext():
            features = self.backbone(images)
        if features.shape[-2:] != self.map_size:
            raise ValueError(
                f"images of {tuple(images.shape[-2:])} give a map of {tuple(features.shape[-2:])} but "
                f"image_size {self.image_size} gives {self.map_size}; resize them or change image_size"
            )
        return features

    def branches(self, features: Tensor, labels: Tensor | None = None) -> DANOutput:
        """What `forward` makes of the maps (B, C, h, w) that `maps` gave."""
        head = self._head(features, labels)
        # Logits of eight bits often tie, and argmax then takes the lowest class: the winner of the competition would
        # depend on how persons are numbered.
        with full_precision(features.device):
            return DANOutput(
                *head,
                logits=self._classify(head.attended),
                adversary_logits=self._classify(head.pooled),
            )

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images to the (B, C) feature that tests compare (Sec. III-A): no adversary, no memory.

        `feature` names it; by default it is that of the attention branch.

        It follows the module's mode: call `eval()` first, or batch norm takes the statistics of these images.
        """
        head = self._head(self.maps(images), None)
        if self.feature == "pooled_root":
            return signed_root(head.pooled)
        if self.feature == "pooled_whitened":
            return self.whitening(head.pooled)
        return getattr(head, self.feature)

    def keys(self, output: DANOutput) -> Tensor:
        """(B, key_dim), what the memory stores: the backbone's outputs but for the last three (Sec. IV-B)."""
        return output.pooled[:, : self.key_dim]

    def gate_features(self, output: DANOutput) -> Tensor:
        """(B, 3), the backbone's last three outputs, which Sec. IV-B reads as alpha, alpha' and beta."""
        return output.pooled[:, self.key_dim :]

    def parameter_groups(self) -> dict[str, list[str]]:
        """The names of the parameters of G_b, backbone and classifier, and of G_a, NL-CBAM (Sec. III-A).

        Without an adversary nothing is trained by L_aad: G_a is empty and its parameters belong to G_b.
        """
        names = [name for name, _ in self.named_parameters()]
        attention = [name for name in names if self.adversary and name.startswith("attention.")]
        return {"backbone": [name for name in names if name not in attention], "attention": attention}

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        training: Mapping[str, Any] | None = None,
        results: Sequence[Evaluation] = (),
    ) -> None:
        """Write the network as a folder to share, which contains neither code nor a pickle.

        model.safetensors has the weights; config.json has what builds the network again, its preprocessing, the
        weights' SHA-256, `training` and `results`; README.md is a model card written from these. Files of an earlier
        network are overwritten, each of them whole or not at all.

        Args:
            folder: a new or empty folder, or one that this has written before.
            training: how the weights came about, in plain JSON: `dan_fast.training.shared.origin_of` gives it for a
                checkpoint. Texts and lists of texts appear in the card under their keys.
            results: figures of these very weights, with their conditions.

        Raises:
            DanFastError: the backbone was given as a module, or the folder holds something else, cannot be written, or
                is being written by another process.
            TypeError: `training` is not plain JSON.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> folder = Path(tempfile.mkdtemp()) / "mine"
            >>> network = DAN(num_classes=10, backbone="resnet18", image_size=(64, 32)).eval()
            >>> network.save_pretrained(folder, training={"recipe": "my own loop"})
            >>> sorted(path.name for path in folder.iterdir())
            ['README.md', 'config.json', 'model.safetensors']
            >>> images = torch.rand(2, 3, 64, 32)
            >>> torch.equal(DAN.from_pretrained(folder).embed(images), network.embed(images))
            True
        """
        save_network(self, folder, training, results)

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str], **options: Any) -> Self:
        """The network that `save_pretrained` wrote, in eval mode on the CPU, in float32.

        Args:
            source: the folder; or where there is no such folder, an id of the Hugging Face Hub, such as "user/name",
                for which huggingface_hub has to be installed.
            options: for an id, those of `huggingface_hub.ModelHubMixin.from_pretrained`: revision, token, cache_dir,
                force_download, local_files_only.

        Raises:
            DanFastError: neither a folder nor an id that the Hub serves; or files that are missing, truncated, of a
                newer version, or of another network.

        Example: see `save_pretrained`.
        """
        return network_of_folder(cls, fetched_folder(source, options))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        training: Mapping[str, Any] | None = None,
        results: Sequence[Evaluation] = (),
        **options: Any,
    ) -> str:
        """Write what `save_pretrained` writes to a repository of the Hugging Face Hub, as the user of `hf auth login`.

        Args:
            repo_id: such as "user/name"; created if it does not exist, and public without `private=True`.
            training, results: see `save_pretrained`.
            options: those of `huggingface_hub.ModelHubMixin.push_to_hub`, such as private, branch, commit_message.

        Returns:
            The address of the commit.

        Raises:
            DanFastError: as `save_pretrained`; huggingface_hub is not installed, or the Hub did not accept it.
        """
        return push_network(self, repo_id, training, results, options)

    def _classify(self, features: Tensor) -> Tensor:
        return self.classifier(self.dropout(features.to(self.classifier.weight.dtype)))

    def _head(self, features: Tensor, labels: Tensor | None) -> AttentionHeadOutput:
        unknown = torch.full(features.shape[:1], -1, dtype=torch.int64, device=features.device)
        if labels is None or not self.adversary:
            return self.attention.head(features, self.classifier.weight, unknown)
        if self.adversary_reach == "all":
            return self.attention.head(features, self.classifier.weight, labels)
        head = self.attention.head(features, self.classifier.weight, unknown)
        correction = self.attention.head(features.detach(), self.classifier.weight.detach(), labels)
        return head._replace(adversary_loss=correction.adversary_loss)


def _require_flags(**flags: object) -> None:
    """Refuse the words that settings have in the place of a flag, of which "none" would be taken as True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            also = ' or "auto"' if name == "instance_norm" else ""
            raise TypeError(f"{name} must be True or False{also}, got {value!r}")


def _map_shape(backbone: nn.Module, image_size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, h, w) of the map, from one image of zeros; the backbone and the random state stay as they are."""
    try:
        with trial(backbone) as like:
            features = backbone(like.new_zeros(1, 3, *image_size))
    except RuntimeError as error:
        raise ValueError(f"backbone takes no images of image_size {image_size} ({error})") from error
    if not isinstance(features, Tensor) or features.ndim != 4 or 0 in features.shape:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"backbone must map (B, 3, H, W) images to a (B, C, h, w) map, got {got}")
    return tuple(features.shape[1:])
