"""What takes part in a race: a network and its training, which is timed step by step, and which draws samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

# The quick preset of train.py; tests/test_race.py holds one against the other.
QUICK_TRAINING = dict(batch_size=16, lr=2.5e-3, lr_schedule="cosine", warmup_steps=100, ema_decay=0.999)
QUICK_LOSS = dict(augment="flip", prediction="v", lognormal=(-0.8, 1.0))
QUICK_NETWORK = dict(width=32, multipliers=(1, 2, 2), blocks=1, groups=8)
QUICK_SCHEDULE = "cosine"
QUICK_GUIDANCE = dict(guide_at=0.3, guidance=3.0)
MANY_STEPS = 10**9  # more than any race makes


class Contender(ABC):
    """A network and its training on the images of a race.

    Attributes:
        samplers: the samplers that may serve it best, the recommended one first.
        net: the network that is trained, for its number of parameters.
        batch_size: images per step.
        fits_time: the learning rate falls to 0 over the time of the race, so that every number of minutes is a training
            of its own. Other contenders keep their own schedule, and are looked at on the way.
    """

    samplers: tuple[str, ...]
    net: nn.Module
    batch_size = 16
    fits_time = True

    @abstractmethod
    def step(self, number: int, progress: float) -> None:
        """Make training step `number`; `progress`, from 0 to 1, is the part of the time that has passed."""

    @abstractmethod
    def draw(self, sampler: str, count: int, seed: int) -> torch.Tensor:
        """Return a batch of samples, uint8 [count, 3, S, S]."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what `load_state` needs to go on, tensors and plain values."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state`."""


def planned_steps(number: int, progress: float) -> int:
    """Return how many steps a race will have, from the part of its time that has passed after `number` of them."""
    return max(number + 1, round(number / progress)) if progress > 0 else MANY_STEPS
