"""Networks, memories and both as one model, from a configuration or a checkpoint."""

from pathlib import Path
from typing import Any

import torch

from dan_fast.core.defaults import plain_defaults
from dan_fast.core.errors import DanFastError
from dan_fast.core.preprocessing import IMAGENET, Preprocessing
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.launch import ranks_in
from dan_fast.nn import DAN, ProgressiveAugmentedMemory
from dan_fast.training.checkpoint import fitting_this_version, load_checkpoint
from dan_fast.training.config import LossConfig, MemoryConfig, ModelConfig, TrainConfig
from dan_fast.training.objective import TrainingModel
from dan_fast.training.starting import start_of, take_weights


def initial_network(settings: dict[str, Any], num_classes: int, read_weights: bool = True) -> DAN:
    """The network a run with these settings starts from; the same weights for the same `run.seed`.

    The process's random numbers go on as if nothing had been drawn.

    Args:
        settings: `TrainConfig.to_dict()`, or the "config" of a checkpoint.
        num_classes: identities of the labelled images.
        read_weights: False leaves out the weights it starts from, for a network that a checkpoint fills: their file
            or hub need not be there any more.

    Raises:
        DanFastError: an adversary without an attention; the weights, see `build_backbone`, `start_of` and
            `take_weights`.
    """
    return network_and_random_state(settings, num_classes, read_weights)[0]


def network_and_random_state(
    settings: dict[str, Any], num_classes: int, read_weights: bool = True, mixes_styles: bool = False
) -> tuple[DAN, torch.Tensor]:
    """`initial_network`, and the state of the CPU's generator after its weights, from where a training goes on.

    Styles are mixed in training alone, so a network that only embeds need not be able to.
    """
    # A checkpoint older than a setting does not name it; it was made with the default.
    model = ModelConfig(**settings["model"])
    if model.adversary and model.attention == "none":
        raise DanFastError(
            "With model.attention none there is no attention for the adversary to correct: add "
            "--model.attention nl_cbam or --model.adversary false."
        )
    start = start_of(model.weights) if read_weights else None
    # It is made on the CPU: no GPU's generator is forked, nor seeded, as torch.manual_seed would do.
    with torch.random.fork_rng(devices=[]), plain_defaults():
        torch.default_generator.manual_seed(settings["run"]["seed"])
        network = DAN(
            num_classes,
            backbone=model.backbone,
            image_size=tuple(settings["data"]["image_size"]),
            reduction=model.reduction,
            dropout=model.dropout,
            weights=model.weights if read_weights and start is None else "none",
            attention=model.attention,
            adversary=model.adversary,
            adversary_reach=LossConfig(**settings["loss"]).adversary_reach,
            feature=model.feature,
            style_mixing=mixes_styles,
            gradient_checkpointing=model.gradient_checkpointing,
            instance_norm=model.instance_norm,
        )
        random_state = torch.get_rng_state()
    if start is not None:
        take_weights(network, network_of(start, model.weights), model.weights)
    return network, random_state


def trained_network(path: str | Path) -> tuple[DAN, dict[str, Any]]:
    """The network of a checkpoint or a shared folder in eval mode on the CPU, and the settings it was trained with.

    Raises:
        DanFastError: see `load_checkpoint`; or settings or weights of another version.

    Example:
        network, settings = trained_network("runs/train/checkpoint.pt")
        features = network.embed(images)
    """
    state = load_checkpoint(path)
    return network_of(state, path), state["config"]


def network_of(state: dict[str, Any], path: str | Path) -> DAN:
    """The network of what `load_checkpoint` gave for a path, in eval mode on the CPU, in float32.

    Raises:
        DanFastError: settings or weights of another version.
    """
    prefix = "network."
    with fitting_this_version(path):
        network = initial_network(state["config"], state["num_classes"], read_weights=False)
        network.preprocessing = preprocessing_of(state)
        network.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state["model"].items() if name.startswith(prefix)}
        )
    return network.eval().to("cpu", torch.float32)


