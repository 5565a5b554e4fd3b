"""ddpm and ddim on Gaussian pixels, for which E[eps | x_t] is exact; the registry of samplers."""

from __future__ import annotations

import inspect

import pytest
import torch
from gaussian import MEAN, STD, exact, seeded_noise, start

from forward_diffusion import NoiseScheduler
from reverse_diffusion import (
    SAMPLERS,
    Sampler,
    ddim_step,
    ddpm_step,
    default_steps,
    find_sampler,
    sample,
    trailing_timesteps,
)

N = 4096


# On top of four standard errors of N samples comes an allowance for the finite number of steps, relative to STD.
# test_samplers.py computes this error exactly; here the noise is drawn as in ordinary use.
@pytest.mark.parametrize("schedule, prediction, sampler, steps, allowance", [
    ("linear", "eps", "ddpm", None, 0.03),
    ("linear", "eps", "ddim", 50, 0.26),
    ("cosine", "v", "ddpm", None, 0.03),
    ("cosine", "x0", "ddim", 100, 0.05),
])
def test_gaussian_data_come_back(schedule, prediction, sampler, steps, allowance):
    scheduler = NoiseScheduler(schedule=schedule)
    torch.manual_seed(1)
    images = sample(exact(scheduler, prediction), scheduler, start(N), sampler=sampler, steps=steps,
                    prediction=prediction, clip=False)
    mean, std = images.mean(dim=(0, 1)), images.std(dim=(0, 1))
    assert ((mean - MEAN).abs() / STD < 4 / N**0.5 + allowance).all()
    assert ((std / STD - 1).abs() < 4 / (2 * N) ** 0.5 + allowance).all()


@pytest.mark.parametrize("steps", [100, 10])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_with_eta_1_is_ddpm(steps, clip):
    scheduler, paths, x_T = NoiseScheduler(100, beta_end=0.1), {}, start(5)
    for sampler, options in (("ddpm", {}), ("ddim", dict(eta=1.0))):
        path = paths[sampler] = []
        sample(exact(scheduler), scheduler, x_T, sampler=sampler, steps=steps, clip=clip,
               draw_noise=seeded_noise(x_T), callback=lambda i, x_t, x_0, path=path: path.append(x_t), **options)
    torch.testing.assert_close(torch.stack(paths["ddpm"]), torch.stack(paths["ddim"]), rtol=0, atol=1e-9)


def test_ddim_with_eta_1_on_a_schedule_that_ends_without_signal():
    """alpha-bar ends at 1e-22 here: rounding must not leave a negative number under the root of eq. 12."""
    scheduler = NoiseScheduler(5000)
    model = exact(scheduler, "x0")
    for steps in (5000, 50, 7):
        images = sample(model, scheduler, start(2), sampler="ddim", steps=steps, eta=1.0, prediction="x0")
        assert images.dtype == torch.float64 and images.isfinite().all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t, s", [(1, 0), (500, 499), (999, 998), (999, 979), (30, 3)])
def test_ddpm_step_is_bayes_rule(schedule, t, s):
    """Prior q(x_s | x_0) times likelihood q(x_t | x_s): Gaussians multiply by adding their precisions."""
    scheduler = NoiseScheduler(schedule=schedule)
    x_0, x_t = start(1, seed=1), start(1, seed=2)
    abar_s = scheduler.alpha_bar(s)
    alpha = 1.0
    for i in range(s + 1, t + 1):
        alpha *= scheduler.alpha_bar(i) / scheduler.alpha_bar(i - 1)
    prior, likelihood = 1 / (1 - abar_s), alpha / (1 - alpha)  # precisions of x_s
    expected = (prior * abar_s**0.5 * x_0 + likelihood * x_t / alpha**0.5) / (prior + likelihood)
    mean, std = ddpm_step(scheduler, x_0, x_t, t, s)
    torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-8)
    assert std**2 == pytest.approx(1 / (prior + likelihood), rel=1e-8)


