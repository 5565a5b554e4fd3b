"""A small convolutional autoencoder: images to a few numbers for each square of pixels, and back.

`python -m tools.train_autoencoder` trains it, on the images that the diffusion will learn and on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

DETAIL_DEVIATION = 0.5  # of normalised latents beside mean colours


@dataclass
class AutoencoderConfig:
    """The size of the autoencoder."""

    width: int = 32  # channels at the first level, which has half of the image's resolution
    multipliers: tuple[int, ...] = (1, 2)  # of the width, one a level; each level halves the resolution
    encoder_blocks: int = 1  # residual blocks a level
    decoder_blocks: int = 2
    groups: int = 8  # of the group normalisations
    channels: int = 4  # of the latents
    mean_colours: bool = False  # the first three channels are mean colours; False, as in files that do not say

    def __post_init__(self):
        self.multipliers = tuple(self.multipliers)
        sizes = (self.width, self.encoder_blocks, self.decoder_blocks, self.groups, self.channels, *self.multipliers)
        if min(sizes) < 1 or not self.multipliers:
            raise ValueError(f"every size of the autoencoder must be at least 1: {self}")
        if self.mean_colours and self.channels < 3:
            raise ValueError(f"mean colours need at least 3 channels, not {self.channels}; "
                             f"--no_mean_colours does without them")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"a level of {width} channels cannot be normalised in {self.groups} groups; "
                                 f"choose a width that is a multiple of {self.groups}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the finest."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def factor(self) -> int:
        """Side of an image in units of the side of its latents."""
        return 2 ** len(self.multipliers)


class Autoencoder(nn.Module):
    """A variational autoencoder (Kingma & Welling 2014).

    The encoder predicts a Gaussian for each latent value, the decoder an image from such values. No convolution runs at
    the image's own resolution, which keeps it cheap: squares of 2 x 2 pixels become channels at the start, and channels
    become pixels at the end (Shi et al. 2016).

    With `mean_colours` the first three channels are the mean colours of each factor x factor square: a small image, as
    smooth as the large one. They bypass the encoder, which learns what they lack, and the decoder adds to them (a
    residual, in the manner of DC-AE, Chen et al. 2024). Normalised, the other channels have half the deviation, so that
    noise hides details before it hides colours.

    Shapes:
        images: [B, 3, H, W] in [-1, 1]; H and W multiples of `factor`.
        latents: [B, channels, H / factor, W / factor].
    """

    def __init__(self, config: AutoencoderConfig | None = None):
        super().__init__()
        self.config = config = config or AutoencoderConfig()
        self.channels, self.factor = config.channels, config.factor

        # Encoder: from the finest level to the coarsest.
        c = config.width
        layers = [nn.PixelUnshuffle(2), nn.Conv2d(12, c, 3, padding=1)]
        for level, width in enumerate(config.widths):
            if level > 0:
                layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * c, width, 1)]
            layers += [Block(width, config.groups) for _ in range(config.encoder_blocks)]
            c = width
        self.encoder = nn.Sequential(*layers, *norm_conv(c, 2 * config.channels, config.groups))

        # Decoder: back again.
        layers = [nn.Conv2d(config.channels, c, 3, padding=1)]
        for level, width in enumerate(reversed(config.widths)):
            if level > 0:
                layers += [nn.Conv2d(c, 4 * width, 1), nn.PixelShuffle(2)]
            layers += [Block(width, config.groups) for _ in range(config.decoder_blocks)]
            c = width
        self.decoder = nn.Sequential(*layers, *norm_conv(c, 12, config.groups), nn.PixelShuffle(2))

        # Statistics of the posterior means over the training images, by which latents are normalised.
        self.register_buffer("mean", torch.zeros(config.channels, 1, 1))
        self.register_buffer("std", torch.ones(config.channels, 1, 1))
        self.register_buffer("largest", torch.ones(()))  # absolute normalised value

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return the shape of one image's latents."""
        return self.channels, image_size // self.factor, image_size // self.factor

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log variance of q(z | image), float32, not normalised."""
        mean, log_variance = self.encoder(images).float().chunk(2, dim=1)
        if self.config.mean_colours:
            colours = F.avg_pool2d(images.float(), self.factor)
            mean = torch.cat([colours, mean[:, 3:]], dim=1)
        return mean, log_variance.clamp(-20, 10)  # keeps its exp finite in the first steps of a training

    def forward(self, images: torch.Tensor, noise: torch.Tensor, extra_std: torch.Tensor | float = 0.0
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the reconstruction from a draw of the posterior, and the posterior's mean and log variance.

        Args:
            noise: standard normal, in the shape of the latents.
            extra_std: deviation of further noise on the latents as these images alone would normalise them; a number,
                or [B, 1, 1, 1].
        """
        mean, log_variance = self.posterior(images)
        std = (log_variance.exp() + (extra_std * self.latent_std(mean.detach())) ** 2).sqrt()
        return self.reconstruct(mean + std * noise), mean, log_variance

    def reconstruct(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the images of latents that are not normalised; neither clipped."""
        images = self.decoder(latents)
        if self.config.mean_colours:
            colours = F.interpolate(latents[:, :3].float(), scale_factor=float(self.factor), mode="bilinear")
            images = images.float() + colours
        return images

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return the normalised posterior mean, on the network's device."""
        return (self.posterior(images.to(self.mean.device))[0] - self.mean) / self.std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the images of normalised latents, clipped to [-1, 1]."""
        return self.reconstruct(latents * self.std + self.mean).float().clamp(-1, 1)

    def set_normalisation(self, means: torch.Tensor) -> None:
        """Set the statistics from posterior means [N, channels, h, w]."""
        self.mean.copy_(means.mean(dim=(0, 2, 3))[:, None, None])
        self.std.copy_(self.latent_std(means))
        self.largest.copy_(((means - self.mean) / self.std).abs().max())

    def latent_std(self, means: torch.Tensor) -> torch.Tensor:
        """Return what normalising divides latents by [channels, 1, 1], from posterior means [N, channels, h, w]."""
        std = means.std(dim=(0, 2, 3), correction=0)[:, None, None].clamp(min=1e-6)
        if self.config.mean_colours:
            std[3:] /= DETAIL_DEVIATION
        return std


class Block(nn.Module):
    """Residual block: GroupNorm, SiLU, convolution, twice."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.layers = nn.Sequential(*norm_conv(width, width, groups), *norm_conv(width, width, groups))
        nn.init.zeros_(self.layers[-1].weight)  # each block starts as the identity
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def norm_conv(c_in: int, c_out: int, groups: int) -> list[nn.Module]:
    """Return GroupNorm, SiLU and a 3x3 convolution."""
    return [nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)]
