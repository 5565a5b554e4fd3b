"""Likelihood of images under a diffusion model: the variational bound in bits per dimension, term by term.

    bound = variational_bound(model, scheduler, images, prediction="v")     # images uint8 [N, 3, S, S]
    print(bound.mean, bound.stderr)                                         # bits per dimension

Fewer bits mean that the model assigns the image a higher probability. The bound is that of Ho et al. (2020, eq. 5),
L_T + L_{T-1} + ... + L_1 + L_0 (DIFFUSION_THEORY.md, "Why it is maximum likelihood"), divided by the 3 S S values of an
image (as in Nichol & Dhariwal 2021). Choices made here:

- The variances of the learned steps are beta, one of the two fixed choices of Ho et al. (section 3.2). Both give a
  bound, so the lower one is the better one, and beta was lower wherever it was tried: 4.28 bits against 4.72 for a
  model of Pokémon. Where little noise is left, beta-tilde is too narrow for a network that is not exact, and a
  Gaussian that is too narrow costs many bits. As in `sample`, "beta_tilde" can be chosen.
- At the last step, to the clean image, beta-tilde is 0; as in the code of Ho et al., that of the step before is used.
  The Gaussian is integrated over the bin of each 8-bit value (Ho et al. 2020, eq. 13).
- The predicted clean image is clipped to [-1, 1], as when sampling. Images lie in that range, so clipping can only
  bring the prediction nearer to the true image, and lower the bound.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from evaluation.error_bars import adjusted_difference, standard_error
from forward_diffusion import NoiseScheduler
from reverse_diffusion import VARIANCES
from utils.images import to_pil
from utils.seeding import seed_from


@dataclass
class Bound:
    """The bound of N images in bits per dimension, by term. Timesteps count from 0, as everywhere in the code.

    prior: [N], L_T: the cost of x_T not being pure noise.
    steps: [N, K], the terms of t = 1 ... T-1, summed within K ranges of t; estimates unless every t was visited.
    decoder: [N], L_0: the cost of the 8-bit values at the end.
    ranges: the K ranges (first t, last t).
    """

    prior: torch.Tensor
    steps: torch.Tensor
    decoder: torch.Tensor
    ranges: list[tuple[int, int]]

    @property
    def bits(self) -> torch.Tensor:
        """The bound of each image, float64 [N]."""
        return self.prior + self.steps.sum(dim=1) + self.decoder

    @property
    def mean(self) -> float:
        return self.bits.mean().item()

    @property
    def stderr(self) -> float:
        """Standard error of the mean, over other images, other noise and other timesteps."""
        return standard_error(self.bits)


# ---------------------------------------------------------------------------------------------------------------------
# the bound


def variational_bound(
    model: Callable[..., torch.Tensor],
    scheduler: NoiseScheduler,
    images: torch.Tensor,
    *,
    latent_range: float = 1.0,
    prediction: str = "eps",
    labels: torch.Tensor | None = None,
    num_timesteps: int | None = 16,
    variance: str = "beta",
    clip: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    callback: Callable[[int], None] | None = None,
) -> Bound:
    """Compute the bound of images, uint8 [N, 3, S, S], or of latents in 256 levels, uint8 [N, C, H, W].

    Args:
        model: any callable (x_t, t[, labels]) -> output; x_t is float32 on `device`.
        latent_range: the levels 0 ... 255 reach the model as -latent_range ... latent_range.
        prediction: what the output means: "eps", "v" or "x0".
        labels: [N, K], the classes of each image; None for a model without.
        num_timesteps: number of t = 1 ... T-1 that are visited for each image, one random t in each of as many ranges.
            The ranges grow with t, since the terms are largest and change fastest near 0. None visits every t.
        seed: noise and timesteps of image i depend on (seed, i), so different models get the same ones.
        batch_size: network passes at a time.
        callback: called after each batch with the number of its passes; N (1 + num_timesteps) in all.

    Raises:
        ValueError: for an unknown variance or prediction, or fewer than 1 timesteps.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}: choose one of {', '.join(VARIANCES)}")
    dimensions = images[0].numel()
    ranges = _timestep_ranges(scheduler.num_timesteps, num_timesteps)
    range_widths = torch.tensor([high - low + 1 for low, high in ranges])
    constant, weight, decoder_std = _coefficients(scheduler, variance)

    # One pass at t = 0 and one in each range for each image; a batch holds passes of several images.
    passes = 1 + len(ranges)
    terms = torch.empty(len(images) * passes, dtype=torch.float64)
    decoder = torch.empty(len(images), dtype=torch.float64)
    for low in range(0, len(terms), batch_size):
        numbers = torch.arange(low, min(low + batch_size, len(terms)))
        image = numbers // passes
        t, noise = _draw_passes(image.tolist(), (numbers % passes).tolist(), ranges, seed, images[0].shape)
        # Predict the clean image
        x_0 = latent_range * (images[image].to(device).float() / 127.5 - 1)
        image_labels = None if labels is None else labels[image].to(device)
        predicted = predict_x_0(model, scheduler, prediction, x_0, t.to(device), noise.to(device), image_labels)
        if clip:
            predicted = predicted.clamp(-latent_range, latent_range)

        # Terms of the bound
        squared_error = (predicted - x_0).double().square().sum(dim=(1, 2, 3)).cpu()
        terms[numbers] = dimensions * constant[t] + weight[t] * squared_error
        last = t == 0
        if last.any():
            mean, std = predicted.cpu()[last] / latent_range, decoder_std / latent_range
            log_p = log_likelihood_of_levels(images[image[last]], mean, std)
            decoder[image[last]] = -log_p.sum(dim=(1, 2, 3))
        if callback is not None:
            callback(len(numbers))

    steps = terms.view(len(images), passes)[:, 1:] * range_widths
    prior = _prior_term(scheduler, latent_range * (images.double() / 127.5 - 1))
    nats_to_bits = 1 / (dimensions * math.log(2))  # per dimension
    return Bound(prior * nats_to_bits, steps * nats_to_bits, decoder * nats_to_bits, ranges)


