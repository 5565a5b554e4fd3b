"""The losses: what a network is trained to minimise, and the random numbers that a step needs for it.

    loss = DiffusionLoss(scheduler, space, image_size=64, precision="bf16")
    randomness = loss.draw_randomness(16, generator, step=0)   # augmentation, timesteps, noise, label dropout
    value = loss(net, images, labels, *randomness)             # scalar

All losses have these two methods, so the training step does not distinguish them; those of train.py also have
`parameter_groups`. ConsistencyLoss, which tunes a model to few steps, is in training/consistency.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from forward_diffusion import NoiseScheduler
from models.space import LatentSpace, PixelSpace
from training.augment import AUGMENT_RAND_DIM, augment, choose_fixed, describe, fixed_augmentations
from utils.device import autocast


@dataclass
class DiffusionLoss:
    """The denoising loss (Ho et al. 2020, algorithm 1); train.py's settings explain the fields."""

    scheduler: NoiseScheduler
    space: PixelSpace | LatentSpace
    image_size: int
    precision: str
    augment: str = "full"
    prediction: str = "eps"
    loss_weighting: str = "uniform"
    label_dropout: float = 0.1
    lognormal: tuple[float, ...] = ()

    def parameter_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """Return Adam's parameter groups. One with "rate" has that multiple of `config.lr`, which does not change."""
        return [dict(params=net.parameters())]

    def draw_randomness(self, batch_size: int, generator: torch.Generator, step: int) -> tuple[torch.Tensor, ...]:
        """Draw, for each image, the augmentation [B, 8], timestep [B], noise [B, C, H, W] and keep_label [B, 1]."""
        options = dict(generator=generator, device=generator.device)
        augment_rand = torch.rand(batch_size, AUGMENT_RAND_DIM, **options)
        t = self.draw_timesteps(batch_size, generator, step)
        noise = torch.randn(batch_size, *self.space.shape(self.image_size), **options)
        keep_label = torch.rand(batch_size, 1, **options) >= self.label_dropout
        return augment_rand, t, noise, keep_label

    def draw_timesteps(self, batch_size: int, generator: torch.Generator, step: int) -> torch.Tensor:
        """Draw the timesteps [B] of a step."""
        if self.lognormal:
            return draw_lognormal_timesteps(batch_size, self.scheduler, *self.lognormal, generator)
        return draw_timesteps(batch_size, self.scheduler.num_timesteps, generator)

    def __call__(self, net: nn.Module, images: torch.Tensor, labels: torch.Tensor, augment_rand: torch.Tensor,
                 t: torch.Tensor, noise: torch.Tensor, keep_label: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean squared error of the network's prediction.

        For eps with uniform weights it is eq. 14 of Ho et al. (2020). Labels are zeroed where `keep_label` is false, so
        that the network also learns the unconditional prediction (Ho & Salimans 2022).

        Args:
            images: as the data set yields them, uint8 [B, 3, S, S] or encoded latents.
            labels: multi-hot [B, K].
        """
        x_0, augment_labels = to_x_0(images, augment_rand, self.augment, self.space, self.precision)
        error = self.error(net, x_0, t, noise, labels * keep_label, augment_labels)
        return (error * self.scheduler.loss_weight(self.loss_weighting, self.prediction, t)).mean()

    def error(self, net: nn.Module, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor,
              augment_labels: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error [B] of the prediction for each image."""
        x_t = self.scheduler.add_noise(x_0, t, noise)
        with autocast(x_t.device, self.precision):
            output = net(x_t, t, labels, augment_labels=augment_labels)
        target = self.scheduler.target(self.prediction, x_0, t, noise)
        return F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3))


