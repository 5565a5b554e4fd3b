"""Finding copies: planted ones are found, however they are turned; creatures that are only alike are not."""

import numpy as np
import pytest
import torch

from augmentation import augment
from copies import calibrate, feature_distance, nearest, plant, warp, wilson
from critters import draw_critter, draw_critters
from features import FeatureSpace


def critters(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(draw_critters(count, 32, seed)[0]).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def train() -> torch.Tensor:
    return critters(300, 0)


@pytest.fixture(scope="module")
def limits(train):
    return calibrate(train, FeatureSpace(train))


def copied(samples, train, limits) -> torch.Tensor:
    return nearest(samples, train).distance <= limits["pixels"].threshold


def test_planted_copies_are_found_fresh_critters_are_not_and_a_mixture_is_counted(train, limits):
    planted = plant(train[:100], torch.Generator().manual_seed(9))
    fresh = critters(100, 1)
    found, alarms = copied(planted, train, limits), copied(fresh, train, limits)
    assert found.float().mean() > 0.95
    assert alarms.float().mean() <= 0.03
    mixture = torch.cat([found, alarms]).float().mean()
    assert 0.45 <= mixture <= 0.55
    assert limits["pixels"].found[1] > 0.9 and limits["pixels"].alarm <= 0.01


def test_each_way_of_turning_is_undone(train):
    pictures, own = train.float() / 255, torch.arange(20)
    ways = {"mirrored": (-1, 0, 0, 0), "turned": (1, 11, 0, 0), "shifted": (1, 0, 0.03, -0.05),
            "all": (-1, -8, -0.02, 0.04)}
    for pose in ways.values():
        made = warp(pictures[:20], torch.tensor(pose, dtype=torch.float32).expand(20, 4))
        made = (255 * (0.15 + 0.75 * made)).round().to(torch.uint8)  # paler, too
        found = nearest(made, train)
        assert (found.index == own).all()
        assert found.distance.median() < 0.1
        assert (found.pose[:, 0] == pose[0]).all()
        assert (found.pose[:, 1] - pose[1]).abs().median() < 2
        assert (found.pose[:, 2:] - torch.tensor(pose[2:])).abs().median() < 0.02


def test_a_picture_is_not_its_own_copy_and_one_of_a_single_colour_is_like_nothing(train):
    own = torch.arange(30)
    found = nearest(train[:30], train, own)
    assert (found.index != own).all() and found.distance.min() > 0.1
    assert nearest(train[:30], train).distance.max() < 0.01
    assert nearest(torch.full((1, 3, 32, 32), 250, dtype=torch.uint8), train).distance.item() == 1


def test_duplicates_in_the_data_do_not_hide_copies(train, limits):
    """A tenth of the creatures again in a file of other colours: the plain 1 % quantile would be next to nothing."""
    again = (127.5 * (augment(train[:12], torch.Generator().manual_seed(3))[0] + 1)).round().to(torch.uint8)
    twice = torch.cat([train[:120], again])
    limit = calibrate(twice, FeatureSpace(twice))["pixels"]
    own = nearest(twice, twice, torch.arange(len(twice))).distance
    assert 22 <= limit.duplicates <= 26
    assert own.quantile(0.01) < 0.5 * limit.threshold
    planted = plant(train[12:112], torch.Generator().manual_seed(4))
    assert (nearest(planted, twice).distance <= limit.threshold).float().mean() > 0.93


def test_pictures_that_are_all_alike_are_not_taken_for_duplicates():
    """Small creatures of one type: some are as near to each other as a copy turned and recoloured is to its picture."""
    drawn = [np.stack([draw_critter(i, 16, seed, ("fire",))[0] for i in range(count)])
             for seed, count in ((0, 300), (1, 100))]
    train, fresh = (torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() for pictures in drawn)
    limit = calibrate(train, FeatureSpace(train))["pixels"]
    own = nearest(train, train, torch.arange(300)).distance
    planted = nearest(plant(train[:100], torch.Generator().manual_seed(1)), train).distance
    assert (own <= planted.quantile(0.95)).float().mean() > 0.1  # nearness alone would not do
    assert limit.duplicates <= 6
    assert (nearest(fresh, train).distance <= limit.threshold).float().mean() <= 0.04


def test_few_pictures_give_a_coarser_alarm_and_too_few_none(train):
    few = train[:60]
    limit = calibrate(few, FeatureSpace(few))["pixels"]
    assert limit.alarm == pytest.approx(1 / (60 - limit.duplicates + 1))
    with pytest.raises(ValueError, match="50"):
        calibrate(train[:49], FeatureSpace(train))
    with pytest.raises(ValueError, match="duplicate"):
        calibrate(train[:30].repeat(3, 1, 1, 1), FeatureSpace(train))


def test_features_find_copies_too_at_the_pose_that_was_found(train, limits):
    space = FeatureSpace(train)
    shifted = warp(train[:40] / 255, torch.tensor([-1, 0, 0.04, -0.03]).expand(40, 4))
    found, alarms = [feature_distance(made, train, nearest(made, train), space) <= limits["features"].threshold
                     for made in ((255 * shifted).to(torch.uint8), critters(40, 2))]
    assert found.float().mean() > 0.9 and alarms.float().mean() <= 0.05


@pytest.mark.parametrize("count, n, low, high", [(0, 100, 0.0, 0.037), (50, 100, 0.404, 0.596), (100, 100, 0.963, 1.0)])
def test_wilson_agrees_with_the_tables(count, n, low, high):
    assert wilson(count, n) == pytest.approx((count / n, low, high), abs=5e-4)


@pytest.mark.parametrize("side", [8, 16, 20, 64])
def test_other_sizes_work(side):
    pictures = torch.from_numpy(draw_critters(30, side, 0)[0]).permute(0, 3, 1, 2)
    found = nearest(pictures[:5].flip(-1), pictures)
    assert found.index.tolist() == list(range(5)) and found.distance.max() < 0.05
