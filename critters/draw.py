"""Draw a critter: choose its types and shades, lay out a body, let features grow, add a face, and paint.

    image, types = draw_critter(7, image_size=64, seed=0)
"""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw

from critters.body_plans import BODY_PLANS, FLYING_BIRD, plan_bird
from critters.critter_types import CRITTER_TYPES, TYPES, Colour, Feature, Palette
from critters.shapes import ellipse, place, smooth, swell, tube
from critters.sketch import Sketch

WHITE, MOUTH, EYE, CHEEK, BEAK = (255, 255, 255), (214, 66, 76), (255, 222, 92), (255, 96, 110), (252, 172, 48)
SUPERSAMPLE = 4  # draw this many times larger, then average: Pillow's polygons have no anti-aliasing of their own
MARGIN = 0.055  # white on every side, as a fraction of the image
OUTLINE = 0.026  # width of the outline, as a fraction of the image: about 1 pixel at 32, 2 at 64
SMALL = 48  # in images of fewer pixels critters are drawn bold


def draw_critter(index: int, image_size: int = 64, seed: int = 0,
                 types: tuple[str, ...] | None = None) -> tuple[Image.Image, tuple[str, ...]]:
    """Draw critter `index` of the set `seed`, an RGB image of image_size x image_size on white, and return its types.

    The image depends on these arguments alone. There are one or two types, the body's first; `types` forces them.

    Raises:
        ValueError: for unknown types, or for a number of types other than one or two.
    """
    rng = np.random.default_rng([seed, index])
    order = rng.permutation(len(TYPES))  # drawn even for forced types, so that they leave the rest as it is
    count = 2 if rng.random() < 1 / 3 else 1
    types = tuple(TYPES[i] for i in order[:count]) if types is None else tuple(types)
    if not 1 <= len(types) <= 2 or any(name not in CRITTER_TYPES for name in types):
        raise ValueError(f"types must be one or two of {', '.join(TYPES)}; got {', '.join(map(str, types)) or 'none'}")
    flies = any(CRITTER_TYPES[name].flies for name in types)

    # Each critter has its own shades of the palettes.
    palettes = [_vary(CRITTER_TYPES[name].palette, rng) for name in types]
    s = Sketch(rng, palettes[0], palettes[-1], facing=1 if rng.random() < .5 else -1, turn=-rng.uniform(0, .2),
               bold=image_size < SMALL)

    # Body.
    odds = np.array([FLYING_BIRD if plan is plan_bird and flies else odd for plan, odd in BODY_PLANS.items()])
    plan = list(BODY_PLANS)[rng.choice(len(BODY_PLANS), p=odds / odds.sum())]
    plan(s)

    # Features. With two types, the second has the back and either the head or the tail.
    head, tail, back = 0, 0, 0
    if len(types) == 2:
        head, tail, back = ((1, 0, 1), (0, 1, 1))[rng.integers(2)]
    features = [(head, feature) for feature in CRITTER_TYPES[types[head]].head]
    features += [(tail, feature) for feature in CRITTER_TYPES[types[tail]].tail]
    features += [(back, feature) for feature in CRITTER_TYPES[types[back]].back]
    bare_back = rng.random() < .25 and not flies
    for i, feature in features:
        if not (bare_back and feature.anchor in ("wings", "spine")):
            _grow(s, feature, palettes[i])

    ink = _shift(s.first.dark, 0.0, 1.0, 0.5)
    _add_face(s, ink)
    return _paint(s, ink, image_size), types


def _vary(palette: Palette, rng: np.random.Generator) -> Palette:
    """Draw a shade of a palette; the accent stays."""
    change = (rng.uniform(-.012, .012), rng.uniform(.88, 1.08), rng.uniform(.9, 1.06))
    return Palette(_shift(palette.main, *change), _shift(palette.light, *change), _shift(palette.dark, *change),
                   palette.accent)


