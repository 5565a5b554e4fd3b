"""From the scores of a race to its table, its curve and its strip of samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evaluation.meanings import MEANINGS, format_figure
from utils.files import write_json, write_text
from utils.images import image_grid, save_image
from utils.plots import result_plot
from utils.tables import markdown_table

SCORES = ("efficientnet_kid", "wasserstein", "clean", "black_corner", "copies", "copies_ratio")  # columns of the table
WITH_INTERVAL = ("efficientnet_kid", "wasserstein")
SHOWN = 10  # samples of each contender in the strip


def write_results(folder: Path, settings: dict[str, Any], machine: dict[str, Any], description: str,
                  results: dict[str, dict[str, Any]], titles: Mapping[str, str]) -> None:
    """Write results.json, results.md, curve.png and samples.png.

    Args:
        results: by contender and minutes, as "4".
        titles: of the contenders, in the order of the table.
    """
    content = dict(settings=settings, machine=machine, data=description, contenders=results)
    write_json(folder / "results.json", content)
    ranked = {name: results[name] for name in titles if results.get(name)}
    if not ranked:
        return
    last = f"{settings['minutes'][-1]:g}"
    write_text(folder / "results.md", f"{table(ranked, titles, last)}\n")
    plot(ranked, titles, folder / "curve.png")
    strip(folder, ranked, titles, last)


def table(results: dict[str, dict[str, Any]], titles: Mapping[str, str], minutes: str) -> str:
    """Return the table after the last of the minutes, in Markdown; the last row has real images."""
    headings = [MEANINGS[name].heading for name in SCORES]
    head = [f"after {minutes} min", "parameters", "images seen", "sampler", *headings]
    rows, real = [], None
    for name, by_minutes in results.items():
        if minutes in by_minutes:
            row = by_minutes[minutes]
            rows.append([titles[name], f"{row['parameters'] / 1e6:.1f} M", f"{row['images']:,}", row["sampler"],
                         *(_cell(row["figures"].get(figure), figure) for figure in SCORES)])
            real = row["figures"]
    if real is not None:
        rows.append(["real images", "", "", "", *(_cell(real.get(name, {}).get("real"), name) for name in SCORES)])
    return markdown_table(head, rows, numbers=True)


def _cell(figure: dict[str, float] | None, name: str) -> str:
    value, interval = format_figure(figure, MEANINGS[name].style)
    return f"{value} ({interval})" if interval and name in WITH_INTERVAL else value


def plot(results: dict[str, dict[str, Any]], titles: Mapping[str, str], path: Path) -> None:
    """Plot KID against minutes on logarithmic axes, with its intervals; the dotted line is that of real images."""
    with result_plot(path, 8, 4.2) as figure:
        axis = figure.subplots()
        floor = None
        for number, (name, by_minutes) in enumerate(results.items()):
            points = [(float(minutes), row["figures"]["efficientnet_kid"]) for minutes, row in by_minutes.items()
                      if "efficientnet_kid" in row["figures"]]
            points.sort(key=lambda point: point[0])
            if not points:
                continue
            values = [1000 * kid["value"] for _, kid in points]
            errors = [[1000 * (kid["value"] - kid["low"]) for _, kid in points],
                      [1000 * (kid["high"] - kid["value"]) for _, kid in points]]
            axis.errorbar([minutes for minutes, _ in points], values, errors, marker="o", markersize=4, capsize=3,
                          color=f"C{number}", label=titles[name])
            floor = 1000 * points[-1][1]["real"]["high"]
        if floor is not None and floor > 0:
            axis.axhline(floor, color="black", linestyle=":", label="real images, upper end of the interval")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(sorted({float(minutes) for row in results.values() for minutes in row}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("minutes of training")
        axis.set_ylabel("KID × 1000, EfficientNet (lower is better)")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def strip(folder: Path, results: dict[str, dict[str, Any]], titles: Mapping[str, str], minutes: str) -> None:
    """Write samples.png: the first samples of each contender after the last of the minutes, none picked."""
    rows, names = [], []
    for name, by_minutes in results.items():
        if minutes in by_minutes:
            rows.append(torch.load(folder / name / f"samples_{minutes}.pt", weights_only=True)[:SHOWN])
            names.append(titles[name])
    if rows:
        pixels = torch.cat(rows)
        save_image(image_grid(pixels, SHOWN, max(1, 64 // pixels.shape[-1]), names), folder / "samples.png")
