"""The site is built without a link that leads nowhere, and fetches nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, in_checkout

in_checkout("mkdocs.yml")
pytestmark = pytest.mark.slow


def built(repository: Path, site: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, env=environment)


def test_the_site_is_built_and_fetches_nothing(tmp_path: Path):
    result = built(ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    start, guide = tmp_path / "index.html", tmp_path / "docs/training/index.html"
    for page in (start, guide):
        fetched = re.findall(r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"(https?:[^\"]+)", page.read_text())
        assert fetched == []
    assert 'href="docs/training/"' in start.read_text()
    assert (tmp_path / "benchmarks/results/cpu/epoch_resnet18.json").is_file()


def test_broken_links_and_pages_that_no_menu_names_end_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from site_files import site_files

    for path in (*site_files(), "mkdocs.yml", "scripts/site_files.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    (tmp_path / "docs/forgotten.md").write_text(
        "[one](speed.md#nowhere) [two](nothing.md) [three](../csrc/nothing.h)\n"
    )
    result = built(tmp_path, tmp_path / "site")
    assert result.returncode == 1
    for complaint in ("docs/forgotten.md", "#nowhere", "'nothing.md'", "'../csrc/nothing.h'"):
        assert complaint in result.stderr, result.stderr
