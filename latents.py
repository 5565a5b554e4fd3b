"""The two spaces in which a diffusion can run: pixels, and the latents of a small autoencoder.

    codec = make_codec(None)                # pixels; or of an autoencoder, from what a checkpoint holds of it
    x_0 = codec.encode(images)              # [B, 3, S, S] in [-1, 1] -> [B, codec.channels, S / codec.factor, ...]
    images = codec.decode(x_0)

Both have the same methods, so that training, samplers and scripts never ask which of the two they work in.
`autoencoder.py` trains the second; DIFFUSION_THEORY.md says why latents, and what they cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from augmentation import AUGMENT_DIM, augment, is_mirrored

# A batch of the data set, and its random numbers u [B, 8] -> (x_0, what the network is told of the augmentation).
Prepared = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Pixels:
    """The pictures themselves."""

    channels, factor, limit = 3, 1, 1.0

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """Of one picture's x_0."""
        return self.channels, image_size, image_size

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, x_0: torch.Tensor) -> torch.Tensor:
        return x_0

    def prepare(self, dataset: Dataset, mode: str) -> tuple[Dataset, Prepared]:
        """The data set to draw batches from, and what makes x_0 of them; `mode` is one of AUGMENT_MODES."""
        return dataset, lambda images, u: augment(images, mode=mode, u=u)

    def saved(self) -> None:
        """What a checkpoint holds of it; `make_codec` builds it again."""


@dataclass
class AutoencoderConfig:
    """All that the autoencoder's size follows from."""

    width: int = 32  # channels at the first level, which has half of the picture's resolution
    multipliers: tuple[int, ...] = (1, 2)  # of the width, one a level; each level halves the resolution
    encoder_blocks: int = 1  # residual blocks a level
    decoder_blocks: int = 2
    groups: int = 8  # of the group normalisations
    channels: int = 4  # of the latents

    def __post_init__(self):
        self.multipliers = tuple(self.multipliers)
        if min(self.width, self.encoder_blocks, self.decoder_blocks, self.groups, self.channels,
               *self.multipliers) < 1 or not self.multipliers:
            raise ValueError(f"every size of the autoencoder must be at least 1: {self}")
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
        """A picture's side is so many times that of its latents."""
        return 2 ** len(self.multipliers)


