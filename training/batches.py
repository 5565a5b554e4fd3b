"""Training batches: which images each step takes, and the loader that reads them.

The batch of a step is a function of (seed, step) alone. A resumed run therefore sees the batches of an uninterrupted
one, with any number of worker processes.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from training.dataset import ImageFolder
from utils.seeding import seed_from


class ShuffledBatches(Sampler):
    """The indices of each training step's images, as a pure function of (seed, step).

    An epoch has ceil(num_images / batch_size) steps and visits every image, in an order drawn from (seed, epoch). Every
    batch is full: the last one of an epoch is filled up from the front of the epoch's order. Iteration yields the
    batches of the steps first_step ... last_step - 1, without end if last_step is None.

    Args:
        rank_slice: the part of each batch that iteration yields, for one process of several.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, first_step: int = 0, last_step: int | None = None,
                 rank_slice: slice = slice(None)):
        self.num_images, self.batch_size, self.seed, self.rank_slice = num_images, batch_size, seed, rank_slice
        self.first_step, self.last_step = first_step, last_step
        self.steps_per_epoch = math.ceil(num_images / batch_size)
        self._order_epoch, self._order = -1, torch.empty(0)  # the order of the latest epoch, drawn once

    def batch(self, step: int) -> list[int]:
        """Return the `batch_size` image indices of `step`, counted from 0 at the start of the run."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._order_epoch:
            generator = torch.Generator().manual_seed(seed_from(self.seed, epoch, stream="order"))
            self._order_epoch, self._order = epoch, torch.randperm(self.num_images, generator=generator)
        first = step_in_epoch * self.batch_size
        positions = torch.arange(first, first + self.batch_size) % self.num_images
        return self._order[positions].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        steps = itertools.count(self.first_step) if self.last_step is None else range(self.first_step, self.last_step)
        return (self.batch(step)[self.rank_slice] for step in steps)

    def __len__(self) -> int:
        if self.last_step is None:
            raise TypeError("batches without end have no length")
        return max(0, self.last_step - self.first_step)


def make_loader(dataset: ImageFolder, batch_size: int, seed: int, first_step: int = 0, last_step: int | None = None,
                workers: int = 0, rank_slice: slice = slice(None), pin_memory: bool = False) -> DataLoader:
    """Load the batches of the steps first_step ... last_step - 1 (see `ShuffledBatches`).

    A batch is (images, labels) as the data set has them: images uint8 [B, 3, S, S], or latents [B, W, C, h, w], see
    `encode_dataset`; labels uint8 [B, K]. Only the `rank_slice` of each batch is read. The batches are the same for any
    number of workers, which decode files and draw no random number.

    Args:
        workers: processes; -1: one a core, at most 8. None are used for images in memory.
        pin_memory: for training on CUDA alone, since pinned memory makes a CUDA context.
    """
    if workers < 0:
        workers = min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    batches = ShuffledBatches(len(dataset), batch_size, seed, first_step, last_step, rank_slice)
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=_unchanged, pin_memory=pin_memory,
        num_workers=0 if dataset.images is not None else workers, worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # its own, so that starting a loader does not draw from torch's global one
    )


def _unchanged(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Collate nothing: `ImageFolder.__getitems__` returns whole batches."""
    return batch


def _outlive_signals(worker: int) -> None:
    """Keep a worker alive through Ctrl-C and the first SIGTERM.

    Both often reach all processes at once, and the training process finishes its step first, for which it needs its
    workers; it ends them itself. A second SIGTERM counts, since Python ends with one the processes left at exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
