"""Sketch: the parts of one critter in the order of their depth, and the places where features can grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from critters.critter_types import Colour, Palette
from critters.shapes import ellipse

Point = tuple[float, float]
Marking = tuple[np.ndarray, Colour]  # a shape painted on a part, cut off at the part's edge


class Part(NamedTuple):
    """Shapes of one colour that share an outline. Depths: 0 far back, 2 body, 4 behind the head, 5 head, 7 eyes."""

    depth: int
    shapes: list[np.ndarray]
    fill: Colour
    markings: list[Marking]
    outline: bool


@dataclass
class Sketch:
    """A critter before it is painted, in a frame about 100 wide around the origin, y downwards.

    A body plan (body_plans.py) adds the parts of the body and sets the head and the anchors of tail, wings and spine.
    """

    rng: np.random.Generator
    first: Palette  # of the body
    second: Palette  # of belly and limbs; the same object where the critter has one type
    facing: int = 1  # -1: mirrored left to right
    bold: bool = False  # a small image: larger eyes; no spots, stripes or blush
    turn: float = 0.0  # how far the face is turned aside, in radii of the head
    beak: bool = False
    parts: list[Part] = field(default_factory=list)
    head: tuple[float, float, float, float] = (0, 0, 1, 1)  # centre and radii
    tail: Point = (0, 0)  # where the tail starts
    wings: list[tuple[float, float, int]] = field(default_factory=list)  # x, y and depth; x < 0 is the left wing
    spine: list[tuple[float, float, float]] = field(default_factory=list)  # x, y and angle of spikes on the back

    def add(self, depth: int, shape: np.ndarray | list[np.ndarray], fill: Colour, markings: Sequence[Marking] = (),
            shade: Colour | None = None, outline: bool = True) -> None:
        """Add one shape, or several that share an outline; with `shade`, their lower edge takes that colour."""
        shapes = shape if isinstance(shape, list) else [shape]
        markings = list(markings)
        if shade is not None:  # light from above: the shapes again, a little higher, in the lit colour
            markings = [(s - (0, 4.5), fill) for s in shapes] + markings
            fill = shade
        self.parts.append(Part(depth, shapes, fill, markings, outline))

    def between(self, low: float, high: float) -> float:
        """Draw a number from the uniform distribution."""
        return float(self.rng.uniform(low, high))

    @property
    def belly(self) -> Colour:
        return self.first.light if self.first is self.second else self.second.main

    def on_head(self, angle: float) -> Point:
        """Return the point of the head's edge at an angle from the top, clockwise in radians."""
        x, y, rx, ry = self.head
        return x + 0.92 * rx * math.sin(angle), y - 0.92 * ry * math.cos(angle)

    def pattern(self, x: float, y: float, rx: float, ry: float) -> list[Marking]:
        """Draw markings for a round part with this centre and radii: stripes, spots, a pale muzzle or none."""
        kind = self.rng.integers(4)
        colour = self.first.dark
        if self.bold and kind < 2:
            return []
        if kind == 0:
            return [(ellipse(x + k * rx * .5, y - ry, rx * .12, ry * .5, .2 * k), colour) for k in (-1, 0, 1)]
        if kind == 1:
            spots = ((-.5, -.62, .18), (.5, -.66, .15), (.76, -.1, .15), (.04, -.84, .13))
            return [(ellipse(x + a * rx, y + b * ry, c * rx, c * rx), colour) for a, b, c in spots]
        if kind == 2:
            return [(ellipse(x + self.turn * rx, y + ry * .72, rx * .66, ry * .5), self.belly)]
        return []
