"""
The built-in data set: small creatures drawn by program, free of any licence.

Every critter has one or two of ten types. The first type colours the body; a second one colours belly and limbs and
adds a feature of its own (fins, leaves, wings ...), so that both can be told from the picture by colour alone.

    python critters.py                                             # 1,000 pictures of 64x64 in data/critters
    python critters.py --count 200 --image_size 32 --seed 7 --output data/small

The folder holds critter_00000.png ... and a labels.csv (columns file,types); a contact sheet goes to
outputs/critters.png. Picture i depends on the seed and on i alone, never on how many others are drawn.

How a picture comes about: a body plan (`plan_*`) lays out body, legs and head, and says where things can grow; the
types grow their ears, tails and wings there (`FEATURES`, a table); a face goes on top; then everything is scaled into
the frame and painted from back to front, each part with a dark outline.
"""

import argparse
import colorsys
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from shapes import (
    BOLT, BOW, CAT_EAR, CRYSTAL, CURL, DOT, EAR, FACET, FAN, FEATHERED, FEELER, FLAME, FLOWER, FLUKE, GEM, HEART, HORN,
    LEAF, LEATHERY, ROUND_EAR, ROUNDED, SPADE, ellipse, place, smooth, swell, tube,
)

Color = tuple[int, int, int]
Point = tuple[float, float]
Mark = tuple[np.ndarray, Color]     # a shape painted on a part, cut off at the part's edge
WHITE, MOUTH, EYE, CHEEK = (255, 255, 255), (214, 66, 76), (255, 222, 92), (255, 96, 110)
SUPERSAMPLE = 4     # draw this many times larger, then average: Pillow's polygons have no anti-aliasing of their own
MARGIN = 0.055      # white on every side, as a share of the picture
SMALL = 48          # in fewer pixels a creature is drawn bold: larger eyes; no spots, stripes or blush
OUTLINE = 0.026     # width of the outline, as a share of the picture: about 1 px at 32, 2 px at 64


@dataclass(frozen=True)
class Palette:
    """The colours of a type, 8-bit RGB: body; belly; shade and markings; small details."""

    main: Color
    light: Color
    dark: Color
    accent: Color


# The hues of `main` lie at least 17 degrees apart on the colour circle; "dark" alone is nearly grey.
PALETTES: dict[str, Palette] = {
    "fire": Palette((240, 78, 44), (255, 196, 158), (176, 42, 30), (255, 206, 72)),
    "water": Palette((58, 116, 228), (178, 208, 252), (34, 68, 160), (128, 190, 255)),
    "grass": Palette((94, 184, 62), (212, 238, 156), (48, 122, 46), (252, 132, 160)),
    "electric": Palette((252, 214, 44), (255, 246, 178), (216, 156, 20), (255, 246, 178)),
    "psychic": Palette((160, 88, 214), (226, 192, 248), (104, 50, 152), (255, 84, 140)),
    "ice": Palette((134, 220, 238), (224, 248, 253), (74, 164, 198), (250, 254, 255)),
    "dragon": Palette((28, 168, 128), (172, 236, 204), (16, 106, 88), (255, 232, 176)),
    "flying": Palette((188, 132, 82), (247, 228, 198), (126, 80, 46), (252, 172, 48)),
    "dark": Palette((80, 78, 96), (166, 164, 184), (46, 44, 58), (232, 62, 74)),
    "fairy": Palette((249, 136, 186), (255, 220, 236), (206, 82, 142), (255, 234, 120)),
}
TYPES: tuple[str, ...] = tuple(PALETTES)


# ---------------------------------------------------------------------------------------------------------------------
# A sketch: the parts of one creature, and where things can grow on it.

