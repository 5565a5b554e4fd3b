"""Image statistics, on images for which they are known."""

import pytest
import torch

from critters import draw_critters
from evaluation.image_statistics import image_statistics
from evaluation.memorization import warp_uint8


def creature() -> torch.Tensor:
    """A grey creature of 16 x 16 pixels in the middle of a white 32 x 32 background, uint8 [3, 32, 32]."""
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    image[:, 8:24, 8:24] = 128
    return image


def test_statistics_measure_what_their_names_say():
    plain = creature()
    tinted, pale, dark = plain.clone(), plain.clone(), plain.clone()
    tinted[2] = tinted[2] // 2
    pale[:] = 255 - (255 - plain) // 2
    dark[:, :, 0] = dark[:, :, -1] = dark[:, 0] = dark[:, -1] = 102
    statistics = image_statistics(torch.stack([plain, tinted, pale, dark]))
    assert statistics["border"].tolist() == pytest.approx([1, 1 - 1 / 6, 1, 0.4], abs=0.01)
    assert statistics["brightness"][0].item() == pytest.approx(0.75 + 0.25 * 128 / 255, abs=1e-3)
    assert statistics["contrast"][2].item() == pytest.approx(statistics["contrast"][0].item() / 2, rel=0.02)
    assert statistics["saturation"][0] == 0 and statistics["saturation"][1] > 0.3
    assert statistics["red_to_blue"].tolist() == pytest.approx([0, statistics["saturation"][1].item(), 0, 0], abs=1e-5)


def test_leaked_rotations_increase_the_tilt():
    drawn = torch.from_numpy(draw_critters(100, 32, 0)[0]).permute(0, 3, 1, 2)
    angle = 30 * torch.rand(100, generator=torch.Generator().manual_seed(0)) - 15
    leaked = warp_uint8(drawn, torch.stack([torch.ones(100), angle, torch.zeros(100), torch.zeros(100)], dim=1))
    before, after = image_statistics(drawn)["tilt"], image_statistics(leaked)["tilt"]
    assert after.mean() > before.mean() + 2 * (before.var() / 100 + after.var() / 100).sqrt()


def test_the_tilt_is_the_angle_of_rotation():
    upright = creature()
    upright[:, 10:14, 10:14] = upright[:, 10:14, 18:22] = 0
    rotated = warp_uint8(upright[None], torch.tensor([[1.0, 12.0, 0.0, 0.0]]))
    assert image_statistics(upright[None])["tilt"].item() == 0 and image_statistics(rotated)["tilt"].item() == 12
