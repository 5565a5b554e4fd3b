"""outputs/index.html: a run at a glance, in one file that a browser opens without a server.

    page = RunPage(config, run, timetable, about, resume="python train.py --resume")
    page.update(number)                  # as often as one likes: see MAX_SHARE and MAX_WAIT
    page.update(number, "finished")

The layout is in run_page.html. Sample grids are in the page itself, as JPEGs of bounded number and size.
"""

from __future__ import annotations

import base64
import functools
import io
import math
import os
import shlex
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from training.config import TrainingConfig
from training.curve import draw_curve
from training.grids import grids, read_grid
from training.run_dir import FIRST_STAGE, RunDir, milestone_epoch, milestones
from training.timetable import Timetable

TEMPLATE = Path(__file__).with_name("run_page.html")
RELOAD_SECONDS = 15
MAX_SHARE = 1e-3  # of the time of a run that may go into its page
MAX_WAIT = 60  # seconds without a new page, though a slow disk makes it take more: the page may not seem dead
MAX_GRIDS, NEWEST = 32, 8  # grids in the page; those that are never left out
MAX_GRID_BYTES = 70_000  # of a grid in the page: 3 MB for all of them, in base64
QUALITIES = ((512, 90), (512, 75), (384, 75), (256, 60), (128, 40))  # longest side and JPEG quality, until it fits
NOT_DRAWN = ("epoch", "step", "loss", "lr", "skipped")  # columns of metrics.csv that have no curve of their own
FORWARD = (f'<!doctype html><meta charset="utf-8"><title>first stage</title><meta http-equiv="refresh" content="0; '
           f'url={FIRST_STAGE}/index.html"><a href="{FIRST_STAGE}/index.html">The first stage</a>')  # for the whole run
HEADINGS = dict(running="Running", stopped="Stopped", finished="Finished")


