"""Equations of DIFFUSION_THEORY.md that no other test holds, checked by numbers: by quadrature, never by sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evaluation import likelihood
from forward_diffusion import NoiseScheduler
from models.exact import ExactDenoiser
from reverse_diffusion import ddim_step, ddpm_step

VALUES = torch.tensor([-1.0, 1.0], dtype=torch.float64)  # a data set of one pixel with two values
GRID = torch.linspace(-9, 9, 6001, dtype=torch.float64)
SPACING = (GRID[1] - GRID[0]).item()


def amplitudes(scheduler: NoiseScheduler, t: int) -> tuple[float, float]:
    abar = scheduler.alpha_bar(t)
    return abar**0.5, (1 - abar) ** 0.5


def best_guess(x: Tensor, a: float, b: float) -> Tensor:
    """E[x_0 | x_t = x] of the two values."""
    return torch.tanh(a * x / b**2)


def score(x: Tensor, a: float, b: float) -> Tensor:
    return (a * best_guess(x, a, b) - x) / b**2


def density(x: Tensor, a: float, b: float) -> Tensor:
    """p_t(x) of the two values."""
    return torch.exp(-((x[..., None] - a * VALUES) ** 2) / (2 * b**2)).mean(-1) / (b * math.sqrt(2 * math.pi))


def wave(x: Tensor, p: Tensor, k: float, std: float = 0.0) -> complex:
    """E exp(i k (x + std z)), for points of GRID of density p that have moved to x; all k determine the new density."""
    return ((p * torch.exp(1j * k * x)).sum() * SPACING * math.exp(-((k * std) ** 2) / 2)).item()


# ---------------------------------------------------------------------------------------------------------------------
# what the network learns


def test_the_squared_error_is_the_unavoidable_one_and_the_distance_from_the_conditional_mean():
    """For x_t on a grid, summed over both values that each may have come from."""
    a, b = 0.6, 0.8
    weight = torch.softmax(a * GRID[:, None] * VALUES / b**2, dim=1) * (density(GRID, a, b) * SPACING)[:, None]
    eps = (GRID[:, None] - a * VALUES) / b
    mean, guess = -b * score(GRID, a, b), torch.sin(GRID)
    error = (weight * (eps - guess[:, None]) ** 2).sum()
    unavoidable = (weight * (eps - mean[:, None]) ** 2).sum()
    assert error.item() == pytest.approx((unavoidable + (weight.sum(1) * (mean - guess) ** 2).sum()).item(), rel=1e-12)


@pytest.mark.parametrize("t", [20, 249, 700])
def test_score_tweedie_and_the_two_values(t):
    """The closed forms of the two values, used below, are those of `ExactDenoiser`."""
    scheduler = NoiseScheduler()
    (a, b), t_batch = amplitudes(scheduler, t), torch.full((9,), t)
    denoiser = ExactDenoiser(VALUES.view(2, 1, 1, 1), scheduler)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1).requires_grad_(True)
    log_density = denoiser.log_density(x, t_batch)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    x, x_0 = x.detach(), denoiser(x, t_batch).detach()
    torch.testing.assert_close(x_0, best_guess(x, a, b), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, score(x, a, b), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, -scheduler.to_eps(x_0, x, t_batch) / b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_density.detach().exp(), density(x.flatten(), a, b))


# ---------------------------------------------------------------------------------------------------------------------
# one step back


@pytest.mark.parametrize("t, s", [(20, 19), (300, 299), (300, 200), (999, 500)])
def test_mean_and_variance_of_a_step_for_data_that_are_not_gaussian(t, s):
    """q(x_s | x_t) of the two values, by quadrature over x_s; at t = s + 1 also in the form with the score."""
    scheduler, x_t = NoiseScheduler(), torch.tensor([[0.4]], dtype=torch.float64)
    (a, b), (a_s, b_s) = amplitudes(scheduler, t), amplitudes(scheduler, s)
    alpha = (a / a_s) ** 2
    x_s = torch.linspace(-1, 1, 40_001, dtype=torch.float64) * (a_s + 8 * b_s)
    weight = density(x_s, a_s, b_s) * torch.exp(-((0.4 - alpha**0.5 * x_s) ** 2) / (2 * (1 - alpha)))
    weight /= weight.sum()
    mean = (weight * x_s).sum().item()
    variance = (weight * (x_s - mean) ** 2).sum().item()

    x_0 = best_guess(x_t, a, b)
    step_mean, std = ddpm_step(scheduler, x_0, x_t, t, s)
    assert mean == pytest.approx(step_mean.item(), rel=1e-6)
    coefficient = a_s * (1 - alpha) / (1 - a**2)
    assert variance == pytest.approx(std**2 + coefficient**2 * (1 - x_0.item() ** 2), rel=1e-5)
    if s == t - 1:
        along_score = (x_t + (1 - alpha) * score(x_t, a, b)) / alpha**0.5
        assert mean == pytest.approx(along_score.item(), rel=1e-6)


def test_the_uncertainty_left_is_below_that_of_the_best_straight_line():
    """For data of variance 1 or less, and a straight line is best for Gaussians."""
    for t in (5, 100, 400, 900):
        a, b = amplitudes(NoiseScheduler(), t)
        left = (density(GRID, a, b) * (1 - best_guess(GRID, a, b) ** 2)).sum().item() * SPACING
        line = b**2 / (a**2 + b**2)  # variance 1
        assert left < line * (1 + 1e-9) and line == pytest.approx(b**2)


# ---------------------------------------------------------------------------------------------------------------------
# the bound


@pytest.mark.parametrize("mean, std", [(0.0, 2.0), (0.0, 0.5), (1.0, 1.0), (-0.3, 0.7)])
def test_the_divergence_of_gaussians(mean, std):
    q = torch.distributions.Normal(0.0, 1.0).log_prob(GRID)
    p = torch.distributions.Normal(mean, std).log_prob(GRID)
    closed = 0.5 * (math.log(std**2) + 1 / std**2 - 1) + mean**2 / (2 * std**2)
    assert ((q.exp() * (q - p)).sum() * SPACING).item() == pytest.approx(closed, rel=1e-6)


def test_the_terms_of_the_bound_for_both_variances():
    """Written for the noise, for the image, and as in the code."""
    scheduler = NoiseScheduler()
    snr, t = scheduler.snr(), torch.arange(1, 1000)
    abar = torch.tensor([scheduler.alpha_bar(i) for i in range(1000)], dtype=torch.float64)
    beta = 1 - abar[1:] / abar[:-1]
    beta_tilde = (1 - abar[:-1]) / (1 - abar[1:]) * beta
    for variance, sigma_squared, image in (
        ("beta_tilde", beta_tilde, (snr[:-1] - snr[1:]) / 2),
        ("beta", beta, abar[:-1] * beta / (2 * (1 - abar[1:]) ** 2)),
    ):
        constant, weight, std = likelihood._coefficients(scheduler, variance)
        noise = beta**2 / (2 * sigma_squared * (1 - beta) * (1 - abar[1:]))
        ratio = beta_tilde / sigma_squared
        torch.testing.assert_close(weight[t], image, rtol=1e-9, atol=0)
        torch.testing.assert_close(noise * snr[1:], image, rtol=1e-9, atol=0)
        torch.testing.assert_close(constant[t], (ratio - 1 - ratio.log()) / 2, rtol=1e-9, atol=1e-15)
        assert std**2 == pytest.approx((beta_tilde[0] if variance == "beta_tilde" else 1 - abar[0]).item(), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# noise or no noise


def halving(error) -> float:
    """By what the error falls when the step is halved: 4 for an error of second order."""
    return error(1e-3) / error(5e-4)


@pytest.mark.parametrize("k", [0.7, 2.0])
def test_drift_and_shake_change_a_density_as_the_equation_says(k):
    """In waves: multiplied by exp(i k x) and integrated by parts, -(p u)' is i k p u, and p'' is -k^2 p."""
    p, u = density(GRID, 0.6, 0.8), torch.sin(GRID)
    before = wave(GRID, p, k)
    change = ((p * (1j * k * u - k**2 / 2) * torch.exp(1j * k * GRID)).sum() * SPACING).item()

    def error(beta: float) -> float:
        return abs(wave(GRID + beta * u, p, k, beta**0.5) - before - beta * change)

    assert halving(error) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("k", [0.7, 2.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_any_amount_of_noise_leads_to_the_density_of_the_step_before(eta, k):
    a, b = 0.6, 0.8
    p, gradient = density(GRID, a, b), score(GRID, a, b)

    def error(beta: float) -> float:
        a_s = a / (1 - beta) ** 0.5
        expected = math.cos(k * a_s) * math.exp(-(k**2) * (1 - a_s**2) / 2)  # of the two values with noise
        moved = GRID + beta / 2 * GRID + (1 + eta**2) / 2 * beta * gradient
        return abs(wave(moved, p, k, eta * beta**0.5) - expected)

    assert halving(error) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_small_step_of_ddim_is_of_that_family(eta):
    """And `ddim_step` with the exact answer leads to the right density, in the limit of small steps."""
    def errors(steps: int, k: float = 2.0) -> tuple[float, float]:
        beta = 1 - 0.36 ** (1 / steps)
        scheduler = NoiseScheduler(steps, beta, beta)
        (a, b), (a_s, b_s) = amplitudes(scheduler, steps - 1), amplitudes(scheduler, steps - 2)
        x_t = GRID[:, None]
        mean, std = ddim_step(scheduler, best_guess(x_t, a, b), x_t, steps - 1, steps - 2, eta=eta)
        mean, p = mean[:, 0], density(GRID, a, b)
        family = GRID + beta / 2 * GRID + (1 + eta**2) / 2 * beta * score(GRID, a, b)
        expected = math.cos(k * a_s) * math.exp(-((k * b_s) ** 2) / 2)  # of the two values with noise
        return (mean - family)[GRID.abs() < 3].abs().max().item(), abs(wave(mean, p, k, std) - expected)

    for large, small in zip(errors(500), errors(1000)):
        assert large / small == pytest.approx(4, rel=0.03)


@pytest.mark.parametrize("k", [0.7, 2.0])
def test_langevin_dynamics_leave_the_density_as_it_is(k):
    a, b = 0.6, 0.8
    p, gradient = density(GRID, a, b), score(GRID, a, b)

    def error(gamma: float) -> float:
        return abs(wave(GRID + gamma / 2 * gradient, p, k, gamma**0.5) - wave(GRID, p, k))

    assert halving(error) == pytest.approx(4, rel=0.02)


def test_langevin_dynamics_approach_the_density_at_the_rate_of_the_equation():
    """From N(0, 1) towards N(m, s^2), both before and after a step Gaussian: the divergence has a closed form."""
    m, s = 0.5, 0.8

    def divergence(mean: float, variance: float) -> float:
        return 0.5 * (math.log(s**2 / variance) + variance / s**2 - 1) + (mean - m) ** 2 / (2 * s**2)

    def error(gamma: float) -> float:
        after = divergence(gamma * m / (2 * s**2), (1 - gamma / (2 * s**2)) ** 2 + gamma)
        # grad ln(p / p_t) is (x - m) / s^2 - x, whose mean square under N(0, 1) is m^2 / s^4 + (1 / s^2 - 1)^2
        rate = -gamma / 2 * (m**2 / s**4 + (1 / s**2 - 1) ** 2)
        return abs(after - divergence(0, 1) - rate)

    assert halving(error) == pytest.approx(4, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# guidance, GANs, straight paths


def test_guidance_aims_at_the_density_times_the_power_of_a_classifier():
    """The two values are two classes: c is +1. Then p(x | c) is a single Gaussian."""
    a, b, g = 0.6, 0.8, 2.5
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_(True)
    log_classifier = torch.nn.functional.logsigmoid(2 * a * x / b**2)  # of the value 1
    (gradient,) = torch.autograd.grad((density(x, a, b).log() + g * log_classifier).sum(), x)
    x = x.detach()
    unconditional, conditional = -b * score(x, a, b), (x - a) / b
    torch.testing.assert_close(unconditional + g * (conditional - unconditional), -b * gradient)


def test_the_best_discriminator_gives_the_jensen_shannon_divergence():
    p, generated = (torch.distributions.Normal(*args).log_prob(GRID).exp() for args in ((0.0, 1.0), (0.7, 1.5)))
    mean, inside = (p + generated) / 2, p > 0
    best = p / (p + generated)

    def value(d: Tensor) -> float:
        return ((torch.xlogy(p, d) + torch.xlogy(generated, 1 - d)).sum() * SPACING).item()

    divergences = sum((torch.xlogy(q, q / mean)[inside].sum() * SPACING).item() for q in (p, generated))
    assert value(best) == pytest.approx(divergences - math.log(4), rel=1e-6)
    for other in (best + 0.01 * best * (1 - best), best - 0.01 * best * (1 - best)):
        assert value(other) < value(best)


def test_a_step_along_the_straight_path_is_a_step_of_ddim():
    """x_tau over its scale is x_t of a schedule with a = (1 - tau) / scale; Euler's step there is `ddim_step`."""
    scheduler = NoiseScheduler()
    x_0, eps = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, s in ((900, 700), (300, 20), (20, -1)):
        (a, b), (a_s, b_s) = amplitudes(scheduler, t), amplitudes(scheduler, s)
        tau, tau_s = b / (a + b), b_s / (a_s + b_s)
        x_tau = (1 - tau) * x_0 + tau * eps
        euler = x_tau + (tau_s - tau) * (eps - x_0)
        torch.testing.assert_close(euler, (1 - tau_s) * x_0 + tau_s * eps)
        mean, std = ddim_step(scheduler, x_0, x_tau * (a + b), t, s)
        torch.testing.assert_close(mean / (a_s + b_s), euler)
        assert std == 0
