"""seed_from: different positions give different seeds, and the values never change."""

from __future__ import annotations

import numpy as np
import torch

from utils.seeding import seed_from


def test_seeds_are_distinct_and_stable():
    positions = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (5, 1), (5 + 2**32,), (2**64 - 1, 3), (-2, 3), (-3, 3)]
    seeds = [seed_from(*position) for position in positions]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_from(np.int32(-5), torch.tensor(1)) == seed_from(-5, 1)
    assert seed_from(1, 2) == 4013407976395716621  # with other values, old runs could not be resumed
