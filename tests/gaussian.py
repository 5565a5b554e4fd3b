"""Data whose answers are known: four pixels, each Gaussian with a mean and a standard deviation of its own."""

import torch

from forward_diffusion import NoiseScheduler

MEAN = torch.tensor([[-0.6, -0.2], [0.1, 0.6]], dtype=torch.float64)
STD = torch.tensor([[0.1, 0.25], [0.5, 0.35]], dtype=torch.float64)


def exact(scheduler: NoiseScheduler, prediction: str = "eps", mean: torch.Tensor = MEAN, std: torch.Tensor = STD):
    """The best possible network for those pixels.

    x_t = a x_0 + b eps is Gaussian with mean a `mean` and variance a^2 std^2 + b^2, and its covariances with x_0 and
    eps are a std^2 and b. So E[x_0 | x_t] and E[eps | x_t] are straight lines in x_t, and E[v | x_t] follows from them.
    With types [B, 1] the mean of an image is `mean` times 1 + its type.
    """
    def model(x_t: torch.Tensor, t: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        assert t.shape == (len(x_t),) and (t == t[0]).all()
        abar = scheduler.alpha_bar(t[0].item())
        a, b = abar**0.5, (1 - abar) ** 0.5
        mu = mean.to(x_t) if types is None else mean.to(x_t) * (1 + types.to(x_t)[:, :, None, None])
        off = (x_t - a * mu) / (a**2 * std.to(x_t) ** 2 + b**2)
        x_0, eps = mu + a * std.to(x_t) ** 2 * off, b * off
        return {"eps": eps, "x0": x_0, "v": a * eps - b * x_0}[prediction]

    return model


def start(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flow(scheduler: NoiseScheduler, x_t: torch.Tensor, t: int, s: int) -> torch.Tensor:
    """Where the probability flow carries x_t at s: as many standard deviations from the mean as it was at t."""
    abar_t, abar_s = scheduler.alpha_bar(t), scheduler.alpha_bar(s)
    at_t, at_s = ((abar * STD**2 + 1 - abar) ** 0.5 for abar in (abar_t, abar_s))
    return abar_s**0.5 * MEAN + at_s / at_t * (x_t - abar_t**0.5 * MEAN)
