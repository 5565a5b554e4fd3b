"""Distances of sets of images: lost types, blur and noise must change them; some cases have a known answer."""

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from critters import TYPES, draw_critter
from evaluation.distances import compare, comparison_sets, kernel_distance, neighbour_scores, sliced_wasserstein
from evaluation.features import FeatureSpace


def critters(count: int, seed: int, types: tuple[str, ...] = TYPES) -> torch.Tensor:
    """One type each, in turn."""
    drawn = [draw_critter(i, 32, seed, (types[i % len(types)],))[0] for i in range(count)]
    return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in drawn]).view(
        count, 32, 32, 3).permute(0, 3, 1, 2).contiguous()


def noisy(images: torch.Tensor, levels: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + levels * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return critters(300, 0)


@pytest.fixture(scope="module")
def fresh() -> torch.Tensor:
    return critters(300, 1)


@pytest.fixture(scope="module")
def space(images, fresh) -> FeatureSpace:
    return FeatureSpace(torch.cat([images, fresh]))


@pytest.fixture(scope="module")
def fresh_scores(images, fresh, space):
    return compare(fresh, images, space)


def test_unseen_critters_have_nearly_ideal_scores(fresh_scores):
    assert fresh_scores["precision"].value > 0.85 and fresh_scores["recall"].value > 0.85
    assert fresh_scores["coverage"].value > 0.9 and 0.8 < fresh_scores["density"].value < 1.2
    assert fresh_scores["wasserstein"].value < 0.05
    assert all(0 < score.error < 0.2 for score in fresh_scores.values())


def test_lost_types_lower_recall_and_coverage_but_not_precision(images, space, fresh_scores):
    lost = compare(critters(300, 2, TYPES[:5]), images, space)
    for name in ("recall", "coverage"):
        assert lost[name].value < fresh_scores[name].value - 0.2
    assert lost["precision"].value > fresh_scores["precision"].value - 2 * fresh_scores["precision"].error - 0.01
    assert lost["wasserstein"].value > fresh_scores["wasserstein"].value


@pytest.mark.parametrize("changes", [
    [lambda x: gaussian_blur(x, 9, 1.0), lambda x: gaussian_blur(x, 9, 1.5), lambda x: gaussian_blur(x, 9, 2.5)],
    [lambda x: noisy(x, 16), lambda x: noisy(x, 32), lambda x: noisy(x, 64)],
], ids=["blur", "noise"])
def test_blur_and_noise_lower_precision_and_raise_the_distance(changes, images, fresh, space, fresh_scores):
    scores = [fresh_scores] + [compare(change(fresh), images, space) for change in changes]
    precision = [score["precision"].value for score in scores]
    distance = [score["wasserstein"].value for score in scores]
    assert precision[1] > precision[2] > precision[3] and precision[0] > precision[2]
    assert distance[0] < distance[1] < distance[2] < distance[3]


def test_slight_blur_changes_the_finest_scale_only(images):
    blurred = sliced_wasserstein(gaussian_blur(images, 5, 0.7), images)
    assert list(blurred) == ["wasserstein", "wasserstein_32", "wasserstein_16"]
    assert blurred["wasserstein_32"].value > 5 * blurred["wasserstein_16"].value


def test_a_known_wasserstein_distance():
    """Flat black and white images in different proportions.

    All values of a patch are one colour c, its projection is c times the sum of the direction, and the distance of two
    such sets is the difference of the proportions times that of the colours.
    """
    black, white = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    half = torch.cat([black.expand(50, -1, -1, -1), white.expand(50, -1, -1, -1)])
    most = torch.cat([black.expand(20, -1, -1, -1), white.expand(80, -1, -1, -1)])
    values = [sliced_wasserstein(most, half, seed)["wasserstein"].value for seed in range(6)]
    # Normalised, black is -1 and white 1; E |sum of a unit direction in D dimensions| is about sqrt(2 / pi).
    assert sum(values) / 6 == pytest.approx(0.3 * 2 * (2 / torch.pi) ** 0.5, rel=0.1)
    assert sliced_wasserstein(half, half)["wasserstein"].value < 1e-6


def test_neighbour_scores_of_two_clusters():
    """Two clusters far apart; the samples fill one of them."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(200, 2, generator=generator), torch.randn(200, 2, generator=generator) + 1000
    samples = torch.randn(400, 2, generator=generator)
    scores = neighbour_scores(samples, torch.cat([a, b]))
    assert scores["precision"].value > 0.95
    assert 0.45 <= scores["recall"].value <= 0.5 and 0.45 <= scores["coverage"].value <= 0.5
    assert scores["density"].value == pytest.approx(1, abs=0.3)
    far = neighbour_scores(samples + 500, torch.cat([a, b]))
    assert all(far[name].value == 0 for name in ("precision", "recall", "density", "coverage"))


def test_a_known_kernel_distance():
    """In one dimension, between two normal distributions: E (x y + 1)^3 from the moments of each."""
    generator = torch.Generator().manual_seed(0)
    shift = 0.5
    # Moments 1 ... 3 of N(0, 1) and N(shift, 1); (x y + 1)^3 = sum of binomial(3, k) x^k y^k.
    plain, shifted = (0, 1, 0), (shift, 1 + shift**2, shift**3 + 3 * shift)
    known = sum(binomial * (b - a) ** 2 for binomial, a, b in zip((3, 3, 1), plain, shifted))
    drawn = [kernel_distance(torch.randn(60, 1, generator=generator) + shift, torch.randn(60, 1, generator=generator))
             for _ in range(60)]
    values = torch.tensor([score["kid"].value for score in drawn])
    assert (values.mean() - known).abs() < 3 * values.std() / 60**0.5
    errors = torch.tensor([score["kid"].error for score in drawn])
    assert 0.6 * values.std() < errors.mean() < 1.7 * values.std()


def test_the_kernel_distance_has_no_bias_in_small_sets():
    generator = torch.Generator().manual_seed(0)
    drawn = [kernel_distance(torch.randn(20, 30, generator=generator), torch.randn(20, 30, generator=generator))["kid"]
             for _ in range(100)]
    values = torch.tensor([score.value for score in drawn])
    assert values.mean().abs() < 3 * values.std() / 10 and (values < 0).sum() > 30
    covered = sum(abs(score.value) < 1.96 * score.error for score in drawn)
    assert covered >= 88


def test_errors_agree_with_the_spread_of_other_draws():
    generator = torch.Generator().manual_seed(0)
    drawn = [neighbour_scores(torch.randn(100, 4, generator=generator) + 1, torch.randn(100, 4, generator=generator))
             for _ in range(30)]
    for name in ("precision", "recall", "coverage"):
        spread = torch.tensor([score[name].value for score in drawn]).std().item()
        stated = sum(score[name].error for score in drawn) / len(drawn)
        assert 0.5 * spread < stated < 2 * spread


def test_comparison_sets_have_one_size_and_no_image_in_common():
    numbered = torch.arange(400).view(-1, 1, 1, 1)
    samples, train, unseen = numbered[:100], numbered[:180], numbered[180:200]
    s, real, other_real = comparison_sets(samples, train, unseen)
    assert len(s) == len(real) == len(other_real) == 100  # too few held out: all real images, halved
    assert sorted(torch.cat([real, other_real]).flatten().tolist()) == list(range(200))
    s, real, other_real = comparison_sets(samples, train, numbered[300:])
    assert len(s) == len(real) == len(other_real) == 100
    assert real.max() < 180 and other_real.min() >= 300
    s, real, other_real = comparison_sets(numbered, numbered[:40], numbered[40:240])
    assert len(real) == len(other_real) == 120  # too few in the training
    with pytest.raises(ValueError, match="at least 50 samples"):
        comparison_sets(samples[:49], train, unseen)


@pytest.mark.parametrize("side", [8, 16, 20, 64])
def test_other_sizes_work(side):
    images = torch.randint(0, 256, (60, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores = compare(images, images, FeatureSpace(images))
    assert scores["precision"].value == scores["recall"].value == scores["coverage"].value == 1
    assert scores["wasserstein"].value < 0.1