class RunPage:
    """Writes the page of a run; a process that is not the main one writes nothing.

    Args:
        config: the settings.
        run: its folders and history.
        timetable: its plan.
        about: what else to say of it, a text for each heading.
        resume: the command that continues a stopped run.
        is_diffusion: it is no autoencoder.
        next_page: of the run that this one is the first stage of, seen from this page; empty for none.
        next_seconds: how long that will take.
    """

    def __init__(self, config: TrainingConfig, run: RunDir, timetable: Timetable, about: dict[str, str], resume: str,
                 is_diffusion: bool = True, next_page: str = "", next_seconds: float = 0.0):
        self.config, self.run, self.timetable, self.about, self.resume = config, run, timetable, about, resume
        self.is_diffusion, self.next_page, self.next_seconds = is_diffusion, next_page, next_seconds
        self.first: int | None = None  # steps that were done at the first update
        self.began = self.next_update = 0.0
        self.template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
        self.encode = functools.lru_cache(2 * MAX_GRIDS)(encode_grid)

    def update(self, number: int, state: str = "running") -> None:
        """Write the page after `number` steps, if it is time; always if the run is not "running" any more."""
        began = time.monotonic()
        if not self.run.is_main or (state == "running" and began < self.next_update):
            return
        is_first = self.first is None
        if is_first:
            self.first, self.began = number, began
            if self.next_page:
                self.run.write("../index.html", lambda path: path.write_text(FORWARD, "utf-8"))
        self.run.write("index.html", lambda path: path.write_text(self.render(number, state), "utf-8", "replace"),
                       errors=Exception)
        # The first time does not count: it may have had the grids of a resumed run to encode.
        seconds = time.monotonic() - began
        self.next_update = time.monotonic() + (10 if is_first else min(MAX_WAIT, seconds / MAX_SHARE))

    # -----------------------------------------------------------------------------------------------------------------
    # parts of the page

    def render(self, number: int, state: str) -> str:
        """Return the page."""
        timetable, name = self.timetable, self.config.run_name or "outputs"
        percent = 100 * number // timetable.last_step
        left = self.seconds_left(number) if state == "running" else 0.0
        curves, place_of = self.curves()
        refresh = f'<noscript><meta http-equiv="refresh" content="{RELOAD_SECONDS}"></noscript>'
        return self.template.substitute(
            title=escape(f"{percent} % · {name}" if state == "running" else f"{name} · {state}"),
            refresh=refresh if state == "running" else "", seconds=RELOAD_SECONDS, state=state,
            written=round(1000 * time.time()), written_text=time.strftime("%Y-%m-%d %H:%M"),
            # A save, at the latest, brings news; some time is left for a grid.
            patience=round(1.5 * self.run.save_seconds + 120), left=round(left or 0),
            kind="A diffusion model" if self.is_diffusion else "An autoencoder",
            name=escape(name), heading=HEADINGS[state], note=self.note(state), percent=percent,
            figures=self.figures(number, state, left), strip=self.strip(number, place_of),
            rendering="pixelated" if self.config.image_size <= 64 else "auto", curves=curves,
            checkpoints=self.checkpoints(), commands=self.commands(), settings=self.settings())

    def seconds_left(self, number: int) -> float | None:
        """Estimate the rest of the run at the speed of this process so far; None before its first steps."""
        if number - self.first < 5:
            return None
        per_step = (time.monotonic() - self.began) / (number - self.first)
        return per_step * (self.timetable.last_step - number) + self.next_seconds

    def note(self, state: str) -> str:
        """Return how to go on, where there is something to do; the script shows the first line for a dead run."""
        resume = f"Continue with <code>{escape(self.resume)}</code>."
        notes = ['<p id="silent" hidden>The process may have been killed, or has a long sample grid to draw. '
                 f"{resume}</p>"]
        if state == "stopped":
            notes.append(f"<p>Everything is saved. {resume}</p>")
        if self.next_page:
            notes.append(f'<p>The first of two stages; <a href="{_link(self.next_page)}">the second</a> has a page of '
                         f"its own as soon as it runs.</p>")
        elif (self.run.outputs / FIRST_STAGE / "index.html").exists():
            notes.append(f'<p>The second of two stages; <a href="{FIRST_STAGE}/index.html">the first</a> trained the '
                         f"autoencoder.</p>")
        return "".join(notes)

    def figures(self, number: int, state: str, left: float | None) -> str:
        """Return the numbers at the top: how far, how long, at what cost, with what loss."""
        cost, timetable = self.run.cost(number), self.timetable
        elapsed, done = time.monotonic() - self.began, number - self.first
        loss, lr = (float(self.run.history[-1][name]) if self.run.history else math.nan for name in ("loss", "lr"))
        skipped = sum(int(row.get("skipped", 0)) for row in self.run.history)
        rows = [("Epoch", f"{timetable.epoch(number):,}", f"of {timetable.epoch(timetable.last_step):,}"),
                ("Step", f"{number:,}", f"of {timetable.last_step:,}"),
                ("Time so far", duration(cost["seconds"]), "")]
        if state == "running":
            rows.append(("Time left", "–" if left is None else duration(left), '<span id="until"></span>'))
        rows += [("Images", f"{cost['images']:,}",
                  f"{done * self.config.batch_size / elapsed:,.3g} per second" if done else ""),
                 ("Peak memory", f"{cost['peak_memory'] / 1e9:.2f} GB" if cost["peak_memory"] else "–", ""),
                 ("Loss", f"{loss:.4g}" if math.isfinite(loss) else "–",
                  f"learning rate {lr:.3g}" if math.isfinite(lr) else "")]
        if skipped:
            rows.append(("Skipped steps", f"{skipped:,}", "not finite"))
        return "".join(f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in rows)

    def curves(self) -> tuple[str, Callable[[int], tuple]]:
        """Return the curves of loss and further columns, and a function from an epoch to its place in the first."""
        history = self.run.history
        if not history:
            waiting = _section("Loss", '<p class="soft">The curve begins with the first whole epoch.</p>')
            return waiting, lambda epoch: ("", "")
        losses = {row["epoch"]: float(row["loss"]) for row in history}
        loss_curve, place = draw_curve(list(losses), list(losses.values()), "loss", marker="here")
        sections = [_section("Loss", loss_curve)]
        for column in (name for name in self.run.columns if name not in NOT_DRAWN):
            rows = [(row["epoch"], float(row[column])) for row in history if row.get(column) not in (None, "")]
            if rows:
                sections.append(_section(column.upper(), draw_curve(*zip(*rows), escape(column), log=False)[0]))

        def place_of(epoch: int) -> tuple:
            loss = losses.get(epoch, math.nan)
            return place(epoch, loss) if math.isfinite(loss) and loss > 0 else ("", "")

        return "".join(sections), place_of

    def strip(self, number: int, place_of: Callable[[int], tuple]) -> str:
        """Return the sample grids with their slider: all of them, or those that `thinned` chooses."""
        newest = math.ceil(number / self.timetable.steps_per_epoch)
        files = grids(self.run.outputs)
        epochs = [epoch for epoch in files if epoch <= newest]
        frames = []
        for epoch in thinned(epochs):
            source = self.encode(files[epoch], files[epoch].stat().st_mtime_ns)
            if source:
                x, y = place_of(epoch)
                frames.append(f'<figure data-epoch="{epoch}" data-x="{x}" data-y="{y}">'
                              f'<a href="{_link(files[epoch].name)}" tabindex="-1">'
                              f'<img src="{source}" alt="sample grid of epoch {epoch}"></a></figure>')
        if not frames:
            return '<p class="soft">The first grid has not been drawn yet.</p>'
        count = f"{len(frames)} of {len(epochs)} grids, more of them recent ones" if len(epochs) > len(frames) else ""
        return (f'<div class="strip" id="strip" tabindex="0" aria-labelledby="grids">{"".join(frames)}</div>'
                '<div class="scrub" hidden><button id="play" type="button" aria-label="play">&#9654;</button>'
                '<input id="slider" type="range" min="0" max="0" value="0" aria-label="epoch of the sample grid">'
                f'<span id="label"></span></div><p><small>{count}</small></p>')

    def checkpoints(self) -> str:
        """Return links to the checkpoints there are; older milestones behind a click."""
        folder = self.run.checkpoints
        named = {"final_model.pt": "at the end", "latest.pt": "to resume from"}
        files = [(folder / name, text) for name, text in named.items()]
        files += [(path, f"epoch {milestone_epoch(path):,}") for path in reversed(milestones(folder))]
        rows = []
        for path, text in files:
            if path.exists():
                link = _link(os.path.relpath(path, self.run.outputs))
                rows.append(f'<div><dt><a href="{link}">{escape(path.name)}</a><small>{text}</small></dt>'
                            f"<dd>{path.stat().st_size / 1e6:,.1f} MB</dd></div>")
        if not rows:
            return '<p class="soft">None has been saved yet.</p>'
        first, rest = (f'<dl class="rows sizes">{"".join(part)}</dl>' for part in (rows[:6], rows[6:]))
        return first + (f"<details><summary>{len(rows) - 6} more</summary>{rest}</details>" if rows[6:] else "")

    def commands(self) -> str:
        """Return what to do with the model, and a link to the report that evaluate.py writes."""
        models = [self.run.checkpoints / name for name in ("latest.pt", "final_model.pt")]
        models = [path for path in models if path.exists()]
        if not models:
            return '<p class="soft">A checkpoint is needed first.</p>'
        model = max(models, key=lambda path: path.stat().st_mtime)  # a run that was prolonged has an old final_model.pt
        if self.next_page:
            return f'<p><a href="{_link(self.next_page)}">The second stage</a> learns its latents.</p>'
        if not self.is_diffusion:
            return _command("Learn its latents", "python", "train.py", "--autoencoder", model)
        report = self.run.outputs / "evaluation"
        return (_command("Draw images", "python", "generate.py", "--checkpoint", model)
                + _command("Measure it", "python", "evaluate.py", "--checkpoint", model, "--output", report)
                + '<p>This writes <a href="evaluation/report.html">the report</a>.</p>')

    def settings(self) -> str:
        """Return what the run is, its settings that are not the default, and all of them behind a click."""
        values = {field.name: (getattr(self.config, field.name), field.default) for field in fields(self.config)}
        changed = {f"--{name}": _shown(value) for name, (value, default) in values.items() if value != default}
        every = {f"--{name}": _shown(value) for name, (value, _) in values.items()}
        return f"{_rows(self.about)}{_rows(changed)}<details><summary>All settings</summary>{_rows(every)}</details>"