def log_likelihood_of_levels(images: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """Return the log probability, in nats, of 8-bit values under a Gaussian (Ho et al. 2020, eq. 13).

    The bin of value v is within 1/255 of v / 127.5 - 1; the bins of 0 and 255 reach to infinity, so that the
    probabilities of all values add up to 1.

    Args:
        images: uint8, any shape.
        mean: of the Gaussians, of the same shape, in [-1, 1].
    """
    x, mean = images.double() / 127.5 - 1, mean.double()
    low = torch.where(images == 0, -math.inf, (x - 1 / 255 - mean) / std)
    high = torch.where(images == 255, math.inf, (x + 1 / 255 - mean) / std)
    # Move both ends into the lower tail, by symmetry, and subtract in logarithms: far out, each would round to 0 or 1.
    mirror = low + high > 0
    low, high = torch.where(mirror, -high, low), torch.where(mirror, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log1p(-torch.exp(log_low - log_high))


def _timestep_ranges(num_timesteps: int, count: int | None) -> list[tuple[int, int]]:
    """Divide t = 1 ... T-1 into `count` ranges (first, last) of increasing width, or into single timesteps."""
    last = num_timesteps - 1
    if count is None or count >= last:
        return [(t, t) for t in range(1, last + 1)]
    if count < 1:
        raise ValueError(f"the number of timesteps to visit must be at least 1, not {count}")
    starts = [1]
    for k in range(1, count):  # as near to geometric as integers allow, leaving room for the ranges that follow
        geometric = round((last + 1) ** (k / count))
        starts.append(min(max(starts[-1] + 1, geometric), last + 1 - (count - k)))
    ends = [start - 1 for start in starts[1:]] + [last]
    return list(zip(starts, ends))


def _draw_passes(images: list[int], passes: list[int], ranges: list[tuple[int, int]], seed: int, shape: torch.Size
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the timesteps [B] and the noise [B, *shape] of some images' passes; pass 0 has t = 0, pass k range k."""
    timesteps, noise = [], []
    for i, k in zip(images, passes):
        generator = torch.Generator().manual_seed(seed_from(seed, i, k, stream="likelihood"))
        u = torch.rand((), generator=generator, dtype=torch.float64).item()
        noise.append(torch.randn(shape, generator=generator))
        if k == 0:
            timesteps.append(0)
        else:
            first, last = ranges[k - 1]
            timesteps.append(first + int(u * (last - first + 1)))
    return torch.tensor(timesteps), torch.stack(noise)


@torch.no_grad()
def predict_x_0(model: Callable[..., torch.Tensor], scheduler: NoiseScheduler, prediction: str, x_0: torch.Tensor,
                t: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Add noise to x_0, and return what the model takes for the clean image."""
    x_t = scheduler.add_noise(x_0, t, noise)
    output = model(x_t, t) if labels is None else model(x_t, t, labels)
    return scheduler.to_x_0(prediction, output.float(), x_t, t)


def _prior_term(scheduler: NoiseScheduler, x_0: torch.Tensor) -> torch.Tensor:
    """Return L_T, the KL divergence of q(x_T | x_0) from a standard normal, in nats: float64 [N]."""
    abar = scheduler.alpha_bar(scheduler.num_timesteps - 1)
    return 0.5 * (abar * (x_0**2 - 1) - math.log1p(-abar)).sum(dim=(1, 2, 3))


def _coefficients(scheduler: NoiseScheduler, variance: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the coefficients of the terms, by (28) and (30) of DIFFUSION_THEORY.md.

    Returns:
        constant, weight: float64 [T], entry 0 unused. The term of t is, in nats, constant[t] for each value of an
            image, plus weight[t] times the squared error of x_0.
        decoder_std: standard deviation of the last step.
    """
    abar = torch.tensor([scheduler.alpha_bar(t) for t in range(scheduler.num_timesteps)], dtype=torch.float64)
    abar_before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / abar_before
    beta_tilde = beta * (1 - abar_before) / (1 - abar)
    x_0_coefficient = abar_before.sqrt() * beta / (1 - abar)  # of x_0 in the mean of a step
    if variance == "beta_tilde":
        constant, sigma_squared, last = torch.zeros_like(beta), beta_tilde, beta_tilde[1]
    else:
        ratio = beta_tilde / beta
        constant, sigma_squared, last = 0.5 * (ratio - 1 - ratio.log()), beta, beta[0]
    return constant, x_0_coefficient**2 / (2 * sigma_squared), last.sqrt().item()


# ---------------------------------------------------------------------------------------------------------------------
# training images against unseen ones


def generalisation_gap(train: Bound, unseen: Bound, detail: tuple[torch.Tensor, torch.Tensor] | None = None
                       ) -> tuple[float, float]:
    """Return how many more bits per dimension unseen images cost than training images, and its standard error.

    Most of the error is the variation among images: detailed ones cost more bits, whether seen or not. `detail`, a
    number for each training and each unseen image such as `png_bits`, removes this (see `adjusted_difference`).
    """
    if detail is None:
        return unseen.mean - train.mean, math.hypot(train.stderr, unseen.stderr)
    return adjusted_difference(train.bits, unseen.bits, detail)


def png_bits(images: torch.Tensor) -> torch.Tensor:
    """Measure the detail of images, uint8 [N, 3, S, S]: bits per dimension as a PNG file, float64 [N]."""
    sizes = []
    for image in images:
        file = io.BytesIO()
        to_pil(image).save(file, format="PNG", optimize=True)
        sizes.append(8 * file.tell() / image.numel())
    return torch.tensor(sizes, dtype=torch.float64)
