"""Image descriptors, on images for which they are known."""

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from evaluation.features import image_descriptors


def noisy(images: torch.Tensor, levels: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + levels * noise).round().clamp(0, 255).to(torch.uint8)


def test_descriptors_measure_what_their_names_say():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, :, :, 16:] = 255  # an upright edge ...
    images[1, :, 16:] = 255  # ... and a level one
    layout, colours, gradients, _ = image_descriptors(images)
    assert layout.shape == (2, 192) and gradients.shape == (2, 288)
    assert (colours**2).sum(dim=1) == pytest.approx([1, 1]) and (colours > 0).sum(dim=1).tolist() == [2, 2]
    strength = gradients.view(2, 3, 6, 16).sum(dim=(1, 3))
    assert strength[0].argmax() == 0 and strength[1].argmax() == 3  # directions of the gradient: across, and down
    assert (strength > 1e-4).sum(dim=1).tolist() == [1, 1]
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    sharpness = image_descriptors(torch.cat([images[:1], gaussian_blur(images[:1], 5, 1.0), grey, noisy(grey, 4)]))[3]
    assert (sharpness[1] <= sharpness[0]).all() and sharpness[1, 1] < sharpness[0, 1] - 0.5
    assert (sharpness[3, :2] > sharpness[2, :2] + 1).all()
