"""Every setting of a training run: the one source for the YAML file, the flags and their help."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from dan_fast.core.batches import BrokenImages
from dan_fast.training.recipes import NO_RECIPE, over, recipe_settings, recipe_words, require_recipe

Precision = Literal["float32", "bfloat16"]
CacheCheck = Literal["quick", "full"]
# One path needs no brackets on the command line: --data.labeled market, --data.labeled '[market, cuhk03]'.
Paths = list[str] | str
# The settings of `data` that are such.
DATASETS = ("labeled", "unlabeled", "targets")


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's and PyTorch's numbers and arrays
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    casts = {bool: bool, int: int, float: float, PathLike: fspath}
    return next((cast(value) for kind, cast in casts.items() if isinstance(value, kind)), value)


def as_list(paths: Paths) -> list[str]:
    """One path or several, as a list."""
    return list(paths) if isinstance(paths, Iterable) and not isinstance(paths, str) else [paths]


@dataclass
class _Section:
    """Settings whose paths are text and whose numbers, checked as flags, are such that load with weights_only=True."""

    def __post_init__(self) -> None:
        for each in fields(self):
            setattr(self, each.name, _plain(getattr(self, each.name)))


@dataclass
class DataConfig(_Section):
    """Images and batches.

    Args:
        labeled: Folders or manifests whose train split is labelled; several are fused (Sec. III-D). FOLDER@VARIANT
            selects a variant of a dataset that has several, such as "cuhk03@labeled new".
        unlabeled: Datasets whose train split is used without labels (the paper: MSMT17), or folders of any images. They
            lend styles or get pseudo labels, as the recipe says. Without unlabelled images, only loss.labeled_embedding
            uses a memory.
        targets: Folders or manifests to evaluate on after the last epoch; they are never trained on. Targets with the
            same name are also named by the folders above them.
        protocol: Name of a protocol of the literature, such as table4 or p1, in place of labeled, unlabeled and
            targets; `dan-fast protocols` lists the protocols.
        root: Folder that contains the protocol's datasets, up to two levels deep.
        unlabeled_share: Share p of the unlabelled images that is used (Fig. 7; the paper: 1).
        image_size: Height and width to which images are resized, written as '[256, 128]' (the paper: '[224, 224]').
        batch_size: Images per iteration, S and S~ together (the paper: 64), over all ranks.
        batch_size_per_rank: Whether batch_size is the number of images of each rank, so that the whole batch is as many
            times larger as there are ranks. Such a run can only be resumed with the same number of ranks.
        iterations: Iterations per epoch, to compare trainings with different batches at equal length; 0 means as many
            as the labelled images fill.
        unlabeled_fraction: Share of unlabelled images in a batch.
        feedback_fraction: Largest share of the labelled places in S~ that images from M' take, with their pseudo
            labels; 0 means none.
        workers: Processes that decode images; 0 decodes in the training process.
        broken_images: Stop with an error at an image that cannot be decoded, or skip and count it.
        cache: Folder that keeps decoded images. The images are the same, and a training on two cores gets them 1.75
            times as fast; each takes 3 height width bytes there. user is dan-fast in the user's cache folder
            ($XDG_CACHE_HOME or ~/.cache); none decodes images each time.
        cache_check: quick compares the sizes and modification times of the images, and their contents where these
            differ; full compares all contents, of the images and of the cache.
    """

    labeled: Paths = field(default_factory=list)
    unlabeled: Paths = field(default_factory=list)
    targets: Paths = field(default_factory=list)
    protocol: str | None = None
    root: str | None = None
    unlabeled_share: ClosedUnitInterval = 1.0
    image_size: tuple[PositiveInt, PositiveInt] = (224, 224)
    batch_size: PositiveInt = 64
    batch_size_per_rank: bool = False
    iterations: NonNegativeInt = 0
    unlabeled_fraction: ClosedUnitInterval = 0.5
    feedback_fraction: ClosedUnitInterval = 0.5
    workers: NonNegativeInt = 2
    broken_images: BrokenImages = "error"
    cache: str = "none"
    cache_check: CacheCheck = "quick"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labeled, self.unlabeled, self.targets = map(as_list, (self.labeled, self.unlabeled, self.targets))


@dataclass
class ModelConfig(_Section):
    """The network.

    Args:
        backbone: torchvision ResNet (the paper: resnet50): resnet18, resnet34, resnet50 or resnet101; or timm:NAME for
            a timm model that outputs a map.
        weights: Weights to start from: none; imagenet (the paper), which torchvision or timm downloads; a file with a
            state dict that has torchvision's or timm's names (torch.save, safetensors); or, to fine-tune, a checkpoint
            or shared folder of this package.
        attention: The attention (the paper: nl_cbam). The others are those of Fig. 6: cbam; only the spatial attention
            of nl_cbam (non_local) or of cbam (spatial); or none.
        adversary: Train with the attention adversary network (the paper), that is, with L_aad and the competition
            between the two branches. Without it there is one branch, and the attention is trained like the backbone.
        reduction: Dimension reduction ratio r of the attention's bottlenecks (the paper: 12); 1 is NL-CBAM* of
            Fig. 6.
        dropout: Dropout rate before the classifier (the paper: 0.5).
        style_mixing: Images whose channel statistics are mixed into early maps in training: none (the paper); batch,
            the other images of the batch; or unlabeled, the unlabelled images of the batch, which then serve only for
            that. Without such images nothing is mixed.
        instance_norm: Normalise half of the channels of the first norm of each early block image by image, in two
            stages (IBN-Net-a: three), which removes some of a camera's style. This is for ResNets and for timm models
            with batch norm; auto does it where the backbone has such blocks.
        feature: The feature that tests compare: attended, that of the attention branch (the paper); pooled, that of the
            backbone; pooled_root, the square root of each number of pooled, with its sign; or pooled_whitened, these
            roots whitened after each epoch by how the keys of one person in M differ. Without M, pooled_whitened is
            pooled_root.
        gradient_checkpointing: Recompute maps of the backbone in the backward pass instead of keeping them all: less
            memory, more time, the same gradients. Not possible where styles are mixed (style_mixing).
        sync_batch_norm: With several ranks, whether batch norm takes its statistics from the images of all ranks, for
            which PyTorch needs GPUs, or of each rank by itself. auto is true on GPUs, except with meta.order 2:
            synchronised batch norm lacks its derivatives.
    """

    backbone: str = "resnet50"
    weights: str = "imagenet"
    attention: Literal["nl_cbam", "cbam", "non_local", "spatial", "none"] = "nl_cbam"
    adversary: bool = True
    reduction: PositiveInt = 12
    dropout: ClosedUnitInterval = 0.5
    style_mixing: Literal["none", "batch", "unlabeled"] = "none"
    instance_norm: Literal["auto"] | bool = False
    feature: Literal["attended", "pooled", "pooled_root", "pooled_whitened"] = "attended"
    gradient_checkpointing: bool = False
    sync_batch_norm: Literal["auto"] | bool = "auto"


@dataclass
class MemoryConfig(_Section):
    """The progressive augmented memory.

    Args:
        labeled_slots: Slots s1 of the labelled memory M (the paper: 9000). With loss.labeled_embedding, provide some
            for each person: a person without a slot has no such loss.
        unlabeled_slots: Slots s2 of the unlabelled memory M' (the paper: 5500).
        decay: Decay kappa1 of the usage of M, Eq. (5) (the paper: 0.99).
        decay_unlabeled: Decay kappa2 of the usage of M', Eq. (12) (the paper: 0.99).
        gates: Where alpha, alpha' and beta come from: parameters (Table II), or features, the last three features of
            the backbone (Sec. IV-B).
        initial_alpha: Initial value of alpha and alpha' where they are parameters (the paper does not say). At 0, half
            of a key goes to the least-used slot and half is spread over all slots; at -4, nearly all of it goes to the
            least-used slot.
        temperature: Divides the cosines in loss.labeled_embedding (the paper has no such loss).
        products: How a GPU multiplies keys and slots: float32, or tf32x3, which takes three products on the tensor
            cores for each one and has 1.2 times the error.
    """

    labeled_slots: PositiveInt = 9000
    unlabeled_slots: PositiveInt = 5500
    decay: ClosedUnitInterval = 0.99
    decay_unlabeled: ClosedUnitInterval = 0.99
    gates: Literal["parameters", "features"] = "parameters"
    initial_alpha: float = 0.0
    temperature: PositiveFloat = 0.05
    products: Literal["float32", "tf32x3"] = "float32"


@dataclass
class LossConfig(_Section):
    """Weights of the losses, Eq. (1).

    Args:
        adversary: lambda1 of L_aad (the paper: 0.6).
        embedding: lambda2 of L_lde (the paper: 0.5).
        regularizer: lambda3 of R (the paper: 0.2).
        confidence_prior: Weight of -log(beta), added to L_lde so that beta rises as pseudo labels become reliable (Fig.
            5b). In the paper it is 0: the gradient of L_lde can then only lower beta, and weight decay works against
            that.
        adversary_reach: What the gradient of L_aad reaches: all of the network (the paper), or only the attention,
            which it is meant to correct.
        labeled_embedding: Weight of the first term of Eq. (15) when it is also applied to labelled images, with their
            own labels (the paper: 0).
    """

    adversary: NonNegativeFloat = 0.6
    embedding: NonNegativeFloat = 0.5
    regularizer: NonNegativeFloat = 0.2
    confidence_prior: NonNegativeFloat = 0.1
    adversary_reach: Literal["all", "attention"] = "all"
    labeled_embedding: NonNegativeFloat = 0.0


@dataclass
class MetaConfig(_Section):
    """Data assimilation meta-learning, Sec. III-D.

    Args:
        procedure: daml3 splits the batch and optimises piecewise (the paper), daml2 splits it and optimises
            L_total, daml1 is plain SGD on L_total (Table IX).
        order: 1 drops second derivatives (Algorithm 1 as printed), 2 keeps them (Eq. 18).
        eta: Weight of the meta-test loss, Eq. (17) (the paper: 1).
        stall_guard: Number of adversary wins in a row after which backbone and attention are both updated until
            attention wins; 0 follows the paper literally.
        tie: What happens when both branches classify equally many samples correctly: cross_entropy lets the branch with
            the lower cross-entropy win; both updates both.
    """

    procedure: Literal["daml1", "daml2", "daml3"] = "daml3"
    order: Literal[1, 2] = 1
    eta: NonNegativeFloat = 1.0
    stall_guard: NonNegativeInt = 20
    tie: Literal["cross_entropy", "both"] = "cross_entropy"


@dataclass
class OptimizerConfig(_Section):
    """The outer SGD and its schedule, Eq. (19).

    Args:
        epochs: Passes through the labelled images, or through data.iterations (the paper: 500). With fewer epochs, Eq.
            (19) is stretched over them.
        lr_scale: Factor on the step sizes delta1 and delta2 of Eq. (19) (the paper: 1, over 500 epochs). Short
            trainings need 30 to 60, or half of that with a meta step.
        momentum: Momentum of the outer step (the paper: 0.9).
        weight_decay: Weight decay of the outer step (the paper: 5e-4).
        backbone_lr_scale: Additional factor on both step sizes for the backbone's parameters (the paper: 1). Below 1,
            pretrained layers keep more of what they have learnt; at 0 the weights stay fixed, while the statistics of
            batch norm are still updated.
    """

    epochs: PositiveInt = 500
    lr_scale: NonNegativeFloat = 1.0
    momentum: NonNegativeFloat = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    backbone_lr_scale: NonNegativeFloat = 1.0


@dataclass
class RunConfig(_Section):
    """Where and how a run takes place.

    The seed, the precision and the choice of GPU or CPU change what is learnt; the other settings change its rounding.

    Args:
        out: Folder of the run: config.yaml, checkpoint.pt, tensorboard/, results.json.
        resume: Continue from the checkpoint in the folder. auto continues if there is a checkpoint and starts a new run
            if there is none, for a queue that repeats the same command.
        seed: Seed of weights, batches, augmentation and dropout.
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        precision: float32, or bfloat16 autocast for the network in training (memory, losses and evaluations stay
            float32).
        deterministic: Let the GPU use only operators that give the same bits in every run, which takes longer. An
            operator without such a form ends the run with an error that names it. On a CPU, runs are repeatable anyway.
        compile: Compile the backbone (torch.compile) after two iterations, time 16 more in pairs with and without it,
            and keep the faster; the results say which. A compiled backbone rounds differently, so runs are repeatable
            only up to rounding. Not possible with several ranks, meta.order 2 or model.gradient_checkpointing.
        checkpoint_every_s: Seconds between checkpoints, which is the most that a killed run loses. A run that is asked
            to stop saves a checkpoint anyway, and so does every epoch that is evaluated.
        checkpoint_every: Save a checkpoint after this many iterations too, if that comes first; 0 turns this off.
        log_every: Iterations between two lines of scalars.
        evaluate_every: Epochs between evaluations on the targets; 0 evaluates after the last epoch only.
        choose_epoch_on_target: Report the evaluated epoch with the highest mAP on the targets, whose weights are kept
            in chosen.pt, in place of the last one (the paper does not say which it reports). Such figures are too high
            to compare with others, and are marked so.
    """

    out: str = "runs/train"
    resume: Literal["auto"] | bool = False
    seed: NonNegativeInt = 0
    device: str = "auto"
    precision: Precision = "float32"
    deterministic: bool = False
    compile: bool = False
    checkpoint_every_s: PositiveFloat = 300.0
    checkpoint_every: NonNegativeInt = 0
    log_every: PositiveInt = 10
    evaluate_every: NonNegativeInt = 0
    choose_epoch_on_target: bool = False


@dataclass
class TrainConfig:
    """Train a Data Assimilation Network.

    Args:
        recipe: Named settings of the method: paper is the paper as printed; plain has the same backbone, augmentation
            and classification loss without any part of DAN; dan is what was found to work; none is the bare defaults.
            Files and other flags override it, and the results say what they changed. In Python, `of_recipe` applies a
            recipe; here it is only a name.
        data: Images and batches.
        model: The network.
        memory: The progressive augmented memory.
        loss: Weights of the losses, Eq. (1).
        meta: Data assimilation meta-learning, Sec. III-D.
        optimizer: The outer SGD and its schedule, Eq. (19).
        run: Where and how the run takes place.
    """

    recipe: str = NO_RECIPE
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require_recipe(self.recipe)

    @classmethod
    def of_recipe(cls, recipe: str, **sections: Mapping[str, Any]) -> "TrainConfig":
        """The settings of a recipe, with others on top.

        Args:
            recipe: dan, paper, plain or none.
            sections: settings that override those of the recipe, one mapping per section.

        Raises:
            DanFastError: there is no such recipe.
            TypeError: there is no such section or setting.

        Example:
            >>> config = TrainConfig.of_recipe("plain", data={"labeled": "market"}, optimizer={"epochs": 60})
            >>> config.meta.procedure, config.model.adversary, config.optimizer.epochs
            ('daml1', False, 60)
        """
        makers = {each.name: each.default_factory for each in fields(cls) if each.name != "recipe"}
        unknown = sorted(sections.keys() - makers.keys())
        if unknown:
            raise TypeError(f"{unknown[0]} is no section of the settings: choose among {', '.join(makers)}.")
        for section, settings in sections.items():
            if not isinstance(settings, Mapping):
                raise TypeError(f"{section} must be a mapping, which leaves the recipe's other settings as they are.")
        merged = over(recipe_settings(recipe), sections)
        return cls(recipe=recipe, **{section: makers[section](**settings) for section, settings in merged.items()})

    @property
    def recipe_words(self) -> str:
        """The recipe and what was changed on top of it, as results name it; "" without a recipe."""
        return recipe_words(self.to_dict(), TrainConfig().to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in config.yaml and in a checkpoint."""
        plain = asdict(self)
        plain["data"]["image_size"] = list(plain["data"]["image_size"])
        return plain


def goes_on(run: RunConfig | Any) -> bool:
    """Whether a training with these settings of `run` continues one, and does not start."""
    return (Path(run.out) / "checkpoint.pt").exists() if run.resume == "auto" else run.resume
