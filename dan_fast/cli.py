"""The command line: `dan-fast COMMAND --help` explains every setting, with its default and the paper's.

A command is imported when it runs, most of them with PyTorch: `--help`, `--version` and a wrong command import none.
"""

import io
import logging
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import dan_fast
from dan_fast.core.errors import DanFastError, Interrupted
from dan_fast.core.home import expanded, with_home
from dan_fast.core.launched import number_of_ranks, own_rank
from dan_fast.core.yaml_files import read_mapping

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# What the parser calls a flag's value by its Python class is written otherwise.
_PLAIN_KINDS = {"tuple": "list", "Sequence": "list", "NoneType": "null"}

# The function or settings of each command, and its line in the list of commands.
_COMMANDS = {
    "quickstart": (
        "dan_fast.commands.quickstart:quickstart",
        "Make synthetic domains, train a small DAN on them and test it on an unseen one.",
    ),
    "synthesize": ("dan_fast.data.synthetic:synthesize", "Draw a synthetic pedestrian dataset of several domains."),
    "train": ("dan_fast.training:TrainConfig", "Train a Data Assimilation Network."),
    "evaluate": (
        "dan_fast.commands.evaluate:evaluate",
        "Compute CMC, mAP and mINP of a trained network on target sets.",
    ),
    "share": (
        "dan_fast.commands.share:share",
        "Write a trained network as a folder of safetensors, JSON and a model card, or to the Hugging Face Hub.",
    ),
    "extract": ("dan_fast.commands.extract:extract", "Write the features of images to a .npz or .parquet file."),
    "search": (
        "dan_fast.commands.search:search",
        "Find the gallery images that are nearest to query images: an index, ranked lists and a page.",
    ),
    "export": (
        "dan_fast.commands.export:export",
        "Write a trained network to an ONNX or .pt2 file that runs without dan_fast.",
    ),
    "datasets": (
        "dan_fast.commands.datasets:list_datasets",
        "List the datasets that are found, what they hold, and the known ones that are missing.",
    ),
    "protocols": (
        "dan_fast.commands.protocols:list_protocols",
        "List the named protocols: what they train and test on, and which of these datasets a folder lacks.",
    ),
    "report": (
        "dan_fast.reporting.report:report",
        "Show trainings beside the paper's tables and figures: pictures and one HTML page.",
    ),
    "sweep": (
        "dan_fast.sweep.runner:sweep",
        "Train a grid of settings, each in its own folder; continue where an earlier call stopped.",
    ),
    "bench": (
        "dan_fast.bench:BENCHMARKS",
        "Time dan_fast beside plain PyTorch, after checking that both give the same result.",
    ),
    "doctor": (
        "dan_fast.commands.doctor:print_report",
        "Show what was built, which paths will run, and what to do about anything missing.",
    ),
}

# The flags of each command that take several paths or names, and how these are written.
_FLAGS_OF_LISTS = {
    "train": dict.fromkeys(("--data.labeled", "--data.unlabeled", "--data.targets"), "'[A, B]'"),
    "evaluate": {"--targets": "'[A, B]'"},
    "export": {"--images": "'[A, B]'"},
    "synthesize": {"--domains": "'[A, B]'"},
    "search": {"--gallery": "A B", "--query": "A B"},
}
# What of the other commands is a list, in a file too.
_LISTS = {"extract": ["paths"], "search": ["gallery", "query"], "report": ["runs"], "datasets": ["roots"]}


def _parse(argv: Sequence[str]) -> tuple[ArgumentParser, Namespace]:
    """The parser and what it made of the flags; the settings of a recipe are the defaults of `train`.

    Raises:
        DanFastError: there is no such recipe, or a file of settings cannot be read.
        ArgumentError: a flag or its value is wrong.
    """
    _require_given_once(argv)
    files = {path: content for given in _values(argv, "--config") for path, content in _settings_in(given)}
    if "train" not in argv[:1]:
        for file, content in files.items():
            for name in _LISTS.get(argv[0], []):
                if isinstance(content.get(name), str):
                    raise DanFastError(f"{name} in {file} is one text: write a list, {name}: [A, B].")
        parser = _parser(argv)
        parsed = with_home(parser.parse_args(argv))
        _require_values(parsed)
        return parser, parsed
    from dan_fast.commands.train import recipe_asked_for, recipe_of_run, require_sections

    for file, content in files.items():
        require_sections(file, content)
    asked = recipe_asked_for(_values(argv, "--recipe"), [*files.values()])
    # Appended, so that the recipe of a flag also wins over a file that names another one.
    argv = [*argv, "--recipe", asked] if asked is not None else argv
    parser = _parser(argv, asked)
    parsed = with_home(parser.parse_args(argv))
    continued = recipe_of_run(parsed.train.run) if asked is None else None
    if continued is not None:
        parser = _parser(argv, continued)
        parsed = with_home(parser.parse_args(argv))
    _require_values(parsed, asked or continued)
    return parser, parsed


