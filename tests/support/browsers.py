"""The Chromium of the system, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from support.deadlines import HANGING_S

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
WIDTHS = {"desktop": (1440, 1000), "phone": (390, 844)}


@contextmanager
def browsing() -> Iterator[Browser]:
    """Start the browser. Without one the test is skipped, or fails if SPARSE_INGEST_TEST_BROWSER_REQUIRED is set."""
    path = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if path is None:
        why = f"the page needs a browser: one of {', '.join(PROGRAMS)}"
        pytest.fail(why) if os.environ.get("SPARSE_INGEST_TEST_BROWSER_REQUIRED") else pytest.skip(why)
    # The sandbox of Chromium refuses root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        expect.set_options(timeout=1000 * HANGING_S)
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Visit:
    """A page with its errors: exceptions, console errors (also of the Content-Security-Policy), dialogs."""

    def __init__(self, page: Page, name: str) -> None:
        self.page, self.name = page, name
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requested.add(request.url))
        self.requested: set[str] = set()

    def screenshot(self, what: str) -> None:
        """Keep a picture of the page if CI is set."""
        if not os.environ.get("CI"):
            return
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{what}-{self.name}.png")

    def assert_accessible(self) -> None:
        """Run axe-core on what is shown."""
        found = Axe().run(self.page)
        assert found.violations_count == 0, found.generate_report()


@contextmanager
def visiting(browser: Browser, url: str, width: str = "desktop", scheme: str = "light") -> Iterator[Visit]:
    """Open a new page at an address; afterwards assert that it had no error and asked no other host."""
    across, down = WIDTHS[width]
    context = browser.new_context(viewport={"width": across, "height": down}, color_scheme=scheme)  # type: ignore[arg-type]
    context.set_default_timeout(1000 * HANGING_S)
    visit = Visit(context.new_page(), f"{width}-{scheme}")
    visit.page.goto(url)
    yield visit
    context.close()
    assert visit.errors == []
    assert {address for address in visit.requested if not address.startswith(("data:", url.partition("?")[0]))} == set()