def to_x_0(images: torch.Tensor, augment_rand: torch.Tensor, mode: str, space: PixelSpace | LatentSpace,
           precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a batch of the data set into what the network learns to denoise.

    Args:
        images: uint8 [B, 3, S, S], which are augmented and encoded; or float [B, W, C, h, w] of `encode_dataset`, of
            which one of the `fixed_augmentations` is chosen.
        augment_rand: [B, AUGMENT_RAND_DIM], see `augment`.
        mode: one of AUGMENT_MODES.
        precision: of the encoder's arithmetic.

    Returns:
        x_0: float32 [B, *space.shape(S)].
        augment_labels: float32 [B, AUGMENT_DIM], see `augment`.
    """
    if images.dtype == torch.uint8:
        if space.is_latent:
            images = images.to(space.device)
        x, augment_labels = augment(images, mode=mode, augment_rand=augment_rand)
        return space.encode(x, precision), augment_labels

    # Encoded before: choose a version of each.
    number = images.shape[1]
    versions = _fixed_versions(mode, number, images.device)
    version = choose_fixed(augment_rand, number).to(images.device)
    return images[torch.arange(len(images), device=images.device), version].float(), describe(versions[version], mode)


@functools.lru_cache(maxsize=8)  # a step copies nothing from the host: a CUDA graph could not be recorded then
def _fixed_versions(mode: str, number: int, device: torch.device) -> torch.Tensor:
    return fixed_augmentations(mode, number - 2).to(device)


def draw_timesteps(batch_size: int, num_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Draw timesteps [B] in 0 ... T-1, stratified: one in each of B equal parts of the range.

    Images come in random order, so each one's timestep is still uniform and the expected loss is unchanged; its
    variance falls (in the manner of Kingma et al. 2021, whose strata share one random offset).
    """
    u = _stratified(batch_size, generator)
    return (u * num_timesteps).long().clamp(max=num_timesteps - 1)  # in float32, u can round up to 1


def draw_lognormal_timesteps(batch_size: int, scheduler: NoiseScheduler, mean: float, std: float,
                             generator: torch.Generator) -> torch.Tensor:
    """Draw timesteps [B], stratified, whose noise levels have a log-normal distribution (Karras et al. 2022, table 1).

    Args:
        mean, std: of log(noise / signal), see `NoiseScheduler.log_noise_levels`. For pixels in [-1, 1] that is the
            logarithm of their sigma, whose mean is -1.2. In EDM2 (Karras et al. 2024) latents have the deviation 0.5
            and the mean is -0.4; here latents have that deviation beside mean colours, which have 1, as have all
            channels of an autoencoder without them: there it would be 0.3.
    """
    normal = torch.special.ndtri(_stratified(batch_size, generator))
    levels = scheduler.log_noise_levels(normal.device)
    return torch.searchsorted(levels, mean + std * normal).clamp(max=scheduler.num_timesteps - 1)


def _stratified(batch_size: int, generator: torch.Generator) -> torch.Tensor:
    u = torch.rand(batch_size, generator=generator, device=generator.device)
    return (torch.arange(batch_size, device=generator.device) + u) / batch_size


@dataclass
class AutoencoderLoss:
    """Reconstruction plus KL divergence; the settings of tools/train_autoencoder.py explain the fields."""

    latent_shape: tuple[int, int, int]
    precision: str
    augment: str = "full"
    edge_weight: float = 1.0
    kl_weight: float = 1e-3
    latent_noise: float = 0.0

    def draw_randomness(self, batch_size: int, generator: torch.Generator, step: int) -> tuple[torch.Tensor, ...]:
        """Draw, for each image, the augmentation, the noise of its latents, and the deviation of further noise.

        Shapes: [B, 8], [B, *latent_shape], [B, 1, 1, 1].
        """
        options = dict(generator=generator, device=generator.device)
        augment_rand = torch.rand(batch_size, AUGMENT_RAND_DIM, **options)
        noise = torch.randn(batch_size, *self.latent_shape, **options)
        return augment_rand, noise, self.latent_noise * torch.rand(batch_size, 1, 1, 1, **options)

    def __call__(self, net: nn.Module, images: torch.Tensor, labels: torch.Tensor, augment_rand: torch.Tensor,
                 noise: torch.Tensor, extra_std: torch.Tensor) -> torch.Tensor:
        """Return the loss for images uint8 [B, 3, S, S]; labels are not used.

        The reconstruction error is the mean absolute error of the colours plus that of the differences between
        neighbours, which are large at edges and zero within an area of one colour (DIFFUSION_THEORY.md, "The first
        term, and why edges are in it"). The KL divergence is that of the posterior from a standard normal distribution,
        per latent value (Kingma & Welling 2014, appendix B). With `latent_noise` the decoder also learns to ignore
        small errors of latents, such as a diffusion leaves in its samples.
        """
        x, _ = augment(images, mode=self.augment, augment_rand=augment_rand)
        with autocast(x.device, self.precision):
            output, mean, log_variance = net(x, noise, extra_std)
        error = output.float() - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return error.abs().mean() + self.edge_weight * edges + self.kl_weight * kl