def _shift(colour: Colour, hue: float, saturation: float, value: float) -> Colour:
    """Move the hue of a colour, in turns, and multiply its saturation and value."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    rgb = colorsys.hsv_to_rgb((h + hue) % 1.0, min(1.0, s * saturation), min(1.0, v * value))
    return tuple(round(255 * c) for c in rgb)


def _grow(s: Sketch, feature: Feature, palette: Palette) -> None:
    """Add a feature to the sketch, in the colours of the palette."""
    size, sway = s.between(*feature.size), s.between(.88, 1.12)
    angles, depth = feature.angles, feature.depth

    # Places: x, y, angle, mirrored, depth.
    if feature.anchor == "head":
        places = [(*s.on_head(angle * sway), angle * sway * .9, angle < 0, depth) for angle in angles]
    elif feature.anchor == "brow":
        x, y, rx, ry = s.head
        places = [(x + s.turn * rx * .8, y - ry * .62, angles[0], False, depth)]
    elif feature.anchor == "wings":
        places = [(x, y, (-1 if x < 0 else 1) * (angles[0] + sway - 1), x < 0, depth) for x, y, depth in s.wings]
    elif feature.anchor == "spine":
        places = [(x, y, angle, False, 1) for x, y, angle in s.spine]
    else:
        x, y = s.tail
        if feature.anchor == "tail":
            x, y = x + 16, y - s.between(3, 14)
            s.add(0, tube([(s.tail[0] - 4, s.tail[1]), (x - 5, s.tail[1] + 2), (x, y)], 6, 4.5), s.first.main)
        places = [(x, y, angle * sway, False, 0) for angle in angles]

    inner_shape = feature.shape if feature.inner_shape is None else feature.inner_shape
    inner_size = np.multiply(size, feature.inner_size)
    for x, y, angle, mirror, depth in places:
        markings = []
        if feature.inner:
            markings = [(place(inner_shape, x, y, inner_size, angle, mirror), getattr(palette, feature.inner))]
        s.add(depth, place(feature.shape, x, y, size, angle, mirror), getattr(palette, feature.fill), markings)


def _add_face(s: Sketch, ink: Colour) -> None:
    """Add eyes, cheeks, and a mouth or a beak."""
    x, y, rx, ry = s.head
    x, y = x + s.turn * rx, y + ry * s.between(.02, .12)
    gap, w, h = rx * s.between(.42, .5), s.between(5.8, 7.2), s.between(8.0, 10.0)
    happy = s.rng.random() < .08
    blush = s.rng.random() < .7 and not s.bold
    if s.bold:
        w, h = 1.25 * w, 1.2 * h
    cheek = tuple((a + b) // 2 for a, b in zip(s.first.main, CHEEK))

    # Eyes and cheeks.
    for side in (-1, 1):
        eye_x = x + side * gap
        if blush:
            s.add(6, ellipse(eye_x + side * 5, y + h + 3.5, 4.5, 3), cheek, outline=False)
        if happy:  # closed eyes, as arches
            s.add(7, tube([(eye_x - w, y + 2), (eye_x, y - 4), (eye_x + w, y + 2)], 1.8, 1.8), ink, outline=False)
            continue
        if max(s.first.main) < 130:  # a black eye would be lost on a black face
            s.add(7, ellipse(eye_x, y, w + 1.2, h + .6), EYE)
            s.add(7, ellipse(eye_x, y + .5, w * .6, h * .75), ink, outline=False)
        else:
            s.add(7, ellipse(eye_x, y, w, h), ink, outline=False)
        s.add(7, ellipse(eye_x - s.facing * w * .25, y - h * .38, w * .48, w * .5), WHITE, outline=False)

    # A beak, an open mouth or a smile.
    y += ry * .46
    if s.beak:
        s.add(8, smooth([(x - 7, y - 5), (x, y - 8), (x + 7, y - 5), (x, y + 5)]), BEAK)
    elif s.rng.random() < .4:
        s.add(8, smooth([(x - 5, y - 2), (x, y - 1), (x + 5, y - 2), (x, y + 6)]), MOUTH)
    else:
        s.add(8, tube([(x - 5, y - 1), (x, y + 2), (x + 5, y - 1)], 1.4, 1.4), ink, outline=False)


def _paint(s: Sketch, ink: Colour, image_size: int) -> Image.Image:
    """Scale the sketch into the frame and paint its parts from back to front, each with an outline in `ink`."""
    size = image_size * SUPERSAMPLE
    line = OUTLINE * size
    points = np.concatenate([shape for part in s.parts for shape in part.shapes])
    low, high = points.min(axis=0), points.max(axis=0)
    margin = max(MARGIN * size, 1.5 * SUPERSAMPLE)  # in a tiny image, still more than one white pixel
    scale = (size - 2 * margin - 2 * line) / (high - low).max()

    def to_frame(shape: np.ndarray) -> np.ndarray:
        return (shape - (low + high) / 2) * (s.facing * scale, scale) + size / 2

    image = Image.new("RGB", (size, size), WHITE)
    pen = ImageDraw.Draw(image)
    for part in sorted(s.parts, key=lambda part: part.depth):
        shapes = [to_frame(shape) for shape in part.shapes]
        if part.outline:
            for shape in shapes:
                pen.polygon(swell(shape, line).ravel().tolist(), fill=ink)
        for shape in shapes:
            pen.polygon(shape.ravel().tolist(), fill=part.fill)
        if part.markings:
            marked, mask = image.copy(), Image.new("1", image.size)
            marking_pen, mask_pen = ImageDraw.Draw(marked), ImageDraw.Draw(mask)
            for shape, colour in part.markings:
                marking_pen.polygon(to_frame(shape).ravel().tolist(), fill=colour)
            for shape in shapes:
                mask_pen.polygon(shape.ravel().tolist(), fill=1)
            image.paste(marked, mask=mask)
    return image.reduce(SUPERSAMPLE)  # a box filter; LANCZOS would ring, and grey the white
