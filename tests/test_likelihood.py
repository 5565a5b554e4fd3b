"""The variational bound on Gaussian pixels, for which the best network, each term and the entropy are known exactly."""

import math

import pytest
import torch

from evaluation import likelihood
from evaluation.likelihood import Bound, generalisation_gap, log_likelihood_of_levels, variational_bound
from forward_diffusion import NoiseScheduler

STD = 0.25  # 32 of the 256 levels, and 4 deviations from the middle to either end
ENTROPY = 0.5 * math.log2(2 * math.pi * math.e * STD**2) + math.log2(127.5)  # of the rounded values, in bits


def gaussian_images(n: int = 64, side: int = 16) -> torch.Tensor:
    x = STD * torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def exact(scheduler: NoiseScheduler, prediction: str):
    """E[output | x_t] for pixels N(0, STD^2): E[x_0 | x_t] = a STD^2 x_t / (a^2 STD^2 + b^2)."""
    abar = torch.tensor([scheduler.alpha_bar(t) for t in range(scheduler.num_timesteps)], dtype=torch.float64)

    def model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a2 = abar[t].view(-1, 1, 1, 1)
        x_0 = a2.sqrt() * STD**2 / (a2 * STD**2 + 1 - a2) * x_t
        return scheduler.target(prediction, x_0.float(), t, scheduler.to_eps(x_0.float(), x_t, t))

    return model


def closed_form(scheduler: NoiseScheduler) -> float:
    """The bound of that model with variances beta-tilde, in bits: E (x_0 - guess)^2 is STD^2 / (SNR STD^2 + 1)."""
    snr = scheduler.snr()
    error = STD**2 / (snr * STD**2 + 1)
    abar = scheduler.alpha_bar(scheduler.num_timesteps - 1)
    prior = 0.5 * (abar * (STD**2 - 1) - math.log1p(-abar))
    steps = (0.5 * (snr[:-1] - snr[1:]) * error[1:]).sum().item()
    # The last step: a bin's probability is the Gaussian over it; how far the guess lies from its middle is Gaussian.
    abar_0, abar_1 = scheduler.alpha_bar(0), scheduler.alpha_bar(1)
    std = ((1 - abar_1 / abar_0) * (1 - abar_0) / (1 - abar_1)) ** 0.5
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    off = -z.abs() * error[0].sqrt()  # by symmetry; in the lower tail, differences stay exact
    high, low = (off + 1 / 255) / std, (off - 1 / 255) / std
    probability = (torch.erfc(-high / 2**0.5) - torch.erfc(-low / 2**0.5)) / 2
    decoder = -(torch.exp(-(z**2) / 2) * probability.log()).sum() / torch.exp(-(z**2) / 2).sum()
    return (prior + steps + decoder.item()) / math.log(2)


def bound_of(scheduler: NoiseScheduler, prediction: str = "v", n: int = 32, **options) -> Bound:
    model = exact(scheduler, prediction)
    return variational_bound(model, scheduler, gaussian_images(n), prediction=prediction, clip=False, **options)


@pytest.mark.parametrize("schedule, prediction", [("linear", "eps"), ("linear", "x0"), ("cosine", "v")])
def test_a_gaussian_with_its_exact_predictor_has_the_bound_of_the_closed_form(schedule, prediction):
    scheduler = NoiseScheduler(schedule=schedule)
    bound = bound_of(scheduler, prediction, num_timesteps=32, variance="beta_tilde")
    assert bound.mean == pytest.approx(closed_form(scheduler), rel=0.01)
    assert bound.mean > ENTROPY


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_with_variances_beta_it_is_the_entropy_to_one_percent_and_never_below(schedule):
    """beta is the right variance for a smooth density, so nothing is lost but what a finite number of steps costs."""
    bound = bound_of(NoiseScheduler(schedule=schedule), num_timesteps=32)
    assert ENTROPY < bound.mean < 1.01 * ENTROPY


def test_more_steps_come_nearer_to_the_entropy():
    excess = []
    for num_timesteps in (20, 60, 180):
        scheduler = NoiseScheduler(num_timesteps, 1e-4 * 180 / num_timesteps, 0.11 * 180 / num_timesteps)
        excess.append(bound_of(scheduler, n=4, num_timesteps=None).mean - ENTROPY)
    assert excess[0] > excess[1] > excess[2] > 0


