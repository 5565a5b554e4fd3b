"""Schedule of a run: epochs, milestones, sample grids, last step."""

from __future__ import annotations

import math

from training.config import TrainingConfig
from training.grids import GRID_NAME


class Timetable:
    """The plan of a run over `num_images` images. Step numbers count the steps that are done.

    Attributes:
        steps_per_epoch: the last batch of an epoch is filled up, see training/batches.py.
        total_steps: of all epochs, over which a cosine learning rate falls.
        last_step: where this run ends: `total_steps`, or earlier with --max_steps.
    """

    def __init__(self, config: TrainingConfig, num_images: int):
        self.config = config
        self.steps_per_epoch = math.ceil(num_images / config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)

    def epoch(self, step: int) -> int:
        """Return the number of epochs that are complete."""
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0

    def is_milestone(self, step: int) -> bool:
        """Whether a checkpoint of this step is kept; the last step's is final_model.pt instead."""
        return 0 < step < self.total_steps and self._ends_one_of(step, self.config.milestone_every)

    def shows_progress(self, step: int) -> bool:
        """Whether a sample grid is drawn and the loss curve updated."""
        return step == self.last_step or self._ends_one_of(step, self.config.sample_every)

    def _ends_one_of(self, step: int, every: int) -> bool:
        epoch = self.epoch(step)
        return self.ends_epoch(step) and (epoch % every == 0 or epoch in self.config.milestones)

    def grid_name(self, step: int) -> str:
        return GRID_NAME.format(math.ceil(step / self.steps_per_epoch))

    def milestone_name(self, step: int) -> str:
        return f"epoch_{self.epoch(step):04d}.pt"
