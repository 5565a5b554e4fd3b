"""Shapes: geometry of smooth outlines, and the flames, leaves, ears and wings made with it.

A shape is a closed polygon, an array [n, 2] of points (x, y), y downwards, in the frame of a sketch: about 100 wide,
with the critter around the origin. `python -m critters` draws a contact sheet that shows all of them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def place(shape: ArrayLike, x: float, y: float, size: ArrayLike = 1.0, turn: float = 0.0,
          mirror: bool = False) -> np.ndarray:
    """Scale a shape by a number or a pair, mirror it left to right, turn it clockwise (radians), move it to (x, y)."""
    p = np.asarray(shape, dtype=float) * size
    c, s, m = math.cos(turn), math.sin(turn), -1 if mirror else 1
    return np.stack([x + c * m * p[:, 0] - s * p[:, 1], y + s * m * p[:, 0] + c * p[:, 1]], axis=1)


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0, petals: float = 0.0) -> np.ndarray:
    """Return an ellipse with centre (x, y) and radii rx, ry.

    With `petals` it is a flower with five petals; the gaps between them have this depth, as a fraction of the radius.
    """
    a = np.arange(40) * (2 * np.pi / 40)
    r = 1 - petals + petals * np.abs(np.cos(2.5 * a))
    return place(np.stack([rx * r * np.sin(a), -ry * r * np.cos(a)], axis=1), x, y, 1.0, turn)


def smooth(points: ArrayLike, closed: bool = True, steps: int = 6) -> np.ndarray:
    """Draw a Catmull-Rom curve through the points, with `steps` points for each piece."""
    p = np.asarray(points, dtype=float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    a, b, c, d = (p[i:len(p) - 3 + i, None] for i in range(4))
    u = (np.arange(steps) / steps)[None, :, None]
    curve = (b + 0.5 * u * (c - a + u * (2 * a - 5 * b + 4 * c - d + u * (3 * (b - c) + d - a)))).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


def tube(points: ArrayLike, start: float, end: float) -> np.ndarray:
    """Return a limb with a round end along a smooth path; its radius goes from `start` to `end`."""
    path = smooth(points, closed=False, steps=5)
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True) + 1e-9
    side = np.linspace(start, end, len(path))[:, None] * np.stack([-along[:, 1], along[:, 0]], axis=1)
    a = np.linspace(0, np.pi, 7)[1:-1, None]
    cap = path[-1] + np.cos(a) * side[-1] + np.sin(a) * end * along[-1]
    return np.concatenate([path + side, cap, (path - side)[::-1]])


def swell(p: np.ndarray, by: float) -> np.ndarray:
    """Grow a closed shape by a distance on all sides; very sharp corners are cut."""
    edge = np.roll(p, -1, axis=0) - p
    edge /= np.linalg.norm(edge, axis=1, keepdims=True) + 1e-9
    clockwise = np.sum(p[:, 0] * np.roll(p[:, 1], -1) - p[:, 1] * np.roll(p[:, 0], -1)) > 0
    n = np.stack([edge[:, 1], -edge[:, 0]], axis=1) * (1 if clockwise else -1)
    corner = n + np.roll(n, 1, axis=0)
    return p + by * corner / np.maximum((corner ** 2).sum(axis=1, keepdims=True) / 2, 0.7)


# Outlines of features, about one unit long: from the origin upwards, wings to the right.
FLAME = smooth([(0, .12), (-.38, -.04), (-.46, -.4), (-.24, -.62), (-.1, -1.1), (.2, -.8), (.24, -.56), (.46, -.44),
                (.36, -.04)])
LEAF = smooth([(0, .04), (-.3, -.3), (-.26, -.7), (0, -1.05), (.26, -.7), (.3, -.3)])
FLUKE = smooth([(0, .12), (-.2, -.3), (-.66, -.7), (-.5, -1), (0, -.78), (.5, -1), (.66, -.7), (.2, -.3)])
FAN = smooth([(-.2, .2), (-.5, -.4), (-.56, -.9), (-.26, -.82), (0, -1.1), (.26, -.82), (.56, -.9), (.5, -.4),
              (.2, .2)])
HEART = smooth([(0, .1), (-.5, -.45), (-.46, -.86), (-.2, -.95), (0, -.74), (.2, -.95), (.46, -.86), (.5, -.45)])
BOW = smooth([(0, -.2), (.5, -.55), (.9, -.4), (.9, .4), (.5, .55), (0, .2), (-.5, .55), (-.9, .4), (-.9, -.4),
              (-.5, -.55)])
EAR = smooth([(-.3, .2), (-.3, -.4), (0, -1.05), (.3, -.4), (.3, .2)])
ROUND_EAR = ellipse(0, -.45, .42, .6)
HORN = smooth([(-.24, .2), (-.22, -.4), (.18, -1), (.24, -.4), (.26, .2)])
FEELER = np.concatenate([[(-.12, .1), (-.1, -.55)], ellipse(0, -.8, .3, .3, math.pi)[3:-2], [(.1, -.55), (.12, .1)]])
FLOWER = ellipse(0, 0, 1, 1, petals=.35)
DOT = ellipse(0, 0, .34, .34)
CURL = tube([(-.4, .1)] + [(.35 + r * math.sin(a), -.3 + r * math.cos(a)) for a, r in
                           zip(np.linspace(0, 5.6, 9), np.linspace(.42, .1, 9))], .16, .11)
FEATHERED = smooth([(0, .1), (.1, -.5), (.5, -.86), (1.06, -.9), (1.0, -.62), (.84, -.5), (.9, -.3), (.66, -.22),
                    (.64, .02), (.36, .02), (.2, .24)])
LEATHERY = np.array([(0, .2), (.08, -.56), (.3, -.98), (1.12, -.74), (.86, -.46), (.94, -.14), (.6, -.18), (.5, .12)])
ROUNDED = smooth([(0, .1), (.06, -.4), (.4, -.8), (.86, -.76), (.98, -.36), (.72, -.1), (.86, .22), (.62, .5),
                  (.22, .36)])
CAT_EAR = np.array([(-.5, .3), (-.1, -.8), (.08, -.8), (.5, .2), (.3, .4)])
BOLT = np.array([(-.06, .12), (-.1, -.4), (-.38, -.36), (-.2, -1.1), (.36, -1.1), (.14, -.68), (.42, -.7)])
CRYSTAL = np.array([(-.22, .2), (-.3, -.55), (0, -1.05), (.3, -.55), (.22, .2)])
FACET = CRYSTAL[2:].tolist() + [(0, .2), (.02, -.45)]
SPADE = np.array([(-.08, .1), (-.5, -.3), (0, -1), (.5, -.3), (.08, .1)])
GEM = np.array([(0, -1), (.8, 0), (0, 1), (-.8, 0)])
