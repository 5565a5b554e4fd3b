"""outputs/index.html: whole, without outside assets, true about the run, and readable in a browser."""

from __future__ import annotations

import math
import re
import signal
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from scripts import TINY, call, metrics

import train
from training import run_page
from training.curve import MAX_POINTS, Axis, draw_curve
from training.loop import COLUMNS
from training.loss import DiffusionLoss
from training.run_dir import RunDir
from training.run_page import MAX_GRID_BYTES, MAX_GRIDS, NEWEST, RunPage, duration, encode_grid, thinned
from training.timetable import Timetable

pytestmark = pytest.mark.usefixtures("own_folder", "plain_loss_curve")
EMPTY_TAGS = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """A page's tags, their attributes and its text. Raises ValueError for tags that do not fit each other."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.open = "", []
        self.feed(html)
        self.close()
        if self.open or not html.rstrip().endswith("</html>"):
            raise ValueError(f"not whole: {self.open}")

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            raise ValueError(f"misplaced </{tag}>")

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data + " "

    def all(self, attribute: str, tag: str = "") -> list[str]:
        return [found[attribute] for name, found in self.tags if attribute in found and tag in ("", name)]

    @property
    def state(self) -> str:
        return self.all("data-state")[0]


def read(folder: str | Path = "outputs") -> Page:
    return Page(Path(folder, "index.html").read_text(encoding="utf-8"))


def make_page(epochs: int = 5, is_main: bool = True, **settings) -> RunPage:
    """Return the page of a run with this many epochs, of which a second one has a loss that is not finite."""
    config = train.Config(**{"epochs": 10, "batch_size": 4, "image_size": 16, **settings})
    losses = {epoch: math.nan if epoch == 2 else 1 / epoch for epoch in range(1, epochs + 1)}
    history = [dict(epoch=epoch, step=2 * epoch, loss=loss, lr=1e-4, skipped=int(loss != loss))
               for epoch, loss in losses.items()]
    run = RunDir(config, history, COLUMNS, new=True, is_main=is_main)
    return RunPage(config, run, Timetable(config, num_images=8), {"Images": "8"}, resume="python train.py --resume")


def draw_grids(page: RunPage, *epochs: int, size: tuple[int, int] = (70, 36)) -> None:
    """Write a grid of one colour for each epoch, which says which one it is."""
    for epoch in epochs:
        Image.new("RGB", size, (7 * epoch % 256, 0, 0)).save(page.run.outputs / f"generated_epoch_{epoch:04d}.png")


# ---------------------------------------------------------------------------------------------------------------------
# trainings


def test_the_page_of_a_finished_run(trained, monkeypatch):
    monkeypatch.chdir(trained)
    page = read()
    assert page.state == "finished" and page.all("http-equiv") == []
    for words in ("Finished", "3 of 3", "6 of 6", "24", "--num_critters 8", "--image_size 16", "generate.py",
                  "fire, water", "8 of 16 × 16 from critters"):
        assert words in re.sub(r"\s+", " ", page.text), words
    assert page.all("data-epoch") == ["1", "2", "3"]
    for link in page.all("href", "a"):
        assert link == "evaluation/report.html" or Path("outputs", unquote(link)).is_file(), link
    assert {"../checkpoints/final_model.pt", "../checkpoints/epoch_0002.pt"} <= set(page.all("href", "a"))


def test_nothing_in_the_page_comes_from_outside(trained):
    text = (trained / "outputs/index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(source.startswith("data:") for source in page.all("src") + page.all("href", "link"))
    assert not re.search(r"https?:|url\(|@import|\bimport\(|fetch\(|XMLHttp", text.replace("data:image", ""))
    assert len(text) < 4_000_000


def test_a_stopped_run_says_how_to_continue_and_then_has_its_whole_history(monkeypatch):
    draws, draw = [], DiffusionLoss.draw_randomness

    def draw_and_stop(self, *args):
        draws.append(1)
        if len(draws) == 5:
            signal.raise_signal(signal.SIGTERM)
        return draw(self, *args)

    monkeypatch.setattr(DiffusionLoss, "draw_randomness", draw_and_stop)
    assert call(train, *TINY, "--sample_every", 1, "--run_name", "a b") == 128 + signal.SIGTERM
    page = read("outputs/a b")
    assert page.state == "stopped" and "python train.py --resume --run_name 'a b'" in page.text
    assert page.all("data-epoch") == ["1", "2"] and "5 of 6" in re.sub(r"\s+", " ", page.text)
    assert call(train, "--resume", "--run_name", "a b") == 0
    page = read("outputs/a b")
    assert page.state == "finished" and page.all("data-epoch") == ["1", "2", "3"]
    curve = re.search(r'class="curve" d="M([^"]*)"', Path("outputs/a b/index.html").read_text())[1]
    assert len(curve.split("L")) == len(metrics("a b/metrics.csv")) == 3


def test_only_the_main_process_writes():
    page = make_page(is_main=False)
    page.update(10)
    page.update(10, "finished")
    assert not Path("outputs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# parts


def test_a_running_page_reloads_itself_and_says_how_long_it_will_take(monkeypatch):
    page, now = make_page(), [1000.0]
    monkeypatch.setattr(run_page.time, "monotonic", lambda: now[0])
    page.update(0)
    assert read().state == "running" and "Time left – " in re.sub(r"\s+", " ", read().text)
    now[0] += 3000
    page.update(10)
    assert read().all("http-equiv") == ["refresh"] and "50 min" in read().text  # as long as it took so far
    assert read().all("data-left") == ["3000"] and "Skipped steps 1" in re.sub(r"\s+", " ", read().text)
    page.update(12, "stopped")
    assert read().all("http-equiv") == []


def test_the_page_takes_a_thousandth_of_the_time(monkeypatch):
    """Of a training that asks for it after every step; writing takes 20 ms here."""
    writes, now = update_for(10_000, monkeypatch, seconds=0.02)
    assert 400 < len(writes) and 0.02 * (len(writes) - 2) <= 0.001 * now


def test_a_page_that_is_slow_to_write_does_not_seem_dead(monkeypatch):
    """On a slow disk it takes more than a thousandth, or the script in it would miss the next one."""
    writes, _ = update_for(3000, monkeypatch, seconds=0.5)
    assert 40 < len(writes) and max(np.diff(writes)) < 62


def update_for(length: float, monkeypatch, seconds: float) -> tuple[list[float], float]:
    """Train for that long with pages that take `seconds` each; return when they were written, and the end."""
    page, now, writes = make_page(), [0.0], []

    def render(*_):
        now[0] += seconds
        writes.append(now[0])
        return "page"

    monkeypatch.setattr(run_page.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(page, "render", render)
    while now[0] < length:
        now[0] += 0.1
        page.update(1)
    return writes, now[0]


def test_no_error_of_the_page_stops_a_training(monkeypatch, capsys):
    page = make_page()
    monkeypatch.setattr(page, "curves", lambda: 1 / 0)
    page.update(4)
    page.update(10, "finished")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no outputs") and "division by zero" in line and "training goes on" in line


def test_text_of_users_is_escaped():
    evil = "<b>&\"'</b><script>alert(1)</script>"
    page = make_page(data=evil)
    page.about, page.resume = {evil: evil}, f"resume {evil}"
    page.config.run_name = evil
    page.run.write = lambda *_, **__: None  # such a folder cannot be
    page.update(4)
    parsed = Page(page.render(4, "finished"))
    assert parsed.text.count("alert(1)") >= 5 and "script" in parsed.text
    assert [tag for tag, _ in parsed.tags].count("script") == 1 and [tag for tag, _ in parsed.tags].count("b") == 1


@pytest.mark.parametrize("state", ["running", "stopped", "finished"])
@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_every_state_is_a_whole_page(state, epochs):
    page = make_page(epochs)
    draw_grids(page, *range(1, epochs + 1))
    page.update(2 * epochs, state)
    assert read().state == state and len(read().all("data-epoch")) == epochs


def test_grids_that_cannot_be_shown_are_left_out():
    """A damaged one, and one of a later epoch, from before a kill; it comes back when the run gets there."""
    page = make_page()
    draw_grids(page, 1, 4, 5, 6)
    Path("outputs/generated_epoch_0004.png").write_bytes(b"damaged")
    Path("outputs/generated_epoch_last.png").write_bytes(b"not ours")
    page.update(10)
    assert read().all("data-epoch") == ["1", "5"]


def test_a_grid_is_small_whatever_it_shows():
    noise = np.random.default_rng(0).integers(256, size=(700, 1100, 3), dtype=np.uint8)
    Image.fromarray(noise).save("noise.png")
    Image.fromarray(noise[:140, :140]).save("small.png")
    for name in ("noise.png", "small.png"):
        source = encode_grid(Path(name))
        assert source.startswith("data:image/jpeg;base64,") and len(source) < MAX_GRID_BYTES * 4 / 3 + 100
    Path("broken.png").write_bytes(Path("small.png").read_bytes()[:1000])
    assert encode_grid(Path("broken.png")) == "" == encode_grid(Path("missing.png"))


def test_few_grids_of_many_are_kept_and_none_comes_back():
    kept: set[int] = set()
    for number in range(1, 300):
        epochs = list(range(10, 10 * number + 1, 10))
        chosen = thinned(epochs)
        assert len(chosen) == min(number, MAX_GRIDS) and chosen == sorted(set(chosen)) and set(chosen) <= set(epochs)
        assert chosen[0] == 10 and chosen[-NEWEST:] == epochs[-NEWEST:]
        assert set(chosen) - kept == {10 * number}  # nothing has to be encoded again
        kept = set(chosen)
    ratios = np.diff(np.log(sorted(kept)[:-NEWEST]))
    assert ratios.max() < 0.75  # the first two, 10 and 20, are that far apart


@pytest.mark.parametrize("seconds, words", [(12, "12 s"), (59, "1 min"), (3599, "1 h 00 min"), (12000, "3 h 20 min"),
                                            (86400 * 3.5, "3.5 days")])
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("low, high, log", [(1, 2000, True), (0.0123, 0.0171, True), (1, 1, True), (20.1, 31.7, False),
                                            (1e-9, 1e4, True), (3, 3, False), (1, 14, True)])
def test_ticks_are_few_and_within_the_axis(low, high, log):
    axis = Axis(low, high, log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7 and all(0 <= axis.fraction(tick) <= 1 + 1e-9 for tick in ticks)
    assert all(float(f"{tick:.3g}") == pytest.approx(tick) for tick in ticks)


def test_a_curve_has_gaps_where_there_is_no_number_and_few_points():
    drawing, place = draw_curve([1, 2, 3, 4, 5, 6], [3, 2, math.nan, 1, math.inf, 0.5], "loss")
    assert drawing.count('class="curve"') == 1 and drawing.count('class="point"') == 2
    assert place(1, 3)[0] < place(4, 1)[0] < place(6, 0.5)[0] and place(1, 3)[1] < place(6, 0.5)[1]
    assert draw_curve([], [], "loss")[0].endswith("</svg>")
    many, _ = draw_curve(range(1, 30_001), [1 / x for x in range(1, 30_001)], "loss")
    assert many.count("L") < MAX_POINTS and len(many) < 20_000


# ---------------------------------------------------------------------------------------------------------------------
# a browser


@pytest.fixture
def open_page(browser):
    """Return a function that opens outputs/index.html from its file; nothing may be written to the console."""
    messages: list[str] = []
    contexts = []

    def open_page(width: int = 360, **options):
        contexts.append(browser.new_context(viewport=dict(width=width, height=740), **options))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or messages.append(request.url))
        tab.goto(Path("outputs/index.html").resolve().as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []


def test_a_browser_shows_the_page_during_a_run_and_after_it(open_page):
    page = make_page(data="a/very_long_name_of_a_folder_without_any_space_in_it_so_that_nothing_can_be_broken_anywhere")
    draw_grids(page, 1, 2, 3, 4)
    page.update(8)
    tab = open_page(reduced_motion="reduce", color_scheme="dark")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360  # nothing sticks out
    assert tab.locator("#label").inner_text() == "epoch 4" and tab.locator("#state").inner_text().startswith("Running")
    assert tab.evaluate("getComputedStyle(document.querySelector('#state b'), '::before').animationName") == "none"

    # By keyboard to the second grid; a reload stays there, and the curve marks it.
    tab.locator("#slider").focus()
    for _ in range(2):
        tab.keyboard.press("ArrowLeft")
    tab.wait_for_function("document.getElementById('label').textContent === 'epoch 2'")
    assert tab.locator("#here").is_hidden()  # its loss is no number
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("location.hash === '#3'")
    assert tab.locator("#here").is_visible()
    draw_grids(page, 5)
    page.update(10, "finished")
    tab.reload()
    assert tab.locator("#label").inner_text() == "epoch 3" and "Finished" in tab.locator("#state").inner_text()
    assert tab.evaluate("Math.round(strip.scrollLeft / strip.clientWidth)") == 2

    # At the newest grid it follows the run.
    tab.keyboard.press("Tab")
    tab.locator("#slider").focus()
    tab.keyboard.press("End")
    tab.wait_for_function("location.hash === '' && document.getElementById('label').textContent === 'epoch 5'")
    draw_grids(page, 6)
    page.update(12, "finished")
    tab.reload()
    assert tab.locator("#label").inner_text() == "epoch 6"
    tab.locator("#play").click()
    tab.wait_for_function("document.getElementById('label').textContent === 'epoch 2'")


def test_a_killed_run_has_no_news(open_page):
    page = make_page()
    page.update(10)
    path = Path("outputs/index.html")
    written = int(read().all("data-written")[0])
    path.write_text(path.read_text().replace(f'"{written}"', f'"{written - 24 * 3600 * 1000}"'))
    tab = open_page(1280)
    assert tab.locator("#state").inner_text().startswith("No news since")
    assert tab.locator("#silent").is_visible() and "python train.py --resume" in tab.locator("#silent").inner_text()
    page.update(10, "finished")  # without a slider, too
    assert "Finished" in open_page(1280, java_script_enabled=False).locator("#state").inner_text()
