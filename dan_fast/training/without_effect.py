"""Settings that were chosen and change nothing, because of others."""

from collections.abc import Iterator

from dan_fast.training.config import TrainConfig
from dan_fast.training.recipes import recipe_changes


def without_effect(config: TrainConfig, unlabeled: bool) -> Iterator[str]:
    """A sentence for each reason why settings on top of the recipe's have no effect.

    Args:
        config: of the run.
        unlabeled: whether its batches hold unlabelled images.

    Example:
        >>> config = TrainConfig.of_recipe("dan", meta={"order": 2, "eta": 0.5})
        >>> list(without_effect(config, unlabeled=False))
        ['meta.order 2 and meta.eta 0.5 change nothing with meta.procedure daml1, which has no meta step.']
    """
    mixing, attention = config.model.style_mixing, config.model.attention
    labelled_by_memory = unlabeled and mixing != "unlabeled"
    by_labels = config.loss.labeled_embedding > 0
    of_recipe = TrainConfig.of_recipe(config.recipe).model.feature
    roots = any(feature in ("pooled_root", "pooled_whitened") for feature in (config.model.feature, of_recipe))
    rules = [
        (("data.unlabeled_fraction",), unlabeled, "without unlabelled images"),
        (("data.unlabeled_share",), unlabeled or config.data.unlabeled_share == 0, "without unlabelled images"),
        (
            (
                "data.feedback_fraction",
                "memory.unlabeled_slots",
                "memory.decay_unlabeled",
                "loss.embedding",
                "loss.regularizer",
            ),
            labelled_by_memory,
            "without unlabelled images that are given pseudo labels, not styles alone (model.style_mixing)",
        ),
        (
            ("memory.labeled_slots", "memory.decay", "memory.gates", "memory.initial_alpha", "memory.products"),
            labelled_by_memory or by_labels,
            "without a memory, which pseudo labels or loss.labeled_embedding need",
        ),
        (
            ("loss.confidence_prior",),
            labelled_by_memory and config.loss.embedding > 0,
            "without unlabelled images in L_lde (loss.embedding, model.style_mixing)",
        ),
        (("memory.temperature",), by_labels, "where loss.labeled_embedding is 0"),
        (("model.style_mixing",), mixing != "unlabeled" or unlabeled, "without unlabelled images"),
        (("model.reduction",), attention not in ("none", "spatial"), f"with model.attention {attention}"),
        (("model.feature",), attention != "none" or roots, "with model.attention none"),
        (("loss.adversary", "loss.adversary_reach"), config.model.adversary, "without model.adversary"),
        (
            ("meta.order", "meta.eta"),
            config.meta.procedure != "daml1",
            "with meta.procedure daml1, which has no meta step",
        ),
        (
            ("meta.stall_guard", "meta.tie"),
            config.meta.procedure == "daml3" and config.model.adversary,
            "where there is no competition, which meta.procedure daml3 with model.adversary holds",
        ),
    ]
    changes = recipe_changes(config.to_dict(), TrainConfig().to_dict())
    for names, has_effect, reason in rules:
        idle = [f"{name} {changes[name]}" for name in names if name in changes]
        if idle and not has_effect:
            yield f"{' and '.join(idle)} change{'s' if len(idle) == 1 else ''} nothing {reason}."
    if config.model.feature == "pooled_whitened" and not (labelled_by_memory or by_labels):
        yield (
            "model.feature pooled_whitened tests what pooled_root tests without a memory, which pseudo labels or "
            "loss.labeled_embedding need."
        )
    if (
        labelled_by_memory
        and mixing == "none"
        and not any((config.loss.embedding, config.loss.regularizer, config.data.feedback_fraction))
    ):
        yield (
            "Unlabelled images take places in the batches and part in no loss: set loss.embedding, loss.regularizer or "
            "data.feedback_fraction, have them lend styles (model.style_mixing), or set data.unlabeled_share to 0."
        )