@dataclass
class Sketch:
    """Parts are (depth, shapes, fill, marks, has an outline). Depths: 0 far back, 2 body, 4 behind the head, 5 head."""

    rng: np.random.Generator
    first: Palette                  # of the body ...
    second: Palette                 # ... and of belly and limbs: the same where there is one type alone
    facing: int = 1                 # -1 where the picture is mirrored
    parts: list[tuple[int, list[np.ndarray], Color, list[Mark], bool]] = field(default_factory=list)
    head: tuple[float, float, float, float] = (0, 0, 1, 1)      # centre and radii
    bold: bool = False              # too small for fine marks
    look: float = 0.0               # how far the face is turned, in radii of the head
    beak: bool = False
    tail: Point = (0, 0)            # where the tail starts
    wings: list[tuple[float, float, int]] = field(default_factory=list)     # x, y and depth; x < 0 is the left wing
    spine: list[tuple[float, float, float]] = field(default_factory=list)   # x, y and angle of spikes on the back

    def add(self, depth: int, shape: np.ndarray | list[np.ndarray], fill: Color, marks: Sequence[Mark] = (),
            shade: Color | None = None, outline: bool = True) -> None:
        """Add one shape, or several that share an outline; with `shade`, their lower edge takes that colour."""
        shapes, marks = shape if isinstance(shape, list) else [shape], list(marks)
        if shade is not None:       # light from above: the shapes again, a little higher, in the lit colour
            marks, fill = [(s - (0, 4.5), fill) for s in shapes] + marks, shade
        self.parts.append((depth, shapes, fill, marks, outline))

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    @property
    def belly(self) -> Color:
        return self.first.light if self.first is self.second else self.second.main

    def on_head(self, angle: float) -> Point:
        """The point of the head's edge at an angle from the top, clockwise in radians."""
        x, y, rx, ry = self.head
        return x + 0.92 * rx * math.sin(angle), y - 0.92 * ry * math.cos(angle)

    def pattern(self, x: float, y: float, rx: float, ry: float) -> list[Mark]:
        """Markings for a round part: stripes, spots, a pale muzzle or none."""
        kind, color = self.rng.integers(4), self.first.dark
        if self.bold and kind < 2:
            return []
        if kind == 0:
            return [(ellipse(x + k * rx * .5, y - ry, rx * .12, ry * .5, .2 * k), color) for k in (-1, 0, 1)]
        if kind == 1:
            spots = ((-.5, -.62, .18), (.5, -.66, .15), (.76, -.1, .15), (.04, -.84, .13))
            return [(ellipse(x + a * rx, y + b * ry, c * rx, c * rx), color) for a, b, c in spots]
        return [(ellipse(x + self.look * rx, y + ry * .72, rx * .66, ry * .5), self.belly)] if kind == 2 else []


# ---------------------------------------------------------------------------------------------------------------------
# Body plans

def plan_blob(s: Sketch) -> None:
    """All head: a round body with nubs for feet and arms."""
    rx, ry, p = s.between(29, 38), s.between(26, 34), s.first
    belly = (ellipse(s.look * 8, ry * .78, rx * s.between(.55, .75), ry * .52), s.belly)
    s.add(5, ellipse(0, 0, rx, ry), p.main, [*s.pattern(0, 0, rx, ry), belly], p.dark)
    for side in (-1, 1):
        up = s.between(-.6, .9)
        s.add(1, ellipse(side * rx * .48, ry * .95, 11, 7.5), s.second.main)
        s.add(4, ellipse(side * rx * 1.02, 6 - 7 * up, 10.5, 6.5, -side * up), s.second.main)
    s.head, s.tail = (0, -ry * .08, rx, ry * .92), (rx * .7, ry * .6)
    s.wings = [(-rx * .8, 0, 0), (rx * .8, 0, 0)]
    s.spine = [(rx * math.sin(a), -ry * math.cos(a), a) for a in (.7, 1.1, 1.5)]


