"""Training batches: every epoch visits every image, and a batch depends on (seed, step) alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.batches import ShuffledBatches, make_loader
from training.dataset import ImageFolder


def write_folder(folder: Path, count: int) -> None:
    """Write `count` PNGs 000.png ..., each of one grey level that is its number times 7."""
    for i in range(count):
        Image.new("RGB", (16, 16), (i * 7,) * 3).save(folder / f"{i:03d}.png")


@pytest.mark.parametrize("num_images, batch_size", [(10, 4), (12, 4), (3, 8), (1, 4), (7, 1)])
def test_every_epoch_visits_every_image(num_images, batch_size):
    batches = ShuffledBatches(num_images, batch_size, seed=3, last_step=1000)
    steps = batches.steps_per_epoch
    assert steps == -(-num_images // batch_size)
    for epoch in range(3):
        epoch_batches = [batches.batch(epoch * steps + k) for k in range(steps)]
        assert all(len(batch) == batch_size for batch in epoch_batches)
        visits = np.bincount(np.concatenate(epoch_batches), minlength=num_images)
        assert len(visits) == num_images and visits.min() >= 1 and visits.max() <= visits.min() + 1


def test_the_order_depends_on_seed_and_epoch():
    def epoch(seed, number):
        return ShuffledBatches(50, 50, seed).batch(number)

    orders = [tuple(epoch(seed, number)) for seed in range(4) for number in range(4)]
    assert len(set(orders)) == 16 and tuple(range(50)) not in orders
    torch.manual_seed(123)
    assert tuple(epoch(0, 0)) == orders[0]  # nothing but (seed, epoch) matters


def test_a_resumed_run_sees_the_same_batches():
    whole = list(ShuffledBatches(10, 4, seed=1, first_step=0, last_step=20))
    for first in (1, 3, 7, 20):
        assert list(ShuffledBatches(10, 4, seed=1, first_step=first, last_step=20)) == whole[first:]
    batches = ShuffledBatches(10, 4, seed=1, last_step=20)
    assert [batches.batch(step) for step in reversed(range(20))] == whole[::-1]
    assert len(batches) == 20 and list(batches) == list(batches) == whole
    endless = iter(ShuffledBatches(10, 4, seed=1))
    assert [next(endless) for _ in range(20)] == whole


def test_the_batches_never_change():
    """Otherwise a run of an older version would go on with other images."""
    batches = ShuffledBatches(10, 4, seed=7)
    assert [batches.batch(step) for step in (0, 2, 3, 1000)] == [[7, 5, 4, 6], [2, 1, 7, 5], [9, 0, 7, 8], [7, 5, 3, 0]]


def test_ranks_share_each_batch():
    whole = list(ShuffledBatches(10, 4, seed=1, last_step=6))
    parts = [list(ShuffledBatches(10, 4, seed=1, last_step=6, rank_slice=slice(first, first + 2))) for first in (0, 2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_the_loader_is_the_same_for_any_number_of_workers(tmp_path):
    write_folder(tmp_path, 9)
    (tmp_path / "004.png").write_bytes(b"")

    def batches(first, workers, memory_limit=0):
        return [images for images, _ in make_loader(ImageFolder(tmp_path, 16, memory_limit), 4, 5, first, 7, workers)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = batches(0, 0)
    assert len(alone) == 7 and all(batch.shape == (4, 3, 16, 16) and batch.dtype == torch.uint8 for batch in alone)
    assert len({tuple(batch[:, 0, 0, 0].tolist()) for batch in alone}) == 7
    assert all(torch.equal(a, b) for a, b in zip(alone, batches(0, 2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[3:], batches(3, 2), strict=True))
    assert torch.equal(torch.get_rng_state(), before)  # a loader does not disturb the training's random numbers

    (tmp_path / "004.png").unlink()
    read, kept = batches(0, 0), batches(0, 2, memory_limit=None)
    assert all(torch.equal(a, b) for a, b in zip(read, kept, strict=True))


def test_memory_is_pinned_only_for_training_on_cuda(monkeypatch):
    """Pinning makes a CUDA context of several hundred MB, also for --device cpu."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dataset = ImageFolder.from_array(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    assert not make_loader(dataset, 2, seed=0, last_step=1).pin_memory
    assert make_loader(dataset, 2, seed=0, last_step=1, pin_memory=True).pin_memory
