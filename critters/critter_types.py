"""The types of critter: the colours of each, and what grows on its head, as its tail and on its back.

To add a type, add an entry to CRITTER_TYPES; outlines for its features go to shapes.py. Choose a `main` colour whose
hue is far from the others, since recognizer.py and the tests tell types by colour. A critter's types are drawn from the
whole table, so a new entry changes every set of critters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from critters.shapes import (
    BOLT,
    BOW,
    CAT_EAR,
    CRYSTAL,
    CURL,
    DOT,
    EAR,
    FACET,
    FAN,
    FEATHERED,
    FEELER,
    FLAME,
    FLOWER,
    FLUKE,
    GEM,
    HEART,
    HORN,
    LEAF,
    LEATHERY,
    ROUND_EAR,
    ROUNDED,
    SPADE,
)

Colour = tuple[int, int, int]  # 8-bit RGB
ANCHORS = ("head", "brow", "tail", "rump", "wings", "spine")


@dataclass(frozen=True)
class Palette:
    """The colours of a type."""

    main: Colour  # body
    light: Colour  # belly
    dark: Colour  # shade and markings
    accent: Colour  # small details


@dataclass(frozen=True)
class Feature:
    """A shape that grows on a critter.

    The anchor is the place: "head" (around its edge, mirrored on the left), "tail" (draws a tail, and the feature at
    its end) and "rump" (the same place without a tail), where it grows once for each of `angles`; "brow" and "wings",
    which take the first angle; or "spine", which takes none.
    """

    anchor: str
    shape: np.ndarray
    size: tuple[float, float]  # range, in the units of a sketch: a critter is about 100 wide
    angles: tuple[float, ...] = (0.0,)  # radians from upright, clockwise
    fill: str = "main"  # a colour of the palette
    inner: str = ""  # the colour of a smaller copy inside, if any ...
    inner_shape: ArrayLike | None = None  # ... or of another shape there
    inner_size: ArrayLike = 0.6  # relative to the feature: a number or a pair
    depth: int = 4  # for "head" and "brow": drawn in front of what has a smaller depth

    def __post_init__(self) -> None:
        if self.anchor not in ANCHORS:
            raise ValueError(f"unknown anchor {self.anchor!r}: choose one of {', '.join(ANCHORS)}")


@dataclass(frozen=True)
class CritterType:
    """Colours and features of a type. Of a critter's two types, each gives some of the features."""

    palette: Palette
    head: tuple[Feature, ...]
    tail: tuple[Feature, ...]
    back: tuple[Feature, ...] = ()
    flies: bool = False  # always has wings, and more often the body of a bird


VEIN = dict(inner="dark", inner_size=(.2, .8))
ICE = dict(fill="light", inner="main", inner_shape=FACET, inner_size=1.0)

