"""models/exact.py: the exact answers, against Bayes' rule, Tweedie's formula and what a sampler makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import MEAN, STD

from forward_diffusion import SCHEDULES, NoiseScheduler
from models.exact import ExactDenoiser, GaussianDenoiser
from reverse_diffusion import sample

NORMAL = torch.distributions.Normal


def some_data(n: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_weights_are_bayes_rule():
    scheduler, data = NoiseScheduler(), some_data()
    x_t, t = some_data(3, seed=1), torch.tensor([10, 400, 10])
    denoiser = ExactDenoiser(data, scheduler)
    for i in range(3):
        abar = scheduler.alpha_bar(int(t[i]))
        likelihood = torch.stack([NORMAL(abar**0.5 * image, (1 - abar) ** 0.5).log_prob(x_t[i]).sum().exp()
                                  for image in data])
        expected = (likelihood[:, None, None, None] * data).sum(0) / likelihood.sum()
        assert torch.allclose(denoiser(x_t, t)[i], expected, atol=1e-9)
        assert denoiser.log_density(x_t, t)[i].item() == pytest.approx(likelihood.mean().log().item())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [20, 300, 999])
def test_tweedies_formula(schedule, t):
    """a E[x_0 | x_t] = x_t + b^2 d ln p / d x_t, with the derivative from differences."""
    scheduler, h = NoiseScheduler(schedule=schedule), 1e-5
    abar, t_batch = scheduler.alpha_bar(t), torch.full((4,), t)
    x_t = some_data(4, seed=2)
    x_t = abar**0.5 * x_t + (1 - abar) ** 0.5 * some_data(4, seed=3)

    points = ExactDenoiser(some_data(), scheduler)
    mean, std = (x[None, None] for x in (MEAN, STD))
    gaussian = NORMAL(abar**0.5 * mean, (abar * std**2 + 1 - abar) ** 0.5)
    log_densities = {points: lambda x: points.log_density(x, t_batch),
                     GaussianDenoiser(mean, std, scheduler): lambda x: gaussian.log_prob(x).sum((1, 2, 3))}
    for denoiser, log_density in log_densities.items():
        gradient = torch.zeros_like(x_t)
        for i in range(4):
            step = torch.zeros(1, 4, dtype=torch.float64)
            step[0, i] = h
            step = step.view(1, 1, 2, 2)
            gradient.flatten(1)[:, i] = (log_density(x_t + step) - log_density(x_t - step)) / (2 * h)
        assert torch.allclose(abar**0.5 * denoiser(x_t, t_batch), x_t + (1 - abar) * gradient, atol=1e-6)


def test_ddpm_with_the_exact_answer_draws_from_the_data():
    """Mean and covariance of the samples are those of the data, as far as 4,000 samples can tell."""
    scheduler = NoiseScheduler(schedule="cosine")
    generator = torch.Generator().manual_seed(6)
    data = torch.randn(30, 2, 1, 1, generator=generator) * torch.tensor([1.0, 0.4])[:, None, None]
    x_T = torch.randn(4000, 2, 1, 1, generator=generator)
    samples = sample(ExactDenoiser(data, scheduler), scheduler, x_T, steps=150, prediction="x0", clip=False,
                     draw_noise=lambda: torch.randn(x_T.shape, generator=generator)).flatten(1)
    data = data.flatten(1)
    assert torch.cdist(samples, data).min(1).values.median() < 0.02  # nearly all are copies
    centred, expected = samples - data.mean(0), data - data.mean(0)
    assert ((samples.mean(0) - data.mean(0)).abs() < 4 * data.std(0) / math.sqrt(len(samples))).all()
    products = centred[:, :, None] * centred[:, None]
    error = products.mean(0) - expected.T @ expected / len(data)
    assert (error.abs() < 4 * products.std(0) / math.sqrt(len(samples))).all()


def test_a_gaussian_takes_one_timestep():
    denoiser = GaussianDenoiser(MEAN, STD, NoiseScheduler())
    with pytest.raises(ValueError, match="one timestep"):
        denoiser(some_data(2), torch.tensor([1, 2]))
