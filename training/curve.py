"""A curve as SVG, for a page without any other asset.

    svg, place = draw_curve(epochs, losses, "loss")
    x, y = place(30, 0.021)                           # where a point is, in the units of the drawing
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 42  # margins
MAX_POINTS = 1000

Place = Callable[[float, float], tuple[float, float]]


def draw_curve(xs: Sequence[float], ys: Sequence[float], name: str, log: bool = True, marker: str = ""
               ) -> tuple[str, Place]:
    """Draw y against the epoch x, with a logarithmic axis for x and, with `log`, for y.

    A y that is not finite interrupts the curve.

    Args:
        xs: positive and rising.
        ys: of the same number; with `log`, one that is not positive interrupts the curve as well.
        name: of y, for those who cannot see it.
        marker: the id of a hidden group at x = 0, a line and a circle, for scripts to move; none without.

    Returns:
        The drawing, whose colours are up to the page, and a function from (x, y) to a place in it.
    """
    pairs = [(x, y if math.isfinite(y) and (y > 0 or not log) else None) for x, y in zip(xs, ys)]
    shown = [y for _, y in pairs if y is not None] or [1.0]
    x_axis, y_axis = Axis(min(xs, default=1), max(xs, default=1)), Axis(min(shown), max(shown), log)

    def place(x: float, y: float) -> tuple[float, float]:
        return (round(LEFT + x_axis.fraction(x) * (WIDTH - LEFT - RIGHT), 1),
                round(HEIGHT - BOTTOM - y_axis.fraction(y) * (HEIGHT - TOP - BOTTOM), 1))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name} against the epoch">']
    for tick in y_axis.ticks():
        y = place(x_axis.low, tick)[1]
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
                     f'<text x="{LEFT - 8}" y="{y + 5}" text-anchor="end">{tick:.4g}</text>')
    for tick in (tick for tick in x_axis.ticks() if tick == round(tick)):  # epochs are whole
        x = place(tick, y_axis.low)[0]
        parts.append(f'<line class="rule" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                     f'<text x="{x}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">{tick:,.6g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">epoch</text>')

    # The curve, in pieces between the gaps; a piece of one point is a dot.
    for piece in _pieces(_thinned(pairs)):
        points = [place(x, y) for x, y in piece]
        if len(points) == 1:
            parts.append(f'<circle class="point" cx="{points[0][0]}" cy="{points[0][1]}" r="3"/>')
        else:
            parts.append('<path class="curve" d="M' + "L".join(f"{x} {y}" for x, y in points) + '"/>')
    if marker:
        parts.append(f'<g id="{marker}" class="here" hidden><line y1="{TOP}" y2="{HEIGHT - BOTTOM}"/><circle r="5"/>'
                     "</g>")
    return "".join([*parts, "</svg>"]), place


class Axis:
    """A range of numbers, linear or logarithmic, that is never empty."""

    def __init__(self, low: float, high: float, log: bool = True):
        if high <= low:
            low, high = (low / 1.5, high * 1.5) if log else (low - 1, high + 1)
        self.low, self.high, self.log = low, high, log

    def fraction(self, value: float) -> float:
        """Return where the value is, from 0 at the low end to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return a few round numbers of the range."""
        if self.log and self.high / self.low > 8:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                ticks = [digit * 10.0**decade for decade in decades for digit in digits]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= 7:
                    break
            return ticks[:: math.ceil(len(ticks) / 7)]
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        unit = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first, last = math.ceil(self.low / unit), math.floor(self.high / unit)
        return [round(number * unit, 12) for number in range(first, last + 1)]


def _thinned(pairs: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Return at most about MAX_POINTS of the pairs, as evenly spaced as they can be on a logarithmic axis."""
    if len(pairs) <= MAX_POINTS:
        return pairs
    ratio = len(pairs) ** (1 / (MAX_POINTS - 1))
    chosen = sorted({round(ratio**i) - 1 for i in range(MAX_POINTS)})
    return [pairs[i] for i in chosen]


def _pieces(pairs: list[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Divide the pairs where y is None."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in pairs:
        if y is not None:
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
