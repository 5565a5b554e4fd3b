"""What can go wrong on the page is a sentence: missing and damaged files, links out of range, odd pictures."""

from __future__ import annotations

import base64
import io

import numpy as np
from driving import open_link, pixels, scribble, text_of
from PIL import Image


def test_a_missing_or_damaged_file_is_a_sentence(visit, site):
    network = bytearray((site / "model/model.onnx").read_bytes())
    network[len(network) // 2] ^= 1
    description = (site / "model/model.json").read_text()
    cases = {
        "model/model.json is missing": {"model/model.json": None},
        "model/model.onnx is missing": {"model/model.onnx": None},
        "ort/ort-wasm-simd-threaded.wasm is missing": {"ort/*.wasm": None},
        "ort/ort.wasm.min.mjs, is missing": {"ort/ort.wasm.min.mjs": None},
        "worker.js is missing": {"worker.js": None},
        "model/model.onnx is damaged": {"model/model.onnx": bytes(network)},
        "model/model.json, is damaged": {"model/model.json": description[:100]},
        "model/model.json, is incomplete": {"model/model.json": description.replace('"timesteps": 1000', '"n": 1')},
        "format 99": {"model/model.json": description.replace('"format": 1', '"format": 99')},
    }
    for words, broken in cases.items():
        page = visit(broken=broken)
        assert words in text_of(page, "trouble-text")
        assert page.get_by_role("button", name="Try again").is_visible() and not page.locator("#draw").is_enabled()
        if "model.onnx" in words:
            page.wait_for_timeout(200)  # what is still on its way must not say that all is well
            assert page.locator("#status").inner_text() == "The network is not loaded."
        if "99" in words:
            page.context.unroute("**/model/model.json*")  # it is back
            page.get_by_role("button", name="Try again").click()
            page.locator("#main").wait_for()
            assert page.locator("#trouble").is_hidden()
        page.context.close()


def test_a_browser_without_webassembly_is_a_sentence(visit):
    page = visit(script="delete globalThis.WebAssembly;")
    assert "no WebAssembly" in text_of(page, "trouble-text")
    page.context.close()


def test_a_link_out_of_range_is_said_in_words(page):
    page.locator("#clear").evaluate("button => button.click()")
    page.evaluate("link => { location.hash = link; }",
                  "#seed=-1&n=1e9&types=fire+plastic&guidance=x&steps=1&mode=drawing&drawing=%3Cscript%3E&model=0")
    notes = text_of(page, "notes-text", "plastic")
    assert all(words in notes for words in ("-1", "1e9", "plastic", "“x”", "drawing in the link", "another model"))
    assert page.locator("#count").input_value() == "16" and page.locator("#seed").input_value() == "0"
    page.get_by_role("button", name="Draw", exact=True).click()
    assert "canvas is empty" in text_of(page, "sketch-trouble")

    open_link(page, "#n=0&steps=1&seed=1e99")  # one that draws by itself: the words stay
    assert page.locator("#notes").is_visible() and "1e99" in text_of(page, "notes-text")
    page.get_by_role("button", name="All right").click()
    assert page.locator("#notes").is_hidden()


def test_pictures_on_the_canvas(page):
    """What is no picture, or too large, is a sentence, and the drawing stays; a real one lands on the canvas."""
    scribble(page)
    before = pixels(page, "#sketch")

    def drop(name, content):
        page.evaluate("""([name, content]) => {
            const bytes = typeof content === "number" ? new Uint8Array(content)
              : Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            const files = new DataTransfer();
            files.items.add(new File([bytes], name));
            const options = { dataTransfer: files, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent("drop", options));
        }""", [name, content])

    def png(width, height, colour=None):
        file = io.BytesIO()
        Image.new("1" if colour is None else "RGB", (width, height), colour).save(file, "png")
        return base64.b64encode(file.getvalue()).decode()

    drop("notes.txt", "AAAA")
    assert "notes.txt is not a picture" in text_of(page, "sketch-trouble")
    drop("cut.png", png(40, 30, "red")[:60])
    assert "cut.png is not a picture" in text_of(page, "sketch-trouble", "cut")
    drop("film.mov", 60_000_000)
    assert "60 MB" in text_of(page, "sketch-trouble", "film")
    drop("sky.png", png(8000, 7000))
    assert "8000 × 7000" in text_of(page, "sketch-trouble", "sky")
    assert np.array_equal(pixels(page, "#sketch"), before)

    drop("red.png", png(40, 30, "red"))
    text_of(page, "sketch-trouble", "^$")
    assert (pixels(page, "#sketch") == [255, 0, 0]).all()
    page.get_by_role("button", name="Undo").click()
    assert np.array_equal(pixels(page, "#sketch"), before)
