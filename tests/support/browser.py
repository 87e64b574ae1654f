"""Pages in a real browser: Chromium from the distribution's packages, driven by playwright, without the network."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
_LOCAL = (
    "file:",
    "data:",
    "blob:",
    "about:",
    "http://127.0.0.1",
    "http://localhost",
    "ws://127.0.0.1",
    "ws://localhost",
)
DESKTOP, PHONE = (1280, 900), (375, 812)  # CSS pixels


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips the test where there is none. A module-scoped fixture shares one among its tests."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install .[dev]")
    if _CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=_OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Opened:
    """A page, and what went wrong in it since it was opened.

    Attributes:
        page: of playwright.
        problems: console errors and warnings, uncaught exceptions, failed requests, and requests to other machines.
    """

    page: Page
    problems: list[str] = field(default_factory=list)

    def scrolls_sideways(self) -> bool:
        """Whether the page is wider than the window."""
        root = "document.scrollingElement"
        return self.page.evaluate(f"{root}.scrollWidth > {root}.clientWidth")

    def accessibility_violations(self, *ignored: str) -> list[str]:
        """What axe-core finds, a line for each kind, without the rules in `ignored`."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is missing")
        found = axe.Axe().run(self.page).response["violations"]
        return [
            f"{rule['id']}: {rule['help']}: {[node['html'][:120] for node in rule['nodes']][:3]}"
            for rule in found
            if rule["id"] not in ignored
        ]


@contextlib.contextmanager
def opened(
    browser: Browser, address: str | Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False, **options: Any
) -> Iterator[Opened]:
    """A page of a new, empty profile.

    Args:
        browser: from `chromium`.
        address: of a file, or of a server on the loopback interface.
        size: of the window, in CSS pixels; `PHONE` is a touch screen.
        dark: whether the user prefers dark pages.
        options: of playwright's `Browser.new_context`.
    """
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        has_touch=size == PHONE,
        is_mobile=size == PHONE,
        **options,
    )
    try:
        found = Opened(context.new_page())
        page, problems = found.page, found.problems
        page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url[:200]} ({request.failure})"))
        page.on("request", lambda request: _note_request(request.url, problems))
        page.on("console", lambda message: _note_message(message, problems))
        page.goto(address.absolute().as_uri() if isinstance(address, Path) else address)
        yield found
    finally:
        context.close()


def _note_request(url: str, problems: list[str]) -> None:
    if not url.startswith(_LOCAL):
        problems.append(f"request to another machine: {url[:200]}")


def _note_message(message: Any, problems: list[str]) -> None:
    if message.type in ("error", "warning"):
        problems.append(f"console {message.type}: {message.text}")