def _require_values(parsed: Namespace, recipe: str | None = None) -> None:
    """Refuse settings that are left empty, in a file mostly: the parser takes None for a value of any of them.

    Raises:
        DanFastError: names the setting.
    """
    settings = parsed[parsed.command]
    if settings is None or "what" in settings:
        return
    parser = ArgumentParser(exit_on_error=False)
    _add_flags(parser, parsed.command, recipe)
    defaults = parser.get_defaults()
    for name, value in settings.items():
        if value is None and defaults.get(name) is not None:
            raise DanFastError(f"{name} is empty: give it a value, or leave it out.")


def _values(argv: Sequence[str], flag: str) -> list[str]:
    """What a command line gives a flag, in order."""
    values = []
    for word, following in pairwise([*argv, ""]):
        if word == flag:
            values.append(following)
        elif word.startswith(f"{flag}="):
            values.append(word.removeprefix(f"{flag}="))
    return values


def _require_given_once(argv: Sequence[str]) -> None:
    """Refuse a flag of a list that is given several times, path by path: all but the last would be left out.

    A list in brackets is meant to replace what stands before it.

    Raises:
        ArgumentError: names the flag.
    """
    for flag, example in _FLAGS_OF_LISTS.get(argv[0] if argv else "", {}).items():
        values = _values(argv, flag)
        if len(values) > 1 and not values[-1].startswith("["):
            raise ArgumentError(None, f"{flag} is given more than once: give all of it together, {flag} {example}")


