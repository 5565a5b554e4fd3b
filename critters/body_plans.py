"""Body plans: each lays out body, legs and head of a sketch, and sets where features can grow.

A new plan is one more function here, and its frequency in BODY_PLANS.
"""

from __future__ import annotations

import math

import numpy as np

from critters.shapes import ellipse, tube
from critters.sketch import Sketch


def plan_blob(s: Sketch) -> None:
    """Lay out a critter that is all head: a round body with nubs for feet and arms."""
    colours = s.first
    rx, ry = s.between(29, 38), s.between(26, 34)
    belly = (ellipse(s.turn * 8, ry * .78, rx * s.between(.55, .75), ry * .52), s.belly)
    s.add(5, ellipse(0, 0, rx, ry), colours.main, [*s.pattern(0, 0, rx, ry), belly], colours.dark)
    for side in (-1, 1):
        raised = s.between(-.6, .9)
        s.add(1, ellipse(side * rx * .48, ry * .95, 11, 7.5), s.second.main)
        s.add(4, ellipse(side * rx * 1.02, 6 - 7 * raised, 10.5, 6.5, -side * raised), s.second.main)
    s.head = (0, -ry * .08, rx, ry * .92)
    s.tail = (rx * .7, ry * .6)
    s.wings = [(-rx * .8, 0, 0), (rx * .8, 0, 0)]
    s.spine = [(rx * math.sin(a), -ry * math.cos(a), a) for a in (.7, 1.1, 1.5)]


def plan_biped(s: Sketch) -> None:
    """Lay out an upright critter with a big head on a pear-shaped body."""
    colours = s.first
    rx, ry = s.between(17, 24), s.between(18, 24)
    head_rx, head_ry = s.between(24, 30), s.between(20, 25)
    belly = (ellipse(s.turn * 5, 22, rx * .66, ry * .72), s.belly)
    s.add(2, ellipse(0, 18, rx, ry), colours.main, [belly], colours.dark)
    for side in (-1, 1):
        raised = s.between(-12, 14)
        arm = [(side * rx * .78, 11), (side * (rx + 5), 13 - raised / 2), (side * (rx + 9), 15 - raised)]
        s.add(3, ellipse(side * rx * .62, 17 + ry, 10, 7), s.second.main)
        s.add(3, tube(arm, 5, 5.5), s.second.main)
    x, y = s.turn * 5, 2 - head_ry * .72
    s.add(5, ellipse(x, y, head_rx, head_ry), colours.main, s.pattern(x, y, head_rx, head_ry), colours.dark)
    s.head = (x, y, head_rx, head_ry)
    s.tail = (rx * .6, 30)
    s.wings = [(-rx * .7, 10, 0), (rx * .7, 10, 0)]
    s.spine = [(rx * .8, 6, 1.1), (rx, 16, 1.4), (rx, 27, 1.7)]


def plan_quadruped(s: Sketch) -> None:
    """Lay out a critter on four legs, seen from the side, its head turned to the viewer."""
    colours = s.first
    rx, ry, leg = s.between(24, 31), s.between(14, 19), s.between(11, 20)
    head_rx, head_ry = s.between(21, 26), s.between(18, 22)
    for x, near in ((-.62, True), (-.2, False), (.38, True), (.8, False)):
        path = [(x * rx, 18), (x * rx, 18 + leg / 2), (x * rx - 1, 16 + leg)]
        s.add(3 if near else 1, tube(path, 6.5, 6.8), s.second.main if near else s.second.dark)
    belly = (ellipse(0, 14 + ry, rx * .8, ry * .75), s.belly)
    s.add(2, ellipse(0, 12, rx, ry), colours.main, [*s.pattern(4, 12, rx, ry), belly], colours.dark)
    s.turn = -.16
    x, y = -rx * .72, s.between(-17, -8)
    s.add(5, ellipse(x, y, head_rx, head_ry), colours.main, s.pattern(x, y, head_rx, head_ry), colours.dark)
    s.head = (x, y, head_rx, head_ry)
    s.tail = (rx * .85, 6)
    s.wings = [(6, 4, 4), (0, 2, 0)]
    s.spine = [(rx * a, 12 - ry * math.sqrt(1 - a * a), a * .8) for a in (.15, .5, .82)]


def plan_bird(s: Sketch) -> None:
    """Lay out an egg-shaped critter on two legs, with a beak."""
    colours = s.first
    rx, ry, radius = s.between(23, 30), s.between(22, 27), s.between(20, 24)
    x = -4 + s.turn * 10
    feet = colours.accent if colours is s.second else s.second.main
    for side in (-.45, .45):
        s.add(1, [tube([(side * rx, 28), (side * rx, 36)], 3, 3), ellipse(side * rx - 2, 39, 8, 4.5)], feet)
    belly = (ellipse(x * .6 - 4, 20, rx * .72, ry * .72), s.belly)
    s.add(5, [ellipse(0, 10, rx, ry, -.2), ellipse(x, -14, radius, radius)], colours.main,
          [*s.pattern(x, -14, radius, radius), belly], colours.dark)
    s.head = (x, -14, radius, radius)
    s.beak = True
    s.tail = (rx * .7, 20)
    s.wings = [(-rx * .75, 8, 0), (rx * .62, 8, 6)]
    s.spine = [(rx * .75, -4, .8), (rx * .95, 6, 1.2), (rx, 16, 1.5)]


def plan_serpent(s: Sketch) -> None:
    """Lay out a critter of two coils and a raised neck."""
    colours = s.first
    bend, head_rx, head_ry = s.between(-7, 7), s.between(22, 27), s.between(18, 22)
    s.add(1, ellipse(2, 33, 33, 11.5), colours.main, [(ellipse(2, 43, 30, 8), s.belly)], colours.dark)
    s.add(2, ellipse(3, 21, 25, 11), colours.main, [(ellipse(3, 30, 22, 7.5), s.belly)], colours.dark)
    neck = np.array([(8, 20), (10 + bend, 4), (-2, -14)])
    s.add(3, tube(neck, 12, 11), colours.main, [(tube(neck - (5, -2), 6.5, 6), s.belly)])
    x, y = -4 + s.turn * 6, s.between(-22, -16)
    s.add(5, ellipse(x, y, head_rx, head_ry), colours.main, s.pattern(x, y, head_rx, head_ry), colours.dark)
    s.head = (x, y, head_rx, head_ry)
    s.tail = (28, 30)
    s.wings = [(-4, 6, 0), (16 + bend / 2, 6, 0)]
    s.spine = [(18 + bend * .6, -4, 1.2), (21 + bend, 5, 1.4), (24, 14, 1.3)]


BODY_PLANS = {plan_blob: 1.0, plan_biped: 1.2, plan_quadruped: 1.2, plan_bird: 0.5, plan_serpent: 0.7}  # frequencies
FLYING_BIRD = 3.0  # the frequency of plan_bird for a type that flies
