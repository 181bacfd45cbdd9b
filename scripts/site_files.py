"""The files of the site, as a hook of mkdocs.yml: the repository's pages, and what they link, at their own paths.

Pages lie in several folders and link sources, figures and one another by relative paths. The site has all of them at
the same paths, so that a link is the same there as in the repository.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md", "benchmarks/results/h200/README.md")
LINK = re.compile(r"\]\(([^)\s#]+)")


def site_files() -> list[str]:
    """The pages and all files that they link, relative to the repository.

    A link to what does not exist, or lies outside, adds nothing here, so that the strict build names it.
    """
    pages = [ROOT / page for page in PAGES] + sorted((ROOT / "docs").glob("*.md"))
    linked = {
        (page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text(encoding="utf-8"))
    }
    linked = {path for path in linked if path.is_file() and path.is_relative_to(ROOT)}
    return sorted(path.relative_to(ROOT).as_posix() for path in {*pages, *linked})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs: the theme's files stay, those of docs/ are replaced."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in site_files():
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
