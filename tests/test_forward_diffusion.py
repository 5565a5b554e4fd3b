"""The forward process against its definition: schedules, the jump to any timestep, eps / v / x_0."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forward_diffusion import PREDICTIONS, SCHEDULES, NoiseScheduler
from utils.seeding import seed_from


def linear_betas(num_timesteps: int = 1000) -> np.ndarray:
    """Ho et al. (2020), section 4, written without torch."""
    return np.array([1e-4 + (0.02 - 1e-4) * i / (num_timesteps - 1) for i in range(num_timesteps)])


def coefficients(scheduler: NoiseScheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of image and noise in add_noise at every timestep, float64 [T] each."""
    t = torch.arange(scheduler.num_timesteps)
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    signal, sigma = scheduler.add_noise(one, t, 0 * one), scheduler.add_noise(0 * one, t, one)
    return signal.flatten(), sigma.flatten()


def test_linear_schedule():
    scheduler = NoiseScheduler()
    assert scheduler.betas[0] == pytest.approx(1e-4, rel=1e-6) and scheduler.betas[-1] == pytest.approx(0.02, rel=1e-6)
    np.testing.assert_allclose(scheduler.betas, linear_betas(), rtol=1e-6)
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, abs=1e-9)  # the published constant
    assert scheduler.alpha_bar(999) == pytest.approx(np.prod(1 - linear_betas()), rel=1e-12)


