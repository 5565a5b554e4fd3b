"""Every sampler on Gaussian pixels, without random numbers: the law of its samples is computed exactly."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import MEAN, STD, exact, flow, law, seeded_noise, start

from forward_diffusion import PREDICTIONS, SCHEDULES, NoiseScheduler
from reverse_diffusion import SAMPLERS, ddpm_step, sample, trailing_timesteps

ALL_SAMPLERS = [  # with their options
    ("ddpm", {}), ("ddpm", dict(variance="beta")), ("ddim", {}), ("ddim", dict(eta=0.5)), ("ddim", dict(eta=1.0)),
    ("dpm++", {}), ("sde-dpm++", {}),
]
DETERMINISTIC = [("ddim", 1), ("dpm++", 2)]  # and their orders


def test_every_sampler_of_the_registry_is_tested_here():
    """But for those of tuned networks, which tests/test_consistency.py has."""
    assert {sampler for sampler, _ in ALL_SAMPLERS} == {name for name in SAMPLERS if not SAMPLERS[name].tuned}
    assert {sampler for sampler, _ in DETERMINISTIC} == {name for name in SAMPLERS if SAMPLERS[name].deterministic}


@pytest.mark.parametrize("schedule, zero_terminal_snr, prediction", [
    (schedule, zero_terminal_snr, prediction) for schedule in SCHEDULES for zero_terminal_snr in (False, True)
    for prediction in PREDICTIONS if not (zero_terminal_snr and prediction == "eps")  # which is refused
])
@pytest.mark.parametrize("sampler, options", ALL_SAMPLERS)
def test_the_mean_is_right_at_every_step(sampler, options, prediction, schedule, zero_terminal_snr):
    """E[x_s] = sqrt(abar_s) MEAN, whatever the number of steps.

    The tolerance 1e-9 is for eps on the cosine schedule, where the first step multiplies rounding by thousands.
    """
    scheduler = NoiseScheduler(100, 1e-3, 0.2, schedule, zero_terminal_snr)
    for steps in (1, 2, 5, 20, 100):
        path = law(scheduler, steps=steps, prediction=prediction, sampler=sampler, **options)
        assert len(path) == steps and path[-1][0] == -1
        for s, mean, _ in path:
            torch.testing.assert_close(mean, scheduler.alpha_bar(s) ** 0.5 * MEAN, rtol=0, atol=1e-9)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 7, None])
def test_each_variance_is_exact_where_theory_says_so(steps, schedule, zero_terminal_snr):
    """Ho et al. (2020), section 3.2: "beta" for standard normal data, "beta_tilde" for a single possible image."""
    scheduler = NoiseScheduler(100, 1e-3, 0.2, schedule, zero_terminal_snr)
    normal = law(scheduler, 0 * MEAN, 0 * STD + 1, steps=steps, sampler="ddpm", variance="beta")
    for _, _, variance in normal[:-1]:  # the last step gives the mean instead
        torch.testing.assert_close(variance, torch.ones_like(MEAN), rtol=0, atol=1e-10)
    for sampler, options in ALL_SAMPLERS:
        if options == dict(variance="beta"):
            continue
        for s, mean, variance in law(scheduler, MEAN, 0 * STD, steps=steps, sampler=sampler, **options):
            abar = scheduler.alpha_bar(s)
            torch.testing.assert_close(mean, abar**0.5 * MEAN, rtol=0, atol=1e-10)
            torch.testing.assert_close(variance, torch.full_like(MEAN, 1 - abar), rtol=0, atol=1e-10)


@pytest.mark.parametrize("t, s", [(1, 0), (500, 499), (999, 979), (700, 100)])
def test_the_true_variance_of_a_step_lies_between_the_two(t, s):
    """q(x_s | x_t) of Gaussian data, from its covariances; STD < 1. This is (20) of DIFFUSION_THEORY.md."""
    scheduler, x = NoiseScheduler(), start(1)
    abar_t, abar_s = scheduler.alpha_bar(t), scheduler.alpha_bar(s)
    var_t, var_s = (abar * STD**2 + 1 - abar for abar in (abar_t, abar_s))
    true = var_s - (abar_t / abar_s) * var_s**2 / var_t  # the covariance of x_s and x_t is sqrt(abar_t / abar_s) var_s
    small, large = (ddpm_step(scheduler, x, x, t, s, variance=name)[1] ** 2 for name in ("beta_tilde", "beta"))
    assert (small < true).all() and (true < large).all()
    assert large == pytest.approx(1 - abar_t / abar_s, rel=1e-12)


# The error of the standard deviation with a finite number of steps, computed exactly. It is largest where the data are
# narrow, STD 0.1, on the linear schedule. The allowances are the measured errors, rounded up.
@pytest.mark.parametrize("options, steps, allowance", [
    (dict(sampler="ddpm"), 100, 0.21), (dict(sampler="ddpm"), None, 0.037),
    (dict(sampler="ddpm", variance="beta"), None, 0.008), (dict(sampler="ddim", eta=0.5), None, 0.022),
    (dict(sampler="ddim"), 50, 0.26), (dict(sampler="ddim"), 500, 0.033),
    (dict(sampler="dpm++"), 50, 0.22), (dict(sampler="dpm++"), 100, 0.077), (dict(sampler="dpm++"), 500, 0.007),
    (dict(sampler="sde-dpm++"), 50, 0.23), (dict(sampler="sde-dpm++"), 100, 0.068),
    (dict(sampler="sde-dpm++"), 500, 0.005),
])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_spread_comes_back(schedule, options, steps, allowance):
    _, _, variance = law(NoiseScheduler(schedule=schedule), steps=steps, **options)[-1]
    assert ((variance.sqrt() / STD - 1).abs() < allowance).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler, order", DETERMINISTIC)
def test_the_order_of_convergence(sampler, order, schedule):
    """The distance to the probability flow, known for Gaussian data, falls as steps to the power -order.

    The order is a claim about small steps in lambda (Lu et al. 2022). It is measured over the first three quarters of
    the timesteps, on a schedule too fine to matter: the last step goes to infinite lambda and is never small. The
    cosine schedule begins so near lambda = -infinity that the first steps are long as well: there it is measured from
    3/4 T to 3/16 T.
    """
    many = 38_400
    scheduler = NoiseScheduler(many, 0.1 / many, 20 / many, schedule)
    begin = many if schedule == "linear" else many * 3 // 4
    x, errors, numbers = start(16), [], [40, 80, 160, 320]
    for steps in numbers:
        seen = {}
        timesteps = trailing_timesteps(begin, steps) + [-1]
        sample(exact(scheduler, "x0"), scheduler, x, sampler=sampler, steps=steps, prediction="x0", start=begin - 1,
               clip=False, callback=lambda i, x_s, x_0, t=timesteps, seen=seen: seen.update({t[i + 1]: x_s}))
        end = begin // 4 - 1
        errors.append((seen[end] - flow(scheduler, x, begin - 1, end)).abs().max().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes == pytest.approx([order] * 3, abs=0.15), errors
    assert errors[-1] < (2e-3 if order == 1 else 2e-5)


@pytest.mark.parametrize("sampler, order", [("ddpm", 1), ("sde-dpm++", 2)])
def test_the_order_of_convergence_in_law(sampler, order):
    """With fresh noise the variance of x_s converges to that of q(x_s), over the same three quarters as above."""
    many = 38_400
    scheduler, errors = NoiseScheduler(many, 0.1 / many, 20 / many), []
    end = many // 4 - 1
    abar = scheduler.alpha_bar(end)
    for steps in (80, 160, 320, 640):
        (variance,) = (variance for s, _, variance in law(scheduler, steps=steps, sampler=sampler) if s == end)
        errors.append((variance / (abar * STD**2 + 1 - abar) - 1).abs().max().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes == pytest.approx([order] * 3, abs=0.15), errors
    assert errors[-1] < (0.1 if order == 1 else 1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [20, 50, 100])
def test_second_order_ends_nearer_to_the_flow(schedule, steps):
    scheduler, x, error = NoiseScheduler(schedule=schedule), start(64), {}
    for sampler, _ in DETERMINISTIC:
        images = sample(exact(scheduler, "v"), scheduler, x, sampler=sampler, steps=steps, prediction="v", clip=False)
        error[sampler] = (images - flow(scheduler, x, 999, -1)).square().mean().sqrt()
    assert error["dpm++"] < 0.7 * error["ddim"]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler, options", ALL_SAMPLERS)
def test_equivalent_networks_draw_the_same(sampler, options, schedule, clip):
    scheduler, x_T = NoiseScheduler(schedule=schedule), start(5)
    eps, v, x_0 = (
        sample(exact(scheduler, prediction), scheduler, x_T, sampler=sampler, steps=20, prediction=prediction,
               draw_noise=seeded_noise(x_T), clip=clip, **options) for prediction in PREDICTIONS
    )
    torch.testing.assert_close(eps, x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(v, x_0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["dpm++", "sde-dpm++"])
def test_few_steps_of_second_order_stay_in_range(sampler, schedule, steps):
    """Extrapolating the predicted image over the long last step would leave the range of the data."""
    scheduler, x_T = NoiseScheduler(schedule=schedule), start(64)
    images = sample(exact(scheduler), scheduler, x_T, sampler=sampler, steps=steps, clip=False,
                    draw_noise=seeded_noise(x_T))
    assert ((images - MEAN).abs() / STD).max() < 5


@pytest.mark.parametrize("sampler, eta", [("dpm++", 0), ("sde-dpm++", 1)])
def test_dpm_solver_against_the_paper(sampler, eta):
    """The multistep solver as Lu et al. (2022) write it, with h, r and e^-h: algorithm 2, and section 5 with noise."""
    scheduler, T, times = NoiseScheduler(schedule="cosine"), 600, [599, 399, 199]
    network, x, seen = exact(scheduler, "x0"), start(3), []
    z = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    draws = iter(z)
    sample(network, scheduler, x, sampler=sampler, steps=3, prediction="x0", start=T - 1, clip=False,
           draw_noise=lambda: next(draws), callback=lambda i, x_s, x_0: seen.append(x_s))
    a, sigma = [scheduler.alpha_bar(t) ** 0.5 for t in times], [(1 - scheduler.alpha_bar(t)) ** 0.5 for t in times]
    lam = [math.log(p / q) for p, q in zip(a, sigma)]
    h = [None, lam[1] - lam[0], lam[2] - lam[1]]
    predicted = [network(x_t, torch.full((3,), t)) for x_t, t in zip([x] + seen, times)]

    def step(x_t, D, i):  # the stochastic one has e^-h before x_t, e^-2h in the other places
        weight = 1 - math.exp(-(1 + eta) * h[i])
        return (sigma[i] / sigma[i - 1] * math.exp(-eta * h[i]) * x_t + a[i] * weight * D
                + eta * sigma[i] * weight**0.5 * z[i - 1])

    first = step(x, predicted[0], 1)
    r = h[1] / h[2]
    second = step(first, (1 + 1 / (2 * r)) * predicted[1] - 1 / (2 * r) * predicted[0], 2)
    torch.testing.assert_close(torch.stack(seen), torch.stack([first, second, predicted[2]]), rtol=0, atol=1e-12)
