"""The samplers, against data whose answer is known: pixels that are Gaussian, for which E[eps | x_t] is exact."""

import pytest
import torch

from forward_diffusion import NoiseScheduler
from gaussian import MEAN, STD, exact, start
from reverse_diffusion import posterior, sample, seeded_noise, trailing_timesteps

N = 4096


# On top of four standard errors of N samples comes an allowance for the finite number of steps, relative to STD.
# test_samplers.py computes what they lose exactly; these draw their noise as a user does.
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
def test_ddim_with_all_its_noise_is_ddpm(steps, clip):
    scheduler, paths = NoiseScheduler(100, beta_end=0.1), {}
    for sampler in ("ddpm", "ddim"):
        paths[sampler] = []
        sample(exact(scheduler), scheduler, start(5), sampler=sampler, steps=steps, eta=1.0, seeds=range(5), clip=clip,
               callback=lambda i, x_t, x_0: paths[sampler].append(x_t))
    torch.testing.assert_close(torch.stack(paths["ddpm"]), torch.stack(paths["ddim"]), rtol=0, atol=1e-9)


def test_ddim_with_all_its_noise_stands_a_schedule_that_ends_at_no_signal():
    """alpha-bar ends at 1e-22 here: rounding must not leave less than 0 under the root of eq. 12."""
    scheduler = NoiseScheduler(5000)
    model = exact(scheduler, "x0")
    for steps in (5000, 50, 7):
        images = sample(model, scheduler, start(2), sampler="ddim", steps=steps, eta=1.0, prediction="x0", seeds=[1, 2])
        assert images.dtype == torch.float64 and images.isfinite().all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t, s", [(1, 0), (500, 499), (999, 998), (999, 979), (30, 3)])
def test_posterior_is_bayes_rule(schedule, t, s):
    """Prior q(x_s | x_0) times likelihood q(x_t | x_s): Gaussians multiply by adding their precisions."""
    scheduler = NoiseScheduler(schedule=schedule)
    x_0, x_t = start(1, seed=1), start(1, seed=2)
    abar_s = scheduler.alpha_bar(s)
    alpha = 1.0
    for i in range(s + 1, t + 1):
        alpha *= scheduler.alpha_bar(i) / scheduler.alpha_bar(i - 1)
    prior, likelihood = 1 / (1 - abar_s), alpha / (1 - alpha)  # precisions of x_s
    expected = (prior * abar_s**0.5 * x_0 + likelihood * x_t / alpha**0.5) / (prior + likelihood)
    mean, std = posterior(scheduler, x_0, x_t, t, s)
    torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-8)
    assert std**2 == pytest.approx(1 / (prior + likelihood), rel=1e-8)


def test_posterior_is_equations_6_and_7():
    scheduler, x_0, x_t = NoiseScheduler(), start(1, seed=1), start(1, seed=2)
    for t in range(1, 1000, 37):
        beta, abar, before = (table[t].item() for table in
                              (scheduler.betas, scheduler.alphas_cumprod, scheduler.alphas_cumprod_prev))
        mean, std = posterior(scheduler, x_0, x_t, t, t - 1)
        expected = before**0.5 * beta / (1 - abar) * x_0 + (1 - beta) ** 0.5 * (1 - before) / (1 - abar) * x_t
        torch.testing.assert_close(mean, expected, rtol=0, atol=2e-3)  # float32 tables: 1 - abar has few digits
        assert std**2 == pytest.approx((1 - before) / (1 - abar) * beta, rel=2e-3)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("clip", [True, False])
def test_the_last_step_ends_at_the_predicted_image(sampler, clip):
    scheduler, seen = NoiseScheduler(), []
    images = sample(exact(scheduler), scheduler, start(4).float(), sampler=sampler, steps=7, eta=0.5, clip=clip,
                    seeds=range(4), callback=lambda i, x_t, x_0: seen.append((i, x_t, x_0)))
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


def test_clip_derives_eps_again():
    """x_t must stay made of the clean image that was kept and the noise that goes with that one."""
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


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.7), ("ddim", 0.0)])
def test_an_image_depends_on_its_own_seed_alone(sampler, eta):
    scheduler = NoiseScheduler(100, beta_end=0.1)

    def images(seeds: list[int]) -> torch.Tensor:
        torch.randn(len(seeds))  # what the global generator did must not matter
        return sample(exact(scheduler), scheduler, seeded_noise(seeds, (1, 2, 2)), sampler=sampler, steps=20, eta=eta,
                      seeds=seeds)

    alone = images([5])[0]
    assert images([3, 4, 5])[2].equal(alone)
    assert images([5, 11, 12, 13, 14, 15, 16])[0].equal(alone)
    assert not images([6])[0].equal(alone)


def test_without_seeds_the_noise_is_fresh():
    scheduler, x_T = NoiseScheduler(10, beta_end=0.5), start(2)
    assert not sample(exact(scheduler), scheduler, x_T).equal(sample(exact(scheduler), scheduler, x_T))


def test_seeded_noise():
    noise = seeded_noise([7, 8, 7], (3, 64, 64))
    assert noise.shape == (3, 3, 64, 64) and noise[0].equal(noise[2]) and not noise[0].equal(noise[1])
    assert noise[1].equal(seeded_noise([8], (3, 64, 64))[0])
    assert abs(noise[:2].mean()) < 0.03 and abs(noise[:2].std() - 1) < 0.03  # 24,576 numbers: 4.6 standard errors


def test_the_noise_of_the_steps_is_new():
    """Seeding it with the image's seed alone would add x_T over again: the images would come out too loud."""
    scheduler, seeds, seen = NoiseScheduler(), [4, 5], []
    x_T = seeded_noise(seeds, (3, 32, 32)).double()
    sample(lambda x_t, t: 0 * x_t, scheduler, x_T, steps=4, seeds=seeds, callback=lambda *a: seen.append(a))
    drawn, x_t = [x_T], x_T
    for t, s, (_, x_s, x_0) in zip([999, 749, 499], [749, 499, 249], seen):
        mean, std = posterior(scheduler, x_0, x_t, t, s)
        drawn.append((x_s - mean) / std)
        x_t = x_s
    drawn = torch.stack(drawn).transpose(0, 1).flatten(0, 1).flatten(1)  # x_T and three steps, of each of two images
    correlation = torch.corrcoef(drawn)
    torch.testing.assert_close(correlation, torch.eye(8, dtype=torch.float64), rtol=0, atol=0.08)  # 4.4 / sqrt(3072)
    torch.testing.assert_close(drawn.std(1), torch.ones(8, dtype=torch.float64), rtol=0, atol=0.06)


def test_a_network_in_lower_precision_leaves_the_path_in_float32():
    scheduler = NoiseScheduler(10)
    images = sample(lambda x_t, t: exact(scheduler)(x_t, t).bfloat16(), scheduler, start(2).float())
    assert images.dtype == torch.float32


@pytest.mark.parametrize("wrong", [
    dict(sampler="euler"), dict(steps=0), dict(steps=101), dict(eta=-0.1), dict(eta=1.1), dict(eta=float("nan")),
    dict(prediction="score"), dict(seeds=[1]), dict(seeds=[1, 2, 3]),
])
def test_wrong_arguments_are_refused(wrong):
    scheduler = NoiseScheduler(100)
    with pytest.raises(ValueError):
        sample(exact(scheduler), scheduler, start(2), **wrong)
