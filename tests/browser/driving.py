"""What a visitor does on the page, by playwright."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from PIL import Image

DONE = re.compile(r" in [\d.]+ s")  # what the page says when it has drawn
PATIENCE = 60_000  # milliseconds


def open_link(page, link: str) -> None:
    """Follow a link to other creatures, and wait for them."""
    page.locator("#status").evaluate("element => { element.textContent = ''; }")
    page.evaluate("link => { location.hash = link; }", link)
    text_of(page, "status", DONE)


def ready(page) -> None:
    """Wait until the network is loaded."""
    page.locator("#draw:enabled").wait_for()


def text_of(page, name: str, pattern: str | re.Pattern = r".") -> str:
    """Wait until an element's text matches, and return it."""
    from playwright.sync_api import expect

    expect(page.locator(f"#{name}")).to_have_text(re.compile(pattern), timeout=PATIENCE)
    return page.locator(f"#{name}").inner_text()


def draw(page) -> None:
    """Press Draw, and wait for the creatures."""
    page.locator("#status").evaluate("element => { element.textContent = ''; }")
    page.get_by_role("button", name="Draw", exact=True).click()
    text_of(page, "status", DONE)


def pixels(page, selector: str = "#picture") -> np.ndarray:
    """Read a canvas back: uint8 [H, W, 3]."""
    png = page.locator(selector).evaluate("canvas => canvas.toDataURL().split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def choose(page, **numbers: float) -> None:
    """Set sliders and seeds."""
    for name, value in numbers.items():
        page.locator(f"#{name}").fill(str(value))
        page.locator(f"#{name}").dispatch_event("change")


def begin_with(page, mode: str) -> None:
    page.locator(f"label:has(input[value={mode}])").click()


def scribble(page) -> None:
    """Draw something blue with a head and a tail on the canvas, with the mouse."""
    begin_with(page, "drawing")
    page.locator("#swatches label[title=blue]").click()
    page.locator("#brush").fill("6")
    page.locator("#sketch").scroll_into_view_if_needed()
    box = page.locator("#sketch").bounding_box()
    for points in ([(0.5, 0.7), (0.55, 0.75)], [(0.45, 0.35), (0.5, 0.35)], [(0.65, 0.75), (0.85, 0.6), (0.9, 0.45)]):
        x, y = ([box["x"] + px * box["width"] for px, _ in points], [box["y"] + py * box["height"] for _, py in points])
        page.mouse.move(x[0], y[0])
        page.mouse.down()
        for i in range(1, len(x)):
            page.mouse.move(x[i], y[i], steps=4)
        page.mouse.up()


def drawn_part(image: np.ndarray) -> float:
    """Return the fraction of an image, uint8 [H, W, 3], that is not nearly white."""
    return (image.min(axis=2) < 200).mean()
