"""Checkpoints of tiny untrained models, whose random weights make every part of the network matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from forward_diffusion import NoiseScheduler
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.space import LatentSpace
from unet import UNet, UNetConfig
from utils.checkpoint import save_checkpoint


def save_tiny_model(path: Path, types: Sequence[str] = (), *, prediction: str = "v", schedule: str = "cosine",
                    latent: bool = False, multipliers: Sequence[int] = (1, 2), **settings) -> Path:
    """Write a model of 16x16 images and 100 timesteps, in pixels or in latents of 4x4."""
    torch.manual_seed(3)
    sizes = AutoencoderConfig(width=8, groups=4, decoder_blocks=1, mean_colours=True)
    autoencoder = Autoencoder(sizes) if latent else None
    net = UNet(UNetConfig(channels=autoencoder.channels if latent else 3, width=8, multipliers=tuple(multipliers),
                          blocks=1, groups=4, num_types=len(types)))
    content = {}
    randomise(net)
    if latent:
        randomise(autoencoder)
        autoencoder.mean.fill_(0.3)
        autoencoder.std.fill_(0.5)
        autoencoder.largest.fill_(3.5)
        content["autoencoder"] = LatentSpace(autoencoder).state()
    save_checkpoint(path, ema=net.state_dict(), network=dict(kind="unet", config=asdict(net.config)), types=list(types),
                    scheduler=NoiseScheduler(100, schedule=schedule).config(), held_out=[], epoch=3, step=12, **content,
                    config=dict(data="critters", image_size=16, prediction=prediction, multipliers=tuple(multipliers),
                                sampler="sde-dpm++", sample_steps=20, run_name="tiny") | settings)
    return path


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Draw all weights anew, also those that start at 0 or 1, so that each layer keeps the size of its input."""
    for part in module.parameters():
        if part.dim() > 1:
            part.copy_(torch.randn(part.shape) / part[0].numel() ** 0.5)
        else:
            part.add_(0.1 * torch.randn(part.shape))
