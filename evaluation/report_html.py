"""report.html: the whole report in one file, with all images inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from evaluation.meanings import MEANINGS, format_figure
from utils.files import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .4em .6em; text-align: left; vertical-align: top }
td.n { white-space: nowrap }
td { line-height: 1.35 }
small, figcaption { color: #666; font-size: .85em }
figure { margin: 1em 0 }
img { max-width: 100%; image-rendering: pixelated }
img.plot { image-rendering: auto }
.pairs { display: flex; flex-wrap: wrap; gap: 1em }
.pairs figure { margin: 0; padding: .3em; border: 2px solid #ddd; width: 146px; overflow-wrap: anywhere }
.pairs img { width: 100% }
.pairs .copy { border-color: #c33 }
.verdict { background: #f4f6f8; padding: .6em 1.2em; border-radius: .5em }
"""
HOW_TO_READ = (
    "Below each figure is its 95 % confidence interval; figures whose intervals overlap can hardly be told apart. The "
    "column of real images has the same measure with real images in place of the samples: the best that can be "
    "expected.")
HOW_TO_READ_TYPES = (
    "Samples that count as copies, by the types that they were drawn with, and the 95 % confidence interval of their "
    "fraction. About 1 % count as copies by chance, and of many rows some lie above that by chance. Types that few "
    "training images have are copied first.")
HOW_TO_READ_PAIRS = (
    "Left: a sample. Right: the nearest training image, mirrored, rotated and shifted to fit. The nearest pairs come "
    "first, and a red frame marks a copy. The distance is the fraction of the sample's contrast that the training "
    "image does not explain: 0 means identical, 1 means nothing in common.")


class Pair(NamedTuple):
    """A sample beside its nearest training image."""

    image: Image.Image
    caption: str
    is_copy: bool


class Plot(NamedTuple):
    """A plot that was written to `path`, and what the report says of it."""

    heading: str
    text: str
    path: Path


def write_html(path: Path, report: dict[str, Any], grids: dict[str, Image.Image], pairs: Sequence[Pair],
               plots: Sequence[Plot]) -> None:
    """Write the page.

    Args:
        report: the content of report.json.
        grids: images by their captions.
    """
    last = report["runs"][-1]
    parts = ["<!doctype html><html lang=en><meta charset=utf-8>",
             f"<title>{escape(last['name'])}</title><style>{STYLE}</style>",
             *_introduction(report), *_images(grids), *_figures(report), *_copies_by_type(last), *_pairs(last, pairs),
             *_plots(plots)]
    if len(report["runs"]) > 1:
        parts += _figures_by_epoch(report["runs"])
    parts.append("</html>\n")
    write_text(path, "\n".join(parts))


def _introduction(report: dict[str, Any]) -> list[str]:
    last = report["runs"][-1]
    parts = [f"<h1>What the model has learned</h1><p>{escape(last['name'])}: {escape(report['summary'])}</p>"]
    if report["trained_on"] is not None:
        parts.append(f"<p>Model trained on: {escape(report['trained_on'])}</p>")
    lines = list(last["verdict"])
    if report["epoch_to_keep"]:
        lines.insert(0, report["epoch_to_keep"])
    parts.append(f"<div class=verdict>{_list(lines)}</div>")
    if report["notes"]:
        parts.append(f"<h2>Notes</h2>{_list(report['notes'])}")
    return parts


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _images(grids: dict[str, Image.Image]) -> list[str]:
    return [f"<figure><img src='{_data_uri(image)}'><figcaption>{escape(caption)}</figcaption></figure>"
            for caption, image in grids.items()]


def _figures(report: dict[str, Any]) -> list[str]:
    """Return the table of the last measurement's figures, with their meanings."""
    last = report["runs"][-1]
    epoch = f" of epoch {last['epoch']}" if len(report["runs"]) > 1 else ""
    parts = [f"<h2>Figures{epoch}</h2><p><small>{escape(HOW_TO_READ)}</small></p>",
             "<table><tr><th>figure<th>samples<th>real images<th>meaning</tr>"]
    for name, meaning in MEANINGS.items():
        if name in last["figures"]:
            figure = last["figures"][name]
            cells = [(meaning.heading, meaning.direction), format_figure(figure, meaning.style),
                     format_figure(figure.get("real"), meaning.style)]
            row = "".join(_cell(*cell) for cell in cells)
            parts.append(f"<tr>{row}<td><small>{escape(meaning.text)}</small></tr>")
    parts.append("</table>")
    return parts


def _figures_by_epoch(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of all measurements' figures, a column for each epoch."""
    parts = ["<table><tr><th>figure" + "".join(f"<th>epoch {run['epoch']}" for run in runs) + "</tr>"]
    for name, meaning in MEANINGS.items():
        if any(name in run["figures"] for run in runs):
            row = "".join(_cell(*format_figure(run["figures"].get(name), meaning.style)) for run in runs)
            parts.append(f"<tr><td class=n>{escape(meaning.heading)}{row}</tr>")
    parts.append("</table>")
    return parts


def _cell(text: str, small_text: str) -> str:
    return f"<td class=n>{escape(text)}<br><small>{escape(small_text)}</small>"


def _copies_by_type(last: dict[str, Any]) -> list[str]:
    rows = last.get("copies_by_type")
    if not rows:
        return []
    columns = {"plain": "as measured above", "guided": "at guidance 3"}
    columns = {name: heading for name, heading in columns.items() if any(name in row for row in rows)}
    parts = [f"<h2>Copies by type</h2><p><small>{escape(HOW_TO_READ_TYPES)}</small></p>",
             "<table><tr><th>type" + "".join(f"<th>{heading}" for heading in columns.values()) + "</tr>"]
    for row in rows:
        cells = "".join(_cell(*_counted(row.get(name))) for name in columns)
        parts.append(f"<tr><td class=n>{escape(row['type'])}{cells}</tr>")
    parts.append("</table>")
    return parts


def _counted(figure: dict[str, float] | None) -> tuple[str, str]:
    """Return the number of copies of a figure with its "total", and its interval."""
    if figure is None:
        return "", ""
    count = f"{round(figure['value'] * figure['total']):,} of {figure['total']:,}"
    return count, f"{format_figure(figure, '%')[1]} %"


def _pairs(last: dict[str, Any], pairs: Sequence[Pair]) -> list[str]:
    if not pairs:
        return []
    parts = [f"<h2>The closest pairs</h2><p>{escape(last['copies']['explanation'])}</p>",
             f"<p><small>{escape(HOW_TO_READ_PAIRS)}</small></p><div class=pairs>"]
    for pair in pairs:
        frame = " class=copy" if pair.is_copy else ""
        parts.append(f"<figure{frame}><img src='{_data_uri(pair.image)}'>"
                     f"<figcaption>{escape(pair.caption)}</figcaption></figure>")
    parts.append("</div>")
    return parts


def _plots(plots: Sequence[Plot]) -> list[str]:
    parts = []
    for plot in plots:
        with Image.open(plot.path) as image:
            parts.append(f"<h2>{escape(plot.heading)}</h2><p>{escape(plot.text)}</p>"
                         f"<img class=plot src='{_data_uri(image)}'>")
    return parts


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