def plan_biped(s: Sketch) -> None:
    """Upright, with a big head on a pear of a body."""
    rx, ry, hx, hy, p = s.between(17, 24), s.between(18, 24), s.between(24, 30), s.between(20, 25), s.first
    s.add(2, ellipse(0, 18, rx, ry), p.main, [(ellipse(s.look * 5, 22, rx * .66, ry * .72), s.belly)], p.dark)
    for side in (-1, 1):
        up = s.between(-12, 14)
        arm = [(side * rx * .78, 11), (side * (rx + 5), 13 - up / 2), (side * (rx + 9), 15 - up)]
        s.add(3, ellipse(side * rx * .62, 17 + ry, 10, 7), s.second.main)
        s.add(3, tube(arm, 5, 5.5), s.second.main)
    x, y = s.look * 5, 2 - hy * .72
    s.add(5, ellipse(x, y, hx, hy), p.main, s.pattern(x, y, hx, hy), p.dark)
    s.head, s.tail = (x, y, hx, hy), (rx * .6, 30)
    s.wings = [(-rx * .7, 10, 0), (rx * .7, 10, 0)]
    s.spine = [(rx * .8, 6, 1.1), (rx, 16, 1.4), (rx, 27, 1.7)]


def plan_quadruped(s: Sketch) -> None:
    """On four legs, seen from the side, the head turned to us."""
    rx, ry, leg, hx, hy, p = *(s.between(*r) for r in ((24, 31), (14, 19), (11, 20), (21, 26), (18, 22))), s.first
    for x, near in ((-.62, True), (-.2, False), (.38, True), (.8, False)):
        path = [(x * rx, 18), (x * rx, 18 + leg / 2), (x * rx - 1, 16 + leg)]
        s.add(3 if near else 1, tube(path, 6.5, 6.8), s.second.main if near else s.second.dark)
    belly = (ellipse(0, 14 + ry, rx * .8, ry * .75), s.belly)
    s.add(2, ellipse(0, 12, rx, ry), p.main, [*s.pattern(4, 12, rx, ry), belly], p.dark)
    x, y, s.look = -rx * .72, s.between(-17, -8), -.16
    s.add(5, ellipse(x, y, hx, hy), p.main, s.pattern(x, y, hx, hy), p.dark)
    s.head, s.tail = (x, y, hx, hy), (rx * .85, 6)
    s.wings = [(6, 4, 4), (0, 2, 0)]
    s.spine = [(rx * a, 12 - ry * math.sqrt(1 - a * a), a * .8) for a in (.15, .5, .82)]


def plan_bird(s: Sketch) -> None:
    """An egg on two legs, with a beak."""
    rx, ry, h, p = s.between(23, 30), s.between(22, 27), s.between(20, 24), s.first
    x, feet = -4 + s.look * 10, p.accent if p is s.second else s.second.main
    for side in (-.45, .45):
        s.add(1, [tube([(side * rx, 28), (side * rx, 36)], 3, 3), ellipse(side * rx - 2, 39, 8, 4.5)], feet)
    belly = (ellipse(x * .6 - 4, 20, rx * .72, ry * .72), s.belly)
    s.add(5, [ellipse(0, 10, rx, ry, -.2), ellipse(x, -14, h, h)], p.main, [*s.pattern(x, -14, h, h), belly], p.dark)
    s.head, s.beak, s.tail = (x, -14, h, h), True, (rx * .7, 20)
    s.wings = [(-rx * .75, 8, 0), (rx * .62, 8, 6)]
    s.spine = [(rx * .75, -4, .8), (rx * .95, 6, 1.2), (rx, 16, 1.5)]


def plan_serpent(s: Sketch) -> None:
    """Two coils and a raised neck."""
    p, bend, hx, hy = s.first, s.between(-7, 7), s.between(22, 27), s.between(18, 22)
    s.add(1, ellipse(2, 33, 33, 11.5), p.main, [(ellipse(2, 43, 30, 8), s.belly)], p.dark)
    s.add(2, ellipse(3, 21, 25, 11), p.main, [(ellipse(3, 30, 22, 7.5), s.belly)], p.dark)
    neck = np.array([(8, 20), (10 + bend, 4), (-2, -14)])
    s.add(3, tube(neck, 12, 11), p.main, [(tube(neck - (5, -2), 6.5, 6), s.belly)])
    x, y = -4 + s.look * 6, s.between(-22, -16)
    s.add(5, ellipse(x, y, hx, hy), p.main, s.pattern(x, y, hx, hy), p.dark)
    s.head, s.tail = (x, y, hx, hy), (28, 30)
    s.wings = [(-4, 6, 0), (16 + bend / 2, 6, 0)]
    s.spine = [(18 + bend * .6, -4, 1.2), (21 + bend, 5, 1.4), (24, 14, 1.3)]


