"""What lets an image depend on its seed alone, whatever batch it is drawn in: its noise, and the shape of batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from reverse_diffusion import slerp
from utils.device import autocast, memory_format
from utils.seeding import seed_from


def seeded_noise(seeds: Iterable[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Return x_T, standard normal [B, *shape] on the CPU, image i from seeds[i] alone, equal on every device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def seeded_steps(x_T: torch.Tensor, seeds: Sequence[int], toward: tuple[int, Sequence[float]] | None
                 ) -> Callable[[], torch.Tensor]:
    """Return a function that draws the noise of the next step, shaped as x_T, image i from seeds[i] alone.

    Args:
        toward: see `Pipeline.sample`.
    """
    def noises(seeds: Sequence[int]) -> Callable[[], torch.Tensor]:
        # Not seeded with the seed itself, which made x_T: the first step's noise would repeat x_T.
        generators = [torch.Generator().manual_seed(seed_from(seed, stream="steps")) for seed in seeds]
        return lambda: torch.stack([torch.randn(x_T.shape[1:], generator=generator, dtype=x_T.dtype)
                                    for generator in generators])

    draw = noises(seeds)
    draw_end = noises([toward[0]]) if toward else None

    def draw_noise() -> torch.Tensor:
        noise = draw()
        if draw_end is not None:
            noise = slerp(noise, draw_end(), torch.tensor(toward[1], dtype=x_T.dtype).view(-1, 1, 1, 1))
        if x_T.is_cuda:  # from pinned memory nothing waits: the CPU draws while the GPU is busy with its pass
            noise = noise.pin_memory()
        return noise.to(x_T.device, non_blocking=x_T.is_cuda)

    return draw_noise


@torch.no_grad()
def in_full_batches(precision: str, function: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """Call `function` on inputs whose rows are repeated up to a full batch.

    On a CPU an image's last bits differ where a batch is no multiple of 4, because its rows are summed in another
    order, and below 16 with a single thread, because PyTorch then chooses another 1x1 convolution. So rows are repeated
    up to a multiple of 8 (twice what was found necessary), or 16.
    """
    n, device, multiple = len(inputs[0]), inputs[0].device, 16 if torch.get_num_threads() == 1 else 8
    rows = torch.arange(math.ceil(n / multiple) * multiple, device=device) % n
    x, *others = (part[rows] for part in inputs)
    with autocast(device, precision):
        return function(x.contiguous(memory_format=memory_format(device)), *others)[:n]
