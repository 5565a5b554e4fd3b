"""Detection of copies: planted copies are found in any pose; creatures that are merely similar are not."""

import numpy as np
import pytest
import torch

from critters import draw_critter, draw_critters
from evaluation.features import FeatureSpace
from evaluation.memorization import calibrate_thresholds, find_copies, find_nearest, plant_copies, warp, warp_uint8
from training.augment import augment


def critters(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(draw_critters(count, 32, seed)[0]).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def train() -> torch.Tensor:
    return critters(300, 0)


@pytest.fixture(scope="module")
def space(train) -> FeatureSpace:
    return FeatureSpace(train)


@pytest.fixture(scope="module")
def thresholds(train, space):
    return calibrate_thresholds(train, space)


def test_planted_copies_are_found_and_unseen_critters_are_not(train, space, thresholds):
    planted = plant_copies(train[:100], torch.Generator().manual_seed(9))
    _, is_copy = find_copies(torch.cat([planted, critters(100, 1)]), train, thresholds, space)
    found, false_alarms = is_copy["pixels"].float().split(100)
    assert found.mean() > 0.95
    assert false_alarms.mean() <= 0.03
    found, false_alarms = is_copy["ratio"].float().split(100)
    assert found.mean() > 0.6 and false_alarms.mean() == 0  # stricter: turned and recoloured copies may be too far off
    assert thresholds["ratio"].planted_found[1] < found.mean() < thresholds["ratio"].planted_found[2]
    assert thresholds["pixels"].planted_found[1] > 0.9 and thresholds["pixels"].false_alarm <= 0.01


def test_each_transformation_is_undone(train):
    poses = {"mirrored": (-1, 0, 0, 0), "rotated": (1, 11, 0, 0), "shifted": (1, 0, 0.03, -0.05),
             "all": (-1, -8, -0.02, 0.04)}
    for pose in poses.values():
        queries = warp(train[:20].float() / 255, torch.tensor(pose, dtype=torch.float32).expand(20, 4))
        queries = (255 * (0.15 + 0.75 * queries)).round().to(torch.uint8)  # less contrast, too
        matches = find_nearest(queries, train)
        assert (matches.index == torch.arange(20)).all()
        assert matches.distance.median() < 0.1
        assert (matches.pose[:, 0] == pose[0]).all()
        assert (matches.pose[:, 1] - pose[1]).abs().median() < 2
        assert (matches.pose[:, 2:] - torch.tensor(pose[2:])).abs().median() < 0.02


def test_an_image_does_not_match_itself_and_a_single_colour_matches_nothing(train):
    own = torch.arange(30)
    matches = find_nearest(train[:30], train, own)
    assert (matches.index != own).all() and matches.distance.min() > 0.1
    itself = find_nearest(train[:30], train)
    assert itself.distance.max() < 0.01 and itself.ratio.max() < 0.05 and (matches.ratio > 0.4).all()
    assert find_nearest(torch.full((1, 3, 32, 32), 250, dtype=torch.uint8), train).distance.item() == 1


def test_duplicates_in_the_data_do_not_hide_copies(train):
    """A tenth of the creatures occur again in other colours; a plain 1 % quantile would be close to 0."""
    again = (127.5 * (augment(train[:12], torch.Generator().manual_seed(3))[0] + 1)).round().to(torch.uint8)
    data = torch.cat([train[:120], again])
    threshold = calibrate_thresholds(data, FeatureSpace(data))["pixels"]
    to_others = find_nearest(data, data, torch.arange(len(data))).distance
    assert 22 <= threshold.duplicates <= 26
    assert to_others.quantile(0.01) < 0.5 * threshold.distance
    planted = plant_copies(train[12:112], torch.Generator().manual_seed(4))
    assert (find_nearest(planted, data).distance <= threshold.distance).float().mean() > 0.93


def test_images_that_are_all_alike_are_not_taken_for_duplicates():
    """Small creatures of one type: some are as near to each other as a rotated and recoloured copy to its original."""
    drawn = [np.stack([draw_critter(i, 16, seed, ("fire",))[0] for i in range(count)])
             for seed, count in ((0, 300), (1, 100))]
    train, fresh = (torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() for images in drawn)
    threshold = calibrate_thresholds(train, FeatureSpace(train))["pixels"]
    to_others = find_nearest(train, train, torch.arange(300)).distance
    planted = find_nearest(plant_copies(train[:100], torch.Generator().manual_seed(1)), train).distance
    assert (to_others <= planted.quantile(0.95)).float().mean() > 0.1  # the distance alone does not suffice
    assert threshold.duplicates <= 6
    assert (find_nearest(fresh, train).distance <= threshold.distance).float().mean() <= 0.04


def test_few_images_raise_the_false_alarm_rate_and_too_few_are_refused(train, space):
    few = train[:60]
    threshold = calibrate_thresholds(few, FeatureSpace(few))["pixels"]
    assert threshold.false_alarm == pytest.approx(1 / (60 - threshold.duplicates + 1))
    with pytest.raises(ValueError, match="50 training images are needed, not 49"):
        calibrate_thresholds(train[:49], space)
    with pytest.raises(ValueError, match="without a duplicate"):
        calibrate_thresholds(train[:30].repeat(3, 1, 1, 1), space)


def test_copies_are_found_by_features_in_the_pose_of_the_match(train, space, thresholds):
    shifted = warp_uint8(train[:40], torch.tensor([-1, 0, 0.04, -0.03]).expand(40, 4))
    _, is_copy = find_copies(torch.cat([shifted, critters(40, 2)]), train, thresholds, space)
    found, false_alarms = is_copy["features"].float().split(40)
    assert found.mean() > 0.9 and false_alarms.mean() <= 0.05


@pytest.mark.parametrize("side", [8, 16, 20, 64])
def test_other_sizes_work(side):
    images = torch.from_numpy(draw_critters(30, side, 0)[0]).permute(0, 3, 1, 2)
    matches = find_nearest(images[:5].flip(-1), images)
    assert matches.index.tolist() == list(range(5)) and matches.distance.max() < 0.05
