"""The command line: `dan-fast COMMAND --help` explains every setting, with its default and the paper's."""

import argparse
import json
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Column, Table

from dan_fast.bench import bench_attention, bench_data, bench_iteration, bench_memory, bench_ranking
from dan_fast.data import ImageCache, ReIDDataset, load_dataset
from dan_fast.data.listing import list_datasets
from dan_fast.data.protocol_listing import list_protocols
from dan_fast.data.protocols import resolve_protocol
from dan_fast.data.synthetic import synthesize
from dan_fast.doctor import print_report
from dan_fast.errors import DanFastError
from dan_fast.evaluation import Evaluation, Reranking, evaluate_dataset, require_whole_splits
from dan_fast.files import write_text
from dan_fast.quickstart import quickstart
from dan_fast.reporting.report import report
from dan_fast.sweep import sweep
from dan_fast.training import Interrupted, TrainConfig, Trainer
from dan_fast.training.build import initial_network, network_of, resolve_device
from dan_fast.training.checkpoint import load_checkpoint
from dan_fast.training.config import BrokenImages, CacheCheck, Paths, Precision, as_list, goes_on
from dan_fast.training.recipes import DEFAULT_RECIPE, recipe_of_file, recipe_settings, recipe_words
from dan_fast.training.reported import epoch_of

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


_BENCHMARKS = {
    "memory": (bench_memory, "The memory step: literal, in score space, compiled, and kernels."),
    "attention": (bench_attention, "The attention head: eager, compiled, and kernels."),
    "iteration": (bench_iteration, "A training iteration: plain ResNet, DAN with literal operators, and DAN."),
    "data": (bench_data, "Feeding images: a plain DataLoader, decoding without a cache, and from the cache."),
    "ranking": (bench_ranking, "Evaluating a ranking: by sorting in NumPy, and by counting."),
}


def evaluate(
    checkpoint: str,
    targets: Paths | None = None,
    protocol: str | None = None,
    root: str | None = None,
    baselines: bool = False,
    repeats: PositiveInt = 10,
    seed: NonNegativeInt = 0,
    metric: Literal["cosine", "euclidean"] = "cosine",
    ap: Literal["standard", "trapezoid"] = "standard",
    rerank: bool = False,
    batch_size: PositiveInt = 128,
    workers: NonNegativeInt = 2,
    device: str = "auto",
    precision: Precision = "float32",
    broken_images: BrokenImages = "error",
    cache: str = "none",
    cache_check: CacheCheck = "quick",
    out: str | None = None,
) -> None:
    """Print CMC, mAP and mINP of a trained network on target sets.

    Args:
        checkpoint: The checkpoint.pt of a run, or its chosen.pt.
        targets: Folders or manifests with query and gallery images, or with test images, which are split by a known
            dataset's fixed splits, else at random.
        protocol: In place of these, a protocol of the literature by its name, such as p1, for its targets.
        root: Folder in which the protocol's targets lie, up to two levels deep.
        baselines: Also evaluate the network as it was before training, and random features (chance).
        repeats: Random splits of a target that has no fixed ones; mean and standard deviation are printed.
        seed: Seed of the random splits.
        metric: How features are compared.
        ap: standard takes the mean precision at each true match, trapezoid is the old MATLAB code's.
        rerank: Re-rank by k-reciprocal encoding (Zhong et al. 2017; k1 20, k2 6, lambda 0.3); the results say so.
        batch_size: Images at a time.
        workers: Processes that decode images; 0 decodes in this one.
        device: auto takes the GPU where there is one; or cpu, cuda, cuda:1.
        precision: float32, or bfloat16 autocast.
        broken_images: Stop with an error at an image that cannot be decoded, or skip and count it.
        cache: Folder for decoded images, for the next evaluation; user is dan-fast in the user's cache folder, none
            decodes images each time.
        cache_check: quick compares sizes and modification times of the images, full all contents.
        out: Also write the figures into this JSON file.
    """
    paths = as_list(targets or [])
    _require_targets(paths, protocol, root)
    place = resolve_device(device)
    state = load_checkpoint(checkpoint)
    datasets = _load_targets(paths, protocol, root)
    for dataset in datasets:
        require_whole_splits(dataset)
    network, settings = network_of(state), state["config"]
    conditions = {
        "named_protocol": _tested_by(protocol, settings),
        "epoch": epoch_of(state),
        "recipe": recipe_words(settings, TrainConfig().to_dict()),
    }
    image_size = tuple(settings["data"]["image_size"])
    preprocessing = network.preprocessing
    decoded = ImageCache.of_setting(
        cache, image_size, cache_check, workers=workers, say=print, interpolation=preprocessing.interpolation
    )
    embeddings: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"trained": network.to(place).embed}
    if baselines:
        untrained = initial_network(settings, network.classifier.out_features).to(place).eval()
        generator = torch.Generator().manual_seed(seed)
        embeddings["untrained"] = untrained.embed
        embeddings["chance"] = lambda images: torch.randn(len(images), 64, generator=generator)

    results: list[tuple[str, Evaluation]] = []
    for dataset in datasets:
        for name, embed in embeddings.items():
            evaluation = evaluate_dataset(
                embed,
                dataset,
                image_size,
                batch_size=batch_size,
                workers=workers,
                device=place,
                precision=precision,
                broken_images=broken_images,
                repeats=repeats,
                seed=seed,
                metric=metric,
                ap=ap,
                cache=decoded,
                reranking=Reranking() if rerank else None,
                preprocessing=preprocessing,
            )
            if name == "trained":
                evaluation = replace(evaluation, **conditions)
            results.append((name, evaluation))

    # Folded: a variant that is cut short in a narrow window says nothing.
    table = Table(Column("target", overflow="fold"), "features", *results[0][1].percentages())
    for name, evaluation in results:
        table.add_row(evaluation.title, name, *evaluation.row())
    Console().print(table)
    for name, evaluation in results:
        print(f"{evaluation.title}, {name}: {evaluation.conditions_and_recipe}.")
    for path in sorted({path for _, evaluation in results for path in evaluation.skipped}):
        print(f"Skipped {path}: it cannot be decoded.")
    if out is not None:
        content = [{"features": name, **evaluation.to_dict()} for name, evaluation in results]
        write_text(out, json.dumps(content, indent=2) + "\n")


