"""The space in which a diffusion runs: pixels, or the latents of an autoencoder.

    space = space_from_state(checkpoint.get("autoencoder"))
    x_0 = space.encode(images)              # [B, 3, S, S] in [-1, 1] -> [B, channels, S / factor, S / factor]
    images = space.decode(x_0)

Both spaces have the same methods, so sampling does not distinguish them; training asks `is_latent` where encoding costs
something. DIFFUSION_THEORY.md explains latents and their cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models.autoencoder import Autoencoder, AutoencoderConfig
from utils.checkpoint import CheckpointError, build_module, load_checkpoint
from utils.device import autocast, memory_format
from utils.images import psnr


class PixelSpace:
    """The images themselves.

    Attributes:
        channels, factor: channels of x_0, and the side of an image in units of the side of x_0.
        latent_range: samplers keep x_0 within plus and minus this number.
        notes: what a reader should know of likelihoods that are measured here.
    """

    is_latent = False
    channels, factor, latent_range = 3, 1, 1.0
    notes: tuple[str, ...] = ()

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """Return the shape of one image's x_0."""
        return self.channels, image_size, image_size

    def encode(self, images: torch.Tensor, precision: str | None = None) -> torch.Tensor:
        """Return x_0 of images [B, 3, S, S] in [-1, 1]: the images."""
        return images

    def decode(self, x_0: torch.Tensor) -> torch.Tensor:
        """Return the images [B, 3, S, S] of x_0."""
        return x_0

    def state(self) -> None:
        """Return what a checkpoint stores; `space_from_state` is the inverse."""

    def fingerprint(self) -> str:
        """Return a string that is equal for equal spaces."""
        return "pixels"

    def to(self, *_: Any, **__: Any) -> PixelSpace:
        return self


class LatentSpace:
    """The normalised latents of an autoencoder.

    Latents have mean 0 and variance 1 in each channel, and no value beyond `latent_range`, over the images that
    `measure` saw; beside mean colours (AutoencoderConfig), the other channels have the deviation DETAIL_DEVIATION.
    """

    is_latent = True

    def __init__(self, autoencoder: Autoencoder):
        self.autoencoder = autoencoder
        self.channels, self.factor = autoencoder.channels, autoencoder.factor
        self.notes = (
            f"Bits are per latent value, {self.channels} values for each {self.factor} x {self.factor} pixels, in 256 "
            f"levels each, not per colour value: compare them only between models of one autoencoder.",)

    @property
    def device(self) -> torch.device:
        return self.autoencoder.mean.device

    @property
    def latent_range(self) -> float:
        return self.autoencoder.largest.item()

    def shape(self, image_size: int) -> tuple[int, int, int]:
        return self.autoencoder.latent_shape(image_size)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, precision: str | None = None) -> torch.Tensor:
        """Return x_0 [B, channels, S / factor, S / factor] of images [B, 3, S, S]: the normalised posterior mean.

        The posterior's standard deviation is small, and a mean can be cached. `precision` is that of the encoder's
        arithmetic; None: as in the caller's context.
        """
        if precision is None:
            return self.autoencoder.encode(images)
        with autocast(self.device, precision):
            return self.autoencoder.encode(images.contiguous(memory_format=memory_format(self.device)))

    @torch.no_grad()
    def decode(self, x_0: torch.Tensor) -> torch.Tensor:
        """Return the images [B, 3, S, S] in [-1, 1] of x_0 [B, channels, S / factor, S / factor]."""
        return self.autoencoder.decode(x_0)

    @torch.no_grad()
    def measure(self, batches: Iterable[torch.Tensor], precision: str) -> float:
        """Set mean, deviation and range of the latents from batches of images [B, 3, S, S] in [-1, 1].

        Returns the mean PSNR of the reconstructions, in dB.
        """
        means, psnrs = [], []
        for images in batches:
            images = images.to(self.device)
            # Each process measures for itself and all must agree, so kernels are not chosen by timing them.
            with autocast(self.device, precision), torch.backends.cudnn.flags(enabled=True, deterministic=True):
                means.append(self.autoencoder.posterior(images)[0])
                psnrs.append(psnr(self.autoencoder.reconstruct(means[-1]).float().clamp(-1, 1), images))
        self.autoencoder.set_normalisation(torch.cat(means))
        return torch.cat(psnrs).mean().item()

    def state(self) -> dict[str, Any]:
        return dict(config=asdict(self.autoencoder.config), weights=self.autoencoder.state_dict())

    def fingerprint(self) -> str:
        """Hash the weights, but not the normalisation: `--init` may go on with other images, scaled a little anew."""
        weights = b"".join(part.detach().float().cpu().numpy().tobytes() for part in self.autoencoder.parameters())
        return hashlib.sha256(weights).hexdigest()

    def to(self, *args: Any, **kwargs: Any) -> LatentSpace:
        self.autoencoder.to(*args, **kwargs)
        return self


def space_from_state(state: dict[str, Any] | None, device: str | torch.device = "cpu") -> PixelSpace | LatentSpace:
    """Build the space that a checkpoint stores at "autoencoder": pixels for None.

    Raises:
        ValueError: if the parts do not fit each other, or a weight is not finite.
    """
    if state is None:
        return PixelSpace()
    try:
        config, weights = AutoencoderConfig(**state["config"]), state["weights"]
        if len(config.multipliers) * (config.encoder_blocks + config.decoder_blocks) > len(weights):
            raise ValueError("an autoencoder that would take for ever to build")
        autoencoder = build_module(lambda: Autoencoder(config), weights, "autoencoder")
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError("an incomplete autoencoder") from error
    if not all(torch.isfinite(part).all() for part in autoencoder.state_dict().values()):
        raise ValueError("weights that are not finite")
    if not (autoencoder.std > 0).all() or not autoencoder.largest > 0:
        raise ValueError("latents without a spread")
    autoencoder.to(device, memory_format=memory_format(torch.device(device)))
    return LatentSpace(autoencoder.eval().requires_grad_(False))


def load_space(path: str | Path, device: str | torch.device = "cpu") -> PixelSpace | LatentSpace:
    """Load the autoencoder of a checkpoint, its own or that of a diffusion in its latents; pixels for an empty path.

    Raises:
        CheckpointError: as `load_checkpoint` does, and if there is no autoencoder in it, or one in parts.
    """
    if not path:
        return PixelSpace()
    if not Path(path).is_file():
        raise CheckpointError(f"no autoencoder at {path}; train one with `python -m tools.train_autoencoder` (for "
                              f"critters: with --preset quick)")
    content = load_checkpoint(path)
    if not isinstance(content.get("autoencoder"), dict):
        raise CheckpointError(f"{path} holds no autoencoder; choose the checkpoint of a tools.train_autoencoder run")
    # An autoencoder's own checkpoint has its averaged weights at "ema".
    return checked_space(path, {"weights": content.get("ema"), **content["autoencoder"]}, device)


def checked_space(path: str | Path, state: dict[str, Any] | None, device: str | torch.device = "cpu"
                  ) -> PixelSpace | LatentSpace:
    """Build the space stored in the checkpoint at `path`. Raises CheckpointError if its parts do not fit."""
    try:
        return space_from_state(state, device)
    except ValueError as error:
        raise CheckpointError(f"{path} has an autoencoder that cannot be used ({error}); choose another") from error
