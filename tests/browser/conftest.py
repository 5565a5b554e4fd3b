"""The page in a real browser: Chromium, driven by playwright, on what `export.py --to web` wrote.

    npm pack onnxruntime-web@1.30.0 && pip install playwright -r requirements-export.txt
    ONNXRUNTIME_WEB=onnxruntime-web-1.30.0.tgz python -m pytest tests/browser

Chromium is the system's own (`apt-get install chromium`). What is missing is named as the reason for skipping. With
PAGE_GIF=docs/images/page.gif the picture of the README is written, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driving import PATIENCE, ready
from scripts import ROOT
from serving import export_page, serving

BOX = ROOT / "checkpoints/critters.pt"


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Return the folder of a page with the bundled model of 32x32."""
    return export_page(BOX, tmp_path_factory.mktemp("web") / "page")


@pytest.fixture(scope="session")
def address(site) -> Iterator[str]:
    """Serve the page, and yield its address."""
    with serving(site) as address:
        yield address


@pytest.fixture(scope="session")
def visit(address, browser) -> Callable:
    """Return a function that opens the page in a new browser context: (link="", broken={}, ...) -> playwright's Page.

    `broken` maps a path to the answer that the server gives instead: bytes, or None for "not found". Its attributes
    `requests` and `errors` are the addresses of all requests, and what was written to the console as an error.
    """
    def open_page(link="", broken=None, script=None, **options):
        context = browser.new_context(**{"viewport": dict(width=1000, height=800)} | options)
        context.on("request", lambda request: open_page.requests.append(request.url))
        for path, content in (broken or {}).items():
            answer = dict(status=404) if content is None else dict(body=content)
            context.route(f"**/{path}*", functools.partial(fulfil, answer))
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: open_page.errors.append(str(error)))
        if not broken:  # else the browser itself speaks of the missing file
            page.on("console", lambda message: open_page.errors.append(message.text) if message.type == "error" else 0)
        page.goto(address + link)
        return page

    open_page.requests, open_page.errors = [], []
    return open_page


def fulfil(answer: dict, route) -> None:
    route.fulfill(**answer)


@pytest.fixture(autouse=True)
def nothing_goes_elsewhere(visit, address) -> Iterator[None]:
    """After each test: no request to another origin, and no error in the console."""
    yield
    assert visit.errors == []
    assert [url for url in visit.requests if not url.startswith((address, f"blob:{address}"))] == []


@pytest.fixture(scope="session")
def page(visit):
    """Return a page that the tests share, each after opening a link of its own in it."""
    page = visit()
    ready(page)
    return page