PLANS = {plan_blob: 1.0, plan_biped: 1.2, plan_quadruped: 1.2, plan_bird: 0.5, plan_serpent: 0.7}     # how often


# ---------------------------------------------------------------------------------------------------------------------
# Features

@dataclass(frozen=True)
class Growth:
    """A shape that grows on a creature, once for every angle in `turns`; on the left it is mirrored."""

    at: str                                     # "head" (around its edge), "brow", "tail", "rump", "wings" or "spine"
    shape: np.ndarray
    size: Point                                 # from, to
    turns: tuple[float, ...] = (0.0,)           # radians from upright, clockwise
    fill: str = "main"                          # a colour of the palette
    inner: str = ""                             # the colour of a smaller copy inside, if any ...
    inside: ArrayLike | None = None             # ... or of another shape there
    inner_size: ArrayLike = 0.6
    depth: int = 4


# What a type grows on the head, as a tail and on the back. "tail" draws a tail first; "rump" does without one.
VEIN = {"inner": "dark", "inner_size": (.2, .8)}
ICE = {"fill": "light", "inner": "main", "inside": FACET, "inner_size": 1.0}
FEATURES: dict[str, tuple[list[Growth], list[Growth], list[Growth]]] = {
    "fire": ([Growth("head", EAR, (13, 19), (-.9, .9), inner="light"),
              Growth("head", FLAME, (24, 32), inner="accent")],
             [Growth("tail", FLAME, (26, 33), (.1,), inner="accent")], []),
    "water": ([Growth("head", FAN, (18, 24), (-1.15, 1.15), inner="accent"), Growth("head", LEAF, (17, 22), (.3,))],
              [Growth("tail", FLUKE, (21, 27), (.8,))], [Growth("spine", FAN, (15, 20))]),
    "grass": ([Growth("head", LEAF, (22, 29), (-.9, .9, 0), **VEIN),
               Growth("head", FLOWER, (8, 11), (0.0,), "accent", "light", DOT, 1.0, depth=6)],
              [Growth("tail", LEAF, (24, 31), (.5,), **VEIN)], [Growth("wings", LEAF, (28, 35), (.9,), **VEIN)]),
    "electric": ([Growth("head", BOLT, (22, 29), (-.65, .65)), Growth("head", CRYSTAL, (15, 19), fill="dark")],
                 [Growth("rump", BOLT, (36, 44), (.8,))], [Growth("spine", CRYSTAL, (13, 17), fill="dark")]),
    "psychic": ([Growth("head", FEELER, (21, 29), (-.5, .5)), Growth("brow", GEM, (6, 8), fill="accent", depth=6)],
                [Growth("rump", CURL, (32, 38))], []),
    "ice": ([Growth("head", CRYSTAL, (17, 23), turns, **ICE) for turns in ((-.6, .6), (0,))],
            [Growth("tail", CRYSTAL, (22, 28), (.7,), **ICE)], [Growth("spine", CRYSTAL, (18, 23), **ICE)]),
    "dragon": ([Growth("head", HORN, (20, 28), (-.5, .5), "accent"), Growth("head", FAN, (13, 17), (-1.3, 1.3))],
               [Growth("tail", SPADE, (18, 23), (.4,))], [Growth("wings", LEATHERY, (28, 36), inner="light")]),
    "flying": ([Growth("head", LEAF, (16, 21), (.9, .45, 0))],
               [Growth("rump", LEAF, (24, 30), (1.9, .9)), Growth("rump", LEAF, (24, 30), (1.4,), "light")],
               [Growth("wings", FEATHERED, (33, 41), inner="light")]),
    "dark": ([Growth("head", CAT_EAR, (21, 29), (-.65, .65), inner="accent")],
             [Growth("tail", FLAME, (25, 31), (.5,), inner="light")], []),
    "fairy": ([Growth("head", ROUND_EAR, (22, 34), (-.6, .6), inner="light"),
               Growth("head", BOW, (11, 14), (-.4,), "dark", "accent", DOT, 1.0, depth=6)],
              [Growth("tail", HEART, (18, 24), (.3,))], [Growth("wings", ROUNDED, (27, 34), inner="light")]),
}


