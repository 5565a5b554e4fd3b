"""Data with known answers: four pixels, each Gaussian with its own mean and standard deviation, or correlated."""

from __future__ import annotations

from collections.abc import Callable

import torch

from forward_diffusion import NoiseScheduler
from models.exact import GaussianDenoiser
from reverse_diffusion import SAMPLERS, sample

MEAN = torch.tensor([[-0.6, -0.2], [0.1, 0.6]], dtype=torch.float64)
STD = torch.tensor([[0.1, 0.25], [0.5, 0.35]], dtype=torch.float64)


def exact(scheduler: NoiseScheduler, prediction: str = "eps", mean: torch.Tensor = MEAN, std: torch.Tensor = STD
          ) -> Callable[..., torch.Tensor]:
    """Return the optimal network for those pixels.

    With labels [B, 1] the mean of an image is `mean` times 1 + its label.
    """
    def model(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        assert t.shape == (len(x_t),)
        abar = scheduler.alpha_bar(t[0].item())
        a, b = abar**0.5, (1 - abar) ** 0.5
        mu = mean.to(x_t) if labels is None else mean.to(x_t) * (1 + labels.to(x_t)[:, :, None, None])
        x_0 = GaussianDenoiser(mu, std, scheduler)(x_t, t)
        eps = (x_t - a * x_0) / b
        return {"eps": eps, "x0": x_0, "v": a * eps - b * x_0}[prediction]

    return model


def exact_of_covariance(scheduler: NoiseScheduler, covariance: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return the optimal network that predicts x_0, for pixels of mean `MEAN` with a covariance [4, 4] between them."""
    def model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = scheduler.alpha_bar(t[0].item())
        gain = abar**0.5 * torch.linalg.solve(abar * covariance + (1 - abar) * torch.eye(4).to(covariance), covariance)
        return MEAN + ((x_t - abar**0.5 * MEAN).flatten(1) @ gain).view_as(x_t)

    return model


def start(n: int, seed: int = 0) -> torch.Tensor:
    """Return x_T, standard normal [n, 1, 2, 2], float64."""
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded_noise(x_T: torch.Tensor, seed: int = 1) -> Callable[[], torch.Tensor]:
    """Return a `draw_noise` for `sample` that draws the same noise in the same order each time it is made."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x_T.shape, generator=generator, dtype=x_T.dtype)


def flow(scheduler: NoiseScheduler, x_t: torch.Tensor, t: int, s: int) -> torch.Tensor:
    """Follow the probability flow of those pixels from t to s."""
    return GaussianDenoiser(MEAN, STD, scheduler).flow(x_t, t, s)


def exact_consistency(scheduler: NoiseScheduler, mean: torch.Tensor = MEAN, std: torch.Tensor = STD
                      ) -> Callable[..., torch.Tensor]:
    """Return the network, of v, whose predicted x_0 is where the probability flow of those pixels leads."""
    def model(x_t: torch.Tensor, t: torch.Tensor, *_: torch.Tensor, **__: torch.Tensor) -> torch.Tensor:
        exactly = GaussianDenoiser(mean, std, scheduler)
        outputs = []
        for x, u in zip(x_t.double(), t.tolist()):
            abar = scheduler.alpha_bar(u)
            outputs.append((abar**0.5 * x - exactly.flow(x, u, -1)) / (1 - abar) ** 0.5)
        return torch.stack(outputs).to(x_t.dtype)

    return model


def law(scheduler: NoiseScheduler, mean: torch.Tensor = MEAN, std: torch.Tensor = STD, *, steps: int | None = None,
        prediction: str = "x0", network: Callable | None = None, sampler: str = "ddpm", **options
        ) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Compute (timestep s, mean, variance) of x_s after each step, from x_T with the mean and variance of q(x_T).

    With the exact network, or any linear one, and without the clip, every step is linear: x_s is the sum of the
    contributions of the mean of x_T, of x_T's deviation from it, and of each step's noise. One row of a batch follows
    each of these; the rows are independent of each other, so the variance is the sum of their squares.
    """
    timesteps = SAMPLERS[sampler].timesteps(scheduler.num_timesteps, steps) + [-1]
    abar_T, draws, path = scheduler.alpha_bar(timesteps[0]), iter(range(2, len(timesteps) + 1)), []
    x_T = (abar_T**0.5 * mean).repeat(len(timesteps) + 1, 1, 1, 1)
    x_T[1] += (abar_T * std**2 + 1 - abar_T) ** 0.5

    def unit_noise():
        noise = torch.zeros_like(x_T)
        noise[next(draws)] = 1
        return noise

    def follow(i, x_s, x_0):
        path.append((timesteps[i + 1], x_s[0, 0], ((x_s[1:] - x_s[0]) ** 2).sum(dim=0)[0]))

    sample(network or exact(scheduler, prediction, mean, std), scheduler, x_T, steps=steps, prediction=prediction,
           sampler=sampler, clip=False, draw_noise=unit_noise, callback=follow, **options)
    return path
