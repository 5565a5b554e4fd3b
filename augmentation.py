"""Augmentation: more pictures out of few, without a mark on what the network draws.

    x_0, told = augment(images, generator, "full")      # `python dataset.py FOLDER` draws what it does

The network is told what was done to each picture and is asked for pictures to which nothing was done; rotations bring
in no black corner, and changes of colour leave white as white as it was.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

AUGMENT_DIM = 5  # what the network is told: angle, brightness, contrast, saturation, hue
AUGMENT_MODES = ("full", "flip", "none", "untold")
MAX_ANGLE = math.radians(15)


def augment(images: torch.Tensor, generator: torch.Generator | None = None, mode: str = "full",
            u: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 `[B, 3, S, S]` to (x_0 float32 `[B, 3, S, S]` in [-1, 1], told float32 `[B, 5]` in [-1, 1]).

    Modes: "none"; "flip", a mirror image with probability 1/2; "full", also with probability 1/2 each a rotation of up
    to 15 degrees, and a jitter of brightness, contrast, saturation (up to 20 % each) and hue (up to 5 % of the circle).

    Non-leaking augmentation (Karras et al. 2022, "EDM", appendix F.2): the network is told in `told` what was done,
    (angle / 15 degrees counter-clockwise, brightness, contrast, saturation, hue), zeros where nothing was, and zeros
    when sampling: so samples are neither tilted nor tinted. A mirror image is not told: it is as good as the original.

    "untold" is "full" without that: the network is told nothing, and learns that creatures lean and change their tint.
    It is there to be compared with.

    Every call draws B x 8 numbers from `generator`, whatever the mode, on the generator's device (else the images'); or
    they are given as `u`, uniform in [0, 1), where the images are part of a larger batch.
    An image that is not rotated is not resampled: it leaves as it came. Nothing here makes the host wait for a GPU.
    """
    if mode not in AUGMENT_MODES:
        raise ValueError(f"mode is one of {', '.join(AUGMENT_MODES)}, not {mode!r}")
    if u is None:
        device = images.device if generator is None else generator.device
        u = torch.rand(len(images), 8, generator=generator, device=device)
    u = u.to(images.device, non_blocking=images.is_cuda)
    coin, amount = u[:, :3] < 0.5, 2 * u[:, 3:] - 1  # three decisions [B, 3], five amounts [B, 5] in [-1, 1)
    told = torch.zeros_like(amount)
    _, rotated, jittered = coin[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1] each
    if mode != "none":
        images = torch.where(is_mirrored(u)[:, None, None, None], images.flip(-1), images)
    x = images.float() / 255
    if mode in ("full", "untold"):
        told = amount * torch.cat([coin[:, 1:2], coin[:, 2:].expand(-1, 4)], dim=1)
        x = torch.where(rotated, _rotate(x, amount[:, 0] * MAX_ANGLE), x)
        x = torch.where(jittered, _jitter(x, amount[:, 1:]), x)
    return 2 * x - 1, torch.zeros_like(told) if mode == "untold" else told


def is_mirrored(u: torch.Tensor) -> torch.Tensor:
    """Which images the numbers `u` [B, 8] of `augment` have mirrored, where its mode allows it; bool [B]."""
    return u[:, 0] < 0.5


def _rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate x `[B, 3, S, S]` in [0, 1] counter-clockwise by `angle` `[B]`, radians, without a black corner."""
    size = x.shape[-1]
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], dim=-1)  # [B, 3, 4S]
    background = border.sort(-1).values[:, :, 2 * size, None]  # the median; [B, 3, 1]
    plain = ((border - background).abs() < 16 / 255).all(1).float().mean(-1) > 2 / 3  # [B]: one colour all around?
    # What comes in at the corners: the picture's own background, which does not smear a creature that touches the
    # edge, or the mirrored picture where there is no such colour. Zero is the background from here to the last line.
    x = x - background[..., None]
    pad = math.ceil(size * (math.cos(MAX_ANGLE) + math.sin(MAX_ANGLE) - 1) / 2) + 1
    around = (pad,) * 4
    x = torch.where(plain[:, None, None, None], F.pad(x, around), F.pad(x, around, mode="reflect"))
    # Where each pixel of the result comes from: the inverse rotation, with y pointing down, -1 ... 1 across the padded
    # picture. Not F.affine_grid, whose matrix product would lose its precision to TF32 or autocast.
    centre = (2 * torch.arange(size, device=x.device) + 1 - size) / (size + 2 * pad)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    grid = torch.stack([cos * centre - sin * centre[:, None], sin * centre + cos * centre[:, None]], dim=-1)
    # Rounding can leave [0, 1] by 1e-8, and a gamma curve of a negative number is NaN: so clamp.
    return (F.grid_sample(x, grid, align_corners=False) + background[..., None]).clamp(0, 1)


def _jitter(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Change the colours of x `[B, 3, H, W]` in [0, 1] by `amount` `[B, 4]` in [-1, 1]; black and white stay exact.

    The two curves fix 0 and 1; the two others add a term that is exactly zero for every grey. So a white background
    stays white to the last bit.
    """
    brightness, contrast, saturation, hue = amount[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1] each
    x = x ** 1.2 ** -brightness  # a gamma curve
    x = x + 0.4 * contrast * x * (1 - x) * (2 * x - 1)  # an S-curve that changes the slope at mid-grey by 20 %
    r, g, b = x.split(1, dim=1)
    luma = g + 0.299 * (r - g) + 0.114 * (b - g)  # written so that a grey's luma is that grey exactly
    x = x + 0.2 * saturation * (x - luma)
    # Rodrigues' rotation about the grey axis (1, 1, 1) / sqrt(3): x + (1 - cos) (mean - x) + sin k cross x
    r, g, b = x.split(1, dim=1)
    mean = g + ((r - g) + (b - g)) / 3
    angle = 2 * math.pi * 0.05 * hue
    x = x - (1 - angle.cos()) * (x - mean) + angle.sin() / math.sqrt(3) * torch.cat([b - g, r - b, g - r], dim=1)
    return x.clamp(0, 1)
