"""The documentation is true: its examples run, its links and names resolve, its commands parse."""

import contextlib
import doctest
import functools
import importlib
import inspect
import io
import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser as torchrun_parser

from dan_fast import cli, functional, reference
from dan_fast.bench import BENCHMARKS
from dan_fast.data import load_dataset
from dan_fast.data.datasets.known import KNOWN
from dan_fast.nn import BACKBONES
from dan_fast.sweep.grid import plan_sweep
from tests.support import ROOT
from tests.support.pages import GUIDES, PAGES, blocks, commands, texts, write_settings

README, TRAINING, KERNELS = ROOT / "README.md", ROOT / "docs/training.md", ROOT / "docs/kernels.md"
ROOMS_PAGES = [ROOT / "csrc/README.md", ROOT / "benchmarks/results/h200/README.md"]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")
COMMANDS = ("pip install -e . && dan-fast quickstart", "pip install -e '.[test]' && pytest")
# Flags of torchreid and fast-reid.
FOREIGN = {
    "feeding.md": {"--interpolation"},  # of scripts/litdata_images.py
    "migrating.md": {"--config-file", "--eval-only", "--resume", "--num-gpus"},
    "scaling.md": {"--trainings"},  # of scripts/rank_overhead.py
    "training.md": {"--gpus-per-task", "--shutdown-timeout"},  # of srun, and of newer versions of torchrun
}
# Blocks that are neither run nor parsed, by page and language, and why.
LEFT = {("CONTRIBUTING.md", "text"): "a tree of folders"}
# Pages whose Python blocks need what other tests have, a LitData store or a process without dan_fast.
ELSEWHERE = {"feeding.md": "tests/data/images/test_feeding.py", "export.md": "tests/export/test_export.py"}
OPERATORS = [name for name in functional.__all__ if name.islower()]  # the others are the tuples of their results
LINES = [(page, words) for page in PAGES for words in commands(page)]


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


