"""Headless Chromium for tests of pages: Debian's, driven by playwright.

A test that asks for it is skipped where one of them is missing, and fails with ``BROWSER=1``, which ``make browser`` sets. That
target puts playwright into ``build/browser``, since nothing else of the project needs it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OF_ITS_OWN = Path(__file__).parents[1] / "build/browser"
NAMES = ("chromium", "chromium-browser", "google-chrome")
VIEWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]
"""Widths of a phone and of a desk, and the colours that a reader prefers."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's synchronous interface, without windows."""
    if OF_ITS_OWN.is_dir() and str(OF_ITS_OWN) not in sys.path:
        sys.path.append(str(OF_ITS_OWN))  # last, so that it brings nothing but what is missing
    path = next(filter(None, map(shutil.which, NAMES)), None)
    try:
        from playwright.sync_api import sync_playwright  # type: ignore[import-not-found]
    except ImportError:
        _missing("playwright is not installed (make browser)")
    if path is None:
        _missing("there is no chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )  # it refuses root with its sandbox
        yield browser
        browser.close()


def _missing(reason: str) -> None:
    if os.environ.get("BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class Watched:
    """A page of a browser, and all that it asked for and complained about."""

    def __init__(self, browser: Any, *, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[Any] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.on(
            "request", lambda request: self.requests.append(request)
        )  # playwright sets attributes of what it is given

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
