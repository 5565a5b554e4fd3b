"""Tests of recognise.py: it names the types of critters that it was not fitted to, and does not see types in anything.

    python -m pytest tests/test_recognise.py
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from critters import TYPES, draw_critter  # noqa: E402
from recognise import CritterRecogniser, oklab  # noqa: E402


@pytest.fixture(scope="module")
def recogniser() -> CritterRecogniser:
    return CritterRecogniser(32)


def drawn(types: tuple[str, ...], count: int, seed: int) -> np.ndarray:
    return np.stack([np.asarray(draw_critter(i, 32, seed, types)[0]) for i in range(count)])


def test_single_types(recogniser):
    for name in TYPES:
        found = recogniser.types(drawn((name,), 20, seed=77), count=1)
        assert found.count({name}) >= 19, name


def test_pairs(recogniser):
    right = [recogniser.types(drawn(pair, 2, seed=78), count=2).count(set(pair))
             for pair in itertools.permutations(TYPES, 2)]
    assert sum(right) >= 0.97 * 2 * len(right)


def test_two_types_are_not_seen_in_one(recogniser):
    """The second score of a single type stays far below that of a pair's second type."""
    single = np.sort(recogniser.scores(drawn(("water",), 20, seed=79)), axis=1)[:, -2]
    pair = np.sort(recogniser.scores(drawn(("water", "fire"), 20, seed=79)), axis=1)[:, -2]
    assert single.max() < pair.min()


def test_the_colours_matter(recogniser):
    """Pictures whose channels were swapped are not what they were: red fire becomes blue."""
    swapped = drawn(("fire",), 20, seed=80)[..., ::-1]
    assert recogniser.types(swapped, count=1).count({"fire"}) == 0


def test_oklab():
    assert np.allclose(oklab(np.array([[255, 255, 255], [0, 0, 0]])), [[1, 0, 0], [0, 0, 0]], atol=1e-6)
    assert np.allclose(oklab(np.array([255, 0, 0])), [0.62796, 0.22486, 0.12585], atol=1e-4)  # Ottosson's table of sRGB
