"""Augmentation: the labels say what was done, and samples inherit nothing of it."""

from __future__ import annotations

import colorsys

import pytest
import torch

from training import augment as module
from training.augment import (
    AMOUNTS,
    AUGMENT_DIM,
    AUGMENT_MODES,
    AUGMENT_RAND_DIM,
    JITTER,
    MAX_ANGLE,
    MIRROR,
    ROTATE,
    augment,
    is_mirrored,
)


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count=64, size=16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator(9))


def on_white(count=64, size=32, colour=0) -> torch.Tensor:
    """White images with a square blob of grey level `colour` in the centre."""
    images = torch.full((count, 3, size, size), 255, dtype=torch.uint8)
    images[:, :, size // 4:-size // 4, size // 4:-size // 4] = colour
    return images


@pytest.mark.parametrize("mode", AUGMENT_MODES)
@pytest.mark.parametrize("size", [16, 33, 64])
@pytest.mark.parametrize("level, value", [(255, 1.0), (0, -1.0)])
def test_white_stays_white_and_black_stays_black(mode, size, level, value):
    images = torch.full((256, 3, size, size), level, dtype=torch.uint8)
    x_0, labels = augment(images, generator(size), mode)
    assert (x_0 == value).all()  # to the last bit
    assert mode != "full" or (labels != 0).any(0).all()


def test_no_dark_corner_and_no_grey_background():
    x_0, labels = augment(on_white(512), generator(), "full")
    assert (labels[:, 0].abs() > 0.9).any()  # including rotations near 15 degrees
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[3:-3, 3:-3] = False  # the blob's corners reach to 32/4 * sqrt(2) from the centre: never here
    assert (x_0[:, :, frame] == 1).all()
    assert (x_0[:, :, 16, 16] == -1).all()  # and the black blob is as black as before


def test_corners():
    angle = torch.linspace(-MAX_ANGLE, MAX_ANGLE, 64)
    x = torch.tensor([0.8, 0.5, 0.2])[:, None, None].expand(64, 3, 32, 32)
    assert torch.equal(module._rotate(x, angle), x)

    # A spot near a corner, and a creature cut by the edge: as if the white paper went on for ever.
    x = on_white(64, colour=90).float() / 255
    x[:, :, 27:30, 26:29], x[:, :, 20:, 10:20] = 0.2, 0.3
    paper = torch.nn.functional.pad(x, (16,) * 4, value=1.0)
    rotated = module._rotate(paper, angle)[:, :, 16:-16, 16:-16]
    assert torch.allclose(module._rotate(x, angle), rotated, atol=1e-4)

    # An image without a background goes on as its reflection: a horizontal ramp stays one in the corners.
    x = torch.linspace(0.2, 0.8, 32).expand(64, 3, 32, 32)
    rotated = module._rotate(x, angle)
    assert rotated.min() >= 0.2 - 1e-6 and rotated.max() <= 0.8 + 1e-6
    assert rotated[:, :, [0, -1], 0].max() < 0.4 and rotated[:, :, [0, -1], -1].min() > 0.6


def test_labels_are_zero_exactly_where_an_image_is_plain():
    images = noise(400)
    plain = images.float() / 255 * 2 - 1
    x_0, labels = augment(images, generator(), "full")
    same = (x_0 == plain).flatten(1).all(1) | (x_0 == plain.flip(-1)).flatten(1).all(1)  # or mirrored; bit by bit
    assert torch.equal(same, (labels == 0).all(1))
    assert 60 < same.sum() < 140  # a quarter: neither rotated nor jittered
    assert labels.dtype == torch.float32 and labels.shape == (400, AUGMENT_DIM)
    assert labels.abs().max() <= 1 and (labels.abs().amax(0) > 0.95).all() and (labels.mean(0).abs() < 0.1).all()
    rotated, jittered = labels[:, 0] != 0, labels[:, 1:] != 0
    assert torch.equal(jittered.any(1), jittered.all(1))  # the jitter comes as a group
    assert 150 < rotated.sum() < 250 and 150 < jittered.all(1).sum() < 250
    assert 60 < (rotated & jittered.all(1)).sum() < 140  # independent of each other


def test_an_image_that_is_not_rotated_is_not_resampled():
    """The colours change pixel by pixel: pixels that were equal stay equal, which resampling would undo."""
    images = 50 + 100 * torch.randint(0, 2, (200, 1, 16, 16), generator=generator(2), dtype=torch.uint8)
    images = images.expand(-1, 3, -1, -1)
    x_0, labels = augment(images, generator(), "full")
    levels = torch.tensor([len(image.unique()) for image in x_0])
    assert (levels[labels[:, 0] == 0] == 2).all() and (levels[labels[:, 0].abs() > 0.1] > 2).all()


@pytest.mark.parametrize("mode", ["flip", "none"])
def test_flip_and_none(mode):
    images = noise(400)
    x_0, labels = augment(images, generator(), mode)
    plain = images.float() / 255 * 2 - 1
    same, mirrored = (x_0 == plain).flatten(1).all(1), (x_0 == plain.flip(-1)).flatten(1).all(1)
    assert (labels == 0).all() and labels.shape == (400, 5) and (same | mirrored).all()
    assert 150 < mirrored.sum() < 250 if mode == "flip" else same.all()
    assert torch.equal(((x_0 + 1) * 127.5).round().to(torch.uint8)[same], images[same])  # [-1, 1] is [0, 255]


def test_the_columns_of_the_random_numbers():
    """Each decision has its own column, and each amount is that of its label."""
    images, rand = noise(1).repeat(4, 1, 1, 1), torch.full((4, AUGMENT_RAND_DIM), 0.75)
    rand[1, MIRROR] = rand[2, ROTATE] = rand[3, JITTER] = 0.25
    rand[:, AMOUNTS] = torch.tensor([0.6, 0.3, 0.7, 0.8, 0.9])
    x_0, augment_labels = augment(images, augment_rand=rand)
    assert is_mirrored(rand).tolist() == [False, True, False, False]
    assert x_0[1].equal(x_0[0].flip(-1)) and not any(x_0[i].equal(x_0[0]) for i in (1, 2, 3))
    expected = torch.tensor([[0.2, 0, 0, 0, 0], [0, -0.4, 0.4, 0.6, 0.8]])
    assert not augment_labels[:2].any() and torch.allclose(augment_labels[2:], expected)


def test_given_numbers_are_those_of_a_generator():
    rand = torch.rand(64, AUGMENT_RAND_DIM, generator=generator(3))
    for ours, theirs in zip(augment(noise(), augment_rand=rand), augment(noise(), generator(3))):
        assert ours.equal(theirs)


def test_the_result_is_finite_and_within_range():
    """Black on nearly white: rounding in the rotation must not hand the gamma curve a number below zero."""
    images = on_white(256) - (on_white(256) == 255).to(torch.uint8)  # 254, as JPEG has it
    x_0, _ = augment(images, generator(), "full")
    assert x_0.isfinite().all() and x_0.min() == -1 and 0.99 < x_0.max() <= 1


@pytest.mark.parametrize("mode", ["all", "untold"])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match=f"full, flip, none, not '{mode}'"):
        augment(noise(1), generator(), mode)


