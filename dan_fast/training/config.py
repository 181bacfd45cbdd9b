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
            chooses among the variants of a dataset that has several, such as "cuhk03@labeled new".
        unlabeled: Datasets whose train split is used without labels (the paper: MSMT17), or folders of any images, for
            styles or pseudo labels, as the recipe says. Without any only loss.labeled_embedding has a memory.
        targets: Folders or manifests to evaluate on after the last epoch, never trained on; those of one name are
            called by the folders above them too.
        protocol: In place of these three, a protocol of the literature by its name, such as table4 or p1; `dan-fast
            protocols` lists them.
        root: Folder in which the protocol's datasets lie, up to two levels deep.
        unlabeled_share: Share p of the unlabelled images that is used (Fig. 7; the paper: 1).
        image_size: Height and width to which images are resized, written as '[256, 128]' (the paper: '[224, 224]').
        batch_size: Images an iteration, S and S~ together (the paper: 64), on however many ranks.
        batch_size_per_rank: Whether batch_size is for each rank, and the whole batch as many times as large; such a run
            goes on with the same number of ranks alone.
        iterations: Iterations of an epoch, to compare trainings of different batches at equal length; 0: as many as the
            labelled images fill.
        unlabeled_fraction: Share of unlabelled images in a batch.
        feedback_fraction: Largest share of S~'s labelled places for images of M' under their pseudo label; 0: none.
        workers: Processes that decode images; 0 decodes in the training process.
        broken_images: Stop with an error at an image that cannot be decoded, or skip and count it.
        cache: Folder for decoded images, which come out the same, 1.75 times as fast in a training on two cores; each
            takes 3 height width bytes there. user is dan-fast in the user's cache folder ($XDG_CACHE_HOME or
            ~/.cache), none decodes images each time.
        cache_check: quick compares sizes and modification times of the images, and contents where these differ; full
            compares all contents, of the images and of what is cached.
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
            a model of timm that gives a map.
        weights: none; imagenet (the paper), the library's own download; the file of a state dict in torchvision's or
            timm's names (torch.save, safetensors); or a checkpoint or shared folder of this package, to fine-tune.
        attention: The attention (the paper: nl_cbam). The others are those of Fig. 6: cbam, the spatial
            attention of nl_cbam (non_local) or of cbam (spatial) alone, or none.
        adversary: Train with the attention adversary network (the paper), that is L_aad and the competition of
            the two branches; without it the attention is trained like the backbone, and there is one branch.
        reduction: Dimension reduction ratio r of the attention's bottlenecks (the paper: 12); 1 is NL-CBAM* of
            Fig. 6.
        dropout: Dropout rate before the classifier (the paper: 0.5).
        style_mixing: Whose channel statistics early maps take a part of in training: none (the paper); batch, of its
            other images; or unlabeled, of its unlabelled images, which then serve for that alone. Without such images
            nothing is mixed.
        instance_norm: Half of the channels of the first norm of each early block are normalised image by image, in two
            stages (IBN-Net-a: three), which takes out some of a camera's style. For ResNets and others of timm with
            batch norm; auto: where the backbone has such blocks.
        feature: What tests compare: attended, the attention branch's (the paper), pooled, the backbone's own,
            pooled_root, the square root of each number of that, with its sign, or pooled_whitened, these roots
            whitened after each epoch by how the keys of one person in M differ; pooled_root where there is no M.
        gradient_checkpointing: Compute maps of the backbone again in the backward pass instead of keeping them all:
            less memory, more time, the same gradients. Not where styles are mixed (style_mixing).
        sync_batch_norm: Where several ranks train, whether batch norm takes its statistics from the images of all of
            them, for which PyTorch needs GPUs, or of each; auto is true on GPUs, but for meta.order 2, whose
            derivatives it lacks.
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
        labeled_slots: Slots s1 of the labelled memory M (the paper: 9000). With loss.labeled_embedding some for each
            person, as one without a slot has no such loss.
        unlabeled_slots: Slots s2 of the unlabelled memory M' (the paper: 5500).
        decay: Decay kappa1 of the usage of M, Eq. (5) (the paper: 0.99).
        decay_unlabeled: Decay kappa2 of the usage of M', Eq. (12) (the paper: 0.99).
        gates: alpha, alpha' and beta as parameters (Table II) or read from the last three features of the
            backbone (Sec. IV-B).
        initial_alpha: Start of alpha and alpha' as parameters (the paper does not say). 0: half of a key goes to the
            least-used slot, half is spread over all; -4: nearly all of it goes to the least-used slot.
        temperature: Divides the cosines in loss.labeled_embedding (the paper: it has no such loss).
        products: How a GPU multiplies keys and slots: float32, or tf32x3, three products on its tensor cores for each
            one, with 1.2 times the error.
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
        confidence_prior: Weight of -log(beta) added to L_lde, so that beta rises as pseudo labels become reliable
            (Fig. 5b); the paper: 0, with which its gradient can only lower beta and weight decay works against it.
        adversary_reach: What the gradient of L_aad reaches: all of the network (the paper), or the attention alone,
            which it is to correct.
        labeled_embedding: Weight of the first term of Eq. (15) for labelled images too, by their own labels (the
            paper: 0).
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
        stall_guard: Adversary wins in a row after which backbone and attention are both updated until
            attention wins; 0 is the literal paper.
        tie: Where both branches classify equally many samples rightly, the one of lower cross_entropy wins, or
            both are updated.
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
        epochs: Passes through the labelled images, or through data.iterations (the paper: 500); fewer stretch
            Eq. (19) over them.
        lr_scale: Factor on the step sizes delta1 and delta2 of Eq. (19) (the paper: 1, over 500 epochs). Short
            trainings need 30 to 60, with a meta step half of that.
        momentum: Momentum of the outer step (the paper: 0.9).
        weight_decay: Weight decay of the outer step (the paper: 5e-4).
        backbone_lr_scale: Further factor on both step sizes for the backbone's parameters (the paper: 1); below 1
            pretrained layers keep more of what they know; 0 keeps weights, while batch norm's statistics move on.
    """

    epochs: PositiveInt = 500
    lr_scale: NonNegativeFloat = 1.0
    momentum: NonNegativeFloat = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    backbone_lr_scale: NonNegativeFloat = 1.0


@dataclass
class RunConfig(_Section):
    """Where and how a run takes place; seed, precision and GPU or CPU change what is learnt, the rest its rounding.

    Args:
        out: Folder of the run: config.yaml, checkpoint.pt, tensorboard/, results.json.
        resume: Continue from the checkpoint in the folder; auto continues if there is one and starts if there is none,
            for a queue that starts the same command again.
        seed: Seed of weights, batches, augmentation and dropout.
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        precision: float32, or bfloat16 autocast for the network in training (memory, losses and evaluations stay
            float32).
        deterministic: Let the GPU use only operators that give the same bits in every run, which takes longer; one that
            has no such form ends the run and is named. On a CPU runs repeat themselves anyway.
        compile: Compile the backbone (torch.compile) after two iterations and keep that where 16 more, in pairs with
            and without it, are faster; results say what was taken. It rounds otherwise, so that runs repeat themselves
            up to rounding only. Not with several ranks, meta.order 2 or model.gradient_checkpointing.
        checkpoint_every_s: Seconds between checkpoints, which is what a run that is killed loses at most; one that is
            asked to stop, and the epochs that are evaluated, have theirs anyway.
        checkpoint_every: Iterations after which there is a checkpoint before that; 0: none.
        log_every: Iterations between two lines of scalars.
        evaluate_every: Epochs between evaluations on the targets; 0 evaluates after the last epoch only.
        choose_epoch_on_target: Report the evaluated epoch of the highest mAP on the targets, whose weights are kept in
            chosen.pt, in place of the last one (the paper does not say which it reports). Such figures are too high to
            be compared with others, and say so.
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
        recipe: Settings of the method by a name: paper is the paper as printed, plain the same backbone, augmentation
            and classification loss without any part of DAN, dan what was found to work, none the bare defaults. Files
            and other flags win over it, and results say what they changed. In Python `of_recipe` applies a recipe;
            here it is a name only.
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
            sections: settings that win over the recipe's, a mapping a section.

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
