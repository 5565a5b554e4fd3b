"""How many bits does the model need to write a picture down? The variational bound, term by term.

    bound = variational_bound(model, scheduler, images, prediction="v")     # images uint8 [N, 3, S, S]
    print(bound.mean, bound.stderr)                                         # bits a dimension

Fewer bits mean that the model expected the picture more. It is the bound of Ho et al. (2020, eq. 5), which
DIFFUSION_THEORY.md derives in section 5: L_T + L_{T-1} + ... + L_1 + L_0, in bits for each of the 3 S S numbers of a
picture (Nichol & Dhariwal 2021 and most papers give it so). What is chosen here, and why:

- The variances of the learned steps are beta, one of the two fixed choices of Ho et al. (section 3.2). Both give a
  bound, so the lower one says more, and that was beta wherever it was tried: 4.28 bits against 4.72 for a model of
  Pokemon. For a network that is not exact beta-tilde is too narrow where there is little noise left, and a Gaussian
  that is too narrow costs much. `sample` draws with either; "beta_tilde" is a parameter here as it is there.
- At the last step, to the clean picture, beta-tilde is 0. As in the code of Ho et al., it takes that of the step before
  there. The Gaussian is integrated over the bin of each 8-bit value (Ho et al. 2020, eq. 13).
- The predicted clean picture is kept within [-1, 1], as when sampling. Pictures lie there, so this can only bring it
  nearer to the true one, and the bound down.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from forward_diffusion import NoiseScheduler, seed_from
from pictures import to_image
from reverse_diffusion import VARIANCES


@dataclass
class Bound:
    """The bound of N pictures in bits a dimension, by term. Timesteps are counted from 0, as everywhere in the code.

    prior: [N], L_T of the papers: what it costs that x_T is not quite pure noise.
    steps: [N, K], the terms of t = 1 ... T-1, summed within K ranges of t. Estimates, unless every t was visited.
    decoder: [N], L_0 of the papers: what it costs to name the 8-bit values at the end.
    ranges: the K ranges (first t, last t).
    """

    prior: torch.Tensor
    steps: torch.Tensor
    decoder: torch.Tensor
    ranges: list[tuple[int, int]]

    @property
    def bits(self) -> torch.Tensor:
        """The bound of each picture, float64 [N]."""
        return self.prior + self.steps.sum(dim=1) + self.decoder

    @property
    def mean(self) -> float:
        return self.bits.mean().item()

    @property
    def stderr(self) -> float:
        """Standard error of the mean: how it would vary with other pictures, other noise and other timesteps."""
        return _stderr(self.bits)


def variational_bound(
    model: Callable[..., torch.Tensor],
    scheduler: NoiseScheduler,
    images: torch.Tensor,
    *,
    limit: float = 1.0,
    prediction: str = "eps",
    types: torch.Tensor | None = None,
    num_timesteps: int | None = 16,
    variance: str = "beta",
    clip: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    callback: Callable[[int], None] | None = None,
) -> Bound:
    """The bound of pictures uint8 [N, 3, S, S]; with `types`, float [N, K], given each picture's types.

    Args:
        model: any callable (x_t, t[, types]) -> output; the images reach it as float32 in [-1, 1] on `device`.
        limit: where the images are the latents of pictures, what 255 stands for, and 0 for its opposite: they then
            reach the model in [-limit, limit], and have any number of channels.
        num_timesteps: how many of t = 1 ... T-1 to visit a picture, one drawn from each of so many ranges; the ranges
            grow with t since the terms are largest and change fastest near 0. None visits all of them.
        callback: called after each batch with the number of passes in it; N (1 + num_timesteps) in all.
        seed: noise and timesteps of picture i come from (seed, i), so that two models are asked the same questions.

    Raises:
        ValueError: for an unknown variance or prediction, or fewer than 1 timesteps.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}: choose one of {', '.join(VARIANCES)}")
    ranges = _ranges(scheduler.num_timesteps, num_timesteps)
    width = torch.tensor([high - low + 1 for low, high in ranges])
    constant, weight, decoder_std = _coefficients(scheduler, variance)
    numbers = images[0].numel()
    in_bits = 1 / (numbers * math.log(2))

    # Each picture is asked at t = 0 and once in each range. Batches are made of such questions, of several pictures.
    asked = 1 + len(ranges)
    terms = torch.empty(len(images) * asked, dtype=torch.float64)
    decoder = torch.empty(len(images), dtype=torch.float64)
    for low in range(0, len(terms), batch_size):
        questions = [divmod(q, asked) for q in range(low, min(low + batch_size, len(terms)))]
        draws = [_draw(seed_from(seed, i, k, stream="likelihood"), images[0].shape) for i, k in questions]
        t = [0 if k == 0 else ranges[k - 1][0] + int(u * width[k - 1]) for (_, k), (u, _) in zip(questions, draws)]
        t = torch.tensor(t)
        of = torch.tensor([i for i, _ in questions])
        x_0 = limit * (images[of].to(device).float() / 127.5 - 1)
        told = () if types is None else (types[of].to(device),)
        t_there = t.to(device)
        x_t = scheduler.add_noise(x_0, t_there, torch.stack([noise for _, noise in draws]).to(device))
        with torch.no_grad():
            output = model(x_t, t_there, *told).float()
        guess = scheduler.to_x_0(prediction, output, x_t, t_there)
        if clip:
            guess = guess.clamp(-limit, limit)
        squared = (guess - x_0).double().square().sum(dim=(1, 2, 3)).cpu()
        terms[low : low + batch_size] = numbers * constant[t] + weight[t] * squared
        if callback is not None:
            callback(len(questions))
        last = t == 0
        if last.any():
            log_p = log_likelihood_of_levels(images[of[last]], guess.cpu()[last] / limit, decoder_std / limit)
            decoder[of[last]] = -log_p.sum(dim=(1, 2, 3))
    steps = terms.view(len(images), asked)[:, 1:] * width

    x_0 = limit * (images.double() / 127.5 - 1)
    abar = scheduler.alpha_bar(scheduler.num_timesteps - 1)
    prior = 0.5 * (abar * (x_0**2 - 1) - math.log1p(-abar)).sum(dim=(1, 2, 3)) * in_bits
    return Bound(prior, steps * in_bits, decoder * in_bits, ranges)


