import pytest
import torch

from copies import warp
from critters import draw_critters
from marks import looks, marks


def picture(background: int = 255) -> torch.Tensor:
    """A grey creature of 16x16 pixels in the middle of a plain 32x32 background, uint8 [3, 32, 32]."""
    image = torch.full((3, 32, 32), background, dtype=torch.uint8)
    image[:, 8:24, 8:24] = 128
    return image


def test_each_mark_is_found_where_it_is_planted_and_nowhere_else():
    corner = picture()
    corner[:, -2:, :2] = 0
    speck = picture()
    speck[:, 0, 16] = 0  # a creature's ear may touch the edge
    images = torch.stack([picture(), corner, picture(0) // 4, picture(220), speck])
    found = marks(images)
    assert found["black_corner"].tolist() == [False, True, True, False, False]
    assert found["collapsed"].tolist() == [False, False, True, False, False]
    assert found["clean"].tolist() == [True, False, False, False, True]


def test_the_corner_that_is_dark_may_be_any_of_the_four():
    for rows in (slice(2), slice(-2, None)):
        for columns in (slice(2), slice(-2, None)):
            image = picture()
            image[:, rows, columns] = 20
            assert marks(image[None])["black_corner"].item() and not marks(image[None])["clean"].item()


def test_looks_measure_what_their_names_say():
    plain = picture()
    tinted, pale, dark = plain.clone(), plain.clone(), plain.clone()
    tinted[2] = tinted[2] // 2
    pale[:] = 255 - (255 - plain) // 2
    dark[:, :, 0] = dark[:, :, -1] = dark[:, 0] = dark[:, -1] = 102
    found = looks(torch.stack([plain, tinted, pale, dark]))
    assert found["border"].tolist() == pytest.approx([1, 1 - 1 / 6, 1, 0.4], abs=0.01)
    assert found["brightness"][0].item() == pytest.approx(0.75 + 0.25 * 128 / 255, abs=1e-3)
    assert found["contrast"][2].item() == pytest.approx(found["contrast"][0].item() / 2, rel=0.02)
    assert found["saturation"][0] == 0 and found["saturation"][1] > 0.3
    assert found["red_to_blue"].tolist() == pytest.approx([0, found["saturation"][1].item(), 0, 0], abs=1e-5)


def test_rotations_that_leak_are_seen_as_tilt():
    drawn = torch.from_numpy(draw_critters(100, 32, 0)[0]).permute(0, 3, 1, 2)
    angle = 30 * torch.rand(100, generator=torch.Generator().manual_seed(0)) - 15
    pose = torch.stack([torch.ones(100), angle, torch.zeros(100), torch.zeros(100)], dim=1)
    leaked = (255 * warp(drawn / 255, pose)).round().to(torch.uint8)
    before, after = looks(drawn)["tilt"], looks(leaked)["tilt"]
    assert after.mean() > before.mean() + 2 * (before.var() / 100 + after.var() / 100).sqrt()
    upright = picture()
    upright[:, 10:14, 10:14] = upright[:, 10:14, 18:22] = 0
    turned = (255 * warp(upright[None] / 255, torch.tensor([[1.0, 12.0, 0.0, 0.0]]))).round().to(torch.uint8)
    assert looks(upright[None])["tilt"].item() == 0 and looks(turned)["tilt"].item() == 12