def test_the_estimate_agrees_with_the_sum_over_every_timestep_and_knows_its_own_error():
    scheduler = NoiseScheduler(120, 1e-3, 0.15)
    whole = bound_of(scheduler, n=16, num_timesteps=None)
    assert [low for low, _ in whole.ranges] == list(range(1, 120))
    estimates = torch.tensor([bound_of(scheduler, n=16, num_timesteps=10, seed=seed).mean for seed in range(24)])
    error = estimates.std().item()
    assert abs(estimates.mean().item() - whole.mean) < 4 * error / 24**0.5 + 4 * whole.stderr
    assert 0.5 < bound_of(scheduler, n=16, num_timesteps=10).stderr / error < 2  # the data, too, vary a little


def test_a_wrong_predictor_costs_bits_and_the_batch_size_changes_nothing():
    scheduler = NoiseScheduler(100, 1e-3, 0.2)
    model, images = exact(scheduler, "x0"), gaussian_images(6)
    options = dict(prediction="x0", num_timesteps=8, clip=False)
    right = variational_bound(model, scheduler, images, batch_size=64, **options)
    again = variational_bound(model, scheduler, images, batch_size=7, **options)
    assert torch.allclose(right.bits, again.bits)
    wrong = variational_bound(lambda x_t, t: model(x_t, t) + 0.05, scheduler, images, **options)
    assert (wrong.bits > right.bits + 0.05).all()


def test_labels_reach_the_model_with_their_own_image():
    scheduler, images = NoiseScheduler(50), gaussian_images(3)
    labels = torch.eye(3)
    truth = images.float() / 127.5 - 1

    def model(x_t, t, labels):
        return truth[labels.argmax(dim=1)]

    right = variational_bound(model, scheduler, images, labels=labels, prediction="x0", num_timesteps=4)
    wrong = variational_bound(model, scheduler, images, labels=labels.roll(1, 0), prediction="x0", num_timesteps=4)
    assert wrong.bits.min() > right.bits.max() + 1


def test_the_levels_have_probabilities_that_add_up_to_one():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 256)
    for mean in (-1.0, -0.337, 0.0, 0.999, 3.0):
        for std in (1e-3, 0.01, 0.4):
            log_p = log_likelihood_of_levels(levels, torch.full((1, 256), mean), std)
            assert log_p.isfinite().all() and log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_the_gap_is_found_and_correction_for_detail_makes_it_more_precise():
    generator = torch.Generator().manual_seed(0)
    detail = [2 + torch.rand(n, generator=generator) for n in (300, 60)]
    bits = [x + 0.01 * torch.randn(len(x), generator=generator) for x in detail]
    bits[1] = bits[1] + 0.05
    seen, unseen = [Bound(x.double(), torch.zeros(len(x), 1), torch.zeros(len(x)), [(1, 9)]) for x in bits]
    plain, plain_error = generalisation_gap(seen, unseen)
    corrected, corrected_error = generalisation_gap(seen, unseen, tuple(detail))
    assert abs(plain - 0.05) < 4 * plain_error
    assert abs(corrected - 0.05) < 4 * corrected_error and corrected_error < plain_error / 10


def test_unknown_choices_are_refused():
    scheduler, images = NoiseScheduler(10), gaussian_images(1)
    with pytest.raises(ValueError, match="variance"):
        variational_bound(exact(scheduler, "v"), scheduler, images, variance="learned")
    with pytest.raises(ValueError, match="at least 1"):
        variational_bound(exact(scheduler, "v"), scheduler, images, num_timesteps=0)


def test_values_of_another_range_have_256_levels_in_that_range():
    """For a network that predicts 0 every term has a closed form; the range here is -3 ... 3."""
    scheduler, latent_range = NoiseScheduler(50), 3.0
    images = torch.randint(126, 130, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    bound = variational_bound(lambda x_t, t: torch.zeros_like(x_t), scheduler, images, prediction="x0",
                              num_timesteps=None, latent_range=latent_range)
    x_0, nats_to_bits = latent_range * (images.double() / 127.5 - 1), 1 / (images[0].numel() * math.log(2))
    constant, weight, std = likelihood._coefficients(scheduler, "beta")
    steps = constant[1:] * images[0].numel() + weight[1:] * x_0.square().sum(dim=(1, 2, 3))[:, None]
    assert torch.allclose(bound.steps, steps * nats_to_bits, rtol=1e-5)
    below = torch.special.ndtr  # in the lower tail, where it is exact
    mass = below((latent_range / 255 - x_0.abs()) / std) - below((-latent_range / 255 - x_0.abs()) / std)
    assert torch.allclose(bound.decoder, -mass.log().sum(dim=(1, 2, 3)) * nats_to_bits, rtol=1e-6)
    abar = scheduler.alpha_bar(49)
    prior = 0.5 * (abar * x_0**2 - abar - math.log(1 - abar)).sum(dim=(1, 2, 3))
    assert torch.allclose(bound.prior, prior * nats_to_bits, rtol=1e-6)
