"""Non-leaking augmentation: more images out of few, and samples that show none of it.

    x_0, augment_labels = augment(images, generator, "full")      # `python -m tools.preview_data FOLDER` shows it

The network is conditioned on what was done to each image (Karras et al. 2022, "EDM", appendix F.2), and samples are
drawn for "nothing was done". Rotations bring in no black corner; the colour jitter leaves white and black exact.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

AUGMENT_MODES = ("full", "flip", "none")
AUGMENT_DIM = 5  # columns of `augment_labels`: angle, brightness, contrast, saturation, hue
MAX_ANGLE = math.radians(15)

# Columns of `augment_rand`, which holds uniform random numbers in [0, 1): three decisions, each "yes" below 1/2, then
# an amount for each column of `augment_labels`.
AUGMENT_RAND_DIM = 8
MIRROR, ROTATE, JITTER = 0, 1, 2
AMOUNTS = slice(3, AUGMENT_RAND_DIM)


def augment(images: torch.Tensor, generator: torch.Generator | None = None, mode: str = "full",
            augment_rand: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert images to the network's range, augmented at random.

    An image that is not rotated is not resampled. Nothing here makes the host wait for a GPU.

    Args:
        images: uint8 [B, 3, S, S].
        generator: draws `augment_rand` if that is not given, on its own device; the same number in every mode.
        mode: "none"; "flip": mirrored with probability 1/2; "full": also, with probability 1/2 each, a rotation of up
            to 15 degrees, and a jitter of brightness, contrast, saturation (up to 20 % each) and hue (up to 5 % of the
            colour circle).
        augment_rand: [B, AUGMENT_RAND_DIM], uniform in [0, 1), with the columns above.

    Returns:
        x_0: float32 [B, 3, S, S] in [-1, 1].
        augment_labels: float32 [B, AUGMENT_DIM] in [-1, 1], what was done: angle / 15 degrees counter-clockwise,
            brightness, contrast, saturation, hue; 0 where nothing was. Mirroring has no column: a mirror image is as
            good a sample as the original.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in AUGMENT_MODES:
        raise ValueError(f"mode is one of {', '.join(AUGMENT_MODES)}, not {mode!r}")
    if augment_rand is None:
        device = images.device if generator is None else generator.device
        augment_rand = torch.rand(len(images), AUGMENT_RAND_DIM, generator=generator, device=device)
    augment_rand = augment_rand.to(images.device, non_blocking=images.is_cuda)

    # Mirror.
    if mode != "none":
        images = torch.where(_per_image(is_mirrored(augment_rand)), images.flip(-1), images)
    x = images.float() / 255

    # Rotate, change colours.
    augment_labels = describe(augment_rand, mode)
    if mode == "full":
        rotated, jittered = _is_rotated(augment_rand), _is_jittered(augment_rand)
        x = torch.where(_per_image(rotated), _rotate(x, augment_labels[:, 0] * MAX_ANGLE), x)
        x = torch.where(_per_image(jittered), _jitter(x, augment_labels[:, 1:]), x)
    return 2 * x - 1, augment_labels


def describe(augment_rand: torch.Tensor, mode: str = "full") -> torch.Tensor:
    """Return the `augment_labels` of `augment`, float32 [B, AUGMENT_DIM]."""
    amounts = 2 * augment_rand[:, AMOUNTS] - 1
    if mode != "full":
        return torch.zeros_like(amounts)
    rotated, jittered = _is_rotated(augment_rand), _is_jittered(augment_rand)
    return amounts * torch.stack([rotated, jittered, jittered, jittered, jittered], dim=1)


def is_mirrored(augment_rand: torch.Tensor) -> torch.Tensor:
    """Return which images `augment` mirrors in the modes "flip" and "full", bool [B]."""
    return augment_rand[:, MIRROR] < 0.5


def _is_rotated(augment_rand: torch.Tensor) -> torch.Tensor:
    return augment_rand[:, ROTATE] < 0.5


def _is_jittered(augment_rand: torch.Tensor) -> torch.Tensor:
    return augment_rand[:, JITTER] < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# augmentations that are made once, where what follows them costs more than the memory for their results


def fixed_augmentations(mode: str, count: int = 0) -> torch.Tensor:
    """Return `augment_rand` [W, AUGMENT_RAND_DIM] of W augmentations for every image.

    They are the image itself; in the modes "flip" and "full" its mirror image; and in the mode "full" `count` others,
    of which each third is rotated, jittered, or both.
    """
    plain = torch.full((1, AUGMENT_RAND_DIM), 0.5)  # "no" to each decision
    mirrored = plain.clone()
    mirrored[:, MIRROR] = 0
    others = torch.rand(count if mode == "full" else 0, AUGMENT_RAND_DIM, generator=torch.Generator().manual_seed(0))
    third = torch.arange(len(others)) % 3
    others[:, ROTATE] = torch.where(third == 1, 0.5, 0.0)
    others[:, JITTER] = torch.where(third == 0, 0.5, 0.0)
    return plain if mode == "none" else torch.cat([plain, mirrored, others])


def choose_fixed(augment_rand: torch.Tensor, number: int) -> torch.Tensor:
    """Choose for each image one of the W = `number` `fixed_augmentations`, as often as `augment` makes its kind.

    Returns:
        Their indices, int64 [B].
    """
    version = is_mirrored(augment_rand).long().clamp(max=number - 1)
    if number > 2:
        changed = _is_rotated(augment_rand) | _is_jittered(augment_rand)
        other = 2 + (augment_rand[:, AMOUNTS.start] * (number - 2)).long().clamp(max=number - 3)
        version = torch.where(changed, other, version)
    return version


def _per_image(values: torch.Tensor) -> torch.Tensor:
    """Reshape [B] to [B, 1, 1, 1], to broadcast over images."""
    return values[:, None, None, None]


def _rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, 3, S, S] in [0, 1] counter-clockwise by `angle` [B], radians, without black corners.

    The corners take the image's own background, which does not smear a creature that touches the edge, or the reflected
    image where the border has no such colour.
    """
    # Find the background: the median of the border, if more than 2/3 of the border are near it.
    size = x.shape[-1]
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], dim=-1)  # [B, 3, 4S]
    background = border.sort(-1).values[:, :, 2 * size, None]  # [B, 3, 1]
    has_background = ((border - background).abs() < 16 / 255).all(1).float().mean(-1) > 2 / 3  # [B]

    # Pad, with the background as zero from here to the last line.
    x = x - background[..., None]
    width = math.ceil(size * (math.cos(MAX_ANGLE) + math.sin(MAX_ANGLE) - 1) / 2) + 1
    padding = (width, width, width, width)
    x = torch.where(_per_image(has_background), F.pad(x, padding), F.pad(x, padding, mode="reflect"))

    # Sample at the inverse rotation of each pixel; y points down, and -1 ... 1 spans the padded image. F.affine_grid
    # would do this with a matrix product, which loses precision to TF32 or autocast.
    centre = (2 * torch.arange(size, device=x.device) + 1 - size) / (size + 2 * width)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    grid = torch.stack([cos * centre - sin * centre[:, None], sin * centre + cos * centre[:, None]], dim=-1)
    # Rounding can leave [0, 1] by 1e-8, and the gamma curve of a negative number is NaN: clamp.
    return (F.grid_sample(x, grid, align_corners=False) + background[..., None]).clamp(0, 1)