def grow(s: Sketch, g: Growth, p: Palette) -> None:
    """Let a feature grow on the sketch, in the colours of the palette."""
    size, sway = s.between(*g.size), s.between(.88, 1.12)
    if g.at == "head":
        spots = [(*s.on_head(turn * sway), turn * sway * .9, turn < 0, g.depth) for turn in g.turns]
    elif g.at == "brow":
        x, y, rx, ry = s.head
        spots = [(x + s.look * rx * .8, y - ry * .62, g.turns[0], False, g.depth)]
    elif g.at == "wings":
        spots = [(x, y, (-1 if x < 0 else 1) * (g.turns[0] + sway - 1), x < 0, depth) for x, y, depth in s.wings]
    elif g.at == "spine":
        spots = [(x, y, turn, False, 1) for x, y, turn in s.spine]
    else:
        x, y = s.tail
        if g.at == "tail":
            x, y = x + 16, y - s.between(3, 14)
            s.add(0, tube([(s.tail[0] - 4, s.tail[1]), (x - 5, s.tail[1] + 2), (x, y)], 6, 4.5), s.first.main)
        spots = [(x, y, turn * sway, False, 0) for turn in g.turns]
    for x, y, turn, mirror, depth in spots:
        inside = g.shape if g.inside is None else g.inside
        marks = []
        if g.inner:
            marks = [(place(inside, x, y, np.multiply(size, g.inner_size), turn, mirror), getattr(p, g.inner))]
        s.add(depth, place(g.shape, x, y, size, turn, mirror), getattr(p, g.fill), marks)