def _settings_in(given: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The file that --config names, and what it holds; nothing where there is none, which the parser says.

    Raises:
        DanFastError: the file cannot be read, or settings themselves stand there.
    """
    path = expanded(given)
    # Path.is_file raises where settings are longer than a name can be.
    if os.path.isfile(path):
        yield path, read_mapping(path, "a file of settings")
    elif any(mark in given for mark in ("{", "\n", ": ")):
        raise DanFastError("--config takes the path of a file, not settings: write them into one.")


def _parser(argv: Sequence[str], recipe: str | None = None) -> ArgumentParser:
    """Every command, and the flags of the one that `argv` names.

    Args:
        argv: the command line that will be parsed.
        recipe: gives the defaults of the flags of `train`; None: the default recipe.
    """
    parser = ArgumentParser(
        prog="dan-fast",
        description="Data Assimilation Network for generalizable person re-identification.",
        version=dan_fast.__version__,
        exit_on_error=False,
        # Recipes and files are looked for before the flags are parsed, by their whole names.
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    named = next((word for word in argv if word in _COMMANDS), None)
    for name in _COMMANDS:
        subparser = _add_command(commands, name, _COMMANDS[name][1])
        if name == named:
            _add_flags(subparser, name, recipe)
    return parser


def _add_command(group: Any, name: str, summary: str) -> ArgumentParser:
    subparser = ArgumentParser(description=summary, exit_on_error=False, allow_abbrev=False)
    subparser.add_argument("--config", action="config", help="YAML file with these settings; flags override it.")
    group.add_subcommand(name, subparser, help=summary)
    return subparser


def _add_flags(parser: ArgumentParser, command: str, recipe: str | None) -> None:
    """Import the command, whose signature names its flags."""
    called = resolve_name(_COMMANDS[command][0])
    match command:
        case "train":
            from dan_fast.commands.train import flag_defaults

            parser.add_class_arguments(called)
            parser.set_defaults(flag_defaults(recipe))
        case "datasets":
            parser.add_argument(
                "roots", nargs="+", type=str, metavar="ROOT", help="Folder to look in, two levels deep, or a manifest."
            )
            parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
            extracting = (
                "First write the images in cuhk-03.mat, and the crops of CUHK-SYSU's frames, as files beside them."
            )
            parser.add_argument("--extract", action="store_true", help=extracting)
        case "extract":
            of_images = "Folder, file, pattern such as 'frames/**/*.jpg', dataset or manifest."
            parser.add_argument("paths", nargs="+", type=str, metavar="PATH", help=of_images)
            parser.add_function_arguments(called, skip={"paths"})
        case "search":
            of_gallery = (
                "Folders, files, patterns or datasets to search in; of a dataset its gallery, or all if it has none."
            )
            of_queries = "Images to search for, given in the same way; of a dataset its queries, or all if it has none."
            for name, what in (("gallery", of_gallery), ("query", of_queries)):
                parser.add_argument(f"--{name}", nargs="+", required=True, type=str, metavar="PATH", help=what)
            parser.add_function_arguments(called, skip={"gallery", "query"})
        case "report":
            of_trainings = "Folders of trainings, or folders that contain such folders, as that of a sweep does."
            parser.add_argument("runs", nargs="+", help=of_trainings)
            parser.add_function_arguments(called, skip={"runs"})
        case "sweep":
            parser.add_function_arguments(called, skip={"list"})
            parser.add_argument("--list", action="store_true", help="Only show what would run, and what is finished.")
        case "bench":
            subjects = parser.add_subcommands(dest="what")
            for name, (benchmark, summary) in called.items():
                subject = _add_command(subjects, name, summary)
                subject.add_class_arguments(benchmark)
        case "quickstart" | "synthesize" | "evaluate" | "share" | "export" | "protocols":
            parser.add_function_arguments(called, skip={"progress"})


def _keep_heap_on_a_cpu(device: str) -> None:
    from dan_fast.core.devices import resolve_device
    from dan_fast.core.heap import keep_heap

    if resolve_device(device).type == "cpu":
        keep_heap()


def _wrong_usage(argv: Sequence[str], error: ArgumentError) -> str:
    """What is wrong with a command line, what may have been meant, and where its help is."""
    words, parser = _command_of(argv)
    said = " ".join(str(error).split())
    said = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", said)
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>", lambda kind: _PLAIN_KINDS.get(kind[1], kind[1]), said)
    meant = "" if parser is None else _meant(parser, words[0], argv, said)
    return f"{said}{meant} (see `{' '.join(['dan-fast', *words, '--help'])}`)"


def _command_of(argv: Sequence[str]) -> tuple[Sequence[str], ArgumentParser | None]:
    """The words of a command line that name what is called, and a parser of its flags; None where that is not known."""
    if not argv or argv[0] not in _COMMANDS:
        return (), None
    parser = ArgumentParser(exit_on_error=False)
    if argv[0] != "bench":
        _add_flags(parser, argv[0], None)
        return argv[:1], parser
    benchmark = resolve_name(_COMMANDS["bench"][0]).get(" ".join(argv[1:2]))
    if benchmark is None:
        return argv[:1], None
    parser.add_class_arguments(benchmark[0])
    return argv[:2], parser


def _meant(parser: ArgumentParser, command: str, argv: Sequence[str], said: str) -> str:
    """What a wrong flag, setting or further word of a command may have meant; "" where it is not known."""
    wrong = re.search(r"(?:unrecognized arguments: |does not accept option ')([^ ']+)", said)
    if wrong is None:
        return ""
    from dan_fast.core.nearest import nearest

    name = wrong[1]
    usage = parser.format_usage()
    if "unrecognized" in said and name[0] != "-":
        given = {word.partition("=")[0] for word in argv}
        required = re.findall(r"--\w+", re.sub(r"\[.*?\]", "", usage, flags=re.S))
        missing = [flag for flag in required if flag not in given]
        if missing:
            return f"; is {missing[0]} {name} meant?"
        lists = [flag for flag, example in _FLAGS_OF_LISTS.get(command, {}).items() if example.startswith("'")]
        return f"; several values of {' or '.join(lists)} are written as one, '[A, B]'" if lists else ""
    flags = re.findall(r"--([\w.]+) (?!CONFIG)", usage)
    near = nearest(name.lstrip("-").partition("=")[0], flags)
    return f"; is {' or '.join(f'--{each}' for each in near)} meant?" if near else ""


def _run(parser: ArgumentParser, parsed: Namespace) -> int:
    command, settings = parsed.command, parser.instantiate(parsed)[parsed.command]
    match command:
        case "train":
            _keep_heap_on_a_cpu(settings.run.device)
        case "evaluate" | "extract" | "search":
            _keep_heap_on_a_cpu(settings.device)
        case "quickstart":
            _keep_heap_on_a_cpu("auto")
        case "bench":
            _keep_heap_on_a_cpu(settings[settings.what].device)
    called = resolve_name(_COMMANDS[command][0])
    if command == "bench":
        called, settings = called[settings.what][0], settings[settings.what]
    result = called(**{name: value for name, value in vars(settings).items() if name != "config"})
    match command:
        case "train":
            from dan_fast.commands.train import train

            train(result)
        case "synthesize":
            print(*result, sep="\n")
        case "report":
            print(result)
        case "bench":
            result.run()
        case "doctor":
            return result
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 after an error, 2 for wrong flags, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files are printed, of which some have bytes that are no UTF-8.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        parser, parsed = _parse(argv)
    except ArgumentError as error:
        print(f"dan-fast: {_wrong_usage(argv, error)}", file=sys.stderr)
        return EXIT_USAGE
    except DanFastError as error:
        print(f"dan-fast: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("dan-fast: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    rank = own_rank()
    name = f"dan-fast, rank {rank}" if number_of_ranks() > 1 else "dan-fast"
    if rank > 0:
        # Each rank reads all datasets, and one says what is odd about them.
        logging.getLogger("dan_fast.data").setLevel(logging.ERROR)
    try:
        return _run(parser, parsed)
    except (DanFastError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except RuntimeError as error:
        # PyTorch raises the death of a worker from a signal handler, wherever the command is.
        from dan_fast.data.images.workers import WorkerDied, is_worker_death

        if not is_worker_death(error):
            raise
        print(f"{name}: {WorkerDied(error)}", file=sys.stderr)
        return EXIT_ERROR
    except Interrupted as stop:
        if rank == 0:
            on = (
                "Continue with --run.resume true" if parsed.command == "train" else "The same command goes on from here"
            )
            print(f"dan-fast: {stop} {on}.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print(f"{name}: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
