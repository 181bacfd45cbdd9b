"""HTML pages of one look beside their pictures; the report is one."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import jinja2

from dan_fast.core.errors import DanFastError
from dan_fast.core.files import write_text

# In a cell without a value.
ABSENT = "–"
# 63.2, 63.2 ± 1.1, 61.6 † or a dash: what is set in a column of numbers.
_NUMBER = re.compile(r"[-–+]?[\d.,]*( ± [\d.]+)?( [†‡])?")
# In a shorter table the eye finds the largest as fast.
SORTABLE_FROM = 8


class Table(NamedTuple):
    """A table of the report; each of the rows has a value for each of the columns.

    Attributes:
        folded: shown as its title until the reader opens it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    folded: bool = False

    @property
    def sortable(self) -> bool:
        """Whether the headings sort the rows."""
        return len(self.rows) >= SORTABLE_FROM


class Figure(NamedTuple):
    """A picture of the report.

    Attributes:
        caption: what came out.
        alt: what the picture shows, for readers who cannot see it and read the caption all the same; else the title.
    """

    title: str
    path: str | Path
    caption: str = ""
    alt: str = ""


def write_report(
    out_dir: str | Path,
    title: str,
    summary: str,
    tables: Sequence[Table] = (),
    figures: Sequence[Figure] = (),
) -> Path:
    """Write ``index.html`` into ``out_dir``, referring to the pictures by relative paths.

    The page needs no network, so it can be moved or archived together with its pictures. Its only script stands in
    the page: it sorts tables of 8 rows and more by the heading that is pressed, and the page reads without it. All
    text is escaped.

    Args:
        out_dir: folder to write into; made if missing.
        title: heading of the page.
        summary: what was done and what came out; an empty line starts a new paragraph.
        tables: shown below the summary; folded ones below the figures.
        figures: shown below the tables; their files must exist.

    Returns:
        The path of the page.

    Raises:
        DanFastError: the file of a figure does not exist.
        ValueError: a row of a table is longer or shorter than its columns.

    Example:
        >>> import tempfile
        >>> table = Table("Unseen domain", ["network", "mAP"], [["trained", 61.5]])
        >>> page = write_report(tempfile.mkdtemp(), "Run 1", "Trained.", [table])
        >>> "<td>61.5</td>" in page.read_text(encoding="utf-8")
        True
    """
    out_dir = Path(out_dir)
    for table in tables:
        for row in table.rows:
            if len(row) != len(table.columns):
                raise ValueError(f"tables: a row of {table.title!r} has {len(row)} values, not {len(table.columns)}.")
    for figure in figures:
        if not Path(figure.path).is_file():
            raise DanFastError(f"{figure.path} does not exist; draw the picture before writing the report.")
    return write_page(
        out_dir / "index.html",
        "report.html",
        title=title,
        paragraphs=[paragraph for paragraph in summary.split("\n\n") if paragraph.strip()],
        tables=[table for table in tables if not table.folded],
        folded=[table for table in tables if table.folded],
        figures=[(figure, link_from(out_dir, figure.path)) for figure in figures],
    )


def write_page(page: Path, template: str, **values: object) -> Path:
    """Write a page by a template that extends ``base.html``, which asks for ``title`` and ``paragraphs``; all text is
    escaped.

    Args:
        page: file to write; its folder is made if missing.
        template: name of a file in ``dan_fast/reporting/templates``.
        values: what the template names.

    Returns:
        The path of the page.

    Raises:
        DanFastError: the page cannot be written, or one is there that is not of this package.
    """
    require_own_page(page)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dan_fast.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["words"] = lambda value: _NUMBER.fullmatch(str(value)) is None
    write_text(page, environment.get_template(template).render(values))
    return page


def require_own_page(page: Path) -> None:
    """Refuse to write a page in the place of one that was not written by this package.

    Raises:
        DanFastError: such a page is there.
    """
    if page.is_file() and b"dan_fast" not in page.read_bytes():
        raise DanFastError(f"{page} is not a page of dan_fast: choose another folder, or move it away.")


def link_from(folder: str | Path, path: str | Path) -> str:
    """The address of a file for a page in ``folder``, relative and quoted.

    Example:
        >>> link_from("runs/page", "runs/images/a b#1.png")
        '../images/a%20b%231.png'
    """
    return quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))
