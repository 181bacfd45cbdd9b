"""A whole experiment in minutes: synthetic domains, a small DAN, an unseen domain, a report."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table as ConsoleTable

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_text
from dan_fast.core.home import expanded
from dan_fast.core.terminal import PLAIN, progress_line
from dan_fast.data import ReIDDataset, load_dataset
from dan_fast.data.synthetic import synthesize
from dan_fast.evaluation import DatasetFeatures, Evaluation, evaluate_features, extract_dataset
from dan_fast.nn import DAN
from dan_fast.reporting import Figure, Table, plot_curves, plot_ranked_lists, write_report
from dan_fast.reporting.canvas import spread_evenly
from dan_fast.reporting.run_figures import CURVES, HEAT_MAPS, plot_attention_over
from dan_fast.training import TrainConfig, Trainer
from dan_fast.training.build import initial_network
from dan_fast.training.recipes import DEFAULT_RECIPE, require_recipe

LABELED = ("campus", "station")
UNLABELED = ("mall",)
UNSEEN = "street"
IMAGE_SIZE = (64, 32)


def quickstart(
    out: str = "runs/quickstart",
    epochs: PositiveInt = 36,
    identities: PositiveInt = 40,
    seed: NonNegativeInt = 0,
    workers: NonNegativeInt = 0,
    recipe: str = DEFAULT_RECIPE,
) -> None:
    """Train a small ResNet-18 on synthetic domains and test it on an unseen one.

    Two domains are labelled; a third one is unlabelled, for recipes that train on unlabelled images.

    An interrupted quickstart continues when it is started again.

    Args:
        out: Folder for the images, the run and the report (index.html).
        epochs: Passes through the labelled images.
        identities: Persons in each domain.
        seed: Seed of images, weights and batches.
        workers: Processes that decode images; 0 decodes in this one.
        recipe: Named settings of the method: dan, paper or plain, as for `dan-fast train`. The settings that a small
            network and a short training need are changed on top of it, and the results list them.

    Raises:
        DanFastError: there is no such recipe, or `out` holds a quickstart with other settings.
    """
    require_recipe(recipe)
    started = time.monotonic()
    console = Console()
    folder = expanded(out)
    _keep_what_was_asked_for(folder, {"identities": identities, "seed": seed, "epochs": epochs, "recipe": recipe})
    # All persons of the unseen domain are test persons, and none of the others.
    draw = partial(synthesize, folder / "data", identities=identities, seed=seed, image_size=IMAGE_SIZE)
    for domains, test_fraction in (((*LABELED, *UNLABELED), 0.0), ((UNSEEN,), 1.0)):
        with progress_line(console, f"Drawing {identities} persons in each of {', '.join(domains)}") as progress:
            draw(domains=domains, test_fraction=test_fraction, progress=progress)
    config = _config(folder, epochs, seed, workers, recipe)
    trainer = Trainer(config)
    unseen = load_dataset(folder / "data" / UNSEEN)

    untrained = initial_network(config.to_dict(), trainer.training_set.num_classes).eval()
    with progress_line(console, f"Testing the untrained network on {UNSEEN}") as progress:
        before, _ = _evaluate(untrained, unseen, workers, progress)
    trainer.fit()
    network = trainer.model.network.eval()
    with progress_line(console, f"Testing the trained network on {UNSEEN}") as progress:
        after, features = _evaluate(network, unseen, workers, progress)

    results = results_table(before, after)
    shown = ConsoleTable(*results.columns, title=results.title)
    for row in results.rows:
        shown.add_row(*row)
    console.print(shown)
    page = quickstart_page(folder, config, network, features, results)
    console.print(f"Report: {page} ({time.monotonic() - started:.0f} s)", **PLAIN)


def _keep_what_was_asked_for(folder: Path, wanted: dict[str, Any]) -> None:
    """Refuse to draw other images, or to train otherwise, where an earlier call has trained, else write down which.

    Raises:
        DanFastError: there is such a training; or see `write_text`.
    """
    file = folder / "drawn.json"
    try:
        # Older versions wrote down less.
        drawn = wanted | json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        drawn = wanted
    if drawn != wanted and (folder / "run" / "checkpoint.pt").exists():
        flags = " ".join(f"--{name} {value}" for name, value in drawn.items())
        raise DanFastError(f"{folder} holds a quickstart with {flags}: give these again, or choose another --out.")
    write_text(file, json.dumps(wanted) + "\n")


def results_table(before: Evaluation, after: Evaluation) -> Table:
    """What the training changed on the unseen domain."""
    size = f"{after.num_query} queries, {after.num_gallery} gallery images"
    return Table(
        f"{UNSEEN}, a domain never seen in training ({size})",
        ["network", *after.percentages()],
        [["untrained", *before.row()], ["trained", *after.row()]],
        "In percent: CMC at ranks 1, 5 and 10, mAP and mINP.",
    )


def quickstart_page(folder: Path, config: TrainConfig, network: DAN, features: DatasetFeatures, results: Table) -> Path:
    """Draw the pictures of a finished training into its folder, with the page that shows them, whose path is returned.

    Args:
        folder: of the quickstart: with the unseen domain's images and the training's logs.
        config: of the training.
        network: the trained one, in eval mode.
        features: its features of the unseen domain.
        results: as by :func:`results_table`.

    Raises:
        DanFastError: an image or the logs cannot be read, or the page cannot be written.
    """
    query, gallery = features.split()
    plot_curves(folder / "run", folder / "curves.png")
    plot_ranked_lists(query, gallery, folder / "ranked.png")
    figures = [
        Figure(
            "Training",
            folder / "curves.png",
            "Losses, accuracy and, where there are memories, gates and slots.",
            CURVES,
        ),
        Figure(
            "Ranked lists",
            folder / "ranked.png",
            f"Queries of {UNSEEN} and what the network ranks first.",
            "Rows of images, a query and then its list, in frames that tell right from wrong.",
        ),
    ]
    if config.model.attention != "none":
        samples = spread_evenly(load_dataset(folder / "data" / UNSEEN).query, 8)
        plot_attention_over(network, samples, folder / "attention.png")
        note = "Spatial attention A_S; its colours span each image's own range, written above."
        figures.append(Figure("Attention", folder / "attention.png", note, HEAT_MAPS))
    words = config.recipe_words or "no recipe"
    unlabeled = f" and {', '.join(UNLABELED)} (unlabelled)" if config.data.unlabeled_share > 0 else ""
    return write_report(
        folder,
        "dan_fast quickstart",
        f"A ResNet-18 trained from scratch for {config.optimizer.epochs} epochs on the synthetic domains "
        f"{' and '.join(LABELED)} (labelled){unlabeled}, tested on {UNSEEN}; {words}.",
        [results],
        figures,
    )


def _config(folder: Path, epochs: int, seed: int, workers: int, recipe: str) -> TrainConfig:
    run = folder / "run"
    config = TrainConfig.of_recipe(
        recipe,
        data={
            "labeled": [str(folder / "data" / name) for name in LABELED],
            "unlabeled": [str(folder / "data" / name) for name in UNLABELED],
            "targets": [str(folder / "data" / UNSEEN)],
            "image_size": IMAGE_SIZE,
            "workers": workers,
        },
        model={"backbone": "resnet18", "weights": "none"},
        optimizer={"epochs": epochs, "lr_scale": 30.0},
        run={"out": str(run), "resume": "auto", "seed": seed},
    )
    # What a recipe has no use for stays as it is.
    if config.data.unlabeled_share > 0:
        config.data.unlabeled_fraction = 0.25
    if config.loss.embedding > 0 or config.loss.labeled_embedding > 0:
        config.memory.labeled_slots = 600
    if config.loss.embedding > 0:
        config.memory.unlabeled_slots = 400
        # Within a few hundred iterations pseudo labels stay poor, so few images are fed back.
        config.data.feedback_fraction = min(config.data.feedback_fraction, 0.25)
    if config.meta.procedure == "daml3":
        # A long guard seldom acts in so short a run, and a backbone frozen half the time learns little. A recipe
        # without a guard gets none.
        config.meta.stall_guard = min(config.meta.stall_guard, 2)
    return config


def _evaluate(
    network: DAN, dataset: ReIDDataset, workers: int, progress: Callable[[int, int], None]
) -> tuple[Evaluation, DatasetFeatures]:
    features = extract_dataset(
        network.embed,
        dataset,
        IMAGE_SIZE,
        workers=workers,
        progress=progress,
        device=next(network.parameters()).device,
        preprocessing=network.preprocessing,
    )
    return evaluate_features(features), features