def test_same_generator_same_result_and_same_number_of_draws():
    images, states = noise(), []
    for mode in AUGMENT_MODES:
        a, b = generator(4), generator(4)
        for _ in range(2):
            (x_a, labels_a), (x_b, labels_b) = augment(images, a, mode), augment(images, b, mode)
            assert torch.equal(x_a, x_b) and torch.equal(labels_a, labels_b)
        states.append(a.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    assert not torch.equal(augment(images, generator(4))[1], augment(images, generator(5))[1])
    assert augment(images)[0].shape == images.shape  # without a generator: torch's global one


def test_the_label_of_the_angle_is_true():
    """A black dot straight above the centre, which a mirror image leaves in place; its centroid gives the angle."""
    images = torch.full((200, 3, 64, 64), 255, dtype=torch.uint8)
    images[:, :, 8:12, 30:34] = 0
    x_0, labels = augment(images, generator(), "full")
    weight = (1 - x_0.mean(1)) / 2
    place = torch.arange(64) - 31.5
    x = (weight * place).sum((1, 2)) / weight.sum((1, 2))
    y = (weight * place[:, None]).sum((1, 2)) / weight.sum((1, 2))
    angle = torch.rad2deg(torch.atan2(-x, -y))  # counter-clockwise from straight up; y points down
    assert (angle - 15 * labels[:, 0]).abs().max() < 0.3
    assert ((x**2 + y**2).sqrt() - 22).abs().max() < 0.2  # about the centre, and not scaled


def test_jitter_does_what_its_amounts_say():
    def jitter(rgb, **amounts):
        row = torch.tensor([[amounts.get(name, 0.0) for name in ("brightness", "contrast", "saturation", "hue")]])
        return module._jitter(torch.tensor(rgb).view(1, 3, 1, 1), row).flatten().tolist()

    colour = [0.7, 0.4, 0.3]
    assert jitter(colour) == pytest.approx(colour, abs=1e-6)
    assert jitter([0.5] * 3, brightness=1.0) == pytest.approx([0.5 ** (1 / 1.2)] * 3)
    assert jitter([0.5] * 3, brightness=-1.0) == pytest.approx([0.5 ** 1.2] * 3)
    for sign in (-1.0, 1.0):
        low, middle, high = (jitter([0.5 + d] * 3, contrast=sign)[0] for d in (-0.01, 0.0, 0.01))
        assert middle == pytest.approx(0.5) and (high - low) / 0.02 == pytest.approx(1 + 0.2 * sign, abs=0.01)
        turned = colorsys.rgb_to_hsv(*jitter(colour, hue=sign))[0] - colorsys.rgb_to_hsv(*colour)[0]
        assert (turned + 0.5) % 1 - 0.5 == pytest.approx(0.05 * sign, abs=0.01)
        result = jitter(colour, saturation=sign)
        luma = 0.299 * 0.7 + 0.587 * 0.4 + 0.114 * 0.3
        assert result == pytest.approx([luma + (1 + 0.2 * sign) * (c - luma) for c in colour], abs=1e-6)
    for grey in (0.0, 0.25, 0.8, 1.0):  # a grey stays that grey when hue and saturation change
        assert jitter([grey] * 3, saturation=1.0, hue=-1.0) == [pytest.approx(grey, abs=1e-7)] * 3
    assert all(0 <= c <= 1 for c in jitter([1.0, 0.0, 0.0], brightness=1.0, contrast=1.0, saturation=1.0, hue=1.0))
