"""Seeds that depend on a position (run, step, image), never on what was drawn before."""

from __future__ import annotations

import numpy as np


def seed_from(*integers: int, stream: str = "") -> int:
    """Hash integers (a run's seed, a step, ...) and the name of a stream into one 63-bit seed.

    A resumed run, or one with more workers, therefore draws the numbers of an uninterrupted one. The stream ("order",
    "step", ...) separates uses whose integers may coincide.
    """
    # SeedSequence takes 32-bit words and ignores trailing zeros: two words for each integer, their number in front.
    words = [len(integers)] + [int(i) >> shift & 0xFFFFFFFF for i in integers for shift in (0, 32)]
    words += stream.encode()
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
