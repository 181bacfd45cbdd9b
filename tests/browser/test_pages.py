"""The HTML pages in Chromium, opened as files: whole, readable in a narrow window and in the dark, by keyboard too."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from torch.utils.tensorboard import SummaryWriter

from dan_fast.commands.quickstart import IMAGE_SIZE, UNSEEN, _config, _evaluate, quickstart_page, results_table
from dan_fast.data import load_dataset
from dan_fast.data.synthetic import synthesize
from dan_fast.reporting.html import SORTABLE_FROM, Table, write_report
from dan_fast.reporting.report import report
from dan_fast.training.build import initial_network
from tests.support.fake_runs import fake_run
from tests.support.searches import search_page

pytestmark = pytest.mark.slow

CHECKS = Path(__file__).with_name("checks.js").read_text(encoding="utf-8")
WIDE, NARROW = 1200, 400
# Playwright's own 30 s are few where other processes have the cores.
PATIENCE_MS = 180_000


def of_report(folder: Path) -> Path:
    """Two runs without a checkpoint, beside the paper: pictures, tables long and folded, and what is missing."""
    for share in (0.0, 1.0):
        scalars = {"memory/beta": [0.1, 0.2], "train/loss/total": [2.0, 1.0]}
        results = [("street", 0.3, 0.2 + share / 5), ("viper", 0.5, 0.4, 10)]
        fake_run(folder / "runs" / f"p{share}", results, scalars, data={"unlabeled_share": share})
    return report([folder / "runs"], folder / "page")


def of_quickstart(folder: Path) -> Path:
    """What the quickstart writes, of a network that was not trained."""
    synthesize(folder / "data", [UNSEEN], identities=3, image_size=IMAGE_SIZE, test_fraction=1.0)
    config = _config(folder, epochs=1, seed=0, workers=0, recipe="paper")
    with SummaryWriter(folder / "run" / "tensorboard") as writer:
        for step in range(3):
            writer.add_scalar("train/loss/total", 3 - step, step)
    network = initial_network(config.to_dict(), num_classes=2, read_weights=False).eval()
    tested, features = _evaluate(network, load_dataset(folder / "data" / UNSEEN), 0, lambda *_: None)
    return quickstart_page(folder, config, network, features, results_table(tested, tested))


# Every kind of page that the package writes: a function that writes one into a folder and returns its path.
PAGES: list[Callable[[Path], Path]] = [of_report, of_quickstart, search_page]


@pytest.fixture(scope="module", params=PAGES, ids=lambda write: write.__name__)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(names)} is on PATH; `apt-get install chromium`")
    with sync_playwright() as playwright:
        # Chromium refuses to run as root within its sandbox.
        sandbox = os.geteuid() != 0
        browser = playwright.chromium.launch(executable_path=found, chromium_sandbox=sandbox, timeout=PATIENCE_MS)
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Browser, path: Path, width: int = WIDE, scheme: str = "light", script: bool = True
) -> Iterator[Page]:
    """The page with its folded parts open and the checks at hand; nothing may have failed when it is closed."""
    failed: list[str] = []
    # A phone lays a page out in its own width only where the page asks for it.
    settings = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "is_mobile": width == NARROW}
    with browser.new_context(java_script_enabled=script, **settings) as context:
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", lambda each: failed.append(each.text) if each.type in ("error", "warning") else None)
        page.on("pageerror", lambda each: failed.append(str(each)))
        page.on("requestfailed", lambda each: failed.append(f"{each.url} failed"))
        page.on("request", lambda each: failed.append(each.url) if each.url.startswith("http") else None)
        page.goto(path.as_uri())
        if script:
            page.add_script_tag(content=CHECKS)
            page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        yield page
    assert not failed


def test_images_load_and_links_lead_to_files(browser, path):
    with opened(browser, path) as page:
        assert page.evaluate("document.images.length") > 1
        assert page.evaluate("images()") == []
        links = page.evaluate("[...document.links].map((each) => each.href)")
    assert [each for each in links if not Path(unquote(urlsplit(each).path)).is_file()] == []


def test_all_that_can_be_clicked_is_reached_by_tab_and_has_a_name_and_a_ring(browser, path):
    with opened(browser, path) as page:
        wanted = page.evaluate("(window.wanted = interactive()).length")
        reached, without_ring = set(), []
        for _ in range(wanted + 1):
            page.keyboard.press("Tab")
            place, ring = page.evaluate("[wanted.indexOf(document.activeElement), ring()]")
            if place < 0 or place in reached:
                break
            reached.add(place)
            if not ring:
                without_ring.append(page.evaluate("said(document.activeElement)"))
        missed = set(range(wanted)) - reached
        assert [page.evaluate("(place) => said(wanted[place])", place) for place in missed] == [] and wanted > 2
        assert without_ring == []
        tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node for node in tree
        if any(each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", ()))
    ]  # fmt: skip
    assert len(focusable) == wanted + 1, "all of them and the document"
    assert [node["role"]["value"] for node in focusable if not node["name"]["value"].strip()] == []


def test_a_narrow_window_scrolls_tables_only(browser, path):
    with opened(browser, path, NARROW) as page:
        assert page.evaluate(f"overflow({NARROW})") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser, path, scheme):
    with opened(browser, path, scheme=scheme) as page:
        assert page.evaluate("(scheme) => contrast(scheme)", scheme) == []


SCORES = ["9.8", "63.2 ± 1.1", "–", "61.6 †", "1,204", "–3.5", "61.6", "+2.0 [-0.5, +4.5]", "1e-06 → 0.5", "5x",
          "+9.5, 1 seed in both"]  # fmt: skip
RISING = ["–3.5", "1e-06 → 0.5", "+2.0 [-0.5, +4.5]", "+9.5, 1 seed in both", "9.8", "61.6 †", "61.6", "63.2 ± 1.1",
          "1,204", "5x", "–"]  # fmt: skip
FALLING = ["1,204", "63.2 ± 1.1", "61.6 †", "61.6", "9.8", "+9.5, 1 seed in both", "+2.0 [-0.5, +4.5]", "1e-06 → 0.5",
           "–3.5", "5x", "–"]  # fmt: skip


@pytest.fixture(scope="module")
def long_table(tmp_path_factory) -> Path:
    rows = [[f"run {len(SCORES) - place}", score] for place, score in enumerate(SCORES)]
    tables = [Table("Long", ["run", "mAP"], rows), Table("Short", ["run", "mAP"], rows[: SORTABLE_FROM - 1])]
    return write_report(tmp_path_factory.mktemp("long"), "Tables", "", tables)


@pytest.mark.parametrize("key", ["click", "Enter", "Space"])
def test_long_tables_sort(browser, long_table, key):
    with opened(browser, long_table) as page:
        region = page.get_by_role("region", name="Long")

        def press(heading):
            button = region.get_by_role("button", name=heading, exact=True)
            button.click() if key == "click" else button.press(key)
            return region.locator("td").all_inner_texts()

        def order():
            return region.locator("thead th").evaluate_all("(all) => all.map((each) => each.ariaSort)")

        assert region.locator("td").all_inner_texts() == SCORES and order() == [None, None]
        assert press("mAP") == RISING and order() == [None, "ascending"]
        assert press("mAP") == FALLING and order() == [None, "descending"]
        # Words with numbers in them go by the numbers: run 2 before run 10.
        assert press("run") == SCORES[::-1] and order() == ["ascending", None]
        assert page.get_by_role("region", name="Short").get_by_role("button").count() == 0


def test_without_script_a_table_is_what_was_written(browser, long_table):
    with opened(browser, long_table, script=False) as page:
        assert page.get_by_role("region", name="Long").locator("td").all_inner_texts() == SCORES
        assert page.get_by_role("columnheader", name="mAP").all_inner_texts() == ["mAP"] * 2
        assert page.get_by_role("button").count() == 0
