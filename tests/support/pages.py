"""The pages of the documentation, their blocks, and the commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT, in_checkout

PAGES = [in_checkout(name) for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
# Pages that are run in this order, and what each leaves behind.
GUIDES = {
    ROOT / "docs/training.md": ("runs/drawn/results.json", "runs/drawn/report/index.html", "runs/python/results.json"),
    ROOT / "docs/kernels.md": (),
    ROOT / "docs/search.md": (
        "runs/drawn/search/index.html",
        "runs/drawn/search/ranked.json",
        "runs/drawn/index/index.json",
    ),
    ROOT / "docs/tracker.md": ("street.npz", "drawn.onnx"),
    ROOT / "docs/migrating.md": ("resnet18.pth", "ranked.png"),
    ROOT / "docs/reproducing.md": tuple(
        f"runs/drawn_recipes/{name}" for name in ("comparison.md", "comparison.json", "results.csv")
    ),
    ROOT / "docs/sharing.md": (),
    ROOT / "README.md": (),
}
ASSIGNMENT = re.compile(r"^[A-Z_]+=\S*$")


class Block(NamedTuple):
    """What stands between two fences; `language` is what follows the first one."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def texts(page: Path, language: str) -> list[str]:
    """The contents of a page's blocks of a language."""
    return [block.text for block in blocks(page) if block.language == language]


def commands(page: Path) -> list[list[str]]:
    """The words of each command in the shell blocks of a page, without variables, comments and where output goes."""
    lines = [line for text in texts(page, "bash") for line in text.splitlines()]
    split = [shlex.split(part.split(" > ")[0], comments=True) for line in lines for part in line.split("&&")]
    return [[word for word in words if not ASSIGNMENT.match(word)] for words in split if words]


def write_settings(page: Path, folder: Path) -> list[Path]:
    """Writes the page's YAML blocks as the files that their first lines name."""
    paths = []
    for text in texts(page, "yaml"):
        paths.append(folder / text.partition("\n")[0].removeprefix("# "))
        paths[-1].write_text(text)
    return paths
