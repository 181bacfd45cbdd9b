"""A whole experiment in minutes: synthetic domains, a small DAN, an unseen domain, a report."""

import time
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table as ConsoleTable

from dan_fast.data import ReIDDataset, image_loader, load_dataset
from dan_fast.data.synthetic import synthesize
from dan_fast.evaluation import evaluate_features, extract_dataset
from dan_fast.nn import DAN
from dan_fast.reporting import Figure, Table, plot_attention, plot_curves, plot_ranked_lists, write_report
from dan_fast.training import (
    DataConfig,
    MemoryConfig,
    MetaConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    Trainer,
)
from dan_fast.training.build import initial_network

LABELED = ("campus", "station")
UNLABELED = ("mall",)
UNSEEN = "street"
IMAGE_SIZE = (96, 48)


def quickstart(
    out: str = "runs/quickstart",
    epochs: PositiveInt = 36,
    identities: PositiveInt = 40,
    seed: NonNegativeInt = 0,
    workers: NonNegativeInt = 0,
) -> None:
    """Train a ResNet-18 DAN on two labelled synthetic domains and an unlabelled one; test it on an unseen one.

    An interrupted quickstart continues when it is started again.

    Args:
        out: Folder for the images, the run and the report (index.html).
        epochs: Passes through the labelled images.
        identities: Persons in each domain.
        seed: Seed of images, weights and batches.
        workers: Processes that decode images; 0 decodes in this one.
    """
    started = time.monotonic()
    console = Console()
    folder = Path(out)
    console.print(f"Drawing {identities} persons in each of {len(LABELED) + len(UNLABELED) + 1} domains ...")
    domains = [*LABELED, *UNLABELED, UNSEEN]
    # All persons of the unseen domain are test persons, and none of the others.
    synthesize(
        folder / "data",
        domains=domains[:-1],
        identities=identities,
        seed=seed,
        image_size=IMAGE_SIZE,
        test_fraction=0.0,
    )
    synthesize(
        folder / "data",
        domains=[UNSEEN],
        identities=identities,
        seed=seed,
        image_size=IMAGE_SIZE,
        test_fraction=1.0,
    )
    config = _config(folder, epochs, seed, workers)
    trainer = Trainer(config)
    unseen = load_dataset(folder / "data" / UNSEEN)

    with torch.random.fork_rng():
        untrained = initial_network(config.to_dict(), trainer.training_set.num_classes).eval()
    before, _ = _evaluate(untrained, unseen, workers)
    trainer.fit()
    network = trainer.model.network.eval()
    after, features = _evaluate(network, unseen, workers)

    columns = ["network", *after.percentages()]
    rows = [["untrained", *before.row()], ["trained", *after.row()]]
    size = f"{after.num_query} queries, {after.num_gallery} gallery images"
    title = f"{UNSEEN}, a domain never seen in training ({size})"
    shown = ConsoleTable(*columns, title=title)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)

    query, gallery = features.split()
    plot_curves(folder / "run", folder / "curves.png")
    plot_ranked_lists(query, gallery, folder / "ranked.png")
    _plot_attention(network, unseen, folder / "attention.png")
    attention_note = "Spatial attention A_S; its colours span each image's own range, written above."
    page = write_report(
        folder,
        "dan_fast quickstart",
        f"A ResNet-18 DAN trained from scratch for {epochs} epochs on the synthetic domains "
        f"{' and '.join(LABELED)} (labelled) and {', '.join(UNLABELED)} (unlabelled), tested on {UNSEEN}.",
        [Table(title, columns, rows, "In percent: CMC at ranks 1, 5 and 10, mAP and mINP.")],
        [
            Figure("Training", folder / "curves.png", "Losses, both branches' accuracy, gates and memory."),
            Figure("Ranked lists", folder / "ranked.png", f"Queries of {UNSEEN} and what the network ranks first."),
            Figure(
                "Attention",
                folder / "attention.png",
                attention_note,
            ),
        ],
    )
    console.print(f"Report: {page} ({time.monotonic() - started:.0f} s)", highlight=False, soft_wrap=True)


def _config(folder: Path, epochs: int, seed: int, workers: int) -> TrainConfig:
    run = folder / "run"
    return TrainConfig(
        data=DataConfig(
            labeled=[str(folder / "data" / name) for name in LABELED],
            unlabeled=[str(folder / "data" / name) for name in UNLABELED],
            targets=[str(folder / "data" / UNSEEN)],
            image_size=IMAGE_SIZE,
            # A few hundred iterations are few for pseudo labels to become good: labelled images lead.
            unlabeled_fraction=0.25,
            feedback_fraction=0.25,
            workers=workers,
        ),
        model=ModelConfig(backbone="resnet18", weights="none"),
        memory=MemoryConfig(labeled_slots=600, unlabeled_slots=400),
        # The default guard seldom acts in so short a run, and a backbone frozen half the time learns little.
        meta=MetaConfig(order=1, stall_guard=2),
        optimizer=OptimizerConfig(epochs=epochs, lr_scale=30.0),
        run=RunConfig(out=str(run), resume=(run / "checkpoint.pt").exists(), seed=seed),
    )


def _evaluate(network: DAN, dataset: ReIDDataset, workers: int):
    features = extract_dataset(
        network.embed,
        dataset,
        IMAGE_SIZE,
        workers=workers,
        device=next(network.parameters()).device,
        preprocessing=network.preprocessing,
    )
    return evaluate_features(features), features


def _plot_attention(network: DAN, dataset: ReIDDataset, path: Path, count: int = 8) -> None:
    step = max(1, len(dataset.query) // count)
    samples = dataset.query[::step][:count]
    images, _ = next(iter(image_loader(samples, IMAGE_SIZE, batch_size=count, preprocessing=network.preprocessing)))
    with torch.inference_mode():
        attention = network(images.to(next(network.parameters()).device)).spatial_attention.cpu()
    plot_attention(images, attention, network.map_size, path, network.preprocessing)
