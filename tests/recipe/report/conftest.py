"""A headless Chromium for the pages, or a skip that says what is missing; every message and request is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recipe.report import folders

Open = Callable[..., Any]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("chromium is not installed (Debian and Ubuntu: apt-get install chromium)")
    with api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a file as a person would; ``page.seen`` are console messages, errors and requests but the file itself."""
    contexts = []

    def open_file(
        path: Path, *, width: int = 1280, dark: bool = False, scripts: bool = True, **more: Any
    ) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light",
            java_script_enabled=scripts, **more,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.seen = []
        address = path.resolve().as_uri()
        page.on("console", lambda message: page.seen.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: page.seen.append(f"error: {error}"))
        page.on(
            "request", lambda request: request.url != address and page.seen.append(f"request: {request.url}")
        )
        page.goto(address)
        if scripts:
            # Polling a function is refused by the page's policy.
            page.wait_for_selector("#precision:not(:empty), #failed:not([hidden])", state="attached")
        return page

    yield open_file
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished run with hostile texts among its prompts."""
    folder = folders.write_run(tmp_path_factory.mktemp("report") / "run <b>&amp; co")
    return folders.report(folder, folders.texts(folders.dynamics(), folders.HOSTILE))