def anchors(page: Path) -> set[str]:
    """The addresses GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_has_the_two_commands():
    shell = [block.strip() for block in texts(README, "bash")]
    assert [block for block in shell if block.startswith("pip")] == list(COMMANDS)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 180


def test_the_guide_to_the_parts_shows_every_part():
    code = "\n".join(texts(KERNELS, "python"))
    for name in ("ProgressiveAugmentedMemory", "memory_step", "NLCBAM", "attention_head", "MetaStep", "meta_gradients"):
        assert name in code
    assert "evaluate_ranking" in code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_parsed(page: Path):
    for language in {block.language for block in blocks(page)} - {"bash", "yaml"}:
        tested = {
            "python": page in GUIDES or page.name in ELSEWHERE,
            "csv": page == TRAINING,
        }
        assert tested.get(language) or (page.name, language) in LEFT, f"{page.name} has a block of {language!r}"


def test_what_is_run_elsewhere_is():
    for page, file in ELSEWHERE.items():
        assert f"docs/{page}" in (ROOT / file).read_text()


def parse(words: list[str]) -> None:
    """Parse a command of dan-fast, without running it."""
    parser = cli._parser(words)
    if "--print_config" in words:
        with pytest.raises(SystemExit) as left, contextlib.redirect_stdout(io.StringIO()) as printed:
            parser.parse_args(words)
        assert left.value.code == 0
        assert "confidence_prior" in printed.getvalue()
    else:
        assert parser.parse_args(words).command == words[0]


@pytest.mark.parametrize(("page", "words"), LINES, ids=[f"{page.stem}: {' '.join(words)}" for page, words in LINES])
def test_a_command_parses(page: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_settings(page, tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    match words:
        case ["dan-fast", *arguments]:
            parse(arguments)
        case ["torchrun", *arguments]:
            job = torchrun_parser().parse_args(arguments)
            assert job.module and job.training_script == "dan_fast"
            parse(job.training_script_args)
        case ["pip", "install", *what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for asked in re.findall(r"(?:dan-fast|\.)\[(.+?)\]", " ".join(what)):
                assert set(asked.split(",")) <= extras.keys()
        case ["python", "benchmarks/experiments/changes" as folder, change, *arguments]:
            assert any(f"@change\ndef {change}(" in path.read_text() for path in (ROOT / folder).glob("*.py"))
            parse(["train", *(str(ROOT / word) if word.startswith("benchmarks/") else word for word in arguments)])
        case ["python", "benchmarks/experiments/street_targets.py" as script, *folders]:
            assert (ROOT / script).is_file() and len(folders) == 2
        case ["python", script, *_] | [script, *_] if script.startswith("scripts/"):
            assert (ROOT / script).is_file()
        case ["pytest", *arguments]:
            assert all((ROOT / argument).is_file() for argument in arguments if argument.startswith("tests/"))
        case _:
            assert words[0] in ("ruff", "mkdocs"), f"{page.name} has a command that no test knows: {words}"


def test_the_pages_say_what_their_tables_are_of():
    for name in ("experiments.md", "reproducing.md"):
        said = " ".join((ROOT / "docs" / name).read_text().split())
        assert "Market-1501-dev, CUHK03-dev and Street are not published with this repository" in said
    changes = [words for _, words in LINES if words[:2] == ["python", "benchmarks/experiments/changes"]]
    assert changes and all(words[-2:] == ["--run.device", "cpu"] for words in changes)


def test_no_example_leaves_out_the_variant_of_cuhk03():
    """Which is never a default: the program would refuse the folder."""
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.suffix in (".py", ".sh")]
    shown = {path.name: path.read_text() for path in scripts}
    shown |= {page.name: "".join(text for language, text in blocks(page) if language) for page in PAGES}
    assert {name for name, text in shown.items() if re.search(r"data/cuhk03(?!@)", text)} == set()
    assert sum("data/cuhk03@" in text for text in shown.values()) >= 4


@pytest.mark.parametrize("page", [page for page in PAGES if texts(page, "yaml")], ids=lambda page: page.name)
def test_the_settings_of_a_page_are_read(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "base.yaml").write_text("data: {labeled: market}")
    for path in write_settings(page, tmp_path):
        if "arms:" in path.read_text():
            assert plan_sweep(path, None, tmp_path)
        else:
            parse(["train", "--config", str(path)])


def test_the_pages_show_every_command():
    shown = {words[1] for _, words in LINES if words[0] == "dan-fast"}
    text = "".join(page.read_text() for page in PAGES)
    assert cli._COMMANDS.keys() <= set(re.findall(r"dan-fast (\w+)", text))
    assert BENCHMARKS.keys() <= set(re.findall(r"dan-fast bench (\w+)", text))
    assert cli._COMMANDS.keys() - shown <= {"bench", "doctor"}
    assert {"train", "evaluate", "synthesize"} <= {words[1] for page, words in LINES if page == README and words[1:]}


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/api.md", [f"`dan_fast.functional.{name}`" for name in OPERATORS]),
        ("docs/backbones.md", [f"`{name}`" for name in BACKBONES]),
        ("docs/datasets.md", [known.title for known in KNOWN.values()]),
    ],
)
def test_a_page_names_each(page: str, names: list[str]):
    text = (ROOT / page).read_text()
    assert not (left := [name for name in names if name not in text]), f"{page} has no word on {', '.join(left)}"


def test_an_operator_has_one_name_and_one_signature():
    """In the reference and in its fast form."""
    assert functional.__all__ == reference.__all__
    for name in OPERATORS:
        fast, literal = (inspect.signature(getattr(form, name)).parameters for form in (functional, reference))
        assert [*fast] == [*literal], name


def test_the_manifest_of_the_guide_is_read(tmp_path: Path):
    (rows,) = texts(TRAINING, "csv")
    (tmp_path / "images").mkdir()
    for name in re.findall(r"images/\w+\.jpg", rows):
        (tmp_path / name).touch()
    (tmp_path / "manifest.csv").write_text(rows)
    dataset = load_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.query), len(dataset.gallery)) == (2, 1, 1)


def test_the_guide_makes_a_manifest_of_a_folder_for_each_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("ben/1.jpg", "anna/2.jpg", "anna/1.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    monkeypatch.chdir(tmp_path)
    (code,) = (text for text in texts(TRAINING, "python") if "photos.csv" in text)
    exec(compile(code, "training.md, manifest", "exec"), {})
    found = [
        (f"{sample.path.parent.name}/{sample.path.name}", sample.pid) for sample in load_dataset("photos.csv").train
    ]
    assert found == [("anna/1.jpg", 1), ("anna/2.jpg", 1), ("ben/1.jpg", 2)]


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """The flags that the help of any command lists."""
    shown = io.StringIO()
    benches = [f"bench {name}" for name in BENCHMARKS]
    for command in (*cli._COMMANDS.keys() - {"bench"}, *benches):
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
            arguments = [*command.split(), "--help"]
            cli._parser(arguments).parse_args(arguments)
    return {*FLAG.findall(shown.getvalue()), *FLAG.findall(torchrun_parser().format_help()), "--version", "--strict"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page: Path, known_flags: set[str]):
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    assert set(FLAG.findall(text)) <= known_flags | FOREIGN.get(page.name, set())


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


@functools.cache
def names_of_tests() -> set[str]:
    files = (ROOT / "tests").rglob("*.py")
    return {name for path in files for name in re.findall(r"def (test_\w+)", path.read_text())}


@pytest.mark.parametrize("page", [*PAGES, *ROOMS_PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_names_resolve(page: Path):
    text = page.read_text()
    for name in re.findall(r"`(dan_fast(?:\.\w+)*)`", text):
        resolve(name)
    assert set(re.findall(r"`(test_\w+)`", text)) <= names_of_tests()
    rooms = "csrc|python_bindings|dan_fast|tests|benchmarks|scripts|docs"
    for file in re.findall(rf"`((?:{rooms})/[\w./*-]+\.\w+)`", text):
        assert any(ROOT.glob(file)), file


def test_the_files_that_the_tree_of_rooms_names_are_there():
    (rooms,) = texts(ROOT / "CONTRIBUTING.md", "text")
    named = set(re.findall(r"[\w*-]+\.(?:py|h|md)\b", rooms))
    assert len(named) > 10 and not [name for name in named if not any(ROOT.glob(f"*/**/{name}"))]


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


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_limits_of_the_pages_are_those_of_the_files(page: str):
    """Rounded to three digits, times over a limit to two decimals or fewer; what follows a semicolon is another run."""
    of_a_row = {
        "memory step": ("memory", {"contender": "kernels", "use": "module", "dtype": "float32", "scale": 1.0}),
        "attention head": ("attention", {"contender": "kernels", "dtype": "float32", "layout": "channels_last"}),
        "iteration of plain": ("iteration", {"contender": "plain"}),
        "order 1": ("iteration", {"contender": "dan", "order": 1, "backbone": "updated"}),
        "order 2": ("iteration", {"contender": "dan", "order": 2, "backbone": "updated"}),
    }
    text = (ROOT / page).read_text().partition("| limit ms | time over limit |")[2].partition("\n\n")[0]
    table = re.findall(r"^\| (.+?) \| ([\d.,]+) \| ([\d.]+)(?:;[^|]*)? \|$", text, re.M)
    rows = {key: row for row in table for key in of_a_row if key in row[0]}
    assert rows.keys() == of_a_row.keys()
    for key, (file, wanted) in of_a_row.items():
        found = json.loads((ROOT / "benchmarks" / "results" / "cpu" / f"{file}.json").read_text())["rows"]
        row = next(each for each in found if wanted.items() <= each.items())
        (kind,) = row["over_limit"].keys() - {"forward"}
        _, limit, over = rows[key]
        assert float(limit.replace(",", "")) == pytest.approx(1e3 * max(row["limit_seconds"][kind].values()), rel=0.01)
        assert f"{row['over_limit'][kind]:.{len(over.partition('.')[2])}f}" == over


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