# ---------------------------------------------------------------------------------------------------------------------
# sample grids


def thinned(epochs: Sequence[int]) -> list[int]:
    """Choose at most MAX_GRIDS of rising epochs: the first, the newest ones, and of the rest ever fewer.

    One after the other is added, and where they are too many, the one goes whose neighbours are nearest to each other
    as a ratio: so what was left out stays out as the run goes on.
    """
    kept: list[int] = []
    for epoch in epochs:
        kept.append(epoch)
        if len(kept) > MAX_GRIDS:
            gaps = {i: (kept[i + 1] + 1) / (kept[i - 1] + 1) for i in range(1, len(kept) - NEWEST)}
            kept.pop(min(gaps, key=gaps.__getitem__))
    return kept


def encode_grid(path: Path, _: int = 0) -> str:
    """Return a sample grid as a data URI of a JPEG of at most MAX_GRID_BYTES; empty for a file that is no image.

    The second argument is not used: it tells a cache of another version of the file.
    """
    image = read_grid(path)
    if image is None:
        return ""
    for side, quality in QUALITIES:
        file = io.BytesIO()
        smaller = image.copy()
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        smaller.save(file, format="JPEG", quality=quality, subsampling=0)  # full colour: a pixel can be a detail
        if file.tell() <= MAX_GRID_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# text


def duration(seconds: float) -> str:
    """Return a time in words, as "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{seconds / 86400:.1f} days"


def _link(path: str) -> str:
    return escape(quote(path.replace(os.sep, "/"), errors="replace"))


def _command(text: str, *words: str | Path) -> str:
    command = shlex.join(word.as_posix() if isinstance(word, Path) else word for word in words)
    return f"<p>{text}<br><code>{escape(command)}</code></p>"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def _rows(rows: dict[str, str]) -> str:
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items())
    return f'<dl class="rows{" many" if len(rows) > 8 else ""}">{cells}</dl>'