class Autoencoder(nn.Module):
    """A convolutional variational autoencoder (Kingma & Welling 2014): pictures to latents, and back.

    The encoder answers with a Gaussian for each number of the latents, the decoder with the picture that such numbers
    stand for. No convolution runs at the picture's own resolution: the first thing that happens is that squares of
    2 x 2 pixels become channels, and the last that channels become pixels again (Shi et al. 2016). So it is cheap.

    Shapes:
        images: [B, 3, H, W] in [-1, 1]; H and W multiples of `factor`.
        latents: [B, channels, H / factor, W / factor], with mean 0 and variance 1 in each channel over the pictures
            that `measure` saw, and no number beyond `limit` there.
    """

    def __init__(self, config: AutoencoderConfig | None = None):
        super().__init__()
        self.config = config = config or AutoencoderConfig()
        self.channels, self.factor = config.channels, config.factor

        layers, c = [], 3
        for width in config.widths:
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * c, width, 3, padding=1)]
            layers += [Block(width, config.groups) for _ in range(config.encoder_blocks)]
            c = width
        self.encoder = nn.Sequential(*layers, *head(c, 2 * config.channels, config.groups))

        layers, c = [nn.Conv2d(config.channels, config.widths[-1], 3, padding=1)], config.widths[-1]
        for finer in (*config.widths[-2::-1], 3):
            layers += [Block(c, config.groups) for _ in range(config.decoder_blocks)]
            layers += head(c, 4 * finer, config.groups) + [nn.PixelShuffle(2)]
            c = finer
        self.decoder = nn.Sequential(*layers)

        # Of the means over the training pictures, see `measure`.
        self.register_buffer("mean", torch.zeros(config.channels, 1, 1))
        self.register_buffer("std", torch.ones(config.channels, 1, 1))
        self.register_buffer("largest", torch.ones(()))

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of q(z | image), float32, as the encoder has them: not normalised."""
        mean, log_variance = self.encoder(images).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)  # within what exp can take in bfloat16's company

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For training: the reconstruction from a draw of the posterior, and the posterior's mean and log variance.

        `noise` is standard normal, [B, channels, H / factor, W / factor].
        """
        mean, log_variance = self.posterior(images)
        return self.decoder(mean + (log_variance / 2).exp() * noise), mean, log_variance

    @torch.no_grad()
    def measure(self, batches: Iterable[torch.Tensor]) -> None:
        """Set what normalises the latents: the mean and deviation of each channel, and the largest number there is."""
        means = torch.cat([self.posterior(images)[0] for images in batches])
        self.mean.copy_(means.mean(dim=(0, 2, 3))[:, None, None])
        self.std.copy_(means.std(dim=(0, 2, 3))[:, None, None].clamp(min=1e-6))
        self.largest.copy_(((means - self.mean) / self.std).abs().max())

    @property
    def limit(self) -> float:
        """No number of the latents was larger than this over the pictures that `measure` saw."""
        return self.largest.item()

    def shape(self, image_size: int) -> tuple[int, int, int]:
        return self.channels, image_size // self.factor, image_size // self.factor

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The normalised mean of the posterior: its deviation is small, and a mean can be kept and used again."""
        return (self.posterior(images)[0] - self.mean) / self.std

    @torch.no_grad()
    def decode(self, x_0: torch.Tensor) -> torch.Tensor:
        return self.decoder(x_0 * self.std + self.mean).float().clamp(-1, 1)

    def prepare(self, dataset: Dataset, mode: str, precision: str) -> tuple[Dataset, Prepared]:
        """As in `Pixels`. Where a picture is only ever itself or its mirror image, both are encoded here, once and for
        all; where it comes in endless variety, or the pictures do not fit in memory, each is encoded as it comes."""
        device = self.mean.device

        def encode(images: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, told = augment(images.to(device), mode=mode, u=u)
            with autocast(device, precision):
                return self.encode(x.contiguous(memory_format=memory_format(device))), told

        if mode == "full" or dataset.images is None:
            return dataset, encode

        both = []  # [n, 2, channels, h, w] of each batch: pictures as they are, and their mirror images
        ways = torch.tensor([[0.99], [0.0]], device=device).expand(-1, 8)  # what `augment` does is decided by these
        for images in tqdm(dataset.images.split(32), desc="encoding", unit="batch", delay=2, leave=False):
            both.append(torch.stack([encode(images, u.expand(len(images), 8))[0].cpu() for u in ways], dim=1))
        encoded = copy.copy(dataset)
        encoded.images = torch.cat(both)

        def pick(latents: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = (is_mirrored(u) & (mode != "none")).long().to(latents.device)
            return latents[torch.arange(len(latents)), chosen], u.new_zeros(len(u), AUGMENT_DIM)

        return encoded, pick

    def saved(self) -> dict[str, Any]:
        return dict(config=asdict(self.config), weights=self.state_dict())


class Block(nn.Module):
    """GroupNorm, SiLU, conv, twice; added to the input."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.layers = nn.Sequential(*head(width, width, groups), *head(width, width, groups))
        nn.init.zeros_(self.layers[-1].weight)  # each block starts as nothing, so that a deep network starts shallow
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def head(c_in: int, c_out: int, groups: int) -> list[nn.Module]:
    return [nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)]


def make_codec(saved: dict[str, Any] | None) -> Pixels | Autoencoder:
    """From what a checkpoint holds at "autoencoder". Here, and nowhere else, it is asked whether there is one.

    Raises:
        ValueError: if the parts do not fit each other, or a weight is not finite.
    """
    if saved is None:
        return Pixels()
    ...
