"""Plots of the report: figures over the training, and bits by timestep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.meanings import MEANINGS
from evaluation.measure import Measurement
from utils.plots import result_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OVER_TIME = ("bits_train", "bits_held_out", "copies", "precision", "recall", "coverage", "wasserstein",
             "wasserstein_fine", "efficientnet_kid", "membership_auc", "saturation")
COLUMNS = 3
NOISE_TICKS = (0.2, 0.5, 1, 2, 5)


def plot_over_time(measurements: Sequence[Measurement], path: Path) -> None:
    """Plot the figures of OVER_TIME against the epoch, with intervals, and those of real images as a dashed line."""
    names = [name for name in OVER_TIME if any(name in m.figures for m in measurements)]
    rows = math.ceil(len(names) / COLUMNS)
    with result_plot(path, 11, 2.5 * rows) as figure:
        axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
        for axis, name in zip(axes, names):
            _plot_figure([m for m in measurements if name in m.figures], name, axis)
        for axis in axes[len(names):]:
            axis.axis("off")


def _plot_figure(measurements: Sequence[Measurement], name: str, axis: Axes) -> None:
    """Plot one figure against the epoch."""
    meaning, epochs, figures = MEANINGS[name], [m.epoch for m in measurements], [m.figures[name] for m in measurements]

    def scaled(values: Sequence[dict], key: str) -> list[float]:
        return [meaning.scale * value[key] for value in values]

    axis.plot(epochs, scaled(figures, "value"), marker="o", color="C0")
    if all("low" in figure for figure in figures):
        axis.fill_between(epochs, scaled(figures, "low"), scaled(figures, "high"), alpha=0.2)
    if all("real" in figure for figure in figures):
        axis.plot(epochs, scaled([figure["real"] for figure in figures], "value"), "--", color="grey")
    unit = ", %" if meaning.style == "%" else ""
    axis.set_title(f"{meaning.heading}{unit} ({meaning.direction})", fontsize=9)
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)


def plot_bits(measurement: Measurement, path: Path) -> None:
    """Plot the terms of the variational bound against the timestep, for training and for unseen images."""
    with result_plot(path, 7, 3.4) as figure:
        axis = figure.subplots()
        labels = {"train": "training images", "held_out": "unseen images"}
        for name, bits in measurement.bits.items():
            middles = [(first + last) / 2 for first, last in bits["ranges"]]
            per_timestep = [value / (last - first + 1) for value, (first, last) in zip(bits["steps"], bits["ranges"])]
            axis.loglog(middles, per_timestep, marker=".", label=labels[name])
        axis.set_xlabel("timestep t (0 is the least noise)")
        axis.set_ylabel("bits per value and timestep")
        axis.grid(alpha=0.3, which="both")
        axis.legend()


def plot_gap(measurements: Sequence[Measurement], path: Path) -> None:
    """Plot the error of unseen images as a multiple of that of training images, against the noise, by epoch."""
    with result_plot(path, 7, 3.4) as figure:
        axis = figure.subplots()
        largest = 1.0
        for number, measurement in enumerate(measurements):
            gaps = measurement.gap_by_noise
            noise = [gap["noise"] for gap in gaps]
            value, low, high = ([1 + gap[key] for gap in gaps] for key in ("value", "low", "high"))
            colour = f"C{number}" if len(measurements) < 10 else str(0.8 * (1 - number / len(measurements)))
            axis.plot(noise, value, marker=".", color=colour, label=f"epoch {measurement.epoch}")
            axis.fill_between(noise, low, high, color=colour, alpha=0.15)
            largest = max(largest, *value)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        if largest > 3:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(NOISE_TICKS, labels=map(str, NOISE_TICKS))
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel("standard deviation of the noise, as a multiple of the image's coefficient")
        axis.set_ylabel("error of unseen images,\nas a multiple of training images'")
        axis.grid(alpha=0.3)
        if len(measurements) > 1:
            axis.legend(fontsize=8)
