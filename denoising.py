"""What a diffusion model is taught: to see what was drawn under the noise (Ho et al. 2020, algorithm 1).

    denoising = Denoising(scheduler, prepare, shape=(3, 64, 64), device=device, precision="bf16")
    drawn = denoising.draw(16, generator)                      # how to augment, timesteps, noise, are types told
    loss = denoising.loss(network, images, types, *drawn)      # a number, to be made small
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from devices import autocast
from forward_diffusion import NoiseScheduler
from latents import Prepared


@dataclass
class Denoising:
    """The random part of a training step, and its loss; see the flags of train.py for what the settings mean."""

    scheduler: NoiseScheduler
    prepare: Prepared  # images, numbers -> x_0, what the network is told of their augmentation; see latents.py
    shape: tuple[int, int, int]  # of one x_0
    device: torch.device
    precision: str
    prediction: str = "eps"
    loss_weighting: str = "uniform"
    label_dropout: float = 0.1

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """For each image: how to augment it [B, 8], its timestep [B], its noise [B, *shape], and whether its types are
        told [B, 1]."""
        options = dict(generator=generator, device=generator.device)
        return (torch.rand(batch_size, 8, **options),
                draw_timesteps(batch_size, self.scheduler.num_timesteps, generator),
                torch.randn(batch_size, *self.shape, **options),
                torch.rand(batch_size, 1, **options) >= self.label_dropout)

    def loss(self, network, images, types, u, t, noise, told) -> torch.Tensor:
        """The mean squared error of what the network predicts, for images as the data set has them and types [B, K].

        For eps with uniform weights it is eq. 14 of Ho et al. (2020); `told` leaves the types out where it is false, so
        that the network also learns to answer without (Ho & Salimans 2022).
        """
        x_0, augmentation = self.prepare(images, u)
        x_t = self.scheduler.add_noise(x_0, t, noise)
        with autocast(self.device, self.precision):
            output = network(x_t, t, types * told, augmentation=augmentation)
        target = self.scheduler.target(self.prediction, x_0, t, noise)
        error = F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3))
        return (error * self.scheduler.loss_weight(self.loss_weighting, self.prediction, t)).mean()


def draw_timesteps(batch_size: int, num_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Random timesteps [B] in 0 ... T-1, spread evenly over the batch: one in each of B equal parts of the range.

    Since images come in random order, each one's timestep is still uniform and the mean of the loss stays what it is;
    its variance falls (in the manner of Kingma et al. 2021, whose parts share one random offset).
    """
    u = torch.rand(batch_size, generator=generator, device=generator.device)
    u = (torch.arange(batch_size, device=generator.device) + u) / batch_size
    return (u * num_timesteps).long().clamp(max=num_timesteps - 1)  # in float32, u can round up to 1