def _jitter(x: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Change the colours of x [B, 3, H, W] in [0, 1] by `amounts` [B, 4] in [-1, 1].

    Brightness and contrast are curves that fix 0 and 1; saturation and hue add a term that is exactly zero for any
    grey. A white background therefore stays white to the last bit.
    """
    brightness, contrast, saturation, hue = amounts[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1] each
    # Brightness: a gamma curve. Contrast: an S-curve that changes the slope at mid-grey by up to 20 %.
    x = x ** 1.2 ** -brightness
    x = x + 0.4 * contrast * x * (1 - x) * (2 * x - 1)
    # Saturation: away from the luma, written so that the luma of a grey is exactly that grey.
    r, g, b = x.split(1, dim=1)
    luma = g + 0.299 * (r - g) + 0.114 * (b - g)
    x = x + 0.2 * saturation * (x - luma)
    # Hue: Rodrigues' rotation about the grey axis k = (1, 1, 1) / sqrt(3), x + (1 - cos) (mean - x) + sin (k cross x).
    r, g, b = x.split(1, dim=1)
    mean = g + ((r - g) + (b - g)) / 3
    angle = 2 * math.pi * 0.05 * hue
    x = x - (1 - angle.cos()) * (x - mean) + angle.sin() / math.sqrt(3) * torch.cat([b - g, r - b, g - r], dim=1)
    return x.clamp(0, 1)
