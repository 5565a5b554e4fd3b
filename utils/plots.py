"""Figures of matplotlib: plain plots of results, and those that explain, in a style of their own.

That style is white and calm, with few colours, and text that is readable at 800 pixels.

    with result_plot("outputs/loss.png", 7, 4) as figure:
        figure.subplots().loglog(epochs, losses)
    with drawing("outputs/weights.png", 8, 4) as figure:
        axis = figure.subplots()
        axis.plot(t, weight, color=COLOURS["blue"])
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULT_DPI = 110
DPI = 160  # twice 80: sharp where a screen has two pixels for one
COLOURS = {"ink": "#1f3a5f", "blue": "#3f78b5", "orange": "#d9772b", "green": "#4b9560", "red": "#bf4b54",
           "violet": "#7d64a8", "grey": "#8d949b", "pale": "#d5dbe1"}
STYLE = {
    "font.size": 11, "axes.titlesize": 11.5, "axes.labelsize": 11, "legend.fontsize": 10, "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5, "text.color": "#2b3138", "axes.labelcolor": "#2b3138", "axes.edgecolor": "#9aa3ab",
    "xtick.color": "#5b646d", "ytick.color": "#5b646d", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": False, "grid.color": "#e3e7eb", "legend.frameon": False, "lines.linewidth": 1.8,
    "figure.facecolor": "white", "savefig.facecolor": "white", "mathtext.fontset": "cm",
}


@contextlib.contextmanager
def result_plot(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of width x height inches; if the block ends well, it is written to `path`."""
    figure = _new_figure(width, height)
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=RESULT_DPI)


@contextlib.contextmanager
def drawing(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of width x height inches; if the block ends well, it is written to `path` as a PNG."""
    with styled(width, height) as figure:
        yield figure
        image = to_image(figure, DPI)
    with replacing(path) as temporary:  # 256 colours are enough for these figures, and a third of the bytes
        image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        image.save(temporary, optimize=True)


@contextlib.contextmanager
def styled(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of width x height inches, in which everything is drawn in the common style."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield _new_figure(width, height)


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend that may need a screen

    return Figure(figsize=(width, height), layout="constrained")


def to_image(figure: Figure, dpi: int) -> Image.Image:
    """Return a figure as an RGB image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return Image.open(buffer).convert("RGB")


def bare(axis: Axes) -> None:
    """Take ticks and frame off an axis, which then is a picture."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
