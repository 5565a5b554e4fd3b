"""Drawing on the page: types, seeds, links, canvas, morphs, Stop; by pointer, by keys, on a phone."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from driving import DONE, PATIENCE, begin_with, choose, draw, drawn_part, open_link, pixels, scribble, text_of
from PIL import Image
from scripts import ROOT
from serving import export_page, serving

from critters.recognizer import CritterRecognizer
from reverse_diffusion import sample
from utils.images import read_settings


def test_the_types_the_seed_and_the_link(page, visit):
    """Fire and flying shows both; a seed is one creature, again, alone or beside another, and through its link."""
    for name in ("fire", "flying"):
        page.get_by_role("button", name=name).click()
    choose(page, seed=7, count=2, steps=10)
    draw(page)
    assert page.locator("#thumbnails canvas").count() == 2
    both = np.stack([pixels(page, f"#thumbnails label:nth-child({i}) canvas") for i in (1, 2)])
    assert both.shape == (2, 32, 32, 3) and np.array_equal(both[1], pixels(page))
    assert min(drawn_part(image) for image in both) > 0.2 and np.abs(both[0].astype(int) - both[1]).mean() > 5
    assert CritterRecognizer(32, count=400).types(both, count=2) == [frozenset({"fire", "flying"})] * 2

    choose(page, seed=8, count=1)  # alone
    draw(page)
    assert np.array_equal(pixels(page), both[1])
    again = visit("#" + page.url.split("#")[1])
    text_of(again, "status", DONE)  # a link draws by itself
    assert np.array_equal(pixels(again), both[1])
    assert again.get_by_role("button", name="flying").get_attribute("aria-pressed") == "true"
    assert again.locator("#seed").input_value() == "8" and again.locator("#notes").is_hidden()
    assert any(url.endswith(".wasm") for url in visit.requests)  # the worker's are among them
    again.context.close()


def test_a_scribble_becomes_a_creature_and_can_be_kept(page, tmp_path):
    open_link(page, "#n=1&steps=1")
    scribble(page)
    page.get_by_role("button", name="water").click()
    choose(page, seed=3, count=1, steps=15, strength=0.7)
    draw(page)
    assert page.locator("#time").get_attribute("max") == "10"  # 70 % of the steps, rounded to the even number
    creature = pixels(page).astype(int)
    assert drawn_part(creature) > 0.2
    foreground = creature[creature.min(axis=2) < 150]
    assert foreground[:, 2].mean() > foreground[:, 0].mean() + 40  # as blue as the scribble

    # Time: the slider goes back to the noise, and shows what the network expected then.
    page.locator("#time").focus()
    assert "noise" not in text_of(page, "picture-caption")
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    assert text_of(page, "picture-caption").startswith("Step 4 of 10, ")
    noisy, expected = pixels(page).astype(int), pixels(page, "#guess").astype(int)
    roughness = [np.abs(np.diff(image, axis=0)).mean() for image in (noisy, expected)]
    assert roughness[0] > 1.5 * roughness[1] and not np.array_equal(noisy, creature)
    page.keyboard.press("End")

    # A file with its settings, and a link with the drawing inside.
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").click()
    assert download.value.suggested_filename == "water-creature-3.png"
    download.value.save_as(tmp_path / "saved.png")
    image = np.asarray(Image.open(tmp_path / "saved.png"))
    assert image.shape == (256, 256, 3) and np.array_equal(image[::8, ::8], creature)
    settings = read_settings(tmp_path / "saved.png")
    assert settings["types"] == ["water"] and settings["seeds"] == [3] and settings["strength"] == 0.7
    page.get_by_role("button", name="Copy link").click()
    text_of(page, "action-status", "link")
    open_link(page, "#n=1&steps=1")
    assert not np.array_equal(pixels(page), creature)
    open_link(page, "#" + settings["link"].split("#")[1])
    assert np.array_equal(pixels(page), creature)


def test_stop_and_draw_again(page):
    page.evaluate("location.hash = '#types=ice&n=16&steps=20&seed=1'")
    text_of(page, "status", "Creature [2-9] of 16")
    page.get_by_role("button", name="Stop").click()
    text = text_of(page, "status", "Stopped")
    page.locator("#thumbnails label").last.click()
    assert "not drawn" in text_of(page, "picture-caption") and page.locator("#save").is_disabled()
    assert re.fullmatch(r"Stopped: [1-9] of 16 done\.", text)
    first = pixels(page, "#thumbnails label:nth-child(1) canvas")
    page.wait_for_timeout(300)
    assert page.locator("#status").inner_text() == text  # it has stopped
    page.locator("#thumbnails label").first.click()
    assert np.array_equal(first, pixels(page)) and drawn_part(first) > 0.2  # what is done stays
    choose(page, count=1)
    draw(page)
    assert np.array_equal(first, pixels(page))


def test_a_morph_leads_from_one_seed_to_the_other(page):
    open_link(page, "#mode=morph&seed=5&to=9&frames=3&steps=4&types=grass")
    ways = []
    for i in range(3):
        page.locator("#morph").fill(str(i))
        ways.append(pixels(page))
    for seed, end in zip((5, 9), ways[::2]):
        open_link(page, f"#seed={seed}&n=1&steps=4&types=grass")
        assert np.array_equal(pixels(page), end)
    assert drawn_part(ways[1]) > 0.2 and len({way.tobytes() for way in ways}) == 3


def test_a_tuned_model_draws_in_few_jumps(visit, site):
    described = json.loads((site / "model/model.json").read_text())
    described |= dict(sampler=dict(name="consistency", steps=2), samplers=["consistency"])
    page = visit("#n=1&seed=5", broken={"model/model.json": json.dumps(described)})
    text_of(page, "status", DONE)
    assert page.locator("#time").get_attribute("max") == "2" and page.locator("#steps").get_attribute("max") == "8"
    assert page.locator("#notes").is_hidden() and len(np.unique(pixels(page))) > 50
    page.context.close()


def test_the_keyboard_alone(page):
    """A type, a drawing and a creature without a pointer."""
    open_link(page, "#n=2&steps=1")
    page.locator("#another").focus()

    def tab_to(selector):
        for _ in range(60):
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not lead to {selector}")

    tab_to("[name=mode]")
    page.keyboard.press("ArrowRight")
    tab_to("#sketch")
    page.keyboard.press("Space")
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
        for _ in range(3):
            page.keyboard.press(f"Shift+{key}")
    page.keyboard.press("Space")
    assert "Brush up" in page.locator("#sketch").get_attribute("aria-label")
    tab_to("[data-type=electric]")
    page.keyboard.press("Space")
    tab_to("#count")
    page.keyboard.press("Home")
    tab_to("#steps")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    tab_to("#draw")
    page.locator("#status").evaluate("element => { element.textContent = ''; }")
    page.keyboard.press("Enter")
    text_of(page, "status", DONE)
    assert "types=electric" in page.url and "n=1" in page.url and "drawing=" in page.url
    page.locator("#seed").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("123")
    page.keyboard.press("Enter")  # without leaving the field
    page.wait_for_url("**seed=123&**")
    text_of(page, "status", DONE)
    assert page.locator("#announcement").inner_text() == page.locator("#status").inner_text()


def test_a_phone(page):
    """360 x 640: nothing beyond the sides in any mode, fingers find the buttons, and Draw is always there."""
    open_link(page, "#mode=morph&seed=5&to=9&frames=2&steps=1")
    page.set_viewport_size(dict(width=360, height=640))
    for mode in ("morph", "drawing", "noise"):
        begin_with(page, mode)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        beyond = page.evaluate("""[...document.querySelectorAll("button, input, canvas, p, legend, label")]
            .filter((e) => e.offsetParent && !e.closest(".hidden") && getComputedStyle(e).opacity !== "0")
            .map((e) => [e.id || e.textContent, e.getBoundingClientRect()])
            .filter(([, box]) => box.left < 0 || box.right > 360.5).map(([name]) => name)""")
        assert beyond == []
    small = page.evaluate("""[...document.querySelectorAll("button")].filter((e) => e.offsetParent)
        .filter((e) => e.getBoundingClientRect().height < 40).map((e) => e.textContent)""")
    assert small == []
    page.evaluate("scrollTo(0, 0)")
    box = page.locator("#draw").bounding_box()
    assert box["y"] + box["height"] <= 640
    page.set_viewport_size(dict(width=1000, height=800))


def test_dark_mode_and_reduced_motion(page):
    open_link(page, "#n=1&steps=1")  # before anything is drawn, captions are those of the settings' noise
    for scheme, bright in (("light", True), ("dark", False)):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = np.mean([int(value) for value in re.findall(r"\d+", background)[:3]])
        assert brightness > 200 if bright else brightness < 60
        assert page.evaluate("getComputedStyle(document.getElementById('draw')).transitionDuration") == "0s"
    page.evaluate("""window.shown = 0;
        new MutationObserver(() => { shown += 1; }).observe(document.getElementById("picture-caption"),
                                                            { childList: true });""")
    open_link(page, "#n=1&steps=6&seed=2")
    assert page.evaluate("shown") == 1 and drawn_part(pixels(page)) > 0.1  # the creature, and no flicker before
    page.emulate_media(color_scheme="null", reduced_motion="null")  # the defaults again; None would leave them


def test_guidance_away_from_the_earlier_network(site, browser, tmp_path):
    """It is on by default, without types as well; 1 is off."""
    with serving(export_page(ROOT / "checkpoints/critters_128.pt", tmp_path / "page")) as address:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(f"{address}#n=1&steps=5&seed=3")
        text_of(page, "status", DONE)
        assert page.locator("#guidance").input_value() == "3" and page.locator("#guidance").is_enabled()
        guided = pixels(page).astype(int)
        choose(page, guidance=1)
        draw(page)
        assert "guidance=1" in page.url and np.abs(pixels(page) - guided).mean() > 2
        page.close()


# ---------------------------------------------------------------------------------------------------------------------
# beside Python, and for the README


def test_the_model_and_the_sampler_in_node_agree_with_python(site, tmp_path):
    """From the same noise, 20 guided steps with the page's network give Python's x_0 to 1e-3."""
    import onnxruntime

    from models.pipeline import Pipeline

    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    pipeline = Pipeline.load(ROOT / "checkpoints/critters.pt")
    labels = pipeline.class_labels([("fire", "flying")])
    x_T = pipeline.noise([5])
    noises = torch.randn(20, *x_T.shape, generator=torch.Generator().manual_seed(6))
    (tmp_path / "input.json").write_text(json.dumps(dict(
        x=x_T.flatten().tolist(), noises=noises.flatten(1).tolist(), labels=labels[0].tolist(), guidance=3, steps=20)))
    done = subprocess.run(["node", Path(__file__).with_name("model.mjs"), site, tmp_path / "input.json"],
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    theirs = torch.tensor(json.loads(done.stdout)).view_as(x_T)

    session = onnxruntime.InferenceSession(site / "model/model.onnx", providers=["CPUExecutionProvider"])

    def network(x_t, t, labels):
        feeds = dict(x=x_t.numpy(), t=t.float().numpy(), labels=labels.numpy())
        return torch.from_numpy(session.run(None, feeds)[0])

    steps = iter(noises)
    ours = sample(network, pipeline.scheduler, x_T, sampler="sde-dpm++", steps=20, prediction="x0", labels=labels,
                  guidance=3.0, draw_noise=lambda: next(steps))
    assert (ours - theirs).abs().max() < 1e-3
    assert len(np.unique(ours.numpy())) > 1000  # a picture


def test_the_picture_of_the_readme(page, tmp_path):
    """A short GIF of a visit, below 300 kB."""
    target = Path(os.environ.get("PAGE_GIF", tmp_path / "page.gif"))
    page.set_viewport_size(dict(width=760, height=900))
    open_link(page, "#types=fire+flying&seed=7" + ("&n=4&steps=20" if "PAGE_GIF" in os.environ else "&n=2&steps=4"))
    page.evaluate("scrollTo(0, 0)")
    frames, top = [], dict(x=0, y=0, width=760, height=590)
    page.locator("#thumbnails label").first.click()
    for moment in (0, 3, 6, 8, 10, 12, 14, 16, 18, 20):
        page.locator("#time").fill(str(moment))
        frames.append(Image.open(io.BytesIO(page.screenshot(clip=top))).convert("RGB"))
    # One palette for all, of half of a GIF's colours: what stays as it was then needs one of the others only.
    strip = Image.new("RGB", (len(frames) * frames[0].width, frames[0].height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * frame.width, 0))
    palette = strip.quantize(128)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(target, save_all=True, append_images=others, duration=[450] * len(others) + [2500], loop=0)
    assert target.stat().st_size < 300_000
