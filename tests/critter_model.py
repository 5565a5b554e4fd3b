"""A checkpoint of an untrained model of critters, for the tests of the tools that measure such models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from critters import TYPES
from forward_diffusion import NoiseScheduler
from unet import UNet, UNetConfig
from utils.checkpoint import save_checkpoint


def save_critter_model(path: Path, class_names: Sequence[str] = TYPES, **settings) -> Path:
    """Write a model of 16x16 images and 20 timesteps with random weights.

    The weights that belong to a type are the same in any order of `class_names`.
    """
    torch.manual_seed(3)
    net = UNet(UNetConfig(width=8, multipliers=(1,), blocks=1, groups=4, num_types=len(TYPES)))
    weights = {name: torch.randn(weight.shape) / weight[0].numel() ** 0.5 if weight.dim() > 1 else weight
               for name, weight in net.state_dict().items()}  # no zeros, or the types would change nothing
    weights["type_vectors.weight"] = 10 * weights["type_vectors.weight"][:, [TYPES.index(name) for name in class_names]]
    save_checkpoint(path, ema=weights, network=dict(kind="unet", config=asdict(net.config)), types=list(class_names),
                    scheduler=NoiseScheduler(20, schedule="cosine").config(), held_out=[],
                    config=dict(prediction="v", image_size=16, **settings))
    return path


def save_other_model(path: Path) -> Path:
    """Write a model of cats."""
    net = UNet(UNetConfig(width=8, multipliers=(1,), blocks=1, groups=4, num_types=1))
    save_checkpoint(path, ema=net.state_dict(), network=dict(kind="unet", config=asdict(net.config)), types=["cat"],
                    scheduler=NoiseScheduler(20).config(), held_out=[], config=dict(prediction="eps", image_size=16))
    return path