# The hues of `main` lie at least 17 degrees apart on the colour circle; "dark" alone is nearly grey.
CRITTER_TYPES: dict[str, CritterType] = {
    "fire": CritterType(
        Palette(main=(240, 78, 44), light=(255, 196, 158), dark=(176, 42, 30), accent=(255, 206, 72)),
        head=(Feature("head", EAR, (13, 19), (-.9, .9), inner="light"),
              Feature("head", FLAME, (24, 32), inner="accent")),
        tail=(Feature("tail", FLAME, (26, 33), (.1,), inner="accent"),),
    ),
    "water": CritterType(
        Palette(main=(58, 116, 228), light=(178, 208, 252), dark=(34, 68, 160), accent=(128, 190, 255)),
        head=(Feature("head", FAN, (18, 24), (-1.15, 1.15), inner="accent"),
              Feature("head", LEAF, (17, 22), (.3,))),
        tail=(Feature("tail", FLUKE, (21, 27), (.8,)),),
        back=(Feature("spine", FAN, (15, 20)),),
    ),
    "grass": CritterType(
        Palette(main=(94, 184, 62), light=(212, 238, 156), dark=(48, 122, 46), accent=(252, 132, 160)),
        head=(Feature("head", LEAF, (22, 29), (-.9, .9, 0), **VEIN),
              Feature("head", FLOWER, (8, 11), fill="accent", inner="light", inner_shape=DOT, inner_size=1.0, depth=6)),
        tail=(Feature("tail", LEAF, (24, 31), (.5,), **VEIN),),
        back=(Feature("wings", LEAF, (28, 35), (.9,), **VEIN),),
    ),
    "electric": CritterType(
        Palette(main=(252, 214, 44), light=(255, 246, 178), dark=(216, 156, 20), accent=(255, 246, 178)),
        head=(Feature("head", BOLT, (22, 29), (-.65, .65)),
              Feature("head", CRYSTAL, (15, 19), fill="dark")),
        tail=(Feature("rump", BOLT, (36, 44), (.8,)),),
        back=(Feature("spine", CRYSTAL, (13, 17), fill="dark"),),
    ),
    "psychic": CritterType(
        Palette(main=(160, 88, 214), light=(226, 192, 248), dark=(104, 50, 152), accent=(255, 84, 140)),
        head=(Feature("head", FEELER, (21, 29), (-.5, .5)),
              Feature("brow", GEM, (6, 8), fill="accent", depth=6)),
        tail=(Feature("rump", CURL, (32, 38)),),
    ),
    "ice": CritterType(
        Palette(main=(134, 220, 238), light=(224, 248, 253), dark=(74, 164, 198), accent=(250, 254, 255)),
        head=(Feature("head", CRYSTAL, (17, 23), (-.6, .6), **ICE),
              Feature("head", CRYSTAL, (17, 23), **ICE)),
        tail=(Feature("tail", CRYSTAL, (22, 28), (.7,), **ICE),),
        back=(Feature("spine", CRYSTAL, (18, 23), **ICE),),
    ),
    "dragon": CritterType(
        Palette(main=(28, 168, 128), light=(172, 236, 204), dark=(16, 106, 88), accent=(255, 232, 176)),
        head=(Feature("head", HORN, (20, 28), (-.5, .5), fill="accent"),
              Feature("head", FAN, (13, 17), (-1.3, 1.3))),
        tail=(Feature("tail", SPADE, (18, 23), (.4,)),),
        back=(Feature("wings", LEATHERY, (28, 36), inner="light"),),
    ),
    "flying": CritterType(
        Palette(main=(188, 132, 82), light=(247, 228, 198), dark=(126, 80, 46), accent=(252, 172, 48)),
        head=(Feature("head", LEAF, (16, 21), (.9, .45, 0)),),
        tail=(Feature("rump", LEAF, (24, 30), (1.9, .9)),
              Feature("rump", LEAF, (24, 30), (1.4,), fill="light")),
        back=(Feature("wings", FEATHERED, (33, 41), inner="light"),),
        flies=True,
    ),
    "dark": CritterType(
        Palette(main=(80, 78, 96), light=(166, 164, 184), dark=(46, 44, 58), accent=(232, 62, 74)),
        head=(Feature("head", CAT_EAR, (21, 29), (-.65, .65), inner="accent"),),
        tail=(Feature("tail", FLAME, (25, 31), (.5,), inner="light"),),
    ),
    "fairy": CritterType(
        Palette(main=(249, 136, 186), light=(255, 220, 236), dark=(206, 82, 142), accent=(255, 234, 120)),
        head=(Feature("head", ROUND_EAR, (22, 34), (-.6, .6), inner="light"),
              Feature("head", BOW, (11, 14), (-.4,), "dark", "accent", DOT, 1.0, depth=6)),
        tail=(Feature("tail", HEART, (18, 24), (.3,)),),
        back=(Feature("wings", ROUNDED, (27, 34), inner="light"),),
    ),
}
TYPES: tuple[str, ...] = tuple(CRITTER_TYPES)
PALETTES: dict[str, Palette] = {name: critter_type.palette for name, critter_type in CRITTER_TYPES.items()}
