"""The documentation is true: its examples run, its links and names resolve, its commands parse."""

import contextlib
import doctest
import importlib
import io
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser as torchrun_parser

from dan_fast import cli
from dan_fast.bench import BENCHMARKS
from dan_fast.data import load_dataset
from tests.support import ROOT, in_checkout

README = in_checkout("README.md").read_text()
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/fidelity.md",
        "docs/experiments.md",
        "docs/reliability.md",
        "docs/limits.md",
        "docs/scaling.md",
        "docs/feeding.md",
        "docs/export.md",
    )
]
ROOMS_PAGES = [ROOT / "csrc/README.md", ROOT / "benchmarks/results/h200/README.md"]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.]*\w")
COMMANDS = ("pip install -e . && dan-fast quickstart", "pip install -e '.[test]' && pytest")


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def resolve(name: str) -> object:
    """The object a dotted name stands for: the longest module in it, then attributes."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError as error:
            # A module that is there and fails to import something else is another matter.
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def command_lines() -> list[list[str]]:
    """The words of every `dan-fast` command in a shell block of the README, redirections left out."""
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    words = [shlex.split(line.split(">")[0]) for line in lines if line.startswith("dan-fast ")]
    return [line[1:] for line in words]


def anchors(page: Path) -> set[str]:
    """The addresses GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_has_the_two_commands():
    shell = [block.strip() for block in blocks(README, "bash")]
    assert [block for block in shell if block.startswith("pip")] == list(COMMANDS)


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_an_example_of_the_readme_runs(number: int):
    torch.manual_seed(0)
    exec(compile(blocks(README, "python")[number], f"README.md, example {number}", "exec"), {"__name__": "readme"})


def test_the_readme_shows_every_part():
    code = "\n".join(blocks(README, "python"))
    for name in ("ProgressiveAugmentedMemory", "memory_step", "NLCBAM", "attention_head", "MetaStep", "meta_gradients"):
        assert name in code
    assert "evaluate_ranking" in code


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_a_command_of_the_readme_parses(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (settings,) = blocks(README, "yaml")
    (tmp_path / "train.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    parser = cli._parser(words)
    if "--print_config" in words:
        with pytest.raises(SystemExit) as left, contextlib.redirect_stdout(io.StringIO()) as printed:
            parser.parse_args(words)
        assert left.value.code == 0
        assert "confidence_prior" in printed.getvalue()
        return
    parsed = parser.parse_args(words)
    assert parsed.command == words[0]


@pytest.mark.parametrize("line", re.findall(r"^torchrun (.+)$", README, re.MULTILINE))
def test_a_job_of_the_readme_parses(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = torchrun_parser().parse_args(shlex.split(line))
    assert job.module and job.training_script == "dan_fast"
    test_a_command_of_the_readme_parses(job.training_script_args, tmp_path, monkeypatch)


def test_the_readme_shows_every_command():
    shown = {words[0] for words in command_lines()}
    inline = set(re.findall(r"dan-fast (\w+)", README))
    assert {"train", "evaluate", "synthesize"} <= shown
    assert {"quickstart", "doctor"} <= inline


def test_the_manifest_of_the_readme_is_read(tmp_path: Path):
    (rows,) = blocks(README, "csv")
    (tmp_path / "images").mkdir()
    for name in re.findall(r"images/\w+\.jpg", rows):
        (tmp_path / name).touch()
    (tmp_path / "manifest.csv").write_text(rows)
    dataset = load_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.query), len(dataset.gallery)) == (2, 1, 1)


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """The flags that the help of any command lists."""
    shown = io.StringIO()
    benches = [f"bench {name}" for name in BENCHMARKS]
    commands = (
        "quickstart synthesize train evaluate share extract export datasets protocols report sweep doctor".split()
    )
    for command in (*commands, *benches):
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
            arguments = [*command.split(), "--help"]
            cli._parser(arguments).parse_args(arguments)
    return {*FLAG.findall(shown.getvalue()), *FLAG.findall(torchrun_parser().format_help()), "--version"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page: Path, known_flags: set[str]):
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    assert set(FLAG.findall(text)) <= known_flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert links
    for link in links:
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [*PAGES, *ROOMS_PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_names_resolve(page: Path):
    text = page.read_text()
    for name in re.findall(r"`(dan_fast(?:\.\w+)*)`", text):
        resolve(name)
    tests = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert set(re.findall(r"`(test_\w+)`", text)) <= tests
    rooms = "csrc|python_bindings|dan_fast|tests|benchmarks|scripts|docs"
    for file in re.findall(rf"`((?:{rooms})/[\w./*-]+\.\w+)`", text):
        assert any(ROOT.glob(file)), file


def test_a_wrong_name_does_not_resolve():
    for name in ("dan_fast.functional.memory_stride", "dan_fast.nowhere.memory_step"):
        with pytest.raises((AttributeError, ModuleNotFoundError)):
            resolve(name)


def test_fidelity_leaves_out_nothing():
    page = (ROOT / "docs/fidelity.md").read_text()

    def rows(heading: str) -> list[str]:
        section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        return re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE)

    assert [row for row in rows("Equations") if row.startswith("(")] == [f"({n})" for n in range(1, 20)]
    lines = [row for row in rows("Algorithm 1") if row[0].isdigit()]
    spans = [[int(number) for number in row.split("-")] for row in lines]
    assert [n for span in spans for n in range(span[0], span[-1] + 1)] == list(range(1, 15))
    tables = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"]
    assert [row for row in rows("Tables") if row in tables] == tables
    assert [row for row in rows("Figures") if row.isdigit()] == [str(n) for n in range(1, 11)]


def test_the_predictions_are_what_the_script_computes():
    page = (ROOT / "docs/scaling.md").read_text()
    tables = runpy.run_path(str(ROOT / "scripts/scaling_model.py"))["tables"]()
    assert tables and all(f"\n\n{table}\n" in page for table in tables)


def test_pictures_are_small():
    pictures = [path for path in (ROOT / "docs/images").iterdir() if path.is_file()]
    assert pictures
    assert all(path.stat().st_size < 200_000 for path in pictures)


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "dan_fast").rglob("*.py")
)


def run_examples(name: str, on_gpu: bool) -> int:
    """Runs the docstrings' examples that need a GPU or those that do not; returns how many."""
    output = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name):
        if any("cuda" in line.source for line in example.examples) == on_gpu:
            torch.manual_seed(0)
            runner.run(example, out=output.write)
    assert runner.failures == 0, output.getvalue()
    return runner.tries


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_examples(name, on_gpu=False)


@pytest.mark.gpu
def test_examples_of_the_docstrings_on_a_gpu():
    assert run_examples("dan_fast.triton_kernels.passes", on_gpu=True) >= 4