def _require_targets(paths: Sequence[str], protocol: str | None, root: str | None) -> None:
    if protocol is None and root is not None:
        raise DanFastError("root is of no use without protocol: name a protocol or leave root out.")
    if protocol is None and not paths:
        raise DanFastError("targets is empty: name at least one folder or manifest, or a protocol and a root.")
    if protocol is not None and paths:
        raise DanFastError(
            f"protocol {protocol} and targets are both given: a protocol names its targets, so leave out one or the "
            "other."
        )
    if protocol is not None and root is None:
        raise DanFastError(f"protocol {protocol} needs root: name the folder in which its targets lie.")


def _load_targets(paths: Sequence[str], protocol: str | None, root: str | None) -> Sequence[ReIDDataset]:
    if protocol is None or root is None:
        return [load_dataset(path) for path in paths]
    return resolve_protocol(protocol, root, targets_only=True).targets


def _tested_by(protocol: str | None, settings: dict[str, Any]) -> str:
    """What to call the protocol of a checkpoint's figures: only a network trained by it has its figures."""
    if protocol is None or settings["data"].get("protocol") == protocol:
        return protocol or ""
    return f"targets of {protocol}, NOT TRAINED BY IT"


def _train(config: TrainConfig) -> None:
    Trainer(config).fit()


def _synthesize(**arguments: Any) -> None:
    for folder in synthesize(**arguments):
        print(folder)


def _asked_recipe(argv: Sequence[str]) -> str | None:
    """The recipe that flags or YAML files of a `train` name; None where they leave it open.

    It has to be known before they are read, because its settings are what they change.
    """
    scan = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    scan.add_argument("--recipe")
    scan.add_argument("--config", action="append", default=[])
    try:
        found, _ = scan.parse_known_args(argv)
    except ArgumentError:
        return None  # a flag without its value, of which the parser of all flags complains
    of_files = [recipe for path in found.config if (recipe := recipe_of_file(path)) is not None]
    return found.recipe or (of_files[-1] if of_files else None)


def _parse(argv: Sequence[str]) -> tuple[ArgumentParser, Namespace]:
    """The parser and what it made of the flags; the settings of a recipe are the defaults of `train`.

    Raises:
        DanFastError: there is no such recipe.
        ArgumentError: a flag or its value is wrong.
    """
    if "train" not in argv[:1]:
        parser = _parser()
        return parser, parser.parse_args(argv)
    asked = _asked_recipe(argv)
    # At the end, where it also wins over a file that names another one.
    argv = [*argv, "--recipe", asked] if asked is not None else argv
    parser = _parser(asked or DEFAULT_RECIPE)
    parsed = parser.parse_args(argv)
    if asked is None and goes_on(parsed.train.run):
        # A run that goes on keeps its recipe, or the lack of one: the default of today is not what it was started with.
        begun = recipe_of_file(Path(parsed.train.run.out) / "config.yaml")
        if begun not in (None, DEFAULT_RECIPE):
            parser = _parser(begun)
            parsed = parser.parse_args(argv)
    return parser, parsed


