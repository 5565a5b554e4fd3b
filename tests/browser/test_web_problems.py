"""What can go wrong on the page is a sentence: missing and damaged files, links out of range, odd pictures."""

from __future__ import annotations

import base64
import io

import numpy as np
from driving import DONE, choose, open_link, pixels, ready, scribble, text_of
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
        "model.json, is incomplete.": {"model/model.json": description.replace('"fire"', "1")},
        "The page cannot start (": {"model/model.json": description.replace('"height": 32', '"height": 1e18')},
        "format 99": {"model/model.json": description.replace('"format": 1', '"format": 99')},
    }
    for words, broken in cases.items():
        page = visit(broken=broken)
        assert words in text_of(page, "trouble-text")
        assert page.get_by_role("button", name="Try again").is_visible() and not page.locator("#draw").is_enabled()
        if "model.onnx" in words:
            page.wait_for_timeout(200)  # what is still on its way must not say that all is well
            assert page.locator("#status").inner_text() == "The network is not loaded."
        if "99" in words or "cannot start" in words:
            page.context.unroute("**/model/model.json*")  # it is back
            page.get_by_role("button", name="Try again").click()
            page.locator("#main").wait_for()
            assert page.locator("#trouble").is_hidden()
        page.context.close()


def test_a_browser_without_webassembly_is_a_sentence(visit):
    page = visit(script="delete globalThis.WebAssembly;")
    assert "no WebAssembly" in text_of(page, "trouble-text")
    page.context.close()


def test_a_browser_that_cannot_compress_says_that_it_did_not_save(visit):
    page = visit(script="delete globalThis.CompressionStream;")
    ready(page)
    open_link(page, "#n=1&steps=1")
    page.get_by_role("button", name="Save PNG").click()
    assert "could not save" in text_of(page, "action-status", "save")
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


def test_two_pictures_at_once_and_a_link_leave_the_newest(page):
    """A picture that is read slowly does not cover what came after it."""
    drop = """async ([colours, then]) => {
        const real = window.createImageBitmap;
        let slow = 400;
        window.createImageBitmap = async (file) => {
            const wait = slow;
            slow = 0;
            await new Promise((resolve) => setTimeout(resolve, wait));
            return real(file);
        };
        for (const colour of colours) {
            const canvas = new OffscreenCanvas(8, 8);
            const pen = canvas.getContext("2d");
            pen.fillStyle = colour;
            pen.fillRect(0, 0, 8, 8);
            const files = new DataTransfer();
            files.items.add(new File([await canvas.convertToBlob()], `${colour}.png`));
            const options = { dataTransfer: files, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent("drop", options));
        }
        if (then) location.hash = then;
        await new Promise((resolve) => setTimeout(resolve, 700));
        window.createImageBitmap = real;
    }"""
    page.evaluate(drop, [["red", "lime"], None])
    assert (pixels(page, "#sketch") == [0, 255, 0]).all()
    page.evaluate(drop, [["red"], "#mode=drawing&steps=3"])
    assert (pixels(page, "#sketch") == 255).all()


# ---------------------------------------------------------------------------------------------------------------------
# links in the same tab


def test_the_drawing_of_another_link_does_not_stay(page):
    for link in ("#mode=drawing&steps=1&drawing=damaged!", "#mode=drawing&steps=2", "#n=1&steps=1&seed=4"):
        scribble(page)
        before = pixels(page, "#sketch")
        assert (before != 255).any()
        page.evaluate("link => { location.hash = link; }", link)
        page.wait_for_function("document.getElementById('undo').disabled === false"
                               " && document.getElementById('steps').value !== '20'")
        page.wait_for_timeout(200)
        assert (pixels(page, "#sketch") == 255).all(), link
        assert page.locator("#notes").is_hidden() == ("damaged" not in link)  # those of the link before are closed
        page.locator("#undo").evaluate("button => button.click()")
        assert np.array_equal(pixels(page, "#sketch"), before)  # nothing is lost


def test_all_notes_on_a_link_are_shown(visit, site):
    """Those on its numbers, and that on the sampler that the page does not have."""
    description = (site / "model/model.json").read_text().replace('"name": "sde-dpm++"', '"name": "ddpm"')
    page = visit("#mode=drawing&n=99&drawing=damaged!", broken={"model/model.json": description})
    notes = text_of(page, "notes-text", "ddpm")
    assert all(words in notes for words in ("99", "drawing in the link is damaged", "sampler “ddpm”"))
    page.context.close()


# ---------------------------------------------------------------------------------------------------------------------
# states of the page

FAILING_WORKER = """
window.failures = 0;
window.Worker = class extends Worker {
    constructor(...options) {
        super(...options);
        window.worker = this;
    }
    postMessage(message) {
        if (message.kind !== "draw" || window.failures === 0) return super.postMessage(message);
        window.failures -= 1;
        const { run } = message.job;
        this.onmessage({ data: { kind: "failed", while: "draw", run, message: "It is broken." } });
    }
};"""


