"""The distances, with what they must notice planted: lost types, blur, noise; and cases whose answer is known."""

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from critters import TYPES, draw_critter
from distances import compare, neighbour_scores, sets_to_compare, sliced_wasserstein
from features import FeatureSpace, describe


def critters(count: int, seed: int, types: tuple[str, ...] = TYPES) -> torch.Tensor:
    """One type each, in turn."""
    drawn = [draw_critter(i, 32, seed, (types[i % len(types)],))[0] for i in range(count)]
    return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in drawn]).view(
        count, 32, 32, 3).permute(0, 3, 1, 2).contiguous()


def noisy(images: torch.Tensor, levels: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + levels * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return critters(300, 0)


@pytest.fixture(scope="module")
def fresh() -> torch.Tensor:
    return critters(300, 1)


@pytest.fixture(scope="module")
def space(pictures, fresh) -> FeatureSpace:
    return FeatureSpace(torch.cat([pictures, fresh]))


@pytest.fixture(scope="module")
def of_fresh(pictures, fresh, space):
    return compare(fresh, pictures, space)


def test_fresh_critters_are_nearly_as_good_as_the_best_that_can_be(of_fresh):
    assert of_fresh["precision"].value > 0.85 and of_fresh["recall"].value > 0.85
    assert of_fresh["coverage"].value > 0.9 and 0.8 < of_fresh["density"].value < 1.2
    assert of_fresh["wasserstein"].value < 0.05
    assert all(0 < score.error < 0.2 for score in of_fresh.values())


def test_half_of_the_types_lost_lowers_recall_and_coverage_and_not_precision(pictures, space, of_fresh):
    lost = compare(critters(300, 2, TYPES[:5]), pictures, space)
    for name in ("recall", "coverage"):
        assert lost[name].value < of_fresh[name].value - 0.2
    assert lost["precision"].value > of_fresh["precision"].value - 2 * of_fresh["precision"].error - 0.01
    assert lost["wasserstein"].value > of_fresh["wasserstein"].value


@pytest.mark.parametrize("spoil", [
    [lambda x: gaussian_blur(x, 9, 1.0), lambda x: gaussian_blur(x, 9, 1.5), lambda x: gaussian_blur(x, 9, 2.5)],
    [lambda x: noisy(x, 16), lambda x: noisy(x, 32), lambda x: noisy(x, 64)],
], ids=["blur", "noise"])
def test_blur_and_noise_lower_precision_and_raise_the_distance_in_order_of_strength(spoil, pictures, fresh, space,
                                                                                    of_fresh):
    scores = [of_fresh] + [compare(how(fresh), pictures, space) for how in spoil]
    precision = [score["precision"].value for score in scores]
    distance = [score["wasserstein"].value for score in scores]
    assert precision[1] > precision[2] > precision[3] and precision[0] > precision[2]
    assert distance[0] < distance[1] < distance[2] < distance[3]


def test_the_finest_scale_tells_slight_blur_and_the_coarsest_does_not(pictures):
    blurred = sliced_wasserstein(gaussian_blur(pictures, 5, 0.7), pictures)
    assert list(blurred) == ["wasserstein", "wasserstein_32", "wasserstein_16"]
    assert blurred["wasserstein_32"].value > 5 * blurred["wasserstein_16"].value


def test_a_known_wasserstein_distance():
    """Flat pictures, of black or white in another share: each patch is one colour c in all its numbers, its projection
    c (sum of the direction), and the distance of two such sets the difference of shares times that of the colours."""
    black, white = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    half = torch.cat([black.expand(50, -1, -1, -1), white.expand(50, -1, -1, -1)])
    most = torch.cat([black.expand(20, -1, -1, -1), white.expand(80, -1, -1, -1)])
    values = [sliced_wasserstein(most, half, seed)["wasserstein"].value for seed in range(6)]
    # Normalised, black is -1 and white 1; E |sum of a unit direction in D dimensions| is about sqrt(2 / pi).
    assert sum(values) / 6 == pytest.approx(0.3 * 2 * (2 / torch.pi) ** 0.5, rel=0.1)
    assert sliced_wasserstein(half, half)["wasserstein"].value < 1e-6


def test_neighbours_in_a_case_that_can_be_counted():
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


def test_error_bars_are_what_other_draws_would_differ_by():
    generator = torch.Generator().manual_seed(0)
    drawn = [neighbour_scores(torch.randn(100, 4, generator=generator) + 1, torch.randn(100, 4, generator=generator))
             for _ in range(30)]
    for name in ("precision", "recall", "coverage"):
        spread = torch.tensor([score[name].value for score in drawn]).std().item()
        stated = sum(score[name].error for score in drawn) / len(drawn)
        assert 0.5 * spread < stated < 2 * spread


def test_the_sets_are_of_one_size_and_have_no_picture_in_common():
    numbered = torch.arange(400).view(-1, 1, 1, 1)
    samples, train, held = numbered[:100], numbered[:180], numbered[180:200]
    s, reference, yardstick = sets_to_compare(samples, train, held)
    assert len(s) == len(reference) == len(yardstick) == 100  # too few held out: all real pictures, halved
    assert sorted(torch.cat([reference, yardstick]).flatten().tolist()) == list(range(200))
    s, reference, yardstick = sets_to_compare(samples, train, numbered[300:])
    assert len(s) == len(reference) == len(yardstick) == 100
    assert reference.max() < 180 and yardstick.min() >= 300
    with pytest.raises(ValueError, match="50 samples"):
        sets_to_compare(samples[:49], train, held)


@pytest.mark.parametrize("side", [8, 16, 20, 64])
def test_other_sizes_work(side):
    images = torch.randint(0, 256, (60, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scores = compare(images, images, FeatureSpace(images))
    assert scores["precision"].value == scores["recall"].value == scores["coverage"].value == 1
    assert scores["wasserstein"].value < 0.1


def test_the_descriptions_have_the_meaning_they_claim():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, :, :, 16:] = 255  # an upright edge ...
    images[1, :, 16:] = 255  # ... and a level one
    layout, colours, edges, grain = describe(images)
    assert layout.shape == (2, 192) and edges.shape == (2, 288)
    assert (colours**2).sum(dim=1) == pytest.approx([1, 1]) and (colours > 0).sum(dim=1).tolist() == [2, 2]
    strength = edges.view(2, 3, 6, 16).sum(dim=(1, 3))
    assert strength[0].argmax() == 0 and strength[1].argmax() == 3  # directions of the gradient: across, and down
    assert (strength > 1e-4).sum(dim=1).tolist() == [1, 1]
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    spoilt = describe(torch.cat([images[:1], gaussian_blur(images[:1], 5, 1.0), grey, noisy(grey, 4)]))[3]
    assert (spoilt[1] <= spoilt[0]).all() and spoilt[1, 1] < spoilt[0, 1] - 0.5
    assert (spoilt[3, :2] > spoilt[2, :2] + 1).all()
