"""The two spaces in which a diffusion can run: pixels, and the latents of a small autoencoder.

    codec = make_codec(None)                # pixels; or of an autoencoder, from what a checkpoint holds of it
    x_0 = codec.encode(images)              # [B, 3, S, S] in [-1, 1] -> [B, codec.channels, S / codec.factor, ...]
    images = codec.decode(x_0)

Both have the same methods, so that training, samplers and scripts never ask which of the two they work in.
`autoencoder.py` trains the second; DIFFUSION_THEORY.md says why latents, and what they cost.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from augmentation import AUGMENT_DIM, augment, is_mirrored
from devices import autocast, memory_format

# A batch of the data set, and its random numbers u [B, 8] -> (x_0, what the network is told of the augmentation).
Prepared = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Pixels:
    """The pictures themselves."""

    channels, factor, limit = 3, 1, 1.0  # limit: where a sampler keeps x_0
    notes = ()  # what to know of the bits that evaluate.py measures

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """Of one picture's x_0."""
        return self.channels, image_size, image_size

    def measure(self, dataset: Dataset, precision: str) -> None:
        """Look at the pictures to be learned, for what depends on them: of pixels, nothing."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, x_0: torch.Tensor) -> torch.Tensor:
        return x_0

    def prepare(self, dataset: Dataset, mode: str, precision: str) -> tuple[Dataset, Prepared]:
        """The data set to draw batches from, and what makes x_0 of them; `mode` is one of AUGMENT_MODES."""
        return dataset, lambda images, u: augment(images, mode=mode, u=u)

    def saved(self) -> None:
        """What a checkpoint holds of it; `make_codec` builds it again."""

    def fingerprint(self) -> str:
        """The same for the same space."""
        return "pixels"

    def to(self, *_, **__) -> Pixels:
        return self


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
        self.notes = (f"The bits are those of latents, {config.channels} numbers for each {config.factor} x "
                      f"{config.factor} pixels in 256 levels each, and not of colour values: compare them among models "
                      f"of one autoencoder alone.",)

        c = config.width
        layers = [nn.PixelUnshuffle(2), nn.Conv2d(12, c, 3, padding=1)]
        for level, width in enumerate(config.widths):
            if level > 0:
                layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * c, width, 1)]
            layers += [Block(width, config.groups) for _ in range(config.encoder_blocks)]
            c = width
        self.encoder = nn.Sequential(*layers, *norm_conv(c, 2 * config.channels, config.groups))

        layers = [nn.Conv2d(config.channels, c, 3, padding=1)]
        for level, width in enumerate(reversed(config.widths)):
            if level > 0:
                layers += [nn.Conv2d(c, 4 * width, 1), nn.PixelShuffle(2)]
            layers += [Block(width, config.groups) for _ in range(config.decoder_blocks)]
            c = width
        self.decoder = nn.Sequential(*layers, *norm_conv(c, 12, config.groups), nn.PixelShuffle(2))

        # Of the means over the training pictures, see `measure`.
        self.register_buffer("mean", torch.zeros(config.channels, 1, 1))
        self.register_buffer("std", torch.ones(config.channels, 1, 1))
        self.register_buffer("largest", torch.ones(()))

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of q(z | image), float32, as the encoder has them: not normalised."""
        mean, log_variance = self.encoder(images).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)  # so that its exp stays a number, whatever the first steps do

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For training: the reconstruction from a draw of the posterior, and the posterior's mean and log variance.

        `noise` is standard normal, [B, channels, H / factor, W / factor].
        """
        mean, log_variance = self.posterior(images)
        return self.decoder(mean + (log_variance / 2).exp() * noise), mean, log_variance

    @torch.no_grad()
    def measure(self, dataset: Dataset, precision: str, most: int = 500) -> None:
        """Set what normalises the latents: the mean and deviation of each channel, and the largest number there is,
        over the pictures to be learned, or `most` of them. And say how well these pictures come back."""
        device, means, psnrs = self.mean.device, [], []
        chosen = torch.linspace(0, len(dataset) - 1, min(most, len(dataset))).round().long()
        for indices in tqdm(chosen.split(32), desc="measuring latents", unit="batch", delay=2, leave=False):
            images, _ = augment(dataset.__getitems__(indices.tolist())[0].to(device), mode="none")
            # Each process measures for itself, and all must find the same: no choice of kernels by trying them.
            with autocast(device, precision), torch.backends.cudnn.flags(enabled=True, deterministic=True):
                means.append(self.posterior(images)[0])
                psnrs.append(psnr(self.decoder(means[-1]).float().clamp(-1, 1), images))
        means = torch.cat(means)
        self.mean.copy_(means.mean(dim=(0, 2, 3))[:, None, None])
        self.std.copy_(means.std(dim=(0, 2, 3))[:, None, None].clamp(min=1e-6))
        self.largest.copy_(((means - self.mean) / self.std).abs().max())
        size, side = images.shape[-1], means.shape[-1]
        print(f"latents    {self.channels} x {side} x {side} for 3 x {size} x {size}, from which the pictures come "
              f"back with a PSNR of {torch.cat(psnrs).mean():.1f} dB")

    @property
    def limit(self) -> float:
        """No number of the latents was larger than this over the pictures that `measure` saw."""
        return self.largest.item()

    def shape(self, image_size: int) -> tuple[int, int, int]:
        return self.channels, image_size // self.factor, image_size // self.factor

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The normalised mean of the posterior: its deviation is small, and a mean can be kept and used again."""
        return (self.posterior(images.to(self.mean.device))[0] - self.mean) / self.std

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

        if mode not in ("none", "flip") or dataset.images is None:
            return dataset, encode

        # Pictures as they are and, where they are wanted, their mirror images: what `augment` does is decided by these.
        ways = torch.tensor([[0.99], [0.0]][: 1 + (mode == "flip")], device=device).expand(-1, 8)
        encoded = copy.copy(dataset)
        encoded.images = torch.empty(len(dataset), len(ways), *self.shape(dataset.image_size))
        for part in tqdm(torch.arange(len(dataset)).split(32), desc="encoding", unit="batch", delay=2, leave=False):
            for way, u in enumerate(ways):
                encoded.images[part, way] = encode(dataset.images[part], u.expand(len(part), 8))[0].cpu()

        def pick(latents: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = (is_mirrored(u) & (mode != "none")).long().to(latents.device)
            return latents[torch.arange(len(latents), device=latents.device), chosen], u.new_zeros(len(u), AUGMENT_DIM)

        return encoded, pick

    def saved(self) -> dict[str, Any]:
        return dict(config=asdict(self.config), weights=self.state_dict())

    def fingerprint(self) -> str:
        """Of its weights, but not of what `measure` found: --init may go on with other pictures, a little rescaled."""
        weights = b"".join(part.detach().float().cpu().numpy().tobytes() for part in self.parameters())
        return hashlib.sha256(weights).hexdigest()


class Block(nn.Module):
    """GroupNorm, SiLU, conv, twice; added to the input."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.layers = nn.Sequential(*norm_conv(width, width, groups), *norm_conv(width, width, groups))
        nn.init.zeros_(self.layers[-1].weight)  # each block starts as nothing, so that a deep network starts shallow
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def norm_conv(c_in: int, c_out: int, groups: int) -> list[nn.Module]:
    """GroupNorm, SiLU, conv."""
    return [nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)]


def make_codec(saved: dict[str, Any] | None, device: str | torch.device = "cpu") -> Pixels | Autoencoder:
    """From what a checkpoint holds at "autoencoder". Here, and nowhere else, it is asked whether there is one.

    Raises:
        ValueError: if the parts do not fit each other, or a weight is not a finite number.
    """
    if saved is None:
        return Pixels()
    try:
        config, weights = AutoencoderConfig(**saved["config"]), saved["weights"]
        if len(config.multipliers) * (config.encoder_blocks + config.decoder_blocks) > len(weights):
            raise ValueError("an autoencoder that would take for ever to build")
        with torch.device("meta"):  # shapes without memory, as in checkpoint.load_model
            shapes = {name: part.shape for name, part in Autoencoder(config).state_dict().items()}
        if shapes != {name: part.shape for name, part in weights.items()}:
            raise ValueError("weights of another autoencoder")
        codec = Autoencoder(config)
        codec.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError("an incomplete autoencoder") from error
    if not all(torch.isfinite(part).all() for part in codec.state_dict().values()):
        raise ValueError("weights that are not finite")
    if not (codec.std > 0).all() or not codec.largest > 0:
        raise ValueError("latents without a spread")
    return codec.to(device, memory_format=memory_format(torch.device(device))).eval().requires_grad_(False)


def psnr(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image [B, 3, H, W] in [-1, 1], in dB; 100 and above are equal to the eye."""
    error = ((images - originals) / 2).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-12).log10()