def test_a_failure_is_not_shown_for_ever(visit):
    page = visit(script=FAILING_WORKER)
    ready(page)
    choose(page, count=1, steps=1)
    for button, loads in (("Draw", False), ("Try again", True)):
        page.evaluate("window.failures = 1")
        page.get_by_role("button", name="Draw", exact=True).click()
        assert text_of(page, "trouble-text") == "It is broken."
        assert page.locator("#trouble").is_visible() and page.locator("#stop").get_attribute("aria-disabled") == "true"
        page.evaluate("window.before = window.worker")
        page.get_by_role("button", name=button, exact=True).click()
        text_of(page, "status", DONE)  # "Try again" draws again by itself
        assert page.locator("#trouble").is_hidden() and page.evaluate("window.worker !== window.before") == loads

    # A frame that cannot be shown ends no drawing, and does not hide what went wrong before.
    choose(page, count=16, steps=50)
    page.get_by_role("button", name="Draw", exact=True).click()
    text_of(page, "status", "Creature 1 of 16")
    fail = "message => window.worker.onmessage({ data: { kind: 'failed', while: 'decode', message } })"
    for message in ("No frame.", "No other frame."):
        page.evaluate(fail, message)
        assert text_of(page, "trouble-text") == "No frame."
    assert page.locator("#stop").get_attribute("aria-disabled") == "false"
    page.get_by_role("button", name="Stop").click()
    text_of(page, "status", "Stopped")
    page.context.close()


def test_decodings_end_with_their_worker(page):
    """And what is asked of a network that is not loaded fails at once, without a message."""
    ends = page.evaluate("""async () => {
        const { Engine } = await import("./engine.js");
        const real = window.Worker;
        window.Worker = class { postMessage() {} terminate() {} };
        const messages = [];
        const engine = new Engine((message) => messages.push(message.kind));
        const late = () => new Promise((resolve) => setTimeout(resolve, 1000, "open"));
        const end = (promise) => Promise.race([promise.then(() => "resolved", () => "rejected"), late()]);
        engine.load({});
        const ends = [await end(engine.decode([]))];
        engine.worker.onmessage({ data: { kind: "ready" } });
        const waiting = end(engine.decode([]));
        engine.load({});
        ends.push(await waiting, await end(engine.decode([])));
        window.Worker = real;
        return [ends, messages];
    }""")
    assert ends == [["rejected"] * 3, ["ready"]]


def test_latents_are_shown_as_they_are_wanted(page):
    """One is decoded at a time, of those that wait the newest alone; an older one never covers a newer one."""
    log, colours = page.evaluate("""async () => {
        const { Stage } = await import("./stage.js");
        const names = ["scene", "picture", "pictureCaption", "guess", "time", "play", "morphRow", "morph", "morphPlay",
                       "morphFrom", "morphTo", "gallery", "thumbnails"];
        const kinds = { picture: "canvas", guess: "canvas", time: "input", morph: "input" };
        const elements = Object.fromEntries(names.map((name) => [name, document.createElement(kinds[name] ?? "div")]));
        elements.time.type = elements.morph.type = "range";
        const log = [], waiting = [];
        const grey = (value) => new Uint8ClampedArray(4).fill(value);
        const decode = (latents) => new Promise((resolve, reject) => {
            log.push(latents);
            waiting.push({ resolve: () => resolve(grey(latents)), reject });
        });
        const stage = new Stage(elements, { alpha_bar: [0.9, 0.5], image_size: 8 }, decode, () => {});
        const turn = () => new Promise((resolve) => setTimeout(resolve));
        const frame = (latents, isDecoded) => ({ latents, pixels: isDecoded ? grey(latents) : null });
        const colour = (canvas) => canvas.getContext("2d").getImageData(0, 0, 1, 1).data[3];
        const colours = [];
        const look = () => colours.push([colour(elements.picture), colour(elements.guess)]);

        // While a creature is being made, the newest decoded guess is shown, and nothing of the creature before.
        const make = (index, base, isDone) => {
            stage.start({ index, steps: 2, t: 1, x_t: frame(base) });
            look();
            stage.step({ index, t: 0, x_t: frame(base + 1), x_0: frame(base + 2, true) }, false);
            look();
            if (isDone) stage.step({ index, t: -1, x_t: frame(base + 3, true), x_0: frame(base + 4, true) }, true);
        };
        stage.begin(["seed 1", "seed 2"], false);
        make(0, 100, true);
        look();
        make(1, 110, false);

        // Back to the creature that is done: three moments are asked for while the first is being decoded.
        stage.choose(0);
        for (const moment of [0, 1, 0, 1]) {
            elements.time.value = moment;
            elements.time.dispatchEvent(new Event("input"));
        }
        log.push("turn");
        waiting.shift().resolve();
        await turn();
        look();
        waiting.shift().reject();
        await turn();

        // A new job begins while one is being decoded.
        elements.time.value = 1;
        elements.time.dispatchEvent(new Event("input"));
        stage.begin(["seed 3"], false);
        make(0, 120, true);
        waiting.shift().resolve();
        await turn();
        look();
        return [log, colours];
    }""")
    assert log == [100, "turn", 101, 101]
    assert colours == [[0, 0], [102, 102], [103, 104], [0, 0], [112, 112], [103, 104], [0, 0], [122, 122], [123, 124]]
