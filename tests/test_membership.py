"""Membership by the error: known for a model that has stored its training images, and for one that never saw them."""

import math

import pytest
import torch

from critters import draw_critters
from evaluation.likelihood import png_bits
from evaluation.membership import denoising_errors, gap_by_noise, membership, noise_levels
from forward_diffusion import NoiseScheduler

SCHEDULER = NoiseScheduler(schedule="cosine")
LEVELS = noise_levels(SCHEDULER, 8)


def critters(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(draw_critters(count, 8, seed)[0]).permute(0, 3, 1, 2)


def as_x_0(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def posterior_mean(stored: torch.Tensor, spread: float):
    """E[x_0 | x_t] if x_0 is one of the stored images plus noise of this deviation: a model that knows them."""
    flat = as_x_0(stored).flatten(1)

    def model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = torch.tensor([SCHEDULER.alpha_bar(int(step)) for step in t]).float()[:, None]
        variance = abar * spread**2 + 1 - abar
        x = x_t.flatten(1)
        weight = torch.softmax(-torch.cdist(x, abar[:1].sqrt() * flat) ** 2 / (2 * variance), dim=1)
        nearest = weight @ flat
        x_0 = nearest + abar.sqrt() * spread**2 / variance * (x - abar.sqrt() * nearest)
        return x_0.view_as(x_t)

    return model


def errors(model, images: torch.Tensor, **options) -> torch.Tensor:
    return denoising_errors(model, SCHEDULER, as_x_0(images), LEVELS, prediction="x0", **options)


def measured(model, train: torch.Tensor, unseen: torch.Tensor):
    pair, detail = (errors(model, train), errors(model, unseen)), (png_bits(train), png_bits(unseen))
    return membership(*pair, detail), gap_by_noise(*pair, detail)


def test_a_model_that_saw_neither_set_cannot_tell_them_and_one_that_stored_one_can():
    train, unseen = critters(50, 0), critters(60, 1)
    (figures, alarm), gaps = measured(posterior_mean(critters(60, 2), 0.2), train, unseen)
    assert figures["auc"]["low"] < 0.5 < figures["auc"]["high"] and alarm == pytest.approx(1 / 61)
    assert figures["found"]["value"] <= 0.1
    assert sum(gap["low"] <= 0 <= gap["high"] for gap in gaps) >= len(gaps) - 1

    (figures, _), gaps = measured(posterior_mean(train, 0.05), train, unseen)
    assert figures["auc"]["value"] > 0.99 and figures["found"]["value"] > 0.95
    assert figures["auc"]["low"] > 0.9 and figures["auc"]["high"] == 1
    assert max(gap["low"] for gap in gaps) > 1  # more than twice the error
    assert gaps[-1]["value"] < 0.1 * max(gap["value"] for gap in gaps)  # nobody can tell in the noise


def test_a_model_that_has_stored_some_images_is_in_between():
    train, unseen = critters(60, 0), critters(60, 1)
    (figures, _), _ = measured(posterior_mean(torch.cat([train[:20], critters(40, 3)]), 0.1), train, unseen)
    assert 0.55 < figures["auc"]["value"] < 0.9
    assert 0.2 < figures["found"]["value"] < 0.6


def test_intervals_cover_chance_as_often_as_they_say():
    """Scores that say nothing; the fraction found has the mean that the false positive rate promises."""
    generator = torch.Generator().manual_seed(0)
    covered, found = 0, []
    for _ in range(60):
        train, unseen = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (40, 120))
        detail = torch.rand(40, generator=generator), torch.rand(120, generator=generator)
        figures, alarm = membership(train, unseen, detail)
        covered += figures["auc"]["low"] <= 0.5 <= figures["auc"]["high"]
        found.append(figures["found"]["value"])
    assert covered >= 52 and alarm == pytest.approx(1 / 121)
    assert abs(sum(found) / 60 - alarm) < 3 * (alarm / 40 / 60 * 3) ** 0.5


def test_detail_alone_is_not_membership():
    """Unseen images that are more detailed, with errors that follow: the correction must take that away."""
    generator = torch.Generator().manual_seed(0)
    detail = torch.rand(100, generator=generator), torch.rand(100, generator=generator) + 0.5
    train, unseen = (3 * x[:, None] + 0.2 * torch.randn(100, 4, generator=generator) for x in detail)
    figures, _ = membership(train, unseen, detail)
    assert figures["auc"]["low"] < 0.5 < figures["auc"]["high"]
    constant = torch.ones(100), torch.ones(100)
    assert membership(train, unseen, constant)[0]["auc"]["low"] > 0.6
    assert all(abs(gap["value"]) < 0.2 for gap in gap_by_noise(train, unseen, detail))
    assert all(gap["low"] > 2 for gap in gap_by_noise(train, unseen, constant))


def test_known_gaps_and_areas():
    detail = torch.arange(50.0), torch.arange(50.0)
    train = torch.arange(50.0)[:, None].repeat(1, 2).double()
    for gap in gap_by_noise(train, train + math.log(1.5), detail):
        assert gap["value"] == pytest.approx(0.5) and gap["low"] == pytest.approx(gap["high"])
    # Of four pairs one is in the wrong order; the detail says nothing.
    scores = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    figures, alarm = membership(*scores, (torch.zeros(2), torch.zeros(2)))
    assert figures["auc"]["value"] == 0.75 and figures["found"]["value"] == 0.5 and alarm == pytest.approx(1 / 3)
    ties = torch.zeros(4, 1)
    assert membership(ties, ties, (torch.zeros(4), torch.zeros(4)))[0]["auc"]["value"] == 0.5


@pytest.mark.parametrize("schedule, steps", [("cosine", 1000), ("linear", 1000), ("cosine", 20), ("linear", 50)])
def test_levels_are_evenly_spaced_in_log_snr(schedule, steps):
    scheduler = NoiseScheduler(steps, schedule=schedule)
    levels = noise_levels(scheduler, 9)
    assert levels == sorted(set(levels)) and 0 <= levels[0] and levels[-1] < steps
    log_snr = scheduler.snr()[levels].log()
    if steps == 1000:
        assert log_snr.tolist() == pytest.approx([4 - i for i in range(9)], abs=0.05)


def test_errors_depend_on_the_image_and_its_number_alone():
    model = posterior_mean(critters(10, 2), 0.2)
    whole = errors(model, critters(9, 0), batch_size=4)
    assert whole.shape == (9, len(LEVELS)) and torch.allclose(whole, errors(model, critters(9, 0)), atol=1e-5)
    assert not torch.allclose(whole, errors(model, critters(9, 0), seed=1), atol=1e-3)