def draw_face(s: Sketch, ink: Color) -> None:
    """Eyes, cheeks, and a mouth or a beak."""
    x, y, rx, ry = s.head
    x, y = x + s.look * rx, y + ry * s.between(.02, .12)
    gap, w, h = rx * s.between(.42, .5), s.between(5.8, 7.2), s.between(8.0, 10.0)
    happy, blush = s.rng.random() < .08, s.rng.random() < .7 and not s.bold
    if s.bold:
        w, h = 1.25 * w, 1.2 * h
    cheek = tuple((a + b) // 2 for a, b in zip(s.first.main, CHEEK))
    for side in (-1, 1):
        ex = x + side * gap
        if blush:
            s.add(6, ellipse(ex + side * 5, y + h + 3.5, 4.5, 3), cheek, outline=False)
        if happy:
            s.add(7, tube([(ex - w, y + 2), (ex, y - 4), (ex + w, y + 2)], 1.8, 1.8), ink, outline=False)
            continue
        if max(s.first.main) < 130:             # a black eye would be lost on a black face
            s.add(7, ellipse(ex, y, w + 1.2, h + .6), EYE)
            s.add(7, ellipse(ex, y + .5, w * .6, h * .75), ink, outline=False)
        else:
            s.add(7, ellipse(ex, y, w, h), ink, outline=False)
        s.add(7, ellipse(ex - s.facing * w * .25, y - h * .38, w * .48, w * .5), WHITE, outline=False)
    y += ry * .46
    if s.beak:
        s.add(8, smooth([(x - 7, y - 5), (x, y - 8), (x + 7, y - 5), (x, y + 5)]), PALETTES["flying"].accent)
    elif s.rng.random() < .4:
        s.add(8, smooth([(x - 5, y - 2), (x, y - 1), (x + 5, y - 2), (x, y + 6)]), MOUTH)
    else:
        s.add(8, tube([(x - 5, y - 1), (x, y + 2), (x + 5, y - 1)], 1.4, 1.4), ink, outline=False)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def shift(color: Color, hue: float, saturation: float, value: float) -> Color:
    """The colour with its hue moved (in turns) and its saturation and value multiplied."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in color))
    rgb = colorsys.hsv_to_rgb((h + hue) % 1.0, min(1.0, s * saturation), min(1.0, v * value))
    return tuple(round(255 * c) for c in rgb)


def draw_critter(index: int, image_size: int = 64, seed: int = 0,
                 types: tuple[str, ...] | None = None) -> tuple[Image.Image, tuple[str, ...]]:
    """
    Draw creature `index` of the set `seed`: an RGB picture of image_size x image_size pixels on white, and its types.

    There are one or two types, the body's first; `types` forces them. Unknown ones raise a ValueError.
    """
    rng = np.random.default_rng([seed, index])
    own = tuple(TYPES[i] for i in rng.permutation(len(TYPES))[:1 + (rng.random() < 1 / 3)])
    types = own if types is None else tuple(types)
    if not 1 <= len(types) <= 2 or any(t not in PALETTES for t in types):
        raise ValueError(f"types must be one or two of {', '.join(TYPES)}; got {', '.join(map(str, types)) or 'none'}")

    palettes = []                               # each creature has its own shade of them
    for t in types:
        by, p = (rng.uniform(-.012, .012), rng.uniform(.88, 1.08), rng.uniform(.9, 1.06)), PALETTES[t]
        palettes.append(Palette(shift(p.main, *by), shift(p.light, *by), shift(p.dark, *by), p.accent))
    s = Sketch(rng, palettes[0], palettes[-1], facing=1 if rng.random() < .5 else -1, look=-rng.uniform(0, .2),
               bold=image_size < SMALL)
    odds = np.array([3.0 if plan is plan_bird and "flying" in types else odd for plan, odd in PLANS.items()])
    list(PLANS)[rng.choice(len(PLANS), p=odds / odds.sum())](s)

    # Of two types, the second has the back and either the head or the tail.
    head, tail, back = (0, 0, 0) if len(types) == 1 else ((1, 0, 1), (0, 1, 1))[rng.integers(2)]
    growths = [(who, g) for slot, who in enumerate((head, tail, back)) for g in FEATURES[types[who]][slot]]
    wingless = rng.random() < .25 and "flying" not in types
    for who, g in growths:
        if not (wingless and g.at in ("wings", "spine")):
            grow(s, g, palettes[who])
    ink = shift(s.first.dark, 0.0, 1.0, 0.5)
    draw_face(s, ink)
    return paint(s, ink, image_size), types


def paint(s: Sketch, ink: Color, image_size: int) -> Image.Image:
    """Scale the sketch into the frame and paint its parts from back to front."""
    size = image_size * SUPERSAMPLE
    line = OUTLINE * size
    every = np.concatenate([shape for _, shapes, *_ in s.parts for shape in shapes])
    low, high = every.min(axis=0), every.max(axis=0)
    margin = max(MARGIN * size, 1.5 * SUPERSAMPLE)              # in a tiny picture, still more than one white pixel
    scale = (size - 2 * margin - 2 * line) / (high - low).max()

    def to_frame(shape: np.ndarray) -> np.ndarray:
        return (shape - (low + high) / 2) * (s.facing * scale, scale) + size / 2

    image = Image.new("RGB", (size, size), WHITE)
    pen = ImageDraw.Draw(image)
    for _, shapes, fill, marks, outline in sorted(s.parts, key=lambda part: part[0]):
        shapes = [to_frame(shape) for shape in shapes]
        for shape in shapes if outline else ():
            pen.polygon(swell(shape, line).ravel().tolist(), fill=ink)
        for shape in shapes:
            pen.polygon(shape.ravel().tolist(), fill=fill)
        if marks:
            marked, mask = image.copy(), Image.new("1", image.size)
            mark_pen, mask_pen = ImageDraw.Draw(marked), ImageDraw.Draw(mask)
            for shape, color in marks:
                mark_pen.polygon(to_frame(shape).ravel().tolist(), fill=color)
            for shape in shapes:
                mask_pen.polygon(shape.ravel().tolist(), fill=1)
            image.paste(marked, mask=mask)
    return image.reduce(SUPERSAMPLE)            # a box filter; LANCZOS would ring, and grey the white


def draw_critters(count: int, image_size: int = 64, seed: int = 0) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Creatures 0 ... count-1: uint8 array [count, image_size, image_size, 3], and the types of each."""
    drawn = [draw_critter(index, image_size, seed) for index in range(count)]
    return np.stack([np.asarray(image) for image, _ in drawn]), [types for _, types in drawn]


def write_critters(folder: str | Path, count: int, image_size: int = 64, seed: int = 0) -> None:
    """Write critter_00000.png ... and labels.csv (columns file,types; two types are separated by a space)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("critter_" + 5 * "[0-9]" + ".png"):  # a larger set's pictures would stay without a label
        old.unlink()
    with open(folder / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file", "types"])
        for index in range(count):
            image, types = draw_critter(index, image_size, seed)
            image.save(folder / f"critter_{index:05d}.png")
            rows.writerow([f"critter_{index:05d}.png", " ".join(types)])


def contact_sheet(image_size: int = 64, seed: int = 0, columns: int = 10) -> Image.Image:
    """A row of creatures for each type, its name at the side; the last third of the columns adds a second type."""
    gap, label = max(2, image_size // 16), 64
    cell = image_size + gap
    sheet = Image.new("RGB", (label + columns * cell, len(TYPES) * cell + gap), WHITE)
    for row, name in enumerate(TYPES):
        y = gap + row * cell
        ImageDraw.Draw(sheet).text((gap, y + image_size // 2 - 6), name, fill=(40, 40, 40))
        for column in range(columns):
            second = TYPES[(row + 1 + column % (len(TYPES) - 1)) % len(TYPES)]
            types = (name, second) if column >= columns - columns // 3 else (name,)
            sheet.paste(draw_critter(row * columns + column, image_size, seed, types)[0], (label + column * cell, y))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the built-in data set: a folder of creatures with labels.csv.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of pictures")
    parser.add_argument("--image_size", type=int, default=64, help="width and height of a picture, in pixels")
    parser.add_argument("--seed", type=int, default=0, help="number of the set; another one gives other creatures")
    parser.add_argument("--output", type=Path, default=Path("data/critters"), help="folder to write")
    args = parser.parse_args()
    for flag, least in (("count", 1), ("image_size", 8), ("seed", 0)):
        if getattr(args, flag) < least:
            sys.exit(f"--{flag} is {getattr(args, flag)}; it must be {least} or more")
    if args.output.exists() and not args.output.is_dir():
        sys.exit(f"--output {args.output} is a file; name a folder")
    if (args.output / "labels.csv").exists() and not any(args.output.glob("critter_*.png")):
        sys.exit(f"--output {args.output} has a labels.csv of other pictures; name another folder")
    sheet = Path("outputs/critters.png")
    try:
        write_critters(args.output, args.count, args.image_size, args.seed)
        sheet.parent.mkdir(exist_ok=True)
        contact_sheet(args.image_size, args.seed).save(sheet)
    except OSError as error:
        sys.exit(f"cannot write {error.filename or args.output}: {error.strerror or error}; choose another --output")
    print(f"{args.count} creatures of {args.image_size}x{args.image_size} in {args.output}, a contact sheet in {sheet}")


if __name__ == "__main__":
    main()
