"""critters/recognizer.py: it names the types of critters that it was not fitted to, and no types that are not there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from critters import TYPES, draw_critter
from critters.recognizer import CritterRecognizer, colour_fractions, oklab


@pytest.fixture(scope="module")
def recognizer() -> CritterRecognizer:
    return CritterRecognizer(32, count=500)


def drawn(types: tuple[str, ...], count: int, seed: int) -> np.ndarray:
    return np.stack([np.asarray(draw_critter(i, 32, seed, types)[0]) for i in range(count)])


def test_single_types(recognizer):
    for name in TYPES:
        recognized = recognizer.types(drawn((name,), 20, seed=77), count=1)
        assert recognized.count({name}) >= 19, name


def test_pairs(recognizer):
    correct = [recognizer.types(drawn(pair, 2, seed=78), count=2).count(set(pair))
               for pair in itertools.permutations(TYPES, 2)]
    assert sum(correct) >= 0.97 * 2 * len(correct)


def test_two_types_are_not_seen_in_one(recognizer):
    """The second score of a single type stays far below that of a pair's second type."""
    single = np.sort(recognizer.scores(drawn(("water",), 20, seed=79)), axis=1)[:, -2]
    pair = np.sort(recognizer.scores(drawn(("water", "fire"), 20, seed=79)), axis=1)[:, -2]
    assert single.max() < pair.min()


def test_colours_matter(recognizer):
    """Swapped channels make another type: red fire becomes blue."""
    swapped = drawn(("fire",), 20, seed=80)[..., ::-1]
    assert recognizer.types(swapped, count=1).count({"fire"}) == 0


def test_fractions_do_not_depend_on_the_other_images(recognizer):
    images = drawn(("ice", "dark"), 70, seed=81)  # more than are computed at a time
    together = colour_fractions(images)
    assert together.shape == (70, 5 * len(TYPES) + 1)
    assert np.allclose(together[[0, 69]], colour_fractions(images[[0, 69]]))
    assert np.allclose((together[:, :-1] ** 2).sum(axis=1), 1) and (together[:, -1] == 1).all()


def test_oklab():
    assert np.allclose(oklab(np.array([[255, 255, 255], [0, 0, 0]])), [[1, 0, 0], [0, 0, 0]], atol=1e-6)
    assert np.allclose(oklab(np.array([255, 0, 0])), [0.62796, 0.22486, 0.12585], atol=1e-4)  # Ottosson's table of sRGB