def test_ddpm_step_is_equations_6_and_7():
    scheduler, x_0, x_t = NoiseScheduler(), start(1, seed=1), start(1, seed=2)
    for t in range(1, 1000, 37):
        beta, abar, abar_prev = (table[t].item() for table in
                                 (scheduler.betas, scheduler.alphas_cumprod, scheduler.alphas_cumprod_prev))
        mean, std = ddpm_step(scheduler, x_0, x_t, t, t - 1)
        expected = abar_prev**0.5 * beta / (1 - abar) * x_0 + (1 - beta) ** 0.5 * (1 - abar_prev) / (1 - abar) * x_t
        torch.testing.assert_close(mean, expected, rtol=0, atol=2e-3)  # float32 tables: 1 - abar has few digits
        assert std**2 == pytest.approx((1 - abar_prev) / (1 - abar) * beta, rel=2e-3)


@pytest.mark.parametrize("sampler, options", [("ddpm", {}), ("ddim", dict(eta=0.5))])
@pytest.mark.parametrize("clip", [True, False])
def test_the_last_step_ends_at_the_predicted_image(sampler, options, clip):
    scheduler, seen = NoiseScheduler(), []
    images = sample(exact(scheduler), scheduler, start(4).float(), sampler=sampler, steps=7, clip=clip,
                    callback=lambda i, x_t, x_0: seen.append((i, x_t, x_0)), **options)
    assert [i for i, _, _ in seen] == list(range(7))
    assert images.equal(seen[-1][1])
    torch.testing.assert_close(images, seen[-1][2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_clip_keeps_a_bad_network_in_range(sampler):
    scheduler, seen = NoiseScheduler(), []

    def bad(x_t, t):
        return 3 * x_t.flip(0) - 2

    images = sample(bad, scheduler, start(64).float(), sampler=sampler, steps=20, callback=lambda *a: seen.append(a))
    assert images.abs().max() <= 1 and all(x_0.abs().max() <= 1 for _, _, x_0 in seen)
    assert sample(bad, scheduler, start(64).float(), sampler=sampler, steps=20, clip=False).abs().max() > 1
    assert sample(bad, scheduler, start(64).float(), sampler=sampler, steps=20, clip=0.5).abs().max() <= 0.5


def test_clip_derives_eps_again():
    """x_s must be made of the clipped x_0 and of the noise that belongs to it."""
    scheduler, seen, x_T = NoiseScheduler(), [], start(8)
    sample(lambda x_t, t: -x_t, scheduler, x_T, sampler="ddim", steps=10, callback=lambda *a: seen.append(a))
    _, x_s, x_0 = seen[0]
    assert (x_0.abs() == 1).any()  # it did clip
    abar_t, abar_s = scheduler.alpha_bar(999), scheduler.alpha_bar(899)
    eps = (x_T - abar_t**0.5 * x_0) / (1 - abar_t) ** 0.5
    torch.testing.assert_close(x_s, abar_s**0.5 * x_0 + (1 - abar_s) ** 0.5 * eps)


def test_trailing_timesteps():
    assert trailing_timesteps(1000, 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]  # Lin et al., table 2
    assert trailing_timesteps(1000, None) == trailing_timesteps(1000, 1000) == list(range(999, -1, -1))
    for num_timesteps in (2, 50, 97, 1000):
        assert trailing_timesteps(num_timesteps, 1) == [num_timesteps - 1]
        for steps in range(1, num_timesteps + 1):
            timesteps = trailing_timesteps(num_timesteps, steps)
            assert len(timesteps) == steps and timesteps[0] == num_timesteps - 1 and timesteps[-1] >= 0
            gaps = [a - b for a, b in zip(timesteps, timesteps[1:])]
            assert all(gap >= 1 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)


def test_by_default_the_noise_is_fresh():
    scheduler, x_T = NoiseScheduler(10, beta_end=0.5), start(2)
    assert not sample(exact(scheduler), scheduler, x_T).equal(sample(exact(scheduler), scheduler, x_T))


@pytest.mark.parametrize("sampler, options, draws", [
    ("ddpm", {}, 4), ("sde-dpm++", {}, 4), ("ddim", dict(eta=0.5), 4), ("ddim", {}, 0), ("dpm++", {}, 0)])
def test_noise_is_drawn_once_a_step_but_for_the_last(sampler, options, draws):
    scheduler, x_T, calls = NoiseScheduler(), start(2), []

    def draw_noise():
        calls.append(1)
        return torch.zeros_like(x_T)

    sample(exact(scheduler), scheduler, x_T, sampler=sampler, steps=5, draw_noise=draw_noise, **options)
    assert len(calls) == draws


def test_a_network_in_lower_precision_leaves_the_path_in_float32():
    scheduler = NoiseScheduler(10)
    images = sample(lambda x_t, t: exact(scheduler)(x_t, t).bfloat16(), scheduler, start(2).float())
    assert images.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# the registry


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_a_step_with_the_documented_signature(name):
    sampler, scheduler, x = SAMPLERS[name], NoiseScheduler(), start(2)
    parameters = list(inspect.signature(sampler.step).parameters.values())
    assert [p.name for p in parameters[:6]] == ["scheduler", "x_0", "x_t", "t", "t_next", "previous"]
    optional = {p.name for p in parameters[6:] if p.default is not inspect.Parameter.empty}
    assert len(optional) == len(parameters) - 6 and set(sampler.options) <= optional
    assert sampler.about and (sampler.steps is None or sampler.steps > 0)
    for t_next, previous in ((500, None), (500, (899, x)), (-1, (899, x))):
        mean, std = sampler.step(scheduler, 0.5 * x, x, 799, t_next, previous)
        assert mean.shape == x.shape and mean.dtype == x.dtype and isinstance(std, float)
        assert (std == 0) == (sampler.deterministic or t_next == -1)


def test_default_steps():
    assert [default_steps(name, 1000) for name in ("ddpm", "ddim", "dpm++", "sde-dpm++")] == [1000, 50, 20, 20]
    assert [default_steps(name, 30) for name in ("ddpm", "ddim", "dpm++", "sde-dpm++")] == [30, 30, 20, 20]
    for function in (lambda: default_steps("euler", 10), lambda: find_sampler("euler")):
        with pytest.raises(ValueError, match="unknown sampler 'euler': choose one of ddpm, ddim, dpm"):
            function()


def mean_of_ddim(scheduler, x_0, x_t, t, t_next, previous=None, scale=1.0):
    """A sampler that no file knows of."""
    mean, _ = ddim_step(scheduler, x_0, x_t, t, t_next, previous)
    return scale * mean, 0.0


def test_a_new_sampler_is_a_line_in_the_registry(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", Sampler(mean_of_ddim, 7, True, ("scale",)))
    scheduler, x_T = NoiseScheduler(), start(3)
    network = exact(scheduler)
    ours = sample(network, scheduler, x_T, sampler="mine", steps=7)
    assert ours.equal(sample(network, scheduler, x_T, sampler="ddim", steps=7))
    assert not ours.equal(sample(network, scheduler, x_T, sampler="mine", steps=7, scale=0.9))
    assert default_steps("mine", 1000) == 7
    with pytest.raises(ValueError, match="sampler mine has no option eta"):
        sample(network, scheduler, x_T, sampler="mine", eta=0.5)


@pytest.mark.parametrize("sampler, option", [
    (sampler, option) for sampler in SAMPLERS for option in ("eta", "variance", "nonsense")
    if option not in SAMPLERS[sampler].options])
def test_an_option_of_another_sampler_is_refused(sampler, option):
    scheduler = NoiseScheduler(10)
    with pytest.raises(ValueError, match=f"sampler {sampler.replace('+', '.')} has no option {option}"):
        sample(exact(scheduler), scheduler, start(2), sampler=sampler, **{option: 1.0})


@pytest.mark.parametrize("wrong", [
    dict(sampler="euler"), dict(steps=0), dict(steps=101), dict(sampler="ddim", eta=-0.1),
    dict(sampler="ddim", eta=1.1), dict(sampler="ddim", eta=float("nan")), dict(prediction="score"),
])
def test_wrong_arguments_are_refused(wrong):
    scheduler = NoiseScheduler(100)
    with pytest.raises(ValueError):
        sample(exact(scheduler), scheduler, start(2), **wrong)