def log_likelihood_of_levels(images: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """Log probability, in nats, of each 8-bit value under a Gaussian around `mean` (Ho et al. 2020, eq. 13).

    `images` uint8 and `mean` in [-1, 1] have one shape. Value v stands at v / 127.5 - 1 and owns what lies within
    1/255 of it; 0 and 255 own everything beyond as well, so that the 256 probabilities add up to 1.
    """
    x, mean = images.double() / 127.5 - 1, mean.double()
    low = torch.where(images == 0, -math.inf, (x - 1 / 255 - mean) / std)
    high = torch.where(images == 255, math.inf, (x + 1 / 255 - mean) / std)
    # Both ends in the lower tail, by symmetry, and the difference in logarithms: far out, each alone would be 0 or 1.
    mirror = low + high > 0
    low, high = torch.where(mirror, -high, low), torch.where(mirror, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log1p(-torch.exp(log_low - log_high))


def gap(seen: Bound, unseen: Bound, detail: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[float, float]:
    """How many more bits a dimension unseen pictures take than those trained on, and the standard error of that.

    The two sets are different pictures, and most of the error is how much pictures differ among themselves: one with
    more detail takes more bits, seen or not. `detail`, a number for each seen and each unseen picture such as
    `png_bits`, takes that out by a straight line fitted to both sets (an analysis of covariance).
    """
    if detail is None:
        return unseen.mean - seen.mean, math.hypot(seen.stderr, unseen.stderr)
    y, x = torch.cat([seen.bits, unseen.bits]), torch.cat(detail).double()
    group = torch.cat([torch.zeros(len(seen.bits)), torch.ones(len(unseen.bits))]).double()
    columns = torch.stack([torch.ones_like(x), group, x - x.mean()], dim=1)
    inverse = torch.linalg.pinv(columns)  # [3, N]
    fitted = inverse @ y
    residual = (y - columns @ fitted) * (len(y) / max(1, len(y) - 3)) ** 0.5
    return fitted[1].item(), ((inverse[1] * residual) ** 2).sum().sqrt().item()  # the sets may vary unequally (White)


def png_bits(images: torch.Tensor) -> torch.Tensor:
    """How much detail pictures uint8 [N, 3, S, S] have: the bits a dimension of each as a PNG file, float64 [N]."""
    sizes = []
    for image in images:
        file = io.BytesIO()
        to_image(image).save(file, format="PNG", optimize=True)
        sizes.append(8 * file.tell() / image.numel())
    return torch.tensor(sizes, dtype=torch.float64)


def _draw(seed: int, shape: torch.Size) -> tuple[float, torch.Tensor]:
    """A number in [0, 1) and standard normal noise, from one seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((), generator=generator, dtype=torch.float64).item(), torch.randn(shape, generator=generator)


def _ranges(num_timesteps: int, count: int | None) -> list[tuple[int, int]]:
    """t = 1 ... T-1 cut into `count` ranges (first, last), or one for each t; each is wider than the one before."""
    last = num_timesteps - 1
    if count is None or count >= last:
        return [(t, t) for t in range(1, last + 1)]
    if count < 1:
        raise ValueError(f"the number of timesteps to visit must be at least 1, not {count}")
    edges = [1]
    for k in range(1, count):  # as near to geometric as whole numbers allow, with room for the ranges that follow
        edges.append(min(max(edges[-1] + 1, round((last + 1) ** (k / count))), last + 1 - (count - k)))
    return list(zip(edges, [edge - 1 for edge in edges[1:]] + [last]))


def _coefficients(scheduler: NoiseScheduler, variance: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """By (11) and (12) of DIFFUSION_THEORY.md: the term of t is, in nats, constant[t] a number of the picture, plus
    weight[t] times the squared error of x_0; float64 [T] each, entry 0 unused. And the deviation of the last step."""
    abar = torch.tensor([scheduler.alpha_bar(t) for t in range(scheduler.num_timesteps)], dtype=torch.float64)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / before
    beta_tilde = beta * (1 - before) / (1 - abar)
    of_x_0 = before.sqrt() * beta / (1 - abar)  # what an error in x_0 does to the mean
    if variance == "beta_tilde":
        constant, sigma2 = torch.zeros_like(beta), beta_tilde
    else:
        ratio = beta_tilde / beta
        constant, sigma2 = 0.5 * (ratio - 1 - ratio.log()), beta
    last = beta_tilde[1] if variance == "beta_tilde" else beta[0]
    return constant, of_x_0**2 / (2 * sigma2), last.sqrt().item()


def _stderr(values: torch.Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else math.nan
