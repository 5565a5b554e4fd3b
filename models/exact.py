"""Exact denoisers: what a perfect network answers, for data whose distribution is known. Nothing is trained.

    denoiser = ExactDenoiser(points, scheduler)                       # points [N, ...], any shape of images
    images = sample(denoiser, scheduler, x_T, prediction="x0")        # as any other network

Both predict x_0, and stand wherever a network may. DIFFUSION_THEORY.md derives them.
"""

from __future__ import annotations

import math

import torch

from forward_diffusion import NoiseScheduler


class ExactDenoiser:
    """E[x_0 | x_t] where the data are N given images, all equally likely (Karras et al. 2022, appendix B.3).

    No network has a lower training loss on these images, and none copies them more faithfully.

    Args:
        data: images [N, ...], floating point.
        scheduler: the noise schedule.
    """

    def __init__(self, data: torch.Tensor, scheduler: NoiseScheduler):
        self.data, self.scheduler = data, scheduler

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the expected x_0 of x_t [B, ...] at timesteps t [B]: a mean of the data, weighted by Bayes' rule."""
        weights = torch.softmax(self.log_kernels(x_t, t), dim=1)
        return (weights @ self.data.flatten(1).to(x_t)).view_as(x_t)

    def log_density(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return ln p(x_t) [B], the noised data's log-density; its gradient is the score."""
        return torch.logsumexp(self.log_kernels(x_t, t), dim=1) - math.log(len(self.data))

    def log_kernels(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return ln q(x_t | x_0) [B, N] of each x_t and each image of the data."""
        x, data = x_t.flatten(1), self.data.flatten(1).to(x_t)
        kernels = x.new_empty(len(x), len(data))
        for value in t.unique().tolist():
            rows, abar = t == value, self.scheduler.alpha_bar(value)
            # Not through matrix products, whose rounding would be as large as the variance at small t.
            distances = torch.cdist(x[rows], abar**0.5 * data, compute_mode="donot_use_mm_for_euclid_dist")
            kernels[rows] = (-distances**2 / (1 - abar) - x.shape[1] * math.log(2 * math.pi * (1 - abar))) / 2
        return kernels


class GaussianDenoiser:
    """E[x_0 | x_t] where each value of the image is Gaussian and independent of the others.

    x_t = a x_0 + b eps is then Gaussian with mean a `mean` and variance a^2 std^2 + b^2, and its covariance with x_0 is
    a std^2, so that the expectation is linear in x_t.

    Args:
        mean, std: of x_0; they broadcast to its shape.
        scheduler: the noise schedule.
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, scheduler: NoiseScheduler):
        self.mean, self.std, self.scheduler = mean, std, scheduler

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the expected x_0 of x_t [B, ...] at the timesteps t [B], which must all be equal."""
        if not (t == t[0]).all():
            raise ValueError("GaussianDenoiser takes one timestep for the whole batch")
        abar = self.scheduler.alpha_bar(int(t[0]))
        mean, variance = self.mean.to(x_t), self.std.to(x_t) ** 2
        return mean + abar**0.5 * variance * (x_t - abar**0.5 * mean) / (abar * variance + 1 - abar)

    def flow(self, x_t: torch.Tensor, t: int, s: int) -> torch.Tensor:
        """Follow the probability flow from t to s: the number of standard deviations from the mean stays the same."""
        abar_t, abar_s = self.scheduler.alpha_bar(t), self.scheduler.alpha_bar(s)
        mean, variance = self.mean.to(x_t), self.std.to(x_t) ** 2
        ratio = ((abar_s * variance + 1 - abar_s) / (abar_t * variance + 1 - abar_t)) ** 0.5
        return abar_s**0.5 * mean + ratio * (x_t - abar_t**0.5 * mean)