@pytest.mark.parametrize("num_timesteps", [20, 1000])
def test_cosine_schedule_is_nichol_and_dhariwals(num_timesteps):
    scheduler = NoiseScheduler(num_timesteps, schedule="cosine")
    f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = f / f[0]  # eq. 17
    # The clip at 0.999 acts on the last beta alone, so all the others' products are the closed form.
    np.testing.assert_allclose([scheduler.alpha_bar(t) for t in range(num_timesteps - 1)], abar[1:-1], rtol=1e-9)
    assert scheduler.betas[-1].item() == pytest.approx(0.999) and scheduler.betas[:-1].max() < 0.999
    assert scheduler.alpha_bar(num_timesteps - 1) == pytest.approx(abar[-2] * 0.001, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_consistent(schedule):
    scheduler = NoiseScheduler(100, schedule=schedule)
    for table in (scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod, scheduler.alphas_cumprod_prev):
        assert table.shape == (100,) and table.dtype == torch.float32
    torch.testing.assert_close(scheduler.alphas, 1 - scheduler.betas)
    torch.testing.assert_close(scheduler.alphas_cumprod, scheduler.alphas_cumprod_prev * scheduler.alphas)
    assert scheduler.alphas_cumprod_prev[0] == 1 == scheduler.alpha_bar(-1)
    abar = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(scheduler.snr(), abar / (1 - abar), rtol=1e-3, atol=0)  # abar is rounded to float32


def test_one_jump_is_noising_step_by_step():
    signal, sigma = coefficients(NoiseScheduler())
    mean, variance = 1.0, 0.0  # of x_t, for x_0 = 1
    path = []
    for beta in linear_betas():  # eq. 2: x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        path.append((mean, variance))
    np.testing.assert_allclose(torch.stack([signal, sigma**2], dim=1), path, rtol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_variance_is_preserved(schedule):
    signal, sigma = coefficients(NoiseScheduler(schedule=schedule))
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(1000, dtype=torch.float64))
    assert (signal.diff() < 0).all() and (sigma.diff() > 0).all()


def test_the_least_noise_is_exact_in_float32():
    """sqrt(1 - abar) from a float32 abar would be 3e-4 off: the table must be computed in float64."""
    x = torch.zeros(1, 3, 2, 2)
    x_t = NoiseScheduler().add_noise(x, torch.tensor([0]), x + 1)
    assert x_t.dtype == torch.float32 and x_t[0, 0, 0, 0].item() == pytest.approx(0.01, rel=1e-6)


def test_each_image_of_a_batch_has_its_own_timestep():
    scheduler, generator = NoiseScheduler(), torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([999, 0, 500, 0, 3])
    together = scheduler.add_noise(x_0, t, noise)
    for outside in (-1, scheduler.num_timesteps):
        with pytest.raises(ValueError, match=f"timestep {outside} is outside of 0 ... "):
            scheduler.add_noise(x_0, outside, noise)
    for i in range(5):
        torch.testing.assert_close(together[i : i + 1], scheduler.add_noise(x_0[[i]], t[[i]], noise[[i]]))
    assert (together[0] - noise[0]).abs().max() < 0.05 < (together[1] - noise[1]).abs().max()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_are_inverses_at_every_timestep(schedule, prediction):
    scheduler, t = NoiseScheduler(schedule=schedule), torch.arange(1000)
    x_0, noise = torch.randn(2, 1000, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = scheduler.add_noise(x_0, t, noise)
    found = scheduler.to_x_0(prediction, scheduler.target(prediction, x_0, t, noise), x_t, t)
    torch.testing.assert_close(found, x_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(scheduler.to_eps(found, x_t, t), noise, rtol=0, atol=1e-10)


def test_targets():
    scheduler, t = NoiseScheduler(schedule="cosine"), torch.tensor([400])
    x_0, noise = torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    abar = scheduler.alpha_bar(400)
    assert scheduler.target("eps", x_0, t, noise).equal(noise)
    assert scheduler.target("x0", x_0, t, noise).equal(x_0)
    v = abar**0.5 * noise - (1 - abar) ** 0.5 * x_0  # Salimans & Ho (2022), appendix D
    torch.testing.assert_close(scheduler.target("v", x_0, t, noise), v)


def test_config_builds_the_scheduler_again():
    for scheduler in (NoiseScheduler(50, 1e-3, 0.1), NoiseScheduler(77, schedule="cosine"),
                      NoiseScheduler(60, zero_terminal_snr=True)):
        again = NoiseScheduler(**scheduler.config())
        assert again.config() == scheduler.config() and again.alphas_cumprod.equal(scheduler.alphas_cumprod)
    older = dict(num_timesteps=50, beta_start=1e-3, beta_end=0.1, schedule="linear")  # as old checkpoints have it
    assert not NoiseScheduler(**older).zero_terminal_snr


@pytest.mark.parametrize("wrong", [
    dict(num_timesteps=1), dict(schedule="sigmoid"), dict(beta_start=0.0), dict(beta_end=1.0),
    dict(beta_start=0.02, beta_end=1e-4), dict(beta_start=float("nan")),
])
def test_a_wrong_schedule_is_refused(wrong):
    with pytest.raises(ValueError):
        NoiseScheduler(**wrong)


def test_wrong_arguments_are_refused():
    scheduler, x, t = NoiseScheduler(10), torch.zeros(1, 1, 2, 2), torch.tensor([0])
    for call in (lambda: scheduler.target("score", x, t, x), lambda: scheduler.to_x_0("score", x, x, t)):
        with pytest.raises(ValueError, match="unknown prediction 'score'"):
            call()
    for t in (-2, 10):
        with pytest.raises(ValueError):
            scheduler.alpha_bar(t)


def test_seed_from_tells_any_two_positions_apart():
    positions = [(1, 2), (2, 1), (1,), (1, 0), (1, 0, 0), (0,), (0, 1), (), (2**32,), (2**32 + 1,), (-1,), (-1, 0)]
    positions += [(0, step) for step in range(2, 1000)]
    seeds = [seed_from(*position) for position in positions]
    for stream in ("order", "step", "steps"):
        seeds += [seed_from(*position, stream=stream) for position in positions[:12]]
    assert len(set(seeds)) == len(positions) + 36
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_from(1, 2) == 4_013_407_976_395_716_621  # with other values, old runs could not be resumed


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_the_error_of_x_0_equally_for_every_prediction(schedule, prediction):
    scheduler = NoiseScheduler(schedule=schedule)
    t = torch.tensor([0, 1, 100, 300, 500, 800, 990])
    x_t, output = torch.randn(2, len(t), 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = scheduler.to_x_0(prediction, output + 0.01, x_t, t) - scheduler.to_x_0(prediction, output, x_t, t)
    weight = scheduler.loss_weight("min_snr", prediction, t).double()
    ratio = weight * 0.01**2 / (error**2).flatten()
    torch.testing.assert_close(ratio, scheduler.snr()[t].clamp(max=5), rtol=1e-3, atol=0)
    assert (scheduler.loss_weight("uniform", prediction, t) == 1).all()
    with pytest.raises(ValueError, match="uniform, min_snr"):
        scheduler.loss_weight("other", prediction, t)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [2, 50, 1000])
def test_zero_terminal_snr_is_algorithm_1_of_lin_et_al(schedule, num_timesteps):
    """sqrt(abar) is shifted so that the last is 0, and scaled so that the first stays the same."""
    before, after = (NoiseScheduler(num_timesteps, schedule=schedule, zero_terminal_snr=on) for on in (False, True))
    old, new = (torch.tensor([s.alpha_bar(t) for t in range(num_timesteps)], dtype=torch.float64).sqrt()
                for s in (before, after))
    assert new[-1] == 0 and new[0] == pytest.approx(old[0].item(), rel=1e-14)
    torch.testing.assert_close(new, (old - old[-1]) * old[0] / (old[0] - old[-1]), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cumprod(1 - after.betas.double(), 0).sqrt()[:-1], new[:-1], rtol=1e-3, atol=0)
    assert after.betas[-1] == 1 and after.alphas[-1] == 0 and (0 < after.betas).all() and (after.betas[:-1] < 1).all()
    assert after.alphas_cumprod_prev[0] == 1 and after.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_leaves_nothing_undefined(schedule):
    scheduler, t = NoiseScheduler(schedule=schedule, zero_terminal_snr=True), torch.tensor([999, 998, 0])
    x_0, noise = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = scheduler.add_noise(x_0, t, noise)
    assert x_t[0].equal(noise[0]) and scheduler.target("v", x_0, t, noise)[0].equal(-x_0[0])
    assert scheduler.snr().isfinite().all() and scheduler.snr()[-1] == 0
    torch.testing.assert_close(scheduler.to_eps(x_0, x_t, t), noise, rtol=0, atol=1e-12)
    for prediction in PREDICTIONS:
        weight = scheduler.loss_weight("min_snr", prediction, t)
        assert weight.isfinite().all() and weight[0] == (1 if prediction == "eps" else 0)
    for prediction in ("v", "x0"):
        found = scheduler.to_x_0(prediction, scheduler.target(prediction, x_0, t, noise), x_t, t)
        torch.testing.assert_close(found, x_0, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="'eps' does not determine x_0 at timestep 999.*choose v or x0"):
        scheduler.to_x_0("eps", noise, x_t, t)
    torch.testing.assert_close(scheduler.to_x_0("eps", noise[2:], x_t[2:], t[2:]), x_0[2:])


def test_to_eps_takes_one_timestep_for_all():
    scheduler, (x_0, x_t) = NoiseScheduler(), torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert scheduler.to_eps(x_0, x_t, 700).equal(scheduler.to_eps(x_0, x_t, torch.full((4,), 700)))
