"""The built-in data set: small creatures drawn by program, free of any licence.

Every critter has one or two of ten types. The first type colours the body; a second one colours belly and limbs and
adds features of its own (fins, leaves, wings ...), so that colour alone tells both. Critter i of a set depends on the
set's seed and on i, not on how many others are drawn.

    critter_types.py   the types: palettes and features; a new type goes here
    shapes.py          geometry, and the outlines of features
    body_plans.py      blob, biped, quadruped, bird, serpent; a new body goes here
    sketch.py          a critter before it is painted: parts and anchors
    draw.py            one critter: `draw_critter`
    sets.py            many critters: arrays, a folder with labels.csv, a contact sheet, critters that nobody trains on
    recognizer.py      the types that an image shows, recognised by their colours
    __main__.py        python -m critters
"""

from __future__ import annotations

from critters.critter_types import PALETTES, TYPES
from critters.draw import draw_critter
from critters.sets import UNSEEN_SEEDS, contact_sheet, draw_critters, unseen_critters, write_critters

__all__ = ["PALETTES", "TYPES", "UNSEEN_SEEDS", "contact_sheet", "draw_critter", "draw_critters", "unseen_critters",
           "write_critters"]