def preprocessing_of(state: dict[str, Any]) -> Preprocessing:
    """How the network of what `load_checkpoint` gave takes its images, whatever its backbone's library says today."""
    # Older checkpoints do not say; there was one way then.
    return Preprocessing.from_dict(state["preprocessing"]) if "preprocessing" in state else IMAGENET


def build_memory(
    config: MemoryConfig, key_dim: int, process_group: ProcessGroup | None = None
) -> ProgressiveAugmentedMemory:
    """An empty memory pair for keys of `key_dim` numbers, divided over the ranks of a process group, if any.

    Raises:
        DanFastError: a start for gates that are no parameters, or fewer slots than ranks.
    """
    ranks = ranks_in(process_group)
    for name in ("labeled_slots", "unlabeled_slots"):
        if getattr(config, name) < ranks:
            raise DanFastError(
                f"memory.{name} {getattr(config, name)} cannot be divided over {ranks} ranks: use more slots or fewer "
                "ranks."
            )
    memory = ProgressiveAugmentedMemory(
        labeled_slots=config.labeled_slots,
        unlabeled_slots=config.unlabeled_slots,
        key_dim=key_dim,
        decay=config.decay,
        decay_unlabeled=config.decay_unlabeled,
        gates=config.gates,
        process_group=process_group,
    )
    if config.gates == "features" and config.initial_alpha != 0:
        raise DanFastError(
            f"memory.initial_alpha {config.initial_alpha} is for gates that are parameters: "
            "set it to 0 or memory.gates to parameters."
        )
    if config.gates == "parameters":
        torch.nn.init.constant_(memory.alpha, config.initial_alpha)
        torch.nn.init.constant_(memory.alpha_unlabeled, config.initial_alpha)
    return memory


def build_model(
    config: TrainConfig,
    network: DAN,
    unlabeled_places: bool,
    lending: bool,
    process_group: ProcessGroup | None = None,
) -> TrainingModel:
    """What a run trains: the network with a memory, where one is of use.

    Args:
        config: of the run.
        network: see `network_and_random_state`.
        unlabeled_places: whether there are unlabelled images in a batch.
        lending: whether they lend their styles and serve for that alone.
        process_group: ranks that train together, over which a memory is divided.

    Raises:
        DanFastError: see `build_memory`; or batch norm that cannot be synchronised.
    """
    if process_group is not None and _synchronises(config, process_group):
        network = with_synchronised_norm(network, process_group)
    memory = None
    if (unlabeled_places and not lending) or config.loss.labeled_embedding > 0:
        memory = build_memory(config.memory, network.key_dim, process_group)
        # L_lde, of unlabelled samples, trains the gates; without any weight decay would be all that moves them.
        memory.requires_grad_(unlabeled_places)
    half = torch.bfloat16 if config.run.precision == "bfloat16" else None
    return TrainingModel(network, memory, config.loss, half, config.memory.temperature, lending)


def with_synchronised_norm(network: DAN, group: ProcessGroup) -> DAN:
    """The network with batch norm that takes its statistics from the images of all ranks; for GPUs."""
    if any(type(each).__module__.startswith("timm.") for each in network.backbone.modules()):
        # PyTorch's own would leave out the activations that timm's batch norm contains.
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(network, group)
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(network, group)


def _synchronises(config: TrainConfig, group: ProcessGroup) -> bool:
    on_gpus = "nccl" in torch.distributed.get_backend_config(group)
    second_order = config.meta.order == 2 and config.meta.procedure != "daml1"
    wanted = config.model.sync_batch_norm
    if wanted == "auto":
        return on_gpus and not second_order
    if wanted and not on_gpus:
        raise DanFastError("PyTorch's SyncBatchNorm is for GPUs alone: set model.sync_batch_norm to false or auto.")
    if wanted and second_order:
        raise DanFastError(
            "PyTorch's SyncBatchNorm has no second derivatives: set model.sync_batch_norm to false or auto, or "
            "meta.order to 1."
        )
    return bool(wanted)