def _parser(recipe: str = DEFAULT_RECIPE) -> ArgumentParser:
    """Every command with its flags; what `train` is not told is as `recipe` has it."""
    import dan_fast

    parser = ArgumentParser(
        prog="dan-fast",
        description="Data Assimilation Network for generalizable person re-identification.",
        version=dan_fast.__version__,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(required=True, dest="command")

    def command(name: str, help_text: str, group: Any = commands) -> ArgumentParser:
        subparser = ArgumentParser(description=help_text, exit_on_error=False)
        subparser.add_argument("--config", action="config", help="YAML file with these settings; flags win over it.")
        group.add_subcommand(name, subparser, help=help_text)
        return subparser

    command(
        "quickstart", "Make synthetic domains, train a small DAN on them and test it on an unseen one."
    ).add_function_arguments(quickstart)
    command("synthesize", "Draw a synthetic pedestrian dataset of several domains.").add_function_arguments(
        synthesize, skip={"progress"}
    )
    trainer = command("train", "Train a Data Assimilation Network.")
    trainer.add_class_arguments(TrainConfig)
    of_recipe = {
        f"{section}.{name}": value
        for section, values in recipe_settings(recipe).items()
        for name, value in values.items()
    }
    trainer.set_defaults({"recipe": recipe, **of_recipe})
    command("evaluate", "CMC, mAP and mINP of a trained network on target sets.").add_function_arguments(evaluate)
    listing = command("datasets", "List the known datasets that are found, their counts, and those that are missing.")
    listing.add_argument("roots", nargs="+", type=str, metavar="ROOT", help="Folder to look in, two levels deep.")
    listing.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    extracting = "First write the images in cuhk-03.mat, and the crops of CUHK-SYSU's frames, as files beside them."
    listing.add_argument("--extract", action="store_true", help=extracting)
    command(
        "protocols", "List the named protocols: trained on, tested on, and what of it a folder lacks."
    ).add_function_arguments(list_protocols, skip={"console"})
    reporter = command("report", "Lay trainings beside the paper's tables and figures: pictures and one HTML page.")
    reporter.add_argument("runs", nargs="+", help="Folders of trainings, or folders of such folders, as a sweep's.")
    reporter.add_function_arguments(report, skip={"runs"})
    sweeper = command("sweep", "Train a grid of settings, each in its own folder; go on where an earlier call stopped.")
    sweeper.add_function_arguments(sweep, skip={"list"})
    sweeper.add_argument("--list", action="store_true", help="Only show what would run, and what is finished.")
    bench = command("bench", "Time dan_fast beside plain PyTorch, after checking that both give the same result.")
    subjects = bench.add_subcommands(dest="what")
    for name, (function, help_text) in _BENCHMARKS.items():
        command(name, help_text, subjects).add_function_arguments(function, skip={"console"})
    command("doctor", "What was built, which paths will run, and what to do about anything missing.")
    return parser


def _run(parser: ArgumentParser, parsed: Namespace) -> int:
    settings = parser.instantiate(parsed)[parsed.command]
    arguments = {name: value for name, value in vars(settings).items() if name != "config"}
    match parsed.command:
        case "train":
            _train(TrainConfig(**arguments))
        case "evaluate":
            evaluate(**arguments)
        case "synthesize":
            _synthesize(**arguments)
        case "datasets":
            list_datasets(**arguments)
        case "protocols":
            list_protocols(**arguments)
        case "quickstart":
            quickstart(**arguments)
        case "report":
            print(report(**arguments))
        case "sweep":
            sweep(**arguments)
        case "bench":
            function, _ = _BENCHMARKS[settings.what]
            function(**{name: value for name, value in vars(settings[settings.what]).items() if name != "config"})
        case "doctor":
            return print_report()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 after an error, 2 for wrong flags, 130 after Ctrl-C."""
    try:
        parser, parsed = _parse(sys.argv[1:] if argv is None else argv)
    except ArgumentError as error:
        print(f"dan-fast: {' '.join(str(error).split())} (see `dan-fast --help`)", file=sys.stderr)
        return EXIT_USAGE
    except DanFastError as error:
        print(f"dan-fast: {error}", file=sys.stderr)
        return EXIT_ERROR
    try:
        return _run(parser, parsed)
    except (DanFastError, OSError) as error:
        print(f"dan-fast: {error}", file=sys.stderr)
        return EXIT_ERROR
    except Interrupted as stop:
        print(f"dan-fast: {stop} Continue with --run.resume true.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("dan-fast: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
