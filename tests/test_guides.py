"""The guides run: each block of Python, and each command on drawn persons, in the order of its page."""

import shlex
from pathlib import Path

import pytest
import torch

from dan_fast import cli
from tests.support.pages import GUIDES, blocks, write_settings

# It draws the persons and trains the network that the others use.
TRAINING = next(iter(GUIDES))


def run(page: Path, folder: Path) -> None:
    """Run a page in a folder, the current one."""
    torch.manual_seed(0)
    write_settings(page, folder)
    namespace = {"__name__": page.stem}
    for number, (language, text) in enumerate(blocks(page), 1):
        if language == "python":
            exec(compile(text, f"{page.name}, block {number}", "exec"), namespace)
        elif language == "bash":
            for line in text.splitlines():
                if "drawn" in line:
                    assert cli.main(shlex.split(line)[1:]) == 0, line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guides")


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    if page != TRAINING and not (folder / "runs/drawn").exists():
        run(TRAINING, folder)
    run(page, folder)
    for path in GUIDES[page]:
        assert (folder / path).is_file(), path
